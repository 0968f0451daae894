"""The sandbox that caused a message of the bus pays for it, not its hearers."""

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from broker.gate.dumps import PayersDump
from broker.gate.filter.costs import ANSWER_COST, BUSY_SECOND, HEARD_COST, QUESTION_COST
from broker.gate.filter.payers import MAX_ARRIVING, MAX_LATE, MAX_MOVERS, Payers
from broker.gate.sandbox.budgets import MOST_OWED, MessageBudget
from broker.wire.matchrule import MatchRule
from policy.match import Judge
from policy.rules import Identity
from tests.helpers.messages import NO_REPLY, access, call, changed, driver_call, names, signal
from tests.helpers.modelbus import Dialogue, FakeHost, Town

HOST = ":1.9"
RATE = 1000


def request(name: str) -> bytes:
    return driver_call(40, "RequestName", "su", name, 0)


def release(name: str) -> bytes:
    return driver_call(41, "ReleaseName", "s", name)


def caused(talk: Dialogue) -> int:
    return talk.host.messages.caused


def left(talk: Dialogue) -> int:
    return talk.host.messages.left


class Counter:
    """Counts of a method's calls, and of the names they had."""

    def __init__(self) -> None:
        self.calls = self.names = 0


def count_calls(patch: pytest.MonkeyPatch, owner: type, method: str) -> Counter:
    counter = Counter()
    original = getattr(owner, method)

    def counted(self: object, *args: object, **options: object) -> object:
        counter.calls += 1
        if args and isinstance(args[0], (set, frozenset, tuple)):
            counter.names += len(args[0])
        return original(self, *args, **options)

    patch.setattr(owner, method, counted)
    return counter


# -- the attack, in its six shapes -----------------------------------------------------------------


def test_attack_c1_who_takes_a_name_and_gives_it_back_pays_for_what_comes_back() -> None:
    town = Town()
    flooder = town.add("own:org.a")
    before = caused(flooder)
    for _ in range(10):
        assert names(flooder.app(request("org.a"), release("org.a"))) == ["return", "return"]
    # Each way an answer, and the owner change that the gate hears for itself.
    assert caused(flooder) - before >= 20 * (ANSWER_COST + HEARD_COST)
    assert left(flooder) <= 25_000 - (caused(flooder) - before)


def test_attack_c1_owner_change_walks_no_match_rules_and_is_charged_for_each_hearer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    town = Town()
    flooder = town.add("own:org.a", "own:org.x.*")
    hearers = [town.add("own:org.a", host=flooder.host) for _ in range(14)]
    for number, talk in enumerate(hearers):
        for place in range(68):
            talk.app(driver_call(50, "AddMatch", "s", f"arg0='org.x.n{number}.n{place}'"))
    said = [talk.model.hear_of("org.a", ":1.100") for talk in (flooder, *hearers)]
    assert all(said)
    walked = count_calls(monkeypatch, MatchRule, "matches")
    before = caused(flooder)
    for talk, heard in zip((flooder, *hearers), said, strict=True):
        talk.deliver(heard)
    assert not walked.calls
    assert caused(flooder) - before >= 15 * HEARD_COST


def test_attack_c1_owner_change_heard_by_many_sandboxes_costs_none_of_them_anything() -> None:
    town = Town({"org.host": HOST})
    flooder = town.add("own:org.a")
    hearers = [town.add("see:org.?", "send:org.host", "receive:") for _ in range(20)]
    for talk in hearers:
        talk.app(call(5, "org.host", flags=NO_REPLY))
        talk.deliver(signal(6, sender=HOST))
    marks = [(caused(talk), left(talk)) for talk in hearers]
    before = caused(flooder)
    for _ in range(5):
        flooder.app(request("org.a"), release("org.a"))
    assert caused(flooder) - before >= 10 * 21 * HEARD_COST
    assert [(caused(talk), left(talk)) for talk in hearers] == marks
    for talk in hearers:  # what was judged for others is still known
        assert len(talk.state.verdicts.app_mute) == len(talk.state.verdicts.bus_signals) == 1


def test_attack_c1_name_of_an_owner_of_many_is_judged_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    town = Town({f"org.x.n{number}": ":1.100" for number in range(250)})
    flooder = town.add("own:org.a")
    hearer = town.add("see:org.a", "see:org.?.*")
    hearer.subscribe("arg0='org.a'")
    flooder.app(request("org.a"), release("org.a"))
    judged = count_calls(monkeypatch, Judge, "see")
    before, mark = caused(flooder), left(hearer)
    flooder.app(request("org.a"), release("org.a"))
    assert judged.names <= 2 * 8  # and not six times all that it owns
    assert caused(flooder) - before >= 4 * HEARD_COST
    assert left(hearer) == mark


def test_attack_c1_owner_that_comes_into_sight_with_its_names_pays_for_each_that_is_told() -> None:
    town = Town({f"org.x.n{number}": ":1.100" for number in range(250)})
    flooder = town.add("own:org.a")
    hearer = town.add("see:org.a", "see:org.zz?")
    hearer.app(driver_call(50, "AddMatch", "s", "type='signal'"))
    before = caused(flooder)
    flooder.app(request("org.a"))
    told = len(hearer.got)
    assert told >= 1
    assert caused(flooder) - before >= 2 * HEARD_COST + told


def test_attack_c1_broadcast_that_is_refused_is_judged_once_and_paid_by_its_sender(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    town = Town()
    flooder = town.add("send:")
    hearers = [town.add(host=flooder.host) for _ in range(14)]
    others = [town.add() for _ in range(3)]
    for talk in town.talks:
        talk.host.denials.clear()
    judged = count_calls(monkeypatch, Judge, "receive")
    before, marks = caused(flooder), [(caused(talk), left(talk)) for talk in others]
    for _ in range(10):
        town.emit(":1.100")
    assert judged.calls == len(town.talks)
    assert caused(flooder) - before == len(town.talks) * (HEARD_COST + 9)
    assert [(caused(talk), left(talk)) for talk in others] == marks
    assert not any(talk.got for talk in (*hearers, *others))
    assert all(len(talk.host.denials) == 10 for talk in others)  # each is told all the same


def test_attack_c1_connection_pays_for_the_questions_that_are_asked_for_it() -> None:
    owners = {f"org.x.n{number}": HOST for number in range(250)}
    town = Town(owners)
    other = town.add()
    before = caused(other)
    curious = town.add("see:org.?.*?")
    assert sum(m.header.member == "GetNameOwner" for m in curious.model.seen) == 0  # cleared
    assert len(curious.filter._owners.names) == 250
    assert caused(curious) >= 250 * QUESTION_COST
    assert caused(other) == before


# -- what was refused before ------------------------------------------------------------------------


def test_refusal_is_forgotten_with_what_it_rests_on() -> None:
    town = Town({"org.a": ":1.100"})
    flooder = town.add("own:org.a")
    hearer = town.add("receive:org.a")
    town.change("org.a", "")
    town.emit(":1.100")
    town.emit(":1.100")
    assert not hearer.got
    flooder.app(request("org.a"))
    town.emit(":1.100")
    assert names(hearer.got) == ["signal Changed"]
    hearer.use(access())
    town.emit(":1.100")
    assert len(hearer.got) == 1


def test_refused_broadcast_is_none_that_looks_like_it() -> None:
    town = Town()
    town.add("send:")
    hearer = town.add("receive:org.no")
    town.emit(":1.100")
    refused = signal(5, "Changed", sender=":1.100")
    assert hearer.state.verdicts.bus_refused
    before = len(hearer.host.denials)
    hearer.deliver(changed(refused, sender=":1.101"), changed(refused, member="Other"))
    assert len(hearer.host.denials) == before + 2
    # Behind others, and cut anywhere.
    for cut in range(1, len(refused), 7):
        hearer.filter.feed_bus(refused + refused[:cut])
        hearer.filter.feed_bus(refused[cut:])
        assert hearer.filter.bus_is_clear
    assert not hearer.got


# -- who it is ---------------------------------------------------------------------------------------


@pytest.fixture
def payers() -> Payers:
    found = Payers()
    found.joined(":1.1", MessageBudget(RATE))
    found.joined(":1.2", MessageBudget(RATE))
    return found


@pytest.mark.parametrize(
    ("mover", "change", "payer"),
    [
        (None, ("org.a", ":1.1", ""), ":1.1"),
        (None, ("org.a", "", ":1.2"), ":1.2"),
        (None, ("org.a", HOST, ":1.2"), ":1.2"),
        (None, ("org.a", "", HOST), ""),
        (":1.1", ("org.a", ":1.1", ":1.2"), ":1.1"),  # who waited for it gets it
        (":1.2", ("org.a", ":1.1", ":1.2"), ":1.2"),  # who came later takes it
        ("", ("org.a", ":1.1", ""), ""),  # it was taken away
        (":1.1", ("org.a", "", HOST), ""),
        (None, (":1.1", ":1.1", ""), ":1.1"),
        (None, (HOST, "", HOST), HOST),
    ],
)
def test_owner_change_is_of_who_asked_for_it_last(
    payers: Payers, mover: str | None, change: tuple[str, str, str], payer: str
) -> None:
    if mover is not None:
        payers.moves(mover, "org.a")
    name, old, new = change
    assert payers.who_moved(name, new, old) == payer


def test_connection_that_is_closed_pays_for_the_end_of_its_names(payers: Payers) -> None:
    budget = payers.budgets[":1.1"]
    assert isinstance(budget, MessageBudget)
    payers.left(":1.1", "c1", ["org.a"])
    assert payers.who_moved("org.a", ":1.2", ":1.1") == ":1.1"
    payers.charge(":1.1", 7)
    assert budget.caused == 7
    for number in range(MAX_LATE):
        payers.joined(f":2.{number}", MessageBudget(RATE))
        payers.left(f":2.{number}", "c2", [])
    assert ":1.1" not in payers.budgets
    assert len(payers.budgets) == MAX_LATE + 1


def test_arrival_is_paid_when_it_is_known_whose_it_was(payers: Payers) -> None:
    payers.charge_arrival(":1.3", 4)
    payers.charge_arrival(":1.3", 4)
    budget = MessageBudget(RATE)
    payers.joined(":1.3", budget)
    assert budget.caused == 8
    payers.charge_arrival(":1.3", 4)
    assert budget.caused == 12


def test_what_is_kept_of_strangers_is_bounded(payers: Payers) -> None:
    for number in range(2 * MAX_MOVERS):
        payers.moves(":1.1", f"org.n{number}")
        payers.charge_arrival(f":3.{number}", 1)
    dump = payers.dump()
    assert len(dump.movers) == MAX_MOVERS
    assert len(dump.arriving) == MAX_ARRIVING


def test_next_gate_knows_who_pays(payers: Payers) -> None:
    payers.moves(":1.2", "org.a")
    payers.charge_arrival(":1.3", 4)
    payers.left(":1.1", "c1", ["org.b"])
    new, budget, arrived = Payers(), MessageBudget(RATE), MessageBudget(RATE)
    new.load(payers.dump())
    new.joined(":1.2", MessageBudget(RATE))
    new.joined(":1.3", arrived)
    new.adopt("c1", budget)
    new.adopt("c9", MessageBudget(RATE))
    assert new.who_moved("org.a", ":1.2", ":1.1") == ":1.2"
    new.charge(new.who_moved("org.b", ":1.2", ":1.1"), 3)
    assert (budget.caused, arrived.caused) == (3, 4)
    assert new.dump().late == ((":1.1", "c1"),)
    new.clear()
    assert new.dump() == PayersDump()
    assert not new.budgets


def test_time_counts_where_it_is_more() -> None:
    town = Town()
    flooder = town.add("send:")
    hearer = town.add("receive:")
    now = iter(range(100))
    hearer.filter._clock = lambda: next(now) * 0.001  # type: ignore[misc]
    before = caused(flooder)
    hearer.deliver(signal(5, sender=":1.100"))
    assert caused(flooder) - before == BUSY_SECOND // 1000
    hearer.deliver(signal(6, sender=":1.100"))  # is known
    assert caused(flooder) - before == BUSY_SECOND // 1000 + 1


def test_what_is_owed_is_bounded() -> None:
    budget = MessageBudget(RATE, lambda: 0.0)
    for _ in range(100):
        budget.charge(RATE)
    assert budget.left == -RATE * MOST_OWED
    assert budget.caused == 100 * RATE
    assert 0 < budget.pause() < MOST_OWED + 1


# -- never a wrong one ---------------------------------------------------------------------------

PLACES = st.integers(0, 3)
NAMES = st.sampled_from(["org.a", "org.b.c"])


class Charges(RuleBasedStateMachine):
    """Two sandboxes with two connections each, hosts, and names that go from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.town = Town()
        self.hosts = [FakeHost(id=f"c{n}", identity=Identity(type="t", app=f"a{n}")) for n in "12"]
        rules = ("own:org.*", "see:org.?", "send:", "receive:org.b.*")
        self.apps = [self.town.add(*rules, host=self.hosts[n % 2]) for n in range(4)]
        self.bystander = self.town.add("see:org.*a", "receive:")

    def check(self, before: list[int], payer: int | None, *, may_be_nothing: bool = False) -> None:
        """Check that only the payer has paid."""
        paid = [host.messages.caused - mark for host, mark in zip(self.hosts, before, strict=True)]
        assert all(not cost for place, cost in enumerate(paid) if place != payer)
        assert sum(paid) > 0 or may_be_nothing
        assert self.bystander.host.messages.caused == self.mark

    def marks(self) -> list[int]:
        self.mark = self.bystander.host.messages.caused
        return [host.messages.caused for host in self.hosts]

    @rule(place=PLACES, name=NAMES)
    def app_takes(self, place: int, name: str) -> None:
        before = self.marks()
        self.apps[place].app(request(name))
        self.check(before, place % 2)

    @rule(place=PLACES, name=NAMES)
    def app_gives(self, place: int, name: str) -> None:
        before = self.marks()
        self.apps[place].app(release(name))
        self.check(before, place % 2, may_be_nothing=True)  # a known answer is in its call's price

    @rule(giver=PLACES, taker=PLACES, name=NAMES)
    def app_gives_to_who_waits(self, giver: int, taker: int, name: str) -> None:
        owner, heir = self.apps[giver], self.apps[taker]
        if owner.model.owners.get(name) != owner.model.me or owner is heir:
            return
        heir.app(request(name))
        before = self.marks()
        self.town.bus.payers.moves(owner.model.me, name)
        self.town.change(name, heir.model.me)
        self.check(before, giver % 2)

    @rule(name=NAMES)
    def host_takes(self, name: str) -> None:
        if self.apps[0].model.owners.get(name, HOST) != HOST:
            return
        before = self.marks()
        self.town.change(name, HOST)
        self.town.change(name, "")
        self.check(before, None, may_be_nothing=True)

    @rule(place=PLACES, member=st.sampled_from(["One", "Two"]))
    def app_emits(self, place: int, member: str) -> None:
        before = self.marks()
        self.town.emit(self.apps[place].model.me, member)
        self.check(before, place % 2)

    @rule(member=st.sampled_from(["One", "Two"]))
    def host_emits(self, member: str) -> None:
        before = self.marks()
        self.town.emit(HOST, member)
        self.check(before, None, may_be_nothing=True)

    @rule(place=PLACES, hearer=PLACES)
    def app_calls(self, place: int, hearer: int) -> None:
        caller, called = self.apps[place], self.apps[hearer]
        before = self.marks()
        called.deliver(changed(call(7, called.model.me, flags=NO_REPLY), sender=caller.model.me))
        self.check(before, place % 2)


Charges.TestCase.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
TestCharges = Charges.TestCase
