"""Match rules that are filed by their arguments say of an owner change what they would say one by one."""

from hypothesis import given, strategies as st

from broker.gate.filter.subscriptions import Subscriptions
from broker.wire.interfaces import DRIVER, DRIVER_PATH
from broker.wire.matchrule import MatchRule, parse_match_rule

NAMES = st.sampled_from(["org.a", "org.a.b", "org.ab", "org.a.b.c", "org", ":1.2"])
OWNERS = st.sampled_from(["", ":1.2", ":1.3"])
VALUES = st.sampled_from(["", "org.a", "org.a.b", ":1.2", ":1.3", "/", "/org/"])


def one_of(key: str, *values: str) -> st.SearchStrategy[str]:
    """Return that key with one of the values, or nothing."""
    return st.sampled_from(["", *(f"{key}='{value}'" for value in values)])


RULES = st.tuples(
    one_of("sender", DRIVER, ":1.2"),
    one_of("interface", DRIVER, "org.a"),
    one_of("member", "NameOwnerChanged", "Other"),
    st.one_of(
        one_of("path", DRIVER_PATH, "/"),
        one_of("path_namespace", "/", "/org", "/org/free", DRIVER_PATH, "/a"),
    ),
    st.one_of(
        one_of("arg0namespace", "org", "org.a", "org.a.b"),
        VALUES.map(lambda value: f"arg0='{value}'"),
        VALUES.map(lambda value: f"arg0path='{value}'"),
    ),
    st.one_of(st.just(""), VALUES.map(lambda value: f"arg1='{value}'")),
    st.one_of(st.just(""), VALUES.map(lambda value: f"arg2path='{value}'")),
    one_of("arg3", "", "org.a"),
).map(lambda parts: parse_match_rule(",".join(filter(None, parts))))


@given(st.lists(RULES, max_size=6), st.sets(st.integers(0, 5)), NAMES, OWNERS, OWNERS)
def test_filed_rules_say_what_each_says(
    rules: list[MatchRule], dropped: set[int], name: str, old: str, new: str
) -> None:
    filed = Subscriptions()
    for rule in rules:
        filed.add(rule)
    for place in dropped:
        if place < len(rules):
            filed.drop(rules[place])
    left = [rule for place, rule in enumerate(rules) if place not in dropped]
    wanted = any(
        rule.matches(
            sender_names=(DRIVER,),
            path=DRIVER_PATH,
            interface=DRIVER,
            member="NameOwnerChanged",
            args=(name, old, new),
        )
        for rule in left
    )
    assert filed.want_owner_change(name, old, new) is wanted
    assert filed.count == len(left)
    assert len(filed) == len(set(left))


def test_nothing_is_left_of_rules_that_are_dropped() -> None:
    rules = [
        parse_match_rule(text) for text in ("", "arg0='org.a'", "arg0namespace='org.a',arg1=''")
    ]
    filed = Subscriptions()
    for rule in rules:
        filed.add(rule, 2)
        filed.drop(rule)
    assert filed.count == len(filed) == len(rules)
    for rule in rules:
        filed.drop(rule)
    assert not filed.count
    assert not filed._counts
    assert not filed._filed
    assert not filed._spaces
