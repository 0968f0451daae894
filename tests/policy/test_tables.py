"""The cost of a list is known when it is set, and no question exceeds it."""

import random
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given

from policy.match import MANY_NAMES, Judge, excess, make_judge, most_steps
from policy.matcher import Pattern
from policy.rules import Access, AccessList, Identity, Peer, Rule
from policy.tables import MAX_NAMES, MAX_PATH, chain_cost
from policy.text import parse_rule
from tests.helpers.steps import measured
from tests.policy.test_match_laws import LISTS, ME

LIMIT = 32_768  # by default
SEND = frozenset({Access.SEND})
APPS = [Identity(type="io.snap", app=f"app{n}", component="c") for n in range(50)]
SLOW = "/**{?,??,???,????,?????,??????}*bN"
SLOWER = "/{" + ",".join(["**a*a0x"] * 60) + "}"
LONG = "/" + "a" * (MAX_PATH - 1)


def listed(*texts: str) -> AccessList:
    return AccessList(rules=tuple(parse_rule(text) for text in texts), receive_from_host=False)


def judged(access: AccessList) -> Judge:
    return Judge(access, bus="session", me=ME)


def steps_of(judge: Judge, names: Sequence[str], path: str, peer: Identity | None = None) -> int:
    """Ask about a message that nothing was found out about yet."""
    before = judge.steps
    judge.send(names, path, "org.freedesktop.DBus.Properties", "Get", peer)
    return judge.steps - before


def own_names(seed: int = 0, count: int = MAX_NAMES) -> list[str]:
    letters = random.Random(seed)
    return [
        "org." + "".join(letters.choices("ab.x", k=240)).replace("..", ".a") for _ in range(count)
    ]


# The lists of the case, and their siblings.
ATTACKS: dict[str, list[str]] = {
    "slow": [f"send:org.x{n % 7}@{SLOW}{n}" for n in range(100)],
    "slower": [f"send:@{SLOWER}"],
    "globs": [f"send:@/org/x{n}/**/y*z:org.x{n}.*" for n in range(9990)],
    "same-beginning": [f"send:@/**{n}*x{n}" for n in range(1500)],
    "literal": [f"send:org.x{n}@/a/b{n}" for n in range(10_000)],
    "peers": [f"send:@/**a*b{n % 5},peer=app:io.snap/app{n}" for n in range(10_000)],
    "names": [f"send:org.*a*b{n}" for n in range(12)],
    "subtrees": [f"send:org.a{n}.*" for n in range(9990)],
    "members": [f"send:org.x:*a*b{n}*" for n in range(600)],
    "interfaces": [f"send::org.*a*b{n}*.M" for n in range(600)],
}
IN_ORDER = pytest.mark.parametrize("name", ATTACKS)


@cache
def attack(name: str) -> AccessList:
    return listed(*ATTACKS[name])


@pytest.mark.slow
@IN_ORDER
def test_attack_c4_no_message_takes_more_steps_than_the_list_costs(name: str) -> None:
    access = attack(name)
    judge = judged(access)
    names = own_names()
    paths = [LONG, ("/a" * 1024)[:MAX_PATH], "/org/x5/" + "y" * 2000 + "/yz", "/x"]
    for path in paths:
        for peer in (None, APPS[3]):
            assert steps_of(judge, names, path, peer) <= judge.cost.steps
    assert judge.cost.pieces <= most_steps(access)
    assert judge.cost.steps <= most_steps(access)
    assert excess(judge.cost, LIMIT) is None


@pytest.mark.parametrize(
    ("texts", "what"),
    [
        ([f"send:@/**a*{n}b*" for n in range(6000)], "send:@/"),
        ([f"send:*a*b{n}*" for n in range(40)], "send:*a*b"),
        ([f"send:@/a{n}/" + "*x?" * 300 for n in range(150)], "pieces"),
    ],
    ids=["paths", "names", "memory"],
)
def test_attack_c4_a_list_that_costs_too_much_is_refused_and_says_by_what(
    texts: list[str], what: str
) -> None:
    text = excess(judged(listed(*texts)).cost, LIMIT)
    assert text is not None
    assert text.startswith(f"rule_steps={LIMIT} would be exceeded: ")
    assert what in text
    assert "\n" not in text
    assert len(text) < 400


def test_the_rule_that_costs_most_is_named() -> None:
    cost = judged(listed("send:@/a*b", f"send:@{SLOWER}", "send:org.x")).cost
    assert cost.rule == parse_rule(f"send:@{SLOWER}")
    assert excess(cost, cost.steps) is None
    assert f"allow send:@{SLOWER[:40]}" in (excess(cost, cost.steps - 1) or "")


def test_one_text_has_one_chain_of_beginnings() -> None:
    def pattern(stem: str, pieces: int, length: int | None = None) -> Pattern:
        return Pattern(stem, pieces, length=length)

    assert chain_cost([pattern("/a", 5), pattern("/b", 7), pattern("/a/x", 3)]) == 8
    assert chain_cost([pattern("", 1), pattern("/a", 5), pattern("/ab", 5), pattern("/b", 7)]) == 11
    # Of those that are as long as they are, one length is the text's; the others are a look each.
    assert chain_cost([pattern("/a", 5, 8), pattern("/a", 5, 9), pattern("/a", 4, 9)]) == 3 + 7


def test_the_owner_of_too_many_names_is_refused() -> None:
    judge = judged(listed("send:*", "receive:*", "see:*"))
    names = own_names(count=MAX_NAMES + 1)
    assert judge.send(names[1:], "/x", None, "M", None).allowed
    assert judge.send(names, "/x", None, "M", None) is MANY_NAMES
    assert judge.receive(names, "/x", None, "M", None, broadcast=True) is MANY_NAMES
    assert judge.see(names, None) is MANY_NAMES
    assert judge.start(names, None) is MANY_NAMES


@given(LISTS)
def test_the_quick_bound_is_one(access: AccessList) -> None:
    cost = judged(access).cost
    assert cost.steps <= most_steps(access)
    assert cost.pieces <= most_steps(access)


def test_the_quick_bound_counts_the_pieces_of_both_directions() -> None:
    access = listed("send+receive:@/:*.Get")
    cost = judged(access).cost
    assert (cost.pieces, most_steps(access)) == (4, 5)


def test_many_peers_are_one_look_up() -> None:
    """A slot has rules for each plug connected to it."""
    rules = [
        Rule(access=SEND, path="/a/*", peer=Peer(kind="app", type="io.snap", app=f"app{n}"))
        for n in range(9000)
    ]
    judge = judged(AccessList(rules=tuple(rules)))
    assert judge.cost.steps < 100
    assert judge.send((":1.1",), "/a/b", "a.b", "M", APPS[7]).rule == rules[7]
    assert not judge.send((":1.1",), "/a/b", "a.b", "M", ME).allowed
    assert judge.steps < 20


@pytest.mark.slow
@IN_ORDER
def test_attack_c4_compiling_is_in_small_steps(name: str) -> None:
    access = attack(name)
    judge, steps = measured(make_judge(access, bus="session", me=ME))
    assert max(steps) <= 32 * len(access.rules) + 4 * 16 * 1024
    assert len(steps) > len(access.rules)
    assert judge.cost.steps <= LIMIT
