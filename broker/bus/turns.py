"""A queue with turns for users, and for the callers of each user. Pure."""

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items by user and caller, taken in turns.

    Users take turns, and the callers of a user take turns. The items of a caller come in order.
    """

    def __init__(self) -> None:
        self._users: Final[OrderedDict[int, OrderedDict[str, deque[T]]]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, user: int, caller: str, item: T) -> None:
        """Put an item behind the caller's other items."""
        self._users.setdefault(user, OrderedDict()).setdefault(caller, deque()).append(item)
        self._count += 1

    def take(
        self,
        may_user: Callable[[int], bool] = lambda _user: True,
        may: Callable[[int, str], bool] = lambda _user, _caller: True,
    ) -> T | None:
        """Take the next item of the caller that waited longest for a turn, or None.

        Users and callers for whom `may_user` or `may` is False are skipped.
        """
        for user, callers in self._users.items():
            if not may_user(user):
                continue
            for caller in callers:
                if may(user, caller):
                    return self._take(user, caller)
        return None

    def drop(self, user: int, caller: str) -> list[T]:
        """Take all items of a caller."""
        callers = self._users.get(user)
        if callers is None or caller not in callers:
            return []
        items = list(callers.pop(caller))
        if not callers:
            del self._users[user]
        self._count -= len(items)
        return items

    def remove(self, user: int, caller: str, item: T) -> None:
        """Take an item out of turn. A missing item is no error."""
        callers = self._users.get(user)
        if callers is None or item not in callers.get(caller, ()):
            return
        rest = [one for one in self.drop(user, caller) if one is not item]
        for one in rest:
            self.put(user, caller, one)

    def _take(self, user: int, caller: str) -> T:
        callers = self._users[user]
        item = callers[caller].popleft()
        self._count -= 1
        callers.move_to_end(caller)
        self._users.move_to_end(user)
        if not callers[caller]:
            del callers[caller]
            if not callers:
                del self._users[user]
        return item
