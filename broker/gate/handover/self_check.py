"""Self check of a gate before a hand-over: judge three messages without a bus."""

import time
from collections.abc import Sequence
from typing import Final

from broker.control_protocol.messages import SandboxLimits
from broker.gate.dumps import HandoverError
from broker.gate.filter.bus_state import BusState, make_absent_name
from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.denials import Denial
from broker.gate.filter.filter import Filter
from broker.gate.name_ledger import NameLedger
from broker.gate.recorder import HeaderRecorder
from broker.wire import errors, marshal
from broker.wire.header import MessageType, measure, parse_header
from broker.wire.interfaces import DRIVER
from policy.match import Judge
from policy.rules import Access, AccessList, Identity, Rule


class _NoSandbox:
    """A sandbox that only `check_judgement` uses."""

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
    """Judge a Hello, an allowed call and a denied call. Raises HandoverError."""
    rules = AccessList(rules=(Rule(access=frozenset({Access.SEND}), name="org.example.Yes"),))
    host = _NoSandbox()
    judge = Judge(rules, bus="none", me=host.identity)
    bus = BusState("none", "unix:path=/none", NameLedger(), make_absent_name(b""))
    bus.gives_instance_field = False  # so that an allowed call is passed on unchanged
    judging = Filter(bus, host, judge, app_takes_fds=True, clock=time.monotonic)
    judging.feed_app(_call(1, DRIVER, "Hello"))
    _answer_all(judging)
    judging.state.to_app.clear()
    allowed = _call(2, "org.example.Yes", "Do")
    judging.feed_app(allowed)
    passed = list(judging.state.to_bus)
    judging.state.to_bus.clear()
    judging.feed_app(_call(3, "org.example.No", "Do"))
    _answer_all(judging)  # the filter asks for the owner first
    refused = b"".join(bytes(item) for item in judging.state.to_app if isinstance(item, bytes))
    good = (
        judging.state.unique_name == ":1.1"
        and passed == [allowed]
        and refused
        and parse_header(refused).error_name in (errors.SERVICE_UNKNOWN, errors.NAME_HAS_NO_OWNER)
        and host.denials == 1
    )
    if not good:
        raise HandoverError("the self check failed: wrong verdicts")


def _call(serial: int, name: str, member: str) -> bytes:
    return marshal.make_call(
        serial, destination=name, path="/org/example", interface=DRIVER, member=member
    )


def _answer_all(judging: Filter) -> None:
    """Answer calls like a bus without other connections."""
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
