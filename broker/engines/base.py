"""The interface between the supervisor and an engine."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from broker.control_protocol.messages import Event, SandboxSpec, Snapshot, Usage
from broker.engines.held_sockets import HeldSockets
from broker.wire.errors import NOT_CONTAINER, BrokerError, CallRefusedError
from policy.rules import AccessList


class EngineLostError(BrokerError):
    """The engine went away before the answer, so the outcome is unknown."""


@contextlib.contextmanager
def ignore_ended_sandbox() -> Iterator[None]:
    """Ignore the refusal of a request to end a sandbox that has ended."""
    try:
        yield
    except CallRefusedError as exc:
        if exc.dbus_name != NOT_CONTAINER:
            raise


class Listener(Protocol):
    """The receiver of an engine's events.

    Events come in step with answers: when a request has returned, all earlier events have been passed on.
    """

    def take_event(self, event: Event) -> None:
        """Take note of an event."""

    def take_snapshot(self, snapshot: Snapshot) -> None:
        """Take note of all that the engine has, after it was started or connected to."""

    def missing(self) -> Sequence[tuple[SandboxSpec, Sequence[int]]]:
        """Return the sandboxes to serve that the snapshot lacked, with their descriptors."""

    def instance_field_wishes(self) -> Sequence[tuple[str, str]]:
        """Return the connections, as bus and unique name, that requested the instance field.

        The engine is told of these connections before a missing sandbox is served.
        """

    def lost(self, sandbox: str) -> None:
        """Take note that the engine refuses to serve a missing sandbox."""


class Engine(Protocol):
    """A server of the sandboxes' sockets.

    All requests raise CallRefusedError and EngineLostError.
    """

    @property
    def name(self) -> str:
        """The engine's name, as in the configuration."""

    @property
    def pid(self) -> int:
        """The process that serves now, or served last."""

    def serving(self, bus: str) -> str:
        """Return the name of the engine that serves new sandboxes on a bus."""

    def instances(self, sandbox: str) -> Mapping[str, str]:
        """Return the paths of the instances that buses made for a sandbox, by bus.

        A path is empty while the bus is asked for another instance.
        """

    def bus_restarted(self, bus: str) -> None:
        """Discard all knowledge of a bus that was started anew."""

    @property
    def held(self) -> HeldSockets:
        """Duplicates of the listening sockets. The engine closes them."""

    @property
    def last_crash(self) -> str:
        """A line about the last crash; empty if there was none."""

    async def add(self, spec: SandboxSpec, fds: Sequence[int]) -> None:
        """Begin to serve a sandbox.

        The caller owns the descriptors, and may close them afterwards.
        """

    async def set_access(self, sandbox: str, access: AccessList) -> None:
        """Replace the rules of a sandbox.

        No message is judged by the old rules after the return.
        """

    async def stop_listening(self, sandbox: str) -> None:
        """Accept no more connections from a sandbox."""

    async def stop(self, sandbox: str, reason: str = "stopped") -> None:
        """End a sandbox and its connections.

        The listener is told of the end and the reason before the return.
        """

    async def who(self, bus: str, unique_name: str) -> str | None:
        """Return the sandbox behind a connection: "" if unknown, None for a host."""

    async def use(self, sandbox: str | None = None) -> Usage:
        """Return the usage of limits by a sandbox, or by all sandboxes together."""

    async def request_instance_field(
        self, bus: str, unique_name: str, *, wanted: bool = True
    ) -> None:
        """Add the instance field to messages from sandboxes to a connection, or stop."""

    async def upgrade(self) -> tuple[int, int]:
        """Replace the serving process, closing no connection; return both pids.

        Raises CallRefusedError if the old process continues to serve.
        """
