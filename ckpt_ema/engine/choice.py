"""Which engine folds: what the user asked for in, an engine with its device and the reason out."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

import torch

from ckpt_ema.averages.profiles import Update
from ckpt_ema.blocks import BlockPlan, with_lanes
from ckpt_ema.engine import cpu, cuda
from ckpt_ema.engine.contract import Engine, NonFiniteBlockError, Nowhere, Task
from ckpt_ema.engine.inputs import InputFiles
from ckpt_ema.errors import CkptEmaError, first_line
from ckpt_ema.layouts import Layout

MIN_BYTES = 20 << 30
"""A fold that reads less is done before a probe would pay."""

COMPARED_BYTES = 512 << 20
"""Read by each engine for the comparison of their bytes."""

SKIPPED_READS = 32
"""Of a probe: a GPU's readers run ahead until there is something to wait for."""

PROBE_READS = 64
"""How often an engine tells of progress from then on: its threads may do so together, and each does several times."""

PROBE_SECONDS = 0.3
LONGEST_PROBE_SECONDS = 1.5
"""From the first time on. Where that is not enough, the disk is slow."""

SUMMED_BYTES = 1 << 20


class Choice(NamedTuple):
    """An engine, and why it."""

    engine: Engine
    device: str
    """`cpu` or `cuda:0`."""

    reason: str


def choose_engine(
    wanted: str,
    plan: BlockPlan,
    layouts: Sequence[Layout],
    updates: Sequence[Sequence[Update]],
    memory_budget_bytes: int,
    local_rank: int = 0,
) -> Choice:
    """The engine for `auto`, `cpu`, `cuda` or `cuda:i`; `auto` takes the GPU where a probe says that it is faster.

    Without a number it is the GPU of this machine whose turn it is by `local_rank`. Raises CkptEmaError when a GPU is
    asked for that is not there.
    """
    if wanted == "cpu":
        return Choice(cpu.fold_blocks, "cpu", "asked for")
    if not torch.cuda.is_available():
        if wanted == "auto":
            return Choice(cpu.fold_blocks, "cpu", "no GPU here")
        built = "" if torch.version.cuda or torch.version.hip else f": torch {torch.__version__} is built without one"
        raise CkptEmaError(f"`--device {wanted}`: torch finds no GPU{built}", hint="pass `--device cpu`")
    own = local_rank % max(1, torch.cuda.device_count())
    # torch.device keeps 8 bits of the index: `cuda:256` would be GPU 0.
    index = own if wanted in ("auto", "cuda") else int(wanted.removeprefix("cuda:"))
    if index >= torch.cuda.device_count():
        raise CkptEmaError(
            f"`--device {wanted}`: there are {torch.cuda.device_count()} GPUs, counted from 0",
            hint="pass `--device cuda:0`",
        )
    device = torch.device("cuda", index)
    on_gpu = functools.partial(cuda.fold_blocks, device=device, memory_budget_bytes=memory_budget_bytes)
    if wanted != "auto":
        return Choice(on_gpu, str(device), "asked for")
    if any(layout.is_remote for layout in layouts):
        return Choice(cpu.fold_blocks, "cpu", "the inputs are remote: the network is what takes the time")
    averaged = _for_gpu(plan)
    if averaged.bytes_to_read < MIN_BYTES:
        return Choice(cpu.fold_blocks, "cpu", "too little to average for a GPU to pay")
    try:
        with InputFiles(layouts) as files:
            task = Task(averaged, layouts, updates, files)
            # The GPU first: what nobody has read of late is slow for both, and then the CPU shall seem no slower.
            on_both = [(_checksum(engine, task), _rate(engine, task)) for engine in (on_gpu, cpu.fold_blocks)]
    except NonFiniteBlockError:
        return Choice(cpu.fold_blocks, "cpu", "the students are not finite")  # as the fold itself is going to say
    except (RuntimeError, CkptEmaError) as error:  # a driver too old, a device in use: no reason not to fold
        return Choice(cpu.fold_blocks, "cpu", f"the probe failed: {first_line(error)}")
    (sum_of_gpu, rate_of_gpu), (sum_of_cpu, rate_of_cpu) = on_both
    if sum_of_gpu != sum_of_cpu:
        return Choice(cpu.fold_blocks, "cpu", f"{device} rounds in another way than the hook")
    rates = f"{rate_of_gpu:.1f} GB/s on {device}, {rate_of_cpu:.1f} on the CPU, expected from a probe"
    if rate_of_gpu > rate_of_cpu:
        return Choice(on_gpu, str(device), rates)
    return Choice(cpu.fold_blocks, "cpu", rates)


class Checksum:
    """A teacher of which only a sum is kept: of each byte times its position, however it is cut into blocks."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def write(self, block: memoryview, position: int) -> None:
        """Count `block`."""
        total = 0
        for begin in range(0, len(block), SUMMED_BYTES):
            part = torch.frombuffer(block[begin : begin + SUMMED_BYTES], dtype=torch.uint8).to(torch.int64)
            # Odd weights below 2**20: the sum of a part stays below 2**63.
            places = torch.arange(position + begin, position + begin + len(part), device="cpu") * 2654435761 % (1 << 20)
            total += int((part * (places | 1)).sum())
        with self._lock:
            self.total += total


def _for_gpu(plan: BlockPlan) -> BlockPlan:
    """What a GPU can fold of a plan; all else the CPU does in either case.

    What there is most of comes first: a probe comes no further.
    """
    lanes = filter(cuda.is_for_gpu, plan.lanes)
    return with_lanes(plan, sorted(lanes, key=attrgetter("bytes_to_read"), reverse=True))


def _checksum(engine: Engine, task: Task) -> int:
    """Of the beginning of each dtype in the teachers; the engine has run once then.

    What Triton's kernel does in a long fold is tried elsewhere; see `fused`.
    """
    sums = [Checksum() for _ in task.updates]
    engine(replace(task, plan=_start_of(task.plan, COMPARED_BYTES)), sums, lambda num_bytes: None)
    return sum(each.total for each in sums)


def _rate(engine: Engine, task: Task) -> float:
    """Gigabytes per second at which an engine would read all of a task's inputs, its start included.

    As far as the dtype that most of it has tells.
    """
    stopwatch = _Stopwatch()
    with contextlib.suppress(_EnoughError):
        engine(task, [Nowhere() for _ in task.updates], stopwatch)
    return task.plan.bytes_to_read / stopwatch.seconds_for(task.plan.bytes_to_read) / 1e9


class _EnoughError(Exception):
    """The probe has seen enough of an engine."""


class _Stopwatch:
    """An engine's progress: what it takes to start is told from what it does from then on.

    A GPU's memory is taken once for a fold, in the time in which it reads gigabytes.
    """

    def __init__(self) -> None:
        self._started = self._first = self._steady = self._now = time.perf_counter()
        self._num_reads = self._num_bytes = self._bytes_before = 0

    def __call__(self, num_bytes: int) -> None:
        """Note bytes that were read; raises _EnoughError when there was enough before, and from then on."""
        now = time.perf_counter()
        is_enough = self._num_reads >= SKIPPED_READS + PROBE_READS and now - self._steady >= PROBE_SECONDS
        if is_enough or (self._num_reads and now - self._first >= LONGEST_PROBE_SECONDS):
            # Not counted: of threads that are done together it is the first, and what the others did would be missing.
            raise _EnoughError
        self._now = now
        self._num_reads += 1
        self._num_bytes += num_bytes
        if self._num_reads == 1:
            self._first = now
        if self._num_reads == SKIPPED_READS:
            self._steady, self._bytes_before = now, self._num_bytes

    def seconds_for(self, num_bytes: int) -> float:
        """How long the engine takes until it has read so many, as it went until now."""
        if self._num_reads < SKIPPED_READS + PROBE_READS // 2:
            return num_bytes * (self._now - self._started) / max(1, self._num_bytes)
        seconds_per_byte = (self._now - self._steady) / (self._num_bytes - self._bytes_before)
        return self._steady - self._started + (num_bytes - self._bytes_before) * seconds_per_byte


def _start_of(plan: BlockPlan, num_bytes: int) -> BlockPlan:
    """The beginning of each of the plan's lanes, about `num_bytes` to read in all."""
    share = min(1.0, num_bytes / plan.bytes_to_read)
    spans = [(begin, begin + math.ceil((end - begin) * share)) for begin, end in (lane.span for lane in plan.lanes)]
    return with_lanes(plan, [replace(lane, span=span) for lane, span in zip(plan.lanes, spans, strict=True)])
