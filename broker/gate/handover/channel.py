"""The hand-over from gate to gate: words, frames and descriptors on a socket.

    new gate                                  old gate
     | -- Offer, with readable versions -----> |
     | <- HandoverHeader --------------------- | does not serve meanwhile
     | <- SandboxDump, for each sandbox ------ |
     | loads each dump, dumps again, compares  |
     | -- Ready -----------------------------> |
     | <- Go --------------------------------- | exits
     | serves                                  |

The old gate decides. Until the Go, the new gate reads from no connection and writes to no
connection. At any step, either side may say Failed, exit, or be silent for too long. Then the old
gate raises HandoverError and serves again, because the new gate has only copies.

The old gate does nothing else during a hand-over. So the state does not change meanwhile, and no
step may take long.
"""

import contextlib
import gc
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NoReturn

import msgspec

from broker.gate.dumps import VERSION, Fds, HandoverError, HandoverHeader, SandboxDump
from broker.posix.descriptors import ANCILLARY_SIZE, SCM_MAX_FD, close_fds, received_fds, rights

# Bytes of one packet. Several packets fit into the buffer of the socket.
PACKET: Final = 65536
# Bytes. A frame has all data that a sandbox may have queued and held, on all connections.
MAX_FRAME: Final = 1 << 40
_HEAD: Final = struct.Struct("<QI")  # number of bytes and of descriptors that follow
Dump = Callable[[Fds], SandboxDump]


class Offer(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The new gate has started, and reads the versions `reads`."""

    pid: int
    reads: tuple[int, ...]


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The new gate has loaded the state, and an own dump is equal to the received state."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The new gate cannot take over."""

    text: str


class Go(msgspec.Struct, frozen=True, tag=True):
    """The old gate reads no more, and the new gate begins."""


Word = Offer | Ready | Failed | Go
_encoder: Final = msgspec.msgpack.Encoder()
_words: Final = msgspec.msgpack.Decoder(Word)


class Channel:
    """An end of the socket between two gates. All methods raise HandoverError."""

    def __init__(self, fd: int, seconds: float) -> None:
        self._sock: Final = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd)
        # The limit is for a step. A gate with a large state may take longer in all, but must not be
        # silent.
        self._seconds: Final = seconds
        self._sock.settimeout(seconds)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def say(self, word: Word) -> None:
        """Send a word."""
        self.send(encode(word))

    def hear(self) -> Word:
        """Wait for a word."""
        data, fds = self.receive()
        close_fds(fds)
        return decode_word(data)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send a frame with descriptors, which stay open in the caller."""
        rest = memoryview(_HEAD.pack(len(data), len(fds)) + data)
        while rest or fds:
            # A message with descriptors has at least one byte.
            self._send(rest[:PACKET] or b"F", fds[:SCM_MAX_FD])
            rest, fds = rest[PACKET:], fds[SCM_MAX_FD:]

    def receive(self) -> tuple[bytes, list[int]]:
        """Wait for a frame. The caller owns the returned descriptors."""
        first, fds = self._receive()
        if len(first) < _HEAD.size:
            raise HandoverError("unexpected answer of the other gate")
        size, count = _HEAD.unpack_from(first)
        if size > MAX_FRAME:
            raise HandoverError(f"a frame of {size} bytes")
        data = bytearray(first[_HEAD.size :])
        while len(data) < size or len(fds) < count:
            more, its_fds = self._receive()
            data += more
            fds += its_fds
        return bytes(data[:size]), fds

    def _send(self, data: bytes | memoryview, fds: Sequence[int] = ()) -> None:
        with self._errors("send to"):
            self._sock.sendmsg([data], rights(fds))

    def _receive(self) -> tuple[bytes, list[int]]:
        with self._errors("receive from"):
            data, ancillary, flags, _ = self._sock.recvmsg(
                PACKET, ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC
            )
        fds = received_fds(ancillary)
        if flags & socket.MSG_CTRUNC:
            raise HandoverError("no room for all descriptors")
        if not data:
            raise HandoverError("the other gate ended")
        return data, fds

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn errors of the socket into HandoverError."""
        try:
            yield
        except TimeoutError:
            text = f"nothing from the other gate for {self._seconds:g} s"
            raise HandoverError(text) from None
        except ConnectionError:
            raise HandoverError("the other gate ended") from None
        except OSError as exc:
            raise HandoverError(f"cannot {what} the other gate: {exc.strerror}") from exc


def hand_over(
    channel: Channel, header: Callable[[Fds], HandoverHeader], dumps: Iterable[Dump]
) -> None:
    """Send all state to the gate at the other end, which serves from then on.

    Raises HandoverError.
    """
    offer = channel.hear()
    if isinstance(offer, Failed):
        raise HandoverError(offer.text)
    if not isinstance(offer, Offer) or VERSION not in offer.reads:
        reads = offer.reads if isinstance(offer, Offer) else ()
        known = ", ".join(map(str, reads)) or "nothing"
        raise HandoverError(f"the new gate reads hand-over version {known}, not {VERSION}")
    gc.disable()  # The dumps are no garbage, so a collection would be wasted time.
    try:
        for dump in (header, *dumps):
            channel.send(*_write(dump))
    finally:
        gc.enable()
    answer = channel.hear()
    if isinstance(answer, Failed):
        raise HandoverError(answer.text)
    if not isinstance(answer, Ready):
        raise HandoverError("unexpected answer of the other gate")
    channel.say(Go())


def _write(dump: Callable[[Fds], msgspec.Struct]) -> tuple[bytes, list[int]]:
    fds = Fds()
    try:
        return encode(dump(fds)), fds.all
    except HandoverError:
        raise
    except Exception as exc:  # A defect of the gate, which still serves.
        raise HandoverError(f"the state cannot be dumped: {exc!r}") from exc


def exit_now(last: Callable[[], None]) -> NoReturn:
    """Call `last`, and exit without closing anything.

    The new gate serves the same sockets, which a shutdown here would end.
    """
    try:
        last()
    finally:
        os._exit(0)


def dump_equals(
    dump: Callable[[Fds], msgspec.Struct], received: msgspec.Struct, fds: Sequence[int]
) -> bool:
    """Return whether a new dump is equal to the received dump."""
    again = Fds()
    # The comparison is of values, because a newer gate may write more fields than an older gate.
    return dump(again) == received and again.all == list(fds)


def encode(frame: msgspec.Struct) -> bytes:
    """Return the bytes of a frame. Equal states give equal bytes."""
    return _encoder.encode(frame)


def decode_word(data: bytes) -> Word:
    """Return the word of the other side. Raises HandoverError."""
    try:
        word: Word = _words.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise HandoverError(f"unexpected answer of the other gate: {exc}") from exc
    return word


def decode_header(data: bytes) -> HandoverHeader:
    """Return the header of a first frame. Raises HandoverError."""
    try:
        return msgspec.msgpack.decode(data, type=HandoverHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise HandoverError(f"the old gate's state: {exc}") from exc


def decode_sandbox(data: bytes) -> SandboxDump:
    """Return the dump of a sandbox. Raises HandoverError."""
    try:
        return msgspec.msgpack.decode(data, type=SandboxDump)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise HandoverError(f"the old gate's state: {exc}") from exc
