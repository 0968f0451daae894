import pytest
from hypothesis import given, settings, strategies as st

from policy.rules import Access, AccessList, Identity, Rule
from policy.snaps.compiler import Compiler
from policy.snaps.explain import Question, judge
from policy.text import parse_rule
from policy.usos.convert import UsosList, expand, make_list, usos_list
from policy.usos.wire_form import parse_usos
from tests.helpers import facts
from tests.helpers.facts import PLUG_APP, SLOT_APP
from tests.helpers.snapworlds import library

ME = Identity(type="org.t.T", app="me")


def said(*rules: str) -> UsosList:
    return make_list(
        parse_rule(text.removeprefix("!"), deny=text.startswith("!")) for text in rules
    )


def test_alternations_are_written_out() -> None:
    found = said("send:org.x@/a{,/**}:{i.j,i.k}.{Get,Set}")
    assert found.unsaid == ()
    assert found.entries == tuple(
        (0x62, "org.x", "/a", text) for text in ("i.j.Get", "i.j.Set", "i.k.Get", "i.k.Set")
    )


def test_what_is_below_alone_cannot_be_said() -> None:
    found = said("send:@{/a,/a/**,/b/**,/c}")
    assert found.entries == ((0x22, "", "/a", ""), (0x2, "", "/c", ""))
    ((rule, reason),) = found.unsaid
    assert (rule.path, reason) == ("/b/**", "it has a glob")


def test_a_denial_is_said_more_widely_rather_than_left_out() -> None:
    found = said("!send:org.x-*@/a/*:i.j.Get*", "!send:org.x:i.*.M,peer=app:t.T/a")
    assert found.entries == ((0x82, "", "", "i.j"), (0x82, "org.x", "", ""))
    assert [reason for _, reason in found.unsaid] == ["it has a glob, so more is denied"] * 2


def test_lists_are_of_one_bus() -> None:
    rules = tuple(parse_rule(f"send:org.{bus},bus={bus}") for bus in ("session", "system"))
    access = AccessList(rules=(*rules, parse_rule("own:org.any")))
    assert usos_list(access, "session").entries == (
        (0x2, "org.session", "", ""),
        (0x8, "org.any", "", ""),
    )
    assert usos_list(access, "other").entries == ((0x8, "org.any", "", ""),)


@pytest.mark.parametrize("interface", ["dbus", "mpris", "browser-support", "bluez", "unity8"])
def test_the_form_never_allows_more(interface: str) -> None:
    for scene in facts.scenes(interface):
        compiler = Compiler(library(), scene.world())
        for me in (PLUG_APP, SLOT_APP):
            access = compiler.access(f"snap.{me.app}.{me.component}")
            for bus in ("session", "system"):
                entries = usos_list(access, bus).entries
                again = AccessList(rules=parse_usos(entries, origin=""), receive_from_host=False)
                for rule in facts.rules_of(scene, me):
                    for message in facts.examples(rule, scene, me):
                        question = Question(
                            access=Access(message.access),
                            bus=bus,
                            names=message.names,
                            path=message.path,
                            interface=message.interface,
                            member=message.member,
                            peer=message.peer,
                        )
                        if judge(again, me, question).allowed:
                            assert judge(access, me, question).allowed


_PATHS = st.sampled_from([None, "/a", "/a{,/**}", "/{a,b}", "/a/*", "{/a,/a/**,/b}", "/a{/b,}"])
_INTERFACES = st.sampled_from([None, "i.j", "i.{j,k}", "i.*"])
_MEMBERS = st.sampled_from([None, "M", "{M,N}", "M*"])
_RULES = st.builds(
    lambda deny, path, interface, member: Rule(
        access=frozenset({Access.SEND}), deny=deny, path=path, interface=interface, member=member
    ),
    st.booleans(),
    _PATHS,
    _INTERFACES,
    _MEMBERS,
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(_RULES, max_size=4),
    st.sampled_from(["/a", "/b", "/a/b", "/a/b/c", "/c"]),
    st.sampled_from(["i.j", "i.k", "i.l"]),
    st.sampled_from(["M", "N", "Mx"]),
)
def test_expansion_keeps_the_verdict_and_the_form_only_narrows(
    rules: list[Rule], path: str, interface: str, member: str
) -> None:
    question = Question(
        access=Access.SEND, bus="b", names=(":1.5",), path=path, interface=interface, member=member
    )
    allowed = judge(AccessList(rules=tuple(rules)), ME, question).allowed
    expanded = tuple(part for rule in rules for part in expand(rule))
    assert judge(AccessList(rules=expanded), ME, question).allowed == allowed
    form = make_list(rules)
    said_rules = parse_usos(form.entries, origin="")
    says = judge(AccessList(rules=said_rules), ME, question).allowed
    assert says <= allowed
    if not form.unsaid:
        assert says == allowed
