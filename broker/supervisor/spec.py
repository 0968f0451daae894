"""What the gate is told of a new sandbox, and how many rules it may be given. Pure."""

from collections.abc import Mapping
from typing import Final

import msgspec

from broker.gate.control import Listener, SandboxSpec
from broker.supervisor.config import Limits
from broker.supervisor.registry import Record
from broker.supervisor.sockets import Bound
from broker.wire.errors import LIMITS_EXCEEDED, CallRefusedError
from policy.rules import AccessList

# An access list of this many takes about 2 MiB, in each of the places that have it.
MAX_RULES: Final = 10_000
# And of unusual ones: the gate's frames carry a list, twice for snaps, and as much again of a sandbox besides.
MAX_RULES_BYTES: Final = 8 * 1024 * 1024


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


def check_rules(access: AccessList) -> AccessList:
    """Return the list, if it has not too many rules or bytes. Raises CallRefusedError LimitsExceeded."""
    if len(access.rules) > MAX_RULES:
        raise CallRefusedError(LIMITS_EXCEEDED, f"max_rules={MAX_RULES} would be exceeded")
    if len(msgspec.msgpack.encode(access)) > MAX_RULES_BYTES:
        text = f"max_rules_bytes={MAX_RULES_BYTES} would be exceeded"
        raise CallRefusedError(LIMITS_EXCEEDED, text)
    return access
