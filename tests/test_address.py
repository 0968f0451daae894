"""Addresses of unix sockets are read and written; everything else is an operator's error."""

import pytest
from hypothesis import given, strategies as st

from broker.wire.address import MAX_PATH, UnixAddress, make_unix_address, parse_address
from broker.wire.errors import ConfigError

GUID = "0123456789abcdef0123456789ABCDEF"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unix:path=/run/bus", [UnixAddress(b"/run/bus")]),
        (f"unix:path=/run/bus,guid={GUID}", [UnixAddress(b"/run/bus", GUID)]),
        (f"unix:guid={GUID},path=/b;", [UnixAddress(b"/b", GUID)]),
        ("unix:abstract=/tmp/x", [UnixAddress(b"\0/tmp/x")]),
        ("unix:path=/a%20b%2c%C3%A4", [UnixAddress("/a b,ä".encode())]),
        ("unix:runtime=yes", [UnixAddress(b"/run/user/1/bus")]),
        ("unix:path=/a;unix:path=/b", [UnixAddress(b"/a"), UnixAddress(b"/b")]),
        ("tcp:host=x,port=1;unix:path=/b;autolaunch:", [UnixAddress(b"/b")]),
    ],
)
def test_unix_sockets_are_read(text: str, expected: list[UnixAddress]) -> None:
    assert parse_address(text, runtime_dir="/run/user/1") == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        (";;", "empty"),
        ("/run/bus", "not a D-Bus address"),
        ("tcp:host=localhost,port=1", "not 'tcp'"),
        ("autolaunch:;unixexec:path=x", "not 'autolaunch', 'unixexec'"),
        ("unix:", "needs one of"),
        (f"unix:guid={GUID}", "needs one of"),
        ("unix:path=/a,abstract=b", "needs one of"),
        ("unix:path=/a,path=/b", "'path' twice"),
        ("unix:tmpdir=/tmp", "'tmpdir'"),
        ("unix:path", "'path' in"),
        ("unix:path=", "empty path"),
        ("unix:path=/a%00b", "NUL"),
        ("unix:path=/a b", "write ' ' as %XX"),
        ("unix:path=/a%2", "write '%'"),
        ("unix:path=/a%zz", "write '%'"),
        ("unix:path=/ä", "write 'ä'"),
        ("unix:runtime=no", "can only be yes"),
        ("unix:runtime=yes", "XDG_RUNTIME_DIR"),
        ("unix:path=/a,guid=12", "32 hexadecimal"),
        ("unix:path=/a,guid=%ff", "32 hexadecimal"),
        ("unix:path=/" + "a" * MAX_PATH, "more than 107"),
        ("unix:path=/a;unix:path=", "empty path"),
    ],
)
def test_other_addresses_are_refused_with_the_reason(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_address(text)


@pytest.mark.parametrize(
    ("path", "guid", "expected"),
    [
        (b"/run/bus", None, "unix:path=/run/bus"),
        ("/run/ä;,", GUID, f"unix:path=/run/%c3%a4%3b%2c,guid={GUID}"),
        (b"\0abs", None, "unix:abstract=abs"),
        ("/\udcff", None, "unix:path=/%ff"),
    ],
)
def test_addresses_are_written(path: bytes | str, guid: str | None, expected: str) -> None:
    assert make_unix_address(path, guid) == expected


@given(
    st.binary(min_size=1, max_size=MAX_PATH).filter(lambda path: 0 not in path),
    st.booleans(),
    st.none() | st.just(GUID),
)
def test_what_is_written_is_read(path: bytes, abstract: bool, guid: str | None) -> None:
    address = UnixAddress(b"\0" + path if abstract else path, guid)
    text = make_unix_address(address.path, guid)
    assert text.isascii()
    assert parse_address(text) == [address]


@given(st.text("unix:path=/abstract,guid%;é", max_size=40))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        found = parse_address(text)
    except ConfigError:
        return
    assert found
