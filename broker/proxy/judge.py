"""Judge of one connection with the exceptions of xdg-dbus-proxy. Pure.

An app may also talk to its own names, and may call GetMachineId of the bus.
"""

import copy
from collections.abc import Collection
from typing import Final

from broker.wire.interfaces import PEER
from policy.match import BUS_NAME, Judge, Verdict
from policy.rules import Identity

TO_ITSELF: Final = Verdict(allowed=True, rule=None, reason="an app may talk to itself")
MACHINE_ID: Final = Verdict(allowed=True, rule=None, reason="GetMachineId is let through")


class ProxyJudge(Judge):
    """A Judge that knows the unique name of the connection, from Hello on."""

    unique_name = ""

    def send(
        self,
        names: Collection[str],
        path: str | None,
        interface: str | None,
        member: str | None,
        peer: Identity | None,
    ) -> Verdict:
        """Judge a call or unicast signal out of the sandbox."""
        if self.unique_name and self.unique_name in names:
            return TO_ITSELF
        if member == "GetMachineId" and BUS_NAME in names and interface in (None, PEER):
            return MACHINE_ID
        return super().send(names, path, interface, member, peer)


def copy_judge(judge: ProxyJudge) -> ProxyJudge:
    """Return a judge for another connection, which shares the compiled rules."""
    return copy.copy(judge)
