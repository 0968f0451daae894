"""Addresses of unix sockets are read and written; others are read for who takes them, and else an error."""

import pytest
from hypothesis import given, strategies as st

from broker.wire.address import (
    MAX_PATH,
    Address,
    AutolaunchAddress,
    TcpAddress,
    UnixAddress,
    make_unix_address,
    parse_address,
    parse_any_address,
)
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
    ("text", "expected"),
    [
        ("tcp:host=127.0.0.1,port=1", [TcpAddress("127.0.0.1", 1)]),
        ("tcp:port=65535,host=a-b.example", [TcpAddress("a-b.example", 65535)]),
        ("tcp:host=%3a%3A1,port=08,family=ipv6", [TcpAddress("::1", 8, "ipv6")]),
        (f"tcp:host=h,port=7,family=ipv4,guid={GUID};", [TcpAddress("h", 7, "ipv4", guid=GUID)]),
        (
            "nonce-tcp:host=h,port=7,noncefile=/tmp/a%20b",
            [TcpAddress("h", 7, noncefile=b"/tmp/a b")],
        ),
        ("autolaunch:", [AutolaunchAddress()]),
        (f"autolaunch:guid={GUID}", [AutolaunchAddress(GUID)]),
        (
            "unix:path=/a;tcp:host=h,port=7;autolaunch:;unix:runtime=yes;launchd:env=X",
            [
                UnixAddress(b"/a"),
                TcpAddress("h", 7),
                AutolaunchAddress(),
                UnixAddress(b"/run/user/1/bus"),
            ],
        ),
    ],
)
def test_other_transports_are_read_for_who_takes_them(text: str, expected: list[Address]) -> None:
    assert parse_any_address(text, runtime_dir="/run/user/1") == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        ("/run/bus", "not a D-Bus address"),
        ("unix:path=/a,path=/b", "'path' twice"),
        ("unixexec:path=x;launchd:", "and autolaunch can be .*, not 'unixexec', 'launchd'"),
        ("tcp:", "needs host="),
        ("tcp:port=1", "needs host="),
        ("tcp:host=h", "needs port="),
        ("nonce-tcp:host=h,port=1", "needs noncefile="),
        ("tcp:host=h,port=1,noncefile=/n", "'noncefile' in"),
        ("tcp:host=h,port=1,bind=x", "'bind' in"),
        ("tcp:host=h,host=i,port=1", "'host' twice"),
        ("tcp:host=,port=1", "host= is not"),
        ("tcp:host=a%20b,port=1", "host= is not"),
        ("tcp:host=a%00b,port=1", "host= is not"),
        ("tcp:host=%c3%a4,port=1", "host= is not"),
        (f"tcp:host={'h' * 254},port=1", "host= is not"),
        ("tcp:host=h,port=", "port= is not between 1 and 65535"),
        ("tcp:host=h,port=0", "port= is not"),
        ("tcp:host=h,port=65536", "port= is not"),
        ("tcp:host=h,port=-1", "port= is not"),
        ("tcp:host=h,port=%2b1", "port= is not"),
        ("tcp:host=h,port=000001", "port= is not"),
        ("tcp:host=h,port=http", "port= is not"),
        ("tcp:host=h,port=1,family=ip", "ipv4 or ipv6"),
        ("tcp:host=h,port=1,family=", "ipv4 or ipv6"),
        ("tcp:host=h,port=1,guid=1", "32 hexadecimal"),
        ("nonce-tcp:host=h,port=1,noncefile=", "noncefile= is empty"),
        ("nonce-tcp:host=h,port=1,noncefile=/a%00", "or has a NUL"),
        ("autolaunch:scope=*", "'scope' in"),
        ("unix:path=/a;tcp:host=h", "needs port="),
    ],
)
def test_what_nobody_takes_is_refused_with_the_reason(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        parse_any_address(text)
    assert "\n" not in str(caught.value)


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


@given(st.text("unixtcp-nce:hsort=127,gfamlv46%;é", max_size=40))
def test_any_text_is_an_address_of_some_kind_or_refused(text: str) -> None:
    for parse in (parse_address, parse_any_address):
        try:
            found = parse(text)
        except ConfigError:
            continue
        assert found
