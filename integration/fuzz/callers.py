"""A call with a body of any shape has one answer at most, takes a bounded slice at a time, and refused changes nothing.

The first bytes of an input say which method is called, with which signature, in how many pieces the message arrives and
whether it is of a sandbox; the body is the rest.
"""

import atexit
import contextlib
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from broker.api import containers1, management, policy
from broker.api.caller import BusContext
from broker.api.dispatch import Objects
from broker.api.subscribers import Subscribers
from broker.bus.codec import MAX_STEPS, STEPS_A_SLICE, Unpacker
from broker.bus.connection import Call
from broker.bus.message_intake import ArrivedMessage, MessageIntake
from broker.bus.values import Variant, pack
from broker.control_protocol.messages import BusSpec
from broker.supervisor.config import Config, ConfiguredLimits
from broker.supervisor.sandboxes.registry import SandboxId
from broker.supervisor.storage.recovery import open_state
from broker.supervisor.supervisor import Environment, Supervisor
from broker.wire.errors import CallRefusedError
from broker.wire.header import Header, MessageType, serialise_header
from broker.wire.interfaces import BROKER_PATH, CONTAINERS1, DRIVER_PATH
from integration.fuzz.pieces import Choices, cut
from tests.helpers.fakes import FakeAnnouncer, FakeBus, FakeEngine, FakeWatch

_CALLER: Final = ":1.1"
_INSIDE: Final = ":1.7"
# A signature, an array of numbers and the last value of a slice are not cut.
_UNCUT: Final = 512
_OTHER_SIGNATURES: Final = (
    "",
    "av",
    "a{sv}",
    "aas",
    "s",
    "(((y)))",
    "a(usos)",
    "vvv",
    "aay",
    "sa(bs)b",
)
# What the one world has open, to the end of the process.
_OPEN: Final = contextlib.ExitStack()
atexit.register(_OPEN.close)


@dataclass(frozen=True, slots=True)
class _World:
    supervisor: Supervisor
    engine: FakeEngine
    objects: Objects
    bus: FakeBus
    methods: tuple[tuple[str, str, str, str], ...]  # path, interface, member, signature

    def state(self) -> tuple[object, ...]:
        """Return all that a call could change."""
        return (
            [(sandbox.record, sandbox.phase) for sandbox in self.supervisor.registry],
            dict(self.engine.access),
        )


@functools.cache
def _world() -> _World:
    folder = Path(_OPEN.enter_context(tempfile.TemporaryDirectory(prefix="bw-fuzz-")))
    state = _OPEN.enter_context(open_state(folder / "state.db"))
    engine, bus = FakeEngine(), FakeBus(users={_CALLER: 0, _INSIDE: 0})
    watch = FakeWatch([_CALLER, _INSIDE])
    supervisor = Supervisor(
        Environment(
            engine=engine,
            state=state,
            announcer=FakeAnnouncer(),
            name_watches={"session": watch},
            folder=folder,
        ),
        ConfiguredLimits(),
    )
    engine.listener = supervisor
    engine.connections["session", _INSIDE] = "c99"
    config = Config(
        scope="user",
        buses=(BusSpec(name="session", address="unix:path=/bus"),),
        runtime_dir=folder,
        limits=ConfiguredLimits(),
    )
    door = BusContext(name="session", bus=bus, supervisor=supervisor, buses=("session",))
    subscribers = Subscribers(lambda: 0.0)
    made = {
        DRIVER_PATH: [containers1.Containers1(door, watch).interface()],
        BROKER_PATH: [
            management.Management(door, engine, config, subscribers, watch).interface(),
            policy.PolicyInterface(door).interface(),
        ],
    }
    methods = tuple(
        (path, one.name, method.name, "".join(arg.type for arg in method.takes))
        for path, interfaces in made.items()
        for one in interfaces
        for method in one.methods
        if method.takes
    )
    return _World(supervisor, engine, Objects(made), bus, methods)


def check(data: bytes) -> None:
    """Hold the invariant."""
    choices = Choices(data)
    world = _world()
    path, interface, member, signature = world.methods[choices.byte() % len(world.methods)]
    which = choices.byte()
    if which % 4 == 3:
        signature = _OTHER_SIGNATURES[which // 4 % len(_OTHER_SIGNATURES)]
    sender = _INSIDE if choices.byte() % 8 == 7 else _CALLER
    sizes = list(choices.take(2))
    body = choices.rest()
    if bool(body) != bool(signature):
        return
    header = Header(
        little=True,
        type=MessageType.METHOD_CALL,
        flags=0,
        body_length=len(body),
        serial=3,
        path=path,
        interface=interface,
        member=member,
        sender=sender,
        signature=signature,
    )
    message = serialise_header(header, sender=True) + body
    arrived = _arrive(world, cut(message, sizes))
    if arrived is not None:
        _read(arrived)
        trio.run(_serve, world, arrived)


def _arrive(world: _World, pieces: list[bytes]) -> ArrivedMessage | None:
    """Return the message if it is wanted; it is stored only then."""
    refused: list[str] = []

    def look(header: Header) -> bool:
        try:
            world.objects.look(header)
        except CallRefusedError as exc:
            refused.append(str(exc))
            return False
        return True

    intake = MessageIntake(look)
    items = [item for piece in pieces for item in intake.feed(piece)]
    assert len(items) + len(refused) == 1
    assert intake.held == 0
    return next((item for item in items if isinstance(item, ArrivedMessage)), None)


def _read(arrived: ArrivedMessage) -> None:
    unpacker = Unpacker(arrived.header.signature, arrived.body)
    with contextlib.suppress(ValueError):
        while not unpacker.run():
            pass
        assert unpacker.spent <= MAX_STEPS
    # What is refused for its number of values was counted before it was read.
    assert unpacker.longest_slice <= STEPS_A_SLICE + _UNCUT + len(arrived.body) // 2


async def _serve(world: _World, arrived: ArrivedMessage) -> None:
    header, bus = arrived.header, world.bus
    bus.answers.clear()
    bus.errors.clear()
    before = world.state()
    call = Call(
        sender=header.sender or "",
        path=header.path or "",
        interface=header.interface,
        member=header.member or "",
        signature=header.signature,
        body=arrived.body,
    )
    await world.objects.serve(bus, call)
    assert len(bus.answers) + len(bus.errors) == 1
    if bus.errors:
        name, text = bus.errors[0]
        assert "internal error" not in text, name
        assert world.state() == before
        return
    assert header.sender != _INSIDE or header.interface == CONTAINERS1
    for sandbox in world.supervisor.registry:
        await world.engine.stop(SandboxId(sandbox.record.id))


def seeds() -> list[bytes]:
    """Return calls that are carried out, and bodies that are large or deep."""
    bodies: dict[str, list[Any]] = {
        "ssa{sv}a{sv}": ["org.example.T", "a", {"k": Variant("s", "v")}, _named()],
        "sa(usos)": ["c0", [(2, "org.a", "/", "")]],
        "sa(bs)b": ["c0", [(False, "send:org.a"), (True, "see:org.b")], True],
        "sa{sv}": ["c0", {"direction": Variant("s", "send"), "bus": Variant("s", "session")}],
    }
    found = []
    for index, (_, _, _, signature) in enumerate(_world().methods):
        head = bytes((index, 0, 0, 64, 200))
        if signature in bodies:
            found.append(head + pack(signature, bodies[signature]))
        elif set(signature) <= {"s", "o"}:
            found.append(head + pack(signature, ["/a"] * len(signature)))
    found.append(
        bytes((0, 7, 0, 0, 0)) + pack("av", [[Variant("av", [Variant("y", 1)] * 50)] * 20])
    )
    found.append(bytes((0, 0, 7, 0, 0)) + b"\1v\0" * 200)
    return found


def _named() -> dict[str, Variant]:
    return {
        "Allow": Variant("a(usos)", [(6, "org.a", "/", ""), (1, "", "/a", "org.i")]),
        "Rules": Variant("a(bs)", [(True, "send:org.b")]),
        "Plugs": Variant("as", ["network"]),
        "KeepAfterCreator": Variant("b", True),
    }
