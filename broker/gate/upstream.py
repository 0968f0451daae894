"""What supervisor and gate say to each other about a bus that has Containers1 itself. Pure.

Such a bus makes a server for each sandbox and labels what connects there. It ends the server when the connection that
asked for it leaves: so the gate asks, on a connection of its own (own.py), and the supervisor says what.
"""

from typing import Final

import msgspec

CONTAINERS1: Final = "org.freedesktop.DBus.Containers1"


class Upstream(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A bus's own server for one sandbox: the sandbox's connections to the bus are made there."""

    instance: str = ""  # its path on the bus; empty: it is lost, and connections wait for another
    address: str = ""
    stop: str = "StopInstance"  # which method ends it, and its connections
    stop_listening: str = "StopListening"  # empty: the bus has none


class CallBus(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """Call the bus itself on the gate's own connection, made as that user. Answered by Called or Refused.

    It is answered when the bus answers, or is too slow, and so perhaps after later requests.
    """

    bus: str
    uid: int
    interface: str
    member: str
    signature: str = ""
    body: bytes = b""
    # A method to be called with the path that the reply begins with, unless it comes to be a sandbox's.
    undo: str = ""
    leave: bool = False  # hang up then, if nothing else is wanted of that connection


class Called(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What the bus returned."""

    signature: str
    body: bytes
    little: bool


class SetUpstream(msgspec.Struct, frozen=True, tag=True):
    """Make a sandbox's connections to a bus there from now on; nil: at the bus itself. Answered by Done.

    The server before is ended, if it is there still.
    """

    sandbox: str
    bus: str
    upstream: Upstream | None


class UpstreamLost(msgspec.Struct, frozen=True, tag=True):
    """The bus, or the gate's own connection to it, is gone, and the sandbox's server with it."""

    sandbox: str
    bus: str
