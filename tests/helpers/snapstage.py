"""A supervisor with fakes around it, and snaps whose plugs and slots belong together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from broker.supervisor.config import ConfiguredLimits
from broker.supervisor.sandboxes.specs import AddRequest, Caller
from broker.supervisor.snaps.connections import Policy
from broker.supervisor.storage.recovery import open_state
from broker.supervisor.storage.state_file import StateFile
from broker.supervisor.supervisor import Environment, Supervisor
from policy.rules import Access, AccessList, Identity
from policy.snaps.explain import Question
from policy.snaps.installed import SNAP_TYPE
from policy.snaps.library import Library
from tests.helpers.fakes import FakeAnnouncer, FakeEngine, FakeWatch
from tests.helpers.records import EMPTY_DICT
from tests.helpers.snapworlds import library

ME = os.geteuid()
CALLER = Caller(bus="session", unique_name=":1.1", uid=ME, credentials=EMPTY_DICT)
PORT = {"interface": "dbus", "attributes": {"bus": "session", "name": "org.example.Player"}}
PLAYER = {"name": "player", "apps": ["player", "second"], "slots": {"control": PORT}}
REMOTE = {"name": "remote", "apps": ["remote"], "plugs": {"control": PORT}}
OTHER = {"name": "other", "apps": ["other"], "plugs": {"control": PORT}}
PAIR = ("remote:control", "player:control")
QUESTION = Question(
    access=Access.SEND,
    bus="session",
    names=("org.example.Player",),
    path="/org/example/Player",
    interface="org.example.Player",
    member="Play",
    peer=Identity(type=SNAP_TYPE, app="player", component="player"),
)


class Stage:
    """A supervisor with fakes around it, and three snaps."""

    def __init__(self, folder: Path, state: StateFile) -> None:
        self.folder = folder
        self.state = state
        self.engine = FakeEngine()
        self.supervisor = self.restart()

    @property
    def policy(self) -> Policy:
        return self.supervisor.policy

    def restart(self, catalogue: Library | None = None) -> Supervisor:
        outside = Environment(
            engine=self.engine,
            state=self.state,
            announcer=FakeAnnouncer(),
            name_watches={"session": FakeWatch([":1.1"])},
            folder=self.folder,
            load_library=lambda: catalogue or library(),
        )
        self.supervisor = Supervisor(outside, ConfiguredLimits())
        self.engine.listener = self.supervisor
        return self.supervisor

    async def add(self, app: str = "remote", component: str | None = None, **fields: Any) -> str:
        defaults: dict[str, Any] = {"type": SNAP_TYPE, "access": AccessList()}
        request = AddRequest(
            app=app,
            component=component or app,
            metadata=EMPTY_DICT,
            buses=("session",),
            **{**defaults, **fields},
        )
        record = await self.supervisor.add(request, CALLER)
        self.supervisor.announce(record)
        return record.id

    async def load(self, *snaps: object, **more: object) -> None:
        world = {"snaps": list(snaps), **more}
        await self.policy.load(ME, msgspec.json.encode(world).decode())

    def has(self, sandbox: str) -> bool:
        """Say whether a sandbox's rules are of the connection."""
        return any("connected remote" in rule.origin for rule in self.engine.access[sandbox].rules)

    def changed(self) -> list[str]:
        """Return, and forget, whose rules were set."""
        done = [what[1] for what in self.engine.done if what[0] == "set_access"]
        self.engine.done.clear()
        return done


@contextmanager
def open_stage(folder: Path) -> Iterator[Stage]:
    """Have a supervisor with no snaps, its state and sockets in this folder."""
    containers = folder / "containers"
    containers.mkdir()
    with open_state(folder / "state.db") as state:
        yield Stage(containers, state)
