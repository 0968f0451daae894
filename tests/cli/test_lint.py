"""`buswarden policy lint` with lists of rules."""

from pathlib import Path

import pytest

from broker.cli.commands import run_command
from broker.cli.lint import read_lists
from broker.wire.errors import ConfigError

SLOW = "send:@/**a*{}b*"


def lint(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = run_command(["policy", "lint", *args])
    return code, *capsys.readouterr()


def test_a_list_is_shown_with_what_it_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rules"
    file.write_text(
        "# from the host: let in\nallow send:@/a*b,bus=system  # by me\ndeny own:org.x\n"
    )
    code, out, err = lint(capsys, str(file))
    assert (code, err) == (0, "")
    (line,) = out.splitlines()
    assert line.startswith(f"{file}: system: a message takes ")
    assert "of 32768 steps (rule_steps) at most" in line
    assert line.endswith("for send:@/a*b,bus=system")


def test_attack_c4_a_list_over_the_limit_is_a_problem_and_says_by_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rules"
    file.write_text("".join(f"allow {SLOW.format(n)}\n" for n in range(20)))
    assert lint(capsys, str(file))[0] == 0
    code, out, _ = lint(capsys, "--rule-steps", "100", str(file))
    assert code == 1
    assert "rule_steps=100 would be exceeded" in out
    assert "allow send:@/**a*10b*" in out


def test_lists_of_several_apps_are_read_in_both_forms() -> None:
    rules = (
        "snap.a.b\n  # from the host: only by rule\n  allow send:org.x\nsnap.c.d\n  deny own:a.b\n"
    )
    json = (
        '{"snap.a.b": {"receive_from_host": false, "rules": [{"deny": false, "rule": "send:org.x"}]},'
        '"snap.c.d": {"rules": [{"deny": true, "rule": "own:a.b"}]}}'
    )
    assert read_lists(rules, "f") == read_lists(json, "f")
    assert set(read_lists(rules, "f")) == {"snap.a.b", "snap.c.d"}
    assert set(read_lists('{"rules": []}', "f")) == {""}


@pytest.mark.parametrize(
    "text",
    ["allow sendx:org.x", "allow", "may send:org.x", "{", '{"a": 1}', '{"a": {"rules": [1]}}'],
)
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^f: "):
        read_lists(text if text != "allow" else "allow this or that", "f")
