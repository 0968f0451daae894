"""A process that changes the rules of a sandbox 1000 times a second, over the gate's control socket.

    python -m integration.bench.pusher FD SANDBOX

It inherits the socket as a descriptor. A byte on its input starts it, the next one stops it; it then writes a line: how
many changes it has had confirmed. The two lists of rules that it swaps allow the service's calls both.
"""

import itertools
import os
import select
import socket
import sys
import time
from typing import Final

from broker.control_protocol import framing, messages
from integration.bench import parties
from integration.bench.traffic import make_rules
from policy.rules import AccessList

RATE: Final = 1000  # a second
# Of all its requests. The starter's over the same socket have low ones, and events have 0.
SERIAL: Final = 1_000_000
COMMANDS: Final = 0


class Pusher:
    """Changes of one sandbox's rules."""

    def __init__(self, connection: socket.socket, sandbox: str) -> None:
        self._connection: Final = connection
        self._reader: Final = framing.FrameReader()
        self._unanswered = 0
        lists = (AccessList(rules=(*make_rules(count), parties.TALK)) for count in (9, 10))
        requests = (messages.SetAccess(sandbox, access) for access in lists)
        envelopes = (messages.Envelope(serial=SERIAL, body=request) for request in requests)
        # Made beforehand: this process should take little of what it shares with those it disturbs.
        self._frames: Final = itertools.cycle([framing.make_frame(each) for each in envelopes])

    def push_until_told(self) -> int:
        """Push until there is a byte on the input; return how many changes were confirmed."""
        start, count = time.monotonic(), 0
        while not select.select([COMMANDS], [], [], 0)[0]:
            self._push()
            count += 1
            # What a pause was too long by is made good: it is the rate that counts.
            time.sleep(max(0.0, start + count / RATE - time.monotonic()))
            self._take_answers(wait=self._unanswered > RATE)
        while self._unanswered:
            self._take_answers(wait=True)
        return count

    def _push(self) -> None:
        self._connection.sendall(next(self._frames))
        self._unanswered += 1

    def _take_answers(self, *, wait: bool) -> None:
        if not wait and not select.select([self._connection], [], [], 0)[0]:
            return
        for envelope, _ in self._reader.feed(self._connection.recv(65536)):
            if isinstance(envelope.body, messages.Refused):
                raise SystemExit(f"the gate refuses: {envelope.body.text}")
            self._unanswered -= envelope.serial == SERIAL


def main(argv: list[str]) -> int:
    """Push whenever told, until the input ends."""
    fd, sandbox = argv
    with socket.socket(fileno=int(fd)) as connection:
        pusher = Pusher(connection, sandbox)
        print("ready", flush=True)
        while os.read(COMMANDS, 1):
            print(pusher.push_until_told(), flush=True)
            os.read(COMMANDS, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
