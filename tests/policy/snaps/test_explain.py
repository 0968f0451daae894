import itertools

import msgspec
import pytest

from policy.bus_calls import NEVER_INTERFACES, NEVER_MEMBERS
from policy.match import BUS_NAME
from policy.rules import Access, AccessList, Identity
from policy.snaps.compiler import Change, Compiler
from policy.snaps.explain import (
    TRYING,
    Explanation,
    Question,
    breadth,
    explain,
    explain_list,
    explaining,
    judge,
    narrowest_rule,
)
from policy.snaps.installed import Connection, Port, Snap, SnapError, World, parse_connection
from policy.snaps.library import parse_interface
from policy.text import format_rule, parse_rule
from tests.helpers.snapworlds import compiler, library

ME = Identity(type="org.t.T", app="me")
NM = Question(
    access=Access.SEND,
    bus="system",
    names=("org.freedesktop.NetworkManager", ":1.5"),
    path="/org/freedesktop/NetworkManager",
    interface="org.freedesktop.NetworkManager",
    member="GetDevices",
)
PLAYER = Question(
    access=Access.SEND,
    bus="session",
    names=(":1.9", "org.mpris.MediaPlayer2.provider"),
    path="/org/mpris/MediaPlayer2",
    interface="org.mpris.MediaPlayer2.Player",
    member="Pause",
    peer=Identity(type="io.snapcraft.snapd", app="provider", component="svc"),
)


def remedies(explanation: Explanation) -> list[str]:
    return [
        format_rule(each.rule) if each.rule else str(each.connection or f"plug {each.plug}")
        for each in explanation.remedies
    ]


def test_attack_c4_each_connection_that_is_tried_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    preview = Compiler.preview

    def counted(self: Compiler, connection: Connection) -> tuple[Change, ...]:
        tried.append(sum(done))
        return preview(self, connection)

    monkeypatch.setattr(Compiler, "preview", counted)
    done: list[int] = []
    made = compiler()
    for work in explaining(made, "snap.client.app", NM):
        done.append(work)  # noqa: PERF402 - as it comes: what is tried looks at the sum
    assert len(tried) > 1
    done_between = [after - before for before, after in itertools.pairwise(tried)]
    assert all(work >= TRYING for work in done_between)


def test_what_is_allowed_says_by_what() -> None:
    one = compiler(("client:network-manager", "snapd:network-manager"))
    found = explain(one, "snap.client.app", NM)
    assert found.verdict.allowed
    assert found.verdict.rule is not None
    assert found.origin == found.verdict.rule.origin
    assert found.origin.startswith("network-manager plug, connected client:network-manager")
    assert found.remedies == ()


def test_a_denial_says_the_rule_and_the_connections_that_would_allow_it() -> None:
    found = explain(compiler(), "snap.client.app", NM)
    assert not found.verdict.allowed
    assert found.origin == ""
    rule, system_slot, app_slot, *others = remedies(found)
    message = "/org/freedesktop/NetworkManager:org.freedesktop.NetworkManager.GetDevices"
    assert rule == f"send:org.freedesktop.NetworkManager@{message},peer=host,bus=system"
    assert system_slot == "client:network-manager snapd:network-manager"
    # On a classic system a plug may talk to the host's service whoever has the slot.
    assert app_slot == "client:network-manager provider:network-manager"
    # Bluetooth may talk to every service of a classic system, and opens more than the plugs above.
    assert others == [
        "client:bluez provider:bluez",
        "client:bluez snapd:bluez",
        "plug network-manager-observe",
        "plug steam-support",
    ]


def test_the_remedies_work() -> None:
    for question in (NM, PLAYER):
        one = compiler()
        for remedy in explain(one, "snap.client.app", question).remedies:
            me = Identity(type="io.snapcraft.snapd", app="client", component="app")
            if remedy.rule is not None:
                access = AccessList(rules=(remedy.rule,), receive_from_host=False)
                assert judge(access, me, question).allowed
            elif remedy.connection is not None:
                one.connect(remedy.connection)
                assert judge(one.access("snap.client.app"), me, question).allowed
                one.disconnect(remedy.connection)
                assert not judge(one.access("snap.client.app"), me, question).allowed


def test_the_other_end_says_which_snap() -> None:
    found = explain(compiler(), "snap.client.app", PLAYER)
    assert remedies(found)[0].endswith("peer=app:io.snapcraft.snapd/provider#svc,bus=session")
    # The plug `only` opens less: it is one app's.
    connections = ["client:only provider:mpris", "client:mpris provider:mpris"]
    assert remedies(found)[1:] == [*connections, "plug steam-support"]
    other = explain(compiler(), "snap.client.other", PLAYER)
    assert remedies(other)[1:] == [*connections[1:], "plug steam-support"]


def test_a_slot_finds_plugs() -> None:
    question = Question(
        access=Access.RECEIVE,
        bus="session",
        names=(":1.4",),
        path="/org/mpris/MediaPlayer2",
        interface="org.mpris.MediaPlayer2.Player",
        member="Pause",
        peer=Identity(type="io.snapcraft.snapd", app="second_x", component="app"),
    )
    found = explain(compiler(), "snap.provider.svc", question)
    assert "second_x:mpris provider:mpris" in remedies(found)
    assert not [text for text in remedies(found) if text.startswith("client:")]


def test_least_privilege_comes_first() -> None:
    found = explain(compiler(), "snap.client.app", NM)
    now = [each.opens for each in found.remedies if not each.plug]
    later = [each.opens for each in found.remedies if each.plug]
    assert now == sorted(now)
    assert later == sorted(later)
    assert now[0] == 1


def test_a_plug_that_the_snap_does_not_have() -> None:
    one = compiler()
    one.remove_snap("snapd")
    one.add_snap(Snap(name="bare", apps=("app",)))
    found = explain(one, "snap.bare.app", NM)
    assert remedies(found)[0].startswith("send:")
    assert "plug network-manager" in remedies(found)


def test_a_plug_that_needs_attributes_is_not_proposed() -> None:
    text = """
summary = "x"
system-slot = ["classic"]
[attributes.plug.name]
type = "bus-name"
required = true
[[plug.connected]]
access = ["send"]
"""
    known = parse_interface(text, name="needy", file="needy.toml")
    one = Compiler(
        msgspec.structs.replace(library(), interfaces={"needy": known}),
        World(snaps=(Snap(name="bare", apps=("app",)),)),
    )
    (remedy,) = explain(one, "snap.bare.app", NM).remedies
    assert remedy.rule == narrowest_rule(NM)


def test_against_a_deny_rule_no_allow_helps() -> None:
    one = compiler()
    one.add_snap(
        Snap(
            name="host",
            system=True,
            slots={"browser-support": Port(interface="browser-support")},
        )
    )
    one.connect(parse_connection("client:browser-support", "host:browser-support"))
    question = Question(
        access=Access.SEND,
        bus="session",
        names=("org.gnome.GConf",),
        path="/org/gnome/GConf/Server",
        interface="org.gnome.GConf.Server",
        member="Ping",
    )
    found = explain(one, "snap.client.app", question)
    assert not found.verdict.allowed
    assert found.remedies == ()
    assert found.origin.startswith("browser-support plug, connected client:browser-support")


def test_a_tag_of_nobody() -> None:
    with pytest.raises(SnapError, match="no app has the security tag"):
        explain(compiler(), "snap.nobody.app", NM)


def test_a_list_alone_is_explained_by_one_rule() -> None:
    allows = AccessList(rules=(parse_rule("send:org.x", origin="mine"),))
    question = Question(access=Access.SEND, bus="b", names=("org.x",), path="/", member="M")
    assert explain_list(allows, ME, question).origin == "mine"
    found = explain_list(AccessList(), ME, question)
    assert remedies(found) == ["send:org.x@/:M,peer=host,bus=b"]
    denies = AccessList(rules=(parse_rule("send:", deny=True, origin="no"),))
    found = explain_list(denies, ME, question)
    assert (found.origin, found.remedies) == ("no", ())


@pytest.mark.parametrize("access", list(Access))
@pytest.mark.parametrize("peer", [None, ME, Identity(type="org.t.T", app="b", component="c")])
@pytest.mark.parametrize("broadcast", [False, True])
def test_the_narrowest_rule_allows_just_this(
    access: Access, peer: Identity | None, broadcast: bool
) -> None:
    me = Identity(type="org.t.T", app="a")
    question = Question(
        access=access,
        bus="b",
        names=(":1.5", "org.x.Y"),
        path="/p",
        interface="i.j",
        member="M",
        peer=peer,
        broadcast=broadcast,
    )
    if access is Access.OWN:
        question = Question(access=access, bus="b", names=("org.x.Y",))
    rule = narrowest_rule(question)
    nothing = AccessList(receive_from_host=False)
    assert not judge(nothing, me, question).allowed
    assert judge(AccessList(rules=(rule,)), me, question).allowed
    assert parse_rule(format_rule(rule)) == rule


def test_breadth_grows_with_what_is_left_open() -> None:
    narrow = parse_rule("send:org.x@/a:i.j.M,peer=host,bus=b")
    some = parse_rule("send:org.x@/a/*:i.j.M,peer=host,bus=b")
    wide = parse_rule("send:")
    assert breadth([narrow]) == 1
    assert breadth([narrow]) < breadth([some]) < breadth([wide])
    assert breadth([narrow, some]) == breadth([narrow]) + breadth([some])
    assert breadth([parse_rule("send:", deny=True)]) == 0
    assert breadth([parse_rule("own:org.x,bus=b")]) == 1


def bus_call(member: str, interface: str | None = BUS_NAME) -> Question:
    return Question(
        access=Access.SEND,
        bus="session",
        names=(BUS_NAME,),
        path="/org/freedesktop/DBus",
        interface=interface,
        member=member,
    )


OPEN = ["Hello", "GetId", "AddMatch", "ListNames", "GetNameOwner", "NameHasOwner", "RequestName"]


@pytest.mark.parametrize("member", OPEN)
@pytest.mark.parametrize("interface", [BUS_NAME, None])
def test_program_p3_what_every_sandbox_may_call_needs_no_rule(
    member: str, interface: str | None
) -> None:
    found = explain_list(AccessList(), ME, bus_call(member, interface))
    assert found.verdict.allowed
    assert found.verdict.reason.startswith("every sandbox may call it")
    assert found.remedies == ()


@pytest.mark.parametrize("member", sorted(NEVER_MEMBERS))
def test_program_p3_no_rule_is_suggested_where_none_can_help(member: str) -> None:
    everything = AccessList(rules=(parse_rule("send+receive+own+see:"),))
    for interface in (BUS_NAME, None, *NEVER_INTERFACES):
        for access in (AccessList(), everything):
            found = explain_list(access, ME, bus_call(member, interface))
            assert not found.verdict.allowed
            assert found.verdict.reason == "no rule can allow it in a sandbox"
            assert found.remedies == ()
    tag = explain(compiler(), "snap.client.app", bus_call(member))
    assert (tag.verdict.allowed, tag.remedies) == (False, ())


def test_program_p3_the_rest_of_the_bus_is_explained_by_a_rule() -> None:
    found = explain_list(AccessList(), ME, bus_call("ReloadConfig"))
    assert not found.verdict.allowed
    (rule,) = remedies(found)
    access = AccessList(rules=(parse_rule(rule),))
    assert explain_list(access, ME, bus_call("ReloadConfig")).verdict.allowed
    assert not explain_list(access, ME, bus_call("BecomeMonitor")).verdict.allowed


def test_program_p3_by_rule_the_bus_is_judged_as_the_gate_judges() -> None:
    strict = AccessList(bus_by_rule=True)
    for member in ("GetId", "ListNames", "RequestName", "GetConnectionUnixUser"):
        found = explain_list(strict, ME, bus_call(member))
        assert not found.verdict.allowed
        assert remedies(found)
    for member in ("GetNameOwner", "AddMatch"):
        assert explain_list(strict, ME, bus_call(member)).verdict.allowed


def named(access: Access, *names: str) -> Question:
    return Question(access=access, bus="session", names=names)


def test_program_p3_own_and_see_are_explained() -> None:
    for access, rule in ((Access.OWN, "own:org.x"), (Access.SEE, "see:org.x,peer=host")):
        question = named(access, "org.x")
        found = explain_list(AccessList(), ME, question)
        assert not found.verdict.allowed
        assert remedies(found) == [f"{rule},bus=session"]
        allowed = AccessList(rules=(parse_rule(rule),))
        assert explain_list(allowed, ME, question).verdict.allowed
    assert explain_list(AccessList(), ME, named(Access.SEE, BUS_NAME)).verdict.allowed
    assert not explain_list(AccessList(), ME, named(Access.OWN, BUS_NAME)).verdict.allowed


def test_program_p3_to_own_a_name_by_rule_takes_the_call_as_well() -> None:
    owns = AccessList(rules=(parse_rule("own:org.x"),), bus_by_rule=True)
    found = explain_list(owns, ME, named(Access.OWN, "org.x"))
    assert not found.verdict.allowed
    none = explain_list(AccessList(bus_by_rule=True), ME, named(Access.OWN, "org.x"))
    assert remedies(none) == ["own:org.x,bus=session"]


@pytest.mark.parametrize("access", [Access.SEND, Access.RECEIVE, Access.SEE])
def test_program_p3_a_rule_for_a_unique_name_is_about_that_connection(access: Access) -> None:
    question = msgspec.structs.replace(NM, access=access, names=(":1.5",), bus="session")
    strict = AccessList(receive_from_host=False)
    (rule,) = (each.rule for each in explain_list(strict, ME, question).remedies)
    assert rule is not None
    assert rule.name == ":1.5"
    again = parse_rule(format_rule(rule))
    given = msgspec.structs.replace(strict, rules=(again,))
    assert explain_list(given, ME, question).verdict.allowed
    other = msgspec.structs.replace(question, names=(":1.6",))
    assert not explain_list(given, ME, other).verdict.allowed


@pytest.mark.parametrize("access", [Access.OWN, Access.SEE])
def test_program_p3_no_rule_about_all_names_is_suggested(access: Access) -> None:
    assert not explain_list(AccessList(), ME, named(access)).remedies
    assert not explain_list(AccessList(), ME, named(Access.OWN, ":1.5")).remedies
