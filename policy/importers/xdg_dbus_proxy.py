"""Options of xdg-dbus-proxy -> rules of exactly the same meaning.

The rule of an option, `--call=NAME=RULE`, is `[METHOD][@PATH]`. Some forms are not what they look
like: `x.Y` is member Y of interface x, anything that begins with `*` is any method, and other
wildcards are literal characters. Options that can match nothing are reported. docs/importers.md has
the table.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import msgspec

from policy.globs import (
    NamePattern,
    PatternError,
    check_bus_name,
    check_interface,
    check_member,
    check_path,
    compile_name,
    parse_name_pattern,
)
from policy.importers.report import Imported, ImportFileError, Unsaid, cut
from policy.match import BUS_NAME
from policy.rules import Access, AccessList, Peer, Rule

# A path and all paths below in the form of policy.globs. xdg-dbus-proxy writes `/a/*`.
BELOW: Final = "{,/**}"

_TALK: Final = frozenset({Access.SEND, Access.RECEIVE})
_LEVELS: Final = {
    "--see": frozenset({Access.SEE}),
    "--talk": _TALK,
    "--own": _TALK | {Access.OWN},
}
_FILTERS: Final = {
    "--call": frozenset({Access.SEND}),
    "--broadcast": frozenset({Access.RECEIVE}),
}


class Argument(msgspec.Struct, frozen=True, kw_only=True):
    """An option with its position."""

    text: str
    file: str
    line: int

    def error(self, problem: str) -> ImportFileError:
        """Return an error with the position."""
        return ImportFileError(self.file, self.line, f"{cut(self.text)}: {problem}")

    def unsaid(self, reason: str) -> Unsaid:
        """Return a remark about this option."""
        return Unsaid(file=self.file, line=self.line, text=cut(self.text), reason=reason)

    @property
    def origin(self) -> str:
        """Return the origin of this option's rules."""
        return f"{self.file}:{self.line}: {cut(self.text)}"


def import_options(
    options: Sequence[str],
    *,
    bus: str | None = None,
    file: str = "xdg-dbus-proxy",
    globs: bool = False,
) -> Imported:
    """Return the rules of the options after one address and path. Raises ImportFileError.

    With `globs`, names may be globs with a fixed beginning: an extension of `buswarden proxy`.
    """
    return import_arguments(_arguments(options, file), bus=bus, globs=globs)


def import_command_line(
    arguments: Sequence[str],
    *,
    bus_of: Callable[[str], str],
    file: str = "xdg-dbus-proxy",
) -> Imported:
    """Return the rules of a whole command line. `bus_of` returns the bus of an address.

    Raises ImportFileError.
    """
    rules: list[Rule] = []
    unsaid: list[Unsaid] = []
    for address, options in _groups(_arguments(arguments, file)):
        imported = import_arguments(options, bus=bus_of(address))
        rules += imported.access.rules
        unsaid += imported.unsaid
    return Imported(access=AccessList(rules=tuple(rules)), unsaid=tuple(unsaid))


def import_arguments(
    arguments: Iterable[Argument], *, bus: str | None, globs: bool = False
) -> Imported:
    """Return the rules of options with positions. Raises ImportFileError."""
    importer = _Importer(bus, globs=globs)
    for argument in arguments:
        importer.add(argument)
    return importer.result()


def always(bus: str | None) -> tuple[Rule, Rule]:
    """Return rules for the behaviour of every filtering proxy.

    Broadcasts go out, and broadcasts of the bus itself come in. Calls to the bus that every sandbox
    may make need no rule, and the proxy refuses other calls to the bus. A denial for a peer does
    not stop broadcasts.
    """
    return (
        Rule(access=_TALK, bus=bus, name=BUS_NAME, origin="xdg-dbus-proxy --filter"),
        Rule(
            access=frozenset({Access.SEND}),
            deny=True,
            bus=bus,
            name=BUS_NAME,
            peer=Peer(kind="host"),
            origin="xdg-dbus-proxy --filter: no other calls to the bus itself",
        ),
    )


def everything(bus: str | None) -> Rule:
    """Return the rule of a proxy that does not filter."""
    return Rule(access=frozenset(Access), bus=bus, origin="xdg-dbus-proxy without --filter")


def covers(wide: NamePattern, narrow: NamePattern) -> bool:
    """Return whether a name pattern covers all names of another.

    Both are exact names or subtrees.
    """
    if wide.kind == "subtree":
        return narrow.base == wide.base or narrow.base.startswith(f"{wide.base}.")
    return wide == narrow


def _arguments(texts: Sequence[str], file: str) -> list[Argument]:
    return [Argument(text=text, file=file, line=at) for at, text in enumerate(texts, 1)]


def _groups(arguments: Sequence[Argument]) -> Iterator[tuple[str, list[Argument]]]:
    """Yield each address with its options. The path of the proxy's own socket is ignored."""
    at = 0
    while at < len(arguments):
        first = arguments[at]
        at += 1
        if first.text.startswith("--"):
            _check_global(first)
            continue
        if at == len(arguments) or arguments[at].text.startswith("--"):
            raise first.error("no path after the address")
        at += 1
        start = at
        while at < len(arguments) and arguments[at].text.startswith("--"):
            at += 1
        yield first.text, list(arguments[start:at])


def _check_global(argument: Argument) -> None:
    option, equals, value = argument.text.partition("=")
    if option == "--args":
        raise argument.error("options in a file descriptor cannot be read here")
    if option == "--fd" and equals and value.isdecimal():
        return
    raise argument.error("unknown option, or one that stands after an address")


class _Importer:
    def __init__(self, bus: str | None, *, globs: bool) -> None:
        self._bus: Final = bus
        self._globs: Final = globs
        self._filter = False
        self._rules: Final[dict[Rule, Rule]] = {}  # by the rule without origin
        self._heard: Final[list[tuple[Argument, NamePattern]]] = []
        self._unsaid: Final[list[Unsaid]] = []

    def add(self, argument: Argument) -> None:
        option, equals, value = argument.text.partition("=")
        if option in _LEVELS and equals:
            self._add_level(argument, option, value)
        elif option in _FILTERS and equals:
            self._add_filter(argument, option, value)
        elif argument.text == "--filter":
            self._filter = True
        elif argument.text == "--sloppy-names":
            reason = "changes of unique names are reported only for names that may be seen"
            self._unsaid.append(argument.unsaid(reason))
        elif argument.text != "--log":
            _check_global(argument)

    def result(self) -> Imported:
        if not self._filter:
            # Without a filter, the other options have no effect.
            return Imported(access=AccessList(rules=(everything(self._bus),)))
        rules = tuple(self._rules.values())
        senders = [
            parse_name_pattern(rule.name)
            for rule in rules
            if rule.name is not None and Access.SEND in rule.access
        ]
        starting = [
            argument.unsaid("starting the service, too, would need a rule to send to it")
            for argument, name in self._heard
            if not any(covers(sender, name) for sender in senders)
        ]
        return Imported(
            access=AccessList(rules=always(self._bus) + rules),
            unsaid=(*self._unsaid, *starting),
        )

    def _add_level(self, argument: Argument, option: str, name: str) -> None:
        if not self._is_glob(name):
            try:
                check_bus_name(name.removesuffix(".*"))
            except PatternError as exc:
                raise argument.error(exc.problem) from None
        if name.startswith(":"):
            raise argument.error("a unique name")
        self._keep(argument, Rule(access=_LEVELS[option], bus=self._bus, name=name))

    def _add_filter(self, argument: Argument, option: str, value: str) -> None:
        name, equals, text = value.partition("=")
        if not equals:
            raise argument.error("no '=' between name and rule")
        try:
            pattern = parse_name_pattern(name)
        except PatternError as exc:
            self._unsaid.append(argument.unsaid(f"left out: {exc.problem}"))
            return
        if pattern.kind == "glob" and not self._is_glob(name):
            self._unsaid.append(argument.unsaid("can match nothing: '*' stands only in '.*'"))
            return
        try:
            path, interface, member = parse_filter(text)
        except PatternError as exc:
            # The name may be seen all the same, and the service started.
            self._unsaid.append(argument.unsaid(f"can match no message: {exc.problem}"))
            self._keep(argument, Rule(access=frozenset({Access.SEE}), bus=self._bus, name=name))
            return
        rule = Rule(
            access=_FILTERS[option],
            bus=self._bus,
            name=name,
            path=path,
            interface=interface,
            member=member,
        )
        self._keep(argument, rule)
        if option == "--broadcast":
            self._heard.append((argument, pattern))

    def _is_glob(self, name: str) -> bool:
        """Return whether a name is a glob of the extension.

        The fixed beginning reaches into an element after the first, so that no option is about all
        names of a domain.
        """
        if not self._globs or name.startswith(":"):
            return False
        try:
            pattern = parse_name_pattern(name)
        except PatternError:
            return False
        first, dot, second = compile_name(name).stem.partition(".")
        return pattern.kind == "glob" and bool(first and dot and second)

    def _keep(self, argument: Argument, rule: Rule) -> None:
        self._rules.setdefault(rule, msgspec.structs.replace(rule, origin=argument.origin))


def parse_filter(text: str) -> tuple[str | None, str | None, str | None]:
    """Return path, interface and member of `[METHOD][@PATH]`.

    Raises PatternError if the filter can match nothing.
    """
    method, _, path = text.partition("@")
    return (_parse_path(path), *_parse_method(method))


def _parse_path(text: str) -> str | None:
    if text in {"", "/*"}:
        return None
    base = text.removesuffix("/*")
    check_path(base)
    if base == text:
        return text
    if base == "/":  # `//*` means paths that begin with `//`
        raise PatternError("empty path element", 1)
    return base + BELOW


def _parse_method(text: str) -> tuple[str | None, str | None]:
    if not text or text.startswith("*"):
        return None, None
    interface, dot, member = text.rpartition(".")
    if not dot:  # an interface of a single element
        interface, member = text, "*"
    check_interface(interface)
    if member == "*":
        return interface, None
    check_member(member)
    return interface, member
