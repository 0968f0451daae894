"""An app's own connections talk to each other: those of one sandbox, and those of two of the same app.

The rules are what `policy import flatpak` gives, or two that a person would write.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from broker.wire.header import MessageType
from integration.harness.processes import PROJECT, Process, running
from integration.harness.rawclient import RawClient
from integration.harness.stage import (
    DENIED,
    INTERFACE,
    PASSED,
    PATH,
    UNKNOWN,
    Stage,
    arrivals,
    call,
    listen,
    settle,
    signal,
)
from integration.harness.supervised import Sandbox, Warden
from policy.importers.flatpak import import_flatpak
from policy.importers.report import Source
from policy.text import format_rule

TWO_OF: Final = ("one sandbox", "two sandboxes")
PYTHON_WITH_GI: Final = "/usr/bin/python3"


def flatpak_rules(app: str) -> tuple[list[str], list[str]]:
    """Return what the importer allows and denies an app of Flatpak on the session bus."""
    metadata = Source(name="metadata", text=f"[Application]\nname={app}\n")
    rules = [
        rule for rule in import_flatpak([metadata]).access.rules if rule.bus in (None, "session")
    ]
    allowed = [format_rule(rule) for rule in rules if not rule.deny]
    return allowed, [format_rule(rule) for rule in rules if rule.deny]


def pair(
    stage: Stage,
    which: str,
    app: str,
    *rules: str,
    deny: Sequence[str] = (),
    from_host: bool | None = None,
) -> list[RawClient]:
    """Return two connections of an app."""
    first = stage.app(*rules, deny=deny, app=app, from_host=from_host)
    if which == "two sandboxes":
        return [first, stage.app(*rules, deny=deny, app=app, from_host=from_host)]
    return [first, stage.warden.connect(stage.sandbox(first))]


def call_itself(app: RawClient, address: str, member: str = "Do") -> str:
    """Call a connection by some name of its own; return PASSED or the error."""
    serial = app.start_call(address, PATH, INTERFACE, member)
    first = app.receive()
    if first.header.type == MessageType.ERROR:
        assert first.header.reply_serial == serial
        return first.error or ""
    assert (first.header.sender, first.header.member) == (app.unique_name, member)
    app.reply(first, "s", ("answer",))
    assert app.wait_reply(serial).values == ("answer",)
    return PASSED


@pytest.mark.parametrize("which", TWO_OF)
def test_bug_1_two_rules_are_enough(stage: Stage, which: str) -> None:
    name = stage.name()
    first, second = pair(stage, which, name, f"own:{name}", f"send:{name}")
    assert first.request_name(name) == 1
    assert second.request_name(name, 4) == 3
    assert second.name_owner(name) == first.unique_name
    for address in (name, first.unique_name):
        assert call(second, first, address) == PASSED
        assert signal(second, first, address)
    # To whoever it is that called there is no rule, and xdg-dbus-proxy has none either.
    assert call(first, second, second.unique_name) == DENIED
    second.close()
    settle(first)


@pytest.mark.parametrize("which", TWO_OF)
def test_bug_1_imported_rules_let_an_app_talk_to_itself(stage: Stage, which: str) -> None:
    name = stage.name()
    allowed, denied = flatpak_rules(name)
    clients = pair(stage, which, name, *allowed, deny=denied)
    names = [name, f"{name}.Second"]
    for client, own in zip(clients, names, strict=True):
        assert client.request_name(own) == 1
        listen(client)
    one, two = clients
    for sender, receiver, own in ((one, two, names[1]), (two, one, names[0])):
        settle(sender)
        assert own in sender.list_names()
        assert sender.name_owner(own) == receiver.unique_name
        for address in (own, receiver.unique_name):
            assert call(sender, receiver, address) == PASSED
            assert signal(sender, receiver, address)
        assert signal(sender, receiver)


def test_bug_1_a_connection_may_call_itself(stage: Stage) -> None:
    name = stage.name()
    app = stage.app(f"own:{name}")
    assert app.request_name(name) == 1
    settle(app)
    app.queue.clear()
    for address in (name, app.unique_name):
        assert call_itself(app, address) == PASSED
    stage.set_rules(app, f"own:{name}", deny=["send::Undo"])
    assert call_itself(app, name, "Undo") == DENIED


@pytest.mark.parametrize("which", TWO_OF)
def test_bug_1_strict_lists_stay_exact(stage: Stage, which: str) -> None:
    name = stage.name()
    rules = (f"own:{name}", f"send:{name}")
    first, second = pair(stage, which, name, *rules, from_host=False)
    assert first.request_name(name) == 1
    assert call(second, first, name) == DENIED
    first.queue.clear()
    assert call_itself(first, name) == DENIED
    stage.set_rules(first, *rules, "receive:,peer=same-app")
    assert call(second, first, name) == PASSED


def test_bug_1_another_app_is_not_let_in(stage: Stage) -> None:
    name = stage.name()
    app = stage.app(f"own:{name}", app=name)
    other = stage.app(f"send:{name}", app=f"{name}.Other")
    assert app.request_name(name) == 1
    assert call(other, app, name) == DENIED
    assert not signal(other, app, name)
    # Without a rule to send nothing is let out, to the same app neither.
    twin = stage.app(app=name)
    assert call(twin, app, name) == UNKNOWN
    assert not signal(twin, app, name)
    assert not [each for each in arrivals(app) if each.header.type == MessageType.METHOD_CALL]


# a real one


@contextmanager
def application(address: str, name: str, log: Path) -> Iterator[Process]:
    """Start a Gio.Application; it says what it is and when it is activated."""
    script = PROJECT / "integration" / "harness" / "gio_application.py"
    env = {"DBUS_SESSION_BUS_ADDRESS": address}
    with running([PYTHON_WITH_GI, str(script), name], env=env, log=log) as process:
        yield process


@pytest.fixture(scope="module")
def has_gi(tmp_path_factory: pytest.TempPathFactory) -> None:
    log = tmp_path_factory.mktemp("gi") / "log"
    with running([PYTHON_WITH_GI, "-c", "import gi"], log=log) as process:
        if process.wait(30):
            pytest.skip("this machine has no python3-gi")


@pytest.mark.usefixtures("has_gi")
@pytest.mark.parametrize("which", TWO_OF)
def test_bug_1_second_start_of_an_application_reaches_the_first(
    shared: Warden, stage: Stage, which: str, tmp_path: Path
) -> None:
    name = stage.name()
    allowed, denied = flatpak_rules(name)

    def add() -> Sandbox:
        return shared.add_server(name, rules=allowed, deny=denied)

    one = add()
    two = one if which == "one sandbox" else add()
    with application(one.address, name, tmp_path / "first") as first:
        first.wait_line("primary")
        first.wait_line("activated")
        with application(two.address, name, tmp_path / "second") as second:
            second.wait_line("remote")
            assert second.wait() == 0, second.log
        first.wait_line("activated")
