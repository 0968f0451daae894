"""Several buses on the command line, against a broker that is a fake."""

import json
from typing import Any

import pytest

from broker.bus.values import Variant
from broker.cli import exec as exec_module
from broker.launcher.plan import Plan
from tests.cli import test_main
from tests.cli.test_main import SANDBOX, Broker, Run

broker, run = test_main.broker, test_main.run  # fixtures
SOCKETS = {"session": "/s/dbus-A", "system": "/s/dbus-B"}
BOTH = ("--bus", "session", "--bus", "system")


@pytest.fixture(autouse=True)
def two_sockets(broker: Broker) -> None:
    broker.answers["Show"] = [SANDBOX | {"sockets": Variant("a{ss}", SOCKETS)}]


def test_add_prints_the_socket_of_each_bus(run: Run) -> None:
    argv = ("add", "--type", "a.b", "--app", "x", *BOTH)
    assert run(*argv)[1] == "c7 /s/dbus-A session\nc7 /s/dbus-B system\n"
    assert json.loads(run(*argv, "--json")[1])["sockets"] == SOCKETS


@pytest.mark.parametrize("buses", [(), ("--bus", "system")])
def test_add_names_the_bus_of_a_single_socket_in_json(run: Run, buses: tuple[str, ...]) -> None:
    argv = ("add", "--type", "a.b", "--app", "x", *buses)
    assert run(*argv)[1] == "c7 /s/dbus-A\n"
    name = buses[-1] if buses else "session"
    assert json.loads(run(*argv, "--json")[1])["sockets"] == {name: "/s/dbus-A"}


def test_exec_gives_the_command_each_bus(
    run: Run, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []

    def run_sandbox(plan: Plan) -> int:
        plans.append(plan)
        return 0

    monkeypatch.setattr(exec_module, "run_sandbox", run_sandbox)
    assert run("exec", *BOTH, "--", "true")[0] == 0
    assert broker.values("AddServer")[3]["Buses"] == Variant("as", ["session", "system"])
    assert set(SOCKETS.values()) <= {part.source for part in plans[0].parts}


@pytest.mark.parametrize(
    "argv",
    [
        ("exec", "--allow", "send:a.b,bus=system", "--", "true"),
        ("exec", "--bus", "session", "--deny", "send:a.b,bus=system", "--", "true"),
        ("add", "--type", "a.b", "--app", "x", "--allow", "send:a.b,bus=system"),
    ],
)
def test_a_rule_for_a_bus_that_it_has_not_adds_nothing(
    run: Run, broker: Broker, argv: tuple[str, ...]
) -> None:
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err == (
        "buswarden: rule 'send:a.b,bus=system': the sandbox has no bus 'system', only session\n"
    )
    assert not added(broker)


def test_access_looks_at_the_buses_only_for_a_rule_that_names_one(run: Run, broker: Broker) -> None:
    assert run("access", "c7", "--allow", "send:a.b")[0] == 0
    assert [call[2] for call in broker.calls] == ["ChangeAccess"]
    assert run("access", "c7", "--allow", "send:a.b,bus=system")[0] == 0
    assert run("access", "c7", "--allow", "send:a.b,bus=other")[0] == 2
    assert [call[2] for call in broker.calls[1:]] == ["Show", "ChangeAccess", "Show"]


def added(broker: Broker) -> list[Any]:
    return [call for call in broker.calls if call[2] == "AddServer"]
