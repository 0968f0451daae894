"""SASL is done, fails or waits alike however its bytes are cut; done only after EXTERNAL and BEGIN.

The first bytes of an input say which side reads the rest, and in what pieces.
"""

import re
from typing import Final, NamedTuple

from broker.wire.errors import PeerProtocolError
from broker.wire.sasl import MAX_DIALOGUE, AuthClient, SaslClient, SaslServer
from broker.wire.sasl_steps import CookieError, MultiMechanismSaslClient
from integration.fuzz.pieces import Choices, cut

_UID: Final = 1000
_GUID: Final = "0123456789abcdef" * 2
_HEX: Final = b"31303030"
# What a server's answers look like, to the byte.
_ANSWERS: Final = re.compile(
    rb"((OK " + _GUID.encode() + rb"|ERROR|DATA|AGREE_UNIX_FD|REJECTED EXTERNAL)\r\n)*"
)
# What a client says on TCP: each mechanism once at the most, nothing that the server made up, and BEGIN last if at all.
_SAID: Final = re.compile(
    rb"\0AUTH EXTERNAL %b\r\n(CANCEL\r\n)?"
    rb"(AUTH DBUS_COOKIE_SHA1 %b\r\n(DATA [0-9a-f]+\r\n)?(CANCEL\r\n)?)?"
    rb"(AUTH ANONYMOUS [0-9a-f]+\r\n(CANCEL\r\n)?)?(BEGIN\r\n)?" % (_HEX, _HEX)
)
# What has to be in a dialogue that was good: somewhere who it is, and BEGIN on a line of its own.
_GOOD: Final = re.compile(
    rb"\0(.*\r\n)?(AUTH +EXTERNAL +%b|(AUTH +EXTERNAL.*\r\n)(.*\r\n)?DATA( +%b)?) *\r\n(.*\r\n)?BEGIN\r\n"
    % (_HEX, _HEX),
    re.DOTALL,
)


class Outcome(NamedTuple):
    """How a dialogue ended."""

    state: str
    said: bytes
    unix_fds: bool
    leftover: bytes


def check(data: bytes) -> None:
    """Hold the invariant."""
    choices = Choices(data)
    serve = (run_client, run_server, run_steps, run_server)[choices.byte() % 4]
    sizes = list(choices.take(3))
    stream = choices.rest()
    whole = serve([stream])
    for parts in (cut(stream, sizes), [stream[n : n + 1] for n in range(len(stream))]):
        pieces = serve(parts)
        # What was answered before a failure is not kept when both come at once.
        assert pieces.state == whole.state
        assert pieces == whole or whole.state == "failed"


def run_server(parts: list[bytes]) -> Outcome:
    """Let a server read these pieces."""
    server = SaslServer(_GUID)
    said, stream = b"", b"".join(parts)
    for number, part in enumerate(parts):
        try:
            said += server.feed(part)
        except PeerProtocolError:
            assert not server.done
            return Outcome("failed", said, False, b"")
        assert _ANSWERS.fullmatch(said)
        if server.done:
            leftover = server.leftover + b"".join(parts[number + 1 :])
            dialogue = stream.removesuffix(leftover)
            assert stream == dialogue + leftover
            assert len(dialogue) <= MAX_DIALOGUE + 1
            assert dialogue.endswith(b"\r\nBEGIN\r\n")
            assert _GOOD.match(dialogue)
            return Outcome("done", said, server.unix_fds, leftover)
    return Outcome("waits", said, server.unix_fds, b"")


def run_client(parts: list[bytes]) -> Outcome:
    """Let a client on a unix socket read these pieces."""
    outcome = _run(SaslClient(_UID), parts)
    assert outcome.said == SaslClient(_UID).start()
    return outcome


def run_steps(parts: list[bytes]) -> Outcome:
    """Let a client on TCP read these pieces."""
    outcome = _run(MultiMechanismSaslClient(_UID, b"random", _fetch_cookie), parts)
    assert _SAID.fullmatch(outcome.said)
    assert outcome.said.endswith(b"BEGIN\r\n") == (outcome.state == "done")
    assert not outcome.unix_fds
    return outcome


def _fetch_cookie(context: str, cookie_id: str) -> str:
    if context != "context":
        raise CookieError("no such file")
    return cookie_id * 2


def _run(client: AuthClient, parts: list[bytes]) -> Outcome:
    said = client.start()
    for number, part in enumerate(parts):
        try:
            said += client.feed(part)
        except PeerProtocolError:
            assert not client.done
            return Outcome("failed", said, False, b"")
        if client.done:
            assert re.fullmatch("[0-9A-Fa-f]{32}", client.guid)
            leftover = client.leftover + b"".join(parts[number + 1 :])
            return Outcome("done", said, client.unix_fds, leftover)
    return Outcome("waits", said, client.unix_fds, b"")


def seeds() -> list[bytes]:
    """Return dialogues of both sides."""
    good = b"\0AUTH EXTERNAL " + _HEX + b"\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\nl\1"
    slow = (
        b"\0AUTH\r\nAUTH EXTERNAL\r\nDATA\r\nCANCEL\r\nAUTH EXTERNAL\r\nDATA "
        + _HEX
        + b"\r\nBEGIN\r\n"
    )
    answers = b"OK " + _GUID.encode() + b"\r\nAGREE_UNIX_FD\r\nl\2"
    return [
        b"\1\5\0\3" + good,
        b"\1\2\2\2" + slow,
        b"\1\1\1\1\0" + b"AUTH ANONYMOUS\r\n" * 6,
        b"\0\7\1\0" + answers,
        b"\0\1\1\1OK " + b"a" * 32 + b"\r\nERROR\r\n",
        b"\0\0\0\0REJECTED EXTERNAL\r\n",
        b"\2\3\1\0REJECTED DBUS_COOKIE_SHA1 ANONYMOUS\r\nDATA %b\r\nOK %bl\1"
        % (b"context 7 abc".hex().encode(), _GUID.encode() + b"\r\n"),
        b"\2\0\0\0DATA\r\nREJECTED DBUS_COOKIE_SHA1 ANONYMOUS\r\nERROR\r\nREJECTED ANONYMOUS\r\n",
    ]
