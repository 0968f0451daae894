"""docs/dbus-api.md against answers: the keys of the dictionaries, and who is refused what."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, cast

import pytest

from broker.api import containers1, management, policy
from broker.api.caller import BusContext
from broker.api.dispatch import Method, Objects
from broker.api.management import describe_denial
from broker.api.subscribers import Subscribers
from broker.bus.values import Variant
from broker.control_protocol.messages import BusSpec, Denied, SandboxSpec, Usage
from broker.supervisor.config import Config, ConfiguredLimits
from broker.supervisor.storage.recovery import open_state
from broker.supervisor.supervisor import Environment, Supervisor
from broker.wire.interfaces import BROKER, BROKER_PATH, BROKER_POLICY, DRIVER_PATH
from policy.match import Verdict
from policy.snaps.explain import Explanation
from policy.snaps.library import Library
from tests.helpers.dbus_interfaces import interfaces
from tests.helpers.dbus_page import keys, method_section, section
from tests.helpers.fakes import FakeAnnouncer, FakeBus, FakeEngine, FakeWatch, make_call
from tests.helpers.records import make_record

ROOT, OURS = 0, os.geteuid()
USER, STRANGER = OURS + 1, OURS + 2
CALLERS: Final = {":1.0": ROOT, ":1.1": USER, ":1.2": STRANGER, ":1.3": OURS, ":1.7": USER}
SANDBOXED: Final = ":1.7"
PATH: Final = "/org/freedesktop/DBus/Containers1/c0"
MESSAGE: Final = {"direction": Variant("s", "own"), "bus": Variant("s", "session")}
# Arguments of each method that takes any: c0 is the sandbox.
ARGUMENTS: Final[dict[str, tuple[object, ...]]] = {
    "AddServer": ("org.example.T", "app", {}, {}),
    "AddContainerServer": ("org.example.T", "app", {}, {}),
    "ChangeAccess": ("c0", [], False),
    "Connect": ("a:b", "c:d"),
    "Disconnect": ("a:b", "c:d"),
    "Explain": ("c0", MESSAGE),
    "GetConnectionInstance": (SANDBOXED,),
    "GetInstanceInfo": (PATH,),
    "Interface": ("x",),
    "LoadSnaps": ("{}",),
    "RemoveContainerServer": (PATH,),
    "SetContainerAccess": ("c0", []),
    "Show": ("c0",),
    "StopInstance": (PATH,),
    "StopListening": (PATH,),
}
METHODS: Final = [
    (path, method) for path, table in interfaces().values() for method in table.methods
]


class World:
    """The three interfaces on one bus, sandbox c0 with a connection, and a gate that does what it is asked for."""

    def __init__(self, outside: Environment, engine: FakeEngine, folder: Path) -> None:
        supervisor = Supervisor(outside, ConfiguredLimits())
        self.bus: Final = FakeBus(users=dict(CALLERS))
        config = Config(
            scope="user",
            buses=(BusSpec(name="session", address="unix:path=/bus"),),
            runtime_dir=folder,
            limits=ConfiguredLimits(),
        )
        door = BusContext(name="session", bus=self.bus, supervisor=supervisor, buses=("session",))
        watch = FakeWatch(list(CALLERS))
        subscribers = Subscribers(lambda: 0.0)
        manager = management.Management(door, engine, config, subscribers, watch)
        policies = policy.PolicyInterface(door)
        self._objects: Final = Objects(
            {
                DRIVER_PATH: [containers1.Containers1(door, watch).interface()],
                BROKER_PATH: [manager.interface(), policies.interface()],
            }
        )
        engine.listener = supervisor
        supervisor.registry.restore(make_record(uid=USER, keep_after_creator=True))
        engine.specs["c0"] = cast("SandboxSpec", None)
        engine.connect("c0", SANDBOXED)

    async def call(self, path: str, method: Method, sender: str) -> str:
        """Call a method with its arguments; return the last part of the error's name, or nothing."""
        self.bus.errors.clear()
        signature = "".join(arg.type for arg in method.takes)
        values = ARGUMENTS.get(method.name, ())
        call = make_call(method.name, signature, *values, path=path, sender=sender)
        await self._objects.serve(self.bus, call)
        return self.bus.errors[0][0].rpartition(".")[2] if self.bus.errors else ""

    async def answer(self, member: str) -> dict[str, Variant]:
        """Return the dictionary that a method of the management answers with; of a list, the first."""
        (method,) = [one for path, one in METHODS if (path, one.name) == (BROKER_PATH, member)]
        assert not await self.call(BROKER_PATH, method, ":1.1")
        ((_, (value,)),) = self.bus.answers
        self.bus.answers.clear()
        return cast("dict[str, Variant]", value[0] if isinstance(value, list) else value)


@contextmanager
def open_world(folder: Path) -> Iterator[World]:
    engine = FakeEngine()
    with open_state(folder / "state.db") as state:
        outside = Environment(
            engine=engine,
            state=state,
            announcer=FakeAnnouncer(),
            name_watches={"session": FakeWatch(list(CALLERS))},
            folder=folder,
            load_library=_no_library,
        )
        yield World(outside, engine, folder)


def _no_library() -> Library:
    raise FileNotFoundError("there is none")


def kinds(values: Mapping[str, Variant]) -> dict[str, str]:
    return {key: value.signature for key, value in values.items()}


# -- keys ------------------------------------------------------------------------------------------------


async def test_keys_of_sandboxes_are_those_that_are_answered(tmp_path: Path) -> None:
    with open_world(tmp_path) as world:
        listed, shown = await world.answer("List"), await world.answer("Show")
    assert keys(method_section(BROKER, "List"), "sandboxes") == kinds(listed)
    more = {key: kind for key, kind in kinds(shown).items() if key not in listed}
    assert keys(method_section(BROKER, "Show"), "what") == more


async def test_keys_of_status_are_those_that_are_answered(tmp_path: Path) -> None:
    with open_world(tmp_path) as world:
        status, shown = await world.answer("Status"), await world.answer("Show")
    part = method_section(BROKER, "Status")
    assert keys(part, "status") == kinds(status)
    watched = cast("dict[str, str]", status["watched"].value)
    assert all(f"`{key}`" in part.text for key in watched)
    use = cast("dict[str, int]", shown["use"].value)
    assert set(cast("dict[str, int]", status["use"].value)) == {*use, "max_containers"}


async def test_keys_of_use_are_those_that_are_answered(tmp_path: Path) -> None:
    with open_world(tmp_path) as world:
        shown = await world.answer("Show")
    use = [row[0] for row in method_section(BROKER, "Show").table("key of use")]
    assert use == list(cast("dict[str, int]", shown["use"].value))
    assert len(use) == len(Usage.__struct_fields__)
    # The page says how many of them are named after limits.
    limits = ConfiguredLimits.__struct_fields__
    assert [name in limits for name in use] == [True] * 13 + [False] * (len(use) - 13)


def test_keys_of_denied_are_those_that_are_told() -> None:
    event = Denied(sandbox="c0", bus="b", direction="send", kind="call", peer="x")
    part = section("Signal Denied", BROKER)
    assert keys(part, "what") == kinds(describe_denial(event))


def test_keys_of_explain_are_those_of_question_and_answer() -> None:
    part = method_section(BROKER_POLICY, "Explain")
    assert keys(part, "message") == dict.fromkeys(policy.MESSAGE_KEYS, "s")
    explanation = Explanation(verdict=Verdict(allowed=False, rule=None, reason=""))
    assert keys(part, "why") == kinds(policy.describe(explanation))


# -- who may call ----------------------------------------------------------------------------------------

# What the page says of callers outside sandboxes: which users may.
WHO: Final[dict[str, Callable[[int], bool]]] = {
    "everybody, sandboxed apps included": lambda _uid: True,
    "every user": lambda _uid: True,
    "the user of the sandbox, root": lambda uid: uid in {ROOT, USER},
    "the broker's own user, root": lambda uid: uid in {ROOT, OURS},
}


def who_may(method: str) -> str:
    """Return what the page says."""
    (who,) = [
        who for names, who in section("Access").table("method") if method in names.split(", ")
    ]
    return who.partition(";")[0]


@pytest.mark.parametrize(("path", "method"), METHODS, ids=[method.name for _, method in METHODS])
async def test_access_is_as_the_page_says(path: str, method: Method, tmp_path: Path) -> None:
    who = who_may(method.name)
    refusal = "NotContainer" if method.name == "GetInstanceInfo" else "AccessDenied"
    for sender, uid in CALLERS.items():
        folder = tmp_path / sender
        folder.mkdir()
        with open_world(folder) as world:
            error = await world.call(path, method, sender)
        may = "sandboxed" in who if sender == SANDBOXED else WHO[who](uid)
        assert (error != refusal) == may, f"{sender} (user {uid}): {error}"


def test_the_page_says_of_every_method_who_may_call_it() -> None:
    names = [one for row in section("Access").table("method") for one in row[0].split(", ")]
    assert sorted(names) == sorted(method.name for _, method in METHODS)
