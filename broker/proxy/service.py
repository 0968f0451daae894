"""The process of the proxy: parse the arguments, serve, and clean up.

The process exits with code 0 when the other end of `--fd` closes. After a signal, the process ends
by that same signal. In both cases the sockets are removed first. If the proxy cannot start, the
exit code is 1, with one line on standard error.
"""

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Final

from broker.control_protocol.messages import Listener
from broker.gate.io.loop import READABLE, Loop
from broker.posix.descriptors import raise_descriptor_limit
from broker.proxy.arguments import Ask, Command, Group, check_paths, parse_arguments
from broker.proxy.connect import Place
from broker.proxy.log import Printer
from broker.proxy.resolve import find_places
from broker.proxy.sandbox import ProxyBus, ProxySandbox
from broker.proxy.sockets import bind_socket
from broker.wire.errors import ConfigError
from policy.importers.report import cut

EXIT_OK: Final = 0
EXIT_REFUSED: Final = 1
# The version of xdg-dbus-proxy whose command line and behaviour the proxy has.
LIKE: Final = "0.1.9"
# The most bytes from --args=FD. A launcher writes far less.
MAX_ARGS: Final = 16 * 1024 * 1024
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
USAGE: Final = """\
Usage: {program} [OPTION]... [ADDRESS PATH [OPTION]...]...

Listens at PATH, and forwards to the bus at ADDRESS the messages that the options allow.

Options:
  --help, --version
  --fd=FD                 write a byte to FD when all sockets listen; exit when the other end closes
  --args=FD               read further options from FD, each ended by a NUL

Options behind an ADDRESS and PATH:
  --filter                forward only messages that the options below allow; default: all messages
  --log                   print allowed and denied messages
  --sloppy-names          report the changes of all unique names
  --see=NAME              NAME is visible; NAME.* stands for NAME and all names below
  --talk=NAME             as --see, and NAME accepts messages and sends broadcasts
  --own=NAME              as --talk, and the client may own NAME
  --call=NAME=RULE        calls to NAME; RULE is [INTERFACE.MEMBER][@PATH], with * for any
  --broadcast=NAME=RULE   broadcasts from NAME

Beyond xdg-dbus-proxy, NAME may be a glob with a fixed beginning: org.kde.StatusNotifierItem-*
"""


def run_proxy(arguments: Sequence[str], *, program: str) -> int:
    """Serve until the end. Return the exit code."""
    logging.basicConfig(
        level=os.environ.get("BUSWARDEN_LOG", "WARNING").upper(),
        format="buswarden: %(levelname)s %(message)s",
    )
    try:
        if not arguments:
            raise ConfigError("no ADDRESS and PATH given; see --help")
        command = parse_arguments(arguments, _read_all)
        if isinstance(command, Ask):
            return _answer(command, program)
        number = _serve(command)
    except ConfigError as exc:
        _complain(f"{program}: {exc}")
        return EXIT_REFUSED
    if number is not None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return EXIT_OK


def _answer(ask: Ask, program: str) -> int:
    if ask is Ask.HELP:
        text = USAGE.format(program=program)
    else:
        # The import takes longer than all other imports here, so only --version waits for the
        # import.
        from importlib.metadata import version  # noqa: PLC0415

        text = f"xdg-dbus-proxy {LIKE} (buswarden {version('buswarden')})\n"
    sys.stdout.write(text)
    return EXIT_OK


def _read_all(fd: int) -> bytes:
    data = bytearray()
    try:
        while more := os.read(fd, 65536):
            data += more
            if len(data) > MAX_ARGS:
                raise ConfigError(f"--args={fd}: more than {MAX_ARGS} bytes")
    except OSError as exc:
        raise ConfigError(f"--args={fd}: cannot be read: {exc.strerror}") from exc
    return bytes(data)


def _serve(command: Command) -> int | None:
    """Serve until the end. Return the number of the signal that ended the proxy, if any.

    Raises ConfigError.
    """
    check_paths(command.groups)
    buses = [_find_bus(group) for group in command.groups]
    if command.fd is not None:
        _check_fd(command.fd)
    for group in command.groups:
        for unsaid in group.imported.unsaid:
            _complain(f"buswarden: {unsaid.text}: {unsaid.reason}")
    raise_descriptor_limit()
    loop = Loop()
    ending = _Ending(loop)
    try:
        with contextlib.ExitStack() as stack:
            ending.watch_signals(stack)
            # If standard output was closed at the start, the number 1 may be another descriptor
            # now.
            printer = Printer(None if sys.stdout is None else 1)
            for group, places in zip(command.groups, buses, strict=True):
                sandbox = _open(loop, group, places, printer)
                stack.callback(sandbox.stop, "stopped")
            if command.fd is not None:
                ending.watch_fd(command.fd)
            # The objects that exist now live until the end, so no collection has to visit them.
            # Collection was turned off by the caller.
            gc.freeze()
            gc.enable()
            loop.run()
    finally:
        loop.close()
    return ending.signal


def _find_bus(group: Group) -> list[Place]:
    """Return the places of a group's bus. Raises ConfigError."""
    try:
        return find_places(group.address, os.environ)
    except ConfigError as exc:
        raise ConfigError(f"bus address {cut(group.address)!r}: {exc}") from exc


def _open(loop: Loop, group: Group, places: Sequence[Place], printer: Printer) -> ProxySandbox:
    bound = bind_socket(group.path)
    # A client may share a connection between addresses with the same guid. Each socket is a
    # different server, and so has a different guid.
    listener = Listener(
        bus="bus",
        fd=0,
        path=bound.path,
        device=bound.device,
        inode=bound.inode,
        guid=os.urandom(16).hex(),
    )
    bus = ProxyBus("bus", places, sloppy_names=group.sloppy_names)
    sandbox = ProxySandbox(loop, group, listener, os.geteuid(), bus=bus, printer=printer)
    sandbox.open([bound.sock.detach()])
    return sandbox


class _Ending:
    """The end of the proxy by a signal or by `--fd`."""

    def __init__(self, loop: Loop) -> None:
        self._loop: Final = loop
        self.signal: int | None = None

    def watch_signals(self, stack: contextlib.ExitStack) -> None:
        """Stop the loop at a signal, as long as the stack is open."""
        read_end, write_end = socket.socketpair()
        stack.enter_context(read_end)
        stack.enter_context(write_end)
        for end in (read_end, write_end):
            end.setblocking(False)
        self._loop.add(read_end.fileno(), READABLE, lambda _events: self._loop.stop())
        signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
        stack.callback(signal.set_wakeup_fd, -1)
        for number in SIGNALS:
            # A signal that is ignored from the start, as by nohup, stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note_signal)

    def watch_fd(self, fd: int) -> None:
        """Write the ready byte, and stop the loop when the other end closes."""
        try:
            os.write(fd, b"x")
        except BrokenPipeError:
            pass  # The other end is closed already, which the loop reports at once.
        except OSError as exc:
            _complain(f"buswarden: --fd={fd}: cannot be written: {exc.strerror}")
        with contextlib.suppress(PermissionError):  # A file has no other end.
            # No events are requested, because epoll always reports that the other end is closed.
            self._loop.add(fd, 0, lambda _events: self._loop.stop())

    def _note_signal(self, number: int, _frame: object) -> None:
        self.signal = number


def _complain(line: str) -> None:
    # A launcher may have closed standard error. Then the line is lost.
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{line}\n")


def _check_fd(fd: int) -> None:
    try:
        os.fstat(fd)
    except OSError as exc:
        raise ConfigError(f"--fd={fd}: {exc.strerror}") from exc
