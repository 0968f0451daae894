"""The command line against a broker that is a fake: what is asked, what is printed, the exit codes."""

import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.bus.connection import Destination
from broker.bus.values import Variant
from broker.cli import client, exec as exec_module
from broker.cli.commands import COMMANDS
from broker.cli.main import main
from broker.launcher.plan import Plan
from broker.wire.errors import NOT_CONTAINER, SERVICE_UNKNOWN, CallRefusedError, ConfigError

ADDRESS = "unix:path=/bus"
OTHER = "unix:path=/other"
PATH = "/org/freedesktop/DBus/Containers1/c7"
STATUS = {
    "version": Variant("s", "0.1"),
    "scope": Variant("s", "user"),
    "pid": Variant("u", 10),
    "gate_pid": Variant("u", 11),
    "engine": Variant("s", "gate"),
    "buses": Variant("a{ss}", {"session": ADDRESS, "system": OTHER}),
    "sandboxes": Variant("u", 1),
    "connections": Variant("u", 2),
    "limits": Variant("a{st}", {"max_containers": 10000}),
    "runtime_dir": Variant("s", "/run/user/0/buswarden"),
    "ended": Variant("a{su}", {"time-limit": 1, "stopped": 2}),
    "watched": Variant("a{ss}", {"processes": "3 by pidfds", "cgroups": "0 by inotify"}),
}
SANDBOX = {
    "id": Variant("s", "c7"),
    "path": Variant("o", PATH),
    "type": Variant("s", "org.example.T"),
    "app": Variant("s", "ap[p]\x1b"),
    "component": Variant("s", "part"),
    "metadata": Variant("a{sv}", {"k": Variant("ay", b"\x01\x02")}),
    "uid": Variant("u", 0),
    "creator": Variant("s", ":1.5"),
    "listening": Variant("b", True),
    "sockets": Variant("a{ss}", {"session": "/s"}),
    "addresses": Variant("a{ss}", {"session": "unix:path=/s"}),
    "connections": Variant("a(ss)", [("session", ":1.9")]),
    "engine": Variant("s", "gate"),
    "access": Variant("a(bs)", [(False, "send:org.x.Y"), (True, "own:org.x.Z")]),
    "receive_from_host": Variant("b", True),
    "portals_as_host": Variant("b", False),
    "denied": Variant("t", 3),
    "created": Variant("t", 0),
    "denials": Variant(
        "aa{sv}",
        [
            {
                "direction": Variant("s", "send"),
                "kind": Variant("s", "call"),
                "peer": Variant("s", "org.x.Z"),
                "path": Variant("s", "/x"),
                "interface": Variant("s", "org.x.I"),
                "member": Variant("s", "M"),
                "reason": Variant("s", "no rule"),
                "more": Variant("u", 2),
            }
        ],
    ),
}
ANSWERS: dict[str, list[Any]] = {
    "Status": [STATUS],
    "List": [[SANDBOX]],
    "Show": [SANDBOX],
    "ChangeAccess": [[(False, "send:org.x.Y")]],
    "AddServer": [PATH, b"/s/dbus-A\0", "unix:path=/s/dbus-A"],
    "StopInstance": [],
    "StopListening": [],
    "GetConnectionInstance": [PATH, {"UnixUserID": Variant("u", 0)}, "org.example.T", "app", {}],
}


class FakeBus:
    """A bus with a broker on it; keeps what it was asked."""

    def __init__(self, address: str, calls: list[tuple[Any, ...]], answers: dict[str, Any]) -> None:
        self.address = address
        self._calls = calls
        self._answers = answers

    async def call(
        self,
        target: Destination,
        member: str,
        signature: str = "",
        values: Sequence[object] = (),
        *,
        fds: Sequence[int] = (),
    ) -> list[Any]:
        self._calls.append((self.address, target.interface, member, signature, list(values)))
        for fd in fds:
            os.fstat(fd)
        answer = self._answers[member]
        if isinstance(answer, Exception):
            raise answer
        return list(answer)


class Broker:
    """What the commands talk to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: dict[str, Any] = dict(ANSWERS)
        self.absent = False

    def connect(self, address: str) -> AbstractAsyncContextManager[FakeBus]:
        return self._open(address)

    @asynccontextmanager
    async def _open(self, address: str) -> AsyncIterator[FakeBus]:
        if self.absent:
            raise ConfigError(f"cannot connect to the bus at {address}: not there")
        yield FakeBus(address, self.calls, self.answers)

    def values(self, member: str) -> list[Any]:
        found: list[list[Any]] = [call[4] for call in self.calls if call[2] == member]
        assert len(found) == 1, self.calls
        return found[0]


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    fake = Broker()
    monkeypatch.setattr(client, "connect_bus", fake.connect)
    monkeypatch.setenv("BUSWARDEN_BUS_ADDRESS", ADDRESS)
    return fake


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(broker: Broker, capsys: pytest.CaptureFixture[str]) -> Run:
    def run_it(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_it


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        pytest.param(["frob"], "No such command", id="command"),
        pytest.param(["list", "--frob"], "No such option", id="option"),
        pytest.param(["show"], "Missing argument 'ID'", id="argument"),
        pytest.param(["add", "--app", "x"], "Missing option '--type'", id="missing-option"),
        pytest.param(["add", "--type", "a.b", "--app", "x", "--meta", "k"], "KEY=VALUE", id="meta"),
        pytest.param(["access", "c1", "--allow", "send:org..x"], "character 9", id="bad-rule"),
        pytest.param(["exec", "--deny", "frob:x", "--", "true"], "character 1", id="bad-access"),
        pytest.param(["exec"], "COMMAND", id="no-command"),
        pytest.param(["exec", "--", "/nonexistent"], "no such command", id="not-there"),
        pytest.param(["who", ":1.5", "--bus", "x"], "no bus 'x', only session, system", id="bus"),
        pytest.param(["--address", "tcp:host=x", "list"], "unix sockets", id="transport"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(run: Run, argv: list[str], says: str) -> None:
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("buswarden: ")
    assert err.count("\n") == 1
    assert says in err


def test_no_command_at_all_shows_the_overview(run: Run) -> None:
    code, _out, err = run()
    assert code == 2
    assert all(command in err for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Run, command: str) -> None:
    code, out, _err = run(command, "--help")
    assert code == 0
    assert f"Usage: buswarden {command}" in out


def test_a_refusal_is_the_text_of_the_broker_and_exit_1(run: Run, broker: Broker) -> None:
    broker.answers["Show"] = CallRefusedError(NOT_CONTAINER, "no sandbox c9\nhere\x1b")
    assert run("show", "c9") == (1, "", "buswarden: no sandbox c9 here\\x1b\n")


def test_a_bus_without_a_broker(run: Run, broker: Broker) -> None:
    broker.answers["List"] = CallRefusedError(SERVICE_UNKNOWN, "not provided")
    code, _out, err = run("list")
    assert code == 1
    assert f"no broker on the bus at {ADDRESS}" in err


def test_a_bus_that_is_not_there(run: Run, broker: Broker) -> None:
    broker.absent = True
    code, _out, err = run("list")
    assert code == 1
    assert "not there" in err


def test_add_asks_for_a_sandbox_that_stays(run: Run, broker: Broker) -> None:
    argv = ["add", "--type", "a.b", "--app", "x", "--component", "c", "--meta", "k=v=w"]
    argv += ["--allow", "send:org.x.Y", "--deny", "own:org.x.Z", "--bus", "system"]
    assert run(*argv, "--portals-as-host") == (0, "c7 /s/dbus-A\n", "")
    assert broker.values("AddServer") == [
        "a.b",
        "x",
        {"k": Variant("s", "v=w")},
        {
            "Component": Variant("s", "c"),
            "Buses": Variant("as", ["system"]),
            "Rules": Variant("a(bs)", [[False, "send:org.x.Y"], [True, "own:org.x.Z"]]),
            "PortalsAsHost": Variant("b", True),
            "KeepAfterCreator": Variant("b", True),
        },
    ]


def test_add_in_json(run: Run) -> None:
    code, out, _err = run("add", "--type", "a.b", "--app", "x", "--json")
    assert code == 0
    assert json.loads(out)["socket"] == "/s/dbus-A"


def test_list_and_show_for_people(run: Run) -> None:
    code, out, _err = run("list")
    assert code == 0
    assert "org.example.T/ap[p]\\x1b#part" in out
    assert ":1.9" in out
    code, out, _err = run("show", "c7")
    assert code == 0
    for part in ("allow send:org.x.Y", "deny own:org.x.Z", "org.x.I.M", "2 more", "uid 0"):
        assert part in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    "argv", [["list"], ["show", "c7"], ["status"], ["who", ":1.9"], ["access", "c7"]]
)
def test_what_can_be_read_can_be_read_as_json(run: Run, argv: list[str]) -> None:
    code, out, _err = run(*argv, "--json")
    assert code == 0
    assert json.loads(out)


def test_status(run: Run) -> None:
    code, out, _err = run("status")
    assert code == 0
    assert "max_containers" in out
    assert OTHER in out
    assert "2 stopped, 1 time-limit" in out
    assert "3 by pidfds" in out


def test_access_changes_rules_and_prints_those_in_force(run: Run, broker: Broker) -> None:
    code, out, _err = run(
        "access", "c7", "--allow", "send:org.x.Y", "--deny", "see:a.b", "--replace"
    )
    assert (code, out) == (0, "allow send:org.x.Y\n")
    rules = [[False, "send:org.x.Y"], [True, "see:a.b"]]
    assert broker.values("ChangeAccess") == ["c7", rules, True]


def test_access_alone_only_looks(run: Run, broker: Broker) -> None:
    assert run("access", "c7") == (0, "allow send:org.x.Y\ndeny own:org.x.Z\n", "")
    assert [call[2] for call in broker.calls] == ["Show"]


def test_replace_alone_takes_everything_away(run: Run, broker: Broker) -> None:
    run("access", "c7", "--replace")
    assert broker.values("ChangeAccess") == ["c7", [], True]


@pytest.mark.parametrize("sandbox", ["c7", PATH])
def test_stop_takes_an_id_or_a_path(run: Run, broker: Broker, sandbox: str) -> None:
    assert run("stop", sandbox) == (0, "", "")
    assert broker.values("StopInstance") == [PATH]


def test_stop_can_keep_connections(run: Run, broker: Broker) -> None:
    run("stop", "c7", "--keep-connections")
    assert broker.values("StopListening") == [PATH]


def test_who_asks_on_the_bus_that_the_name_is_on(run: Run, broker: Broker) -> None:
    assert run("who", ":1.9", "--bus", "system") == (0, "c7 org.example.T/app#part\n", "")
    assert [(call[0], call[2]) for call in broker.calls] == [
        (ADDRESS, "Status"),
        (OTHER, "GetConnectionInstance"),
        (OTHER, "Show"),
    ]


def test_exec_gives_the_pipe_away_and_passes_the_exit_code_on(
    run: Run, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []

    def run_sandbox(plan: Plan) -> int:
        plans.append(plan)
        return 42

    monkeypatch.setattr(exec_module, "run_sandbox", run_sandbox)
    monkeypatch.setattr(exec_module, "find_bubblewrap", lambda: "bwrap")
    code, _out, _err = run("exec", "--allow", "send:org.x.Y", "--", "true", "--flag")
    assert code == 42
    type_, app, metadata, named = broker.values("AddServer")
    assert (type_, app, metadata) == (exec_module.DEFAULT_TYPE, "true", {})
    assert named == {
        "Rules": Variant("a(bs)", [[False, "send:org.x.Y"]]),
        "CloseNotify": Variant("h", 0),
    }
    assert plans[0].after[-2:] == ("true", "--flag")
    assert "/s/dbus-A" in [part.source for part in plans[0].parts]


def test_exec_runs_nothing_if_the_broker_refuses(run: Run, broker: Broker) -> None:
    broker.answers["AddServer"] = CallRefusedError("x.y", "max_containers is 3")
    code, out, err = run("exec", "--", "touch", "/nonexistent/x")
    assert (code, out, err) == (1, "", "buswarden: max_containers is 3\n")


def test_the_broker_is_found_in_this_order(tmp_path: Path) -> None:
    environ = {
        "BUSWARDEN_BUS_ADDRESS": "unix:path=/env",
        "XDG_RUNTIME_DIR": str(tmp_path),
        "DBUS_SESSION_BUS_ADDRESS": "unix:path=/session",
    }
    assert client.find_address("unix:path=/said", environ) == "unix:path=/said"
    assert client.find_address(None, environ) == "unix:path=/env"
    del environ["BUSWARDEN_BUS_ADDRESS"]
    (tmp_path / "buswarden").mkdir()
    (tmp_path / "buswarden/bus-address").write_text("unix:path=/file\n")
    assert client.find_address(None, environ) == "unix:path=/file"
    del environ["XDG_RUNTIME_DIR"]
    assert client.find_address(None, environ) == "unix:path=/session"
    del environ["DBUS_SESSION_BUS_ADDRESS"]
    with pytest.raises(client.NoBrokerError, match="buswarden run"):
        client.find_address(None, environ)


@pytest.mark.parametrize("before", [[], ["--address", ADDRESS]])
def test_the_proxy_reads_its_arguments_itself(run: Run, before: list[str]) -> None:
    code, out, err = run(*before, "proxy", "--filter")
    assert (code, out) == (1, "")
    assert err.startswith("buswarden proxy: --filter: ")


def test_by_another_name_it_is_the_proxy_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/xdg-dbus-proxy", "status"])
    assert main() == 1
    assert capsys.readouterr().err == "xdg-dbus-proxy: status: no socket PATH behind this ADDRESS\n"
