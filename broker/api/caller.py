"""Identification of callers by the bus and the gate, never by the caller's own words."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

from broker.bus.connection import BUS_DRIVER, Call, Destination
from broker.bus.values import Variant, holds_descriptor, pack
from broker.supervisor.sandboxes.specs import Caller
from broker.supervisor.supervisor import Supervisor
from broker.wire.errors import ACCESS_DENIED, CallRefusedError


class Connection(Protocol):
    """The part of a bus connection that the interfaces use."""

    async def call(
        self, target: Destination, member: str, signature: str = "", values: Any = ()
    ) -> list[Any]:
        """Return the values of the reply."""

    async def forwards_instance_field(self) -> bool:
        """Return whether the bus forwards header field 10."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BusContext:
    """A bus with the service on it."""

    name: str
    bus: Connection
    supervisor: Supervisor
    buses: Collection[str]  # the names of all buses

    async def host_caller(self, call: Call) -> Caller:
        """Return the caller, which must be outside all sandboxes.

        Raises CallRefusedError AccessDenied for a call from inside a sandbox.
        """
        if await self.supervisor.is_inside(self.name, call.sender):
            raise CallRefusedError(ACCESS_DENIED, f"{call.member} is not for callers in a sandbox")
        (credentials,) = await self.bus.call(
            BUS_DRIVER, "GetConnectionCredentials", "s", [call.sender]
        )
        uid = credentials.get("UnixUserID")
        if not isinstance(uid, Variant) or not isinstance(uid.value, int):
            raise CallRefusedError(ACCESS_DENIED, "the bus does not know the user of the caller")
        return Caller(
            bus=self.name,
            unique_name=call.sender,
            uid=uid.value,
            credentials=pack("a{sv}", [_without_descriptors(credentials)]),
        )


def _without_descriptors(credentials: dict[str, Variant]) -> dict[str, Variant]:
    """Return the credentials without descriptors, such as a pidfd.

    A stored descriptor would be an index into the descriptors of a message that is gone.
    """
    return {key: value for key, value in credentials.items() if not holds_descriptor(value)}
