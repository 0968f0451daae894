import os
import socket
from pathlib import Path

from broker.engines.held_sockets import PIPE, HeldSockets
from broker.supervisor.config import ConfiguredLimits
from broker.supervisor.sandboxes.sockets import bound_socket
from broker.supervisor.sandboxes.specs import is_held, make_again
from policy.rules import NO_ACCESS, AccessList
from tests.helpers.records import make_record

ME = os.geteuid()


def test_what_listens_must_be_held_whole() -> None:
    held = HeldSockets()
    read, write = os.pipe()
    record = make_record(1, sockets={"session": "/a", "system": "/b"}, close_notify=True)
    for bus in ("session", "system", PIPE):
        assert not is_held(record, held)
        held.keep("c1", bus, read)
    assert is_held(record, held)
    assert not is_held(make_record(1, listening=False), held)
    held.close()
    os.close(read)
    os.close(write)


def test_a_sandbox_is_made_again_as_it_was(tmp_path: Path) -> None:
    held = HeldSockets()
    access = AccessList(receive_from_host=False)
    with bound_socket(tmp_path, ME) as bound, socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(tmp_path.parent / f"theirs-{os.getpid()}"))
        held.keep("c1", "session", bound.fd)
        held.keep("c1", "system", theirs.fileno())
        held.keep("c1", PIPE, theirs.fileno())
        record = make_record(
            1,
            sockets={"session": bound.path, "system": theirs.getsockname()},
            addresses={"session": bound.address, "system": "unix:path=/x,guid=0a"},
            close_notify=True,
        )
        spec, fds = make_again(record, access, held, ConfiguredLimits(), tmp_path)
        mine, other = spec.listeners
        assert (mine.path, mine.device, mine.inode) == (bound.path, bound.device, bound.inode)
        assert (mine.guid, other.guid) == (bound.guid, "0a")
        assert other.path == ""  # not ours to unlink
        assert spec.close_notify == 2
        assert spec.access == access
        assert os.fstat(fds[0]).st_ino == os.fstat(bound.fd).st_ino
        Path(bound.path).unlink()
        ((mine, _),) = [
            make_again(record, NO_ACCESS, held, ConfiguredLimits(), tmp_path)[0].listeners
        ]
        assert mine.path == ""  # somebody took it away
        Path(theirs.getsockname()).unlink()
    held.close()


def test_an_abstract_name_is_nobodys_to_unlink(tmp_path: Path) -> None:
    held = HeldSockets()
    with socket.socket(socket.AF_UNIX) as sock:
        held.keep("c1", "session", sock.fileno())
    record = make_record(1, sockets={"session": "\0here"})
    ((listener,), _) = (
        make_again(record, NO_ACCESS, held, ConfiguredLimits(), tmp_path)[0].listeners,
        0,
    )
    assert listener.path == ""
    held.close()
