"""The contents of the recorded frames, and the program that recorded them.

    python -m tests.helpers.recorded_frames

writes tests/data/control-PROTOCOL.txt, a control frame of each message, and tests/data/handover-VERSION.txt, the frames
of a hand-over, by the present code. PROTOCOL is that of broker/control_protocol/messages.py, VERSION that of
broker/gate/dumps.py. Run it when one of them is raised, or when a field with a default is new. In the second case the
difference shows the new field alone, because each value is made from the name and the type of its field.

Each line of a file is the name of a class and its bytes in hexadecimal digits.
"""

import types
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from broker.control_protocol.framing import make_frame
from broker.control_protocol.messages import PROTOCOL, Answer, Envelope, Event, Request
from broker.gate.dumps import (
    VERSION,
    CallDump,
    ConnectionStateDump,
    HandoverHeader,
    PlainCalls,
    PlainCallsDump,
    ReplierDump,
    ReplyAction,
    SandboxDump,
)
from broker.gate.handover.channel import Word, encode
from policy.rules import Access

DATA: Final = Path(__file__).resolve().parent.parent / "data"
CONTROL_FILE: Final = DATA / f"control-{PROTOCOL}.txt"
HANDOVER_FILE: Final = DATA / f"handover-{VERSION}.txt"

# All actions on the reply to a call, as handlers of replies are registered. The values of an action are the handler's.
ACTIONS: Final = (
    ReplyAction("add-match", ("type='signal'",)),
    ReplyAction("count-callers"),
    ReplyAction("credentials"),
    ReplyAction("hello"),
    ReplyAction("ignore"),
    ReplyAction("list"),
    ReplyAction("meter"),
    ReplyAction("must-work"),
    ReplyAction("owner", ("org.example.Name",)),
    ReplyAction("owners", ("org.example.Name", "org.example.Other")),
    ReplyAction("read-barrier", (3,)),
    ReplyAction("refuse", (7, "org.example.Name", "GetNameOwner", "text")),
    ReplyAction("request-name", ("org.example.Name", 4)),
    ReplyAction("translate", (0xFFF00001,), ReplyAction("list")),
    ReplyAction("wording", ("GetNameOwner", "org.example.Name")),
)
AnyStruct = TypeVar("AnyStruct", bound=msgspec.Struct)


def make_full(kind: type[AnyStruct], within: tuple[type, ...] = ()) -> AnyStruct:
    """Return an object with no field at its default; a class within itself has its defaults there."""
    if kind is PlainCallsDump:
        return make_plain()  # type: ignore[return-value]
    values = {
        field.name: make_value(field.type, field.name, field.default, (*within, kind))
        for field in msgspec.structs.fields(kind)
        if field.required or kind not in within
    }
    made = kind(**values)
    if isinstance(made, ConnectionStateDump):
        return msgspec.structs.replace(made, calls=make_calls())
    if isinstance(made, HandoverHeader):
        return msgspec.structs.replace(made, version=VERSION, protocol=PROTOCOL)
    return made


def make_value(kind: Any, name: str, default: object, within: tuple[type, ...]) -> Any:
    """Return a value of that type, made from the name of its field."""
    number = zlib.crc32(name.encode()) % 1000 + 1
    plain: Mapping[Any, Callable[[], object]] = {
        str: lambda: name,
        bytes: name.encode,
        bool: lambda: default is not True,
        int: lambda: number,
        float: lambda: number / 8,
        Access: lambda: Access.SEND,
    }
    if kind in plain:
        return plain[kind]()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return make_full(kind, within)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return args[-1]
    if origin in (Union, types.UnionType):
        return make_value(args[0], name, default, within)
    parts = [make_value(arg, name, None, within) for arg in args if arg is not Ellipsis]
    if origin is dict:
        return {parts[0]: parts[1]}
    return origin(parts)  # tuple, frozenset


def make_plain() -> PlainCallsDump:
    """Return two calls to owners of a name, one to a unique name, and one that waits under another serial."""
    calls = PlainCalls()
    for serial, owner, name, since in (
        (5, ":1.2", "org.example.Name", 3),
        (6, ":1.2", "org.example.Name", 4),
        (7, ":1.3", "", 0),
        (8, "", "", 0),
    ):
        calls.add((serial, *calls.index(owner, name), since))
    return calls.dump()


def make_calls() -> tuple[CallDump, ...]:
    """Return a waiting call for each action, from the app and from the gate in turn."""
    replier = ReplierDump(owner=":1.2", name="org.example.Name", since=3)
    return tuple(
        CallDump(serial=100 + place, replier=replier, action=action, is_own=bool(place % 2))
        for place, action in enumerate(ACTIONS)
    )


MESSAGES: Final = {
    kind.__name__: Envelope(serial=17, body=make_full(kind), fds=2, number=23)
    for kind in get_args(Request | Answer | Event)
}
FRAMES: Final[dict[str, msgspec.Struct]] = {
    kind.__name__: make_full(kind) for kind in (*get_args(Word), HandoverHeader, SandboxDump)
}


def fields_at_default(values: Iterable[object]) -> set[str]:
    """Return the fields, as Class.field, that no object in these values has set."""
    seen: dict[str, bool] = {}
    for made in walk(values):
        for field in msgspec.structs.fields(made):
            name = f"{type(made).__name__}.{field.name}"
            is_set = field.required or getattr(made, field.name) != field.default
            seen[name] = seen.get(name, False) or is_set
    return {name for name, is_set in seen.items() if not is_set}


def walk(value: object) -> Iterator[msgspec.Struct]:
    """Return every object of the protocol in a value, however deep."""
    if isinstance(value, msgspec.Struct):
        yield value
        yield from walk([getattr(value, field.name) for field in msgspec.structs.fields(value)])
    elif isinstance(value, Mapping):
        yield from walk([*value.values()])
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for part in value:
            yield from walk(part)


def write_lines(frames: Mapping[str, bytes]) -> str:
    """Return frames as the text of a recording."""
    return "".join(f"{name} {data.hex()}\n" for name, data in frames.items())


def read_lines(path: Path) -> dict[str, bytes]:
    """Return the frames of a recording, by name."""
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {name: bytes.fromhex(digits) for name, digits in lines}


def control_text() -> str:
    return write_lines({name: make_frame(envelope) for name, envelope in MESSAGES.items()})


def handover_text() -> str:
    return write_lines({name: encode(frame) for name, frame in FRAMES.items()})


def main() -> None:
    CONTROL_FILE.write_text(control_text(), encoding="ascii")
    HANDOVER_FILE.write_text(handover_text(), encoding="ascii")


if __name__ == "__main__":
    main()
