"""Who asks for a sandbox, what for, and the record that comes of it. Values only."""

from collections.abc import Mapping
from dataclasses import dataclass

from broker.supervisor.ends import Cgroup, Process
from broker.supervisor.registry import Record, Sandbox
from broker.supervisor.sockets import Bound
from policy.rules import AccessList


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks: a connection to a bus, outside all sandboxes. Credentials are a marshalled `a{sv}`."""

    bus: str
    unique_name: str
    uid: int
    credentials: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """The origin of a connection: a sandbox, an unknown sandbox, or the host."""

    is_inside: bool  # of a sandbox, now or before
    sandbox: Sandbox | None  # which, if it is known and has not ended
    is_there: bool  # the bus has not let go of the connection, for all that we know


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
    """Return what is stored of a new sandbox."""
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
