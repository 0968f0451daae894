"""The new gate's side of a hand-over: load the state, compare with the dumps, say Ready."""

import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec

from broker.control_protocol.messages import PROTOCOL
from broker.gate.dumps import READS, Fds, HandoverError, HandoverHeader, SandboxDump
from broker.gate.handover.channel import (
    Channel,
    Go,
    Offer,
    Ready,
    decode_header,
    decode_sandbox,
    dump_equals,
)
from broker.gate.handover.self_check import check_judgement
from broker.gate.sandbox.sandbox import Sandbox
from broker.posix.descriptors import close_fds
from policy.match import Judge
from policy.rules import AccessList, Identity

LOGGER: Final = logging.getLogger(__name__)
# Seconds. The old gate has a shorter limit. The limit here is for an old gate that was stopped or
# hangs.
LONGEST_WAIT: Final = 600.0
# Compiled rules, by app and list, and then by bus.
_Known = dict[tuple[Identity, AccessList], dict[str, Judge]]


class Successor(Protocol):
    """The part of the new gate that a hand-over fills."""

    def load(self, header: HandoverHeader, fds: Sequence[int]) -> None:
        """Restore all state except that of the sandboxes."""

    def add_empty(self, dump: SandboxDump) -> Sandbox:
        """Add an empty sandbox with the id of `dump`, for the caller to load."""

    def dumper(self, serial: int, protocol: int, pid: int) -> Callable[[Fds], HandoverHeader]:
        """Return the function that makes the first frame of a hand-over."""


def offer(channel: Channel, pid: int) -> None:
    """Offer to take over, after a self check. Raises HandoverError."""
    check_judgement()
    channel.say(Offer(pid=pid, reads=READS))


def take_over(channel: Channel, gate: Successor) -> HandoverHeader:
    """Receive and load the state, and wait for Go. The next call is `gate.resume`.

    Raises HandoverError. Then the caller exits without closing anything, because the old gate
    serves the same sockets.
    """
    data, fds = channel.receive()
    header = decode_header(data)
    if header.version not in READS:
        raise HandoverError(f"hand-over version {header.version} is not known here")
    if header.protocol != PROTOCOL:
        raise HandoverError(
            f"the new gate speaks control protocol {PROTOCOL}, the supervisor {header.protocol}:"
            " restart the supervisor"
        )
    try:
        gate.load(header, fds)
        known: _Known = {}
        for _ in range(header.sandboxes):
            _take_sandbox(channel, gate, known)
    except HandoverError:
        raise
    except Exception as exc:  # After any error the old gate still serves.
        raise HandoverError(f"the state cannot be loaded: {exc!r}") from exc
    if not dump_equals(gate.dumper(header.serial, header.protocol, header.pid), header, fds):
        raise HandoverError("the loaded state differs from the old gate's state")
    channel.say(Ready())
    if not isinstance(channel.hear(), Go):
        raise HandoverError("unexpected answer of the other gate")
    LOGGER.info("taken-over from=%d: %d sandboxes", header.pid, header.sandboxes)
    return header


def _take_sandbox(channel: Channel, gate: Successor, known: _Known) -> None:
    data, fds = channel.receive()
    dump = decode_sandbox(data)
    sandbox = gate.add_empty(dump)
    # Compiling rules takes the longest, and many sandboxes belong to the same app.
    judges = known.setdefault((sandbox.identity, dump.spec.access), {})
    problem = _load(sandbox, dump, fds, judges)
    if not problem:
        return
    # A single sandbox must not prevent an upgrade. So the sandbox is served without its
    # connections.
    LOGGER.error("not-taken-over sandbox=%s: %s: all connections end", sandbox.id, problem)
    sandbox.discard()
    bare, kept, lost = without_connections(dump, fds)
    sandbox = gate.add_empty(bare)
    if problem := _load(sandbox, bare, kept, judges):
        raise HandoverError(f"{sandbox.id}: {problem}")
    close_fds(fds[len(kept) :])  # The old gate still has the originals.
    sandbox.lost.extend(lost)


def _load(sandbox: Sandbox, dump: SandboxDump, fds: Sequence[int], judges: dict[str, Judge]) -> str:
    """Load a sandbox. Return a description of the problem, or an empty text."""
    try:
        sandbox.load(dump, fds, judges)
        if dump_equals(sandbox.dump, dump, fds):
            return ""
    except Exception as exc:  # noqa: BLE001 - only this sandbox is affected
        return repr(exc)
    return "the loaded state differs from the old gate's state"


def without_connections(
    dump: SandboxDump, fds: Sequence[int]
) -> tuple[SandboxDump, Sequence[int], list[tuple[str, str]]]:
    """Return the dump without connections.

    Return also the remaining descriptors, and bus and unique name of each removed connection.
    Raises HandoverError.
    """
    used = [at for _, at in dump.listening] + [dump.close_pipe] * (dump.close_pipe >= 0)
    if used != list(range(len(used))):
        raise HandoverError("unexpected order of descriptors")
    bare = msgspec.structs.replace(dump, connections=(), lingering=(), waiting=())
    states = [
        (connection.bus, connection.filter.state)
        for connection in dump.connections
        if connection.filter is not None
    ]
    names = [(bus, state.unique_name) for bus, state in states if state.unique_name]
    names += [(rest.bus, rest.unique_name) for rest in dump.lingering]
    return bare, fds[: len(used)], names
