"""Running a piece of a test as another user: in a forked child, since that user may not read our Python."""

import json
import os
import traceback
from collections.abc import Callable
from typing import Any, Final

NOBODY: Final = 65534


def as_user(uid: int, function: Callable[[], Any]) -> Any:
    """Return what `function` returns (JSON) when it runs with that uid, gid, and no other group."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        _be_the_child(uid, function, writing)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as answers:
        text = answers.read()
    os.waitpid(pid, 0)
    answer = json.loads(text)
    if "error" in answer:
        raise AssertionError(answer["error"])
    return answer["value"]


def _be_the_child(uid: int, function: Callable[[], Any], writing: int) -> None:
    answer = None
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        answer = {"value": function()}
    finally:  # whatever happened, the child does not go on with the parent's test run
        answer = answer or {"error": traceback.format_exc()}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
