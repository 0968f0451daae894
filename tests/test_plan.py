"""The plan of a sandbox: what is hidden, what is set, when the network goes."""

from itertools import pairwise

import pytest

from broker.sandbox.plan import (
    Host,
    Places,
    Plan,
    Wish,
    addresses_in,
    find_buses,
    make_plan,
)
from broker.wire.errors import ConfigError

SOCKET = "/run/user/1000/buswarden/containers/dbus-AAAAAA"
GUID = "0123456789abcdef0123456789abcdef"
SESSION = "unix:path=/run/user/1000/bus"


def host(**changes: object) -> Host:
    facts: dict[str, object] = {
        "uid": 1000,
        "cwd": "/home/u/work",
        "environ": {"HOME": "/home/u", "LANG": "C"},
        "runtime_dirs": ("/run/user/1000", "/run/user/1000/buswarden"),
    }
    return Host(**(facts | changes))  # type: ignore[arg-type]


def plan(*addresses: str, shared: tuple[str, ...] = (), **changes: object) -> Plan:
    wish = Wish(
        command=("app", "--flag"),
        socket=SOCKET,
        bus_addresses=addresses or (SESSION,),
        shared=shared,
    )
    return make_plan(wish, host(**changes))


def mounts(made: Plan, option: str) -> list[str]:
    """The destinations of one kind of mount, in order."""
    width = 2 if option in {"--ro-bind", "--bind"} else 1
    return [made.argv[i + width] for i, word in enumerate(made.argv) if word == option]


def at(made: Plan, *words: str) -> int:
    found = [i for i in range(len(made.argv)) if made.argv[i : i + len(words)] == words]
    assert len(found) == 1, (words, made.argv)
    return found[0]


def test_the_command_comes_last_and_untouched() -> None:
    assert plan().argv[-3:] == ("--", "app", "--flag")


def test_the_root_is_read_only_and_temporary_places_are_empty() -> None:
    made = plan()
    assert (
        at(made, "--ro-bind", "/", "/") < at(made, "--tmpfs", "/tmp") < at(made, "--tmpfs", "/run")
    )
    assert "--bind" not in made.argv
    assert "--dev-bind" not in made.argv


@pytest.mark.parametrize(
    "option", ["--unshare-pid", "--die-with-parent", "--new-session", "--unshare-ipc"]
)
def test_nothing_survives_and_nothing_is_shared(option: str) -> None:
    assert option in plan().argv


def test_no_capability_is_kept() -> None:
    assert ("--cap-drop", "ALL") in pairwise(plan().argv)


def test_the_sandbox_socket_stands_where_a_session_bus_does() -> None:
    made = plan()
    bind = at(made, "--ro-bind", SOCKET, "/run/user/1000/bus")
    assert (
        at(made, "--tmpfs", "/run") < at(made, "--perms", "0700", "--dir", "/run/user/1000") < bind
    )
    assert made.environ["XDG_RUNTIME_DIR"] == "/run/user/1000"
    assert made.environ["DBUS_SESSION_BUS_ADDRESS"] == "unix:path=/run/user/1000/bus"


def test_the_environment_tells_of_no_other_bus() -> None:
    environ = {
        "HOME": "/home/u",
        "DBUS_SESSION_BUS_ADDRESS": SESSION,
        "DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/x",
        "AT_SPI_BUS_ADDRESS": "unix:path=/y",
        "DBUS_STARTER_ADDRESS": "unix:path=/z",
        "DBUS_SESSION_BUS_PID": "7",
        "IBUS_ADDRESS": "unix:path=/i",
        "BUSWARDEN_BUS_ADDRESS": SESSION,
        "NOTIFY_SOCKET": "/run/n",
    }
    made = plan(environ=environ)
    assert made.environ == {
        "HOME": "/home/u",
        "XDG_RUNTIME_DIR": "/run/user/1000",
        "DBUS_SESSION_BUS_ADDRESS": "unix:path=/run/user/1000/bus",
    }


@pytest.mark.parametrize(
    ("path", "covered"),
    [
        pytest.param("/home/u/.cache/bus", True, id="home"),
        pytest.param("/srv/bus", True, id="elsewhere"),
        pytest.param("/tmp/bus", False, id="tmp-is-empty-anyway"),
        pytest.param("/run/dbus/system_bus_socket", False, id="run-is-empty-anyway"),
        pytest.param("/dev/log", False, id="dev-is-new-anyway"),
        pytest.param("/tmpfile", True, id="a-prefix-is-not-a-parent"),
    ],
)
def test_a_visible_socket_is_covered(path: str, *, covered: bool) -> None:
    made = plan(sockets=(path,))
    assert (path in mounts(made, "--ro-bind")) is covered
    if covered:
        assert at(made, "--ro-bind", "/", "/") < at(made, "--ro-bind", "/dev/null", path)


def test_a_runtime_dir_elsewhere_is_emptied_with_all_below_it() -> None:
    made = plan(
        runtime_dirs=("/home/u/.run/buswarden", "/home/u/.run", "/run/user/1000"),
        sockets=("/home/u/.run/bus",),
        cwd="/home/u/.run/x",
    )
    assert mounts(made, "--tmpfs") == ["/tmp", "/run", "/home/u/.run"]
    assert "/home/u/.run/bus" not in mounts(made, "--ro-bind")
    assert ("--chdir", "/") in pairwise(made.argv)


def test_a_working_directory_that_is_visible_is_kept() -> None:
    assert ("--chdir", "/home/u/work") in pairwise(plan().argv)
    assert ("--chdir", "/") in pairwise(plan(cwd="/tmp/x").argv)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        pytest.param(f"unix:abstract=/tmp/dbus-x,guid={GUID}", "@/tmp/dbus-x", id="abstract"),
        pytest.param("tcp:host=localhost,port=1", "tcp:host=localhost", id="tcp"),
        pytest.param(f"{SESSION};unix:abstract=y", "@y", id="one-of-two"),
    ],
)
def test_the_network_goes_if_a_bus_is_reached_without_a_path(address: str, why: str) -> None:
    made = plan(address)
    assert "--unshare-net" in made.argv
    assert why in made.no_network


def test_the_network_goes_if_something_like_an_unknown_bus_listens() -> None:
    assert (
        "@/tmp/dbus-Zx" in plan(abstract_sockets=("/tmp/.X11-unix/X0", "/tmp/dbus-Zx")).no_network
    )


def test_the_network_stays_otherwise() -> None:
    made = plan(abstract_sockets=("/tmp/.X11-unix/X0",), resolv_conf="/run/resolve/stub.conf")
    assert made.no_network == ""
    assert "--unshare-net" not in made.argv
    resolv = at(made, "--ro-bind", "/run/resolve/stub.conf", "/run/resolve/stub.conf")
    assert at(made, "--tmpfs", "/run") < resolv


def test_a_resolver_file_that_is_visible_is_not_mounted_again() -> None:
    assert "/etc/resolv.conf" not in mounts(plan(resolv_conf="/etc/resolv.conf"), "--ro-bind")


def test_buses_are_found_in_addresses_and_environment() -> None:
    addresses = (f"{SESSION},guid={GUID};unix:path=/b", "", "nonsense", "unix:runtime=yes")
    places = find_buses(addresses, {"XDG_RUNTIME_DIR": "/r"})
    assert places == Places(paths=("/run/user/1000/bus", "/b", "/r/bus"), elsewhere=("nonsense",))
    assert addresses_in({"AT_SPI_BUS_ADDRESS": "a", "DBUS_SYSTEM_BUS_ADDRESS": "", "X": "b"}) == (
        "a",
    )


def test_what_is_shared_shows_through_but_for_its_sockets_and_runtime_dirs() -> None:
    made = plan(
        shared=("/tmp/project",),
        cwd="/tmp/project/src",
        runtime_dirs=("/tmp/project/run", "/tmp/other"),
        sockets=("/tmp/project/bus", "/tmp/project/run/bus", "/tmp/bus"),
    )
    share = at(made, "--ro-bind", "/tmp/project", "/tmp/project")
    assert at(made, "--tmpfs", "/tmp") < share < at(made, "--tmpfs", "/tmp/project/run")
    assert share < at(made, "--ro-bind", "/dev/null", "/tmp/project/bus")
    assert mounts(made, "--tmpfs") == ["/tmp", "/run", "/tmp/project/run"]
    assert "/tmp/bus" not in mounts(made, "--ro-bind")
    assert made.cwd == "/tmp/project/src"


@pytest.mark.parametrize("directory", ["/", "/run", "/run/user/1000", "/proc", "/dev/shm"])
def test_what_the_sandbox_has_of_its_own_cannot_be_shared(directory: str) -> None:
    with pytest.raises(ConfigError, match="cannot share"):
        plan(shared=(directory,))
