import re

import pytest
from hypothesis import given, strategies as st

from policy.globs import compile_member_glob, compile_path
from policy.rules import Access, Peer, Rule
from policy.snaps.catalogue_schema import Entry
from policy.snaps.templates import (
    ANY_CONNECTION,
    Template,
    fill,
    find_placeholders,
    join,
    make_template,
)

KNOWN = {"snap": "x", "plug.name": "x.x", "plug.name:path": "/x"}


def template(**keys: object) -> Template:
    return make_template(Entry(**{"access": ("send",), **keys}), KNOWN, {"plug.name"})  # type: ignore[arg-type]


def rules(made: Template, *peers: Peer | None, **values: str) -> list[Rule]:
    found = {key.replace("__", ".").replace("_as_", ":"): value for key, value in values.items()}
    return fill(made, peers or (None,), "here", found)[0]


def test_names_and_interfaces_are_multiplied_paths_and_members_joined() -> None:
    made = rules(
        template(
            name=("org.a", "org.b"),
            interface=("i.j", "i.k"),
            path=("/a/b", "/a/c*"),
            member=("Get", "GetAll"),
        )
    )
    assert [(rule.name, rule.interface) for rule in made] == [
        ("org.a", "i.j"),
        ("org.a", "i.k"),
        ("org.b", "i.j"),
        ("org.b", "i.k"),
    ]
    assert {(rule.path, rule.member) for rule in made} == {("/a/{b,c*}", "Get{,All}")}


def test_each_peer_has_its_rules() -> None:
    host, app = Peer(kind="host"), Peer(kind="app", type="t.T", app="a")
    assert [rule.peer for rule in rules(template(name="org.a"), host, app)] == [host, app]
    assert fill(template(name="org.a"), (), "here", {}) == ([], [])


def test_who_has_no_name_may_be_seen() -> None:
    (rule,) = rules(template(path="/a"))
    assert rule.access == {Access.SEND, Access.SEE}
    (rule,) = rules(template(name="org.a"))
    assert rule.access == {Access.SEND}
    (rule,) = rules(template(path="/a", deny=True))
    assert rule.access == {Access.SEND}


def test_sending_to_ones_own_snap_lets_no_broadcast_out() -> None:
    same = Peer(kind="same-app")
    (rule,) = rules(template(), same)
    assert rule.name == ANY_CONNECTION
    (rule,) = rules(template(access=("receive",)), same)
    assert rule.name is None


def test_placeholders_are_filled() -> None:
    made = template(
        interface="<plug.name>{,.*}", path="<plug.name:path>{,/**}", name="org.<snap>.*"
    )
    filled = rules(made, snap="s", plug__name="org.y", plug__name_as_path="/org/y")
    (rule,) = filled
    assert (rule.name, rule.interface, rule.path) == ("org.s.*", "org.y{,.*}", "/org/y{,/**}")


def test_what_cannot_be_is_left_out_and_said() -> None:
    made = template(path="<plug.name:path>/x")
    good, left_out = fill(made, (None,), "here", {"plug.name:path": "/a-b"})
    assert good == []
    assert left_out == [
        "here: a rule that no message can match is left out: '-' cannot stand in a path"
    ]
    good, left_out = fill(made, (None,), "here", {})
    assert (good, left_out) == ([], ["here: a rule that needs plug.name:path is left out"])


def test_too_many_alternatives_become_several_rules() -> None:
    members = tuple(f"Member{number}" for number in range(150))
    made = rules(template(member=members))
    assert 1 < len(made) < 10
    for member in members:
        assert any(compile_member_glob(rule.member or "")(member) for rule in made)


@given(
    st.lists(st.from_regex(r"(/[ab]{1,3}\*{0,2}){1,3}", fullmatch=True), min_size=2, max_size=6),
    st.from_regex(r"(/[abc]{1,4}){1,4}", fullmatch=True),
)
def test_a_joined_pattern_is_the_union(patterns: list[str], path: str) -> None:
    alone = any(compile_path(pattern)(path) for pattern in patterns)
    assert bool(compile_path(join(patterns))(path)) == alone


def test_find_placeholders() -> None:
    assert find_placeholders("a<b>c<d:e>") == ["b", "d:e"]
    for bad in ("<", "a>", "<a<b>>"):
        with pytest.raises(ValueError, match=re.escape("stand around a placeholder")):
            find_placeholders(bad)
