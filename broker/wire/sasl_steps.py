"""The client's side of the authentication dialogue where the socket does not say who we are: on TCP. No I/O.

It goes step by step, as what it says depends on what the server answers. Descriptors do not pass on such a
connection, and are not asked for.
"""

# Theory of operation. The mechanisms are tried in the order of _MECHANISMS, each at most once, so a dialogue
# ends whatever the server says. The first is tried unasked; its REJECTED line says which others the server
# has. Who cannot go on with a mechanism says CANCEL, and after that only REJECTED is an answer.

import enum
import re
from collections.abc import Callable, Sequence
from typing import Final

from broker.wire.errors import BrokerError, PeerProtocolError
from broker.wire.sasl import GUID, AuthClient

_MECHANISMS: Final = (b"EXTERNAL", b"DBUS_COOKIE_SHA1", b"ANONYMOUS")
# What ANONYMOUS may say about who it is, for the log of the bus.
_TRACE: Final = b"buswarden"
# The name of a file: no blank, slash, backslash or dot in it, so it is a file of the keyrings' folder.
_CONTEXT: Final = re.compile(rb"[\x21-\x2d\x30-\x5b\x5d-\x7e]{1,128}")
_COOKIE_ID: Final = re.compile(rb"[0-9]{1,20}")
_CHALLENGE: Final = re.compile(rb"[\x21-\x7e]+")

# Context, id of the cookie: returns the cookie. Raises CookieError.
FetchCookie = Callable[[str, str], str]


class CookieError(BrokerError):
    """A cookie that we do not have: the bus is told by other means who we are, or not at all."""


class ClientState(enum.Enum):
    """What the client waits for."""

    OK = enum.auto()
    DATA = enum.auto()  # the challenge
    REJECTED = enum.auto()  # said CANCEL


class MultiMechanismSaslClient(AuthClient):
    """Tries one mechanism after the other.

    `challenge` is random, and new for each connection: a cookie is only ever hashed together with it.
    """

    def __init__(self, uid: int, challenge: bytes, fetch_cookie: FetchCookie) -> None:
        super().__init__(uid)
        self._challenge: Final = challenge.hex().encode()
        self._fetch_cookie: Final = fetch_cookie
        self._state = ClientState.OK
        self._tried = 0  # of _MECHANISMS
        self._reasons: Final[list[str]] = []  # why not, a mechanism each

    def start(self) -> bytes:
        """Return what the client says first."""
        return b"\0" + self._try_next(_MECHANISMS[:1]) + b"\r\n"

    def _answer(self, line: bytes) -> bytes:
        command, _, argument = line.partition(b" ")
        if command == b"REJECTED":
            if self._state is not ClientState.REJECTED:  # else the reason is known
                self._reasons.append("rejected")
            return self._try_next(argument.split(b" "))
        if self._state is ClientState.REJECTED:
            raise PeerProtocolError(f"the bus answers CANCEL with {line[:80]!r}")
        if command == b"OK" and GUID.fullmatch(argument):
            self.guid = argument.decode()
            self.done = True
            return b"BEGIN"
        if command == b"DATA" and self._state is ClientState.DATA:
            return self._answer_challenge(argument)
        if command in (b"DATA", b"ERROR"):
            return self._cancel(f"answered with {command.decode()}")
        raise PeerProtocolError(f"the bus does not let us in: {line[:80]!r}")

    def _try_next(self, offered: Sequence[bytes]) -> bytes:
        """Return the AUTH line of the next mechanism that the server has."""
        while self._tried < len(_MECHANISMS):
            mechanism = _MECHANISMS[self._tried]
            self._tried += 1
            if mechanism in offered:
                cookie = mechanism == b"DBUS_COOKIE_SHA1"
                self._state = ClientState.DATA if cookie else ClientState.OK
                who = _TRACE.hex().encode() if mechanism == b"ANONYMOUS" else self._uid
                return b"AUTH " + mechanism + b" " + who
            self._reasons.append("not offered")
        told = [
            f"{mechanism.decode()}: {reason}"
            for mechanism, reason in zip(_MECHANISMS, self._reasons, strict=True)
        ]
        raise PeerProtocolError(f"the bus does not let us in: {'; '.join(told)}")

    def _cancel(self, reason: str) -> bytes:
        self._reasons.append(reason)
        self._state = ClientState.REJECTED
        return b"CANCEL"

    def _answer_challenge(self, argument: bytes) -> bytes:
        # With it comes a library of cryptography, larger than all the rest, which few need.
        import hashlib  # noqa: PLC0415

        context, cookie_id, challenge = _parse_challenge(argument)
        try:
            cookie = self._fetch_cookie(context, cookie_id)
        except CookieError as exc:
            return self._cancel(str(exc))
        said = b":".join([challenge, self._challenge, cookie.encode()])
        # SHA-1 is what the mechanism is made of; nothing else of ours uses it.
        digest = hashlib.sha1(said, usedforsecurity=False).hexdigest().encode()
        self._state = ClientState.OK
        return b"DATA " + (self._challenge + b" " + digest).hex().encode()


def _parse_challenge(argument: bytes) -> tuple[str, str, bytes]:
    """Return the context, the id of the cookie, and what the server wants hashed."""
    try:
        # fromhex takes blanks between the digits, which are no hex.
        parts = b"" if b" " in argument else bytes.fromhex(argument.decode())
        context, cookie_id, challenge = parts.split(b" ")
    except ValueError:
        raise PeerProtocolError(f"not the challenge of a cookie: {argument[:80]!r}") from None
    if not _CONTEXT.fullmatch(context):
        raise PeerProtocolError(f"not the context of a cookie: {context[:80]!r}")
    if not _COOKIE_ID.fullmatch(cookie_id) or not _CHALLENGE.fullmatch(challenge):
        raise PeerProtocolError(f"not the challenge of a cookie: {parts[:80]!r}")
    return context.decode(), cookie_id.decode(), challenge
