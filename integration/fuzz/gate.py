"""Whatever an app sends, nothing passes the filter that the rules in force deny, and nothing else goes wrong.

What `Witness` checks of each message, and `World` of the tables and descriptors, holds after each thing that
happens. An input is things that happen: a byte says which, and what follows says more.
"""

from collections.abc import Callable
from typing import Final

from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL
from broker.wire.errors import PeerProtocolError
from broker.wire.header import BUS_ADDS, FIXED_SIZE, MAX_FIELDS, measure, parse_header
from broker.wire.interfaces import DRIVER
from broker.wire.marshal import make_return
from integration.fuzz.pieces import Choices
from integration.fuzz.world import NAMES, OWNERS, PEERS, World, answer_to, from_peer
from tests.helpers.messages import (
    NO_REPLY,
    access,
    big,
    call,
    changed,
    driver_call,
    misplaced,
    signal,
)
from tests.helpers.modelbus import ME

MAX_RAW: Final = 512
RULES: Final = (
    access("send:org.a", "see:org.a.b", "receive:org.a", "own:org.mine.*"),
    access("send:", "receive:", deny=["send:org.a.b"]),
    access(),
    access("send:org.*:org.example.I.Do", "receive:,peer=host", receive_from_host=False),
    access("send:,peer=app:org.test/other", "see:,peer=host", deny=["receive:org.a.b"]),
    access("send:*", "own:*", "receive:net.c@/a/**", deny=["send:@/a", "own:org.a*"]),
)
APP: Final[tuple[Callable[[int], bytes], ...]] = (
    lambda serial: call(serial, "org.a"),
    lambda serial: call(serial, "org.a.b"),
    lambda serial: call(serial, "net.c", path="/a/b"),
    lambda serial: call(serial, ":1.2", interface=None),
    lambda serial: call(serial, ":1.5", flags=NO_REPLY),
    lambda serial: call(serial + FIRST_GATE_SERIAL, "org.a"),
    lambda serial: misplaced(make_return(serial, reply_serial=serial, destination=":1.2"), "/a"),
    lambda serial: big(call(serial, "org.ab", signature="s", values=("x",))),
    lambda serial: changed(call(serial, "org.a"), sender=":1.1", reply_serial=7, flags=255),
    signal,
    lambda serial: signal(serial, destination="org.a", path="/a"),
    lambda serial: driver_call(serial, "AddMatch", "s", ""),
    lambda serial: driver_call(serial, "AddMatch", "s", f"member=M{serial % 8}"),
    lambda serial: driver_call(serial, "RemoveMatch", "s", ""),
    lambda serial: driver_call(serial, "GetNameOwner", "s", NAMES[serial % len(NAMES)]),
    lambda serial: driver_call(serial, "ListNames"),
    lambda serial: driver_call(serial, "RequestName", "su", NAMES[serial % len(NAMES)], serial),
    lambda serial: driver_call(serial, "ReleaseName", "s", NAMES[serial % len(NAMES)]),
    lambda serial: driver_call(serial + FIRST_GATE_SERIAL, "StartServiceByName", "su", "org.ab", 0),
    lambda serial: driver_call(serial, "BecomeMonitor", "asu", (), 0),
    lambda serial: changed(call(serial, "org.a"), extra={10: ("o", "/a"), 99: ("s", str(serial))}),
    lambda serial: changed(answer_to(serial, ME), destination=PEERS[serial % len(PEERS)]),
    lambda serial: changed(answer_to(serial, ME, error=True), destination=":1.2", sender=None),
    lambda serial: changed(call(serial, DRIVER, "Ping"), interface="org.freedesktop.DBus.Peer"),
)
PEER: Final[tuple[Callable[[int], bytes], ...]] = (
    lambda serial: call(serial, ME),
    lambda serial: call(serial, ME, interface=None, flags=NO_REPLY),
    lambda serial: signal(serial, destination=ME),
    lambda serial: signal(serial, path="/a/b"),
    lambda serial: changed(signal(serial), extra={10: ("o", "/a")}),
    lambda serial: big(call(serial, ME, path="/a")),
)


def check(data: bytes) -> None:
    """Hold the invariant."""
    choices = Choices(data)
    first = choices.byte()
    world = World(RULES[first % len(RULES)], app_takes_fds=first < 128)
    while not choices.ended and not world.ended:
        what = choices.byte()
        THINGS[what % len(THINGS)](world, choices)
    world.finish()


def app_sends(world: World, choices: Choices) -> None:
    """Let the app send something that has a meaning, whole or not, perhaps with descriptors."""
    message = APP[choices.byte() % len(APP)](choices.byte() or 1)
    flags = choices.byte()
    fds = flags % 4 if flags > 200 else 0
    if fds:
        message = changed(message, unix_fds=fds)
    at = len(message) * (flags % 16) // 16
    for part in (message[:at], message[at:]):
        if part:
            world.app(part, fds)
            fds = 0


def app_sends_raw(world: World, choices: Choices) -> None:
    """Let the app send any bytes."""
    size = choices.byte() * 2 % MAX_RAW
    world.app(choices.take(size), choices.byte() % 3)


def app_repeats(world: World, choices: Choices) -> None:
    """Let the app send the same message a few times, with other serials."""
    make, count = APP[choices.byte() % len(APP)], choices.byte() % 8
    world.app(b"".join(make(20 + number) for number in range(count)))


def peer_sends(world: World, choices: Choices) -> None:
    """Let a peer send something that has a meaning."""
    message = PEER[choices.byte() % len(PEER)](choices.byte() or 1)
    fds = choices.byte()
    fds = fds % 4 if fds > 200 else 0
    sender = PEERS[choices.byte() % len(PEERS)]
    world.peer(changed(from_peer(message, sender), unix_fds=fds), fds)


def peer_sends_raw(world: World, choices: Choices) -> None:
    """Let a peer send any legal message; what the bus itself says is the model's to say."""
    data = choices.take(choices.byte() * 2 % MAX_RAW)
    try:
        if len(data) < FIXED_SIZE or measure(data) > len(data):
            return
        header = parse_header(data[: measure(data)])
    except PeerProtocolError:
        return
    if header.sender in PEERS and header.destination in (None, ME) and not header.unix_fds:
        world.peer(data[: measure(data)])


def peer_sends_strange(world: World, choices: Choices) -> None:
    """Let a peer send a call, signal or reply that the bus allows and nobody reads."""
    which, sender = choices.byte(), PEERS[choices.byte() % len(PEERS)]
    if which < len(PEER) * 16:
        message = from_peer(PEER[which % len(PEER)](choices.byte() or 1), sender)
    else:
        waiting = list(world.witness.waiting.values())
        serial = waiting[which % len(waiting)].bus_serial if waiting else 1
        message = answer_to(serial, sender, error=which % 2 > 0, number=which)
    # Most are small, for a megabyte takes its time.
    if choices.byte() > 250 and message[:1] == b"l":
        world.peer_strange(misplaced(message, "/" + "a" * (MAX_FIELDS + BUS_ADDS)))
    else:
        world.peer_strange(changed(message, extra={200: ("s", "\uffff")}))


def peer_answers(world: World, choices: Choices) -> None:
    """Let a peer answer a call that waits, if it was asked or not."""
    waiting = list(world.witness.waiting.values())
    serial, sender = choices.byte(), PEERS[choices.byte() % len(PEERS)]
    bus_serial = waiting[serial % len(waiting)].bus_serial if waiting else serial or 1
    world.peer(answer_to(bus_serial, sender, error=serial > 128, number=serial + 1))


def rules_change(world: World, choices: Choices) -> None:
    """Swap the rules."""
    world.use(RULES[choices.byte() % len(RULES)])


def name_moves(world: World, choices: Choices) -> None:
    """Let a name change its owner, or have none."""
    which = choices.byte()
    owners = ("", *PEERS)
    name = NAMES[which % len(NAMES)]
    new = owners[which // len(NAMES) % len(owners)]
    if world.model.owners.get(name, "") != new:
        world.change(name, new)


def peer_leaves(world: World, choices: Choices) -> None:
    """Let a peer end."""
    world.leave(PEERS[choices.byte() % len(PEERS)])


def sandboxed_peer_hangs_up(world: World, _choices: Choices) -> None:
    """Close the app of another sandbox; its messages are still to come."""
    world.hang_up()


def bus_is_slow(world: World, choices: Choices) -> None:
    """Let the bus wait, do one thing, or go on."""
    match choices.byte() % 3:
        case 0:
            world.paused = True
        case 1:
            world.step()
        case _:
            world.go_on()


THINGS: Final = (
    app_sends,
    app_sends_raw,
    app_repeats,
    peer_sends,
    peer_sends_raw,
    peer_answers,
    rules_change,
    name_moves,
    peer_leaves,
    bus_is_slow,
    peer_sends_strange,
    sandboxed_peer_hangs_up,
)


def seeds() -> list[bytes]:
    """Return days in the life of a connection."""
    number = {thing: bytes((place,)) for place, thing in enumerate(THINGS)}
    calls = b"".join(number[app_sends] + bytes((n, n + 2, 0)) for n in range(len(APP)))
    incoming = b"".join(number[peer_sends] + bytes((n, n + 2, 0, n)) for n in range(len(PEER)))
    raw = call(3, "org.a")
    answers = b"".join(number[peer_answers] + bytes((n, n)) for n in range(4))
    slow = number[bus_is_slow] + b"\0"
    strange = b"".join(number[peer_sends_strange] + bytes((n, n, n + 1, n)) for n in (0, 2, 5, 251))
    later = number[bus_is_slow] + b"\2"
    moved = (
        number[name_moves] + b"\5" + number[app_repeats] + b"\0\7" + number[rules_change] + b"\2"
    )
    assert len(OWNERS) < len(NAMES)
    return [
        b"\0" + calls + answers,
        b"\1" + calls + incoming + calls,
        b"\1" + calls + strange + incoming + strange + answers,
        b"\5" + slow + calls + number[rules_change] + b"\1" + incoming + later + answers,
        b"\4" + number[app_sends_raw] + bytes((len(raw) // 2,)) + raw + b"\0" + moved + calls,
        b"\2" + number[sandboxed_peer_hangs_up] + incoming + calls,
        b"\3" + number[app_sends] + b"\0\5\311" + number[peer_leaves] + b"\0" + calls,
    ]
