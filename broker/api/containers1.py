"""org.freedesktop.DBus.Containers1, the interface of dbus-daemon's proposal.

Further methods, such as StopListening and SetContainerAccess, are the broker's additions.
"""

from typing import Final

from broker.api.arguments import NAMED, Context, reading_allow, reading_request
from broker.api.caller import BusContext
from broker.api.dispatch import Interface, Method, Property, ReturnValues, SignalSpec, args
from broker.bus.codec import MAX_BODY
from broker.bus.connection import BUS_DRIVER, Call
from broker.bus.values import Variant, unpack
from broker.supervisor.sandboxes.registry import Record
from broker.supervisor.sandboxes.rule_limits import in_slices
from broker.supervisor.watches.watches import NameWatch
from broker.wire.errors import (
    FAILED,
    INVALID_ARGS,
    NAME_HAS_NO_OWNER,
    NOT_CONTAINER,
    NOT_SUPPORTED,
    CallRefusedError,
)
from broker.wire.interfaces import CONTAINERS1, DRIVER, INSTANCE_PREFIX
from broker.wire.names import is_bus_name, is_unique_name

NOBODY: Final = -1  # the uid of no user
_ADD_TAKES: Final = args(
    "container_type:s", "container_name:s", "metadata:a{sv}", "named_arguments:a{sv}"
)
_ADD_GIVES: Final = args("container_instance:o", "socket_path:ay", "connectable_address:s")
_INSTANCE: Final = args("container_instance:o")
_ABOUT: Final = args("creator:a{sv}", "container_type:s", "container_name:s", "metadata:a{sv}")


class Containers1:
    """The interface on one bus."""

    def __init__(self, context: BusContext, watch: NameWatch) -> None:
        self._context: Final = context
        self._supervisor: Final = context.supervisor
        self._watch: Final = watch

    def interface(self) -> Interface:
        """Return the description of the interface."""
        rules = args("container_instance:s", "rules:a(usos)")
        return Interface(
            name=CONTAINERS1,
            methods=(
                *(
                    Method(
                        name=name,
                        takes=_ADD_TAKES,
                        gives=_ADD_GIVES,
                        longest=MAX_BODY,
                        run=self._add,
                    )
                    for name in ("AddServer", "AddContainerServer")
                ),
                Method(name="StopInstance", takes=_INSTANCE, run=self._stop),
                Method(name="RemoveContainerServer", takes=_INSTANCE, run=self._stop),
                Method(name="StopListening", takes=_INSTANCE, run=self._stop_listening),
                Method(
                    name="SetContainerAccess",
                    takes=rules,
                    longest=MAX_BODY,
                    run=self._set_access,
                ),
                Method(
                    name="GetConnectionInstance",
                    takes=args("connection_name:s"),
                    gives=(*_INSTANCE, *_ABOUT),
                    run=self._get_connection_instance,
                ),
                Method(
                    name="GetInstanceInfo",
                    takes=_INSTANCE,
                    gives=_ABOUT,
                    run=self._get_instance_info,
                ),
                Method(name="RequestHeader", run=self._request_header),
            ),
            signals=(SignalSpec(name="InstanceRemoved", args=_INSTANCE),),
            properties=(Property(name="SupportedArguments", type="as", value=sorted(NAMED)),),
        )

    async def _add(self, call: Call) -> ReturnValues:
        # The caller is watched before the bus is asked about the caller. So a caller that leaves is
        # noticed either by the question or by the watch.
        self._watch.add(call.sender)
        try:
            caller = await self._context.host_caller(call)
            context = Context(
                bus=self._context.name,
                buses=self._context.buses,
                fds=call.fds,
                uid=caller.uid,
                origin=f"AddServer by {call.sender}",
                max_metadata=self._supervisor.limits.max_container_metadata_bytes,
            )
            request = await in_slices(reading_request(call.values, context), call.turn)
            record = await self._supervisor.add(request, caller)
        except BaseException:
            self._watch.discard(call.sender)
            raise

        def then() -> None:
            self._supervisor.announce(record)
            self._watch.discard(call.sender)

        bus = next(iter(record.sockets))
        path = record.sockets[bus].encode() + b"\0"
        return ReturnValues((record.path, path, record.addresses[bus]), then)

    async def _stop(self, call: Call) -> ReturnValues:
        caller = await self._context.host_caller(call)
        await self._supervisor.stop(caller, instance(call.values[0]))
        return ReturnValues()

    async def _stop_listening(self, call: Call) -> ReturnValues:
        caller = await self._context.host_caller(call)
        await self._supervisor.stop_listening(caller, instance(call.values[0]))
        return ReturnValues()

    async def _set_access(self, call: Call) -> ReturnValues:
        caller = await self._context.host_caller(call)
        target, entries = call.values
        origin = f"SetContainerAccess by {call.sender}"
        rules = await in_slices(reading_allow(entries, origin), call.turn)
        await self._supervisor.set_access(caller, target, rules)
        return ReturnValues()

    async def _get_connection_instance(self, call: Call) -> ReturnValues:
        unique_name = await self._find_owner(call.values[0])
        behind = await self._supervisor.who(self._context.name, unique_name)
        if not behind.is_there and not await self._is_there(unique_name):
            raise CallRefusedError(NAME_HAS_NO_OWNER, f"no connection has the name {unique_name}")
        if not behind.is_inside:
            raise CallRefusedError(NOT_CONTAINER, f"{unique_name} is in no sandbox")
        if behind.sandbox is None:
            # The gate died, or the bus takes long to close a connection of an ended sandbox.
            text = f"{unique_name} is in a sandbox that is not known any more"
            raise CallRefusedError(FAILED, text)
        record = behind.sandbox.record
        return ReturnValues((record.path, *describe(record)))

    async def _get_instance_info(self, call: Call) -> ReturnValues:
        # The caller is always identified first. Otherwise the time of the answer would tell whether
        # the instance exists.
        seen_by = NOBODY
        if not await self._supervisor.is_inside(self._context.name, call.sender):
            seen_by = (await self._context.host_caller(call)).uid
        record = self._supervisor.registry.find(instance(call.values[0]), seen_by=seen_by).record
        return ReturnValues(describe(record))

    async def _request_header(self, call: Call) -> ReturnValues:
        self._watch.add(call.sender)  # as in `_add`
        try:
            caller = await self._context.host_caller(call)
            if not await self._context.bus.forwards_instance_field():
                raise CallRefusedError(NOT_SUPPORTED, "this bus strips unknown header fields")
            await self._supervisor.request_instance_field(caller)
        finally:
            self._watch.discard(call.sender)
        return ReturnValues()

    async def _find_owner(self, name: str) -> str:
        if not is_bus_name(name):
            raise CallRefusedError(INVALID_ARGS, f"{name[:100]!r} is not a bus name")
        if name == DRIVER:
            raise CallRefusedError(NOT_CONTAINER, "the bus itself is in no sandbox")
        if is_unique_name(name):
            return name
        (owner,) = await self._context.bus.call(BUS_DRIVER, "GetNameOwner", "s", [name])
        return str(owner)

    async def _is_there(self, unique_name: str) -> bool:
        (there,) = await self._context.bus.call(BUS_DRIVER, "NameHasOwner", "s", [unique_name])
        return bool(there)


def instance(path: str) -> str:
    """Check the path of an instance, and return the path. Raises CallRefusedError."""
    if not path.startswith(INSTANCE_PREFIX):
        raise CallRefusedError(NOT_CONTAINER, f"{path[:100]!r} is not the path of a sandbox")
    return path


def describe(record: Record) -> tuple[object, ...]:
    """Return creator, type, name and metadata of a sandbox."""
    creator: dict[str, Variant]
    (creator,) = unpack("a{sv}", record.credentials)
    (metadata,) = unpack("a{sv}", record.metadata)
    return creator, record.type, record.app, metadata
