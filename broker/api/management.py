"""org.buswarden.Broker1: the interface for the command line.

Callers in sandboxes are refused. A caller sees the sandboxes of the own user, and root sees all.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from broker.api.arguments import reading_rules
from broker.api.caller import BusContext
from broker.api.dispatch import Interface, Method, ReturnValues, SignalSpec, args
from broker.api.subscribers import Subscribers
from broker.bus.codec import MAX_BODY
from broker.bus.connection import Call
from broker.bus.values import Variant, unpack
from broker.control_protocol.messages import Denied
from broker.engines.base import Engine, EngineLostError
from broker.supervisor.config import Config
from broker.supervisor.sandboxes.lifecycle import Phase
from broker.supervisor.sandboxes.registry import SandboxEntry
from broker.supervisor.sandboxes.rule_limits import in_slices
from broker.supervisor.watches.watches import NameWatch
from broker.wire.errors import ACCESS_DENIED, CallRefusedError
from broker.wire.interfaces import BROKER
from policy.rules import Rule
from policy.text import format_rule

ENDED: Final = SignalSpec(name="SandboxEnded", args=args("sandbox:o", "reason:s"))
DENIED: Final = SignalSpec(name="Denied", args=args("sandbox:o", "what:a{sv}"))
Dict = dict[str, Variant]


class Management:
    """The interface on one bus."""

    def __init__(
        self,
        context: BusContext,
        engine: Engine,
        config: Config,
        subscribers: Subscribers,
        watch: NameWatch,
    ) -> None:
        self._context: Final = context
        self._subscribers: Final = subscribers
        self._watch: Final = watch
        self._engine: Final = engine
        self._config: Final = config
        self._registry: Final = context.supervisor.registry

    def interface(self) -> Interface:
        """Return the description of the interface."""
        change_takes = args("sandbox:s", "rules:a(bs)", "replace:b")
        return Interface(
            name=BROKER,
            methods=(
                Method(name="List", gives=args("sandboxes:aa{sv}"), run=self._list),
                Method(
                    name="Show", takes=args("sandbox:s"), gives=args("what:a{sv}"), run=self._show
                ),
                Method(
                    name="ChangeAccess",
                    takes=change_takes,
                    longest=MAX_BODY,
                    gives=args("all_rules:a(bs)"),
                    run=self._change_access,
                ),
                Method(name="Status", gives=args("status:a{sv}"), run=self._status),
                Method(name="Subscribe", run=self._subscribe),
                Method(name="Unsubscribe", run=self._unsubscribe),
                Method(name="Upgrade", gives=args("old_pid:u", "new_pid:u"), run=self._upgrade),
            ),
            signals=(DENIED, ENDED),
        )

    async def _list(self, call: Call) -> ReturnValues:
        caller = await self._context.host_caller(call)
        # The sandboxes are described one by one while the answer is written, because other callers
        # have turns in between.
        shown = (
            self._describe(sandbox)
            for sandbox in self._registry
            if sandbox.may_be_seen_by(caller.uid) and sandbox.phase is not Phase.ENDED
        )
        return ReturnValues((shown,))

    async def _show(self, call: Call) -> ReturnValues:
        caller = await self._context.host_caller(call)
        used = await self._used(self._registry.find(call.values[0]).record.id)
        sandbox = self._registry.find(call.values[0])
        if not sandbox.may_be_seen_by(caller.uid):
            raise CallRefusedError(ACCESS_DENIED, f"{sandbox.record.id} belongs to another user")
        denials = [describe_denial(event) for event in sandbox.denials]
        more = {
            "denials": Variant("aa{sv}", denials),
            "built_in": Variant("a(bs)", format_rules(sandbox.record.built_in)),
            "use": Variant("a{st}", used),
        }
        return ReturnValues((self._describe(sandbox) | more,))

    async def _change_access(self, call: Call) -> ReturnValues:
        caller = await self._context.host_caller(call)
        target, entries, replace = call.values
        rules = await in_slices(reading_rules(entries, f"ChangeAccess by {call.sender}"), call.turn)
        access = await self._context.supervisor.set_access(caller, target, rules, replace=replace)
        return ReturnValues((format_rules(access.rules),))

    async def _status(self, call: Call) -> ReturnValues:
        await self._context.host_caller(call)
        used = await self._used(None)
        config = self._config
        limits: dict[str, int] = msgspec.structs.asdict(config.limits)
        status: Dict = {
            "version": Variant("s", _version()),
            "scope": Variant("s", config.scope),
            "pid": Variant("u", os.getpid()),
            "gate_pid": Variant("u", self._engine.pid),
            "engine": Variant("s", self._engine.name),
            "buses": Variant("a{ss}", {bus.name: bus.address for bus in config.buses}),
            "engines": Variant(
                "a{ss}", {bus.name: self._engine.serving(bus.name) for bus in config.buses}
            ),
            "sandboxes": Variant("u", len(self._registry)),
            "connections": Variant("u", self._registry.connection_count()),
            "limits": Variant("a{st}", dict(limits)),
            "use": Variant("a{st}", used | {"max_containers": len(self._registry)}),
            "ended": Variant("a{su}", dict(self._context.supervisor.ended)),
            "watched": Variant("a{ss}", self._context.supervisor.watches.describe()),
            "runtime_dir": Variant("s", str(config.runtime_dir)),
            "last_crash": Variant("s", self._engine.last_crash),
        }
        return ReturnValues((status,))

    async def _subscribe(self, call: Call) -> ReturnValues:
        # The subscription ends with the connection. So the connection is watched before the bus is
        # asked about the connection.
        self._watch.add(call.sender)
        try:
            caller = await self._context.host_caller(call)
            is_new = (caller.bus, caller.unique_name) not in self._subscribers
            self._subscribers.add(caller)
        except BaseException:
            self._watch.discard(call.sender)
            raise
        if not is_new:
            self._watch.discard(call.sender)
        elif call.sender not in self._watch:  # The connection left meanwhile. No event follows.
            self._subscribers.discard(caller.bus, caller.unique_name)
        return ReturnValues()

    async def _unsubscribe(self, call: Call) -> ReturnValues:
        caller = await self._context.host_caller(call)
        if self._subscribers.discard(caller.bus, caller.unique_name):
            self._watch.discard(call.sender)
        return ReturnValues()

    async def _upgrade(self, call: Call) -> ReturnValues:
        caller = await self._context.host_caller(call)
        if caller.uid not in (0, os.geteuid()):
            raise CallRefusedError(ACCESS_DENIED, "Upgrade is for root and the broker's own user")
        return ReturnValues(await self._engine.upgrade())

    async def _used(self, sandbox: str | None) -> dict[str, int]:
        """Return the use of each limit, by the limit's name.

        Return nothing if the gate does not answer.
        """
        try:
            used = msgspec.structs.asdict(await self._engine.use(sandbox))
        except (CallRefusedError, EngineLostError):
            return {}
        return {"max_connections_per_container": used.pop("connections"), **used}

    def _describe(self, sandbox: SandboxEntry) -> Dict:
        record = sandbox.record
        rules = format_rules(record.access.rules)
        sockets = {bus: _show_path(path) for bus, path in record.sockets.items()}
        (metadata,) = unpack("a{sv}", record.metadata)
        # An empty path belongs to an instance that is being recreated.
        instances = self._engine.instances(record.id)
        engines = {bus: "containers1" if bus in instances else "gate" for bus in record.sockets}
        return {
            "id": Variant("s", record.id),
            "path": Variant("o", record.path),
            "type": Variant("s", record.type),
            "app": Variant("s", record.app),
            "component": Variant("s", record.component or ""),
            "metadata": Variant("a{sv}", metadata),
            "uid": Variant("u", record.uid),
            "creator": Variant("s", record.creator),
            "listening": Variant("b", record.listening),
            "sockets": Variant("a{ss}", sockets),
            "addresses": Variant("a{ss}", dict(record.addresses)),
            "connections": Variant("a(ss)", list(sandbox.connections)),
            "engine": Variant("s", "containers1" if instances else "gate"),
            "engines": Variant("a{ss}", engines),
            "instances": Variant("a{ss}", {bus: path for bus, path in instances.items() if path}),
            "access": Variant("a(bs)", rules),
            "receive_from_host": Variant("b", record.access.receive_from_host),
            "portals_as_host": Variant("b", record.portals_as_host),
            "keep_after_creator": Variant("b", record.keep_after_creator),
            "plugs": Variant("as", list(record.plugs)),
            "phase": Variant("s", sandbox.phase.name.lower()),
            "reason": Variant("s", sandbox.reason),
            "process": Variant("u", record.process.pid if record.process is not None else 0),
            "cgroup": Variant("s", record.cgroup.path if record.cgroup is not None else ""),
            "time_limit": Variant("t", record.time_limit),
            "time_left": Variant("t", self._context.supervisor.watches.time_left(record)),
            "close_notify": Variant("b", record.close_notify),
            "denied": Variant("t", sandbox.denied),
            "created": Variant("t", int(record.created)),
        }


def describe_denial(event: Denied) -> Dict:
    """Return a refusal as a dictionary, without unknown facts."""
    values: dict[str, Any] = msgspec.structs.asdict(event)
    del values["sandbox"]
    texts = {key: Variant("s", value) for key, value in values.items() if isinstance(value, str)}
    return texts | {"more": Variant("u", event.more)}


def format_rules(rules: Sequence[Rule]) -> Iterator[tuple[bool, str]]:
    """Yield rules as (deny, text)."""
    return ((rule.deny, format_rule(rule)) for rule in rules)


def _version() -> str:
    # The import takes more memory than all else in this module, so the import waits for a caller.
    from importlib import metadata  # noqa: PLC0415

    try:
        return metadata.version("buswarden")
    except metadata.PackageNotFoundError:
        return "not installed"


def _show_path(path: str) -> str:
    """Return a path with `@` for the NUL of an abstract name.

    No D-Bus string may hold NUL.
    """
    return "@" + path[1:] if path.startswith("\0") else path
