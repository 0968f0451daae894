"""The system call filter for a sandboxed command, as a classic BPF program. Pure.

The filter keeps two things from the command. The first are keyrings, because the kernel finds keys
by number and user, not by namespace. The second is the sandbox's first process, pid 1: no system
call that takes a pid may open, read or trace that process.

A process descriptor can be had in ways that no filter sees (a file handle of pidfs). So taking
another process's descriptors (pidfd_getfd) and opening by handle are refused for every process.
"""

import errno
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from broker.wire.errors import ConfigError

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16  # in struct seccomp_data
_X32: Final = 0x40000000
_REFUSED: Final = ("add_key", "request_key", "keyctl", "open_by_handle_at", "pidfd_getfd")
# The positions of the arguments that are pids.
_PIDS: Final[Mapping[str, tuple[int, ...]]] = {
    "ptrace": (1,),
    "process_vm_readv": (0,),
    "process_vm_writev": (0,),
    "kcmp": (0, 1),
    "pidfd_open": (0,),
    "prlimit64": (0,),
}
_ORDER: Final = (*_REFUSED, *_PIDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Calls:
    """System call numbers on an architecture, in the order of _ORDER."""

    arch: int  # AUDIT_ARCH_*
    numbers: tuple[int, ...]

    def number(self, name: str) -> int:
        return self.numbers[_ORDER.index(name)]


_X86_64: Final = _Calls(
    arch=0xC000003E, numbers=(248, 249, 250, 304, 438, 101, 310, 311, 312, 434, 302)
)
_I386: Final = _Calls(
    arch=0x40000003, numbers=(286, 287, 288, 342, 438, 26, 347, 348, 349, 434, 340)
)
_ARM: Final = _Calls(
    arch=0x40000028, numbers=(309, 310, 311, 371, 438, 26, 376, 377, 378, 434, 369)
)
_GENERIC: Final = (217, 218, 219, 265, 438, 117, 270, 271, 272, 434, 261)
_AARCH64: Final = _Calls(arch=0xC00000B7, numbers=_GENERIC)
_RISCV64: Final = _Calls(arch=0xC00000F3, numbers=_GENERIC)
# os.uname().machine -> the numbers that the machine's kernel accepts; the native numbers first.
_MACHINES: Final[Mapping[str, tuple[_Calls, ...]]] = {
    "x86_64": (_X86_64, _I386),
    "aarch64": (_AARCH64, _ARM),
    "riscv64": (_RISCV64,),
}


def make_filter(machine: str) -> bytes:
    """Return the filter program for a machine.

    Raises ConfigError for a machine not in the table.
    """
    program = [_step(_LOAD, _ARCH_AT)]
    for calls in _calls_of(machine):
        block = list(_block(calls))
        program += [_step(_EQUAL, calls.arch, 0, len(block)), *block]
    # On an architecture outside the table, a number could mean any call.
    program.append(_refuse(errno.ENOSYS))
    return b"".join(program)


def keyctl_number(machine: str) -> int:
    """Return the number of keyctl(2) in a machine's native numbering. Raises ConfigError."""
    return _calls_of(machine)[0].number("keyctl")


def _calls_of(machine: str) -> tuple[_Calls, ...]:
    if machine not in _MACHINES:
        raise ConfigError(f"the system calls of {machine[:40]} are not known: exec cannot run here")
    return _MACHINES[machine]


def _block(calls: _Calls) -> Iterator[bytes]:
    yield _step(_LOAD, _NUMBER_AT)
    if calls is _X86_64:
        yield from (_step(_AT_LEAST, _X32, 0, 1), _refuse(errno.ENOSYS))
    for name in _REFUSED:
        yield from (_step(_EQUAL, calls.number(name), 0, 1), _refuse(errno.EPERM))
    for name, arguments in _PIDS.items():
        checks = [step for argument in arguments for step in _refuse_init(argument)]
        checks.append(_step(_RETURN, _ALLOW))
        yield from (_step(_EQUAL, calls.number(name), 0, len(checks)), *checks)
    yield _step(_RETURN, _ALLOW)


def _refuse_init(argument: int) -> tuple[bytes, ...]:
    # The kernel takes a pid as 32 bits, so the lower half is compared (little-endian machines).
    return (
        _step(_LOAD, _ARGUMENTS_AT + 8 * argument),
        _step(_EQUAL, 1, 0, 1),
        _refuse(errno.EPERM),
    )


def _refuse(error: int) -> bytes:
    return _step(_RETURN, _ERRNO | error)


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
