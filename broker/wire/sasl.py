"""Both sides of D-Bus authentication on unix sockets. EXTERNAL only, and no I/O.

Feed received bytes and send the returned bytes, until `done`. Then `leftover` has the bytes behind
the dialogue, which belong to the message parser. Descriptors must not arrive before the end of the
dialogue; the receiver checks that. An error is final: after a PeerProtocolError every call raises
the error again.
"""

# Theory of operation. A dialogue consists of lines that end in CR LF. Nothing else ends a line: a
# lone CR or LF is content, and makes the line unknown. The server turns each line into a Verb.
# _TRANSITIONS has the next state and the answer for a state and a verb. A pair that is missing
# there gets an ERROR line and changes nothing. Only `BEGIN`, to the byte, in READY leads to DONE.
# REJECTED answers are counted, because a guessing client would collect them.
#
# A typical dialogue:
#
#     client                         server        state
#     NUL
#     AUTH EXTERNAL 31303030                       AUTH
#                                    OK guid       READY
#     NEGOTIATE_UNIX_FD              AGREE_UNIX_FD READY
#     BEGIN                                        DONE
#
# Client and server agree on every byte only if neither is generous. So there is no case folding,
# and no trimming at the front of a line.

import abc
import enum
import re
from collections.abc import Mapping
from typing import Final

from broker.wire.errors import PeerProtocolError

# The longest legal line has about 100 bytes. The limit is on all lines together, so that the
# dialogue of a peer that never sends BEGIN ends.
MAX_DIALOGUE: Final = 16 * 1024
# A real dialogue has up to ten lines. An empty line has two bytes, but costs as much time as any
# other line.
MAX_LINES: Final = 32
MAX_REJECTED: Final = 6  # as in dbus-daemon

_PRINTABLE: Final = re.compile(rb"[\x20-\x7e]+")
GUID: Final = re.compile(rb"[0-9A-Fa-f]{32}")
_CRLF: Final = b"\r\n"


class Verb(enum.Enum):
    """The meaning of a client's line to the server."""

    AUTH_UID = enum.auto()  # EXTERNAL with the client's own uid
    AUTH_EMPTY = enum.auto()  # EXTERNAL without an identity, which comes later
    AUTH_OTHER = enum.auto()  # no mechanism, another mechanism, or another uid
    DATA_UID = enum.auto()
    DATA_OTHER = enum.auto()
    CANCEL = enum.auto()
    ERROR = enum.auto()
    NEGOTIATE_UNIX_FD = enum.auto()
    BEGIN = enum.auto()
    NO_BEGIN = enum.auto()  # BEGIN with anything behind
    UNKNOWN = enum.auto()


class ServerState(enum.Enum):
    """The state of the server."""

    AUTH = enum.auto()  # waits for AUTH
    DATA = enum.auto()  # waits for DATA
    READY = enum.auto()  # sent OK, waits for BEGIN
    DONE = enum.auto()
    FAILED = enum.auto()


# A uid as a client writes it; the highest number is no uid (-1 in the kernel).
_UID: Final = re.compile(rb"0|[1-9][0-9]{0,9}")
_MAX_UID: Final = 2**32 - 2
_REJECTED: Final = b"REJECTED EXTERNAL"
_ERROR: Final = b"ERROR"
_OK: Final = b"OK"  # the guid follows
_TRANSITIONS: Final[Mapping[tuple[ServerState, Verb], tuple[ServerState, bytes]]] = {
    (ServerState.AUTH, Verb.AUTH_UID): (ServerState.READY, _OK),
    (ServerState.AUTH, Verb.AUTH_EMPTY): (ServerState.DATA, b"DATA"),
    (ServerState.AUTH, Verb.AUTH_OTHER): (ServerState.AUTH, _REJECTED),
    (ServerState.AUTH, Verb.ERROR): (ServerState.AUTH, _REJECTED),
    (ServerState.AUTH, Verb.BEGIN): (ServerState.FAILED, b""),
    (ServerState.AUTH, Verb.NO_BEGIN): (ServerState.FAILED, b""),
    (ServerState.DATA, Verb.DATA_UID): (ServerState.READY, _OK),
    (ServerState.DATA, Verb.DATA_OTHER): (ServerState.AUTH, _REJECTED),
    (ServerState.DATA, Verb.CANCEL): (ServerState.AUTH, _REJECTED),
    (ServerState.DATA, Verb.ERROR): (ServerState.AUTH, _REJECTED),
    (ServerState.DATA, Verb.BEGIN): (ServerState.FAILED, b""),
    (ServerState.DATA, Verb.NO_BEGIN): (ServerState.FAILED, b""),
    (ServerState.READY, Verb.NEGOTIATE_UNIX_FD): (ServerState.READY, b"AGREE_UNIX_FD"),
    (ServerState.READY, Verb.CANCEL): (ServerState.AUTH, _REJECTED),
    (ServerState.READY, Verb.ERROR): (ServerState.AUTH, _REJECTED),
    (ServerState.READY, Verb.BEGIN): (ServerState.DONE, b""),
    (ServerState.READY, Verb.NO_BEGIN): (ServerState.FAILED, b""),
}
_PLAIN_VERBS: Final = {
    b"CANCEL": Verb.CANCEL,
    b"ERROR": Verb.ERROR,
    b"NEGOTIATE_UNIX_FD": Verb.NEGOTIATE_UNIX_FD,
}


class Lines:
    """A splitter of bytes into lines without CR LF, within MAX_DIALOGUE and MAX_LINES."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._taken = 0
        self._count = 0

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_line(self) -> bytes | None:
        # The buffer may also hold bytes behind the dialogue, of any number. So only two kinds of
        # bytes count: bytes taken as lines, and bytes that can no longer be a line within the
        # limit.
        room = MAX_DIALOGUE - self._taken
        end = self._buffer.find(_CRLF, 0, room)
        if end < 0:
            if len(self._buffer) >= room:
                raise PeerProtocolError(f"more than {MAX_DIALOGUE} bytes of authentication")
            return None
        self._count += 1
        if self._count > MAX_LINES:
            raise PeerProtocolError(f"more than {MAX_LINES} lines of authentication")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + len(_CRLF)]
        self._taken += end + len(_CRLF)
        return line

    def take_rest(self) -> bytes:
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest


class SaslServer:
    """The server's side, for a peer whose uid by SO_PEERCRED is one that may connect.

    The peer's own claim decides nothing, so every uid that can be claimed is accepted. A program
    in a user namespace claims the uid that it has in there.
    """

    def __init__(self, guid: str, *, takes_fds: bool = True) -> None:
        self.leftover = b""
        self.unix_fds = False
        self._guid: Final = guid.encode()
        self._takes_fds: Final = takes_fds
        self._lines: Final = Lines()
        self._state = ServerState.AUTH
        self._rejected = 0
        self._saw_nul = False

    @property
    def done(self) -> bool:
        """Return whether the client has sent BEGIN in the right state."""
        return self._state is ServerState.DONE

    def feed(self, data: bytes) -> bytes:
        """Return the bytes to send to the client. Raises PeerProtocolError."""
        if self._state is ServerState.FAILED:
            raise PeerProtocolError("authentication failed before")
        assert not self.done
        try:
            return self._feed(data)
        except PeerProtocolError:
            self._state = ServerState.FAILED
            raise

    def _feed(self, data: bytes) -> bytes:
        if not self._saw_nul:
            if not data:
                return b""
            if data[0]:
                raise PeerProtocolError("the first byte is not NUL")
            self._saw_nul = True
            data = data[1:]
        self._lines.feed(data)
        out = bytearray()
        while not self.done and (line := self._lines.next_line()) is not None:
            if answer := self._answer(line):
                out += answer + _CRLF
        if self.done:
            self.leftover = self._lines.take_rest()
        return bytes(out)

    def _answer(self, line: bytes) -> bytes:
        verb = self._parse_verb(line)
        if verb is Verb.NEGOTIATE_UNIX_FD and not self._takes_fds:
            verb = Verb.UNKNOWN  # as a server without support for descriptors answers
        self._state, answer = _TRANSITIONS.get((self._state, verb), (self._state, _ERROR))
        if self._state is ServerState.FAILED:
            raise PeerProtocolError(f"no BEGIN in its place: {line[:40]!r}")
        if answer == _REJECTED:
            # After REJECTED the client negotiates anew.
            self.unix_fds = False
            self._rejected += 1
            if self._rejected >= MAX_REJECTED:
                raise PeerProtocolError(f"rejected {MAX_REJECTED} times")
        elif answer == _OK:
            answer += b" " + self._guid
        elif verb is Verb.NEGOTIATE_UNIX_FD and self._state is ServerState.READY:
            self.unix_fds = True
        return answer

    def _parse_verb(self, line: bytes) -> Verb:
        if not _PRINTABLE.fullmatch(line):
            return Verb.UNKNOWN
        command, blank, arguments = line.partition(b" ")
        arguments = arguments.strip(b" ")
        match command:
            case b"AUTH":
                mechanism, _, response = arguments.partition(b" ")
                if mechanism != b"EXTERNAL":
                    return Verb.AUTH_OTHER
                response = response.lstrip(b" ")
                if not response:
                    return Verb.AUTH_EMPTY
                return Verb.AUTH_UID if _is_uid(response) else Verb.AUTH_OTHER
            case b"DATA":
                # No data: the client authenticates as its own user.
                good = not arguments or _is_uid(arguments)
                return Verb.DATA_UID if good else Verb.DATA_OTHER
            case b"BEGIN":
                return Verb.NO_BEGIN if blank else Verb.BEGIN
            case _:
                return _PLAIN_VERBS.get(command, Verb.UNKNOWN)


def _is_uid(response: bytes) -> bool:
    """Return whether a response is a uid in decimal digits, in hexadecimal as EXTERNAL has it."""
    try:
        # fromhex accepts blanks between the digits, but blanks are not hexadecimal digits.
        claimed = b"" if b" " in response else bytes.fromhex(response.decode())
    except ValueError:
        return False
    return bool(_UID.fullmatch(claimed)) and int(claimed) <= _MAX_UID


class AuthClient(abc.ABC):
    """The client's side: lines in, answers out. An error is final."""

    def __init__(self, uid: int) -> None:
        self.done = False
        self.leftover = b""
        self.unix_fds = False
        self.guid = ""
        self._uid: Final = str(uid).encode().hex().encode()
        self._lines: Final = Lines()
        self._failed = False

    @abc.abstractmethod
    def start(self) -> bytes:
        """Return the first bytes of the client."""

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the server, and return the bytes to send.

        Raises PeerProtocolError, also if the server rejects the client.
        """
        if self._failed:
            raise PeerProtocolError("authentication failed before")
        assert not self.done
        self._failed = True  # cleared once all bytes are taken
        self._lines.feed(data)
        out = self._take_lines()
        self._failed = False
        return out

    def _take_lines(self) -> bytes:
        out = b""
        while not self.done and (line := self._lines.next_line()) is not None:
            if answer := self._answer(line):
                out += answer + _CRLF
        if self.done:
            self.leftover = self._lines.take_rest()
        return out

    @abc.abstractmethod
    def _answer(self, line: bytes) -> bytes:
        """Return the answer to a line, b"" for no answer. Raises PeerProtocolError."""


class SaslClient(AuthClient):
    """The side of a client that sends everything at once and then only reads.

    Messages may be sent together with BEGIN, but descriptors may not: dbus-daemon loses descriptors
    that arrive during authentication.
    """

    def start(self) -> bytes:
        """Return all bytes of the client."""
        return b"\0AUTH EXTERNAL " + self._uid + b"\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"

    def _answer(self, line: bytes) -> bytes:
        command, _, argument = line.partition(b" ")
        if not self.guid:
            if command != b"OK" or not GUID.fullmatch(argument):
                raise PeerProtocolError(f"the bus rejected the authentication: {line[:80]!r}")
            self.guid = argument.decode()
            return b""
        if command not in (b"AGREE_UNIX_FD", b"ERROR"):
            raise PeerProtocolError(f"the bus answers NEGOTIATE_UNIX_FD with {line[:80]!r}")
        self.unix_fds = command == b"AGREE_UNIX_FD"
        self.done = True
        return b""
