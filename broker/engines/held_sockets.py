"""Duplicates of the gate's listening sockets, kept for the next gate.

The key of a descriptor is (sandbox, bus); an empty bus stands for the read end of the close-notification pipe. A
descriptor is closed when the sandbox ends or stops listening.

A second keeper, for the case that the supervisor dies too, learns of each change by `on_change`, and gives
descriptors back by `adopt` before a gate is started.
"""

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Final

LOGGER: Final = logging.getLogger(__name__)
PIPE: Final = ""  # in place of a bus name


class HeldSockets:
    """Owned descriptors, by sandbox and bus."""

    def __init__(self) -> None:
        # Called with sandbox, bus and descriptor; with None for a descriptor that is about to be closed.
        self.on_change: Callable[[str, str, int | None], None] = _ignore
        self._fds: Final[dict[str, dict[str, int]]] = {}
        # For each request that waits for the gate: the sandboxes it concerns that have not ended since.
        self._asked: Final[dict[object, set[str]]] = {}

    def __contains__(self, sandbox: str) -> bool:
        return sandbox in self._fds

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._fds))

    def of(self, sandbox: str) -> Mapping[str, int]:
        """Return the descriptors of a sandbox by bus, still owned by this object."""
        return self._fds.get(sandbox, {})

    @contextlib.contextmanager
    def unless_ended(self, sandboxes: Iterable[str]) -> Iterator[Container[str]]:
        """Return a set of sandboxes from which those are removed that end during the `with`.

        Nothing may be held of an ended sandbox any more, because an end is announced only once.
        """
        question = object()
        living = self._asked[question] = set(sandboxes)
        try:
            yield living
        finally:
            del self._asked[question]

    def end(self, sandbox: str) -> None:
        """Close the descriptors of a sandbox that has ended, and let `unless_ended` know."""
        for living in self._asked.values():
            living.discard(sandbox)
        self.drop(sandbox)

    def keep(self, sandbox: str, bus: str, fd: int) -> None:
        """Hold a duplicate of a descriptor, or log a warning if no descriptor is left."""
        try:
            own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        except OSError as exc:
            LOGGER.warning("%s: cannot hold its listening socket: %s", sandbox, exc.strerror)
            return
        self.adopt(sandbox, bus, own)

    def adopt(self, sandbox: str, bus: str, fd: int) -> None:
        """Hold and own a descriptor from now on."""
        self.drop(sandbox, bus)
        self._fds.setdefault(sandbox, {})[bus] = fd
        self.on_change(sandbox, bus, fd)

    def drop(self, sandbox: str, bus: str | None = None) -> None:
        """Close the descriptors of a sandbox, or only the descriptor for a bus.

        Harmless if none is held.
        """
        held = self._fds.get(sandbox, {})
        for which in [bus] if bus is not None else list(held):
            if (fd := held.pop(which, None)) is not None:
                self.on_change(sandbox, which, None)
                with contextlib.suppress(OSError):
                    os.close(fd)
        if not held:
            self._fds.pop(sandbox, None)

    def drop_listeners(self, sandbox: str) -> None:
        """Close the listening sockets of a sandbox, but not the pipe."""
        for bus in [bus for bus in self.of(sandbox) if bus != PIPE]:
            self.drop(sandbox, bus)

    def close(self) -> None:
        """Close all descriptors without `on_change`, so that the second keeper keeps all."""
        self.on_change = _ignore
        for sandbox in self:
            self.drop(sandbox)


def _ignore(_sandbox: str, _bus: str, _fd: int | None) -> None:
    pass
