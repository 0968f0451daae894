"""What format_rule writes, parse_rule reads; what it refuses, it points at."""

import re
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from msgspec.structs import replace

from policy.rules import Access, Peer, Rule
from policy.text import RuleSyntaxError, format_rule, misfit, parse_rule

SEND = frozenset({Access.SEND})


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("send:", Rule(access=SEND)),
        ("send:org.example.App", Rule(access=SEND, name="org.example.App")),
        ("send:org.example.*", Rule(access=SEND, name="org.example.*")),
        ("send::1.42", Rule(access=SEND, name=":1.42")),
        ("send::1.42:Go", Rule(access=SEND, name=":1.42", member="Go")),
        ("send::org.x.Go", Rule(access=SEND, interface="org.x", member="Go")),
        ("send:@/a", Rule(access=SEND, path="/a")),
        ("send:@/a:Go", Rule(access=SEND, path="/a", member="Go")),
        ("send:org.x:Go", Rule(access=SEND, name="org.x", member="Go")),
        ("send:org.x:org.i.*", Rule(access=SEND, name="org.x", interface="org.i")),
        (
            "send:org.example.*@/path/**:if.ace.Member",
            Rule(
                access=SEND,
                name="org.example.*",
                path="/path/**",
                interface="if.ace",
                member="Member",
            ),
        ),
        (
            "send:@/a{,/b,/c}:{org.a,org.b}.{Get,Set}",
            Rule(access=SEND, path="/a{,/b,/c}", interface="{org.a,org.b}", member="{Get,Set}"),
        ),
        ("see+own:org.x", Rule(access=frozenset({Access.OWN, Access.SEE}), name="org.x")),
        ("send:,peer=host", Rule(access=SEND, peer=Peer(kind="host"))),
        ("send:org.x,peer=same-app", Rule(access=SEND, name="org.x", peer=Peer(kind="same-app"))),
        (
            "receive:,peer=app:io.snap/foo",
            Rule(
                access=frozenset({Access.RECEIVE}), peer=Peer(kind="app", type="io.snap", app="foo")
            ),
        ),
        (
            "send:,bus=system,peer=app:io.snap/a%2Cb%23/c#d%20",
            Rule(
                access=SEND,
                bus="system",
                peer=Peer(kind="app", type="io.snap", app="a,b#/c", component="d "),
            ),
        ),
    ],
)
def test_read(text: str, rule: Rule) -> None:
    assert parse_rule(text) == rule
    assert parse_rule(format_rule(rule)) == rule


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("send::*.Go", "send::Go"),
        ("send::.Go", "send::Go"),
        ("send::*", "send:"),
        ("send::*.*", "send:"),
        ("see+send:org.x", "send+see:org.x"),
        ("send:,bus=a,peer=host", "send:,peer=host,bus=a"),
        ("send::[OG]o", "send::[OG]o"),
    ],
)
def test_written_in_one_way(text: str, same: str) -> None:
    assert format_rule(parse_rule(text)) == same


def test_deny_and_origin_come_from_outside() -> None:
    rule = parse_rule("own:org.x", deny=True, origin="here")
    assert (rule.deny, rule.origin) == (True, "here")


@pytest.mark.parametrize(
    ("text", "position", "problem"),
    [
        ("", 1, "':' missing"),
        ("send", 5, "':' missing"),
        (":org.x", 1, "unknown access ''"),
        ("send+fly:org.x", 6, "unknown access 'fly'"),
        ("send:org..x", 9, "empty bus name element"),
        ("send:org", 6, "bus name of a single element"),
        ("send:org.x/y", 11, "cannot stand in a bus name"),
        ("send::1..2", 8, "empty bus name element"),
        ("send:org.x@", 11, "empty path"),
        ("send:org.x@a", 12, "begins with '/'"),
        ("send:org.x@/a@/b", 14, "cannot stand in a path"),
        ("send:org.x@/a/", 14, "does not end with '/'"),
        ("send:@/a{b,peer=host", 9, "'{' without '}'"),
        ("send:org.x:", 11, "nothing after ':'"),
        ("send:org.x:a.b.", 15, "no member"),
        ("send:org.x:a..M", 13, "empty interface element"),
        ("send:org.x:a.b.1M", 16, "begins with a digit"),
        ("send:org.x:i.M", 12, "interface of a single element"),
        ("send:org.x:a.b.M-", 17, "cannot stand in a member"),
        ("send:org.x:a.b.M:N", 17, "cannot stand in a member"),
        ("send:org.x,", 12, "expected peer="),
        ("send:org.x,pear=host", 12, "expected peer="),
        ("send:org.x,peer", 12, "expected peer="),
        ("send:org.x,peer=", 16, "nothing after peer="),
        ("send:org.x,peer=host,peer=host", 22, "second time"),
        ("send:org.x,peer=hosts", 17, "not host, same-app"),
        ("send:org.x,peer=app:foo", 24, "'/' missing"),
        ("send:org.x,peer=app:foo/bar", 21, "single element"),
        ("send:org.x,peer=app:a.b/c#", 26, "empty component"),
        ("send:org.x,peer=app:a.b/%80", 25, "'%' without"),
        ("send:org.x,bus=a%", 17, "'%' without"),
        ("own:org.x@/a", 1, "own is about a name"),
        ("own:org.x,peer=host", 1, "no peer"),
        ("see:org.x:Go", 1, "see is about a name"),
    ],
)
def test_refused(text: str, position: int, problem: str) -> None:
    with pytest.raises(RuleSyntaxError) as caught:
        parse_rule(text)
    assert problem in caught.value.problem
    assert (caught.value.text, caught.value.position) == (text, position)
    assert str(caught.value) == (f'bad rule "{text}": character {position}: {caught.value.problem}')


def test_an_error_is_one_printable_line() -> None:
    with pytest.raises(RuleSyntaxError) as caught:
        parse_rule("send:\n\x1b[31m" + "x" * 1000)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_what_makes_sense_with_see_and_send_together() -> None:
    assert misfit(parse_rule("see+send:org.x@/a")) is None


def test_the_examples_in_the_manual_can_be_read() -> None:
    manual = Path(__file__).parents[2] / "docs" / "policy.md"
    examples = re.findall(
        r"^\| `((?:send|receive|own|see)[+:].*?)` \|", manual.read_text(), re.MULTILINE
    )
    assert len(examples) > 10
    for text in examples:
        assert format_rule(parse_rule(text)) == text


WORDS = st.sampled_from(["a", "Item_2", "x9"])
DOTTED = st.lists(WORDS, min_size=2, max_size=3).map(".".join)
PLAIN = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)
PEERS = st.one_of(
    st.builds(Peer, kind=st.sampled_from(["host", "same-app"])),
    st.builds(
        Peer, kind=st.just("app"), type=DOTTED, app=PLAIN | st.just(""), component=st.none() | PLAIN
    ),
)
RULES = st.builds(
    Rule,
    access=st.sets(st.sampled_from([Access.SEND, Access.RECEIVE]), min_size=1).map(frozenset),
    bus=st.none() | PLAIN,
    name=st.none() | DOTTED | DOTTED.map("{}.*".format) | st.sampled_from(["*", "a-?", ":1.5"]),
    path=st.none() | DOTTED.map(lambda text: "/" + text.replace(".", "/")) | st.just("/{a,b/c}*"),
    interface=st.none() | DOTTED | st.sampled_from(["**", "a.*", "{a.b,c.d}", "a.[bc]"]),
    member=st.none() | WORDS | st.sampled_from(["G*", "{G,S}et", "[GS]et", "**"]),
    peer=st.none() | PEERS,
)


@given(RULES)
def test_what_is_written_reads_the_same(rule: Rule) -> None:
    assert parse_rule(format_rule(rule)) == rule


@given(RULES)
def test_stars_alone_are_written_with_their_meaning(rule: Rule) -> None:
    # Any member is no condition; any interface is one: a message may have none.
    starred = replace(rule, interface="*", member="*")
    assert parse_rule(format_rule(starred)) == replace(rule, interface="**", member=None)


@given(st.text(":@,.=+*{}[]/#%abc1peerhostsend", max_size=30), st.sampled_from(["", "send:"]))
def test_any_text_is_a_rule_or_an_error_with_its_place(text: str, start: str) -> None:
    try:
        rule = parse_rule(start + text)
    except RuleSyntaxError as exc:
        position = exc.position
    else:
        position = 1
        assert parse_rule(format_rule(rule)) == rule
    assert 1 <= position <= len(start + text) + 1
