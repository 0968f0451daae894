"""The authentication dialogue, whole and byte by byte, from both sides."""

import itertools

import pytest
from hypothesis import given, strategies as st

from broker.wire import sasl
from broker.wire.errors import PeerProtocolError
from broker.wire.sasl import (
    MAX_DIALOGUE,
    MAX_LINES,
    MAX_REJECTED,
    Lines,
    SaslClient,
    SaslServer,
    ServerState,
    Verb,
)

GUID = "0123456789abcdef0123456789abcdef"
OK = f"OK {GUID}\r\n".encode()
AUTH = b"AUTH EXTERNAL 31303030\r\n"
REJECTED = b"REJECTED EXTERNAL\r\n"
AGREE = b"AGREE_UNIX_FD\r\n"
ERROR = b"ERROR\r\n"


def make_server(*data: bytes) -> SaslServer:
    server = SaslServer(GUID)
    for piece in data:
        server.feed(piece)
    return server


@pytest.mark.parametrize(
    ("said", "answered"),
    [
        (AUTH + b"BEGIN\r\n", OK),
        (AUTH + b"NEGOTIATE_UNIX_FD\r\nBEGIN\r\n", OK + AGREE),
        # As sd-bus and zbus say it.
        (b"AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n", b"DATA\r\n" + OK + AGREE),
        (b"AUTH EXTERNAL\r\nDATA 31303030\r\nBEGIN\r\n", b"DATA\r\n" + OK),
        # As GDBus does.
        (b"AUTH\r\n" + AUTH + b"BEGIN\r\n", REJECTED + OK),
        (b"AUTH   EXTERNAL   31303030 \r\nBEGIN\r\n", OK),
    ],
)
def test_a_good_dialogue_ends_however_it_is_cut(said: bytes, answered: bytes) -> None:
    whole = SaslServer(GUID)
    assert whole.feed(b"\0" + said + b"l\1rest") == answered
    slow = SaslServer(GUID)
    assert b"".join(slow.feed(bytes([byte])) for byte in b"\0" + said) == answered
    assert whole.done
    assert slow.done
    assert whole.leftover == b"l\1rest"
    assert slow.leftover == b""
    assert whole.unix_fds is slow.unix_fds is (AGREE in answered)


@pytest.mark.parametrize(
    ("said", "answered"),
    [
        (b"AUTH ANONYMOUS\r\n", REJECTED),
        (b"AUTH DBUS_COOKIE_SHA1 31303030\r\n", REJECTED),
        (b"AUTH external 31303030\r\n", REJECTED),
        (b"AUTH EXTERNAL 3130303\r\n", REJECTED),
        (b"AUTH EXTERNAL 31 303030\r\n", REJECTED),
        (b"AUTH EXTERNAL xx\r\n", REJECTED),
        (b"AUTH EXTERNAL\r\nDATA 2d31\r\n", b"DATA\r\n" + REJECTED),
        (b"AUTH EXTERNAL\r\nCANCEL\r\n", b"DATA\r\n" + REJECTED),
        (b"AUTH EXTERNAL\r\nERROR what\r\n", b"DATA\r\n" + REJECTED),
        (b"AUTH EXTERNAL\r\nAUTH EXTERNAL\r\n", b"DATA\r\n" + ERROR),
        (b"AUTH EXTERNAL\r\nNEGOTIATE_UNIX_FD\r\n", b"DATA\r\n" + ERROR),
        (b"CANCEL\r\n", ERROR),
        (b"DATA\r\n", ERROR),
        (b"ERROR\r\n", REJECTED),
        (b"NEGOTIATE_UNIX_FD\r\n", ERROR),
        (AUTH + b"CANCEL\r\n", OK + REJECTED),
        (AUTH + b"ERROR\r\n", OK + REJECTED),
        (AUTH + AUTH, OK + ERROR),
        (AUTH + b"DATA\r\n", OK + ERROR),
        (AUTH + b"NEGOTIATE_UNIX_FD\r\n" * 2, OK + AGREE * 2),
        (b"\r\n", ERROR),
        (b"auth EXTERNAL\r\n", ERROR),
        (b" AUTH\r\n", ERROR),
        (b"AUTH\tEXTERNAL\r\n", ERROR),
        (b"AU\0TH\r\n", ERROR),
        (b"\xc3\xa4\r\n", ERROR),
        (b"AUTH\nBEGIN\r\n", ERROR),
        (b"AUTH\rBEGIN\r\n", ERROR),
        (AUTH + b"\nBEGIN\r\n", OK + ERROR),
        (AUTH + b"BEGIN\r\r\n", OK + ERROR),
        (AUTH + b"begin\r\n", OK + ERROR),
        (AUTH + b"DATA BEGIN\r\n", OK + ERROR),
        (AUTH + b"BEGIN\n", OK),
        (AUTH + b"BEGIN", OK),
    ],
)
def test_other_lines_are_answered_and_do_not_end_it(said: bytes, answered: bytes) -> None:
    server = SaslServer(GUID)
    assert server.feed(b"\0" + said) == answered
    assert not server.done


@pytest.mark.parametrize("uid", [b"0", b"1000", b"65534", b"4294967294"])
@pytest.mark.parametrize("how", [b"AUTH EXTERNAL ", b"AUTH EXTERNAL\r\nDATA "])
def test_bug_7_any_uid_may_be_claimed(how: bytes, uid: bytes) -> None:
    """A program in a user namespace claims the uid that it has in there; the kernel has said who it is."""
    server = make_server(b"\0", how + uid.hex().encode() + b"\r\n", b"BEGIN\r\n")
    assert server.done


@pytest.mark.parametrize(
    "claim",
    [b"-1", b"+0", b"00", b"01000", b"root", b" 0", b"0\n", b"4294967295", b"9" * 10, b"\xb2"],
)
def test_what_is_no_uid_is_rejected(claim: bytes) -> None:
    server = SaslServer(GUID)
    assert server.feed(b"\0AUTH EXTERNAL " + claim.hex().encode() + b"\r\n") == REJECTED


@pytest.mark.parametrize(
    "said",
    [
        b"A",
        b"\0BEGIN\r\n",
        b"\0BEGIN x\r\n",
        b"\0AUTH EXTERNAL\r\nBEGIN\r\n",
        b"\0AUTH EXTERNAL\r\nBEGIN \r\n",
        b"\0" + AUTH + b"BEGIN now\r\n",
        b"\0" + AUTH + b"BEGIN \r\n",
        b"\0" + AUTH + b"CANCEL\r\nBEGIN\r\n",
    ],
)
def test_a_violation_ends_it_for_good(said: bytes) -> None:
    server = SaslServer(GUID)
    with pytest.raises(PeerProtocolError):
        server.feed(said)
    with pytest.raises(PeerProtocolError, match="before"):
        server.feed(AUTH)
    assert not server.done


def test_rejections_are_counted() -> None:
    server = make_server(b"\0" + b"AUTH\r\n" * (MAX_REJECTED - 1))
    with pytest.raises(PeerProtocolError, match="rejected 6 times"):
        server.feed(b"AUTH\r\n")


def test_whoever_starts_anew_negotiates_anew() -> None:
    server = make_server(b"\0" + AUTH, b"NEGOTIATE_UNIX_FD\r\n", b"CANCEL\r\n", AUTH, b"BEGIN\r\n")
    assert server.done
    assert not server.unix_fds


def test_descriptors_can_be_left_out_of_it() -> None:
    server = SaslServer(GUID, takes_fds=False)
    said = b"\0" + AUTH + b"NEGOTIATE_UNIX_FD\r\nBEGIN\r\n"
    assert server.feed(said) == OK + ERROR
    assert server.done
    assert not server.unix_fds


def test_nothing_in_is_nothing_out() -> None:
    server = SaslServer(GUID)
    assert server.feed(b"") == b""
    assert server.feed(b"\0") == b""
    assert server.feed(b"") == b""


def test_an_endless_line_ends_it() -> None:
    server = make_server(b"\0", b"A" * (MAX_DIALOGUE - 1))
    with pytest.raises(PeerProtocolError, match="more than"):
        server.feed(b"A")


def test_endless_lines_end_it() -> None:
    server = make_server(b"\0")
    with pytest.raises(PeerProtocolError, match="more than"):
        for _ in range(MAX_DIALOGUE):
            server.feed(b"WHAT\r\n")


def test_lines_are_counted_on_both_sides() -> None:
    server = make_server(b"\0", b"\r\n" * MAX_LINES)
    with pytest.raises(PeerProtocolError, match=f"more than {MAX_LINES} lines"):
        server.feed(b"\r\n")
    lines = Lines()
    lines.feed(b"\r\n" * (MAX_LINES + 1))
    assert [lines.next_line() for _ in range(MAX_LINES)] == [b""] * MAX_LINES
    with pytest.raises(PeerProtocolError, match="lines"):
        lines.next_line()


def test_what_follows_the_dialogue_has_no_limit_here() -> None:
    server = make_server(b"\0" + AUTH + b"BEGIN\r\n" + b"x" * (2 * MAX_DIALOGUE))
    assert len(server.leftover) == 2 * MAX_DIALOGUE


def test_done_is_reached_only_by_begin_from_ready() -> None:
    ends = [start for start, (state, _) in sasl._TRANSITIONS.items() if state is ServerState.DONE]
    assert ends == [(ServerState.READY, Verb.BEGIN)]
    begun = {state for state, _ in sasl._TRANSITIONS}
    assert not begun & {ServerState.DONE, ServerState.FAILED}


@given(st.binary(max_size=60))
def test_no_bytes_authenticate_without_begin(data: bytes) -> None:
    server = make_server(b"\0")
    try:
        server.feed(data)
    except PeerProtocolError:
        return
    assert not server.done


@given(st.lists(st.integers(1, 70), max_size=6), st.booleans())
def test_server_and_client_agree_in_any_pieces(cuts: list[int], fds: bool) -> None:
    client, server = SaslClient(1000), SaslServer(GUID)
    said = client.start() + b"hello"
    answers = b"".join(server.feed(piece) for piece in _cut(said[:-12], cuts))
    answers += server.feed(said[-12:])
    if not fds:
        answers = answers.replace(AGREE, b"ERROR not here\r\n")
    for piece in _cut(answers, cuts):
        client.feed(piece)
    assert server.done
    assert client.done
    assert server.leftover == b"hello"
    assert client.leftover == b""
    assert client.guid == GUID
    assert client.unix_fds is fds
    assert server.unix_fds


def _cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, *(cut for cut in cuts if cut < len(data)), len(data)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


def test_the_client_keeps_what_follows() -> None:
    client = SaslClient(1000)
    assert client.feed(OK + AGREE + b"l\2") == b""
    assert client.done
    assert client.leftover == b"l\2"


@pytest.mark.parametrize(
    "answer",
    [
        REJECTED,
        b"DATA\r\n",
        b"OK\r\n",
        b"OK x\r\n",
        b"\r\n",
        AGREE,
        OK + b"WHAT\r\n",
        OK + b"REJECTED\r\n",
        OK + OK,
        b"x" * MAX_DIALOGUE,
    ],
)
def test_the_client_takes_no_other_answer(answer: bytes) -> None:
    client = SaslClient(1000)
    with pytest.raises(PeerProtocolError):
        client.feed(answer)
    assert not client.done
    with pytest.raises(PeerProtocolError):
        client.feed(OK)
