"""Who owned a name since a call to it was made: one record for all calls that wait, however many. No I/O.

A name that changes hands again and again must not cost a look at each call that waits for its owner, of which there
may be thousands. So a change is written down once, and a call knows from where on it has to read.
"""

from collections import deque
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Final


class OwnerHistory:
    """The last changes of one name's owner. It lives as long as a call does that may have to know of them."""

    __slots__ = ("__weakref__", "_changes", "count")

    def __init__(self, most: int) -> None:
        self._changes: Final[deque[tuple[str, str]]] = deque(maxlen=most)
        self.count = 0  # of all changes, those included that are forgotten

    @property
    def changes(self) -> tuple[tuple[str, str], ...]:
        """The changes that are not forgotten."""
        return tuple(self._changes)

    def restore(self, count: int, changes: Collection[tuple[str, str]]) -> None:
        """Restore what `count` and `changes` were."""
        self.count = count
        self._changes.extend(changes)

    def add(self, old: str, new: str) -> None:
        """Write a change down ("" is nobody)."""
        self._changes.append((old, new))
        self.count += 1

    def owners_since(self, count: int) -> Iterator[str]:
        """Return who owned it since there were so many changes, some maybe twice."""
        known = len(self._changes)
        for change in islice(self._changes, max(0, known - (self.count - count)), None):
            yield from filter(None, change)


class OwnersSince(Collection[str]):
    """The owners of a name since a call to it: they may answer the call, too."""

    __slots__ = ("_history", "count")

    def __init__(self, history: OwnerHistory, count: int | None = None) -> None:
        self._history: Final = history
        self.count: Final = history.count if count is None else count  # of the changes before

    def __contains__(self, owner: object) -> bool:
        return owner in {*self._history.owners_since(self.count)}

    def __iter__(self) -> Iterator[str]:
        return iter({*self._history.owners_since(self.count)})

    def __len__(self) -> int:
        return len({*self})
