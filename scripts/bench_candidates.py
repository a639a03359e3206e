"""What the benchmark measures: each candidate prepares (imports, plans) and hands back the work to be timed."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOMENTUM = 0.1
EIGHT_MOMENTA = [k / 10 for k in range(1, 9)]


def prepare_fold(run: Path, output: Path, **options: Any) -> Callable[[], None]:
    """ckpt-ema itself, its planning included."""
    import torch

    import ckpt_ema.engine.cpu  # noqa: F401  (imported before the clock starts)
    from ckpt_ema import fold

    torch.zeros(1, device=options.get("device", "cpu"))  # as in the loop below: a GPU's context is there already

    def work() -> None:
        fold(run, output, announce=lambda plan: None, **{"momentum": MOMENTUM, **options})

    return work


def prepare_fold_without_llvm(run: Path, output: Path, **options: Any) -> Callable[[], None]:
    """The same as where llvmlite is not installed: torch's calls update the teacher."""
    sys.modules["llvmlite"] = None  # type: ignore[assignment]
    return prepare_fold(run, output, **options)


def prepare_read(run: Path, output: Path) -> Callable[[], None]:
    """The same threads and preads into one buffer each; nothing computed, nothing written."""
    return prepare_floor(run, output, writes=False)


def prepare_floor(run: Path, output: Path, *, writes: bool = True) -> Callable[[], None]:
    """The same threads, the same preads into one buffer each, the same bytes written; nothing computed."""
    import ckpt_ema
    from ckpt_ema.engine.inputs import InputFiles, LaneExtents

    plan = ckpt_ema.plan(run, output, momentum=MOMENTUM)

    def work() -> None:
        blocks = iter(list(plan.blocks.blocks()))
        lock = threading.Lock()
        descriptor = os.open(output, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        os.ftruncate(descriptor, plan.bytes_to_write)

        def work_off() -> None:
            buffer = memoryview(bytearray(plan.blocks.thread_buffers[0]))
            trash = memoryview(bytearray(4096))
            while True:
                with lock:
                    block = next(blocks, None)
                if block is None:
                    return
                part = buffer[: (block.end - block.begin) * block.lane.student_dtype.itemsize]
                for layout in plan.layouts:
                    LaneExtents(files, layout, block.lane).read(block.begin, block.end, part, trash, {})
                if writes:
                    os.pwrite(descriptor, part, block.position)

        with InputFiles(plan.layouts) as files:
            threads = [threading.Thread(target=work_off) for _ in range(plan.blocks.num_threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        os.close(descriptor)

    return work


def prepare_pinned(run: Path, output: Path) -> Callable[[], None]:
    """As many bytes as the checkpoints have, from page-locked memory to the GPU; nothing read, nothing computed."""
    import torch

    num_bytes = sum(path.stat().st_size for path in run.glob("step_*"))
    sources = [torch.zeros(32 << 20, dtype=torch.uint8).pin_memory() for _ in range(8)]
    target = torch.empty(32 << 20, dtype=torch.uint8, device="cuda")

    def work() -> None:
        for number in range(num_bytes // len(target)):
            target.copy_(sources[number % len(sources)], non_blocking=True)
        torch.cuda.synchronize()

    return work


def prepare_loop(run: Path, output: Path, device: str = "cpu") -> Callable[[], None]:
    """The loop a user would write."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.zeros(1, device=device)  # a GPU's context is there before the clock starts, for all alike

    def work() -> None:
        paths = sorted(run.glob("step_*.safetensors"), key=lambda path: int(path.stem.split("_")[1]))
        teacher = load_file(paths[0], device=device)
        with torch.no_grad():
            for path in paths[1:]:
                for name, tensor in load_file(path, device=device).items():
                    teacher[name].mul_(1 - MOMENTUM).add_(tensor, alpha=MOMENTUM)
        save_file(teacher, output)

    return work


def prepare_averaged_model(run: Path, output: Path, device: str = "cpu") -> Callable[[], None]:
    """torch's AveragedModel, fed the same checkpoints."""
    import torch
    from safetensors.torch import load_file, save_file
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    torch.zeros(1, device=device)  # as above

    class Model(torch.nn.Module):
        def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList([torch.nn.Parameter(tensor) for tensor in tensors.values()])

    def work() -> None:
        paths = sorted(run.glob("step_*.safetensors"), key=lambda path: int(path.stem.split("_")[1]))
        model = Model(load_file(paths[0], device=device))
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - MOMENTUM))
        averaged.update_parameters(model)
        for path in paths[1:]:
            with torch.no_grad():
                for parameter, tensor in zip(model.weights, load_file(path, device=device).values(), strict=True):
                    parameter.copy_(tensor)
            averaged.update_parameters(model)
        save_file(averaged.module.state_dict(), output)

    return work


def prepare_mergekit(run: Path, output: Path, device: str = "cpu") -> Callable[[], None]:
    """mergekit's linear merge of the same files, with the coefficients of the same fold."""
    import yaml
    from mergekit.scripts.merge_raw_pytorch import main

    import ckpt_ema

    plan = ckpt_ema.plan(run, output, momentum=MOMENTUM)
    config = output.with_name("merge.yaml")
    models = [
        {"model": str(run / checkpoint.name), "parameters": {"weight": checkpoint.coefficient}}
        for checkpoint in plan.checkpoints
    ]
    dtype = plan.tensors[0].student_dtype.name
    settings = {"merge_method": "linear", "models": models, "dtype": "float32", "out_dtype": dtype}
    config.write_text(yaml.safe_dump({**settings, "parameters": {"normalize": False}}))

    words = [str(config), str(output.with_name("merged")), "--quiet", *(["--cuda"] if device == "cuda" else [])]

    def work() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # it draws bars whatever it is told
            main.main(words, standalone_mode=False)

    return work


def prepare_dd(run: Path, output: Path) -> Callable[[], None]:
    """The files read by dd, one after the other."""
    paths = sorted(run.glob("step_*"))

    def work() -> None:
        for path in paths:
            subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=16M", "status=none"], check=True)

    return work


CANDIDATES: dict[str, Callable[..., Callable[[], None]]] = {
    "fold": prepare_fold,
    "fold without llvmlite": prepare_fold_without_llvm,
    "floor": prepare_floor,
    "read": prepare_read,
    "pinned": prepare_pinned,
    "dd": prepare_dd,
    "loop": prepare_loop,
    "AveragedModel": prepare_averaged_model,
    "mergekit": prepare_mergekit,
}
