"""Apps that talk all the time while something falls over, and know which of their calls must pass and which must not.

The rules of each app allow one of two interfaces, MARKS, by turns: list `n` allows MARKS[n % 2]. Whoever changes them says so by
`begin` and `done`; a call that was sent and answered while no change was under way must have been judged by the
list that was acknowledged last.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from integration.harness.rawclient import RawClient
from integration.harness.service import ECHO, PATH
from integration.harness.supervised import PATH_SUBTREE, SEND, Sandbox, Usos

MARKS: Final = ("org.example.Mark0", "org.example.Mark1")
ANSWER_TIMEOUT: Final = (
    30.0  # seconds; a gate that is started anew takes its time on a busy machine
)


def rules_of(number: int) -> Usos:
    """Return what list `number` allows."""
    return (SEND | PATH_SUBTREE, ECHO, "/", MARKS[number % 2])


@dataclass(slots=True, eq=False)
class App:
    """One sandbox with one connection."""

    sandbox: Sandbox
    client: RawClient | None = None
    acknowledged: int = 0  # the number of the list that is in force for sure
    begun: int = 0  # of the last one that may be
    calls: int = 0
    connections: int = 0

    def begin(self) -> int:
        """A change is about to be asked for: return its number."""
        self.begun += 1
        return self.begun

    def done(self) -> None:
        """It was acknowledged."""
        self.acknowledged = self.begun

    def ask(self, mark: int) -> None:
        """Call one of the two. Raises AssertionError if it was judged by a wrong list."""
        assert self.client is not None
        number, text = self.acknowledged, f"{self.sandbox.id} {self.calls}"
        reply = self.client.call(
            ECHO, PATH, MARKS[mark], "Echo", "s", (text,), timeout=ANSWER_TIMEOUT
        )
        passed = reply.error is None
        assert not passed or reply.values == (text,)
        self.calls += 1
        if self.begun == number:  # nothing changed meanwhile
            assert passed == (number % 2 == mark), (self.sandbox.id, number, mark, reply.error)

    def connect(self) -> None:
        self.client = self.sandbox.connect()
        self.connections += 1

    def close(self) -> None:
        if self.client is not None:
            self.client.close()
            self.client = None


@dataclass(slots=True, eq=False)
class Traffic:
    """Keeps apps talking, in a thread, for as long as the block. With `comes_back` they connect again."""

    comes_back: bool = False
    pause: float = 0.004  # seconds, between two calls
    failures: list[str] = field(default_factory=list)
    _apps: list[App] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _busy: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        for app in self._apps:
            app.close()

    @property
    def apps(self) -> Sequence[App]:
        return tuple(self._apps)

    def add(self, app: App) -> None:
        app.connect()
        self._apps.append(app)

    def remove(self, app: App) -> None:
        """Close its connection: its sandbox is about to end."""
        with self._busy:  # so that nobody is in the middle of a call of its
            self._apps.remove(app)
            app.close()

    def wait_calls(self, count: int = 2) -> None:
        """Wait until each app has been answered so many times more."""
        wanted = {app: app.calls + count for app in self.apps}
        deadline = time.monotonic() + 2 * ANSWER_TIMEOUT
        while late := [a for a, calls in wanted.items() if a.calls < calls and a in self._apps]:
            assert not self.failures, self.failures
            assert time.monotonic() < deadline, [app.sandbox.id for app in late]
            time.sleep(0.005)

    def _run(self) -> None:
        turn = 0
        while not self._stop.wait(self.pause):
            apps = self.apps
            if apps:
                turn += 1
                app = apps[turn % len(apps)]
                with self._busy:
                    if app in self._apps:
                        self._talk(app, turn // len(apps) % 2)

    def _talk(self, app: App, mark: int) -> None:
        try:
            if app.client is None:
                app.connect()
            app.ask(mark)
        except (OSError, EOFError) as exc:
            app.close()
            if not self.comes_back:
                self.failures.append(f"{app.sandbox.id}: {exc!r}")
        except AssertionError as exc:
            self.failures.append(f"{app.sandbox.id}: {exc}")
