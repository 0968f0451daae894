"""An address is refused with ConfigError in one line, or each socket in it written anew is that socket."""

import re
from typing import Final

from broker.wire.address import MAX_PATH, make_unix_address, parse_address
from broker.wire.errors import ConfigError
from integration.fuzz.pieces import text_of

_PLAIN: Final = re.compile(r"[!-~]+")


def check(data: bytes) -> None:
    """Hold the invariant."""
    try:
        found = parse_address(text_of(data), runtime_dir="/run/user/7")
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


def seeds() -> list[bytes]:
    """Return addresses of every form."""
    return [
        b"unix:path=/tmp/a%20b,guid=" + b"0a" * 16,
        b"tcp:host=localhost,port=1;unix:abstract=x-y_z.\\*;unix:runtime=yes",
        b"unix:path=a,path=b;",
        b"unix:tmpdir=/tmp",
        b"unix:path=%0",
    ]
