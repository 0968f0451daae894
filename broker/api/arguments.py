"""Checks of the arguments of AddServer.

The module is pure, except that descriptors, the process and the cgroup among the arguments are
examined.
"""

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from broker.bus.codec import Packer, TooLongError
from broker.bus.values import Variant, holds_descriptor, nesting
from broker.supervisor.sandboxes.lifecycle import Process
from broker.supervisor.sandboxes.rule_limits import SLICE, check_number
from broker.supervisor.sandboxes.sockets import check_readable, check_writable
from broker.supervisor.sandboxes.specs import AddRequest
from broker.supervisor.watches import cgroups, processes
from broker.wire.errors import INVALID_ARGS, LIMITS_EXCEEDED, CallRefusedError
from broker.wire.names import is_interface
from policy.match import RULE_WORK, reading_work
from policy.rules import AccessList, Rule
from policy.text import parse_rule
from policy.usos.wire_form import parse_usos

# An app's identifier may be any text. The text is shown, stored, and part of each message about the
# sandbox.
MAX_TEXT: Final = 4096  # bytes
MAX_PLUGS: Final = 1024
# A bus closes a connection that sends more than 64 levels. The broker's answers wrap the metadata
# in further levels, and the broker must not lose the connection.
MAX_METADATA_NESTING: Final = 32
MAX_TIME_LIMIT: Final = 2**32 - 1  # seconds

NAMED: Final[Mapping[str, str]] = {
    "Allow": "a(usos)",
    "Buses": "as",
    "Cgroup": "s",
    "CloseNotify": "h",
    "Component": "s",
    "KeepAfterCreator": "b",
    "Plugs": "as",
    "PortalsAsHost": "b",
    "Process": "u",
    "ProcessFd": "h",
    "ReadyNotify": "h",
    "ReceiveFromHost": "b",
    "Rules": "a(bs)",
    "Socket": "h",
    "TimeLimit": "t",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The origin of a call."""

    bus: str
    buses: Collection[str]
    fds: Sequence[int]
    uid: int
    origin: str  # for the rules
    max_metadata: int = 65_536  # bytes


def reading_request(values: Sequence[Any], context: Context) -> Generator[int, None, AddRequest]:
    """Return the request in the four arguments of AddServer, and yield the work done.

    Raises CallRefusedError.
    """
    type_, app, metadata, variants = values
    if not is_interface(type_):
        raise CallRefusedError(INVALID_ARGS, f"type {type_[:100]!r} is not an interface name")
    check_text(app, "name")
    packed = yield from _packing_metadata(metadata, context.max_metadata)
    named = _check_named(variants)
    component = named.get("Component") or None
    if component is not None:
        check_text(component, "Component")
    allow = yield from reading_allow(named.get("Allow", ()), context.origin)
    rules = allow + (yield from reading_rules(named.get("Rules", ()), context.origin))
    return AddRequest(
        type=type_,
        app=app,
        component=component,
        metadata=packed,
        buses=_check_buses(named.get("Buses", [context.bus]), context.buses),
        access=AccessList(rules=rules, receive_from_host=named.get("ReceiveFromHost", True)),
        plugs=_check_plugs(named.get("Plugs", [])),
        portals_as_host=named.get("PortalsAsHost", False),
        keep_after_creator=named.get("KeepAfterCreator", False),
        process=_check_process(named, context),
        cgroup=cgroups.identify(named["Cgroup"]) if "Cgroup" in named else None,
        time_limit=_check_time_limit(named),
        close_notify=_take_fd(named, context, "CloseNotify", check_readable),
        ready_notify=_take_fd(named, context, "ReadyNotify", check_writable),
        socket=_take_fd(named, context, "Socket", _check_nothing),
    )


def reading_allow(
    entries: Sequence[tuple[int, str, str, str]], origin: str
) -> Generator[int, None, tuple[Rule, ...]]:
    """Return the rules of `a(usos)`, and yield the work done. Raises CallRefusedError."""
    check_number(entries, sum(len(text) for entry in entries for text in entry[1:]))
    rules: list[Rule] = []
    for index, entry in enumerate(entries):
        try:
            rules += parse_usos([entry], origin=origin, first=index)
        except ValueError as exc:
            raise CallRefusedError(INVALID_ARGS, str(exc)) from exc
        yield RULE_WORK + sum(map(len, entry[1:]))
    return tuple(rules)


def reading_rules(
    entries: Sequence[tuple[bool, str]], origin: str
) -> Generator[int, None, tuple[Rule, ...]]:
    """Return the rules of `a(bs)`, which are (deny, text), and yield the work done.

    Raises CallRefusedError.
    """
    check_number(entries, sum(len(text) for _, text in entries))
    rules = []
    for deny, text in entries:
        try:
            rules.append(parse_rule(text, deny=deny, origin=origin))
        except ValueError as exc:
            raise CallRefusedError(INVALID_ARGS, str(exc)) from exc
        yield RULE_WORK + reading_work(text)
    return tuple(rules)


def _packing_metadata(metadata: Mapping[str, Variant], most: int) -> Generator[int, None, bytes]:
    """Return metadata in the stored form, and yield the work done.

    Raises CallRefusedError.
    """
    packer = Packer("a{sv}", [metadata], max_bytes=most)
    try:
        while not packer.run():
            yield SLICE
    except TooLongError as exc:
        text = f"max_container_metadata_bytes={most} would be exceeded"
        raise CallRefusedError(LIMITS_EXCEEDED, text) from exc
    # These checks visit each value. The size is limited by now, so the values are few.
    if holds_descriptor(metadata):
        raise CallRefusedError(INVALID_ARGS, "metadata cannot hold descriptors")
    if nesting(metadata) > MAX_METADATA_NESTING:
        text = f"max_metadata_nesting={MAX_METADATA_NESTING} would be exceeded"
        raise CallRefusedError(LIMITS_EXCEEDED, text)
    return packer.body


def check_text(text: str, name: str) -> None:
    """Check the length of a text with arbitrary content. Raises CallRefusedError."""
    if len(text.encode()) > MAX_TEXT:
        raise CallRefusedError(LIMITS_EXCEEDED, f"{name}: max_text_bytes={MAX_TEXT} is exceeded")


def _check_named(variants: Mapping[str, Variant]) -> dict[str, Any]:
    for name, variant in variants.items():
        wanted = NAMED.get(name)
        if wanted is None:
            raise CallRefusedError(INVALID_ARGS, f"unknown named argument {name[:100]!r}")
        if variant.signature != wanted:
            raise CallRefusedError(
                INVALID_ARGS, f"named argument {name} has type {wanted}, not {variant.signature}"
            )
    return {name: variant.value for name, variant in variants.items()}


def _check_buses(wanted: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    if not wanted or len(set(wanted)) != len(wanted):
        raise CallRefusedError(INVALID_ARGS, "Buses is empty, or names a bus twice")
    for bus in wanted:
        if bus not in known:
            listed = ", ".join(known)
            raise CallRefusedError(INVALID_ARGS, f"no bus {bus[:100]!r}, only: {listed}")
    return tuple(wanted)


def _check_plugs(plugs: Sequence[str]) -> tuple[str, ...]:
    if len(plugs) > MAX_PLUGS:
        raise CallRefusedError(LIMITS_EXCEEDED, f"max_plugs={MAX_PLUGS} is exceeded")
    for plug in plugs:
        check_text(plug, "Plugs")
        if not plug:
            raise CallRefusedError(INVALID_ARGS, "Plugs has an empty name")
    return tuple(dict.fromkeys(plugs))


def _check_process(named: Mapping[str, Any], context: Context) -> Process | None:
    if "Process" in named and "ProcessFd" in named:
        raise CallRefusedError(INVALID_ARGS, "only one of Process and ProcessFd may be given")
    if "Process" in named:
        return processes.identify(named["Process"], context.uid)
    fd = _take_fd(named, context, "ProcessFd", _check_nothing)
    return processes.identify_fd(fd, context.uid) if fd is not None else None


def _check_time_limit(named: Mapping[str, Any]) -> int:
    seconds: int = named.get("TimeLimit", 0)
    if "TimeLimit" in named and not 1 <= seconds <= MAX_TIME_LIMIT:
        raise CallRefusedError(
            INVALID_ARGS, f"TimeLimit must be 1 to {MAX_TIME_LIMIT} seconds, not {seconds}"
        )
    return seconds


def _take_fd(
    named: Mapping[str, Any], context: Context, name: str, check: Callable[[int, str], None]
) -> int | None:
    if name not in named:
        return None
    index: int = named[name]
    if index >= len(context.fds):
        raise CallRefusedError(INVALID_ARGS, f"{name}: there is no descriptor {index}")
    fd = context.fds[index]
    check(fd, name)
    return fd


def _check_nothing(_fd: int, _name: str) -> None:
    """Accept any descriptor, because the user of the descriptor checks the type."""
