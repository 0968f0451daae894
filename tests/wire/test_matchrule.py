"""Match rules: strictly read, canonically written, and matched as the buses match."""

from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from broker.wire.errors import (
    ACCESS_DENIED,
    LIMITS_EXCEEDED,
    MATCH_RULE_INVALID,
    CallRefusedError,
)
from broker.wire.matchrule import MAX_RULE, MatchRule, parse_match_rule


def refusal(text: str) -> str:
    with pytest.raises(CallRefusedError) as caught:
        parse_match_rule(text)
    return caught.value.dbus_name


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", MatchRule()),
        (" \t", MatchRule()),
        ("type='signal'", MatchRule()),
        ("type=signal,member=M", MatchRule(member="M")),
        ("type='method_call',path='/a'", MatchRule(path="/a")),
        ("destination=':1.5',path_namespace='/'", MatchRule(path_namespace="/")),
        ("sender='a.b', interface='c.D' ".rstrip(), MatchRule(sender="a.b", interface="c.D")),
        ("sender =':1.5'", MatchRule(sender=":1.5")),
        ("\n\tmember='M',\r\n", MatchRule(member="M")),
        ("arg0namespace='com'", MatchRule(arg0namespace="com")),
        ("arg63='x',arg1path='/y/'", MatchRule(args=((1, "/y/", True), (63, "x", False)))),
        ("arg0=''", MatchRule(args=((0, "", False),))),
        ("arg0=", MatchRule(args=((0, "", False),))),
        ("arg0='a,b=\\'", MatchRule(args=((0, "a,b=\\", False),))),
        (r"arg0='it'\''s'", MatchRule(args=((0, "it's", False),))),
        (r"arg0=a\b\'\n", MatchRule(args=((0, r"a\b'\n", False),))),
        (r"arg0=a" + "\\", MatchRule(args=((0, "a\\", False),))),
        ("arg0= x ", MatchRule(args=((0, " x ", False),))),
        ("arg0='eavesdrop=true'", MatchRule(args=((0, "eavesdrop=true", False),))),
        ("eavesdrop='false'", MatchRule()),
        ("eavesdrop=false,member=M", MatchRule(member="M")),
        ("member='M',", MatchRule(member="M")),
        ("member='M', ", MatchRule(member="M")),
    ],
)
def test_rules_are_read_as_the_specification_says(text: str, rule: MatchRule) -> None:
    assert parse_match_rule(text) == rule


@pytest.mark.parametrize(
    "text",
    [
        "=type='signal'",
        "type='signal',=member='X'",
        "type='signal',,member='X'",
        ",type='signal'",
        ",",
        "type",
        "type='signal',member",
        "type='signal' ",
        "type= 'signal'",
        "type='signal",
        "type='other'",
        "type=''",
        "Type='signal'",
        "type='signal',type='signal'",
        "colour='red'",
        "member='a.b'",
        "member=''",
        "interface='nodot'",
        "sender='nodot'",
        "sender=':1'",
        "destination='nodot'",
        "path='a'",
        "path='/a/'",
        "path_namespace='/a/'",
        "path='/a',path_namespace='/a'",
        "arg0namespace='.a'",
        "arg0namespace='a',arg0='a'",
        "arg0='a',arg0path='/a'",
        "arg0='a',arg0='a'",
        "arg64='a'",
        "arg100='a'",
        "arg00='a'",
        "arg='a'",
        "arg-1='a'",
        "arg1namespace='a'",
        "arg\N{SUPERSCRIPT TWO}='a'",
        "arg\N{ARABIC-INDIC DIGIT TWO}='a'",
        r"arg0=a\,arg1=b",
        r"arg0=\\'a'",
        "member='M'x'",
        "eavesdrop='false',eavesdrop='true'",
    ],
)
def test_what_could_be_read_in_two_ways_is_invalid(text: str) -> None:
    assert refusal(text) == MATCH_RULE_INVALID


@pytest.mark.parametrize(
    "text",
    [
        "eavesdrop=true",
        "eavesdrop='true',type='signal'",
        "eavesdrop =true",
        "\teavesdrop\n='tr''ue'",
        "type='signal',eavesdrop=''",
        "eavesdrop='True'",
        r"eavesdrop=\'",
        "eavesdrop='true',colour='red'",
    ],
)
def test_eavesdropping_is_denied_however_it_is_spelt(text: str) -> None:
    assert refusal(text) == ACCESS_DENIED


def test_a_rule_has_at_most_1024_bytes_as_given_and_as_written() -> None:
    fits = "arg0='" + "x" * (MAX_RULE - 21) + "'"
    canonical = parse_match_rule(fits).canonical()
    assert len(canonical) == MAX_RULE
    assert refusal(canonical + " ") == LIMITS_EXCEEDED
    assert refusal(fits.replace("x", "xx", 1)) == LIMITS_EXCEEDED
    assert refusal("arg0='" + "ä" * 510 + "'") == LIMITS_EXCEEDED


def test_a_rule_has_at_most_16_keys_as_written() -> None:
    keys = [f"arg{index}='x'" for index in range(16)]
    canonical = parse_match_rule(",".join(keys[:15])).canonical()
    assert canonical.count("=") == 16
    assert parse_match_rule(canonical).canonical() == canonical
    assert refusal(",".join(keys)) == LIMITS_EXCEEDED


def test_canonical_text_is_about_signals_and_quoted() -> None:
    assert parse_match_rule("").canonical() == "type='signal'"
    text = r"destination=a.b,arg1path=/x,member=M,sender=a.b,arg0=it\'s"
    expected = r"type='signal',sender='a.b',member='M',arg0='it'\''s',arg1path='/x'"
    assert parse_match_rule(text).canonical() == expected


RULES = st.builds(
    MatchRule,
    sender=st.none() | st.sampled_from(["a.b", ":1.5"]),
    interface=st.none() | st.just("a.B"),
    member=st.none() | st.just("M"),
    path=st.none() | st.just("/a"),
    args=st.dictionaries(
        st.integers(0, 63),
        st.tuples(st.text("a',\\= \té", max_size=9), st.booleans()),
        max_size=5,
    ).map(lambda args: tuple((index, *args[index]) for index in sorted(args))),
)


@given(RULES)
def test_canonical_text_is_read_as_the_same_rule(rule: MatchRule) -> None:
    assert parse_match_rule(rule.canonical()) == rule


@given(st.text("arg0pathmember=', \\type'signal/eavesdrop", max_size=40))
def test_any_text_is_a_rule_or_refused(text: str) -> None:
    try:
        rule = parse_match_rule(text)
    except CallRefusedError:
        return
    assert parse_match_rule(rule.canonical()) == rule


def matches(text: str, *, names: Sequence[str] = (":1.5", "a.b"), args: Sequence[str] = ()) -> bool:
    return parse_match_rule(text).matches(
        sender_names=names, path="/a/b", interface="i.F", member="M", args=args
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sender=a.b,interface=i.F,member=M,path=/a/b",
        "sender=:1.5",
        "path_namespace=/",
        "path_namespace=/a",
        "path_namespace=/a/b",
        "arg0namespace=org.x",
        "arg0namespace=org.x.Y",
        "arg0=org.x.Y",
        "arg0path=org.x.Y",
        "arg1path=/p/",
        "arg1path=/p/q/r",
        "arg1path=/",
        "arg1=/p/q/",
    ],
)
def test_what_is_asked_for_matches(text: str) -> None:
    assert matches(text, args=("org.x.Y", "/p/q/"))


@pytest.mark.parametrize(
    "text",
    [
        "sender=a.c",
        "interface=i.G",
        "member=N",
        "path=/a",
        "path_namespace=/a/b/c",
        "path_namespace=/a/bb",
        "arg0namespace=org.x.Y.Z",
        "arg0namespace=org.x.YY",
        "arg0namespace=org.xx",
        "arg0=org.x",
        "arg1path=/p",
        "arg1path=/p/qq",
        "arg1=/p/q",
        "arg2=''",
    ],
)
def test_what_is_not_asked_for_does_not_match(text: str) -> None:
    assert not matches(text, args=("org.x.Y", "/p/q/"))


def test_a_message_without_arguments_matches_no_rule_about_them() -> None:
    assert not matches("arg0namespace=org.x")
    assert not matches("arg0=''")


def test_a_message_without_path_is_in_no_namespace() -> None:
    rule = parse_match_rule("path_namespace=/")
    assert not rule.matches(sender_names=(), path=None, interface=None, member=None, args=())
