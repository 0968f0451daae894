"""Bodies are read strictly and written rightly; messages are whole and parse."""

import contextlib
import struct

import pytest
from hypothesis import given, strategies as st

from broker.wire.errors import PeerProtocolError
from broker.wire.header import Flag, Header, MessageType, measure, parse_header
from broker.wire.marshal import (
    Value,
    make_body,
    make_call,
    make_error,
    make_return,
    make_signal,
    read_body,
)

DRIVER = "org.freedesktop.DBus"
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\0"), max_size=9)
VALUES = st.one_of(
    st.tuples(st.just("s"), TEXTS),
    st.tuples(st.just("o"), st.sampled_from(["/", "/a/b"])),
    st.tuples(st.just("g"), st.sampled_from(["", "a{sv}", "(ii)"])),
    st.tuples(st.just("u"), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("b"), st.booleans()),
    st.tuples(st.just("as"), st.lists(TEXTS, max_size=3).map(tuple)),
)


@given(st.lists(VALUES, max_size=5))
def test_what_is_made_is_read(typed: list[tuple[str, Value]]) -> None:
    signature = "".join(kind for kind, _ in typed)
    values = tuple(value for _, value in typed)
    body = make_body(signature, values)
    assert read_body(signature, body, little=True) == values
    for length in range(len(body)):
        with pytest.raises(PeerProtocolError):
            read_body(signature, body[:length], little=True)


def test_big_endian_bodies_are_read() -> None:
    body = struct.pack(">I3sxI", 2, b"hi\0"[:3], 7)
    assert read_body("su", body, little=False) == ("hi", 7)


def test_an_empty_body_has_no_values() -> None:
    assert read_body("", b"", little=True) == ()
    with pytest.raises(PeerProtocolError, match="1 bytes too many"):
        read_body("", b"x", little=True)


@pytest.mark.parametrize("signature", ["i", "a", "v", "sv", "aas", "a{sv}", "(s)"])
def test_other_types_are_refused(signature: str) -> None:
    with pytest.raises(PeerProtocolError, match="a body of type"):
        read_body(signature, bytes(64), little=True)


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        ("s", b"\1\0\0\0a\0x"),
        ("b", b"\2\0\0\0"),
        ("o", b"\1\0\0\0a\0"),
        ("g", b"\1a\0"),
        ("as", b"\5\0\0\0\1\0\0\0a\0"),
        ("as", b"\2\0\0\0\1\0\0\0a\0"),
        ("as", b"\xff\xff\xff\xff"),
        ("su", b"\1\0\0\0a\0\1\0\0\0\0\0"),
    ],
)
def test_bad_bodies_are_refused(signature: str, body: bytes) -> None:
    with pytest.raises(PeerProtocolError):
        read_body(signature, body, little=True)


@pytest.mark.parametrize(
    ("signature", "value"),
    [("s", "a\0b"), ("as", ["a\0b"]), ("s", 1), ("u", "x"), ("s", ["x"]), ("as", "x"), ("g", True)],
)
def test_a_value_that_does_not_fit_its_type_is_our_mistake(signature: str, value: Value) -> None:
    with pytest.raises(ValueError, match=" as "):
        make_body(signature, [value])


def test_too_few_or_too_many_values_are_our_mistake() -> None:
    with pytest.raises(ValueError, match="zip"):
        make_body("s", [])


def parse(message: bytes) -> tuple[Header, tuple[Value, ...]]:
    assert measure(message) == len(message)
    header = parse_header(message)
    assert header.little
    return header, read_body(header.signature, message[header.size :], little=True)


def test_a_call_says_what_it_should() -> None:
    header, values = parse(
        make_call(
            9,
            destination=DRIVER,
            path="/",
            interface=DRIVER,
            member="RequestName",
            signature="su",
            values=("a.b", 4),
            flags=Flag.NO_AUTO_START,
        )
    )
    assert (header.type, header.serial, header.flags) == (MessageType.METHOD_CALL, 9, 2)
    assert (header.destination, header.path, header.interface) == (DRIVER, "/", DRIVER)
    assert (header.member, values) == ("RequestName", ("a.b", 4))


def test_a_body_that_is_made_already_goes_as_it_is() -> None:
    body = make_body("u", (7,))
    for message in (
        make_call(
            1, destination="a.b", path="/", interface=None, member="M", signature="u", body=body
        ),
        make_return(1, reply_serial=3, signature="u", body=body),
        make_signal(1, path="/", interface="a.B", member="M", signature="u", body=body),
    ):
        header, values = parse(message)
        assert (values, header.body_length) == ((7,), 4)
    # Other types than `make_body` knows are the caller's to pack.
    message = make_call(
        1,
        destination=None,
        path="/",
        interface=None,
        member="M",
        signature="h",
        body=bytes(4),
        unix_fds=2,
    )
    header = parse_header(message)
    assert message.endswith(bytes(4))
    assert (header.signature, header.unix_fds, header.body_length) == ("h", 2, 4)


def test_a_return_says_what_it_should() -> None:
    message = make_return(
        1, reply_serial=3, destination=":1.2", sender=DRIVER, signature="as", values=(["a", "b"],)
    )
    header, values = parse(message)
    assert (header.type, header.reply_serial) == (MessageType.METHOD_RETURN, 3)
    assert (header.destination, header.sender) == (":1.2", DRIVER)
    assert header.flags == Flag.NO_REPLY_EXPECTED
    assert values == (("a", "b"),)


def test_an_error_says_what_it_should() -> None:
    header, values = parse(make_error(1, reply_serial=3, name="a.E", text="no", sender=DRIVER))
    assert (header.type, header.error_name, header.reply_serial) == (MessageType.ERROR, "a.E", 3)
    assert (header.sender, header.destination, values) == (DRIVER, None, ("no",))


def test_a_signal_says_what_it_should() -> None:
    header, values = parse(
        make_signal(1, path="/", interface="a.B", member="S", signature="b", values=(True,))
    )
    assert (header.type, header.path, header.interface) == (MessageType.SIGNAL, "/", "a.B")
    assert (header.member, header.sender, values) == ("S", None, (True,))


@given(st.text("sogubav", max_size=4), st.binary(max_size=40), st.booleans())
def test_any_bytes_are_read_or_refused(signature: str, body: bytes, little: bool) -> None:
    with contextlib.suppress(PeerProtocolError):
        read_body(signature, body, little=little)
