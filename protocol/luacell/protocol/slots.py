"""The layout of slots: where a call's bytes and its control words lie in a pair of segments.

    args segment, slot i at i * args_stride          out segment, slot i at i * out_stride
      0  generation  u64   written by the host         0  begun       u64   written by the worker
     64  withdrawn   u64   written by the broker       8  done        u64
    128  payload: arguments                           16  code, out_size, error_size, flags   4 x u32
                                                      32  cpu_us      u64   of the worker, when it began
                                                     128  payload: results, or the error's text

Each 64-byte line has one writer. Payloads start at page offset 128 in both segments: copies between buffers
that differ by a few bytes modulo the page size run many times slower. `begun` and `done` hold the sequence
number of the call that a worker last began and last finished there, so that after its death they tell what
happened. Nobody clears these words, and a slot sees many workers: sequence numbers are never reused.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final, NamedTuple

from luacell.protocol.limits import ERROR_TEXT_MAX, SLOTS_PER_SEGMENT_MAX

PAYLOAD_OFFSET: Final = 128
DONE_OFFSET: Final = 8
WITHDRAWN_OFFSET: Final = 64
PAGE: Final = 4096
ARGS_STRIDE_MIN: Final = PAGE
OUT_STRIDE_MIN: Final = 2 * PAGE  # holds an error text of ERROR_TEXT_MAX besides the words
GENERATION_MASK: Final = (1 << 32) - 1  # after it comes 0
SLOT_SHIFT: Final = 16  # a slot's number is pair index << SLOT_SHIFT | position

assert OUT_STRIDE_MIN - PAYLOAD_OFFSET >= ERROR_TEXT_MAX

WORD: Final = Struct("<Q")
_ANSWER: Final = Struct("<QQIIIIQ")


class Answer(NamedTuple):
    """What a worker left in a slot; untrusted until `sequence` was compared and sizes were clamped.

    Attributes:
        cpu_us: CPU time of the worker's process when it began the call, up to 10 ms earlier at most.
    """

    begun: int
    done: int
    code: int
    out_size: int
    error_size: int
    flags: int
    cpu_us: int = 0


def stride_for(payload_size: int, stride_min: int) -> int:
    """Return the bytes from one slot to the next for payloads of up to `payload_size` bytes.

    Sizes are rounded up to eight steps per power of two, so that slots are found again by later calls of
    about the same size, at a waste of an eighth at most.
    """
    wanted = max(payload_size + PAYLOAD_OFFSET, stride_min)
    step = max(PAGE, (1 << (wanted - 1).bit_length()) >> 4)
    return (wanted + step - 1) // step * step


@dataclass(frozen=True, slots=True)
class SlotShape:
    """Count and strides of the slots in a pair of segments, all in bytes but `count`."""

    count: int
    args_stride: int
    out_stride: int

    @classmethod
    def for_payloads(cls, args_size: int, out_size: int, count: int) -> SlotShape:
        """Choose strides that hold the given payloads."""
        assert 1 <= count <= SLOTS_PER_SEGMENT_MAX, count
        return cls(count, stride_for(args_size, ARGS_STRIDE_MIN), stride_for(out_size, OUT_STRIDE_MIN))

    @property
    def args_bytes(self) -> int:
        """Size of the args segment."""
        return self.count * self.args_stride

    @property
    def out_bytes(self) -> int:
        """Size of the out segment."""
        return self.count * self.out_stride

    @property
    def total_bytes(self) -> int:
        """Size of both segments."""
        return self.args_bytes + self.out_bytes

    @property
    def args_capacity(self) -> int:
        """Bytes of arguments that fit a slot."""
        return self.args_stride - PAYLOAD_OFFSET

    @property
    def out_capacity(self) -> int:
        """Bytes of results that fit a slot."""
        return self.out_stride - PAYLOAD_OFFSET


def write_generation(args: memoryview, offset: int, generation: int) -> None:
    """Host: stamp the slot at `offset` with the generation of its next call."""
    WORD.pack_into(args, offset, generation)


def write_withdrawn(args: memoryview, offset: int, sequence: int) -> None:
    """Broker: tell the worker that it must not begin call `sequence`."""
    WORD.pack_into(args, offset + WITHDRAWN_OFFSET, sequence)


def read_answer(out: memoryview, offset: int) -> Answer:
    """Broker: read what a worker wrote about its calls in the slot at `offset`."""
    return Answer._make(_ANSWER.unpack_from(out, offset))
