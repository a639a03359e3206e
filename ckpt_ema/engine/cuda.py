"""The fold on a GPU: readers fill pinned buffers, streams copy in, compute and copy back, writers write.

A single thread drives it and only queues work. Reads are handed out in the order in which the device needs them, each
with a buffer that the device has only to let go of, so that nothing ever waits for the device as a whole. Blocks are as
large as a pinned buffer, so the model may be larger than the device's memory.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from ckpt_ema.blocks import ELEMENT_MULTIPLE, Block, BlockPlan, Lane, buffer_bytes_per_element, padded
from ckpt_ema.dtypes import DType
from ckpt_ema.engine import cpu, fused
from ckpt_ema.engine.arithmetic import comparable
from ckpt_ema.engine.buffers import Buffer, torch_dtype
from ckpt_ema.engine.contract import Jobs, Task, Teacher, wait_whatever_comes, write_block
from ckpt_ema.engine.inputs import ExtentTable, stored_dtype
from ckpt_ema.errors import CkptEmaError, MisuseError, first_line
from ckpt_ema.timings import Timings

# What is copied to the device at once; large enough for the link's full speed. A thread takes several times as long
# to read as many bytes as the link does to carry them: it takes many buffers being filled at once to keep that busy.
SLOT_BYTES = 16 << 20
MAX_SLOTS = 16
MIN_SLOTS = 8
NUM_STAGES = 3
NUM_RESULTS = 2
MAX_READERS = 12
MAX_WRITERS = 8
# From so many teachers of 16-bit students on, torch's own calls, which read and write each teacher twice, keep an H100
# longer than the link does (20 bytes of each at 3 TB/s, against 2 of the student at 50 GB/s). With fewer, compiling the
# kernel that does it in one pass, about a second, costs more than it saves.
FUSED_FROM_TEACHERS = 6
# Timed spans of the device from which on those that are over are counted.
MAX_SPANS = 256


def fold_blocks(
    task: Task,
    teachers: Sequence[Teacher],
    progress: Callable[[int], None],
    *,
    device: torch.device,
    memory_budget_bytes: int,
) -> Timings:
    """The GPU's Engine; see there for the contract. What is copied, complex or not contiguous, the CPU does.

    Raises CkptEmaError when the device has no room for the smaller of two block sizes, fails, or makes a NaN or an
    infinity where the CPU makes none.
    """
    plan = task.plan
    averaged = tuple(lane for lane in plan.lanes if _is_for_gpu(lane))
    others = tuple(lane for lane in plan.lanes if not _is_for_gpu(lane))
    timings = Timings()
    if others:
        timings = cpu.fold_blocks(replace(task, plan=replace(plan, lanes=others)), teachers, progress)
    if not averaged:
        return timings
    slot_bytes = min(SLOT_BYTES, memory_budget_bytes // MIN_SLOTS)
    slot_bytes = 1 << max(0, slot_bytes.bit_length() - 1)  # torch pins powers of two, whatever is asked for
    num_slots = min(MAX_SLOTS, memory_budget_bytes // slot_bytes)
    pipeline = None
    for size in (slot_bytes, slot_bytes // 4):
        elements = _elements_of_block(averaged, size)
        if not elements:
            raise MisuseError(
                f"`--memory` is {memory_budget_bytes} bytes, too few for a GPU", hint="pass `--memory 64MiB`"
            )
        cut = replace(plan, lanes=averaged, block_elements=elements)
        try:
            pipeline = _Pipeline(task, cut, teachers, progress, device, timings, num_slots)
            break
        except RuntimeError as error:
            if not _is_lack_of_memory(error):
                raise _failure(device, error) from error
            reason = first_line(error)
        # Behind the handler: what was allocated is held by the error until then.
        _empty_cache()
    if pipeline is None:
        raise CkptEmaError(
            f"{device} has no room for blocks of {size >> 10} KiB{_free_memory(device)}",
            details=[reason],
            hint="free some of its memory, or pass `--device cpu`",
        )
    try:
        pipeline.run()
    except RuntimeError as error:
        if any(error is each for each in pipeline.errors_of_caller):
            raise
        raise _failure(device, error) from error
    finally:
        pipeline.close()
        _empty_cache()
    return timings


def _is_for_gpu(lane: Lane) -> bool:
    return lane.is_plain_average and lane.dtype.kind != "complex"


def _elements_of_block(lanes: Sequence[Lane], num_bytes: int) -> int:
    """As many as a buffer of `num_bytes` holds of every lane, but for those that it holds whole, such as counters."""
    sizes = [(buffer_bytes_per_element(lane)[0], padded(lane.num_elements)) for lane in lanes]
    longer = [size for size, count in sizes if size * count > num_bytes]
    if not longer:
        return max(count for _, count in sizes)
    return num_bytes // max(longer) // ELEMENT_MULTIPLE * ELEMENT_MULTIPLE


def _is_lack_of_memory(error: RuntimeError) -> bool:
    # Where there is no room for anything at all, nor for page-locked memory, it is no OutOfMemoryError.
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error)


def _free_memory(device: torch.device) -> str:
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # so full that it cannot be asked
        return ""
    return f": {free >> 20} of {total >> 20} MiB are free"


def _failure(device: torch.device, error: RuntimeError) -> CkptEmaError:
    return CkptEmaError(f"{device} failed: {first_line(error)}", hint="pass `--device cpu`")


def _empty_cache() -> None:
    # A device that failed fails here, too; what it failed of is being raised.
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


class _Slot:
    """A pinned buffer, when the device has copied its content, and the reading into it or the writing of it."""

    buffer: Buffer

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        # Whoever waits for it sleeps: readers and writers need the cores.
        self.copied = torch.cuda.Event(blocking=True)
        self.future: Future[None] | None = None

    def pin(self) -> None:
        """Get the memory, where there is none yet: that takes as long as reading does, and threads do it at once."""
        if hasattr(self, "buffer"):
            return
        try:
            self.buffer = Buffer(self._num_bytes, pinned=True)
        except RuntimeError as error:
            if not _is_lack_of_memory(error):
                raise
            raise CkptEmaError(
                f"there is no room for a page-locked buffer of {self._num_bytes >> 10} KiB: {first_line(error)}",
                hint="pass a smaller `--memory`, or `--device cpu`",
            ) from error

    def close(self) -> None:
        """Give the memory back, whoever holds this."""
        self.future = None
        vars(self).pop("buffer", None)


class _Output(_Slot):
    """One for a finished block, with its least and its greatest number."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.extremes = torch.empty(2, dtype=torch.float64, device="cpu", pin_memory=True)

    def close(self) -> None:
        super().close()
        del self.extremes


class _Stage:
    """A buffer on the device, and when it is full and when it is free."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.filled = torch.cuda.Event()
        self.used = torch.cuda.Event()

    def bytes(self, count: int) -> torch.Tensor:
        return self._memory[:count]

    def elements(self, dtype: DType, count: int) -> torch.Tensor:
        return self._memory[: count * dtype.itemsize].view(torch_dtype(dtype))

    def close(self) -> None:
        """Give the memory back, whatever views there are of it."""
        self._memory.untyped_storage().resize_(0)


class _Result(_Stage):
    """A finished block on the device, and its least and its greatest number: they say whether all of it is finite."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        super().__init__(num_bytes, device)
        self.extremes = torch.empty(2, dtype=torch.float64, device=device)

    def close(self) -> None:
        super().close()
        self.extremes.untyped_storage().resize_(0)


class _Pipeline:
    """The buffers and streams of one pass over the blocks.

    While it runs it allocates a few bytes per block, and for 8-bit teachers a block in float32.
    """

    def __init__(
        self,
        task: Task,
        plan: BlockPlan,
        teachers: Sequence[Teacher],
        progress: Callable[[int], None],
        device: torch.device,
        timings: Timings,
        num_slots: int,
    ) -> None:
        """`plan` is the task's, cut into the device's blocks; `num_slots` pinned buffers of a block each."""
        self._task, self._plan, self._teachers = task, plan, teachers
        self._progress, self._device, self._timings = progress, device, timings
        self._extents = ExtentTable(task.files)
        # Several teachers are several files, which are written at once.
        num_outputs = num_slots // (4 if len(teachers) == 1 else 2)
        self._num_readers = min(MAX_READERS, num_slots - num_outputs, max(2, plan.num_threads))
        self._num_writers = min(MAX_WRITERS, num_outputs, max(1, plan.num_threads // 2))
        self._lock = threading.Lock()
        self._jobs = Jobs()
        self.errors_of_caller: list[BaseException] = []
        """What was raised in reading, writing and progress, and is not the device's."""

        lanes = plan.lanes
        counts = [min(plan.block_elements, padded(lane.num_elements)) for lane in lanes]
        raw = max(count * lane.input_itemsize for count, lane in zip(counts, lanes, strict=True))
        wide = max(count * lane.accumulate_dtype.itemsize for count, lane in zip(counts, lanes, strict=True))
        out = max(count * lane.dtype.itemsize for count, lane in zip(counts, lanes, strict=True))
        self._stages = [_Stage(raw, device) for _ in range(NUM_STAGES)]
        self._results = deque(_Result(out, device) for _ in range(NUM_RESULTS))
        self._accumulators = [_Stage(wide, device) for _ in teachers]
        self._widened = _Stage(wide, device)
        streams = [torch.cuda.Stream(device) for _ in range(3)]
        self._copying, self._computing, self._returning = streams
        for stream in streams:
            # The allocator may have given memory that the caller's own work has still to write to.
            stream.wait_stream(torch.cuda.current_stream(device))
        self._inputs = deque(_Slot(raw) for _ in range(num_slots - num_outputs))
        self._outputs = deque(_Output(out) for _ in range(num_outputs))
        self._slots = [*self._inputs, *self._outputs]
        self._spans: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._fused = {
            (lane.accumulate_dtype, dtype)
            for lane in lanes
            for dtype in lane.input_dtypes
            if len(teachers) >= FUSED_FROM_TEACHERS
            and fused.is_usable(device, torch_dtype(lane.accumulate_dtype), torch_dtype(dtype))
        }
        """Dtypes of teacher and student that one kernel does in one pass."""

    def run(self) -> None:
        """Fold every block; nothing of it runs any more on return, on the device or off."""
        readers = ThreadPoolExecutor(self._num_readers, "read")
        writers = ThreadPoolExecutor(self._num_writers, "write")
        try:
            self._drive(readers, writers)
            torch.cuda.synchronize(self._device)
            self._count_spans()
        finally:
            wait_whatever_comes([functools.partial(self._end, readers, writers)])

    def _end(self, readers: ThreadPoolExecutor, writers: ThreadPoolExecutor) -> None:
        self._jobs.end()
        for executor in (readers, writers):
            executor.shutdown()
        with contextlib.suppress(RuntimeError):  # a device that failed, which has been said
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Give all memory back, though the traceback of an error that is held has the pipeline.

        But for the buffer that was being read into or written from when the error came up.
        """
        for stage in (*self._stages, *self._results, *self._accumulators, self._widened):
            stage.close()
        for slot in self._slots:
            slot.close()
        self.errors_of_caller.clear()

    def _drive(self, readers: ThreadPoolExecutor, writers: ThreadPoolExecutor) -> None:
        wanted = self._reads()
        pending: deque[tuple[Block, int, _Slot]] = deque()
        number = 0
        for output in self._outputs:
            output.future = self._submit(writers, output.pin)
        while True:
            while self._inputs and (item := next(wanted, None)) is not None:
                slot = self._inputs.popleft()
                slot.future = self._submit(readers, self._read, *item, slot)
                pending.append((*item, slot))
            if not pending:
                break
            block, index, slot = pending.popleft()
            assert slot.future is not None
            self._wait(slot.future.result)
            self._enter(block, index, slot, self._stages[number % NUM_STAGES])
            self._inputs.append(slot)
            number += 1
            if index == len(self._task.layouts) - 1:
                self._finish(block, writers)
        for output in self._outputs:
            if output.future is not None:
                output.future.result()

    def _submit(self, executor: ThreadPoolExecutor, job: Callable[..., None], *arguments: Any) -> Future[None]:
        return executor.submit(self._jobs.run, functools.partial(job, *arguments))

    def _wait(self, until: Callable[[], object]) -> None:
        """Call what waits for a reading or a writing, and count the time."""
        started = time.perf_counter()
        until()
        self._timings.waiting += time.perf_counter() - started

    def _reads(self) -> Iterator[tuple[Block, int]]:
        for block in self._plan.blocks():
            for index in range(len(self._task.layouts)):
                yield block, index

    def _read(self, block: Block, index: int, slot: _Slot) -> None:
        slot.pin()
        self._wait_until_copied(slot)  # the device has taken what was in it
        with self._of_caller():
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
            teachers = [accumulator.elements(lane.accumulate_dtype, count) for accumulator in self._accumulators]
            if index == 0:
                for teacher in teachers:
                    teacher.copy_(student)
            else:
                self._update(teachers, student, index, lane)
            stage.used.record(self._computing)

    def _update(self, teachers: Sequence[torch.Tensor], student: torch.Tensor, index: int, lane: Lane) -> None:
        is_fused = (lane.accumulate_dtype, lane.input_dtypes[index]) in self._fused
        if not is_fused and student.dtype is not teachers[0].dtype:
            student = self._widened.elements(lane.accumulate_dtype, len(student)).copy_(student)
        for teacher, updates in zip(teachers, self._task.updates, strict=True):
            keep, take = updates[index]
            if is_fused:
                fused.update_run_(teacher, student, keep, take)
            else:
                teacher.mul_(keep).add_(student, alpha=take)

    def _finish(self, block: Block, writers: ThreadPoolExecutor) -> None:
        """Queue every teacher's rounding, its way back, and its writing."""
        lane, count = block.lane, block.end - block.begin
        num_bytes = count * lane.dtype.itemsize
        finished = _Countdown(len(self._teachers))
        for teacher, accumulator in zip(self._teachers, self._accumulators, strict=True):
            self._results.rotate()
            self._outputs.rotate()
            result, slot = self._results[0], self._outputs[0]
            if slot.future is not None:
                self._wait(slot.future.result)
            with self._queued("computing", self._computing, result.used):
                rounded = result.elements(lane.dtype, count)
                rounded.copy_(accumulator.elements(lane.accumulate_dtype, count))
                least, greatest = torch.aminmax(comparable(rounded))
                result.extremes.copy_(torch.stack((least, greatest)))
                result.filled.record(self._computing)
            with self._queued("copying", self._returning, result.filled):
                slot.buffer.tensor[:num_bytes].copy_(result.bytes(num_bytes), non_blocking=True)
                slot.extremes.copy_(result.extremes, non_blocking=True)
                result.used.record(self._returning)
                slot.copied.record(self._returning)
            slot.future = self._submit(writers, self._write, teacher, block, slot, finished)

    def _write(self, teacher: Teacher, block: Block, slot: _Output, finished: _Countdown) -> None:
        self._wait_until_copied(slot)
        if not all(map(math.isfinite, slot.extremes.tolist())):
            # The CPU folds this block once more, and finds the tensor and the checkpoint it came from.
            with self._of_caller():
                cpu.refold(self._task, block)
            raise CkptEmaError(
                f"{self._device} made a NaN or an infinity where the CPU makes none", hint="pass `--device cpu`"
            )
        started = time.perf_counter()
        content = slot.buffer.bytes[: (block.end - block.begin) * block.lane.dtype.itemsize]
        with self._of_caller():
            write_block(teacher, self._plan.aliases, content, block.position)
            if finished.is_last():
                self._task.on_finished(block)
        with self._lock:
            self._timings.writing += (time.perf_counter() - started) / self._num_writers

    def _wait_until_copied(self, slot: _Slot) -> None:
        with torch.cuda.device(self._device):  # a thread begins with the first GPU, which it might begin to use
            slot.copied.synchronize()

    @contextlib.contextmanager
    def _of_caller(self) -> Iterator[None]:
        """What is raised inside is not the device's, whatever its type."""
        try:
            yield
        except BaseException as error:
            self.errors_of_caller.append(error)
            raise

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
            self._count_spans()

    def _count_spans(self) -> None:
        """Count the spans that are over, as far as the first that is not."""
        while self._spans and self._spans[0][2].query():
            what, start, end = self._spans.popleft()
            seconds = start.elapsed_time(end) / 1000
            setattr(self._timings, what, getattr(self._timings, what) + seconds)


class _Countdown:
    """Which of several threads is the last."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._lock = threading.Lock()

    def is_last(self) -> bool:
        """Whether all others have asked before."""
        with self._lock:
            self._left -= 1
            return self._left == 0
