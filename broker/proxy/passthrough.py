"""A connection of a proxy that does not filter, where every valid message passes. No I/O.

Some checks remain. Only whole, strictly valid messages reach the bus, with exactly the descriptors
that the header counts, and without a sender or unknown fields from the app. Data from the bus is
split into messages only to keep descriptors with the right message.
"""

from collections.abc import Callable, Sequence
from typing import Final, NoReturn

from broker.gate.dumps import Fds, FilterDump, HandoverError
from broker.gate.filter.bus_state import BusState
from broker.gate.filter.connection_state import ConnectionState, SandboxView
from broker.gate.filter.costs import JUDGED_COST
from broker.gate.filter.from_app import KNOWN_FLAGS
from broker.gate.filter.from_bus import without_fds
from broker.gate.filter.receive_buffer import ReceiveBuffer
from broker.gate.output import Chunk
from broker.wire import errors
from broker.wire.errors import PeerProtocolError, PeerQuotaError
from broker.wire.header import (
    APP_LIMITS,
    BUS_LIMITS,
    FIXED_SIZE,
    Flag,
    Header,
    MessageType,
    measure,
    parse_header,
    serialise_header,
)
from broker.wire.marshal import read_reply
from broker.wire.skim import parse_or_skim
from policy.match import Judge

# The number and the largest size of app headers that are remembered as valid and clean. Together
# the headers take at most 256 KiB.
MAX_REMEMBERED: Final = 512
MAX_REMEMBERED_BYTES: Final = 512

_REPLIES: Final = (MessageType.METHOD_RETURN, MessageType.ERROR)
# The first word and the fields of a header, and whether there is a body. Together with the numbers
# that `measure` checks, these make a header valid.
_Key = tuple[bytes, bool]


class PassthroughFilter:
    """A `Mediator` (gate/sandbox/mediator.py) that judges nothing.

    No message ever waits here.
    """

    # The filter asks the bus nothing. So neither the app nor a message from the bus waits.
    held = yielded = is_changing = False
    bus_is_clear = fits_rules = True
    tracked_names = 0

    def __init__(
        self, bus: BusState, sandbox: SandboxView, judge: Judge, *, app_takes_fds: bool
    ) -> None:
        self.state: Final = ConnectionState(bus, sandbox, judge, app_takes_fds=app_takes_fds)
        self.state.reply_handlers.clear()  # Otherwise answers to the gate would reach the app.
        self.from_app: Final = ReceiveBuffer(sandbox)
        self._from_bus: Final = ReceiveBuffer(None)
        self.spent = self.answered = 0
        self.billed = 0.0
        self._clean: Final[set[_Key]] = set()

    @property
    def fds(self) -> int:
        """The number of descriptors whose message has not arrived yet."""
        return self.from_app.fd_count + self._from_bus.fd_count

    def resume_reading(self) -> None:
        """Do nothing, because no message waits."""

    def do_chores(self) -> None:
        """Do nothing, because there are no chores."""

    def change_rules(self, judge: Judge) -> None:
        """Store the rules, which judge nothing."""
        self.state.judge = judge

    def close(self) -> list[int]:
        """Return all remaining descriptors, which the caller closes."""
        return self.from_app.take_fds() + self._from_bus.take_fds()

    def dump(self, _fds: Fds) -> NoReturn:
        """Raise HandoverError, because a proxy has no next process."""
        raise HandoverError("connections of a proxy are not handed over")

    def load(self, _dump: FilterDump, _fds: Sequence[int]) -> NoReturn:
        """Raise HandoverError, because a proxy has no former process."""
        raise HandoverError("connections of a proxy are not handed over")

    # -- both directions ---------------------------------------------------------------------------

    def _split(
        self,
        buffer: ReceiveBuffer,
        whole: bytes,
        is_known: Callable[[bytes, int, int], bool],
        look_at: Callable[[bytes, int], None],
    ) -> None:
        """Split data into messages, and pass on runs of known messages as one piece each.

        `is_known` gets the data with the position and size of a message. `look_at` passes on any
        other message, or does not.
        """
        is_from_app = buffer is self.from_app
        limits = APP_LIMITS if is_from_app else BUS_LIMITS
        out = self.state.to_bus if is_from_app else self.state.to_app
        pos = run = 0
        while pos + FIXED_SIZE <= len(whole):
            size = measure(whole, pos, limits)
            if pos + size > len(whole):
                if is_from_app:
                    self._check_size(size)
                buffer.expect(size)
                break
            if not is_known(whole, pos, size):
                if run < pos:
                    out.append(whole[run:pos])
                look_at(whole[pos : pos + size], pos)
                run = pos + size
            pos += size
        if run < pos:
            out.append(whole[run:pos])
        buffer.consume(whole, pos)

    # -- from the app ------------------------------------------------------------------------------

    def feed_app(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes from the app. PeerProtocolError and PeerQuotaError end the connection."""
        whole = self.from_app.feed(data, fds)
        if whole is not None:
            self._split(self.from_app, whole, self._is_clean, self._look_at)

    def _is_clean(self, data: bytes, pos: int, size: int) -> bool:
        if self.from_app.has_fds or _key(data, pos, size) not in self._clean:
            return False
        self.spent += 1
        return True

    def _check_size(self, size: int) -> None:
        limit = self.state.sandbox.limits.bytes_held
        if self.state.sandbox.bytes_held + size > limit:
            raise PeerQuotaError(f"a message of {size} bytes, with bytes_held={limit} in all")

    def _look_at(self, data: bytes, at: int) -> None:
        """Pass on a message whose header is not remembered. Raises PeerProtocolError."""
        state = self.state
        self.spent += JUDGED_COST
        header = parse_header(data)
        fds = self.from_app.peek_fds(header.unix_fds, at)
        if fds and not state.app_takes_fds:
            raise PeerProtocolError("file descriptors that were not negotiated")
        self.from_app.drop_fds(len(fds))
        if header.type > MessageType.SIGNAL:  # The specification wants unknown types ignored.
            state.sandbox.close_fds(fds)
            return
        if _has_forgeries(header):
            data = serialise_header(header) + data[header.size :]
        elif not fds:
            self._remember(_key(data, 0, len(data)))
        state.to_bus.append(Chunk(data, fds) if fds else data)

    def _remember(self, key: _Key) -> None:
        if len(key[0]) <= MAX_REMEMBERED_BYTES:
            if len(self._clean) >= MAX_REMEMBERED:
                self._clean.clear()
            self._clean.add(key)

    # -- from the bus ------------------------------------------------------------------------------

    def feed_bus(self, arrived: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes from the bus. PeerProtocolError and PeerQuotaError end the connection."""
        whole = self._from_bus.feed(arrived, fds)
        if whole is not None:
            self._split(self._from_bus, whole, self._is_plain, self._bring)

    def _is_plain(self, _data: bytes, _pos: int, _size: int) -> bool:
        return bool(self.state.unique_name) and not self._from_bus.has_fds

    def _bring(self, data: bytes, at: int) -> None:
        """Pass a message with descriptors, or the answer to Hello, to the app."""
        state = self.state
        header = parse_or_skim(data)  # The app itself checks messages from the bus.
        fds = self._from_bus.peek_fds(header.unix_fds, at)
        self._from_bus.drop_fds(len(fds))
        if not state.unique_name and header.type == MessageType.METHOD_RETURN:
            state.unique_name = str(read_reply(header, data, "s")[0])
            state.sandbox.said_hello(state)
        if fds and not state.app_takes_fds:
            state.sandbox.close_fds(fds)
            self._refuse_fds(header)
            return
        state.deliver(data, fds)

    def _refuse_fds(self, header: Header) -> None:
        """Answer a message whose descriptors the app does not accept.

        An app that waits for a reply receives an error. The caller of a method receives an error
        too.
        """
        state = self.state
        if header.type in _REPLIES:
            state.deliver(without_fds(header)[1])
        elif header.type == MessageType.METHOD_CALL and not header.flags & Flag.NO_REPLY_EXPECTED:
            text = "The receiver takes no file descriptors"
            state.refuse_caller(header.sender or "", header.serial, errors.NOT_SUPPORTED, text)


def _key(data: bytes, pos: int, size: int) -> _Key:
    little = data[pos] == ord("l")
    body = int.from_bytes(data[pos + 4 : pos + 8], "little" if little else "big")
    return data[pos : pos + 4] + data[pos + 12 : pos + size - body], body > 0


def _has_forgeries(header: Header) -> bool:
    return bool(
        header.has_unknown
        or header.sender is not None
        or header.flags & ~KNOWN_FLAGS
        or (header.reply_serial is not None and header.type not in _REPLIES)
    )
