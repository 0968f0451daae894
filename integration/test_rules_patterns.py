"""Rules on real buses: names, paths, interfaces and members, and whose names count."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from integration.harness.buses import KINDS, open_bus
from integration.harness.processes import PYTHON
from integration.harness.rawclient import BUS, BUS_PATH, RawClient
from integration.harness.service import ECHO, PATH as ECHO_PATH
from integration.harness.stage import DENIED, PASSED, UNKNOWN, Stage, call, listen, refusal, signal
from integration.harness.supervised import Warden, open_warden

# names


def test_exact_name_is_that_name_alone(stage: Stage) -> None:
    name = stage.name()
    below, longer = f"{name}.below", f"{name}er"
    host, others = stage.host(name), stage.host(below, longer)
    app = stage.app(f"send:{name}")
    assert call(app, host, name) == PASSED
    assert call(app, others, below) == UNKNOWN
    assert call(app, others, longer) == UNKNOWN


def test_subtree_is_the_name_and_all_below(stage: Stage) -> None:
    name = stage.name()
    inside = [stage.host(name), stage.host(f"{name}.x"), stage.host(f"{name}.x.y-z")]
    sibling = stage.host(f"{name}x")
    app = stage.app(f"send:{name}.*")
    for host, each in zip(inside, (name, f"{name}.x", f"{name}.x.y-z"), strict=True):
        assert call(app, host, each) == PASSED
    assert call(app, sibling, f"{name}x") == UNKNOWN


def test_glob_names(stage: Stage) -> None:
    name = stage.name()
    item, other = stage.host(f"{name}.Item-1-2"), stage.host(f"{name}.Items")
    app = stage.app(f"send:{name}.Item-*")
    assert call(app, item, f"{name}.Item-1-2") == PASSED
    assert call(app, other, f"{name}.Items") == UNKNOWN
    stage.set_rules(app, f"send:{name}.Item?")
    assert call(app, item, f"{name}.Item-1-2") == UNKNOWN
    assert call(app, other, f"{name}.Items") == PASSED


def test_glob_name_that_is_taken_later(stage: Stage) -> None:
    name = stage.name()
    app, host = stage.app(f"send:{name}.Item-*"), stage.host()
    assert call(app, host, host.unique_name) == UNKNOWN
    assert host.request_name(f"{name}.Item-7") == 1
    assert call(app, host, host.unique_name) == PASSED
    assert host.release_name(f"{name}.Item-7") == 1
    assert call(app, host, host.unique_name) == UNKNOWN


# paths, interfaces, members


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("/a/b", ["/a/b"], ["/a", "/a/b/c", "/a/bc"]),
        ("/a/*", ["/a/b"], ["/a", "/a/b/c", "/b"]),
        ("/a/*/c", ["/a/b/c"], ["/a/c", "/a/b/b/c"]),
        ("/a/**", ["/a/b", "/a/b/c"], ["/b", "/ab"]),
        ("/a/?", ["/a/b"], ["/a/bb"]),
        ("/a/[bc]", ["/a/b", "/a/c"], ["/a/d"]),
        ("/a/{one,two}", ["/a/one", "/a/two"], ["/a/three", "/a/onetwo"]),
    ],
)
def test_path_globs(stage: Stage, pattern: str, inside: list[str], outside: list[str]) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}@{pattern}")
    for path in inside:
        assert call(app, host, name, path=path) == PASSED, path
    for path in outside:
        assert call(app, host, name, path=path) == DENIED, path


def test_interface_globs(stage: Stage) -> None:
    name = stage.name()
    host, app = (
        stage.host(name),
        stage.app(f"send:{name}:org.one.*.*", f"send:{name}:org.t[wx]o.Do"),
    )
    assert call(app, host, name, interface="org.one.Iface") == PASSED
    assert call(app, host, name, interface="org.two", member="Do") == PASSED
    assert call(app, host, name, interface="org.two", member="Undo") == DENIED
    assert call(app, host, name, interface="org.three") == DENIED


def test_rule_with_an_interface_is_not_about_calls_without_one(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}:org.one.*")
    assert call(app, host, name, interface=None) == DENIED
    stage.set_rules(app, f"send:{name}:Do")
    assert call(app, host, name, interface=None) == PASSED


def test_member_globs(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}:org.one.{{Get*,S?t}}")
    for member in ("Get", "GetAll", "Set"):
        assert call(app, host, name, interface="org.one", member=member) == PASSED, member
    for member in ("Forget", "Seat", "Remove"):
        assert call(app, host, name, interface="org.one", member=member) == DENIED, member


def test_patterns_hold_for_what_comes_in(stage: Stage) -> None:
    name = stage.name()
    host = stage.host(f"{name}.Item-1")
    app = stage.app(f"receive:{name}.Item-*@/a/**:org.one.Get*", from_host=False)

    def arrives(path: str, interface: str, member: str) -> bool:
        answer = call(host, app, app.unique_name, path=path, interface=interface, member=member)
        assert answer in (PASSED, DENIED)
        return answer == PASSED

    assert arrives("/a/b/c", "org.one", "GetIt")
    assert not arrives("/b", "org.one", "GetIt")
    assert not arrives("/a/b", "org.two", "GetIt")
    assert not arrives("/a/b", "org.one", "SetIt")


# a name is about connections


def test_rule_counts_by_whatever_name_the_owner_is_called(stage: Stage) -> None:
    name, other = stage.name(), stage.name()
    host, app = stage.host(name, other), stage.app(f"send:{name}")
    assert call(app, host, name) == PASSED
    assert call(app, host, host.unique_name) == PASSED
    assert call(app, host, other) == PASSED


def test_deny_counts_by_whatever_name_the_owner_is_called(stage: Stage) -> None:
    name, denied = stage.name(), stage.name()
    host, app = stage.host(name, denied), stage.app("send:", deny=[f"send:{denied}"])
    for destination in (name, denied, host.unique_name):
        assert call(app, host, destination) in (DENIED, UNKNOWN)


def test_owner_is_seen_by_all_its_names(stage: Stage) -> None:
    name, other = stage.name(), stage.name()
    host, app = stage.host(name, other), stage.app(f"see:{name}")
    assert app.name_owner(other) == host.unique_name
    for destination in (name, other, host.unique_name):
        assert call(app, host, destination) == DENIED, destination


def test_right_leaves_with_the_name(stage: Stage) -> None:
    name = stage.name()
    first, second, app = stage.host(name), stage.host(), stage.app(f"send:{name}")
    assert call(app, first, first.unique_name) == PASSED
    assert first.release_name(name) == 1
    assert second.request_name(name) == 1
    assert call(app, first, first.unique_name) == UNKNOWN
    assert call(app, second, name) == PASSED
    assert call(app, second, second.unique_name) == PASSED


def test_rule_may_name_a_unique_name(stage: Stage) -> None:
    name = stage.name()
    host, other = stage.host(name), stage.host()
    app = stage.app(f"send:{host.unique_name}")
    assert call(app, host, host.unique_name) == PASSED
    assert call(app, host, name) == PASSED
    assert call(app, other, other.unique_name) == UNKNOWN


def test_receive_counts_the_names_of_the_sender(stage: Stage) -> None:
    name = stage.name()
    host, stranger = stage.host(name), stage.host()
    app = listen(stage.app(f"receive:{name}", from_host=False))
    assert call(host, app, app.unique_name) == PASSED
    assert signal(host, app)
    assert call(stranger, app, app.unique_name) == DENIED
    assert not signal(stranger, app)
    assert host.release_name(name) == 1
    assert call(host, app, app.unique_name) == DENIED
    assert not signal(host, app)


# names that are activatable, and nobody owns yet


STARTED = "org.example.Started"
HIDDEN = "org.example.Hidden"


@contextmanager
def _activating(kind: str, folder: Path) -> Iterator[Warden]:
    command = [PYTHON, "-m", "integration.harness.service", "--name"]
    services = {name: [*command, name] for name in (STARTED, HIDDEN)}
    with open_bus(kind, folder, services) as bus, open_warden(bus, folder / "run") as warden:
        yield warden


def _start(client: RawClient, name: str) -> tuple[str, str] | None:
    return refusal(client, BUS, BUS_PATH, BUS, "StartServiceByName", "su", (name, 0))


def _ping(client: RawClient) -> tuple[str, str] | None:
    return refusal(client, STARTED, ECHO_PATH, ECHO, "Ping")


@pytest.mark.parametrize("kind", KINDS)
def test_call_to_an_activatable_name_starts_it_if_it_may(kind: str, folder: Path) -> None:
    with _activating(kind, folder) as warden:
        for deny in (f"send:{STARTED}", f"send:{STARTED}:{ECHO}.Ping"):
            denied = warden.connect(warden.add_server(rules=[f"see+send:{STARTED}"], deny=[deny]))
            error = _ping(denied)
            assert error is not None
            assert error[0] == DENIED
        # Whoever will own it counts as the host.
        rule = f"send:{STARTED},peer=app:org.example.Type/app"
        elsewhere = warden.connect(warden.add_server(rules=[rule]))
        error = _ping(elsewhere)
        assert error is not None
        assert error[0] == UNKNOWN
        assert not warden.host.driver("NameHasOwner", "s", STARTED)[0]
        app = warden.connect(warden.add_server(rules=[f"send:{STARTED},peer=host"]))
        assert _ping(app) is None
        assert app.name_owner(STARTED) == warden.host.name_owner(STARTED)


@pytest.mark.parametrize("kind", KINDS)
def test_start_service_needs_send(kind: str, folder: Path) -> None:
    with _activating(kind, folder) as warden:
        host = warden.host
        app = warden.connect(warden.add_server(rules=[f"see:{STARTED}"]))
        assert app.driver("ListActivatableNames")[0] == [
            name for name in host.driver("ListActivatableNames")[0] if name in (BUS, STARTED)
        ]
        error = _start(app, STARTED)
        assert error is not None
        assert error[0] == DENIED
        # A hidden service is as one that is not there.
        absent = _start(host, "org.example.Absent")
        assert absent is not None
        assert _start(app, HIDDEN) == (absent[0], absent[1].replace("Absent", "Hidden"))
        for name in (STARTED, HIDDEN):
            assert not host.driver("NameHasOwner", "s", name)[0]

        allowed = warden.connect(warden.add_server(rules=[f"send:{STARTED}:{ECHO}.Ping"]))
        assert allowed.driver("StartServiceByName", "su", STARTED, 0) == (1,)
        assert host.driver("NameHasOwner", "s", STARTED) == (True,)
        assert allowed.driver("StartServiceByName", "su", STARTED, 0) == (2,)
