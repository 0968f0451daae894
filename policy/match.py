"""The judgement: an AccessList compiled into an index, and questions to it. Pure.

A Judge does not change: new rules are a new Judge. It answers for one sandbox on one bus, and is told who the
other end is; it keeps nothing of what it was asked. docs/policy.md says what the rules mean.

How the index works (policy.tables). Rules are put into buckets by what they name: nothing, an exact name, a subtree, a
glob. Which buckets a name belongs to is found once and remembered. Within a bucket rules are filed by
who the other end must be, and by their interface if they say one literally. So of a thousand rules a question tries those few
that could be about it; they are tried in turn, by the fixed beginnings of their patterns first. What that comes to at the
worst is `Judge.cost`: it does not depend on what is asked.
"""

from collections.abc import Collection, Generator
from typing import Final

import msgspec

from policy.globs import is_literal
from policy.matcher import reading_cost
from policy.rules import Access, AccessList, Identity, Rule
from policy.tables import (
    MAX_NAMES,
    MAX_PATH,
    NAME_STEPS,
    Bill,
    Cost,
    Entry,
    MessageTable,
    Names,
    NameTable,
    Question,
    Work,
)
from policy.text import format_rule

# To whom the design sends broadcasts: to nobody, or to the bus itself.
BUS_NAME: Final = "org.freedesktop.DBus"
# `*` asks for no name in particular: it matches whoever the other end is.
_ANY_NAME: Final = frozenset({None, "*"})
# The most pieces of all patterns of a list, for each allowed step, because they take memory.
PIECES_A_STEP: Final = 4
# More than any character of a pattern can take, and more than a name takes beside its globs.
_STEPS_A_LETTER: Final = 8
_SHOWN: Final = 200  # characters of a rule
# How much work it is to file a rule, and to compile a character of a pattern; to look at a literal one is 1.
RULE_WORK: Final = 128
_PATTERN: Final = 16


class Verdict(msgspec.Struct, frozen=True):
    """A judgement, the rule that gave it (none: no rule matched), and the reason in a line."""

    allowed: bool
    rule: Rule | None
    reason: str


class NamesUsed(msgspec.Struct, frozen=True, kw_only=True):
    """The bus names whose owners the rules ask for."""

    exact: frozenset[str]
    subtrees: frozenset[str]  # the base: without `.*`
    globs: bool  # there are others, so any name may matter


NO_SEND: Final = Verdict(allowed=False, rule=None, reason="no rule allows sending it")
NO_RECEIVE: Final = Verdict(allowed=False, rule=None, reason="no rule allows receiving it")
NO_OWN: Final = Verdict(allowed=False, rule=None, reason="no rule allows owning the name")
NO_SEE: Final = Verdict(allowed=False, rule=None, reason="no rule allows seeing the name")
NO_START: Final = Verdict(allowed=False, rule=None, reason="no rule allows sending to the name")
FROM_HOST: Final = Verdict(allowed=True, rule=None, reason="what the host sends is let in")
LONG_PATH: Final = Verdict(
    allowed=False, rule=None, reason=f"object path longer than {MAX_PATH} characters"
)
MANY_NAMES: Final = Verdict(
    allowed=False, rule=None, reason=f"the other end owns more than {MAX_NAMES} names"
)


class Judge:
    """The judge of an access list on a bus. Raises PatternError for a bad pattern.

    `names` are all names that the other end is known by: those it owns, its unique name, and the
    name in the message. `peer` is who the other end is; None is the host.
    """

    def __init__(
        self, access: AccessList, *, bus: str, me: Identity, tables: "Tables | None" = None
    ) -> None:
        """Compile a list, unless its rules are filed already: see `make_judge`."""
        if tables is None:
            tables = Tables(me)
            for _ in tables.take(access, bus):
                pass
        self.access: Final = access
        self.me: Final = me
        self.cost: Final = tables.cost
        self._tables: Final = tables
        self._verdicts: Final[dict[int, Verdict]] = {}
        self._receive_from_host: Final = access.receive_from_host
        self.restricts_broadcast_receivers: Final = tables.hearers_matter
        self.uses: Final = tables.uses
        self.any_send: Final = tables.any_send
        self.owner_matters: Final = tables.owner_matters

    @property
    def steps(self) -> int:
        """The steps that all questions so far took."""
        return self._tables.work.steps

    def send(
        self,
        names: Collection[str],
        path: str | None,
        interface: str | None,
        member: str | None,
        peer: Identity | None,
    ) -> Verdict:
        """Judge a call or unicast signal out of the sandbox."""
        tables = self._tables
        return self._judge(tables.send, names, Question(path, interface, member, peer), NO_SEND)

    def broadcast(self, path: str | None, interface: str | None, member: str | None) -> Verdict:
        """Judge a broadcast out of the sandbox, whoever may hear it: `hear` judges that."""
        question = Question(path, interface, member, None)
        return self._judge(self._tables.broadcast, (), question, NO_SEND)

    def judge_broadcast_receiver(
        self, path: str | None, interface: str | None, member: str | None, peer: Identity
    ) -> Verdict:
        """Judge whether another app may hear a broadcast out of this sandbox.

        To be asked where it comes in, if `hearers_matter`: what a broadcast needs beside `broadcast`.
        """
        if path is not None and len(path) > MAX_PATH:
            return LONG_PATH
        question = Question(path, interface, member, peer)
        return self._verdict(self._tables.send.find_under((BUS_NAME,), question), NO_SEND)

    def receive(
        self,
        names: Collection[str],
        path: str | None,
        interface: str | None,
        member: str | None,
        peer: Identity | None,
        *,
        broadcast: bool,
    ) -> Verdict:
        """Judge a call or signal into the sandbox. A broadcast needs a rule, also from the host."""
        question = Question(path, interface, member, peer)
        verdict = self._judge(self._tables.receive, names, question, NO_RECEIVE)
        if verdict is NO_RECEIVE and peer is None and not broadcast and self._receive_from_host:
            return FROM_HOST
        return verdict

    def own(self, name: str) -> Verdict:
        """Judge a request for a bus name."""
        return self._verdict(self._tables.own.find((name,), None), NO_OWN)

    def see(self, names: Collection[str], peer: Identity | None) -> Verdict:
        """Judge whether the other end's existence may be known."""
        if len(names) > MAX_NAMES:
            return MANY_NAMES
        return self._verdict(self._tables.see.find(names, peer), NO_SEE)

    def start(self, names: Collection[str], peer: Identity | None) -> Verdict:
        """Judge whether the service of these names may be started: if anything may be sent to it."""
        if len(names) > MAX_NAMES:
            return MANY_NAMES
        return self._verdict(self._tables.start.find(names, peer), NO_START)

    def _judge(
        self, table: MessageTable, names: Collection[str], question: Question, no_match: Verdict
    ) -> Verdict:
        if question.path is not None and len(question.path) > MAX_PATH:
            return LONG_PATH
        if len(names) > MAX_NAMES:
            return MANY_NAMES
        return self._verdict(table.find(names, question), no_match)

    def _verdict(self, rule: Rule | None, no_match: Verdict) -> Verdict:
        if rule is None:
            return no_match
        # The rules are those of `access`, so each has its id as long as there is a judge.
        verdict = self._verdicts.get(id(rule))
        if verdict is None:
            word = "denied" if rule.deny else "allowed"
            origin = f" ({rule.origin})" if rule.origin else ""
            reason = f"{word} by {format_rule(rule)}{origin}"
            verdict = Verdict(allowed=not rule.deny, rule=rule, reason=reason)
            self._verdicts[id(rule)] = verdict
        return verdict


def excess(cost: Cost, limit: int) -> str | None:
    """Describe how a list exceeds `limit` steps or its pieces; None if it does not."""
    pieces = limit * PIECES_A_STEP
    if cost.steps <= limit and cost.pieces <= pieces:
        return None
    over = f"a message could take {cost.steps} steps"
    if cost.steps <= limit:
        over = f"the patterns have {cost.pieces} pieces of at most {pieces}"
    most = ""
    if cost.rule is not None:
        word = "deny" if cost.rule.deny else "allow"
        text = format_rule(cost.rule)
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        most = f"; most is for {word} {shown} ({cost.rule_steps} alone)"
    return f"rule_steps={limit} would be exceeded: {over}{most}"


def most_steps(access: AccessList) -> int:
    """Return a number that a list's steps and pieces are certainly not above, without compiling it."""
    steps = len(access.rules)
    has_subtrees = False
    for rule in access.rules:
        if rule.name is not None and not is_literal(rule.name):
            has_subtrees = True
            steps += MAX_NAMES * _STEPS_A_LETTER * len(rule.name)
        for text in (rule.path, rule.interface, rule.member):
            if text is not None:
                steps += (
                    1 if is_literal(text) else _STEPS_A_LETTER * reading_cost(MAX_PATH) * len(text)
                )
    return steps + has_subtrees * MAX_NAMES * NAME_STEPS


def make_judge(access: AccessList, *, bus: str, me: Identity) -> Generator[int, None, Judge]:
    """Compile a list step by step, and tell how much work each was. Raises PatternError."""
    tables = Tables(me)
    yield from tables.take(access, bus)
    return Judge(access, bus=bus, me=me, tables=tables)


class Tables:
    """The rules of a list, by the questions that are asked of them."""

    def __init__(self, me: Identity) -> None:
        self._me: Final = me
        self.work: Final = Work()
        names = Names(self.work)
        self._names: Final = names
        self.send: Final = MessageTable(names, self.work)
        self.broadcast: Final = MessageTable(names, self.work)
        self.receive: Final = MessageTable(names, self.work)
        self.own: Final = NameTable(names, self.work)
        self.see: Final = NameTable(names, self.work)
        self.start: Final = NameTable(names, self.work)
        self.hearers_matter = self.any_send = self.owner_matters = False
        self.uses = NamesUsed(exact=frozenset(), subtrees=frozenset(), globs=False)
        self.cost = Cost()

    def take(self, access: AccessList, bus: str) -> Generator[int, None, None]:
        """File a list's rules, and tell how much work each was. Raises PatternError."""
        rules = [rule for rule in access.rules if rule.bus is None or rule.bus == bus]
        bill = Bill()
        for rule in rules:
            entry = Entry(rule, self._me)
            self._file(entry)
            bill.add(entry)
            yield RULE_WORK + sum(map(reading_work, _texts(rule)))
        names = self._names
        self.uses = NamesUsed(
            exact=frozenset(names.exact),
            subtrees=frozenset(names.subtrees),
            # Which names may be seen by their owner alone, only a look at all of them tells.
            globs=names.has_globs or _owner_decides_sight(rules),
        )
        self.owner_matters = any(rule.name is not None or rule.peer is not None for rule in rules)
        yield RULE_WORK * len(rules) // 4
        self.cost = yield from bill.total(names, self.send, self.receive)

    def _file(self, entry: Entry) -> None:
        rule = entry.rule
        if rule.name is not None:
            self._names.add(rule.name)
        if Access.SEND in rule.access:
            self.send.add(entry)
            self.any_send = self.any_send or not rule.deny
            if rule.name in {None, BUS_NAME}:
                self.hearers_matter = self.hearers_matter or rule.peer is not None
                # Who hears a broadcast is judged at each receiver: a deny for some peers stops nothing here.
                if not (rule.deny and rule.peer is not None):
                    self.broadcast.add_whoever(entry)
            # A deny of some messages leaves others, for which the service may be started.
            if not (rule.deny and entry.is_about_messages):
                self.start.add(entry)
        if Access.RECEIVE in rule.access:
            self.receive.add(entry)
        if Access.OWN in rule.access:
            self.own.add_whoever(entry)
        if _is_for_sight(rule):
            self.see.add(entry)


def _texts(rule: Rule) -> list[str]:
    texts = (rule.name, rule.path, rule.interface, rule.member)
    return [text for text in texts if text is not None]


def reading_work(text: str) -> int:
    """Return how much work it is to read a text that may be a pattern."""
    return len(text) if is_literal(text) else _PATTERN * len(text)


def _is_for_sight(rule: Rule) -> bool:
    return Access.SEE in rule.access or (rule.name is not None and not rule.deny)


def _owner_decides_sight(rules: list[Rule]) -> bool:
    """Say whether names that no rule says may be seen or not by who owns them."""
    if any(Access.SEE in rule.access and rule.name is None and rule.peer for rule in rules):
        return True
    sight = [rule for rule in rules if _is_for_sight(rule)]
    # An owner that is not known passes for the host, so it must be known where the host is let through.
    unnamed = [rule for rule in sight if not rule.deny and rule.name in _ANY_NAME]
    if any(rule.peer is not None and rule.peer.kind == "host" for rule in unnamed):
        return True
    # What is denied for one of an owner's names is for all of them.
    denied = any(rule.deny and (rule.peer or rule.name not in _ANY_NAME) for rule in sight)
    return denied and any(rule.peer is None for rule in unnamed)
