"""Rules on real buses: broadcasts and unicast signals, out of sandboxes and into them."""

import pytest

from broker.wire.header import MessageType
from integration.harness.rawclient import BUS, BUS_PATH
from integration.harness.stage import (
    INTERFACE,
    OWNER_CHANGED,
    PATH,
    Stage,
    arrivals,
    listen,
    members,
    settle,
    signal,
    told,
)
from integration.harness.supervised import TYPE

APP = "org.example.Peer"


# out


def test_broadcast_goes_out_by_a_rule_without_a_name_or_with_the_bus_name(stage: Stage) -> None:
    host = listen(stage.host())
    for rule in (f"send::{INTERFACE}.Done", f"send:{BUS}:{INTERFACE}.Done"):
        app = stage.app(rule)
        assert signal(app, host)
        assert not signal(app, host, member="Undone")
        assert not signal(app, host, interface="org.example.Else")


def test_rule_with_another_name_lets_no_broadcast_out(stage: Stage) -> None:
    name = stage.name()
    host = listen(stage.host(name))
    app = stage.app(f"send:{name}", f"send:{name}.*", "see:")
    assert not signal(app, host)
    assert signal(app, host, name)


def test_broadcast_is_judged_by_its_path(stage: Stage) -> None:
    host, app = listen(stage.host()), stage.app(f"send:@{PATH}/*")
    assert signal(app, host, path=f"{PATH}/one")
    assert not signal(app, host, path=PATH)


def test_deny_stops_a_broadcast(stage: Stage) -> None:
    host, app = listen(stage.host()), stage.app("send:", deny=[f"send::{INTERFACE}.Undone"])
    assert signal(app, host)
    assert not signal(app, host, member="Undone")


# in


def test_subscription_is_no_permission(stage: Stage) -> None:
    name = stage.name()
    host = stage.host(name)
    app = listen(stage.app(f"see:{name}"))
    app.add_match(f"type='signal',sender='{name}'")
    assert not signal(host, app)
    stage.set_rules(app, f"receive:{name}")
    assert signal(host, app)


def test_permission_is_no_subscription(stage: Stage) -> None:
    host, app = stage.host(), stage.app("receive:")
    assert not signal(host, app)
    app.add_match("type='signal'")
    assert signal(host, app)
    app.remove_match("type='signal'")
    assert not signal(host, app)


def test_broadcast_of_the_host_needs_a_rule_whatever_the_default(stage: Stage) -> None:
    host, app = stage.host(), listen(stage.app(from_host=True))
    assert not signal(host, app)
    stage.set_rules(app, "receive:,peer=host")
    assert signal(host, app)


def test_broadcast_comes_in_by_sender_path_interface_and_member(stage: Stage) -> None:
    name = stage.name()
    host, stranger = stage.host(name), stage.host()
    app = listen(stage.app(f"receive:{name}@{PATH}/*:{INTERFACE}.D*"))
    assert signal(host, app, path=f"{PATH}/one")
    assert not signal(host, app)
    assert not signal(host, app, path=f"{PATH}/one", member="Undone")
    assert not signal(host, app, path=f"{PATH}/one", interface="org.example.Else")
    assert not signal(stranger, app, path=f"{PATH}/one")


def test_deny_receive_stops_a_broadcast(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), listen(stage.app("receive:", deny=[f"receive:{name}"]))
    assert not signal(host, app)
    assert host.release_name(name) == 1
    assert signal(host, app)


def test_broadcast_between_sandboxes_needs_both(stage: Stage) -> None:
    sender, receiver = stage.app(), listen(stage.app(app=APP))
    for send in (False, True):
        for receive in (False, True):
            stage.set_rules(sender, *(["send:"] if send else []))
            stage.set_rules(receiver, *(["receive:"] if receive else []))
            assert signal(sender, receiver) is (send and receive)


def test_peer_of_a_broadcast_is_judged_at_each_receiver(stage: Stage) -> None:
    red = listen(stage.app("receive:", app=APP, component="red"))
    blue = listen(stage.app("receive:", app=APP, component="blue"))
    sender = stage.app(f"send:,peer=app:{TYPE}/{APP}#red")
    assert signal(sender, red)
    assert not signal(sender, blue)
    stage.set_rules(sender, f"send:,peer=app:{TYPE}/{APP}")
    assert signal(sender, blue)
    arrivals(red)
    stage.set_rules(sender, "send:", deny=[f"send:,peer=app:{TYPE}/{APP}#blue"])
    assert signal(sender, red)
    assert not signal(sender, blue)
    arrivals(red)
    stage.set_rules(sender, "send:,peer=host")
    assert not signal(sender, red)
    assert signal(sender, listen(stage.host()))


def test_last_broadcast_of_who_left_is_judged_by_its_rules(stage: Stage) -> None:
    red = listen(stage.app("receive:", app=APP, component="red"))
    blue = listen(stage.app("receive:", app=APP, component="blue"))
    sender = stage.app(f"send:,peer=app:{TYPE}/{APP}#red")
    sender.emit(PATH, INTERFACE, "Done")
    settle(sender)
    stage.warden.stop_instance(stage.sandbox(sender))
    assert members(blue, MessageType.SIGNAL) == []
    assert members(red, MessageType.SIGNAL) == ["Done"]


def test_sandbox_does_not_hear_the_bus_without_a_rule(stage: Stage) -> None:
    app, name = stage.app(), stage.name()
    app.add_match(OWNER_CHANGED)
    app.add_match("type='signal'")
    host = stage.host(name)
    host.close()
    settle(app)
    assert told(app) == []


# unicast


def test_unicast_signal_of_the_host_needs_no_subscription(stage: Stage) -> None:
    host, app = stage.host(), stage.app()
    assert signal(host, app, app.unique_name)
    stage.set_rules(app, deny=["receive:"])
    assert not signal(host, app, app.unique_name)


def test_signal_to_nobody_vanishes(stage: Stage) -> None:
    app, host = stage.app("send:"), stage.host()
    assert not signal(app, host, "org.example.Absent.Name")
    assert not signal(app, host, ":1.4000000")
    assert not signal(app, host, BUS)


@pytest.mark.parametrize("member", ["ActivationFailure", "NameOwnerChanged", "NameAcquired"])
def test_forged_signals_of_the_bus_have_their_real_sender(stage: Stage, member: str) -> None:
    app, host = stage.app("send:"), stage.host()
    app.emit(BUS_PATH, BUS, member, "sss", ("a.b", "", ":1.1"), destination=host.unique_name)
    settle(app, host)
    forged = [each for each in host.queue if each.header.sender == app.unique_name]
    assert [each.header.member for each in forged] == [member]


def test_signal_with_a_forged_sender_has_the_real_one(stage: Stage) -> None:
    app, host = stage.app("send:"), listen(stage.host())
    app.emit(PATH, INTERFACE, "Done")
    settle(app)
    assert host.wait_signal("Done").header.sender == app.unique_name
