"""Rules on real buses that change while connections are held: both ways, at once, and whole or not at all."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from broker.wire.header import Flag, MessageType
from integration.harness.clients import TEXT_CALLS
from integration.harness.messages import make_header, make_message
from integration.harness.rawclient import BUS, CallError, RawClient
from integration.harness.service import ECHO, PATH as ECHO_PATH, running_service
from integration.harness.stage import (
    DENIED,
    INTERFACE,
    OWNER_CHANGED,
    PASSED,
    PATH,
    UNKNOWN,
    Stage,
    arrivals,
    call,
    listen,
    mute_call,
    settle,
    signal,
    told,
)
from integration.harness.supervised import DENY, PATH_SUBTREE, SEE, SEND

CHANGES = 100


# one held connection


def test_send_is_given_and_taken_on_a_held_connection(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"see:{name}")
    for _ in range(3):
        assert call(app, host, name) == DENIED
        assert not mute_call(app, host, name)
        assert not signal(app, host, name)
        stage.set_rules(app, f"send:{name}")
        # Twice: the second time by the verdict that is remembered.
        for _ in range(2):
            assert call(app, host, name) == PASSED
            assert mute_call(app, host, name)
            assert signal(app, host, name)
        stage.set_rules(app, f"see:{name}")


def test_receive_is_given_and_taken_on_a_held_connection(stage: Stage) -> None:
    host, app = stage.host(), listen(stage.app(from_host=False))
    to = app.unique_name
    for _ in range(3):
        assert call(host, app, to) == DENIED
        assert not mute_call(host, app, to)
        assert not signal(host, app, to)
        assert not signal(host, app)
        stage.set_rules(app, "receive:")
        for _ in range(2):
            assert call(host, app, to) == PASSED
            assert mute_call(host, app, to)
            assert signal(host, app, to)
            assert signal(host, app)
        stage.set_rules(app)


def test_change_is_for_all_connections_of_the_sandbox_and_no_other(stage: Stage) -> None:
    name = stage.name()
    host, app, other = stage.host(name), stage.app(), stage.app()
    held = [app, *(stage.warden.connect(stage.sandbox(app)) for _ in range(3))]
    stage.set_rules(app, f"send:{name}")
    assert [call(each, host, name) for each in held] == [PASSED] * 4
    assert call(other, host, name) == UNKNOWN
    stage.set_rules(app)
    assert [call(each, host, name) for each in held] == [UNKNOWN] * 4


def test_rules_are_added_or_replaced(stage: Stage) -> None:
    name, other = stage.name(), stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    second = stage.host(other)
    change, sandbox = stage.warden.change_access, stage.sandbox(app)
    assert change(sandbox, rules=[f"send:{other}"]) == [
        (False, f"send:{name}"),
        (False, f"send:{other}"),
    ]
    assert [call(app, host, name), call(app, second, other)] == [PASSED, PASSED]
    assert change(sandbox, rules=[f"send:{other}"], replace=True) == [(False, f"send:{other}")]
    assert [call(app, host, name), call(app, second, other)] == [UNKNOWN, PASSED]
    stage.warden.set_access(sandbox, (SEE | PATH_SUBTREE, name, "/", ""))
    assert [call(app, host, name), call(app, second, other)] == [DENIED, UNKNOWN]


@pytest.mark.parametrize("library", TEXT_CALLS)
def test_every_library_before_and_after(stage: Stage, library: str) -> None:
    name = stage.name()
    app = stage.app(f"see:{name}")
    address = stage.sandbox(app).address

    def echo() -> str:
        outcome = TEXT_CALLS[library](address, name, ECHO_PATH, f"{ECHO}.Echo", "hello there")
        return outcome.out if outcome.ok else outcome.err

    with running_service(stage.warden.bus.address, name):
        refused = ("AccessDenied", "may not call", "Access denied")
        assert any(word in echo() for word in refused)
        stage.set_rules(app, f"send:{name}")
        assert "hello there" in echo()
        stage.set_rules(app, f"see:{name}")
        assert any(word in echo() for word in refused)


# names


def test_own_taken_away_releases_the_name(stage: Stage) -> None:
    name, kept = stage.name(), stage.name()
    host, app = stage.host(), stage.app(f"own:{name}", f"own:{kept}")
    app.add_match(OWNER_CHANGED)
    assert [app.request_name(each) for each in (name, kept)] == [1, 1]
    told(app)
    stage.set_rules(app, f"own:{kept}")
    assert app.wait_signal("NameLost").values == (name,)
    settle(app)
    assert told(app) == [(name, app.unique_name, "")]
    assert not host.driver("NameHasOwner", "s", name)[0]
    assert host.name_owner(kept) == app.unique_name
    assert host.request_name(name) == 1


def test_own_taken_away_ends_the_wait_for_the_name(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"own:{name}")
    assert app.request_name(name, 0) == 2
    stage.set_rules(app)
    settle(app)
    assert host.release_name(name) == 1
    assert not host.driver("NameHasOwner", "s", name)[0]


def test_sight_given_and_taken_is_told_as_an_owner_change(stage: Stage) -> None:
    name, absent = stage.name(), stage.name()
    host, app = stage.host(name), stage.app()
    app.add_match(OWNER_CHANGED)
    for access in ("see", "send", "own", "receive"):
        stage.set_rules(app, f"{access}:{name}", f"{access}:{absent}")
        assert told(app) == [(name, "", host.unique_name)], access
        stage.set_rules(app, f"see:{name}.*", f"{access}:{absent}")
        assert told(app) == []
        stage.set_rules(app)
        assert told(app) == [(name, host.unique_name, "")]


@pytest.mark.parametrize("rule", ["see:{}", "see:{}.*", "own:{}", "see:,peer=host", "see:{}*"])
def test_sight_that_comes_and_goes_quickly_is_told_in_turn(stage: Stage, rule: str) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app()
    app.add_match(f"{OWNER_CHANGED},arg0='{name}'")
    for _ in range(20):
        stage.set_rules(app, rule.format(name))
        stage.set_rules(app)
    stage.set_rules(app, rule.format(name))
    # What was gone again before its owner was known need not be told.
    changes = told(app)
    came, went = (name, "", host.unique_name), (name, host.unique_name, "")
    assert changes[-1] == came
    assert changes == [came, went] * (len(changes) // 2) + [came]
    assert host.release_name(name) == 1
    assert told(app) == [went]


def test_sight_is_told_only_to_who_subscribed(stage: Stage) -> None:
    name, other = stage.name(), stage.name()
    host, app = stage.host(name, other), stage.app()
    app.add_match(f"{OWNER_CHANGED},arg0='{other}'")
    stage.set_rules(app, f"see:{name}", f"see:{other}")
    assert told(app) == [(other, "", host.unique_name)]


# all or nothing


@pytest.mark.parametrize("bad", ["send:org..x", "dance:", "send:a.b@nopath", "own:a.b@/x"])
def test_list_with_one_bad_rule_is_refused_whole(stage: Stage, bad: str) -> None:
    good, other = stage.name(), stage.name()
    host, second, app = stage.host(good), stage.host(other), stage.app(f"send:{good}")
    before = stage.warden.show(stage.sandbox(app))["access"]
    for replace in (False, True):
        with pytest.raises(CallError, match="InvalidArgs"):
            stage.warden.change_access(
                stage.sandbox(app),
                rules=[f"send:{other}", bad],
                deny=[f"send:{good}"],
                replace=replace,
            )
    assert stage.warden.show(stage.sandbox(app))["access"] == before
    assert call(app, host, good) == PASSED
    assert call(app, second, other) == UNKNOWN


@pytest.mark.parametrize("flags", [0, DENY, 0x800 | SEND, 0x80000000 | SEND])
def test_usos_with_bad_flags_are_refused_whole(stage: Stage, flags: int) -> None:
    name, other = stage.name(), stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    with pytest.raises(CallError, match="InvalidArgs"):
        stage.warden.set_access(
            stage.sandbox(app),
            (SEND | PATH_SUBTREE, other, "/", ""),
            (flags | PATH_SUBTREE, other, "/", ""),
        )
    assert call(app, host, name) == PASSED


# at once


class _Hammer:
    """Sends signals to one connection all the time, each with the phase in which it was sent."""

    def __init__(self, sender: RawClient, destination: str) -> None:
        self.phase = "between"
        self.sent: dict[str, int] = {}
        self._sender = sender
        self._destination = destination
        self._lock = threading.Lock()
        self._over = False

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._over = True
            thread.join()

    def between(self) -> None:
        """End the phase, once all that was sent in it has been judged."""
        with self._lock:
            settle(self._sender)
            self.phase = "between"

    def wait(self, number: int) -> None:
        """Let it send so many in this phase."""
        deadline = time.monotonic() + 60  # a machine may be busy
        phase = self.phase
        while self.sent.get(phase, 0) < number:
            assert time.monotonic() < deadline
            time.sleep(0.0005)

    def _run(self) -> None:
        while not self._over:
            with self._lock:
                phase = self.phase
                self._sender.send_raw(b"".join(self._message(phase, kind) for kind in _KINDS * 2))
                self.sent[phase] = self.sent.get(phase, 0) + 4
            time.sleep(0.0002)

    def _message(self, phase: str, kind: MessageType) -> bytes:
        header = make_header(
            kind,
            self._sender.next_serial(),
            flags=Flag.NO_REPLY_EXPECTED,
            path=PATH,
            interface=INTERFACE,
            member="Hammer",
            destination=self._destination,
            signature="s",
        )
        return make_message(header, (phase,))


_KINDS = (MessageType.METHOD_CALL, MessageType.SIGNAL)


@pytest.mark.parametrize("direction", ["out", "in"])
def test_after_the_change_nothing_is_judged_by_the_old_rules(stage: Stage, direction: str) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(from_host=False)
    out = direction == "out"
    sender, receiver = (app, host) if out else (host, app)
    allowed = f"send:{name}" if out else "receive:"
    hammer = _Hammer(sender, receiver.unique_name)
    seen: dict[str, int] = {}
    with hammer.running():
        for number in range(CHANGES):
            hammer.between()
            _count(receiver, seen)
            passes = bool(number % 2)
            # Both ways to change them.
            if number % 4 < 2:
                stage.set_rules(app, *([allowed] if passes else []))
            else:
                flags = SEND if out else 0x4
                usos = [(flags | PATH_SUBTREE, name if out else "", "/", "")]
                stage.warden.set_access(stage.sandbox(app), *(usos if passes else []))
            hammer.phase = f"{number} {'passes' if passes else 'vanishes'}"
            hammer.wait(8)
        hammer.between()
    _count(receiver, seen)
    hammered = {phase: n for phase, n in hammer.sent.items() if phase != "between"}
    assert len(hammered) == CHANGES
    for phase, number in hammered.items():
        assert seen.get(phase, 0) == (number if phase.endswith("passes") else 0), phase


def _count(receiver: RawClient, seen: dict[str, int]) -> None:
    for message in arrivals(receiver):
        (phase,) = message.values
        seen[phase] = seen.get(phase, 0) + 1


def test_change_while_the_owner_of_a_name_is_asked_for(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app("send:,peer=host")
    for _ in range(20):
        # The first message to a name that no rule names waits for the answer of the bus.
        serial = app.start_call(name, PATH, INTERFACE, "Do", flags=0)
        stage.set_rules(app)
        settle(app)
        passed = [each for each in arrivals(host) if each.header.type == MessageType.METHOD_CALL]
        for each in passed:
            host.reply(each)
        assert app.wait_reply(serial).error in (None, UNKNOWN)
        assert call(app, host, name) == UNKNOWN
        stage.set_rules(app, "send:,peer=host")
    assert app.name_owner(BUS) == BUS
