"""Owners are learned on the connection itself, the last word wins, and what is not known is waited for."""

import pytest

from broker.control_protocol.messages import SandboxLimits
from broker.gate.filter.name_owners import MAX_NARROW_MATCHES
from broker.gate.filter.pending_calls import MAX_FORMER_OWNERS
from broker.wire import errors
from broker.wire.errors import PeerQuotaError
from tests.helpers.messages import access, call, driver_call, names
from tests.helpers.modelbus import Dialogue

OWNERS = {"org.a": ":1.2", "org.b": ":1.3"}
MATCH = (
    "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',"
    "member='NameOwnerChanged',path_namespace='/org/freedesktop/DBus'"
)


def knows(talk: Dialogue) -> dict[str, str]:
    return {name: target.owner for name, target in talk.filter._owners.names.items()}


def test_it_subscribes_before_it_asks() -> None:
    talk = Dialogue(access("send:org.a"), owners=OWNERS, hello=False)
    talk.paused = True
    talk.app(driver_call(1, "Hello"))
    talk.step()
    talk.paused = False
    talk.resume()
    asked = names(talk.model.seen)
    assert asked.index("call AddMatch") < asked.index("call GetNameOwner")
    assert knows(talk) == {"org.a": ":1.2"}


def test_change_between_subscription_and_answer_is_not_lost() -> None:
    talk = Dialogue(owners=OWNERS)
    talk.paused = True
    talk.use(access("send:org.a"))
    talk.step()  # AddMatch
    talk.change("org.a", ":1.3")
    talk.resume()
    assert knows(talk) == {"org.a": ":1.3"}
    talk.app(call(2, ":1.3"), call(3, ":1.2"))
    assert [m.header.serial for m in talk.arrived] == [2]


def test_list_that_comes_after_the_rules_changed_says_nothing_of_names_they_do_not_use() -> None:
    talk = Dialogue(owners={"org.a": ":1.2", "org.b": ":1.2"})
    talk.paused = True
    talk.use(access("send:org.a", "send:org.x.*"))  # lists names
    talk.use(access("send:", deny=["send:org.b"]))  # uses another
    talk.resume()
    assert "org.a" not in knows(talk)
    # Its owner has to be asked for, who owns the denied name as well.
    (answer,) = talk.app(call(2, "org.a"))
    assert answer.text.startswith("error")
    assert not talk.arrived


@pytest.mark.parametrize(
    ("rules", "matches"),
    [
        (access("send:org.a"), [f"{MATCH},arg0='org.a'"]),
        (access("send:org.x.*"), [f"{MATCH},arg0namespace='org.x'"]),
        (access("send:org.?"), [MATCH]),
        (access(*(f"send:org.n{n}" for n in range(MAX_NARROW_MATCHES + 1))), [MATCH]),
        (access("send:"), []),
    ],
    ids=["exact", "subtree", "glob", "many", "none"],
)
def test_it_subscribes_to_what_its_rules_use(rules: object, matches: list[str]) -> None:
    talk = Dialogue(rules, owners=OWNERS)  # type: ignore[arg-type]
    assert talk.model.matches == matches
    talk.use(access())
    assert not talk.model.matches


@pytest.mark.parametrize("rule", ["send:org.*", "send:org.?"])
def test_names_of_a_pattern_are_listed_and_followed(rule: str) -> None:
    talk = Dialogue(access(rule), owners={**OWNERS, "com.c": ":1.4"})
    assert OWNERS.items() <= knows(talk).items()
    talk.change("org.n", ":1.5")
    talk.change("com.n", ":1.6")
    talk.app(call(2, ":1.5"), call(3, ":1.6"))
    assert [m.header.serial for m in talk.arrived] == [2]


@pytest.mark.parametrize("rule", ["send:org.*", "send:org.?*"])
def test_names_that_come_and_go_leave_nothing(rule: str) -> None:
    talk = Dialogue(access(rule))
    for n in range(50):
        talk.change(f"org.n{n}", ":1.2")
        talk.change(f"org.n{n}", "")
    assert not knows(talk)


def test_name_that_no_rule_names_is_asked_for_once_and_what_is_behind_it_waits() -> None:
    talk = Dialogue(access("send:"), owners=OWNERS)
    talk.paused = True
    talk.app(call(2, "org.a"), call(3, ":1.9"), call(4, "org.a"))
    assert talk.is_held()
    talk.model.uniques.add(":1.9")
    talk.resume()
    assert [m.header.serial for m in talk.arrived] == [2, 3, 4]
    assert names(talk.model.seen).count("call GetNameOwner") == 1


def test_nothing_is_asked_if_nothing_may_be_sent() -> None:
    talk = Dialogue(access("receive:"), owners=OWNERS)
    assert names(talk.app(call(2, "org.a"))) == ["error ServiceUnknown"]
    assert not talk.model.seen


def test_names_that_no_rule_names_have_a_budget() -> None:
    talk = Dialogue(access("send:"), owners=OWNERS, limits=SandboxLimits(tracked_names=3))
    for n in range(2, 12):
        talk.app(call(2 * n, f"org.n{n}"), call(2 * n + 1, "org.a"))
    assert sorted(knows(talk)) == ["org.a", "org.n10", "org.n11"]
    assert len(talk.model.matches) == 3


def test_name_that_rules_came_to_name_is_not_forgotten() -> None:
    talk = Dialogue(access("send:"), owners=OWNERS, limits=SandboxLimits(tracked_names=2))
    talk.app(call(2, "org.a"))
    talk.use(access("send:", deny=["send:org.a"]))
    for n in range(5):
        talk.app(call(10 + n, f"org.n{n}"))
    talk.clear()
    talk.app(call(3, ":1.2"))
    assert not talk.arrived


def test_many_names_that_no_rule_names_are_followed_by_one_match() -> None:
    talk = Dialogue(access("send:"))
    for n in range(MAX_NARROW_MATCHES + 5):
        talk.app(call(n + 2, f"org.n{n}"))
    assert talk.model.matches == [MATCH]


def test_bus_that_takes_no_match_rule_ends_the_connection() -> None:
    talk = Dialogue(owners=OWNERS)
    talk.model.refuse["AddMatch"] = (errors.LIMITS_EXCEEDED, "full")
    with pytest.raises(PeerQuotaError, match="match rules"):
        talk.use(access("send:org.a"))


def test_bus_that_does_not_list_its_names_ends_the_connection() -> None:
    talk = Dialogue(owners=OWNERS)
    talk.model.refuse["ListNames"] = (errors.FAILED, "no")
    with pytest.raises(PeerQuotaError, match="list"):
        talk.use(access("send:org.*"))


def test_former_owners_are_bounded() -> None:
    talk = Dialogue(access("send:org.a"), owners=OWNERS)
    talk.app(call(2, "org.a"))
    for n in range(3 * MAX_FORMER_OWNERS):
        talk.change("org.a", f":2.{n}")
    (entry,) = talk.state.pending.calls_to_bus.values()
    assert len(entry.former) <= MAX_FORMER_OWNERS
    assert names(talk.reply(talk.arrived[0], sender=f":2.{3 * MAX_FORMER_OWNERS - 2}")) == [
        "return"
    ]


def test_change_of_rules_forgets_what_is_used_no_more() -> None:
    talk = Dialogue(access("send:org.a", "send:org.b"), owners=OWNERS)
    talk.use(access("send:org.b"))
    assert knows(talk) == {"org.b": ":1.3"}
    talk.use(access("send:org.a"))
    assert knows(talk) == {"org.a": ":1.2"}
    assert talk.model.matches == [f"{MATCH},arg0='org.a'"]


def test_owner_change_costs_the_same_however_many_calls_wait() -> None:
    talk = Dialogue(access("send:org.a"), owners=OWNERS)
    talk.app(*(call(2 + n, "org.a") for n in range(50)))
    before = list(talk.state.pending.calls_to_bus.values())
    assert len({*map(id, before)}) == 1  # one Target, which all have
    talk.change("org.a", ":1.3")
    assert list(map(id, talk.state.pending.calls_to_bus.values())) == list(map(id, before))
    for asked in talk.arrived:
        assert names(talk.reply(asked, sender=":1.3")) == ["return"]


def test_each_call_is_answered_by_who_owned_the_name_since_it_was_made() -> None:
    talk = Dialogue(access("send:org.a"), owners=OWNERS)
    owners = [":1.2", ":1.3", "", ":1.4"]
    for n, owner in enumerate(owners):
        if n:
            talk.change("org.a", owner)
        talk.model.owners.setdefault(
            "org.a", "starting"
        )  # so that the model does not answer itself
        talk.app(*(call(10 * n + 10 + m, "org.a") for m in range(4)))
        talk.model.owners["org.a"] = owner
    arrived = iter(talk.arrived)
    for n in range(len(owners)):
        for sender in [*filter(None, owners), ":1.9"]:
            answered = names(talk.reply(next(arrived), sender=sender))
            assert answered == (["return"] if sender in owners[n:] else []), (n, sender)


def test_history_of_a_name_is_kept_as_long_as_calls_wait() -> None:
    talk = Dialogue(access("send:org.*"), owners=OWNERS)
    owners = talk.filter._owners
    talk.change("org.a", ":1.3")
    assert not owners._histories
    talk.app(call(2, "org.a"))
    for owner in ("", ":1.4", ""):  # nobody's names are forgotten
        talk.change("org.a", owner)
    assert list(owners._histories or ()) == ["org.a"]
    talk.change("org.a", ":1.5")
    assert names(talk.reply(talk.arrived[0], sender=":1.5")) == ["return"]
    assert not owners._histories


def test_call_to_a_name_that_was_forgotten_meanwhile_is_still_followed() -> None:
    limits = SandboxLimits(tracked_names=1)
    talk = Dialogue(access("send:"), owners=OWNERS, limits=limits)
    talk.app(call(2, "org.a"))
    talk.app(call(3, "org.b"))
    assert "org.a" not in knows(talk)
    talk.app(call(4, "org.a"))
    talk.change("org.a", ":1.4")
    first, *_ = talk.arrived
    assert names(talk.reply(first, sender=":1.4")) == ["return"]
