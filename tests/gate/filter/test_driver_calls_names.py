"""Names, as an app may look them up, start and own them."""

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest

from broker.bus.values import Variant, pack, unpack
from broker.control_protocol.messages import SandboxLimits
from broker.gate.filter.driver_calls import without_descriptors
from broker.wire import errors
from broker.wire.errors import PeerProtocolError
from broker.wire.header import Flag, measure, parse_header, serialise_header
from broker.wire.interfaces import DRIVER
from tests.helpers.messages import (
    NO_REPLY,
    Message,
    access,
    big,
    call,
    changed,
    driver_call,
    make_reply,
    names,
    signal,
    split,
)
from tests.helpers.modelbus import ME, OTHER_APP, Dialogue

OWNERS = {"org.a": ":1.2", "org.a2": ":1.2", "org.b": ":1.3"}
BOTH_ORDERS = pytest.mark.parametrize("order", [bytes, big], ids=["little", "big"])
Order = Callable[[bytes], bytes]


def answer(talk: Dialogue, *data: bytes) -> tuple[object, ...]:
    """Return what one call gets: its values, or the last part of its error's name."""
    (got,) = talk.app(*data)
    return got.body if got.text == "return" else (got.text,)


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
    assert first.bus.knows_absent_name_errors
    second = Dialogue(shared=first.bus, me=":1.8", hello=False)
    second.app(driver_call(1, "Hello"))
    assert names(second.model.seen) == ["call Hello"]


@pytest.mark.parametrize("member", ["ListNames", "ListActivatableNames"])
@BOTH_ORDERS
def test_lists_have_what_may_be_seen(member: str, order: Order) -> None:
    talk = Dialogue(access("see:org.a"), owners={"org.a": ":1.2", "org.b": ":1.3"})
    talk.model.activatable.extend(["org.a", "org.c"])
    (listed,) = answer(talk, order(driver_call(2, member)))
    seen = [DRIVER, "org.a", ":1.2", ME] if member == "ListNames" else [DRIVER, "org.a"]
    assert listed == tuple(seen)


@pytest.mark.parametrize(
    ("allowed", "denied"),
    [("see:", "see:org.a"), ("send:*", "see:org.a"), ("see:*,peer=host", "see:org.a")],
)
def test_lists_lack_every_name_of_an_owner_that_may_not_be_seen(allowed: str, denied: str) -> None:
    owners = {"org.a": ":1.2", "org.alias": ":1.2", "org.b": ":1.3"}
    talk = Dialogue(access(allowed, deny=[denied]), owners=owners)
    (listed,) = answer(talk, driver_call(2, "ListNames"))
    assert listed == (DRIVER, "org.b", ":1.3", ME)


def test_refused_list_is_passed_on() -> None:
    talk = Dialogue()
    talk.model.refuse["ListNames"] = (errors.FAILED, "no")
    assert answer(talk, driver_call(2, "ListNames")) == ("error Failed",)


# -- credentials ------------------------------------------------------------------------------------------

CREDENTIALS = {
    "UnixUserID": Variant("u", 1000),
    "ProcessFD": Variant("h", 0),
    "LinuxSecurityLabel": Variant("ay", b"unconfined\0"),
    "org.example.Handles": Variant("a(sh)", [("x", 0)]),
    "ProcessID": Variant("u", 7),
    "UnixGroupIDs": Variant("au", [1000, 27]),
}
KEPT = {name: value for name, value in CREDENTIALS.items() if "h" not in value.signature}


def credentials(
    to: Message, values: dict[str, Variant] = CREDENTIALS, *, signature: str = "a{sv}", fds: int = 1
) -> bytes:
    """Return the answer of a bus, dbus 1.16 if it has a descriptor."""
    body = pack(signature, [values] if signature == "a{sv}" else [7])
    reply = make_reply(to, sender=DRIVER, destination=ME)
    return changed(reply, signature=signature, body_length=len(body), unix_fds=fds) + body


@pytest.mark.parametrize("app_takes_fds", [True, False])
@pytest.mark.parametrize("serial", [2, 0xFFF00001])
@pytest.mark.parametrize("name", [ME, "org.a"])
def test_app_is_given_no_descriptor_of_a_process(
    name: str, serial: int, *, app_takes_fds: bool
) -> None:
    talk = Dialogue(access("see:org.a"), owners=OWNERS, app_takes_fds=app_takes_fds)
    talk.paused = True
    talk.app(driver_call(serial, "GetConnectionCredentials", "s", name))
    (asked,) = talk.waiting
    (got,) = talk.deliver(credentials(asked), fds=(33,))
    assert (got.fds, got.header.unix_fds, talk.host.closed) == ((), 0, [33])
    assert (got.header.reply_serial, got.header.sender) == (serial, DRIVER)
    assert unpack("a{sv}", got.raw[got.header.size :]) == [KEPT]


def test_credentials_with_nothing_but_a_descriptor_are_empty() -> None:
    talk = Dialogue()
    talk.paused = True
    talk.app(driver_call(2, "GetConnectionCredentials", "s", ME))
    answer = credentials(talk.waiting[0], {"ProcessFD": Variant("h", 0)})
    (got,) = talk.deliver(answer, fds=(33,))
    assert unpack("a{sv}", got.raw[got.header.size :]) == [{}]


def test_credentials_without_descriptors_are_passed_on_as_they_are() -> None:
    talk = Dialogue()
    talk.paused = True
    talk.app(driver_call(2, "GetConnectionCredentials", "s", ME))
    (got,) = talk.deliver(credentials(talk.waiting[0], KEPT, fds=0))
    assert unpack("a{sv}", got.raw[got.header.size :]) == [KEPT]
    assert not talk.host.closed


def test_credentials_that_are_none_are_the_end_with_the_descriptor_closed() -> None:
    talk = Dialogue()
    talk.paused = True
    talk.app(driver_call(2, "GetConnectionCredentials", "s", ME))
    with pytest.raises(PeerProtocolError, match=r"answered \(u\)"):
        talk.deliver(credentials(talk.waiting[0], signature="u"), fds=(33,))
    assert talk.host.closed == [33]


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("count", range(len(CREDENTIALS)))
def test_entries_keep_their_alignment_whatever_goes_before_them(
    count: int, order: Literal["little", "big"]
) -> None:
    names = list(CREDENTIALS)
    turned = {name: CREDENTIALS[name] for name in names[count:] + names[:count]}
    (asked,) = split(driver_call(2, "GetConnectionCredentials", "s", ME))
    message = credentials(Message(header=parse_header(asked), raw=asked), turned)
    if order == "big":
        message = in_big_order(message, turned)
    found = without_descriptors(message)
    header = parse_header(found)
    assert (header.little, header.unix_fds) == (order == "little", 0)
    left = {name: value for name, value in turned.items() if name in KEPT}
    assert unpack("a{sv}", found[header.size :], little=header.little) == [left]
    assert measure(found) == len(found)


def in_big_order(message: bytes, values: dict[str, Variant]) -> bytes:
    """Return the message as a big-endian bus would have written it."""
    out = bytearray(8)
    for name, value in values.items():
        out += bytes(-len(out) % 8) + struct.pack(">I", len(name)) + name.encode() + b"\0"
        out += bytes([len(value.signature)]) + value.signature.encode() + b"\0"
        out += bytes(-len(out) % 4)
        content = value.value
        if isinstance(content, bytes):
            out += struct.pack(">I", len(content)) + content
        elif value.signature == "a(sh)":
            out += struct.pack(">I", 12) + bytes(-(len(out) + 4) % 8)
            out += struct.pack(">I", 1) + b"x\0\0\0" + bytes(4)
        elif isinstance(content, list):
            out += struct.pack(f">{len(content) + 1}I", 4 * len(content), *content)
        else:
            out += struct.pack(">I", content)
    struct.pack_into(">I", out, 0, len(out) - 8)
    header = replace(parse_header(message), little=False, body_length=len(out))
    return serialise_header(header, sender=True) + bytes(out)


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
    for name, error in (("org.other", "error AccessDenied"), ("org.meow", "error ServiceUnknown")):
        assert answer(talk, request(name)) == (error,)
        for member in ("ReleaseName", "ListQueuedOwners"):
            assert answer(talk, order(driver_call(3, member, "s", name))) == (error,)
    assert answer(talk, request(":1.9")) == ("error InvalidArgs",)
    assert answer(talk, order(driver_call(3, "ReleaseName", "s", "org.me.x"))) == (1,)
    assert {denial.direction for denial in talk.host.denials} == {"own"}


def test_flags_that_are_not_defined_are_masked() -> None:
    talk = Dialogue(access("own:org.me"))
    talk.app(request("org.me", 0xFF))
    assert talk.model.requested == [("org.me", 7)]


def test_bug_9_queue_of_an_own_name_has_all_who_wait() -> None:
    talk = Dialogue(access("own:org.me"), owners=OWNERS)
    asked = driver_call(2, "ListQueuedOwners", "s", "org.me")
    assert answer(talk, asked) == (tuple(sorted(talk.model.uniques)),)
    assert len(talk.model.uniques) > 1


OWNING = [("RequestName", "su", (0,)), ("ReleaseName", "s", ()), ("ListQueuedOwners", "s", ())]


@pytest.mark.parametrize(("member", "signature", "more"), OWNING)
def test_program_p2_hidden_name_looks_absent_to_who_would_own_it(
    member: str, signature: str, more: tuple[int, ...]
) -> None:
    # org.b has an owner, org.no has none, and org.a2 is another name of an owner that may be seen.
    talk = Dialogue(access("see:org.a", "own:org.me", "send:org.talk"), owners=OWNERS)
    for name, error in (
        ("org.b", errors.SERVICE_UNKNOWN),
        ("org.no", errors.SERVICE_UNKNOWN),
        ("org.a", errors.ACCESS_DENIED),
        ("org.a2", errors.ACCESS_DENIED),
        ("org.talk", errors.ACCESS_DENIED),
    ):
        (got,) = talk.app(driver_call(2, member, signature, name, *more))
        assert got.header.error_name == error, name
        assert talk.host.denials[-1].direction == "own"
        assert (talk.host.denials[-1].peer, len(talk.host.denials)) == (name, 1)
        talk.host.denials.clear()
    assert not {"call RequestName", "call ReleaseName"} & set(names(talk.model.seen))
    (got,) = talk.app(driver_call(2, member, signature, "org.b", *more, flags=Flag.NO_AUTO_START))
    assert got.header.error_name == errors.NAME_HAS_NO_OWNER
    assert not talk.app(driver_call(2, member, signature, "org.b", *more, flags=NO_REPLY))
    assert talk.host.denials[-1].peer == "org.b"


def test_names_have_a_budget() -> None:
    talk = Dialogue(access("own:org.me.*"), limits=SandboxLimits(names=2))
    assert answer(talk, request("org.me.a")) == answer(talk, request("org.me.b")) == (1,)
    assert answer(talk, request("org.me.c")) == ("error LimitsExceeded",)
    assert answer(talk, request("org.me.a")) == (2,)
    assert answer(talk, driver_call(3, "ReleaseName", "s", "org.me.a")) == (1,)
    assert answer(talk, request("org.me.c")) == (1,)


def test_names_of_all_connections_are_counted_together() -> None:
    rules = access("own:org.me.*")
    talk, other = Dialogue(rules, limits=SandboxLimits(names=2)), Dialogue(rules, me=":1.8")
    talk.host.states.append(other.state)
    assert answer(other, request("org.me.a")) == answer(talk, request("org.me.b")) == (1,)
    assert answer(talk, request("org.me.c")) == ("error LimitsExceeded",)
    assert answer(talk, request("org.me.b")) == (2,)
    assert answer(other, driver_call(3, "ReleaseName", "s", "org.me.a")) == (1,)
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
    assert not talk.state.requested_names


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
