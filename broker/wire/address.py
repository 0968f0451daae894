"""D-Bus server addresses: unix sockets, and for the proxy the transports of xdg-dbus-proxy.

The functions look neither at the file system nor at the environment.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from broker.wire.errors import ConfigError

# sun_path has 108 bytes. The last byte is the NUL of a path; an abstract name begins with NUL.
MAX_PATH: Final = 107

_PLAIN: Final = frozenset(rb"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_/.\*")
_ESCAPE: Final = re.compile(r"%([0-9A-Fa-f]{2})|([-0-9A-Za-z_/.\\*])")
_GUID: Final = re.compile(r"[0-9A-Fa-f]{32}")
_PLACES: Final = ("path", "abstract", "runtime")
_FAMILIES: Final = ("ipv4", "ipv6")
# A DNS name has at most 253 characters, and a numeric address far fewer.
_HOST: Final = re.compile(r"[\x21-\x7e]{1,253}")
_PORT: Final = re.compile(r"[0-9]{1,5}")
_MAX_PORT: Final = 65535


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A unix socket to connect to."""

    path: bytes  # as for connect(): an abstract path begins with NUL
    guid: str | None = None  # of the expected server


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A TCP server to connect to."""

    host: str  # a name or a numeric address
    port: int
    family: str | None = None  # "ipv4", "ipv6", or None for either
    noncefile: bytes | None = None  # the file whose content the client sends first
    guid: str | None = None


@dataclass(frozen=True, slots=True)
class AutolaunchAddress:
    """The bus of the X11 display, started if none is running."""

    guid: str | None = None


Address = UnixAddress | TcpAddress | AutolaunchAddress


def parse_address(text: str, *, runtime_dir: str | None = None) -> list[UnixAddress]:
    """Return the sockets to try, in order. Raises ConfigError.

    Alternatives of other transports are skipped as long as there is a unix socket. The address
    `unix:runtime=yes` is in `runtime_dir`.
    """
    found = []
    others = []
    for entry, transport, rest in _split(text):
        if transport == "unix":
            found.append(_parse_unix(entry, rest, runtime_dir))
        else:
            others.append(transport)
    if found:
        return found
    if others:
        raise ConfigError(f"only unix sockets can be connected to, not {_listed(others)}")
    raise ConfigError("empty D-Bus address")


def parse_any_address(text: str, *, runtime_dir: str | None = None) -> list[Address]:
    """Return all addresses to try, in order. Raises ConfigError.

    A client that proves its identity by the socket must use `parse_address` instead.
    """
    found: list[Address] = []
    others = []
    for entry, transport, rest in _split(text):
        match transport:
            case "unix":
                found.append(_parse_unix(entry, rest, runtime_dir))
            case "tcp" | "nonce-tcp":
                found.append(_parse_tcp(entry, rest, needs_nonce=transport == "nonce-tcp"))
            case "autolaunch":
                _, guid = _parse_keys(entry, rest, ())
                found.append(AutolaunchAddress(guid))
            case _:
                others.append(transport)
    if found:
        return found
    if others:
        allowed = "unix, tcp, nonce-tcp and autolaunch"
        raise ConfigError(f"only {allowed} can be connected to, not {_listed(others)}")
    raise ConfigError("empty D-Bus address")


def make_unix_address(path: bytes | str, guid: str | None = None) -> str:
    """Return the address of a socket. `path` is as in UnixAddress."""
    raw = path.encode("utf-8", "surrogateescape") if isinstance(path, str) else path
    key = "path"
    if raw.startswith(b"\0"):
        key, raw = "abstract", raw[1:]
    text = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02x}" for byte in raw)
    return f"unix:{key}={text}" + (f",guid={guid}" if guid else "")


def _split(text: str) -> Iterator[tuple[str, str, str]]:
    for entry in filter(None, text.split(";")):
        transport, colon, rest = entry.partition(":")
        if not colon:
            raise ConfigError(f"not a D-Bus address: {entry[:80]!r}")
        yield entry, transport, rest


def _listed(transports: list[str]) -> str:
    return ", ".join(f"{transport[:20]!r}" for transport in transports[:5])


def _parse_keys(
    entry: str, rest: str, known: Collection[str]
) -> tuple[dict[str, bytes], str | None]:
    """Return the values by key, and the guid separately."""
    keys: dict[str, bytes] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or key not in (*known, "guid"):
            raise ConfigError(f"{key[:40]!r} in D-Bus address {entry[:80]!r} is not supported")
        if key in keys:
            raise ConfigError(f"{key!r} twice in D-Bus address {entry[:80]!r}")
        keys[key] = _unescape(value, entry)
    guid = keys.pop("guid", None)
    if guid is not None and not _GUID.fullmatch(guid.decode("ascii", "replace")):
        raise ConfigError(f"the guid in D-Bus address {entry[:80]!r} is not 32 hexadecimal digits")
    return keys, guid.decode() if guid is not None else None


def _parse_unix(entry: str, rest: str, runtime_dir: str | None) -> UnixAddress:
    keys, guid = _parse_keys(entry, rest, _PLACES)
    if len(keys) != 1:
        raise ConfigError(f"D-Bus address {entry[:80]!r} needs one of path=, abstract=, runtime=")
    path = _find_path(keys, entry, runtime_dir)
    return UnixAddress(path, guid)


def _parse_tcp(entry: str, rest: str, *, needs_nonce: bool) -> TcpAddress:
    known = ("host", "port", "family", "noncefile") if needs_nonce else ("host", "port", "family")
    keys, guid = _parse_keys(entry, rest, known)
    for key in known:
        if key != "family" and key not in keys:
            raise ConfigError(f"D-Bus address {entry[:80]!r} needs {key}=")
    host, port, family = (
        keys[key].decode("ascii", "replace") if key in keys else None
        for key in ("host", "port", "family")
    )
    if host is None or not _HOST.fullmatch(host):
        raise ConfigError(f"D-Bus address {entry[:80]!r}: host= is not the name of a host")
    if port is None or not _PORT.fullmatch(port) or not 0 < int(port) <= _MAX_PORT:
        raise ConfigError(f"D-Bus address {entry[:80]!r}: port= is not between 1 and {_MAX_PORT}")
    if family not in (None, *_FAMILIES):
        raise ConfigError(f"D-Bus address {entry[:80]!r}: family= can only be ipv4 or ipv6")
    noncefile = keys.get("noncefile")
    if noncefile is not None and (not noncefile or 0 in noncefile):
        raise ConfigError(f"D-Bus address {entry[:80]!r}: noncefile= is empty, or has a NUL")
    return TcpAddress(host, int(port), family, noncefile, guid)


def _find_path(keys: Mapping[str, bytes], entry: str, runtime_dir: str | None) -> bytes:
    ((key, value),) = keys.items()
    if key == "runtime":
        if value != b"yes":
            raise ConfigError(f"D-Bus address {entry[:80]!r}: runtime= can only be yes")
        if not runtime_dir:
            raise ConfigError(f"D-Bus address {entry[:80]!r}: there is no XDG_RUNTIME_DIR")
        value = runtime_dir.encode("utf-8", "surrogateescape") + b"/bus"
    if not value or 0 in value:
        raise ConfigError(f"D-Bus address {entry[:80]!r}: empty path, or a NUL in the path")
    if len(value) > MAX_PATH:
        raise ConfigError(f"D-Bus address {entry[:80]!r}: the path has more than {MAX_PATH} bytes")
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
