"""The fold on a GPU: readers carry blocks to the device, streams compute, writers carry finished blocks back.

Each reader takes one checkpoint's block at a time, through small page-locked buffers, into memory of the device, where
as many blocks as there are readers are in the making at once. A single thread queues the updates in the checkpoints'
order; nothing waits for the device as a whole before the end, and the model may be larger than its memory.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from ckpt_ema.blocks import Block, Lane, with_lanes
from ckpt_ema.dtypes import BY_NAME, DType
from ckpt_ema.engine import cpu, fused
from ckpt_ema.engine.buffers import torch_dtype
from ckpt_ema.engine.contract import Task, Teacher, write_block
from ckpt_ema.engine.device_plan import DevicePlan, plan_for_device
from ckpt_ema.engine.inputs import ExtentTable, stored_dtype
from ckpt_ema.engine.staging import StagingBuffers, is_lack_of_memory
from ckpt_ema.engine.workers import Ticket, Workers, wait_whatever_comes
from ckpt_ema.errors import CkptEmaError, first_line
from ckpt_ema.timings import Timings

# What an H100 and its link reach, and what importing Triton and compiling take.
LINK_BYTES_PER_SECOND = 50e9
DEVICE_BYTES_PER_SECOND = 3e12
COMPILING_SECONDS = 2.0
# Timed intervals of computing from which on those that are over are counted.
MAX_INTERVALS = 256


def fold_blocks(
    task: Task,
    teachers: Sequence[Teacher],
    progress: Callable[[int], None],
    *,
    device: torch.device,
    memory_budget_bytes: int,
) -> Timings:
    """The GPU's Engine; see there for the contract. What `is_for_gpu` refuses, such as copies, the CPU does.

    Raises CkptEmaError when the device has no room for the smaller of two block sizes, fails, or makes a NaN or an
    infinity where the CPU makes none.
    """
    plan = task.plan
    averaged = [lane for lane in plan.lanes if is_for_gpu(lane)]
    others = [lane for lane in plan.lanes if not is_for_gpu(lane)]
    timings = Timings()
    if others:
        timings = cpu.fold_blocks(replace(task, plan=with_lanes(plan, others)), teachers, progress)
    if not averaged:
        return timings
    memory = _free_and_total_bytes(device)
    plans = plan_for_device(
        with_lanes(plan, averaged),
        memory_budget_bytes=memory_budget_bytes,
        free_bytes=memory[0] if memory else 0,
        is_remote=any(layout.is_remote for layout in task.layouts),
    )
    pipeline = None
    for device_plan in plans:
        try:
            pipeline = _Pipeline(task, device_plan, teachers, progress, device, timings)
            break
        except RuntimeError as error:
            if not is_lack_of_memory(error):
                raise _failure(device, error) from error
            reason = first_line(error)
        # After the handler: what was allocated is held by the error until then.
        _empty_cache()
    if pipeline is None:
        memory = _free_and_total_bytes(device)
        free = f": {memory[0] >> 20} of {memory[1] >> 20} MiB are free" if memory else ""
        raise CkptEmaError(
            f"{device} has no room for {device_plan.device_bytes >> 10} KiB{free}",
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


def seconds_saved_by_kernel(lanes: Sequence[Lane], num_teachers: int) -> float:
    """How much longer torch's own updates keep an H100 than its link, or our kernel's one pass over memory, takes.

    Nothing where the link takes longest. It is an estimate, of what is worth compiling a kernel for.
    """
    seconds = 0.0
    for lane in lanes:
        teachers_bytes = lane.accumulate_dtype.itemsize * num_teachers
        for dtype in _dtypes_for_kernel(lane):
            # mul_ reads and writes the teacher; add_ reads it and the student, and writes it.
            by_torch = 5 * teachers_bytes / DEVICE_BYTES_PER_SECOND
            by_kernel = (2 * teachers_bytes + dtype.itemsize) / DEVICE_BYTES_PER_SECOND
            saved = by_torch - max(by_kernel, dtype.itemsize / LINK_BYTES_PER_SECOND)
            seconds += (lane.span[1] - lane.span[0]) * max(0.0, saved)
    return seconds


def _dtypes_for_kernel(lane: Lane) -> list[DType]:
    """Those of the inputs that a kernel could update the lane's teachers with: not of the first, which is copied."""
    if torch_dtype(lane.accumulate_dtype) not in fused.DTYPES:
        return []
    return [dtype for dtype in lane.input_dtypes[1:] if torch_dtype(dtype) in fused.DTYPES]


def is_for_gpu(lane: Lane) -> bool:
    """Whether a lane is folded on the device; all others the CPU does."""
    # Where a teacher is kept in 16 bits, torch's add_ rounds alpha to these on a CPU, and on a GPU it does not.
    is_narrow = lane.accumulate_dtype.itemsize < 4
    return lane.is_plain_average and lane.dtype.kind != "complex" and not is_narrow


def _free_and_total_bytes(device: torch.device) -> tuple[int, int] | None:
    _empty_cache()  # what torch keeps for later is free, too
    try:
        return torch.cuda.mem_get_info(device)
    except RuntimeError:  # so full that it cannot be asked
        return None


def _failure(device: torch.device, error: RuntimeError) -> CkptEmaError:
    return CkptEmaError(f"{device} failed: {first_line(error)}", hint="pass `--device cpu`")


def _empty_cache() -> None:
    # A device that failed fails here, too; what it failed of is being raised.
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


class _DeviceBuffer:
    """Memory for a block on the device."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def bytes(self, count: int) -> torch.Tensor:
        return self._memory[:count]

    def elements(self, dtype: DType, count: int) -> torch.Tensor:
        return self._memory[: count * dtype.itemsize].view(torch_dtype(dtype))

    def close(self) -> None:
        """Give the memory back, whatever views there are of it."""
        self._memory.untyped_storage().resize_(0)


Interval = tuple[torch.cuda.Event, torch.cuda.Event]
"""From which moment on the device computed, and until when."""

Kind = TypeVar("Kind", bound=_DeviceBuffer)


class _Exchanged(_DeviceBuffer):
    """One that a thread fills or empties: when it is full, and what the thread is at."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        # Whoever waits for an event sleeps: readers and writers need the cores.
        self.filled = torch.cuda.Event(blocking=True)
        self.ticket: Ticket | None = None
        # Last, here and below: what fails before has no memory that somebody would have to give back.
        super().__init__(num_bytes, device)


class _Incoming(_Exchanged):
    """One for a student's block, and when it is free again."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.used = torch.cuda.Event(blocking=True)
        super().__init__(num_bytes, device)


class _Outgoing(_Exchanged):
    """One for a finished block; on the host, its least and its greatest number: they say whether all is finite."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.extremes = torch.empty(2, dtype=torch.float64, device="cpu", pin_memory=True)
        super().__init__(num_bytes, device)

    def close(self) -> None:
        super().close()
        vars(self).pop("extremes", None)


class _Pipeline:
    """The buffers and streams of one pass over the blocks.

    While it runs it allocates a few bytes per block.
    """

    def __init__(
        self,
        task: Task,
        device_plan: DevicePlan,
        teachers: Sequence[Teacher],
        progress: Callable[[int], None],
        device: torch.device,
        timings: Timings,
    ) -> None:
        self._task, self._plan, self._teachers = task, device_plan.blocks, teachers
        self._staging_bytes = device_plan.staging_bytes
        self._progress, self._device, self._timings = progress, device, timings
        self._extents = ExtentTable(task.files)
        self._num_readers, self._num_writers = device_plan.num_readers, device_plan.num_writers
        self._lock = threading.Lock()
        self.errors_of_caller: list[BaseException] = []
        """What was raised in reading, writing and progress, and is not the device's."""

        self._failures: list[BaseException] = []
        """What any thread raised."""

        self._buffers: list[_DeviceBuffer] = []
        self._staging: list[StagingBuffers] = []
        try:
            self._allocate(device_plan)
        except BaseException:
            self.close()
            raise

    def _allocate(self, plan: DevicePlan) -> None:
        device, lanes, teachers = self._device, self._plan.lanes, self._teachers
        raw, wide, out = plan.raw_bytes, plan.wide_bytes, plan.out_bytes
        self._incoming = deque(self._made(_Incoming, raw) for _ in range(plan.num_incoming))
        self._outgoing = deque(self._made(_Outgoing, out) for _ in range(plan.num_outgoing))
        self._widened = self._made(_DeviceBuffer, wide)
        self._accumulators = [self._made(_DeviceBuffer, wide) for _ in teachers]
        streams = [torch.cuda.Stream(device) for _ in range(3)]
        self._copying, self._computing, self._returning = streams
        for stream in streams:
            # The allocator may have given memory that the caller's own work has still to write to.
            stream.wait_stream(torch.cuda.current_stream(device))
        self._intervals: deque[Interval] = deque()
        self._unused_intervals: list[Interval] = []
        self._uploads = StagingBuffers(plan.num_uploads, min(plan.staging_bytes, raw), device, self._copying)
        self._downloads = StagingBuffers(plan.num_writers, min(plan.staging_bytes, out), device, self._returning)
        self._staging = [self._uploads, self._downloads]
        self._fused: set[tuple[DType, DType]] = set()
        """Dtypes of teacher and student that one kernel does in one pass."""

        if seconds_saved_by_kernel(lanes, len(teachers)) > COMPILING_SECONDS:
            pairs = {(lane.accumulate_dtype, dtype) for lane in lanes for dtype in _dtypes_for_kernel(lane)}
            self._fused = {
                (teacher, student)
                for teacher, student in pairs
                if fused.is_usable(device, torch_dtype(teacher), torch_dtype(student))
            }

    def _made(self, kind: type[Kind], num_bytes: int) -> Kind:
        """A buffer that `close` gives back, however many of them there are."""
        with torch.inference_mode(False):  # or no thread could write to it: they are in none of the caller's modes
            buffer = kind(num_bytes, self._device)
        self._buffers.append(buffer)
        return buffer

    def run(self) -> None:
        """Fold every block; nothing of it runs any more on return, on the device or off."""
        readers = Workers(self._num_readers, "read", self._failures)
        writers = Workers(self._num_writers, "write", self._failures)
        ends = [readers.end, writers.end, self._finish_queued]
        try:
            with torch.cuda.device(self._device):
                self._drive(readers, writers)
                torch.cuda.synchronize(self._device)
                self._count_intervals()
        finally:
            wait_whatever_comes(ends)
        self._timings.copying += self._uploads.waiting_seconds / self._num_readers
        self._timings.copying += self._downloads.waiting_seconds / self._num_writers

    def _finish_queued(self) -> None:
        with contextlib.suppress(RuntimeError):  # a device that failed, which has been said
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Give all memory back, though the traceback of an error that is held has the pipeline.

        But for the buffer that was being read into or written from when the error came up.
        """
        for buffer in self._buffers:
            buffer.close()
        for buffers in self._staging:
            buffers.close()
        self.errors_of_caller.clear()
        self._failures.clear()

    def _drive(self, readers: Workers, writers: Workers) -> None:
        wanted = self._reads()
        pending: deque[tuple[Block, int, _Incoming]] = deque()
        while True:
            while self._incoming and (item := next(wanted, None)) is not None:
                buffer = self._incoming.popleft()
                buffer.ticket = readers.submit(functools.partial(self._read, *item, buffer))
                pending.append((*item, buffer))
            if not pending:
                break
            block, index, buffer = pending.popleft()
            self._wait_for(buffer)
            self._enter(block, index, buffer)
            self._incoming.append(buffer)
            if index == len(self._task.layouts) - 1:
                self._finish(block, writers)
            if len(self._intervals) > MAX_INTERVALS:
                self._count_intervals()
        for outgoing in self._outgoing:
            self._wait_for(outgoing)

    def _wait_for(self, buffer: _Exchanged) -> None:
        """Wait until no thread fills or empties it any more, and count the time; raise what any thread raised."""
        ticket, buffer.ticket = buffer.ticket, None
        if ticket is not None:
            started = time.perf_counter()
            ticket.wait()
            self._timings.waiting += time.perf_counter() - started
        if self._failures:
            raise self._failures[0]

    def _reads(self) -> Iterator[tuple[Block, int]]:
        for block in self._plan.blocks():
            for index in range(len(self._task.layouts)):
                yield block, index

    def _read(self, block: Block, index: int, buffer: _Incoming) -> None:
        """Carry one student's block to the device."""
        layout = self._task.layouts[index]
        itemsize = stored_dtype(layout, block).itemsize
        num_bytes = (block.end - block.begin) * itemsize
        extents = self._extents.of(layout, block.lane)
        trash = self._task.files.new_trash(self._staging_bytes)
        seconds = 0.0

        def fill(staged: memoryview, position: int) -> None:
            nonlocal seconds
            started = time.perf_counter()
            first = block.begin + position // itemsize
            with self._of_caller():
                extents.read(first, first + len(staged) // itemsize, staged, trash, {})
            seconds += time.perf_counter() - started

        with torch.cuda.device(self._device):
            buffer.used.synchronize()  # what the device had in it before
            self._uploads.upload(buffer.bytes(num_bytes), fill)
            buffer.filled.record(self._copying)
        with self._of_caller(), self._lock:
            self._timings.reading += seconds / self._num_readers
            self._progress(num_bytes)

    def _enter(self, block: Block, index: int, buffer: _Incoming) -> None:
        """Queue one student's update of every teacher."""
        lane, count = block.lane, block.end - block.begin
        stored = stored_dtype(self._task.layouts[index], block)
        self._computing.wait_event(buffer.filled)
        with self._queued():
            student = buffer.elements(stored, count)
            teachers = [accumulator.elements(lane.accumulate_dtype, count) for accumulator in self._accumulators]
            if index == 0:
                for teacher in teachers:
                    teacher.copy_(student)
            else:
                self._update(teachers, student, index, lane)
            buffer.used.record(self._computing)

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

    def _finish(self, block: Block, writers: Workers) -> None:
        """Queue every teacher's rounding, and its way back."""
        lane, count = block.lane, block.end - block.begin
        finished = _Countdown(len(self._teachers))
        for teacher, accumulator in zip(self._teachers, self._accumulators, strict=True):
            buffer = self._outgoing.popleft()
            self._wait_for(buffer)
            with self._queued():
                rounded = buffer.elements(lane.dtype, count)
                rounded.copy_(accumulator.elements(lane.accumulate_dtype, count))
                if rounded.dtype.itemsize == 1:  # 8-bit floats know no order; float32 holds all of them
                    rounded = self._widened.elements(BY_NAME["float32"], count).copy_(rounded)
                # What is allocated here gets no name: the traceback of an error that is held would keep it.
                buffer.extremes.copy_(torch.stack(torch.aminmax(rounded)).double(), non_blocking=True)
                buffer.filled.record(self._computing)
            buffer.ticket = writers.submit(functools.partial(self._write, teacher, block, buffer, finished))
            self._outgoing.append(buffer)

    def _write(self, teacher: Teacher, block: Block, buffer: _Outgoing, finished: _Countdown) -> None:
        """Carry one teacher's block back, and write it."""
        with torch.cuda.device(self._device):
            buffer.filled.synchronize()
        if not _is_finite(buffer.extremes):
            # The CPU folds this block once more, and finds the tensor and the checkpoint it came from.
            with self._of_caller():
                cpu.refold(self._task, block)
            raise CkptEmaError(
                f"{self._device} made a NaN or an infinity where the CPU makes none", hint="pass `--device cpu`"
            )
        seconds = 0.0

        def put(content: memoryview, position: int) -> None:
            nonlocal seconds
            started = time.perf_counter()
            with self._of_caller():
                write_block(teacher, self._plan.aliases, content, block.position + position)
            seconds += time.perf_counter() - started

        self._downloads.download(buffer.bytes((block.end - block.begin) * block.lane.dtype.itemsize), put)
        if finished.is_last():
            with self._of_caller():
                self._task.on_finished(block)
        with self._lock:
            self._timings.writing += seconds / self._num_writers

    @contextlib.contextmanager
    def _of_caller(self) -> Iterator[None]:
        """What is raised inside is not the device's, whatever its type."""
        try:
            yield
        except BaseException as error:
            self.errors_of_caller.append(error)
            raise

    @contextlib.contextmanager
    def _queued(self) -> Iterator[None]:
        """What is called inside is computed on the device when its turn comes, and its time counted."""
        start, end = self._unused_intervals.pop() if self._unused_intervals else _new_interval()
        with torch.cuda.stream(self._computing):
            start.record(self._computing)
            yield
            end.record(self._computing)
        self._intervals.append((start, end))

    def _count_intervals(self) -> None:
        """Count the intervals that are over, as far as the first that is not."""
        while self._intervals and self._intervals[0][1].query():
            start, end = interval = self._intervals.popleft()
            self._timings.computing += start.elapsed_time(end) / 1000
            self._unused_intervals.append(interval)


def _new_interval() -> Interval:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _is_finite(extremes: torch.Tensor) -> bool:
    return all(map(math.isfinite, extremes.tolist()))


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
