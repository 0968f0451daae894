"""Runs of messages that differ in their serials alone, behind a known message. No I/O.

A program that sends many messages repeats the same message. Once the first message of a run is known, the others are cut
out of the buffer by a C loop (`struct.iter_unpack`) and compared, which takes half the time of as many look-ups. A
message with another header, but for the serial, or with another size of the body ends the run.
"""

import functools
import struct
from collections.abc import MutableMapping
from typing import Final

from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL, InterceptedCall, Replier

# The fewest messages behind the first, by size. A shorter run costs more than the look-ups.
SHORTEST: Final = 3
# Remembered forms. Each is a size of the header with a size of the body.
_MAX_FORMS: Final = 256

# The positions of a message, of its body, and of its end.
Place = tuple[int, int, int]
Pending = MutableMapping[int, Replier | InterceptedCall]


def match_call_run(data: bytes, place: Place, pending: Pending, room: int) -> int:
    """Add to `pending` the calls behind and like the call at `place`; return the number of added calls.

    `pending` may have `room` calls in all, and has the call at `place` already.
    """
    pos, start, stop = place
    if _cannot_be_run(data, pos, stop, start - pos):
        return 0
    form = _call_form(start - pos - 12, stop - start)
    first, body, serial, key = form.unpack_from(data, pos)
    replier = pending[serial]
    left = room - len(pending)
    done = 0
    for word, size, serial, fields in form.iter_unpack(_following(data, pos, stop)):
        if fields != key or word != first or size != body or done >= left:
            break
        if serial in pending or not 0 < serial < FIRST_GATE_SERIAL:
            break
        pending[serial] = replier
        done += 1
    return done


def match_reply_run(data: bytes, place: Place, at: int, pending: Pending, sender: str) -> int:
    """Remove the calls answered by replies like the reply at `place`; return the number of removed calls.

    `at` is the position of REPLY_SERIAL in that reply, `sender` the connection that may reply.
    """
    pos, start, stop = place
    if _cannot_be_run(data, pos, stop, at - pos):
        return 0
    form = _reply_form(at - pos - 12, start - at - 4, stop - start)
    first, body, _, head, _, tail = form.unpack_from(data, pos)
    done = 0
    for word, size, _, before, asked, after in form.iter_unpack(_following(data, pos, stop)):
        if before != head or after != tail or word != first or size != body:
            break
        entry = pending.get(asked)
        if entry is None or entry.owner != sender:
            break
        del pending[asked]
        done += 1
    return done


def _cannot_be_run(data: bytes, pos: int, stop: int, size: int) -> bool:
    """Return whether too few bytes follow, or the next message differs in the first `size` bytes."""
    if len(data) - stop < (stop - pos) * SHORTEST:
        return True
    return data[pos + 12 : pos + size] != data[stop + 12 : stop + size]


def _following(data: bytes, pos: int, stop: int) -> memoryview:
    """Return the bytes behind a message, without a rest that is shorter than the message."""
    size = stop - pos
    return memoryview(data)[stop : stop + (len(data) - stop) // size * size]


# First word, size of the body, serial, size and bytes of the field array. The field array of a reply is in two parts.


@functools.lru_cache(_MAX_FORMS)
def _call_form(fields: int, body: int) -> struct.Struct:
    return struct.Struct(f"<III{fields}s{body}x")


@functools.lru_cache(_MAX_FORMS)
def _reply_form(before: int, after: int, body: int) -> struct.Struct:
    return struct.Struct(f"<III{before}sI{after}s{body}x")
