"""Calls to the bus itself: the tables that the gate and `explain` judge by."""

import msgspec
import pytest

from broker.gate.filter.driver_calls import BusDriverCalls
from policy.bus_calls import (
    ANY,
    BUS_PATH,
    BY_RULE_TOO,
    LOOK_UPS,
    NEVER,
    NEVER_MEMBERS,
    OWNING,
    judge_bus_call,
    own_calls,
)
from policy.match import BUS_NAME, Judge
from policy.rules import AccessList, Identity
from policy.text import format_rule, parse_rule

ME = Identity(type="org.t.T", app="me")


def judge(*rules: str, by_rule: bool = False) -> Judge:
    access = AccessList(rules=tuple(map(parse_rule, rules)), bus_by_rule=by_rule)
    return Judge(access, bus="session", me=ME)


def test_the_gate_has_a_method_for_each_call_that_needs_no_rule() -> None:
    for member in BusDriverCalls._METHODS:
        for interface in (BUS_NAME, None):
            assert judge_bus_call(judge(), BUS_PATH, interface, member).allowed, member
        assert not judge_bus_call(judge(), BUS_PATH, "org.x.Other", member).allowed
    assert BusDriverCalls._METHODS.keys() >= LOOK_UPS | OWNING | BY_RULE_TOO


@pytest.mark.parametrize("member", sorted(NEVER_MEMBERS))
def test_no_rule_allows_what_reaches_beyond_a_connection(member: str) -> None:
    everything = judge("send:", f"send:{BUS_NAME}")
    assert judge_bus_call(everything, BUS_PATH, BUS_NAME, member) is NEVER
    assert judge_bus_call(everything, BUS_PATH, None, member) is NEVER
    assert judge_bus_call(everything, BUS_PATH, f"{BUS_NAME}.Debug.Stats", member) is NEVER
    assert judge_bus_call(everything, BUS_PATH, "org.x.Other", member).allowed


def test_ping_and_introspect_are_for_everybody() -> None:
    assert judge_bus_call(judge(), "/", f"{BUS_NAME}.Peer", "Ping") is ANY
    assert judge_bus_call(judge(), "/", f"{BUS_NAME}.Introspectable", "Introspect") is ANY
    assert not judge_bus_call(judge(), "/", f"{BUS_NAME}.Peer", "GetMachineId").allowed


@pytest.mark.parametrize("member", sorted(BY_RULE_TOO))
def test_by_rule_a_call_needs_a_rule(member: str) -> None:
    rule = f"send:{BUS_NAME}:{BUS_NAME}.{member}"
    assert not judge_bus_call(judge(by_rule=True), BUS_PATH, BUS_NAME, member).allowed
    allowed = judge_bus_call(judge(rule, by_rule=True), BUS_PATH, BUS_NAME, member)
    assert allowed.allowed
    assert allowed.rule == msgspec.structs.replace(parse_rule(rule))


def test_a_rule_for_owning_brings_its_calls() -> None:
    rules = tuple(map(parse_rule, ("own:org.a,bus=session", "own:org.b,bus=session", "send:org.c")))
    (made,) = own_calls(rules, "why")
    member = "{Request,Release}Name"
    assert format_rule(made) == f"send:{BUS_NAME}:{BUS_NAME}.{member},bus=session"
    assert made.origin == "why"
