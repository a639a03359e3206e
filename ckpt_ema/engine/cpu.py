"""The fold on the CPU: each block's bytes from every checkpoint in order in, the finished block to the writer out.

Python threads, one block each: preadv and all arithmetic release the interpreter's lock. A block's accumulator stays in
the cache while every student's bytes stream past it, so that memory does not grow with the model or the run.
"""

from __future__ import annotations

import cmath
import functools
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from ckpt_ema.blocks import Block, BlockPlan, padded
from ckpt_ema.dtypes import DType
from ckpt_ema.engine.arithmetic import comparable, sign_of_finiteness, update_
from ckpt_ema.engine.buffers import Buffer, torch_dtype
from ckpt_ema.engine.compiled import Kernel, find_kernel, is_made_for, is_tried, why_not
from ckpt_ema.engine.contract import NonFinite, NonFiniteBlockError, Nowhere, Task, Teacher, write_block
from ckpt_ema.engine.gather import gather_block
from ckpt_ema.engine.inputs import ExtentTable, Scatters, stored_dtype
from ckpt_ema.engine.workers import TORCH_THREADS, Jobs, start, wait_whatever_comes
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.layouts import Layout
from ckpt_ema.timings import Timings

# A block of 500 students is a gigabyte: whoever looks at the progress would wait for long.
TOLD_BYTES = 32 << 20

COMPILED_UPDATES = 1 << 29
"""Of elements, from which on a kernel saves more than compiling it takes."""

Kernels = dict[tuple[DType, DType], Kernel]
"""By the dtypes of an accumulator and of an input."""


def fold_blocks(
    task: Task, teachers: Sequence[Teacher], progress: Callable[[int], None], chosen: Iterable[Block] | None = None
) -> Timings:
    """The CPU's Engine; see there for the contract. Folds only `chosen` blocks of the plan where these are given."""
    plan = task.plan
    blocks = _Queue(iter(plan.blocks() if chosen is None else chosen))
    extents = ExtentTable(task.files)
    kernels: Kernels = {}
    failures: list[BaseException] = []
    timings = Timings()
    lock = threading.Lock()
    jobs = Jobs()

    def work(job: Callable[[], None], end: threading.Event) -> None:
        def on_one_thread() -> None:
            # torch's own threads on blocks of this size cost more than they bring.
            torch.set_num_threads(1)
            job()

        try:
            jobs.run(on_one_thread)
        except BaseException as error:
            blocks.stop()
            failures.append(error)
        finally:
            end.set()

    def tell(num_bytes: int) -> None:
        with lock:
            progress(num_bytes)

    def fold_all() -> None:
        started = time.perf_counter()
        folder = _BlockFolder(task, teachers, extents, kernels, tell)
        while (block := blocks.take()) is not None:
            folder.fold(block)
            task.on_finished(block)
            folder.tell_progress()
        with lock:
            folder.add_timings(timings, time.perf_counter() - started, plan.num_threads)

    todo: list[Callable[[], None]] = [fold_all] * plan.num_threads
    for dtypes in _worth_compiling(plan):
        add = functools.partial(_add_kernel, kernels, *dtypes)
        if is_tried(*map(torch_dtype, dtypes)):
            add()
        else:  # meanwhile the others fold with torch's calls, to the same bits
            todo.append(add)
    ended = [threading.Event() for _ in todo]
    threads = [
        threading.Thread(target=work, args=(job, end), name="fold", daemon=True)
        for job, end in zip(todo, ended, strict=True)
    ]
    with TORCH_THREADS.given_back():
        try:
            for thread in threads[: plan.num_threads]:
                start(thread)
            for thread, end in zip(threads[plan.num_threads :], ended[plan.num_threads :], strict=True):
                try:
                    start(thread)
                except CkptEmaError:  # torch's calls do without it
                    end.set()
            for end in ended:
                end.wait()
        finally:
            # Also when the user interrupts the waiting: no thread may write to a file that is being discarded.
            blocks.stop()
            wait_whatever_comes([jobs.end])
    try:
        if failures:
            raise failures[0]
    finally:
        # An error knows the frames that know the list: together they would keep the buffers.
        failures.clear()
    return timings


def refold(task: Task, block: Block) -> None:
    """Fold a block that another engine found not to be finite, in the plan's own portions; raises where it is not."""
    teachers = [Nowhere()] * len(task.updates)
    folder = _BlockFolder(task, teachers, ExtentTable(task.files), {}, lambda num_bytes: None)
    size = task.plan.block_elements
    for begin in range(block.begin, block.end, size):
        folder.fold(Block(block.lane, begin, min(begin + size, block.end)))


def _worth_compiling(plan: BlockPlan) -> list[tuple[DType, DType]]:
    """The dtypes of accumulators and inputs that a kernel is made for, and so much is folded of that it pays."""
    counts: Counter[tuple[DType, DType]] = Counter()
    for lane in plan.lanes:
        if lane.action == "average":
            for dtype, number in Counter(lane.input_dtypes[1:]).items():
                counts[lane.accumulate_dtype, dtype] += number * (lane.span[1] - lane.span[0]) * plan.num_teachers
    return [
        dtypes
        for dtypes, count in counts.items()
        if count >= COMPILED_UPDATES and is_made_for(*map(torch_dtype, dtypes))
    ]


def why_not_compiled(plan: BlockPlan) -> Iterator[str]:
    """Of each dtype that a kernel would have paid for, why there is none here."""
    for accumulator, student in _worth_compiling(plan):
        if reason := why_not(torch_dtype(accumulator), torch_dtype(student)):
            yield f"{student} by torch's calls: {reason}"


def _add_kernel(kernels: Kernels, accumulator: DType, student: DType) -> None:
    kernel = find_kernel(torch_dtype(accumulator), torch_dtype(student))
    if kernel is not None:
        kernels[accumulator, student] = kernel


def batches(kernels: Sequence[Kernel | None], size: int) -> Iterator[tuple[Kernel | None, list[int]]]:
    """The inputs after the first in their order: up to `size` together where one kernel serves them, else each alone.

    `kernels` are the inputs' own.
    """
    for kernel, alike in itertools.groupby(range(1, len(kernels)), kernels.__getitem__):
        while batch := list(itertools.islice(alike, size if kernel else 1)):
            yield kernel, batch


class _Queue:
    """Hands out blocks in file order, so that every input is read from front to back."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._blocks = blocks
        self._lock = threading.Lock()
        self._stopped = False

    def take(self) -> Block | None:
        with self._lock:
            return None if self._stopped else next(self._blocks, None)

    def stop(self) -> None:
        self._stopped = True


class _BlockFolder:
    """One thread's buffers, and what it does with them."""

    def __init__(
        self,
        task: Task,
        teachers: Sequence[Teacher],
        extents: ExtentTable,
        kernels: Kernels,
        progress: Callable[[int], None],
    ) -> None:
        plan = task.plan
        self._progress = progress
        self._untold_bytes = 0
        self._aliases = plan.aliases
        self._layouts = task.layouts
        # By input: a student enters every teacher before the next one is read.
        self._updates = list(zip(*task.updates, strict=True))
        self._kernels = kernels
        self._files = task.files
        self._teachers = teachers
        raw, accumulator, widened, span = plan.thread_buffers
        self._raw, self._widened, self._span = Buffer(raw), Buffer(widened), Buffer(span)
        # A kernel needs no room for widened students, and folds several in one pass: 16-bit ones fit into its halves.
        self._stages = [self._raw, *self._widened.split()]
        self._accumulators = [Buffer(accumulator) for _ in teachers]
        self._trash = task.files.new_trash(raw)
        self._extents = extents
        self._scatters: dict[int, Scatters] = {}
        """Of the block at hand, by the addresses of buffers."""

        self._reading = self._writing = 0.0

    def fold(self, block: Block) -> None:
        """Fold one block of every teacher, and write it."""
        self._scatters.clear()
        if block.lane.action == "average":
            self._average(block)
        else:
            self._copy(block)

    def tell_progress(self) -> None:
        """Tell of what was read since the last time."""
        num_bytes, self._untold_bytes = self._untold_bytes, 0
        if num_bytes:
            self._progress(num_bytes)

    def add_timings(self, timings: Timings, seconds: float, num_threads: int) -> None:
        """Add this thread's part, of `seconds` in all."""
        timings.reading += self._reading / num_threads
        timings.writing += self._writing / num_threads
        timings.computing += (seconds - self._reading - self._writing) / num_threads

    def _average(self, block: Block) -> None:
        lane = block.lane
        count = block.end - block.begin
        size = padded(count)
        accumulators = [buffer.elements(lane.accumulate_dtype, size) for buffer in self._accumulators]
        # The first input becomes the teacher: read straight into its place where it needs no conversion.
        if lane.input_dtypes[0] is lane.accumulate_dtype:
            self._read(self._layouts[0], block, self._accumulators[0])
        else:
            self._read(self._layouts[0], block, self._raw)
            accumulators[0].copy_(self._raw.elements(lane.input_dtypes[0], size))
        for accumulator in accumulators[1:]:
            accumulator.copy_(accumulators[0])
        rows = [accumulator.view(1, -1) for accumulator in accumulators]
        kernels = [self._kernels.get((lane.accumulate_dtype, dtype)) for dtype in lane.input_dtypes]
        for kernel, inputs in batches(kernels, len(self._stages)):
            if kernel is None:
                self._fold_by_torch(inputs[0], block, rows)
            else:
                self._fold_by_kernel(kernel, inputs, block, size)
            if self._untold_bytes >= TOLD_BYTES:
                self.tell_progress()
        for teacher, accumulator, buffer in zip(self._teachers, accumulators, self._accumulators, strict=True):
            self._write(teacher, block, self._finish(block, accumulator, buffer))

    def _finish(self, block: Block, accumulator: torch.Tensor, buffer: Buffer) -> Buffer:
        """Round a teacher to its own dtype; the buffer that holds it then. Raises NonFiniteBlockError."""
        lane = block.lane
        count = block.end - block.begin
        target, finished = accumulator, buffer
        if lane.dtype is not lane.accumulate_dtype:
            finished = self._raw
            kernel = self._kernels.get((lane.accumulate_dtype, lane.dtype))
            # What is after the last element may be anything; then torch looks at the others alone.
            if kernel is not None and kernel.narrow(buffer.address, accumulator.numel(), finished.address):
                return finished
            target = finished.elements(lane.dtype, accumulator.numel())
            target.copy_(accumulator)
        if not _is_finite(target[:count]):
            raise NonFiniteBlockError(self._find_origin(block, ~comparable(target[:count]).isfinite()))
        return finished

    def _fold_by_torch(self, index: int, block: Block, rows: Sequence[torch.Tensor]) -> None:
        """Read one input and fold it into every teacher, each of shape [1, n]."""
        lane = block.lane
        self._read(self._layouts[index], block, self._raw)
        student = self._raw.elements(lane.input_dtypes[index], rows[0].numel())
        if student.dtype is not rows[0].dtype:
            student = self._widened.elements(lane.accumulate_dtype, student.numel()).copy_(student)
        for row, (keep, take) in zip(rows, self._updates[index], strict=True):
            update_(row, student, keep, take)

    def _fold_by_kernel(self, kernel: Kernel, indices: Sequence[int], block: Block, size: int) -> None:
        """Read some inputs, no more than there are stages, and fold them into every teacher in one pass."""
        stages = self._stages[: len(indices)]
        for index, stage in zip(indices, stages, strict=True):
            self._read(self._layouts[index], block, stage)
        students = [stage.address for stage in stages]
        updates = zip(*(self._updates[index] for index in indices), strict=True)
        for accumulator, own in zip(self._accumulators, updates, strict=True):
            kernel.fold(accumulator.address, size, students, own)

    def _copy(self, block: Block) -> None:
        lane = block.lane
        count = block.end - block.begin
        self._read(self._layouts[-1], block, self._raw)
        finished = self._raw
        if lane.student_dtype.kind != "integer":
            source = self._raw.elements(lane.student_dtype, count)
            # An infinity in a buffer is a mask or an observer's start; a NaN is a broken model.
            if not _is_finite(source) and bool((nan := comparable(source).isnan()).any()):
                raise NonFiniteBlockError(self._find_origin(block, nan))
            if not lane.copies_bytes:
                finished = self._accumulators[0]
                target = finished.elements(lane.dtype, count)
                target.copy_(source)
                overflow = ~comparable(target).isfinite() & comparable(source).isfinite()
                if bool(overflow.any()):
                    raise NonFiniteBlockError(NonFinite(self._tensor_at(block, overflow), None))
        for teacher in self._teachers:
            self._write(teacher, block, finished)

    def _read(self, layout: Layout, block: Block, buffer: Buffer) -> None:
        started = time.perf_counter()
        num_bytes = (block.end - block.begin) * stored_dtype(layout, block).itemsize
        if block.lane.is_scattered:
            gather_block(self._files, layout, block, buffer, self._span, self._trash)
        else:
            extents = self._extents.of(layout, block.lane)
            scatters = self._scatters.setdefault(buffer.address, {})
            extents.read(block.begin, block.end, buffer.bytes[:num_bytes], self._trash, scatters)
        self._reading += time.perf_counter() - started
        self._untold_bytes += num_bytes

    def _write(self, teacher: Teacher, block: Block, finished: Buffer) -> None:
        started = time.perf_counter()
        content = finished.bytes[: (block.end - block.begin) * block.lane.dtype.itemsize]
        write_block(teacher, self._aliases, content, block.position)
        self._writing += time.perf_counter() - started

    def _find_origin(self, block: Block, bad: torch.Tensor) -> NonFinite:
        """The tensor of the first element that `bad` marks, and the first input that is not finite there."""
        bad = bad.clone()
        tensor = self._tensor_at(block, bad)
        inputs = range(len(self._layouts)) if block.lane.action == "average" else [len(self._layouts) - 1]
        for i in inputs:
            self._read(self._layouts[i], block, self._raw)
            stored = self._raw.elements(stored_dtype(self._layouts[i], block), block.end - block.begin)
            brought = ~comparable(stored).isfinite() & bad
            if bool(brought.any()):
                return NonFinite(self._tensor_at(block, brought), i)
        return NonFinite(tensor, None)

    def _tensor_at(self, block: Block, marked: torch.Tensor) -> int:
        element = block.begin + int(marked.to(torch.uint8).argmax())
        return next(index for index, _, _ in block.lane.tensors_between(element, element + 1))


def _is_finite(elements: torch.Tensor) -> bool:
    finite = cmath.isfinite(sign_of_finiteness(elements).item())
    return finite or bool(comparable(elements).isfinite().all())
