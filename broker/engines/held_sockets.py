"""What the gate listens on, held a second time: so that a gate which dies takes no socket with it.

A key is (sandbox, bus); no bus is the read end of its close-notification pipe. Descriptors are closed when their sandbox
ends or listens no more. Whoever keeps them somewhere else as well, for the case that we die too, is told by
`on_change`, and gives them back by `adopt` before there is a gate.
"""

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Final

LOGGER: Final = logging.getLogger(__name__)
PIPE: Final = ""  # in place of a bus


class HeldSockets:
    """Descriptors of ours, by sandbox and bus."""

    def __init__(self) -> None:
        # Called with sandbox, bus, and the descriptor: None when it is about to be closed.
        self.on_change: Callable[[str, str, int | None], None] = _ignore
        self._fds: Final[dict[str, dict[str, int]]] = {}
        # For each question to the gate what it is about, without what has ended since.
        self._asked: Final[dict[object, set[str]]] = {}

    def __contains__(self, sandbox: str) -> bool:
        return sandbox in self._fds

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._fds))

    def of(self, sandbox: str) -> Mapping[str, int]:
        """Return what is held of a sandbox: lent, not given."""
        return self._fds.get(sandbox, {})

    @contextlib.contextmanager
    def unless_ended(self, sandboxes: Iterable[str]) -> Iterator[Container[str]]:
        """Give those of the sandboxes that the gate is asked about that have not ended meanwhile.

        Of the others nothing may be held any more: nobody would tell us again to let it go.
        """
        question = object()
        living = self._asked[question] = set(sandboxes)
        try:
            yield living
        finally:
            del self._asked[question]

    def end(self, sandbox: str) -> None:
        """It has ended: close what is held of it, and see to it that no more is."""
        for living in self._asked.values():
            living.discard(sandbox)
        self.drop(sandbox)

    def keep(self, sandbox: str, bus: str, fd: int) -> None:
        """Hold a duplicate. Without descriptors to spare the sandbox goes without."""
        try:
            own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        except OSError as exc:
            LOGGER.warning("%s: its socket cannot be held: %s", sandbox, exc.strerror)
            return
        self.adopt(sandbox, bus, own)

    def adopt(self, sandbox: str, bus: str, fd: int) -> None:
        """Hold this very one: it is ours from here on."""
        self.drop(sandbox, bus)
        self._fds.setdefault(sandbox, {})[bus] = fd
        self.on_change(sandbox, bus, fd)

    def drop(self, sandbox: str, bus: str | None = None) -> None:
        """Close what is held of a sandbox, or of it for one bus. Fine if there is nothing."""
        held = self._fds.get(sandbox, {})
        for which in [bus] if bus is not None else list(held):
            if (fd := held.pop(which, None)) is not None:
                self.on_change(sandbox, which, None)
                with contextlib.suppress(OSError):
                    os.close(fd)
        if not held:
            self._fds.pop(sandbox, None)

    def drop_listeners(self, sandbox: str) -> None:
        """It takes no more connections."""
        for bus in [bus for bus in self.of(sandbox) if bus != PIPE]:
            self.drop(sandbox, bus)

    def close(self) -> None:
        """Close all of them, and tell nobody: they may be wanted by who comes after us."""
        self.on_change = _ignore
        for sandbox in self:
            self.drop(sandbox)


def _ignore(_sandbox: str, _bus: str, _fd: int | None) -> None:
    pass
