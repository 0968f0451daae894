"""Attacks on who is who: an app that hangs up with a backlog, and what other questions tell (docs/threats.md, G).

The attacker sends something that matters, then so much that the bus takes a while to read it, and closes. As long as
the bus has any of it, nobody may take the sender for a host: not the broker, nor who asks it, nor the rules of
another sandbox. The bus is stopped meanwhile, so that all of it is before the bus when it goes on. What then is first
is chance, so each is tried several times.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.wire.header import MessageType
from integration.harness.messages import Message
from integration.harness.processes import wait_gone
from integration.harness.rawclient import BUS, BUS_PATH, CallError, RawClient
from integration.harness.stage import Stage
from integration.harness.supervised import (
    CONTAINERS,
    CONTAINERS_PATH,
    MANAGE,
    MANAGE_PATH,
    NAME,
    Warden,
    wait_for,
)
from integration.harness.values import Variant

TIMES = 12
NOT_CONTAINER = "org.freedesktop.DBus.Error.NotContainer"
NO_OWNER = "org.freedesktop.DBus.Error.NameHasNoOwner"
NOT_KNOWN = "org.freedesktop.DBus.Error.Failed"
PATH = "/org/example/Thing"
INTERFACE = "org.example.Thing"
BACKLOG = 700  # messages, of some hundred bytes: what fits into the bus's socket
SIXTEEN = 16


def make_call(client: RawClient, destination: str, member: str, body: str = "") -> bytes:
    """Return a call that wants no reply."""
    return client.make_mute_call(destination, PATH, INTERFACE, member, body)


def make_backlog(client: RawClient, destination: str, count: int = BACKLOG) -> bytes:
    """Return much for the bus to read."""
    return b"".join(make_call(client, destination, "Noise") for _ in range(count))


@contextmanager
def stopped(warden: Warden) -> Iterator[None]:
    """Stop the bus during the block, so that it reads nothing."""
    os.kill(warden.bus.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(warden.bus.pid, signal.SIGCONT)


def warm_up(client: RawClient, *destinations: str) -> None:
    """Make the gate look up these names, because a stopped bus cannot answer."""
    client.send_raw(b"".join(make_call(client, each, "Noise") for each in destinations))
    client.driver("GetId")


def hang_up(warden: Warden, client: RawClient, data: bytes) -> None:
    """Send it all, and close; return when the gate has noticed, which the bus has not."""
    gate = Path(f"/proc/{warden.gate_pid}/fd")
    before = len(list(gate.iterdir()))
    client.send_raw(data)
    client.close()
    wait_for(lambda: len(list(gate.iterdir())) < before)


def calls_from(receiver: RawClient, sender: str) -> list[Message]:
    """Return the calls that come from there, and take everything else."""
    return [
        each
        for each in receiver.drain(0.1)
        if (each.header.type, each.header.sender) == (MessageType.METHOD_CALL, sender)
    ]


def answer_about(warden: Warden, name: str) -> str:
    """Return the instance that the broker names, or the error."""
    to = (NAME, CONTAINERS_PATH, CONTAINERS, "GetConnectionInstance", "s", (name,))
    reply = warden.host.call(*to, timeout=60)  # they may have much to do
    return reply.error or str(reply.values[0])


# -- I1 -------------------------------------------------------------------------------------------


def test_attack_i1_a_change_of_its_own_rules_is_never_carried_out(stage: Stage) -> None:
    warden = stage.warden
    sink = stage.host()
    for _ in range(TIMES):
        # As the catalogue has it for some plugs: whatever is of the host may be called.
        sandbox = warden.add_server(rules=["send:,peer=host"])
        client = warden.connect(sandbox)
        wanted = (sandbox.id, [(False, "own:org.example.Taken")], False)
        warm_up(client, NAME, sink.unique_name)
        with stopped(warden):
            client.start_call(NAME, MANAGE_PATH, MANAGE, "ChangeAccess", "sa(bs)b", wanted)
            hang_up(warden, client, make_backlog(client, sink.unique_name))
        sink.drain(0.1)
        assert (False, "own:org.example.Taken") not in warden.show(sandbox)["access"]


def test_attack_i1_b_service_that_asks_is_told_the_instance(stage: Stage) -> None:
    warden = stage.warden
    service = stage.host(name := stage.name())
    sandbox = warden.add_server(rules=[f"send:{name}"])
    for _ in range(TIMES):
        client = warden.connect(sandbox)
        warm_up(client, name)
        with stopped(warden):
            data = make_call(client, name, "Do") + make_backlog(client, name)
            hang_up(warden, client, data)
        assert service.wait_call("Do").header.sender == client.unique_name
        assert answer_about(warden, client.unique_name) in (sandbox.path, NO_OWNER)
        service.drain(0.1)


def test_attack_i1_c_last_connection_is_no_host_to_another_sandbox(stage: Stage) -> None:
    warden = stage.warden
    sink = stage.host()
    sender = warden.add_server(rules=["send:"])
    for _ in range(TIMES):
        name = stage.name()
        # It takes what the host sends, for no rule says otherwise.
        other = warden.add_server("org.example.Other", rules=[f"own:{name}"])
        client = warden.connect(sender)
        warm_up(client, sink.unique_name, name)
        backlog = make_backlog(client, sink.unique_name)
        with stopped(warden):
            hang_up(warden, client, backlog + make_call(client, name, "Do"))
            receiver = warden.connect(other, hello=False)
        receiver.hello()
        assert receiver.request_name(name) == 1
        assert not calls_from(receiver, client.unique_name)
        receiver.close()
        sink.drain(0.1)


def test_attack_i1_the_end_of_the_sandbox_hides_nobody(stage: Stage) -> None:
    warden = stage.warden
    service = stage.host(name := stage.name())
    for _ in range(TIMES):
        sandbox = warden.add_server(rules=[f"send:{name}"])
        client = warden.connect(sandbox)
        client.send_raw(make_call(client, name, "Do") + make_backlog(client, name))
        service.wait_call("Do")
        stop = warden.host.start_call(
            NAME, CONTAINERS_PATH, CONTAINERS, "StopInstance", "o", (sandbox.path,)
        )
        assert answer_about(warden, client.unique_name) in (sandbox.path, NO_OWNER)
        assert warden.host.wait_reply(stop).error is None
        # Its end is told when the bus has let go of all that it had.
        assert answer_about(warden, client.unique_name) == NO_OWNER
        service.drain(0.1)


def test_attack_i1_a_thousand_that_close_at_once(stage: Stage) -> None:
    warden = stage.warden
    service = stage.host(name := stage.name())
    sandboxes = [warden.add_server(rules=[f"send:{name}"]) for _ in range(63)]
    clients = [(each, warden.connect(each)) for each in sandboxes for _ in range(SIXTEEN)]
    for _, client in clients:
        client.send_raw(make_call(client, name, "Do") + make_backlog(client, name, 20))
    for _, client in clients:
        client.sock.close()
    for sandbox, client in clients[::50]:
        assert answer_about(warden, client.unique_name) in (sandbox.path, NO_OWNER)
    service.drain(0.5)
    wait_for(lambda: warden.manage("Status")[0]["connections"] == 0, 60.0)
    (status,) = warden.manage("Status")
    assert (status["use"]["lingering"], status["use"]["max_connections_per_container"]) == (0, 0)


def test_attack_i1_what_lingers_counts(stage: Stage) -> None:
    """A connection that the bus has not let go of takes a place; one that would be too many waits for it."""
    warden = stage.warden
    sink = stage.host()
    sandbox = warden.add_server(rules=["send:,peer=host"])
    for _ in range(3):
        clients = [warden.connect(sandbox) for _ in range(SIXTEEN)]
        for client in clients:
            client.send_raw(make_backlog(client, sink.unique_name, 300))
            client.close()
        again = [warden.connect(sandbox) for _ in range(SIXTEEN)]
        use = warden.show(sandbox)["use"]
        assert use["max_connections_per_container"] <= SIXTEEN
        for client in again:
            client.driver("GetId")
            client.close()
        sink.drain(0.1)
    assert "too-many-connections" not in warden.log


def test_attack_i1_callers_of_one_that_hangs_up_are_told(stage: Stage) -> None:
    """The bus answers in its place as soon as it has read all (C23)."""
    app = stage.app("receive:", "send:,peer=host")
    host, sink = stage.host(), stage.host()
    serial = host.start_call(app.unique_name, PATH, INTERFACE, "Do")
    app.wait_call("Do")
    app.send_raw(make_backlog(app, sink.unique_name, 300))
    app.close()
    assert host.wait_reply(serial).error == "org.freedesktop.DBus.Error.NoReply"


def test_attack_i1_over_an_upgrade(stage: Stage) -> None:
    warden = stage.warden
    service = stage.host(name := stage.name())
    sandbox = warden.add_server(rules=[f"send:{name}"])
    for _ in range(4):
        client = warden.connect(sandbox)
        client.send_raw(make_call(client, name, "Do") + make_backlog(client, name, 3000))
        client.close()
        (_, warden.gate_pid) = warden.manage("Upgrade")
        service.wait_call("Do")
        assert answer_about(warden, client.unique_name) in (sandbox.path, NO_OWNER)
        service.drain(0.1)
    wait_for(lambda: not warden.show(sandbox)["connections"])


def test_attack_i1_gate_that_died_leaves_no_hosts(warden: Warden) -> None:
    service, old_host = warden.connect_host(), warden.connect_host()
    service.request_name("org.example.Attacked")
    rules = ["send:org.example.Attacked", "send:org.example.Other.*", f"send:{NAME}"]
    sandbox = warden.add_server(rules=rules)
    for number in range(4):
        # It is stopped while the bus has much to read, so that the next gate is there before the bus is done.
        name = f"org.example.Other.n{number}"
        other = warden.add_server("org.example.Other", rules=[f"own:{name}"])
        client = warden.connect(sandbox)
        warm_up(client, "org.example.Attacked", name)
        with stopped(warden):
            data = make_call(client, "org.example.Attacked", "Do")
            data += make_backlog(client, "org.example.Attacked", BACKLOG - 50)
            hang_up(warden, client, data + make_call(client, name, "Do"))
            os.kill(warden.gate_pid, signal.SIGKILL)
            assert wait_gone(warden.gate_pid)
            receiver = warden.connect(other, hello=False)  # the next gate takes it
        assert service.wait_call("Do").header.sender == client.unique_name
        assert answer_about(warden, client.unique_name) in (NOT_KNOWN, NO_OWNER)
        warden.gate_pid = warden.manage("Status")[0]["gate_pid"]
        receiver.hello()
        assert receiver.request_name(name) == 1
        assert not calls_from(receiver, client.unique_name)
        client.close()
    # Who was there before, and is a host, is one still.
    assert answer_about(warden, old_host.unique_name) == NOT_CONTAINER
    again = warden.add_server(creator=old_host)
    app = warden.connect(again)
    old_host.start_call(app.unique_name, PATH, INTERFACE, "Do")
    assert app.wait_call("Do").header.sender == old_host.unique_name


# -- the wall: nothing of a sandbox reaches what manages the broker --------------------------------------


def test_attack_i1_wall_stands_whatever_the_rules_say(stage: Stage) -> None:
    warden = stage.warden
    app = stage.app("send:", "own:*", "see:")
    mine = stage.sandbox(app)
    broker = warden.host.name_owner(NAME)
    calls: list[tuple[Any, ...]] = [
        (MANAGE_PATH, MANAGE, "List", "", ()),
        (MANAGE_PATH, MANAGE, "Status", "", ()),
        (MANAGE_PATH, MANAGE, "ChangeAccess", "sa(bs)b", (mine.id, [], True)),
        (MANAGE_PATH, None, "ChangeAccess", "sa(bs)b", (mine.id, [], True)),
        (MANAGE_PATH, f"{MANAGE}.Policy", "Snaps", "", ()),
        (CONTAINERS_PATH, CONTAINERS, "AddServer", "ssa{sv}a{sv}", ("a.b", "x", {}, {})),
        (CONTAINERS_PATH, None, "StopInstance", "o", (mine.path,)),
        (CONTAINERS_PATH, CONTAINERS, "SetContainerAccess", "sa(usos)", (mine.id, [])),
        (CONTAINERS_PATH, CONTAINERS, "GetInstanceInfo", "o", (mine.path,)),
        (CONTAINERS_PATH, CONTAINERS, "RequestHeader", "", ()),
    ]
    for name in (NAME, broker):
        for call in calls:
            reply = app.call(name, *call)
            assert reply.error == "org.freedesktop.DBus.Error.AccessDenied"
            assert "built in" in reply.values[0], call
    with pytest.raises(CallError, match="built in"):
        app.request_name(NAME)
    origins = {each["origin"] for each in stage.denials(app) if each.get("kind")}
    assert len(origins) == 1
    assert all(origin.startswith("built in: the broker") for origin in origins)
    # A service in a sandbox may ask who calls it.
    asked = (name, CONTAINERS_PATH, CONTAINERS, "GetConnectionInstance", "s")
    assert app.ask(*asked, (app.unique_name,))[0] == mine.path


def test_attack_i1_explain_says_the_same_as_the_gate(stage: Stage) -> None:
    app = stage.app("send:")
    question = {
        "direction": Variant("s", "send"),
        "bus": Variant("s", "session"),
        "name": Variant("s", NAME),
        "path": Variant("s", MANAGE_PATH),
        "interface": Variant("s", MANAGE),
        "member": Variant("s", "ChangeAccess"),
    }
    interface = f"{MANAGE}.Policy"
    asked = (stage.sandbox(app).id, question)
    (why,) = stage.warden.host.ask(NAME, MANAGE_PATH, interface, "Explain", "sa{sv}", asked)
    assert not why["allowed"]
    assert why["origin"].startswith("built in: the broker")
    assert why["suggestions"] == []


# -- I2 -------------------------------------------------------------------------------------------


def test_attack_i2_service_that_starts_gets_no_untagged_call(stage: Stage) -> None:
    """A service asks for field 10, then takes the name that an app keeps calling."""
    warden = stage.warden
    if not warden.bus.forwards_unknown_fields:
        return  # RequestHeader is refused there
    for _ in range(20):
        name = stage.name()
        app = stage.app(f"send:{name}")
        app.send_raw(make_call(app, name, "Do"))  # it is remembered
        app.driver("GetId")
        service = stage.host()
        service.ask(NAME, CONTAINERS_PATH, CONTAINERS, "RequestHeader")
        data = b"".join(make_call(app, name, "Do") for _ in range(100))
        app.send_raw(data)
        service.start_call(BUS, BUS_PATH, BUS, "RequestName", "su", (name, 4))
        app.send_raw(data)
        app.driver("GetId")
        service.driver("GetId")
        calls = [m for m in service.queue if m.header.type == MessageType.METHOD_CALL]
        assert calls
        assert all(m.header.has_unknown for m in calls)
        service.close()
        app.close()


def test_attack_i2_what_was_on_its_way_does_not_overtake_the_answer(stage: Stage) -> None:
    """Sent to another owner of the name, and read by the bus when the name is the service's."""
    warden = stage.warden
    if not warden.bus.forwards_unknown_fields:
        return
    for _ in range(TIMES):
        older, service = stage.host(name := stage.name()), stage.host()
        app = stage.app(f"send:{name}")
        warm_up(app, name)
        with stopped(warden):
            app.send_raw(b"".join(make_call(app, name, "Do") for _ in range(BACKLOG)))
            older.start_call(BUS, BUS_PATH, BUS, "ReleaseName", "s", (name,))
            header = service.start_call(NAME, CONTAINERS_PATH, CONTAINERS, "RequestHeader")
        assert service.wait_reply(header, 30).error is None
        assert service.request_name(name) == 1
        app.send_raw(make_call(app, name, "Do"))
        calls = [service.wait_call("Do"), *calls_from(service, app.unique_name)]
        assert all(m.header.has_unknown for m in calls)
        for client in (older, service, app):
            client.close()


def test_attack_i2_broadcasts_have_it_too(stage: Stage) -> None:
    warden = stage.warden
    if not warden.bus.forwards_unknown_fields:
        return
    app, service = stage.app("send:"), stage.host()
    service.add_match(f"type='signal',interface='{INTERFACE}'")
    service.ask(NAME, CONTAINERS_PATH, CONTAINERS, "RequestHeader")
    for _ in range(3):
        app.emit(PATH, INTERFACE, "Done")
        assert service.wait_signal("Done").header.has_unknown


def test_attack_i2_next_gate_tags_from_the_first_message_on(warden: Warden) -> None:
    """An app is back before the next gate has heard of everybody who wants the field."""
    if not warden.bus.forwards_unknown_fields:
        return
    service = warden.connect_host()
    service.request_name("org.example.Tagged")
    service.ask(NAME, CONTAINERS_PATH, CONTAINERS, "RequestHeader")
    sandboxes = [warden.add_server(rules=["send:org.example.Tagged"]) for _ in range(60)]
    for _ in range(3):
        os.kill(warden.gate_pid, signal.SIGKILL)
        assert wait_gone(warden.gate_pid)
        app = warden.connect(sandboxes[0])
        app.send_raw(make_call(app, "org.example.Tagged", "Do"))
        assert service.wait_call("Do").header.has_unknown
        app.close()
        warden.gate_pid = warden.manage("Status")[0]["gate_pid"]


# -- I3 -------------------------------------------------------------------------------------------


def test_attack_i3_sandbox_learns_nothing_by_guessing_ids(stage: Stage) -> None:
    app, other = stage.app(f"send:{NAME}"), stage.app(app="org.example.Secret")
    secret = stage.sandbox(other).path
    answers = [
        app.call(NAME, CONTAINERS_PATH, CONTAINERS, "GetInstanceInfo", "o", (path,))
        for path in (secret, secret.rpartition("/c")[0] + "/c777")
    ]
    there, absent = ((reply.error, str(reply.values)) for reply in answers)
    assert there == absent
    assert "Secret" not in there[1]
