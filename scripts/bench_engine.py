"""What bounds an engine: the same fold with one thing of it changed at a time, its teachers forgotten.

The variants take turns, so that a machine that gets slower slows all of them. Planning, page-locking and writing are
not in the figures; taking memory of the device and giving it back is.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_candidates import EIGHT_MOMENTA, MOMENTUM, prepare_pinned


def bench_engine(
    arguments: argparse.Namespace, write_run: Callable[[str], Path], device: str
) -> Iterator[tuple[str, Any]]:
    """Print one table per dtype for `cpu` or `cuda`; `write_run(dtype)` makes the checkpoints."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        print("\nno GPU here: its engine was not measured", flush=True)
        return
    for dtype in arguments.dtypes:
        run = write_run(dtype)
        variants = _on_gpu(run) if device == "cuda" else _on_cpu(run)
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for round_number in range(arguments.rounds + 1):
            for name, work in variants.items():
                took = work()
                label = f"{run.name}, round {round_number} of {arguments.rounds}: {name}"
                print(f"{label} took {took:.3f} s", file=sys.stderr, flush=True)
                if round_number:  # the first one warms the page cache and locks pages
                    seconds[name].append(took)
        num_bytes = sum(path.stat().st_size for path in run.glob("step_*"))
        name_of_device = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        print(f"\nthe engine on {name_of_device}, {num_bytes / 1e9:.2f} GB of {dtype}, warm, nothing written\n")
        print("| | GB/s |")
        print("|---|---|")
        for name, values in seconds.items():
            print(f"| {name} | {num_bytes / statistics.median(values) / 1e9:.1f} |", flush=True)
        if not arguments.keep:
            shutil.rmtree(run)
        yield dtype, {"device": name_of_device, "run_bytes": num_bytes, "seconds": seconds}


def _on_cpu(run: Path) -> dict[str, Callable[[], float]]:
    from ckpt_ema.engine import cpu

    cores = len(os.sched_getaffinity(0))
    found = {"as it is": functools.partial(_seconds, run, cpu.fold_blocks)}
    for threads in (1, 2, 4, 8, 16, 32):
        if threads <= cores:
            found[f"{threads} threads"] = functools.partial(_seconds, run, cpu.fold_blocks, num_threads=threads)
    if cores >= 4:
        # Nothing in common but the memory and the files: faster than as many threads, these wait for the interpreter.
        found[f"4 processes of {cores // 4} threads"] = functools.partial(_seconds_of_processes, run, 4, cores // 4)
    for elements in (256, 1024, 2048, 4096):
        found[f"blocks of {elements}k elements"] = functools.partial(
            _seconds, run, cpu.fold_blocks, block_elements=elements << 10
        )
    return found


def _on_gpu(run: Path) -> dict[str, Callable[[], float]]:
    import torch

    from ckpt_ema.engine import cuda, device_plan, inputs, staging
    from ckpt_ema.sizes import DEFAULT_MEMORY_BUDGET_BYTES

    engine = functools.partial(
        cuda.fold_blocks, device=torch.device("cuda:0"), memory_budget_bytes=DEFAULT_MEMORY_BUDGET_BYTES
    )

    def with_(budget: int = DEFAULT_MEMORY_BUDGET_BYTES, **values: int) -> Callable[[], float]:
        def work() -> float:
            with _replaced(device_plan, **values):
                return _seconds(run, functools.partial(engine, memory_budget_bytes=budget))

        return work

    # What is in memory that nothing was read into may be no number.
    all_finite = functools.partial(_replaced, cuda, _is_finite=lambda extremes: True)

    def without_reading() -> float:
        with _replaced(inputs.LaneExtents, read=lambda *arguments: None), all_finite():
            return _seconds(run, engine)

    def without_copying() -> float:
        def note_only(buffers: Any, into: object, out_of: object, slot: Any) -> None:
            slot.copied.record(buffers._stream)

        with _replaced(staging.StagingBuffers, _copy=note_only), all_finite():
            return _seconds(run, engine)

    def switching(seconds: float) -> Callable[[], float]:
        def work() -> float:
            before = sys.getswitchinterval()
            sys.setswitchinterval(seconds)
            try:
                return _seconds(run, engine)
            finally:
                sys.setswitchinterval(before)

        return work

    found: dict[str, Callable[[], float]] = {
        "pinned copy alone": functools.partial(_copy_seconds, run),
        "as it is": functools.partial(_seconds, run, engine),
        "without reading": without_reading,
        "without copying": without_copying,
        "eight teachers": functools.partial(_seconds, run, engine, momentum=EIGHT_MOMENTA),
        "switching threads after 0.2 ms": switching(2e-4),
    }
    for readers in (4, 8, 12, 14):
        found[f"{readers} readers"] = with_(MAX_READERS=readers)
    for ahead in (0, 8):
        found[f"{ahead} buffers ahead"] = with_(STAGING_AHEAD=ahead)
    for mib in (1, 2, 8, 16):
        # As many threads as there are with the default: larger ones need more memory for that.
        budget = max(DEFAULT_MEMORY_BUDGET_BYTES, DEFAULT_MEMORY_BUDGET_BYTES * mib // 4)
        found[f"buffers of {mib} MiB"] = with_(budget, STAGING_BYTES=mib << 20, STAGING_BUFFERS_PER_BLOCK=64 // mib)
    for mib in (8, 16, 32, 128):
        found[f"blocks of {mib} MiB"] = with_(STAGING_BUFFERS_PER_BLOCK=mib // 4)
    return found


def _seconds_of_processes(run: Path, count: int, num_threads: int) -> float:
    spawning = multiprocessing.get_context("spawn")
    # It lets none go before each has one part.
    barrier = spawning.Barrier(count)
    span = functools.partial(_span_of_part, run, count, num_threads)
    with ProcessPoolExecutor(count, spawning, _meet_at, (barrier,)) as pool:
        spans = list(pool.map(span, range(count)))
    return max(end for _, end in spans) - min(start for start, _ in spans)


_barriers: list[Any] = []
"""Of a process that takes a part, its one."""


def _meet_at(barrier: Any) -> None:
    _barriers.append(barrier)


def _span_of_part(run: Path, count: int, num_threads: int, number: int) -> tuple[float, float]:
    import ckpt_ema
    from ckpt_ema.blocks import plan_of_rank
    from ckpt_ema.engine import cpu
    from ckpt_ema.engine.contract import Nowhere, Task
    from ckpt_ema.engine.inputs import InputFiles

    plan = ckpt_ema.plan(run, run.parent / "teacher.safetensors", momentum=MOMENTUM)
    blocks = replace(plan_of_rank(plan.blocks, number, count), num_threads=num_threads)
    with InputFiles(plan.layouts) as files:
        task = Task(blocks, plan.layouts, [teacher.updates for teacher in plan.teachers], files)
        # Not the first fold of a process, which the others' figures are not, either.
        try:
            cpu.fold_blocks(task, [Nowhere()], lambda num_bytes: None)
        except BaseException:
            _barriers[0].abort()
            raise
        _barriers[0].wait()
        started = time.perf_counter()  # one clock for all processes
        cpu.fold_blocks(task, [Nowhere()], lambda num_bytes: None)
        return started, time.perf_counter()


def _seconds(
    run: Path, engine: Callable[..., Any], momentum: float | list[float] = MOMENTUM, **plan_changes: Any
) -> float:
    import ckpt_ema
    from ckpt_ema.engine.contract import Nowhere, Task
    from ckpt_ema.engine.inputs import InputFiles

    plan = ckpt_ema.plan(run, run.parent / "teacher-{momentum}.safetensors", momentum=momentum)
    blocks = plan.blocks
    if "block_elements" in plan_changes:
        raw, accumulator, widened, span = (
            size * plan_changes["block_elements"] // blocks.block_elements for size in blocks.thread_buffers
        )
        plan_changes["thread_buffers"] = raw, accumulator, widened, span
    with InputFiles(plan.layouts) as files:
        updates = [teacher.updates for teacher in plan.teachers]
        task = Task(replace(blocks, **plan_changes), plan.layouts, updates, files)
        started = time.perf_counter()
        engine(task, [Nowhere() for _ in plan.teachers], lambda num_bytes: None)
        return time.perf_counter() - started


def _copy_seconds(run: Path) -> float:
    work = prepare_pinned(run, run)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextlib.contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
