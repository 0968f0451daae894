"""The client's side of authentication on TCP, where the socket proves no identity. No I/O.

The dialogue goes step by step, because each step depends on the server's answer. Descriptors cannot
be passed on such a connection, and are not negotiated.
"""

# Theory of operation. The mechanisms are tried in the order of _MECHANISMS, each at most once, so a
# dialogue ends whatever the server says. The first mechanism is tried unasked. The REJECTED line of
# the answer lists the server's other mechanisms. A client that cannot continue a mechanism sends
# CANCEL, and only REJECTED is a valid answer to CANCEL.

import enum
import re
from collections.abc import Callable, Sequence
from typing import Final

from broker.wire.errors import BrokerError, PeerProtocolError
from broker.wire.sasl import GUID, AuthClient

_MECHANISMS: Final = (b"EXTERNAL", b"DBUS_COOKIE_SHA1", b"ANONYMOUS")
# The identity that ANONYMOUS states, for the log of the bus.
_TRACE: Final = b"buswarden"
# A context is a file name without blank, slash, backslash and dot, so the file is in the keyrings'
# folder.
_CONTEXT: Final = re.compile(rb"[\x21-\x2d\x30-\x5b\x5d-\x7e]{1,128}")
_COOKIE_ID: Final = re.compile(rb"[0-9]{1,20}")
_CHALLENGE: Final = re.compile(rb"[\x21-\x7e]+")

# (context, id of the cookie) -> cookie. Raises CookieError.
FetchCookie = Callable[[str, str], str]


class CookieError(BrokerError):
    """A cookie is not available. The mechanism is cancelled."""


class ClientState(enum.Enum):
    """The answer that the client waits for."""

    OK = enum.auto()
    DATA = enum.auto()  # the challenge
    REJECTED = enum.auto()  # after CANCEL


class MultiMechanismSaslClient(AuthClient):
    """A client that tries its mechanisms in order.

    `challenge` is random, and new for each connection, because a cookie is only ever hashed
    together with the challenge.
    """

    def __init__(self, uid: int, challenge: bytes, fetch_cookie: FetchCookie) -> None:
        super().__init__(uid)
        self._challenge: Final = challenge.hex().encode()
        self._fetch_cookie: Final = fetch_cookie
        self._state = ClientState.OK
        self._tried = 0  # number of tried mechanisms of _MECHANISMS
        self._reasons: Final[list[str]] = []  # why each mechanism failed

    def start(self) -> bytes:
        """Return the first bytes of the client."""
        return b"\0" + self._try_next(_MECHANISMS[:1]) + b"\r\n"

    def _answer(self, line: bytes) -> bytes:
        command, _, argument = line.partition(b" ")
        if command == b"REJECTED":
            # the reason of a cancelled mechanism is known
            if self._state is not ClientState.REJECTED:
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
        raise PeerProtocolError(f"the bus rejected the authentication: {line[:80]!r}")

    def _try_next(self, offered: Sequence[bytes]) -> bytes:
        """Return the AUTH line of the next mechanism that the server offers."""
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
        raise PeerProtocolError(f"the bus rejected the authentication: {'; '.join(told)}")

    def _cancel(self, reason: str) -> bytes:
        self._reasons.append(reason)
        self._state = ClientState.REJECTED
        return b"CANCEL"

    def _answer_challenge(self, argument: bytes) -> bytes:
        # hashlib loads a cryptography library larger than the rest of the program, and few clients
        # need the library.
        import hashlib  # noqa: PLC0415

        context, cookie_id, challenge = _parse_challenge(argument)
        try:
            cookie = self._fetch_cookie(context, cookie_id)
        except CookieError as exc:
            return self._cancel(str(exc))
        said = b":".join([challenge, self._challenge, cookie.encode()])
        # The mechanism demands SHA-1. No other part of the program uses SHA-1.
        digest = hashlib.sha1(said, usedforsecurity=False).hexdigest().encode()
        self._state = ClientState.OK
        return b"DATA " + (self._challenge + b" " + digest).hex().encode()


def _parse_challenge(argument: bytes) -> tuple[str, str, bytes]:
    """Return the context, the cookie's id, and the server's challenge."""
    try:
        # fromhex accepts blanks between the digits, but blanks are not hexadecimal digits.
        parts = b"" if b" " in argument else bytes.fromhex(argument.decode())
        context, cookie_id, challenge = parts.split(b" ")
    except ValueError:
        raise PeerProtocolError(f"not the challenge of a cookie: {argument[:80]!r}") from None
    if not _CONTEXT.fullmatch(context):
        raise PeerProtocolError(f"not the context of a cookie: {context[:80]!r}")
    if not _COOKIE_ID.fullmatch(cookie_id) or not _CHALLENGE.fullmatch(challenge):
        raise PeerProtocolError(f"not the challenge of a cookie: {parts[:80]!r}")
    return context.decode(), cookie_id.decode(), challenge
