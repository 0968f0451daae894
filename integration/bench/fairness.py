"""What a sandbox that floods costs the others: round trips of another sandbox and of the host, with it and without.

All call the same service. The two victims take turns, a call each, and the flood comes and goes, so that a slow
spell of the machine hits all alike; "without" means that the flooding process sleeps.
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from integration.bench import parties
from integration.bench.client import BenchError, Client
from integration.bench.flooder import FLOODS, MANY_NAMES, OWNED
from integration.bench.measure import Effort, Result, make_result
from integration.bench.parties import Process, Scene
from integration.bench.sandboxes import TALK_FLAGS, open_sandbox
from integration.bench.traffic import MICROSECONDS, ROUNDTRIP
from policy.usos.wire_form import Usos

# Of a block, in which both victims call all the time.
BLOCK: Final = 0.4  # seconds
# Before a block with a flood: what the budget of messages lets through at once is used up then. Before one
# without: what is still under way arrives.
FLOOD_FIRST: Final = 1.2  # seconds
CALM_FIRST: Final = 0.2  # seconds
QUICK_ROUNDS: Final = 1
ROUNDS: Final = 4
NAMES: Final = tuple(f"fair-{who}{kind}" for kind in FLOODS for who in ("", "host-"))

_TALK: Final = (TALK_FLAGS, parties.SERVICE, "/", "")
_ANY_PATH: Final = 0x20
_OWN_BELOW: Final = (0x8 | 0x10 | _ANY_PATH, OWNED, "/", "")
_SEE_BELOW: Final = (0x1 | 0x10 | _ANY_PATH, OWNED, "/", "")
_SEND_ANY: Final = (0x2 | _ANY_PATH, "", "/", "")
# Whatever any app of that kind owns is seen: so who has this follows all names, as with a glob.
_SEE_APP: Final = (0x1 | 0x400 | _ANY_PATH, f"{parties.SERVICE}/bench", "/", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """The sandboxes and names of a flood beside the two victims."""

    villain: Sequence[Usos] = (_TALK,)  # the rules of the sandbox that floods
    hearers: int = 0  # sandboxes with a connection that follows all names
    host_names: int = 0  # that somebody else owns


CASTS: Final[Mapping[str, Cast]] = {
    "flip": Cast(villain=(_OWN_BELOW, _SEE_BELOW), hearers=20),
    "flip-250": Cast(villain=(_OWN_BELOW, _SEE_BELOW), hearers=4),
    "broadcast": Cast(villain=(_SEND_ANY,)),
    "churn": Cast(villain=(_SEE_APP, _SEE_BELOW), hearers=4, host_names=MANY_NAMES),
}


@dataclass(slots=True)
class Victim:
    """Somebody who calls the service, and the medians of its blocks in seconds."""

    client: Client
    idle: list[float] = field(default_factory=list)
    flooded: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """How much longer a call takes during the flood: the median of the rounds."""
        pairs = zip(self.flooded, self.idle, strict=True)
        return statistics.median(flooded / idle for flooded, idle in pairs)


def measure_fairness(kind: str, scene: Scene, effort: Effort) -> list[Result]:
    """Measure a flood: another sandbox's call, then the host's; the peer is the same without the flood."""
    victims = flood(scene, kind, ROUNDS if effort == Effort() else QUICK_ROUNDS)
    return [make_result("us", MICROSECONDS, [each.flooded, each.idle]) for each in victims]


def flood(scene: Scene, kind: str, rounds: int) -> tuple[Victim, Victim]:
    """Return what another sandbox and the host had from a flood of that kind."""
    cast = CASTS.get(kind, Cast())
    with contextlib.ExitStack() as stack:
        stack.enter_context(parties.open_supervisor(scene))
        creator = stack.enter_context(Client(scene.bus))
        sandbox = stack.enter_context(open_sandbox(creator))
        villain = stack.enter_context(open_sandbox(creator, rules=cast.villain))
        _open_others(stack, scene, creator, cast)
        victims = [Victim(stack.enter_context(Client(path))) for path in (sandbox, scene.bus)]
        argv = [sys.executable, "-m", "integration.bench.flooder", kind, str(villain)]
        flooder = stack.enter_context(parties.open_process(argv))
        parties.wait_line(flooder, "ready")
        for victim in victims:
            victim.client.settle()
        for _ in range(rounds):
            time.sleep(CALM_FIRST)
            for victim, trip in zip(victims, _call(victims), strict=True):
                victim.idle.append(trip)
            with _flooding(flooder):
                time.sleep(FLOOD_FIRST)
                for victim, trip in zip(victims, _call(victims), strict=True):
                    victim.flooded.append(trip)
    other, host = victims
    return other, host


def _open_others(stack: contextlib.ExitStack, scene: Scene, creator: Client, cast: Cast) -> None:
    """Let the others in, who do nothing but hear."""
    owner = stack.enter_context(Client(scene.bus))
    for number in range(cast.host_names):
        owner.own(f"{OWNED}.h{number}")
    for _ in range(cast.hearers):
        hearer = stack.enter_context(open_sandbox(creator, rules=(_SEE_APP,)))
        stack.enter_context(Client(hearer)).settle()


def _call(victims: list[Victim]) -> list[float]:
    """Have them call in turns for a block; return the median of each."""
    call = ROUNDTRIP.make_call()
    sizes = [victim.client.measure_reply(call) for victim in victims]
    trips: list[list[float]] = [[] for _ in victims]
    end = time.perf_counter() + BLOCK
    while time.perf_counter() < end:
        for victim, size, mine in zip(victims, sizes, trips, strict=True):
            mine.append(victim.client.roundtrips(call, size, 1))
    return [statistics.median(mine) for mine in trips]


@contextlib.contextmanager
def _flooding(flooder: Process) -> Iterator[None]:
    assert flooder.stdin is not None
    assert flooder.stdout is not None
    flooder.stdin.write(b"f")
    flooder.stdin.flush()
    yield
    flooder.stdin.write(b"s")
    flooder.stdin.flush()
    if not int(flooder.stdout.readline()):
        raise BenchError("the flood could do nothing")
    parties.wait_line(flooder, "ready")
