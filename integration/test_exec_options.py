"""The options of `exec` for buses, displays, folders and a home, and their errors."""

import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from integration.harness.buses import Bus, open_bus
from integration.harness.clients import Outcome, run
from integration.harness.exec_probe import probe, report_of
from integration.harness.processes import PYTHON
from integration.harness.service import ECHO, PATH, running_service
from integration.harness.supervised import Warden, open_warden

UID: Final = os.getuid()
INSIDE: Final = f"/run/user/{UID}"
SYSTEM_SOCKET: Final = "/run/dbus/system_bus_socket"


@pytest.fixture
def three(bus: Bus, folder: Path) -> Iterator[Warden]:
    """A broker of three buses; the service is on the system bus alone."""
    with ExitStack() as stack:
        args = []
        for name in ("system", "accessibility"):
            (folder / name).mkdir()
            other = stack.enter_context(open_bus(bus.kind, folder / name))
            args += ["--bus", f"{name}={other.address}"]
            if name == "system":
                stack.enter_context(running_service(other.address))
        yield stack.enter_context(open_warden(bus, folder / "run", *args))


def shell(warden: Warden, script: str, *options: str) -> Outcome:
    return warden.cli("exec", *options, "--", "sh", "-c", script)


def test_each_bus_is_where_it_is_looked_for(three: Warden) -> None:
    call = f"busctl --system call {ECHO} {PATH} {ECHO} Echo s hello"
    rule = ("--allow", f"send:{ECHO},bus=system")
    outcome = shell(three, call, "--bus", "session", "--bus", "system", *rule)
    assert outcome.out == 's "hello"\n', outcome.err
    # The same name, by way of the session bus.
    assert not shell(three, call.replace("--system", "--user"), "--bus", "system", *rule).ok
    names = ("session", "system", "accessibility")
    buses = [word for name in names for word in ("--bus", name)]
    report = report_of(three.cli("exec", *buses, "--", *probe()))
    assert report["reached"] == sorted([f"{INSIDE}/bus", f"{INSIDE}/at-spi/bus", SYSTEM_SOCKET])
    variables = shell(three, "env", *buses).out.splitlines()
    assert f"DBUS_SYSTEM_BUS_ADDRESS=unix:path={SYSTEM_SOCKET}" in variables
    assert f"AT_SPI_BUS_ADDRESS=unix:path={INSIDE}/at-spi/bus" in variables


def test_without_the_option_it_has_the_first_bus_alone(three: Warden) -> None:
    report = report_of(three.cli("exec", "--", *probe()))
    assert report["reached"] == [f"{INSIDE}/bus"]
    assert "SYSTEM_BUS" not in shell(three, "env").out


def test_a_bus_alone_is_not_in_the_place_of_another(three: Warden) -> None:
    report = report_of(three.cli("exec", "--bus", "system", "--", *probe()))
    assert report["reached"] == [SYSTEM_SOCKET]
    assert "SESSION_BUS" not in shell(three, "env", "--bus", "system").out


def test_a_rule_for_a_bus_that_it_has_not_is_refused(three: Warden) -> None:
    rule = ("--allow", f"send:{ECHO},bus=system")
    says = "the sandbox has no bus 'system', only session\n"
    outcome = shell(three, "true", *rule)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert outcome.err.endswith(says)
    added = three.cli("add", "--type", "a.b", "--app", "x", *rule)
    assert (added.code, added.err.endswith(says)) == (2, True)
    sandbox = three.add_server()
    changed = three.cli("access", sandbox.id, *rule)
    assert (changed.code, changed.err.endswith(says)) == (2, True)
    assert [one["id"] for one in three.list_sandboxes()] == [sandbox.id]
    assert three.cli("access", sandbox.id, "--allow", f"send:{ECHO},bus=session").ok


def test_add_prints_all_sockets(three: Warden) -> None:
    buses = ("--bus", "session", "--bus", "system")
    argv = ("add", "--type", "a.b", "--app", "x", *buses)
    rows = [line.split(" ") for line in three.cli(*argv).out.splitlines()]
    assert [row[2] for row in rows] == ["session", "system"]
    assert len({row[0] for row in rows}) == 1
    assert all(Path(row[1]).is_socket() for row in rows)
    facts = three.cli(*argv, "--json")
    assert '"sockets": {' in facts.out
    one = three.cli("add", "--type", "a.b", "--app", "x").out.split()
    assert len(one) == 2


def test_an_unknown_bus_is_named(three: Warden) -> None:
    outcome = shell(three, "true", "--bus", "nowhere")
    assert not outcome.ok
    assert "nowhere" in outcome.err


# -- what cannot be had ----------------------------------------------------------------------------------


def test_a_program_that_cannot_be_run_inside(shared: Warden, folder: Path) -> None:
    script = folder / "script"
    script.write_text("#!/nonexistent/interpreter\n")
    script.chmod(0o755)
    absent = shared.cli("exec", "--", str(script))
    assert absent.code == 127
    assert "not found" in absent.err
    script.write_bytes(b"\x7fELF nonsense")
    outcome = shared.cli("exec", "--", str(script))
    assert outcome.code in {2, 126, 127}
    assert outcome.err


def test_the_folder_of_the_commands_file_is_there_read_only(shared: Warden, folder: Path) -> None:
    script = folder / "script"
    script.write_text('#!/bin/sh\nls -A "$(dirname "$0")"; touch "$0"; exit 9\n')
    script.chmod(0o755)
    outcome = shared.cli("exec", "--", str(script))
    assert outcome.code == 9, outcome.err
    assert "script" in outcome.out.splitlines()
    assert "Read-only" in outcome.err


def no_more_namespaces() -> list[str]:
    """Return the beginning of an argv in whose world no user namespace can be made."""
    script = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"'
    return ["unshare", "-U", "-r", "-m", "sh", "-ec", script, "sh"]


def test_without_user_namespaces_it_says_so_in_a_line(shared: Warden) -> None:
    argv = [*no_more_namespaces(), PYTHON, "-m", "broker.cli", "exec", "--", "true"]
    outcome = run(*argv, env={"XDG_RUNTIME_DIR": str(shared.runtime)})
    lines = [line for line in outcome.err.splitlines() if "was not started" in line]
    assert outcome.code == 1
    assert len(lines) == 1, outcome.err
    assert "allow user namespaces" in lines[0]


def test_words_of_bubblewrap_are_passed_on(
    shared: Warden, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.which("bwrap")
    (folder / "bwrap").write_text(f'#!/bin/sh\nexec {real} --frobnicate "$@"\n')
    (folder / "bwrap").chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    outcome = shared.cli("exec", "--", "true")
    assert outcome.code == 1
    assert "true was not started: Unknown option --frobnicate (install" in outcome.err


def test_standard_error_of_the_command_is_ours(shared: Warden) -> None:
    outcome = shell(shared, "ls -l /proc/self/fd/2; echo words >&2; exit 1")
    assert outcome.code == 1
    assert outcome.err.endswith("words\n")


# -- folders and displays --------------------------------------------------------------------------------


def test_program_p8_a_home_that_stays(
    shared: Warden, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "")
    home = folder / "home"
    home.mkdir()
    (home / "secret").write_text("s")
    env = {"XDG_RUNTIME_DIR": str(shared.runtime), "HOME": str(home)}

    def run_in(app: str, script: str, *options: str) -> Outcome:
        argv = [PYTHON, "-m", "broker.cli", "exec", "--app", app, *options, "--", "sh", "-c"]
        return run(*argv, script, env=env)

    look = 'echo "$HOME"; ls -A "$HOME"'
    assert run_in("a", f"{look}; touch ~/lost").out == f"{home}\n"
    assert run_in("a", "touch ~/profile", "--home").ok
    assert run_in("a", look, "--home").out == f"{home}\nprofile\n"
    assert run_in("b", look, "--home").out == f"{home}\n"
    assert run_in("a", look).out == f"{home}\n"
    kept = home / ".local/state/buswarden/homes/a"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    bad = run_in("../../x", "true", "--home")
    assert bad.code == 2
    assert "cannot be the name of a folder" in bad.err


def test_the_users_home_is_not_there(shared: Warden) -> None:
    assert shell(shared, "ls -A ~").out == ""
    assert not shell(shared, "touch /usr/x /etc/x /x").ok


def test_displays_are_reached_only_if_asked_for(shared: Warden, folder: Path) -> None:
    number = 50_000 + os.getpid() % 10_000
    path = Path(f"/tmp/.X11-unix/X{number}")
    path.parent.mkdir(exist_ok=True)
    cookie = folder / "cookie"
    cookie.write_text("cookie")
    wayland = shared.runtime / "wayland-7"
    with ExitStack() as stack:
        for at in (path, wayland):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.bind(str(at))
            stack.callback(at.unlink)
            sock.listen()
        env = {"DISPLAY": f":{number}", "XAUTHORITY": str(cookie), "WAYLAND_DISPLAY": wayland.name}
        env |= {"XDG_RUNTIME_DIR": str(shared.runtime)}

        def reached(*options: str) -> list[str]:
            argv = [PYTHON, "-m", "broker.cli", "exec", *options, "--", *probe()]
            return list(report_of(run(*argv, env=env))["reached"])

        own = f"{INSIDE}/bus"
        assert reached() == [own]
        assert reached("--x11") == sorted([own, str(path)])
        assert reached("--wayland") == [own, f"{INSIDE}/wayland-0"]
        argv = [PYTHON, "-m", "broker.cli", "exec", "--x11", "--", "sh", "-c"]
        script = 'echo "$DISPLAY"; cat "$XAUTHORITY"'
        assert run(*argv, script, env=env).out == f":{number}\ncookie"


def test_displays_that_are_not_there_are_named(shared: Warden) -> None:
    for option, says in (
        ("--x11", "DISPLAY names no display"),
        ("--wayland", "wayland-0: No such"),
    ):
        outcome = run(
            *(PYTHON, "-m", "broker.cli", "exec", option, "--", "true"),
            env={"XDG_RUNTIME_DIR": str(shared.runtime), "DISPLAY": "", "WAYLAND_DISPLAY": ""},
        )
        assert outcome.code == 2
        assert says in outcome.err
