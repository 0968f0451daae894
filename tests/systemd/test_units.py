import configparser
import re
import shlex
from pathlib import Path

import pytest

from broker.cli import units as command
from broker.cli.commands import EXIT_OK, EXIT_REFUSED, EXIT_USAGE
from broker.cli.main import main
from broker.systemd.units import (
    BUS_POLICY,
    BUS_SERVICE,
    UNITS,
    Installation,
    Scope,
    is_unchanged,
    make_files,
    quote,
)

HERE = Installation(python="/opt/it/bin/python")
SCOPES: tuple[Scope, ...] = ("user", "system")


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and line[0] not in "#[<"]


@pytest.mark.parametrize("scope", SCOPES)
def test_each_option_has_its_reason_and_none_is_twice(scope: Scope) -> None:
    for name in ("buswarden.service", "buswarden-gate.service"):
        text = make_files(scope, HERE)[name]
        service = text.partition("[Service]\n")[2].partition("\n[")[0]
        options = [line.partition("=")[0] for line in lines_of(service)]
        assert len(set(options)) == len(options)
        for option in (
            "NoNewPrivileges",
            "SystemCallFilter",
            "RestrictAddressFamilies",
            "WatchdogSec",
            "KillMode",
        ):
            assert re.search(rf"^# .*[.]\n{option}=", service, re.MULTILINE), option


def test_only_the_systems_units_need_namespaces_and_capabilities() -> None:
    user, system = make_files("user", HERE), make_files("system", HERE)
    for name in ("buswarden.service", "buswarden-gate.service"):
        for option in ("ProtectSystem", "CapabilityBoundingSet", "PrivateTmp", "RuntimeDirectory"):
            assert f"\n{option}=" not in user[name]
            assert f"\n{option}=" in system[name]
    assert BUS_POLICY in system
    assert BUS_POLICY not in user
    assert set(user) == {*UNITS, BUS_SERVICE}
    assert "DirectoryMode=0711" in system["buswarden-gate.socket"]


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_started_is_this_installation(scope: Scope) -> None:
    files = make_files(scope, Installation(python="/opt/my programs/100%/python", path="/src"))
    for name, module in (("buswarden.service", "cli"), ("buswarden-gate.service", "gate")):
        unit = configparser.ConfigParser(strict=True, interpolation=None)
        unit.optionxform = str  # type: ignore[assignment, method-assign]
        unit.read_string(files[name])
        python, *rest = shlex.split(unit["Service"]["ExecStart"])
        assert python == "/opt/my programs/100%%/python"
        assert rest[:3] == ["-P", "-m", f"broker.{module}"]
        assert unit["Service"]["Environment"] == "PYTHONPATH=/src"
    assert f"--scope {scope}" in files["buswarden.service"]
    assert "Environment=" not in make_files(scope, HERE)["buswarden.service"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("/usr/bin/python3", "/usr/bin/python3"),
        ("/a b", '"/a b"'),
        ('/a"b', '"/a\\"b"'),
        ("/a\\b", '"/a\\\\b"'),
        ("100%", "100%%"),
        ("a'b", '"a\'b"'),
    ],
)
def test_words_are_quoted_as_systemd_reads_them(text: str, word: str) -> None:
    assert quote(text) == word


@pytest.mark.parametrize("scope", SCOPES)
def test_a_file_says_whether_it_was_changed(scope: Scope) -> None:
    for text in make_files(scope, HERE).values():
        assert is_unchanged(text)
        assert not is_unchanged(text + "\n")
        assert not is_unchanged(text.partition("\n")[2])
    assert not is_unchanged("")
    # Another version's is not somebody's change.
    other = make_files(scope, Installation(python="/other"))["buswarden.service"]
    assert is_unchanged(other)


# -- the command ----------------------------------------------------------------------------------


def test_written_to_a_folder_and_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new"
    assert main(["install-units", "--system", "--dir", str(folder)]) == EXIT_OK
    names = {*UNITS, BUS_SERVICE, BUS_POLICY}
    assert {path.name for path in folder.iterdir()} == names
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())
    assert "now run" not in capsys.readouterr().out
    assert main(["install-units", "--system", "--dir", str(folder)]) == EXIT_OK
    assert main(["install-units", "--system", "--dir", str(folder), "--remove"]) == EXIT_OK
    assert main(["install-units", "--system", "--dir", str(folder), "--remove"]) == EXIT_OK
    assert list(folder.iterdir()) == []


def test_what_somebody_changed_is_left_alone_unless_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["install-units", "--dir", str(tmp_path)]) == EXIT_OK
    path = tmp_path / "buswarden-gate.socket"
    (tmp_path / "buswarden.service").unlink()
    path.write_text("[Socket]\nListenStream=/mine\n")
    for more in ([], ["--remove"]):
        assert main(["install-units", "--dir", str(tmp_path), *more]) == EXIT_REFUSED
        assert capsys.readouterr().err == (
            f"buswarden: {path} was changed, or was not written by buswarden: use --force to go on\n"
        )
    assert "/mine" in path.read_text()
    assert not (tmp_path / "buswarden.service").exists()  # all or nothing
    assert main(["install-units", "--dir", str(tmp_path), "--force"]) == EXIT_OK
    assert is_unchanged(path.read_text())


def test_a_users_files_are_in_the_users_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert main(["install-units", "--user"]) == EXIT_OK
    assert (tmp_path / ".config" / "systemd" / "user" / "buswarden.service").exists()
    assert (tmp_path / "data" / "dbus-1" / "services" / BUS_SERVICE).exists()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "now run: systemctl --user daemon-reload &&"
        " systemctl --user enable --now buswarden-gate.socket buswarden.service"
    )
    assert main(["install-units", "--remove"]) == EXIT_OK
    assert "systemctl --user daemon-reload" in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert main(["install-units"]) == EXIT_USAGE


def test_printing_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["install-units", "--print", "--system"]) == EXIT_OK
    out = capsys.readouterr().out
    assert "# /etc/systemd/system/buswarden.service\n" in out
    assert f"# /usr/local/share/dbus-1/system-services/{BUS_SERVICE}\n" in out
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["install-units", "--dir", str(tmp_path / "file" / "below")]) == EXIT_REFUSED
    (tmp_path / "buswarden.service").mkdir()
    assert main(["install-units", "--dir", str(tmp_path)]) == EXIT_REFUSED
    assert main(["install-units", "--dir", str(tmp_path), "--remove", "--force"]) == EXIT_REFUSED
    err = capsys.readouterr().err
    assert err.count("\n") == 3
    assert "Not a directory" in err


def test_a_checkout_is_named_to_python_and_an_installed_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = command.find_installation()
    assert (Path(here.path) / "broker" / "systemd" / "units.py").exists()
    monkeypatch.setattr("sysconfig.get_path", lambda _name: here.path)
    assert command.find_installation().path == ""


def test_a_program_that_the_services_cannot_see_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_installation", lambda: Installation(python="/tmp/x/python3"))
    monkeypatch.setattr(command, "_write", lambda _files: pytest.fail("it wrote them"))
    assert main(["install-units", "--system"]) == EXIT_REFUSED
    assert "/tmp/x/python3 is hidden from the services" in capsys.readouterr().err
