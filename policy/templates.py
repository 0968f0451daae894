"""Entries of the catalogue made ready: alternatives joined or multiplied, placeholders filled in.

A template is made once, when the catalogue is loaded, and filled in for each app and connection.
A text from a snap can never become a pattern: the placeholders' values are checked by
`policy.snaps` and have no wildcards. What such a value makes illegal on D-Bus (a path with a `-`) could match
no message, so that rule is left out.
"""

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from policy.globs import (
    PatternError,
    compile_interface,
    compile_member_glob,
    compile_name,
    compile_path,
    stem,
)
from policy.interface import Entry, OtherEnd, Texts
from policy.rules import Access
from policy.text import misfit_of

PLACEHOLDER: Final = re.compile(r"<([^<>]*)>")
# What stands for a placeholder when a pattern is checked before any snap is known.
_SAMPLES: Final = {"": "x", "path": "/x", "tag:path": "x"}
_BELOW: Final = "{,/**}"


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """A rule but for its peer and origin. Its texts may have placeholders."""

    access: frozenset[Access]
    deny: bool
    bus: str | None
    name: str | None
    path: str | None
    interface: str | None
    member: str | None


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """An entry made ready."""

    entry: Entry
    number: int  # of the entry in its section, from 1
    shapes: tuple[Shape, ...]
    open: bool  # it has placeholders
    peer: OtherEnd | None
