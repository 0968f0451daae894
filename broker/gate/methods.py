"""Which methods of the bus itself (org.freedesktop.DBus) an app may call, and which no rule allows: tables."""

from typing import Final

PEER: Final = "org.freedesktop.DBus.Peer"
INTROSPECTABLE: Final = "org.freedesktop.DBus.Introspectable"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"

# No rule allows these: they reach beyond one connection (the stock session buses would let them through).
NEVER_INTERFACES: Final = frozenset(
    {
        "org.freedesktop.DBus.Monitoring",
        "org.freedesktop.DBus.Debug.Stats",
        "org.freedesktop.DBus.Containers1",
    }
)
# The bus takes calls without an interface, so their members count too.
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
# Flags of RequestName that the specification has.
REQUEST_NAME_FLAGS: Final = 7
# Answers of RequestName by which the app has the name, or waits in its queue, or has it already.
HAS_NAME: Final = (1, 2, 4)

# Calls that every sandbox may make, and that snapd's profiles do not allow to every snap: in a list with
# `bus_by_rule` they need a send rule as well.
BY_RULE_TOO: Final = frozenset(
    {
        "GetAdtAuditSessionData",
        "GetConnectionCredentials",
        "GetConnectionSELinuxSecurityContext",
        "GetConnectionUnixProcessID",
        "GetConnectionUnixUser",
        "GetId",
        "ListActivatableNames",
        "ListNames",
        "ListQueuedOwners",
        "ReleaseName",
        "RequestName",
    }
)
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
