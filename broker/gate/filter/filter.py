"""The judgement of a connection: bytes and descriptors in, bytes and descriptors out. No I/O.

Read the theory of operation in connection_state.py first. The fast path is here: a message whose header bytes were
judged before costs a slice and a look-up, and a run of such messages is passed on in a single slice. Every other message is
cut out whole and handed to `AppMessages` or `BusMessages`.

The caller feeds what was read, then sends all of `state.to_bus` and `state.to_app`. While `held` is true the caller does
not read from the app, for one of three reasons:

    reason                                            ends by
    a message needs an answer of the bus              `feed_bus`, which brings the answer
    a chore is not done (chores.py)                   `do_chores`, once a turn
    too much was judged in this turn (`yielded`)      `resume_reading`, in a later turn

`spent` is the cost of the app's messages, and `answered` the cost of the replies to the app's calls. The caller charges
the sandbox and sets both to 0. Other messages of the bus are charged here to the sandboxes that caused such messages
(payers.py), and `billed` is the time that these took.
"""

import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from broker.gate.dumps import ChunkDump, Fds, FilterDump, HandoverError, pick
from broker.gate.filter.access_change import AccessChange
from broker.gate.filter.bus_state import BusState
from broker.gate.filter.connection_state import ConnectionState, KnownNote, SandboxView
from broker.gate.filter.costs import BUSY_SECOND, BYTES_A_MESSAGE, HEARD_COST, JUDGED_COST
from broker.gate.filter.driver_calls import BusDriverCalls
from broker.gate.filter.from_app import AppMessages
from broker.gate.filter.from_bus import Arrived, BusMessages
from broker.gate.filter.message_runs import Place, match_call_run, match_reply_run
from broker.gate.filter.name_owners import NameOwners
from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL, InterceptedCall
from broker.gate.filter.receive_buffer import ReceiveBuffer
from broker.gate.filter.unreadable import AWAITED, MAX_HEADER, TOO_LARGE, leave_out
from broker.gate.filter.verdict_cache import KINDS
from broker.gate.filter.visibility import NameVisibility
from broker.gate.output import EMPTY_QUEUE, Output
from broker.wire.errors import PeerProtocolError, PeerQuotaError
from broker.wire.fixed_header import FIXED, REPLIES, SIGNALS, U32
from broker.wire.header import (
    BUS_LIMITS,
    FIXED_SIZE,
    READ_LIMITS,
    Header,
    measure,
    measure_header,
    parse_header,
)
from broker.wire.skim import skim_fixed, skim_header
from policy.match import Judge

_SIGNALS: Final = frozenset(SIGNALS)


class Filter:
    """The judge of a connection of a sandbox to a bus."""

    def __init__(
        self,
        bus: BusState,
        sandbox: SandboxView,
        judge: Judge,
        *,
        app_takes_fds: bool,
        judged_a_turn: int = sys.maxsize,
        clock: Callable[[], float],
    ) -> None:
        self.state: Final = ConnectionState(bus, sandbox, judge, app_takes_fds=app_takes_fds)
        self.held = False
        self.yielded = False
        self.spent = self.answered = 0
        self.billed = 0.0
        self._clock: Final = clock
        self._turn = judged_a_turn * JUDGED_COST
        self._owners: Final = NameOwners(self.state, self._synced)
        self._visibility: Final = NameVisibility(self.state, self._owners)
        driver = BusDriverCalls(self.state, self._owners, self._visibility)
        self._app_messages: Final = AppMessages(self.state, self._owners, self._visibility, driver)
        self._bus_messages: Final = BusMessages(self.state, self._owners, self._visibility)
        self._access_change: Final = AccessChange(self.state, self._owners, self._visibility)
        self.from_app: Final = ReceiveBuffer(sandbox)
        self._from_bus: Final = ReceiveBuffer(None)
        # Messages of the bus that wait for owners or chores. Later messages wait behind these, to stay in order.
        self._stash: deque[Arrived] = EMPTY_QUEUE
        self._stashed_bytes = 0
        self._wake = False
        self._pending: Final = self.state.pending
        self._verdicts: Final = self.state.verdicts
        self._recorder: Final = sandbox.recorder
        self._budgets: Final = bus.payers.budgets

    # -- rules ---------------------------------------------------------------------------------------

    def change_rules(self, judge: Judge) -> None:
        """Judge every message from now on by these rules."""
        self._access_change.apply(judge)
        self._release_held()
        self.held = self.held or bool(self.state.chores)

    def do_chores(self) -> None:
        """Do a slice of the chores. Raises as `feed_bus` does."""
        start = self._clock()
        self.state.chores.do_slice()
        took = self._clock() - start
        self.state.bus.payers.charge(self.state.unique_name, int(took * BUSY_SECOND))
        self._release_held()
        if self.state.chores:
            self.held = True
        elif self.held and not self.yielded:
            self.held = False
            self.feed_app(b"")

    @property
    def is_changing(self) -> bool:
        """Return whether the app has still to be told of names that a change of rules hid."""
        return self._access_change.changing > 0

    def resume_reading(self) -> None:
        """Continue after a yield. Raises as `feed_app` does."""
        if self.yielded:
            self.yielded, self.held = False, bool(self.state.chores)
            self.feed_app(b"")

    @property
    def bus_is_clear(self) -> bool:
        """Return whether nothing from the bus waits."""
        return self._from_bus.is_idle and not (self._stash or self.state.chores)

    @property
    def fds(self) -> int:
        """The number of descriptors that wait here."""
        waiting = sum(len(stashed.fds) for stashed in self._stash)
        return self.from_app.fd_count + self._from_bus.fd_count + waiting

    @property
    def tracked_names(self) -> int:
        """The number of names that are followed only because the app wrote to them."""
        return self._owners.extra_count

    @property
    def followed_names(self) -> int:
        """The number of names whose owner is followed."""
        return len(self._owners.names)

    def close(self) -> list[int]:
        """Return every descriptor that is still here: the caller closes them."""
        fds = self.from_app.take_fds() + self._from_bus.take_fds()
        for stashed in self._stash:
            fds += stashed.fds
        self._stash = EMPTY_QUEUE
        return fds

    # -- handing over ------------------------------------------------------------------------------------

    def dump(self, fds: Fds) -> FilterDump:
        """Return the state without the rules, with descriptors as indexes. Raises HandoverError."""
        if self.state.to_app or self.state.to_bus:
            raise HandoverError("something is still to be sent")
        told = self._access_change.known_to_app
        state = self.state.dump(self._owners.changes_of)
        return FilterDump(
            app_takes_fds=self.state.app_takes_fds,
            held=self.held,
            yielded=self.yielded,
            wake=self._wake,
            state=state,
            owners=self._owners.dump(state.asked_names()),
            recently_visible=tuple(self._visibility.recently_visible),
            known_to_app=None if told is None else tuple(sorted(told)),
            from_app=self.from_app.dump(fds),
            from_bus=self._from_bus.dump(fds),
            stash=tuple(ChunkDump(one.data, fds.put_all(one.fds)) for one in self._stash),
        )

    def load(self, dump: FilterDump, fds: Sequence[int]) -> None:
        """Restore the state from `dump`. Raises ValueError."""
        self.held, self.yielded, self._wake = dump.held, dump.yielded, dump.wake
        histories = self._owners.load(dump.owners, self._access_change.tell_new)
        self.state.load(dump.state, self._owners.since)
        del histories  # the waiting calls keep them alive now
        self._visibility.recently_visible.update(dict.fromkeys(dump.recently_visible))
        self._access_change.known_to_app = (
            None if dump.known_to_app is None else frozenset(dump.known_to_app)
        )
        self.from_app.load(dump.from_app, fds)
        self._from_bus.load(dump.from_bus, fds)
        for one in dump.stash:
            header = parse_header(one.data, 0, READ_LIMITS)
            self._put_by(Arrived(header, one.data, pick(fds, one.fds)))

    @property
    def fits_rules(self) -> bool:
        """Return whether the followed names are those of the rules, which may have changed in a hand-over."""
        return not self.state.unique_name or self._owners.uses == self.state.judge.uses

    # -- from the app ----------------------------------------------------------------------------------

    # `feed_app` and `feed_bus` are one function each, however long, because a call costs as much as a look-up.

    def feed_app(  # noqa: C901, PLR0912, PLR0915
        self, data: bytes, fds: Sequence[int] = ()
    ) -> None:
        """Take bytes from the app. Raises PeerProtocolError or PeerQuotaError: end the connection."""
        state, buffer = self.state, self.from_app
        plain = not fds and buffer.is_idle
        if not plain or self.held or not data:
            data = self._take_from_app(data, fds) or b""
            if not data:
                return
        end = len(data)
        pos = run = known = 0
        pending = self._pending.calls_to_bus
        room = state.sandbox.limits.pending_calls
        calls, tables = self._verdicts.app_calls, self._verdicts.app_tables
        kinds = KINDS if plain or not buffer.has_fds else {}
        unpack = FIXED.unpack_from
        while pos + FIXED_SIZE <= end:
            first, body, serial, fields = unpack(data, pos)
            kind = kinds.get(first)
            if kind is not None:
                table = tables[kind]
                start = pos + 16 + (fields + 7 & -8)
                stop = start + body
                replier = table.get(data[pos + 12 : start])
                if replier is not None and stop <= end and 0 < serial < FIRST_GATE_SERIAL:
                    if table is not calls:
                        pos = stop
                        known += 1
                        continue
                    if serial not in pending and len(pending) < room:
                        pending[serial] = replier
                        more = match_call_run(data, (pos, start, stop), pending, room)
                        known += 1 + more
                        pos = stop + (stop - pos) * more
                        continue
            elif kinds and first in REPLIES:
                stop = self.known_app_reply(data, pos, end, body, fields)
                if stop:
                    pos = stop
                    known += 1
                    continue
            if run < pos:
                pass_on(state.to_bus, self._recorder.note_from_app, data, run, pos)
            run, stop = pos, self._app_message(data, pos)
            if not stop:
                break
            run = pos = stop
        if run < pos:
            pass_on(state.to_bus, self._recorder.note_from_app, data, run, pos)
        self.spent += known
        if pos < end or not plain:
            buffer.consume(data, pos)

    def _take_from_app(self, data: bytes, fds: Sequence[int]) -> bytes | None:
        """Put bytes behind the held ones; return all bytes that can be judged now."""
        state = self.state
        buffer = self.from_app
        ready = buffer.feed(data, fds)
        if self.held:
            if ready is not None:
                buffer.unread(ready)
            return None
        if ready is None:
            if state.sandbox.bytes_held <= state.sandbox.limits.bytes_held or not buffer.held:
                return None
            # The room that was there when this message began was taken by other connections of the sandbox.
            ready = buffer.take_all()
        return ready

    def known_app_reply(self, data: bytes, pos: int, end: int, body: int, fields: int) -> int:
        """Answer a call by a reply of a known shape; return its end, or 0 for the slow path."""
        start = pos + 16 + (fields + 7 & -8)
        at = self._verdicts.app_reply_at.get(start - pos)
        if at is None or start + body > end:
            return 0
        at += pos
        caller = self._verdicts.app_replies.get(data[pos + 12 : at] + data[at + 4 : start])
        serial = U32.unpack_from(data, pos + 8)[0]
        if caller is None or not 0 < serial < FIRST_GATE_SERIAL:
            return 0
        key = (caller, U32.unpack_from(data, at)[0])
        if key not in self._pending.calls_to_app:
            return 0
        self._pending.calls_to_app.discard(key)
        return start + body

    def _app_message(self, data: bytes, pos: int) -> int:
        """Judge a message from the app; return its end, or 0 if the message has to wait."""
        buffer = self.from_app
        if self.spent >= self._turn:
            self.held = self.yielded = True
            return 0
        size = measure(data, pos)
        if pos + size > len(data):
            limit = self.state.sandbox.limits.bytes_held
            if self.state.sandbox.bytes_held + size <= limit:
                buffer.expect(size)
                return 0
            return self._refuse_too_large(data, pos, size)
        header = self._recorder.parse_from_app(data, pos)
        # `AppMessages` closes the descriptors of a dropped message. So the buffer keeps those of a message that waits.
        fds = buffer.peek_fds(header.unix_fds, pos)
        if header.unix_fds and not self.state.app_takes_fds:
            raise PeerProtocolError("file descriptors that were not negotiated")
        if not self._app_messages.message(header, data[pos : pos + size], fds):
            self.held = True
            return 0
        self.spent += JUDGED_COST
        buffer.drop_fds(len(fds))
        return pos + size

    def _refuse_too_large(self, data: bytes, pos: int, size: int) -> int:
        """Refuse a message that exceeds the sandbox's `bytes_held`, and skip the rest of it."""
        buffer = self.from_app
        header_size = measure_header(data, pos)
        if len(data) - pos < header_size:
            buffer.expect(header_size)
            return 0
        header = parse_header(data, pos)
        if header.unix_fds:
            raise PeerQuotaError("a message over the budget, with file descriptors")
        limit = self.state.sandbox.limits.bytes_held
        self._app_messages.refuse_too_large(
            header, f"a message of {size} bytes, with bytes_held={limit} in all for this sandbox"
        )
        buffer.skip(pos + size - len(data))
        return len(data)

    # -- from the bus ----------------------------------------------------------------------------------

    def feed_bus(  # noqa: C901, PLR0912, PLR0915
        self, arrived: bytes, fds: Sequence[int] = ()
    ) -> None:
        """Take bytes from the bus. Raises PeerProtocolError or PeerQuotaError: end the connection."""
        buffer = self._from_bus
        plain = not fds and buffer.is_idle
        data = arrived if plain else buffer.feed(arrived, fds)
        if data is None:
            return
        pos, run, end = 0, 0, len(data)
        answered = 0  # the size of replies to the app's calls
        chores, to_app = self.state.chores, self.state.to_app
        fast = not (buffer.has_fds or self._stash or chores)
        tables = self._verdicts.bus_tables
        unpack = FIXED.unpack_from
        while pos + FIXED_SIZE <= end:
            first, body, serial, fields = unpack(data, pos)
            start = pos + 16 + (fields + 7 & -8)
            stop = start + body
            if stop <= end:
                if first in REPLIES:
                    known = self._known_bus_reply(data, (pos, start, stop)) if fast else 0
                    if known:
                        answered += known - pos
                        pos = known
                        continue
                else:
                    kind = KINDS.get(first) if fast else None
                    if kind is not None:
                        table = tables[kind]
                        caller = table.get(data[pos + 12 : start])
                        if caller is not None and self.known_bus_call(
                            table, caller, serial, stop - pos
                        ):
                            pos = stop
                            continue
            if run < pos:
                pass_on(to_app, self._recorder.note_from_bus, data, run, pos)
            run, stop = pos, self._bus_message(data, pos)
            if not stop:
                break
            fast = fast and not (self._stash or chores)
            run = pos = stop
        if run < pos:
            pass_on(to_app, self._recorder.note_from_bus, data, run, pos)
        if pos < end or not plain:
            buffer.consume(data, pos)
        if self._wake:
            self._release_held()
        if chores:
            self.held = True
        self.answered += answered // BYTES_A_MESSAGE

    def _known_bus_reply(self, data: bytes, place: Place) -> int:
        """Answer calls by a run of replies of a known shape; return its end, or 0 for the slow path."""
        pos, start, stop = place
        verdicts, pending = self._verdicts, self._pending.calls_to_bus
        at = verdicts.bus_reply_at.get(start - pos)
        if at is None:
            return 0
        at += pos
        sender = verdicts.bus_replies.get(data[pos + 12 : at] + data[at + 4 : start])
        entry = pending.get(asked := U32.unpack_from(data, at)[0])
        if sender is None or entry is None or entry.owner != sender:
            return 0
        del pending[asked]
        return stop + (stop - pos) * match_reply_run(data, place, at, pending, sender)

    def known_bus_call(self, table: object, caller: str, serial: int, size: int) -> bool:
        """Record a known call to the app, or charge a mute one or a signal. False: the slow path is needed."""
        if table is self._verdicts.bus_calls:
            waiting = self._pending.calls_to_app
            if len(waiting) >= self.state.sandbox.limits.pending_calls:
                return False
            waiting.add((caller, serial))
        if (budget := self._budgets.get(caller)) is not None:
            budget.charge(1 + size // BYTES_A_MESSAGE)
        return True

    def _bus_message(self, data: bytes, pos: int) -> int:
        """Judge a message from the bus; return its end, or 0 if the message is not whole."""
        buffer = self._from_bus
        start = self._clock()
        size = measure(data, pos, BUS_LIMITS)
        if measure_header(data, pos, BUS_LIMITS) > MAX_HEADER:
            return self._leave_out(data, pos, size, TOO_LARGE)
        if pos + size > len(data):
            buffer.expect(size)
            return 0
        waits = self._stash or self.state.chores
        if not (waits or buffer.has_fds) and self._known_refusal(data, pos, size):
            return pos + size
        try:
            header = self._recorder.parse_from_bus(data, pos)
        except PeerProtocolError as exc:
            return self._leave_out(data, pos, size, str(exc))
        fds = buffer.peek_fds(header.unix_fds, pos)
        self._take_in(Arrived(header, data[pos : pos + size], fds), start)
        buffer.drop_fds(len(fds))
        return pos + size

    def _take_in(self, arrived: Arrived, start: float) -> None:
        """Judge a message from the bus, or queue it behind waiting ones."""
        waiting = len(self._pending.calls_to_bus)
        in_order = not (self._stash or self.state.chores) or self._cannot_wait(arrived.header)
        if not (in_order and self._hear(arrived, start)):
            self._put_by(arrived)
        if len(self._pending.calls_to_bus) < waiting:
            self.answered += len(arrived.data) // BYTES_A_MESSAGE
        # A single message may be as large as the bus allows.
        is_much = self._stashed_bytes > self.state.sandbox.limits.bytes_queued
        if is_much and len(self._stash) > 1:
            raise PeerQuotaError("too much arrived while the owners of names were asked for")

    def _put_by(self, arrived: Arrived) -> None:
        if self._stash is EMPTY_QUEUE:
            self._stash = deque()
        self._stash.append(arrived)
        self._stashed_bytes += len(arrived.data)

    def _leave_out(self, data: bytes, pos: int, size: int, why: str) -> int:
        """Skip a message whose header is not read; return as `_bus_message` does."""
        buffer = self._from_bus
        header_size = measure_header(data, pos, BUS_LIMITS)
        if pos + header_size > len(data):
            if data[pos + 1] in AWAITED:
                buffer.expect(header_size)
                return 0
            header = skim_fixed(
                data, pos
            )  # no program waits for a signal, so its header is not stored
        else:
            header = skim_header(data, pos)
        # Descriptors are sent with the beginning of their message.
        self.state.sandbox.close_fds(buffer.take_fds_before(pos + size))
        buffer.skip(max(0, pos + size - len(data)))
        start = self._clock()
        in_place = leave_out(self.state, header, why)
        cost = max(HEARD_COST, int((self._clock() - start) * BUSY_SECOND))
        self.state.bus.payers.charge(header.sender or "", cost + size // BYTES_A_MESSAGE)
        if in_place is not None:
            self._take_in(Arrived(parse_header(in_place), in_place, ()), self._clock())
        return min(pos + size, len(data))

    def _known_refusal(self, data: bytes, pos: int, size: int) -> bool:
        """Refuse a broadcast with a header that was refused before; return False for any other message."""
        refusals = self._verdicts.bus_refused
        first, _, _, fields = FIXED.unpack_from(data, pos)
        if not refusals or first not in _SIGNALS:
            return False
        header_size = FIXED_SIZE + (fields + 7 & -8)
        denial = refusals.get(data[pos + 12 : pos + header_size])
        if denial is None:
            return False
        self._recorder.note_from_bus(data, pos, header_size)
        self.state.sandbox.denied(self.state, denial)
        self.state.bus.payers.charge(denial.peer, 1 + size // BYTES_A_MESSAGE)
        return True

    def _hear(self, arrived: Arrived, start: float) -> bool:
        """Judge a message at the cost of the sandbox that caused the message. False: the message must wait."""
        header, data, fds = arrived
        if not self._bus_messages.message(header, data, fds):
            return False
        took = self._clock() - start
        self.billed += took
        self._bus_messages.charge(len(data) // BYTES_A_MESSAGE, int(took * BUSY_SECOND))
        return True

    def _cannot_wait(self, header: Header) -> bool:
        """Return whether others wait for this message: it answers Hello or a call of the gate's own."""
        entry = self._pending.calls_to_bus.get(header.reply_serial or 0)
        return isinstance(entry, InterceptedCall) and (entry.is_own or not self.state.unique_name)

    # -- waiting for owners ---------------------------------------------------------------------------

    def _synced(self) -> None:
        # Called from within a loop over a buffer. What waits is released when that loop is done.
        self._wake = True

    def _release_held(self) -> None:
        while self._wake and not self._owners.waiting:
            self._wake = False
            # One of these messages may begin a chore. The messages behind it wait for its end.
            while self._stash and not self._owners.waiting:
                arrived = self._stash.popleft()
                self._stashed_bytes -= len(arrived.data)
                waits = not self._hear(arrived, self._clock())
                assert not waits
            if not self._stash:
                self._stash = EMPTY_QUEUE
            if self.held and not (self.yielded or self._owners.waiting):
                self.held = False
                self.feed_app(b"")


def pass_on(out: Output, note: KnownNote, data: bytes, pos: int, end: int) -> None:
    """Pass on a run of known messages, from `pos` to `end`, and write down the first one."""
    out.append(data[pos:end])
    # Known headers are little-endian.
    note(data, pos, FIXED_SIZE + U32.unpack_from(data, pos + 12)[0])
