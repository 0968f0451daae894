"""Text and JSON forms of rules, lists and interfaces for `buswarden policy`."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from policy.exporters.xdg_dbus_proxy import export_options
from policy.rules import AccessList
from policy.snaps.catalogue_schema import Entry, PeerBySystem
from policy.snaps.library import SECTIONS, Known
from policy.text import format_rule
from policy.usos.convert import usos_list
from policy.usos.wire_form import on_the_wire

_USUAL_BUSES: Final = {"session", "system"}


def rule_lines(tag: str, access: AccessList) -> Iterator[str]:
    """Return an app's list as lines."""
    if tag:
        yield tag
    indent = "  " if tag else ""
    from_host = "let in" if access.receive_from_host else "only by rule"
    yield f"{indent}# from the host: {from_host}"
    if access.bus_by_rule:
        yield f"{indent}# questions to the bus about names and owners: only by rule"
    for rule in access.rules:
        origin = f"  # {rule.origin}" if rule.origin else ""
        yield f"{indent}{'deny' if rule.deny else 'allow'} {format_rule(rule)}{origin}"


def access_facts(access: AccessList) -> dict[str, Any]:
    """Return a list as plain values."""
    rules = [
        {"deny": rule.deny, "rule": format_rule(rule), "origin": rule.origin}
        for rule in access.rules
    ]
    return {
        "receive_from_host": access.receive_from_host,
        "bus_by_rule": access.bus_by_rule,
        "rules": rules,
    }


def usos_facts(access: AccessList) -> dict[str, Any]:
    """Return a list as a(usos) for each bus, with the rules that a(usos) cannot express."""
    facts = {}
    for bus in _buses(access):
        made = usos_list(access, bus)
        unsaid = [
            {"deny": rule.deny, "rule": format_rule(rule), "reason": reason}
            for rule, reason in made.unsaid
        ]
        facts[bus] = {"usos": [on_the_wire(entry) for entry in made.entries], "unsaid": unsaid}
    return facts


def proxy_facts(access: AccessList) -> dict[str, Any]:
    """Return a list as options of xdg-dbus-proxy for each bus.

    Rules that the options cannot express are returned as `unsaid`.
    """
    facts = {}
    for bus in _buses(access):
        made = export_options(access, bus=bus)
        unsaid = [
            {"rule": format_rule(one.rule) if one.rule else "", "reason": one.reason}
            for one in made.refused
        ]
        facts[bus] = {"options": made.options, "unsaid": unsaid}
    return facts


def _buses(access: AccessList) -> list[str]:
    return sorted({rule.bus for rule in access.rules if rule.bus is not None} | _USUAL_BUSES)


def diff_lists(before: Mapping[str, set[str]], after: Mapping[str, set[str]]) -> Iterator[str]:
    """Return the rules that only one of two sets of lists has, for each app."""
    for tag in sorted({*before, *after}):
        old, new = before.get(tag, set()), after.get(tag, set())
        if old == new and (tag in before) == (tag in after):
            continue
        yield tag if tag in before and tag in after else f"{tag} ({_only(tag in before)})"
        yield from (f"- {text}" for text in sorted(old - new))
        yield from (f"+ {text}" for text in sorted(new - old))


def describe_interface(known: Known) -> Iterator[str]:
    """Return an interface as lines."""
    interface = known.interface
    yield f"{known.name}: {interface.summary}"
    yield f"file: {known.file}"
    if interface.system_slot:
        yield f"slot of the system on: {', '.join(interface.system_slot)}"
    for side in ("plug", "slot"):
        for name, attribute in getattr(interface.attributes, side).items():
            default = f", else {attribute.default}" if attribute.default else ""
            needed = ", required" if attribute.required else default
            yield f"attribute of the {side}: {name} ({attribute.type}{needed})"
    for where in SECTIONS:
        templates = known.sections[where]
        if templates:
            yield f"{where}:"
            yield from (f"  {_describe_entry(template.entry)}" for template in templates)


def _describe_entry(entry: Entry) -> str:
    parts = [("deny " if entry.deny else "") + "+".join(entry.access)]
    for key in ("bus", "name", "path", "interface", "member", "peer"):
        value = getattr(entry, key)
        if value is not None:
            parts.append(f"{key}={_shown(value)}")
    for key in ("on", "slot_is", "confinement", "never"):
        value = getattr(entry, key)
        if value is not None:
            parts.append(f"[{key.replace('_', '-')}: {value}]")
    if entry.needs:
        parts.append(f"[needs: {', '.join(entry.needs)}]")
    return " ".join(parts)


def _shown(value: object) -> str:
    if isinstance(value, PeerBySystem):
        ends = msgspec.structs.asdict(value).items()
        return " ".join(f"{system}:{_shown(end)}" for system, end in ends)
    return "|".join(value) if isinstance(value, tuple) else str(value)


def _only(is_old: bool) -> str:  # noqa: FBT001 - private, with one caller
    return "gone" if is_old else "new"
