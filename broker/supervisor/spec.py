"""The specification of a new sandbox, as it is sent to the gate. Pure."""

from collections.abc import Mapping

import msgspec

from broker.gate.control import Listener, SandboxSpec
from broker.supervisor.config import Limits
from broker.supervisor.registry import Record
from broker.supervisor.sockets import Bound
from policy.rules import AccessList


def make_spec(
    record: Record,
    access: AccessList,
    bound: Mapping[str, Bound],
    close_notify: int | None,
    limits: Limits,
) -> tuple[SandboxSpec, list[int]]:
    """Return the sandbox as the gate is to have it, and the descriptors that go with that."""
    fds = [one.fd for one in bound.values()]
    close_notify_at = None
    if close_notify is not None:
        close_notify_at = len(fds)
        fds.append(close_notify)
    listeners = tuple(
        Listener(
            bus=bus,
            fd=index,
            path=one.path if one.is_ours else "",
            device=one.device,
            inode=one.inode,
            guid=one.guid,
        )
        for index, (bus, one) in enumerate(bound.items())
    )
    spec = SandboxSpec(
        id=record.id,
        identity=record.identity,
        uid=record.uid,
        listeners=listeners,
        access=access,
        close_notify=close_notify_at,
        limits=limits.for_sandbox(),
        # For a supervisor that has lost it. The rules are not in it: the gate has those in force.
        record=msgspec.msgpack.encode(msgspec.structs.replace(record, access=_no_rules(record))),
        metadata=record.metadata,
    )
    return spec, fds


def _no_rules(record: Record) -> AccessList:
    return msgspec.structs.replace(record.access, rules=())
