"""Recorded frames of a hand-over are read by the present code, and the present code writes the same.

So no rename of a class or a field changes the format by accident: an upgrade hands over from one version to another.
tests/helpers/recorded_frames.py says how to record again.
"""

import socket
from collections.abc import Callable, Sequence
from typing import NoReturn, get_args

import msgspec
import pytest

from broker.gate.dumps import VERSION, Fds, HandoverError, HandoverHeader, SandboxDump
from broker.gate.filter import read_barrier
from broker.gate.handover.channel import (
    Channel,
    Word,
    decode_header,
    decode_sandbox,
    decode_word,
    encode,
)
from broker.gate.handover.take_over import take_over
from broker.gate.sandbox import meter
from broker.gate.sandbox.sandbox import Sandbox
from tests.helpers import recorded_frames as recorded
from tests.helpers.messages import access
from tests.helpers.modelbus import Dialogue

RECORDING = recorded.read_lines(recorded.HANDOVER_FILE)


@pytest.mark.parametrize("name", [kind.__name__ for kind in get_args(Word)])
def test_recorded_word_is_read_as_it_was_said(name: str) -> None:
    assert decode_word(RECORDING[name]) == recorded.FRAMES[name]


def test_recorded_state_is_read_as_it_was_written() -> None:
    assert decode_header(RECORDING["HandoverHeader"]) == recorded.FRAMES["HandoverHeader"]
    assert decode_sandbox(RECORDING["SandboxDump"]) == recorded.FRAMES["SandboxDump"]


def test_present_code_writes_the_recorded_frames() -> None:
    assert recorded.handover_text() == recorded.HANDOVER_FILE.read_text(encoding="ascii")


def test_recording_has_every_field() -> None:
    assert not recorded.fields_at_default(recorded.FRAMES.values())


def test_recording_has_a_call_for_each_action() -> None:
    handlers = {*Dialogue(access()).filter.state.reply_handlers, meter.KIND, read_barrier.KIND}
    assert {action.kind for action in recorded.ACTIONS} == handlers


class Unused:
    """A gate that nothing is loaded into."""

    def load(self, _header: HandoverHeader, _fds: Sequence[int]) -> NoReturn:
        raise AssertionError

    def add_empty(self, _dump: SandboxDump) -> Sandbox:
        raise AssertionError

    def dumper(self, _serial: int, _protocol: int, _pid: int) -> Callable[[Fds], HandoverHeader]:
        raise AssertionError


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("version", f"hand-over version {VERSION + 1} is not known here"),
        ("protocol", "the new gate speaks control protocol"),
    ],
)
def test_another_version_is_refused_in_one_line(field: str, message: str) -> None:
    header = decode_header(RECORDING["HandoverHeader"])
    other = msgspec.structs.replace(header, **{field: getattr(header, field) + 1})
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    old, new = Channel(ours.detach(), 5), Channel(theirs.detach(), 5)
    try:
        old.send(encode(other))
        with pytest.raises(HandoverError, match=message) as caught:
            take_over(new, Unused())
    finally:
        old.close()
        new.close()
    assert "\n" not in str(caught.value)


def test_field_of_a_later_version_is_ignored() -> None:
    later = msgspec.msgpack.decode(RECORDING["SandboxDump"]) | {"new": 1}
    assert decode_sandbox(msgspec.msgpack.encode(later)) == recorded.FRAMES["SandboxDump"]
