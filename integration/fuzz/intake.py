"""Bytes come out of an intake in order, a descriptor never with a later message; all of it is accounted for.

An input is reads: how many bytes, how many descriptors, the bytes. A message begins with its length and
the number of its descriptors.
"""

from dataclasses import dataclass
from typing import Final

from broker.gate.filter.receive_buffer import ReceiveBuffer
from broker.wire.errors import PeerProtocolError
from integration.fuzz.pieces import Choices

_HEAD: Final = 2
_MAX_FDS: Final = 4
_MAX_SIZE: Final = 64


@dataclass(slots=True)
class _Account:
    bytes_held: int = 0


class _Reader:
    """Uses an intake as the gate does."""

    def __init__(self) -> None:
        self.account: Final = _Account()
        self.intake: Final = ReceiveBuffer(self.account)
        self.messages: Final[list[tuple[bytes, tuple[int, ...]]]] = []

    def read(self, data: bytes, fds: list[int]) -> None:
        taken = self.intake.feed(data, fds)
        if taken is None:
            return
        used = 0
        while len(taken) - used >= _HEAD:
            size = max(_HEAD, taken[used] % _MAX_SIZE)
            if len(taken) - used < size:
                self.intake.expect(size)
                break
            claimed = self.intake.peek_fds(taken[used + 1] % _MAX_FDS, used)
            self.intake.drop_fds(len(claimed))
            self.messages.append((taken[used : used + size], claimed))
            used += size
        self.intake.consume(taken, used)


def check(data: bytes) -> None:
    """Hold the invariant."""
    choices = Choices(data)
    reader = _Reader()
    stream = b""
    batch_ends: list[int] = []  # of each descriptor: where the read ends that it came with
    try:
        while not choices.ended:
            piece = choices.take(choices.byte() % _MAX_SIZE)
            count = choices.byte() % _MAX_FDS if piece else 0
            stream += piece
            fds = list(range(len(batch_ends), len(batch_ends) + count))
            batch_ends += [len(stream)] * count
            reader.read(piece, fds)
            assert reader.account.bytes_held == reader.intake.held
            assert bool(reader.intake.unfinished) is bool(reader.intake.held)
    except PeerProtocolError:
        pass
    else:
        assert (
            b"".join(message for message, _ in reader.messages)
            == stream[: -reader.intake.held or None]
        )
    _check_claims(reader, stream, batch_ends)


def _check_claims(reader: _Reader, stream: bytes, batch_ends: list[int]) -> None:
    at = 0
    given: list[int] = []
    for message, claimed in reader.messages:
        assert stream[at : at + len(message)] == message
        assert all(batch_ends[fd] > at for fd in claimed)
        given += claimed
        at += len(message)
    assert given + reader.intake.take_fds() == list(range(len(batch_ends)))
    assert reader.account.bytes_held == 0


def seeds() -> list[bytes]:
    """Return reads of whole messages, of parts, and with descriptors for none."""
    return [
        b"\4\0\4\0xy\5\2\5\2abc",
        b"\1\1\5\1\0\1\1\0a\2\0bc",
        b"\6\3\3\1x\3\2y",
        b"\4\1\4\0ab\4\0\4\1cd",
    ]
