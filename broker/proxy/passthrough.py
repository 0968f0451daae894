"""A connection of a proxy that does not filter: whatever is a valid message passes, both ways. No I/O.

What is left of the gate's care: only whole, strictly valid messages reach the bus, with the descriptors that
they name and no others, and without a sender or fields that the app made up. What the bus sends is cut into
messages only so that descriptors stay with theirs.
"""

from collections.abc import Sequence
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

# Headers of the app that were found valid and clean, and the longest of them: 256 KiB at the most.
MAX_REMEMBERED: Final = 512
MAX_REMEMBERED_BYTES: Final = 512

_REPLIES: Final = (MessageType.METHOD_RETURN, MessageType.ERROR)
# First word and fields of a header, and whether there is a body: all that makes it valid but for the
# numbers that `measure` checks.
_Key = tuple[bytes, bool]


class PassthroughFilter:
    """A `Mediator` (gate/sandbox/mediator.py) that judges nothing. No message ever waits in it."""

    # Nothing is asked for, so neither the app nor a message of the bus has to wait for an answer.
    held = yielded = is_changing = False
    bus_is_clear = fits_rules = True
    tracked_names = 0

    def __init__(
        self, bus: BusState, sandbox: SandboxView, judge: Judge, *, app_takes_fds: bool
    ) -> None:
        self.state: Final = ConnectionState(bus, sandbox, judge, app_takes_fds=app_takes_fds)
        self.state.reply_handlers.clear()  # the app would get the answers
        self.from_app: Final = ReceiveBuffer(sandbox)
        self._from_bus: Final = ReceiveBuffer(None)
        self.spent = self.answered = 0
        self.billed = 0.0
        self._clean: Final[set[_Key]] = set()

    @property
    def fds(self) -> int:
        """The number of descriptors that wait for their message."""
        return self.from_app.fd_count + self._from_bus.fd_count

    def resume_reading(self) -> None:
        """Do nothing: no message waits."""

    def do_chores(self) -> None:
        """Do nothing: there are no chores."""

    def change_rules(self, judge: Judge) -> None:
        """Keep other rules, by which nothing is judged either."""
        self.state.judge = judge

    def close(self) -> list[int]:
        """Return every descriptor that is still here: the caller closes them."""
        return self.from_app.take_fds() + self._from_bus.take_fds()

    def dump(self, _fds: Fds) -> NoReturn:
        """Raise HandoverError, because a proxy has no next process."""
        raise HandoverError("connections of a proxy are not handed over")

    def load(self, _dump: FilterDump, _fds: Sequence[int]) -> NoReturn:
        """Raise HandoverError, because a proxy has no former process."""
        raise HandoverError("connections of a proxy are not handed over")

    # -- from the app ------------------------------------------------------------------------------

    def feed_app(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take what the app sent. Raises PeerProtocolError or PeerQuotaError: end the connection."""
        buffer = self.from_app
        whole = buffer.feed(data, fds)
        if whole is None:
            return
        pos = run = 0
        out = self.state.to_bus
        while pos + FIXED_SIZE <= len(whole):
            size = measure(whole, pos)
            if pos + size > len(whole):
                self._check_size(size)
                buffer.expect(size)
                break
            if not buffer.has_fds and _key(whole, pos, size) in self._clean:
                self.spent += 1
                pos += size
                continue
            if run < pos:
                out.append(whole[run:pos])
            self._look_at(whole[pos : pos + size], pos)
            pos += size
            run = pos
        if run < pos:
            out.append(whole[run:pos])
        buffer.consume(whole, pos)

    def _check_size(self, size: int) -> None:
        limit = self.state.sandbox.limits.bytes_held
        if self.state.sandbox.bytes_held + size > limit:
            raise PeerQuotaError(f"a message of {size} bytes, with bytes_held={limit} in all")

    def _look_at(self, data: bytes, at: int) -> None:
        """Pass on a message whose header was not seen before. Raises PeerProtocolError."""
        state = self.state
        self.spent += JUDGED_COST
        header = parse_header(data)
        fds = self.from_app.peek_fds(header.unix_fds, at)
        if fds and not state.app_takes_fds:
            raise PeerProtocolError("file descriptors that were not negotiated")
        self.from_app.drop_fds(len(fds))
        if header.type > MessageType.SIGNAL:  # the specification wants unknown types ignored
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
        """Take what the bus sent. Raises PeerProtocolError or PeerQuotaError: end the connection."""
        buffer = self._from_bus
        whole = buffer.feed(arrived, fds)
        if whole is None:
            return
        pos = run = 0
        out = self.state.to_app
        while pos + FIXED_SIZE <= len(whole):
            size = measure(whole, pos, BUS_LIMITS)
            if pos + size > len(whole):
                buffer.expect(size)
                break
            if buffer.has_fds or not self.state.unique_name:
                if run < pos:
                    out.append(whole[run:pos])
                self._bring(whole[pos : pos + size], pos)
                run = pos + size
            pos += size
        if run < pos:
            out.append(whole[run:pos])
        buffer.consume(whole, pos)

    def _bring(self, data: bytes, at: int) -> None:
        """Pass a message to the app that has descriptors, or may be the answer to Hello."""
        state = self.state
        header = parse_or_skim(data)  # what a bus may deliver is the app's own matter
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
        """Say that the app takes no descriptors, to whoever waits to hear of the message."""
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
