"""Rule lists in files, and the cost of rule lists."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from broker.wire.errors import ConfigError
from policy.match import Judge
from policy.rules import AccessList, Identity, Rule
from policy.tables import Cost
from policy.text import RuleSyntaxError, format_rule, parse_rule

STDIN: Final = "-"
# A rule in a line of `rule_lines`, with the origin in a comment behind.
_LINE: Final = re.compile(r"(allow|deny) (\S+)(?:\s+#.*)?", re.ASCII)
# The bus for a list whose rules name no bus. Such rules apply to all buses.
_ANY_BUS: Final = "any other bus"
_NOBODY: Final = Identity(type="org.buswarden.Lint", app="")


def read_lists(text: str, file: str) -> dict[str, AccessList]:
    """Return the lists in a file of rules or of JSON, by app. Raises ConfigError."""
    try:
        if text.lstrip().startswith("{"):
            return _read_json(msgspec.json.decode(text))
        return _read_lines(text)
    except (RuleSyntaxError, msgspec.MsgspecError, RecursionError) as exc:
        raise ConfigError(f"{file}: {exc}") from exc
    except (AttributeError, KeyError, TypeError):
        raise ConfigError(f"{file}: not the output of `compile --format json`") from None


def costs(access: AccessList) -> dict[str, Cost]:
    """Return the cost of a list on each bus that the list names."""
    buses = sorted({rule.bus for rule in access.rules if rule.bus is not None}) or [_ANY_BUS]
    return {bus: Judge(access, bus=bus, me=_NOBODY).cost for bus in buses}


def describe_cost(cost: Cost, limit: int) -> str:
    """Return the cost of a list as a line for people."""
    said = f"a message takes {cost.steps} of {limit} steps (rule_steps) at most"
    if cost.rule is None:
        return said
    return f"{said}, {cost.rule_steps} of them for {format_rule(cost.rule)[:200]}"


def _read_lines(text: str) -> dict[str, AccessList]:
    lists: dict[str, list[Rule]] = {}
    tag = ""
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        found = _LINE.fullmatch(stripped)
        if found is None and line == stripped and " " not in line:
            tag = line
            continue
        if found is None:
            raise RuleSyntaxError(stripped, 1, "expected allow or deny, then a rule")
        rule = parse_rule(found[2], deny=found[1] == "deny")
        lists.setdefault(tag, []).append(rule)
    return {tag: AccessList(rules=tuple(rules)) for tag, rules in lists.items()}


def _read_json(data: Mapping[str, Any]) -> dict[str, AccessList]:
    facts = {"": data} if "rules" in data else data
    return {tag: AccessList(rules=tuple(_rules(each["rules"]))) for tag, each in facts.items()}


def _rules(entries: list[Mapping[str, Any]]) -> Iterator[Rule]:
    for entry in entries:
        yield parse_rule(str(entry["rule"]), deny=bool(entry["deny"]))
