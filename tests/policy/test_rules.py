"""The vocabulary is made of values: comparable, usable in sets, and the same after a journey."""

import msgspec
import pytest

from policy.rules import NO_ACCESS, Access, AccessList, Identity, Peer, Rule

FULL = Rule(
    access=frozenset({Access.SEND, Access.SEE}),
    deny=True,
    bus="session",
    name="org.example.*",
    path="/a/**",
    interface="org.x",
    member="Get*",
    peer=Peer(kind="app", type="io.snapcraft.snapd", app="foo", component="bar"),
    origin="a test",
)


@pytest.mark.parametrize("rule", [FULL, Rule(access=frozenset({Access.OWN}))])
def test_an_access_list_survives_msgpack(rule: Rule) -> None:
    access = AccessList(rules=(rule,), receive_from_host=False)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(access), type=AccessList) == access


def test_rules_are_values() -> None:
    assert len({FULL, msgspec.structs.replace(FULL), Rule(access=FULL.access)}) == 2


def test_a_rule_cannot_change() -> None:
    with pytest.raises(AttributeError):
        FULL.deny = False  # type: ignore[misc]


@pytest.mark.parametrize(
    "bad", [b'{"access":["fly"]}', b'{"access":[],"peer":{"kind":"moon"}}', b"{}"]
)
def test_other_words_are_refused(bad: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(bad, type=Rule)


def test_no_access_is_an_empty_list_with_the_default_for_the_host() -> None:
    assert AccessList(rules=(), receive_from_host=True) == NO_ACCESS


def test_an_app_without_component_is_not_the_component_with_no_name() -> None:
    assert Identity(type="a.b", app="x") != Identity(type="a.b", app="x", component="")
