"""org.buswarden.Broker1.Policy: snaps, connections, and explanations of verdicts.

Callers in sandboxes are refused. Only the broker's own user and root may make changes.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from broker.api.caller import BusContext
from broker.api.dispatch import Interface, Method, ReturnValues, args
from broker.bus.codec import MAX_BODY
from broker.bus.connection import Call
from broker.bus.values import Variant
from broker.supervisor.snaps.catalogue import world_of
from broker.wire.errors import INVALID_ARGS, CallRefusedError
from broker.wire.interfaces import BROKER_POLICY
from broker.wire.names import is_bus_name, is_interface, is_member, is_object_path
from policy.rules import Access, Identity
from policy.snaps.compiler import Change
from policy.snaps.explain import Explanation, Question, Remedy
from policy.text import format_rule, parse_rule

_CONNECTION: Final = args("plug:s", "slot:s")
_CHANGED: Final = args("changed:as")

# The fields of a message to explain, each with the check of a value. "" is the same as no value.
MESSAGE_KEYS: Final[Mapping[str, Callable[[str], bool]]] = {
    "direction": {access.value for access in Access}.__contains__,
    "bus": lambda text: len(text) <= 255,
    "name": is_bus_name,
    "path": is_object_path,
    "interface": is_interface,
    "member": is_member,
    "peer": lambda text: text == "host" or text.startswith("app:"),
}


class PolicyInterface:
    """The interface on one bus."""

    def __init__(self, context: BusContext) -> None:
        self._context: Final = context
        self._snaps: Final = context.supervisor.snaps
        self._policy: Final = context.supervisor.policy

    def interface(self) -> Interface:
        """Return the description of the interface."""
        what = args("sandbox_or_app:s", "message:a{sv}")
        connections = args("connections:a(sss)")
        return Interface(
            name=BROKER_POLICY,
            methods=(
                Method(name="LoadSnaps", takes=args("snaps:s"), longest=MAX_BODY, run=self._load),
                Method(name="Snaps", gives=args("snaps:s"), run=self._list_snaps),
                Method(name="Connect", takes=_CONNECTION, gives=_CHANGED, run=self._connect),
                Method(name="Disconnect", takes=_CONNECTION, gives=_CHANGED, run=self._disconnect),
                Method(name="Connections", gives=connections, run=self._connections),
                Method(name="Explain", takes=what, gives=args("why:a{sv}"), run=self._explain),
                Method(
                    name="Interface",
                    takes=args("name:s"),
                    gives=args("interface:s"),
                    run=self._interface,
                ),
            ),
        )

    async def _load(self, call: Call) -> ReturnValues:
        caller = await self._context.host_caller(call)
        await self._policy.load(caller.uid, call.values[0])
        return ReturnValues()

    async def _list_snaps(self, call: Call) -> ReturnValues:
        await self._context.host_caller(call)
        return ReturnValues((_json(world_of(self._snaps.ready())),))

    async def _connect(self, call: Call) -> ReturnValues:
        caller = await self._context.host_caller(call)
        plug, slot = call.values
        changes = await self._policy.connect(caller.uid, plug, slot)
        return ReturnValues(([describe_change(change) for change in changes],))

    async def _disconnect(self, call: Call) -> ReturnValues:
        caller = await self._context.host_caller(call)
        plug, slot = call.values
        changes = await self._policy.disconnect(caller.uid, plug, slot)
        return ReturnValues(([describe_change(change) for change in changes],))

    async def _connections(self, call: Call) -> ReturnValues:
        await self._context.host_caller(call)
        compiler = self._snaps.ready()
        rows = []
        for one in compiler.connections:
            interface = compiler.snaps[one.plug_snap].plugs[one.plug].interface
            rows.append((f"{one.plug_snap}:{one.plug}", f"{one.slot_snap}:{one.slot}", interface))
        return ReturnValues((rows,))

    async def _explain(self, call: Call) -> ReturnValues:
        caller = await self._context.host_caller(call)
        what, message = call.values
        question = parse_question(message)
        return ReturnValues((describe(await self._policy.explain(caller.uid, what, question)),))

    async def _interface(self, call: Call) -> ReturnValues:
        await self._context.host_caller(call)
        known = self._snaps.interface(call.values[0])
        facts = {"name": known.name, "file": known.file, **msgspec.to_builtins(known.interface)}
        return ReturnValues((_json(facts),))


def parse_question(message: Mapping[str, Variant]) -> Question:
    """Return the question that the fields of a message describe.

    Raises CallRefusedError InvalidArgs.
    """
    said: dict[str, str] = {}
    for key, variant in message.items():
        check = MESSAGE_KEYS.get(key)
        text = variant.value
        if check is None or not isinstance(text, str):
            raise CallRefusedError(INVALID_ARGS, f"{key[:100]!r} is not a text field of a message")
        if text and not check(text):
            raise CallRefusedError(INVALID_ARGS, f"bad {key} {text[:100]!r}")
        if text:
            said[key] = text
    for key in ("direction", "bus"):
        if key not in said:
            raise CallRefusedError(INVALID_ARGS, f"the message's {key} is missing")
    access = Access(said["direction"])
    return Question(
        access=access,
        bus=said["bus"],
        names=(said["name"],) if "name" in said else (),
        path=said.get("path"),
        interface=said.get("interface"),
        member=said.get("member"),
        peer=_parse_peer(said.get("peer", "host")),
        # A message without a destination is a broadcast.
        broadcast=access is Access.SEND and "name" not in said,
    )


def describe(explanation: Explanation) -> dict[str, Variant]:
    """Return an explanation as a dictionary."""
    verdict = explanation.verdict
    rule = "" if verdict.rule is None else _rule_text(verdict.rule.deny, format_rule(verdict.rule))
    return {
        "allowed": Variant("b", verdict.allowed),
        "reason": Variant("s", verdict.reason),
        "rule": Variant("s", rule),
        "origin": Variant("s", explanation.origin),
        "suggestions": Variant("as", [_describe_remedy(one) for one in explanation.remedies]),
    }


def describe_change(change: Change) -> str:
    """Return a line about a change of an app's list."""
    counts = [
        f"{len(rules)} {'rule' if len(rules) == 1 else 'rules'} {verb}"
        for verb, rules in (("added", change.added), ("removed", change.removed))
        if rules
    ]
    return f"{change.tag}: {', '.join(counts)}"


def _describe_remedy(remedy: Remedy) -> str:
    if remedy.connection is not None:
        return f"connect {remedy.connection}"
    if remedy.rule is not None:
        return f"allow {format_rule(remedy.rule)}"
    return f"plug {remedy.plug}"


def _rule_text(deny: bool, text: str) -> str:  # noqa: FBT001 - as parse_rule says it
    return f"{'deny' if deny else 'allow'} {text}"


def _parse_peer(text: str) -> Identity | None:
    if text == "host":
        return None
    try:
        rule = parse_rule(f"send:,peer={text}")
    except ValueError as exc:
        raise CallRefusedError(INVALID_ARGS, str(exc)) from exc
    peer = rule.peer
    if peer is None or peer.kind != "app" or rule.bus is not None:
        raise CallRefusedError(INVALID_ARGS, f"bad peer {text[:100]!r}")
    return Identity(type=peer.type, app=peer.app, component=peer.component)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
