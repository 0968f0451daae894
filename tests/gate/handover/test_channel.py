"""The words and frames between two gates, over a socket pair."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Final

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from broker.gate.dumps import READS, VERSION, Fds, HandoverError, StreamDump
from broker.gate.handover.channel import (
    PACKET,
    Channel,
    Failed,
    Go,
    Offer,
    Ready,
    Word,
    dump_equals,
    hand_over,
)
from broker.posix.descriptors import SCM_MAX_FD, close_fds

OFFER: Final = Offer(pid=7, reads=READS)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """The old gate's end, and the new one's."""
    pair = make_pair(5.0)
    yield pair
    for end in pair:
        end.close()


def make_pair(seconds: float) -> tuple[Channel, Channel]:
    old, new = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(old.detach(), seconds), Channel(new.detach(), seconds)


def inodes(fds: list[int]) -> list[int]:
    return [os.fstat(fd).st_ino for fd in fds]


@settings(max_examples=30)
@given(
    size=st.one_of(st.integers(0, 3 * PACKET), st.sampled_from([PACKET - 12, PACKET - 11, PACKET])),
    count=st.one_of(st.integers(0, 5), st.sampled_from([SCM_MAX_FD, SCM_MAX_FD + 1, 600])),
)
def test_a_frame_arrives_whole_with_its_descriptors_in_order(size: int, count: int) -> None:
    old, new = make_pair(10.0)
    data = os.urandom(size)
    pipes = [os.pipe() for _ in range(3)]
    fds = [pipes[n % 3][n % 2] for n in range(count)]
    sender = threading.Thread(target=old.send, args=(data, fds))
    sender.start()
    got, got_fds = new.receive()
    sender.join()
    old.say(Go())
    try:
        assert got == data
        assert inodes(got_fds) == inodes(fds)
        assert not any(map(os.get_inheritable, got_fds))
        assert new.hear() == Go()  # nothing of the frame is left
    finally:
        close_fds(got_fds)
        for pair in pipes:
            close_fds(pair)
        old.close()
        new.close()


def test_an_end_is_a_reason(ends: tuple[Channel, Channel]) -> None:
    old, new = ends
    new.close()
    with pytest.raises(HandoverError, match="ended"):
        old.hear()
    with pytest.raises(HandoverError, match="ended"):
        old.send(b"x" * 10)


def test_silence_is_a_reason() -> None:
    old, new = make_pair(0.05)
    with pytest.raises(HandoverError, match=r"nothing from the other gate for 0\.05 s"):
        old.hear()
    with pytest.raises(HandoverError, match="nothing from"):
        old.send(b"x" * 10_000_000)  # nobody reads it
    old.close()
    new.close()


@pytest.mark.parametrize("packet", [b"x", b"\xff" * 12, b"\3" + bytes(11) + b"abc"])
def test_nonsense_is_a_reason(packet: bytes) -> None:
    sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(theirs.detach(), 0.05)
    with sock:
        sock.send(packet)
        with pytest.raises(HandoverError):
            channel.hear()
    channel.close()


def play(ends: tuple[Channel, Channel], *words: Word, frames: int = 2) -> str:
    """Hand over to a gate that says these words, the first one at once; return why that fails, if it does."""
    old, new = ends
    heard: list[Word] = []

    def be_new() -> None:
        new.say(words[0])
        if len(words) > 1:
            for _ in range(frames):
                new.receive()
            new.say(words[1])
            heard.append(new.hear())

    thread = threading.Thread(target=be_new)
    thread.start()
    try:
        hand_over(old, _opening, [_opening] * (frames - 1))  # type: ignore[arg-type, list-item]
    except HandoverError as exc:
        return str(exc)
    finally:
        old.close()
        thread.join()
    assert heard == [Go()]
    return ""


def _opening(fds: Fds) -> StreamDump:
    return StreamDump(fd=fds.put(0))


def test_who_is_ready_is_told_to_go(ends: tuple[Channel, Channel]) -> None:
    assert play(ends, OFFER, Ready()) == ""


@pytest.mark.parametrize(
    ("words", "why"),
    [
        pytest.param((Failed("not today"),), "not today", id="fails-at-once"),
        pytest.param((Offer(pid=1, reads=(98, 99)),), "98, 99", id="other-version"),
        pytest.param((Offer(pid=1, reads=()),), "version nothing", id="no-version"),
        pytest.param((Ready(),), "version nothing", id="no-offer"),
    ],
)
def test_who_cannot_is_given_nothing(
    ends: tuple[Channel, Channel], words: tuple[Word, ...], why: str
) -> None:
    assert why in play(ends, *words)
    with pytest.raises(HandoverError, match="ended"):
        ends[1].hear()


def test_version_is_one_that_is_read_here() -> None:
    assert VERSION in READS


@pytest.mark.parametrize(
    ("dump", "fds", "is_same"),
    [
        pytest.param(_opening, [0], True, id="same"),
        pytest.param(_opening, [1], False, id="other-descriptor"),
        pytest.param(_opening, [], False, id="no-descriptor"),
        pytest.param(lambda _fds: StreamDump(fd=0, reading=False), [], False, id="other-state"),
    ],
)
def test_what_came_is_compared(
    dump: Callable[[Fds], msgspec.Struct], fds: list[int], is_same: bool
) -> None:
    assert dump_equals(dump, StreamDump(fd=0), fds) is is_same


def test_a_state_that_cannot_be_written_is_a_reason(ends: tuple[Channel, Channel]) -> None:
    old, new = ends
    new.say(OFFER)

    def defect(_fds: Fds) -> StreamDump:
        raise KeyError("oops")

    with pytest.raises(HandoverError, match="oops"):
        hand_over(old, defect, [])  # type: ignore[arg-type]
