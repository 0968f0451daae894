"""The new gate's side of a hand-over: take everything, try it, and only then say so."""

import logging
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from broker.control_protocol.messages import PROTOCOL, SandboxLimits
from broker.gate.dumps import (
    READS,
    Go,
    HandoverError,
    HandoverHeader,
    Offer,
    Ready,
    SandboxDump,
    decode_opening,
    decode_sandbox,
)
from broker.gate.filter.bus_state import BusState, make_absent_name
from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.denials import Denial
from broker.gate.filter.filter import Filter
from broker.gate.handover.channel import Channel, dump_equals
from broker.gate.name_ledger import NameLedger
from broker.gate.recorder import HeaderRecorder
from broker.gate.sandbox.sandbox import Sandbox
from broker.gate.server import Gate
from broker.posix.descriptors import close_fds
from broker.wire import errors, marshal
from broker.wire.header import MessageType, measure, parse_header
from broker.wire.interfaces import DRIVER
from policy.match import Judge
from policy.rules import Access, AccessList, Identity, Rule

LOGGER: Final = logging.getLogger(__name__)
# The old gate decides how long it waits; this is for one that was stopped, or hangs.
LONGEST_WAIT: Final = 600.0  # seconds
# Compiled rules by whose and which they are, then by bus.
_Known = dict[tuple[Identity, AccessList], dict[str, Judge]]


def offer(channel: Channel, pid: int) -> None:
    """Say that we are there. Raises HandoverError, also if we do not work."""
    check_judgement()
    channel.say(Offer(pid=pid, reads=READS))


def take_over(channel: Channel, gate: Gate) -> HandoverHeader:
    """Get everything, and wait until it is ours; `gate.resume` is next.

    Raises HandoverError: then this process is to end as it stands, for what it has open is another's.
    """
    data, fds = channel.receive()
    opening = decode_opening(data)
    if opening.version not in READS:
        raise HandoverError(f"hand-over version {opening.version} is not known here")
    if opening.protocol != PROTOCOL:
        raise HandoverError(
            f"it speaks control protocol {PROTOCOL}, the supervisor {opening.protocol}: restart that one"
        )
    try:
        gate.load(opening, fds)
        known: _Known = {}
        for _ in range(opening.sandboxes):
            _take_sandbox(channel, gate, known)
    except HandoverError:
        raise
    except Exception as exc:  # whatever it is, the old gate is better
        raise HandoverError(f"the state does not work out here: {exc!r}") from exc
    if not dump_equals(gate.dumper(opening.serial, opening.protocol, opening.pid), opening, fds):
        raise HandoverError("what came of the old gate's state differs from it")
    channel.say(Ready())
    if not isinstance(channel.hear(), Go):
        raise HandoverError("the other gate said something else than expected")
    LOGGER.info("taken-over from=%d: %d sandboxes", opening.pid, opening.sandboxes)
    return opening


def _take_sandbox(channel: Channel, gate: Gate, known: _Known) -> None:
    data, fds = channel.receive()
    dump = decode_sandbox(data)
    sandbox = gate.add_empty(dump)
    # Compiling rules takes longest of all, and many sandboxes are of the same app.
    judges = known.setdefault((sandbox.identity, dump.spec.access), {})
    problem = _load(sandbox, dump, fds, judges)
    if not problem:
        return
    # One sandbox has no veto: it is served without the connections that it had.
    LOGGER.error("not-taken-over sandbox=%s: %s: its connections end", sandbox.id, problem)
    sandbox.discard()
    bare, kept, lost = without_connections(dump, fds)
    sandbox = gate.add_empty(bare)
    if problem := _load(sandbox, bare, kept, judges):
        raise HandoverError(f"{sandbox.id}: {problem}")
    close_fds(fds[len(kept) :])  # copies: the old gate has them still
    sandbox.lost.extend(lost)


def _load(sandbox: Sandbox, dump: SandboxDump, fds: Sequence[int], judges: dict[str, Judge]) -> str:
    """Load a sandbox; return what is wrong with what came of it."""
    try:
        sandbox.load(dump, fds, judges)
        if dump_equals(sandbox.dump, dump, fds):
            return ""
    except Exception as exc:  # noqa: BLE001 - whatever it is, it is this sandbox's matter
        return repr(exc)
    return "what came of it differs from what it was"


def without_connections(
    dump: SandboxDump, fds: Sequence[int]
) -> tuple[SandboxDump, Sequence[int], list[tuple[str, str]]]:
    """Return a dump that has none, with its descriptors, and the buses and unique names of those it had.

    Raises HandoverError.
    """
    used = [at for _, at in dump.listening] + [dump.close_pipe] * (dump.close_pipe >= 0)
    if used != list(range(len(used))):
        raise HandoverError("the descriptors are in another order than expected")
    bare = msgspec.structs.replace(dump, connections=(), lingering=(), waiting=())
    states = [(link.bus, link.filter.state) for link in dump.connections if link.filter is not None]
    names = [(bus, state.unique_name) for bus, state in states if state.unique_name]
    names += [(rest.bus, rest.unique_name) for rest in dump.lingering]
    return bare, fds[: len(used)], names


class _NoSandbox:
    """Where the connection of `check_judgement` would belong."""

    id: Final = "c0"
    identity: Final = Identity(type="org.buswarden.Test", app="app")
    limits: Final = SandboxLimits()
    states: Final[tuple[ConnectionState, ...]] = ()

    def __init__(self) -> None:
        self.recorder: Final = HeaderRecorder(self.id)
        self.bytes_held = 0
        self.denials = 0

    def denied(self, _state: ConnectionState, _denial: Denial) -> None:
        self.denials += 1

    def said_hello(self, state: ConnectionState) -> None:
        state.bus.connected(state.unique_name, self.id, self.identity)

    def close_fds(self, fds: Sequence[int]) -> None:
        assert not fds


def check_judgement() -> None:
    """Have a connection of nobody say Hello, call what it may and what it may not. Raises HandoverError."""
    rules = AccessList(rules=(Rule(access=frozenset({Access.SEND}), name="org.example.Yes"),))
    host = _NoSandbox()
    judge = Judge(rules, bus="none", me=host.identity)
    bus = BusState("none", "unix:path=/none", NameLedger(), make_absent_name(b""))
    bus.gives_instance_field = False  # what is passed on is to be what was sent
    judging = Filter(bus, host, judge, app_takes_fds=True, clock=time.monotonic)
    judging.feed_app(_call(1, DRIVER, "Hello"))
    _answer_all(judging)
    judging.state.to_app.clear()
    allowed = _call(2, "org.example.Yes", "Do")
    judging.feed_app(allowed)
    passed = list(judging.state.to_bus)
    judging.state.to_bus.clear()
    judging.feed_app(_call(3, "org.example.No", "Do"))
    _answer_all(judging)  # it asked who that is
    refused = b"".join(bytes(item) for item in judging.state.to_app if isinstance(item, bytes))
    good = (
        judging.state.unique_name == ":1.1"
        and passed == [allowed]
        and refused
        and parse_header(refused).error_name in (errors.SERVICE_UNKNOWN, errors.NAME_HAS_NO_OWNER)
        and host.denials == 1
    )
    if not good:
        raise HandoverError("it does not judge as it should")


def _call(serial: int, name: str, member: str) -> bytes:
    return marshal.make_call(
        serial, destination=name, path="/org/example", interface=DRIVER, member=member
    )


def _answer_all(judging: Filter) -> None:
    """Answer as a bus on which nobody is: Hello with a name, all else with nothing or an error."""
    while judging.state.to_bus:
        sent = b"".join(bytes(item) for item in judging.state.to_bus if isinstance(item, bytes))
        judging.state.to_bus.clear()
        while sent:
            size = measure(sent, 0)
            header = parse_header(sent)
            sent = sent[size:]
            if header.type == MessageType.METHOD_CALL:
                judging.feed_bus(_answer(header.serial, header.member or ""))


def _answer(serial: int, member: str) -> bytes:
    if member in ("Hello", "AddMatch", "RemoveMatch"):
        values = (":1.1",) if member == "Hello" else ()
        return marshal.make_return(
            1,
            reply_serial=serial,
            sender=DRIVER,
            destination=":1.1",
            signature="s" * len(values),
            values=values,
        )
    return marshal.make_error(
        1,
        reply_serial=serial,
        name=errors.NAME_HAS_NO_OWNER,
        text="nobody is here",
        sender=DRIVER,
        destination=":1.1",
    )
