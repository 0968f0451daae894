"""A bus that dies and comes back costs the connections to it; sandboxes, other buses and their apps go on."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from integration.harness.apps import MARKS, App, Traffic, rules_of
from integration.harness.buses import BROKER, DAEMON, KINDS, Bus, open_bus
from integration.harness.processes import wait_gone
from integration.harness.rawclient import CallError, RawClient
from integration.harness.service import ECHO, PATH, running_service
from integration.harness.supervised import (
    MANAGE,
    MANAGE_PATH,
    NAME,
    Warden,
    open_warden,
    stop_and_check,
    wait_for,
)
from integration.harness.values import Variant

KEEP: Final = Variant("b", True)
DEATHS: Final = 3


@dataclass(slots=True)
class Mortal:
    """A bus that can be killed and started again at its address."""

    kind: str
    folder: Path
    bus: Bus | None = None
    _stack: ExitStack = field(default_factory=ExitStack)

    def start(self) -> Bus:
        self.folder.mkdir(exist_ok=True)
        self.bus = self._stack.enter_context(open_bus(self.kind, self.folder))
        self._stack.enter_context(running_service(self.bus.address))
        return self.bus

    def kill(self) -> None:
        assert self.bus is not None
        os.kill(self.bus.pid, signal.SIGKILL)
        self._stack.close()
        (self.folder / "bus").unlink(missing_ok=True)

    def close(self) -> None:
        self._stack.close()


@contextmanager
def mortal(kind: str, folder: Path) -> Iterator[Mortal]:
    bus = Mortal(kind, folder)
    bus.start()
    try:
        yield bus
    finally:
        bus.close()


def wait_service(bus: Bus) -> RawClient:
    """Return a host's connection to a bus that the supervisor is on again."""
    host = RawClient.connect(bus.address)
    wait_for(lambda: host.driver("NameHasOwner", "s", NAME) == (True,), 20)
    return host


def find(host: RawClient, key: str = "id") -> list[str]:
    (sandboxes,) = host.ask(NAME, MANAGE_PATH, MANAGE, "List")
    return [one[key] for one in sandboxes]


def tries(warden: Warden) -> list[float]:
    """Return the pauses before each try to connect again."""
    ends = [line.rpartition("next try in ")[2] for line in warden.log.splitlines()]
    return [float(end.split()[0]) for end in ends if end.endswith(" s") and end[0].isdigit()]


def wait_tries(warden: Warden, count: int) -> None:
    wait_for(lambda: len(tries(warden)) >= count, 30)


@pytest.mark.parametrize("kind", KINDS)
def test_one_bus_dies_again_and_again(kind: str, folder: Path) -> None:
    other = DAEMON if kind == BROKER else BROKER
    with mortal(kind, folder / "a") as dying, mortal(other, folder / "b") as steady:
        assert dying.bus is not None
        assert steady.bus is not None
        second = f"second={steady.bus.address}"
        with open_warden(dying.bus, folder / "run", "--bus", second) as warden:
            mine = warden.add_server("mine", allow=[rules_of(0)], KeepAfterCreator=KEEP)
            both = warden.add_server(Buses=Variant("as", ["second"]), KeepAfterCreator=KEEP)
            follower = warden.add_server("follower")
            with RawClient.connect(steady.bus.address) as host, Traffic() as traffic:
                traffic.add(make_app(host))
                for n in range(DEATHS):
                    client = mine.connect()
                    dying.kill()
                    warden.host.close()
                    assert client.is_closed()
                    client.close()
                    traffic.wait_calls(20)  # whoever is on the other bus notices nothing
                    assert {mine.id, both.id} <= set(find(host))
                    wait_tries(warden, len(tries(warden)) + 2)
                    again = dying.start()
                    warden.host = wait_service(again)
                    check_is_back(warden, mine.connect(), mine.path)
                    # Whose creator was on it is without a creator now.
                    wait_for(lambda: follower.id not in find(warden.host))
                    assert sorted(find(host)) == sorted(find(warden.host)), n
            assert not traffic.failures
            assert f"{follower.id}: ended (creator-gone)" in warden.log
            pauses = tries(warden)
            assert pauses[0] < 0.2 < max(pauses)


def make_app(host: RawClient) -> App:
    """Have a sandbox on the bus of this host, by the supervisor's being there, too."""
    warden = Warden(bus=None, runtime=Path(), process=None, host=host)  # type: ignore[arg-type]
    return App(warden.add_server("steady", allow=[rules_of(0)], KeepAfterCreator=KEEP))


def check_is_back(warden: Warden, client: RawClient, path: str) -> None:
    with client:
        assert warden.who(client.unique_name) == path
        assert client.call(ECHO, PATH, MARKS[0], "Echo", "s", ("x",)).error is None
        assert client.call(ECHO, PATH, MARKS[1], "Echo", "s", ("x",)).error is not None
    with pytest.raises(CallError):
        warden.who(warden.host.unique_name)


def test_header_wishes_end_with_their_bus_only(folder: Path) -> None:
    with mortal(BROKER, folder / "a") as dying:
        assert dying.bus is not None
        with open_warden(dying.bus, folder / "run") as warden:
            warden.containers("RequestHeader")
            assert wishes(warden) == 1
            warden.host.close()
            dying.kill()
            warden.host = wait_service(dying.start())
            wait_for(lambda: wishes(warden) == 0)
            warden.containers("RequestHeader")
            warden.host.close()
            warden.host = wait_service(dying.bus)
            wait_for(lambda: wishes(warden) == 0)


def wishes(warden: Warden) -> int:
    """Return how many the supervisor has stored."""
    import sqlite3  # noqa: PLC0415 - for this look only

    with sqlite3.connect(warden.folder / "state.db") as db:
        ((count,),) = db.execute("SELECT count(*) FROM tag").fetchall()
    db.close()
    return int(count)


@pytest.mark.parametrize("kind", KINDS)
def test_bus_and_supervisor_die_together(kind: str, folder: Path) -> None:
    runtime = folder / "run"
    with mortal(kind, folder / "a") as dying:
        assert dying.bus is not None
        with open_warden(dying.bus, runtime, orderly=False) as first:
            followers = [first.add_server("follower") for _ in range(3)]
            kept = first.add_server("kept", KeepAfterCreator=KEEP)
            first.kill()
            first.host.close()
            dying.kill()
            again = dying.start()
            # Whoever has the creator's name by now did not make anything.
            with ExitStack() as stack:
                others = [stack.enter_context(RawClient.connect(again.address)) for _ in range(9)]
                assert others
                with open_warden(again, runtime) as second:
                    wait_for(lambda: find(second.host) == [kept.id])
                    for one in followers:
                        assert f"{one.id}: ended (creator-gone)" in second.log


def test_it_ends_in_order_without_its_bus(folder: Path) -> None:
    with mortal(DAEMON, folder / "a") as dying:
        assert dying.bus is not None
        with open_warden(dying.bus, folder / "run", orderly=False) as warden:
            sandbox = warden.add_server(KeepAfterCreator=KEEP)
            dying.kill()
            wait_tries(warden, 2)
            stop_and_check(warden)
            assert f"{sandbox.id}: ended (stopped)" in warden.log


@pytest.mark.parametrize("kind", KINDS)
def test_gone_for_good(kind: str, folder: Path) -> None:
    config = folder / "config.toml"
    config.write_text("bus_gone_seconds = 1\n")
    with mortal(kind, folder / "a") as dying, mortal(kind, folder / "b") as steady:
        assert dying.bus is not None
        assert steady.bus is not None
        args = ("--bus", f"second={steady.bus.address}", "--config", str(config))
        with open_warden(dying.bus, folder / "run", *args, orderly=False) as warden:
            mine = warden.add_server("mine", KeepAfterCreator=KEEP)
            two = Variant("as", ["session", "second"])
            both = warden.add_server("both", Buses=two, KeepAfterCreator=KEEP)
            with RawClient.connect(steady.bus.address) as host:
                warden.host.close()
                dying.kill()
                wait_for(lambda: find(host) == [both.id])
                assert f"{mine.id}: ended (bus-gone)" in warden.log
                warden.host = wait_service(dying.start())  # late, but not too late
                assert find(warden.host) == [both.id]
                dying.kill()
            steady.kill()
            assert warden.process.wait() == 1
            assert wait_gone(warden.gate_pid)
            assert warden.log.splitlines()[-1].startswith("buswarden: no bus is left")
            assert f"{both.id}: ended (bus-gone)" in warden.log
