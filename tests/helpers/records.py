"""Records and gate states for tests of the supervisor."""

from typing import Any

from broker.control_protocol.messages import SandboxSpec, SandboxState, Snapshot
from broker.supervisor.sandboxes.registry import Record
from policy.rules import NO_ACCESS

EMPTY_DICT = b"\0\0\0\0\0\0\0\0"  # a marshalled a{sv}


def make_record(number: int = 0, **fields: Any) -> Record:
    defaults: dict[str, Any] = {
        "number": number,
        "type": "org.example.Type",
        "app": "app",
        "metadata": EMPTY_DICT,
        "uid": 1000,
        "creator": ":1.1",
        "creator_bus": "session",
        "credentials": EMPTY_DICT,
        "sockets": {"session": f"/run/dbus-{number}"},
        "addresses": {"session": f"unix:path=/run/dbus-{number}"},
        "access": NO_ACCESS,
        "created": 1.0,
    }
    return Record(**{**defaults, **fields})


def make_state(record: Record, **fields: Any) -> SandboxState:
    """Return the gate's view of a sandbox that is as we have it."""
    spec = SandboxSpec(
        id=record.id,
        identity=record.identity,
        uid=record.uid,
        listeners=(),
        access=record.access_in_force,
    )
    defaults: dict[str, Any] = {
        "spec": spec,
        "listening": True,
        "connections": (),
        "opening": 0,
        "denied": 0,
    }
    return SandboxState(**{**defaults, **fields})


def make_snapshot(*states: SandboxState) -> Snapshot:
    return Snapshot(protocol=1, pid=77, buses=(), sandboxes=states)
