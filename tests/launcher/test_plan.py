"""The plan of a sandbox: what is shown, what is its own, which sockets answer, when something is refused."""

from itertools import pairwise
from typing import Any

import pytest

from broker.launcher.mounts import Mount
from broker.launcher.plan import (
    MAX_PARTS,
    Display,
    HostFacts,
    Part,
    Places,
    Plan,
    Wish,
    addresses_in,
    find_buses,
    make_plan,
)
from broker.launcher.stage import BELOW, LIVE, SHOWN, SOCKET
from broker.wire.errors import ConfigError

SOCKET_PATH = "/run/user/1000/buswarden/containers/dbus-AAAAAA"
GUID = "0123456789abcdef0123456789abcdef"
SESSION = "unix:path=/run/user/1000/bus"
ROOT = Mount(device="8:1", root="/", point="/")
RUN = Mount(device="0:40", root="/", point="/run/user/1000")


def host(**changes: Any) -> HostFacts:
    facts: dict[str, Any] = {
        "uid": 1000,
        "cwd": "/home/u/work",
        "environ": {"HOME": "/home/u", "LANG": "C"},
        "home": "/home/u",
        "folders": ("/usr", "/etc", "/opt"),
        "links": (("/bin", "usr/bin"), ("/lib", "usr/lib")),
        "mounts": (ROOT, RUN),
        "protected": ("/run/user/1000", "/run/user/1000/buswarden", "/run/dbus"),
    }
    return HostFacts(**(facts | changes))


def plan(wish: dict[str, Any] | None = None, **changes: Any) -> Plan:
    asked: dict[str, Any] = {
        "command": ("app", "--flag"),
        "sockets": {"session": SOCKET_PATH},
        "bus_addresses": (SESSION,),
    }
    return make_plan(Wish(**(asked | (wish or {}))), host(**changes))


def parts(made: Plan, *kinds: str) -> list[str]:
    """Return the paths of the parts of these kinds, in order."""
    return [part.at for part in made.parts if part.kind in kinds]


def own(made: Plan) -> list[str]:
    """The file systems that are the command's own, in order."""
    return [made.before[i + 1] for i, word in enumerate(made.before) if word == "--tmpfs"]


def test_the_command_comes_last_and_untouched() -> None:
    assert plan().after[-3:] == ("buswarden", "app", "--flag")


def test_only_chosen_parts_of_the_host_are_there() -> None:
    made = plan()
    assert made.parts == (
        Part(source="/etc", at="/etc", kind=SHOWN),
        Part(source="/opt", at="/opt", kind=SHOWN),
        Part(source="/usr", at="/usr", kind=SHOWN),
        Part(source=SOCKET_PATH, at="/run/user/1000/bus", kind=SOCKET),
    )
    assert own(made) == ["/tmp", "/var/tmp", "/run", "/home/u", "/proc/1"]
    assert "--bind" not in made.before + made.after
    assert ("--symlink", "usr/bin", "/bin") in zip(
        made.before, made.before[1:], made.before[2:], strict=False
    )
    assert ("--remount-ro", "/") in pairwise(made.after)


@pytest.mark.parametrize(
    "option",
    [
        *("--unshare-user", "--disable-userns", "--unshare-pid", "--unshare-ipc", "--unshare-net"),
        *("--unshare-cgroup", "--unshare-uts", "--die-with-parent", "--new-session"),
    ],
)
def test_nothing_survives_and_nothing_is_shared(option: str) -> None:
    assert option in plan().before


def test_no_capability_is_kept() -> None:
    assert ("--cap-drop", "ALL") in pairwise(plan().before)


def test_settings_of_the_kernel_are_read_only() -> None:
    made = plan()
    assert ("--ro-bind-try", "/proc/sys", "/proc/sys") in zip(
        made.before, made.before[1:], made.before[2:], strict=False
    )


def test_each_bus_stands_where_programs_look_for_it() -> None:
    sockets = {"session": "/s", "system": "/y", "accessibility": "/a"}
    made = plan({"sockets": sockets})
    assert [(part.source, part.at) for part in made.parts if part.kind == SOCKET] == [
        ("/a", "/run/user/1000/at-spi/bus"),
        ("/s", "/run/user/1000/bus"),
        ("/y", "/run/dbus/system_bus_socket"),
    ]
    assert made.environ["DBUS_SESSION_BUS_ADDRESS"] == "unix:path=/run/user/1000/bus"
    assert made.environ["DBUS_SYSTEM_BUS_ADDRESS"] == "unix:path=/run/dbus/system_bus_socket"
    assert made.environ["AT_SPI_BUS_ADDRESS"] == "unix:path=/run/user/1000/at-spi/bus"


def test_a_bus_of_another_name_stands_for_the_session_bus_unless_that_is_there() -> None:
    made = plan({"sockets": {"mine": "/m", "system": "/y"}})
    assert ("/m", "/run/user/1000/bus") in [(part.source, part.at) for part in made.parts]
    with pytest.raises(ConfigError, match="mine and session"):
        plan({"sockets": {"mine": "/m", "session": "/s"}})


def test_the_environment_tells_of_no_other_bus_nor_display() -> None:
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
        "DISPLAY": ":0",
        "WAYLAND_DISPLAY": "wayland-0",
        "TMPDIR": "/home/u/tmp",
    }
    assert plan(environ=environ).environ == {
        "HOME": "/home/u",
        "XDG_RUNTIME_DIR": "/run/user/1000",
        "DBUS_SESSION_BUS_ADDRESS": "unix:path=/run/user/1000/bus",
    }


def test_a_folder_for_temporary_files_that_is_there_is_kept() -> None:
    made = plan({"shared": ("/srv/x",)}, environ={"TMPDIR": "/srv/x/tmp"})
    assert made.environ["TMPDIR"] == "/srv/x/tmp"


# -- folders --------------------------------------------------------------------------------------------


def test_a_folder_comes_before_what_lies_inside_it() -> None:
    wish = {"shared": ("/srv/a/b", "/srv/a-b"), "bound": ("/srv/a",)}
    made = plan(wish)
    order = ["/etc", "/opt", "/srv/a", "/srv/a/b", "/srv/a-b", "/usr"]
    assert parts(made, SHOWN, LIVE) == order


def test_what_is_mounted_inside_a_folder_is_shown_without_its_sockets() -> None:
    mounts = (ROOT, RUN, Mount(device="0:40", root="/", point="/opt/run"))
    made = plan(mounts=mounts)
    assert parts(made, BELOW) == ["/opt/run"]
    assert parts(plan({"shared": ("/srv/x",)}, mounts=mounts), BELOW) == ["/opt/run"]


def test_many_file_systems_are_refused() -> None:
    mounts = tuple(
        Mount(device="0:1", root="/", point=f"/opt/{number}") for number in range(MAX_PARTS)
    )
    with pytest.raises(ConfigError, match=f"at most {MAX_PARTS}"):
        plan(mounts=(ROOT, *mounts))


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/run", "/run/user", "/run/user/1000", "/run/user/1000/at-spi"),
        *("/tmp", "/var", "/proc", "/dev/shm", "/sys/class"),
    ],
)
def test_what_the_sandbox_has_of_its_own_cannot_be_shared(path: str) -> None:
    for wish in ({"shared": (path,)}, {"bound": (path,)}):
        with pytest.raises(ConfigError, match="cannot share"):
            plan(wish)


@pytest.mark.parametrize(
    ("folder", "why"),
    [
        pytest.param("/run/dbus", "/run/dbus", id="itself"),
        pytest.param("/run/dbus/below", "/run/dbus", id="below"),
        pytest.param("/srv/again", "/run/user/1000", id="another-mount"),
        pytest.param("/srv/again/at-spi", "/run/user/1000", id="below-another-mount"),
        pytest.param("/srv/part", "/run/user/1000", id="mount-of-a-part"),
        pytest.param("/home/u/p", "/home/u/p/bus", id="contains-a-bus"),
        pytest.param("/srv/deep", "mounted inside", id="mount-inside"),
    ],
)
def test_no_folder_that_leads_to_a_bus_is_given_as_it_is(folder: str, why: str) -> None:
    mounts = (
        *(ROOT, RUN),
        Mount(device="0:40", root="/", point="/srv/again"),
        Mount(device="0:40", root="/at-spi", point="/srv/part"),
        Mount(device="0:99", root="/", point="/srv/deep/er"),
    )
    protected = ("/run/user/1000", "/run/dbus", "/home/u/p/bus")
    with pytest.raises(ConfigError, match=why):
        plan({"bound": (folder,)}, mounts=mounts, protected=protected)
    assert parts(plan({"bound": ("/srv/else",)}, mounts=mounts), LIVE) == ["/srv/else"]


def test_a_socket_with_another_name_may_be_in_any_folder_of_its_file_system() -> None:
    linked = ("/home/u/x/bus",)
    with pytest.raises(ConfigError, match="/home/u/x/bus has another name"):
        plan({"bound": ("/srv/else",)}, linked=linked)
    mounts = (ROOT, RUN, Mount(device="0:9", root="/", point="/srv"))
    assert parts(plan({"bound": ("/srv/else",)}, linked=linked, mounts=mounts), LIVE)


def test_a_later_mount_hides_an_earlier_one() -> None:
    mounts = (ROOT, RUN, Mount(device="0:77", root="/", point="/run/user/1000"))
    protected = ("/run/user/1000",)
    other = Mount(device="0:40", root="/", point="/srv/old")
    made = plan({"bound": ("/srv/old",)}, mounts=(*mounts, other), protected=protected)
    assert parts(made, LIVE) == ["/srv/old"]


def test_a_home_that_stays_stands_where_the_home_does() -> None:
    made = plan({"home": "/home/u/.local/state/buswarden/homes/app"})
    (part,) = [part for part in made.parts if part.kind == LIVE]
    assert part.at == "/home/u"
    assert made.environ["HOME"] == "/home/u"


@pytest.mark.parametrize("home", ["", "/opt/service", "/var", "/proc/x"])
def test_no_home_is_laid_over_something_else(home: str) -> None:
    made = plan(home=home, environ={"HOME": home})
    assert own(made) == ["/tmp", "/var/tmp", "/run", "/proc/1"]
    with pytest.raises(ConfigError, match="no private home"):
        plan({"home": "/x"}, home=home)


@pytest.mark.parametrize(
    ("program", "shown", "name"),
    [
        pytest.param(("/usr/bin/app", "/usr/bin/app"), None, "app", id="system"),
        pytest.param(("/srv/a/app", "/srv/a/app"), "/srv/a", "/srv/a/app", id="own-folder"),
        pytest.param(("/srv/a/app", "/usr/lib/app"), "/srv/a", "/srv/a/app", id="link"),
        pytest.param(("/home/u/app", "/home/u/app"), "/home/u/app", "/home/u/app", id="in-home"),
        pytest.param(("/home/u/app", "/usr/lib/app"), None, "/usr/lib/app", id="link-in-home"),
        pytest.param(("/tmp/app", "/tmp/app"), "/tmp/app", "/tmp/app", id="in-tmp"),
        pytest.param(("/app", "/app"), "/app", "/app", id="in-root"),
    ],
)
def test_the_commands_own_folder_is_there(
    program: tuple[str, str], shown: str | None, name: str
) -> None:
    made = plan({"program": program}, environ={"PATH": "/usr/bin"})
    assert [at for at in parts(made, SHOWN) if at not in ("/etc", "/opt", "/usr")] == (
        [shown] if shown else []
    )
    assert made.after[-2:] == (name, "--flag")


def test_a_working_directory_that_is_there_is_kept() -> None:
    made = plan({"shared": ("/home/u/project",)}, cwd="/home/u/project/src")
    assert ("--chdir", "/home/u/project/src") in pairwise(made.after)
    assert made.notes == ()


def test_it_starts_in_its_home_otherwise_and_that_is_said() -> None:
    made = plan()
    assert ("--chdir", "/home/u") in pairwise(made.after)
    assert "/home/u/work is not there" in made.notes[0]
    assert plan(cwd="/home/u").notes == ()


# -- network and displays ----------------------------------------------------------------------------


def test_the_network_is_asked_for() -> None:
    made = plan({"network": True}, scopes=True, resolv_conf="/run/resolve/stub.conf")
    assert "--unshare-net" not in made.before
    assert made.scope
    assert "/run/resolve/stub.conf" in parts(made, SHOWN)
    assert "/run/resolve/stub.conf" not in parts(plan(resolv_conf="/run/r"), SHOWN)
    assert "/etc/r" not in parts(plan({"network": True}, resolv_conf="/etc/r"), SHOWN)


@pytest.mark.parametrize(
    ("address", "scopes", "why"),
    [
        pytest.param(f"unix:abstract=/tmp/dbus-x,guid={GUID}", False, "@/tmp/dbus-x", id="old"),
        pytest.param(f"{SESSION};unix:abstract=y", False, "@y", id="one-of-two"),
        pytest.param("tcp:host=localhost,port=1", True, "tcp:host=localhost", id="tcp"),
    ],
)
def test_no_network_by_which_a_bus_could_be_reached(
    address: str, why: str, *, scopes: bool
) -> None:
    wish = {"network": True, "bus_addresses": (address,)}
    with pytest.raises(ConfigError, match=f"--net would let app reach the bus at .*{why}"):
        plan(wish, scopes=scopes)
    assert plan({"bus_addresses": (address,)}).notes


def test_an_abstract_bus_is_no_obstacle_where_the_kernel_keeps_it_away() -> None:
    wish = {"network": True, "bus_addresses": ("unix:abstract=x",)}
    assert plan(wish, scopes=True).scope


def test_an_older_kernel_is_told_of() -> None:
    assert "abstract sockets" in plan({"network": True}).notes[0]


def test_displays_are_asked_for() -> None:
    display = Display(name=":7", socket="/tmp/.X11-unix/X7", cookie="/home/u/.Xauthority")
    made = plan({"x11": display, "wayland": "/run/user/1000/wayland-3"})
    assert parts(made, SOCKET)[1:] == ["/tmp/.X11-unix/X7", "/run/user/1000/wayland-0"]
    assert "/run/user/1000/Xauthority" in parts(made, SHOWN)
    assert (made.environ["DISPLAY"], made.environ["WAYLAND_DISPLAY"]) == (":7", "wayland-0")
    assert made.environ["XAUTHORITY"] == "/run/user/1000/Xauthority"


def test_a_display_by_the_network_needs_the_network() -> None:
    display = Display(name="far:0")
    with pytest.raises(ConfigError, match="add --net"):
        plan({"x11": display})
    assert plan({"x11": display, "network": True}).environ["DISPLAY"] == "far:0"


def test_buses_are_found_in_addresses_and_environment() -> None:
    addresses = (f"{SESSION},guid={GUID};unix:path=/b", "", "nonsense", "unix:runtime=yes")
    places = find_buses((*addresses, "unix:abstract=a"), {"XDG_RUNTIME_DIR": "/r"})
    assert places == Places(
        paths=("/run/user/1000/bus", "/b", "/r/bus"), abstract=("a",), elsewhere=("nonsense",)
    )
    assert addresses_in({"AT_SPI_BUS_ADDRESS": "a", "DBUS_SYSTEM_BUS_ADDRESS": "", "X": "b"}) == (
        "a",
    )
