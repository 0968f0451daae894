"""Resolution of ADDRESS to sockets, once at the start, by host names and dbus-launch."""

import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from broker.proxy.autolaunch import launch
from broker.proxy.connect import Place, TcpPlace
from broker.wire.address import (
    Address,
    AutolaunchAddress,
    TcpAddress,
    UnixAddress,
    parse_any_address,
)
from broker.wire.errors import ConfigError

LOGGER: Final = logging.getLogger(__name__)

# For each of the places before `autolaunch:`. dbus-launch runs only if none answers.
PROBE_SECONDS: Final = 2.0
_FAMILIES: Final = {None: socket.AF_UNSPEC, "ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}

Launch = Callable[[Mapping[str, str]], str]


def find_places(
    text: str, environ: Mapping[str, str], *, run_launch: Launch = launch
) -> list[Place]:
    """Return the places to try, in order. Raises ConfigError.

    An alternative that cannot be resolved is skipped, if another alternative can.
    """
    runtime_dir = environ.get("XDG_RUNTIME_DIR")
    places: list[Place] = []
    problems = []
    for address in parse_any_address(text, runtime_dir=runtime_dir):
        try:
            if not isinstance(address, AutolaunchAddress):
                places += _resolve(address)
            elif not any(map(answers, places)):
                # dbus-launch may start a bus. So dbus-launch runs only if no earlier place answers.
                launched = parse_any_address(run_launch(environ), runtime_dir=runtime_dir)
                for one in launched:
                    places += _resolve(one)
        except ConfigError as exc:
            problems.append(str(exc))
    if not places:
        raise ConfigError("; ".join(problems) or "empty D-Bus address")
    for problem in problems:
        LOGGER.warning("bus-address: %s", problem)
    return places


def _resolve(address: Address) -> Iterator[Place]:
    if isinstance(address, AutolaunchAddress):
        raise ConfigError("autolaunch: dbus-launch gave autolaunch: again")
    if isinstance(address, UnixAddress):
        yield address
        return
    yield from resolve(address)


def resolve(address: TcpAddress) -> Iterator[TcpPlace]:
    """Yield all places of a host. Raises ConfigError."""
    try:
        found = socket.getaddrinfo(
            address.host, address.port, _FAMILIES[address.family], socket.SOCK_STREAM
        )
    except socket.gaierror as exc:
        raise ConfigError(f"host {address.host!r} cannot be found: {exc.strerror}") from exc
    except UnicodeError as exc:
        raise ConfigError(f"host {address.host!r} cannot be found: not a host name") from exc
    for family, _, _, _, sockaddr in found:
        yield TcpPlace(family, sockaddr, address.noncefile)


def answers(place: Place) -> bool:
    """Return whether a program listens at `place`. May block for PROBE_SECONDS."""
    family: int = socket.AF_UNIX
    target: bytes | tuple[Any, ...]
    if isinstance(place, UnixAddress):
        target, seconds = place.path, 0.0
    else:
        family, target, seconds = place.family, place.sockaddr, PROBE_SECONDS
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(seconds)
        try:
            sock.connect(target)
        except BlockingIOError:
            return True  # a server with a full backlog
        except OSError:
            return False
    return True
