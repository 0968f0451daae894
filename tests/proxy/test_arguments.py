from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from broker.proxy.arguments import (
    MAX_ARGUMENTS,
    Ask,
    Command,
    check_paths,
    parse_arguments,
    split_arguments,
)
from broker.wire.errors import ConfigError
from policy.importers.report import ImportFileError
from policy.importers.xdg_dbus_proxy import import_options
from policy.rules import Access
from policy.text import format_rule

BUS = "unix:path=/bus"
POLICY = (
    "--see=org.example.A",
    "--talk=org.example.B.*",
    "--own=org.example.C",
    "--call=org.example.D=x.Y.*@/a/*",
    "--broadcast=org.example.E=*",
)

argument_text = st.text(st.characters(exclude_characters="\0", codec="utf-8"))


def nothing(fd: int) -> bytes:
    raise AssertionError(fd)


def parse(*arguments: str, given: dict[int, bytes] | None = None) -> Command:
    command = parse_arguments(arguments, (given or {}).pop if given else nothing)
    assert isinstance(command, Command)
    return command


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(arguments, nothing)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- groups -------------------------------------------------------------------------------------------


def test_a_group_is_an_address_a_path_and_what_stands_behind() -> None:
    (group,) = parse(BUS, "/s", "--filter", *POLICY).groups
    assert (group.address, group.path, group.filter) == (BUS, "/s", True)
    assert group.imported == import_options([*POLICY, "--filter"], file="argument")


def test_options_belong_to_the_group_before_them() -> None:
    one, two, three = parse(
        BUS, "/1", "--filter", "--talk=org.example.A",
        BUS, "/2", "--log", "--fd=7",
        BUS, "/3", "--sloppy-names", "--filter",
    ).groups  # fmt: skip
    assert (one.filter, one.log, one.sloppy_names) == (True, False, False)
    assert (two.filter, two.log, two.sloppy_names) == (False, True, False)
    assert (three.filter, three.log, three.sloppy_names) == (True, False, True)
    assert "org.example.A" in names(one.imported.access.rules)
    assert "org.example.A" not in names(three.imported.access.rules)


def names(rules: Sequence[object]) -> set[str | None]:
    return {getattr(rule, "name", None) for rule in rules}


def test_without_filter_everything_is_allowed() -> None:
    (group,) = parse(BUS, "/s", *POLICY).groups
    (rule,) = group.imported.access.rules
    assert (rule.access, rule.name, rule.deny) == (frozenset(Access), None, False)


def test_filter_may_stand_behind_what_it_is_for() -> None:
    (group,) = parse(BUS, "/s", "--see=org.example.A", "--filter").groups
    assert "see:org.example.A" in {format_rule(rule) for rule in group.imported.access.rules}


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ("--own=", "send+receive+own:{}"),
        ("--talk=", "send+receive:{}"),
        ("--see=", "see:{}"),
        ("--call=", "send:{}:x.Y.*"),
        ("--broadcast=", "receive:{}:x.Y.*"),
    ],
)
@pytest.mark.parametrize("name", ["org.kde.StatusNotifierItem-*", "org.kde.Item-[0-9]", "org.k?"])
def test_bug_9_globs_are_an_extension(option: str, rule: str, name: str) -> None:
    more = "=x.Y.*" if ".Y." in rule else ""
    (group,) = parse(BUS, "/s", "--filter", f"{option}{name}{more}").groups
    assert format_rule(group.imported.access.rules[-1]) == rule.format(name)
    # What xdg-dbus-proxy's own options mean stays as it is.
    options = ["--filter", f"{option}{name}{more}"]
    if more:
        assert import_options(options).unsaid
        assert len(import_options(options).access.rules) == 2
    else:
        with pytest.raises(ImportFileError):
            import_options(options)


@pytest.mark.parametrize(
    "name", ["*", "?", "org*", "org.*-x", "org.?", "*.kde.x", "org.*.x", ":1.4*", "org.kde[.x"]
)
def test_bug_9_globs_have_a_fixed_beginning(name: str) -> None:
    for option in ("--own=", "--talk=", "--see="):
        assert f"{option}{name}" in refusal(BUS, "/s", "--filter", f"{option}{name}")
    for option in ("--call=", "--broadcast="):
        (group,) = parse(BUS, "/s", "--filter", f"{option}{name}=*").groups
        assert group.imported.unsaid
        assert len(group.imported.access.rules) == 2


def test_the_origin_of_a_rule_is_its_option() -> None:
    (group,) = parse(BUS, "/s", "--filter", "--see=org.example.A").groups
    assert group.imported.access.rules[-1].origin.endswith("--see=org.example.A")


def test_what_can_match_nothing_is_told() -> None:
    (group,) = parse(BUS, "/s", "--filter", "--call=org.example.A=x.Y").groups
    (unsaid,) = group.imported.unsaid
    assert "--call=org.example.A=x.Y" in unsaid.text


# -- options that stand anywhere ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [("--fd=5", BUS, "/s"), (BUS, "/s", "--fd=5"), ("--fd=4", BUS, "/s", "--fd=5")]
)
def test_the_last_fd_counts(arguments: tuple[str, ...]) -> None:
    assert parse(*arguments).fd == 5


@pytest.mark.parametrize(
    ("arguments", "ask"),
    [
        (("--help",), Ask.HELP),
        ((BUS, "/s", "--version"), Ask.VERSION),
        (("--help", "--bogus"), Ask.HELP),
    ],
)
def test_questions_end_the_reading(arguments: tuple[str, ...], ask: Ask) -> None:
    assert parse_arguments(arguments, nothing) is ask


def test_arguments_from_a_descriptor_stand_in_their_place() -> None:
    one, two = parse(
        "--args=3", "--log", BUS, "/2",
        given={3: f"{BUS}\0/1\0--filter\0--args=4".encode(), 4: b"--see=org.example.A"},
    ).groups  # fmt: skip
    assert (one.path, one.filter, one.log) == ("/1", True, True)
    assert "org.example.A" in names(one.imported.access.rules)
    assert (two.path, two.filter) == ("/2", False)


def test_a_path_does_not_come_from_behind_an_option() -> None:
    assert "no socket PATH" in refusal(BUS, "--args=3")


@given(st.lists(argument_text))
def test_what_is_joined_is_split_again(arguments: list[str]) -> None:
    data = b"".join(argument.encode() + b"\0" for argument in arguments)
    assert split_arguments(data) == arguments


@given(st.lists(argument_text, min_size=1))
def test_the_last_nul_may_lack(arguments: list[str]) -> None:
    data = "\0".join(arguments).encode()
    last = [] if not arguments[-1] else arguments[-1:]
    assert split_arguments(data) == [*arguments[:-1], *last]


@given(st.binary())
def test_no_byte_is_lost(data: bytes) -> None:
    again = "\0".join(split_arguments(data)).encode("utf-8", "surrogateescape")
    assert again == data.removesuffix(b"\0")


@given(st.lists(st.sampled_from(["--filter", "--log", "--sloppy-names", "--fd=3", *POLICY])))
def test_arguments_mean_the_same_wherever_they_come_from(options: list[str]) -> None:
    data = b"\0".join(option.encode() for option in options)
    assert parse(BUS, "/s", "--args=9", given={9: data}) == parse(BUS, "/s", *options)


@given(
    st.lists(
        st.sampled_from(
            [
                "--filter",
                "--log",
                "--fd=3",
                "--fd=x",
                "--talk=org.a.B",
                "--talk=x",
                "--help",
                BUS,
                "/s",
            ]
        )
        | argument_text,
        max_size=8,
    )
)
def test_whatever_the_arguments_are_they_are_read_or_refused_in_a_line(
    arguments: list[str],
) -> None:
    problem = ""
    try:
        read = parse_arguments(arguments, lambda _fd: b"")
    except ConfigError as exc:
        problem = str(exc)
    else:
        assert isinstance(read, Ask) or read.groups
    assert problem.isprintable()


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "no ADDRESS and PATH"),
        (("--fd=3",), "no ADDRESS and PATH"),
        (("--filter",), "stands behind the ADDRESS and PATH"),
        (("--talk=org.a.B", BUS, "/s"), "stands behind the ADDRESS and PATH"),
        ((BUS,), "no socket PATH"),
        ((BUS, "--filter"), "no socket PATH"),
        ((BUS, ""), "empty"),
        ((BUS, "/s\0"), "NUL"),
        ((BUS, "/s", BUS), "no socket PATH"),
        (("--bogus",), "unknown option"),
        (("-",), "unknown option"),
        ((BUS, "/s", "--filter=yes"), "unknown option"),
        ((BUS, "/s", "--tal=org.a.B"), "unknown option"),
        ((BUS, "/s", "--talk"), "write --talk=VALUE"),
        (("--fd",), "write --fd=VALUE"),
        (("--args",), "write --args=VALUE"),
        (("--fd=",), "--fd=: not the number"),
        (("--fd=-1",), "not the number"),
        (("--fd=1x",), "not the number"),
        (("--fd=\u0661",), "not the number"),
        (("--fd=99999999999",), "not the number"),
        (("--fd=4294967295",), "not the number"),
        (("--args=x",), "--args=x: not the number"),
        ((BUS, "/s", "--talk=nodots"), "--talk=nodots: "),
        ((BUS, "/s", "--talk="), "--talk=: "),
        ((BUS, "/s", "--see=:1.5"), "unique name"),
        ((BUS, "/s", "--own=org.*.x"), "--own=org.*.x: "),
        ((BUS, "/s", "--call=org.a.B"), "no '='"),
        ((BUS, "/s", "--broadcast=org.a.B"), "no '='"),
    ],
)
def test_refused_in_a_line_that_says_what(arguments: tuple[str, ...], problem: str) -> None:
    assert problem in refusal(*arguments)


def test_bad_options_are_refused_without_filter_as_well() -> None:
    assert "--talk=x" in refusal(BUS, "/s", "--talk=x")


def test_an_option_with_control_characters_is_shown_without() -> None:
    assert "\x1b" not in refusal("--\x1b[31m")


def test_arguments_have_an_end() -> None:
    with pytest.raises(ConfigError, match="arguments"):
        parse_arguments(["--args=3"], lambda _fd: b"--log\0" * (MAX_ARGUMENTS + 1))


def test_two_sockets_have_two_paths() -> None:
    check_paths(parse(BUS, "/1", BUS, "/2").groups)
    with pytest.raises(ConfigError, match="/1"):
        check_paths(parse(BUS, "/1", BUS, "/1").groups)
