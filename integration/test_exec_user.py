"""`exec`'s sandbox for an ordinary user: the same attacks, by a user without any right on the machine.

The broker is left out: that user may not read our checkout. Its part, a plan and the program that carries it
out, is taken from there; the bus is a socket that the user listens on.
"""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from broker.launcher import launch
from broker.launcher.host import find_host
from broker.launcher.plan import Wish, make_plan
from integration.harness.clients import Outcome
from integration.harness.exec_probe import probe, report_of
from integration.harness.other_user import as_user

UID: Final = 23450  # of nobody
INSIDE: Final = f"/run/user/{UID}/bus"


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's; the program that makes the sandbox is where the user can read it."""
    if os.getuid():
        pytest.skip("the machine: only root can become another user")
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="bw-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copy(launch.STAGE, folder / "stage.py")
        monkeypatch.setattr(launch, "STAGE", str(folder / "stage.py"))
        monkeypatch.setattr("sys.executable", "/usr/bin/python3")
        for part in ("home", "run"):
            (folder / part).mkdir()
            os.chown(folder / part, UID, UID)
        monkeypatch.setenv("HOME", str(folder / "home"))
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder / "run"))
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        monkeypatch.chdir("/")
        yield folder


def run_as_user(place: Path, *parts: str, shared: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run the attacker in a sandbox of the user's, and return its report."""

    def run() -> list[Any]:
        bus, other = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        bus.bind(f"{place}/run/bus")
        other.bind(f"{place}/home/other")
        for sock in (bus, other):
            sock.listen()
        reach = [f"{place}/run/bus", f"{place}/home/other"]
        host = find_host(
            bus_addresses=[f"unix:path={place}/run/bus"], runtime_dirs=[f"{place}/run"]
        )
        command = tuple(probe(*parts, reach=reach))
        wish = Wish(command=command, sockets={"session": f"{place}/run/bus"}, shared=shared)
        out = os.open(f"{place}/run/out", os.O_RDWR | os.O_CREAT, 0o600)
        err = os.open(f"{place}/run/err", os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(out, 1)
        os.dup2(err, 2)
        code = launch.run_sandbox(make_plan(wish, host))
        return [code, Path(f"{place}/run/out").read_text(), Path(f"{place}/run/err").read_text()]

    code, out, err = as_user(UID, run)
    return report_of(Outcome(code=code, out=out, err=err))


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "home-shared"])
def test_attack_x1_as_a_user(place: Path, *, shared: bool) -> None:
    report = run_as_user(place, shared=(str(place / "home"),) if shared else ())
    assert (report["uid"], report["reached"], report["fds"]) == (UID, [INSIDE], [0, 1, 2])


def test_attack_x2_x3_x5_as_a_user(place: Path) -> None:
    report = run_as_user(place, "cgroups", "init", "keys", "settings")
    assert not report["cgroups"]["nested"]
    assert 0 not in report["init"].values()
    assert 0 not in report["keys"].values()
    assert report["settings"] == []


def test_a_users_home_is_empty_and_its_own(place: Path) -> None:
    (place / "home/secret").write_text("s")
    run_as_user(place)
    assert sorted(path.name for path in (place / "home").iterdir()) == ["other", "secret"]
