"""The bus itself, as an app may use it: an allow-list, answers cut to what it may see, names it may own."""

from collections.abc import Callable

import msgspec
import pytest

from broker.control_protocol.messages import SandboxLimits
from broker.wire import errors
from broker.wire.errors import PeerProtocolError
from broker.wire.interfaces import DRIVER
from broker.wire.marshal import Value
from tests.helpers.messages import NO_REPLY, access, big, call, changed, driver_call, names
from tests.helpers.modelbus import Dialogue

OWNERS = {"org.a": ":1.2", "org.a2": ":1.2", "org.b": ":1.3"}
EVERYTHING = access("send+receive+see:", "own:org.*")
PEER = "org.freedesktop.DBus.Peer"
PROPERTIES = "org.freedesktop.DBus.Properties"
BOTH_ORDERS = pytest.mark.parametrize("order", [bytes, big], ids=["little", "big"])
Order = Callable[[bytes], bytes]


def answer(talk: Dialogue, *data: bytes) -> tuple[object, ...]:
    """Return what one call gets: its values, or the last part of its error's name."""
    (got,) = talk.app(*data)
    return got.body if got.text == "return" else (got.text,)


# -- the allow-list ----------------------------------------------------------------------------------


@BOTH_ORDERS
@pytest.mark.parametrize("interface", [DRIVER, None])
def test_every_sandbox_may_ask_for_the_id(interface: str | None, order: Order) -> None:
    talk = Dialogue()
    assert answer(talk, order(call(2, DRIVER, "GetId", interface=interface))) == ("0" * 32,)


@pytest.mark.parametrize(
    ("member", "interface"),
    [
        ("Ping", PEER),
        ("Ping", None),
        ("Introspect", "org.freedesktop.DBus.Introspectable"),
        ("Introspect", None),
    ],
)
def test_every_sandbox_may_ping_and_introspect(member: str, interface: str | None) -> None:
    talk = Dialogue()
    assert names(talk.app(call(2, DRIVER, member, interface=interface))) == ["return"]


@pytest.mark.parametrize(
    ("destination", "member", "interface"),
    [
        (DRIVER, "ReloadConfig", DRIVER),
        (DRIVER, "ReloadConfig", None),
        (DRIVER, "GetMachineId", PEER),
        (DRIVER, "Get", PROPERTIES),
        (DRIVER, "GetAll", PROPERTIES),
        (DRIVER, "Hello", "org.example.I"),
        (DRIVER, "GetId", "org.example.I"),
        (None, "GetMachineId", PEER),
    ],
)
def test_everything_else_needs_a_rule(
    destination: str | None, member: str, interface: str | None
) -> None:
    message = call(2, destination, member, interface=interface)
    talk = Dialogue()
    assert names(talk.app(message)) == ["error AccessDenied"]
    assert not talk.model.seen
    assert talk.host.denials
    talk = Dialogue(access("send:org.freedesktop.DBus"))
    assert not talk.app(message)
    assert talk.sent == [f"call {member}"]


@pytest.mark.parametrize("flags", [0, NO_REPLY])
@pytest.mark.parametrize(
    ("member", "interface"),
    [
        ("BecomeMonitor", "org.freedesktop.DBus.Monitoring"),
        ("BecomeMonitor", DRIVER),
        ("BecomeMonitor", None),
        ("UpdateActivationEnvironment", DRIVER),
        ("UpdateActivationEnvironment", None),
        ("GetStats", "org.freedesktop.DBus.Debug.Stats"),
        ("GetAllMatchRules", None),
        ("AddServer", "org.freedesktop.DBus.Containers1"),
        ("AddServer", None),
        ("Whatever", "org.freedesktop.DBus.Containers1"),
    ],
)
def test_some_things_no_rule_can_allow(member: str, interface: str | None, flags: int) -> None:
    talk = Dialogue(access("send+receive+see:", "send:org.freedesktop.DBus", "own:org.*"))
    got = talk.app(call(2, DRIVER, member, interface=interface, flags=flags))
    assert names(got) == ([] if flags else ["error AccessDenied"])
    assert not talk.model.seen
    assert talk.host.denials[0].reason == "no rule can allow it in a sandbox"


@pytest.mark.parametrize("member", ["Get", "GetAll", "Set"])
def test_properties_of_what_no_rule_can_allow_are_refused(member: str) -> None:
    talk = Dialogue(EVERYTHING)
    got = talk.app(
        call(
            2,
            DRIVER,
            member,
            interface=PROPERTIES,
            signature="s",
            values=("org.freedesktop.DBus.Debug.Stats",),
        )
    )
    assert names(got) == ["error AccessDenied"]
    assert not talk.model.seen


def test_call_to_nobody_is_a_ping_or_not_understood() -> None:
    talk = Dialogue(EVERYTHING)
    assert names(talk.app(call(2, None, "Ping", interface=PEER))) == ["return"]
    assert names(talk.app(call(3, None, "GetId", interface=DRIVER))) == ["error UnknownMethod"]


@pytest.mark.parametrize("member", ["AddMatch", "GetNameOwner", "RequestName", "ReleaseName"])
def test_wrong_arguments_are_refused(member: str) -> None:
    talk = Dialogue(EVERYTHING)
    assert answer(talk, driver_call(2, member, "u", 7)) == ("error InvalidArgs",)
    assert answer(talk, driver_call(3, member)) == ("error InvalidArgs",)
    assert not talk.sent


def test_broken_arguments_end_the_connection() -> None:
    message = driver_call(2, "GetNameOwner", "s", "org.a")
    with pytest.raises(PeerProtocolError):
        Dialogue().app(message[:-1] + b"x")


def test_nothing_an_app_adds_to_a_driver_call_is_passed_on() -> None:
    talk = Dialogue()
    talk.app(changed(driver_call(2, "GetId"), extra={10: ("o", "/evil")}, sender=":1.9"))
    assert [m.raw for m in talk.model.seen] == [driver_call(2, "GetId")]


def test_driver_call_of_the_same_serial_is_refused_while_one_waits() -> None:
    talk = Dialogue()
    talk.paused = True
    assert names(talk.app(driver_call(2, "GetId"), driver_call(2, "GetId"))) == [
        "error AccessDenied"
    ]
    assert names(talk.resume()) == ["return"]


# -- match rules ----------------------------------------------------------------------------------------


@BOTH_ORDERS
def test_match_rule_is_passed_on_in_canonical_words(order: Order) -> None:
    talk = Dialogue()
    assert answer(talk, order(driver_call(2, "AddMatch", "s", " member=A,\tpath='/x'"))) == ()
    assert talk.model.matches[-1] == "type='signal',member='A',path='/x'"
    assert answer(talk, order(driver_call(3, "RemoveMatch", "s", "path=/x,member='A'"))) == ()
    assert talk.model.matches.count("type='signal',member='A',path='/x'") == 0


@pytest.mark.parametrize(
    ("rule", "error"),
    [
        ("eavesdrop=true", "AccessDenied"),
        ("eavesdrop='tr''ue'", "AccessDenied"),
        ("type='signal',\teavesdrop = 'true'", "AccessDenied"),
        ("=type='signal'", "MatchRuleInvalid"),
        ("member='A',member='B'", "MatchRuleInvalid"),
        ("arg0='" + "x" * 1024 + "'", "LimitsExceeded"),
    ],
)
def test_bad_match_rule_is_refused(rule: str, error: str) -> None:
    talk = Dialogue(EVERYTHING)
    assert answer(talk, driver_call(2, "AddMatch", "s", rule)) == (f"error {error}",)
    assert not talk.sent
    assert talk.state.matches.count == 0


def test_match_rule_that_was_not_added_cannot_be_removed() -> None:
    talk = Dialogue(access("send:org.a"), owners=OWNERS)
    (ours,) = talk.model.matches
    for rule in ("", "member='A'", ours):
        assert answer(talk, driver_call(2, "RemoveMatch", "s", rule)) == (
            "error MatchRuleNotFound",
        )
    assert talk.model.matches == [ours]


def test_match_rules_are_counted() -> None:
    talk = Dialogue(limits=SandboxLimits(match_rules=2))
    add = driver_call(2, "AddMatch", "s", "")
    assert answer(talk, add) == answer(talk, add) == ()
    assert answer(talk, add) == ("error LimitsExceeded",)
    assert answer(talk, driver_call(2, "RemoveMatch", "s", "")) == ()
    assert answer(talk, add) == ()
    assert talk.state.matches.count == 2


def test_match_rules_of_all_connections_are_counted_together() -> None:
    talk, other = Dialogue(limits=SandboxLimits(match_rules=2)), Dialogue(me=":1.8")
    talk.host.states.append(other.state)
    add = driver_call(2, "AddMatch", "s", "")
    assert answer(other, add) == answer(talk, add) == ()
    assert answer(talk, add) == ("error LimitsExceeded",)
    assert answer(other, driver_call(2, "RemoveMatch", "s", "")) == ()
    assert answer(talk, add) == ()


def test_match_rule_that_the_bus_refuses_does_not_count() -> None:
    talk = Dialogue()
    talk.model.refuse["AddMatch"] = (errors.LIMITS_EXCEEDED, "full")
    assert answer(talk, driver_call(2, "AddMatch", "s", "")) == ("error LimitsExceeded",)
    assert talk.state.matches.count == 0
    assert not talk.state.matches


CALLS = [
    ("RequestName", ("org.example.Mine", 0)),
    ("ReleaseName", ("org.example.Mine",)),
    ("ListQueuedOwners", ("org.example.Mine",)),
    ("ListNames", ()),
    ("ListActivatableNames", ()),
    ("GetId", ()),
    ("GetConnectionUnixUser", (DRIVER,)),
    ("GetConnectionUnixProcessID", (DRIVER,)),
    ("GetConnectionCredentials", (DRIVER,)),
]


@pytest.mark.parametrize(("member", "values"), CALLS)
@pytest.mark.parametrize("interface", [DRIVER, None])
def test_by_rule_the_bus_tells_names_to_those_who_may_ask(
    member: str, values: tuple[Value, ...], interface: str | None
) -> None:
    rules = ("own:org.example.Mine", "see:org.freedesktop.DBus")
    asked = f"send:org.freedesktop.DBus:org.freedesktop.DBus.{member}"
    for given, by_rule, passes in (
        (rules, False, True),
        (rules, True, False),
        ((*rules, asked), True, interface is not None),  # a rule for an interface needs one
        ((*rules, "send:org.freedesktop.DBus"), True, True),
    ):
        talk = Dialogue(msgspec.structs.replace(access(*given), bus_by_rule=by_rule))
        signature = "".join("u" if isinstance(value, int) else "s" for value in values)
        got = talk.app(
            call(2, DRIVER, member, interface=interface, signature=signature, values=values)
        )
        if passes:
            assert "AccessDenied" not in str(names(got)), (given, by_rule)
            assert not talk.host.denials
        else:
            assert names(got) == ["error AccessDenied"]
            assert not talk.model.seen
            assert talk.host.denials[0].member == member


@pytest.mark.parametrize("member", ["GetNameOwner", "NameHasOwner", "AddMatch"])
def test_by_rule_the_rest_is_as_ever(member: str) -> None:
    talk = Dialogue(msgspec.structs.replace(access("see:org.freedesktop.DBus"), bus_by_rule=True))
    text = "type='signal'" if member == "AddMatch" else DRIVER
    got = talk.app(driver_call(2, member, "s", text))
    assert "AccessDenied" not in str(names(got))
