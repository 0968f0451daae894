"""An address is refused with ConfigError in one line, or each socket in it written anew is that socket."""

import re
from typing import Final

from broker.wire.address import (
    MAX_PATH,
    TcpAddress,
    UnixAddress,
    make_unix_address,
    parse_address,
    parse_any_address,
)
from broker.wire.errors import ConfigError
from integration.fuzz.pieces import text_of

_PLAIN: Final = re.compile(r"[!-~]+")


def check(data: bytes) -> None:
    """Hold the invariant."""
    text = text_of(data)
    check_any(text)
    try:
        found = parse_address(text, runtime_dir="/run/user/7")
    except ConfigError as exc:
        assert len(str(exc).splitlines()) == 1
        return
    assert found
    for address in found:
        assert 0 < len(address.path) <= MAX_PATH + 1
        assert 0 not in address.path[1:]
        text = make_unix_address(address.path, address.guid)
        assert _PLAIN.fullmatch(text)
        assert parse_address(text) == [address]


def check_any(text: str) -> None:
    """Hold it for who takes other transports as well."""
    try:
        found = parse_any_address(text, runtime_dir="/run/user/7")
    except ConfigError as exc:
        assert len(str(exc).splitlines()) == 1
        return
    assert found
    # Whoever takes unix sockets alone finds the same ones.
    unix = [one for one in found if isinstance(one, UnixAddress)]
    assert not unix or parse_address(text, runtime_dir="/run/user/7") == unix
    for one in found:
        if isinstance(one, TcpAddress):
            assert 0 < one.port < 65536
            assert _PLAIN.fullmatch(one.host)
            assert one.noncefile is None or (one.noncefile and 0 not in one.noncefile)


def seeds() -> list[bytes]:
    """Return addresses of every form."""
    return [
        b"unix:path=/tmp/a%20b,guid=" + b"0a" * 16,
        b"tcp:host=localhost,port=1;unix:abstract=x-y_z.\\*;unix:runtime=yes",
        b"unix:path=a,path=b;",
        b"unix:tmpdir=/tmp",
        b"unix:path=%0",
        b"nonce-tcp:host=127.0.0.1,port=65535,family=ipv6,noncefile=/tmp/n;autolaunch:",
    ]
