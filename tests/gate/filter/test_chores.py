"""Walks over all names of a connection are done in slices; no message passes one."""

import pytest

from broker.gate.filter.chores import NAME_WORK, SLICE, STEP_WORK, Chores, Work
from policy.rules import AccessList
from policy.tables import MAX_NAMES
from tests.helpers.messages import access, call, changed, driver_call
from tests.helpers.modelbus import ME, Dialogue

MANY = 4000
OWNERS = {f"org.n{n}": f":1.{n // 4 + 10}" for n in range(MANY)}
GLOBS = access("send:org.n?*", *(f"send:org.g{n}*" for n in range(20)))
OTHERS = access("send:org.n*1", *(f"send:org.h{n}*" for n in range(20)))
FEW = {"org.a1": ":1.2", "org.a2": ":1.2", "org.b1": ":1.3", "org.b2": ":1.4", "com.c": ":1.5"}


def counted(seen: list[int], count: int, size: int) -> Work:
    for n in range(count):
        seen.append(n)
        yield size


def test_what_is_short_is_done_at_once() -> None:
    chores, seen = Chores(), list[int]()
    chores.begin(counted(seen, 9, SLICE // 10))
    assert not chores
    assert len(seen) == 9


def test_what_is_long_is_done_in_turns_and_in_order() -> None:
    chores, seen = Chores(), list[int]()
    chores.begin(counted(seen, 30, SLICE // 10))
    chores.begin(counted(seen, 5, SLICE // 10))
    assert len(seen) == 10
    chores.do_slice()
    assert len(seen) == 20
    while chores:
        chores.do_slice()
    assert seen == [*range(30), *range(5)]


def test_what_a_chore_begins_comes_after_it() -> None:
    chores, seen = Chores(), list[int]()

    def begins() -> Work:
        yield 1
        chores.begin(counted(seen, 2, 1))
        seen.append(-1)
        yield 1

    chores.begin(begins())
    assert seen == [-1, 0, 1]


def test_a_chore_that_fails_is_not_begun_again() -> None:
    chores = Chores()

    def fails() -> Work:
        yield SLICE
        raise ValueError("no")

    chores.begin(fails())
    with pytest.raises(ValueError, match="no"):
        chores.do_slice()
    chores.do_slice()
    assert not chores


# -- changes of rules ---------------------------------------------------------------------------------


def steps(talk: Dialogue) -> int:
    return talk.state.judge.steps


def test_attack_c4_a_change_of_rules_looks_at_few_names_a_turn() -> None:
    talk = Dialogue(GLOBS, owners=OWNERS)
    talk.subscribe()
    talk.works = False
    turns, told = 0, 0
    talk.use(OTHERS)
    while talk.state.chores:
        before = steps(talk)
        talk.filter.do_chores()
        told, turns = max(told, now := len(talk.state.to_app)), turns + 1
        # Each looked at is charged as NAME_WORK at the least, and an owner is looked at whole.
        assert now <= SLICE // NAME_WORK + MAX_NAMES
        assert steps(talk) - before <= SLICE // STEP_WORK + talk.state.judge.cost.steps
        talk._pump()
    assert turns > 2 * MANY * NAME_WORK // SLICE - 2
    assert len([m for m in talk.got if m.text == "signal NameOwnerChanged"]) > MANY // 2


def test_attack_c4_a_list_of_many_names_is_answered_in_turns() -> None:
    talk = Dialogue(GLOBS, owners=OWNERS)
    talk.works = False
    answers = talk.app(driver_call(5, "ListNames"), driver_call(6, "GetId"))
    turns = 0
    while talk.state.chores:
        assert not answers  # in order, whatever takes long
        assert talk.is_held()
        talk.filter.do_chores()
        answers = talk.deliver()
        turns += 1
    assert [m.header.reply_serial for m in talk.got] == [5, 6]
    assert len(talk.got[0].body[0]) == MANY + MANY // 4 + 2  # type: ignore[arg-type]
    assert turns > MANY * NAME_WORK // SLICE


def test_attack_c4_an_owner_of_more_names_than_are_looked_at_is_not_seen() -> None:
    owners = {f"org.n{n}": ":1.2" for n in range(MAX_NAMES)}
    talk = Dialogue(access("send:org.*", "see:org.*"), owners=owners)
    talk.subscribe()
    before = steps(talk)
    (answer,) = talk.app(driver_call(5, "GetNameOwner", "s", "org.n1"))
    assert answer.text.startswith("error")
    assert steps(talk) == before
    talk.change("org.n2", "")
    (answer,) = talk.app(driver_call(6, "GetNameOwner", "s", "org.n1"))
    assert answer.text == "return"


LISTS = [
    access("send:org.a?", "see:org.?2"),
    access("send:org.*", deny=["send:org.a1", "see:org.a1"]),
    access("see:org.b1", "own:org.b*"),
    access("see:,peer=host"),
    access(),
]


@pytest.mark.parametrize("before", LISTS)
@pytest.mark.parametrize("after", LISTS)
def test_in_slices_the_app_hears_the_same(before: AccessList, after: AccessList) -> None:
    heard = []
    for room in (SLICE, 1):
        talk = Dialogue(before, owners=FEW)
        talk.state.chores.room = room
        talk.subscribe()
        talk.use(after)
        talk.use(before)
        talk.use(after)
        talk.app(driver_call(5, "ListNames"))
        heard.append([(m.text, m.body) for m in talk.got])
        assert not talk.is_held()
        assert not talk.filter.is_changing
    assert heard[0] == heard[1]


def test_whatever_comes_meanwhile_waits_and_is_judged_by_the_new_rules() -> None:
    talk = Dialogue(access("send:org.a?", "receive:org.a?"), owners=FEW)
    talk.state.chores.room = 1
    talk.subscribe()
    talk.works = False
    talk.use(access("send:org.b?", "receive:org.b?"))
    assert talk.filter.is_changing
    first = list(talk.got)  # the slice that is done at once
    talk.got.clear()
    talk.app(call(5, "org.a1"), call(6, "org.b1"))
    talk.deliver(changed(call(7, ME), sender=":1.3"))
    talk.change("org.b2", ":1.3")
    assert not talk.got
    assert not talk.arrived
    talk.works = True
    talk.deliver()
    assert [m.header.serial for m in talk.arrived] == [6]
    texts = [m.text for m in talk.got]
    assert texts.count("error ServiceUnknown") + texts.count("error AccessDenied") == 1
    assert sum(m.header.serial == 7 for m in talk.got) == 1
    changes = [m.body for m in [*first, *talk.got] if m.text == "signal NameOwnerChanged"]
    assert ("org.a1", ":1.2", "") in changes
    assert ("org.b1", "", ":1.3") in changes


def test_what_is_told_of_one_change_is_known_to_the_next() -> None:
    talk = Dialogue(access(), owners=FEW)
    talk.state.chores.room = 1
    talk.subscribe()
    talk.works = False
    for rules in (access("see:org.a?"), access("see:org.b?"), access("see:org.a?")):
        talk.use(rules)
    talk.works = True
    talk.deliver()
    shown: dict[object, object] = {}
    for name, old, new in [m.body for m in talk.got if m.text == "signal NameOwnerChanged"]:
        assert shown.get(name, "") == old
        shown[name] = new
    assert {name for name, new in shown.items() if new} == {"org.a1", "org.a2"}
