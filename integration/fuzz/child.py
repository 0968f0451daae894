"""One harness under atheris, in a process of its own: NAME and libFuzzer's options."""

import shlex
import sys

import atheris

from integration.fuzz.harnesses import Harness, load


def main(argv: list[str]) -> None:
    """Fuzz until libFuzzer ends the process."""
    name = argv[1]
    harness = load_instrumented(name)
    # libFuzzer starts itself anew to merge, by a shell and this word.
    again = f"{shlex.quote(sys.executable)} -m integration.fuzz.child {name}"
    atheris.Setup([again, *argv[2:]], harness.check)
    atheris.Fuzz()


def load_instrumented(name: str) -> Harness:
    """Import a harness. What it tests is instrumented when it is first imported: here."""
    assert not any(module.partition(".")[0] in ("broker", "policy") for module in sys.modules)
    with atheris.instrument_imports(include=["broker", "policy"]):
        return load(name)


if __name__ == "__main__":
    main(sys.argv)
