import pytest

from policy.rules import Peer
from policy.snaps.installed import SNAP_TYPE, Port, Snap, SnapError
from policy.snaps.rule_blocks import BlockMaker, End
from policy.text import format_rule, parse_rule
from tests.helpers.snapworlds import THING, library


def app(name: str | None) -> Peer:
    return Peer(kind="app", type=SNAP_TYPE, app="foo", component=name)


@pytest.mark.parametrize(
    ("apps", "having", "peers"),
    [
        (("a", "b"), None, [app(None)]),
        (("a", "b"), ("b", "a"), [app(None)]),
        (("a", "b", "hook.configure"), ("b", "a"), [app("a"), app("b")]),
        (("a", "b"), ("b",), [app("b")]),
        (("a",), None, [app("a")]),
        ((), None, []),
    ],
)
def test_a_whole_snap_is_one_peer(
    apps: tuple[str, ...], having: tuple[str, ...] | None, peers: list[Peer]
) -> None:
    port = Port(interface="mpris", apps=having)
    end = End(library(), "slot", Snap(name="foo", apps=apps, slots={"m": port}), "m")
    assert list(end.peers) == peers


def test_apps_share_what_is_alike_and_have_their_own_otherwise() -> None:
    interfaces = ("network-manager", "ubuntu-download-manager")
    ports = {name: Port(interface=name) for name in interfaces}
    plugs = Snap(name="foo", apps=("a", "b"), plugs=ports)
    slots = Snap(name="bar", apps=("svc",), slots=ports)
    maker = BlockMaker(library(), "core")
    found = []
    for name in interfaces:
        ends = End(library(), "plug", plugs, name), End(library(), "slot", slots, name)
        (_, blocks), _ = maker.connected(*ends)
        found.append(blocks)
    alike, different = found
    assert alike["snap.foo.a"] is alike["snap.foo.b"]
    paths = {rule.path for rule in different["snap.foo.a"].rules if rule.path}
    assert any("/snap_2efoo_2ea/" in path for path in paths)
    assert not any("/snap_2efoo_2eb/" in path for path in paths)


def test_a_condition_that_is_not_met_leaves_an_entry_out() -> None:
    host = library().system_snap("classic")
    attributes = {"action-prefix": "org.example"}
    maker = BlockMaker(library(), "classic")
    slot = End(library(), "slot", host, "polkit")
    for having, number in (({}, 0), (attributes, 4)):
        port = Port(interface="polkit", attributes=dict(having))
        snap = Snap(name="foo", apps=("a",), plugs={"p": port})
        made = maker.connected(End(library(), "plug", snap, "p"), slot)
        rules = [rule for _, blocks in made for block in blocks.values() for rule in block.rules]
        assert len(rules) == number
    with pytest.raises(SnapError, match="is not a text"):
        port = Port(interface="polkit", attributes={"action-prefix": ["org.example"]})
        End(library(), "plug", Snap(name="foo", apps=("a",), plugs={"p": port}), "p")


def test_all_compiled_rules_can_be_written_and_read() -> None:
    host = library().system_snap("classic")
    maker = BlockMaker(library(), "classic")
    for name in library().interfaces:
        port = Port(interface=name, attributes=dict(THING) | {"action-prefix": "a"})
        if name == "mpris":
            port = Port(interface=name)
        snap = Snap(name="foo", apps=("a",), plugs={"p": port}, slots={"p": port})
        plug, slot = End(library(), "plug", snap, "p"), End(library(), "slot", snap, "p")
        made = [blocks for _, blocks in maker.connected(plug, slot)]
        made += [maker.permanent(plug), maker.permanent(slot)]
        if name in host.slots:
            made += [
                blocks for _, blocks in maker.connected(plug, End(library(), "slot", host, name))
            ]
        for blocks in made:
            for block in blocks.values():
                for rule in block.rules:
                    again = parse_rule(format_rule(rule), deny=rule.deny, origin=rule.origin)
                    assert again == rule
