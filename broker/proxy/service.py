"""The proxy's process: reads its arguments, serves, and leaves nothing behind.

It ends with code 0 when the other end of `--fd` closes, and by the signal itself when one tells it to, in both
cases after its sockets are removed. Exit code 1, with one line on standard error: it could not start.
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
# The version whose command line and ways these are.
LIKE: Final = "0.1.9"
# What --args=FD may give, in bytes: far more than a launcher writes.
MAX_ARGS: Final = 16 * 1024 * 1024
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
USAGE: Final = """\
Usage: {program} [OPTION]... [ADDRESS PATH [OPTION]...]...

Listens at PATH and passes to the bus at ADDRESS what the options behind it allow.

Options:
  --help, --version
  --fd=FD                 write a byte to FD when all sockets listen; end when its other end closes
  --args=FD               read further options from FD, each ended by a NUL

Options of the ADDRESS and PATH before them:
  --filter                let through what the options below allow; without it everything passes
  --log                   print what passes and what is refused
  --sloppy-names          tell of all unique names that come and go
  --see=NAME              NAME may be seen; NAME.* is NAME and all names below it
  --talk=NAME             and may be talked to, and its broadcasts come in
  --own=NAME              and may be owned
  --call=NAME=RULE        calls to NAME; RULE is [INTERFACE.MEMBER][@PATH], with * for any
  --broadcast=NAME=RULE   broadcasts from NAME
"""


def run_proxy(arguments: Sequence[str], *, program: str) -> int:
    """Serve until told to end. Returns the exit code."""
    logging.basicConfig(
        level=os.environ.get("BUSWARDEN_LOG", "WARNING").upper(),
        format="buswarden: %(levelname)s %(message)s",
    )
    try:
        if not arguments:
            raise ConfigError("no ADDRESS and PATH: nothing to do; see --help")
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
        # Not for those who only run it: it takes longer to import than all else here.
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
    """Serve until the end; return the number of the signal that told us to. Raises ConfigError."""
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
            # Where it was closed before, its number is that of something else by now.
            printer = Printer(None if sys.stdout is None else 1)
            for group, places in zip(command.groups, buses, strict=True):
                sandbox = _open(loop, group, places, printer)
                stack.callback(sandbox.stop, "stopped")
            if command.fd is not None:
                ending.watch_fd(command.fd)
            # What exists now stays for good: no collection need walk over it. It was off until now.
            gc.freeze()
            gc.enable()
            loop.run()
    finally:
        loop.close()
    return ending.signal


def _find_bus(group: Group) -> list[Place]:
    """Return where the bus is, with all that has to be asked for put in. Raises ConfigError."""
    try:
        return find_places(group.address, os.environ)
    except ConfigError as exc:
        raise ConfigError(f"bus address {cut(group.address)!r}: {exc}") from exc


def _open(loop: Loop, group: Group, places: Sequence[Place], printer: Printer) -> ProxySandbox:
    bound = bind_socket(group.path)
    # Clients share connections to servers of one guid: each socket is another server.
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
    """What ends the proxy."""

    def __init__(self, loop: Loop) -> None:
        self._loop: Final = loop
        self.signal: int | None = None

    def watch_signals(self, stack: contextlib.ExitStack) -> None:
        """End in order at a signal, as long as the stack is open."""
        ours, pythons = socket.socketpair()
        stack.enter_context(ours)
        stack.enter_context(pythons)
        for end in (ours, pythons):
            end.setblocking(False)
        self._loop.add(ours.fileno(), READABLE, lambda _events: self._loop.stop())
        signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
        stack.callback(signal.set_wakeup_fd, -1)
        for number in SIGNALS:
            # One that was ignored before us, as by nohup, is meant to be.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._told)

    def watch_fd(self, fd: int) -> None:
        """Say that we are ready, and end when the other end closes."""
        try:
            os.write(fd, b"x")
        except BrokenPipeError:
            pass  # closed already: we shall hear of it at once
        except OSError as exc:
            _complain(f"buswarden: --fd={fd}: cannot be written: {exc.strerror}")
        with contextlib.suppress(PermissionError):  # a file: it has no other end
            # No event is asked for: that the other end is gone is told in any case.
            self._loop.add(fd, 0, lambda _events: self._loop.stop())

    def _told(self, number: int, _frame: object) -> None:
        self.signal = number


def _complain(line: str) -> None:
    # A launcher may have closed it, and then there is nobody to tell.
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{line}\n")


def _check_fd(fd: int) -> None:
    try:
        os.fstat(fd)
    except OSError as exc:
        raise ConfigError(f"--fd={fd}: {exc.strerror}") from exc
