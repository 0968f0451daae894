"""The types of the whole state that one gate hands over to the next. No I/O.

A hand-over is a sequence of frames: a HandoverHeader, then a SandboxDump for each sandbox. Each
frame is msgpack with the names of the fields. The fields name descriptors by the index in the
frame. State that can be made again is left out: compiled rules, remembered verdicts, sums. Times
are those of the monotonic clock, which all processes share.

VERSION is raised with every change that would make a gate misread the frames of an older gate.
Fields with a default may be added without a new version. tests/data/handover-3.txt has recorded
frames.
"""

import array
import struct
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from broker.control_protocol.messages import SandboxSpec
from broker.gate.event_journal import EventJournal
from policy.rules import AccessList, Identity

VERSION: Final = 3
# The versions that this gate can read. Versions 1 and 2 were before the first release.
READS: Final = (VERSION,)


class ReplyAction(msgspec.Struct, frozen=True, omit_defaults=True):
    """The handling of a reply: `kind` names the handler, and `values` are its arguments."""

    kind: str
    values: tuple[str | int, ...] = ()
    after: "ReplyAction | None" = None


class ReplierDump(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The connections that may answer a call: `owner`, and the later owners of `name`.

    The later owners are those in the name's history from the change `since` on.
    """

    owner: str
    name: str = ""
    since: int = 0


class CallDump(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A waiting call with a reply that the gate handles by an action."""

    serial: int
    replier: ReplierDump
    action: ReplyAction
    is_own: bool = False  # a call of the gate, not of the app


class PlainCallsDump(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Calls whose reply is passed on, in packed form.

    Thousands of such calls may wait, each for a different owner of a name.
    """

    owners: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    # Of each call: serial, index of the owner, index of the name, and `since` as in a ReplierDump.
    rows: bytes = b""


class HistoryDump(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The last changes of a name's owner, for the calls that wait for that name."""

    name: str
    count: int = 0
    changes: tuple[tuple[str, str], ...] = ()


class ConnectionStateDump(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state that both directions of a connection share."""

    unique_name: str = ""
    greeting: bool = False
    plain: PlainCallsDump = PlainCallsDump()
    calls: tuple[CallDump, ...] = ()
    translated_serials: tuple[int, ...] = ()
    calls_to_app: tuple[tuple[str, int], ...] = ()
    matches: tuple[tuple[str, int], ...] = ()
    requested_names: tuple[tuple[str, int], ...] = ()
    name_requests: int = 0
    callers: tuple[str, ...] = ()
    counts_callers: bool = False
    next_gate_serial: int

    def asked_names(self) -> set[str]:
        """Return the well-known names that calls wait for."""
        return ({call.replier.name for call in self.calls} | set(self.plain.names)) - {""}


class OwnersDump(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The owners of the names that matter to a connection."""

    names: tuple[tuple[str, str], ...] = ()
    waiting: int = 0
    tells: bool = False
    extra: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    subtrees: tuple[str, ...] = ()
    globs: bool = False
    matches: tuple[str, ...] = ()
    histories: tuple[HistoryDump, ...] = ()  # of the names that calls wait for
    unasked: tuple[str, ...] = ()  # names whose owner has still to be asked for
    asking: int = 0  # the number of unanswered questions


class ChunkDump(msgspec.Struct, frozen=True, omit_defaults=True):
    """Bytes with the descriptors that travel with these bytes."""

    data: bytes
    fds: tuple[int, ...] = ()


class ReceiveBufferDump(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The unfinished end of a stream."""

    held: bytes = b""
    need: int = 0
    skip: int = 0
    unfinished: int = 0
    number: int = 0
    fds: tuple[int, ...] = ()
    # (number of descriptors left, position at which the read of the descriptors ended)
    batches: tuple[tuple[int, int], ...] = ()


class FilterDump(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A filter, with the unfinished messages of both directions."""

    app_takes_fds: bool
    held: bool = False
    yielded: bool = False
    wake: bool = False
    state: ConnectionStateDump
    owners: OwnersDump
    recently_visible: tuple[str, ...] = ()
    known_to_app: tuple[str, ...] | None = None
    from_app: ReceiveBufferDump
    from_bus: ReceiveBufferDump
    stash: tuple[ChunkDump, ...] = ()


class StreamDump(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A socket, and the bytes that the other end has not taken."""

    fd: int
    queue: tuple[ChunkDump, ...] = ()
    reading: bool = True


class AppConnectionDump(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An app's connection.

    During the handshake there is no filter. The next gate then repeats the handshake from `said`
    and `bus_said`.
    """

    bus: str
    guid: str
    app_side: StreamDump
    said: bytes = b""
    bus_side: StreamDump | None = None
    bus_said: bytes = b""
    filter: FilterDump | None = None
    deadline: float | None = None
    watched: int = 0  # the number of the message with the deadline, or 0 for the handshake
    was_unfinished: int = 0
    is_throttled: bool = False


class LingeringDump(msgspec.Struct, frozen=True, kw_only=True):
    """The bus side of a connection whose app has gone."""

    bus: str
    unique_name: str
    fd: int


class BudgetDump(msgspec.Struct, frozen=True, kw_only=True):
    """The budget of a sandbox's messages."""

    left: int
    filled: float
    caused: int = 0


class RateLimitedLogDump(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The lines of the log that a sandbox has caused."""

    second: float
    used: int = 0
    suppressed: int = 0
    suppressed_ever: int = 0


class SandboxDump(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A sandbox with its sockets and connections."""

    spec: SandboxSpec
    guid: str
    listening: tuple[tuple[int, int], ...] = ()  # (index in the spec's listeners, descriptor)
    close_pipe: int = -1
    connections: tuple[AppConnectionDump, ...] = ()
    lingering: tuple[LingeringDump, ...] = ()
    reason: str = ""  # of the end, while the end waits for lingering connections
    waiting_requests: tuple[int, ...] = ()  # serials of requests that wait for the end
    messages: BudgetDump
    limited_log: RateLimitedLogDump
    is_throttled: bool = False
    throttled_count: int = 0
    # Throttled readers in order, by the index of a connection, or -1 for the listeners.
    waiting: tuple[int, ...] = ()
    denied_count: int = 0
    reports_left: int
    unreported: int = 0


class PayersDump(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The payers of a bus, without open connections."""

    late: tuple[tuple[str, str], ...] = ()  # (unique name, sandbox)
    movers: tuple[tuple[str, str], ...] = ()  # (name, last requester)
    arriving: tuple[tuple[str, int], ...] = ()  # (unique name, debt)


class BusDump(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state that all connections to a bus share."""

    name: str
    address: str
    guid: str = ""
    identities: tuple[tuple[str, Identity], ...] = ()
    sandboxes: tuple[tuple[str, str], ...] = ()
    closed_recently: tuple[str, ...] = ()
    spans: tuple[tuple[str, bytes], ...] = ()  # of the ledger
    # The rules of closed connections. The rules of open connections are in the sandboxes' frames.
    judges: tuple[tuple[AccessList, Identity], ...] = ()
    broadcast_judges: tuple[tuple[str, int], ...] = ()
    wants_instance_field: tuple[str, ...] = ()
    absent_name_errors: tuple[tuple[str, str, str], ...] = ()
    payers: PayersDump = PayersDump()


class BusClientCallDump(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A call for the supervisor on a connection of the gate, without an answer yet."""

    serial: int
    request: int = 0  # the serial of the supervisor's request, or 0 for a request given up
    interface: str
    member: str
    undo: str = ""
    leave: bool = False
    removed: str = ""  # the sandbox that ends if there is an answer

    def given_up(self) -> "BusClientCallDump":
        """Return the call without its request."""
        return msgspec.structs.replace(self, request=0)


class BusClientDump(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A connection of the gate itself to a bus, and the servers that depend on the connection."""

    bus: str
    uid: int
    stream: StreamDump
    buffer: bytes = b""
    skip: int = 0  # bytes still to come that are skipped
    next_serial: int
    waiting: tuple[BusClientCallDump, ...] = ()
    claimed: tuple[tuple[str, str], ...] = ()  # (instance, sandbox)
    unclaimed: tuple[tuple[str, str, str], ...] = ()  # (instance, interface, method that undoes)


class SupervisorChannelDump(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The control socket, the supervisor's connection, and the unconfirmed events."""

    listening: int
    stream: StreamDump | None = None
    # Frames behind the request to hand over. The last frame may be unfinished.
    requests: bytes = b""
    request_fds: tuple[int, ...] = ()
    journal: EventJournal


class HandoverHeader(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """The first frame: the state outside of sandboxes, and the number of sandboxes that follow."""

    version: int
    pid: int
    serial: int  # of the request to hand over
    protocol: int  # of the supervisor that made the request
    channel: SupervisorChannelDump
    buses: tuple[BusDump, ...] = ()
    bus_clients: tuple[BusClientDump, ...] = ()
    sandboxes: int = 0


_ROW: Final = struct.Struct("=4I")


class HandoverError(Exception):
    """The hand-over fails, and the old gate serves again."""


class PlainCalls:
    """The packer of calls whose reply is passed on.

    Both gates run on one machine, so numbers are in native byte order.
    """

    def __init__(self) -> None:
        self._owners: Final[dict[str, int]] = {}
        self._names: Final[dict[str, int]] = {}
        self._numbers: Final = array.array("I")

    def index(self, owner: str, name: str) -> tuple[int, int]:
        """Return the indexes of an owner and a name."""
        owners, names = self._owners, self._names
        return owners.setdefault(owner, len(owners)), names.setdefault(name, len(names))

    def add(self, row: tuple[int, int, int, int]) -> None:
        """Add a call: serial, index of the owner, index of the name, `since`."""
        self._numbers.extend(row)

    def dump(self) -> PlainCallsDump:
        """Return the calls that were added."""
        rows = self._numbers.tobytes()
        return PlainCallsDump(owners=tuple(self._owners), names=tuple(self._names), rows=rows)


def unpack_rows(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Return the rows of a `PlainCallsDump`. Raises struct.error."""
    return _ROW.iter_unpack(data)


class Fds:
    """The descriptors of one frame. Fields of the frame name descriptors by index."""

    def __init__(self) -> None:
        self.all: Final[list[int]] = []

    def put(self, fd: int) -> int:
        """Add a descriptor, and return the index."""
        self.all.append(fd)
        return len(self.all) - 1

    def put_all(self, fds: Sequence[int]) -> tuple[int, ...]:
        """Add descriptors, and return the indexes."""
        return tuple(self.put(fd) for fd in fds)


def pick(fds: Sequence[int], indexes: Sequence[int]) -> tuple[int, ...]:
    """Return the descriptors that have these indexes."""
    return tuple(fds[index] for index in indexes)
