"""Names, paths and numbers of the bus driver, of Containers1 and of this broker, each written once.

`policy.match.BUS_NAME` and `policy.wall.CONTAINERS1` are copies: policy/ imports nothing of broker/.
`broker.systemd.units.NAME` is a copy of `BROKER`: broker/systemd imports nothing but itself.
"""

from typing import Final

# The bus itself: its name, its only object, and the interface of that object, called as the name is.
DRIVER: Final = "org.freedesktop.DBus"
DRIVER_PATH: Final = "/org/freedesktop/DBus"

PEER: Final = "org.freedesktop.DBus.Peer"
INTROSPECTABLE: Final = "org.freedesktop.DBus.Introspectable"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"

# dbus-daemon's experimental interface for sandboxes, and the paths of the instances that it makes.
CONTAINERS1: Final = "org.freedesktop.DBus.Containers1"
INSTANCE_PREFIX: Final = "/org/freedesktop/DBus/Containers1/"
# The header field by which a message names the instance that sent it.
INSTANCE_FIELD: Final = 10

# The broker's own bus name, and the interface of the same name on this object.
BROKER: Final = "org.buswarden.Broker1"
BROKER_PATH: Final = "/org/buswarden/Broker1"
BROKER_POLICY: Final = "org.buswarden.Broker1.Policy"
