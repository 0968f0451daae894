import os
import sys

import pytest

from broker.control_protocol.spawn import spawn_gate

# The interpreter stands for the gate: its argument says which descriptors it writes to.
SCRIPT = """
import os, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
os.write(int(options["--ready-fd"]), b"ready")
if "--take-over" in options:
    os.write(int(options["--take-over"]), b"next")
os.write(3, b" leader" if os.getsid(0) == os.getpid() else b" child")
"""


def read_all(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read()


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("is_swapped", [False, True])
def test_each_descriptor_is_where_the_options_say(detach: bool, is_swapped: bool) -> None:
    ready, ready_there = os.pipe()
    take_over, take_over_there = os.pipe()
    given = [ready_there, take_over_there]
    if is_swapped:  # the higher number first
        given.reverse()
        ready, take_over = take_over, ready
    pid = spawn_gate([sys.executable, "-c", SCRIPT], os.environ, *given, detach=detach)
    for fd in given:
        os.close(fd)  # they stay the caller's
    assert read_all(ready) == b"ready leader" if detach else b"ready child"
    assert read_all(take_over) == b"next"
    os.waitpid(pid, 0)


def test_without_a_socket_to_take_over_at_there_is_no_such_option() -> None:
    ready, ready_there = os.pipe()
    pid = spawn_gate([sys.executable, "-c", SCRIPT], os.environ, ready_there)
    os.close(ready_there)
    assert read_all(ready) == b"ready child"
    os.waitpid(pid, 0)


def test_what_cannot_be_started_leaves_no_descriptor_behind() -> None:
    ready, ready_there = os.pipe()
    with pytest.raises(FileNotFoundError):
        spawn_gate(["/nonexistent"], {}, ready_there)
    os.close(ready_there)
    assert read_all(ready) == b""
