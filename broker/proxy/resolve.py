"""Where the bus of a group is: ADDRESS with all put in that has to be asked for once, at the start."""

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

# For each of the places before `autolaunch:`, to see whether it has to be run.
PROBE_SECONDS: Final = 2.0
_FAMILIES: Final = {None: socket.AF_UNSPEC, "ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}

Launch = Callable[[Mapping[str, str]], str]


def find_places(
    text: str, environ: Mapping[str, str], *, run_launch: Launch = launch
) -> list[Place]:
    """Return the places to try, in order. Raises ConfigError.

    An alternative that cannot be found out is passed over as long as there is another.
    """
    runtime_dir = environ.get("XDG_RUNTIME_DIR")
    places: list[Place] = []
    problems = []
    for address in parse_any_address(text, runtime_dir=runtime_dir):
        try:
            if not isinstance(address, AutolaunchAddress):
                places += _resolve(address)
            elif not any(map(answers, places)):
                # It starts a bus where there is none: not if somebody else is there.
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
    """Return all places of a host. Raises ConfigError."""
    try:
        found = socket.getaddrinfo(
            address.host, address.port, _FAMILIES[address.family], socket.SOCK_STREAM
        )
    except socket.gaierror as exc:
        raise ConfigError(f"host {address.host!r} cannot be found: {exc.strerror}") from exc
    except UnicodeError as exc:
        raise ConfigError(f"host {address.host!r} cannot be found: not a name") from exc
    for family, _, _, _, sockaddr in found:
        yield TcpPlace(family, sockaddr, address.noncefile)


def answers(place: Place) -> bool:
    """Return whether somebody listens there. May wait for PROBE_SECONDS."""
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
            return True  # and has more to do than it takes at once
        except OSError:
            return False
    return True
