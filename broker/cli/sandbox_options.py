"""The common options of `add` and `exec`, which both add a sandbox, as one value."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from broker.cli.client import NewSandbox
from broker.cli.options import (
    ALLOW,
    DENY,
    PORTALS_AS_HOST,
    all_rules,
    end_options,
    identity_options,
)

F = TypeVar("F", bound=Callable[..., Any])
RuleTexts = tuple[tuple[bool, str], ...]
BUS = click.option(
    "--bus",
    "buses",
    metavar="NAME",
    multiple=True,
    help="A bus of the broker. May be repeated. Default: the broker's first bus.",
)


def new_sandbox_options(*, identity_required: bool) -> Callable[[F], F]:
    """Return the decorator that passes the options of a new sandbox as `new`.

    Without a required identity, type and app of `new` may be empty.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def with_new(  # noqa: PLR0913 - one parameter an option
            *args: Any,
            type_: str | None,
            app: str | None,
            component: str,
            buses: tuple[str, ...],
            allow: RuleTexts,
            deny: RuleTexts,
            portals_as_host: bool,
            process: int | None,
            cgroup: str,
            time_limit: int | None,
            **others: Any,
        ) -> Any:
            new = NewSandbox(
                type=type_ or "",
                app=app or "",
                component=component,
                buses=buses,
                rules=tuple(all_rules(allow, deny)),
                portals_as_host=portals_as_host,
                process=process,
                cgroup=cgroup,
                time_limit=time_limit or 0,
            )
            return function(*args, new=new, **others)

        decorated: Any = with_new
        # Click lists options in the order in which decorators stand above a function, so the last
        # comes first.
        for option in (
            end_options,
            PORTALS_AS_HOST,
            DENY,
            ALLOW,
            BUS,
            identity_options(required=identity_required),
        ):
            decorated = option(decorated)
        result: F = decorated
        return result

    return decorate
