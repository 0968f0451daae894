"""The bus itself, as an app may use it: an allow-list, answers cut to what it may see, names it may own."""

from collections.abc import Callable

import pytest

from broker.gate.bus import DRIVER
from broker.gate.control import SandboxLimits
from broker.wire import errors
from broker.wire.errors import PeerProtocolError
from broker.wire.header import Flag
from tests.messages import NO_REPLY, access, big, call, changed, driver_call, names, signal
from tests.modelbus import ME, OTHER_APP, Dialogue

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
    assert answer(talk, order(driver_call(2, "AddMatch", "s", " member = A ,path='/x'"))) == ()
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
    assert talk.core.match_count == 0


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
    assert talk.core.match_count == 2


def test_match_rule_that_the_bus_refuses_does_not_count() -> None:
    talk = Dialogue()
    talk.model.refuse["AddMatch"] = (errors.LIMITS_EXCEEDED, "full")
    assert answer(talk, driver_call(2, "AddMatch", "s", "")) == ("error LimitsExceeded",)
    assert talk.core.match_count == 0
    assert not talk.core.matches


# -- looking names up -----------------------------------------------------------------------------------

LOOK_UPS = [
    "GetNameOwner",
    "GetConnectionUnixProcessID",
    "GetConnectionUnixUser",
    "GetConnectionCredentials",
    "GetConnectionSELinuxSecurityContext",
    "GetAdtAuditSessionData",
]


@pytest.mark.parametrize("member", LOOK_UPS)
@pytest.mark.parametrize(("hidden", "absent"), [("org.b", "org.no"), (":1.3", ":1.99")])
def test_hidden_name_looks_absent(member: str, hidden: str, absent: str) -> None:
    talk = Dialogue(access("see:org.a"), owners=OWNERS)
    (seen,) = Dialogue(access("see:"), owners=OWNERS).app(driver_call(2, member, "s", absent))
    (got,) = talk.app(driver_call(2, member, "s", hidden))
    assert got.header.error_name == seen.header.error_name == errors.NAME_HAS_NO_OWNER
    assert str(got.body[0]).replace(hidden, absent) == seen.body[0]
    assert talk.host.denials[0].direction == "see"


@pytest.mark.parametrize("name", ["org.a", "org.a2", ":1.2", ME, DRIVER])
@pytest.mark.parametrize("member", [*LOOK_UPS, "NameHasOwner"])
def test_seen_name_is_looked_up(member: str, name: str) -> None:
    talk = Dialogue(access("see:org.a"), owners=OWNERS)
    assert names(talk.app(driver_call(2, member, "s", name))) == ["return"]


@BOTH_ORDERS
def test_hidden_name_has_no_owner(order: Order) -> None:
    talk = Dialogue(access("see:org.a"), owners=OWNERS)
    for name, there in (("org.a", True), ("org.b", False), (":1.3", False), (":1.2", True)):
        assert answer(talk, order(driver_call(2, "NameHasOwner", "s", name))) == (there,)
    assert not talk.app(driver_call(2, "NameHasOwner", "s", "org.b", flags=NO_REPLY))


def test_invalid_name_is_refused() -> None:
    assert answer(Dialogue(), driver_call(2, "GetNameOwner", "s", "nodots")) == (
        "error InvalidArgs",
    )


def test_hidden_name_is_worded_as_this_bus_words_it() -> None:
    talk = Dialogue(owners=OWNERS, hello=False)
    talk.model.refuse["GetNameOwner"] = (
        errors.NAME_HAS_NO_OWNER,
        "The name does not have an owner",
    )
    talk.app(driver_call(1, "Hello"))
    got = talk.app(driver_call(2, "GetNameOwner", "s", "org.b"))
    assert got[0].body == ("The name does not have an owner",)


def test_bus_is_asked_for_its_words_once() -> None:
    first = Dialogue()
    assert first.bus.wording_known
    second = Dialogue(shared=first.bus, me=":1.8", hello=False)
    second.app(driver_call(1, "Hello"))
    assert names(second.model.seen) == ["call Hello"]


@pytest.mark.parametrize("member", ["ListNames", "ListActivatableNames"])
@BOTH_ORDERS
def test_lists_have_what_may_be_seen(member: str, order: Order) -> None:
    talk = Dialogue(access("see:org.a"), owners=OWNERS)
    talk.model.activatable.extend(["org.a", "org.c"])
    (listed,) = answer(talk, order(driver_call(2, member)))
    seen = [DRIVER, "org.a", "org.a2", ":1.2", ME] if member == "ListNames" else [DRIVER, "org.a"]
    assert listed == tuple(seen)


def test_refused_list_is_passed_on() -> None:
    talk = Dialogue()
    talk.model.refuse["ListNames"] = (errors.FAILED, "no")
    assert answer(talk, driver_call(2, "ListNames")) == ("error Failed",)


# -- starting ---------------------------------------------------------------------------------------------


def test_service_may_be_started_if_it_may_be_sent_to() -> None:
    talk = Dialogue(access("send:org.a:org.example.I.*", "see:org.b"), owners=OWNERS)

    def start(name: str) -> tuple[object, ...]:
        return answer(talk, driver_call(2, "StartServiceByName", "su", name, 0))

    assert start("org.a") == (2,)
    assert start(DRIVER) == (2,)
    assert start("org.b") == ("error AccessDenied",)
    assert start("org.c") == ("error ServiceUnknown",)
    assert start(":1.2") == ("error InvalidArgs",)
    assert [m.body[0] for m in talk.model.seen if m.text == "call StartServiceByName"] == [
        "org.a",
        DRIVER,
    ]


def test_hidden_service_is_worded_as_one_that_cannot_be_started() -> None:
    hidden = Dialogue().app(driver_call(2, "StartServiceByName", "su", "org.b", 0))[0]
    absent = Dialogue(access("send:")).app(driver_call(2, "StartServiceByName", "su", "org.no", 0))
    assert hidden.header.error_name == absent[0].header.error_name
    assert str(hidden.body[0]).replace("org.b", "org.no") == absent[0].body[0]


def test_peer_of_a_rule_counts_for_starting() -> None:
    talk = Dialogue(access("send:,peer=host"), owners=OWNERS)
    talk.bus.connected(":1.3", "c2", OTHER_APP)
    started = [
        answer(talk, driver_call(2, "StartServiceByName", "su", name, 0))
        for name in ("org.a", "org.b")
    ]
    assert started == [(2,), ("error ServiceUnknown",)]


# -- owning -----------------------------------------------------------------------------------------------


def request(name: str, flags: int = 0, serial: int = 2) -> bytes:
    return driver_call(serial, "RequestName", "su", name, flags)


@BOTH_ORDERS
def test_name_needs_an_own_rule(order: Order) -> None:
    talk = Dialogue(access("own:org.me.*", "send+see:org.other"))
    assert answer(talk, request("org.me.x")) == (1,)
    for name in ("org.other", "org.meow"):
        assert answer(talk, request(name)) == ("error AccessDenied",)
        for member in ("ReleaseName", "ListQueuedOwners"):
            assert answer(talk, order(driver_call(3, member, "s", name))) == ("error AccessDenied",)
    assert answer(talk, request(":1.9")) == ("error InvalidArgs",)
    assert answer(talk, order(driver_call(3, "ReleaseName", "s", "org.me.x"))) == (1,)
    assert {denial.direction for denial in talk.host.denials} == {"own"}


def test_flags_that_are_not_defined_are_masked() -> None:
    talk = Dialogue(access("own:org.me"))
    talk.app(request("org.me", 0xFF))
    assert talk.model.requested == [("org.me", 7)]


def test_queue_is_cut_to_what_may_be_seen() -> None:
    talk = Dialogue(access("own:org.me"), owners=OWNERS)
    assert answer(talk, driver_call(2, "ListQueuedOwners", "s", "org.me")) == ((ME,),)


def test_names_have_a_budget() -> None:
    talk = Dialogue(access("own:org.me.*"), limits=SandboxLimits(names=2))
    assert answer(talk, request("org.me.a")) == answer(talk, request("org.me.b")) == (1,)
    assert answer(talk, request("org.me.c")) == ("error LimitsExceeded",)
    assert answer(talk, request("org.me.a")) == (2,)
    assert answer(talk, driver_call(3, "ReleaseName", "s", "org.me.a")) == (1,)
    assert answer(talk, request("org.me.c")) == (1,)


def test_name_that_was_not_got_does_not_count() -> None:
    talk = Dialogue(access("own:org.*"), owners=OWNERS, limits=SandboxLimits(names=1))
    assert answer(talk, request("org.a", 4)) == (3,)
    assert answer(talk, request("org.me")) == (1,)


def test_taking_own_away_releases_the_name() -> None:
    talk = Dialogue(access("own:org.me.*", "own:org.keep"))
    talk.app(request("org.me.a"), request("org.me.b", serial=3), request("org.keep", serial=4))
    talk.use(access("own:org.me.b", "own:org.keep"))
    assert sorted(talk.model.owners) == ["org.keep", "org.me.b"]
    talk.use(access())
    assert not talk.model.owners
    assert not talk.core.requested_names


@pytest.mark.parametrize("second", [request("org.a", serial=3), changed(request("org.a"), flags=1)])
def test_name_that_is_still_waited_for_is_released_too(second: bytes) -> None:
    # The first request does not get it, and says so after the second one, which queues, was sent.
    talk = Dialogue(access("own:org.a"), owners=OWNERS)
    talk.paused = True
    talk.app(request("org.a", 4), second)
    talk.resume()
    talk.clear()
    talk.use(access())
    assert "call ReleaseName" in names(talk.model.seen)


def test_request_on_its_way_is_taken_back_with_the_right() -> None:
    talk = Dialogue(access("own:org.me"))
    talk.paused = True
    talk.app(request("org.me"))
    talk.use(access())
    talk.resume()
    assert not talk.model.owners


def test_signals_about_own_names_come_through() -> None:
    talk = Dialogue()
    lost = signal(8, "NameLost", destination=ME, sender=DRIVER, interface=DRIVER, values=("org.a",))
    assert names(talk.deliver(lost)) == ["signal NameLost"]


def test_flag_against_starting_is_kept() -> None:
    talk = Dialogue(access("send:org.a"), owners=OWNERS)
    talk.app(call(2, "org.a", flags=int(Flag.NO_AUTO_START)))
    assert talk.arrived[0].header.flags == Flag.NO_AUTO_START
