"""The fold on a GPU: readers fill pinned buffers, streams copy in, compute and copy back, a thread writes.

A single thread drives it and only queues work. Reads are handed out in the order in which the device needs them, so
that the oldest one always has its buffer, and nothing ever waits for the device as a whole. Blocks are as large as a
pinned buffer, so the model may be larger than the device's memory.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from ckpt_ema.blocks import ELEMENT_MULTIPLE, Block, BlockPlan, Lane, buffer_bytes_per_element
from ckpt_ema.engine import cpu
from ckpt_ema.engine.buffers import Buffer, torch_dtype
from ckpt_ema.engine.contract import Task, Teacher, write_block
from ckpt_ema.engine.inputs import ExtentTable, stored_dtype
from ckpt_ema.errors import CkptEmaError, MisuseError
from ckpt_ema.timings import Timings

# What is copied to the device at once; large enough for the link's full speed.
SLOT_BYTES = 32 << 20
NUM_INPUT_SLOTS = 6
NUM_OUTPUT_SLOTS = 2
NUM_STAGES = 3
MAX_READERS = 8
# Timed spans of the device that are kept before they are counted.
MAX_SPANS = 4096


def fold_blocks(
    task: Task,
    teachers: Sequence[Teacher],
    progress: Callable[[int], None],
    *,
    device: torch.device,
    memory_budget_bytes: int,
) -> Timings:
    """The GPU's Engine; see there for the contract. What is only copied, and what is not contiguous, the CPU does.

    Raises CkptEmaError when the device has no room for the smaller of two block sizes.
    """
    plan = task.plan
    averaged = tuple(lane for lane in plan.lanes if lane.is_plain_average)
    others = tuple(lane for lane in plan.lanes if not lane.is_plain_average)
    timings = Timings()
    if others:
        timings = cpu.fold_blocks(replace(task, plan=replace(plan, lanes=others)), teachers, progress)
    if not averaged:
        return timings
    slot_bytes = min(SLOT_BYTES, memory_budget_bytes // (NUM_INPUT_SLOTS + NUM_OUTPUT_SLOTS))
    slot_bytes = 1 << max(0, slot_bytes.bit_length() - 1)  # torch pins powers of two, whatever is asked for
    widest = max(buffer_bytes_per_element(lane)[0] for lane in averaged)
    for size in (slot_bytes, slot_bytes // 4):
        elements = size // widest // ELEMENT_MULTIPLE * ELEMENT_MULTIPLE
        if not elements:
            raise MisuseError(
                f"`--memory` is {memory_budget_bytes} bytes, too few for a GPU", hint="pass `--memory 64MiB`"
            )
        cut = replace(plan, lanes=averaged, block_elements=elements)
        try:
            pipeline = _Pipeline(task, cut, teachers, progress, device, timings)
        except RuntimeError:  # no room on the device, or for pinned memory
            torch.cuda.empty_cache()
            continue
        try:
            pipeline.run()
        except RuntimeError as error:
            what = (str(error).splitlines() or [""])[0]
            raise CkptEmaError(f"{device} failed: {what}", hint="pass `--device cpu`") from error
        finally:
            del pipeline
            torch.cuda.empty_cache()
        return timings
    free, total = torch.cuda.mem_get_info(device)
    raise CkptEmaError(
        f"{device} has no room for blocks of {slot_bytes // 4 >> 20} MiB: {free >> 20} of {total >> 20} MiB are free",
        hint="free some of its memory, or pass `--device cpu`",
    )


class _Slot:
    """A pinned buffer, and the moment from which it may be filled again."""

    def __init__(self, num_bytes: int) -> None:
        self.buffer = Buffer(num_bytes, pinned=True)
        self.copied = torch.cuda.Event()
        self.is_finite = torch.ones(1, dtype=torch.bool, pin_memory=True)
        self.writing: Future[None] | None = None


class _Stage:
    """A buffer on the device, and when it is full and when it is free."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.filled = torch.cuda.Event()
        self.used = torch.cuda.Event()

    def bytes(self, count: int) -> torch.Tensor:
        return self._memory[:count]


class _Pipeline:
    """The buffers and streams of one pass over the blocks; only the check for NaN allocates while it runs."""

    def __init__(
        self,
        task: Task,
        plan: BlockPlan,
        teachers: Sequence[Teacher],
        progress: Callable[[int], None],
        device: torch.device,
        timings: Timings,
    ) -> None:
        """`plan` is the task's, cut into the device's blocks."""
        self._task, self._plan, self._teachers = task, plan, teachers
        self._progress, self._device, self._timings = progress, device, timings
        self._extents = ExtentTable(task.files)
        self._num_readers = min(MAX_READERS, max(2, plan.num_threads))
        self._lock = threading.Lock()
        lanes, elements = plan.lanes, plan.block_elements
        raw = elements * max(lane.input_itemsize for lane in lanes)
        wide = elements * max(lane.accumulate_dtype.itemsize for lane in lanes)
        out = elements * max(lane.dtype.itemsize for lane in lanes)
        self._stages = [_Stage(raw, device) for _ in range(NUM_STAGES)]
        self._results = [_Stage(out, device) for _ in range(NUM_OUTPUT_SLOTS)]
        self._accumulators = [_Stage(wide, device) for _ in teachers]
        self._widened = _Stage(wide, device)
        self._copying, self._computing, self._returning = (torch.cuda.Stream(device) for _ in range(3))
        self._inputs = deque(_Slot(raw) for _ in range(NUM_INPUT_SLOTS))
        self._outputs = deque(_Slot(out) for _ in range(NUM_OUTPUT_SLOTS))
        self._spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def run(self) -> None:
        """Fold every block; nothing of it runs any more on return, on the device or off."""
        readers = ThreadPoolExecutor(self._num_readers, "read")
        writer = ThreadPoolExecutor(1, "write")
        try:
            self._drive(readers, writer)
            self._add_device_seconds()
        finally:
            readers.shutdown(wait=True, cancel_futures=True)
            writer.shutdown(wait=True, cancel_futures=True)
            torch.cuda.synchronize(self._device)

    def _drive(self, readers: ThreadPoolExecutor, writer: ThreadPoolExecutor) -> None:
        wanted = self._reads()
        pending: deque[tuple[Block, int, _Slot, Future[None]]] = deque()
        number = 0
        while True:
            while self._may_read(bool(pending)) and (item := next(wanted, None)) is not None:
                slot = self._inputs.popleft()
                started = time.perf_counter()
                slot.copied.synchronize()  # the device has taken what was in it
                self._timings.waiting += time.perf_counter() - started
                pending.append((*item, slot, readers.submit(self._read, *item, slot)))
            if not pending:
                break
            block, index, slot, reading = pending.popleft()
            started = time.perf_counter()
            reading.result()
            self._timings.waiting += time.perf_counter() - started
            self._enter(block, index, slot, self._stages[number % NUM_STAGES])
            self._inputs.append(slot)
            number += 1
            if index == len(self._task.layouts) - 1:
                self._finish(block, writer)
        for slot in self._outputs:
            if slot.writing is not None:
                slot.writing.result()

    def _may_read(self, has_pending: bool) -> bool:
        """Whether a buffer is there to be filled; the one whose copy was queued last is left to the device."""
        return bool(self._inputs) and (not has_pending or self._inputs[0].copied.query())

    def _reads(self) -> Iterator[tuple[Block, int]]:
        for block in self._plan.blocks():
            for index in range(len(self._task.layouts)):
                yield block, index

    def _read(self, block: Block, index: int, slot: _Slot) -> None:
        started = time.perf_counter()
        layout = self._task.layouts[index]
        num_bytes = (block.end - block.begin) * stored_dtype(layout, block).itemsize
        trash = self._task.files.new_trash()
        self._extents.of(layout, block.lane).read(block.begin, block.end, slot.buffer.bytes[:num_bytes], trash, {})
        seconds = time.perf_counter() - started
        with self._lock:
            self._timings.reading += seconds / self._num_readers
            self._progress(num_bytes)

    def _enter(self, block: Block, index: int, slot: _Slot, stage: _Stage) -> None:
        """Queue one student's copy to the device and its update of every teacher."""
        lane, count = block.lane, block.end - block.begin
        stored = torch_dtype(stored_dtype(self._task.layouts[index], block))
        num_bytes = count * stored.itemsize
        with self._queued("copying", self._copying, stage.used):
            stage.bytes(num_bytes).copy_(slot.buffer.tensor[:num_bytes], non_blocking=True)
            slot.copied.record(self._copying)
            stage.filled.record(self._copying)
        with self._queued("computing", self._computing, stage.filled):
            student = stage.bytes(num_bytes).view(stored)
            teachers = [self._elements(accumulator, lane, count) for accumulator in self._accumulators]
            if index == 0:
                for teacher in teachers:
                    teacher.copy_(student)
            else:
                if student.dtype is not teachers[0].dtype:
                    student = self._elements(self._widened, lane, count).copy_(student)
                for teacher, updates in zip(teachers, self._task.updates, strict=True):
                    keep, take = updates[index]
                    teacher.mul_(keep).add_(student, alpha=take)
            stage.used.record(self._computing)

    def _finish(self, block: Block, writer: ThreadPoolExecutor) -> None:
        """Queue every teacher's rounding, its way back, and its writing."""
        lane, count = block.lane, block.end - block.begin
        num_bytes = count * lane.dtype.itemsize
        for teacher, accumulator in zip(self._teachers, self._accumulators, strict=True):
            result = self._results[0]
            self._results.append(self._results.pop(0))
            slot = self._outputs.popleft()
            self._outputs.append(slot)
            if slot.writing is not None:
                started = time.perf_counter()
                slot.writing.result()
                self._timings.waiting += time.perf_counter() - started
            with self._queued("computing", self._computing, result.used):
                rounded = result.bytes(num_bytes).view(torch_dtype(lane.dtype))
                rounded.copy_(self._elements(accumulator, lane, count))
                comparable = rounded.float() if rounded.dtype.itemsize == 1 else rounded
                is_finite = comparable.isfinite().all()
                result.filled.record(self._computing)
            with self._queued("copying", self._returning, result.filled):
                # The allocator must not give the flag away while this stream still reads it.
                is_finite.record_stream(self._returning)
                slot.buffer.tensor[:num_bytes].copy_(result.bytes(num_bytes), non_blocking=True)
                slot.is_finite.copy_(is_finite.view(1), non_blocking=True)
                result.used.record(self._returning)
                slot.copied.record(self._returning)
            slot.writing = writer.submit(self._write, teacher, block, slot)

    def _write(self, teacher: Teacher, block: Block, slot: _Slot) -> None:
        slot.copied.synchronize()
        if not bool(slot.is_finite):
            # The CPU folds this block once more, and finds the tensor and the checkpoint it came from.
            cpu.refold(self._task, block)
            raise CkptEmaError(
                f"{self._device} made a NaN or an infinity where the CPU makes none", hint="pass `--device cpu`"
            )
        started = time.perf_counter()
        content = slot.buffer.bytes[: (block.end - block.begin) * block.lane.dtype.itemsize]
        write_block(teacher, self._plan.aliases, content, block.position)
        if teacher is self._teachers[-1]:  # a single thread writes, one teacher after the other
            self._task.on_finished(block)
        self._timings.writing += time.perf_counter() - started

    def _elements(self, stage: _Stage, lane: Lane, count: int) -> torch.Tensor:
        return stage.bytes(count * lane.accumulate_dtype.itemsize).view(torch_dtype(lane.accumulate_dtype))

    @contextlib.contextmanager
    def _queued(self, what: str, stream: torch.cuda.Stream, after: torch.cuda.Event) -> Iterator[None]:
        """What is called inside is queued on `stream` behind `after`, and its time counted."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            stream.wait_event(after)
            start.record(stream)
            yield
            end.record(stream)
        self._spans.append((what, start, end))
        if len(self._spans) > MAX_SPANS:
            self._add_device_seconds()

    def _add_device_seconds(self) -> None:
        """Count the spans that are over; what still runs is waited for."""
        for what, start, end in self._spans:
            end.synchronize()
            seconds = start.elapsed_time(end) / 1000
            setattr(self._timings, what, getattr(self._timings, what) + seconds)
        self._spans.clear()
