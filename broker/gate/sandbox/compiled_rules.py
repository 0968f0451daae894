"""The rules of a sandbox, compiled for each bus in slices. No I/O."""

from collections.abc import Generator

from broker.control_protocol.messages import SandboxSpec
from broker.wire.errors import INVALID_ARGS, LIMITS_EXCEEDED, CallRefusedError
from policy.match import Judge, excess, make_judge
from policy.rules import AccessList


def compile_rules(
    spec: SandboxSpec, access: AccessList, *, is_new: bool
) -> Generator[int, None, dict[str, Judge]]:
    """Return the judge of each bus of the sandbox. Raises CallRefusedError.

    A new list is also refused if the list costs too much, because the author is not trusted.
    """
    judges = {}
    for listener in spec.listeners:
        try:
            judge = yield from make_judge(access, bus=listener.bus, me=spec.identity)
        except ValueError as exc:
            raise CallRefusedError(INVALID_ARGS, str(exc)) from exc
        if is_new and (text := excess(judge.cost, spec.limits.rule_steps)) is not None:
            raise CallRefusedError(LIMITS_EXCEEDED, text)
        judges[listener.bus] = judge
    return judges
