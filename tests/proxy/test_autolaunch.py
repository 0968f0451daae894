"""What dbus-launch is asked, what it answers, and each way in which that goes wrong."""

import stat
from pathlib import Path

import pytest

from broker.proxy.autolaunch import find_machine_id, launch, parse_answer
from broker.wire.errors import ConfigError

ID = "0123456789abcdef0123456789abcdef"
ANSWER = b"unix:path=/run/bus,guid=12\0" + b"\1\0\0\0" + b"\0" * 8


@pytest.fixture
def ids(tmp_path: Path) -> list[str]:
    (tmp_path / "id").write_text(f"{ID}\n")
    return [str(tmp_path / "none"), str(tmp_path / "id")]


def environ(tmp_path: Path, script: str | None) -> dict[str, str]:
    """Return one whose dbus-launch is that shell script, or is not there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    if script is not None:
        path = folder / "dbus-launch"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(stat.S_IRWXU)
    return {"DISPLAY": ":9", "PATH": str(folder)}


def test_the_answer_has_the_address_first() -> None:
    assert parse_answer(ANSWER) == "unix:path=/run/bus,guid=12"


@pytest.mark.parametrize("output", [b"", b"\0", b"unix:path=/b", b"unix:path=\xff\0", ANSWER[:5]])
def test_an_answer_without_address_is_refused(output: bytes) -> None:
    with pytest.raises(ConfigError, match="gave no address"):
        parse_answer(output)


def test_it_is_asked_as_glib_asks(tmp_path: Path, ids: list[str]) -> None:
    script = f"echo \"$DISPLAY $*\" > {tmp_path}/asked; printf 'unix:path=/b\\0abcd'"
    assert launch(environ(tmp_path, script), machine_ids=ids) == "unix:path=/b"
    asked = f":9 --autolaunch={ID} --binary-syntax --close-stderr\n"
    assert (tmp_path / "asked").read_text() == asked


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (None, "no program dbus-launch: install dbus-launch"),
        ("echo no display >&2; echo more >&2; exit 3", "code 3: 'no display'"),
        ("exit 3", "code 3$"),
        ("exit 0", "gave no address"),
        ("while :; do :; done", "no answer from dbus-launch after 0.1 seconds"),
    ],
)
def test_what_goes_wrong_is_one_line(
    tmp_path: Path, ids: list[str], script: str | None, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        seconds = 0.1 if "while" in (script or "") else 10.0
        launch(environ(tmp_path, script), machine_ids=ids, seconds=seconds)
    assert "\n" not in str(caught.value)


def test_a_program_that_cannot_be_run(tmp_path: Path, ids: list[str]) -> None:
    env = environ(tmp_path, "exit 0")
    path = tmp_path / "bin" / "dbus-launch"
    path.write_bytes(b"no program")
    with pytest.raises(ConfigError, match="cannot be run"):
        launch(env, machine_ids=ids)


def test_without_a_display_nothing_is_run(tmp_path: Path, ids: list[str]) -> None:
    env = environ(tmp_path, f"touch {tmp_path}/ran") | {"DISPLAY": ""}
    with pytest.raises(ConfigError, match="there is no DISPLAY"):
        launch(env, machine_ids=ids)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["", "x" * 32, ID[1:], f"{ID}0", "0" * 1000])
def test_what_is_no_machine_id(tmp_path: Path, ids: list[str], text: str) -> None:
    path = tmp_path / "bad"
    path.write_text(text)
    assert find_machine_id([str(path), *ids]) == ID
    with pytest.raises(ConfigError, match=r"no machine id in .*/bad: run dbus-uuidgen"):
        find_machine_id([str(path)])
