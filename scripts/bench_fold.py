"""The benchmark of the fold: every figure of the README's tables comes from here.

Each measurement is a process of its own that imports torch first and then times the work alone. The candidates of a
comparison run in turn, round by round; ratios are taken within a round and their median is printed, so that a machine
that gets slower slows all of them. The first round is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MOMENTUM = 0.1
THREADS = len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=Path("/tmp/ckpt-ema-bench"), help="folder for the checkpoints")
    parser.add_argument("--outputs", type=Path, default=Path("/dev/shm"), help="folder for the teachers, on a tmpfs")
    parser.add_argument("--checkpoints", type=int, default=6)
    parser.add_argument("--elements", type=float, default=335e6, help="parameters of the model")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--plot", type=Path, help="also draw the fold's figures here (needs matplotlib)")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints for the next call")
    parser.add_argument("--measure", nargs=3, metavar=("WHAT", "RUN", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    arguments.inputs.mkdir(parents=True, exist_ok=True)
    print(describe_machine(), flush=True)
    figures: dict[str, Any] = {"machine": describe_machine(), "checkpoints": arguments.checkpoints}
    try:
        for name in arguments.only:
            figures[name] = SECTIONS[name](arguments)
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.inputs, ignore_errors=True)
    if arguments.plot and "fold" in figures:
        draw(figures, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def describe_machine() -> str:
    import torch

    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{cpu}, {THREADS} cores, {memory:.0f} GiB; Linux {platform.release().split('-')[0]}, Python"
        f" {platform.python_version()}, torch {torch.__version__}; {time.strftime('%Y-%m-%d')}"
    )


# --- what is measured, each in a process of its own -------------------------------------------------------------------


def measure(what: str, run: str, output: str) -> None:
    """Print the seconds that one candidate takes, and the process's peak memory."""
    import resource

    import torch  # noqa: F401  (imported before the clock starts, for all alike)

    work = CANDIDATES[what](Path(run), Path(output))
    touch_memory(Path(output), Path(run))
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "peak_before": peak_before}))


def touch_memory(output: Path, run: Path) -> None:
    """Write and delete a file of the output's size: a virtual machine's host is slow to give memory at first touch."""
    num_bytes = next(run.glob("step_*")).stat().st_size
    chunk = bytes(1 << 22)
    with output.open("wb") as file:
        for _ in range(num_bytes // len(chunk) + 1):
            file.write(chunk)
    output.unlink()


def prepare_fold(run: Path, output: Path) -> Callable[[], None]:
    import ckpt_ema.engine.cpu  # noqa: F401  (imported before the clock starts)
    from ckpt_ema import fold

    def work() -> None:
        fold(run, output, momentum=MOMENTUM, announce=lambda plan: None)

    return work


def prepare_floor(run: Path, output: Path) -> Callable[[], None]:
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
                os.pwrite(descriptor, part, block.position)

        with InputFiles(plan.layouts) as files:
            threads = [threading.Thread(target=work_off) for _ in range(plan.blocks.num_threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        os.close(descriptor)

    return work


def prepare_loop(run: Path, output: Path) -> Callable[[], None]:
    """The loop a user would write."""
    import torch
    from safetensors.torch import load_file, save_file

    def work() -> None:
        paths = sorted(run.glob("step_*.safetensors"), key=lambda path: int(path.stem.split("_")[1]))
        teacher = load_file(paths[0])
        with torch.no_grad():
            for path in paths[1:]:
                for name, tensor in load_file(path).items():
                    teacher[name].mul_(1 - MOMENTUM).add_(tensor, alpha=MOMENTUM)
        save_file(teacher, output)

    return work


def prepare_averaged_model(run: Path, output: Path) -> Callable[[], None]:
    """torch's AveragedModel, fed the same checkpoints."""
    import torch
    from safetensors.torch import load_file, save_file
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    class Model(torch.nn.Module):
        def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList([torch.nn.Parameter(tensor) for tensor in tensors.values()])

    def work() -> None:
        paths = sorted(run.glob("step_*.safetensors"), key=lambda path: int(path.stem.split("_")[1]))
        model = Model(load_file(paths[0]))
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - MOMENTUM))
        averaged.update_parameters(model)
        for path in paths[1:]:
            with torch.no_grad():
                for parameter, tensor in zip(model.weights, load_file(path).values(), strict=True):
                    parameter.copy_(tensor)
            averaged.update_parameters(model)
        save_file(averaged.module.state_dict(), output)

    return work


CANDIDATES = {
    "fold": prepare_fold,
    "floor": prepare_floor,
    "loop": prepare_loop,
    "AveragedModel": prepare_averaged_model,
}


# --- comparisons ------------------------------------------------------------------------------------------------------


def run_candidate(what: str, run: Path, arguments: argparse.Namespace) -> dict[str, float]:
    output = arguments.outputs / f"ckpt-ema-bench-{os.getpid()}.safetensors"
    try:
        command = [sys.executable, __file__, "--measure", what, str(run), str(output)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        output.unlink(missing_ok=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def compare(runs: dict[str, tuple[str, Path]], arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Run each (candidate, run) in turn, round by round; the first round is thrown away."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for round_number in range(arguments.rounds + 1):
        for name, (what, run) in runs.items():
            figures = run_candidate(what, run, arguments)
            if round_number:
                results[name].append(figures)
    return results


def median_seconds(results: list[dict[str, float]]) -> float:
    return statistics.median(item["seconds"] for item in results)


def median_ratio(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    return statistics.median(a["seconds"] / b["seconds"] for a, b in zip(one, other, strict=True))


def write_run(folder: Path, shapes: list[tuple[int, ...]], dtype: str, arguments: argparse.Namespace, how: str) -> Path:
    """Checkpoints of random numbers; written by their own libraries, in a process that gives its memory back."""
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        code = (
            "import sys, json, torch\n"
            "from safetensors.torch import save_file\n"
            "folder, shapes, dtype, count, how = json.load(sys.stdin)\n"
            "g = torch.Generator().manual_seed(0)\n"
            "base = {f'layer{i:05d}.weight': torch.randn(s, generator=g) for i, s in enumerate(shapes)}\n"
            "for k in range(count):\n"
            "    student = {n: (t + 0.01 * k).to(getattr(torch, dtype)) for n, t in base.items()}\n"
            "    if how == 'safetensors': save_file(student, f'{folder}/step_{k}.safetensors')\n"
            "    else: torch.save({'model': student, 'step': k}, f'{folder}/step_{k}.pt')\n"
        )
        settings = json.dumps([str(folder), shapes, dtype, arguments.checkpoints, how])
        subprocess.run([sys.executable, "-c", code], input=settings, text=True, check=True)
        (folder / "complete").touch()
    for path in folder.glob("step_*"):
        warm(path)
    return folder


def warm(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def bench_fold(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = {}
    for dtype in ("float32", "bfloat16"):
        shapes = [(4096, 2048)] * max(1, round(arguments.elements / (4096 * 2048)))
        run = write_run(arguments.inputs / dtype, shapes, dtype, arguments, "safetensors")
        results = compare({name: (name, run) for name in CANDIDATES}, arguments)
        size = next(run.glob("step_*")).stat().st_size
        print(
            f"\n{arguments.checkpoints} checkpoints of {size / 1e9:.2f} GB, {dtype}, warm page cache, output on tmpfs\n"
        )
        print("| | seconds | GB/s read | times the floor | fold is faster by | peak memory |")
        print("|---|---|---|---|---|---|")
        for name in ("floor", "fold", "loop", "AveragedModel"):
            seconds = median_seconds(results[name])
            floor = median_ratio(results[name], results["floor"])
            faster = median_ratio(results[name], results["fold"])
            peak = statistics.median(item["peak"] for item in results[name])
            print(
                f"| {name} | {seconds:.2f} | {arguments.checkpoints * size / seconds / 1e9:.1f} | {floor:.2f} |"
                f" {faster:.1f} | {peak / 2**20:.0f} MiB |",
                flush=True,
            )
        above = statistics.median(item["peak"] - item["peak_before"] for item in results["fold"])
        print(f"\nthe fold's peak memory above `import torch`: {above / 2**20:.0f} MiB", flush=True)
        rows[dtype] = {"checkpoint_bytes": size, "results": results}
        if not arguments.keep:
            shutil.rmtree(run)
    return rows


def bench_small_tensors(arguments: argparse.Namespace) -> dict[str, Any]:
    elements = 250_000_000
    rows = {}
    print("\n20000 small tensors against one tensor of the same bytes (1 GB per checkpoint, float32)\n")
    print("| format | one tensor | 20000 tensors | ratio |")
    print("|---|---|---|---|")
    for how in ("safetensors", "torch.save"):
        one = write_run(arguments.inputs / f"one-{how}", [(elements,)], "float32", arguments, how)
        many = write_run(arguments.inputs / f"many-{how}", [(elements // 20000,)] * 20000, "float32", arguments, how)
        results = compare({"one": ("fold", one), "many": ("fold", many)}, arguments)
        ratio = median_ratio(results["many"], results["one"])
        one_seconds, many_seconds = median_seconds(results["one"]), median_seconds(results["many"])
        print(f"| {how} | {one_seconds:.2f} s | {many_seconds:.2f} s | {ratio:.2f} |", flush=True)
        rows[how] = {"results": results}
        if not arguments.keep:
            shutil.rmtree(one)
            shutil.rmtree(many)
    return rows


def bench_start(arguments: argparse.Namespace) -> dict[str, Any]:
    """Whole processes: what a user waits for before anything happens."""
    import torch
    from safetensors.torch import save_file

    run = arguments.inputs / "fifty"
    run.mkdir(parents=True, exist_ok=True)
    student = {f"layer{i}.weight": torch.zeros(8, 8) for i in range(400)}
    for step in range(50):
        save_file(student, run / f"step_{step}.safetensors")
    rows = {}
    print("\nwhole processes\n")
    print("| command | seconds |")
    print("|---|---|")
    for label, words in (("ckpt-ema --help", ["--help"]), ("ckpt-ema plan, 50 checkpoints", ["plan", str(run)])):
        seconds = list(whole_process(words, arguments.rounds + 1))[1:]
        print(f"| {label} | {statistics.median(seconds):.2f} |", flush=True)
        rows[label] = seconds
    shutil.rmtree(run)
    return rows


def draw(figures: dict[str, Any], path: Path) -> None:
    """One panel per dtype, one bar per candidate: median seconds, the spread of the rounds as a line."""
    import matplotlib

    matplotlib.use("svg")
    # Same figures, same file: no dates, no random identifiers.
    matplotlib.rcParams["svg.hashsalt"] = "ckpt-ema"
    import matplotlib.pyplot as plt

    names = {
        "floor": "read + write only",
        "fold": "ckpt-ema fold",
        "loop": "load_file loop",
        "AveragedModel": "AveragedModel",
    }
    panels, axes = plt.subplots(1, len(figures["fold"]), figsize=(9, 2.4), layout="constrained")
    for axis, (dtype, row) in zip(axes, figures["fold"].items(), strict=True):
        for place, (candidate, label) in enumerate(reversed(names.items())):
            seconds = [item["seconds"] for item in row["results"][candidate]]
            middle = statistics.median(seconds)
            colour = {"fold": "#c8553d", "floor": "#9aa5ad"}.get(candidate, "#44617b")
            axis.barh(place, middle, color=colour, label=label)
            axis.plot([min(seconds), max(seconds)], [place, place], color="black", linewidth=1)
            axis.text(max(seconds), place, f"  {middle:.2f} s", va="center")
        axis.set_yticks(range(len(names)), list(reversed(names.values())))
        axis.set_title(f"{dtype}, {figures['checkpoints']} x {row['checkpoint_bytes'] / 1e9:.2f} GB", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    panels.savefig(path, metadata={"Date": None})


def whole_process(words: list[str], count: int) -> Iterator[float]:
    for _ in range(count):
        started = time.perf_counter()
        subprocess.run(
            [str(Path(sys.executable).with_name("ckpt-ema")), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        yield time.perf_counter() - started


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "fold": bench_fold,
    "small-tensors": bench_small_tensors,
    "start": bench_start,
}

if __name__ == "__main__":
    main()
