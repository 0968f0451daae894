"""Recorded control frames are read by the present code, and the present code writes the same.

So no rename of a class or a field changes the protocol by accident: the supervisor and the gate may be of different
versions. tests/helpers/recorded_frames.py says how to record again.
"""

import pytest

from broker.control_protocol.framing import FrameReader
from tests.helpers import recorded_frames as recorded

RECORDING = recorded.read_lines(recorded.CONTROL_FILE)


@pytest.mark.parametrize("name", recorded.MESSAGES)
def test_recorded_frame_is_read_as_it_was_written(name: str) -> None:
    assert FrameReader().feed(RECORDING[name], [3, 4]) == [(recorded.MESSAGES[name], [3, 4])]


def test_present_code_writes_the_recorded_frames() -> None:
    assert recorded.control_text() == recorded.CONTROL_FILE.read_text(encoding="ascii")


def test_recording_has_every_field() -> None:
    values = [envelope.body for envelope in recorded.MESSAGES.values()]
    assert not recorded.fields_at_default(values)
