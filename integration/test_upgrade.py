"""An upgrade of the gate: a new process serves, and nobody who talks through it can tell."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.wire.header import MessageType
from integration.harness.buses import Bus
from integration.harness.load import Caller, Emitter, Talker, under_load
from integration.harness.messages import make_header, make_message
from integration.harness.processes import is_running
from integration.harness.rawclient import CallError, RawClient, connect_socket
from integration.harness.service import ECHO, PATH, running_service
from integration.harness.stage import arrivals
from integration.harness.supervised import (
    MANAGE,
    MANAGE_PATH,
    NAME,
    Sandbox,
    Warden,
    open_warden,
    wait_for,
)
from integration.harness.values import Variant

TALK = (f"send:{ECHO}", "receive:", "own:org.example.mine.*", "see:")


@pytest.fixture
def warden(bus: Bus, folder: Path) -> Iterator[Warden]:
    """A supervisor on a bus that has the service."""
    with running_service(bus.address), open_warden(bus, folder / "run") as running_warden:
        yield running_warden


def upgrade(warden: Warden) -> int:
    """Have the gate replaced, and return the new one's process."""
    old, new = warden.manage("Upgrade")
    assert (old, new != old) == (warden.gate_pid, True)
    wait_for(lambda: not is_running(old))
    warden.gate_pid = new
    return int(new)


def echo(client: RawClient, text: str = "hello") -> None:
    reply = client.call(ECHO, PATH, ECHO, "Echo", "s", (text,))
    assert (reply.error, reply.values) == (None, (text,))


def memory_of(pid: int) -> int:
    """Return the bytes that are a process's own, with its share of others'."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    (kilobytes,) = [line.split()[1] for line in lines if line.startswith("Pss:")]
    return int(kilobytes) * 1024


def count_fds(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_twenty_upgrades_under_load(warden: Warden) -> None:
    sandboxes = [warden.add_server(rules=TALK) for _ in range(3)]
    apps = [warden.connect(sandbox) for sandbox in sandboxes for _ in range(2)]
    talkers = [Talker(app, seed) for seed, app in enumerate(apps[:4])]
    caller = Caller(warden.connect_host(), apps[4])
    apps[5].add_match(f"interface='{ECHO}',member='Tick'")
    apps[5].add_match(f"interface='{ECHO}',member='Last'")
    emitter = Emitter(warden.connect_host(), apps[5])
    warden.manage("Status")
    fds = count_fds(warden.gate_pid)
    with under_load([*talkers, caller, emitter]):
        for number in range(20):
            time.sleep(0.05 + number % 5 / 50)
            upgrade(warden)
            late = warden.connect(sandboxes[number % 3])  # the sockets are served, too
            echo(late)
            late.close()
    assert min(talker.calls for talker in talkers) > 20
    assert min(caller.calls, emitter.sent) > 20
    for client, sandbox in zip(apps, (s for s in sandboxes for _ in range(2)), strict=True):
        assert warden.who(client.unique_name) == sandbox.path
    wait_for(lambda: count_fds(warden.gate_pid) == fds)


def test_what_it_takes_does_not_grow(warden: Warden) -> None:
    sandbox = warden.add_server(rules=TALK)
    clients = [warden.connect(sandbox) for _ in range(10)]
    for client in clients:
        echo(client, "x" * 100_000)
    upgrade(warden)
    fds, memory = count_fds(warden.gate_pid), memory_of(warden.gate_pid)
    for _ in range(5):
        upgrade(warden)
        for client in clients:
            echo(client, "x" * 100_000)
    assert count_fds(warden.gate_pid) == fds
    assert memory_of(warden.gate_pid) < memory * 1.2 + 2_000_000


def test_calls_in_both_directions_are_answered_afterwards(warden: Warden) -> None:
    host = warden.connect_host()
    assert host.request_name("org.example.Slow") == 1
    sandbox = warden.add_server(rules=["send:org.example.Slow", "receive:"])
    app = warden.connect(sandbox)
    out = app.start_call("org.example.Slow", PATH, ECHO, "Out", "s", ("a",))
    back = host.start_call(app.unique_name, PATH, ECHO, "Back", "s", ("b",))
    asked, called = host.wait_call("Out"), app.wait_call("Back")
    upgrade(warden)
    host.reply(asked, "s", ("c",))
    app.reply(called, "s", ("d",))
    assert app.wait_reply(out).values == ("c",)
    assert host.wait_reply(back).values == ("d",)
    # Once, and no more.
    host.reply(asked, "s", ("again",))
    app.reply(called, "s", ("again",))
    assert [m for m in arrivals(app) if m.header.reply_serial == out] == []
    assert [m for m in arrivals(host) if m.header.reply_serial == back] == []


def test_names_and_their_queues_stay(warden: Warden) -> None:
    host = warden.connect_host()
    sandbox = warden.add_server(rules=TALK)
    owner, waiter = warden.connect(sandbox), warden.connect(sandbox)
    assert owner.request_name("org.example.mine.One") == 1
    assert host.request_name("org.example.mine.Two") == 1
    assert waiter.request_name("org.example.mine.Two", 0) == 2
    upgrade(warden)
    assert host.name_owner("org.example.mine.One") == owner.unique_name
    assert owner.request_name("org.example.mine.One") == 4
    host.release_name("org.example.mine.Two")
    # The bus also told it of its own unique name, when it said Hello.
    while waiter.wait_signal("NameAcquired").values != ("org.example.mine.Two",):
        pass
    warden.change_access(sandbox, rules=[f"send:{ECHO}"], replace=True)
    wait_for(lambda: "org.example.mine.One" not in host.list_names())
    assert "org.example.mine.Two" not in host.list_names()


def test_match_rules_stay_and_can_be_taken_away(warden: Warden) -> None:
    host = warden.connect_host()
    sandbox = warden.add_server(rules=TALK)
    app = warden.connect(sandbox)
    rule = f"type='signal',interface='{ECHO}'"
    app.add_match(rule)
    upgrade(warden)
    host.emit(PATH, ECHO, "First")
    assert app.wait_signal("First").header.sender == host.unique_name
    app.remove_match(rule)
    with pytest.raises(CallError, match="MatchRuleNotFound"):
        app.remove_match(rule)
    host.emit(PATH, ECHO, "Second")
    host.driver("GetId")
    assert arrivals(app) == []


def test_half_a_message_is_kept_with_its_descriptors(warden: Warden) -> None:
    sandbox = warden.add_server(rules=TALK)
    app, other = warden.connect(sandbox), warden.connect(sandbox)
    text = "half " * 40_000
    data, serial = _call_bytes(app, "Echo", "s", (text,))
    app.send_raw(data[: len(data) // 2])
    read_end, write_end = os.pipe()
    os.write(write_end, b"abc")
    os.close(write_end)
    with_fd, its_serial = _call_bytes(other, "Sum", "h", (0,), unix_fds=1)
    other.send_raw(with_fd[:30], [read_end])
    os.close(read_end)
    echo(warden.connect(sandbox))  # all of that has been read by now
    upgrade(warden)
    app.send_raw(data[len(data) // 2 :])
    other.send_raw(with_fd[30:])
    assert app.wait_reply(serial).values == (text,)
    (fd,) = other.wait_reply(its_serial).fds
    assert os.read(fd, 100).decode() == str(sum(b"abc"))
    os.close(fd)


def _call_bytes(
    client: RawClient, member: str, signature: str, values: tuple[object, ...], *, unix_fds: int = 0
) -> tuple[bytes, int]:
    serial = client.next_serial()
    header = make_header(
        MessageType.METHOD_CALL,
        serial,
        path=PATH,
        interface=ECHO,
        member=member,
        destination=ECHO,
        signature=signature,
        unix_fds=unix_fds,
    )
    return make_message(header, values), serial


def test_replies_that_nobody_reads_are_kept_in_order(warden: Warden) -> None:
    sandbox = warden.add_server(rules=TALK)
    app = warden.connect(sandbox)
    assert arrivals(app) == []
    texts = [f"{number} " * 100_000 for number in range(12)]
    asked = []
    for number, text in enumerate(texts):
        asked.append(app.start_call(ECHO, PATH, ECHO, "Echo", "s", (text,)))
        read_end, write_end = os.pipe()
        os.write(write_end, bytes([number]))
        os.close(write_end)
        asked.append(app.start_call(ECHO, PATH, ECHO, "Sum", "h", (0,), fds=[read_end]))
        os.close(read_end)
    wait_for(lambda: warden.show(sandbox)["use"]["bytes_queued"] > 1_000_000)
    wait_for(lambda: warden.show(sandbox)["use"]["fds"] > 3)
    upgrade(warden)
    assert warden.show(sandbox)["use"]["fds"] > 3
    for number, text in enumerate(texts):
        first, second = app.receive(), app.receive()
        assert [first.header.reply_serial, second.header.reply_serial] == asked[:2]
        del asked[:2]
        assert first.values == (text,)
        (fd,) = second.fds
        assert os.read(fd, 100).decode() == str(number)
        os.close(fd)


def test_handshakes_go_on_where_they_were(warden: Warden) -> None:
    sandbox = warden.add_server(rules=TALK)
    whole = b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n"
    whole += b"NEGOTIATE_UNIX_FD\r\nBEGIN\r\n"
    socks = [connect_socket(sandbox.address) for _ in range(5)]
    cuts = (0, 1, 10, len(whole) - 9, len(whole))
    for sock, cut in zip(socks, cuts, strict=True):
        sock.sendall(whole[:cut])
    greeted = warden.connect(sandbox, hello=False)
    echo(warden.connect(sandbox))
    upgrade(warden)
    for sock, cut in zip(socks, cuts, strict=True):
        sock.sendall(whole[cut:])
        sock.settimeout(10)
        answer = b""
        while answer.count(b"\r\n") < 2:
            answer += sock.recv(4096)
        assert answer.endswith(b"AGREE_UNIX_FD\r\n")
        sock.close()
    greeted.hello()
    echo(greeted)
    assert warden.who(greeted.unique_name) == sandbox.path


def test_rules_are_in_force_throughout(warden: Warden) -> None:
    sandbox = warden.add_server(rules=TALK)
    app = warden.connect(sandbox)
    echo(app)
    warden.change_access(sandbox, rules=["see:"], replace=True)
    upgrade(warden)
    assert app.call(ECHO, PATH, ECHO, "Echo", "s", ("no",)).error is not None
    warden.change_access(sandbox, rules=TALK, replace=True)
    echo(app)
    # Denied in the middle of it, by a change that is asked for while the old gate hands over.
    serial = warden.host.start_call(NAME, MANAGE_PATH, MANAGE, "Upgrade")
    for allowed in (False, True, False):
        warden.change_access(sandbox, rules=TALK if allowed else ["see:"], replace=True)
        error = app.call(ECHO, PATH, ECHO, "Echo", "s", ("now?",)).error
        assert (error is None) == allowed
    reply = warden.host.wait_reply(serial)
    assert reply.error is None
    warden.gate_pid = reply.values[1]
    assert warden.show(sandbox)["denied"] >= 3  # it counts on


def test_a_pipe_that_is_closed_meanwhile_ends_its_sandbox(warden: Warden) -> None:
    pipes = [os.pipe() for _ in range(6)]
    sandboxes = [warden.add_server(fds={"CloseNotify": read_end}) for read_end, _ in pipes]
    for read_end, _ in pipes:
        os.close(read_end)
    clients = [warden.connect(sandbox) for sandbox in sandboxes]
    serial = warden.host.start_call(NAME, MANAGE_PATH, MANAGE, "Upgrade")
    for _, write_end in pipes[:5]:
        time.sleep(0.05)
        os.close(write_end)
    reply = warden.host.wait_reply(serial)
    assert reply.error is None
    warden.gate_pid = reply.values[1]
    assert all(client.is_closed() for client in clients[:5])
    wait_for(lambda: [s["path"] for s in warden.list_sandboxes()] == [sandboxes[5].path])
    os.close(pipes[5][1])
    assert clients[5].is_closed()
    assert not any(sandbox.socket.exists() for sandbox in sandboxes)


def test_who_connects_meanwhile_waits_and_limits_hold(warden: Warden) -> None:
    sandbox = warden.add_server(rules=TALK)
    clients = [warden.connect(sandbox) for _ in range(8)]
    serial = warden.host.start_call(NAME, MANAGE_PATH, MANAGE, "Upgrade")
    clients += [warden.connect(sandbox) for _ in range(8)]
    reply = warden.host.wait_reply(serial)
    assert reply.error is None
    warden.gate_pid = reply.values[1]
    for client in clients:
        echo(client)
    assert _is_refused(sandbox)
    clients.pop().close()
    wait_for(lambda: not _is_refused(sandbox))


def _is_refused(sandbox: Sandbox) -> bool:
    try:
        sandbox.connect().close()
    except (EOFError, ConnectionError):
        return True
    return False


def test_the_supervisor_may_die_right_after_it_asked(bus: Bus, folder: Path) -> None:
    with running_service(bus.address), open_warden(bus, folder / "run", orderly=False) as first:
        sandbox = first.add_server(rules=TALK, KeepAfterCreator=Variant("b", True))
        app = first.connect(sandbox)
        first.host.start_call(NAME, MANAGE_PATH, MANAGE, "Upgrade")
        time.sleep(0.3)  # it may be anywhere in it
        first.kill()
        echo(app)
        with open_warden(bus, folder / "run") as second:
            assert second.who(app.unique_name) == sandbox.path
            echo(app)
            upgrade(second)
            echo(app)


def test_the_command_line_says_what_happened(warden: Warden) -> None:
    sandbox = warden.add_server(rules=TALK)
    app = warden.connect(sandbox)
    old = warden.gate_pid
    outcome = warden.cli("upgrade")
    assert outcome.ok, outcome.err
    (status,) = warden.manage("Status")
    warden.gate_pid = status["gate_pid"]
    assert outcome.out == f"the gate is process {warden.gate_pid} now, instead of {old}\n"
    echo(app)


def test_an_app_may_not_ask_for_it(warden: Warden) -> None:
    app = warden.connect(warden.add_server(rules=[f"send:{NAME}"]))
    reply = app.call(NAME, MANAGE_PATH, MANAGE, "Upgrade")
    assert reply.error is not None
    assert reply.error.endswith("AccessDenied")


def test_a_reload_replaces_the_gate(warden: Warden) -> None:
    app = warden.connect(warden.add_server(rules=TALK))
    warden.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "SIGHUP: gate process" in warden.log)
    (status,) = warden.manage("Status")
    assert status["gate_pid"] != warden.gate_pid
    warden.gate_pid = status["gate_pid"]
    echo(app)
