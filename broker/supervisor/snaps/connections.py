"""Changes to the connections of snaps, and explanations of denials.

Theory of operation. A change takes four steps, and the caller is answered after the last one:

    1. the compiler makes the change, and names the apps with changed rules
    2. the new rules of these apps' sandboxes are checked, all of them before the next step
    3. the engine enforces the new rules
    4. the state file stores the change

If a step fails, the compiler undoes the change and the engine enforces the old rules again, before the caller is
told. Changes are made one at a time, and no sandbox of a snap is made meanwhile.
"""

import logging
import os
from collections.abc import Callable, Collection, Generator
from functools import partial
from typing import Final, ParamSpec, TypeVar

import msgspec
import trio

from broker.engines.base import Engine, EngineLostError
from broker.supervisor.sandboxes.registry import Record, Registry
from broker.supervisor.sandboxes.rule_limits import check_cost, check_list, in_slices
from broker.supervisor.snaps.catalogue import Snaps, decode_world, is_snap, world_of
from broker.supervisor.storage.state_file import StateFile
from broker.wire.errors import ACCESS_DENIED, INVALID_ARGS, NOT_CONTAINER, CallRefusedError
from broker.wire.interfaces import INSTANCE_PREFIX
from policy.rules import AccessList
from policy.snaps.compiler import Change, Compiler
from policy.snaps.explain import Explanation, Question, explaining, explaining_list
from policy.snaps.installed import SnapError, parse_connection, tag_of

LOGGER: Final = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
UNDO_TIMEOUT: Final = 10.0  # seconds, for which the caller waits, too


class Policy:
    """The operations of callers on snaps and connections."""

    def __init__(
        self,
        state: StateFile,
        engine: Engine,
        registry: Registry,
        snaps: Snaps,
        changing: trio.Lock,
        rule_steps: int,
    ) -> None:
        self._state: Final = state
        self._engine: Final = engine
        self._registry: Final = registry
        self._snaps: Final = snaps
        self._changing: Final = changing
        self._rule_steps: Final = rule_steps

    async def connect(self, uid: int, plug: str, slot: str) -> tuple[Change, ...]:
        """Connect a plug to a slot, and return the changes of rules. Raises CallRefusedError."""
        return await self._change_connection(uid, plug, slot, connect=True)

    async def disconnect(self, uid: int, plug: str, slot: str) -> tuple[Change, ...]:
        """Disconnect a plug from a slot, and return the changes of rules. Raises CallRefusedError."""
        return await self._change_connection(uid, plug, slot, connect=False)

    async def _change_connection(
        self, uid: int, plug: str, slot: str, *, connect: bool
    ) -> tuple[Change, ...]:
        _check_owner(uid)
        async with self._changing:
            compiler, connection = self._snaps.ready(), _refusing(parse_connection, plug, slot)
            if connect and compiler.is_connected(connection):
                return ()
            state = self._state
            change, undo = compiler.connect, compiler.disconnect
            store = state.put_connection if connect else state.delete_connection
            if not connect:
                change, undo = undo, change
            changes = _refusing(change, connection)
            await self._carry_out(
                {change.tag for change in changes},
                store=partial(store, plug, slot),
                undo=partial(undo, connection),
            )
            return changes

    async def load(self, uid: int, text: str) -> None:
        """Replace the installed snaps, and keep connections that are still valid. Raises CallRefusedError."""
        _check_owner(uid)
        world = decode_world(text)
        async with self._changing:
            before = self._snaps.ready()
            kept = world_of(before).connections
            # In a thread, because this can take seconds and other callers must be answered meanwhile.
            after = await trio.to_thread.run_sync(self._snaps.build, world, kept)
            held = [sandbox.record for sandbox in self._registry if sandbox.record.held is not None]
            tags = _differing(before, after, self._tags_in_use())
            tags |= {tag for record in held if (tag := _tag(record)) is not None}
            self._snaps.compiler = after
            self._hold(held, give_back=False)
            # Without the host's own snap, which is made from the catalogue when the file is read.
            stored = msgspec.structs.replace(world, connections=world_of(after).connections)

            def undo() -> None:
                self._snaps.compiler = before
                self._hold(held, give_back=True)

            await self._carry_out(tags, store=partial(self._state.put_world, stored), undo=undo)
            for record in held:
                if sandbox := self._registry.get(record.id):
                    self._state.put_fact(sandbox.record)

    async def explain(self, uid: int, what: str, question: Question) -> Explanation:
        """Explain a verdict for a sandbox, or for an app of a snap. Raises CallRefusedError."""
        # Under the lock, because other callers have turns meanwhile and could change the rules.
        async with self._changing:
            return await in_slices(self._explaining(uid, what, question))

    def _explaining(
        self, uid: int, what: str, question: Question
    ) -> Generator[int, None, Explanation]:
        sandbox = self._registry.get(what.removeprefix(INSTANCE_PREFIX))
        if sandbox is None:
            compiler, app = self._snaps.ready(), self._snaps.tag(what)
            return (yield from _refusing_late(explaining(compiler, app, question)))
        record = sandbox.record
        if uid not in {0, record.uid}:
            raise CallRefusedError(ACCESS_DENIED, f"{record.id} belongs to another user")
        access = self._in_force(record)
        explanation = yield from explaining_list(access, record.identity, question)
        tag = self._snaps.tag_for(record.identity)
        if tag is None or explanation.verdict.allowed or explanation.verdict.rule is not None:
            return explanation
        more = yield from _refusing_late(explaining(self._snaps.ready(), tag, question))
        return msgspec.structs.replace(explanation, remedies=more.remedies)

    async def _carry_out(
        self, tags: set[str], *, store: Callable[[], object], undo: Callable[[], object]
    ) -> None:
        """Enforce the compiler's rules and store the change, or undo both."""
        try:
            await self._enforce(tags)
            store()
        except BaseException:
            undo()
            with trio.move_on_after(UNDO_TIMEOUT, shield=True):
                await self._enforce_old(tags)
            raise

    async def _enforce(self, tags: set[str]) -> None:
        # All lists are checked before the first list is changed.
        await self._check_apps(tags)
        lists = {}
        for record in self._records(tags):
            access, buses = self._in_force(record), record.sockets
            lists[record.id] = await check_list(access, record.identity, buses, self._rule_steps)
        for id_, access in lists.items():
            try:
                await self._engine.set_access(id_, access)
            except CallRefusedError as exc:
                if exc.dbus_name != NOT_CONTAINER:  # an ended sandbox needs no rules
                    raise

    async def _check_apps(self, tags: set[str]) -> None:
        """Refuse lists that cost too much, even before a sandbox has such a list. Raises CallRefusedError."""
        compiler = self._snaps.ready()
        for tag in tags & set(compiler.tags):
            access, me = compiler.access(tag), compiler.identity(tag)
            buses = {rule.bus for rule in access.rules if rule.bus is not None} or {""}
            try:
                await in_slices(check_cost(access, me, buses, self._rule_steps))
            except CallRefusedError as exc:
                raise CallRefusedError(exc.dbus_name, f"{tag}: {exc}") from exc

    async def _enforce_old(self, tags: Collection[str]) -> None:
        for record in self._records(tags):
            try:
                await self._engine.set_access(record.id, self._in_force(record))
            except (CallRefusedError, EngineLostError) as exc:
                # Either the sandbox has ended, or the next snapshot shows the wrong list, which is then set again.
                LOGGER.warning("%s: %s", record.id, exc)

    def _hold(self, records: Collection[Record], *, give_back: bool) -> None:
        """Drop the rules that stood in for lost snaps, or restore them."""
        for record in records:
            if sandbox := self._registry.get(record.id):
                held = record.held if give_back else None
                self._registry.update(msgspec.structs.replace(sandbox.record, held=held))

    def _in_force(self, record: Record) -> AccessList:
        return record.in_force(self._snaps.compiled(record.identity, record.plugs))

    def _records(self, tags: Collection[str]) -> list[Record]:
        """Return the sandboxes of these apps."""
        return [
            sandbox.record
            for sandbox in self._registry
            if _tag(sandbox.record) in tags and self._registry.get(sandbox.record.id)
        ]

    def _tags_in_use(self) -> set[str]:
        return {tag for sandbox in self._registry if (tag := _tag(sandbox.record)) is not None}


def _tag(record: Record) -> str | None:
    component = record.component
    if component is None or not is_snap(record.type, component):
        return None
    return tag_of(record.app, component)


def _differing(before: Compiler, after: Compiler, tags: set[str]) -> set[str]:
    """Return the apps among `tags` whose lists differ between two compilers."""
    old, new = tags & set(before.tags), tags & set(after.tags)
    return (old ^ new) | {tag for tag in old & new if before.access(tag) != after.access(tag)}


def _check_owner(uid: int) -> None:
    if uid not in {0, os.geteuid()}:
        text = "only the broker's own user may change connections"
        raise CallRefusedError(ACCESS_DENIED, text)


def _refusing(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function, and turn SnapError into CallRefusedError."""
    try:
        return function(*args, **kwargs)
    except SnapError as exc:
        raise CallRefusedError(INVALID_ARGS, str(exc)) from exc


def _refusing_late(work: Generator[int, None, T]) -> Generator[int, None, T]:
    """Turn SnapError into CallRefusedError for work in slices."""
    try:
        return (yield from work)
    except SnapError as exc:
        raise CallRefusedError(INVALID_ARGS, str(exc)) from exc
