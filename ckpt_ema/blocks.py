"""How the fold goes about it: catalogue, layouts and a memory budget in, lanes and blocks out.

The teacher's data section is cut into lanes: runs of tensors of one dtype and one treatment. A lane is folded as one
long vector, a block at a time, whatever tensors it crosses; thousands of small tensors cost as little as a large one.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Literal, NamedTuple

from ckpt_ema.byte_ranges import RemoteFile, count_elements
from ckpt_ema.catalogue import TeacherTensor
from ckpt_ema.dtypes import BY_NAME, DType
from ckpt_ema.errors import MisuseError
from ckpt_ema.layouts import Layout
from ckpt_ema.remote_store import MAX_REQUEST_BYTES

Accumulate = Literal["float32", "float64", "student"]

# Large enough that the calls cost nothing, small enough that a block stays in the processor's last-level cache.
BLOCK_ELEMENTS = 512 * 1024
# Vectorised kernels treat the last few elements of a tensor apart, and float16 rounds differently there. Blocks are
# folded in buffers padded to a multiple of this, so that where a block ends can never show in its bits.
ELEMENT_MULTIPLE = 64
MIN_BLOCK_ELEMENTS = 1024
RANK_MULTIPLE = 4096
MAX_THREADS = 16
# Behind a URL a read takes tens of milliseconds whatever its size: fewer and larger ones, and many at once, which
# wait rather than compute.
REMOTE_READ_BYTES = 8 << 20
REMOTE_THREADS = 32
GAPS_PER_REQUEST = 3
"""By so many of a remote file's largest gaps a request may be longer than a buffer."""


@dataclass(frozen=True, slots=True)
class Lane:
    """A run of the teacher's bytes that holds tensors of one dtype and one treatment, without a gap."""

    action: Literal["average", "copy"]
    student_dtype: DType
    """The newest student's."""

    accumulate_dtype: DType
    dtype: DType
    """Of the written teacher."""

    input_dtypes: tuple[DType, ...]
    """Of each input: students may change their precision, and averages that take part be stored in other dtypes."""

    begin: int
    """First byte in the teacher's data section."""

    tensors: tuple[int, ...]
    """Indices into every layout's schema."""

    starts: tuple[int, ...]
    """First element of each tensor within the lane, and the lane's number of elements."""

    span: tuple[int, int]
    """The elements that are folded here: all, or those of one rank."""

    is_scattered: bool
    """One tensor that some checkpoint stores in another order than row-major; its elements are gathered."""

    @property
    def num_elements(self) -> int:
        """Elements in all."""
        return self.starts[-1]

    @property
    def copies_bytes(self) -> bool:
        """Whether its bytes go from the newest student to the teacher as they are."""
        return self.action == "copy" and self.student_dtype is self.dtype

    @property
    def is_plain_average(self) -> bool:
        """Whether it is averaged, and stored in row-major order in every checkpoint."""
        return self.action == "average" and not self.is_scattered

    @property
    def input_itemsize(self) -> int:
        """Bytes of an element of the widest input."""
        return max(dtype.itemsize for dtype in self.input_dtypes)

    @property
    def input_bytes_per_element(self) -> int:
        """Bytes of an element in all inputs together."""
        return sum(dtype.itemsize for dtype in self.input_dtypes)

    @property
    def bytes_to_read(self) -> int:
        """Bytes of the elements that are folded here, in all inputs together."""
        return (self.span[1] - self.span[0]) * self.input_bytes_per_element

    def tensors_between(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(schema index, first element within the tensor, number of elements) of what lies in `[begin, end)`."""
        position = bisect.bisect_right(self.starts, begin) - 1
        while begin < end:
            stop = min(self.starts[position + 1], end)
            if stop > begin:
                yield self.tensors[position], begin - self.starts[position], stop - begin
            begin = max(begin, stop)
            position += 1


@dataclass(frozen=True, slots=True)
class Block:
    """A run of a lane's elements that is folded at once."""

    lane: Lane
    begin: int
    end: int

    @property
    def position(self) -> int:
        """First byte in the teacher's data section."""
        return self.lane.begin + self.begin * self.lane.dtype.itemsize

    @property
    def end_position(self) -> int:
        """After its last byte there."""
        return self.lane.begin + self.end * self.lane.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Alias:
    """A tensor that shares its bytes with another one in every checkpoint; the teacher holds them twice."""

    begin: int
    """First byte in the teacher's data section."""

    original: int
    """First byte of the tensor whose bytes these are."""

    num_bytes: int


class BufferSizes(NamedTuple):
    """Bytes of one thread's buffers, or what they need for an element of a block."""

    raw: int
    """A student's bytes as they are stored."""

    accumulator: int
    """One teacher's."""

    widened: int
    """The student in the accumulator's dtype; where a kernel widens it, two more students of half that size."""

    span: int
    """What a scattered tensor's elements are gathered from."""

    def total(self, num_teachers: int) -> int:
        """All of them, with an accumulator for each teacher."""
        return self.raw + num_teachers * self.accumulator + self.widened + self.span

    @property
    def gap(self) -> int:
        """Of inputs behind URLs: what is read along between two ranges of one request."""
        return min(self.raw, RemoteFile.max_gap_bytes)

    @property
    def answer(self) -> int:
        """Of inputs behind URLs: the store's own bytes for one request, gaps and all."""
        return min(self.raw + GAPS_PER_REQUEST * self.gap, MAX_REQUEST_BYTES)


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """Everything the engine needs but the coefficients."""

    lanes: tuple[Lane, ...]
    aliases: tuple[Alias, ...]
    offsets: dict[str, tuple[int, int]]
    """Byte range of each tensor in the teacher's data section."""

    data_bytes: int
    """Size of the data section."""

    bytes_to_read: int
    block_elements: int
    num_threads: int
    thread_buffers: BufferSizes
    """Bytes of each buffer of one thread."""

    num_teachers: int

    @property
    def buffer_bytes(self) -> int:
        """What all threads' buffers take together; never above the budget."""
        return self.num_threads * self.thread_buffers.total(self.num_teachers)

    def blocks(self) -> Iterator[Block]:
        """Every block, in the teacher's byte order, which is the files' own order as well."""
        for lane in self.lanes:
            for begin in range(*lane.span, self.block_elements):
                yield Block(lane, begin, min(begin + self.block_elements, lane.span[1]))


def accumulate_dtype(tensor: TeacherTensor, accumulate: Accumulate) -> DType:
    """The dtype a teacher's tensor is kept in while it is folded: never narrower than any student's own."""
    if accumulate == "student":
        if len(tensor.student_dtypes) > 1:
            dtypes = " and ".join(map(str, tensor.student_dtypes))
            raise MisuseError(
                f"`--accumulate student` is impossible for `{tensor.name}`, which is {dtypes}",
                # Not to omit it: a teacher that goes on is accumulated in what it says of itself.
                hint="pass `--accumulate float64` to widen each student as it is read",
            )
        if tensor.student_dtype.itemsize == 1:
            raise MisuseError(
                f"`--accumulate student` is impossible for {tensor.student_dtype}: torch has no arithmetic in it",
                hint="omit `--accumulate` to accumulate in float32",
            )
        return tensor.student_dtype
    wide = accumulate == "float64" or any(dtype.is_wide for dtype in tensor.student_dtypes)
    if tensor.student_dtype.kind == "complex":
        return BY_NAME["complex128" if wide else "complex64"]
    return BY_NAME["float64" if wide else "float32"]


def plan_blocks(
    tensors: Sequence[TeacherTensor],
    layouts: Sequence[Layout],
    *,
    accumulate: Accumulate,
    memory_budget_bytes: int,
    num_threads: int | None = None,
    num_teachers: int = 1,
) -> BlockPlan:
    """Lay out the teachers' data section, the same for all of them, and cut it into blocks.

    `layouts` are those of the students to be folded, oldest first (an initial teacher before them). Raises
    MisuseError when the budget is too small for the smallest block.
    """
    newest = layouts[-1]
    aliases_of = _find_aliases(tensors, layouts)
    # Most students share a schema; where their precision changes, and in averages that take part, dtypes are others.
    # Those of a continued teacher's own students decide in what a tensor is computed, though nothing of them is read.
    schemas = list({id(layout.schema): layout.schema for layout in layouts}.values())
    stored = {
        t.index: tuple(dtype.name for dtype in (*(schema.dtypes[t.index] for schema in schemas), *t.student_dtypes))
        for t in tensors
    }
    scattered = {t.index: any(schema.is_scattered(t.index) for schema in schemas) for t in tensors}

    def file_order(tensor: TeacherTensor) -> tuple[object, ...]:
        # Wide elements first keeps every tensor aligned; the newest checkpoint's own order makes reads sequential.
        return (
            -tensor.dtype.itemsize,
            tensor.dtype.name,
            tensor.index in aliases_of,
            tensor.action,
            tensor.student_dtype.name,
            stored[tensor.index],
            scattered[tensor.index],
            newest.place(tensor.index),
            tensor.name,
        )

    ordered = sorted(tensors, key=file_order)
    offsets: dict[str, tuple[int, int]] = {}
    position = 0
    for tensor in ordered:
        end = position + count_elements(tensor.shape) * tensor.dtype.itemsize
        offsets[tensor.name] = (position, end)
        position = end
    names = {tensor.index: tensor.name for tensor in tensors}
    aliases = tuple(
        Alias(
            offsets[names[index]][0], offsets[names[original]][0], offsets[names[index]][1] - offsets[names[index]][0]
        )
        for index, original in aliases_of.items()
    )
    stretches = _stretches([tensor for tensor in ordered if tensor.index not in aliases_of], offsets, scattered, stored)
    lanes = tuple(_lane(stretch, offsets, scattered, layouts, accumulate) for stretch in stretches)
    is_remote = any(layout.is_remote for layout in layouts)
    size_blocks = _size_remote_blocks if is_remote else _size_blocks
    block_elements, threads = size_blocks(lanes, memory_budget_bytes, num_threads, num_teachers)
    bytes_to_read = sum(lane.bytes_to_read for lane in lanes)
    buffers = _thread_buffers(lanes, block_elements)
    return BlockPlan(lanes, aliases, offsets, position, bytes_to_read, block_elements, threads, buffers, num_teachers)


def plan_of_rank(plan: BlockPlan, number: int, count: int) -> BlockPlan:
    """The part of a plan that rank `number` of `count` does: as many bytes to read as the others', in one run.

    Where it is cut does not depend on the size of blocks, which may differ between ranks.
    """
    if count == 1:
        return plan
    costs = [lane.input_bytes_per_element for lane in plan.lanes]
    total = sum(lane.num_elements * cost for lane, cost in zip(plan.lanes, costs, strict=True))
    first, stop = total * number // count, total * (number + 1) // count
    lanes = []
    before = 0
    for lane, cost in zip(plan.lanes, costs, strict=True):
        begin, end = (_cut(lane, border - before, cost) for border in (first, stop))
        if begin < end:
            lanes.append(replace(lane, span=(begin, end)))
        before += lane.num_elements * cost
    return with_lanes(plan, lanes)


def without(plan: BlockPlan, finished: Sequence[tuple[int, int]]) -> BlockPlan:
    """What of a plan is left where byte ranges of the teacher's data section, in order and disjoint, are finished."""
    if not finished:
        return plan
    lanes = []
    for lane in plan.lanes:
        first, stop = (lane.begin + element * lane.dtype.itemsize for element in lane.span)
        for begin, end in finished[bisect.bisect_left(finished, first, key=itemgetter(1)) :]:
            if begin >= stop:
                break
            lanes.append(_between(lane, first, min(begin, stop)))
            first = max(first, end)
        lanes.append(_between(lane, first, stop))
    return with_lanes(plan, [lane for lane in lanes if lane.span[0] < lane.span[1]])


def _between(lane: Lane, begin: int, end: int) -> Lane:
    """The lane's elements in bytes `[begin, end)` of the data section; where these cut one, all of it."""
    size = lane.dtype.itemsize
    return replace(lane, span=((begin - lane.begin) // size, -(-(end - lane.begin) // size)))


def with_lanes(plan: BlockPlan, lanes: Sequence[Lane]) -> BlockPlan:
    """The plan with these lanes, which are some of its own or parts of them, alone."""
    return replace(plan, lanes=tuple(lanes), bytes_to_read=sum(lane.bytes_to_read for lane in lanes))


def _cut(lane: Lane, num_bytes: int, cost: int) -> int:
    """The element where `num_bytes` of a lane's inputs are read, on a border that keeps pages to one rank."""
    if num_bytes >= lane.num_elements * cost:
        return lane.num_elements
    return max(0, num_bytes // cost // RANK_MULTIPLE * RANK_MULTIPLE)


def _find_aliases(tensors: Sequence[TeacherTensor], layouts: Sequence[Layout]) -> dict[int, int]:
    """Tensors that are the same bytes as an earlier one in every checkpoint (tied weights), by schema index."""
    first: dict[object, int] = {}
    aliases: dict[int, int] = {}
    # By place in the newest checkpoint first: a full key for each of 20000 tensors and 50 checkpoints is slow.
    newest = layouts[-1]
    places = [newest.place(tensor.index) for tensor in tensors]
    counts: dict[tuple[int, int], int] = {}
    for place in places:
        counts[place] = counts.get(place, 0) + 1
    for tensor, place in zip(tensors, places, strict=True):
        if counts[place] == 1 or 0 in tensor.shape:
            continue
        key = (
            tensor.student_dtypes,
            tensor.action,
            tensor.shape,
            # One place read as two dtypes holds two tensors.
            tuple(
                (
                    layout.schema.dtypes[tensor.index],
                    layout.schema.geometries[tensor.index],
                    layout.places(tensor.index),
                )
                for layout in layouts
            ),
        )
        original = first.setdefault(key, tensor.index)
        if original != tensor.index:
            aliases[tensor.index] = original
    return aliases


def _stretches(
    ordered: Sequence[TeacherTensor],
    offsets: Mapping[str, tuple[int, int]],
    scattered: Mapping[int, bool],
    stored: Mapping[int, tuple[str, ...]],
) -> Iterator[list[TeacherTensor]]:
    """Tensors that follow each other in the teacher and are treated alike; a scattered one is a stretch of its own."""

    def kind(tensor: TeacherTensor) -> tuple[object, ...]:
        return (
            tensor.dtype,
            tensor.action,
            tensor.student_dtype,
            stored[tensor.index],
            tensor.index if scattered[tensor.index] else None,
        )

    stretch: list[TeacherTensor] = []
    for tensor in ordered:
        if 0 in tensor.shape:
            continue
        # Aliases lie in between where the next dtype begins; a lane never spans them.
        if stretch and (kind(tensor) != kind(stretch[-1]) or offsets[tensor.name][0] != offsets[stretch[-1].name][1]):
            yield stretch
            stretch = []
        stretch.append(tensor)
    if stretch:
        yield stretch


def _lane(
    stretch: Sequence[TeacherTensor],
    offsets: Mapping[str, tuple[int, int]],
    scattered: Mapping[int, bool],
    layouts: Sequence[Layout],
    accumulate: Accumulate,
) -> Lane:
    first = stretch[0]
    averages = first.action == "average"
    return Lane(
        action=first.action,
        student_dtype=first.student_dtype,
        accumulate_dtype=accumulate_dtype(first, accumulate) if averages else first.dtype,
        dtype=first.dtype,
        input_dtypes=tuple(layout.schema.dtypes[first.index] for layout in (layouts if averages else layouts[-1:])),
        begin=offsets[first.name][0],
        tensors=tuple(tensor.index for tensor in stretch),
        starts=tuple(itertools.accumulate((count_elements(tensor.shape) for tensor in stretch), initial=0)),
        span=(0, sum(count_elements(tensor.shape) for tensor in stretch)),
        is_scattered=scattered[first.index],
    )


def buffer_bytes_per_element(lane: Lane) -> BufferSizes:
    """What a thread's buffers need per element of a block."""
    raw = max(lane.student_dtype.itemsize, lane.dtype.itemsize, lane.input_itemsize)
    span = raw if lane.is_scattered else 0
    if lane.copies_bytes:
        return BufferSizes(raw, 0, 0, span)
    wide = lane.accumulate_dtype.itemsize
    widens = lane.action == "average" and any(dtype is not lane.accumulate_dtype for dtype in lane.input_dtypes[1:])
    return BufferSizes(raw, wide, wide if widens else 0, span)


def _widest(lanes: Sequence[Lane]) -> BufferSizes:
    """The largest need for each buffer; a thread allocates them once, for all lanes."""
    return _largest(map(buffer_bytes_per_element, lanes))


def _thread_buffers(lanes: Sequence[Lane], block_elements: int) -> BufferSizes:
    """Bytes of a thread's buffers; a short lane of wide elements, such as counters, does not widen them."""
    return _largest(
        BufferSizes(*(size * min(block_elements, padded(lane.num_elements)) for size in buffer_bytes_per_element(lane)))
        for lane in lanes
    )


def _largest(sizes: Iterable[BufferSizes]) -> BufferSizes:
    return BufferSizes(*map(max, zip(BufferSizes(0, 0, 0, 0), *sizes, strict=True)))


def padded(elements: int) -> int:
    """The number of elements of a buffer that holds so many."""
    return -(-elements // ELEMENT_MULTIPLE) * ELEMENT_MULTIPLE


def _size_blocks(lanes: Sequence[Lane], budget: int, num_threads: int | None, num_teachers: int) -> tuple[int, int]:
    widest = max(1, _widest(lanes).total(num_teachers))
    # The accumulators of all teachers share the cache; half a block each was the fastest for eight.
    best = BLOCK_ELEMENTS if num_teachers == 1 else BLOCK_ELEMENTS // 2
    _check_budget(budget, widest * MIN_BLOCK_ELEMENTS)
    threads = num_threads or min(len(os.sched_getaffinity(0)), MAX_THREADS)
    # A small budget gives up threads before it gives up blocks of a useful size.
    threads = max(1, min(threads, budget // (widest * (BLOCK_ELEMENTS // 8))))
    return _whole_elements(min(best, budget // (threads * widest)), lanes), threads


def _size_remote_blocks(
    lanes: Sequence[Lane], budget: int, num_threads: int | None, num_teachers: int
) -> tuple[int, int]:
    """The same for inputs behind URLs: blocks of REMOTE_READ_BYTES, larger where the budget has room for them.

    A store answers with bytes of its own, which lie in memory beside the buffer they are copied to, and so do those
    between two ranges of one request.
    """
    least = _widest(lanes).total(num_teachers) + (2 + GAPS_PER_REQUEST) * _widest(lanes).raw
    least = max(1, least) * MIN_BLOCK_ELEMENTS
    _check_budget(budget, least)
    # What most is read of decides; counters take eight bytes each, and are few.
    itemsize = max(lanes, key=lambda lane: lane.num_elements).input_itemsize if lanes else 1

    def bytes_of_thread(elements: int) -> int:
        buffers = _thread_buffers(lanes, elements)
        return max(1, buffers.total(num_teachers) + buffers.answer + buffers.gap)

    smallest = _whole_elements(REMOTE_READ_BYTES // itemsize, lanes)
    threads = max(1, min(num_threads or REMOTE_THREADS, budget // bytes_of_thread(smallest)))
    elements = smallest
    while elements > ELEMENT_MULTIPLE and threads * bytes_of_thread(elements) > budget:
        elements = _whole_elements(elements * 3 // 4, lanes)
    largest = _whole_elements(MAX_REQUEST_BYTES // itemsize, lanes)
    while elements < largest and threads * bytes_of_thread(more := min(largest, elements * 2)) <= budget:
        elements = more
    return elements, threads


def _check_budget(budget: int, least: int) -> None:
    if budget < least:
        raise MisuseError(
            f"`--memory` is {budget} bytes, less than the {least} of the smallest block",
            hint="pass for example `--memory 64MiB`",
        )


def _whole_elements(elements: int, lanes: Sequence[Lane]) -> int:
    """A block's size as a multiple of ELEMENT_MULTIPLE, and no more than the longest lane needs."""
    elements = min(elements, padded(max((lane.num_elements for lane in lanes), default=1)))
    return max(ELEMENT_MULTIPLE, elements // ELEMENT_MULTIPLE * ELEMENT_MULTIPLE)
