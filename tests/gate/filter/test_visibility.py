"""What an app sees: itself, what its rules name, whoever called it; and how it hears of changes."""

import pytest

from broker.gate.filter.connection_state import MAX_CALLERS
from broker.gate.filter.visibility import MAX_LATELY_SEEN
from broker.wire.interfaces import DRIVER
from tests.helpers.messages import Message, access, call, changed, driver_call, names
from tests.helpers.modelbus import APP, ME, OTHER_APP, Dialogue, make_bus

OWNERS = {"org.a": ":1.2", "org.a2": ":1.2", "org.b": ":1.3"}
SEES_A = access("see:org.a")


def told(messages: list[Message]) -> list[tuple[object, ...]]:
    """Return the owner changes among them."""
    return [m.body for m in messages if m.text == "signal NameOwnerChanged"]


def sees(talk: Dialogue, name: str) -> bool:
    return names(talk.app(driver_call(800, "GetNameOwner", "s", name))) == ["return"]


def test_it_sees_itself_and_the_bus_without_any_rule() -> None:
    talk = Dialogue(owners=OWNERS)
    assert sees(talk, ME)
    assert sees(talk, DRIVER)
    assert not sees(talk, "org.a")


@pytest.mark.parametrize("rule", ["see:org.a", "send:org.a", "receive:org.a", "own:org.a"])
def test_any_rule_that_names_a_name_shows_it(rule: str) -> None:
    talk = Dialogue(access(rule), owners=OWNERS)
    assert sees(talk, "org.a")
    assert not sees(talk, "org.b")


def test_caller_is_seen_with_its_names() -> None:
    talk = Dialogue(access("send:org.c"), owners=OWNERS)
    assert not sees(talk, ":1.2")
    talk.deliver(changed(call(8, ME), sender=":1.2"))
    assert sees(talk, ":1.2")
    assert sees(talk, "org.a")
    assert not sees(talk, ":1.3")


def test_refused_caller_is_not_seen() -> None:
    talk = Dialogue(access(receive_from_host=False), owners=OWNERS)
    talk.deliver(changed(call(8, ME), sender=":1.2"))
    assert not sees(talk, ":1.2")


def test_caller_is_forgotten_with_its_end() -> None:
    talk = Dialogue(access("send:org.x.*", "see:org.?"), owners=OWNERS)
    talk.deliver(changed(call(8, ME), sender=":1.2"))
    talk.subscribe()
    gone = told(talk.deliver(talk.model.leave(":1.2")))
    assert gone[-1] == (":1.2", ":1.2", "")
    assert ":1.2" not in talk.state.callers


def test_remembered_callers_are_bounded() -> None:
    talk = Dialogue()
    for n in range(MAX_CALLERS + 10):
        talk.deliver(changed(call(8, ME, flags=1), sender=f":2.{n}"))
    assert len(talk.state.callers) == MAX_CALLERS
    assert ":2.0" not in talk.state.callers


def test_name_is_seen_by_who_owns_it() -> None:
    talk = Dialogue(access("see:,peer=same-app"), owners=OWNERS)
    talk.bus.connected(":1.3", "c2", APP)
    talk.bus.connected(":1.2", "c3", OTHER_APP)
    assert sees(talk, "org.b")
    assert not sees(talk, "org.a")
    assert sees(talk, ":1.3")


# -- owner changes ------------------------------------------------------------------------------------------


def test_owner_changes_are_heard_of_what_is_seen() -> None:
    talk = Dialogue(SEES_A, owners=OWNERS)
    talk.subscribe("member='NameOwnerChanged'")
    assert told(talk.change("org.a", ":1.3")) == [("org.a", ":1.2", ":1.3")]
    assert told(talk.change("org.a", "")) == [("org.a", ":1.3", "")]
    assert not told(talk.change("org.b", ":1.4"))
    assert not told(talk.deliver(talk.model.owner_changed(":1.9", "", ":1.9")))


def test_owner_that_may_not_be_seen_is_not_told() -> None:
    talk = Dialogue(access("see:org.*", deny=["see:org.b"]), owners=OWNERS)
    talk.subscribe("arg0='org.a'")
    assert told(talk.change("org.a", ":1.3")) == [("org.a", ":1.2", "")]
    assert not sees(talk, "org.a")
    assert not told(talk.change("org.a", ""))
    assert not told(talk.change("org.a", ":1.3"))
    assert told(talk.change("org.a", ":1.2")) == [("org.a", "", ":1.2")]


def test_owner_that_takes_a_hidden_name_leaves_sight_with_its_names() -> None:
    talk = Dialogue(access("see:org.a", deny=["see:org.b"]), owners={"org.a": ":1.2"})
    talk.subscribe("member='NameOwnerChanged'")
    assert told(talk.change("org.b", ":1.2")) == [("org.a", ":1.2", "")]
    assert not sees(talk, "org.a")
    assert told(talk.change("org.b", "")) == [("org.a", "", ":1.2")]
    talk.change("org.b", ":1.2")
    assert not told(talk.change("org.a", ""))


def test_caller_that_is_gone_is_as_one_that_never_was() -> None:
    talk = Dialogue(access("send:org.c"), owners=OWNERS)
    talk.deliver(changed(call(8, ME), sender=":1.2"))
    question = call(5, ":1.2")
    assert names(talk.app(question)) == ["error AccessDenied"]
    talk.model.leave(":1.2")
    assert names(talk.app(question)) == ["error ServiceUnknown"]
    assert not talk.state.callers


def test_owner_changes_are_heard_only_by_who_asked() -> None:
    talk = Dialogue(SEES_A, owners=OWNERS)
    assert not talk.change("org.a", ":1.3")  # the gate's own match brought it
    talk.subscribe("arg0='org.b'")
    assert not talk.change("org.a", ":1.2")
    talk.subscribe("arg0namespace='org'")
    assert len(told(talk.change("org.a", ":1.3"))) == 1


def test_end_of_a_connection_is_heard_even_if_its_name_went_before() -> None:
    talk = Dialogue(SEES_A, owners=OWNERS)
    talk.subscribe()
    assert told(talk.deliver(talk.model.leave(":1.2"))) == [
        ("org.a", ":1.2", ""),
        # Nothing of org.a2: what it was called else is known only by names of the rules.
        (":1.2", ":1.2", ""),
    ]
    assert not told(talk.deliver(talk.model.leave(":1.3")))


def test_end_of_a_sandboxed_peer_is_heard() -> None:
    # The gate closes a peer's connection before the bus tells the others of it.
    shared = make_bus()
    peer = Dialogue(shared=shared, me=":1.8", identity=APP)
    talk = Dialogue(access("see:,peer=same-app"), shared=shared)
    talk.subscribe()
    shared.members.discard(peer.state.verdicts)
    shared.gone(":1.8")
    assert told(talk.deliver(talk.model.leave(":1.8"))) == [(":1.8", ":1.8", "")]


def test_lately_seen_connections_are_bounded() -> None:
    talk = Dialogue(SEES_A, owners=OWNERS)
    talk.subscribe()
    for n in range(MAX_LATELY_SEEN + 10):
        talk.change("org.a", f":2.{n}")
    assert len(talk.filter._visibility.recently_visible) == MAX_LATELY_SEEN


# -- changes of rules -----------------------------------------------------------------------------------------


def test_taking_sight_away_and_giving_it_is_told() -> None:
    talk = Dialogue(SEES_A, owners=OWNERS)
    talk.subscribe()
    assert told(talk.use(access())) == [("org.a", ":1.2", "")]
    assert told(talk.use(access("send:org.b"))) == [("org.b", "", ":1.3")]
    # By a glob all names are known, and so another name of a seen owner.
    appeared = told(talk.use(access("see:org.?")))
    assert sorted(map(str, appeared)) == ["('org.a', '', ':1.2')", "('org.a2', '', ':1.2')"]
    assert not told(talk.use(access("see:org.*")))


def test_sight_that_is_given_twice_while_owners_are_asked_for_is_told_once() -> None:
    talk = Dialogue(owners={**OWNERS, "org.c": ":1.4"})
    talk.subscribe()
    talk.paused = True
    talk.use(access("see:org.a", "see:org.b"))
    for _ in range(3):
        talk.step()  # some answers have come, some have not
    talk.use(access("see:org.a", "see:org.b", "see:org.c"))
    talk.resume()
    assert told(talk.got) == [
        ("org.a", "", ":1.2"),
        ("org.b", "", ":1.3"),
        ("org.c", "", ":1.4"),
    ]


def test_name_without_an_owner_is_not_told() -> None:
    talk = Dialogue()
    talk.subscribe()
    assert not talk.use(access("see:org.absent"))
    assert not talk.use(access())


def test_change_of_rules_is_told_only_to_who_asked_for_owner_changes() -> None:
    talk = Dialogue(SEES_A, owners=OWNERS)
    talk.subscribe("member='Other'")
    assert not talk.use(access())


def test_bus_itself_does_not_appear() -> None:
    talk = Dialogue()
    talk.subscribe()
    assert not talk.use(access("send:org.freedesktop.DBus"))


def test_rules_that_hide_an_owner_by_another_of_its_names_tell_nothing_of_it() -> None:
    talk = Dialogue(
        access("send:net.c", deny=["see:net.c"]), owners={"net.c": ":1.3", "org.a.b": ":1.3"}
    )
    talk.subscribe()
    assert talk.use(access("see:", "send:net.c", deny=["see:org.a.b"])) == []
