"""What an honest client of `buswarden proxy` meets, and of the real xdg-dbus-proxy: the same, on both buses.

Each test runs on both programs. What differs on purpose is in test_proxy_differences.py.
"""

import os

import pytest

from integration.harness.processes import wait_until
from integration.harness.proxies import (
    OTHER,
    PROGRAMS,
    SECOND,
    STARTED,
    Scene,
    World,
    echo_error,
    error_of,
)
from integration.harness.rawclient import RawClient
from integration.harness.service import ECHO, PATH
from integration.harness.stage import DENIED, NO_OWNER, UNKNOWN, call, signal

PEER = "org.freedesktop.DBus.Peer"
PROPERTIES = "org.freedesktop.DBus.Properties"


@pytest.fixture(params=list(PROGRAMS))
def scene(request: pytest.FixtureRequest, world: World) -> Scene:
    return Scene(kind=request.param, world=world)


# -- levels ------------------------------------------------------------------------------------------


def test_a_hidden_name_is_not_there(scene: Scene) -> None:
    with scene.client() as app:
        assert app.driver("NameHasOwner", "s", ECHO) == (False,)
        assert error_of(app, "GetNameOwner", "s", ECHO) == NO_OWNER
        assert ECHO not in app.list_names()
        assert echo_error(app, ECHO) == UNKNOWN
        assert error_of(app, "StartServiceByName", "su", ECHO, 0) == UNKNOWN


def test_a_hidden_unique_name_is_not_there(scene: Scene) -> None:
    owner = scene.world.host.name_owner(ECHO)
    with scene.client() as app:
        assert app.driver("NameHasOwner", "s", owner) == (False,)
        assert error_of(app, "GetNameOwner", "s", owner) == NO_OWNER
        assert owner not in app.list_names()
        assert echo_error(app, owner) in (UNKNOWN, NO_OWNER)


def test_a_name_to_see_is_seen_and_no_more(scene: Scene) -> None:
    with scene.client(f"--see={ECHO}") as app:
        owner = app.name_owner(ECHO)
        assert app.driver("NameHasOwner", "s", ECHO) == (True,)
        assert {ECHO, owner} <= set(app.list_names())
        assert app.driver("GetConnectionUnixUser", "s", ECHO) == (os.getuid(),)
        assert echo_error(app, ECHO) == DENIED
        assert echo_error(app, owner) == DENIED
        assert error_of(app, "StartServiceByName", "su", ECHO, 0) == DENIED


def test_a_name_to_talk_to(scene: Scene) -> None:
    with scene.client(f"--talk={ECHO}") as app:
        assert echo_error(app, ECHO) == ""
        assert echo_error(app, app.name_owner(ECHO)) == ""
        assert echo_error(app, ECHO, interface="org.example.Else", path="/else") == ""


def test_a_service_may_be_started_by_who_may_talk_to_it(scene: Scene) -> None:
    with scene.client(f"--talk={STARTED}") as app:
        assert STARTED in app.driver("ListActivatableNames")[0]
        assert app.driver("StartServiceByName", "su", STARTED, 0)[0] in (1, 2)
        assert echo_error(app, STARTED) == ""
    with scene.client(f"--see={STARTED}") as app:
        assert STARTED in app.driver("ListActivatableNames")[0]
        assert error_of(app, "StartServiceByName", "su", STARTED, 0) == DENIED
    with scene.client() as app:
        assert STARTED not in app.driver("ListActivatableNames")[0]
        assert error_of(app, "StartServiceByName", "su", STARTED, 0) == UNKNOWN


def test_a_service_is_started_by_a_call(scene: Scene) -> None:
    with scene.client(f"--talk={STARTED}") as app:
        if app.driver("NameHasOwner", "s", STARTED) == (True,):
            app.ask(STARTED, PATH, ECHO, "Quit")
            # It answers before it goes.
            assert wait_until(lambda: app.driver("NameHasOwner", "s", STARTED) == (False,))
        assert echo_error(app, STARTED) == ""


def test_another_name_of_an_owner_stays_hidden(scene: Scene) -> None:
    with scene.client(f"--talk={ECHO}") as app:
        assert app.driver("NameHasOwner", "s", OTHER) == (False,)
        assert OTHER not in app.list_names()
        assert echo_error(app, OTHER) == UNKNOWN


def test_other_owners_stay_hidden(scene: Scene) -> None:
    with scene.client(f"--talk={ECHO}") as app:
        assert echo_error(app, SECOND) == UNKNOWN
        assert error_of(app, "GetNameOwner", "s", SECOND) == NO_OWNER


def test_a_name_to_own(scene: Scene) -> None:
    with scene.client("--own=org.example.Mine") as app:
        assert app.request_name("org.example.Mine") == 1
        assert app.driver("ListQueuedOwners", "s", "org.example.Mine") == ([app.unique_name],)
        assert scene.world.host.name_owner("org.example.Mine") == app.unique_name
        assert call(scene.world.host, app, "org.example.Mine") == "passed"
        assert app.release_name("org.example.Mine") == 1


@pytest.mark.parametrize("member", ["RequestName", "ReleaseName", "ListQueuedOwners"])
def test_program_p2_a_name_that_may_not_be_owned(scene: Scene, member: str) -> None:
    options = (
        "--talk=org.example.Mine",
        f"--see={ECHO}",
        "--own=org.example.Sub.*",
        "--see=org.example.Subs",
    )
    more: tuple[object, ...] = (0,) if member == "RequestName" else ()
    with scene.client(*options) as app:
        for name, error in (
            ("org.example.Mine", DENIED),
            (ECHO, DENIED),
            ("org.example.Subs", DENIED),
            ("org.example.Subs.x", UNKNOWN),
            (SECOND, UNKNOWN),
        ):
            assert error_of(app, member, "su" if more else "s", name, *more) == error, name
        assert app.request_name("org.example.Sub.x1.y") == 1
        assert app.request_name("org.example.Sub") == 1


def test_bug_9_who_waits_for_a_name_is_told(scene: Scene) -> None:
    host = scene.world.host
    assert host.request_name("org.example.Queued") == 1
    with (
        scene.client("--own=org.example.Queued") as app,
        RawClient.connect(scene.world.bus.address) as waiting,
    ):
        assert waiting.request_name("org.example.Queued", 0) == 2
        assert app.request_name("org.example.Queued", 0) == 2
        queue = [host.unique_name, waiting.unique_name, app.unique_name]
        assert app.driver("ListQueuedOwners", "s", "org.example.Queued") == (queue,)
    assert host.release_name("org.example.Queued") == 1


def test_own_gives_talk_and_talk_gives_see(scene: Scene) -> None:
    with scene.client(f"--own={ECHO}", f"--talk={SECOND}") as app:
        assert echo_error(app, ECHO) == ""
        assert {ECHO, SECOND} <= set(app.list_names())


@pytest.mark.parametrize(
    ("option", "passes"),
    [
        ("--talk=org.example.*", True),
        ("--talk=org.example.Echo.*", True),
        ("--talk=org.example.Ech.*", False),
        ("--talk=org.example.Echo.Sub", False),
        ("--talk=org.examples.*", False),
    ],
)
def test_a_subtree_is_the_name_and_all_below(scene: Scene, option: str, passes: bool) -> None:
    with scene.client(option) as app:
        assert echo_error(app, ECHO) == ("" if passes else UNKNOWN)


def test_the_strongest_option_for_a_name_counts(scene: Scene) -> None:
    with scene.client(f"--talk={ECHO}", f"--see={ECHO}", "--see=org.example.*") as app:
        assert echo_error(app, ECHO) == ""
        assert echo_error(app, SECOND) == DENIED


# -- rules --------------------------------------------------------------------------------------------

# What is called: (path, interface, member).
PROBES = {
    "a": ("/a", "x.Y", "M"),
    "below": ("/a/b", "x.Y", "M"),
    "beside": ("/ab", "x.Y", "M"),
    "member": ("/a", "x.Y", "N"),
    "inner": ("/a", "x.Y.Z", "M"),
    "none": ("/a", None, "M"),
}
CALL_RULES = {
    "*": set(PROBES),
    "": set(PROBES),
    "x.Y.*": {"a", "below", "beside", "member"},
    "x.Y.M": {"a", "below", "beside"},
    "x.Y": set(),
    "*@/a": {"a", "member", "inner", "none"},
    "@/a": {"a", "member", "inner", "none"},
    "*@/a/*": {"a", "below", "member", "inner", "none"},
    "*@/*": set(PROBES),
    "@": set(PROBES),
    "x.Y.M@/a": {"a"},
    "x.Y.*@/a/*": {"a", "below", "member"},
    "*.Foo": set(PROBES),
    "x.*.M": set(),
    "x.Y.M*": set(),
    "x.Y.M@/a@/b": set(),
}


@pytest.mark.parametrize("rule", CALL_RULES)
def test_calls_by_rule(scene: Scene, rule: str) -> None:
    name = "org.example.Ruled"
    passed = set()
    with RawClient.connect(scene.world.bus.address) as service:
        assert service.request_name(name) == 1
        with scene.client(f"--call={name}={rule}") as app:
            for probe, (path, interface, member) in PROBES.items():
                result = call(app, service, name, path=path, interface=interface, member=member)
                assert result in ("passed", DENIED)
                if result == "passed":
                    passed.add(probe)
    assert passed == CALL_RULES[rule]


BROADCASTS = {probe: what for probe, what in PROBES.items() if what[1] is not None}


@pytest.mark.parametrize("rule", ["*", "x.Y.*", "x.Y.M", "*@/a", "*@/a/*", "x.Y.M@/a", "x.Y"])
def test_broadcasts_by_rule(scene: Scene, rule: str) -> None:
    name = "org.example.Ruled"
    passed = set()
    with RawClient.connect(scene.world.bus.address) as service:
        assert service.request_name(name) == 1
        with scene.client(f"--broadcast={name}={rule}") as app:
            app.add_match("type='signal'")
            for probe, (path, interface, member) in BROADCASTS.items():
                assert interface is not None
                if signal(service, app, path=path, interface=interface, member=member):
                    passed.add(probe)
    assert passed == CALL_RULES[rule] & set(BROADCASTS)


def test_a_call_rule_makes_the_name_seen(scene: Scene) -> None:
    with scene.client(f"--call={ECHO}={ECHO}.Echo@{PATH}") as app:
        assert ECHO in app.list_names()
        assert app.driver("GetConnectionUnixUser", "s", ECHO) == (os.getuid(),)
        assert echo_error(app, ECHO) == ""
        assert echo_error(app, app.name_owner(ECHO)) == ""
        assert echo_error(app, ECHO, path="/else") == DENIED


def test_a_call_rule_lets_the_service_be_started(scene: Scene) -> None:
    with scene.client(f"--call={STARTED}=*@/nowhere") as app:
        assert app.driver("StartServiceByName", "su", STARTED, 0)[0] in (1, 2)


def test_rules_add_up(scene: Scene) -> None:
    with scene.client(f"--call={ECHO}=*@/one", f"--call={ECHO}=*@/two") as app:
        assert echo_error(app, ECHO, path="/one") == echo_error(app, ECHO, path="/two") == ""
        assert echo_error(app, ECHO, path="/three") == DENIED


def test_a_rule_for_a_subtree(scene: Scene) -> None:
    with scene.client(f"--call=org.example.*=*@{PATH}") as app:
        assert echo_error(app, ECHO) == echo_error(app, SECOND) == ""
        assert echo_error(app, SECOND, path="/else") == DENIED
