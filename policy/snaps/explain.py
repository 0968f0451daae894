"""Reasons for verdicts, and remedies for denials. Pure.

A denial without a deciding rule may have remedies of three kinds: a rule that allows just this
action; possible connections of existing plugs and slots; and plugs that the snap does not have.
Each remedy states how much more would be allowed, and the narrowest remedy comes first. A denial by
a deny rule is only explained, because no allow rule overrides a deny rule.
"""

from collections.abc import Generator, Iterable, Iterator
from typing import Final

import msgspec

from policy.bus_calls import BUS_PATH, NEVER, judge_bus_call, own_calls
from policy.globs import is_literal
from policy.match import BUS_NAME, RULE_WORK, Judge, Verdict, make_judge
from policy.rules import Access, AccessList, Identity, Peer, Rule
from policy.snaps.compiler import Compiler
from policy.snaps.installed import Connection, Port, Snap, SnapError, identity_of, tag_of
from policy.snaps.rule_blocks import BlockMaker, End
from policy.wall import walled

# Limit on connections that are tried. Connections to the other end's snap, and to the system's,
# come first.
MAX_TRIED: Final = 500
_SEES_BUS: Final = Verdict(allowed=True, rule=None, reason="every sandbox sees the bus itself")
# Work of looking at a plug or slot, in the unit of policy.match.
_LOOKING: Final = 16
# Work of trying a connection, without the work for the connection's rules.
TRYING: Final = 1024


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """An action of an app.

    `names` and `peer` belong to the other end; for `own`, to the name.
    """

    access: Access
    bus: str
    names: tuple[str, ...] = ()
    path: str | None = None
    interface: str | None = None
    member: str | None = None
    peer: Identity | None = None  # None: the host
    broadcast: bool = False


class Remedy(msgspec.Struct, frozen=True, kw_only=True):
    """An addition that would allow an action: a rule, a connection or a plug."""

    because: Rule  # the rule that then allows the action
    opens: int  # breadth of the addition, for comparison
    rule: Rule | None = None
    connection: Connection | None = None
    plug: str = ""  # the interface of a plug that the snap lacks


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict, the origin of the deciding rule, and remedies for a denial."""

    verdict: Verdict
    origin: str = ""
    remedies: tuple[Remedy, ...] = ()


def judge(access: AccessList, me: Identity, question: Question) -> Verdict:
    """Return the verdict of an access list."""
    return ask(Judge(access, bus=question.bus, me=me), question)


def ask(judge: Judge, question: Question) -> Verdict:
    """Return the verdict of a judge for the question's bus."""
    names, peer = question.names, question.peer
    message = (question.path, question.interface, question.member)
    match question.access:
        case Access.SEND if question.broadcast:
            return judge.broadcast(*message)
        case Access.SEND:
            return judge.send(names, *message, peer)
        case Access.RECEIVE:
            return judge.receive(names, *message, peer, broadcast=question.broadcast)
        case Access.OWN:
            return judge.own(names[0] if names else "")
        case Access.SEE:
            return judge.see(names, peer)


def ask_as_gate(judge: Judge, question: Question) -> Verdict:
    """Return the verdict of the gate, which treats the bus itself in a way of its own."""
    verdict = ask(judge, question)
    names = question.names
    match question.access:
        case Access.SEND if BUS_NAME in names and not question.broadcast:
            return judge_bus_call(judge, question.path, question.interface, question.member)
        case Access.SEE if BUS_NAME in names:
            return _SEES_BUS
        case Access.OWN if BUS_NAME in names:
            return NEVER
        case Access.OWN if verdict.allowed:
            # The name is asked for by a call, which may need a rule as well.
            calling = judge_bus_call(judge, BUS_PATH, BUS_NAME, "RequestName")
            return verdict if calling.allowed else calling
        case _:
            return verdict


def explain_list(access: AccessList, me: Identity, question: Question) -> Explanation:
    """Explain a verdict by an access list alone."""
    return _at_once(explaining_list(access, me, question))


def explain(compiler: Compiler, tag: str, question: Question) -> Explanation:
    """Explain a verdict for an app of a snap. Raises SnapError for an unknown tag."""
    return _at_once(explaining(compiler, tag, question))


def explaining_list(
    access: AccessList, me: Identity, question: Question
) -> Generator[int, None, Explanation]:
    """Run `explain_list` step by step, and yield the work of each step."""
    verdict = yield from _judging(access, me, question)
    remedies: list[Remedy] = []
    if not verdict.allowed:
        yield from _one_rule(access, me, question, remedies)
    return _explanation(verdict, tuple(remedies))


def explaining(
    compiler: Compiler, tag: str, question: Question
) -> Generator[int, None, Explanation]:
    """Run `explain` step by step, and yield the work of each step.

    The compiler must not change meanwhile.
    """
    access = walled(compiler.access(tag))
    snap, app = _find_app(compiler, tag)
    me = identity_of(snap.name, app)
    verdict = yield from _judging(access, me, question)
    if verdict.allowed or verdict.rule is not None or verdict is NEVER:
        return _explanation(verdict, ())
    remedies: list[Remedy] = []
    yield from _one_rule(access, me, question, remedies)
    yield from _connections(compiler, snap, app, question, remedies)
    yield from _new_plugs(compiler, snap, app, question, remedies)
    return _explanation(verdict, tuple(sorted(remedies, key=_order)))


def _at_once(work: Generator[int, None, Explanation]) -> Explanation:
    while True:
        try:
            next(work)
        except StopIteration as exc:
            explanation: Explanation = exc.value
            return explanation


def _judging(access: AccessList, me: Identity, question: Question) -> Generator[int, None, Verdict]:
    made = yield from make_judge(access, bus=question.bus, me=me)
    return ask_as_gate(made, question)


def narrowest_rule(question: Question) -> Rule:
    """Return the rule that allows an action and as little else as a rule can."""
    # A unique name is of one service, like a well-known name. A rule without a name would be about
    # all services.
    names = sorted(question.names, key=lambda name: name.startswith(":"))
    name = names[0] if names else None
    rule = Rule(access=frozenset({question.access}), bus=question.bus, name=name)
    if question.access is Access.OWN:
        return rule
    peer = _peer(question.peer)
    if question.access is Access.SEE:
        return msgspec.structs.replace(rule, peer=peer)
    # Each receiver judges whether it may hear a broadcast.
    everybody = question.access is Access.SEND and question.broadcast
    return msgspec.structs.replace(
        rule,
        name=None if everybody else name,
        path=question.path,
        interface=question.interface,
        member=question.member,
        peer=None if everybody else peer,
    )


def breadth(rules: Iterable[Rule]) -> int:
    """Estimate how much rules allow. A rule that is literal throughout counts 1."""
    return sum(_breadth(rule) for rule in rules if not rule.deny)


def _breadth(rule: Rule) -> int:
    # A pattern doubles the breadth, and "any" quadruples the breadth.
    texts = [rule.bus, rule.name]
    if rule.access != {Access.OWN}:
        texts += [rule.path, rule.interface, rule.member]
    doubled = sum(2 if text is None else not is_literal(text) for text in texts)
    if rule.peer is None and Access.OWN not in rule.access:
        doubled += 2
    return len(rule.access - {Access.SEE} or {Access.SEE}) << doubled


def _explanation(verdict: Verdict, remedies: tuple[Remedy, ...]) -> Explanation:
    origin = verdict.rule.origin if verdict.rule is not None else ""
    return Explanation(verdict=verdict, origin=origin, remedies=remedies)


def _order(remedy: Remedy) -> tuple[int, int, str]:
    # Remedies that an administrator can apply at once come before remedies that need another snap.
    what = f"{remedy.connection or ''}{remedy.plug}"
    return bool(remedy.plug), remedy.opens, what


# A search for remedies. The search adds remedies to a list, and yields the work done.
_Finding = Generator[int, None, None]


def _one_rule(
    access: AccessList, me: Identity, question: Question, found: list[Remedy]
) -> _Finding:
    rule = narrowest_rule(question)
    if question.access in {Access.OWN, Access.SEE} and rule.name is None:
        return  # a rule without a name would be about all names
    if question.access is Access.OWN and str(rule.name).startswith(":"):
        return  # nobody can request a unique name
    # A rule for owning brings the calls along that it needs.
    added = (rule, *own_calls((rule,), "")) if access.bus_by_rule else (rule,)
    more = msgspec.structs.replace(access, rules=(*access.rules, *added))
    verdict = yield from _judging(more, me, question)
    if verdict.allowed:
        found.append(Remedy(because=rule, opens=breadth([rule]), rule=rule))


def _connections(
    compiler: Compiler, snap: Snap, app: str, question: Question, found: list[Remedy]
) -> _Finding:
    tag, me = tag_of(snap.name, app), identity_of(snap.name, app)
    near = {question.peer.app} if question.peer is not None else set()
    near |= {other.name for other in compiler.snaps.values() if other.system}
    others = sorted(compiler.snaps.values(), key=lambda each: (each.name not in near, each.name))
    yield _LOOKING * len(others)
    tried = 0
    for connection in _candidates(compiler, snap, app, others):
        if connection is None:  # the search goes on to another snap
            yield _LOOKING
            continue
        tried += 1
        if tried > MAX_TRIED:
            return
        changes = compiler.preview(connection)
        added = [rule for change in changes if change.tag == tag for rule in change.added]
        yield TRYING + RULE_WORK * sum(len(change.added) for change in changes)
        because = yield from _allowing(added, me, question)
        if because is not None:
            all_added = [rule for change in changes for rule in change.added]
            found.append(Remedy(because=because, opens=breadth(all_added), connection=connection))


def _candidates(
    compiler: Compiler, snap: Snap, app: str, others: list[Snap]
) -> Iterator[Connection | None]:
    """Yield possible connections of the app's plugs and slots, with None in between.

    Connected pairs are left out. None gives the caller a chance to do other work.
    """
    plugs, slots = _by_interface(snap.plugs, snap, app), _by_interface(snap.slots, snap, app)
    for other in others:
        yield None
        for slot, there in other.slots.items():
            yield None
            for plug in plugs.get(there.interface, ()):
                yield _unconnected(compiler, (snap.name, plug), (other.name, slot))
        for plug, there in other.plugs.items():
            yield None
            for slot in slots.get(there.interface, ()):
                yield _unconnected(compiler, (other.name, plug), (snap.name, slot))


def _by_interface(ports: dict[str, Port], snap: Snap, app: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, port in _ports_of(ports, snap, app):
        found.setdefault(port.interface, []).append(name)
    return found


def _ports_of(ports: dict[str, Port], snap: Snap, app: str) -> list[tuple[str, Port]]:
    return [(name, port) for name, port in ports.items() if app in snap.apps_of(port)]


def _unconnected(
    compiler: Compiler, plug: tuple[str, str], slot: tuple[str, str]
) -> Connection | None:
    connection = Connection(plug_snap=plug[0], plug=plug[1], slot_snap=slot[0], slot=slot[1])
    return None if compiler.is_connected(connection) else connection


def _new_plugs(
    compiler: Compiler, snap: Snap, app: str, question: Question, found: list[Remedy]
) -> _Finding:
    """Find interfaces with a slot of the host for which the snap has no plug."""
    tag, me = tag_of(snap.name, app), identity_of(snap.name, app)
    library, maker = compiler.library, BlockMaker(compiler.library, compiler.system)
    host = library.system_snap(compiler.system)
    there = [
        port.interface
        for one in compiler.snaps.values()
        if one.system
        for port in one.slots.values()
    ]
    slots = {name: Port(interface=name) for name in (*host.slots, *there)}
    host = msgspec.structs.replace(host, slots=slots)
    has = {port.interface for _, port in _ports_of(snap.plugs, snap, app)}
    for name in sorted(host.slots.keys() - has):
        with_plug = msgspec.structs.replace(snap, plugs={name: Port(interface=name)})
        try:
            plug = End(library, "plug", with_plug, name)
            made = maker.connected(plug, End(library, "slot", host, name))
        except SnapError:
            continue  # the interface needs attributes
        added = [rule for _, blocks in made if tag in blocks for rule in blocks[tag].rules]
        yield TRYING + RULE_WORK * len(added)
        because = yield from _allowing(added, me, question)
        if because is not None:
            found.append(Remedy(because=because, opens=breadth(added), plug=name))


def _allowing(
    added: list[Rule], me: Identity, question: Question
) -> Generator[int, None, Rule | None]:
    access = AccessList(rules=tuple(added), receive_from_host=False, bus_by_rule=True)
    verdict = yield from _judging(access, me, question)
    return verdict.rule if verdict.allowed else None


def _find_app(compiler: Compiler, tag: str) -> tuple[Snap, str]:
    # A snap's name has no dot.
    _, name, app = tag.split(".", 2)
    return compiler.snaps[name], app


def _peer(identity: Identity | None) -> Peer:
    if identity is None:
        return Peer(kind="host")
    return Peer(kind="app", type=identity.type, app=identity.app, component=identity.component)
