"""A real dbus-daemon that listens on TCP as well, and a client that can authenticate there.

All of it is on 127.0.0.1, at a port that the kernel chooses. The host's own connections go by the unix socket of
the same bus.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from broker.proxy.keyring import read_cookie
from broker.wire.sasl_steps import MultiMechanismSaslClient
from integration.harness.buses import DAEMON, Bus
from integration.harness.processes import running
from integration.harness.proxies import SECOND, PatientClient, World
from integration.harness.rawclient import RawClient
from integration.harness.service import ECHO, running_service

COOKIE: Final = "DBUS_COOKIE_SHA1"
ANONYMOUS: Final = "ANONYMOUS"

_CONFIG: Final = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={folder}/bus</listen>
  <listen>{transport}:host=127.0.0.1,port=0</listen>
  <auth>EXTERNAL</auth>
  <auth>{auth}</auth>
  {anonymous}
  <policy context="default">
    <allow user="*"/>
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
</busconfig>
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpWorld:
    """A bus with two services on it, and where it listens on TCP."""

    world: World
    address: str
    auth: str

    @property
    def home(self) -> Path:
        """The home folder of the bus: it writes its cookies there."""
        return self.world.folder

    @property
    def env(self) -> dict[str, str]:
        """The environment of a proxy that can read the cookies."""
        return {"HOME": str(self.home)}

    @property
    def port(self) -> int:
        return int(self.address.partition("port=")[2].partition(",")[0])


class SteppingClient(PatientClient):
    """A client that can do without EXTERNAL: through the C program it is the client that is asked for the cookie."""

    home = Path("/nonexistent")
    asks_for_fds = False  # and wants to be told that there are none

    def _authenticate(self, uid: int) -> None:
        keyrings = self.home / ".dbus-keyrings"
        client = MultiMechanismSaslClient(
            uid,
            os.urandom(16),
            lambda context, cookie_id: read_cookie(keyrings, uid, context, cookie_id),
        )
        self.send_raw(client.start())  # sets the timeout, too
        while True:
            data = self.sock.recv(4096)
            if not data:
                raise EOFError("closed during authentication")
            answer = client.feed(data)
            if client.done:
                break
            self.sock.sendall(answer)
        if self.asks_for_fds:
            self._say(b"NEGOTIATE_UNIX_FD", b"ERROR")
        self.sock.sendall(answer)
        self._buffer += client.leftover


def connect(path: Path, home: Path, *, asks_for_fds: bool = False) -> SteppingClient:
    """Return a client of a proxy, which has the cookies of that home folder."""

    class HomeClient(SteppingClient):
        pass

    HomeClient.home, HomeClient.asks_for_fds = home, asks_for_fds
    return HomeClient.connect(f"unix:path={path}")


@contextmanager
def open_tcp_world(folder: Path, transport: str, auth: str) -> Iterator[TcpWorld]:
    """Run dbus-daemon with that transport and mechanism."""
    config = folder / "bus.conf"
    anonymous = "<allow_anonymous/>" if auth == ANONYMOUS else ""
    config.write_text(
        _CONFIG.format(
            folder=escape(str(folder)), transport=transport, auth=auth, anonymous=anonymous
        )
    )
    argv = [DAEMON, f"--config-file={config}", "--nofork", "--nopidfile", "--print-address=1"]
    # It puts its cookies into HOME, and its nonce into TMPDIR.
    env = {"HOME": str(folder), "TMPDIR": str(folder), "XDG_RUNTIME_DIR": str(folder)}
    with running(argv, env=env, log=folder / "bus.log") as process:
        found = {one.partition(":")[0]: one for one in process.read_line().split(";")}
        bus = Bus(kind=DAEMON, address=found["unix"], pid=process.pid)
        with (
            running_service(bus.address, ECHO),
            running_service(bus.address, SECOND),
            RawClient.connect(bus.address) as host,
        ):
            world = World(bus=bus, folder=folder, host=host)
            yield TcpWorld(world=world, address=found[transport], auth=auth)


def closed_port() -> int:
    """Return a port of 127.0.0.1 at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    assert isinstance(port, int)
    return port
