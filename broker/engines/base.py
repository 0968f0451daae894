"""What the supervisor asks of an engine, whatever mediates the bus behind it."""

from collections.abc import Sequence
from typing import Protocol

from broker.gate.control import Event, SandboxSpec, Snapshot, Use
from broker.wire.errors import BrokerError
from policy.rules import AccessList


class EngineLostError(BrokerError):
    """The engine went away before it answered: what was asked may or may not have been done."""


class Listener(Protocol):
    """Who is told by an engine. Called in step with its answers: when a request has returned, whatever
    had happened before has been told."""

    def take_event(self, event: Event) -> None:
        """Something happened."""

    def take_snapshot(self, snapshot: Snapshot) -> None:
        """The engine was started, or connected to: this is what it has."""


class Engine(Protocol):
    """Serves the sandboxes' sockets. All of it raises CallRefusedError and EngineLostError."""

    @property
    def name(self) -> str:
        """Which engine this is."""

    @property
    def pid(self) -> int:
        """The process that serves them now."""

    async def add(self, spec: SandboxSpec, fds: Sequence[int]) -> None:
        """Begin to serve. The descriptors remain the caller's, who may close them afterwards."""

    async def set_access(self, sandbox: str, access: AccessList) -> None:
        """Swap the rules. When it returns no message is judged by the old ones."""

    async def stop_listening(self, sandbox: str) -> None:
        """Take no more connections."""

    async def stop(self, sandbox: str) -> None:
        """Also end the connections. When it returns, the listener has been told of the end."""

    async def who(self, bus: str, unique_name: str) -> str | None:
        """Return which sandbox is behind a connection to that bus."""

    async def use(self, sandbox: str | None = None) -> Use:
        """Return what a sandbox, or all of them together, take of their limits."""

    async def tag_headers(self, bus: str, unique_name: str) -> None:
        """Put header field 10 into what sandboxes send to this connection."""
