"""The GPU's engine against the CPU's, and who chooses between them."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import itertools
import math
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save_file

import ckpt_ema
from ckpt_ema import CkptEmaError
from ckpt_ema.blocks import REMOTE_READ_BYTES, Block, BlockPlan, Lane, with_lanes
from ckpt_ema.dtypes import BY_NAME
from ckpt_ema.engine import choice, cpu, cuda, device_plan, fused
from ckpt_ema.engine.buffers import Buffer
from ckpt_ema.engine.choice import choose_engine
from ckpt_ema.engine.contract import Engine, NonFinite, NonFiniteBlockError, Nowhere, Task
from ckpt_ema.engine.inputs import InputFiles, LaneExtents
from ckpt_ema.engine.staging import StagingBuffers
from ckpt_ema.engine.workers import Jobs, Ticket, start, wait_whatever_comes
from ckpt_ema.locations import as_path
from ckpt_ema.plans import FoldPlan
from ckpt_ema.sizes import DEFAULT_MEMORY_BUDGET_BYTES
from tests.conftest import quiet_fold, save_hollow
from tests.device_model import Event, modelled
from tests.test_many_teachers import MOMENTA, varied_student

EIGHT_MOMENTA = [k / 10 for k in range(1, 9)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four students with tensors of every kind, one of them larger than a block."""
    folder = tmp_path / "run"
    folder.mkdir()
    for i in range(4):
        student = varied_student(i)
        student["large.weight"] = torch.randn(1 << 20, generator=torch.Generator().manual_seed(i))
        student["large.bfloat16"] = student["large.weight"].to(torch.bfloat16)
        student["complex.weight"] = torch.randn(33, dtype=torch.complex64, generator=torch.Generator().manual_seed(i))
        student["eight.weight"] = torch.randn(77, generator=torch.Generator().manual_seed(i)).to(torch.float8_e4m3fn)
        student["large.float64"] = student["large.weight"][: 1 << 17].double()
        student["large.float8"] = student["large.weight"][: 1 << 18].to(torch.float8_e5m2)
        torch.save({"model": student, "step": i}, folder / f"step_{i}.pt")
    return folder


def leave_out_8_bits(run: Path) -> None:
    """Save the students without the tensors that torch cannot compute in."""
    for path in run.iterdir():
        saved = torch.load(path)
        for name in ("eight.weight", "large.float8"):
            del saved["model"][name]
        torch.save(saved, path)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": MOMENTA},
        {"momentum": EIGHT_MOMENTA},
        {"dtype": "float16"},
        {"accumulate": "float64"},
        {"accumulate": "student"},
    ],
)
@pytest.mark.parametrize("budget", [1 << 19, 1 << 28])  # which cuts the lanes into 23 blocks, and into one each
@pytest.mark.parametrize("by", ["torch", "kernel"])
def test_the_gpu_writes_what_the_cpu_writes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str, budget: int, options: dict[str, Any]
) -> None:
    """Byte for byte, whatever the blocks and the dtypes, and whether torch's calls or our kernel computed it."""
    if options.get("accumulate") == "student":
        leave_out_8_bits(run)
    monkeypatch.setattr(cuda, "COMPILING_SECONDS", -math.inf if by == "kernel" else math.inf)
    # Before launches are counted: each pair of dtypes is tried once, with the kernel.
    can_launch = [
        fused.is_usable(torch.device("cuda:0"), torch.float32, student) for student in (torch.float32, torch.bfloat16)
    ]
    launches: list[int] = []
    update_run = fused.update_run_

    def count(*arguments: Any) -> None:
        launches.append(1)
        update_run(*arguments)

    monkeypatch.setattr(fused, "update_run_", count)
    options = {"momentum": 0.3, "memory_budget_bytes": budget, **options}
    gpu = quiet_fold(run, tmp_path / "gpu-{momentum}.safetensors", device="cuda", **options)
    on_cpu = quiet_fold(run, tmp_path / "cpu-{momentum}.safetensors", device="cpu", **options)
    assert gpu.device == "cuda:0"
    assert bool(launches) == (by == "kernel" and any(can_launch) and options.get("accumulate") != "float64")
    for one, other in zip(gpu.plan.teachers, on_cpu.plan.teachers, strict=True):
        assert one.output.read_bytes() == other.output.read_bytes()


@pytest.mark.gpu
def test_the_gpu_folds_in_inference_mode_too(run: Path, tmp_path: Path) -> None:
    """As evaluation code calls it; its own threads are in no such mode, and share the buffers."""
    options: dict[str, Any] = {"momentum": MOMENTA, "memory_budget_bytes": 1 << 19}
    expected = fold_on_cpu(run, tmp_path / "cpu-{momentum}.safetensors", **options)
    with torch.inference_mode():
        report = quiet_fold(run, tmp_path / "gpu-{momentum}.safetensors", device="cuda", **options)
    data_bytes = report.plan.blocks.data_bytes
    assert [teacher.output.read_bytes()[-data_bytes:] for teacher in report.plan.teachers] == expected


@pytest.mark.gpu
def test_the_gpu_names_the_tensor_and_the_checkpoint_too(run: Path, tmp_path: Path) -> None:
    """A NaN is found on the device, and the message is the CPU's."""
    broken = torch.load(run / "step_2.pt")
    broken["model"]["large.weight"][777_777] = torch.nan
    torch.save(broken, run / "step_2.pt")
    messages = []
    for device in ("cpu", "cuda"):
        with pytest.raises(CkptEmaError) as caught:
            quiet_fold(run, tmp_path / "t.safetensors", momentum=0.5, device=device)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "large.weight" in messages[0]
    assert not list(tmp_path.glob("*safetensors*"))


@pytest.mark.gpu
@pytest.mark.parametrize("momentum", [0.5, [0.5, 0.1]])
def test_the_devices_memory_is_given_back(run: Path, tmp_path: Path, momentum: Any) -> None:
    """After a fold, and after one that failed, while its error is at hand."""
    output = tmp_path / "t-{momentum}.safetensors"
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    quiet_fold(run, output, momentum=momentum, device="cuda")
    assert torch.cuda.memory_reserved() <= before
    broken = torch.load(run / "step_2.pt")
    broken["model"]["large.weight"][777_777] = torch.nan
    torch.save(broken, run / "step_2.pt")
    with pytest.raises(CkptEmaError) as caught:
        quiet_fold(run, output, momentum=momentum, device="cuda", overwrite=True)
    assert torch.cuda.memory_reserved() <= before, caught.value


@pytest.mark.gpu
def test_a_full_device_is_a_clear_error(run: Path, tmp_path: Path) -> None:
    """A smaller block is tried, then the command says what is free; nothing is written."""
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(CkptEmaError, match=r"has no room for \d+ KiB: \d+ of"):
            quiet_fold(run, tmp_path / "t.safetensors", momentum=0.5, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not list(tmp_path.glob("*safetensors*"))


@pytest.mark.gpu
def test_a_gpu_that_is_not_there_is_a_clear_error(run: Path, tmp_path: Path) -> None:
    """`cuda:99` says how many there are."""
    with pytest.raises(CkptEmaError, match="counted from 0"):
        quiet_fold(run, tmp_path / "t.safetensors", momentum=0.5, device="cuda:99")


@pytest.mark.gpu
def test_auto_takes_what_a_probe_found_faster(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says what it measured."""
    monkeypatch.setattr(choice, "MIN_BYTES", 1)
    report = quiet_fold(run, tmp_path / "t.safetensors", momentum=0.5)
    assert "expected from a probe" in report.device_reason


def fold_on_a_model(run: Path, output: Path, **options: Any) -> list[bytes]:
    """What the GPU's engine writes where the model is its device, each teacher's bytes."""
    plan = ckpt_ema.plan(run, output, **options)
    teachers = [Bytes(plan.blocks.data_bytes) for _ in plan.teachers]
    finished: list[tuple[Block, list[bytes]]] = []

    def note(block: Block) -> None:
        place = slice(block.position, block.end_position)
        finished.append((block, [bytes(teacher.content[place]) for teacher in teachers]))

    with InputFiles(plan.layouts) as files:
        updates = [teacher.updates for teacher in plan.teachers]
        # More threads than there may be cores.
        task = Task(replace(plan.blocks, num_threads=5), plan.layouts, updates, files, note)
        budget = options["memory_budget_bytes"]
        read: list[int] = []
        alone = threading.Lock()

        def progress(num_bytes: int) -> None:
            assert alone.acquire(blocking=False), "progress is told of from two threads at once"
            time.sleep(1e-4)
            read.append(num_bytes)
            alone.release()

        cuda.fold_blocks(task, teachers, progress, device=torch.device("cpu"), memory_budget_bytes=budget)
    assert sum(read) == plan.blocks.bytes_to_read
    # Every byte of every lane is reported as finished once, and only when all teachers have it.
    ranges = sorted((block.position, block.end_position) for block, _ in finished)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))
    assert sum(end - begin for begin, end in ranges) == sum(
        lane.num_elements * lane.dtype.itemsize for lane in plan.blocks.lanes
    )
    for block, then in finished:
        assert then == [bytes(teacher.content[block.position : block.end_position]) for teacher in teachers]
    return [bytes(teacher.content) for teacher in teachers]


class Bytes:
    """A teacher in memory."""

    def __init__(self, count: int) -> None:
        self.content = bytearray(count)

    def write(self, block: memoryview, position: int) -> None:
        self.content[position : position + len(block)] = block


def fold_on_cpu(run: Path, output: Path, **options: Any) -> list[bytes]:
    report = quiet_fold(run, output, device="cpu", **options)
    return [teacher.output.read_bytes()[-report.plan.blocks.data_bytes :] for teacher in report.plan.teachers]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("options", [{}, {"momentum": MOMENTA}, {"dtype": "float16"}, {"accumulate": "float64"}])
def test_on_a_model_of_a_gpu_nothing_is_used_before_it_is_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], seed: int
) -> None:
    """Whenever the device does what is queued, the bytes are the CPU's."""
    options = {"momentum": 0.3, "memory_budget_bytes": 1 << 19, **options}
    expected = fold_on_cpu(run, tmp_path / "cpu-{momentum}.safetensors", **options)
    with modelled(monkeypatch, seed) as device:
        assert fold_on_a_model(run, tmp_path / "t-{momentum}.safetensors", **options) == expected
        assert device.num_run > 1000


@pytest.mark.parametrize(
    ("dtype", "accumulate", "is_sent"),
    [
        (torch.bfloat16, "student", False),
        (torch.float16, "student", False),
        (torch.bfloat16, "float32", True),
        (torch.float32, "student", True),
    ],
)
def test_what_is_kept_in_16_bits_is_not_sent_to_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, accumulate: str, is_sent: bool
) -> None:
    """The teacher's dtype counts, not the student's; either way the bytes are the CPU's."""
    run = tmp_path / "run"
    run.mkdir()
    for i in range(3):
        weight = torch.randn(3000, generator=torch.Generator().manual_seed(i)).to(dtype)
        save_file({"weight": weight}, run / f"step_{i}.safetensors")
    options: dict[str, Any] = {"momentum": 0.3, "memory_budget_bytes": 1 << 18, "accumulate": accumulate}
    expected = fold_on_cpu(run, tmp_path / "cpu.safetensors", **options)
    with modelled(monkeypatch, 0) as device:
        assert fold_on_a_model(run, tmp_path / "t.safetensors", **options) == expected
    assert bool(device.allocated) == is_sent


@pytest.mark.parametrize("seed", range(6))
def test_in_inference_mode_a_model_of_a_gpu_folds_too(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """What the caller's thread makes in that mode the engine's own threads could not write to."""
    options: dict[str, Any] = {"momentum": MOMENTA, "memory_budget_bytes": 1 << 19}
    expected = fold_on_cpu(run, tmp_path / "cpu-{momentum}.safetensors", **options)
    with modelled(monkeypatch, seed), torch.inference_mode():
        assert fold_on_a_model(run, tmp_path / "t-{momentum}.safetensors", **options) == expected


@pytest.fixture
def long_run(tmp_path: Path) -> Path:
    """More students than the engine has buffers, all of 16 bits."""
    folder = tmp_path / "long"
    folder.mkdir()
    for i in range(20):
        student = {"weight": torch.randn(100_000, generator=torch.Generator().manual_seed(i)).to(torch.bfloat16)}
        save_file(student, folder / f"step_{i}.safetensors")
    return folder


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("num_buffers", [8, 15])
def test_on_a_model_of_a_gpu_buffers_are_used_again(
    long_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_buffers: int, seed: int
) -> None:
    """By more students and more teachers than there are buffers, into teachers that are wider than they."""
    options: dict[str, Any] = {"momentum": EIGHT_MOMENTA, "dtype": "float32", "memory_budget_bytes": num_buffers << 13}
    expected = fold_on_cpu(long_run, tmp_path / "cpu-{momentum}.safetensors", **options)
    with modelled(monkeypatch, seed) as device:
        assert fold_on_a_model(long_run, tmp_path / "t-{momentum}.safetensors", **options) == expected
    # Each is made once, and two numbers for each that is written from.
    assert len(device.pinned) <= num_buffers + num_buffers // 2


@pytest.mark.parametrize("first", ["float32", "float16"])
def test_an_initial_teacher_of_another_dtype_on_a_model_too(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Wider and narrower than the students it comes before."""
    init = tmp_path / "init.safetensors"
    quiet_fold(run, init, momentum=0.5, until_step=1, dtype=first, device="cpu")
    options: dict[str, Any] = {"momentum": 0.3, "memory_budget_bytes": 1 << 18, "init": init, "from_step": 2}
    expected = fold_on_cpu(run, tmp_path / "cpu.safetensors", **options)
    for seed in range(4):
        with modelled(monkeypatch, seed):
            assert fold_on_a_model(run, tmp_path / "t.safetensors", **options) == expected


@pytest.mark.parametrize("forgets", ["wait_event", "wait_stream", "synchronize"])
def test_the_model_shows_what_is_not_waited_for(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgets: str
) -> None:
    """Without any one of the three ways in which the engine waits, some of a few folds come out wrong."""
    options: dict[str, Any] = {"momentum": 0.3, "memory_budget_bytes": 1 << 20}
    expected = fold_on_cpu(run, tmp_path / "cpu.safetensors", **options)

    def is_right(seed: int) -> bool:
        with modelled(monkeypatch, seed, forgets=forgets):
            try:
                return fold_on_a_model(run, tmp_path / "t.safetensors", **options) == expected
            except CkptEmaError:  # a number that is not there yet may be no number
                return False

    assert not all(is_right(seed) for seed in range(24))


def test_a_smaller_block_is_tried_where_the_device_is_full(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One; then it is an error that says what is free, and what twelve buffers of 128 KiB take."""
    options: dict[str, Any] = {"momentum": 0.3, "memory_budget_bytes": 1 << 20}
    expected = fold_on_cpu(run, tmp_path / "cpu.safetensors", **options)
    num_run = []
    for largest_bytes in (1 << 30, 1 << 18):
        with modelled(monkeypatch, 0, largest_bytes=largest_bytes) as device:
            assert fold_on_a_model(run, tmp_path / "t.safetensors", **options) == expected
            num_run.append(device.num_run)
    assert 3 * num_run[0] < num_run[1]
    with modelled(monkeypatch, 0, largest_bytes=1 << 13):
        with pytest.raises(CkptEmaError, match="has no room for 1536 KiB: 1024 of 2048 MiB are free") as caught:
            fold_on_a_model(run, tmp_path / "t.safetensors", **options)
        assert caught.value.hint == "free some of its memory, or pass `--device cpu`"
        assert caught.value.details == ("CUDA out of memory, says the model",)


@pytest.mark.parametrize("momentum", [0.3, [0.3, 0.1, 0.01]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_half_of_what_is_free_is_left_to_whoever_trains_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, momentum: Any, dtype: torch.dtype
) -> None:
    """Blocks are as large as that allows, down to a sixteenth, which is tried whatever is said to be free."""
    run = tmp_path / "run"
    run.mkdir()
    for i in range(2):
        save_file({"a": torch.full((3 << 20,), float(i)).to(dtype)}, run / f"step_{i}.safetensors")
    plan = ckpt_ema.plan(run, tmp_path / "{momentum}.safetensors", momentum=momentum, memory_budget_bytes=1 << 20)

    def taken(free_bytes: int) -> int:
        with modelled(monkeypatch, 0, free_bytes=free_bytes) as device, InputFiles(plan.layouts) as files:
            task = Task(plan.blocks, plan.layouts, [teacher.updates for teacher in plan.teachers], files)
            options: dict[str, Any] = {"device": torch.device("cpu"), "memory_budget_bytes": 1 << 20}
            cuda.fold_blocks(task, [Nowhere() for _ in plan.teachers], lambda _: None, **options)
        return device.allocated_bytes

    most = taken(1 << 40)
    assert taken(2 * most) == most
    for free_bytes in (2 * most - 1, most, most // 3):
        assert taken(free_bytes) <= free_bytes // 2 < 2.1 * taken(free_bytes)
    assert taken(1) == pytest.approx(most / 16, rel=0.2)


def test_a_device_that_fails_is_said_to_fail(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to be full; also where nothing can be done with it any more, or only what is done first fails."""

    failed = "cpu failed: CUDA error: all devices are busy\n\nhint: pass `--device cpu`"
    full = (
        "cpu has no room for 1536 KiB\n  CUDA error: out of memory\n\n"
        "hint: free some of its memory, or pass `--device cpu`"
    )
    for first, reason, expected in (
        ("Stream", "all devices are busy", failed),
        ("synchronize", "all devices are busy", failed),
        ("Stream", "out of memory", full),
    ):

        def fail(*_: object, reason: str = reason, **__: object) -> None:
            raise RuntimeError(f"CUDA error: {reason}\nCompile with more patience")

        with modelled(monkeypatch, 0) as device, monkeypatch.context() as patch:
            for what in (first, "empty_cache", "mem_get_info"):
                patch.setattr(torch.cuda, what, fail)
            with pytest.raises(CkptEmaError) as caught:
                fold_on_a_model(run, tmp_path / "t.safetensors", momentum=0.3, memory_budget_bytes=1 << 20)
        assert str(caught.value) == expected
        # Though the error is at hand, and with it what was being made.
        assert len(device.allocated) > 3
        if expected is full:  # nobody knows how full: as little as possible
            assert device.allocated_bytes == 1536 << 10
        assert not any(storage.nbytes() for storage in device.allocated)


@pytest.mark.parametrize(
    ("reason", "message", "hint"),
    [
        ("out of memory", r"no room for a page-locked buffer of \d+ KiB: CUDA error", "pass a smaller `--memory`, or "),
        ("illegal access", "cpu failed: CUDA error: illegal access", "pass "),
    ],
)
def test_without_room_for_what_is_page_locked_it_says_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, message: str, hint: str
) -> None:
    """That is memory of the host, and the budget's to say; a device that fails there is not taken for it."""
    made = itertools.count()

    def pin(self: Buffer, num_bytes: int, *, pinned: bool = False) -> None:
        if pinned and next(made) == 5:
            raise RuntimeError(f"CUDA error: {reason}\nCompile with more patience")
        make(self, num_bytes, pinned=pinned)

    make = Buffer.__init__
    with modelled(monkeypatch, 0), monkeypatch.context() as patch:
        patch.setattr(Buffer, "__init__", pin)
        with pytest.raises(CkptEmaError, match=message) as caught:
            fold_on_a_model(run, tmp_path / "t.safetensors", momentum=0.3, memory_budget_bytes=1 << 20)
    assert caught.value.hint == f"{hint}`--device cpu`"


ON_THE_MODEL = functools.partial(cuda.fold_blocks, device=torch.device("cpu"), memory_budget_bytes=1 << 20)


@pytest.mark.parametrize(("engine", "name"), [(cpu.fold_blocks, "fold"), (ON_THE_MODEL, "read")])
def test_interrupted_while_a_thread_starts_nothing_runs_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine, name: str
) -> None:
    """A thread whose start does not come to its end runs, though nobody has it."""
    plan = ckpt_ema.plan(run, tmp_path / "t.safetensors", momentum=0.3, memory_budget_bytes=1 << 20)
    blocks = only_for_gpu(plan.blocks)
    start, preadv, has_returned = threading.Thread.start, os.preadv, threading.Event()
    late: list[str] = []

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.startswith(name):
            time.sleep(0.05)
            raise KeyboardInterrupt

    def slowly(*arguments: Any) -> int:
        time.sleep(0.1)
        late.extend([threading.current_thread().name] * has_returned.is_set())
        return preadv(*arguments)

    with modelled(monkeypatch, 0), monkeypatch.context() as patch:
        patch.setattr(os, "preadv", slowly)
        with InputFiles(plan.layouts) as files:
            patch.setattr(threading.Thread, "start", interrupted)
            task = Task(blocks, plan.layouts, [teacher.updates for teacher in plan.teachers], files)
            with pytest.raises(KeyboardInterrupt):
                engine(task, [Nowhere()], lambda _: None)
            has_returned.set()
            time.sleep(0.3)
    assert not late


def test_what_the_cpu_raises_of_a_block_it_folds_again_is_its_own(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device made a NaN; what comes next is not its failure."""
    broken = torch.load(run / "step_2.pt")
    broken["model"]["large.weight"][777_777] = math.nan
    torch.save(broken, run / "step_2.pt")

    def fail(*_: object) -> None:
        raise RuntimeError("mine")

    with modelled(monkeypatch, 0), monkeypatch.context() as patch:
        patch.setattr(cpu, "refold", fail)
        with pytest.raises(RuntimeError, match=r"^mine$"):
            fold_on_a_model(run, tmp_path / "t.safetensors", momentum=0.3, memory_budget_bytes=1 << 20)


def test_a_part_of_a_page_locked_buffer_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever still reads into it would write to memory that is somebody else's by then."""
    with modelled(monkeypatch, 0) as device:
        buffer = Buffer(1 << 16, pinned=True)
        part = buffer.bytes[5:7]
        del buffer
        assert device.pinned[0]() is not None
        del part
        assert device.pinned[0]() is None


def test_a_failed_read_leaves_one_buffer_to_whoever_holds_the_error(
    long_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that it was to fill."""
    preadv, calls = os.preadv, itertools.count()

    def fail(*arguments: Any) -> int:
        if next(calls) < 20:
            return preadv(*arguments)
        time.sleep(0.05)
        raise OSError(errno.EIO, "Input/output error")

    with modelled(monkeypatch, 0) as device, monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(CkptEmaError, match="cannot read"):
            fold_on_a_model(long_run, tmp_path / "t.safetensors", momentum=0.3, memory_budget_bytes=1 << 16)
        assert len(device.pinned) > 3
        assert sum(pinned() is not None for pinned in device.pinned) <= 1


def test_a_fold_leaves_nothing_to_the_garbage_collector(
    long_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher is a file of many gigabytes, and is let go of when the fold returns."""
    plan = ckpt_ema.plan(long_run, tmp_path / "t.safetensors", momentum=0.3)
    gc.collect()
    gc.disable()
    try:
        with modelled(monkeypatch, 0), InputFiles(plan.layouts) as files:
            teacher = Nowhere()
            task = Task(plan.blocks, plan.layouts, [teacher.updates for teacher in plan.teachers], files)
            ON_THE_MODEL(task, [teacher], lambda _: None)
            kept = weakref.ref(teacher)
            del teacher
            assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["read", "write", "fold"])
def test_without_threads_it_says_so_and_keeps_nothing(
    long_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It is no failure of the device."""
    plan = ckpt_ema.plan(long_run, tmp_path / "t.safetensors", momentum=0.3)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith(name):
            raise RuntimeError("can't start new thread")
        start(thread)

    gc.collect()
    gc.disable()
    try:
        with modelled(monkeypatch, 0), InputFiles(plan.layouts) as files, monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            teacher = Nowhere()
            kept = weakref.ref(teacher)
            task = Task(plan.blocks, plan.layouts, [each.updates for each in plan.teachers], files)
            engine = cpu.fold_blocks if name == "fold" else ON_THE_MODEL
            with pytest.raises(CkptEmaError, match="cannot start a thread: can't start new thread") as caught:
                engine(task, [teacher], lambda _: None)
            assert "ulimit -u" in caught.value.hint
            del teacher, caught
            assert kept() is None
    finally:
        gc.enable()


def test_interrupted_while_its_first_thread_starts_it_keeps_nothing(
    long_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python counts that thread among those to come for ever, with all that was handed to it."""
    plan = ckpt_ema.plan(long_run, tmp_path / "t.safetensors", momentum=0.3)
    before = dict(threading._limbo)  # type: ignore[attr-defined]

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    gc.collect()
    gc.disable()
    try:
        with modelled(monkeypatch, 0), InputFiles(plan.layouts) as files, monkeypatch.context() as patch:
            named = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else "_start_new_thread"
            patch.setattr(threading, named, interrupt)
            teacher = Nowhere()
            kept = weakref.ref(teacher)
            updates = [each.updates for each in plan.teachers]
            task = Task(only_for_gpu(plan.blocks), plan.layouts, updates, files)
            with contextlib.suppress(KeyboardInterrupt):
                ON_THE_MODEL(task, [teacher], lambda _: None)
            del teacher
            assert kept() is None
    finally:
        gc.enable()
        limbo = threading._limbo  # type: ignore[attr-defined]
        assert len(limbo) > len(before)  # or this would try nothing
        for thread in set(limbo) - set(before):
            del limbo[thread]


def test_an_interrupt_while_a_thread_starts_is_no_lack_of_threads() -> None:
    """Between a lock that is given back and what takes it again, it makes that fail of something else."""

    class Thread(threading.Thread):
        def start(self) -> None:
            try:
                raise KeyboardInterrupt
            finally:
                threading.Lock().release()

    with pytest.raises(KeyboardInterrupt):
        start(Thread())
    try:
        raise KeyError("somebody's own")
    except KeyError:  # while it is handled, there is no thread left
        with pytest.raises(CkptEmaError, match="cannot start a thread: threads can only be"):
            start(threading.current_thread())


@pytest.mark.parametrize("is_done_first", [False, True])
def test_everybody_who_waits_for_a_job_is_let_go(is_done_first: bool) -> None:
    """Also who waits beside another, and again."""
    ticket = Ticket()
    threads = [threading.Thread(target=ticket.wait, daemon=True) for _ in range(3)]
    if is_done_first:
        ticket.tell()
    for thread in threads:
        thread.start()
    if not is_done_first:
        time.sleep(0.05)
        assert all(thread.is_alive() for thread in threads)
        ticket.tell()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    ticket.wait()


def test_writers_beside_each_other_and_what_they_fail_of(
    long_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several write one teacher; a full disk is said at once, not when a writer's turn comes again."""
    options: dict[str, Any] = {"momentum": 0.3, "memory_budget_bytes": 1 << 20}
    monkeypatch.setattr(device_plan, "STAGING_BYTES", 1 << 11)
    expected = fold_on_cpu(long_run, tmp_path / "cpu.safetensors", **options)
    for seed in range(8):
        with modelled(monkeypatch, seed):
            assert fold_on_a_model(long_run, tmp_path / "t.safetensors", **options) == expected
    read: list[int] = []
    writers: dict[str, int] = {}
    arrived: list[int] = []
    new_trash = InputFiles.new_trash

    def count(files: InputFiles, buffer_bytes: int) -> memoryview:  # asked for at the beginning of each reading
        read.append(1)
        return new_trash(files, buffer_bytes)

    def fail(*_: object) -> None:
        arrived.append(1)
        deadline = time.monotonic() + 20
        while len(arrived) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        writers[threading.current_thread().name] = len(read)
        raise CkptEmaError("the disk is full")

    monkeypatch.setattr(InputFiles, "new_trash", count)
    monkeypatch.setattr(Bytes, "write", fail)
    with modelled(monkeypatch, 0), pytest.raises(CkptEmaError, match="the disk is full"):
        fold_on_a_model(long_run, tmp_path / "t.safetensors", **options)
    assert len(writers) >= 2
    assert all(name.startswith("write") for name in writers)
    # What had been handed out by then, to five readers and for three blocks more, and some that happened meanwhile.
    assert len(read) - min(writers.values()) < 20


def test_what_the_device_computes_is_counted_once(
    long_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each update and each rounding, of which there are more than are kept to be counted; events are used again."""
    plan = ckpt_ema.plan(long_run, tmp_path / "t.safetensors", momentum=0.3)
    monkeypatch.setattr(cuda, "MAX_INTERVALS", 16)
    finished: list[Block] = []
    with modelled(monkeypatch, 0) as device, InputFiles(plan.layouts) as files:
        updates = [teacher.updates for teacher in plan.teachers]
        task = Task(plan.blocks, plan.layouts, updates, files, finished.append)
        options = {"device": torch.device("cpu"), "memory_budget_bytes": 1 << 16}
        timings = cuda.fold_blocks(task, [Nowhere()], lambda _: None, **options)
    assert len(finished) > 1
    assert timings.computing == pytest.approx(len(finished) * (len(plan.layouts) + 1) / 1000)
    assert min(timings.reading, timings.copying, timings.writing, timings.waiting) > 0
    # Some more than MAX_INTERVALS, where the device lags behind.
    assert device.num_timed // 2 < len(finished) * (len(plan.layouts) + 1) / 2


def test_waiting_for_copies_is_counted_as_copying_both_ways(
    long_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads wait beside each other, and so their number divides it."""
    plan = ckpt_ema.plan(long_run, tmp_path / "t.safetensors", momentum=0.3)
    blocks = replace(only_for_gpu(plan.blocks), num_threads=4)

    def copying_per_use(way: str) -> float:
        """Where each use of the buffers is a minute of waiting, one way."""
        uses: list[StagingBuffers] = []
        carry = getattr(StagingBuffers, way)

        def slowly(buffers: StagingBuffers, *arguments: Any) -> None:
            uses.append(buffers)
            carry(buffers, *arguments)

        with modelled(monkeypatch, 0), InputFiles(plan.layouts) as files, monkeypatch.context() as patch:
            patch.setattr(StagingBuffers, way, slowly)
            patch.setattr(StagingBuffers, "waiting_seconds", property(lambda buffers: 60 * uses.count(buffers)))
            task = Task(blocks, plan.layouts, [teacher.updates for teacher in plan.teachers], files)
            timings = ON_THE_MODEL(task, [Nowhere()], lambda _: None)
        return timings.copying / len(uses)

    # A megabyte has room for eight buffers: four for as many readers, two ahead of them and one of a writer.
    assert copying_per_use("upload") == pytest.approx(60 / 4, rel=0.01)
    assert copying_per_use("download") == pytest.approx(60, rel=0.01)


def test_a_buffer_waits_for_no_longer_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And counts that: five portions up through three buffers wait twice; down, each is waited for."""
    with modelled(monkeypatch, 0) as device:
        device.eagerness = 0.0
        stream = torch.cuda.Stream()
        waits: list[float] = []
        synchronize = Event.synchronize

        def slowly(event: Event) -> None:
            started = time.perf_counter()
            time.sleep(0.01)
            synchronize(event)
            waits.append(time.perf_counter() - started)

        monkeypatch.setattr(Event, "synchronize", slowly)
        buffers = StagingBuffers(3, 8, torch.device("cpu"), stream)
        there = torch.empty(37, dtype=torch.uint8)
        for carry, count in ((buffers.upload, 2), (buffers.download, 5)):
            waits.clear()
            before = buffers.waiting_seconds
            carry(there, lambda content, position: None)
            device.run_all()
            assert len(waits) == count
            assert sum(waits) <= buffers.waiting_seconds - before < sum(waits) + 0.01


def test_a_buffer_whose_filling_failed_is_there_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes next finds it, and what is carried then arrives."""
    with modelled(monkeypatch, 0) as device:
        buffers = StagingBuffers(1, 8, torch.device("cpu"), torch.cuda.Stream())
        there = torch.zeros(20, dtype=torch.uint8)

        def fail(content: memoryview, position: int) -> None:
            raise OSError("no more")

        def fill(content: memoryview, position: int) -> None:
            content[:] = bytes(range(position, position + len(content)))

        for carry in (buffers.upload, buffers.download):
            with pytest.raises(OSError, match="no more"):
                carry(there, fail)
        buffers.upload(there, fill)
        device.run_all()
        assert there.tolist() == list(range(20))


@pytest.mark.parametrize("momentum", [0.1, [0.1, 0.2]])
@pytest.mark.parametrize("num_cores", [2, 16, 64])
def test_what_the_default_budget_has_room_for(tmp_path: Path, momentum: Any, num_cores: int) -> None:
    """No more than the cores can use; a store behind a network is asked for more at once, in larger buffers.

    These take no more of the device.
    """
    for step in range(2):
        save_file({"weight": torch.zeros(1 << 25)}, tmp_path / f"step_{step}.safetensors")
    plan = ckpt_ema.plan(tmp_path, tmp_path / "{momentum}.safetensors", momentum=momentum)
    blocks = replace(plan.blocks, num_threads=num_cores)
    budget = DEFAULT_MEMORY_BUDGET_BYTES
    near, far = (
        device_plan.plan_for_device(blocks, memory_budget_bytes=budget, free_bytes=1 << 40, is_remote=is_remote)[0]
        for is_remote in (False, True)
    )
    assert near.staging_bytes == 4 << 20
    assert far.staging_bytes == REMOTE_READ_BYTES
    assert near.blocks == far.blocks
    assert far.device_bytes <= near.device_bytes
    assert (near.num_readers, near.num_writers) == (min(16, num_cores), min(8, num_cores))
    # 64 MiB each: students' blocks, finished ones, each teacher's and a widened one of what is computed.
    num_blocks = (near.num_readers + 3) + (near.num_writers + 1) + (blocks.num_teachers + 1)
    assert near.device_bytes == num_blocks * 64 << 20
    for each in (near, far):
        assert (each.num_uploads + each.num_writers) * each.staging_bytes <= budget


@pytest.mark.parametrize("seed", range(6))
def test_a_run_behind_urls_folds_to_the_same_bytes_on_a_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """In requests of another size than on a disk: as large as the engine's buffers then are."""
    memory = fsspec.filesystem("memory")
    memory.put(str(run), "/on-a-model", recursive=True)
    expected = fold_on_cpu(run, tmp_path / "cpu.safetensors", momentum=0.3, memory_budget_bytes=1 << 20)
    request_bytes = 1 << (11 + seed)
    monkeypatch.setattr(device_plan, "REMOTE_READ_BYTES", request_bytes)
    portions: set[int] = set()
    read = LaneExtents.read

    def note(extents: LaneExtents, first: int, stop: int, buffer: memoryview, *arguments: Any) -> None:
        if threading.current_thread().name.startswith("read"):
            portions.add(len(buffer))
        read(extents, first, stop, buffer, *arguments)

    monkeypatch.setattr(LaneExtents, "read", note)
    with modelled(monkeypatch, seed):
        found = fold_on_a_model(
            as_path("memory://on-a-model"), tmp_path / "t.safetensors", momentum=0.3, memory_budget_bytes=1 << 20
        )
    memory.rm("/on-a-model", recursive=True)
    assert found == expected
    assert max(portions) == request_bytes


def test_a_counter_does_not_make_every_block_smaller(tmp_path: Path) -> None:
    """A buffer's elements are those of the widest tensors that it cannot hold whole, and every block fits in it."""
    student = {"weight": torch.randn(1 << 18).to(torch.bfloat16), "steps": torch.tensor(3.0, dtype=torch.float64)}
    student["bias"] = torch.zeros(3000)
    for i in range(2):
        save_file(student, tmp_path / f"step_{i}.safetensors")
    lanes = ckpt_ema.plan(tmp_path, tmp_path / "t.safetensors").blocks.lanes
    assert sorted(lane.dtype.itemsize for lane in lanes) == [2, 4, 8]
    for num_bytes, elements in ((1 << 16, 1 << 15), (1 << 13, 1 << 11), (1 << 19, 1 << 18)):
        assert device_plan._elements_of_block(lanes, num_bytes) == elements
        for lane in lanes:
            assert min(elements, lane.num_elements) * lane.dtype.itemsize <= num_bytes


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["large.weight", "large.bfloat16"])
def test_the_first_number_that_is_none_is_found_on_a_model_too(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: float, seed: int
) -> None:
    """By the least and the greatest of each block; the CPU then says where it came from."""
    broken = torch.load(run / "step_2.pt")
    broken["model"][name][777_777] = number
    torch.save(broken, run / "step_2.pt")
    options: dict[str, Any] = {"momentum": [0.3, 0.1], "memory_budget_bytes": 1 << 20}
    with modelled(monkeypatch, seed) as device, pytest.raises(NonFiniteBlockError) as caught:
        fold_on_a_model(run, tmp_path / "t-{momentum}.safetensors", **options)
    plan = ckpt_ema.plan(run, tmp_path / "t.safetensors", momentum=0.3)
    assert caught.value.origin.layout == 2
    # The device has its memory back, though the error is at hand, and with it whatever its traceback holds.
    assert device.allocated
    assert not any(storage.nbytes() for storage in device.allocated)
    assert device.computed
    assert all(tensor() is None for tensor in device.computed)
    # And the host.
    assert len(device.pinned) > 3
    assert all(pinned() is None for pinned in device.pinned)
    assert plan.layouts[0].schema.names[caught.value.origin.tensor] == name


def test_a_checkpoint_that_cannot_be_read_to_its_end_stops_it_on_a_model_too(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU's error, and no thread left behind."""
    preadv = os.preadv
    before = threading.active_count()
    calls = itertools.count()

    def fails(*arguments: Any) -> int:
        if next(calls) == 40:
            raise OSError(errno.EIO, "Input/output error")
        time.sleep(0.02)  # some are still at it when one fails
        return preadv(*arguments)

    with modelled(monkeypatch, 2), monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fails)
        with pytest.raises(CkptEmaError, match=r"cannot read .* at byte"):
            fold_on_a_model(run, tmp_path / "t.safetensors", momentum=0.3, memory_budget_bytes=1 << 20)
    # They have nothing to do any more, and are about to end.
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threading.active_count() == before


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("where", ["reading", "progress", "finished", "writing"])
def test_an_error_of_the_callers_own_is_not_called_the_devices(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, seed: int
) -> None:
    """A RuntimeError out of what was passed reaches whoever passed that, also where every thread raises one."""
    plan = ckpt_ema.plan(run, tmp_path / "t.safetensors", momentum=0.3)

    def fail(*_: object) -> None:
        raise RuntimeError("mine")

    def is_fine(*_: object) -> None:
        pass

    teacher = Nowhere()
    if where == "writing":
        monkeypatch.setattr(teacher, "write", fail)
    if where == "reading":
        monkeypatch.setattr(LaneExtents, "read", fail)
    blocks = only_for_gpu(plan.blocks)
    with modelled(monkeypatch, seed), InputFiles(plan.layouts) as files:
        finished = fail if where == "finished" else is_fine
        task = Task(blocks, plan.layouts, [teacher.updates for teacher in plan.teachers], files, finished)
        progress = fail if where == "progress" else is_fine
        with pytest.raises(RuntimeError, match=r"^mine$"):
            cuda.fold_blocks(task, [teacher], progress, device=torch.device("cpu"), memory_budget_bytes=1 << 20)


def only_for_gpu(blocks: BlockPlan) -> BlockPlan:
    """The part of a plan that the GPU's engine does not leave to the CPU's."""
    return with_lanes(blocks, [lane for lane in blocks.lanes if cuda.is_for_gpu(lane)])


INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
import pytest, torch
import ckpt_ema
from ckpt_ema.engine import cpu, cuda
from ckpt_ema.engine.contract import Nowhere, Task
from ckpt_ema.engine.inputs import InputFiles
from tests.device_model import modelled
from tests.test_cuda import only_for_gpu

run, device = Path(sys.argv[1]), sys.argv[2]
preadv = os.preadv
plan = ckpt_ema.plan(run, run.with_name("t.safetensors"), momentum=0.3, memory_budget_bytes=1 << 20)
patch = pytest.MonkeyPatch()


def slowly(*arguments):
    time.sleep(0.4)
    return preadv(*arguments)


def alarm(*_):
    raise TimeoutError


# Whoever is started in the background by a shell script ignores Ctrl-C.
signal.signal(signal.SIGINT, alarm if sys.argv[3] == "alarm" else signal.default_int_handler)


def interrupt():
    for _ in range(4):
        time.sleep(0.03)
        os.kill(os.getpid(), signal.SIGINT)


patch.setattr(os, "preadv", slowly)
with modelled(patch, 0), InputFiles(plan.layouts) as files:
    task = Task(only_for_gpu(plan.blocks), plan.layouts, [teacher.updates for teacher in plan.teachers], files)
    interrupting = threading.Timer(0.2, interrupt)
    interrupting.start()
    try:
        if device == "cpu":
            cpu.fold_blocks(task, [Nowhere()], lambda _: None)
        else:
            options = {"device": torch.device("cpu"), "memory_budget_bytes": 1 << 20}
            cuda.fold_blocks(task, [Nowhere()], lambda _: None, **options)
        print("was not interrupted")
    except (KeyboardInterrupt, TimeoutError):
        # What folds is about to end, having been told, or still reads.
        time.sleep(0.1)
        running = [thread.name for thread in threading.enumerate() if thread.name.startswith(("fold", "read", "write"))]
        print("interrupted", running, interrupting.is_alive())
"""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("by", ["Ctrl-C", "alarm"])
def test_however_often_it_is_interrupted_nothing_runs_on(run: Path, device: str, by: str) -> None:
    """A thread that outlived the fold would write to a file that is being discarded, or to another one."""
    command = [sys.executable, "-c", INTERRUPTED, str(run), device, by]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=root)
    assert done.stdout == "interrupted [] False\n", done.stderr


CAUGHT_WITH_A_LOCK = """
import sys, threading
from pathlib import Path
import pytest, torch
import ckpt_ema
from ckpt_ema.engine import cpu, cuda
from ckpt_ema.engine.contract import Nowhere, Task
from ckpt_ema.engine.inputs import InputFiles
from tests.device_model import modelled
from tests.test_cuda import only_for_gpu

run, left = Path(sys.argv[1]), int(sys.argv[3])
options = {"device": torch.device("cpu"), "memory_budget_bytes": 1 << 17}
plan = ckpt_ema.plan(run, run.with_name("t.safetensors"), momentum=0.3, memory_budget_bytes=1 << 17)


def enter(condition):
    global left
    entered = condition._lock.__enter__()
    if threading.get_ident() == threading.main_thread().ident:
        left -= 1
        if left == 0:
            raise KeyboardInterrupt  # a signal that is handled right behind the call
    return entered


with modelled(pytest.MonkeyPatch(), 0), InputFiles(plan.layouts) as files:
    task = Task(only_for_gpu(plan.blocks), plan.layouts, [teacher.updates for teacher in plan.teachers], files)
    threading.Condition.__enter__ = enter
    try:
        if sys.argv[2] == "cpu":
            cpu.fold_blocks(task, [Nowhere()], lambda _: None)
        else:
            cuda.fold_blocks(task, [Nowhere()], lambda _: None, **options)
        print("was not interrupted")
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.parametrize(("device", "count"), [("cpu", 1), ("cpu", 2), ("cuda", 1), ("cuda", 2), ("cuda", 3)])
def test_interrupted_with_a_lock_in_hand_it_ends(run: Path, device: str, count: int) -> None:
    """The lock is given back by nobody; no thread may wait for it that the fold waits for."""
    command = [sys.executable, "-c", CAUGHT_WITH_A_LOCK, str(run), device, str(count)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=root)
    assert done.stdout == "interrupted\n", done.stderr


def test_what_has_ended_begins_no_job_and_is_at_none() -> None:
    """Jobs that have begun come to their end before, also those that fail."""
    jobs, begun, done = Jobs(), threading.Event(), []

    def fail() -> None:
        begun.set()
        time.sleep(0.1)
        done.append("failed")
        raise OSError

    def work() -> None:
        with contextlib.suppress(OSError):
            jobs.run(fail)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    jobs.end()
    assert done == ["failed"]
    jobs.run(lambda: done.append("late"))
    assert done == ["failed"]
    thread.join()


def test_waiting_goes_on_whatever_interrupts_it() -> None:
    """Every wait comes to its end, and the last interrupt goes on its way."""
    interrupts = [KeyboardInterrupt(), TimeoutError("of an alarm's handler")]
    ended = []

    def first() -> None:
        if interrupts:
            raise interrupts.pop(0)
        ended.append("first")

    with pytest.raises(TimeoutError, match="alarm"):
        wait_whatever_comes([first, lambda: ended.append("second")])
    assert ended == ["first", "second"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_auto_is_the_cpu(run: Path, tmp_path: Path) -> None:
    """Without a probe, and the report says why."""
    report = quiet_fold(run, tmp_path / "t.safetensors", momentum=0.5)
    assert (report.device, report.device_reason) == ("cpu", "no GPU here")
    plan = report.plan
    updates = [teacher.updates for teacher in plan.teachers]
    assert choose_engine("auto", plan.blocks, plan.layouts, updates, 1 << 20).engine is cpu.fold_blocks


@contextlib.contextmanager
def probed(blocks: BlockPlan, plan: FoldPlan) -> Iterator[Task]:
    """What the probe folds of these blocks."""
    with InputFiles(plan.layouts) as files:
        updates = [teacher.updates for teacher in plan.teachers]
        yield Task(choice._for_gpu(blocks), plan.layouts, updates, files)


def test_a_probe_folds_the_first_blocks_and_forgets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compares no more than it is to, of each lane from its start, and leaves no file."""
    monkeypatch.setattr(choice, "COMPARED_BYTES", 3 << 20)
    folder = tmp_path / "run"
    folder.mkdir()
    for i in range(3):
        values = torch.full((1 << 17,), float(i))
        student = {"a": values, "b": values.clone(), "c": values.to(torch.bfloat16), "steps": torch.tensor(i)}
        save_file({**student, "turned": values.to(torch.complex64)}, folder / f"step_{i}.safetensors")
    plan = ckpt_ema.plan(folder, momentum=[0.5, 0.25])
    updates = [teacher.updates for teacher in plan.teachers]
    read: list[int] = []

    def engine(*arguments: Any) -> Any:
        return cpu.fold_blocks(*arguments[:-1], lambda num_bytes: (read.append(num_bytes), arguments[-1](num_bytes)))

    with probed(plan.blocks, plan) as task:
        assert task.plan.bytes_to_read == 3 * (10 << 17)
        found = choice._checksum(engine, task)
    # Three students of two tensors in float32 and one in bfloat16, of each dtype as much as of the others.
    assert sorted(read) == [3 * 2 * 104_858, 3 * 4 * 209_716]
    read.clear()
    with probed(plan.blocks, plan) as task:
        assert choice._rate(engine, task) > 0
    assert sum(read) == task.plan.bytes_to_read
    assert sorted(tmp_path.iterdir()) == [folder]
    for threads in (1, 3):
        other = ckpt_ema.plan(folder, momentum=[0.5, 0.25], num_threads=threads, memory_budget_bytes=1 << 20)
        with probed(other.blocks, other) as task:
            assert choice._checksum(engine, task) == found
    spans: list[tuple[int, int]] = []
    part = with_lanes(plan.blocks, [replace(plan.blocks.lanes[-1], span=(1000, 5000))])
    with probed(part, plan) as task:
        choice._checksum(lambda task, *_: spans.append(task.plan.lanes[0].span), task)  # type: ignore[arg-type,return-value]
    assert spans == [(1000, 5000)]
    changed = [tuple(update._replace(take=update.take + 1e-7) for update in each) for each in updates]
    with probed(plan.blocks, plan) as task:
        assert choice._checksum(engine, replace(task, updates=changed)) != found


@pytest.fixture
def huge(tmp_path: Path) -> FoldPlan:
    """A plan of two students of 100 GB, of which the files have the names and no bytes."""
    for step in range(2):
        save_hollow(tmp_path / f"step_{step}.safetensors", {"a": ("F32", 25 * 10**9)})
    return ckpt_ema.plan(tmp_path, tmp_path / "t.safetensors", momentum=0.5)


class Clock:
    """Time that passes only where an engine says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of probes, for engines that take their time by it."""
    monkeypatch.setattr(choice, "time", CLOCK)
    return CLOCK


def engine_of(start_seconds: float, bytes_per_second: float, num_threads: int, first_byte: bytes = b"0") -> Engine:
    """One that only takes its time, by the clock; its threads come to the end of 4 MB each together."""

    def fold(task: Task, teachers: Any, progress: Any, **_: Any) -> Any:
        if task.plan.bytes_to_read < choice.MIN_BYTES:
            teachers[-1].write(memoryview(bytearray(first_byte)), 0)
            return
        CLOCK.sleep(start_seconds)
        for _ in range(100 * 10**9 // (4 * 10**6 * num_threads)):
            CLOCK.sleep(num_threads * 4e6 / bytes_per_second)
            for _ in range(num_threads):
                progress(4 * 10**6)

    return fold


@pytest.mark.parametrize(
    ("start_seconds", "bytes_per_second", "num_threads"),
    [(0.0, 1e10, 1), (0.0, 1e10, 16), (0.5, 1e10, 16), (2.0, 1e9, 4), (0.0, 5e7, 4), (0.0, 6.4e7, 16)],
)
def test_a_probe_tells_the_start_from_what_comes_then(
    huge: FoldPlan, clock: Clock, start_seconds: float, bytes_per_second: float, num_threads: int
) -> None:
    """Whatever it takes to start, how many threads it has and how slow it is, in 3 s from then on."""
    with probed(huge.blocks, huge) as task:
        started = clock.now
        rate = choice._rate(engine_of(start_seconds, bytes_per_second, num_threads), task)
    assert clock.now - started <= 3 + start_seconds
    expected = 2e11 / (start_seconds + 2e11 / bytes_per_second) / 1e9
    assert rate == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("num_students", [2, 48, 300])
def test_a_probe_of_the_cpu_tells_how_fast_it_is(
    huge: FoldPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_students: int
) -> None:
    """However many students there are, and little of a wider dtype first: no more than 16 threads read at 0.1 GB/s
    each, and no less than came in all, its start included, but for what is read when it ends."""
    folder = tmp_path / "many"
    folder.mkdir()
    for step in range(num_students):
        save_hollow(folder / f"step_{step}.safetensors", {"a": ("F64", 10**7), "b": ("F32", 10**9)})
    plan = ckpt_ema.plan(folder, tmp_path / "t.safetensors", momentum=0.5)
    read_bytes: list[int] = []
    widths: set[int] = set()

    def read(extents: LaneExtents, first: int, stop: int, buffer: memoryview, *_: Any) -> None:
        time.sleep(len(buffer) / 1e8)
        read_bytes.append(len(buffer))
        widths.add(len(buffer) // (stop - first))

    monkeypatch.setattr(LaneExtents, "read", read)
    blocks = replace(plan.blocks, num_threads=16)
    with probed(blocks, plan) as task:
        started = time.perf_counter()
        rate = choice._rate(cpu.fold_blocks, task)
    assert 0.75 * sum(read_bytes) / (time.perf_counter() - started) / 1e9 <= rate <= 1.05 * 16 * 0.1
    assert widths == {4}


def test_readers_that_run_ahead_are_not_taken_for_a_fast_engine(huge: FoldPlan, clock: Clock) -> None:
    """A GPU's read twenty blocks before they wait for anything."""

    def fold(task: Task, teachers: Any, progress: Any) -> Any:
        for number in range(2000):
            clock.sleep(0.0 if number < 20 else 0.01)
            progress(4 * 10**6)

    with probed(huge.blocks, huge) as task:
        assert choice._rate(fold, task) == pytest.approx(0.4, rel=0.1)  # type: ignore[arg-type]


def test_a_probe_that_is_stopped_keeps_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers of the CPU's threads are free before the fold makes its own."""
    plan = ckpt_ema.plan(run, tmp_path / "t.safetensors", momentum=0.5)
    buffers: list[weakref.ref[Buffer]] = []
    make = Buffer.__init__

    def note(buffer: Buffer, *arguments: Any, **options: Any) -> None:
        buffers.append(weakref.ref(buffer))
        make(buffer, *arguments, **options)

    monkeypatch.setattr(Buffer, "__init__", note)
    monkeypatch.setattr(choice, "LONGEST_PROBE_SECONDS", 1e-9)
    gc.disable()
    try:
        with probed(plan.blocks, plan) as task:
            choice._rate(cpu.fold_blocks, task)
            assert buffers
            assert not any(buffer() for buffer in buffers)
    finally:
        gc.enable()


def choose_between(
    on_cpu: Engine, on_gpu: Engine, plan: FoldPlan, monkeypatch: pytest.MonkeyPatch, lanes: Sequence[Lane] | None = None
) -> tuple[str, str]:
    """The device and the reason of `auto` for two teachers, where these are the engines."""
    monkeypatch.setattr(cpu, "fold_blocks", on_cpu)
    monkeypatch.setattr(cuda, "fold_blocks", on_gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    updates = [teacher.updates for teacher in plan.teachers] * 2
    blocks = plan.blocks if lanes is None else with_lanes(plan.blocks, lanes)
    found = choose_engine("auto", blocks, plan.layouts, updates, 1 << 20)
    return found.device, found.reason


@pytest.mark.parametrize(
    ("on_gpu", "device", "reason"),
    [
        (
            engine_of(0.5, 1e10, 16),
            "cuda:0",
            r"9\.[89] GB/s on cuda:0, 4\.0 on the CPU, expected from a probe",
        ),
        (engine_of(2.0, 1e10, 16), "cuda:0", r"9\.[01] GB/s on cuda:0, 4\.0 on the CPU, expected from a probe"),
        (engine_of(0.0, 1e9, 16), "cpu", r"1\.0 GB/s on cuda:0, 4\.0 on the CPU, expected from a probe"),
        (engine_of(0.0, 1e10, 16, b"1"), "cpu", "cuda:0 rounds in another way than the hook"),
    ],
)
def test_auto_takes_what_is_done_earlier(
    huge: FoldPlan, clock: Clock, monkeypatch: pytest.MonkeyPatch, on_gpu: Engine, device: str, reason: str
) -> None:
    """A GPU that takes its time to start too, but never one with other bytes in any teacher."""
    found = choose_between(engine_of(0.0, 4e9, 16), on_gpu, huge, monkeypatch)
    assert found[0] == device
    assert re.fullmatch(reason, found[1])


def test_auto_takes_no_gpu_for_little(huge: FoldPlan, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """That starts for longer than it saves, or for which there is little or nothing."""
    (lane,) = huge.blocks.lanes
    fast = engine_of(0.0, 1e10, 16), engine_of(2.0, 4e10, 16)
    # 22 GB are 2.2 s on one, and half a second on the other.
    assert choose_between(*fast, huge, monkeypatch, [replace(lane, span=(0, 11 * 10**9 // 4))])[0] == "cpu"
    for lanes in ([], [replace(lane, action="copy")], [replace(lane, span=(0, 10**9))]):
        expected = ("cpu", "too little to average for a GPU to pay")
        assert choose_between(*fast, huge, monkeypatch, lanes) == expected


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NonFiniteBlockError(NonFinite(0, 0)), "the students are not finite"),
        (RuntimeError("CUDA error: busy\nmore"), "the probe failed: CUDA error: busy"),
        (CkptEmaError("no room"), "the probe failed: no room"),
    ],
)
@pytest.mark.parametrize("where", ["compared", "timed"])
def test_a_probe_that_fails_is_no_reason_not_to_fold(
    huge: FoldPlan, clock: Clock, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception, reason: str
) -> None:
    """Whether the first bytes are compared, or the time is taken; the CPU is told to fold, and the reason is said."""

    def fold(task: Task, *_: Any, **__: Any) -> Any:
        if (task.plan.bytes_to_read < choice.MIN_BYTES) == (where == "compared"):
            raise error

    on_cpu = engine_of(0.0, 4e9, 16)
    assert choose_between(on_cpu, fold, huge, monkeypatch) == ("cpu", reason)  # type: ignore[arg-type]


def test_a_disk_that_nobody_has_read_of_speaks_for_no_gpu(
    huge: FoldPlan, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes first reads from the disk, and whoever comes then from memory: the GPU comes first."""
    engines: list[str] = []

    def noted(name: str) -> Engine:
        def fold(*arguments: Any, **options: Any) -> Any:
            engines.append(name)
            return engine_of(0.0, 1e10, 16)(*arguments, **options)

        return fold

    choose_between(noted("cpu"), noted("gpu"), huge, monkeypatch)
    assert engines == ["gpu", "gpu", "cpu", "cpu"]


@pytest.mark.parametrize("pays", [True, False])
def test_only_a_kernel_that_pays_is_tried(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pays: bool
) -> None:
    """For each pair of dtypes that updates, once."""
    tried: list[tuple[torch.dtype, torch.dtype]] = []

    def is_usable(device: torch.device, teacher: torch.dtype, student: torch.dtype) -> bool:
        tried.append((teacher, student))
        return False

    monkeypatch.setattr(fused, "is_usable", is_usable)
    monkeypatch.setattr(cuda, "COMPILING_SECONDS", -math.inf if pays else math.inf)
    with modelled(monkeypatch, 0):
        fold_on_a_model(run, tmp_path / "t.safetensors", momentum=0.3, memory_budget_bytes=1 << 20)
    students = {torch.float32, torch.bfloat16, torch.float16} & {
        tensor.dtype for tensor in torch.load(run / "step_0.pt")["model"].values()
    }
    assert len(tried) == len(set(tried))
    assert set(tried) == ({(torch.float32, dtype) for dtype in students} if pays else set())


def test_the_kernel_is_compiled_where_that_pays(huge: FoldPlan) -> None:
    """By what is left to update: 25e9 numbers, with 3 TB/s on the device and 50 GB/s from the host."""
    (lane,) = huge.blocks.lanes
    narrow = replace(lane, input_dtypes=(BY_NAME["bfloat16"],) * 2)
    # mul_ and add_ move a teacher's number five times; the link brings one in 80 ps, or 40.
    eight, sixteen = 8 * 20 / 3e12, 16 * 20 / 3e12
    for lanes, num_teachers, seconds in (
        ([lane], 1, 0.0),
        ([lane], 8, 0.0),
        ([lane], 16, 25e9 * (sixteen - 4 / 50e9)),
        ([narrow], 6, 0.0),
        ([narrow], 8, 25e9 * (eight - 2 / 50e9)),
        ([lane, narrow], 8, 25e9 * (eight - 2 / 50e9)),
        # The kernel itself takes longer than the link: it moves a number twice, and the student's.
        ([narrow], 100, 25e9 * (100 * 20 - (100 * 8 + 2)) / 3e12),
        ([replace(narrow, span=(7, 10**9 + 7))], 8, 1e9 * (eight - 2 / 50e9)),
        ([replace(lane, accumulate_dtype=BY_NAME["float64"])], 100, 0.0),
    ):
        assert cuda.seconds_saved_by_kernel(lanes, num_teachers) == pytest.approx(seconds)


@pytest.mark.parametrize("seed", range(40))
def test_no_budget_is_exceeded_and_none_leaves_a_thread_out(huge: FoldPlan, seed: int) -> None:
    """The host's buffers fit in any budget, and there are as many of them as threads, and more for readers."""
    random = Random(seed)
    budget = random.randrange(1 << 16, 1 << random.randint(17, 30))
    blocks = replace(huge.blocks, num_threads=random.randint(1, 32), num_teachers=random.choice([1, 8]))
    for free_bytes in (1 << 40, 1 << 28):
        for found in device_plan.plan_for_device(
            blocks, memory_budget_bytes=budget, free_bytes=free_bytes, is_remote=random.random() < 0.3
        ):
            assert (found.num_uploads + found.num_writers) * found.staging_bytes <= budget
            assert min(found.num_readers, found.num_writers) >= 1
            assert found.num_uploads > found.num_readers


def test_progress_does_not_wait_for_a_block_of_all_students(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many it is told of in between; in all, of every byte once."""
    monkeypatch.setattr(cpu, "TOLD_BYTES", 1 << 20)
    told: list[tuple[int, int]] = []
    fold = ckpt_ema.fold(
        run,
        tmp_path / "t.safetensors",
        momentum=0.5,
        device="cpu",
        announce=lambda plan: None,
        progress=lambda *seen: told.append(seen),
    )
    assert told[-1] == (fold.plan.bytes_to_read,) * 2
    # A block of the largest is 2 MiB of each of four students; the first is told of with the second.
    assert max(after - before for (before, _), (after, _) in itertools.pairwise(told)) == 4 << 20
