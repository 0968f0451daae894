"""The grammar of D-Bus names: a predicate for each kind of name, for decoded text.

The predicates follow the specification where the reference implementation is laxer. For example
`:1` is no unique name here, as for dbus-broker and GDBus. No predicate raises.
"""

import re
from collections.abc import Callable
from typing import Final

# The specification's limit for every kind of name. Only the message limits an object path.
MAX_NAME: Final = 255

_ELEMENT: Final = r"[A-Za-z_][A-Za-z0-9_]*"
_BUS_ELEMENT: Final = r"[A-Za-z_-][A-Za-z0-9_-]*"
_UNIQUE_ELEMENT: Final = r"[A-Za-z0-9_-]+"  # may begin with a digit

_UNIQUE: Final = re.compile(rf":{_UNIQUE_ELEMENT}(?:\.{_UNIQUE_ELEMENT})+").fullmatch
_WELL_KNOWN: Final = re.compile(rf"{_BUS_ELEMENT}(?:\.{_BUS_ELEMENT})+").fullmatch
_NAMESPACE: Final = re.compile(rf"{_BUS_ELEMENT}(?:\.{_BUS_ELEMENT})*").fullmatch
_INTERFACE: Final = re.compile(rf"{_ELEMENT}(?:\.{_ELEMENT})+").fullmatch
_MEMBER: Final = re.compile(_ELEMENT).fullmatch
# A single repeat needs no backtracking, which is seven times as fast on a path of a megabyte.
# Slashes are checked separately.
_PATH: Final = re.compile(r"/[A-Za-z0-9_/]*").fullmatch

Predicate = Callable[[str], bool]


def is_unique_name(text: str) -> bool:
    """Return whether the text is a unique name, like `:1.42`."""
    return len(text) <= MAX_NAME and _UNIQUE(text) is not None


def is_well_known_name(text: str) -> bool:
    """Return whether the text is a well-known name, like `org.example.App`."""
    return len(text) <= MAX_NAME and _WELL_KNOWN(text) is not None


def is_bus_name(text: str) -> bool:
    """Return whether the text is a unique or well-known name."""
    return is_unique_name(text) if text.startswith(":") else is_well_known_name(text)


def is_name_space(text: str) -> bool:
    """Return whether `arg0namespace` accepts the text: a well-known name, or a first element."""
    return len(text) <= MAX_NAME and _NAMESPACE(text) is not None


def is_object_path(text: str) -> bool:
    """Return whether the text is an object path, of any length."""
    return _PATH(text) is not None and (text == "/" or not (text.endswith("/") or "//" in text))


def is_interface(text: str) -> bool:
    """Return whether the text is an interface name."""
    return len(text) <= MAX_NAME and _INTERFACE(text) is not None


def is_member(text: str) -> bool:
    """Return whether the text is the name of a method or signal."""
    return len(text) <= MAX_NAME and _MEMBER(text) is not None


def is_error_name(text: str) -> bool:
    """Return whether the text is an error name. The grammar is that of interfaces."""
    return is_interface(text)
