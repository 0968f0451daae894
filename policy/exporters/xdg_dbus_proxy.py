"""Rules -> options of xdg-dbus-proxy. Rules that no option expresses are refused.

The options have no denials, no peers and no globs. Some options allow more than the name suggests:
`--own` lets the app talk to any owner of the name, `--broadcast` lets the app start the service,
and with any filter all broadcasts of the app go out. A rule that would become wider or narrower is
refused, and listed with the reason.
"""

from collections.abc import Iterator
from typing import Final

import msgspec

from policy.globs import NamePattern, PatternError, check_bus_name, parse_name_pattern
from policy.importers.aare import (
    Alternative,
    Budget,
    BudgetError,
    UnsayableError,
    Wild,
    alternatives,
)
from policy.importers.xdg_dbus_proxy import always, covers, everything
from policy.rules import Access, AccessList, Rule

_MAX_WRITTEN: Final = 2**20  # characters of all patterns, alternatives written out
_DOUBLE_STAR: Final = "**"


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """A rule that no option expresses.

    Without a rule: an effect of the options that no rule has.
    """

    rule: Rule | None
    reason: str


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """Options to stand after the address and path of a bus.

    The options have the meaning of the list if nothing is refused.
    """

    options: tuple[str, ...]
    refused: tuple[Refused, ...] = ()


def export_options(access: AccessList, *, bus: str) -> Exported:
    """Return the options that express the list's rules for a bus."""
    rules = {
        msgspec.structs.replace(rule, bus=None, origin=""): rule
        for rule in access.rules
        if rule.bus in {None, bus}
    }
    refused: list[Refused] = []
    if not access.receive_from_host:
        reason = "it lets in all calls and unicast signals from the host"
        refused.append(Refused(rule=None, reason=reason))
    if _bare(everything(None)) in rules and not any(rule.deny for rule in rules):
        return Exported(options=(), refused=tuple(refused))
    given = [_bare(rule) for rule in always(None)]
    if not all(rule in rules for rule in given):
        reason = (
            "it lets out all broadcasts, lets in those of the bus, and refuses other calls to it"
        )
        refused.append(Refused(rule=None, reason=f"{reason}: the list does not have these rules"))
    exporter = _Exporter([rule for rule in rules if rule not in given])
    options = {"--filter": None}
    for rule, original in rules.items():
        if rule in given:
            continue
        try:
            options.update(dict.fromkeys(exporter.options(rule)))
        except UnsayableError as exc:
            refused.append(Refused(rule=original, reason=str(exc)))
    return Exported(options=tuple(options), refused=tuple(refused))


def _bare(rule: Rule) -> Rule:
    return msgspec.structs.replace(rule, bus=None, origin="")


class _Exporter:
    """A writer of options.

    Knows all allowed names, because an option may imply another rule's effect.
    """

    def __init__(self, rules: list[Rule]) -> None:
        self._budget: Final = Budget(_MAX_WRITTEN)
        allowed = [rule for rule in rules if _problem(rule) is None]
        plain = [rule for rule in allowed if not _has_filter(rule)]
        self._sent: Final = _names(allowed, Access.SEND)
        self._all_sent: Final = _names(plain, Access.SEND)
        self._all_received: Final = _names(plain, Access.RECEIVE)

    def options(self, rule: Rule) -> list[str]:
        """Return the options of a rule. Raises UnsayableError."""
        problem = _problem(rule)
        if problem is not None:
            raise UnsayableError(problem)
        assert rule.name is not None
        name = parse_name_pattern(rule.name)
        talks = _covered(name, self._all_sent) and _covered(name, self._all_received)
        if Access.OWN in rule.access:
            if not talks:
                raise UnsayableError("--own would also allow talking to another owner of the name")
            _check_level(name)
            return [f"--own={rule.name}"]
        if rule.access == {Access.SEE}:
            _check_level(name)
            return [f"--see={rule.name}"]
        if talks and not _has_filter(rule) and _is_level(name):
            return [f"--talk={rule.name}"]
        if Access.RECEIVE in rule.access and not _covered(name, self._sent):
            raise UnsayableError("--broadcast would also allow starting the service")
        words = [
            word
            for access, word in ((Access.SEND, "--call"), (Access.RECEIVE, "--broadcast"))
            if access in rule.access
        ]
        filters = list(self._filters(rule))
        return [f"{word}={rule.name}={text}" for word in words for text in filters]

    def _filters(self, rule: Rule) -> Iterator[str]:
        if rule.interface is None and rule.member is not None:
            raise UnsayableError("a member without an interface")
        methods = [""]
        if rule.interface is not None:
            members = ["*"] if rule.member is None else self._literals("member", rule.member)
            interfaces = self._literals("interface", rule.interface)
            methods = [f"{each}.{member}" for each in interfaces for member in members]
        paths = [""] if rule.path is None else self._paths(rule.path)
        for method in methods:
            for path in paths:
                yield f"{method}{path}" or "*"

    def _alternatives(self, what: str, pattern: str) -> list[Alternative]:
        try:
            return alternatives(pattern, self._budget)
        except (UnsayableError, BudgetError) as exc:
            raise UnsayableError(f"{what}: {exc}") from None

    def _literals(self, what: str, pattern: str) -> list[str]:
        found = self._alternatives(what, pattern)
        if not all(isinstance(piece, str) for pieces in found for piece in pieces):
            raise UnsayableError(f"a glob for its {what}")
        return ["".join(piece for piece in pieces if isinstance(piece, str)) for pieces in found]

    def _paths(self, pattern: str) -> list[str]:
        """Return `@/a`, and `@/a/*` for a path with all paths below."""
        exact: dict[str, None] = {}
        below: dict[str, None] = {}
        for pieces in self._alternatives("path", pattern):
            texts = [piece for piece in pieces if isinstance(piece, str)]
            text = "".join(texts)
            if len(texts) == len(pieces):
                exact[text] = None
            elif (
                len(texts) == len(pieces) - 1
                and isinstance(pieces[-1], Wild)
                and pieces[-1].text == _DOUBLE_STAR
                and text.endswith("/")
            ):
                below[text[:-1]] = None
            else:
                raise UnsayableError("a glob for its path")
        for base in below:
            if base and base not in exact:
                raise UnsayableError(f"what is below {base} without {base} itself")
        return [
            *(f"@{path}" for path in exact if path.removesuffix("/") not in below),
            *(f"@{base}/*" for base in below),
        ]


def _has_filter(rule: Rule) -> bool:
    return any(part is not None for part in (rule.path, rule.interface, rule.member))


def _problem(rule: Rule) -> str | None:
    """Describe why no option can express a rule, whatever the other rules; None if no reason."""
    if rule.deny:
        return "a denial"
    if rule.peer is not None:
        return "a peer"
    if rule.name is None:
        return "it names no bus name"
    if parse_name_pattern(rule.name).kind == "glob":
        return "a glob for a name"
    return None


def _names(rules: list[Rule], access: Access) -> list[NamePattern]:
    return [
        parse_name_pattern(rule.name)
        for rule in rules
        if access in rule.access and rule.name is not None
    ]


def _covered(name: NamePattern, patterns: list[NamePattern]) -> bool:
    return any(covers(pattern, name) for pattern in patterns)


def _is_level(name: NamePattern) -> bool:
    """Return whether --see, --talk and --own accept this name."""
    if name.base.startswith(":"):
        return False
    try:
        check_bus_name(name.base)
    except PatternError:
        return False
    return True


def _check_level(name: NamePattern) -> None:
    if not _is_level(name):
        raise UnsayableError("a unique name, or everything below a name of one element")
