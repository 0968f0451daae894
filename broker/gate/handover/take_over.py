"""The new gate's side of a hand-over: load everything, compare it with the dumps, and only then say Ready."""

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
# Seconds. The old gate has a limit of its own; this one is for an old gate that was stopped, or hangs.
LONGEST_WAIT: Final = 600.0
# Compiled rules: by app and list, then by bus.
_Known = dict[tuple[Identity, AccessList], dict[str, Judge]]


class Successor(Protocol):
    """The new gate, as far as a hand-over fills it."""

    def load(self, header: HandoverHeader, fds: Sequence[int]) -> None:
        """Restore all state but that of the sandboxes."""

    def add_empty(self, dump: SandboxDump) -> Sandbox:
        """Return a new sandbox of the dump's id, into which the dump is to be loaded."""

    def dumper(self, serial: int, protocol: int, pid: int) -> Callable[[Fds], HandoverHeader]:
        """Return the function that makes the first frame of a hand-over."""


def offer(channel: Channel, pid: int) -> None:
    """Offer to take over, after a self check. Raises HandoverError."""
    check_judgement()
    channel.say(Offer(pid=pid, reads=READS))


def take_over(channel: Channel, gate: Successor) -> HandoverHeader:
    """Receive and load everything, and wait for Go. `gate.resume` is next.

    Raises HandoverError. Then the caller ends the process without closing anything, because the old gate has it all open.
    """
    data, fds = channel.receive()
    header = decode_header(data)
    if header.version not in READS:
        raise HandoverError(f"hand-over version {header.version} is not known here")
    if header.protocol != PROTOCOL:
        raise HandoverError(
            f"it speaks control protocol {PROTOCOL}, the supervisor {header.protocol}: restart that one"
        )
    try:
        gate.load(header, fds)
        known: _Known = {}
        for _ in range(header.sandboxes):
            _take_sandbox(channel, gate, known)
    except HandoverError:
        raise
    except Exception as exc:  # whatever it is, the old gate still serves
        raise HandoverError(f"the state does not work out here: {exc!r}") from exc
    if not dump_equals(gate.dumper(header.serial, header.protocol, header.pid), header, fds):
        raise HandoverError("what came of the old gate's state differs from it")
    channel.say(Ready())
    if not isinstance(channel.hear(), Go):
        raise HandoverError("the other gate said something else than expected")
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
    # One sandbox must not prevent an upgrade, so it is served without the connections that it had.
    LOGGER.error("not-taken-over sandbox=%s: %s: its connections end", sandbox.id, problem)
    sandbox.discard()
    bare, kept, lost = without_connections(dump, fds)
    sandbox = gate.add_empty(bare)
    if problem := _load(sandbox, bare, kept, judges):
        raise HandoverError(f"{sandbox.id}: {problem}")
    close_fds(fds[len(kept) :])  # copies, which the old gate still has
    sandbox.lost.extend(lost)


def _load(sandbox: Sandbox, dump: SandboxDump, fds: Sequence[int], judges: dict[str, Judge]) -> str:
    """Load a sandbox; return the problem, if there is one."""
    try:
        sandbox.load(dump, fds, judges)
        if dump_equals(sandbox.dump, dump, fds):
            return ""
    except Exception as exc:  # noqa: BLE001 - whatever it is, only this sandbox has it
        return repr(exc)
    return "what came of it differs from what it was"


def without_connections(
    dump: SandboxDump, fds: Sequence[int]
) -> tuple[SandboxDump, Sequence[int], list[tuple[str, str]]]:
    """Return the dump without connections, its descriptors, and the buses and unique names of the connections.

    Raises HandoverError.
    """
    used = [at for _, at in dump.listening] + [dump.close_pipe] * (dump.close_pipe >= 0)
    if used != list(range(len(used))):
        raise HandoverError("the descriptors are in another order than expected")
    bare = msgspec.structs.replace(dump, connections=(), lingering=(), waiting=())
    states = [
        (connection.bus, connection.filter.state)
        for connection in dump.connections
        if connection.filter is not None
    ]
    names = [(bus, state.unique_name) for bus, state in states if state.unique_name]
    names += [(rest.bus, rest.unique_name) for rest in dump.lingering]
    return bare, fds[: len(used)], names
