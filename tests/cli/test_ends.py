"""What ends a sandbox, on the command line, against a broker that is a fake."""

import os
from typing import Any

import pytest

from broker.bus.values import Variant
from broker.wire.errors import CallRefusedError
from tests.cli import test_main
from tests.cli.test_main import SANDBOX, Broker, Run

broker, run = test_main.broker, test_main.run  # fixtures


def test_add_passes_on_what_ends_it(run: Run, broker: Broker) -> None:
    argv = ["add", "--type", "a.b", "--app", "x", "--time-limit", "60", "--cgroup", "/c"]
    assert run(*argv, "--process", str(os.getpid()))[0] == 0
    assert broker.values("AddServer")[3] == {
        "KeepAfterCreator": Variant("b", True),
        "Cgroup": Variant("s", "/c"),
        "TimeLimit": Variant("t", 60),
        "ProcessFd": Variant("h", 0),  # a pidfd: FakeBus looks whether there is one
    }


def test_a_process_that_is_not_there_is_no_reason_to_ask(run: Run, broker: Broker) -> None:
    argv = ["add", "--type", "a.b", "--app", "x", "--process", "4194305"]
    assert run(*argv) == (2, "", "buswarden: process 4194305: No such process\n")
    assert broker.calls == []


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({}, "the last connection after the creator is gone"),
        ({"keep_after_creator": Variant("b", True)}, "`buswarden stop` only"),
        ({"listening": Variant("b", False)}, "the last connection\n"),
        ({"process": Variant("u", 7), "cgroup": Variant("s", "/c")}, "process 7, cgroup /c"),
        ({"close_notify": Variant("b", True)}, "the pipe of the creator"),
        ({"time_limit": Variant("t", 9), "time_left": Variant("t", 3)}, "the time limit, in 3 s"),
    ],
)
def test_show_says_what_it_ends_with(
    run: Run, broker: Broker, facts: dict[str, Any], says: str
) -> None:
    broker.answers["Show"] = [SANDBOX | facts]
    assert says in run("show", "c7")[1]


def test_exec_passes_it_on_beside_its_own_pipe(run: Run, broker: Broker) -> None:
    broker.answers["AddServer"] = CallRefusedError("x.y", "no more")
    argv = ["exec", "--process", str(os.getpid()), "--time-limit", "5", "--", "true"]
    assert run(*argv) == (1, "", "buswarden: no more\n")
    assert broker.values("AddServer")[3] == {
        "CloseNotify": Variant("h", 0),
        "ProcessFd": Variant("h", 1),
        "TimeLimit": Variant("t", 5),
    }


@pytest.mark.parametrize("value", ["0", "-1", "x", "4294967296"])
def test_a_time_limit_is_a_number_of_seconds(run: Run, broker: Broker, value: str) -> None:
    code, _out, err = run("add", "--type", "a.b", "--app", "x", "--time-limit", value)
    assert code == 2
    assert "--time-limit" in err
    assert broker.calls == []
