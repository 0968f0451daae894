"""Records of sandboxes from requests, and specifications from records."""

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from broker.control_protocol.messages import Listener, SandboxSpec
from broker.engines.held_sockets import PIPE, HeldSockets
from broker.supervisor.config import ConfiguredLimits
from broker.supervisor.sandboxes.lifecycle import Cgroup, Process
from broker.supervisor.sandboxes.registry import Record, SandboxEntry
from broker.supervisor.sandboxes.sockets import Bound
from policy.rules import AccessList


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The connection that makes a request, outside all sandboxes.

    Credentials are a marshalled `a{sv}`.
    """

    bus: str
    unique_name: str
    uid: int
    credentials: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """The origin of a connection: a sandbox, an unknown sandbox, or the host."""

    is_inside: bool  # of a sandbox, now or before
    sandbox: SandboxEntry | None  # if known and not ended
    is_there: bool  # as far as known, the bus has not released the name


@dataclass(frozen=True, slots=True, kw_only=True)
class AddRequest:
    """The arguments of AddServer. The descriptors are the caller's, and only lent."""

    type: str
    app: str
    component: str | None = None
    metadata: bytes
    buses: tuple[str, ...]  # the first one's socket is answered
    access: AccessList
    plugs: tuple[str, ...] = ()
    portals_as_host: bool = False
    keep_after_creator: bool = False
    process: Process | None = None
    cgroup: Cgroup | None = None
    time_limit: int = 0  # seconds; 0: none
    close_notify: int | None = None
    ready_notify: int | None = None
    socket: int | None = None  # to listen on for the first bus


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Now, by two clocks."""

    created: float  # seconds since 1970
    boot: float  # seconds since boot


def make_record(
    number: int, request: AddRequest, caller: Caller, bound: Mapping[str, Bound], now: Times
) -> Record:
    """Return the record of a new sandbox."""
    return Record(
        number=number,
        type=request.type,
        app=request.app,
        component=request.component,
        metadata=request.metadata,
        uid=caller.uid,
        creator=caller.unique_name,
        creator_bus=caller.bus,
        credentials=caller.credentials,
        sockets={bus: one.path for bus, one in bound.items()},
        addresses={bus: one.address for bus, one in bound.items()},
        access=request.access,
        portals_as_host=request.portals_as_host,
        keep_after_creator=request.keep_after_creator,
        close_notify=request.close_notify is not None,
        plugs=request.plugs,
        process=request.process,
        cgroup=request.cgroup,
        time_limit=request.time_limit,
        expires=now.boot + request.time_limit if request.time_limit else 0.0,
        created=now.created,
    )


def make_spec(
    record: Record,
    access: AccessList,
    bound: Mapping[str, Bound],
    close_notify: int | None,
    limits: ConfiguredLimits,
) -> tuple[SandboxSpec, list[int]]:
    """Return a sandbox's specification and descriptors for the gate."""
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
        # For a supervisor that has lost the record. The rules are left out, because the gate has those in force.
        record=msgspec.msgpack.encode(msgspec.structs.replace(record, access=_no_rules(record))),
        metadata=record.metadata,
    )
    return spec, fds


def _no_rules(record: Record) -> AccessList:
    return msgspec.structs.replace(record.access, rules=())


def is_held(record: Record, held: HeldSockets) -> bool:
    """Return whether a sandbox listens, and all sockets and the pipe are held."""
    wanted = {*record.sockets, PIPE} if record.close_notify else {*record.sockets}
    return record.listening and wanted <= set(held.of(record.id))


def make_again(
    record: Record, access: AccessList, held: HeldSockets, limits: ConfiguredLimits, folder: Path
) -> tuple[SandboxSpec, Sequence[int]]:
    """Return a held sandbox's specification and descriptors, which stay held."""
    fds = held.of(record.id)
    bound = {bus: _find(record, bus, fds[bus], folder) for bus in record.sockets}
    return make_spec(record, access, bound, fds.get(PIPE), limits)


def _find(record: Record, bus: str, fd: int, folder: Path) -> Bound:
    """Return a held socket of a sandbox with the original description."""
    path = record.sockets[bus]
    guid = record.addresses[bus].rpartition("guid=")[2]
    device, inode = _identify(path, folder)
    return Bound(fd=fd, path=path, guid=guid, device=device, inode=inode)


def _identify(path: str, folder: Path) -> tuple[int, int]:
    """Return device and inode of a supervisor's socket; zeros for a caller's.

    A path in the folder is the supervisor's, because nobody else makes files there.
    """
    if path.startswith("\0") or Path(path).parent != folder:
        return 0, 0
    try:
        info = os.lstat(path)
    except OSError:
        return 0, 0
    return (info.st_dev, info.st_ino) if stat.S_ISSOCK(info.st_mode) else (0, 0)
