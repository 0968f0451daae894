"""Measure the gate, xdg-dbus-proxy and the plain bus side by side. See docs/performance.md."""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from integration.bench import report
from integration.bench.client import BenchError
from integration.bench.measure import QUICK, Effort, Result
from integration.bench.parties import Scene, open_scene
from integration.bench.policies import measure_compiling, measure_connecting, measure_judging
from integration.bench.sandboxes import measure_adding, measure_memory
from integration.bench.traffic import (
    PIPELINED,
    PIPELINED_1K,
    PIPELINED_64K,
    ROUNDTRIP,
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
    Measurement(("roundtrip-1000-rules",), measure_rules),
    Measurement(("add-sandbox",), measure_adding),
    Measurement(("pss-1",), partial(measure_memory, 1)),
    Measurement(("pss-100",), partial(measure_memory, 100)),
    Measurement(("compile-1000",), measure_compiling),
    Measurement(("connect-one",), measure_connecting),
    Measurement(("judge-300-globs",), measure_judging),
)
NAMES: Final = tuple(name for measurement in MEASUREMENTS for name in measurement.names)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the file."""
    arguments = make_parser().parse_args(argv)
    effort = QUICK if arguments.quick else Effort()
    results: dict[str, Result] = {}
    try:
        measure(arguments.only or NAMES, effort, results)
    except (BenchError, OSError, subprocess.TimeoutExpired) as exc:
        if results:  # what there is took its time
            report.print_table(results)
        print(f"bench: {exc}", file=sys.stderr)
        return 1
    report.print_table(results)
    if arguments.json:
        rows = msgspec.json.encode([result.make_row(name) for name, result in results.items()])
        arguments.json.write_bytes(msgspec.json.format(rows) + b"\n")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m integration.bench", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--only", action="append", choices=NAMES, metavar="NAME", help="this row (repeatable)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument("--quick", action="store_true", help="few short blocks: for a first look")
    return parser


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
