"""The built-in rules between sandboxes and the broker's own management interfaces. Pure.

They are in every sandbox's list, whatever else is: so one judgement is the gate's, and that of `explain`. They are about
whoever owns the broker's name, by whatever name it is called. What is left open is in docs/policy.md.
"""

from typing import Final

import msgspec

from policy.rules import Access, AccessList, Rule

BROKER: Final = "org.buswarden.Broker1"
CONTAINERS1: Final = "org.freedesktop.DBus.Containers1"
# Every method of that interface but GetConnectionInstance, with which a sandboxed service identifies its callers.
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
    """Return the list with these rules."""
    return msgspec.structs.replace(access, rules=(*access.rules, *WALL))
