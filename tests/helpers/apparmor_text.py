"""What is known of snapd's D-Bus rules, written as the AppArmor profile of an app.

The text is made of tests/data alone, as tests.helpers.facts reads it, and in the forms that snapd's own files have:
a template, an abstraction that is included, and rules of several lines with their alternatives in braces.
"""

from collections.abc import Sequence
from typing import Any, Final

from policy.importers.apparmor import import_apparmor
from policy.importers.report import Imported, Source
from policy.rules import Identity
from tests.helpers import facts
from tests.helpers.facts import Scene

ABSTRACTION: Final = "abstractions/dbus"
_CONDITIONS: Final = ("path", "interface", "member")
_ACCESS: Final = {"own": "bind"}


def import_profile(scene: Scene, me: Identity) -> Imported:
    """Read the profile of an app in a scene."""
    return import_apparmor(
        Source(label_of(me), profile(scene, me)),
        resolve={f"<{ABSTRACTION}>": [Source(ABSTRACTION, abstraction(scene, me))]}.get,
        placeholders={
            "###PLUG_SECURITY_TAGS###": f'"{label_of(facts.PLUG_APP)}"',
            "###SLOT_SECURITY_TAGS###": f'"{label_of(facts.SLOT_APP)}"',
        },
    )


def profile(scene: Scene, me: Identity) -> str:
    """Return the whole profile."""
    rules = [rule for rule in facts.rules_of(scene, me, as_written=True) if _is_own(rule)]
    lines = [
        f'@{{SNAP_INSTANCE_NAME}}="{me.app}"',
        f'profile "{label_of(me)}" (attach_disconnected,mediate_deleted) {{',
        f"#include <{ABSTRACTION}>",
        *(text for rule in rules for text in rule_text(rule, scene, me)),
        "}\n",
    ]
    return "\n".join(lines)


def abstraction(scene: Scene, me: Identity) -> str:
    """Return the file that every profile includes."""
    rules = [rule for rule in facts.rules_of(scene, me, as_written=True) if not _is_own(rule)]
    return "".join(f"{text}\n" for rule in rules for text in rule_text(rule, scene, me))


def rule_text(rule: dict[str, Any], scene: Scene, me: Identity) -> list[str]:
    """Return the rule; nothing if there is nobody for whom it is."""
    label = _label(rule, scene, me)
    if label is None:
        return []
    words = [_ACCESS.get(each, each) for each in rule["access"]]
    access = words[0] if len(words) == 1 else f"({', '.join(words)})"
    parts = [f"{'deny ' if rule.get('effect') == 'deny' else ''}dbus {access}"]
    if "bus" in rule:
        parts.append(f"bus={facts.fill(rule['bus'])}")
    if "own_name" in rule:
        parts.append(f"name={_own_name(rule)}")
    parts += [f"{key}={_braced(rule[key])}" for key in _CONDITIONS if key in rule]
    peer = [f"name={_braced(rule['peer_name'])}"] if "peer_name" in rule else []
    peer += [f"label={label}"] if label else []
    parts += [f"peer=({', '.join(peer)})"] if peer else []
    return ["\n    ".join(parts) + ","]


def label_of(peer: Identity | None) -> str:
    """Return the label that a peer runs under."""
    return "unconfined" if peer is None else f"snap.{peer.app}.{peer.component}"


def _is_own(rule: dict[str, Any]) -> bool:
    return "side" in rule


def _label(rule: dict[str, Any], scene: Scene, me: Identity) -> str | None:
    """Return the pattern of labels: empty if it is about anybody, None if it is about nobody."""
    match rule["peer"]:
        case "any":
            return ""
        case "same app":
            return "snap.@{SNAP_INSTANCE_NAME}.*"
        case "self":
            return "@{profile_name}"
        case _:
            peers = facts.peers_of(rule, scene, me)
    if peers in ([facts.PLUG_APP], [facts.SLOT_APP]):
        return f"###{'PLUG' if peers == [facts.PLUG_APP] else 'SLOT'}_SECURITY_TAGS###"
    return _braced([label_of(each) for each in peers]) if peers else None


def _own_name(rule: dict[str, Any]) -> str:
    if "own_name_regex" not in rule:
        return _braced(rule["own_name"])
    # Of the facts' regular expressions there is this one: up to two numbers after the name.
    number = "[1-9]" + "{,[0-9_]}" * 8 + "{,[0-9]}"
    return f'"{facts.fill("{attr.name}")}{{_,-}}{number}{{,_{number}}}"'


def _braced(patterns: Sequence[str]) -> str:
    filled = [facts.fill(each) for each in patterns]
    return f'"{filled[0]}"' if len(filled) == 1 else f'"{{{",".join(filled)}}}"'
