"""Threats D12 to D20: match rules, and signals of the bus itself."""

import pytest

from broker.wire.header import MessageType
from integration.harness.rawclient import BUS, BUS_PATH, RawClient
from integration.harness.stage import (
    DENIED,
    ERROR,
    INTERFACE,
    OWNER_CHANGED,
    PATH,
    Stage,
    arrivals,
    call,
    listen,
    members,
    settle,
    signal,
    told,
)
from integration.harness.threats import Scene

EVERYTHING = "send+receive+see+own:"
BAD_RULE = f"{ERROR}MatchRuleInvalid"
LIMITS = f"{ERROR}LimitsExceeded"


@pytest.fixture
def stage(scene: Scene) -> Stage:
    """More apps and hosts, on the same gate."""
    return Stage(scene.warden)


def add(client: RawClient, rule: str, member: str = "AddMatch") -> str | None:
    """Return the error's name, None if the rule is taken."""
    return client.call(BUS, BUS_PATH, BUS, member, "s", (rule,)).error


def overheard(stage: Stage, app: RawClient) -> list[str | None]:
    """Return the members of what an app hears of others' talk: whispered to a third, and said aloud."""
    name = stage.name()
    host, other = stage.host(name), stage.host()
    other.start_call(name, PATH, INTERFACE, "Whisper")
    other.emit(PATH, INTERFACE, "Whispered", destination=name)
    other.emit(PATH, INTERFACE, "Said")
    host.reply(host.wait_call("Whisper"))
    settle(host, other)
    return [
        each.header.member
        for each in arrivals(app)
        if each.header.sender in (host.unique_name, other.unique_name)
    ]


@pytest.mark.parametrize(
    "rule",
    [
        "eavesdrop=true",
        "eavesdrop='true'",
        "eavesdrop='tr''ue'",
        "type='signal',eavesdrop = 'true'",
        "eavesdrop ='true'",
        "\teavesdrop\n=true",
        "type='method_call',eavesdrop=\\'true",
        "eavesdrop=''",
        "eavesdrop='True'",
        "eavesdrop='false',eavesdrop='true'",
        "eavesdrop='true',eavesdrop='false'",
        "eavesdrop",
        "'eavesdrop'='true'",
        "type='signal',eavesdrop='true',",
    ],
)
def test_d12_nobody_eavesdrops(stage: Stage, rule: str) -> None:
    app = stage.app(EVERYTHING, f"send:{BUS}")
    assert add(app, rule) in (DENIED, BAD_RULE)
    assert overheard(stage, app) == []


@pytest.mark.parametrize("rule", ["eavesdrop='false'", "arg0='eavesdrop=true'"])
def test_d12_harmless_mentions_are_taken(stage: Stage, rule: str) -> None:
    app = stage.app(EVERYTHING)
    assert add(app, rule) is None
    assert overheard(stage, app) == (["Said"] if rule.startswith("eaves") else [])
    assert add(app, rule, "RemoveMatch") is None


@pytest.mark.parametrize(
    "rule",
    [
        "=type='signal'",
        "type='signal',=member='X'",
        "type='signal',,member='X'",
        ",type='signal'",
        "type='signal",
        "type='signal'member='X'",
        "type=signal\\,member=X",
        "type='signal',type='signal'",
        "member='X',member='Y'",
        "type",
        "arg64='x'",
        "arg00='x'",
        "arg-1='x'",
        "arg0='x',arg0path='/x'",
        "arg0='x',arg0namespace='x.y'",
        "arg1namespace='x.y'",
        "path='/a',path_namespace='/a'",
        "path='a'",
        "path_namespace='/a/'",
        "sender='nodots'",
        "interface='nodots'",
        "member='a.b'",
        "type='anything'",
        "colour='red'",
        "TYPE='signal'",
    ],
)
def test_d13_what_readers_differ_on_is_refused(stage: Stage, rule: str) -> None:
    app = stage.app(EVERYTHING)
    assert add(app, rule) == BAD_RULE
    assert add(app, rule, "RemoveMatch") == BAD_RULE
    assert overheard(stage, app) == []


def test_d13_what_is_taken_means_the_same_on_every_bus(stage: Stage) -> None:
    host, app = stage.host(), stage.app("receive:")
    for rule in (" type='signal', member='Do''ne', ", "member=Done,type='signal'"):
        assert add(app, rule) is None
        assert signal(host, app)
        assert not signal(host, app, member="Undone")
        assert add(app, "member='Done'", "RemoveMatch") is None
        assert not signal(host, app)


def test_d14_rules_are_bounded_in_length_and_number(stage: Stage) -> None:
    app = stage.app(EVERYTHING)
    assert add(app, f"arg0='{'x' * 1020}'") == LIMITS
    many = ",".join(f"arg{number}='x'" for number in range(17))
    assert add(app, many) == LIMITS
    rules = [f"member='M{number}'" for number in range(17)]
    assert [add(app, rule) for rule in rules] == [None] * 16 + [LIMITS]
    assert add(app, rules[0]) == LIMITS  # the same once more counts as well
    assert add(app, rules[0], "RemoveMatch") is None
    assert add(app, rules[16]) is None
    assert [add(app, rule, "RemoveMatch") for rule in rules[1:]] == [None] * 16
    app.start_call(BUS, BUS_PATH, BUS, "AddMatch", "s", ("x" * 5000,))
    settle(app)


@pytest.mark.parametrize("rule", ["", "type='method_call'", "type='error'", "destination=':1.1'"])
def test_d15_rules_are_about_broadcasts_only(stage: Stage, rule: str) -> None:
    app = stage.app(EVERYTHING)
    assert add(app, rule) is None
    assert overheard(stage, app) == ["Said"]
    assert add(app, "type='signal'", "RemoveMatch") is None


def test_d16_subscription_is_no_permission(stage: Stage) -> None:
    name = stage.name()
    host, stranger = stage.host(name), stage.host()
    app = stage.app(f"see:{name}")
    assert add(app, "") is None
    assert add(app, f"sender='{name}'") is None
    for sender in (host, stranger):
        assert not signal(sender, app)
    stage.set_rules(app, f"receive:{name}@{PATH}/*:{INTERFACE}.D*")
    assert signal(host, app, path=f"{PATH}/one")
    assert not signal(host, app, path=f"{PATH}/one", member="Undone")
    assert not signal(host, app)
    assert not signal(stranger, app, path=f"{PATH}/one")


def test_d17_only_its_own_rules_are_taken_back(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"receive+send:{name}")
    not_found = f"{ERROR}MatchRuleNotFound"
    changed = f"type='signal',sender='{BUS}',interface='{BUS}',member='NameOwnerChanged'"
    for rule in (changed, f"{changed},arg0='{name}'", f"arg0='{name}',{changed}"):
        assert add(app, rule, "RemoveMatch") == not_found
        for _ in range(2):
            assert add(app, rule) is None
        for _ in range(2):
            assert add(app, rule, "RemoveMatch") is None
        assert add(app, rule, "RemoveMatch") == not_found
    # The gate still learns of owners: its rule was not taken away with the app's.
    assert call(app, host, host.unique_name) == "passed"
    assert host.release_name(name) == 1
    settle(app)
    assert call(app, host, host.unique_name) == f"{ERROR}ServiceUnknown"


def test_d18_owner_changes_of_hidden_names_are_not_told(stage: Stage) -> None:
    name, hidden = stage.name(), stage.name()
    app = stage.app(f"see:{name}")
    app.add_match(OWNER_CHANGED)
    app.add_match("")
    for _ in range(3):
        other = stage.host(hidden)
        other.close()
    host = stage.host(name)
    settle(host)
    assert told(app)[:1] == [(name, "", host.unique_name)]


def test_d18_hidden_owners_of_visible_names_are_not_told(stage: Stage) -> None:
    name, secret = stage.name(), stage.name()
    host, other = stage.host(name), stage.host(secret)
    app = stage.app("see:org.example.*", deny=[f"see+send:{secret}"])
    app.add_match(f"{OWNER_CHANGED},arg0='{name}'")
    assert app.name_owner(name) == host.unique_name
    assert other.request_name(name, 0) == 2
    assert host.release_name(name) == 1
    settle(host)
    assert told(app) == [(name, host.unique_name, "")]
    assert app.driver("NameHasOwner", "s", name) == (False,)
    assert host.request_name(name, 0) == 2
    assert other.release_name(name) == 1
    settle(other)
    assert told(app) == [(name, "", host.unique_name)]


def test_d18_owner_that_takes_a_hidden_name_leaves_sight(stage: Stage) -> None:
    name, secret = stage.name(), stage.name()
    host = stage.host(name)
    app = stage.app("see:org.example.*", deny=[f"see:{secret}"])
    app.add_match(f"{OWNER_CHANGED},arg0='{name}'")
    for _ in range(2):
        assert app.name_owner(name) == host.unique_name
        assert host.request_name(secret) == 1
        assert told(app) == [(name, host.unique_name, "")]
        assert app.driver("NameHasOwner", "s", name) == (False,)
        assert host.release_name(secret) == 1
        assert told(app) == [(name, "", host.unique_name)]
    assert host.request_name(secret) == 1
    assert host.release_name(name) == 1
    assert told(app) == [(name, host.unique_name, "")]


@pytest.mark.parametrize("member", ["NameAcquired", "NameLost"])
def test_d19_names_of_others_are_not_told(stage: Stage, member: str) -> None:
    name, own = stage.name(), stage.name()
    host, app = stage.host(), stage.app(f"own:{own}", f"see:{name}", "receive:")
    app.add_match(f"type='signal',member='{member}'")
    settle(app)
    app.queue.clear()
    assert host.request_name(name) == 1
    assert host.release_name(name) == 1
    assert app.request_name(own) == 1
    assert app.release_name(own) == 1
    settle(app)
    heard = [each for each in app.queue if each.header.member == member]
    assert {each.values for each in heard} == {(own,)}
    assert {each.header.sender for each in heard} == {BUS}


@pytest.mark.parametrize("unicast", [True, False])
def test_d20_forged_owner_changes_change_nothing(stage: Stage, *, unicast: bool) -> None:
    name = stage.name()
    host, forger = stage.host(name), stage.host()
    app = stage.app(f"send:{name}", from_host=False)
    listen(app)
    app.add_match(f"type='signal',path='{BUS_PATH}'")
    for old, new in ((host.unique_name, forger.unique_name), (host.unique_name, "")):
        forger.emit(
            BUS_PATH,
            BUS,
            "NameOwnerChanged",
            "sss",
            (name, old, new),
            destination=app.unique_name if unicast else None,
        )
    settle(forger)
    assert members(app, MessageType.SIGNAL) == []
    assert call(app, host, name) == "passed"
    assert call(app, host, host.unique_name) == "passed"
    assert call(app, forger, forger.unique_name) == f"{ERROR}ServiceUnknown"
    # Where the rules let it in, it has its real sender.
    stage.set_rules(app, "receive:")
    destination = app.unique_name if unicast else None
    forger.emit(BUS_PATH, BUS, "NameLost", "s", (name,), destination=destination)
    settle(forger)
    (got,) = arrivals(app)
    assert got.header.sender == forger.unique_name


def test_d20_forged_owner_changes_of_an_app_are_judged_as_others(stage: Stage) -> None:
    host, app = stage.host(), stage.app("send:org.example.Else")
    host.add_match(f"type='signal',path='{BUS_PATH}'")
    host.add_match(OWNER_CHANGED)
    settle(host)
    told(host)
    for destination in (None, host.unique_name, BUS):
        app.emit(
            BUS_PATH,
            BUS,
            "NameOwnerChanged",
            "sss",
            (INTERFACE, "", app.unique_name),
            destination=destination,
        )
    settle(app)
    assert told(host) == []
    assert len(stage.denials(app)) == 3
