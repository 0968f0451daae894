"""The command line against a supervisor that runs: what each command says, as text and as JSON, and its exit code."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.cli.main import main
from integration.harness.clients import Outcome
from integration.harness.rawclient import RawClient
from integration.harness.service import ECHO, PATH, running_service
from integration.harness.supervised import Warden, wait_for
from integration.harness.values import Variant

OK, REFUSED, USAGE = 0, 1, 2
TYPE = "org.example.T"


@pytest.fixture(autouse=True)
def bystander(shared: Warden) -> Iterator[RawClient]:
    """What runs already, and goes on."""
    client = shared.connect(shared.add_server("org.example.Bystander"))
    yield client
    assert client.driver("GetId")


def ok(outcome: Outcome) -> str:
    assert outcome.code == OK, outcome
    assert outcome.err == ""
    return outcome.out


def from_json(outcome: Outcome) -> Any:
    return json.loads(ok(outcome))


def problem(outcome: Outcome, code: int) -> str:
    """Return the one line that says what was wrong."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert re.fullmatch(r"buswarden: [^\n]+\n", outcome.err), outcome.err
    return outcome.err


def here(shared: Warden, capsys: pytest.CaptureFixture[str], *args: str) -> Outcome:
    """Run the command line in this process: for what is tried in many ways."""
    code = main(["--address", shared.bus.address, *args])
    out, err = capsys.readouterr()
    return Outcome(code=code, out=out, err=err)


def add(shared: Warden, *args: str) -> str:
    """Add a sandbox and return its id."""
    return ok(shared.cli("add", "--type", TYPE, "--app", "App", *args)).split()[0]


def test_a_sandbox_from_add_to_stop(shared: Warden) -> None:
    added = from_json(
        shared.cli(
            *("add", "--type", TYPE, "--app", "App", "--component", "part", "--json"),
            *(
                "--meta",
                "a=b=c",
                "--meta",
                "empty=",
                "--allow",
                f"send:{ECHO}",
                "--deny",
                "own:x.*",
            ),
        )
    )
    assert added.keys() == {"id", "path", "socket", "address", "sockets"}
    assert added["sockets"].keys() == {"session"}
    assert Path(added["socket"]).is_socket()
    client = RawClient.connect(added["address"])  # add keeps it after it has left the bus
    facts = from_json(shared.cli("show", added["id"], "--json"))
    assert facts["metadata"] == {"a": "b=c", "empty": ""}
    assert (facts["type"], facts["app"], facts["component"]) == (TYPE, "App", "part")
    assert facts["access"] == [[False, f"send:{ECHO}"], [True, "own:x.*"]]
    assert facts["connections"] == [["session", client.unique_name]]
    assert facts["sockets"] == {"session": added["socket"]}
    assert any("org.freedesktop.portal" in rule for _, rule in facts["built_in"])
    assert any("org.buswarden" in rule for _, rule in facts["built_in"])
    listed = {one["id"]: one for one in from_json(shared.cli("list", "--json"))}
    assert len(listed) == 2
    assert listed[added["id"]].items() <= facts.items()
    who = from_json(shared.cli("who", client.unique_name, "--json"))
    assert (who["id"], who["app"], who["component"]) == (added["id"], "App", "part")
    assert ok(shared.cli("stop", added["id"])) == ""
    assert client.is_closed(2)
    client.close()
    assert not Path(added["socket"]).exists()


def test_the_same_as_text(shared: Warden) -> None:
    name, socket = ok(
        shared.cli("add", "--type", TYPE, "--app", "App", "--allow", f"send:{ECHO}")
    ).split()
    client = RawClient.connect(f"unix:path={socket}")
    client.call("org.example.Hidden", "/x", "a.b", "Try")
    listed = ok(shared.cli("list"))
    assert re.search(
        rf"^{name} +{TYPE}/App +{client.unique_name} +1 +1 +listening", listed, re.MULTILINE
    )
    shown = ok(shared.cli("show", name))
    assert f"allow send:{ECHO}" in shown
    assert "deny send:org.freedesktop.portal.* (built in)" in shown
    assert "org.example.Hidden /x a.b.Try" in shown
    assert ok(shared.cli("who", client.unique_name)) == f"{name} {TYPE}/App\n"
    client.close()


def test_access_changes_and_shows(shared: Warden) -> None:
    name = add(shared)
    client = RawClient.connect(
        f"unix:path={shared.manage('Show', 's', name)[0]['sockets']['session']}"
    )
    call = (ECHO, PATH, ECHO, "Echo", "s", ("hello",))
    with running_service(shared.bus.address), client:
        assert client.call(*call).error is not None
        assert ok(shared.cli("access", name, "--allow", f"send:{ECHO}")) == f"allow send:{ECHO}\n"
        assert client.call(*call).error is None
        rule = f"send:{ECHO}:{ECHO}.Echo"
        found = from_json(shared.cli("access", name, "--deny", rule, "--json"))
        both = [{"deny": False, "rule": f"send:{ECHO}"}, {"deny": True, "rule": rule}]
        assert found == both
        assert client.call(*call).error is not None
        assert from_json(shared.cli("access", name, "--json")) == both  # only shows
        path = f"/org/freedesktop/DBus/Containers1/{name}"
        replaced = ok(shared.cli("access", path, "--replace", "--allow", f"send:{ECHO}"))
        assert replaced == f"allow send:{ECHO}\n"
        assert client.call(*call).error is None
        assert ok(shared.cli("access", name, "--replace")) == ""
        assert client.call(*call).error is not None


def test_stop_that_keeps_connections(shared: Warden) -> None:
    sandbox = shared.add_server()
    client = shared.connect(sandbox)
    ok(shared.cli("stop", sandbox.path, "--keep-connections"))
    assert client.driver("GetId")
    assert not sandbox.socket.exists()
    assert "closed to new connections" in ok(shared.cli("list"))
    client.close()
    wait_for(lambda: sandbox.id not in {one["id"] for one in shared.list_sandboxes()})


def test_status(shared: Warden) -> None:
    status = from_json(shared.cli("status", "--json"))
    assert status["pid"] == shared.process.pid
    assert status["gate_pid"] == shared.gate_pid
    assert (status["sandboxes"], status["connections"]) == (1, 1)
    assert status["buses"] == {"session": shared.bus.address}
    text = ok(shared.cli("status"))
    assert re.search(rf"^gate: +process {shared.gate_pid}$", text, re.MULTILINE)
    assert "max_containers_per_user" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("show", "c99999"), "c99999"),
        (("stop", "c99999"), "c99999"),
        (("stop", "nonsense"), "nonsense"),
        (("access", "c99999", "--allow", "send:"), "c99999"),
        (("who", ":1.99999"), ":1.99999"),
        (("who", "org.freedesktop.DBus"), "the bus itself"),
        (("who", "org.buswarden.Broker1"), "in no sandbox"),
        (("who", "nodots"), "not a bus name"),
        (("add", "--type", "nodots", "--app", "x"), "nodots"),
        (("add", "--type", "a.b", "--app", "x", "--bus", "nowhere"), "nowhere"),
        (("add", "--type", "a.b", "--app", "x", "--meta", "k=" + "x" * 65_536), "max_container"),
    ],
)
def test_what_is_refused(
    shared: Warden, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], words: str
) -> None:
    assert words in problem(here(shared, capsys, *args), REFUSED)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("nonsense",), "nonsense"),
        (("add", "--app", "x"), "--type"),
        (("add", "--type", "a.b", "--app", "x", "--meta", "novalue"), "novalue"),
        (("add", "--type", "a.b", "--app", "x", "--allow", "send:org..x"), "character 9"),
        (("access", "c0", "--allow", "talk:org.x"), "talk"),
        (("access", "c0", "--deny", "send:org.x,peer=nobody"), "nobody"),
        (("access",), "ID"),
        (("stop", "c0", "--nonsense"), "--nonsense"),
        (("exec",), "COMMAND"),
        (("exec", "--", "no-such-command-anywhere"), "no-such-command-anywhere"),
        (("--address", "nonsense", "list"), "nonsense"),
        (("--address", "tcp:host=127.0.0.1,port=1", "list"), "tcp"),
        (("run", "--bus", "session"), "session"),
        (("run", "--scope", "planet"), "planet"),
        (("run", "--config", "/no/such/file"), "/no/such/file"),
    ],
)
def test_what_is_asked_in_the_wrong_way(
    shared: Warden, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], words: str
) -> None:
    assert words in problem(here(shared, capsys, *args), USAGE)


def test_exit_codes_are_those_of_the_process(shared: Warden) -> None:
    problem(shared.cli("stop", "c99999"), REFUSED)
    problem(shared.cli("stop"), USAGE)


def test_no_control_character_reaches_the_terminal(shared: Warden) -> None:
    shared.add_server("evil\x1b[31m\nc9 forged", metadata={"k\x07": Variant("s", "\x1b]0;x\x07")})
    for sandbox in shared.list_sandboxes():
        assert "\x1b" not in ok(shared.cli("show", sandbox["id"]))
    listed = ok(shared.cli("list"))
    assert "\x1b" not in listed
    assert "\nc9 forged" not in listed


def test_where_the_broker_is_looked_for(
    shared: Warden,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*args: str) -> Outcome:
        code = main([*args, "list", "--json"])
        out, err = capsys.readouterr()
        return Outcome(code=code, out=out, err=err)

    address = shared.bus.address
    for name in ("BUSWARDEN_BUS_ADDRESS", "DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (
        ("BUSWARDEN_BUS_ADDRESS", address),
        ("DBUS_SESSION_BUS_ADDRESS", address),
        ("XDG_RUNTIME_DIR", str(shared.runtime)),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            ok(said())
    ok(said("--address", address))
    assert "is `buswarden run` running?" in problem(said(), REFUSED)
    nowhere = ("--address", f"unix:path={folder}/nothing")
    assert "nothing" in problem(said(*nowhere), REFUSED)


def test_portals_are_denied_with_the_reason_unless_insisted(shared: Warden) -> None:
    portal = "org.freedesktop.portal.Desktop"
    call = (portal, "/org/freedesktop/portal/desktop", portal, "Echo", "s", ("x",))
    denied, insisted = (
        add(shared, "--allow", f"send:{portal}", *more) for more in ((), ("--portals-as-host",))
    )
    shown = {name: shared.manage("Show", "s", name)[0] for name in (denied, insisted)}
    with running_service(shared.bus.address, portal):
        with RawClient.connect(shown[denied]["addresses"]["session"]) as client:
            reply = client.call(*call)
            assert reply.error == "org.freedesktop.DBus.Error.AccessDenied"
            # Nor by its unique name, nor as the other portal interface.
            owner = shared.host.name_owner(portal)
            assert client.call(owner, *call[1:]).error is not None
        with RawClient.connect(shown[insisted]["addresses"]["session"]) as client:
            assert client.call(*call).error is None
    shown_now = ok(shared.cli("show", denied))
    assert "portals would take the sandbox for a program of the host" in shown_now
    built_in = shared.manage("Show", "s", insisted)[0]["built_in"]
    assert not [rule for _, rule in built_in if "org.freedesktop.portal" in rule]
    denial = shared.manage("Show", "s", denied)[0]["denials"][0]
    assert "--portals-as-host" in denial["origin"]
