"""The fast path of a single message with known header bytes: a read, a look-up, a write.

Most apps send a single message at a time. Then the code around the judgement (calls, short lists, a
queue) costs more than the judgement. So an established connection has the handlers of this module
in the loop. A handler passes on a whole known message, if nothing waits that has to go first
(`SocketStream.is_clear`). Everything else goes to the slow path, exactly as read. filter/filter.py
describes the look-up, and why the look-up is enough.

    readable --> is_clear? --> recvmsg --> one whole message? --> known? --> write to the other side
                    | no                       | no                 | no
                    v                          v                    v
              stream.on_event            slow_path.app_sent, slow_path.bus_sent
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from broker.gate.filter.costs import BYTES_A_MESSAGE
from broker.gate.filter.filter import Filter
from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL
from broker.gate.filter.verdict_cache import KINDS
from broker.gate.io.loop import READABLE
from broker.gate.io.stream import READ_SIZE, RECEIVE, TRUNCATED, SocketStream, StreamClosedError
from broker.gate.sandbox.budgets import MessageBudget
from broker.gate.sandbox.meter import Meter
from broker.posix.descriptors import ANCILLARY_SIZE, Ancillary
from broker.wire.fixed_header import FIXED, REPLIES, U32
from broker.wire.header import FIXED_SIZE

# Shared by all connections, because a bound method takes 72 bytes.
_unpack: Final = FIXED.unpack_from
_unpack_serial: Final = U32.unpack_from

Handler = Callable[[int], None]
# Account for a message and return True to pass the message on. False: nothing was done, and the
# slow path judges.
TryForward = Callable[[bytes, int], bool]
# The slow path, with the bytes, ancillary data and flags of recvmsg.
Sent = Callable[[bytes, Sequence[Ancillary], int], None]


class SlowPath(Protocol):
    """The connection, which handles everything that the fast path does not."""

    def app_sent(self, data: bytes, ancillary: Sequence[Ancillary], flags: int) -> None:
        """Judge bytes from the app."""

    def bus_sent(self, data: bytes, ancillary: Sequence[Ancillary], flags: int) -> None:
        """Judge bytes from the bus."""

    def cut_short(self, stream: SocketStream, rest: bytes) -> None:
        """Send the rest of a message of which the other end took only a part."""

    def failed(self, exc: Exception) -> None:
        """End the connection because of an error other than BlockingIOError."""


@dataclass(frozen=True, slots=True)
class Accounting:
    """The filter of the connection, and the accounts that both paths charge."""

    judging: Filter
    budget: MessageBudget
    meter: Meter


def install_fast_path(
    slow_path: SlowPath, accounting: Accounting, app: SocketStream, bus: SocketStream
) -> None:
    """Pass known messages of an established connection on without the slow path."""
    app.set_handler(
        _make_handler(slow_path, app, bus, _make_app_note(accounting), slow_path.app_sent)
    )
    bus.set_handler(
        _make_handler(slow_path, bus, app, _make_bus_note(accounting), slow_path.bus_sent)
    )


def _make_handler(
    slow_path: SlowPath, source: SocketStream, target: SocketStream, note: TryForward, sent: Sent
) -> Handler:
    receive, target_fd = source.sock.recvmsg, target.fd

    def handle(events: int) -> None:
        if events != READABLE or not source.is_clear:
            source.on_event(events)
            return
        try:
            data, ancillary, flags, _ = receive(READ_SIZE, ANCILLARY_SIZE, RECEIVE)
            size = len(data)
            if size < FIXED_SIZE or ancillary or flags & TRUNCATED or not note(data, size):
                sent(data, ancillary, flags)
                return
            try:
                # Never waits, because the gate alone has this end of the connection, and made the
                # socket non-blocking.
                taken = os.write(target_fd, data)
            except OSError as exc:
                taken = _count_as_sent(exc, size)
            if taken != size:
                slow_path.cut_short(target, data[taken:])
        except Exception as exc:  # noqa: BLE001 - the connection handles each error
            slow_path.failed(exc)

    return handle


def _count_as_sent(exc: OSError, size: int) -> int:
    """Return how many bytes of a message need not be sent again. Raises StreamClosedError."""
    if isinstance(exc, BlockingIOError):
        return 0
    if isinstance(exc, ConnectionError):
        # The last bytes of the other end are still to be read. The connection ends afterwards.
        return size
    raise StreamClosedError from exc


def _make_app_note(accounting: Accounting) -> TryForward:
    judging, budget, meter = accounting.judging, accounting.budget, accounting.meter
    state = judging.state
    pending, calls, tables = (
        state.pending.calls_to_bus,
        state.verdicts.app_calls,
        state.verdicts.app_tables,
    )
    room = state.sandbox.limits.pending_calls
    trace = state.sandbox.recorder.note_from_app

    def note(data: bytes, size: int) -> bool:
        first, body, serial, fields = _unpack(data)
        start = 16 + (fields + 7 & -8)
        if start + body != size or not 0 < serial < FIRST_GATE_SERIAL:
            return False
        if budget.left <= 0 or meter.counted >= meter.ask_from:
            return False
        kind = KINDS.get(first)
        if kind is None:
            if first not in REPLIES or not judging.known_app_reply(data, 0, size, body, fields):
                return False
        else:
            table = tables[kind]
            answerer = table.get(data[12:start])
            if answerer is None:
                return False
            if table is calls:
                if serial in pending or len(pending) >= room:
                    return False
                pending[serial] = answerer
        cost = 1 + size // BYTES_A_MESSAGE
        budget.left -= cost
        meter.counted += cost
        trace(data, 0, start)
        return True

    return note


def _make_bus_note(accounting: Accounting) -> TryForward:
    judging, meter = accounting.judging, accounting.meter
    state = judging.state
    pending, tables = state.pending.calls_to_bus, state.verdicts.bus_tables
    reply_at, shapes = state.verdicts.bus_reply_at, state.verdicts.bus_replies
    trace = state.sandbox.recorder.note_from_bus

    def note(data: bytes, size: int) -> bool:
        first, body, serial, fields = _unpack(data)
        start = 16 + (fields + 7 & -8)
        if start + body != size:
            return False
        if first not in REPLIES:
            kind = KINDS.get(first)
            if kind is None:
                return False
            table = tables[kind]
            caller = table.get(data[12:start])
            if caller is None or not judging.known_bus_call(table, caller, serial, size):
                return False
            trace(data, 0, start)
            return True
        at = reply_at.get(start)
        if at is None:
            return False
        asked = _unpack_serial(data, at)[0]
        entry = pending.get(asked)
        # An unknown shape gives None, which is never equal to an owner.
        if entry is None or entry.owner != shapes.get(data[12:at] + data[at + 4 : start]):
            return False
        del pending[asked]
        if size >= BYTES_A_MESSAGE:
            answered = size // BYTES_A_MESSAGE
            meter.counted += answered
            meter.answered += answered
        trace(data, 0, start)
        return True

    return note
