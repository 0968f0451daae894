"""a(usos) both ways: every flag, every refusal, and nothing said more widely than it is."""

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from broker.bus.values import pack
from policy.rules import Access, Peer, Rule
from policy.text import format_rule, parse_rule
from policy.usos.wire_form import Flag, Usos, make_usos, on_the_wire, parse_usos


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ((0x1, "org.x", "", ""), "see:org.x"),
        ((0x2, "org.x", "", ""), "send:org.x"),
        ((0x4, "", "", ""), "receive:"),
        ((0x8, "org.x", "", ""), "own:org.x"),
        ((0xF, "org.x", "", ""), "send+receive+own+see:org.x"),
        ((0x12, "org.x", "", ""), "send:org.x.*"),
        ((0x2, ":1.4", "", ""), "send::1.4"),
        ((0x2, "", "/a", ""), "send:@/a"),
        ((0x2, "", "/", ""), "send:@/"),
        ((0x22, "", "/a", ""), "send:@/a{,/**}"),
        ((0x2, "", "", "org.i"), "send::org.i.*"),
        ((0x42, "", "", "org.i.M"), "send::org.i.M"),
        ((0x82, "org.x", "", ""), "!send:org.x"),
        ((0x102, "org.x", "", ""), "send:org.x,peer=host"),
        ((0x202, "", "", ""), "send:,peer=same-app"),
        ((0x402, "io.snap/foo", "", ""), "send:,peer=app:io.snap/foo"),
        ((0x402, "io.snap/f/o#bar", "", ""), "send:,peer=app:io.snap/f/o#bar"),
        (
            (0x4F7 & ~0x10, "io.snap/foo", "/a/b", "org.i.M"),
            "!send+receive+see:@/a/b{,/**}:org.i.M,peer=app:io.snap/foo",
        ),
    ],
)
def test_both_ways(entry: Usos, text: str) -> None:
    rule = parse_rule(text.removeprefix("!"), deny=text.startswith("!"), origin="here")
    assert parse_usos([entry], origin="here") == (rule,)
    assert make_usos([rule]) == ([entry], [])


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ((0x22, "", "/", ""), "send:"),
        ((0x72, "", "", ""), "send:"),
        ((0x29, "org.x", "/", ""), "own+see:org.x"),
    ],
)
def test_other_ways_to_say_any(entry: Usos, text: str) -> None:
    assert parse_usos([entry], origin="") == (parse_rule(text),)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ((0x802, "", "", ""), "unknown flags 0x800"),
        ((0x80000002, "", "", ""), "unknown flags 0x80000000"),
        ((0x0, "org.x", "", ""), "none of SEE"),
        ((0x130, "org.x", "", ""), "none of SEE"),
        ((0x302, "", "", ""), "more than one of PEER_HOST"),
        ((0x502, "io.snap/foo", "", ""), "more than one of PEER_HOST"),
        ((0x412, "io.snap/foo", "", ""), "NAME_SUBTREE with PEER_APP"),
        ((0x402, "io.snap", "", ""), "not TYPE/ID"),
        ((0x402, "", "", ""), "not TYPE/ID"),
        ((0x402, "snap/foo", "", ""), "type of app 'snap/foo'"),
        ((0x402, "io.snap/foo#", "", ""), "empty component"),
        ((0x2, "org.x.*", "", ""), "name 'org.x.\\*': '\\*' cannot stand"),
        ((0x12, "org.x*", "", ""), "cannot stand"),
        ((0x12, "org..x", "", ""), "empty bus name element"),
        ((0x12, ":1.4", "", ""), "cannot stand"),
        ((0x2, "org", "", ""), "single element"),
        ((0x2, "", "a", ""), "path 'a'"),
        ((0x2, "", "/a*", ""), "cannot stand"),
        ((0x22, "", "/a/", ""), "does not end"),
        ((0x2, "", "", "i"), "interface 'i'"),
        ((0x42, "", "", "M"), "single element|empty"),
        ((0x42, "", "", "org.i."), "empty member"),
        ((0x42, "", "", "org.i.*"), "cannot stand"),
        ((0x8, "org.x", "/a", ""), "own is about a name"),
        ((0x108, "org.x", "", ""), "no peer"),
        ((0x1, "org.x", "", "org.i"), "see is about a name"),
    ],
)
def test_refused_with_index_and_reason(entry: Usos, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^rule 1: .*({problem})"):
        parse_usos([(2, "org.x", "", ""), entry], origin="")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("send:org.x,bus=session", "one bus"),
        ("send:org.x:M", "member but no interface"),
        ("send:@/a/*", "glob"),
        ("send:@/a*{,/**}", "glob"),
        ("send::org.*.*", "glob"),
        ("send::org.i.M*", "glob"),
        ("send:org.x-?", "glob for a name"),
        ("send:org.x,peer=app:io.snap/foo", "a name and an app"),
        ("send:,peer=app:io.snap/f%23o", "has a '#'"),
    ],
)
def test_what_cannot_be_said_is_listed(text: str, reason: str) -> None:
    rule, other = parse_rule(text), parse_rule("see:org.x")
    said, unsaid = make_usos([rule, other])
    assert said == [(1, "org.x", "", "")]
    assert [each for each, _ in unsaid] == [rule]
    assert reason in unsaid[0][1]


def test_what_is_printed_can_be_sent() -> None:
    for text in ("send:org.x", "receive:", "send:org.x@/a{,/**}", "own:org.x"):
        (entry,), _ = make_usos([parse_rule(text)])
        sent = on_the_wire(entry)
        assert pack("a(usos)", [[sent]])
        assert parse_usos([sent], origin="") == (parse_rule(text),)


def test_the_examples_in_the_manual_are_what_they_say() -> None:
    manual = Path(__file__).parents[3] / "docs" / "policy.md"
    examples = re.findall(
        r"^\| `(\(0x.*?\))` \| (deny )?`(.*?)` \|", manual.read_text(), re.MULTILINE
    )
    assert len(examples) == 5
    for entry, deny, text in examples:
        rule = parse_rule(text, deny=bool(deny))
        assert parse_usos([ast.literal_eval(entry)], origin="") == (rule,)


NAMES = st.sampled_from(["", "org.x", "org.x.y", ":1.2", "io.snap/foo", "io.snap/foo#bar"])
PATHS = st.sampled_from(["", "/", "/a", "/a/b"])
INTERFACES = st.sampled_from(["", "org.i", "org.i.M"])


@given(st.integers(0, sum(Flag)), NAMES, PATHS, INTERFACES)
def test_what_is_taken_can_be_said_again(flags: int, name: str, path: str, interface: str) -> None:
    try:
        rules = parse_usos([(flags, name, path, interface)], origin="")
    except ValueError:
        return
    said, unsaid = make_usos(rules)
    assert not unsaid
    assert parse_usos(said, origin="") == rules


PEERS = st.sampled_from(
    [
        None,
        Peer(kind="host"),
        Peer(kind="same-app"),
        Peer(kind="app", type="io.snap", app="foo"),
        Peer(kind="app", type="io.snap", app="f#o", component="bar"),
    ]
)
RULES = st.builds(
    Rule,
    access=st.sets(st.sampled_from([Access.SEND, Access.RECEIVE]), min_size=1).map(frozenset),
    deny=st.booleans(),
    name=st.sampled_from([None, "org.x", "org.x.*", "org.*-?"]),
    path=st.sampled_from([None, "/", "/a", "/a{,/**}", "/a/*"]),
    interface=st.sampled_from([None, "org.i", "org.*"]),
    member=st.sampled_from([None, "M", "M?"]),
    peer=PEERS,
)


@given(st.lists(RULES, max_size=4))
def test_what_is_said_means_the_rule_and_nothing_is_lost(rules: list[Rule]) -> None:
    said, unsaid = make_usos(rules)
    read = parse_usos(said, origin="")
    left = [rule for rule in rules if rule not in [each for each, _ in unsaid]]
    assert sorted(map(format_rule, read)) == sorted(map(format_rule, left))
    assert list(read) == left
