"""Threats F: rules, sandboxes and buses that change or end while messages are on their way."""

import os
import signal as signals
import threading
from pathlib import Path

import pytest

from broker.wire.header import MessageType
from integration.harness.buses import KINDS, open_bus
from integration.harness.messages import make_header, make_message
from integration.harness.other_user import NOBODY, as_user
from integration.harness.rawclient import BUS, CallError, RawClient, connect_socket
from integration.harness.scripts import auth, echo, open_fds
from integration.harness.service import ECHO, running_service
from integration.harness.stage import (
    DENIED,
    INTERFACE,
    OWNER_CHANGED,
    PASSED,
    PATH,
    UNKNOWN,
    Stage,
    arrivals,
    call,
    listen,
    members,
    mute_call,
    settle,
    signal,
    told,
)
from integration.harness.supervised import (
    CONTAINERS,
    CONTAINERS_PATH,
    MANAGE,
    MANAGE_PATH,
    NAME,
    PATH_SUBTREE,
    SEND,
    TYPE,
    Warden,
    open_warden,
    wait_for,
)
from integration.harness.threats import Scene, assert_rests, is_closed
from integration.harness.values import Variant

BATCH = 1500


@pytest.fixture
def stage(scene: Scene) -> Stage:
    """More apps and hosts, on the same gate."""
    return Stage(scene.warden)


def mute(client: RawClient, destination: str, member: str, number: int) -> bytes:
    """Return a call that wants no reply."""
    return client.make_mute_call(destination, PATH, INTERFACE, member, str(number))


# -- rules ---------------------------------------------------------------------------------------------------


def test_f1_right_that_is_taken_while_calls_wait(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    serials = [app.start_call(name, PATH, INTERFACE, "Do") for _ in range(5)]
    calls = [host.wait_call("Do") for _ in serials]
    stage.set_rules(app, deny=["send+receive+see+own:"])
    for _ in range(3):
        assert call(app, host, name) == UNKNOWN
        assert not mute_call(app, host, host.unique_name)
        assert not signal(app, host, name)
    for number, each in enumerate(calls):
        host.reply(each, "s", (str(number),))
    assert [app.wait_reply(serial).values for serial in serials] == [(str(n),) for n in range(5)]


def test_f2_change_in_the_middle_of_a_batch(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}:{INTERFACE}.Old")
    seen: list[tuple[str | None, int]] = []
    for old, new in (("Old", "New"), ("New", "Old")):
        batch = b"".join(mute(app, name, ("Old", "New")[n % 2], n) for n in range(BATCH))
        writer = threading.Thread(target=app.send_raw, args=(batch,))
        writer.start()
        stage.set_rules(app, f"send:{name}:{INTERFACE}.{new}")
        settle(stage.warden.host)
        writer.join()
        settle(app)
        seen = [(each.header.member, int(each.values[0])) for each in arrivals(host)]
        assert [number for _, number in seen] == sorted(number for _, number in seen)
        by_old = [number for member, number in seen if member == old]
        by_new = [number for member, number in seen if member == new]
        # One list judged each of them: all of the one up to a point, all of the other after it.
        first = 0 if old == "Old" else 1
        assert by_old == list(range(first, BATCH, 2))[: len(by_old)]
        assert by_new == list(range(1 - first, BATCH, 2))[BATCH // 2 - len(by_new) :]
        assert len(seen) in (BATCH // 2 - 1, BATCH // 2, BATCH // 2 + 1)
        assert call(app, host, name, member=old) == DENIED
        assert call(app, host, name, member=new) == PASSED


def test_f3_name_that_may_be_owned_no_more(stage: Stage) -> None:
    name, wanted = stage.name(), stage.name()
    host = stage.host(wanted)
    app = stage.app(f"own:{name}", f"own:{wanted}")
    assert app.request_name(name) == 1
    assert app.request_name(wanted, 0) == 2
    stage.set_rules(app)
    assert app.wait_signal("NameLost").values == (name,)
    assert host.request_name(name) == 1
    assert host.release_name(wanted) == 1
    assert host.driver("NameHasOwner", "s", wanted) == (False,)
    for each in (name, wanted):
        assert app.call(BUS, PATH, BUS, "RequestName", "su", (each, 0)).error == UNKNOWN


def test_f4_sight_that_comes_and_goes(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app()
    app.add_match(f"{OWNER_CHANGED},arg0='{name}'")
    for rule in (f"see:{name}", f"send:{name}", f"see:{name}.*"):
        stage.set_rules(app, rule)
        assert told(app) == [(name, "", host.unique_name)]
        assert app.name_owner(name) == host.unique_name
        stage.set_rules(app)
        assert told(app) == [(name, host.unique_name, "")]
        assert app.driver("NameHasOwner", "s", name) == (False,)


def test_f5_broadcasts_are_judged_as_they_come(stage: Stage) -> None:
    host, app, sender = stage.host(), stage.app(), stage.app()
    listen(app)
    listen(host)
    for _ in range(2):
        stage.set_rules(app, "receive:")
        stage.set_rules(sender, "send:")
        assert signal(host, app)
        assert signal(sender, host)
        arrivals(app)
        stage.set_rules(app)
        stage.set_rules(sender)
        assert not signal(host, app)
        assert not signal(sender, host)


@pytest.mark.parametrize("bad", ["send:org..x", "dance:", "send:a.b@nopath", "send:a.b:[x.Y"])
def test_f7_bad_list_is_refused_whole(stage: Stage, bad: str) -> None:
    good, other = stage.name(), stage.name()
    host, app = stage.host(good, other), stage.app(f"send:{good}:{INTERFACE}.Do")
    before = stage.warden.show(stage.sandbox(app))["access"]
    for replace in (False, True):
        with pytest.raises(CallError, match="InvalidArgs"):
            stage.warden.change_access(
                stage.sandbox(app), rules=[f"send:{other}", bad], deny=["send:"], replace=replace
            )
    usos = [(SEND | PATH_SUBTREE, other, "/", ""), (0x800, other, "/", "")]
    with pytest.raises(CallError, match="InvalidArgs"):
        stage.warden.set_access(stage.sandbox(app), *usos)
    assert stage.warden.show(stage.sandbox(app))["access"] == before
    assert call(app, host, good) == PASSED
    assert call(app, host, good, member="Undo") == DENIED


# -- sandboxes -------------------------------------------------------------------------------------------------


def test_f6_listening_that_stops(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    sandbox = stage.sandbox(app)
    stage.warden.stop_listening(sandbox)
    assert not sandbox.socket.exists()
    with pytest.raises(OSError, match=r"refused|No such file"):
        connect_socket(sandbox.address)
    assert call(app, host, name) == PASSED
    stage.set_rules(app)
    assert call(app, host, name) == UNKNOWN
    app.close()
    wait_for(lambda: sandbox.path not in [one["path"] for one in stage.warden.list_sandboxes()])


def test_f6_sandbox_that_is_stopped(scene: Scene, stage: Stage) -> None:
    name = stage.name()
    app = stage.owner(name)
    host, sandbox = stage.host(), stage.sandbox(app)
    more = [stage.warden.connect(sandbox) for _ in range(3)]
    silent = connect_socket(sandbox.address)
    half = connect_socket(sandbox.address)
    half.sendall(auth())
    serial = host.start_call(app.unique_name, PATH, INTERFACE, "Do")
    app.wait_call("Do")
    stage.warden.stop_instance(sandbox)
    assert not sandbox.socket.exists()
    for client in (app, *more):
        scene.assert_closed(client)
    for sock in (silent, half):
        assert is_closed(sock)
        sock.close()
    assert host.wait_reply(serial).error is not None
    wait_for(lambda: not host.driver("NameHasOwner", "s", name)[0])
    with pytest.raises(CallError, match="NotContainer"):
        stage.warden.change_access(sandbox, rules=["send:"])


# -- who may change it -------------------------------------------------------------------------------------------


def test_f8_no_sandbox_changes_anything(stage: Stage) -> None:
    # Whatever its rules let it say: the supervisor asks the gate who it is.
    app = stage.app("send+receive+see:", f"send:{NAME}")
    own = stage.sandbox(app)
    before = stage.warden.list_sandboxes()
    pairs = [(False, "send+own:")]
    usos = [(SEND | PATH_SUBTREE, "", "/", "")]
    for path, interface, member, signature, values in (
        (MANAGE_PATH, MANAGE, "ChangeAccess", "sa(bs)b", (own.id, pairs, False)),
        (CONTAINERS_PATH, CONTAINERS, "SetContainerAccess", "sa(usos)", (own.id, usos)),
        (CONTAINERS_PATH, CONTAINERS, "StopInstance", "o", (own.path,)),
        (CONTAINERS_PATH, CONTAINERS, "StopListening", "o", (own.path,)),
        (CONTAINERS_PATH, CONTAINERS, "AddServer", "ssa{sv}a{sv}", (TYPE, "x.y", {}, {})),
    ):
        assert app.call(NAME, path, interface, member, signature, values).error == DENIED
    assert [one["access"] for one in stage.warden.list_sandboxes()] == [
        one["access"] for one in before
    ]


def test_f8_gate_takes_one_supervisor_and_no_other_user(scene: Scene) -> None:
    path = scene.warden.folder / "gate.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    address = f"unix:path={path}"
    with connect_socket(address) as sock:
        assert is_closed(sock)
    if os.getuid() != 0:
        pytest.skip("the machine gives tests no root")

    def attempt() -> str:
        try:
            with connect_socket(address) as sock:
                return "closed" if is_closed(sock) else "taken"
        except OSError as exc:
            return type(exc).__name__

    assert as_user(NOBODY, attempt) == "PermissionError"
    # And if the modes were wrong: who it is decides.
    folders = [path, *path.parents[: len(path.parents) - 2]]
    modes = [each.stat().st_mode & 0o7777 for each in folders]
    try:
        for each in folders:
            each.chmod(0o777)
        assert as_user(NOBODY, attempt) == "closed"
    finally:
        for each, mode in zip(folders, modes, strict=True):
            each.chmod(mode)


# -- the bus ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_f9_bus_that_ends_and_starts_anew(kind: str, folder: Path) -> None:
    run = folder / "run"
    with open_bus(kind, folder) as first, open_warden(first, run, orderly=False) as one:
        rules = [f"send:{ECHO}"]
        kept = one.add_server(rules=rules, KeepAfterCreator=Variant("b", True))
        before = open_fds(one)
        apps = [one.connect(kept) for _ in range(3)]
        os.kill(first.pid, signals.SIGKILL)
        assert all(app.is_closed(3) for app in apps)
        one.kill()  # with its bus; the gate goes on (test_bus_loss.py: the supervisor waits for the bus)
        with connect_socket(kept.address) as sock:
            sock.sendall(auth() + b"BEGIN\r\n")
            assert is_closed(sock)
        assert_rests(one.gate_pid)
        (folder / "bus").unlink()
        with open_bus(kind, folder) as second, running_service(second.address):
            with open_warden(second, run) as two:
                assert (two.gate_pid, open_fds(two)) == (one.gate_pid, before)
                # The new bus gives the old names to others.
                hosts = {two.connect_host().unique_name for _ in range(20)}
                for app in apps:
                    assert app.unique_name not in hosts or _is_host(two, app.unique_name)
                late = two.connect(kept)
                echo(late)
                assert two.who(late.unique_name) == kept.path
                echo(two.connect(two.add_server(rules=rules)))
                two.tidy()
                assert open_fds(two) == before - 1  # its listening socket


def _is_host(warden: Warden, unique_name: str) -> bool:
    try:
        warden.who(unique_name)
    except CallError as exc:
        return exc.name.endswith("NotContainer")
    return False


# -- owners that are not known yet -----------------------------------------------------------------------------


def begin(stage: Stage, sandbox_of: RawClient, more: bytes = b"") -> RawClient:
    """Return a new connection that has said Hello, and these bytes, and has not been answered."""
    client = stage.warden.connect(stage.sandbox(sandbox_of), hello=False)
    header = make_header(
        MessageType.METHOD_CALL,
        client.next_serial(),
        path="/org/freedesktop/DBus",
        interface=BUS,
        member="Hello",
        destination=BUS,
    )
    client.send_raw(make_message(header) + more)
    return client


def finish(client: RawClient) -> RawClient:
    """Take the answer to Hello."""
    (client.unique_name,) = client.wait_reply(1).values
    return client


def test_f10_nothing_passes_before_the_owners_are_known(stage: Stage) -> None:
    secret = stage.name()
    host = stage.host(secret)
    app = stage.app("send+receive:", deny=[f"send+see+receive:{secret}"])
    number = int(app.unique_name.rpartition(".")[2])
    prefix = app.unique_name.removesuffix(str(number))
    for _ in range(5):
        data = b"".join(mute(app, each, "Do", 0) for each in (host.unique_name, secret) * 3)
        client = begin(stage, app, data)
        for _ in range(10):  # unique names can be guessed
            for guess in range(number, number + 8):
                host.emit(PATH, INTERFACE, "Done", destination=f"{prefix}{guess}")
        finish(client)
        settle(host)
        assert members(client, MessageType.SIGNAL) == []
        assert [each for each in arrivals(host) if each.header.sender == client.unique_name] == []
        assert call(client, host, host.unique_name) == UNKNOWN
        number = int(client.unique_name.rpartition(".")[2])
        client.close()


def test_f11_owner_that_comes_or_goes_at_the_beginning(stage: Stage) -> None:
    name = stage.name()
    host = stage.host()
    for rule in (f"send:{name}", f"send:{name}.*", f"send:{name[:-1]}?"):
        app = stage.app(rule)
        for _ in range(6):
            client = begin(stage, app)
            is_owner = host.driver("NameHasOwner", "s", name) == (False,)
            assert (host.request_name(name) if is_owner else host.release_name(name)) == 1
            finish(client)
            settle(client)
            for _ in range(2):
                expected = PASSED if is_owner else UNKNOWN
                assert call(client, host, host.unique_name) == expected
            client.close()
