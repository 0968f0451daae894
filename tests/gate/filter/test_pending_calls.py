"""Serials of calls that wait for a reply, and the owners of a name since a call to it."""

import gc
import weakref

import pytest
from hypothesis import given, strategies as st

from broker.gate.filter.pending_calls import (
    FIRST_GATE_SERIAL,
    LAST_SERIAL,
    OwnerHistory,
    OwnersSince,
    PendingCalls,
    Replier,
)
from broker.wire.errors import PeerQuotaError

OWNERS = st.sampled_from(["", ":1.1", ":1.2", ":1.3", ":1.4", ":1.5"])


@given(st.lists(OWNERS, max_size=20), st.integers(0, 20))
def test_it_is_whoever_owned_it_from_then_on(owners: list[str], start: int) -> None:
    history, changes = OwnerHistory(100), list(zip(["", *owners], [*owners, ""], strict=True))
    for change in changes[:start]:
        history.add(*change)
    others = OwnersSince(history)
    for change in changes[start:]:
        history.add(*change)
    expected = {owner for change in changes[start:] for owner in change if owner}
    assert {*others} == expected
    assert len(others) == len(expected)
    assert all((each in others) == (each in expected) for each in (":1.1", ":1.2", ":1.9"))


def test_old_changes_are_forgotten() -> None:
    history = OwnerHistory(3)
    first = OwnersSince(history)
    for number in range(10):
        history.add(f":1.{number}", f":1.{number + 1}")
    last = OwnersSince(history)
    assert sorted(first) == [":1.10", ":1.7", ":1.8", ":1.9"]
    assert not last
    history.add(":1.10", "")
    assert {*last} == {":1.10"}


def test_it_lives_as_long_as_somebody_reads_it() -> None:
    history = OwnerHistory(3)
    others, gone = OwnersSince(history), weakref.ref(history)
    del history
    assert gone() is not None
    del others
    gc.collect()
    assert gone() is None


def test_own_serials_are_those_that_no_call_waits_with() -> None:
    pending = PendingCalls()
    pending.calls_to_bus[FIRST_GATE_SERIAL + 1] = Replier(":1.2")
    assert [pending.next_gate_serial() for _ in range(3)] == [
        FIRST_GATE_SERIAL,
        FIRST_GATE_SERIAL + 2,
        FIRST_GATE_SERIAL + 3,
    ]


def test_own_serials_begin_again_at_their_end() -> None:
    pending = PendingCalls()
    pending.gate_serial = LAST_SERIAL
    assert [pending.next_gate_serial(), pending.next_gate_serial()] == [
        LAST_SERIAL,
        FIRST_GATE_SERIAL,
    ]


def test_own_serials_that_are_all_in_use_end_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("broker.gate.filter.pending_calls.LAST_SERIAL", FIRST_GATE_SERIAL + 2)
    pending = PendingCalls()
    pending.calls_to_bus.update(
        dict.fromkeys(range(FIRST_GATE_SERIAL, FIRST_GATE_SERIAL + 3), Replier(":1.2"))
    )
    with pytest.raises(PeerQuotaError, match="too many"):
        pending.next_gate_serial()


def test_only_serials_of_the_app_wait_for_the_app() -> None:
    pending = PendingCalls()
    pending.calls_to_bus.update({5: Replier(":1.2"), FIRST_GATE_SERIAL: Replier(":1.2")})
    assert [pending.awaits_reply(serial) for serial in (5, 6, FIRST_GATE_SERIAL)] == [
        True,
        False,
        False,
    ]
