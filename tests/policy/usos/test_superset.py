"""A bus's own list must let through all that the gate's does."""

import pytest

from policy.match import Judge
from policy.rules import AccessList, Identity, Rule
from policy.text import parse_rule
from policy.usos.convert import make_superset
from policy.usos.wire_form import parse_usos

ME = Identity(type="org.example.T", app="a")


def rule(text: str, *, deny: bool = False) -> Rule:
    return parse_rule(text, deny=deny, origin="")


def superset(*rules: Rule, from_host: bool = False) -> tuple[tuple[int, str, str, str], ...]:
    return make_superset(AccessList(rules=rules, receive_from_host=from_host), "session")


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("send:org.a", (0x22, "org.a", "/", "")),
        ("send:org.a.*", (0x32, "org.a", "/", "")),
        ("send:org.a@/x", (0x2, "org.a", "/x", "")),
        ("send:org.a@/x*", (0x22, "org.a", "/", "")),
        ("own:org.K-*", (0x28, "", "/", "")),
    ],
)
def test_an_allow_is_said_or_said_more_widely(text: str, entry: object) -> None:
    assert superset(rule(text)) == (entry,)


def test_a_deny_is_said_or_left_to_the_gate() -> None:
    assert superset(rule("send:org.a@/x*", deny=True)) == ()
    assert superset(rule("send:org.a", deny=True)) == ((0xA2, "org.a", "/", ""),)


@pytest.mark.parametrize(
    "peer", ["host", "same-app", "app:org.example.T/b", "app:org.example.T/b#c"]
)
def test_a_peer_is_another_to_the_bus_than_to_the_gate(peer: str) -> None:
    assert superset(rule(f"receive:@/x,peer={peer}")) == ((0x4, "", "/x", ""),)
    assert superset(rule(f"send:org.a,peer={peer}")) == ((0x22, "org.a", "/", ""),)
    assert superset(rule(f"send:org.a,peer={peer}", deny=True)) == ()


def test_what_comes_from_the_host_comes_in() -> None:
    assert superset(from_host=True) == ((0x24, "", "/", ""),)


def test_rules_about_another_bus_are_left_out() -> None:
    there = rule("send:org.a")
    other = Rule(access=there.access, name="org.b", bus="system")
    mine = Rule(access=there.access, name="org.a", bus="session")
    assert superset(other, mine) == ((0x22, "org.a", "/", ""),)


@pytest.mark.parametrize("text", ["own:org.K-*", "own:org.a.*", "own:org.a"])
def test_it_can_be_read_again_and_allows_as_much(text: str) -> None:
    entries = superset(rule(text))
    again = AccessList(rules=parse_usos(entries, origin=""))
    for name in ("org.K-1", "org.a", "org.a.b"):
        exact = Judge(AccessList(rules=(rule(text),)), bus="session", me=ME)
        wide = Judge(again, bus="session", me=ME)
        assert wide.own(name).allowed or not exact.own(name).allowed
