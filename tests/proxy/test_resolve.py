"""ADDRESS becomes places: names resolved, dbus-launch asked, and what cannot be had passed over."""

import logging
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from broker.proxy.connect import TcpPlace
from broker.proxy.resolve import answers, find_places
from broker.wire.address import UnixAddress
from broker.wire.errors import ConfigError

# No label of a name is as long, so nobody is asked for it.
NO_HOST = f"tcp:host={'x' * 64},port=1"
BUS = UnixAddress(b"/run/bus")


def never(_environ: Mapping[str, str]) -> str:
    raise AssertionError("dbus-launch was run")


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


def test_unix_sockets_are_as_they_are() -> None:
    places = find_places("unix:runtime=yes;unix:path=/b", {"XDG_RUNTIME_DIR": "/run"})
    assert places == [BUS, UnixAddress(b"/b")]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_hosts_are_resolved(host: str) -> None:
    (place,) = find_places(f"nonce-tcp:host={host},port=7,family=ipv4,noncefile=/n", {})
    assert place == TcpPlace(socket.AF_INET, ("127.0.0.1", 7), b"/n")


def test_a_name_gives_all_its_places() -> None:
    places = find_places("unix:path=/run/bus;tcp:host=localhost,port=7", {})
    assert places[0] == BUS
    assert TcpPlace(socket.AF_INET, ("127.0.0.1", 7)) in places[1:]


@pytest.mark.parametrize("address", [NO_HOST, "tcp:host=127.0.0.1,port=1,family=ipv6"])
def test_a_host_that_is_not_there_is_passed_over_or_refused(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="cannot be found") as caught:
        find_places(address, {})
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert find_places(f"{address};unix:path=/run/bus", {}) == [BUS]
    assert "cannot be found" in caplog.text


def test_dbus_launch_is_asked_in_its_place() -> None:
    def run_launch(environ: Mapping[str, str]) -> str:
        assert environ == {"DISPLAY": ":1"}
        return "unix:path=/run/bus;tcp:host=127.0.0.1,port=7"

    places = find_places("autolaunch:", {"DISPLAY": ":1"}, run_launch=run_launch)
    assert places == [BUS, TcpPlace(socket.AF_INET, ("127.0.0.1", 7))]
    places = find_places(
        "unix:path=/none;autolaunch:;unix:path=/b", {"DISPLAY": ":1"}, run_launch=run_launch
    )
    assert places[1:3] == [BUS, TcpPlace(socket.AF_INET, ("127.0.0.1", 7))]


def test_no_bus_is_launched_where_one_is(tmp_path: Path, listening: int) -> None:
    address = f"tcp:host=127.0.0.1,port={listening};autolaunch:"
    assert find_places(address, {}, run_launch=never) == [
        TcpPlace(socket.AF_INET, ("127.0.0.1", listening))
    ]
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(0)
        place = UnixAddress(str(path).encode())
        assert find_places(f"unix:path={path};autolaunch:", {}, run_launch=never) == [place]
        sock.accept()[0].close()
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(path))
            assert answers(place)  # though there is no room for more
    assert not answers(place)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("autolaunch:", "autolaunch: again"),
        ("", "empty"),
        ("nonsense", "not a D-Bus address"),
        (NO_HOST, "cannot be found"),
    ],
)
def test_an_answer_of_dbus_launch_that_is_no_use(answer: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        find_places("autolaunch:", {}, run_launch=lambda _environ: answer)


def test_launching_may_fail_where_there_is_another(caplog: pytest.LogCaptureFixture) -> None:
    assert find_places("autolaunch:;unix:path=/run/bus", {}) == [BUS]
    assert "there is no DISPLAY" in caplog.text
