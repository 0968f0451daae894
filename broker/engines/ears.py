"""Between a gate's connection and the listener: what is about the buses' own servers is the engine's."""

from collections.abc import Sequence
from typing import Final, Protocol

from broker.engines.base import Listener
from broker.gate.control import Ended, Event, SandboxSpec, Snapshot
from broker.gate.upstream import UpstreamLost


class Engine(Protocol):
    """What is to be told of, before or after the listener."""

    def learn(self, snapshot: Snapshot) -> None:
        """This is what the gate has."""

    def lose(self, event: UpstreamLost) -> None:
        """A bus has forgotten a sandbox."""

    def restored(self, spec: SandboxSpec) -> SandboxSpec:
        """Return a sandbox as a new gate is to have it."""

    def forget(self, sandbox: str) -> None:
        """It is no more."""


class Ears:
    """Tells both, in step."""

    def __init__(self, engine: Engine, listener: Listener) -> None:
        self._engine: Final = engine
        self._listener: Final = listener

    def take_event(self, event: Event) -> None:
        """Something happened."""
        if isinstance(event, UpstreamLost):
            self._engine.lose(event)
            return
        self._listener.take_event(event)
        if isinstance(event, Ended):
            self._engine.forget(event.sandbox)

    def take_snapshot(self, snapshot: Snapshot) -> None:
        """The gate was started, or connected to."""
        self._engine.learn(snapshot)
        self._listener.take_snapshot(snapshot)

    def missing(self) -> Sequence[tuple[SandboxSpec, Sequence[int]]]:
        """Return what it was to have, and did not."""
        return [(self._engine.restored(spec), fds) for spec, fds in self._listener.missing()]

    def tagged(self) -> Sequence[tuple[str, str]]:
        """Return who wants header field 10."""
        return self._listener.tagged()

    def lost(self, sandbox: str) -> None:
        """It does not take that sandbox again."""
        self._engine.forget(sandbox)
        self._listener.lost(sandbox)
