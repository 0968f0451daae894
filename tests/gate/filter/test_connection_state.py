"""Serials, remembered verdicts and shapes, callers: the state that both directions share."""

import pytest

from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL, LAST_SERIAL, Replier
from broker.gate.filter.verdict_cache import remember_shape
from broker.wire.errors import PeerQuotaError
from broker.wire.header import parse_header
from broker.wire.marshal import make_return
from policy.match import Judge
from tests.helpers.messages import access, changed
from tests.helpers.modelbus import APP, FakeHost, make_bus


def make_core() -> ConnectionState:
    judge = Judge(access(), bus="session", me=APP)
    return ConnectionState(make_bus(), FakeHost(), judge, app_takes_fds=True)


def test_own_serials_are_those_that_no_call_waits_with() -> None:
    state = make_core()
    state.pending.calls_to_bus[FIRST_GATE_SERIAL + 1] = Replier(":1.2")
    assert [state.pending.next_gate_serial() for _ in range(3)] == [
        FIRST_GATE_SERIAL,
        FIRST_GATE_SERIAL + 2,
        FIRST_GATE_SERIAL + 3,
    ]


def test_own_serials_begin_again_at_their_end() -> None:
    state = make_core()
    state.pending.gate_serial = LAST_SERIAL
    assert [state.pending.next_gate_serial(), state.pending.next_gate_serial()] == [
        LAST_SERIAL,
        FIRST_GATE_SERIAL,
    ]


def test_own_serials_that_are_all_in_use_end_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("broker.gate.filter.pending_calls.LAST_SERIAL", FIRST_GATE_SERIAL + 2)
    state = make_core()
    state.pending.calls_to_bus.update(
        dict.fromkeys(range(FIRST_GATE_SERIAL, FIRST_GATE_SERIAL + 3), Replier(":1.2"))
    )
    with pytest.raises(PeerQuotaError, match="too many"):
        state.pending.next_gate_serial()


def test_only_serials_of_the_app_wait_for_the_app() -> None:
    state = make_core()
    state.pending.calls_to_bus.update({5: Replier(":1.2"), FIRST_GATE_SERIAL: Replier(":1.2")})
    assert [state.pending.awaits_reply(serial) for serial in (5, 6, FIRST_GATE_SERIAL)] == [
        True,
        False,
        False,
    ]


def shaped(path: str, serial: int = 7) -> bytes:
    plain = make_return(1, reply_serial=serial, destination=":1.2", sender=":1.3")
    return changed(plain, extra={10: ("o", path)})


def test_shapes_of_one_length_lack_the_same_bytes() -> None:
    shapes: dict[bytes, str] = {}
    positions: dict[int, int] = {}
    near, far = shaped("/a"), changed(shaped("/a"), path=None, error_name="a.b2345678")
    far = changed(far, error_name="a.bcdefgh")
    first, second = parse_header(near), parse_header(far)
    assert first.size != second.size or first.reply_serial_at != second.reply_serial_at
    # As if both had one length: the second place drops what was remembered with the first.
    remember_shape(shapes, positions, first, near, ":1.3")
    positions[first.size] += 8
    remember_shape(shapes, positions, first, near, ":1.4")
    assert list(shapes.values()) == [":1.4"]
    assert positions == {first.size: first.reply_serial_at}


def test_shape_that_is_too_long_leaves_nothing() -> None:
    shapes: dict[bytes, str] = {}
    positions: dict[int, int] = {}
    long = shaped("/" + "a" * 1000)
    remember_shape(shapes, positions, parse_header(long), long, ":1.3")
    assert not shapes
    assert not positions


def test_stranger_that_was_judged_as_host_drops_the_verdicts() -> None:
    state = make_core()
    state.verdicts.app_calls.remember(b"key", Replier(":1.5"), ":1.5")
    state.verdicts.forget_about(":1.6")
    assert state.verdicts.app_calls
    state.verdicts.forget_about(":1.5")
    assert not state.verdicts.app_calls
