"""The gate's own connections to buses: on them the supervisor has the bus called, and what the bus makes is kept.

Theory of operation. A bus that has Containers1 ends a server when the connection that asked for it leaves, and the
gate is who outlives the supervisor. One connection a bus and user, made when first needed. What a call with `undo`
made is unclaimed until a sandbox has it; if the supervisor goes before, or does not wait for the answer any more, it
is undone, so nothing is left half made whoever dies when. The bus is trusted with what it says, but neither to
answer nor to read: calls have a deadline, and how many wait is bounded.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from broker.gate.bus import Bus
from broker.gate.handover import Fds, OwnDump
from broker.gate.loop import Loop
from broker.gate.ownlink import Host, OwnLink
from broker.gate.upstream import CONTAINERS1, CallBus, Upstream
from broker.wire import errors
from broker.wire.errors import CallRefusedError


class Own:
    """All of them, by bus and user."""

    def __init__(self, loop: Loop, host: Host) -> None:
        self._loop: Final = loop
        self._host: Final = host
        self._links: Final[dict[tuple[str, int], OwnLink]] = {}

    def call(self, bus: Bus, request: CallBus, asked: int) -> None:
        """Call the bus; the answer goes to the request of that number. Raises CallRefusedError."""
        link = self._get(bus.name, request.uid)
        if link is None:
            link = OwnLink(self._loop, self._host, bus, request.uid)
            self._links[bus.name, request.uid] = link
            link.open()
            if link.is_closed:
                text = f"bus {bus.name} cannot be reached"
                raise CallRefusedError(errors.DISCONNECTED, text)
        link.call(request, asked)

    def claim(self, sandbox: str, uid: int, upstreams: Mapping[str, Upstream]) -> None:
        """Have these be a sandbox's from now on: they are made, and nobody's. Raises CallRefusedError."""
        for bus, upstream in upstreams.items():
            link = self._get(bus, uid)
            if upstream.instance and (link is None or upstream.instance not in link.unclaimed):
                text = f"bus {bus} does not have {upstream.instance} any more"
                raise CallRefusedError(errors.DISCONNECTED, text)
        for bus, upstream in upstreams.items():
            if upstream.instance and (link := self._get(bus, uid)) is not None:
                del link.unclaimed[upstream.instance]
                link.claimed[upstream.instance] = sandbox

    def stop_listening(self, uid: int, upstreams: Mapping[str, Upstream]) -> None:
        """Have the buses take no more connections there."""
        for bus, upstream in upstreams.items():
            link = self._get(bus, uid)
            if link is not None and upstream.instance in link.claimed and upstream.stop_listening:
                link.stop_listening(upstream.stop_listening, upstream.instance)

    def stop(self, uid: int, upstreams: Mapping[str, Upstream]) -> None:
        """Have the buses end them."""
        for bus, upstream in upstreams.items():
            link = self._get(bus, uid)
            if link is not None and upstream.instance in link.claimed:
                link.tell(CONTAINERS1, upstream.stop, upstream.instance)

    def supervisor_lost(self) -> None:
        """Undo what nobody will claim."""
        for link in self._links.values():
            link.supervisor_lost()

    def close(self) -> None:
        """Hang up on all: the buses end what they made, and nobody is told."""
        for link in self._links.values():
            link.hang_up()
        self._links.clear()

    def dump(self, fds: Fds) -> tuple[OwnDump, ...]:
        """Return those that are ready."""
        return tuple(link.dump(fds) for link in self._links.values() if link.is_ready)

    def settle(self) -> None:
        """Close what is not ready to be handed over: it has made nothing yet."""
        for link in list(self._links.values()):
            if not link.is_ready:
                link.close("the gate is being replaced: try again")
        for key in [key for key, link in self._links.items() if link.is_closed]:
            del self._links[key]

    def load(self, dumps: Sequence[OwnDump], buses: Mapping[str, Bus], fds: Sequence[int]) -> None:
        """Have those that were dumped."""
        for dump in dumps:
            link = OwnLink(self._loop, self._host, buses[dump.bus], dump.uid)
            self._links[dump.bus, dump.uid] = link
            link.load(dump, fds)

    def _get(self, bus: str, uid: int) -> OwnLink | None:
        link = self._links.get((bus, uid))
        return link if link is not None and not link.is_closed else None
