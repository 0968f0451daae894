"""The filter of system calls, run by a small machine for classic BPF."""

import errno
import struct

import pytest

from broker.launcher.seccomp import keyctl_number, make_filter
from broker.wire.errors import ConfigError

X86_64, I386, AARCH64, ARM, RISCV64 = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028, 0xC00000F3
ALLOWED = 0
MACHINES = ("x86_64", "aarch64", "riscv64")


def judge(machine: str, arch: int, number: int, *arguments: int) -> int:
    """Return the errno that the call gets, 0 if it is let through."""
    words = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("<IIQ6Q", number, arch, 0, *(word & (1 << 64) - 1 for word in words))
    program = list(struct.iter_unpack("=HBBI", make_filter(machine)))
    value, at = 0, 0
    while True:
        code, if_true, if_false, operand = program[at]
        at += 1
        if code == 0x20:
            value = int.from_bytes(data[operand : operand + 4], "little")
        elif code == 0x15:
            at += if_true if value == operand else if_false
        elif code == 0x35:
            at += if_true if value >= operand else if_false
        else:
            assert code == 0x06
            return operand & 0xFFFF if operand != 0x7FFF0000 else ALLOWED


@pytest.mark.parametrize(
    ("machine", "arch", "number"),
    [
        pytest.param("x86_64", X86_64, 250, id="keyctl"),
        pytest.param("x86_64", X86_64, 248, id="add_key"),
        pytest.param("x86_64", X86_64, 249, id="request_key"),
        pytest.param("x86_64", X86_64, 304, id="open_by_handle_at"),
        pytest.param("x86_64", X86_64, 438, id="pidfd_getfd"),
        pytest.param("x86_64", I386, 288, id="keyctl-32"),
        pytest.param("aarch64", AARCH64, 219, id="keyctl-arm64"),
        pytest.param("aarch64", ARM, 311, id="keyctl-arm"),
        pytest.param("riscv64", RISCV64, 219, id="keyctl-riscv"),
    ],
)
def test_refused_always(machine: str, arch: int, number: int) -> None:
    assert judge(machine, arch, number, 7) == errno.EPERM


@pytest.mark.parametrize(
    ("arch", "number", "position"),
    [
        pytest.param(X86_64, 101, 1, id="ptrace"),
        pytest.param(X86_64, 310, 0, id="process_vm_readv"),
        pytest.param(X86_64, 311, 0, id="process_vm_writev"),
        pytest.param(X86_64, 312, 0, id="kcmp"),
        pytest.param(X86_64, 312, 1, id="kcmp-second"),
        pytest.param(X86_64, 434, 0, id="pidfd_open"),
        pytest.param(X86_64, 302, 0, id="prlimit64"),
        pytest.param(I386, 26, 1, id="ptrace-32"),
    ],
)
def test_refused_for_the_first_process_alone(arch: int, number: int, position: int) -> None:
    def call(pid: int) -> int:
        arguments = [7, 7]
        arguments[position] = pid
        return judge("x86_64", arch, number, *arguments)

    assert call(1) == errno.EPERM
    assert call((5 << 32) | 1) == errno.EPERM
    assert {call(0), call(2), call(257)} == {ALLOWED}


def test_numbers_of_another_architecture_are_none() -> None:
    assert judge("x86_64", AARCH64, 0) == errno.ENOSYS
    assert judge("x86_64", X86_64, 0x40000000 | 521) == errno.ENOSYS
    assert judge("riscv64", X86_64, 0) == errno.ENOSYS


@pytest.mark.parametrize("machine", MACHINES)
def test_all_else_is_let_through(machine: str) -> None:
    arch = {"x86_64": X86_64, "aarch64": AARCH64, "riscv64": RISCV64}[machine]
    refused = {number for number in range(500) if judge(machine, arch, number) != ALLOWED}
    assert len(refused) == 5
    assert keyctl_number(machine) in refused


def test_a_machine_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="vax"):
        make_filter("vax")
