"""org.buswarden.Broker1.Policy: what it takes and gives, and who may call it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.api.caller import BusContext
from broker.api.dispatch import Objects
from broker.api.policy import PolicyInterface, describe_change, parse_question
from broker.bus.values import Variant, plain
from broker.supervisor.storage.recovery import open_state
from broker.wire.errors import CallRefusedError
from broker.wire.interfaces import BROKER_PATH
from policy.rules import Access, Identity
from policy.snaps.compiler import Change
from policy.text import parse_rule
from tests.helpers.fakes import FakeBus, make_call
from tests.helpers.snapstage import OTHER, PAIR, PLAYER, REMOTE, Stage

PEER = "app:io.snapcraft.snapd/player#player"
MESSAGE = {
    "direction": "send",
    "bus": "session",
    "name": "org.example.Player",
    "path": "/org/example/Player",
    "interface": "org.example.Player",
    "member": "Play",
    "peer": PEER,
}
METHODS: dict[str, Any] = {
    "LoadSnaps": ("s", "{}"),
    "Snaps": ("",),
    "Connect": ("ss", *PAIR),
    "Disconnect": ("ss", *PAIR),
    "Connections": ("",),
    "Explain": ("sa{sv}", "remote.remote", {}),
    "Interface": ("s", "mpris"),
}


class Service:
    def __init__(self, stage: Stage) -> None:
        me = os.geteuid()
        self.stage = stage
        self.bus = FakeBus(users={":1.1": me, ":1.2": me + 1, ":1.7": me})
        door = BusContext(
            name="session", bus=self.bus, supervisor=stage.supervisor, buses=("session",)
        )
        self.objects = Objects({BROKER_PATH: [PolicyInterface(door).interface()]})

    async def ask(self, member: str, signature: str = "", *values: Any, **fields: Any) -> Any:
        """Return the plain value of the answer, None if there is none, or the name of the error."""
        self.bus.answers.clear()
        self.bus.errors.clear()
        call = make_call(member, signature, *values, path=BROKER_PATH, **fields)
        await self.objects.serve(self.bus, call)
        if self.bus.errors:
            return self.bus.errors[0][0].rpartition(".")[2]
        answer = self.bus.answers[0][1]
        return plain(answer[0]) if answer else None

    async def explain(self, what: str = "remote.remote", **changes: str) -> Any:
        said = {**MESSAGE, **changes}
        message = {key: Variant("s", text) for key, text in said.items()}
        return await self.ask("Explain", "sa{sv}", what, message)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with open_state(tmp_path / "state.db") as state:
        yield Service(Stage(tmp_path, state))


async def test_snaps_are_loaded_listed_and_connected(service: Service) -> None:
    text = json.dumps({"snaps": [PLAYER, REMOTE, OTHER]})
    assert await service.ask("LoadSnaps", "s", text) is None
    listed = json.loads(await service.ask("Snaps"))
    assert [snap["name"] for snap in listed["snaps"]] == ["other", "player", "remote", "snapd"]
    assert listed["snaps"][2]["plugs"]["control"]["attributes"] == {
        "bus": "session",
        "name": "org.example.Player",
    }
    changed = await service.ask("Connect", "ss", *PAIR)
    assert changed[2] == "snap.remote.remote: 10 rules added"
    assert await service.ask("Connections") == [(*PAIR, "dbus")]
    changed = await service.ask("Disconnect", "ss", *PAIR)
    assert changed[2] == "snap.remote.remote: 10 rules removed"
    assert await service.ask("Connections") == []
    # What is listed can be loaded again.
    assert await service.ask("LoadSnaps", "s", json.dumps(listed)) is None
    assert json.loads(await service.ask("Snaps")) == listed


async def test_without_snaps_there_is_nothing_but_the_system(service: Service) -> None:
    assert await service.ask("Connections") == []
    (snap,) = json.loads(await service.ask("Snaps"))["snaps"]
    assert (snap["name"], snap["system"]) == ("snapd", True)
    assert await service.ask("Connect", "ss", *PAIR) == "InvalidArgs"
    assert await service.ask("Connect", "ss", "remote", "") == "InvalidArgs"
    assert await service.explain() == "InvalidArgs"


async def test_an_interface_is_told_in_json(service: Service) -> None:
    facts = json.loads(await service.ask("Interface", "s", "mpris"))
    assert (facts["name"], facts["file"]) == ("mpris", "mpris.toml")
    assert facts["slot"]["permanent"]
    assert await service.ask("Interface", "s", "no-such") == "InvalidArgs"


@pytest.mark.parametrize("member", METHODS)
async def test_callers_inside_are_refused(service: Service, member: str) -> None:
    service.stage.engine.connections["session", ":1.7"] = "c0"
    assert await service.ask(member, *METHODS[member], sender=":1.7") == "AccessDenied"


@pytest.mark.parametrize("member", ["LoadSnaps", "Connect", "Disconnect"])
async def test_other_users_may_look_but_not_change(service: Service, member: str) -> None:
    assert await service.ask(member, *METHODS[member], sender=":1.2") == "AccessDenied"
    assert await service.ask("Connections", sender=":1.2") == []


async def test_an_explanation_says_what_would_help(service: Service) -> None:
    await service.stage.load(PLAYER, REMOTE)
    denied = await service.explain()
    assert not denied["allowed"]
    assert (denied["rule"], denied["origin"]) == ("", "")
    assert denied["reason"]
    assert f"connect {' '.join(PAIR)}" in denied["suggestions"]
    rule = "allow send:org.example.Player@/org/example/Player:org.example.Player.Play"
    assert f"{rule},peer={PEER},bus=session" in denied["suggestions"]
    await service.ask("Connect", "ss", *PAIR)
    allowed = await service.explain()
    assert allowed["allowed"]
    assert allowed["rule"].startswith("allow send")
    assert "connected remote:control player:control" in allowed["origin"]
    assert allowed["suggestions"] == []
    assert not (await service.explain(peer="host"))["allowed"]


async def test_a_plug_that_the_snap_does_not_have_is_suggested(service: Service) -> None:
    await service.stage.load(REMOTE)
    answer = await service.explain(
        bus="system",
        name="org.freedesktop.UPower",
        path="/org/freedesktop/UPower",
        interface="org.freedesktop.UPower",
        member="EnumerateDevices",
        peer="host",
    )
    assert "plug upower-observe" in answer["suggestions"]


@pytest.mark.parametrize(
    "changes",
    [
        {"direction": "sideways"},
        {"direction": ""},
        {"bus": ""},
        {"bus": "x" * 300},
        {"name": "x"},
        {"path": "x"},
        {"interface": "x"},
        {"member": "a.b"},
        {"peer": "same-app"},
        {"peer": "app:x"},
        {"peer": "app:a.b/c,bus=x"},
        {"more": "x"},
    ],
)
async def test_a_message_that_cannot_be_is_refused(
    service: Service, changes: dict[str, str]
) -> None:
    await service.stage.load(PLAYER, REMOTE)
    assert await service.explain(**changes) == "InvalidArgs"


def test_a_question_has_what_was_said() -> None:
    message = {key: Variant("s", text) for key, text in MESSAGE.items()}
    question = parse_question(message)
    assert (question.access, question.names) == (Access.SEND, ("org.example.Player",))
    assert question.peer == Identity(type="io.snapcraft.snapd", app="player", component="player")
    assert not question.broadcast
    del message["name"]
    message["peer"] = Variant("s", "")
    question = parse_question(message)
    assert (question.names, question.peer, question.broadcast) == ((), None, True)
    with pytest.raises(CallRefusedError, match="not a text"):
        parse_question({"bus": Variant("u", 1)})


def test_a_change_is_told_in_words() -> None:
    rule = parse_rule("send:")
    change = Change(tag="snap.a.b", added=(rule,), removed=(rule, rule))
    assert describe_change(change) == "snap.a.b: 1 rule added, 2 rules removed"
