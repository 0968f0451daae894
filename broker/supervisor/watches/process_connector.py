"""The kernel's process connector: a netlink socket that reports exits.

Root may use the connector, and since Linux 6.6 every user. The pids are those of the first pid namespace. So in a
container the connector is refused, silent, or names other pids. The test is a thread of this process that ends: the connector
is used only if that exit is named under this process's own pid.
"""

import ctypes
import errno
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Final

LOGGER: Final = logging.getLogger(__name__)
TEST_TIMEOUT: Final = 1.0  # seconds, from the end of the thread to the connector's event
# Bytes of queued exits: some ten thousand, more than usually end in a second.
BUFFER: Final = 4 * 1024 * 1024
READS_A_TURN: Final = 256
_ONE: Final = 4096  # a message has 76 bytes
_SO_ATTACH_FILTER: Final = 26
_SO_RCVBUFFORCE: Final = 33
_LISTEN, _IGNORE = 1, 2
_EXIT: Final = 0x80000000
_CN_PROC: Final = (1, 1)  # CN_IDX_PROC, CN_VAL_PROC
_NLMSGHDR: Final = struct.Struct("=IHHII")
# After it: idx, val, seq, ack, len and flags; what happened, cpu, time, pid and thread group.
_EVENT: Final = struct.Struct("=IIIIHHIIQII")
_REQUEST: Final = struct.Struct("=IHHIIIIIIHHI")
_NLMSG_DONE: Final = 3


class ProcessConnector:
    """A subscription to exits, which owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock: Final = sock

    def fileno(self) -> int:
        """Return the descriptor that becomes readable."""
        return self._sock.fileno()

    def read(self) -> set[int] | None:
        """Return the pids of processes with an ended thread; None after dropped events."""
        found: set[int] = set()
        count, dropped = 0, False
        # After a first dropped event the kernel drops all others without an error, until the queue is read.
        while dropped or count < READS_A_TURN:
            count += 1
            try:
                data, (sender, _groups) = self._sock.recvfrom(_ONE)
            except BlockingIOError:
                break
            except OSError as exc:
                if exc.errno != errno.ENOBUFS:
                    LOGGER.warning("process-connector: %s", exc.strerror)
                    return None
                dropped = True
                continue
            if sender == 0:  # the kernel, for other processes may write to this socket, too
                found.update(parse_exits(data))
        return None if dropped else found

    def close(self) -> None:
        """Unsubscribe and close the socket.

        Older kernels count listeners, and do not notice a closed socket.
        """
        size = _REQUEST.size
        request = _REQUEST.pack(size, _NLMSG_DONE, 0, 0, 0, *_CN_PROC, 0, 0, 4, 0, _IGNORE)
        try:
            self._sock.send(request)
        except OSError as exc:
            LOGGER.debug("process-connector: %s", exc.strerror)
        self._sock.close()


def parse_exits(data: bytes) -> Iterator[int]:
    """Yield the thread group of each exit in a datagram."""
    at = 0
    while len(data) - at >= _NLMSGHDR.size + _EVENT.size:
        length = _NLMSGHDR.unpack_from(data, at)[0]
        idx, val, _, _, _, _, what, _, _, _, tgid = _EVENT.unpack_from(data, at + _NLMSGHDR.size)
        if (idx, val) == _CN_PROC and what == _EXIT:
            yield tgid
        if length < _NLMSGHDR.size:
            return
        at += (length + 3) & ~3


def open_connector() -> ProcessConnector | None:
    """Subscribe, or return None if that is refused or of no use here.

    Call from a thread, because the test takes some tenths of a second.
    """
    sock = _subscribe()
    if sock is None:
        return None
    connector = ProcessConnector(sock)
    if not _knows_us(connector):
        connector.close()
        LOGGER.info("process-connector: the kernel names other pids: watching by pidfds")
        return None
    return connector


def _subscribe() -> socket.socket | None:
    # Imported only here, because pyroute2 takes more memory than all modules of the supervisor together.
    try:
        from pyroute2.netlink import NLMSG_DONE  # noqa: PLC0415
        from pyroute2.netlink.connector.cn_proc import (  # noqa: PLC0415
            ProcEventSocket,
            proc_event_control,
        )
        from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415
    except ImportError as exc:
        LOGGER.info("process-connector: %s: watching by pidfds", exc)
        return None
    try:
        theirs = ProcEventSocket()
        try:
            theirs.bind()
            # Not by the method `control`, which waits for an answer that never comes in a container.
            request = proc_event_control()
            request["action"], request["len"] = _LISTEN, 4
            request["idx"], request["val"] = _CN_PROC
            theirs.put(request, NLMSG_DONE, msg_flags=0, msg_seq=0)
            # Only the socket is kept, because pyroute2 puts an event loop around the socket.
            sock = socket.socket(fileno=os.dup(theirs.fileno()))
        finally:
            theirs.close()
    except (OSError, NetlinkError) as exc:
        LOGGER.info("process-connector: %s: watching by pidfds", exc)
        return None
    sock.setblocking(False)
    _tune(sock)
    return sock


def _tune(sock: socket.socket) -> None:
    """Let the kernel queue only exits, and room for many."""
    program = b"".join(
        struct.pack("=HBBI", *line)
        for line in (
            (0x20, 0, 0, 36),  # load `what`, in network order
            (0x15, 0, 1, socket.htonl(_EXIT)),  # an exit?
            (0x06, 0, 0, 0xFFFFFFFF),  # take the whole message
            (0x06, 0, 0, 0),  # drop the message
        )
    )
    held = ctypes.create_string_buffer(program)
    try:
        pointer = struct.pack("HP", 4, ctypes.addressof(held))
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, pointer)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER)
    except OSError as exc:  # the connector works without, only slower
        LOGGER.debug("process-connector: %s", exc.strerror)


def _knows_us(connector: ProcessConnector) -> bool:
    """Return whether the connector reports the end of a thread of this process."""
    thread = threading.Thread(target=_do_nothing)
    thread.start()
    thread.join()
    poll = select.poll()
    poll.register(connector.fileno(), select.POLLIN)
    deadline = time.monotonic() + TEST_TIMEOUT
    while (left := deadline - time.monotonic()) > 0:
        poll.poll(left * 1000)
        if os.getpid() in (connector.read() or ()):
            return True
    return False


def _do_nothing() -> None:
    """Return at once, as the body of a thread that ends."""
