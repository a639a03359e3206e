"""How much of everything the fold on a GPU takes: the memory's budget and what is free in, sizes and numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ckpt_ema.blocks import ELEMENT_MULTIPLE, REMOTE_READ_BYTES, BlockPlan, Lane, buffer_bytes_per_element, padded

# Of a page-locked buffer; why so many, `staging` says.
STAGING_BYTES = 4 << 20
MAX_READERS = 16
MAX_WRITERS = 8
# Page-locked buffers beyond those that readers fill: their copies are under way.
STAGING_AHEAD = 2
# They are made smaller where the budget has no room for so many.
MIN_BUFFERS = 8
# What one update is queued for. Queueing took as long for a small block as for a large one: as it seems, since the
# interpreter's lock has to be taken from a dozen others several times.
STAGING_BUFFERS_PER_BLOCK = 16
# Students' blocks on the device beyond those that the readers are at.
INCOMING_AHEAD = 3
# Blocks a sixteenth as large are the smallest, where little of the device's memory is free; they are tried, too, where
# larger ones found no room after all.
SMALLER = 16


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Blocks of the fold on a GPU, and its buffers on the host and on the device."""

    blocks: BlockPlan
    """What to fold, cut into the device's blocks."""

    staging_bytes: int
    """Of each buffer on the host."""

    num_readers: int
    """How many threads carry students' blocks to the device."""

    num_writers: int
    """How many carry finished blocks back."""

    raw_bytes: int
    """Of each buffer on the device for a student's block."""

    wide_bytes: int
    """Of each for what is computed: every teacher's block, and a widened student's."""

    out_bytes: int
    """Of each for a finished block."""

    @property
    def num_uploads(self) -> int:
        """How many buffers on the host carry to the device; each writer has one that carries back."""
        return self.num_readers + STAGING_AHEAD

    @property
    def num_incoming(self) -> int:
        """How many there are for students' blocks."""
        return self.num_readers + INCOMING_AHEAD

    @property
    def num_outgoing(self) -> int:
        """How many there are for finished blocks."""
        return self.num_writers + 1

    @property
    def device_bytes(self) -> int:
        """Of all buffers on the device together."""
        return (
            self.num_incoming * self.raw_bytes
            + (self.blocks.num_teachers + 1) * self.wide_bytes
            + self.num_outgoing * self.out_bytes
        )


def plan_for_device(
    blocks: BlockPlan, *, memory_budget_bytes: int, free_bytes: int, is_remote: bool
) -> list[DevicePlan]:
    """What to try, in this order: blocks halved until half of the device's `free_bytes` has room for all, the smallest.

    That is one where they are the same, also where there is no room for these. Of the host's memory it takes no more
    than the budget.
    """
    most = REMOTE_READ_BYTES if is_remote else STAGING_BYTES
    staging_bytes = min(most, memory_budget_bytes // MIN_BUFFERS)
    staging_bytes = 1 << max(0, staging_bytes.bit_length() - 1)  # torch pins powers of two, whatever is asked for
    num_buffers = memory_budget_bytes // staging_bytes

    def plan(block_bytes: int) -> DevicePlan:
        cut = replace(blocks, block_elements=_elements_of_block(blocks.lanes, block_bytes))
        return _with_buffers(cut, staging_bytes, num_buffers)

    block_bytes = min(staging_bytes, STAGING_BYTES) * STAGING_BUFFERS_PER_BLOCK
    least = block_bytes // SMALLER
    # What trains on the device goes on to take memory.
    while block_bytes > least and plan(block_bytes).device_bytes > free_bytes // 2:
        block_bytes //= 2
    first, smallest = plan(block_bytes), plan(least)
    return [first, smallest] if smallest.device_bytes < first.device_bytes else [first]


def _with_buffers(blocks: BlockPlan, staging_bytes: int, num_buffers: int) -> DevicePlan:
    # Several teachers are several files, which are written at once.
    num_writers = min(MAX_WRITERS, num_buffers // (8 if blocks.num_teachers == 1 else 4), blocks.num_threads)
    num_readers = min(MAX_READERS, num_buffers - num_writers - STAGING_AHEAD, max(2, blocks.num_threads))
    counts = [(lane, min(blocks.block_elements, padded(lane.num_elements))) for lane in blocks.lanes]
    return DevicePlan(
        blocks,
        staging_bytes,
        num_readers,
        num_writers,
        raw_bytes=max(count * lane.input_itemsize for lane, count in counts),
        wide_bytes=max(count * lane.accumulate_dtype.itemsize for lane, count in counts),
        out_bytes=max(count * lane.dtype.itemsize for lane, count in counts),
    )


def _elements_of_block(lanes: Sequence[Lane], num_bytes: int) -> int:
    """As many as a buffer of `num_bytes` holds of every lane, but for those that it holds whole, such as counters.

    At least ELEMENT_MULTIPLE.
    """
    sizes = [(buffer_bytes_per_element(lane)[0], padded(lane.num_elements)) for lane in lanes]
    longer = [size for size, count in sizes if size * count > num_bytes]
    if not longer:
        return max(count for _, count in sizes)
    return max(1, num_bytes // max(longer) // ELEMENT_MULTIPLE) * ELEMENT_MULTIPLE
