"""Names, paths and numbers of the bus driver, of Containers1 and of this broker.

Each name is written once, with two exceptions. `policy.match.BUS_NAME` and
`policy.wall.CONTAINERS1` are copies, because policy/ imports nothing of broker/.
`broker.systemd.units.NAME` is a copy of `BROKER`, because broker/systemd imports no other package.
"""

from typing import Final

# The bus itself: the name, the only object, and the object's interface of the same name.
DRIVER: Final = "org.freedesktop.DBus"
DRIVER_PATH: Final = "/org/freedesktop/DBus"

PEER: Final = "org.freedesktop.DBus.Peer"
INTROSPECTABLE: Final = "org.freedesktop.DBus.Introspectable"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"

# dbus-daemon's experimental interface for sandboxes, and the paths of Containers1 instances.
CONTAINERS1: Final = "org.freedesktop.DBus.Containers1"
INSTANCE_PREFIX: Final = "/org/freedesktop/DBus/Containers1/"
# The header field that names the instance of a message's sender.
INSTANCE_FIELD: Final = 10

# The broker's own bus name, and the interface of the same name on this object.
BROKER: Final = "org.buswarden.Broker1"
BROKER_PATH: Final = "/org/buswarden/Broker1"
BROKER_POLICY: Final = "org.buswarden.Broker1.Policy"
