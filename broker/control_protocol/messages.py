"""The messages between supervisor and gate, and their framing. No I/O.

A frame is a little-endian uint32 length and that many bytes of msgpack: one Envelope. File descriptors
travel with the first byte of their frame (SCM_RIGHTS); `Envelope.fds` says how many belong to it, and
the messages name them by index. The supervisor sends requests. The gate answers each one in order, and
sends events in between. An event that happened before an answer is sent before it, so whoever has an
answer has all older events. docs/control-protocol.md has a table of all messages.

Some messages are about a bus that has Containers1 itself. Such a bus makes a server for each sandbox and
labels the connections that come through it. The bus ends the server when the connection that asked for it
leaves. So the gate asks on a connection of its own (gate/containers1/bus_client.py), and the supervisor
says what to ask.
"""

from typing import Final

import msgspec

from policy.rules import AccessList, Identity


class ContainerServer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A bus's own server for one sandbox: the sandbox's connections to the bus are made there."""

    instance: str = ""  # its path on the bus; empty: it is lost, and connections wait for another
    address: str = ""
    stop: str = "StopInstance"  # which method ends it, and its connections
    stop_listening: str = "StopListening"  # empty: the bus has none


class CallBus(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """Call the bus itself on the gate's own connection, made as that user. Answered by Called or Refused.

    It is answered when the bus answers, or is too slow, and so perhaps after later requests.
    """

    bus: str
    uid: int
    interface: str
    member: str
    signature: str = ""
    body: bytes = b""
    # A method to be called with the path that the reply begins with, unless it comes to be a sandbox's.
    undo: str = ""
    leave: bool = False  # hang up then, if nothing else is wanted of that connection


class Called(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What the bus returned."""

    signature: str
    body: bytes
    little: bool


class SetContainerServer(msgspec.Struct, frozen=True, tag=True):
    """Make a sandbox's connections to a bus there from now on; nil: at the bus itself. Answered by Done.

    The server before is ended, if it is there still.
    """

    sandbox: str
    bus: str
    server: ContainerServer | None


class ContainerServerLost(msgspec.Struct, frozen=True, tag=True):
    """The bus, or the gate's own connection to it, is gone, and the sandbox's server with it."""

    sandbox: str
    bus: str


# Raised with every change that an older peer would misread.
PROTOCOL: Final = 4


class BusSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A real bus to connect to."""

    name: str
    address: str  # D-Bus address


class SandboxLimits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one sandbox may take. Defaults are for a session; docs/budgets.md has the reason of each."""

    connections: int = 16  # max_connections_per_container, counted at accept
    bytes_held: int = 64 * 1024 * 1024  # of unfinished messages from the sandbox
    bytes_queued: int = 64 * 1024 * 1024  # to connections that do not read, all together
    pending_calls: int = 4096  # each way and connection
    match_rules: int = 1024  # of all connections
    names: int = 256  # owned or queued for, of all connections
    tracked_names: int = 1024  # names that no rule names but that the app wrote to, a connection
    rule_steps: int = 32_768  # of a judgement by its rules, at the worst: policy.tables.Cost
    fds: int = 256  # descriptors that are in the gate, of all connections and both ways
    messages_per_second: int = 25_000  # from the sandbox; over it, it is read more slowly
    log_lines_per_second: int = 10  # warnings of the gate
    handshake_seconds: int = 30  # from accept to the bus's answer to Hello
    message_seconds: int = 60  # from the first byte of a message to its last


class Listener(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A listening socket of a sandbox, for one bus."""

    bus: str
    fd: int  # index into the envelope's descriptors (in a snapshot: -1)
    path: str = ""  # to unlink when listening ends; empty: not ours to unlink
    device: int = 0  # st_dev and st_ino of what was bound there: only that is unlinked
    inode: int = 0
    guid: str = (
        ""  # 32 hex digits, what the socket calls itself in the handshake; empty: gate's own
    )


class SandboxSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that the gate has to know of a sandbox."""

    id: str  # cN
    identity: Identity
    uid: int  # whose connections are taken, and as whom the bus is connected to
    listeners: tuple[Listener, ...]
    access: AccessList
    close_notify: int | None = None  # index: read end of a pipe; the sandbox ends at its EOF
    limits: SandboxLimits = SandboxLimits()
    record: bytes = b""  # the supervisor's own, given back in a snapshot
    metadata: bytes = b""  # a marshalled a{sv}, for buses that have Containers1
    # By bus: where its connections are made, if not at the bus itself.
    container_servers: dict[str, ContainerServer] = {}


class SetBuses(msgspec.Struct, frozen=True, tag=True):
    """Say which buses there are. Answered by Done."""

    buses: tuple[BusSpec, ...]


class AddSandbox(msgspec.Struct, frozen=True, tag=True):
    """Begin to serve a sandbox. Answered by Done when its sockets are served."""

    spec: SandboxSpec


class SetAccess(msgspec.Struct, frozen=True, tag=True):
    """Swap the rules of a sandbox. Answered by Done when no message is judged by the old ones."""

    sandbox: str
    access: AccessList


class StopListening(msgspec.Struct, frozen=True, tag=True):
    """Close and unlink the sockets; the sandbox ends with its last connection. Answered by Done."""

    sandbox: str


class StopSandbox(msgspec.Struct, frozen=True, tag=True):
    """Also end its connections. Answered by Done, after its Ended event, and so perhaps after later requests."""

    sandbox: str
    reason: str = "stopped"  # which Ended then tells, if only to the next supervisor


class WhoIs(msgspec.Struct, frozen=True, tag=True):
    """Ask which sandbox is behind a unique name. Answered by SandboxOf, perhaps after later requests."""

    bus: str
    unique_name: str


class RequestInstanceField(msgspec.Struct, frozen=True, tag=True):
    """Put header field 10, the sender's instance path, into messages to this connection. Done."""

    bus: str
    unique_name: str
    wanted: bool = True  # False: no more


class TakeSnapshot(msgspec.Struct, frozen=True, tag=True):
    """Ask for everything there is. Answered by Snapshot, if need be by several with one after the other."""

    in_parts: bool = False  # no: one frame, which may be longer than is read


class TakeUsage(msgspec.Struct, frozen=True, tag=True):
    """Ask what a sandbox, or all of them together, take of their limits. Answered by Use."""

    sandbox: str | None = None


class TakeListeners(msgspec.Struct, frozen=True, tag=True):
    """Ask for duplicates of what these sandboxes listen on. Answered by Listeners, with descriptors."""

    sandboxes: tuple[str, ...]


class Confirm(msgspec.Struct, frozen=True, tag=True):
    """Nothing is asked: the envelope's number says what has been dealt with. Answered by Done."""


class StartNext(msgspec.Struct, frozen=True, tag=True):
    """Start a gate that is to take over, as one of the same service. Answered by Started, or Refused.

    Two descriptors come along: for its --ready-fd, and for its --take-over.
    """

    argv: tuple[str, ...]
    environment: dict[str, str]


class HandOver(msgspec.Struct, frozen=True, tag=True):
    """Hand everything over to the gate at the other end of the descriptor that comes along.

    Answered by HandedOver, from the new gate on this same connection; or Refused, and nothing has changed.
    """

    seconds: float  # how long a step of it may take
    protocol: int = PROTOCOL  # of who asks, which the new gate has to speak


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End every sandbox and the gate. Answered by Done before it exits."""


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
    """It is so."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """It was not done, and nothing has changed."""

    error: str  # D-Bus error name
    text: str


class Started(msgspec.Struct, frozen=True, tag=True):
    """A process is started; that it works is for it to say."""

    pid: int


class HandedOver(msgspec.Struct, frozen=True, tag=True):
    """Another process serves now."""

    pid: int


class SandboxOf(msgspec.Struct, frozen=True, tag=True):
    """The sandbox of a connection: its id, None for a host, "" if it is unknown.

    "" is the answer for a connection whose sandbox is forgotten, as those of a gate that died.
    """

    sandbox: str | None


class Usage(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """What is taken now of each of SandboxLimits; those of single connections are added up."""

    connections: int = 0
    bytes_held: int = 0
    bytes_queued: int = 0
    pending_calls: int = 0
    match_rules: int = 0
    names: int = 0
    tracked_names: int = 0
    rule_steps: int = 0
    fds: int = 0
    messages_per_second: int = 0  # of what may come at once
    log_lines_per_second: int = 0  # in this second
    handshake_seconds: int = 0  # connections in their handshake
    message_seconds: int = 0  # connections with half a message
    throttled: int = 0  # times that the sandbox was read more slowly, so far
    suppressed: int = 0  # lines that were left out of the log, so far
    caused: int = 0  # messages charged so far for what it made the bus deliver, to any sandbox
    lingering: int = 0  # connections, counted above, whose app has closed and the bus has not

    def __add__(self, other: "Usage") -> "Usage":
        """Return both together."""
        mine, theirs = msgspec.structs.astuple(self), msgspec.structs.astuple(other)
        names = self.__struct_fields__
        return Usage(**{name: a + b for name, a, b in zip(names, mine, theirs, strict=True)})


class SandboxState(msgspec.Struct, frozen=True, kw_only=True):
    """A sandbox as the gate has it."""

    spec: SandboxSpec
    listening: bool
    connections: tuple[tuple[str, str], ...]  # (bus, unique name) of those that said Hello
    opening: int  # connections that did not say Hello yet
    denied: int  # messages refused so far
    usage: Usage = Usage()


class Snapshot(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """All there is, at one moment."""

    protocol: int
    pid: int
    buses: tuple[BusSpec, ...]
    sandboxes: tuple[SandboxState, ...]
    more: bool = False  # the next answer to the same request has other sandboxes of the same moment


class Listeners(msgspec.Struct, frozen=True, tag=True):
    """The descriptors that come along, in order: of which sandbox, and for which bus.

    No bus is the read end of its close-notification pipe. Sandboxes that are not there are left out.
    """

    what: tuple[tuple[str, str], ...]


class Connected(msgspec.Struct, frozen=True, tag=True):
    """A connection of a sandbox said Hello. Sent before it can say anything else."""

    sandbox: str
    bus: str
    unique_name: str


class Gone(msgspec.Struct, frozen=True, tag=True):
    """The bus has let go of that connection."""

    sandbox: str
    bus: str
    unique_name: str


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A sandbox neither listens nor has connections. Exactly once a sandbox."""

    sandbox: str
    reason: str  # "close-notify", "last-connection", "instance-removed", or what StopSandbox said


class Denied(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """A message was refused."""

    sandbox: str
    bus: str
    direction: str  # "send", "receive", "own", "see"
    kind: str  # "call", "signal" or "reply"; "" if all that it tells is how many went unreported
    peer: str  # the name in the message: destination, sender, or the name asked for
    path: str = ""
    interface: str = ""
    member: str = ""
    reason: str = ""  # the verdict in words
    origin: str = ""  # of the rule that denied, if one did
    more: int = 0  # how many refusals of this sandbox went unreported since the one before


# Characters of each text of a Denied. A path in a message may have a MiB, and a thousand refusals are kept.
MAX_DENIAL_TEXT: Final = 255
_CUT: Final = "…"


def shorten_denial_text(text: str) -> str:
    """Return a text cut to MAX_DENIAL_TEXT characters; a text that was cut ends in a mark."""
    return text if len(text) <= MAX_DENIAL_TEXT else text[: MAX_DENIAL_TEXT - len(_CUT)] + _CUT


Answer = Done | Refused | Started | HandedOver | SandboxOf | Snapshot | Usage | Listeners | Called
Event = Connected | Gone | Ended | Denied | ContainerServerLost


class Envelope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One frame. An answer carries its request's serial; an event serial 0.

    Events that no snapshot makes up for (Ended, Denied) are numbered, and told again to the next supervisor until
    a request has said, by its number, that all up to that one have been dealt with.
    """

    serial: int
    body: Request | Answer | Event
    fds: int = 0
    number: int = 0
