"""D-Bus server addresses, of unix sockets. Nothing here looks at the file system or environment."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from broker.wire.errors import ConfigError

# sun_path has 108 bytes, the last one for the NUL of a path; an abstract name begins with one.
MAX_PATH: Final = 107

_PLAIN: Final = frozenset(rb"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_/.\*")
_ESCAPE: Final = re.compile(r"%([0-9A-Fa-f]{2})|([-0-9A-Za-z_/.\\*])")
_GUID: Final = re.compile(r"[0-9A-Fa-f]{32}")
_PLACES: Final = ("path", "abstract", "runtime")


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A unix socket to connect to."""

    path: bytes  # as for connect(): an abstract one begins with NUL
    guid: str | None = None  # of the server that should be there


def parse_address(text: str, *, runtime_dir: str | None = None) -> list[UnixAddress]:
    """Return the sockets to try, in order. Raises ConfigError.

    Alternatives of other transports are passed over as long as there is a unix socket. `unix:runtime=yes`
    is in `runtime_dir`.
    """
    found = []
    others = []
    for entry in filter(None, text.split(";")):
        transport, colon, rest = entry.partition(":")
        if not colon:
            raise ConfigError(f"not a D-Bus address: {entry[:80]!r}")
        if transport == "unix":
            found.append(_parse_unix(entry, rest, runtime_dir))
        else:
            others.append(transport)
    if found:
        return found
    if others:
        listed = ", ".join(f"{other[:20]!r}" for other in others[:5])
        raise ConfigError(f"only unix sockets can be connected to, not {listed}")
    raise ConfigError("empty D-Bus address")


def make_unix_address(path: bytes | str, guid: str | None = None) -> str:
    """Return the address of a socket; `path` as in UnixAddress."""
    raw = path.encode("utf-8", "surrogateescape") if isinstance(path, str) else path
    key = "path"
    if raw.startswith(b"\0"):
        key, raw = "abstract", raw[1:]
    text = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02x}" for byte in raw)
    return f"unix:{key}={text}" + (f",guid={guid}" if guid else "")


def _parse_unix(entry: str, rest: str, runtime_dir: str | None) -> UnixAddress:
    keys: dict[str, bytes] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or key not in (*_PLACES, "guid"):
            raise ConfigError(f"{key[:40]!r} in D-Bus address {entry[:80]!r}: cannot connect by it")
        if key in keys:
            raise ConfigError(f"{key!r} twice in D-Bus address {entry[:80]!r}")
        keys[key] = _unescape(value, entry)
    guid = keys.pop("guid", None)
    if guid is not None and not _GUID.fullmatch(guid.decode("ascii", "replace")):
        raise ConfigError(f"the guid in D-Bus address {entry[:80]!r} is not 32 hexadecimal digits")
    if len(keys) != 1:
        raise ConfigError(f"D-Bus address {entry[:80]!r} needs one of path=, abstract=, runtime=")
    path = _find_path(keys, entry, runtime_dir)
    return UnixAddress(path, guid.decode() if guid is not None else None)


def _find_path(keys: Mapping[str, bytes], entry: str, runtime_dir: str | None) -> bytes:
    ((key, value),) = keys.items()
    if key == "runtime":
        if value != b"yes":
            raise ConfigError(f"D-Bus address {entry[:80]!r}: runtime= can only be yes")
        if not runtime_dir:
            raise ConfigError(f"D-Bus address {entry[:80]!r}: there is no XDG_RUNTIME_DIR")
        value = runtime_dir.encode("utf-8", "surrogateescape") + b"/bus"
    if not value or 0 in value:
        raise ConfigError(f"D-Bus address {entry[:80]!r}: empty path, or one with NUL")
    if len(value) > MAX_PATH:
        raise ConfigError(f"D-Bus address {entry[:80]!r}: more than {MAX_PATH} bytes of path")
    return b"\0" + value if key == "abstract" else value


def _unescape(value: str, entry: str) -> bytes:
    out = bytearray()
    at = 0
    while at < len(value):
        piece = _ESCAPE.match(value, at)
        if piece is None:
            raise ConfigError(f"D-Bus address {entry[:80]!r}: write {value[at]!r} as %XX")
        out.append(int(piece[1], 16) if piece[1] else ord(piece[2]))
        at = piece.end()
    return bytes(out)
