import os
from pathlib import Path
from typing import Any

import pytest

from broker.control_protocol.messages import BusSpec, SandboxLimits
from broker.supervisor.config import MAX_FILE, SYSTEM_BUS, load_config
from broker.wire.errors import ConfigError

ENVIRON = {
    "XDG_RUNTIME_DIR": "/run/user/7",
    "DBUS_SESSION_BUS_ADDRESS": "unix:path=/run/user/7/bus",
}
SESSION = BusSpec(name="session", address="unix:path=/run/user/7/bus")


def write(folder: Path, text: str) -> Path:
    path = folder / "buswarden.toml"
    path.write_text(text)
    return path


def test_without_anything_it_serves_the_session_bus() -> None:
    config = load_config(environ=ENVIRON)
    assert config.scope == "user"
    assert config.buses == (SESSION,)
    assert config.runtime_dir == Path("/run/user/7/buswarden")
    assert config.limits.max_containers_per_user == 10_000


def test_without_a_session_bus_there_is_none() -> None:
    assert load_config(environ={"XDG_RUNTIME_DIR": "/run/user/7"}).buses == ()


def test_system_scope_has_the_system_bus_and_narrower_limits() -> None:
    config = load_config(scope="system", environ={})
    assert config.buses == (BusSpec(name="system", address=SYSTEM_BUS),)
    assert config.runtime_dir == Path("/run/buswarden")
    assert (config.limits.max_containers, config.limits.max_containers_per_user) == (512, 16)
    assert config.limits.max_container_metadata_bytes == 4096


def test_system_scope_takes_the_address_of_the_environment() -> None:
    config = load_config(scope="system", environ={"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/b"})
    assert config.buses[0].address == "unix:path=/b"


def test_flags_go_before_the_file_and_the_file_before_the_environment(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'scope = "system"\nruntime_dir = "/run/x"\n'
        '[buses]\nsession = "unix:path=/file"\n[limits]\nnames = 3\n',
    )
    config = load_config(path, environ=ENVIRON)
    assert config.scope == "system"
    assert config.buses == (BusSpec(name="session", address="unix:path=/file"),)
    assert config.runtime_dir == Path("/run/x")
    assert config.limits.names == 3
    config = load_config(
        path, scope="user", buses={"a": "unix:path=/1", "b": "unix:path=/2"}, environ=ENVIRON
    )
    assert config.scope == "user"
    assert [bus.name for bus in config.buses] == ["a", "b"]


def test_limits_reach_the_sandboxes(tmp_path: Path) -> None:
    path = write(tmp_path, "[limits]\nmax_connections_per_container = 5\npending_calls = 6\n")
    assert load_config(path, environ=ENVIRON).limits.for_sandbox() == SandboxLimits(
        connections=5, pending_calls=6
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("scope = 3", "scope"),
        ('scope = "mars"', "scope"),
        ("colour = 1", "colour"),
        ("[limits]\nmax_fun = 1", "'max_fun'"),
        ("[limits]\nnames = -1", "names cannot be -1"),
        ("[limits]\nnames = true", "int"),
        ("[limits]\nmessages_per_second = 0", "messages_per_second cannot be 0"),
        ("[limits]\nmessage_seconds = 0", "message_seconds cannot be 0"),
        ("[limits]\nhandshake_seconds = 86401", "handshake_seconds cannot be 86401"),
        ("[buses]\nsession = 1", "buses"),
        ('runtime_dir = "here"', "absolute"),
        ("not toml", "buswarden.toml"),
        ('[buses]\n"no good" = "unix:path=/x"', "invalid bus name"),
        ('[buses]\nsession = "tcp:host=x"', "unix"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config(write(tmp_path, text), environ=ENVIRON)


@pytest.mark.parametrize(
    "arguments",
    [
        {"path": Path("/does/not/exist")},
        {"scope": "galaxy"},
        {"buses": {"": "unix:path=/x"}},
        {"environ": {}},
        {"environ": {"XDG_RUNTIME_DIR": "/" + "x" * 80}},
    ],
)
def test_bad_arguments_are_clear_errors(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        load_config(**{"environ": ENVIRON, **arguments})


def test_the_engine_is_the_flags_or_the_files_or_nobodys(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('engine = "containers1"\n')
    assert load_config(path, environ=ENVIRON).engine == "containers1"
    assert load_config(path, engine="gate", environ=ENVIRON).engine == "gate"
    assert load_config(environ=ENVIRON).engine is None
    path.write_text('engine = "another"\n')
    with pytest.raises(ConfigError, match="engine"):
        load_config(path, environ=ENVIRON)


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"\xff = 1", "utf-8"), (b"#" * (MAX_FILE + 1), f"more than {MAX_FILE} bytes")],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(
    tmp_path: Path, content: bytes, why: str
) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=why) as caught:
        load_config(path, environ={"XDG_RUNTIME_DIR": "/run/user/1"})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_device_or_a_pipe_is_no_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="not a file"):
            load_config(path, environ={"XDG_RUNTIME_DIR": "/run/user/1"})
