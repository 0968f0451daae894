"""The commands about snaps, connections and explanations, against a broker that is a fake."""

import json
from pathlib import Path
from typing import Any

import pytest

from broker.bus.values import Variant
from broker.cli import exec as exec_module
from broker.cli.connections import MAX_FILE, read_text
from broker.wire.errors import INVALID_ARGS, CallRefusedError, ConfigError
from tests.cli import test_main
from tests.cli.test_main import Broker, Run

broker, run = test_main.broker, test_main.run  # fixtures

POLICY = "org.buswarden.Broker1.Policy"
WORLD = {
    "system": "classic",
    "snaps": [
        {"name": "player", "apps": ["a", "b"], "slots": {"s": {"interface": "mpris"}}},
        {"name": "snapd", "system": True, "slots": {"x": {"interface": "x"}}},
    ],
}
WHY = {
    "allowed": Variant("b", False),
    "reason": Variant("s", "no rule allows sending it"),
    "rule": Variant("s", ""),
    "origin": Variant("s", ""),
    "suggestions": Variant("as", ["connect a:p b:s", "allow send:org.x.Y"]),
}
MESSAGE = ("session", "org.x.Y", "/x", "org.x.I", "M")


@pytest.fixture(autouse=True)
def answers(broker: Broker) -> None:
    broker.answers |= {
        "Connect": [["snap.a.b: 1 rule added"]],
        "Disconnect": [["snap.a.b: 1 rule removed"]],
        "Connections": [[["a:p", "b:s", "mpris"]]],
        "Snaps": [json.dumps(WORLD)],
        "LoadSnaps": [],
        "Explain": [WHY],
    }


def test_connecting_and_disconnecting_says_what_changed(run: Run, broker: Broker) -> None:
    assert run("connect", "a:p", "b:s") == (0, "snap.a.b: 1 rule added\n", "")
    assert run("disconnect", "a:p", "b:s") == (0, "snap.a.b: 1 rule removed\n", "")
    assert broker.values("Connect") == broker.values("Disconnect") == ["a:p", "b:s"]
    broker.answers["Connect"] = CallRefusedError(INVALID_ARGS, "there is no snap 'a'")
    assert run("connect", "a:p", "b:s") == (1, "", "buswarden: there is no snap 'a'\n")


def test_connections_are_listed(run: Run) -> None:
    code, out, _ = run("connections")
    assert code == 0
    assert out.splitlines()[-1].split() == ["a:p", "b:s", "mpris"]
    _, out, _ = run("connections", "--json")
    assert json.loads(out) == [{"plug": "a:p", "slot": "b:s", "interface": "mpris"}]


def test_snaps_are_listed(run: Run) -> None:
    code, out, _ = run("snaps")
    assert code == 0
    assert out.splitlines()[-2].split() == ["player", "a", "b", "s"]
    assert out.splitlines()[-1].split() == ["snapd", "(system)"]
    _, out, _ = run("snaps", "--json")
    assert json.loads(out) == WORLD


@pytest.mark.parametrize(
    ("name", "text"),
    [("w.json", json.dumps(WORLD["snaps"][:1])), ("w.toml", '[[snaps]]\nname = "player"\n')],
)
def test_a_file_of_snaps_is_loaded(
    run: Run, broker: Broker, tmp_path: Path, name: str, text: str
) -> None:
    file = tmp_path / name
    file.write_text(text)
    assert run("snaps", "load", str(file)) == (0, "", "")
    (sent,) = broker.values("LoadSnaps")
    assert "player" in sent
    json.loads(sent)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("w.json", b"{", "truncated"),
        ("w.json", b"[" * 100_000, "nested too deeply"),
        ("w.toml", b"x = \n", "line 1"),
        ("w.toml", b"x = '\xff'", "not UTF-8 at byte 5"),
    ],
)
def test_a_bad_file_is_one_line_and_exit_2(
    run: Run, tmp_path: Path, name: str, data: bytes, says: str
) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    code, out, err = run("snaps", "load", str(file))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_a_file_that_is_too_long_or_not_there_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "big"
    with file.open("wb") as stream:
        stream.truncate(MAX_FILE + 1)
    with pytest.raises(ConfigError, match="more than"):
        read_text(file)
    with pytest.raises(ConfigError, match="No such file"):
        read_text(tmp_path / "none")


def test_a_denial_is_explained(run: Run, broker: Broker) -> None:
    code, out, _ = run("explain", "remote.a", "--send", *MESSAGE, "--peer", "app:a.b/c")
    assert code == 0
    assert out.splitlines() == [
        "denied: no rule allows sending it",
        "each of these would allow the message, least privilege first:",
        "  connect a:p b:s",
        "  allow send:org.x.Y",
    ]
    what, message = broker.values("Explain")
    assert what == "remote.a"
    assert {key: text.value for key, text in message.items()} == {
        "direction": "send",
        "bus": "session",
        "name": "org.x.Y",
        "path": "/x",
        "interface": "org.x.I",
        "member": "M",
        "peer": "app:a.b/c",
    }
    assert json.loads(run("explain", "c1", "--send", *MESSAGE, "--json")[1])["allowed"] is False


def test_an_allowance_is_explained(run: Run, broker: Broker) -> None:
    more = {"allowed": True, "reason": "a rule allows it", "rule": "allow send:", "origin": "x"}
    signatures: dict[type, str] = {bool: "b", str: "s"}
    why = {key: Variant(signatures[type(value)], value) for key, value in more.items()}
    broker.answers["Explain"] = [{**why, "suggestions": Variant("as", [])}]
    code, out, _ = run("explain", "c1", "--receive", "session", "-", "-", "-", "-")
    assert code == 0
    assert out.splitlines() == [
        "allowed: a rule allows it",
        "  by the rule: allow send:",
        "  origin: x",
    ]
    assert set(broker.values("Explain")[1]) == {"direction", "bus", "peer"}


@pytest.mark.parametrize("direction", ["own", "see"])
@pytest.mark.parametrize("more", [[], ["-", "-", "-"]])
def test_program_p3_a_name_to_own_or_see_is_explained(
    run: Run, broker: Broker, direction: str, more: list[str]
) -> None:
    assert run("explain", "c1", f"--{direction}", "session", "org.x.Y", *more)[0] == 0
    what, message = broker.values("Explain")
    assert what == "c1"
    assert {key: text.value for key, text in message.items()} == {
        "direction": direction,
        "bus": "session",
        "name": "org.x.Y",
        "peer": "host",
    }


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["explain", "c1", *MESSAGE], "--send and --receive"),
        (["explain", "c1", "--send", "session"], "Missing argument"),
        (
            ["explain", "c1", "--send", "session", "org.x.Y", "/x", "a.b"],
            "Missing argument 'MEMBER'",
        ),
        (["explain", "c1", "--own", "session"], "Missing argument"),
        (["explain", "c1", "--own", "session", "-"], "--own needs a NAME"),
        (["explain", "c1", "--see", *MESSAGE], "--see takes BUS and NAME alone"),
        (["connect", "a:p"], "Missing argument"),
        (["snaps", "load", "/nonexistent"], "does not exist"),
        (["snaps", "frob"], "No such command"),
        (["exec", "--snap", "a", "--type", "x.y", "--", "true"], "--snap cannot"),
        (["exec", "--snap", "a", "--component", "x", "--", "true"], "--snap cannot"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(run: Run, argv: list[str], says: str) -> None:
    code, out, err = run(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


@pytest.mark.parametrize(("app", "component"), [([], "player"), (["--app", "b"], "b")])
def test_exec_of_a_snaps_app(
    run: Run,
    broker: Broker,
    monkeypatch: pytest.MonkeyPatch,
    app: list[str],
    component: str,
) -> None:
    monkeypatch.setattr(exec_module, "find_bubblewrap", lambda: None)
    monkeypatch.setattr(exec_module, "_run_in", lambda *_: 0)
    code, _, err = run("exec", "--snap", "player", *app, "--", "true")
    assert (code, err) == (0, "")
    type_, name, _, named = broker.values("AddServer")
    values: dict[str, Any] = {key: variant.value for key, variant in named.items()}
    assert (type_, name) == ("io.snapcraft.snapd", "player")
    assert (values["Component"], values["ReceiveFromHost"]) == (component, False)
