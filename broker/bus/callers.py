"""Waiting calls and turns of callers.

Users share the supervisor's time, and the callers of a user share the user's time.

Theory of operation. A call goes through these steps:

    bus            Callers                                       worker
     | header --> | check: room for caller, user and all?         |
     | body ----> | put                                           |
     | <--------- | ask_user, for the first call of a caller      |
     | uid -----> | know: early -> the queue of the user          |
     |            | next: a slot is free, and the turn came ----> |
     |            | <---------------- turn, between two slices -- |
     |            | -- the slice of this caller ----------------> |
     |            | <-------------------------------------- done  |

- Admission. A call is admitted or refused by its header. The limits count the waiting calls, bytes
  and descriptors of the caller, of the user and of all. A user or caller with less than an equal
  share is admitted even if a common limit is reached, so that a flood keeps no other caller out.
- Order. Calls start in turns of users, and of the callers of a user, while there are slots. A user
  without a running call may always start a call. Long bodies have slots of their own, because the
  changes that long bodies request keep the gate busy, too.
- Slices. Long work is done in slices. Only a single slice runs at a time, and other tasks run
  between slices.
- Leaving. When a caller leaves the bus (`gone`), the caller's waiting calls are closed. Running
  calls of the caller end at their next `turn` with CallerGoneError. A request that the gate already
  has is finished, because half a change would be worse. The caller is forgotten when the last
  running call is done.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

import trio

from broker.bus.turns import FairQueue
from broker.wire.errors import LIMITS_EXCEEDED, BrokerError, CallRefusedError

# Limits on waiting calls of a caller, of a user, and of all. A caller or user with less than an
# equal share has room even beyond the last two limits, so that other callers keep no caller out.
MAX_OF_CALLER: Final = 64
MAX_OF_USER: Final = 256
MAX_WAITING: Final = 1024
# The same for the bytes of bodies. The longest body has 8 MiB.
MAX_BYTES_OF_CALLER: Final = 16 * 1024 * 1024
MAX_BYTES_OF_USER: Final = 32 * 1024 * 1024
MAX_BYTES: Final = 64 * 1024 * 1024
# The same for the descriptors of calls.
MAX_FDS_OF_CALLER: Final = 64
MAX_FDS_OF_USER: Final = 128
MAX_FDS: Final = 256
# Limits on running calls.
RUNNING_OF_CALLER: Final = 4
RUNNING_OF_USER: Final = 32
RUNNING: Final = 64
# A longer body is a long body, as of some hundred rules. A caller may have one long call running.
LONG: Final = 32 * 1024
RUNNING_LONG: Final = 4
# Remembered idle callers. Idle callers stay watched, so that the next call needs no new watch.
MAX_IDLE: Final = 64
# The user of callers whose user the bus has not reported yet.
UNKNOWN: Final = -1


class CallerGoneError(BrokerError):
    """The caller left the bus and needs no answer."""


class Waiting(Protocol):
    """The part of a call that the queue needs."""

    @property
    def sender(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def fd_count(self) -> int: ...
    def close(self) -> None: ...


class Watch(Protocol):
    """The part of a name watch that is needed here."""

    def add(self, name: str) -> None:
        """Watch a name."""

    def discard(self, name: str) -> None:
        """Undo one `add`."""


class _Amount:
    """A number of waiting calls, of their bytes and descriptors, and of their callers."""

    __slots__ = ("bytes", "callers", "calls", "fds")

    def __init__(self) -> None:
        self.calls = self.bytes = self.fds = self.callers = 0

    def add(self, call: Waiting, sign: int = 1) -> None:
        self.calls += sign
        self.bytes += sign * call.size
        self.fds += sign * call.fd_count


class _Caller:
    """A connection that has sent calls."""

    __slots__ = ("early", "is_gone", "name", "running", "running_long", "user", "waiting")

    def __init__(self, name: str) -> None:
        self.name: Final = name
        self.user = UNKNOWN
        self.early: Final[list[Waiting]] = []  # calls that came before the user was known
        self.waiting: Final = _Amount()
        self.running = 0
        self.running_long = 0
        self.is_gone = False

    @property
    def is_idle(self) -> bool:
        return not (self.running or self.waiting.calls)


class Callers:
    """The callers on a bus. After `ask_user` the owner calls `know` or `gone`."""

    def __init__(self, ask_user: Callable[[str], None]) -> None:
        self._ask_user: Final = ask_user
        self._watch: Watch | None = None
        self._callers: Final[OrderedDict[str, _Caller]] = OrderedDict()  # idle callers by age
        self._idle: Final[OrderedDict[str, None]] = OrderedDict()
        self._users: Final[dict[int, _Amount]] = {}
        self._users_running: Final[dict[int, int]] = {}
        self._all: Final = _Amount()
        self._running = 0
        self._running_long = 0
        self._short: Final = FairQueue[Waiting]()
        self._long: Final = FairQueue[Waiting]()
        self._long_first = True
        self._changed = trio.Event()
        self._closed = False
        self._slices: Final = FairQueue[trio.Event]()
        self._wanted = trio.Event()  # set when a caller waits for a slice

    def __len__(self) -> int:
        """Return the number of waiting calls."""
        return self._all.calls

    # -- arriving ----------------------------------------------------------------------------------

    def check(self, sender: str, size: int, fds: int) -> None:
        """Refuse a call that exceeds a limit. Raises CallRefusedError."""
        caller = self._callers.get(sender)
        mine = caller.waiting if caller is not None else _Amount()
        user = caller.user if caller is not None else UNKNOWN
        theirs = self._users.get(user) or _Amount()
        fellows = theirs.callers + (not mine.calls)
        users = len(self._users) + (user not in self._users)
        for wanted, kind, limits in (
            (1, "calls", (MAX_OF_CALLER, MAX_OF_USER, MAX_WAITING)),
            (size, "bytes", (MAX_BYTES_OF_CALLER, MAX_BYTES_OF_USER, MAX_BYTES)),
            (fds, "fds", (MAX_FDS_OF_CALLER, MAX_FDS_OF_USER, MAX_FDS)),
        ):
            own, user_has, all_have = (getattr(one, kind) for one in (mine, theirs, self._all))
            if own + wanted > limits[0]:
                raise _too_much(f"{limits[0]} {kind} of {sender}")
            if user_has + wanted > limits[1] and own + wanted > limits[1] // fellows:
                raise _too_much(f"{limits[1]} {kind} of one user")
            if all_have + wanted > limits[2] and user_has + wanted > limits[2] // users:
                raise _too_much(f"{limits[2]} {kind}")

    def put(self, call: Waiting) -> None:
        """Queue a call and take ownership. `gone` and `close` close the call."""
        caller = self._callers.get(call.sender)
        if caller is None:
            caller = self._callers[call.sender] = _Caller(call.sender)
            if self._watch is not None:
                self._watch.add(call.sender)
        if caller.user == UNKNOWN and not caller.early:
            self._ask_user(call.sender)
        self._idle.pop(call.sender, None)
        self._count(caller, call)
        if caller.user == UNKNOWN:
            caller.early.append(call)
        else:
            self._queue(caller, call)

    def know(self, sender: str, user: int) -> None:
        """Set the user of a caller, and queue the caller's early calls."""
        caller = self._callers.get(sender)
        if caller is None or caller.user != UNKNOWN:
            return
        early = caller.early[:]
        caller.early.clear()
        for call in early:
            self._count(caller, call, -1)
        caller.user = user
        for call in early:
            self._count(caller, call)
            self._queue(caller, call)

    def gone(self, sender: str) -> None:
        """Drop the waiting calls of a caller that left the bus, and end the running calls."""
        caller = self._callers.get(sender)
        if caller is None:
            return
        caller.is_gone = True
        left = [*caller.early, *self._short.drop(caller.user, sender)]
        left += self._long.drop(caller.user, sender)
        caller.early.clear()
        for call in left:
            self._count(caller, call, -1)
            call.close()
        for event in self._slices.drop(caller.user, sender):
            event.set()
        if caller.is_idle:
            self._forget(caller)

    def watch(self, watch: Watch) -> None:
        """Watch all callers from now on. The owner of `watch` calls `gone`."""
        self._watch = watch
        for sender in list(self._callers):
            watch.add(sender)

    def close(self) -> None:
        """Drop all calls, and start no more calls."""
        self._closed = True
        for sender in list(self._callers):
            self._watch = None
            self.gone(sender)
        self._wake()

    def _queue(self, caller: _Caller, call: Waiting) -> None:
        queue = self._long if call.size > LONG else self._short
        queue.put(caller.user, caller.name, call)
        self._wake()

    def _count(self, caller: _Caller, call: Waiting, sign: int = 1) -> None:
        theirs = self._users.setdefault(caller.user, _Amount())
        if caller.waiting.calls == (sign < 0):  # the caller's first or last waiting call
            theirs.callers += sign
        for amount in (caller.waiting, theirs, self._all):
            amount.add(call, sign)
        if not theirs.calls:
            del self._users[caller.user]

    # -- starting ----------------------------------------------------------------------------------

    async def next(self) -> Waiting | None:
        """Wait for the next call to run, and return the call; None after `close`.

        The caller of this method finally passes the call to `done`.
        """
        while not self._closed:
            if (call := self.next_nowait()) is not None:
                return call
            self._changed = trio.Event()
            await self._changed.wait()
        return None

    def next_nowait(self) -> Waiting | None:
        """Return the next call to run, or None if no caller may start a call."""
        # Short and long calls take turns. Otherwise calls of one kind could wait for ever.
        self._long_first = not self._long_first
        for long in (self._long_first, not self._long_first):
            if not long:
                call = self._short.take(self._may_user, self._may)
            elif self._running_long < RUNNING_LONG:
                call = self._long.take(self._may_user, self._may_long)
            else:
                call = None
            if call is not None:
                break
        else:
            return None
        caller = self._callers[call.sender]
        self._count(caller, call, -1)
        self._change_running(caller, call, 1)
        return call

    def done(self, call: Waiting) -> None:
        """Free the slot of a call that has run."""
        caller = self._callers[call.sender]
        self._change_running(caller, call, -1)
        if caller.is_idle and caller.is_gone:
            self._forget(caller)
        elif caller.is_idle:
            self._idle[caller.name] = None
            if len(self._idle) > MAX_IDLE:
                self._forget(self._callers[next(iter(self._idle))])
        self._wake()

    def _may_user(self, user: int) -> bool:
        return self._running < RUNNING or not self._users_running.get(user)

    def _may(self, user: int, sender: str) -> bool:
        caller = self._callers[sender]
        if self._users_running.get(user, 0) >= RUNNING_OF_USER and caller.running:
            return False
        return caller.running < RUNNING_OF_CALLER

    def _may_long(self, user: int, sender: str) -> bool:
        return not self._callers[sender].running_long and self._may(user, sender)

    def _change_running(self, caller: _Caller, call: Waiting, sign: int) -> None:
        caller.running += sign
        self._running += sign
        running = self._users_running.get(caller.user, 0) + sign
        if running:
            self._users_running[caller.user] = running
        else:
            del self._users_running[caller.user]
        if call.size > LONG:
            caller.running_long += sign
            self._running_long += sign

    def _forget(self, caller: _Caller) -> None:
        del self._callers[caller.name]
        self._idle.pop(caller.name, None)
        if self._watch is not None:
            self._watch.discard(caller.name)

    def _wake(self) -> None:
        self._changed.set()

    # -- slices ------------------------------------------------------------------------------------

    async def turn(self, sender: str) -> None:
        """Wait for a caller's turn to do a slice of work. Raises CallerGoneError."""
        caller = self._callers[sender]
        if not caller.is_gone:
            event = trio.Event()
            self._slices.put(caller.user, sender, event)
            self._wanted.set()
            try:
                await event.wait()
            finally:
                self._slices.remove(caller.user, sender, event)
        if caller.is_gone:
            raise CallerGoneError(f"{sender} left the bus")

    async def give_turns(self) -> None:
        """Give turns until cancelled, one at a time, with other tasks in between."""
        while True:
            event = self._slices.take()
            if event is None:
                self._wanted = trio.Event()
                await self._wanted.wait()
            else:
                event.set()
                # In the first round the slice runs. In the second round the caller can ask for the
                # next slice.
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()


def _too_much(what: str) -> CallRefusedError:
    return CallRefusedError(LIMITS_EXCEEDED, f"{what} wait already: try again later")
