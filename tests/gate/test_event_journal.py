import pytest
from hypothesis import given, strategies as st

from broker.control_protocol.messages import Connected, Denied, Ended, Event
from broker.gate import event_journal as kept_module
from broker.gate.event_journal import EventJournal


def refusal(sandbox: str = "c0", more: int = 0, kind: str = "call") -> Denied:
    return Denied(sandbox=sandbox, bus="session", direction="send", kind=kind, peer="x", more=more)


def told(kept: EventJournal) -> list[Event]:
    return [event for _, event in kept.replay()]


def test_what_a_snapshot_tells_is_not_kept() -> None:
    kept = EventJournal()
    assert kept.add(Connected("c0", "session", ":1.1"), was_sent=True) == 0
    assert told(kept) == []


def test_events_are_told_in_order_until_they_are_confirmed() -> None:
    kept = EventJournal()
    events: list[Event] = [refusal("c0"), Ended("c1", "stopped"), refusal("c2")]
    numbers = [kept.add(event, was_sent=True) for event in events]
    assert numbers == sorted(set(numbers))
    assert list(kept.replay()) == list(zip(numbers, events, strict=True))
    kept.confirm(numbers[1])
    kept.confirm(0)
    assert told(kept) == told(kept) == events[2:]
    kept.confirm(numbers[2])
    assert told(kept) == []


@given(st.lists(st.one_of(st.integers(0, 9), st.just("end"), st.just("refusal"))))
def test_confirmed_ones_are_never_told_again_and_others_always(steps: list[int | str]) -> None:
    kept = EventJournal()
    model: dict[int, Event] = {}
    for step in steps:
        if isinstance(step, int):
            kept.confirm(step)
            model = {number: event for number, event in model.items() if number > step}
        else:
            event: Event = Ended("c1", "stopped") if step == "end" else refusal()
            model[kept.add(event, was_sent=True)] = event
    assert dict(kept.replay()) == model


def test_refusals_that_do_not_fit_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "MAX_DENIALS", 2)
    kept = EventJournal()
    kept.add(refusal("c9"), was_sent=True)  # goes first, and was told: not counted
    for _ in range(3):
        kept.add(refusal("c1", more=5), was_sent=False)
    kept.add(refusal("c1", kind="", more=1), was_sent=False)
    events = told(kept)
    assert [(e.sandbox, e.kind, e.more) for e in events if isinstance(e, Denied)] == [
        ("c1", "call", 5),
        ("c1", "", 1),
        ("c1", "", 12),
    ]
    assert len(told(kept)) == 2  # the count is told once


def test_ends_have_their_bound_and_take_their_counts_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "MAX_DENIALS", 0)
    monkeypatch.setattr(kept_module, "MAX_ENDS", 2)
    kept = EventJournal()
    kept.add(refusal("c1"), was_sent=False)
    for name in ("c1", "c2", "c3"):
        kept.add(Ended(name, "stopped"), was_sent=False)
    assert told(kept) == [Ended("c2", "stopped"), Ended("c3", "stopped")]


def test_an_end_is_not_told_of_another_sandbox_of_that_name() -> None:
    kept = EventJournal()
    for name in ("c1", "c2"):
        kept.add(Ended(name, "stopped"), was_sent=False)
    kept.forget_end("c1")
    assert told(kept) == [Ended("c2", "stopped")]
