"""The client's dialogue on TCP, step by step: which mechanisms it tries, and what it says of a cookie."""

import hashlib
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from broker.wire.errors import PeerProtocolError
from broker.wire.sasl import MAX_DIALOGUE, SaslServer
from broker.wire.sasl_steps import CookieError, MultiMechanismSaslClient

GUID = "0123456789abcdef0123456789abcdef"
OK = f"OK {GUID}"
CHALLENGE = b"\1\2\3"
COOKIE = "c00c1e"

EXTERNAL = "AUTH EXTERNAL 31303030"
COOKIE_SHA1 = "AUTH DBUS_COOKIE_SHA1 31303030"
ANONYMOUS = f"AUTH ANONYMOUS {b'buswarden'.hex()}"


def data(text: str) -> str:
    return f"DATA {text.encode().hex()}"


ASKED = data("org_freedesktop_general 7 5e7e7")
DIGEST = hashlib.sha1(f"5e7e7:010203:{COOKIE}".encode()).hexdigest()
ANSWERED = data(f"010203 {DIGEST}")


def fetch(context: str, cookie_id: str) -> str:
    if (context, cookie_id) != ("org_freedesktop_general", "7"):
        raise CookieError(f"no cookie {cookie_id} in {context}")
    return COOKIE


def make_client() -> MultiMechanismSaslClient:
    """Return one that has said its first line."""
    client = MultiMechanismSaslClient(1000, CHALLENGE, fetch)
    assert client.start() == b"\0" + lines(EXTERNAL)
    return client


def lines(*said: str) -> bytes:
    return "".join(f"{line}\r\n" for line in said).encode()


# What the server says, and what the client says to each line; its first line is always EXTERNAL.
GOOD = [
    pytest.param([(OK, "BEGIN")], id="external"),
    pytest.param(
        [("REJECTED DBUS_COOKIE_SHA1", COOKIE_SHA1), (ASKED, ANSWERED), (OK, "BEGIN")],
        id="cookie",
    ),
    pytest.param([("REJECTED ANONYMOUS", ANONYMOUS), (OK, "BEGIN")], id="anonymous"),
    pytest.param(
        [
            ("REJECTED ANONYMOUS EXTERNAL DBUS_COOKIE_SHA1 KERBEROS", COOKIE_SHA1),
            (ASKED, ANSWERED),
            ("REJECTED EXTERNAL DBUS_COOKIE_SHA1 ANONYMOUS", ANONYMOUS),
            (OK, "BEGIN"),
        ],
        id="wrong-cookie-then-anonymous",
    ),
    pytest.param(
        [
            ("REJECTED DBUS_COOKIE_SHA1 ANONYMOUS", COOKIE_SHA1),
            (data("org_freedesktop_general 8 5e7e7"), "CANCEL"),
            ("REJECTED DBUS_COOKIE_SHA1 ANONYMOUS", ANONYMOUS),
            (OK, "BEGIN"),
        ],
        id="no-such-cookie",
    ),
    pytest.param(
        [
            ("ERROR what", "CANCEL"),
            ("REJECTED DBUS_COOKIE_SHA1", COOKIE_SHA1),
            (OK, "BEGIN"),
        ],
        id="error-is-no-end",
    ),
    pytest.param(
        [("DATA", "CANCEL"), ("REJECTED ANONYMOUS", ANONYMOUS), (OK, "BEGIN")],
        id="external-wants-data",
    ),
]


@pytest.mark.parametrize("dialogue", GOOD)
def test_a_good_dialogue(dialogue: Sequence[tuple[str, str]]) -> None:
    client = make_client()
    for said, answer in dialogue:
        assert not client.done
        assert client.feed(lines(said)) == lines(answer)
    assert client.done
    assert (client.guid, client.leftover, client.unix_fds) == (GUID, b"", False)


@pytest.mark.parametrize("dialogue", GOOD)
def test_a_good_dialogue_however_it_is_cut(dialogue: Sequence[tuple[str, str]]) -> None:
    said = lines(*(said for said, _ in dialogue))
    answers = lines(*(answer for _, answer in dialogue))
    whole, slow = make_client(), make_client()
    assert whole.feed(said + b"l\2rest") == answers
    assert b"".join(slow.feed(bytes([byte])) for byte in said) == answers
    assert whole.done
    assert slow.done
    assert whole.leftover == b"l\2rest"
    assert slow.leftover == b""


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (["REJECTED"], "EXTERNAL: rejected; DBUS_COOKIE_SHA1: not offered; ANONYMOUS: not off"),
        (["REJECTED EXTERNAL"], "not offered"),
        (["REJECTED external anonymous"], "not offered"),
        (["REJECTED ANONYMOUS", "REJECTED ANONYMOUS"], "ANONYMOUS: rejected"),
        (
            ["REJECTED DBUS_COOKIE_SHA1", data("c 9 x"), "REJECTED DBUS_COOKIE_SHA1"],
            "DBUS_COOKIE_SHA1: no cookie 9 in c; ANONYMOUS: not offered",
        ),
        (["ERROR", "ERROR"], "answers CANCEL with b'ERROR'"),
        (["ERROR", OK], "answers CANCEL"),
        (["OK"], "rejected the authentication"),
        (["OK x"], "rejected the authentication"),
        ([f"{OK} "], "rejected the authentication"),
        (["ok"], "rejected the authentication"),
        ([""], "rejected the authentication"),
        (["AGREE_UNIX_FD"], "rejected the authentication"),
        (["WHAT"], "rejected the authentication"),
    ],
)
def test_a_bus_that_does_not_let_us_in(said: Sequence[str], problem: str) -> None:
    client = make_client()
    with pytest.raises(PeerProtocolError, match=problem):
        client.feed(lines(*said))
    assert not client.done
    with pytest.raises(PeerProtocolError, match="before"):
        client.feed(lines(OK))


@pytest.mark.parametrize(
    ("challenge", "problem"),
    [
        ("DATA", "not the challenge"),
        ("DATA xx", "not the challenge"),
        ("DATA 61 62", "not the challenge"),
        (data("context 7"), "not the challenge"),
        (data("context 7 a b"), "not the challenge"),
        (data("context  7 a"), "not the challenge"),
        (data("context 7 "), "not the challenge"),
        (data("context x a"), "not the challenge"),
        (data("context -1 a"), "not the challenge"),
        (data("context 7 \n"), "not the challenge"),
        (data(f"context {'7' * 21} a"), "not the challenge"),
        (data(" 7 a"), "not the context"),
        (data("../passwd 7 a"), "not the context"),
        (data(".. 7 a"), "not the context"),
        (data("a/b 7 a"), "not the context"),
        (data("a\\b 7 a"), "not the context"),
        (data("a.b 7 a"), "not the context"),
        (data("a\tb 7 a"), "not the context"),
        (data("a\0b 7 a"), "not the context"),
        (data("ä 7 a"), "not the context"),
        (data(f"{'a' * 129} 7 a"), "not the context"),
    ],
)
def test_a_challenge_that_is_none(challenge: str, problem: str) -> None:
    def fetch_never(_context: str, _cookie_id: str) -> str:
        raise AssertionError("asked for")

    client = MultiMechanismSaslClient(1000, CHALLENGE, fetch_never)
    client.start()
    client.feed(lines("REJECTED DBUS_COOKIE_SHA1"))
    with pytest.raises(PeerProtocolError, match=problem):
        client.feed(lines(challenge))


def test_an_endless_line_ends_it() -> None:
    client = make_client()
    client.feed(b"A" * (MAX_DIALOGUE - 1))
    with pytest.raises(PeerProtocolError, match="more than"):
        client.feed(b"A")


ANY_LINE = st.sampled_from(
    ["REJECTED EXTERNAL DBUS_COOKIE_SHA1 ANONYMOUS", "ERROR", "DATA", ASKED, OK, "WHAT"]
)


@given(st.lists(ANY_LINE, max_size=20))
def test_it_ends_whatever_the_server_says(said: list[str]) -> None:
    client = make_client()
    for number, line in enumerate(said):
        try:
            client.feed(lines(line))
        except PeerProtocolError:
            return
        if client.done:
            return
        assert number < 8


@given(st.binary(max_size=60))
def test_no_bytes_let_it_in_without_ok(said: bytes) -> None:
    client = make_client()
    try:
        client.feed(said)
    except PeerProtocolError:
        return
    assert not client.done


@given(st.lists(st.integers(1, 70), max_size=6))
def test_our_own_server_lets_it_in(cuts: list[int]) -> None:
    client, server = MultiMechanismSaslClient(1000, CHALLENGE, fetch), SaslServer(GUID)
    answers = server.feed(client.start())
    places = sorted({0, *(cut for cut in cuts if cut < len(answers)), len(answers)})
    said = b"".join(client.feed(answers[a:b]) for a, b in itertools.pairwise(places))
    server.feed(said)
    assert server.done
    assert client.done
    assert not server.unix_fds
