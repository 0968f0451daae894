"""Built-in rules between sandboxes and the broker's own management interfaces. Pure.

The rules are in every sandbox's list, in the gate and in `explain`, so both give the same
judgement. The rules concern the owner of the broker's name, by whichever name the owner is
addressed. docs/policy.md lists the members that stay allowed.
"""

from typing import Final

import msgspec

from policy.rules import Access, AccessList, Rule

BROKER: Final = "org.buswarden.Broker1"
CONTAINERS1: Final = "org.freedesktop.DBus.Containers1"
# All methods of the interface but GetConnectionInstance. A sandboxed service identifies callers
# with GetConnectionInstance.
CLOSED: Final = (
    "AddServer",
    "AddContainerServer",
    "StopInstance",
    "RemoveContainerServer",
    "StopListening",
    "SetContainerAccess",
    "GetInstanceInfo",
    "RequestHeader",
)
_ORIGIN: Final = "built in: the broker is not managed from inside a sandbox"
_SEND: Final = frozenset({Access.SEND})


def _deny(path: str | None = None, interface: str | None = None, member: str | None = None) -> Rule:
    return Rule(
        access=_SEND,
        deny=True,
        name=BROKER,
        path=path,
        interface=interface,
        member=member,
        origin=_ORIGIN,
    )


WALL: Final = (
    _deny(interface="org.buswarden.*"),
    _deny(path="/org/buswarden/**"),
    _deny(interface=CONTAINERS1, member="{" + ",".join(CLOSED) + "}"),
    Rule(access=frozenset({Access.OWN}), deny=True, name=BROKER, origin=_ORIGIN),
)


def walled(access: AccessList) -> AccessList:
    """Return the list with the built-in rules added."""
    return msgspec.structs.replace(access, rules=(*access.rules, *WALL))
