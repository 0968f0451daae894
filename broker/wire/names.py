"""The grammar of D-Bus names: one predicate a kind, for text that is already decoded.

They follow the specification, not the reference implementation where that is laxer (`:1` is no unique
name here, as for dbus-broker and GDBus). No predicate raises.
"""

import re
from collections.abc import Callable
from typing import Final

# The specification's limit for every kind of name but object paths, which only the message limits.
MAX_NAME: Final = 255

_ELEMENT: Final = r"[A-Za-z_][A-Za-z0-9_]*"
_BUS_ELEMENT: Final = r"[A-Za-z_-][A-Za-z0-9_-]*"
_UNIQUE_ELEMENT: Final = r"[A-Za-z0-9_-]+"  # may begin with a digit

_UNIQUE: Final = re.compile(rf":{_UNIQUE_ELEMENT}(?:\.{_UNIQUE_ELEMENT})+").fullmatch
_WELL_KNOWN: Final = re.compile(rf"{_BUS_ELEMENT}(?:\.{_BUS_ELEMENT})+").fullmatch
_NAMESPACE: Final = re.compile(rf"{_BUS_ELEMENT}(?:\.{_BUS_ELEMENT})*").fullmatch
_INTERFACE: Final = re.compile(rf"{_ELEMENT}(?:\.{_ELEMENT})+").fullmatch
_MEMBER: Final = re.compile(_ELEMENT).fullmatch
# Of one repeat, so that no way back is remembered: seven times as fast on a path of a megabyte. Slashes are looked at apart.
_PATH: Final = re.compile(r"/[A-Za-z0-9_/]*").fullmatch

Predicate = Callable[[str], bool]


def is_unique_name(text: str) -> bool:
    """Say whether this is a connection's own name, like `:1.42`."""
    return len(text) <= MAX_NAME and _UNIQUE(text) is not None


def is_well_known_name(text: str) -> bool:
    """Say whether this is a name that a connection may ask for, like `org.example.App`."""
    return len(text) <= MAX_NAME and _WELL_KNOWN(text) is not None


def is_bus_name(text: str) -> bool:
    """Say whether this is a name of either kind."""
    return is_unique_name(text) if text.startswith(":") else is_well_known_name(text)


def is_name_space(text: str) -> bool:
    """Say whether this may stand in `arg0namespace`: a well-known name, or the first element of one."""
    return len(text) <= MAX_NAME and _NAMESPACE(text) is not None


def is_object_path(text: str) -> bool:
    """Say whether this is an object path, of any length."""
    return _PATH(text) is not None and (text == "/" or not (text.endswith("/") or "//" in text))


def is_interface(text: str) -> bool:
    """Say whether this is an interface name."""
    return len(text) <= MAX_NAME and _INTERFACE(text) is not None


def is_member(text: str) -> bool:
    """Say whether this is the name of a method or signal."""
    return len(text) <= MAX_NAME and _MEMBER(text) is not None


def is_error_name(text: str) -> bool:
    """Say whether this is the name of an error; their grammar is that of interfaces."""
    return is_interface(text)
