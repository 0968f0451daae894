"""What outlives what: the gate its supervisor; and that neither forgets nor tells twice."""

import os
import signal
from pathlib import Path
from typing import Any

from integration.harness.buses import Bus, open_dbus_broker
from integration.harness.processes import is_running
from integration.harness.rawclient import RawClient
from integration.harness.service import ECHO, PATH, running_service
from integration.harness.supervised import (
    CONTAINERS,
    CONTAINERS_PATH,
    MANAGE,
    MANAGE_PATH,
    NAME,
    SEND,
    Warden,
    open_warden,
    wait_for,
)
from integration.harness.values import Variant

KEEP = Variant("b", True)


def echo(client: RawClient) -> str | None:
    return client.call(ECHO, PATH, ECHO, "Echo", "s", ("hello",)).error


def removals(host: RawClient) -> list[str]:
    """Return what was told to have ended since the last time."""
    return [m.values[0] for m in host.drain() if m.header.member == "InstanceRemoved"]


def listen(bus: Bus) -> RawClient:
    host = RawClient.connect(bus.address)
    host.add_match(f"interface='{CONTAINERS}'")
    return host


def test_killed_supervisor_costs_no_app_its_connection(bus: Bus, folder: Path) -> None:
    runtime = folder / "run"
    with (
        running_service(bus.address),
        listen(bus) as host,
        open_warden(bus, runtime, orderly=False) as first,
    ):
        kept = first.add_server("kept", rules=[f"send:{ECHO}"], KeepAfterCreator=KEEP)
        followers = first.add_server("follower", rules=[f"send:{ECHO}"])
        read_end, write_end = os.pipe()
        piped = first.add_server("piped", fds={"CloseNotify": read_end})
        os.close(read_end)
        client, follower = first.connect(kept), first.connect(followers)
        stopped = first.add_server("stopped")
        first.stop_instance(stopped)
        assert removals(host) == [stopped.path]
        first.kill()
        assert is_running(first.gate_pid)
        assert echo(client) is None
        late = first.connect(kept)  # the gate goes on taking connections
        assert echo(late) is None
        os.close(write_end)  # the gate ends it without any supervisor
        wait_for(lambda: not piped.socket.exists())
        first.host.close()  # the creator of all leaves meanwhile
        with open_warden(bus, runtime) as second:
            assert second.gate_pid == first.gate_pid
            assert removals(host) == [piped.path]
            for one in (client, late):
                assert second.who(one.unique_name) == kept.path
                assert echo(one) is None
            assert second.show(kept)["metadata"] == {}
            wait_for(lambda: not second.show(followers)["listening"])
            assert second.who(follower.unique_name) == followers.path
            second.set_access(kept)
            assert echo(client) is not None
            new = second.add_server("new", KeepAfterCreator=KEEP)
            assert int(new.id[1:]) > int(stopped.id[1:])
            for sandbox in (kept, followers, new):
                second.stop_instance(sandbox)
            assert client.is_closed(2)
            told = removals(host)
            assert sorted(told) == sorted([kept.path, followers.path, new.path])


def test_orderly_end_tells_and_leaves_nothing(bus: Bus, folder: Path) -> None:
    with listen(bus) as host:
        with open_warden(bus, folder / "run") as warden:
            sandboxes = [warden.add_server(KeepAfterCreator=KEEP) for _ in range(3)]
            client = sandboxes[0].connect()  # not closed at the end of the block
        with client:
            assert client.is_closed(1)
        assert sorted(removals(host)) == sorted(sandbox.path for sandbox in sandboxes)
        with open_warden(bus, folder / "run") as again:
            assert again.list_sandboxes() == []
            new = again.add_server()
            assert int(new.id[1:]) == int(sandboxes[-1].id[1:]) + 1  # ids are not given again


def test_rules_are_stored_before_the_answer(bus: Bus, folder: Path) -> None:
    runtime = folder / "run"
    with open_warden(bus, runtime, orderly=False) as first:
        sandbox = first.add_server(KeepAfterCreator=KEEP)
        for n in range(20):
            first.set_access(sandbox, (SEND, f"org.example.N{n}", "/", ""))
        first.kill()
        with open_warden(bus, runtime) as second:
            assert second.show(sandbox)["access"] == [(False, "send:org.example.N19@/")]


def test_refusals_meanwhile_are_told_on_return(bus: Bus, folder: Path) -> None:
    runtime = folder / "run"
    with listen(bus) as host, open_warden(bus, runtime, orderly=False) as first:
        host.ask(NAME, MANAGE_PATH, MANAGE, "Subscribe")
        sandbox = first.add_server(KeepAfterCreator=KEEP)
        client = first.connect(sandbox)
        client.call("org.example.N", "/before", None, "M")
        wait_for(lambda: first.show(sandbox)["denied"] == 1)
        wait_for(lambda: "Denied" in [m.header.member for m in host.drain()])
        first.kill()
        for n in range(70):  # 50 a second are told one by one
            client.call("org.example.N", f"/meanwhile{n}", None, "M")
        with open_warden(bus, runtime) as second:
            wait_for(lambda: second.show(sandbox)["denied"] == 71)
            paths = {denial["path"] for denial in second.show(sandbox)["denials"]}
            assert "/meanwhile9" in paths
            # Who subscribed to the one before asks again, as it sees that the name has another owner.
            host.ask(NAME, MANAGE_PATH, MANAGE, "Subscribe")
            client.call("org.example.N", "/after", None, "M")
            assert host.wait_signal("Denied").values[1]["path"] == "/after"


def test_header_wishes_outlive_supervisor_and_gate(folder: Path) -> None:
    runtime = folder / "run"
    with (
        open_dbus_broker(folder) as bus,
        RawClient.connect(bus.address) as host,
        open_warden(bus, runtime, orderly=False) as first,
    ):
        sandbox = first.add_server(rules=["send:"], KeepAfterCreator=KEEP)
        host.ask(NAME, CONTAINERS_PATH, CONTAINERS, "RequestHeader")
        first.kill()
        with open_warden(bus, runtime) as second:
            check_tagged(second.connect(sandbox), host)
            os.kill(second.gate_pid, signal.SIGKILL)
            second.gate_pid = second.manage("Status")[0]["gate_pid"]
            wait_for(lambda: "served again" in second.log)
            check_tagged(second.connect(sandbox), host)


def check_tagged(client: RawClient, host: RawClient) -> None:
    """Call until the call says who calls: the wish is told to a new gate after it serves."""

    def is_tagged() -> bool:
        client.start_call(host.unique_name, "/x", "org.example.I", "M")
        host.sock.settimeout(10)
        return b"\x0a\x01o\0" in host.sock.recv(65536)

    wait_for(is_tagged)


def test_descriptors_of_the_supervisor_come_back(shared: Warden) -> None:
    def count() -> int:
        return len(list(Path(f"/proc/{shared.process.pid}/fd").iterdir()))

    shared.stop_instance(shared.add_server())
    before = count()
    read_end, write_end = os.pipe()
    for _ in range(20):
        fds = {"CloseNotify": read_end, "ReadyNotify": write_end}
        shared.stop_instance(shared.add_server(fds=fds))
        # Refused, with descriptors: and ones that no argument names.
        values: tuple[Any, ...] = ("nodots", "x", {}, {"CloseNotify": Variant("h", 0)})
        call = ("org.buswarden.Broker1", "/org/freedesktop/DBus", CONTAINERS)
        more = [read_end, write_end, read_end]
        reply = shared.host.call(*call, "AddServer", "ssa{sv}a{sv}", values, fds=more)
        assert reply.error is not None
        shared.host.call(*call, "Nonsense", "h", (0,), fds=more)
    wait_for(lambda: count() == before)
    for fd in (read_end, write_end):
        os.close(fd)


def test_any_number_of_long_lists_is_taken_over(folder: Path) -> None:
    rules = [(SEND, "", f"/n{n}/{'x' * 40_000}", "") for n in range(195)]
    with (
        open_dbus_broker(folder) as bus,
        running_service(bus.address),
        open_warden(bus, folder / "run", orderly=False) as first,
    ):
        client = first.connect(first.add_server(rules=[f"send:{ECHO}"], KeepAfterCreator=KEEP))
        # More of them than one frame of the gate's may carry.
        for _ in range(5):
            first.add_server(allow=rules, KeepAfterCreator=KEEP)
        first.kill()
        with open_warden(bus, folder / "run") as second:
            assert second.gate_pid == first.gate_pid
            (status,) = second.manage("Status")
            assert status["sandboxes"] == 6
            assert echo(client) is None
