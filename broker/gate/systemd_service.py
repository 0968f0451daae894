"""The gate as a service of systemd: sockets, notifications, and the start of the next gate.

The gate itself starts the next gate. A process started by the supervisor would belong to the
supervisor's service, would have the restrictions of that service, and would end with that service.
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
    """The systemd service of this process.

    Without systemd there are no descriptors or notifications.
    """

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Take the descriptors and addresses in the environment."""
        self._given: Final = dict(take_descriptors(environ))
        self._notifier: Final[Notifier] = take_notifier(environ, patience=0.0)
        self._next = 0  # pid of the next gate

    @property
    def is_there(self) -> bool:
        """Return whether systemd started the gate, and so owns the control socket."""
        return self._notifier.is_wanted

    def control(self) -> socket.socket | None:
        """Return the control socket from systemd, if there is one."""
        fd = self._given.pop(CONTROL, None)
        return socket.socket(fileno=fd) if fd is not None else None

    def serves(self, loop: Loop) -> None:
        """Notify systemd that the gate serves, and send keep-alive notifications from now on."""
        self._notifier.ready()
        pause = self._notifier.watchdog / 2

        def alive() -> None:
            self._notifier.alive()
            loop.call_later(pause, alive)

        if pause:
            alive()

    def start_next(self, request: StartNext, fds: Sequence[int]) -> Started:
        """Start the next gate in this service, and close the descriptors.

        Raises CallRefusedError.

        After an error the descriptors stay open.
        """
        if not self.is_there:
            raise CallRefusedError(errors.NOT_SUPPORTED, "this gate is not a service of systemd")
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
        """Notify systemd that the next gate is now the main process."""
        if self._next:
            self._notifier.main_process(self._next)

    def _reap(self) -> None:
        """Reap an earlier next gate, which did not take over."""
        if self._next:
            os.waitpid(self._next, os.WNOHANG)
            self._next = 0
