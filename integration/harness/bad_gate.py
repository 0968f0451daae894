"""A gate that fails when it is to take over: `python -m integration.harness.bad_gate HOW OPTIONS...`.

Asked for anything else it is the real one. HOW: exit (at start), test (its self-test), version (it reads another one),
mute (it does not even begin), killed (in the midst of it), hang (it takes everything and says nothing), refuse (it
takes everything and does not want it), babble (it says something else), corrupt (what it made of a sandbox differs). Two do not fail: newer (it speaks
another control protocol), none. Nor does defect, until it is asked for the use of limits and has a sandbox.
"""

import os
import signal
import sys
import time
from typing import Final

from broker.control_protocol.messages import PROTOCOL, Usage
from broker.gate import __main__ as gate_main, server
from broker.gate.dumps import READS
from broker.gate.handover import self_check, take_over
from broker.gate.handover.channel import Channel, Failed, Offer
from policy.match import Judge
from policy.rules import NO_ACCESS, Identity

LONG: Final = 600.0  # seconds
OTHER_VERSION: Final = max(READS) + 97  # of the hand-over, which no gate here writes


def main() -> int:
    how, *argv = sys.argv[1:]
    if how == "defect":
        server.Gate._usage = _usage  # type: ignore[method-assign]  # noqa: SLF001
    if "--take-over" not in argv or how in ("none", "defect"):
        return gate_main.main(argv)
    if how == "newer":
        for module in (take_over, server):
            vars(module)["PROTOCOL"] = PROTOCOL + 1
        return gate_main.main(argv)
    if how == "exit":
        return 3
    if how == "test":
        vars(self_check)["Judge"] = _never_allows
        return gate_main.main(argv)
    if how == "corrupt":
        vars(take_over)["dump_equals"] = lambda *_: False
        return gate_main.main(argv)
    channel = Channel(int(argv[argv.index("--take-over") + 1]), LONG)
    os.write(int(argv[argv.index("--ready-fd") + 1]), b"x")
    if how == "mute":
        time.sleep(LONG)
    reads = (OTHER_VERSION,) if how == "version" else READS
    channel.say(Offer(pid=os.getpid(), reads=reads))
    _go_on(how, channel)
    return 1


def _go_on(how: str, channel: Channel) -> None:
    channel.receive()  # the opening
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    channel.receive()  # a sandbox
    if how == "babble":
        channel.say(Offer(pid=1, reads=READS))
    elif how == "refuse":
        channel.say(Failed("on second thoughts, no"))
    time.sleep(LONG)


def _usage(self: server.Gate, sandbox: str | None) -> Usage:
    if self._sandboxes:
        raise RuntimeError(f"a defect, asked for {sandbox}")
    return Usage()


def _never_allows(_access: object, *, bus: str, me: Identity) -> Judge:
    return Judge(NO_ACCESS, bus=bus, me=me)


if __name__ == "__main__":
    sys.exit(main())
