"""Runs of single harnesses: the process, its limits, and what is left of it."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from integration.fuzz.harnesses import load

PROJECT: Final = Path(__file__).resolve().parents[2]
WORK: Final = PROJECT / ".cache" / "fuzz"
MACHINE: Final = "machine"
MACHINE_SHARE: Final = 4
# An input that takes longer is a finding: the gate serves nobody else meanwhile.
INPUT_SECONDS: Final = 5
MEMORY_MIB: Final = 1024
# How long a process may take to start and to end, beyond the time that it fuzzes.
GRACE_SECONDS: Final = 60
MERGE_SECONDS: Final = 600
MAX_INPUT: Final = 2048
# Of one harness, what is kept in the repository.
MAX_KEPT: Final = 5
MAX_KEPT_BYTES: Final = 600
_LAST: Final = re.compile(r"^#(\d+)\s+\w+\s+cov: (\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A broken invariant."""

    name: str
    text: str  # the last line of the error
    again: str  # the command that shows it


def fuzz(name: str, seconds: int, corpus: Path) -> tuple[Finding | None, str]:
    """Fuzz one harness; return what it found, and a line about it."""
    work = prepare(name)
    options = [
        f"-max_total_time={seconds}",
        f"-timeout={INPUT_SECONDS}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-max_len={MAX_INPUT}",
        f"-artifact_prefix={WORK}/{name}-",
    ]
    folders = [work, *(folder for folder in [corpus] if folder.is_dir())]
    code, said = run_child(name, options, folders, seconds + GRACE_SECONDS)
    if code:
        return _finding(name, said), f"{seconds} s, a finding"
    inputs, edges = _LAST.findall(said)[-1]
    return None, f"{seconds} s, {inputs} inputs, {edges} places of the code"


def run_child(name: str, options: list[str], folders: list[Path], seconds: int) -> tuple[int, str]:
    """Run a harness under atheris; return its exit code and all that it said."""
    argv = [sys.executable, "-m", "integration.fuzz.child", name, *options, *map(str, folders)]
    log = WORK / f"{name}.log"
    with log.open("wb") as out:
        try:
            done = subprocess.run(
                argv, cwd=PROJECT, stdout=out, stderr=out, timeout=seconds, check=False
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = -1
    return code, log.read_text(errors="replace")


def prepare(name: str) -> Path:
    """Return the folder where a harness keeps what it finds, with its seeds in it."""
    work = WORK / "corpus" / name
    work.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(load(name).seeds()):
        (work / f"seed-{number:02}").write_bytes(seed)
    return work


def merge(name: str, corpus: Path) -> str:
    """Choose anew, of all that is known, few and small inputs that reach as much; say how many."""
    work, merged = prepare(name), WORK / "merged" / name
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir(parents=True)
    corpus.mkdir(parents=True, exist_ok=True)
    folders = [merged, corpus, work]
    code, said = run_child(name, ["-set_cover_merge=1"], folders, MERGE_SECONDS)
    if code:
        return f"{name}: not merged, see {WORK / name}.log: {said[-100:]!r}"
    seeds = set(load(name).seeds())
    found = [path for path in merged.iterdir() if path.stat().st_size <= MAX_KEPT_BYTES]
    found = [path for path in found if path.read_bytes() not in seeds]
    found.sort(key=lambda path: path.stat().st_size, reverse=True)
    # Those that somebody gave a name are findings, and stay.
    for path in corpus.iterdir():
        if re.fullmatch("[0-9a-f]{40}", path.name):
            path.unlink()
    for path in found[:MAX_KEPT]:
        shutil.copy(path, corpus / path.name)
    return f"{name}: {len(found)} inputs, {min(len(found), MAX_KEPT)} kept"


def run_machine(seconds: int) -> tuple[Finding | None, str]:
    """Run the state machine for a while; return what it found, and a line about it."""
    WORK.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "integration.fuzz.machine", str(seconds)]
    log = WORK / f"{MACHINE}.log"
    with log.open("wb") as out:
        done = subprocess.run(
            argv, cwd=PROJECT, stdout=out, stderr=out, timeout=seconds * 4 + 120, check=False
        )
    said = log.read_text(errors="replace")
    if done.returncode:
        text = f"see {log}: {_last_error(said)}"
        again = f"{sys.executable} -m integration.fuzz --only {MACHINE}"
        return Finding(name=MACHINE, text=text, again=again), f"{seconds} s, a finding"
    return None, said.splitlines()[-1]


def _finding(name: str, said: str) -> Finding:
    kept = re.findall(r"Test unit written to (\S+)", said)
    again = (
        f".venv/bin/python -m integration.fuzz --replay {name} {kept[-1]}"
        if kept
        else f"see {name}.log"
    )
    return Finding(name=name, text=_last_error(said), again=again)


def _last_error(said: str) -> str:
    errors = re.findall(
        r"^\s*(?:\S*Error|AssertionError|\S*Exception|SUMMARY)\b.*$", said, re.MULTILINE
    )
    return errors[-1].strip() if errors else said[-200:].strip()
