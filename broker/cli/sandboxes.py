"""The commands about sandboxes: add, list, show, access, stop, who."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import click

from broker.cli.client import Added, NewSandbox, ServiceClient, ask, instance_path
from broker.cli.options import ALLOW, DENY, JSON, KeyValue, Settings, all_rules, check_rule_buses
from broker.cli.output import (
    app_name,
    format_access,
    print_json,
    print_line,
    print_pairs,
    print_table,
)
from broker.cli.sandbox_options import RuleTexts, new_sandbox_options
from policy.text import parse_rule

# A sandbox with any of these facts does not end with its creator.
_INSTEAD_OF_CREATOR: Final = ("keep_after_creator", "close_notify", "process", "cgroup")


@click.command("add")
@new_sandbox_options(identity_required=True)
@click.option(
    "--meta", metavar="K=V", multiple=True, type=KeyValue(), help="Metadata. May be repeated."
)
@JSON
@click.pass_obj
def add_command(
    settings: Settings, *, new: NewSandbox, meta: tuple[tuple[str, str], ...], as_json: bool
) -> None:
    """Add a sandbox that stays until `stop`, or until an end that the options give.

    The command prints the id and the path of the bus socket. For several buses there is a line for
    each bus, with the name of the bus.
    """
    new = replace(new, metadata=dict(meta), keep_after_creator=True)
    added = ask(settings, partial(_add, new=new, name_bus=as_json))
    if as_json:
        facts = {
            "id": added.id,
            "path": added.path,
            "socket": added.socket,
            "address": added.address,
        }
        print_json(facts | {"sockets": dict(added.sockets)})
    elif len(added.sockets) < 2:
        print_line(f"{added.id} {added.socket}")
    else:
        for bus in new.buses:
            print_line(f"{added.id} {added.sockets[bus]} {bus}")


async def _add(client: ServiceClient, *, new: NewSandbox, name_bus: bool) -> Added:
    """Add a sandbox. Without `name_bus`, its only socket may lack the name of its bus."""
    buses = new.buses
    if not buses and (name_bus or any(parse_rule(text, deny=deny).bus for deny, text in new.rules)):
        buses = (next(iter((await client.status())["buses"])),)
    check_rule_buses(new.rules, buses)
    added = await client.add(new)
    return added if added.sockets or not buses else replace(added, sockets={buses[0]: added.socket})


@click.command("list")
@JSON
@click.pass_obj
def list_command(settings: Settings, *, as_json: bool) -> None:
    """List the sandboxes."""
    sandboxes = ask(settings, ServiceClient.list_sandboxes)
    if as_json:
        print_json(sandboxes)
        return
    print_table(
        ("ID", "APP", "CONNECTIONS", "RULES", "DENIED", "STATE"),
        [
            (
                sandbox["id"],
                app_name(sandbox),
                " ".join(unique for _bus, unique in sandbox["connections"]),
                str(len(sandbox["access"])),
                str(sandbox["denied"]),
                "listening" if sandbox["listening"] else "closed to new connections",
            )
            for sandbox in sandboxes
        ],
    )


@click.command("show")
@click.argument("sandbox", metavar="ID")
@JSON
@click.pass_obj
def show_command(settings: Settings, *, sandbox: str, as_json: bool) -> None:
    """Show a sandbox, with the rules and the latest refused messages."""
    facts = ask(settings, partial(ServiceClient.show, sandbox=sandbox))
    if as_json:
        print_json(facts)
        return
    print_pairs(_describe(facts))
    built_in = [f"{line} (built in)" for line in format_access(facts.get("built_in", []))]
    print_table(("RULE",), [(line,) for line in (*format_access(facts["access"]), *built_in)])
    used = sorted((name, str(value)) for name, value in facts.get("use", {}).items() if value)
    print_table(("BUDGET", "USES"), used)
    denials = facts.get("denials", [])
    if denials:
        print_table(("REFUSED", "WHAT", "WHY"), [_describe_denial(denial) for denial in denials])


@click.command("access")
@click.argument("sandbox", metavar="ID")
@ALLOW
@DENY
@click.option("--replace", is_flag=True, help="Remove all other rules.")
@JSON
@click.pass_obj
def access_command(
    settings: Settings,
    *,
    sandbox: str,
    allow: RuleTexts,
    deny: RuleTexts,
    replace: bool,
    as_json: bool,
) -> None:
    """Change the rules of a sandbox, and print all rules of the sandbox.

    The printed rules are in force when the command returns. Without options nothing is changed.
    """
    rules = all_rules(allow, deny)
    if rules or replace:
        change = partial(_change_access, sandbox=sandbox, rules=rules, replace=replace)
        access = ask(settings, change)
    else:
        access = ask(settings, partial(ServiceClient.show, sandbox=sandbox))["access"]
    if as_json:
        print_json([{"deny": bool(denied), "rule": text} for denied, text in access])
        return
    for line in format_access(access):
        print_line(line)


async def _change_access(
    client: ServiceClient, *, sandbox: str, rules: Sequence[tuple[bool, str]], replace: bool
) -> list[tuple[bool, str]]:
    if any(parse_rule(text, deny=deny).bus for deny, text in rules):
        check_rule_buses(rules, (await client.show(sandbox))["sockets"])
    return await client.change_access(sandbox, rules, replace=replace)


@click.command("stop")
@click.argument("sandbox", metavar="ID")
@click.option(
    "--keep-connections",
    is_flag=True,
    help="Refuse new connections, and end the sandbox with the last connection.",
)
@click.pass_obj
def stop_command(settings: Settings, *, sandbox: str, keep_connections: bool) -> None:
    """End a sandbox, with all sockets and connections. ID is an id or an object path."""
    path = instance_path(sandbox)
    ask(settings, partial(ServiceClient.stop, path=path, keep_connections=keep_connections))


@click.command("who")
@click.argument("name", metavar="UNIQUE_NAME")
@click.option("--bus", metavar="NAME", help="The bus of the name. Default: the bus of --address.")
@JSON
@click.pass_obj
def who_command(settings: Settings, *, name: str, bus: str | None, as_json: bool) -> None:
    """Show the sandbox behind a connection, by the call that portals make."""
    instance = ask(settings, partial(ServiceClient.who, name=name, bus=bus))
    facts = {
        "id": instance.id,
        "path": instance.path,
        "type": instance.type,
        "app": instance.app,
        "component": instance.component,
        "metadata": instance.metadata,
        "creator": instance.creator,
    }
    if as_json:
        print_json(facts)
    else:
        print_line(f"{instance.id} {app_name(facts)}")


def _describe(facts: Mapping[str, Any]) -> dict[str, str]:
    connections = [f"{unique} ({bus})" for bus, unique in facts["connections"]]
    pairs = {
        "id": facts["id"],
        "path": facts["path"],
        "app": app_name(facts),
        "metadata": ", ".join(f"{key}={value}" for key, value in sorted(facts["metadata"].items())),
        "created": f"{_local_time(facts['created'])} by uid {facts['uid']} ({facts['creator']})",
        "listening": "yes" if facts["listening"] else "no",
        "connections": ", ".join(connections),
        "ends with": ", ".join(_ends_with(facts)) or "`buswarden stop` only",
        "from the host": "let in" if facts["receive_from_host"] else "only by rule",
        "refused": f"{facts['denied']} messages",
    }
    pairs |= {f"socket ({bus})": path for bus, path in sorted(facts["sockets"].items())}
    instances = facts.get("instances", {})
    return pairs | {
        f"engine ({bus})": _show_engine(engine, instances.get(bus))
        for bus, engine in sorted(facts.get("engines", {}).items())
    }


def _show_engine(engine: str, instance: str | None) -> str:
    if engine == "gate":
        return engine
    return f"{engine}, instance {instance}" if instance else f"{engine}, once the bus is back"


def _ends_with(facts: Mapping[str, Any]) -> Iterator[str]:
    if not facts["listening"]:
        yield "the last connection"
    elif not any(facts.get(key) for key in _INSTEAD_OF_CREATOR):
        yield "the last connection after the creator is gone"
    if facts.get("close_notify"):
        yield "the pipe of the creator"
    if facts.get("process"):
        yield f"process {facts['process']}"
    if facts.get("cgroup"):
        yield f"cgroup {facts['cgroup']}"
    if facts.get("time_limit"):
        yield f"the time limit, in {facts['time_left']} s"


def _describe_denial(denial: Mapping[str, Any]) -> tuple[str, str, str]:
    interface, member = denial.get("interface", ""), denial.get("member", "")
    what = f"{interface}.{member}" if interface else member
    peer, path = denial.get("peer", ""), denial.get("path", "")
    more = f" (and {denial['more']} more before)" if denial.get("more") else ""
    where = " ".join(part for part in (peer, path, what) if part)
    direction = f"{denial.get('direction', '')} {denial.get('kind', '')}".strip()
    origin = f" [{denial['origin']}]" if denial.get("origin") else ""
    return direction, where, f"{denial.get('reason', '')}{origin}{more}"


def _local_time(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
