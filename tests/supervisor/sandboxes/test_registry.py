import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from broker.control_protocol.messages import MAX_DENIAL_TEXT, Denied
from broker.supervisor.config import ConfiguredLimits
from broker.supervisor.sandboxes.lifecycle import Event, Phase
from broker.supervisor.sandboxes.registry import (
    BUILT_IN,
    MAX_DENIALS,
    NOTHING,
    Record,
    Registry,
    Removed,
    SandboxId,
)
from broker.wire.errors import LIMITS_EXCEEDED, NOT_CONTAINER, CallRefusedError
from policy.match import Judge
from policy.rules import Access, AccessList, Identity, Rule
from policy.wall import WALL, walled
from tests.helpers.records import make_record, make_snapshot, make_state

SMALL = ConfiguredLimits(
    max_containers=3, max_containers_per_user=2, max_container_metadata_bytes=10
)


def running(registry: Registry, number: int = 0, **fields: object) -> Record:
    record = make_record(number, **fields)
    registry.add(record)
    assert registry.announce(record.id) is None
    return record


def denied(sandbox: str = "c0", member: str = "M", more: int = 0) -> Denied:
    return Denied(
        sandbox=sandbox,
        bus="session",
        direction="send",
        kind="call",
        peer="org.example.X",
        member=member,
        more=more,
    )


def test_a_record_knows_its_names() -> None:
    record = make_record(7, component="part")
    assert record.id == "c7"
    assert record.path == "/org/freedesktop/DBus/Containers1/c7"
    assert record.identity == Identity(type="org.example.Type", app="app", component="part")


def test_a_rule_for_owning_lets_the_name_be_asked_for_where_that_needs_a_rule() -> None:
    own = Rule(access=frozenset({Access.OWN}), name="org.example.Mine", bus="session")
    record = make_record(access=AccessList(rules=(own,)), portals_as_host=True)
    assert record.in_force(AccessList()).rules == (own, *WALL)
    compiled = AccessList(rules=(), bus_by_rule=True)
    access = record.in_force(compiled)
    assert access.bus_by_rule
    judge = Judge(access, bus="session", me=record.identity)
    asking = ("/org/freedesktop/DBus", "org.freedesktop.DBus")
    for member, allowed in (("RequestName", True), ("ReleaseName", True), ("ListNames", False)):
        assert judge.send(("org.freedesktop.DBus",), *asking, member, None).allowed is allowed
    elsewhere = Judge(access, bus="system", me=record.identity)
    assert not elsewhere.send(("org.freedesktop.DBus",), *asking, "RequestName", None).allowed
    bare = make_record(access=AccessList(), portals_as_host=True)
    assert bare.in_force(compiled).rules == WALL


def test_portals_are_denied_unless_the_caller_insists() -> None:
    given = AccessList(rules=(Rule(access=frozenset({Access.SEND})),), receive_from_host=False)
    record = make_record(access=given)
    assert record.access_in_force.rules == (*given.rules, *BUILT_IN)
    assert not record.access_in_force.receive_from_host
    assert all(rule.deny and rule.origin for rule in BUILT_IN)
    insisting = msgspec.structs.replace(record, portals_as_host=True)
    assert insisting.access_in_force == walled(given)


def test_a_sandbox_is_found_by_id_and_by_path() -> None:
    registry = Registry(ConfiguredLimits())
    record = running(registry)
    assert registry.find("c0").record == record
    assert registry.find(record.path).record == record


@pytest.mark.parametrize("name", ["c1", "", "/", "0", "/org/freedesktop/DBus/Containers1/", "C0"])
def test_what_is_no_sandbox_is_not_found(name: str) -> None:
    registry = Registry(ConfiguredLimits())
    running(registry)
    with pytest.raises(CallRefusedError) as caught:
        registry.find(name)
    assert caught.value.dbus_name == NOT_CONTAINER


def test_each_limit_is_kept_and_named() -> None:
    registry = Registry(SMALL)
    running(registry, 0, uid=1)
    running(registry, 1, uid=1)
    for arguments, name in (((1, 0), "max_containers_per_user=2"), ((2, 11), "metadata_bytes=10")):
        with pytest.raises(CallRefusedError, match=name) as caught:
            registry.new_number(*arguments)
        assert caught.value.dbus_name == LIMITS_EXCEEDED
    assert registry.new_number(2, 10) == 2
    running(registry, 2, uid=2)
    with pytest.raises(CallRefusedError, match="max_containers=3"):
        registry.new_number(3, 0)


def test_a_sandbox_that_ended_counts_no_more_but_keeps_its_number() -> None:
    registry = Registry(SMALL)
    running(registry, 0, uid=1)
    running(registry, 1, uid=1)
    assert registry.end("c1", "stopped") is not None
    assert registry.new_number(1, 0) == 2


def test_an_end_is_told_once() -> None:
    registry = Registry(ConfiguredLimits())
    record = running(registry)
    assert registry.end("c0", "stopped") == Removed(record=record, reason="stopped")
    assert registry.end("c0", "stopped") is None
    assert registry.end("c9", "stopped") is None


def test_an_end_before_the_announcement_is_told_after_it() -> None:
    registry = Registry(ConfiguredLimits())
    record = make_record()
    registry.add(record)
    assert registry.end("c0", "close-notify") is None
    assert registry.get("c0") is None
    assert registry.announce(record.id) == Removed(record=record, reason="close-notify")
    assert len(registry) == 0


def test_a_sandbox_that_did_not_come_about_is_forgotten() -> None:
    registry = Registry(ConfiguredLimits(max_containers=1))
    registry.add(make_record())
    registry.withdraw(SandboxId("c0"))
    assert registry.end("c0", "stopped") is None
    assert registry.new_number(1000, 0) == 1


def test_connections_are_counted() -> None:
    registry = Registry(ConfiguredLimits())
    running(registry)
    registry.connect("c0", "session", ":1.5")
    registry.connect("c0", "system", ":1.5")
    registry.connect("c9", "system", ":1.6")
    assert registry.connection_count() == 2
    registry.disconnect("c0", "session", ":1.5")
    registry.disconnect("c0", "session", ":1.5")
    registry.disconnect("c9", "session", ":1.5")
    assert list(registry.find("c0").connections) == [("system", ":1.5")]


def test_denials_are_counted_and_the_last_are_kept_short() -> None:
    registry = Registry(ConfiguredLimits())
    running(registry)
    for number in range(MAX_DENIALS + 5):
        registry.deny(denied(member=str(number)))
    registry.deny(denied(member="x" * 1000, more=10))
    sandbox = registry.find("c0")
    assert sandbox.denied == MAX_DENIALS + 5 + 11
    assert len(sandbox.denials) == MAX_DENIALS
    assert sandbox.denials[-1].member == "x" * (MAX_DENIAL_TEXT - 1) + "…"
    assert registry.deny(denied(sandbox="c9")) is None


# -- reconciling ----------------------------------------------------------------------------------


def test_what_both_have_is_kept_with_the_gates_facts() -> None:
    record = make_record(4)
    registry = Registry(ConfiguredLimits(), [record], next_number=6)
    state = make_state(record, connections=(("session", ":1.9"),), denied=3)
    result = registry.reconcile(make_snapshot(state))
    assert not any((result.differences, result.strangers, result.lost, result.changed))
    sandbox = registry.find("c4")
    assert list(sandbox.connections) == [("session", ":1.9")]
    assert (sandbox.denied, sandbox.phase, registry.next_number) == (3, Phase.RUNNING, 6)


def test_what_only_the_gate_has_is_to_be_stopped_and_its_number_is_taken() -> None:
    registry = Registry(ConfiguredLimits())
    result = registry.reconcile(make_snapshot(make_state(make_record(8))))
    assert result.strangers == ("c8",)
    assert len(result.differences) == 1
    assert registry.next_number == 9


def test_what_only_we_have_has_ended() -> None:
    record = make_record(1)
    registry = Registry(ConfiguredLimits(), [record], next_number=2)
    result = registry.reconcile(make_snapshot())
    assert result.lost == (Removed(record=record, reason="gate-lost"),)
    assert registry.reconcile(make_snapshot()).lost == ()


def test_what_is_held_is_served_again() -> None:
    records = [make_record(number) for number in range(3)]
    registry = Registry(ConfiguredLimits(), records, next_number=3)
    registry.connect("c1", "session", ":1.9")
    registry.apply("c2", Event.STOP_ASKED)
    result = registry.reconcile(make_snapshot(), is_held=lambda record: record.number > 0)
    assert result.missing == ("c1",)
    assert [(one.record.id, one.reason) for one in result.lost] == [
        ("c0", "gate-lost"),
        ("c2", "stopped"),  # so it was decided before
    ]
    assert len(result.differences) == 3
    assert not registry.find("c1").connections
    assert registry.lose(SandboxId("c1")) == Removed(record=records[1], reason="gate-lost")
    assert registry.lose(SandboxId("c1")) is None


def test_what_was_closing_has_lost_its_last_connection() -> None:
    registry = Registry(ConfiguredLimits(), [make_record(listening=False)], next_number=1)
    (lost,) = registry.reconcile(make_snapshot()).lost
    assert lost.reason == "last-connection"


def test_what_is_just_being_added_is_left_alone() -> None:
    registry = Registry(ConfiguredLimits())
    registry.add(make_record(0))
    registry.add(make_record(1))
    result = registry.reconcile(make_snapshot(make_state(make_record(0))))
    assert not any((result.lost, result.strangers))
    assert len(registry) == 2


def test_a_gate_that_stopped_listening_is_believed() -> None:
    record = make_record()
    registry = Registry(ConfiguredLimits(), [record], next_number=1)
    result = registry.reconcile(make_snapshot(make_state(record, listening=False)))
    assert [changed.listening for changed in result.changed] == [False]
    assert not registry.find("c0").record.listening


def test_rules_that_were_never_acknowledged_are_set_again() -> None:
    record = make_record()
    registry = Registry(ConfiguredLimits(), [record], next_number=1)
    other = make_state(make_record(portals_as_host=True))
    assert registry.reconcile(make_snapshot(other)).other_access == ("c0",)


# What ends a sandbox for a reason of its own, and what the gate says when it is over.
DECIDED = {
    Event.STOP_ASKED: "stopped",
    Event.PROCESS_ENDED: "process-ended",
    Event.CGROUP_EMPTY: "cgroup-empty",
    Event.TIME_OVER: "time-limit",
    Event.BUS_GONE: "bus-gone",
}
OVER = {
    Event.PIPE_CLOSED: "close-notify",
    Event.LAST_CONNECTION: "last-connection",
    Event.STOPPED: "stopped",
    Event.REMOVED: "instance-removed",
    Event.GATE_LOST: "gate-lost",
}
CLOSED = {Event.CLOSE_ASKED: "last-connection", Event.CREATOR_LEFT: "creator-gone"}


class Expected:
    """Why a sandbox has to end, told without phases: the first that decides, or else what is over and why."""

    def __init__(self) -> None:
        self.decided = ""
        self.closing = ""

    def reason(self, event: Event) -> str:
        if not self.decided and self.closing and event in {Event.LAST_CONNECTION, Event.GATE_LOST}:
            return self.closing
        return self.decided or OVER[event]


class Lives(RuleBasedStateMachine):
    """Whatever happens in whatever order: ends are told once, after their announcement, for the first reason."""

    starting: Bundle[str] = Bundle("starting")
    known: Bundle[str] = Bundle("known")

    def __init__(self) -> None:
        super().__init__()
        self.registry = Registry(ConfiguredLimits(max_containers=5, max_containers_per_user=4))
        self.given: set[str] = set()
        self.announced: set[str] = set()
        self.removed: list[str] = []
        self.expected: dict[str, Expected] = {}
        self.ended: dict[str, str] = {}  # before the announcement, and why
        self.asked: set[str] = set()  # what the gate is to stop

    def take(self, removed: Removed | None, reason: str) -> None:
        if removed is not None:
            assert removed.record.id in self.announced
            assert removed.reason == reason
            self.removed.append(removed.record.id)

    @rule(target=starting, uid=st.integers(1, 2))
    def add(self, uid: int) -> str:
        try:
            number = self.registry.new_number(uid, 0)
        except CallRefusedError:
            mine = sum(sandbox.record.uid == uid for sandbox in self.registry)
            assert mine >= 4 or len(self.registry) >= 5
            return ""
        record = make_record(number, uid=uid)
        assert record.id not in self.given
        self.given.add(record.id)
        self.registry.add(record)
        return record.id

    @rule(target=known, id_=consumes(starting))
    def announce(self, id_: str) -> str:
        if id_:
            self.announced.add(id_)
            self.expected[id_] = Expected()
            removed = self.registry.announce(SandboxId(id_))
            assert (removed is not None) == (id_ in self.ended)
            self.take(removed, self.ended.get(id_, ""))
        return id_

    @rule(id_=consumes(starting))
    def withdraw(self, id_: str) -> None:
        if id_:
            self.registry.withdraw(SandboxId(id_))
            assert self.registry.get(id_) is None

    @rule(id_=st.one_of(known, starting), event=st.sampled_from([*DECIDED, *OVER, *CLOSED]))
    def happen(self, id_: str, event: Event) -> None:
        is_there = self.registry.get(id_) is not None
        step = self.registry.apply(id_, event)
        if id_ not in self.announced:
            assert step.removed is None
            if is_there and event in OVER and event is not Event.GATE_LOST:
                self.ended[id_] = OVER[event]
            return
        if not is_there:
            assert step == NOTHING
            return
        expected = self.expected[id_]
        if event in OVER:
            assert step.removed is not None
            self.take(step.removed, expected.reason(event))
            self.asked.discard(id_)
        elif event in DECIDED:
            expected.decided = expected.decided or DECIDED[event]
            self.asked.add(id_)
            assert step.removed is None
        elif not expected.decided:
            expected.closing = expected.closing or CLOSED[event]

    @rule(data=st.data())
    def restart_gate(self, data: st.DataObject) -> None:
        there = [sandbox.record for sandbox in self.registry]
        kept = [record for record in there if data.draw(st.booleans())]
        result = self.registry.reconcile(make_snapshot(*(make_state(record) for record in kept)))
        for removed in result.lost:
            id_ = removed.record.id
            self.take(removed, self.expected[id_].reason(Event.GATE_LOST))
            self.asked.discard(id_)

    @rule()
    def restart_supervisor(self) -> None:
        if not all(sandbox.is_announced for sandbox in self.registry):
            return
        records = [sandbox.record for sandbox in self.registry]
        limits = ConfiguredLimits(max_containers=5, max_containers_per_user=4)
        self.registry = Registry(limits, records, self.registry.next_number)
        for record in records:  # what was decided is decided again by whoever watches
            self.expected[record.id].decided = ""
        self.asked.clear()

    @invariant()
    def ends_are_told_once(self) -> None:
        assert len(self.removed) == len(set(self.removed))
        there = {sandbox.record.id for sandbox in self.registry}
        assert not there & set(self.removed)
        assert self.announced == set(self.removed) | (there & self.announced)

    @invariant()
    def phases_are_what_was_decided(self) -> None:
        for sandbox in self.registry:
            id_ = sandbox.record.id
            if sandbox.is_announced:
                assert (sandbox.phase is Phase.STOPPING) == (id_ in self.asked)
                assert sandbox.record.closing == self.expected[id_].closing

    @invariant()
    def nothing_leaks(self) -> None:
        uids = [sandbox.record.uid for sandbox in self.registry]
        assert self.registry._by_uid == {uid: uids.count(uid) for uid in set(uids)}


TestLives = Lives.TestCase


def test_what_closed_it_is_known_after_a_restart() -> None:
    registry = Registry(ConfiguredLimits())
    record = running(registry)
    closing = registry.apply(record.id, Event.CREATOR_LEFT).record
    assert closing is not None
    again = Registry(ConfiguredLimits(), [closing], next_number=1)
    assert again.find("c0").phase is Phase.CLOSING
    removed = again.end("c0", "last-connection")
    assert removed is not None
    assert removed.reason == "creator-gone"
    older = make_record(3, listening=False)
    assert Registry(ConfiguredLimits(), [older], 4).find("c3").reason == "last-connection"
