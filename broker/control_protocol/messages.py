"""The messages between supervisor and gate. No I/O.

The supervisor sends requests. The gate answers the requests in order, and sends events in between.
An event that happened before an answer is sent before that answer. So the receiver of an answer has
received all older events. A message names file descriptors by the index among the descriptors of
the envelope. docs/control-protocol.md has a table of all messages.

    supervisor                                gate
    AddSandbox, serial 7      ------------>
                              <------------   Gone, serial 0      (happened before the answer)
                              <------------   Done, serial 7

Some messages are about a bus that has Containers1. Such a bus makes a server for each sandbox, and
labels the connections through that server. The bus ends the server when the connection that
requested the server leaves. So the gate makes the request on a separate connection that the gate
keeps (gate/containers1/bus_client.py), and the supervisor provides the content of the request.
"""

from typing import Final

import msgspec

from policy.rules import AccessList, Identity


class ContainerServer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A server of a bus for one sandbox.

    The sandbox's connections to the bus are made there.
    """

    # The path on the bus. An empty path means that the server is lost. Connections then wait for
    # the next server.
    instance: str = ""
    address: str = ""
    stop: str = "StopInstance"  # the method that ends the server and all connections of the server
    stop_listening: str = "StopListening"  # empty if the bus has no such method


class CallBus(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """Call the bus on a connection that the gate makes as user `uid`.

    Answered by Called or Refused.

    The answer comes when the bus has answered or has taken too long. So the answer may come after
    the answers to later requests.
    """

    bus: str
    uid: int
    interface: str
    member: str
    signature: str = ""
    body: bytes = b""
    # A method to call with the path at the beginning of the reply, if no sandbox comes to use that
    # path.
    undo: str = ""
    leave: bool = False  # afterwards close the connection, unless the connection has another use


class Called(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The reply of the bus to CallBus."""

    signature: str
    body: bytes
    little: bool


class SetContainerServer(msgspec.Struct, frozen=True, tag=True):
    """Connect a sandbox to a bus through `server` from now on. Answered by Done.

    nil stands for a direct connection to the bus. The previous server is ended.
    """

    sandbox: str
    bus: str
    server: ContainerServer | None


class ContainerServerLost(msgspec.Struct, frozen=True, tag=True):
    """The sandbox's server is lost, with the bus or with the gate's connection to the bus."""

    sandbox: str
    bus: str


# Raised with every change that an older peer would misread.
PROTOCOL: Final = 4


class BusSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A real bus to connect to."""

    name: str
    address: str  # D-Bus address


class SandboxLimits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The limits of one sandbox.

    The defaults are for a session. docs/budgets.md has the reason of each default.
    """

    connections: int = 16  # max_connections_per_container, counted at accept
    bytes_held: int = 66 * 1024 * 1024  # of unfinished messages from the sandbox
    bytes_queued: int = 64 * 1024 * 1024  # to connections that do not read, all together
    pending_calls: int = 4096  # for each connection and each direction
    match_rules: int = 1024  # of all connections
    names: int = 256  # owned or queued for, of all connections
    # For each connection, names that the app wrote to and that no rule names.
    tracked_names: int = 1024
    rule_steps: int = 32_768  # of the most expensive judgement: policy.tables.Cost
    fds: int = 256  # descriptors inside the gate, of all connections and in both directions
    messages_per_second: int = 25_000  # from the sandbox, which is read more slowly above the limit
    log_lines_per_second: int = 10  # warnings of the gate
    handshake_seconds: int = 30  # from accept to the bus's answer to Hello
    message_seconds: int = 60  # from the first to the last byte of a message


class Listener(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A listening socket of a sandbox, for one bus."""

    bus: str
    fd: int  # index into the envelope's descriptors (in a snapshot: -1)
    path: str = ""  # to unlink when listening ends; empty if another program unlinks the socket
    # st_dev and st_ino of the bound socket. Only that socket is unlinked.
    device: int = 0
    inode: int = 0
    guid: str = ""  # 32 hex digits, the server's guid in the handshake; empty for the gate's guid


class SandboxSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The gate's knowledge of a sandbox."""

    id: str  # cN
    identity: Identity
    uid: int  # the user whose connections are accepted, and as whom the gate connects to the bus
    listeners: tuple[Listener, ...]
    access: AccessList
    close_notify: int | None = None  # index of the read end of a pipe; EOF there ends the sandbox
    limits: SandboxLimits = SandboxLimits()
    record: bytes = b""  # data of the supervisor, returned in a snapshot
    metadata: bytes = b""  # a marshalled a{sv}, for buses that have Containers1
    # By bus, the server that connections go through. A bus that is missing is connected to
    # directly.
    container_servers: dict[str, ContainerServer] = {}


class SetBuses(msgspec.Struct, frozen=True, tag=True):
    """Replace the list of buses. Answered by Done."""

    buses: tuple[BusSpec, ...]


class AddSandbox(msgspec.Struct, frozen=True, tag=True):
    """Begin to serve a sandbox. Answered by Done when the sockets accept connections."""

    spec: SandboxSpec


class SetAccess(msgspec.Struct, frozen=True, tag=True):
    """Replace the rules of a sandbox.

    Answered by Done when the old rules judge no message.
    """

    sandbox: str
    access: AccessList


class StopListening(msgspec.Struct, frozen=True, tag=True):
    """Close and unlink the sockets of a sandbox. Answered by Done.

    The sandbox ends with the last connection.
    """

    sandbox: str


class StopSandbox(msgspec.Struct, frozen=True, tag=True):
    """Close the sockets and the connections of a sandbox. Answered by Done.

    The answer comes after the sandbox's Ended event. So the answer may come after the answers to
    later requests.
    """

    sandbox: str
    reason: str = "stopped"  # for the Ended event, which the next supervisor may receive


class WhoIs(msgspec.Struct, frozen=True, tag=True):
    """Ask for the sandbox behind a unique name.

    Answered by SandboxOf, perhaps out of order.
    """

    bus: str
    unique_name: str


class RequestInstanceField(msgspec.Struct, frozen=True, tag=True):
    """Add header field 10 to messages to this connection. Answered by Done.

    The field has the sender's instance path.
    """

    bus: str
    unique_name: str
    wanted: bool = True  # False ends an earlier request


class TakeSnapshot(msgspec.Struct, frozen=True, tag=True):
    """Ask for the whole state. Answered by Snapshot, or by several Snapshots in sequence."""

    in_parts: bool = False  # False asks for one frame, which may exceed MAX_FRAME


class TakeUsage(msgspec.Struct, frozen=True, tag=True):
    """Ask for the use of limits by a sandbox, or by all sandboxes together.

    Answered by Usage.
    """

    sandbox: str | None = None


class TakeListeners(msgspec.Struct, frozen=True, tag=True):
    """Ask for duplicates of the sandboxes' listening sockets. Answered by Listeners."""

    sandboxes: tuple[str, ...]


class Confirm(msgspec.Struct, frozen=True, tag=True):
    """Confirm events by the number in the envelope, and ask for nothing. Answered by Done."""


class StartNext(msgspec.Struct, frozen=True, tag=True):
    """Start the next gate in the same service. Answered by Started or Refused.

    The request carries two descriptors, for --ready-fd and for --take-over of the next gate.
    """

    argv: tuple[str, ...]
    environment: dict[str, str]


class HandOver(msgspec.Struct, frozen=True, tag=True):
    """Hand the whole state over to another gate.

    The descriptor in this request leads to the other gate. Answered by HandedOver from the new
    gate, on the same connection. After a failure, answered by Refused from the old gate, and nothing
    has changed.
    """

    seconds: float  # the longest time of one step
    protocol: int = PROTOCOL  # the supervisor's version, which the new gate must speak


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End every sandbox and the gate. Answered by Done before the gate exits."""


Request = (
    SetBuses
    | AddSandbox
    | SetAccess
    | StopListening
    | StopSandbox
    | WhoIs
    | RequestInstanceField
    | TakeSnapshot
    | TakeUsage
    | TakeListeners
    | Confirm
    | StartNext
    | HandOver
    | CallBus
    | SetContainerServer
    | Shutdown
)


class Done(msgspec.Struct, frozen=True, tag=True):
    """The request was carried out."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The request was not carried out, and nothing has changed."""

    error: str  # D-Bus error name
    text: str


class Started(msgspec.Struct, frozen=True, tag=True):
    """The process was started. The process itself reports on --ready-fd when it works."""

    pid: int


class HandedOver(msgspec.Struct, frozen=True, tag=True):
    """The process that serves from now on."""

    pid: int


class SandboxOf(msgspec.Struct, frozen=True, tag=True):
    """The sandbox of a connection, by id. None stands for the host.

    "" stands for a sandbox that is forgotten, such as a sandbox of a gate that died.
    """

    sandbox: str | None


class Usage(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """The present use of each of SandboxLimits.

    Limits that apply to a connection are added up over all connections.
    """

    connections: int = 0
    bytes_held: int = 0
    bytes_queued: int = 0
    pending_calls: int = 0
    match_rules: int = 0
    names: int = 0
    tracked_names: int = 0
    rule_steps: int = 0
    fds: int = 0
    messages_per_second: int = 0  # used part of the burst
    log_lines_per_second: int = 0  # in the current second
    handshake_seconds: int = 0  # connections in the handshake
    message_seconds: int = 0  # connections with an unfinished message
    throttled: int = 0  # how often the sandbox was read more slowly, so far
    suppressed: int = 0  # lines that were left out of the log, so far
    # Messages charged so far because the sandbox made the bus deliver messages to any sandbox.
    caused: int = 0
    lingering: int = 0  # connections, counted above, that the app has closed and the bus has not

    def __add__(self, other: "Usage") -> "Usage":
        """Return the sum of both."""
        mine, theirs = msgspec.structs.astuple(self), msgspec.structs.astuple(other)
        names = self.__struct_fields__
        return Usage(**{name: a + b for name, a, b in zip(names, mine, theirs, strict=True)})


class SandboxState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a sandbox in the gate."""

    spec: SandboxSpec
    listening: bool
    connections: tuple[tuple[str, str], ...]  # (bus, unique name) of connections after Hello
    opening: int  # connections before Hello
    denied: int  # messages refused so far
    usage: Usage = Usage()


class Snapshot(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The whole state at one moment, or a part."""

    protocol: int
    pid: int
    buses: tuple[BusSpec, ...]
    sandboxes: tuple[SandboxState, ...]
    more: bool = False  # another part of the same moment follows as the next answer


class Listeners(msgspec.Struct, frozen=True, tag=True):
    """The sandbox and the bus of each descriptor in this answer, in order.

    An empty bus stands for the read end of the sandbox's close-notification pipe. Unknown sandboxes
    are left out.
    """

    what: tuple[tuple[str, str], ...]


class Connected(msgspec.Struct, frozen=True, tag=True):
    """A connection of a sandbox has a unique name.

    The event is sent before any other message of the connection is forwarded.
    """

    sandbox: str
    bus: str
    unique_name: str


class Gone(msgspec.Struct, frozen=True, tag=True):
    """The bus has closed a connection of a sandbox."""

    sandbox: str
    bus: str
    unique_name: str


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A sandbox neither listens nor has connections. Sent exactly once for a sandbox."""

    sandbox: str
    reason: str  # "close-notify", "last-connection", "instance-removed", or that of StopSandbox


class Denied(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """A message was refused."""

    sandbox: str
    bus: str
    direction: str  # "send", "receive", "own", "see"
    kind: str  # "call", "signal" or "reply"; "" if only `more` has a meaning
    peer: str  # the name in the message: destination, sender, or requested name
    path: str = ""
    interface: str = ""
    member: str = ""
    reason: str = ""  # the verdict in words
    origin: str = ""  # of the rule that denied the message, if a rule did
    more: int = 0  # refusals of this sandbox that went unreported since the last event


# Characters of each text of a Denied. A path in a message may have a MiB, and a thousand refusals
# are kept.
MAX_DENIAL_TEXT: Final = 255
_CUT: Final = "…"


def shorten_denial_text(text: str) -> str:
    """Return a text cut to MAX_DENIAL_TEXT characters; a text that was cut ends in a mark."""
    return text if len(text) <= MAX_DENIAL_TEXT else text[: MAX_DENIAL_TEXT - len(_CUT)] + _CUT


Answer = Done | Refused | Started | HandedOver | SandboxOf | Snapshot | Usage | Listeners | Called
Event = Connected | Gone | Ended | Denied | ContainerServerLost


class Envelope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The content of a frame.

    An answer has the serial of the request, and an event has serial 0.

    Ended and Denied events are numbered, because no snapshot contains them. The gate sends such an
    event again to the next supervisor, until a request confirms the event. The number in a request
    confirms all events up to that number.
    """

    serial: int
    body: Request | Answer | Event
    fds: int = 0
    number: int = 0
