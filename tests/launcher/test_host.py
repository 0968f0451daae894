"""The facts of the host that `exec` collects, and the files its options name."""

import os
import socket
import stat
from pathlib import Path

import pytest

from broker.launcher import cgroup, host
from broker.launcher.plan import Display
from broker.wire.errors import ConfigError


def test_what_is_shared_is_a_folder_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        assert host.find_shared(str(tmp_path / "link")) == str(tmp_path / "file")
        assert host.find_shared(str(tmp_path)) == str(tmp_path)
        for name, says in (("s", "is a socket"), ("fifo", "neither"), ("none", "No such file")):
            with pytest.raises(ConfigError, match=says):
                host.find_shared(str(tmp_path / name))
    with pytest.raises(ConfigError, match="not a folder"):
        host.find_bound(str(tmp_path / "file"))


def test_a_link_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match="loop"):
        host.find_shared(str(tmp_path / "loop"))


def test_a_program_is_found_by_its_folder_and_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "bin").symlink_to("real")
    (tmp_path / "real/tool").touch(mode=0o755)
    (tmp_path / "real/alias").symlink_to("tool")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    found = (str(tmp_path / "real/alias"), str(tmp_path / "real/tool"))
    assert host.find_program("alias") == found
    assert host.find_program("missing") is None


def test_facts_about_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    monkeypatch.setattr(host, "find_bubblewrap", lambda: "/usr/bin/bwrap")
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    facts = host.find_host(
        bus_addresses=[f"unix:path={tmp_path}/link/bus"], runtime_dirs=[str(tmp_path / "link")]
    )
    assert {str(tmp_path / "run/bus"), str(tmp_path / "run"), "/run/user"} <= set(facts.protected)
    assert facts.home == str(tmp_path / "run")
    assert "/usr" in facts.folders
    assert Path(facts.staging).is_dir()
    monkeypatch.setenv("HOME", "/")
    assert host.find_host(bus_addresses=(), runtime_dirs=()).home == ""


def test_sockets_with_another_name_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "find_bubblewrap", lambda: "/usr/bin/bwrap")
    (tmp_path / "run/containers").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as bus, socket.socket(socket.AF_UNIX) as other:
        bus.bind(str(tmp_path / "bus"))
        other.bind(str(tmp_path / "run/containers/a"))

        def linked() -> tuple[str, ...]:
            return host.find_host(
                bus_addresses=[f"unix:path={tmp_path}/bus"], runtime_dirs=[str(tmp_path / "run")]
            ).linked

        assert linked() == ()
        (tmp_path / "again").hardlink_to(tmp_path / "bus")
        assert linked() == (str(tmp_path / "bus"),)
        (tmp_path / "once-more").hardlink_to(tmp_path / "run/containers/a")
        assert len(linked()) == 2


def test_a_working_directory_that_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "find_bubblewrap", lambda: "/usr/bin/bwrap")
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path / "d")
    (tmp_path / "d").rmdir()
    assert host.find_host(bus_addresses=(), runtime_dirs=()).cwd == "/"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        pytest.param("far:0.1", Display(name="far:0.1"), id="network"),
        pytest.param("", None, id="none"),
        pytest.param(":x", None, id="no-number"),
        pytest.param(":99999", None, id="not-there"),
    ],
)
def test_displays(name: str, found: Display | None) -> None:
    environ = {"DISPLAY": name, "HOME": "/nonexistent"}
    if found is None:
        with pytest.raises(ConfigError, match="--x11"):
            host.find_x11(environ)
    else:
        assert host.find_x11(environ) == found


def test_a_compositor_is_a_socket(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path), "WAYLAND_DISPLAY": "w"}
    (tmp_path / "w").touch()
    with pytest.raises(ConfigError, match="not a socket"):
        host.find_wayland(environ)
    (tmp_path / "w").unlink()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "w"))
        assert host.find_wayland(environ) == str(tmp_path / "w")
    with pytest.raises(ConfigError, match="XDG_RUNTIME_DIR"):
        host.find_wayland({})


def test_a_home_is_of_one_app_and_of_nobody_else(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    home = Path(host.make_home("a.b", environ))
    assert home == tmp_path / "buswarden/homes/a.b"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert host.make_home("a.b", environ) == str(home)
    for app in ("..", ".", "a/b", "x" * 256):
        with pytest.raises(ConfigError, match="name of a folder"):
            host.make_home(app, environ)
    (tmp_path / "buswarden/homes/link").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="not a folder of this user"):
        host.make_home("link", environ)


def test_no_cgroup_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise PermissionError(13, "Permission denied", "/sys/fs/cgroup/x")

    monkeypatch.setattr(cgroup, "_make", refuse)
    with cgroup.own_cgroup() as group:
        assert group.path == ""
        assert group.why_not == "/sys/fs/cgroup/x: Permission denied"
