"""Options that several commands share, and the check of a rule on the command line."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import click

from broker.wire.errors import ConfigError
from policy.text import RuleSyntaxError, parse_rule

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options in front of the command's name."""

    address: str | None = None


class RuleText(click.ParamType[tuple[bool, str]]):
    """A rule in the form of policy.text, checked before the command does anything."""

    name = "rule"

    def __init__(self, *, deny: bool) -> None:
        self._deny = deny

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[bool, str]:
        """Return (deny, text)."""
        if isinstance(value, tuple):
            return value
        try:
            parse_rule(value, deny=self._deny)
        except RuleSyntaxError as exc:
            self.fail(str(exc), param, ctx)
        return self._deny, value


class KeyValue(click.ParamType[tuple[str, str]]):
    """A pair in the form KEY=VALUE."""

    name = "key=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Return (key, value)."""
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not key or not equals:
            self.fail(f"{value[:80]!r} is not KEY=VALUE", param, ctx)
        return key, text


ALLOW: Final = click.option(
    "--allow",
    metavar="RULE",
    multiple=True,
    type=RuleText(deny=False),
    help="Add a rule that allows. May be repeated.",
)
DENY: Final = click.option(
    "--deny",
    metavar="RULE",
    multiple=True,
    type=RuleText(deny=True),
    help="Add a rule that denies. May be repeated.",
)
JSON: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
PORTALS_AS_HOST: Final = click.option(
    "--portals-as-host",
    is_flag=True,
    help="Do not deny portals. Portals then treat the app as a program of the host.",
)


def identity_options(*, required: bool) -> Callable[[F], F]:
    """Return the decorator for --type, --app and --component."""

    def decorate(function: F) -> F:
        for option in (
            click.option("--component", metavar="C", default="", help="A part of the app."),
            click.option("--app", metavar="A", required=required, help="The app's identifier."),
            click.option(
                "--type", "type_", metavar="T", required=required, help="The type of the sandbox."
            ),
        ):
            function = option(function)
        return function

    return decorate


def end_options(function: F) -> F:
    """Add --process, --cgroup and --time-limit."""
    for option in (
        click.option(
            "--time-limit",
            metavar="SECONDS",
            type=click.IntRange(1, 2**32 - 1),
            help="End the sandbox after this time.",
        ),
        click.option(
            "--cgroup",
            metavar="PATH",
            default="",
            help="End the sandbox with the last process of this cgroup, a folder in /sys/fs/cgroup.",
        ),
        click.option(
            "--process",
            metavar="PID",
            type=click.IntRange(1, 2**31 - 1),
            help="End the sandbox with this process.",
        ),
    ):
        function = option(function)
    return function


def check_rule_buses(rules: Iterable[tuple[bool, str]], buses: Collection[str]) -> None:
    """Refuse a rule for a bus that the sandbox does not have. Raises ConfigError.

    Such a rule would never decide, so the rule is most likely a mistake.
    """
    for deny, text in rules:
        bus = parse_rule(text, deny=deny).bus
        if bus is not None and bus not in buses:
            known = ", ".join(sorted(buses))
            raise ConfigError(
                f"rule {text[:200]!r}: the sandbox has no bus {bus[:80]!r}, only {known}"
            )


def all_rules(*groups: Iterable[tuple[bool, str]]) -> list[tuple[bool, str]]:
    """Return the rules of --allow and --deny together."""
    return [rule for group in groups for rule in group]
