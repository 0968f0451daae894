"""The AppArmor importer beside AppArmor's own parser: both take the same texts, and all of Debian's profiles."""

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from broker.cli.policy_files import make_resolver
from integration.harness.processes import PROJECT
from policy.importers.apparmor import import_apparmor
from policy.importers.apparmor_parser import parse_profiles
from policy.importers.report import ImportFileError, Source

FETCHED: Final = PROJECT / ".cache" / "apparmor"
ROOT: Final = FETCHED / "root"
BASE: Final = ROOT / "etc" / "apparmor.d"
EXTRAS: Final = ROOT / "usr" / "share" / "apparmor" / "extra-profiles"
RULE: Final = "dbus send bus=session peer=(name=org.example.A),"
# Profiles with D-Bus rules that the packages are known to have.
KNOWN: Final = {
    "usr.bin.evince",
    "usr.sbin.cups-browsed",
    "usr.sbin.cupsd",
    "usr.lib.libreoffice.program.soffice.bin",
    "usr.sbin.avahi-daemon",
    "usr.sbin.dnsmasq",
    "usr.lib.telepathy",
}


@pytest.fixture(scope="module")
def parser() -> Path:
    if not (FETCHED / "complete").exists():
        pytest.skip("Debian's profiles are not there: make apparmor-profiles, with a network")
    (path,) = [path for path in ROOT.rglob("apparmor_parser") if path.is_file()]
    return path


def takes(parser: Path, file: Path, *more: str) -> str:
    """Return why the parser refuses a file; empty: it takes it."""
    features = BASE / "abi" / "3.0"  # with D-Bus, whatever the kernel has
    quiet = ["--skip-kernel-load", "--skip-cache", "--config-file=/dev/null", "--stdout"]
    done = subprocess.run(
        [parser, *quiet, "--kernel-features", features, "-b", BASE, "-I", BASE, *more, file],
        env={"LD_LIBRARY_PATH": ":".join(map(str, ROOT.glob("usr/lib/*-linux-gnu*")))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode >= 0, done
    return (done.stderr or "refused") if done.returncode else ""


def imports(text: str, name: str = "f") -> tuple[str, int]:
    """Return why the importer refuses a file, and how many D-Bus rules of it there are."""
    source, resolve = Source(name, text), make_resolver([BASE])
    try:
        profiles = parse_profiles(source, resolve).profiles
        for profile in profiles:
            import_apparmor(source, resolve=resolve, profile=profile.name)
    except ImportFileError as exc:
        return str(exc), 0
    return "", sum(len(profile.rules) for profile in profiles)


def in_turn(function: Callable[[Path], str], files: list[Path]) -> list[str]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, files))


def test_bug_2_all_profiles_of_debian_are_taken_as_by_the_parser(parser: Path) -> None:
    files = [path for path in sorted([*BASE.iterdir(), *EXTRAS.rglob("*")]) if path.is_file()]
    # Read and checked, but not compiled: that of a single one takes a minute.
    refused = in_turn(lambda file: takes(parser, file, "--debug"), files)
    with_rules = set()
    for file, reason in zip(files, refused, strict=True):
        ours, rules = imports(file.read_text(), str(file))
        assert bool(ours) == bool(reason), (file.name, ours, reason)
        if rules:
            with_rules.add(file.name)
    assert with_rules >= {name for name in KNOWN if (BASE / name).exists()}
    assert len(with_rules) >= 5


def inside(rules: str) -> str:
    return f"profile demo /usr/bin/demo {{\n  {rules}\n}}\n"


SAME: Final = {
    "abi within": inside(f"abi <abi/3.0>,\n  {RULE}"),
    "abi before": "abi <abi/3.0>,\n" + inside(RULE),
    "abi in a hat": inside("^h { abi <abi/3.0>, }"),
    "abi denied": inside("deny abi <abi/3.0>,"),
    "abi without a comma": "abi <abi/3.0>\n" + inside(RULE),
    "abi without a file": "abi ,\n" + inside(RULE),
    "abi behind": inside(RULE) + "abi <abi/3.0>,\n",
    "exec_path": f"@{{exec_path}} = /usr/bin/demo\nprofile demo @{{exec_path}} {{ {RULE} }}\n",
    "attach_path": f"@{{attach_path}} = /usr/bin/demo\nprofile demo @{{attach_path}} {{ {RULE} }}\n",
    "profile_name": "@{profile_name} = x\n" + inside(RULE),
    "variable twice": "@{A} = x\n@{A} = y\n" + inside(RULE),
    "variable added to": "@{A} = x\n@{A} += y\n" + inside("dbus bus=@{A},"),
    "variable of an include twice": "include <tunables/global>\n@{HOME}=/x\n" + inside(RULE),
    "variable added to that is not there": "@{A} += x\n" + inside(RULE),
    "variable behind": inside(RULE) + "@{A} = x\n",
    "variable that nobody sets": inside("dbus bus=@{A},"),
    "variable of a variable that nobody sets": "@{A} = @{B}\n" + inside("dbus bus=@{A},"),
    "variable unused": "@{A} = @{B}\n" + inside(RULE),
    "variable without a value": "@{A} = \n" + inside(RULE),
    "profile by a variable": "@{A} = /x\n@{A} { }\n",
    "owner": inside(f"owner {RULE}"),
    "other": inside(f"other {RULE}"),
    "owner in a block": inside(f"owner {{ {RULE} }}"),
    "owner of a file": inside("owner /a r,"),
    "owner of a capability": inside("owner capability,"),
    "deny": inside(f"deny {RULE}"),
    "deny before a block": inside(f"deny {{ {RULE} }}"),
    "audit before a block": inside(f"audit {{ {RULE} }}"),
    "audit deny": inside(f"audit deny {RULE}"),
    "deny audit": inside(f"deny audit {RULE}"),
    "allow deny": inside(f"allow deny {RULE}"),
    "deny owner": inside("deny owner /a r,"),
    "owner deny": inside("owner deny /a r,"),
    "deny deny": inside(f"deny deny {RULE}"),
    "boolean": "$x = true\n" + inside(f"if $x {{ {RULE} }}"),
    "boolean else": "${x} = FALSE\n" + inside(f"if not $x {{ {RULE} }} else {{ {RULE} }}"),
    "boolean twice": "$x = true\n$x = true\n" + inside(RULE),
    "boolean of another value": "$x = maybe\n" + inside(RULE),
    "boolean that nobody sets": inside(f"if $x {{ {RULE} }}"),
    "boolean in parentheses": "$x = true\n" + inside(f"if ($x) {{ {RULE} }}"),
    "defined": "@{X} = a\n" + inside(f"if not defined @{{X}} {{ {RULE} }} else {{ {RULE} }}"),
    "condition not met, bad rule": "$x = false\n" + inside("if $x { xyzzy, }"),
    "condition not met, no variable": "$x = false\n" + inside("if $x { dbus bus=@{NO}, }"),
    "condition outside": f"$x = true\nif $x {{ {inside(RULE)} }}",
    "condition denied": "$x = true\n" + inside(f"deny if $x {{ {RULE} }}"),
    "else alone": inside("else { }"),
    "include that is not there": inside("include <abstractions/nope>"),
    "include if exists": inside("include if exists <abstractions/nope>"),
    "include of old": "include <tunables/global>\n" + inside("#include <abstractions/dbus>"),
    "include in a condition": "include <tunables/global>\n$x = true\n"
    + inside("if $x { include <abstractions/dbus> }"),
    "flags": "profile demo flags=(attach_disconnected, mediate_deleted) { }\n",
    "flags unknown": "profile demo flags=(nope) { }\n",
    "flags none": "profile demo flags=() { }\n",
    "flags that exclude each other": "profile demo flags=(complain, kill) { }\n",
    "flags twice": "profile demo flags=(complain) flags=(audit) { }\n",
    "two hats of one name": inside("hat h { }\n hat h { }"),
    "a child and a hat of one name": inside("hat h { }\n profile h { }"),
    "name for sending": inside("dbus send name=org.a,"),
    "name and peer": inside("dbus send name=org.a peer=(name=org.b),"),
    "bind with a path": inside("dbus bind path=/a,"),
    "eavesdrop with a path": inside("dbus eavesdrop path=/a,"),
    "bus twice": inside("dbus bus=session bus=system,"),
    "peer before": inside("dbus send peer=(name=org.a) bus=session,"),
    "unknown access": inside("dbus frob,"),
    "unknown condition": inside("dbus send foo=bar,"),
    "no value": inside("dbus send path=,"),
    "brace open": inside("dbus send path=/a{b,"),
    "brace of one": inside("dbus send path=/a{b},"),
    "bracket open": inside("dbus send path=/a[b,"),
    "no comma": inside("dbus send bus=session"),
    "unknown rule": inside("xyzzy,"),
}


@pytest.mark.parametrize("what", SAME)
def test_bug_3_what_the_parser_takes_is_taken_and_no_more(
    parser: Path, tmp_path: Path, what: str
) -> None:
    file = tmp_path / "profile"
    file.write_text(SAME[what])
    reason, (ours, _) = takes(parser, file), imports(SAME[what])
    assert bool(ours) == bool(reason), (ours, reason)
