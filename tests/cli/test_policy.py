"""`buswarden policy`: everything without a broker."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.cli.main import main

SNAPS = """
[[snaps]]
name = "player"
apps = ["player"]
[snaps.slots.control]
interface = "dbus"
attributes = {bus = "session", name = "org.example.Player"}

[[snaps]]
name = "remote"
apps = ["remote"]
[snaps.plugs.control]
interface = "dbus"
attributes = {bus = "session", name = "org.example.Player"}
"""
CONNECTED = 'connections = [["remote:control", "player:control"]]\n' + SNAPS
PROFILE = """
profile "snap.a.b" {
  #include <abstractions/bus>
  dbus (send) bus=session path=/x interface=org.x.I member=Do,
}
"""

Run = Callable[..., tuple[int, str, str]]
Write = Callable[[str, str], str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setenv("HOME", str(tmp_path))

    def run_it(*argv: str) -> tuple[int, str, str]:
        code = main(["policy", *argv])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_it


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_it(name: str, text: str) -> str:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(text)
        return str(file)

    return write_it


def test_lint_says_file_and_line(run: Run, write: Write) -> None:
    assert run("lint") == (0, "", "")
    good = write("good.toml", 'summary = "Fine."\n')
    bad = write("bad.toml", 'summary = "Bad."\n[[plug.connected]]\naccess = ["send"]\nnme = "x"\n')
    assert run("lint", good) == (0, "", "")
    code, out, err = run("lint", good, bad)
    assert (code, err) == (1, "")
    assert out.startswith(f"{bad}:4: ")
    assert out.count("\n") == 1


def test_lint_reads_ones_own_files(run: Run, write: Write) -> None:
    write(".config/buswarden/interfaces.d/mine.toml", "x = 1\n")
    code, out, _ = run("lint")
    assert code == 1
    assert "mine.toml:1: " in out
    assert run("show", "mpris")[0] == 2


def test_an_interface_is_shown(run: Run) -> None:
    code, out, _ = run("show", "dbus")
    assert code == 0
    lines = out.splitlines()
    assert lines[:2] == [
        "dbus: Offer a service under a bus name of one's own (slot), or use one (plug).",
        "file: dbus.toml",
    ]
    assert "attribute of the plug: name (bus-name, required)" in lines
    assert "slot.permanent:" in lines
    assert "  own bus=<slot.bus> name=<slot.name>" in lines
    assert "(name-element, else <snap>)" in run("show", "mpris")[1]
    assert "slot of the system on: " in run("show", "network-manager")[1]
    assert json.loads(run("show", "mpris", "--json")[1])["name"] == "mpris"
    assert run("show", "every-snap")[1].splitlines()[2] == "every-snap:"
    assert run("show", "nope") == (2, "", "buswarden: no interface 'nope' with D-Bus rules\n")


def test_snaps_are_compiled_to_rules(run: Run, write: Write) -> None:
    file = write("w.toml", CONNECTED)
    code, out, err = run("compile", file)
    assert (code, err) == (0, "")
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [
        "snap.player.player",
        "snap.remote.remote",
    ]
    assert "  # from the host: only by rule" in out
    assert "  allow own:org.example.Player,bus=session  # dbus slot player:control" in out
    _, out, _ = run("compile", file, "--app", "remote.remote")
    assert out.splitlines()[0] == "snap.remote.remote"
    assert run("compile", file, "--app", "snap.remote.remote")[1] == out
    assert run("compile", file, "--app", "no.one")[0] == 2


def test_snaps_are_compiled_to_json_and_usos(run: Run, write: Write) -> None:
    file = write("w.toml", CONNECTED)
    facts = json.loads(run("compile", file, "--format", "json")[1])["snap.remote.remote"]
    assert facts["receive_from_host"] is False
    assert {"deny", "rule", "origin"} == set(facts["rules"][0])
    buses = json.loads(run("compile", file, "--format", "usos")[1])["snap.remote.remote"]
    assert set(buses) == {"accessibility", "session", "system"}
    assert [
        0x42,
        "org.freedesktop.DBus",
        "/org/freedesktop/DBus",
        "org.freedesktop.DBus.Hello",
    ] in (buses["accessibility"]["usos"])
    assert buses["session"]["unsaid"][0]["reason"]


def test_what_a_proxy_cannot_say_of_snaps_is_listed(run: Run, write: Write) -> None:
    file = write("w.toml", CONNECTED)
    code, out, _ = run("compile", file, "--format", "xdg-dbus-proxy")
    facts = json.loads(out)["snap.remote.remote"]["session"]
    assert code == 0
    assert isinstance(facts["options"], list)
    # A snap takes nothing from the host without a rule, and a proxy lets all of that in.
    assert any("from the host" in one["reason"] for one in facts["unsaid"])


def test_two_worlds_are_compared(run: Run, write: Write) -> None:
    before, after = write("a.toml", SNAPS), write("b.toml", CONNECTED)
    code, out, _ = run("diff", before, after)
    assert code == 0
    assert out.splitlines()[0] == "snap.player.player"
    assert {line[:2] for line in out.splitlines()} == {"sn", "+ "}
    lists = write("b.json", run("compile", after, "--format", "json")[1])
    assert run("diff", after, lists) == (0, "", "")
    assert run("diff", before, lists)[1] == out
    assert "snap.player.player (gone)" in run("diff", before, write("c.json", "{}"))[1]
    assert "snap.player.player (new)" in run("diff", write("c.json", "{}"), before)[1]


@pytest.mark.parametrize("text", ["[]", '{"x": 1}', '{"x": {}}', '{"x": {"rules": [1]}}', "{"])
def test_what_is_neither_is_one_line_and_exit_2(run: Run, write: Write, text: str) -> None:
    file = write("x.json", text)
    code, out, err = run("diff", file, file)
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    "text",
    [
        "x = 1",
        '[[snaps]]\nname = "a"\n[snaps.plugs.p]\ninterface = "dbus"',
        'connections = [["a:b", "c:d"]]',
    ],
)
def test_bad_snaps_are_one_line_and_exit_2(run: Run, write: Write, text: str) -> None:
    code, out, err = run("compile", write("w.toml", text))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "w.toml: " in err


def test_an_apparmor_profile_is_imported(run: Run, write: Write) -> None:
    file = write("profile", PROFILE)
    code, out, err = run("import", "apparmor", file)
    assert code == 0
    assert "allow send:@/x:org.x.I.Do,bus=session" in out
    assert "# from the host: only by rule" in out
    assert "profile:3: include" in err
    included = Path(write("d/abstractions/bus", "  dbus (receive) bus=session path=/y,\n"))
    directory = str(included.parent.parent)
    code, out, err = run("import", "apparmor", "--include", directory, file)
    assert (code, err) == (0, "")
    assert "allow receive:@/y,bus=session" in out
    assert run("import", "apparmor", "--profile", "other", file)[0] == 2
    assert run("import", "apparmor", file, file)[0] == 2


def test_an_include_of_a_directory_or_by_its_path(run: Run, write: Write, tmp_path: Path) -> None:
    part = write("d/parts/one", "  dbus (receive) bus=session path=/y,\n")
    text = 'profile a {{\n  include <parts>\n  include "{}"\n  include if exists <none>\n}}\n'
    file = write("profile", text.format(part))
    code, out, err = run("import", "apparmor", "--include", str(tmp_path / "d"), file)
    assert (code, err) == (0, "")
    assert "allow receive:@/y,bus=session" in out


def test_flatpak_metadata_is_imported(run: Run, write: Write) -> None:
    file = write("metadata", "[Session Bus Policy]\norg.x.Y=talk\n")
    code, out, _ = run("import", "flatpak", "--app-id", "org.x.App", file)
    assert code == 0
    assert "allow send+receive:org.x.Y,bus=session" in out
    override = write("override", "[Session Bus Policy]\norg.x.Y=none\n")
    assert "org.x.Y" not in run("import", "flatpak", "--app-id", "org.x.App", file, override)[1]


@pytest.mark.parametrize(
    "text",
    [
        "--filter --talk=org.x.Y",
        "--filter\0--talk=org.x.Y\0",
        "xdg-dbus-proxy unix:path=/a /b --filter '--talk=org.x.Y'  # comment",
    ],
)
def test_a_proxys_command_line_is_imported(run: Run, write: Write, text: str) -> None:
    code, out, _ = run("import", "xdg-dbus-proxy", "--format", "json", write("args", text))
    assert code == 0
    rules = [rule["rule"] for rule in json.loads(out)["rules"]]
    assert "send+receive:org.x.Y,bus=session" in rules


def test_each_address_of_a_proxy_is_a_bus(run: Run, write: Write) -> None:
    file = write("args", "unix:path=/a /b --filter --talk=a.b unix:path=/c /d --filter --talk=c.d")
    code, out, err = run("import", "xdg-dbus-proxy", file)
    assert (code, out) == (2, "")
    assert "no --bus is left for the address 'unix:path=/c'" in err
    _, out, _ = run("import", "xdg-dbus-proxy", "--bus", "session", "--bus", "system", file)
    assert "allow send+receive:c.d,bus=system" in out


@pytest.mark.parametrize("text", ["--filter '", "--talk=..x", "--frob"])
def test_a_bad_command_line_is_one_line_and_exit_2(run: Run, write: Write, text: str) -> None:
    code, out, err = run("import", "xdg-dbus-proxy", write("args", text))
    assert (code, out, err.count("\n")) == (2, "", 1)
