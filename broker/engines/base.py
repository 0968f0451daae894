"""What the supervisor asks of an engine, whatever mediates the bus behind it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from broker.control_protocol.messages import Event, SandboxSpec, Snapshot, Usage
from broker.engines.held_sockets import HeldSockets
from broker.wire.errors import NOT_CONTAINER, BrokerError, CallRefusedError
from policy.rules import AccessList


class EngineLostError(BrokerError):
    """The engine went away before it answered: what was asked may or may not have been done."""


@contextlib.contextmanager
def ignore_ended_sandbox() -> Iterator[None]:
    """Have something ended that may have ended by itself meanwhile, or with its gate."""
    try:
        yield
    except CallRefusedError as exc:
        if exc.dbus_name != NOT_CONTAINER:
            raise


class Listener(Protocol):
    """Who is told by an engine. Called in step with its answers: when a request has returned, whatever
    had happened before has been told."""

    def take_event(self, event: Event) -> None:
        """Something happened."""

    def take_snapshot(self, snapshot: Snapshot) -> None:
        """The engine was started, or connected to: this is what it has."""

    def missing(self) -> Sequence[tuple[SandboxSpec, Sequence[int]]]:
        """Return what it was to have by that snapshot, and did not: to be served with these descriptors."""

    def tagged(self) -> Sequence[tuple[str, str]]:
        """Return who wants header field 10, as bus and unique name: told before any sandbox is served again."""

    def lost(self, sandbox: str) -> None:
        """It does not take that sandbox again."""


class Engine(Protocol):
    """Serves the sandboxes' sockets. All of it raises CallRefusedError and EngineLostError."""

    @property
    def name(self) -> str:
        """Which engine this is."""

    @property
    def pid(self) -> int:
        """The process that serves them now."""

    def serving(self, bus: str) -> str:
        """Return which engine serves new sandboxes on that bus: one may use another."""

    def instances(self, sandbox: str) -> Mapping[str, str]:
        """Return the paths that the buses themselves know a sandbox by, by bus; empty while it gets another."""

    def bus_restarted(self, bus: str) -> None:
        """What was known of that bus holds no more: it started anew."""

    @property
    def held(self) -> HeldSockets:
        """What it listens on, a second time: closed by the engine."""

    @property
    def last_crash(self) -> str:
        """A line about the last time that it died; empty if it did not."""

    async def add(self, spec: SandboxSpec, fds: Sequence[int]) -> None:
        """Begin to serve. The descriptors remain the caller's, who may close them afterwards."""

    async def set_access(self, sandbox: str, access: AccessList) -> None:
        """Swap the rules. When it returns no message is judged by the old ones."""

    async def stop_listening(self, sandbox: str) -> None:
        """Take no more connections."""

    async def stop(self, sandbox: str, reason: str = "stopped") -> None:
        """Also end the connections. When it returns, the listener has been told of the end, and why it came."""

    async def who(self, bus: str, unique_name: str) -> str | None:
        """Return which sandbox is behind a connection to that bus, "" if that is not known; None for a host."""

    async def use(self, sandbox: str | None = None) -> Usage:
        """Return what a sandbox, or all of them together, take of their limits."""

    async def request_instance_field(
        self, bus: str, unique_name: str, *, wanted: bool = True
    ) -> None:
        """Put header field 10 into what sandboxes send to this connection, or no more."""

    async def upgrade(self) -> tuple[int, int]:
        """Replace the process that serves by a new one, with no connection closed; return both pids.

        Raises CallRefusedError if the old one serves on.
        """
