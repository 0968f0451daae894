"""What the bus says of calls that want no reply is taken for no other call's, and what is asked meanwhile waits."""

import pytest

from broker.control_protocol.messages import SandboxLimits
from broker.wire import errors
from broker.wire.interfaces import DRIVER
from broker.wire.marshal import make_error
from broker.wire.matchrule import parse_match_rule
from tests.helpers.messages import NO_REPLY, access, call, driver_call
from tests.helpers.modelbus import Dialogue

HIDDEN = {"org.a": ":1.2", "org.hidden.X": ":1.3"}


def talk_to_daemon(*rules: str, **named: object) -> Dialogue:
    """Return a dialogue with a bus that answers whatever it is sent, as dbus-daemon does."""
    talk = Dialogue(access(*rules), **named)  # type: ignore[arg-type]
    talk.model.answers_mute = True
    return talk


@pytest.mark.parametrize("member", ["ListNames", "ListActivatableNames"])
def test_a_list_that_nobody_waits_for_answers_no_other_call(member: str) -> None:
    talk = talk_to_daemon("see:org.a", owners=HIDDEN)
    got = talk.app(driver_call(50, member, flags=NO_REPLY), driver_call(50, "GetId"))
    assert [message.body for message in got] == [("0" * 32,)]


def test_a_number_that_nobody_waits_for_is_no_answer_to_a_request() -> None:
    talk = talk_to_daemon("own:org.me.*", limits=SandboxLimits(names=2))
    for number in range(5):
        serial, name = 60 + number, f"org.me.N{number}"
        talk.app(
            driver_call(serial, "GetConnectionUnixUser", "s", DRIVER, flags=NO_REPLY),
            driver_call(serial, "RequestName", "su", name, 0),
        )
    assert sorted(talk.model.owners) == ["org.me.N0", "org.me.N1"]
    talk.use(access())
    assert talk.model.owners == {}


@pytest.mark.parametrize("flags", [0, NO_REPLY])
def test_an_error_that_nobody_waits_for_does_not_make_a_rule_uncounted(flags: int) -> None:
    talk = talk_to_daemon("send:org.gone", limits=SandboxLimits(match_rules=4))
    for number in range(20):
        talk.app(
            call(100 + number, "org.gone", flags=NO_REPLY),
            driver_call(100 + number, "AddMatch", "s", f"member='M{number}'", flags=flags),
        )
    assert len([rule for rule in talk.model.matches if "member='M" in rule]) == 4
    assert talk.state.matches.count == 4


@pytest.mark.parametrize("flags", [0, NO_REPLY])
def test_an_app_cannot_take_away_what_the_gate_follows_names_by(flags: int) -> None:
    rules = access("send:", deny=["send:org.hidden.X"])
    talk = Dialogue(rules, owners=HIDDEN)
    ours = list(talk.model.matches)
    assert ours
    talk.model.refuse["AddMatch"] = (errors.LIMITS_EXCEEDED, "too many match rules")
    for text in (*ours, *(rule.replace("path_namespace", "path") for rule in ours)):
        talk.app(
            driver_call(50, "AddMatch", "s", text, flags=flags),
            driver_call(51, "RemoveMatch", "s", text),
        )
    assert talk.model.matches == ours
    talk.model.refuse.clear()
    talk.change("org.hidden.X", ":1.9")
    talk.clear()
    assert [message.text for message in talk.app(call(60, ":1.9"))] == ["error ServiceUnknown"]
    assert talk.arrived == []


def test_a_serial_is_taken_while_its_call_waits_under_another() -> None:
    talk = Dialogue(access("send:org.a"), owners=HIDDEN)
    talk.app(call(2, "org.a"))  # so that the next one is known
    talk.clear()
    talk.paused = True
    talk.app(driver_call(3, "ListNames"))
    (refused,) = talk.app(call(3, "org.a"))
    assert refused.text == "error AccessDenied"
    assert talk.deliver(make_error(9, reply_serial=3, name="a.b", text="c", sender=DRIVER)) == []
    (listed,) = talk.resume()
    assert listed.header.reply_serial == 3
    assert talk.app(call(3, "org.a")) == []
    assert [message.header.serial for message in talk.arrived] == [3]


def test_a_rule_like_the_gates_own_is_written_otherwise() -> None:
    talk = Dialogue(access("see:org.a"), owners=HIDDEN)
    (ours,) = talk.model.matches
    assert [m.text for m in talk.app(driver_call(5, "AddMatch", "s", ours))] == ["return"]
    assert parse_match_rule(ours).canonical() == ours
    assert talk.model.matches == [ours, ours.replace("path_namespace", "path")]
    assert talk.change("org.a", ":1.8")
    assert [m.text for m in talk.app(driver_call(6, "RemoveMatch", "s", ours))] == ["return"]
    assert talk.model.matches == [ours]


def test_a_list_on_its_way_while_the_rules_change_has_what_may_be_seen() -> None:
    owners = {"org.hidden.X": ":1.3", "org.other.Y": ":1.3", "org.a": ":1.2"}
    talk = Dialogue(owners=owners)
    talk.paused = True
    talk.app(driver_call(50, "ListNames"))
    talk.use(access("see:", deny=["see:org.hidden.X"]))
    (names,) = [message.body[0] for message in talk.resume() if message.header.signature == "as"]
    assert isinstance(names, tuple)
    assert {"org.a", ":1.2"} <= set(names)
    assert {"org.hidden.X", "org.other.Y", ":1.3"}.isdisjoint(names)


def test_an_owner_change_before_all_owners_are_known_waits() -> None:
    owners = {"org.hidden.X": ":1.3", "org.a": ":1.2"}
    talk = Dialogue(access("see:", deny=["see:org.hidden.X"]), owners=owners, hello=False)
    talk.paused = True
    talk.app(driver_call(1, "Hello"))
    talk.step()
    talk.app(driver_call(2, "AddMatch", "s", ""))
    while not any("NameOwnerChanged" in rule for rule in talk.model.matches):
        talk.step()
    talk.clear()
    assert talk.change("org.other.Y", ":1.3") == talk.change("org.b", ":1.2") == []
    told = [message.body[0] for message in talk.resume() if message.header.signature == "sss"]
    assert told == ["org.b"]


def test_a_service_is_not_started_by_another_name_of_who_is_denied() -> None:
    owners = {"org.hidden.X": ":1.3", "org.other.Y": ":1.3"}
    rules = access("send+see:", deny=["send+see:org.hidden.X"])
    talk = Dialogue(rules, owners=owners)
    starts = [driver_call(7, "StartServiceByName", "su", name, 0) for name in ("org.other.Y",)]
    (reply,) = talk.app(*starts)
    assert reply.text == "error ServiceUnknown"
    assert "org.other.Y" in str(reply.body[0])
