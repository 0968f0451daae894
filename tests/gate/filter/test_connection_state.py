"""Callers, and replies that are handled: the state that both directions share."""

from broker.gate.filter.connection_state import MAX_CALLERS, ConnectionState
from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL, NO_REPLIER
from broker.wire.header import parse_header
from broker.wire.marshal import make_return
from policy.match import Judge
from tests.helpers.messages import access
from tests.helpers.modelbus import APP, FakeHost, make_bus


def make_state() -> ConnectionState:
    judge = Judge(access(), bus="session", me=APP)
    return ConnectionState(make_bus(), FakeHost(), judge, app_takes_fds=True)


def test_reply_is_given_the_serial_of_the_app_back() -> None:
    for serial in (5, FIRST_GATE_SERIAL + 9):
        state = make_state()
        action = state.pending.translated(serial)
        assert state.pending.awaits_reply(serial)
        assert state.pending.calls_to_bus.get(5) in (None, NO_REPLIER)
        reply = make_return(1, reply_serial=FIRST_GATE_SERIAL, sender=":1.2")
        state.handle_reply(action, parse_header(reply), reply, ())
        assert state.to_app == [make_return(1, reply_serial=serial, sender=":1.2")]
        assert not state.pending.awaits_reply(serial)


def test_callers_are_bounded_and_the_last_ones_stay() -> None:
    state = make_state()
    for number in range(MAX_CALLERS):
        state.remember_caller(f":1.{number}")
    state.remember_caller(":1.0")
    state.remember_caller(":2.0")
    assert len(state.callers) == MAX_CALLERS
    assert ":1.0" in state.callers
    assert ":1.1" not in state.callers
