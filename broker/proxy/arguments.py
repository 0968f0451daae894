"""Parser for the command line of xdg-dbus-proxy. No I/O.

The command line consists of options and of groups, each with an ADDRESS, a PATH and options. An
argument that begins with `-` is an option. Any other argument is an address, and the next argument
is a path. Options about messages belong to the group in front of them. Other options may stand
anywhere. `--args=FD` stands for the arguments that the caller reads from that descriptor. An
argument is text in the form of `os.fsdecode`.
"""

import enum
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from broker.wire.errors import ConfigError
from policy.importers.report import Imported, ImportFileError, cut
from policy.importers.xdg_dbus_proxy import import_options

# The number of all arguments together. A launcher writes some kilobytes.
MAX_ARGUMENTS: Final = 1_000_000
MAX_FD: Final = 2**31 - 1
# Stands in place of a file's name, in the origin of a rule and in errors.
ORIGIN: Final = "argument"

_POLICY: Final = ("--see=", "--talk=", "--own=", "--call=", "--broadcast=")

Read = Callable[[int], bytes]


class Ask(enum.Enum):
    """A request for information instead of a proxy."""

    HELP = enum.auto()
    VERSION = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A socket, the address of the bus behind, and the rules."""

    address: str
    path: str
    imported: Imported  # the rules in the options
    filter: bool = False
    log: bool = False
    sloppy_names: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """The content of a command line."""

    groups: tuple[Group, ...]
    fd: int | None = None  # a pipe or socket that ends the proxy when the other end closes


@dataclass(slots=True)
class _Group:
    """A group that is being parsed."""

    address: str
    path: str = ""
    policy: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)

    def add(self, option: str) -> bool:
        """Add an option. Return False for an option that does not belong to a group."""
        if option in _FLAGS:
            self.flags.add(_FLAGS[option])
        elif option.startswith(_POLICY):
            self.policy.append(option)
        else:
            return False
        return True

    def finish(self) -> Group:
        """Return the group with the rules. Raises ConfigError."""
        options = [*self.policy, "--filter"] if "filter" in self.flags else self.policy
        try:
            imported = import_options(options, bus=None, file=ORIGIN, globs=True)
        except ImportFileError as exc:
            raise ConfigError(exc.problem) from exc
        flags = {name: name in self.flags for name in _FLAGS.values()}
        return Group(address=self.address, path=self.path, imported=imported, **flags)


_FLAGS: Final[Mapping[str, str]] = {
    "--filter": "filter",
    "--log": "log",
    "--sloppy-names": "sloppy_names",
}


def parse_arguments(arguments: Sequence[str], read: Read) -> Command | Ask:
    """Parse arguments, with `read` to read a descriptor to the end. Raises ConfigError."""
    left = deque(arguments)
    groups: list[_Group] = []
    fd = None
    while left:
        if len(left) > MAX_ARGUMENTS:
            raise ConfigError(f"more than {MAX_ARGUMENTS} arguments")
        argument = left.popleft()
        if not argument.startswith("-"):
            groups.append(_Group(argument, _take_path(argument, left)))
        elif groups and groups[-1].add(argument):
            pass
        elif argument == "--help":
            return Ask.HELP
        elif argument == "--version":
            return Ask.VERSION
        elif argument.startswith("--fd="):
            fd = _parse_fd(argument)
        elif argument.startswith("--args="):
            left.extendleft(reversed(split_arguments(read(_parse_fd(argument)))))
        else:
            raise ConfigError(f"{cut(argument)}: {_why_unknown(argument)}")
    if not groups:
        raise ConfigError("no ADDRESS and PATH given; see --help")
    return Command(groups=tuple(group.finish() for group in groups), fd=fd)


def split_arguments(data: bytes) -> list[str]:
    """Return the arguments in `data`.

    Each argument ends with a NUL, which the last may lack.
    """
    parts = data.split(b"\0")
    if not parts[-1]:
        parts.pop()
    return [part.decode("utf-8", "surrogateescape") for part in parts]


def check_paths(groups: Iterable[Group]) -> None:
    """Refuse two groups with the same path. Raises ConfigError.

    The later group would replace the socket of the earlier group.
    """
    seen = set()
    for group in groups:
        if group.path in seen:
            raise ConfigError(f"{cut(group.path)}: PATH of two sockets; give different paths")
        seen.add(group.path)


def _take_path(address: str, left: deque[str]) -> str:
    if not left or left[0].startswith("-"):
        raise ConfigError(f"{cut(address)}: no socket PATH behind this ADDRESS")
    path = left.popleft()
    if not path or "\0" in path:
        raise ConfigError(
            f"{cut(address)}: the socket PATH behind this ADDRESS is empty or has a NUL"
        )
    return path


def _parse_fd(argument: str) -> int:
    text = argument.partition("=")[2]
    if text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_FD)):
        number = int(text)
        if number <= MAX_FD:
            return number
    raise ConfigError(f"{cut(argument)}: not the number of a file descriptor")


def _why_unknown(argument: str) -> str:
    if argument in _FLAGS or argument.startswith(_POLICY):
        return "this option stands behind the ADDRESS and PATH of a socket"
    option = f"{argument}="
    if option in (*_POLICY, "--fd=", "--args="):
        return f"write {option}VALUE"
    return "unknown option; see --help"
