"""A snapshot in parts, each of which fits a frame. No I/O."""

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from broker.control_protocol.messages import SandboxState, Snapshot

# Bytes of a part, unless one sandbox alone has more: even then it is far below what a frame may carry.
MAX_PART_BYTES: Final = 8 * 1024 * 1024
_encoder: Final = msgspec.msgpack.Encoder()


def split_snapshot(
    head: Snapshot, states: Iterable[SandboxState], most: float
) -> Iterator[Snapshot]:
    """Return `head` with these sandboxes, in as many parts as it takes: all but the last say that there are more."""
    part: list[SandboxState] = []
    size = 0
    for state in states:
        its_size = len(_encoder.encode(state))
        if part and size + its_size > most:
            yield msgspec.structs.replace(head, sandboxes=tuple(part), more=True)
            part, size = [], 0
        part.append(state)
        size += its_size
    yield msgspec.structs.replace(head, sandboxes=tuple(part))
