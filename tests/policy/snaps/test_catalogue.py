"""Every rule that is known of snapd, against what the catalogue makes of it."""

from collections import Counter
from functools import cache

import msgspec
import pytest

from policy.match import Judge
from policy.rules import Access, AccessList, Identity
from policy.snaps.catalogue_schema import SYSTEMS
from policy.snaps.compiler import Compiler
from policy.snaps.explain import Question, ask
from policy.snaps.installed import Port, Snap, SnapError, World, identity_of
from policy.snaps.library import load_library
from tests.helpers import facts
from tests.helpers.facts import PLUG_APP, SLOT_APP, Message, Scene

LIBRARY = load_library()
IDLE = [facts.replace_component(each, "idle") for each in (PLUG_APP, SLOT_APP)]


def tag(me: Identity) -> str:
    return f"snap.{me.app}.{me.component}"


class Asker:
    """Answers for one app, on whatever bus."""

    def __init__(self, access: AccessList, me: Identity) -> None:
        self._judge = cache(lambda bus: Judge(access, bus=bus, me=me))

    def allows(self, message: Message, *, broadcast: bool = False) -> bool:
        question = Question(
            access=Access(message.access),
            bus=message.bus,
            names=message.names,
            path=message.path,
            interface=message.interface,
            member=message.member,
            peer=message.peer,
            broadcast=broadcast,
        )
        return ask(self._judge(message.bus), question).allowed


def test_there_are_all_the_rules() -> None:
    made = Counter(
        {name: sum(map(len, known.sections.values())) for name, known in LIBRARY.interfaces.items()}
    )
    assert made == {name: len(facts.BY_NAME[name]["rules"]) for name in facts.INTERFACES}
    everybody = len(LIBRARY.every_snap.sections["every-snap"])
    assert everybody == 8
    assert made.total() + everybody == 866


@pytest.mark.parametrize("interface", facts.INTERFACES)
def test_verdicts_are_those_of_snapd(interface: str) -> None:
    seen: set[int] = set()
    for scene in facts.scenes(interface):
        compiler = Compiler(LIBRARY, scene.world())
        for me in (PLUG_APP, SLOT_APP, *IDLE):
            seen |= check_app(scene, me, compiler.access(tag(me)))
    missed = [
        rule
        for rule in facts.BY_NAME[interface]["rules"]
        if id(rule) not in seen and not facts.gives_nothing(rule)
    ]
    assert not missed


def check_app(scene: Scene, me: Identity, access: AccessList) -> set[int]:
    """Check one app of a scene; return which rules were seen to work."""
    mine = facts.rules_of(scene, me)
    known, asker = facts.Known(mine, scene, me), Asker(access, me)
    seen: set[int] = set()
    for rule in mine if me not in IDLE else []:
        for message in facts.examples(rule, scene, me):
            assert known.allows(message) or rule.get("effect") == "deny"
            seen.add(id(rule))
    for message in facts.tries(scene, me):
        assert asker.allows(message) == known.allows(message), (scene, me, message)
    return seen


@pytest.mark.parametrize("interface", facts.INTERFACES)
def test_nothing_is_left_out_for_snaps_with_good_names(interface: str) -> None:
    for scene in facts.scenes(interface):
        compiler = Compiler(LIBRARY, scene.world())
        assert not [text for each in compiler.tags for text in compiler.left_out(each)]


@pytest.mark.parametrize("interface", ["network-manager", "mpris", "avahi-observe", "bluez"])
def test_unconnected_is_what_is_permanent(interface: str) -> None:
    scene = facts.scenes(interface)[-1]
    world = msgspec.structs.replace(scene.world(), connections=())
    compiler = Compiler(LIBRARY, world)
    for me in (PLUG_APP, SLOT_APP):
        rules = [rule for rule in facts.rules_of(scene, me) if rule.get("when") != "connected"]
        known = facts.Known(rules, scene, me)
        asker = Asker(compiler.access(tag(me)), me)
        for rule in facts.rules_of(scene, me):
            for message in facts.examples(rule, scene, me):
                assert asker.allows(message) == known.allows(message)


def test_broadcasts_go_out_by_rules_without_a_name_or_with_that_of_the_bus() -> None:
    scene = Scene(interface="mpris", system="core", system_slot=False)
    judge = Judge(
        Compiler(LIBRARY, scene.world()).access(tag(SLOT_APP)), bus="session", me=SLOT_APP
    )
    path, properties = "/org/mpris/MediaPlayer2", "org.freedesktop.DBus.Properties"
    assert judge.broadcast(path, properties, "PropertiesChanged").allowed
    assert judge.broadcast(path, "org.mpris.MediaPlayer2.Player", "Seeked").allowed
    assert not judge.broadcast(path, "org.mpris.MediaPlayer2.TrackList", "TrackAdded").allowed
    assert not judge.broadcast("/other", properties, "PropertiesChanged").allowed


def test_who_may_be_talked_to_may_be_seen() -> None:
    # account-control names no bus name: only that the other end is the host.
    scene = Scene(interface="account-control", system="classic", system_slot=True)
    access = Compiler(LIBRARY, scene.world()).access(tag(PLUG_APP))
    judge = Judge(access, bus="system", me=PLUG_APP)
    assert judge.see(("org.freedesktop.Accounts",), None).allowed
    assert not judge.see(("org.example.App",), facts.STRANGER).allowed
    assert not Judge(access, bus="session", me=PLUG_APP).see(("org.x.Y",), None).allowed


def test_snaps_in_classic_confinement_may_do_everything() -> None:
    snap = Snap(name="free", apps=("app",), confinement="classic")
    for system in SYSTEMS:
        world, free = World(system=system, snaps=(snap,)), system == "classic"
        me = identity_of("free", "app")
        judge = Judge(Compiler(LIBRARY, world).access("snap.free.app"), bus="session", me=me)
        message = ("/a", "org.x.Y", "Z")
        assert judge.send(("org.x.Y",), *message, facts.STRANGER).allowed is free
        assert judge.receive((":1.5",), *message, None, broadcast=True).allowed is free
        assert judge.own("org.x.Y").allowed is free


def test_a_browser_without_a_sandbox_of_its_own_has_no_part_of_rtkit() -> None:
    scene = Scene(interface="browser-support", system="classic", system_slot=True)
    for allowed in (True, False):
        end = Port(interface="browser-support", attributes={"allow-sandbox": allowed})
        world = msgspec.structs.replace(
            scene.world(),
            snaps=(
                Snap(name="snapd", system=True, slots={"end": Port(interface="browser-support")}),
                Snap(name="consumer", apps=("app",), plugs={"end": end}),
            ),
        )
        judge = Judge(Compiler(LIBRARY, world).access(tag(PLUG_APP)), bus="system", me=PLUG_APP)
        path, interface = "/org/freedesktop/RealtimeKit1", "org.freedesktop.RealtimeKit1"
        for wanted, member in (
            (interface, "MakeThreadRealtime"),
            ("org.freedesktop.DBus.Properties", "Get"),
        ):
            verdict = judge.send((interface,), path, wanted, member, None)
            assert verdict.allowed is allowed


def test_interfaces_take_nothing_from_snaps_in_classic_confinement() -> None:
    plugs = {"b": Port(interface="browser-support"), "n": Port(interface="network-manager")}
    snap = Snap(name="free", apps=("app",), confinement="classic", plugs=plugs)
    world = World(
        snaps=(snap, LIBRARY.system_snap("classic")),
        connections=(("free:b", "snapd:browser-support"), ("free:n", "snapd:network-manager")),
    )
    access = Compiler(LIBRARY, world).access("snap.free.app")
    assert all(rule.origin.startswith("every-snap") for rule in access.rules)
    me = identity_of("free", "app")
    judge = Judge(access, bus="session", me=me)
    name = "org.gnome.GConf"
    assert judge.send((name,), "/a", "org.gnome.GConf.Server", "Get", None).allowed


@pytest.mark.parametrize("interface", ["calendar-service", "contacts-service"])
def test_the_services_of_unity_have_a_system_slot_on_classic(interface: str) -> None:
    assert interface in LIBRARY.system_snap("classic").slots
    assert interface not in LIBRARY.system_snap("core").slots


@pytest.mark.parametrize(
    "interface", ["polkit", "polkit-agent", "upower-observe", "locale-control", "steam-support"]
)
def test_what_depends_on_the_machine_is_there_if_it_says_so(interface: str) -> None:
    assert interface not in LIBRARY.system_snap("core").slots
    assert interface in LIBRARY.system_snap("core", there=(interface,)).slots
    with pytest.raises(SnapError, match="a core system has no slot 'unity7'"):
        LIBRARY.system_snap("core", there=(interface, "unity7"))
    with pytest.raises(SnapError, match="no slot 'nothing'"):
        LIBRARY.system_snap("core", there=("nothing",))


def test_parallel_instances_have_paths_of_the_desktop() -> None:
    end = {"end": Port(interface="unity7")}
    world = World(
        snaps=(
            Snap(name="snapd", system=True, slots=end),
            Snap(name="con-sumer_x1", apps=("app",), plugs=end),
        ),
        connections=(("con-sumer_x1:end", "snapd:end"),),
    )
    compiler = Compiler(LIBRARY, world)
    assert not compiler.left_out("snap.con-sumer_x1.app")
    paths = [rule.path or "" for rule in compiler.access("snap.con-sumer_x1.app").rules]
    assert any("con_sumer_x1" in path for path in paths)


def test_plugs_do_not_broadcast_what_is_for_the_apps_of_a_slot() -> None:
    scene = Scene(interface="bluez", system="core", system_slot=False)
    compiler = Compiler(LIBRARY, scene.world())
    login = ("/org/freedesktop/login1", "org.freedesktop.login1.Manager", "PrepareForShutdown")
    plug = Judge(compiler.access(tag(PLUG_APP)), bus="system", me=PLUG_APP)
    assert not plug.broadcast(*login).allowed
    assert plug.send((":1.7",), "/org/bluez", "org.bluez.Adapter1", "Start", SLOT_APP).allowed
    for name in LIBRARY.interfaces:
        for each in facts.scenes(name):
            if each.system_slot:
                continue
            for rule in Compiler(LIBRARY, each.world()).access(tag(PLUG_APP)).rules:
                if rule.peer is None or rule.peer.app != SLOT_APP.app or rule.deny:
                    continue
                assert Access.SEND not in rule.access or rule.name is not None, rule
