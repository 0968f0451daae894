"""The judgement: an AccessList compiled into an index, and questions to the index. Pure.

A Judge never changes: new rules make a new Judge. A Judge answers for one sandbox on one bus,
learns the other end of a message from each question, and keeps nothing of a question.
docs/policy.md defines the meaning of rules.

The index (policy.tables) works as follows. Rules are put into buckets by their name condition:
none, an exact name, a subtree, or a glob. The buckets for a name are found once and remembered.
Within a bucket rules are filed by their peer condition, and by their interface if the interface is
literal. So a question tries only the few rules of a thousand that may match, and first compares the
fixed beginnings of their patterns. `Judge.cost` is the number of steps in the worst case, and does
not depend on the question.
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

# The bus itself. A send rule is about broadcasts if the rule has no name, or this name.
BUS_NAME: Final = "org.freedesktop.DBus"
# `*` is no condition on the name, because every name matches.
_ANY_NAME: Final = frozenset({None, "*"})
# The limit on pattern pieces of a list, for each allowed step. The limit exists because pieces take
# memory.
PIECES_A_STEP: Final = 4
# An upper bound for the steps of a pattern's character, and for a name's steps beside globs.
_STEPS_A_LETTER: Final = 8
_DIRECTIONS: Final = frozenset({Access.SEND, Access.RECEIVE})
_SHOWN: Final = 200  # characters of a rule
# Work of filing a rule, and of compiling a character of a pattern. The unit is a literal character.
RULE_WORK: Final = 128
_PATTERN: Final = 16


class Verdict(msgspec.Struct, frozen=True):
    """A judgement with the deciding rule (None: no rule matched), and the reason in a line."""

    allowed: bool
    rule: Rule | None
    reason: str


class NamesUsed(msgspec.Struct, frozen=True, kw_only=True):
    """The bus names whose owners matter to the rules."""

    exact: frozenset[str]
    subtrees: frozenset[str]  # the base, without `.*`
    globs: bool  # there are glob rules, so any name may matter


NO_SEND: Final = Verdict(allowed=False, rule=None, reason="no rule allows sending it")
NO_RECEIVE: Final = Verdict(allowed=False, rule=None, reason="no rule allows receiving it")
NO_OWN: Final = Verdict(allowed=False, rule=None, reason="no rule allows owning the name")
NO_SEE: Final = Verdict(allowed=False, rule=None, reason="no rule allows seeing the name")
NO_START: Final = Verdict(allowed=False, rule=None, reason="no rule allows sending to the name")
FROM_HOST: Final = Verdict(allowed=True, rule=None, reason="what the host sends is let in")
FROM_SAME_APP: Final = Verdict(
    allowed=True, rule=None, reason="what the app's own connections send is let in"
)
LONG_PATH: Final = Verdict(
    allowed=False, rule=None, reason=f"object path longer than {MAX_PATH} characters"
)
MANY_NAMES: Final = Verdict(
    allowed=False, rule=None, reason=f"the other end owns more than {MAX_NAMES} names"
)


class Judge:
    """The judge of an access list on a bus. Raises PatternError for a bad pattern.

    `names` are all names of the other end: its owned names, its unique name, and the name in the
    message. `peer` is the identity of the other end; None is the host.
    """

    def __init__(
        self, access: AccessList, *, bus: str, me: Identity, tables: "Tables | None" = None
    ) -> None:
        """Compile an access list, unless `tables` has the filed rules already: see `make_judge`."""
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
        """Return the steps that all questions so far took."""
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
        """Judge a broadcast out of the sandbox, without regard to the receivers.

        `judge_broadcast_receiver` judges each receiver.
        """
        question = Question(path, interface, member, None)
        return self._judge(self._tables.broadcast, (), question, NO_SEND)

    def judge_broadcast_receiver(
        self, path: str | None, interface: str | None, member: str | None, peer: Identity
    ) -> Verdict:
        """Judge whether another app may receive a broadcast out of this sandbox.

        To be asked at each receiving sandbox, in addition to `broadcast`, if
        `restricts_broadcast_receivers` is set.
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
        """Judge a call or signal into the sandbox. A broadcast needs a rule, whoever the sender."""
        question = Question(path, interface, member, peer)
        verdict = self._judge(self._tables.receive, names, question, NO_RECEIVE)
        if verdict is NO_RECEIVE and self._receive_from_host and not broadcast:
            if peer is None:
                return FROM_HOST
            if (peer.type, peer.app) == (self.me.type, self.me.app):
                return FROM_SAME_APP
        return verdict

    def own(self, name: str) -> Verdict:
        """Judge a request for a bus name."""
        return self._verdict(self._tables.own.find((name,), None), NO_OWN)

    def see(self, names: Collection[str], peer: Identity | None) -> Verdict:
        """Judge whether the other end may be visible."""
        if len(names) > MAX_NAMES:
            return MANY_NAMES
        return self._verdict(self._tables.see.find(names, peer), NO_SEE)

    def start(self, names: Collection[str], peer: Identity | None) -> Verdict:
        """Judge whether the service of these names may be started.

        Any right to send to the service is a right to start the service.
        """
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
        # `access` keeps the rules alive, so the ids are valid as long as this judge.
        verdict = self._verdicts.get(id(rule))
        if verdict is None:
            word = "denied" if rule.deny else "allowed"
            origin = f" ({rule.origin})" if rule.origin else ""
            reason = f"{word} by {format_rule(rule)}{origin}"
            verdict = Verdict(allowed=not rule.deny, rule=rule, reason=reason)
            self._verdicts[id(rule)] = verdict
        return verdict


def excess(cost: Cost, limit: int) -> str | None:
    """Describe how a list exceeds `limit` steps or the limit on pieces; None if within both."""
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
    """Return an upper bound for a list's steps and pieces, without compiling the list."""
    steps = len(access.rules)
    has_subtrees = False
    for rule in access.rules:
        if rule.name is not None and not is_literal(rule.name):
            has_subtrees = True
            steps += MAX_NAMES * _STEPS_A_LETTER * len(rule.name)
        # A text is a piece in each direction, and a step in the more expensive direction.
        directions = max(1, len(rule.access & _DIRECTIONS))
        for text in (rule.path, rule.interface, rule.member):
            if text is not None:
                steps += (
                    directions
                    if is_literal(text)
                    else _STEPS_A_LETTER * reading_cost(MAX_PATH) * len(text)
                )
    return steps + has_subtrees * MAX_NAMES * NAME_STEPS


def make_judge(access: AccessList, *, bus: str, me: Identity) -> Generator[int, None, Judge]:
    """Compile an access list step by step, and yield the work of each step.

    Raises PatternError.
    """
    tables = Tables(me)
    yield from tables.take(access, bus)
    return Judge(access, bus=bus, me=me, tables=tables)


class Tables:
    """The rules of an access list, filed by kind of question."""

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
        """File the rules of a list, and yield the work of each step. Raises PatternError."""
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
            # Where the owner decides visibility, only a look at all names tells the visible names.
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
                # Each receiver judges whether it may hear a broadcast. So a deny for some peers
                # stops nothing here.
                if not (rule.deny and rule.peer is not None):
                    self.broadcast.add_whoever(entry)
            # A deny of some messages leaves other messages, for which the service may be started.
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
    """Return the work of reading a text that may be a pattern."""
    return len(text) if is_literal(text) else _PATTERN * len(text)


def _is_for_sight(rule: Rule) -> bool:
    return Access.SEE in rule.access or (rule.name is not None and not rule.deny)


def _owner_decides_sight(rules: list[Rule]) -> bool:
    """Return whether the owner decides the visibility of names that no rule names."""
    if any(Access.SEE in rule.access and rule.name is None and rule.peer for rule in rules):
        return True
    sight = [rule for rule in rules if _is_for_sight(rule)]
    # An unknown owner counts as the host. So the owner must be known where the host is let through.
    unnamed = [rule for rule in sight if not rule.deny and rule.name in _ANY_NAME]
    if any(rule.peer is not None and rule.peer.kind == "host" for rule in unnamed):
        return True
    # A denial for any name of an owner denies all names of the owner.
    denied = any(rule.deny and (rule.peer or rule.name not in _ANY_NAME) for rule in sight)
    return denied and any(rule.peer is None for rule in unnamed)
