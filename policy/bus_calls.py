"""Calls to the bus itself: what every sandbox may call, what needs a rule, and what no rule allows.

The gate judges by these tables, and `explain` does, so both give the same judgement. The tables are
an allow-list: a call in none of them needs a rule. What a call is about (a name that may be seen,
started or owned) is judged by whoever has the arguments.
"""

from typing import Final

from policy.match import BUS_NAME, Judge, Verdict
from policy.rules import Access, Rule

# The bus's only object.
BUS_PATH: Final = "/org/freedesktop/DBus"
PEER: Final = "org.freedesktop.DBus.Peer"
INTROSPECTABLE: Final = "org.freedesktop.DBus.Introspectable"
# No rule allows calls to these, because their effect reaches beyond one connection. The stock
# session buses allow such calls.
NEVER_INTERFACES: Final = frozenset(
    {
        "org.freedesktop.DBus.Monitoring",
        "org.freedesktop.DBus.Debug.Stats",
        "org.freedesktop.DBus.Containers1",
    }
)
# The bus accepts calls without an interface, so the members count too.
NEVER_MEMBERS: Final = frozenset(
    {
        "BecomeMonitor",
        "UpdateActivationEnvironment",
        "GetStats",
        "GetConnectionStats",
        "GetAllMatchRules",
        "AddServer",
        "StopInstance",
        "StopListening",
        "GetConnectionInstance",
        "GetInstanceInfo",
        "RequestHeader",
    }
)
# Every sandbox may call these about a name that the sandbox may see.
LOOK_UPS: Final = frozenset(
    {
        "GetNameOwner",
        "NameHasOwner",
        "GetConnectionUnixProcessID",
        "GetConnectionUnixUser",
        "GetConnectionCredentials",
        "GetConnectionSELinuxSecurityContext",
        "GetAdtAuditSessionData",
    }
)
# Every sandbox may call these about a name that the sandbox may own.
OWNING: Final = frozenset({"RequestName", "ReleaseName", "ListQueuedOwners"})
_PLAIN: Final = frozenset(
    {"Hello", "AddMatch", "RemoveMatch", "GetId", "ListNames", "ListActivatableNames"}
)
# Calls that snapd's profiles do not allow to every snap. In a list with `bus_by_rule` these calls
# need a send rule as well.
BY_RULE_TOO: Final = frozenset(
    {
        *(LOOK_UPS - {"GetNameOwner", "NameHasOwner"}),
        *OWNING,
        "GetId",
        "ListActivatableNames",
        "ListNames",
    }
)

NEVER: Final = Verdict(allowed=False, rule=None, reason="no rule can allow it in a sandbox")


def _open(about: str = "") -> Verdict:
    return Verdict(allowed=True, rule=None, reason=f"every sandbox may call it{about}")


ANY: Final = _open()
_OF_THE_BUS: Final = {
    **dict.fromkeys(_PLAIN, ANY),
    **dict.fromkeys(LOOK_UPS, _open(", about names that it may see")),
    **dict.fromkeys(OWNING, _open(", about names that it may own")),
    "StartServiceByName": _open(", for names that it may send to"),
}


def judge_bus_call(
    judge: Judge, path: str | None, interface: str | None, member: str | None
) -> Verdict:
    """Judge a call to the bus, without regard to the arguments."""
    to_driver = interface in {None, BUS_NAME}
    if interface in NEVER_INTERFACES or (to_driver and member in NEVER_MEMBERS):
        return NEVER
    if to_driver and member in _OF_THE_BUS:
        if member not in BY_RULE_TOO or not judge.access.bus_by_rule:
            return _OF_THE_BUS[member]
    elif (interface in {None, PEER} and member == "Ping") or (
        interface in {None, INTROSPECTABLE} and member == "Introspect"
    ):
        return ANY
    return judge.send((BUS_NAME,), path, interface, member, None)


def own_calls(given: tuple[Rule, ...], origin: str) -> tuple[Rule, ...]:
    """Return the rules for requesting and releasing the names that the given rules allow to own."""
    buses = {rule.bus for rule in given if Access.OWN in rule.access and not rule.deny}
    return tuple(
        Rule(
            access=frozenset({Access.SEND}),
            bus=bus,
            name=BUS_NAME,
            interface=BUS_NAME,
            member="{Request,Release}Name",
            origin=origin,
        )
        for bus in sorted(buses, key=str)
    )
