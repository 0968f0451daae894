"""Measure the gate, xdg-dbus-proxy and the plain bus side by side. See docs/performance.md."""

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from integration.bench import plot, report
from integration.bench.changes import measure_changes
from integration.bench.client import BenchError
from integration.bench.containers1 import measure_labelled_adding
from integration.bench.crowd import measure_callers, measure_signals
from integration.bench.fairness import measure_fairness
from integration.bench.flooder import FLOODS
from integration.bench.lifetimes import measure_hostile_upgrades, measure_upgrades
from integration.bench.lifetimes_end import measure_ends
from integration.bench.many import measure_many, measure_startup
from integration.bench.measure import QUICK, Effort, Result
from integration.bench.parties import Scene, open_scene
from integration.bench.policies import measure_compiling, measure_connecting, measure_judging
from integration.bench.restart import measure_restart
from integration.bench.sandboxes import measure_adding, measure_memory
from integration.bench.traffic import (
    PIPELINED,
    PIPELINED_1K,
    PIPELINED_1M,
    PIPELINED_64K,
    ROUNDTRIP,
    measure_counts,
    measure_load,
    measure_rules,
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Something to run, and the rows that come of it, in this order."""

    names: tuple[str, ...]
    run: Callable[[Scene, Effort], list[Result]]


MEASUREMENTS: Final = (
    Measurement(("roundtrip", "cpu-roundtrip"), partial(measure_load, ROUNDTRIP)),
    Measurement(("pipelined-0", "cpu-pipelined"), partial(measure_load, PIPELINED)),
    Measurement(("pipelined-1k",), partial(measure_load, PIPELINED_1K)),
    Measurement(("pipelined-64k",), partial(measure_load, PIPELINED_64K)),
    Measurement(("pipelined-1m",), partial(measure_load, PIPELINED_1M)),
    Measurement(("signals-1", "signals-10", "signals-100"), measure_signals),
    Measurement(
        (
            *("callers-1", "callers-10", "callers-100"),
            *("cpu-callers-1", "cpu-callers-10", "cpu-callers-100"),
            "callers-growth",
        ),
        measure_callers,
    ),
    Measurement(("rules-10", "rules-1000", "rules-10000", "rules-growth"), measure_counts),
    Measurement(("roundtrip-1000-rules",), measure_rules),
    Measurement(("changes-under-load",), measure_changes),
    *(
        Measurement((f"fair-{kind}", f"fair-host-{kind}"), partial(measure_fairness, kind))
        for kind in FLOODS
    ),
    Measurement(("add-sandbox",), measure_adding),
    Measurement(("pss-1",), partial(measure_memory, 1)),
    Measurement(("pss-100",), partial(measure_memory, 100)),
    Measurement(("add-1000", "pss-1000"), measure_many),
    Measurement(("startup", "startup-supervisor"), measure_startup),
    Measurement(("restart-1000",), measure_restart),
    Measurement(("end-p50", "end-p99"), measure_ends),
    Measurement(("upgrade-pause", "upgrade-pause-max"), partial(measure_upgrades, 1)),
    Measurement(("upgrade-pause-hostile",), measure_hostile_upgrades),
    Measurement(("upgrade-pause-1000", "upgrade-pause-1000-max"), partial(measure_upgrades, 1000)),
    Measurement(("compile-1000",), measure_compiling),
    Measurement(("connect-one",), measure_connecting),
    Measurement(("judge-300-globs",), measure_judging),
    # Last, for not everybody has built its bus, and what cannot be measured is the end.
    Measurement(("add-sandbox-containers1",), measure_labelled_adding),
)
NAMES: Final = tuple(name for measurement in MEASUREMENTS for name in measurement.names)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the file."""
    arguments = make_parser().parse_args(argv)
    effort = QUICK if arguments.quick else Effort()
    raise_descriptor_limit()
    results: dict[str, Result] = {}
    failure: Exception | None = None
    try:
        measure(arguments.only or NAMES, effort, results)
    except (BenchError, OSError, subprocess.TimeoutExpired) as exc:
        failure = exc
    if results:  # what there is took its time
        tell(results, arguments)
    if failure is not None:
        print(f"bench: {failure}", file=sys.stderr)
    return 0 if failure is None else 1


def tell(results: dict[str, Result], arguments: argparse.Namespace) -> None:
    """Print the table, and write what was asked for."""
    if arguments.markdown:
        print(report.make_markdown(results), end="")
    else:
        report.print_table(results)
    if arguments.plot:
        plot.write_plots(results, arguments.plot)
    if arguments.json:
        rows = msgspec.json.encode([result.make_row(name) for name, result in results.items()])
        arguments.json.write_bytes(msgspec.json.format(rows) + b"\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m integration.bench", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--only", action="append", choices=NAMES, metavar="NAME", help="this row (repeatable)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw them there (SVG)")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--quick", action="store_true", help="few short blocks: for a first look")
    return parser


def raise_descriptor_limit() -> None:
    """A thousand sandboxes are some thousand sockets here: the usual soft limit of 1024 is too low."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def measure(wanted: Collection[str], effort: Effort, results: dict[str, Result]) -> None:
    """Fill in the wanted rows. Raises BenchError; the rows before stay."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, open_scene(Path(folder)) as scene:
        for measurement in MEASUREMENTS:
            if set(wanted).isdisjoint(measurement.names):
                continue
            print(f"measuring {', '.join(measurement.names)}", file=sys.stderr)
            # A load gives its processor time as well, which not every row is about.
            rows = zip(measurement.names, measurement.run(scene, effort), strict=False)
            results |= {name: result for name, result in rows if name in wanted}


if __name__ == "__main__":
    sys.exit(main())
