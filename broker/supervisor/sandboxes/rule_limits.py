"""Limits to the number and cost of a sandbox's rules, and work on rules in slices.

Reading, compiling and writing ten thousand rules takes longer than a caller may keep others waiting. So that
work is a generator that yields how much was done, and `in_slices` gives other callers their turn in between.
"""

from collections.abc import Collection, Generator, Sequence
from functools import partial
from typing import Final, TypeVar

import msgspec
import trio

from broker.bus.values import Turn
from broker.control_protocol.messages import Snapshot
from broker.wire.errors import LIMITS_EXCEEDED, CallRefusedError
from policy.match import RULE_WORK, excess, make_judge, most_steps
from policy.rules import AccessList, Identity

# A list of so many rules takes about 2 MiB in each process that has the list.
MAX_RULES: Final = 10_000
# Bytes of a list with unusually long rules. A frame for the gate carries a list twice for snaps, and as much again.
MAX_RULES_BYTES: Final = 8 * 1024 * 1024
# Work, as policy.match counts it, between two turns of other callers: some milliseconds.
SLICE: Final = 50_000
# Advice on a list that was accepted under another limit.
WHAT_TO_DO: Final = "give it other rules, or set rule_steps higher"

T = TypeVar("T")


async def in_slices(work: Generator[int, None, T], turn: Turn = trio.lowlevel.checkpoint) -> T:
    """Do the work and return the result; await `turn` after each slice."""
    results: list[T] = []
    for _ in iter(partial(_do_slice, work, results), True):
        await turn()
    await trio.lowlevel.checkpoint()
    return results[0]


def _do_slice(work: Generator[int, None, T], results: list[T]) -> bool:
    """Do a slice; after the last slice append the result and return True."""
    done = 0
    while done < SLICE:
        try:
            done += next(work)
        except StopIteration as exc:
            results.append(exc.value)
            return True
    return False


def check_number(entries: Sequence[object], characters: int = 0) -> None:
    """Refuse too many rules before the first is read. Raises CallRefusedError LimitsExceeded."""
    if len(entries) > MAX_RULES:
        raise CallRefusedError(LIMITS_EXCEEDED, f"max_rules={MAX_RULES} would be exceeded")
    if characters > MAX_RULES_BYTES:
        text = f"max_rules_bytes={MAX_RULES_BYTES} would be exceeded"
        raise CallRefusedError(LIMITS_EXCEEDED, text)


def check_rules(access: AccessList) -> None:
    """Refuse a list of too many rules or bytes. Raises CallRefusedError LimitsExceeded."""
    check_number(access.rules)
    check_number((), len(msgspec.msgpack.encode(access)))


async def check_list(
    access: AccessList, me: Identity, buses: Collection[str], rule_steps: int
) -> AccessList:
    """Return a list within the limits of number and cost. Raises CallRefusedError."""
    check_rules(access)
    await in_slices(check_cost(access, me, buses, rule_steps))
    return access


def check_cost(
    access: AccessList, me: Identity, buses: Collection[str], rule_steps: int
) -> Generator[int, None, None]:
    """Refuse a list that costs too much on any of these buses. Raises CallRefusedError LimitsExceeded."""
    yield RULE_WORK * len(access.rules) // 8
    if most_steps(access) <= rule_steps:
        return
    for bus in buses:
        judge = yield from make_judge(access, bus=bus, me=me)
        if (text := excess(judge.cost, rule_steps)) is not None:
            raise CallRefusedError(LIMITS_EXCEEDED, text)


def over_limit(snapshot: Snapshot, rule_steps: int) -> list[str]:
    """Return a line for each sandbox with older rules that cost too much now."""
    return [
        f"{state.spec.id}: a message takes {state.usage.rule_steps} steps, over rule_steps={rule_steps}: its rules stay"
        f" as long as this gate runs, and the next one ends it; {WHAT_TO_DO}"
        for state in snapshot.sandboxes
        if state.usage.rule_steps > rule_steps
    ]
