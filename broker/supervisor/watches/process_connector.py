"""The kernel's process connector: one netlink socket that tells of every process of the machine that ends.

It is for root, or so since Linux 6.6 for everybody, and counts pids as the first pid namespace does: in a container it
is refused, says nothing, or names other pids than ours. So a thread of our own ends first, and only who is told of
that under our own pid uses it.
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
TEST_TIMEOUT: Final = 1.0  # seconds, from the end of our thread to the word of it
# Exits that can wait: some ten thousand, which is more than a pid namespace usually starts in a second.
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
    """A subscription. Owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock: Final = sock

    def fileno(self) -> int:
        """Return what becomes readable."""
        return self._sock.fileno()

    def read(self) -> set[int] | None:
        """Return the pids of processes of which a thread ended; None if the kernel dropped some."""
        found: set[int] = set()
        count, dropped = 0, False
        # Once it has dropped one the kernel drops all, and says nothing more of it, until we have read the rest.
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
            if sender == 0:  # the kernel; other processes may write to us, too
                found.update(parse_exits(data))
        return None if dropped else found

    def close(self) -> None:
        """Tell the kernel that nobody listens: older ones count, and do not look whether we are there."""
        size = _REQUEST.size
        request = _REQUEST.pack(size, _NLMSG_DONE, 0, 0, 0, *_CN_PROC, 0, 0, 4, 0, _IGNORE)
        try:
            self._sock.send(request)
        except OSError as exc:
            LOGGER.debug("process-connector: %s", exc.strerror)
        self._sock.close()


def parse_exits(data: bytes) -> Iterator[int]:
    """Give the thread group of each exit in a datagram."""
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
    """Subscribe, if it is permitted and works here. It takes some tenths of a second: for a thread."""
    sock = _subscribe()
    if sock is None:
        return None
    connector = ProcessConnector(sock)
    if not _knows_us(connector):
        connector.close()
        LOGGER.info("process-connector: it does not know our pids: watching by pidfds")
        return None
    return connector


def _subscribe() -> socket.socket | None:
    # Imported by who needs it: it takes more memory than the rest of the supervisor's own modules together.
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
            # Not by its `control`, which waits for an answer that a container never gets.
            request = proc_event_control()
            request["action"], request["len"] = _LISTEN, 4
            request["idx"], request["val"] = _CN_PROC
            theirs.put(request, NLMSG_DONE, msg_flags=0, msg_seq=0)
            # Its socket is all that we keep: it has an event loop of its own around it.
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
    """Have exits only, and room for many."""
    program = b"".join(
        struct.pack("=HBBI", *line)
        for line in (
            (0x20, 0, 0, 36),  # load `what`, in network order
            (0x15, 0, 1, socket.htonl(_EXIT)),  # an exit?
            (0x06, 0, 0, 0xFFFFFFFF),  # take it whole
            (0x06, 0, 0, 0),  # drop it
        )
    )
    held = ctypes.create_string_buffer(program)
    try:
        pointer = struct.pack("HP", 4, ctypes.addressof(held))
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, pointer)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER)
    except OSError as exc:  # it works without, only slower
        LOGGER.debug("process-connector: %s", exc.strerror)


def _knows_us(connector: ProcessConnector) -> bool:
    """End a thread of our own, and say whether we are told so under our pid."""
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
    """A thread of ours that ends."""
