"""Which engine folds: what the user asked for in, an engine with its device and the reason out."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ckpt_ema.blocks import BlockPlan
from ckpt_ema.engine import cpu, cuda
from ckpt_ema.engine.contract import Engine, NonFiniteBlockError, Nowhere, Task, Teacher
from ckpt_ema.engine.inputs import InputFiles
from ckpt_ema.errors import CkptEmaError, first_line
from ckpt_ema.layouts import Layout
from ckpt_ema.profiles import Update

PROBED_BYTES = 1 << 30
"""Bytes read at once in a probe; a fold of less than PROBES_PER_FOLD times as many is not worth one."""

PROBES_PER_FOLD = 20
SMALL_PROBES = 8
"""As many small probes make one large."""

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
    device = torch.device(f"cuda:{own}" if wanted in ("auto", "cuda") else wanted)
    if device.index >= torch.cuda.device_count():
        raise CkptEmaError(
            f"`--device {wanted}`: there are {torch.cuda.device_count()} GPUs, counted from 0",
            hint="pass `--device cuda:0`",
        )
    on_gpu = functools.partial(cuda.fold_blocks, device=device, memory_budget_bytes=memory_budget_bytes)
    if wanted != "auto":
        return Choice(on_gpu, str(device), "asked for")
    if any(layout.is_remote for layout in layouts):
        return Choice(cpu.fold_blocks, "cpu", "the inputs are remote: the network is what takes the time")
    if plan.bytes_to_read < PROBES_PER_FOLD * PROBED_BYTES:
        return Choice(cpu.fold_blocks, "cpu", "too little to read for a GPU to pay")
    probe = _Probe(plan, layouts, updates)
    try:
        by_cpu = probe.run(cpu.fold_blocks)
        by_gpu = probe.run(on_gpu)
    except NonFiniteBlockError:
        return Choice(cpu.fold_blocks, "cpu", "the students are not finite")  # as the fold itself is going to say
    except (RuntimeError, CkptEmaError) as error:  # a driver too old, a device in use: no reason not to fold
        return Choice(cpu.fold_blocks, "cpu", f"the probe failed: {first_line(error)}")
    if by_gpu.checksum != by_cpu.checksum:
        return Choice(cpu.fold_blocks, "cpu", f"{device} rounds in another way than the hook")
    rates = f"{by_gpu.rate:.1f} GB/s on {device}, {by_cpu.rate:.1f} on the CPU, in a probe"
    if by_gpu.rate > by_cpu.rate:
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
            places = torch.arange(position + begin, position + begin + len(part)) * 2654435761 % (1 << 20)
            total += int((part * (places | 1)).sum())
        with self._lock:
            self.total += total


class Probed(NamedTuple):
    """What a probe of one engine found."""

    rate: float
    """Gigabytes per second at which it would read all of the fold's inputs, its start included."""

    checksum: int
    """Of all teachers' bytes and their positions."""


class _Probe:
    """The first blocks of a fold, folded and forgotten: a few, and more.

    What an engine takes to start is told from what each byte takes. A GPU's memory is taken and given back within the
    time in which it folds a gigabyte; a whole fold pays for that once.
    """

    def __init__(self, plan: BlockPlan, layouts: Sequence[Layout], updates: Sequence[Sequence[Update]]) -> None:
        self._bytes_to_read = plan.bytes_to_read
        self._few, self._more = (
            _start_of(plan, num_bytes // max(1, len(layouts)))
            for num_bytes in (PROBED_BYTES // SMALL_PROBES, PROBED_BYTES)
        )
        self._layouts, self._updates = layouts, updates

    def run(self, engine: Engine) -> Probed:
        """Fold with `engine`: once to warm the page cache and the device, and once for the time."""
        sums = [Checksum() for _ in self._updates]
        nowhere = [Nowhere() for _ in self._updates]
        self._seconds(engine, self._few, sums)
        self._seconds(engine, self._more, nowhere)
        few, more = (self._seconds(engine, plan, nowhere) for plan in (self._few, self._more))
        few_bytes, more_bytes = (plan.bytes_to_read for plan in (self._few, self._more))
        seconds_per_byte = max(0.0, more - few) / max(1, more_bytes - few_bytes)
        seconds = more + (self._bytes_to_read - more_bytes) * seconds_per_byte
        return Probed(self._bytes_to_read / max(seconds, 1e-9) / 1e9, sum(each.total for each in sums))

    def _seconds(self, engine: Engine, plan: BlockPlan, teachers: Sequence[Teacher]) -> float:
        with InputFiles(self._layouts) as files:
            started = time.perf_counter()
            engine(Task(plan, self._layouts, self._updates, files), teachers, lambda num_bytes: None)
            return time.perf_counter() - started


def _start_of(plan: BlockPlan, num_bytes: int) -> BlockPlan:
    """The plan's averaged, contiguous lanes up to `num_bytes` of one student."""
    lanes = []
    taken = 0
    for lane in plan.lanes:
        room = (num_bytes - taken) // lane.student_dtype.itemsize
        if not lane.is_plain_average or room <= 0:
            continue
        elements = min(lane.num_elements, room)
        whole = [start for start in lane.starts[:-1] if start < elements]
        lanes.append(replace(lane, tensors=lane.tensors[: len(whole)], starts=(*whole, elements), span=(0, elements)))
        taken += elements * lane.student_dtype.itemsize
    bytes_to_read = sum(lane.num_elements * dtype.itemsize for lane in lanes for dtype in lane.input_dtypes)
    return replace(plan, lanes=tuple(lanes), aliases=(), bytes_to_read=bytes_to_read)
