"""Refusals of messages: the reports to the supervisor and the texts for callers. No I/O."""

from typing import NamedTuple

from broker.wire.header import Header, MessageType
from policy.match import Verdict
from policy.tables import MAX_PATH


class Denial(NamedTuple):
    """A refusal, for the supervisor."""

    direction: str
    kind: str
    peer: str
    path: str
    interface: str
    member: str
    reason: str
    origin: str


def denial(direction: str, header: Header, peer: str, verdict: Verdict) -> Denial:
    """Return the report of a refused message."""
    return Denial(
        direction,
        "call" if header.type == MessageType.METHOD_CALL else "signal",
        peer,
        (header.path or "")[:MAX_PATH],  # a longer path is refused by any rules
        header.interface or "",
        header.member or "",
        verdict.reason,
        verdict.rule.origin if verdict.rule is not None else "",
    )


def refusal(header: Header, name: str, verdict: Verdict) -> str:
    """Return the text of AccessDenied, for the developer of the app."""
    member = f"{header.interface}.{header.member}" if header.interface else header.member
    path = (header.path or "")[:MAX_PATH]
    return f"This sandbox may not call {member} at {path} of {name}: {verdict.reason}"
