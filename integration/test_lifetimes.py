"""How sandboxes end, and that it is told exactly once: pipes, stops, creators, limits."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from integration.harness.buses import Bus
from integration.harness.processes import PYTHON, running
from integration.harness.rawclient import CallError, RawClient
from integration.harness.supervised import (
    CONTAINERS,
    CONTAINERS_PATH,
    NAME,
    TYPE,
    Sandbox,
    Warden,
    open_warden,
    wait_for,
)
from integration.harness.values import Variant

LIMITS_EXCEEDED = "org.freedesktop.DBus.Error.LimitsExceeded"
KEEP = Variant("b", True)


class Ends:
    """A host that listens for InstanceRemoved."""

    def __init__(self, warden: Warden) -> None:
        self._warden = warden
        self._client = warden.connect_host()
        self._client.add_match(f"sender='{NAME}',interface='{CONTAINERS}'")

    def wait(self) -> str:
        """Return the path of the next sandbox that ended."""
        return str(self._client.wait_signal("InstanceRemoved").values[0])

    def told(self) -> list[str]:
        """Return all that ended up to now: what the supervisor says next comes behind it."""
        self._warden.manage("Status")
        self._client.ask(NAME, CONTAINERS_PATH, "org.freedesktop.DBus.Peer", "Ping")
        signals = [m for m in self._client.drain(0) if m.header.member == "InstanceRemoved"]
        return [message.values[0] for message in signals]


@contextmanager
def pipe() -> Iterator[list[int]]:
    """Two ends, each closed at the end of the block unless it was taken out of the list."""
    ends = list(os.pipe())
    try:
        yield ends
    finally:
        for fd in ends:
            os.close(fd)


def is_over(warden: Warden, sandbox: Sandbox) -> bool:
    """Say whether the service knows it no more, and its socket is gone."""
    try:
        warden.containers("GetInstanceInfo", "o", sandbox.path)
    except CallError as exc:
        return exc.name.endswith("NotContainer") and not sandbox.socket.exists()
    return False


# -- the pipes ---------------------------------------------------------------------------------------------


def test_close_notify_ends_it_with_its_connections(shared: Warden) -> None:
    ends = Ends(shared)
    with pipe() as (read_end, write_end):
        sandbox = shared.add_server(fds={"CloseNotify": read_end})
        held = os.dup(write_end)
    clients = [shared.connect(sandbox) for _ in range(3)]
    assert clients[0].driver("GetId")  # our end of the read side is closed, which means nothing
    os.write(held, b"bytes mean nothing")
    assert clients[0].driver("GetId")
    os.close(held)
    assert ends.wait() == sandbox.path
    assert all(client.is_closed(2) for client in clients)
    assert is_over(shared, sandbox)
    assert ends.told() == []


def test_close_notify_waits_for_the_last_holder(shared: Warden) -> None:
    stack = ExitStack()
    with pipe() as (read_end, write_end):
        sandbox = shared.add_server(fds={"CloseNotify": read_end})
        argv = [PYTHON, "-c", "print('held', flush=True); input()"]
        holder = stack.enter_context(running(argv, pass_fds=[write_end]))
        holder.wait_line("held")
    assert shared.connect(sandbox).driver("GetId")
    holder.send_signal(signal.SIGKILL)
    wait_for(lambda: is_over(shared, sandbox))
    stack.close()


def test_close_notify_takes_a_socket_too(shared: Warden) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sandbox = shared.add_server(fds={"CloseNotify": theirs.fileno()})
    wait_for(lambda: is_over(shared, sandbox))


def test_close_notify_that_is_closed_already_ends_it_after_the_answer(shared: Warden) -> None:
    ends = Ends(shared)
    for _ in range(5):
        read_end, write_end = os.pipe()
        os.close(write_end)
        sandbox = shared.add_server(fds={"CloseNotify": read_end})
        os.close(read_end)
        assert ends.wait() == sandbox.path
        assert is_over(shared, sandbox)
    assert ends.told() == []


def test_with_close_notify_the_creator_may_leave(shared: Warden) -> None:
    creator = RawClient.connect(shared.bus.address)
    with pipe() as (read_end, write_end):
        sandbox = shared.add_server(creator=creator, fds={"CloseNotify": read_end})
        creator.close()
        wait_for(lambda: _has_left(shared, creator))
        assert shared.connect(sandbox).driver("GetId")
        assert shared.show(sandbox)["listening"]
        assert write_end
    wait_for(lambda: is_over(shared, sandbox))


def test_ready_notify_gets_one_byte_once_it_listens(shared: Warden) -> None:
    with pipe() as (read_end, write_end):
        sandbox = shared.add_server(fds={"ReadyNotify": write_end})
        assert len(os.read(read_end, 100)) == 1
        assert shared.connect(sandbox).driver("GetId")
        os.set_blocking(read_end, False)
        with pytest.raises(BlockingIOError):
            os.read(read_end, 100)
        assert os.get_blocking(write_end)  # the caller's descriptor is as it was


def test_ready_notify_of_who_does_not_read_keeps_nobody_waiting(shared: Warden) -> None:
    with pipe() as (_read_end, write_end):
        os.set_blocking(write_end, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(write_end, bytes(65536))
        os.set_blocking(write_end, True)
        assert shared.add_server(fds={"ReadyNotify": write_end}).socket.is_socket()
    assert shared.add_server().socket.is_socket()


def test_ready_notify_to_nobody_harms_nobody(shared: Warden) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    sandbox = shared.add_server(fds={"ReadyNotify": write_end})
    os.close(write_end)
    assert shared.connect(sandbox).driver("GetId")


# -- stops -----------------------------------------------------------------------------------------------


def test_stop_instance_tells_once_however_it_is_asked(shared: Warden) -> None:
    ends = Ends(shared)
    sandbox = shared.add_server()
    clients = [shared.connect(sandbox) for _ in range(3)]
    # Four at once: one of them ends it.
    values = ("o", (sandbox.path,))
    serials = [
        shared.host.start_call(NAME, CONTAINERS_PATH, CONTAINERS, member, *values)
        for member in ("StopInstance", "StopListening", "RemoveContainerServer", "StopInstance")
    ]
    errors = [shared.host.wait_reply(serial).error for serial in serials]
    assert None in errors
    assert {error for error in errors if error} <= {"org.freedesktop.DBus.Error.NotContainer"}
    assert all(client.is_closed(2) for client in clients)
    assert ends.told() == [sandbox.path]


def test_stop_listening_ends_it_with_the_last_connection(shared: Warden) -> None:
    ends = Ends(shared)
    sandbox = shared.add_server()
    first, second = shared.connect(sandbox), shared.connect(sandbox)
    shared.stop_listening(sandbox)
    assert not sandbox.socket.exists()
    first.close()
    assert second.driver("GetId")
    assert ends.told() == []
    second.close()
    assert ends.wait() == sandbox.path
    assert is_over(shared, sandbox)
    assert ends.told() == []


def test_stop_listening_without_connections_ends_it(shared: Warden) -> None:
    ends = Ends(shared)
    sandbox = shared.add_server()
    shared.stop_listening(sandbox)
    assert is_over(shared, sandbox)
    assert ends.told() == [sandbox.path]


def test_connection_that_did_not_say_hello_counts_as_one(shared: Warden) -> None:
    sandbox = shared.add_server()
    quiet = shared.connect(sandbox, hello=False)
    shared.stop_listening(sandbox)
    assert not is_over(shared, sandbox)
    assert quiet.hello()
    quiet.close()
    wait_for(lambda: is_over(shared, sandbox))


def test_many_ends_are_told_once_each(shared: Warden) -> None:
    ends = Ends(shared)
    creator = shared.connect_host()
    sandboxes = [shared.add_server(creator=creator) for _ in range(30)]
    for sandbox in sandboxes[::3]:
        shared.connect(sandbox).close()
    for sandbox in sandboxes[1::3]:
        shared.stop_instance(sandbox)
    creator.close()
    wait_for(lambda: not shared.list_sandboxes())
    told = ends.told()
    assert sorted(told) == sorted(sandbox.path for sandbox in sandboxes)


# -- the creator -------------------------------------------------------------------------------------------


def _has_left(warden: Warden, client: RawClient) -> bool:
    return not warden.host.driver("NameHasOwner", "s", client.unique_name)[0]


def test_creator_leaving_stops_the_listening_and_no_more(shared: Warden) -> None:
    ends = Ends(shared)
    creator, other = shared.connect_host(), shared.connect_host()
    mine, idle = shared.add_server(creator=creator), shared.add_server(creator=creator)
    theirs = shared.add_server(creator=other)
    client = shared.connect(mine)
    creator.close()
    assert ends.wait() == idle.path
    wait_for(lambda: not shared.show(mine)["listening"])
    assert not mine.socket.exists()
    assert client.driver("GetId")
    assert shared.who(client.unique_name) == mine.path
    assert shared.show(theirs)["listening"]
    client.close()
    assert ends.wait() == mine.path
    assert ends.told() == []


def test_kept_after_creator(shared: Warden) -> None:
    creator = shared.connect_host()
    kept = shared.add_server(creator=creator, KeepAfterCreator=KEEP)
    idle = shared.add_server(creator=creator)
    creator.close()
    wait_for(lambda: is_over(shared, idle))
    assert shared.show(kept)["listening"]
    assert shared.who(shared.connect(kept).unique_name) == kept.path


def test_creator_that_leaves_at_once_is_noticed(shared: Warden) -> None:
    # It does not even wait for the answer: whenever its end is seen, nothing is left listening.
    for _ in range(10):
        with RawClient.connect(shared.bus.address) as creator:
            values: tuple[Any, ...] = (TYPE, "gone", {}, {})
            creator.start_call(
                NAME, CONTAINERS_PATH, CONTAINERS, "AddServer", "ssa{sv}a{sv}", values
            )
    wait_for(lambda: not shared.list_sandboxes())
    assert list((shared.folder / "containers").iterdir()) == []


def test_a_stranger_leaving_changes_nothing(shared: Warden) -> None:
    sandbox = shared.add_server()
    stranger = shared.connect_host()
    stranger.close()
    wait_for(lambda: _has_left(shared, stranger))
    assert shared.show(sandbox)["listening"]


# -- limits ----------------------------------------------------------------------------------------------


@pytest.fixture
def small(bus: Bus, folder: Path) -> Iterator[Warden]:
    """A supervisor with small limits."""
    config = folder / "small.toml"
    config.write_text(
        "[limits]\nmax_containers = 4\nmax_containers_per_user = 3\n"
        "max_connections_per_container = 2\nmax_container_metadata_bytes = 100\n"
    )
    with open_warden(bus, folder / "run", "--config", str(config)) as warden:
        yield warden


def test_configured_limits_hold_and_free_themselves(small: Warden) -> None:
    _metadata_has_a_limit(small)
    _containers_have_a_limit(small)
    _connections_have_a_limit(small)


def _metadata_has_a_limit(small: Warden) -> None:
    with pytest.raises(CallError) as caught:
        small.add_server(metadata={"k": Variant("s", "x" * 100)})
    assert caught.value.name == LIMITS_EXCEEDED
    assert "max_container_metadata_bytes=100" in caught.value.text
    small.stop_instance(small.add_server(metadata={"k": Variant("s", "x" * 50)}))


def _containers_have_a_limit(small: Warden) -> None:
    sandboxes = [small.add_server() for _ in range(3)]
    client = small.connect(sandboxes[0])
    for creator in (small.host, small.connect_host()):
        with pytest.raises(CallError) as caught:
            small.add_server(creator=creator)
        assert caught.value.name == LIMITS_EXCEEDED
        assert "max_containers_per_user=3" in caught.value.text
    assert client.driver("GetId")
    small.stop_instance(sandboxes[1])
    again = small.add_server()
    assert again.id not in {sandbox.id for sandbox in sandboxes}
    # One that only has connections left counts still.
    small.stop_listening(sandboxes[0])
    with pytest.raises(CallError, match="max_containers_per_user"):
        small.add_server()
    client.close()
    wait_for(lambda: is_over(small, sandboxes[0]))
    small.tidy()


def _connections_have_a_limit(small: Warden) -> None:
    sandbox, other = small.add_server(), small.add_server()
    first, second = small.connect(sandbox), small.connect(sandbox, hello=False)
    with pytest.raises((EOFError, ConnectionError)):
        sandbox.connect()
    assert "max_connections_per_container=2" in small.log
    assert first.driver("GetId")
    assert second.hello()
    assert small.connect(other).driver("GetId")
    first.close()
    wait_for(lambda: len(small.show(sandbox)["connections"]) == 1)
    assert small.connect(sandbox).driver("GetId")


def test_max_containers_counts_those_of_all_users(bus: Bus, folder: Path) -> None:
    config = folder / "one.toml"
    config.write_text("[limits]\nmax_containers = 1\n")
    with open_warden(bus, folder / "run", "--config", str(config)) as warden:
        warden.add_server()
        with pytest.raises(CallError, match="max_containers=1"):
            warden.add_server()
