"""Assembles system-call filters: rules in, a BPF program out.

Pure: it knows how a filter is written, not what it should say (`calls`) nor how it is installed (`seccomp`).

Source: Linux Documentation/userspace-api/seccomp_filter.rst, seccomp(2), bpf_common.h, audit.h.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

# What a filter may answer.
KILL_PROCESS: Final = 0x8000_0000
ALLOW: Final = 0x7FFF_0000
_ERRNO: Final = 0x0005_0000
REFUSED: Final = _ERRNO | errno.EPERM
UNKNOWN: Final = _ERRNO | errno.ENOSYS
PRETENDED: Final = _ERRNO  # the caller is told of a success, and nothing is done

AUDIT_ARCH_X86_64: Final = 0xC000_003E
# One past the newest call that the tables were checked against (469, file_setattr, Linux 6.17). Above lie
# calls that nobody has judged yet, and from 0x40000000 on the x32 twins of all the others; both get the
# answer of an older kernel, for which every libc has a fallback.
FIRST_UNKNOWN_NUMBER: Final = 470

# Classic BPF, and where struct seccomp_data holds what it looks at. An argument's low word comes first, and
# is all that the kernel reads of the pids, commands and clone flags tested here.
_LOAD_WORD: Final = 0x20
_AND: Final = 0x54
_JUMP_IF_EQUAL: Final = 0x15
_JUMP_IF_AT_LEAST: Final = 0x35
_RETURN: Final = 0x06
_NUMBER_OFFSET: Final = 0
_ARCH_OFFSET: Final = 4
_ARGUMENTS_OFFSET: Final = 16
_ARGUMENT_SIZE: Final = 8
INSTRUCTION: Final = struct.Struct("=HBBI")
_RUN_LENGTH: Final = 8  # rules; about the root of their number makes the shortest way through
MAX_INSTRUCTION_COUNT: Final = 4096  # BPF_MAXINSNS; longer programs are refused by the kernel

_WORD: Final = struct.Struct("=I")
_MAX_PID: Final = 1 << 22  # PID_MAX_LIMIT of a 64-bit kernel
# Stands in a rule for the id of the process to be confined; never itself an id, a number or a verdict.
OWN_PID: Final = 0x7FFF_FFFE
_ALL_BITS: Final = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Condition:
    """Holds when the low 32 bits of an argument, masked, are one of a few values."""

    argument: int
    values: tuple[int, ...]
    mask: int = _ALL_BITS


@dataclass(frozen=True, slots=True)
class Rule:
    """What a filter answers to one system call: `met` where the condition holds, else `verdict`."""

    name: str
    number: int
    verdict: int = REFUSED
    condition: Condition | None = None
    met: int = ALLOW


def assemble(rules: Iterable[Rule], *, otherwise: int) -> bytes:
    """Assemble a filter program from rules.

    A call whose answer does not hang on its arguments is decided on architecture and number alone; that lets
    the kernel (5.11 and later) remember the verdict, and allowed calls then do not run the filter at all. To
    that end it walks the program for every call there is as it installs it: 140 us with the rules in one long
    chain, 60 us with runs of them that higher numbers skip.

    Args:
        rules: at most one for each system call.
        otherwise: the answer to calls that no rule names.

    Returns:
        The BPF program, 8 bytes an instruction.
    """
    in_order = sorted(rules, key=lambda rule: rule.number)
    starts = range(0, len(in_order), _RUN_LENGTH)
    runs = b"".join(_run(in_order[start : start + _RUN_LENGTH], otherwise) for start in starts)
    program = _prologue() + runs + _instruction(_RETURN, otherwise)
    count = len(program) // INSTRUCTION.size
    assert count <= MAX_INSTRUCTION_COUNT, f"{count} instructions, limit {MAX_INSTRUCTION_COUNT}"
    return program


def _prologue() -> bytes:
    """Turn away foreign architectures and unknown numbers; leave the number loaded for what follows."""
    return b"".join(
        (
            _instruction(_LOAD_WORD, _ARCH_OFFSET),
            # A 64-bit process may still use int 0x80, where the same numbers mean other calls.
            _instruction(_JUMP_IF_EQUAL, AUDIT_ARCH_X86_64, if_so=1),
            _instruction(_RETURN, KILL_PROCESS),
            _instruction(_LOAD_WORD, _NUMBER_OFFSET),
            _instruction(_JUMP_IF_AT_LEAST, FIRST_UNKNOWN_NUMBER, if_not=1),
            _instruction(_RETURN, UNKNOWN),
        )
    )


def _run(rules: Sequence[Rule], otherwise: int) -> bytes:
    """Assemble some rules in order of their numbers, behind a jump over all of them."""
    body = b"".join(_block(rule) for rule in rules) + _instruction(_RETURN, otherwise)
    size = len(body) // INSTRUCTION.size
    return _instruction(_JUMP_IF_AT_LEAST, rules[-1].number + 1, if_so=size) + body


def _block(rule: Rule) -> bytes:
    """Assemble one rule: skipped as a whole by any other call, else it always returns."""
    body = _instruction(_RETURN, rule.verdict)
    if rule.condition is not None:
        body = _test(rule.condition) + body + _instruction(_RETURN, rule.met)
    size = len(body) // INSTRUCTION.size
    return _instruction(_JUMP_IF_EQUAL, rule.number, if_not=size) + body


def _test(condition: Condition) -> bytes:
    """Assemble a condition: falls through where it does not hold, else skips one more instruction."""
    load = _instruction(_LOAD_WORD, _ARGUMENTS_OFFSET + _ARGUMENT_SIZE * condition.argument)
    mask = b"" if condition.mask == _ALL_BITS else _instruction(_AND, condition.mask)
    left = range(len(condition.values) - 1, -1, -1)
    compare = (
        _instruction(_JUMP_IF_EQUAL, value, if_so=still + 1)
        for value, still in zip(condition.values, left, strict=True)
    )
    return load + mask + b"".join(compare)


def _instruction(code: int, operand: int, *, if_so: int = 0, if_not: int = 0) -> bytes:
    """Encode one instruction; a jump skips `if_so` or `if_not` of those behind it (at most 255)."""
    return INSTRUCTION.pack(code, if_so, if_not, operand)


class Template:
    """A filter without the id of the process that it is for.

    Assembled in the zygote, and cut where the id belongs: a process just forked pays for each page that it touches, and
    would spend 0.2 ms on the same work.

    Args:
        rules: at most one for each system call; OWN_PID stands in them for the process itself.
        otherwise: the answer to calls that no rule names.
    """

    def __init__(self, rules: Sequence[Rule], *, otherwise: int) -> None:
        self.rules = rules
        self.otherwise = otherwise
        self._pieces = assemble(rules, otherwise=otherwise).split(_WORD.pack(OWN_PID))

    def program(self, own_pid: int) -> bytes:
        """Return the filter for a process.

        Args:
            own_pid: the process that will be confined, as it sees itself; it may signal itself.

        Returns:
            The BPF program, 8 bytes an instruction, x86-64 only: any other architecture's calls kill the process.

        Raises:
            ValueError: own_pid is not the id of a process; 0 and the negative ones would name groups.
        """
        if not 0 < own_pid <= _MAX_PID:
            raise ValueError(f"own_pid is {own_pid}, a process id lies between 1 and {_MAX_PID}")
        return _WORD.pack(own_pid).join(self._pieces)
