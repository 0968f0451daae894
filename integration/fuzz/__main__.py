"""Fuzz every harness for a while, each in a process of its own. See docs/development.md."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from integration.fuzz.harnesses import CORPUS, SHARES, invariant_of, load
from integration.fuzz.runs import MACHINE, MACHINE_SHARE, Finding, fuzz, merge, run_machine


def main(argv: Sequence[str] | None = None) -> int:
    """Run, say in a line for each harness what came of it, and how to see a finding again."""
    arguments = make_parser().parse_args(argv)
    if arguments.replay:
        name, path = arguments.replay
        load(name).check(Path(path).read_bytes())
        print(f"{name}: {path} breaks nothing")
        return 0
    names = arguments.only or [*SHARES, MACHINE]
    if importlib.util.find_spec("atheris") is None:
        print("fuzz: atheris is not installed (make fuzz does it): no bytes are fuzzed", flush=True)
        names = [name for name in names if name == MACHINE]
    if arguments.merge:
        for name in names:
            if name != MACHINE:
                print(merge(name, arguments.corpus / name))
        return 0
    findings = [found for found in run_all(names, arguments.seconds, arguments.corpus) if found]
    for finding in findings:
        print(f"\n{finding.name}: {finding.text}\nsee it again: {finding.again}")
    print(f"{len(names)} harnesses, {len(findings)} findings")
    return 1 if findings else 0


def run_all(names: Sequence[str], seconds: int, corpus: Path) -> list[Finding | None]:
    """Run the harnesses one after the other."""
    shares = {**SHARES, MACHINE: MACHINE_SHARE}
    total = sum(shares[name] for name in names)
    found = []
    for name in names:
        mine = max(1, seconds * shares[name] // total)
        print(f"{name}: {invariant_of(name)}", flush=True)
        finding, line = run_machine(mine) if name == MACHINE else fuzz(name, mine, corpus / name)
        found.append(finding)
        print(f"  {line}", flush=True)
    return found


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m integration.fuzz", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--seconds", type=int, default=600, help="for all together (600)")
    parser.add_argument(
        "--only", action="append", choices=(*SHARES, MACHINE), metavar="NAME", help="(repeatable)"
    )
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folder of kept inputs")
    parser.add_argument(
        "--replay", nargs=2, metavar=("NAME", "FILE"), help="give one input to one harness"
    )
    parser.add_argument(
        "--merge", action="store_true", help="keep of what was found what reaches more code"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
