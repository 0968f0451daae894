"""Both halves of the D-Bus authentication dialogue on unix sockets, EXTERNAL only, with no I/O.

Feed them what arrived, send what they hand back, until `done`. What came behind the dialogue belongs to the
message parser and waits in `leftover`. Descriptors must not arrive before that: who receives
checks it. An error is final: after a PeerProtocolError every call raises it again.
"""

# Theory of operation. A dialogue is lines that end in CR LF, and nothing else ends one: a lone CR
# or LF is content, of a line that is then unknown. The server turns each line into a Verb, and
# _TRANSITIONS says what a verb does in a state; a pair that is not in it is an ERROR line and no more. Only
# `BEGIN`, to the byte, in READY leads to DONE. REJECTED is counted, as it is what a guesser would collect.
# Sender and receiver agree on every byte only if neither is generous: there is no case folding, and
# no trimming at the front of a line.

import abc
import enum
import re
from collections.abc import Mapping
from typing import Final

from broker.wire.errors import PeerProtocolError

# The longest legal line is about 100 bytes. The cap is on all lines together, so that a peer that
# never says BEGIN ends.
MAX_DIALOGUE: Final = 16 * 1024
# A real dialogue has up to ten. Empty lines cost two bytes each, and as much time as any other.
MAX_LINES: Final = 32
MAX_REJECTED: Final = 6  # as dbus-daemon's

_PRINTABLE: Final = re.compile(rb"[\x20-\x7e]+")
GUID: Final = re.compile(rb"[0-9A-Fa-f]{32}")
_CRLF: Final = b"\r\n"


class Verb(enum.Enum):
    """What a line from the client means to the server."""

    AUTH_UID = enum.auto()  # EXTERNAL as the uid that it has
    AUTH_EMPTY = enum.auto()  # EXTERNAL, who I am comes later
    AUTH_OTHER = enum.auto()  # no mechanism, another one, or another uid
    DATA_UID = enum.auto()
    DATA_OTHER = enum.auto()
    CANCEL = enum.auto()
    ERROR = enum.auto()
    NEGOTIATE_UNIX_FD = enum.auto()
    BEGIN = enum.auto()
    NO_BEGIN = enum.auto()  # BEGIN with anything behind it
    UNKNOWN = enum.auto()


class ServerState(enum.Enum):
    """Where the server is."""

    AUTH = enum.auto()  # waits for AUTH
    DATA = enum.auto()  # waits for DATA
    READY = enum.auto()  # said OK, waits for BEGIN
    DONE = enum.auto()
    FAILED = enum.auto()


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
    """Bytes in, lines without their CR LF out, within MAX_DIALOGUE and MAX_LINES."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._taken = 0
        self._count = 0

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_line(self) -> bytes | None:
        # Bytes behind the dialogue are in the buffer too, and are as many as they are: only what
        # was taken, or can no longer be a line within the cap, counts.
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
    """The side of the bus. `uid` is who the peer is by SO_PEERCRED: nobody else may it say to be."""

    def __init__(self, uid: int, guid: str, *, takes_fds: bool = True) -> None:
        self.leftover = b""
        self.unix_fds = False
        self._uid: Final = str(uid).encode()
        self._guid: Final = guid.encode()
        self._takes_fds: Final = takes_fds
        self._lines: Final = Lines()
        self._state = ServerState.AUTH
        self._rejected = 0
        self._saw_nul = False

    @property
    def done(self) -> bool:
        """Whether the client said BEGIN in its place."""
        return self._state is ServerState.DONE

    def feed(self, data: bytes) -> bytes:
        """Return what is to be sent to the client. Raises PeerProtocolError."""
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
            verb = Verb.UNKNOWN  # as for who has never heard of it
        self._state, answer = _TRANSITIONS.get((self._state, verb), (self._state, _ERROR))
        if self._state is ServerState.FAILED:
            raise PeerProtocolError(f"no BEGIN in its place: {line[:40]!r}")
        if answer == _REJECTED:
            # Whoever starts anew negotiates anew.
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
                return Verb.AUTH_UID if self._is_uid(response) else Verb.AUTH_OTHER
            case b"DATA":
                # No data: act as who I am.
                good = not arguments or self._is_uid(arguments)
                return Verb.DATA_UID if good else Verb.DATA_OTHER
            case b"BEGIN":
                return Verb.NO_BEGIN if blank else Verb.BEGIN
            case _:
                return _PLAIN_VERBS.get(command, Verb.UNKNOWN)

    def _is_uid(self, response: bytes) -> bool:
        try:
            # fromhex takes blanks between the digits, which are no hex.
            return b" " not in response and bytes.fromhex(response.decode()) == self._uid
        except ValueError:
            return False


class AuthClient(abc.ABC):
    """The side of a client: lines in, what it says to them out. An error is final."""

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
        """Return what the client says first."""

    def feed(self, data: bytes) -> bytes:
        """Take what the server said; return what is to be sent to it.

        Raises PeerProtocolError, also if it does not let us in.
        """
        if self._failed:
            raise PeerProtocolError("authentication failed before")
        assert not self.done
        self._failed = True  # until all of it is taken
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
        """Return what is said to a line, b"" for nothing. Raises PeerProtocolError."""


class SaslClient(AuthClient):
    """The side of a client that says everything at once and then only reads.

    What follows BEGIN may be sent with it, but for descriptors: dbus-daemon loses those that arrive while
    it authenticates.
    """

    def start(self) -> bytes:
        """Return all that the client has to say."""
        return b"\0AUTH EXTERNAL " + self._uid + b"\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"

    def _answer(self, line: bytes) -> bytes:
        command, _, argument = line.partition(b" ")
        if not self.guid:
            if command != b"OK" or not GUID.fullmatch(argument):
                raise PeerProtocolError(f"the bus does not let us in: {line[:80]!r}")
            self.guid = argument.decode()
            return b""
        if command not in (b"AGREE_UNIX_FD", b"ERROR"):
            raise PeerProtocolError(f"the bus answers NEGOTIATE_UNIX_FD with {line[:80]!r}")
        self.unix_fds = command == b"AGREE_UNIX_FD"
        self.done = True
        return b""
