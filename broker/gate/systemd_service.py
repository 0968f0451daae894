"""The gate as a service of systemd: the control socket that it is given, what it says of itself, and its successor.

The successor is started here and not by the supervisor, since that one is another service: a process of its would have its
restrictions, and end with it.
"""

import os
import socket
from collections.abc import MutableMapping, Sequence
from typing import Final

from broker.control_protocol.messages import Started, StartNext
from broker.control_protocol.spawn import spawn_gate
from broker.gate.io.loop import Loop
from broker.posix.descriptors import close_fds
from broker.systemd.notify import Notifier, take_descriptors, take_notifier
from broker.wire import errors
from broker.wire.errors import CallRefusedError

CONTROL: Final = "control"  # FileDescriptorName= of the socket unit


class SystemdService:
    """Who started us, if it was systemd; else nobody, who gives nothing and is told nothing."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Take what is in the environment."""
        self._given: Final = dict(take_descriptors(environ))
        self._notifier: Final[Notifier] = take_notifier(environ, patience=0.0)
        self._next = 0  # the process that is to take over

    @property
    def is_there(self) -> bool:
        """Whether there is one, whose control socket is not ours to take away."""
        return self._notifier.is_wanted

    def control(self) -> socket.socket | None:
        """Return the socket to listen on for supervisors, if one was given."""
        fd = self._given.pop(CONTROL, None)
        return socket.socket(fileno=fd) if fd is not None else None

    def serves(self, loop: Loop) -> None:
        """Say that we serve, and from now on that we are alive."""
        self._notifier.ready()
        pause = self._notifier.watchdog / 2

        def alive() -> None:
            self._notifier.alive()
            loop.call_later(pause, alive)

        if pause:
            alive()

    def start_next(self, request: StartNext, fds: Sequence[int]) -> Started:
        """Start who is to take over, where we are. The descriptors are ours, if it comes so far. Raises CallRefusedError."""
        if not self.is_there:
            raise CallRefusedError(errors.NOT_SUPPORTED, "this gate is no service of systemd")
        if len(fds) != 2 or not request.argv:
            raise CallRefusedError(errors.INVALID_ARGS, "StartNext takes two descriptors")
        self._reap()
        environment = {**request.environment, **self._notifier.environment()}
        try:
            self._next = spawn_gate(request.argv, environment, *fds)
        except OSError as exc:
            text = f"{request.argv[0]} cannot be started: {exc.strerror}"
            raise CallRefusedError(errors.FAILED, text) from exc
        close_fds(fds)
        return Started(self._next)

    def replaced(self) -> None:
        """Say who serves now."""
        if self._next:
            self._notifier.main_process(self._next)

    def _reap(self) -> None:
        """Take note of an earlier one that did not come so far."""
        if self._next:
            os.waitpid(self._next, os.WNOHANG)
            self._next = 0
