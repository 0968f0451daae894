"""The grammar of type signatures, without recursion. Time is linear in the length."""

from typing import Final

MAX_SIGNATURE: Final = 255  # the length takes a byte on the wire
# The specification's limits: 32 array type codes and 32 open parentheses. A dict entry is always in
# an array, so the limit on arrays also limits dict entries.
MAX_NESTING: Final = 32

BASIC: Final = frozenset("ybnqiuxtdsogh")
_VARIANT: Final = "v"


def is_signature(text: str) -> bool:
    """Return whether the text is a sequence, perhaps empty, of complete types."""
    if len(text) > MAX_SIGNATURE:
        return False
    at = 0
    while at < len(text):
        at = find_type_end(text, at)
        if at < 0:
            return False
    return True


def is_single_type(text: str) -> bool:
    """Return whether the text is exactly one complete type, as a variant requires."""
    return 0 < len(text) <= MAX_SIGNATURE and find_type_end(text, 0) == len(text)


def find_type_end(signature: str, at: int) -> int:
    """Return the end of the complete type that begins at `at`, or -1 if none begins there."""
    nesting = _Nesting()
    for position in range(at, len(signature)):
        code = signature[position]
        if code in "a({":
            if not nesting.enter(code):
                return -1
            continue
        if code in BASIC:
            complete = nesting.complete(key=True)
        elif code == _VARIANT:
            complete = nesting.complete(key=False)
        else:
            complete = nesting.leave(code) and nesting.complete(key=False)
        if not complete:
            return -1
        if not nesting.open:
            return position + 1
    return -1


class _Nesting:
    """The open containers, innermost last, with the number of types in each so far."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self._counts: list[int] = []

    def enter(self, code: str) -> bool:
        # "{" follows an "a" directly and stands nowhere else. Arrays are closed together with the
        # element, so an innermost array still waits for the element.
        if code == "{":
            if not self.open or self.open[-1] != "a":
                return False
        elif self._is_dict_key() or self.open.count(code) >= MAX_NESTING:
            return False
        self.open.append(code)
        self._counts.append(0)
        return True

    def leave(self, code: str) -> bool:
        if code == ")":
            good = bool(self.open) and self.open[-1] == "(" and self._counts[-1] > 0
        elif code == "}":
            good = bool(self.open) and self.open[-1] == "{" and self._counts[-1] == 2
        else:
            good = False
        if good:
            self._pop()
        return good

    def complete(self, *, key: bool) -> bool:
        """Count a complete type, and close the arrays whose element is complete with that type."""
        if self._is_dict_key() and not key:
            return False
        while self.open and self.open[-1] == "a":
            self._pop()
        if self.open:
            self._counts[-1] += 1
            return self.open[-1] != "{" or self._counts[-1] <= 2
        return True

    def _is_dict_key(self) -> bool:
        return bool(self.open) and self.open[-1] == "{" and self._counts[-1] == 0

    def _pop(self) -> None:
        self.open.pop()
        self._counts.pop()
