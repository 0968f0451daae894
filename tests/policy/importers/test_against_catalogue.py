"""The AppArmor importer, given the known rules of snapd as text, against the catalogue that was made of them."""

import re

import pytest

from policy.rules import Identity
from policy.snaps.compiler import Compiler
from tests.helpers import facts
from tests.helpers.apparmor_text import import_profile, label_of, profile
from tests.helpers.facts import DRIVER, DRIVER_PATH, PLUG_APP, SLOT_APP, Message, Scene
from tests.policy.snaps.test_catalogue import IDLE, LIBRARY, Asker

NUMBER = "[1-9][0-9_]{0,8}[0-9]?"
DBUS = Scene(interface="dbus", system="core", system_slot=False)


def deviation(message: Message) -> str:
    """Say why the catalogue may be narrower than the text; docs/policy.md has it under the same words."""
    introspect = (DRIVER_PATH, f"{DRIVER}.Introspectable", "Introspect")
    if (message.path, message.interface, message.member) == introspect and (
        message.access == "send" and message.peer is None and DRIVER not in message.names
    ):
        return "the two rules of the template for Introspect of the bus"
    numbers = re.compile(f"{re.escape(facts.fill('{attr.name}'))}[_-]{NUMBER}(_{NUMBER})?")
    if message.access == "own" and numbers.fullmatch(message.names[0]):
        return "names that end in numbers"
    return ""


def askers(scene: Scene, me: Identity) -> tuple[Asker, Asker]:
    """Return who answers by the catalogue, and who by the imported text."""
    compiled = Compiler(LIBRARY, scene.world()).access(label_of(me))
    return Asker(compiled, me), Asker(import_profile(scene, me).access, me)


@pytest.mark.parametrize("interface", facts.INTERFACES)
def test_verdicts_are_those_of_the_catalogue(interface: str) -> None:
    for scene in facts.scenes(interface):
        for me in (PLUG_APP, SLOT_APP, *IDLE):
            given, imported = askers(scene, me)
            for message in facts.tries(scene, me):
                where = (scene, me, message)
                allowed = imported.allows(message)
                if allowed != given.allows(message):
                    assert allowed, where
                    assert deviation(message), where
                if message.access == "send":
                    heard = imported.allows(message, broadcast=True)
                    if heard != given.allows(message, broadcast=True):
                        # A profile does not say which of its rules are a plug's: docs/policy.md has
                        # "broadcasts of a plug's apps to the apps with the slot".
                        assert heard, where
                        assert not scene.system_slot, where
                        assert me == PLUG_APP, where


@pytest.mark.parametrize("interface", facts.INTERFACES)
def test_all_of_the_text_is_said(interface: str) -> None:
    for scene in facts.scenes(interface):
        for me in (PLUG_APP, SLOT_APP, *IDLE):
            written = facts.rules_of(scene, me, as_written=True)
            eavesdrops = sum("eavesdrop" in rule["access"] for rule in written)
            reasons = [each.reason for each in import_profile(scene, me).unsaid]
            assert reasons == ["eavesdropping is never allowed"] * eavesdrops


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (
            Message(
                access="send",
                bus="session",
                names=("org.example.Other",),
                path=DRIVER_PATH,
                interface=f"{DRIVER}.Introspectable",
                member="Introspect",
                peer=None,
            ),
            "the two rules of the template for Introspect of the bus",
        ),
        (
            Message(
                access="own",
                bus="session",
                names=("org.example.Thing_1234567890_12",),
                path="/",
                interface=None,
                member="",
                peer=None,
            ),
            "names that end in numbers",
        ),
    ],
)
def test_deviations_are_there(message: Message, why: str) -> None:
    given, imported = askers(DBUS, SLOT_APP)
    assert deviation(message) == why
    assert imported.allows(message)
    assert not given.allows(message)


def test_text_is_like_that_of_snapd() -> None:
    text = profile(DBUS, PLUG_APP)
    assert text.startswith('@{SNAP_INSTANCE_NAME}="consumer"\nprofile "snap.consumer.app" (')
    assert "\ndbus (receive, send)\n    peer=(label=snap.@{SNAP_INSTANCE_NAME}.*),\n" in text
    assert (
        '\ndbus (receive, send)\n    bus=session\n    interface="org.example.Thing{,.*}"'
        "\n    peer=(label=###SLOT_SECURITY_TAGS###),\n"
    ) in text
    assert '\ndbus bind\n    bus=session\n    name="org.example.Thing"' in profile(DBUS, SLOT_APP)
