"""The benchmark of the fold: every figure of the README's tables comes from here.

Each measurement (but for `engine` and `online`, on a GPU as well) is a process of its own that imports torch first and
then times the work alone. The candidates of a comparison run in turn, round by round; ratios are taken within a round
and their median is printed, so that a machine that gets slower slows all of them. The first round is not counted. A
candidate that fails is named on stderr and left out of its table; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_candidates import CANDIDATES, EIGHT_MOMENTA
from bench_engine import bench_engine
from bench_online import bench_online, bench_online_cuda
from bench_sharded import bench_ranks, bench_sharded

THREADS = len(os.sched_getaffinity(0))
ON_GPU = {"device": "cuda"}
DTYPES = ("float32", "bfloat16")
OTHERS = ("loop", "AveragedModel", *(["mergekit"] if importlib.util.find_spec("mergekit") else []))
"""What the fold is compared with, on the CPU and on a GPU, from the page cache and from the disk."""

Parts = Iterator[tuple[str, Any]]
"""What a section has measured: the name of a part, such as a dtype, and its figures, when it is finished."""

FAILURES: list[str] = []
"""Of this call; all else was measured."""


class CandidateError(Exception):
    """The process of a candidate failed."""


class SectionError(Exception):
    """What a section compares all others with failed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=Path("/tmp"), help="folder for the folder of checkpoints")
    parser.add_argument("--outputs", type=Path, default=Path("/dev/shm"), help="folder for the teachers, on a tmpfs")
    parser.add_argument("--checkpoints", type=positive, default=6)
    parser.add_argument("--elements", type=float, default=335e6, help="parameters of the model")
    parser.add_argument("--rounds", type=positive, default=5, help="counted rounds")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--plot", type=Path, help="also draw the fold's figures here, growth and GPU beside it")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of the sections that have a table for each"
    )
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints for the next call")
    parser.add_argument("--measure", nargs=4, metavar=("WHAT", "RUN", "OUTPUT", "OPTIONS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    # A folder of its own: all of it is removed in the end.
    arguments.inputs /= "ckpt-ema-bench"
    arguments.inputs.mkdir(parents=True, exist_ok=True)
    print(describe_machine(), flush=True)
    figures: dict[str, Any] = {"machine": describe_machine(), "checkpoints": arguments.checkpoints}
    try:
        for name in arguments.only:
            print(f"section `{name}`", file=sys.stderr, flush=True)
            figures[name] = {}
            write_figures(figures, arguments.json)
            try:
                for part, found in SECTIONS[name](arguments):
                    figures[name][part] = found
                    write_figures(figures, arguments.json)
            except SectionError as error:
                FAILURES.append(name)
                print(f"Error: section `{name}`: {error}", file=sys.stderr, flush=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.inputs, ignore_errors=True)
    if arguments.plot and figures.get("fold"):
        draw_bars(figures["fold"], FOLD_BARS, arguments.plot)
    if arguments.plot and figures.get("cuda"):  # none without a GPU
        draw_bars(figures["cuda"], CUDA_BARS, arguments.plot.with_name("cuda.svg"))
    if arguments.plot and figures.get("growth"):
        draw_growth(figures, arguments.plot.with_name("growth.svg"))
    if FAILURES:
        sys.exit(1)


def write_figures(figures: dict[str, Any], path: Path | None) -> None:
    """By and by: an hour's figures are not lost to what fails last, nor those of a call that is stopped."""
    if path:
        path.write_text(json.dumps(figures, indent=2) + "\n")


def positive(text: str) -> int:
    """A number of 1 or more; argparse says what it is not."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


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


def measure(what: str, run: str, output: str, options: str) -> None:
    """Print the seconds that one candidate takes, and the process's peak memory."""
    import torch  # noqa: F401  (imported before the clock starts, for all alike)

    settings = json.loads(options)
    is_cold = settings.pop("is_cold")
    work = CANDIDATES[what](Path(run), Path(output), **settings)
    touch_memory(Path(output), Path(run), len(settings.get("momentum", [0])))
    if is_cold:
        # A disk may lend a burst to who comes after a pause: every candidate comes right after the same reading.
        forget(Path(run))
        for path in Path(run).glob("step_*"):
            warm(path)
        forget(Path(run))
    peak_before = peak_memory_bytes()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    peak = peak_memory_bytes()
    print(json.dumps({"seconds": seconds, "peak": peak, "peak_before": peak_before}))


def peak_memory_bytes() -> int:
    """Of this process; getrusage would take what its parent had for its own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next((line.split()[1] for line in lines if line.startswith("VmHWM")), "0"))  # 0: not told


def touch_memory(output: Path, run: Path, num_teachers: int = 1) -> None:
    """Write and delete a file of the output's size: a virtual machine's host is slow to give memory at first touch."""
    output = output.with_name("touch-memory")
    num_bytes = next(run.glob("step_*")).stat().st_size * num_teachers
    chunk = bytes(1 << 22)
    with output.open("wb") as file:
        for _ in range(num_bytes // len(chunk) + 1):
            file.write(chunk)
    output.unlink()


# --- comparisons ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One thing to time: a candidate on a run."""

    what: str
    run: Path
    options: dict[str, Any] = field(default_factory=dict)
    is_cold: bool = False
    """Whether the files are read from the disk."""


def run_candidate(case: Case, arguments: argparse.Namespace) -> dict[str, float]:
    """What `measure` prints in a process of its own; raises CandidateError where that fails."""
    folder = arguments.outputs / f"ckpt-ema-bench-{os.getpid()}"
    several = len(case.options.get("momentum", [0])) > 1
    output = folder / ("teacher-{momentum}.safetensors" if several else "teacher.safetensors")
    folder.mkdir(parents=True)
    try:
        command = [sys.executable, __file__, "--measure", case.what, str(case.run), str(output)]
        command.append(json.dumps({**case.options, "is_cold": case.is_cold}))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        shutil.rmtree(folder)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        # An error of our own ends with a hint.
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
        raise CandidateError(": ".join([f"exit code {done.returncode}", *(errors or lines)[-1:]]))
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def forget(run: Path) -> None:
    """Drop a run's files from the page cache."""
    for path in run.glob("step_*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(
    cases: dict[str, Case], arguments: argparse.Namespace, bases: Sequence[str] = ()
) -> dict[str, list[dict[str, float]]]:
    """Run each case in turn, round by round; the first round is thrown away, and so is what fails in any.

    Raises SectionError where that is one of `bases`, which the others are compared with.
    """
    results: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for round_number in range(arguments.rounds + 1):
        for name in list(results):
            label = f"{cases[name].run.name}, round {round_number} of {arguments.rounds}: {name}"
            try:
                figures = run_candidate(cases[name], arguments)
            except CandidateError as error:
                if name in bases:
                    raise SectionError(f"{label} failed, which others are compared with, {error}") from error
                FAILURES.append(label)
                print(f"{label} failed and is left out, {error}", file=sys.stderr, flush=True)
                del results[name]
                continue
            print(f"{label} took {figures['seconds']:.3f} s", file=sys.stderr, flush=True)
            if round_number:
                results[name].append(figures)
    return results


def median_seconds(results: list[dict[str, float]]) -> float:
    return statistics.median(item["seconds"] for item in results)


def median_ratio(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    return statistics.median(a["seconds"] / b["seconds"] for a, b in zip(one, other, strict=True))


def print_rates(results: dict[str, list[dict[str, float]]], num_bytes: int, base: str) -> None:
    """A table of what took `num_bytes` in, against `base`."""
    print(f"| | seconds | GB/s | times {base} |")
    print("|---|---|---|---|")
    for name, items in results.items():
        seconds, ratio = median_seconds(items), median_ratio(items, results[base])
        print(f"| {name} | {seconds:.2f} | {num_bytes / seconds / 1e9:.2f} | {ratio:.2f} |", flush=True)


def write_run(folder: Path, shapes: list[tuple[int, ...]], dtype: str, arguments: argparse.Namespace, how: str) -> Path:
    """Checkpoints of random numbers; written by their own libraries, in a process that gives its memory back."""
    settings = json.dumps([str(folder), shapes, dtype, arguments.checkpoints, how])
    complete = folder / "complete"
    if complete.exists() and complete.read_text() == settings:  # kept by an earlier call
        for path in folder.glob("step_*"):
            warm(path)
        return folder
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
    subprocess.run([sys.executable, "-c", code], input=settings, text=True, check=True)
    complete.write_text(settings)
    return folder


def layers(elements: float) -> list[tuple[int, ...]]:
    """Shapes of about as many elements in all."""
    return [(4096, 2048)] * max(1, round(elements / (4096 * 2048)))


def warm(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def bench_fold(arguments: argparse.Namespace) -> Parts:
    for dtype in arguments.dtypes:
        run = write_run(arguments.inputs / dtype, layers(arguments.elements), dtype, arguments, "safetensors")
        # It has a part in 16-bit students' alone.
        without = ["fold without llvmlite"] if dtype == "bfloat16" else []
        names = ("read", "floor", "fold", *without, *OTHERS)
        results = compare({name: Case(name, run) for name in names}, arguments, ("floor", "fold"))
        size = next(run.glob("step_*")).stat().st_size
        print(
            f"\n{arguments.checkpoints} checkpoints of {size / 1e9:.2f} GB, {dtype}, warm page cache, output on tmpfs\n"
        )
        print("| | seconds | GB/s read | times the floor | fold is faster by | peak memory |")
        print("|---|---|---|---|---|---|")
        for name, items in results.items():
            seconds = median_seconds(items)
            floor = median_ratio(items, results["floor"])
            faster = median_ratio(items, results["fold"])
            peak = statistics.median(item["peak"] for item in items)
            print(
                f"| {name} | {seconds:.2f} | {arguments.checkpoints * size / seconds / 1e9:.1f} | {floor:.2f} |"
                f" {faster:.1f} | {peak / 2**20:.0f} MiB |",
                flush=True,
            )
        above = statistics.median(item["peak"] - item["peak_before"] for item in results["fold"])
        print(f"\nthe fold's peak memory above `import torch`: {above / 2**20:.0f} MiB", flush=True)
        if not arguments.keep:
            shutil.rmtree(run)
        yield dtype, {"run_bytes": arguments.checkpoints * size, "results": results}


def bench_small_tensors(arguments: argparse.Namespace) -> Parts:
    elements = 250_000_000
    print("\n20000 small tensors against one tensor of the same bytes (1 GB per checkpoint, float32)\n")
    print("| format | one tensor | 20000 tensors | ratio |")
    print("|---|---|---|---|")
    for how in ("safetensors", "torch.save"):
        one = write_run(arguments.inputs / f"one-{how}", [(elements,)], "float32", arguments, how)
        many = write_run(arguments.inputs / f"many-{how}", [(elements // 20000,)] * 20000, "float32", arguments, how)
        results = compare({"one": Case("fold", one), "many": Case("fold", many)}, arguments, ("one", "many"))
        ratio = median_ratio(results["many"], results["one"])
        one_seconds, many_seconds = median_seconds(results["one"]), median_seconds(results["many"])
        print(f"| {how} | {one_seconds:.2f} s | {many_seconds:.2f} s | {ratio:.2f} |", flush=True)
        if not arguments.keep:
            shutil.rmtree(one)
            shutil.rmtree(many)
        yield how, {"results": results}


def bench_cold(arguments: argparse.Namespace) -> Parts:
    """From the disk: the fold, what it cannot avoid and what others do, against dd reading the same files."""
    for dtype in arguments.dtypes:
        run = write_run(arguments.inputs / f"cold-{dtype}", layers(arguments.elements), dtype, arguments, "safetensors")
        names = ("dd", "read", "floor", "fold", *OTHERS)
        results = compare({name: Case(name, run, is_cold=True) for name in names}, arguments, ["dd"])
        size = sum(path.stat().st_size for path in run.glob("step_*"))
        print(f"\n{arguments.checkpoints} checkpoints of {size / arguments.checkpoints / 1e9:.2f} GB, {dtype}, cold\n")
        print_rates(results, size, "dd")
        if not arguments.keep:
            shutil.rmtree(run)
        yield dtype, {"run_bytes": size, "results": results}


def cases_on_gpu(run: Path, *, is_cold: bool) -> dict[str, Case]:
    """What the fold on a GPU cannot avoid, the fold, and others; dd first where they read from the disk."""
    found: dict[str, tuple[str, dict[str, Any]]] = {
        **({"dd": ("dd", {})} if is_cold else {}),
        "pinned copy": ("pinned", {}),
        "read": ("read", {}),
        "read and write": ("floor", {}),
        "fold on the CPU": ("fold", {"device": "cpu"}),
        "fold on the GPU": ("fold", ON_GPU),
        "eight teachers on the GPU": ("fold", {**ON_GPU, "momentum": EIGHT_MOMENTA}),
        **{f"{what} on the GPU": (what, ON_GPU) for what in OTHERS},
    }
    # The copy reads no file that would have to be forgotten before.
    return {name: Case(what, run, options, is_cold and what != "pinned") for name, (what, options) in found.items()}


def bench_cuda(arguments: argparse.Namespace, *, is_cold: bool) -> Parts:
    """The fold on a GPU against the copying that it cannot avoid, or from the disk against dd; nothing without one."""
    import torch

    base, where = ("dd", "cold") if is_cold else ("pinned copy", "warm page cache")
    if not torch.cuda.is_available():
        print(f"\nno GPU here: the fold on a GPU was not measured, {where}", flush=True)
        return
    for dtype in arguments.dtypes:
        run = write_run(arguments.inputs / f"cuda-{dtype}", layers(arguments.elements), dtype, arguments, "safetensors")
        results = compare(cases_on_gpu(run, is_cold=is_cold), arguments, [base])
        size = sum(path.stat().st_size for path in run.glob("step_*"))
        print(
            f"\n{torch.cuda.get_device_name()}, {arguments.checkpoints} checkpoints, {size / 1e9:.2f} GB of {dtype},"
            f" {where}\n"
        )
        print_rates(results, size, base)
        if not arguments.keep:
            shutil.rmtree(run)
        yield dtype, {"device": torch.cuda.get_device_name(), "run_bytes": size, "results": results}


def bench_parts(device: str, arguments: argparse.Namespace) -> Parts:
    """What bounds an engine; see `bench_engine`."""

    def write(dtype: str) -> Path:
        return write_run(
            arguments.inputs / f"engine-{dtype}", layers(arguments.elements), dtype, arguments, "safetensors"
        )

    return bench_engine(arguments, write, device)


def bench_teachers(arguments: argparse.Namespace) -> Parts:
    """What more teachers from one pass cost, where reading is free and where it is not."""
    gigabytes = 4 * arguments.elements / 5 / 1e9
    print(f"\nteachers from one pass, {arguments.checkpoints} checkpoints of {gigabytes:.2f} GB, float32\n")
    print("| teachers | warm | times one | cold | times one |")
    print("|---|---|---|---|---|")
    run = write_run(arguments.inputs / "teachers", layers(arguments.elements / 5), "float32", arguments, "safetensors")
    cases = {}
    for is_cold in (False, True):
        for count in (1, 2, 4, 8):
            name = f"{count} {'cold' if is_cold else 'warm'}"
            cases[name] = Case("fold", run, {"momentum": EIGHT_MOMENTA[:count]}, is_cold)
    rows = compare(cases, arguments, ("1 warm", "1 cold"))
    for count in (1, 2, 4, 8):
        if not {f"{count} warm", f"{count} cold"} <= rows.keys():
            continue
        warm, cold = rows[f"{count} warm"], rows[f"{count} cold"]
        print(
            f"| {count} | {median_seconds(warm):.2f} s | {median_ratio(warm, rows['1 warm']):.2f} |"
            f" {median_seconds(cold):.2f} s | {median_ratio(cold, rows['1 cold']):.2f} |",
            flush=True,
        )
    if not arguments.keep:
        shutil.rmtree(run)
    yield from rows.items()


def bench_growth(arguments: argparse.Namespace) -> Parts:
    """How the time grows with each of the things that may grow."""
    small = arguments.elements / 5

    def run_of(elements: float, checkpoints: int = 6, tensors: int = 40) -> Path:
        folder = arguments.inputs / f"growth-{elements:.0f}-{checkpoints}-{tensors}"
        settings = argparse.Namespace(**{**vars(arguments), "checkpoints": checkpoints})
        return write_run(folder, [(round(elements / tensors),)] * tensors, "float32", settings, "safetensors")

    def by_checkpoints() -> dict[str, Case]:
        run = run_of(small, checkpoints=24)
        return {f"{count}": Case("fold", run, {"last": count}) for count in (3, 6, 12, 24)}

    def by_size() -> dict[str, Case]:
        sizes = [part * small for part in (0.25, 0.5, 1, 2)]
        return {f"{size / 1e6:.0f}": Case("fold", run_of(size)) for size in sizes}

    def by_tensors() -> dict[str, Case]:
        return {f"{count}": Case("fold", run_of(small, tensors=count)) for count in (1, 100, 1000, 10000)}

    def by_threads() -> dict[str, Case]:
        return {f"{count}": Case("fold", run_of(small), {"num_threads": count}) for count in (1, 2, 3, 4)}

    print(f"\nhow the time grows, from 6 checkpoints of {4 * small / 1e9:.2f} GB in 40 float32 tensors\n")
    print("| what grows | | seconds |")
    print("|---|---|---|")
    groups = {
        "checkpoints": by_checkpoints,
        "million parameters": by_size,
        "tensors": by_tensors,
        "threads": by_threads,
    }
    for what, prepare in groups.items():
        results = compare(prepare(), arguments)
        for value, items in results.items():
            print(f"| {what} | {value} | {median_seconds(items):.2f} |", flush=True)
        # Group by group: all of them together would push each other out of the page cache.
        for path in arguments.inputs.glob("growth-*"):
            shutil.rmtree(path)
        yield what, results


def bench_start(arguments: argparse.Namespace) -> Parts:
    """Whole processes: what a user waits for before anything happens."""
    import torch
    from safetensors.torch import save_file

    run = arguments.inputs / "fifty"
    run.mkdir(parents=True, exist_ok=True)
    student = {f"layer{i}.weight": torch.zeros(8, 8) for i in range(400)}
    for step in range(50):
        save_file(student, run / f"step_{step}.safetensors")
    print("\nwhole processes\n")
    print("| command | seconds |")
    print("|---|---|")
    for label, words in (("ckpt-ema --help", ["--help"]), ("ckpt-ema plan, 50 checkpoints", ["plan", str(run)])):
        seconds = list(whole_process(words, arguments.rounds + 1))[1:]
        print(f"| {label} | {statistics.median(seconds):.2f} |", flush=True)
        yield label, seconds
    shutil.rmtree(run)


def bench_ranks_of_a_run(arguments: argparse.Namespace) -> Parts:
    run = write_run(arguments.inputs / "float32", layers(arguments.elements), "float32", arguments, "safetensors")
    return bench_ranks(arguments, run)


def start_plot() -> Any:
    """matplotlib's pyplot, set so that the same figures make the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ckpt-ema"  # no random identifiers
    import matplotlib.pyplot as plt

    return plt


def draw_growth(figures: dict[str, Any], path: Path) -> None:
    """One panel per thing that grows: median seconds, the spread of the rounds as a line."""
    plt = start_plot()
    panels, (axes,) = plt.subplots(1, len(figures["growth"]), figsize=(9, 2.4), layout="constrained", squeeze=False)
    for axis, (what, group) in zip(axes, figures["growth"].items(), strict=True):
        values = [float(value) for value in group]
        seconds = [[item["seconds"] for item in items] for items in group.values()]
        axis.vlines(
            values, [min(each) for each in seconds], [max(each) for each in seconds], color="black", linewidth=1
        )
        axis.plot(values, [statistics.median(each) for each in seconds], "o-", color="#c8553d", markersize=4)
        axis.set_xlabel(what)
        axis.set_ylim(bottom=0)
        if what == "tensors":
            axis.set_xscale("log")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("seconds per fold")
    panels.savefig(path, metadata={"Date": None})


FOLD_BARS = {
    "floor": "read + write only",
    "fold": "ckpt-ema fold",
    "fold without llvmlite": "without llvmlite",
    "loop": "load_file loop",
    "AveragedModel": "AveragedModel",
    "mergekit": "mergekit linear",
}
CUDA_BARS = {
    "pinned copy": "host-to-device copy only",
    "read and write": "read + write only",
    "fold on the GPU": "ckpt-ema on the GPU",
    "fold on the CPU": "ckpt-ema on the CPU",
    "loop on the GPU": "load_file loop on the GPU",
    "AveragedModel on the GPU": "AveragedModel on the GPU",
    "mergekit on the GPU": "mergekit linear on the GPU",
}
OURS = ("fold", "fold without llvmlite", "fold on the GPU", "fold on the CPU")
FLOORS = ("floor", "pinned copy", "read and write")


def draw_bars(rows: dict[str, Any], names: dict[str, str], path: Path) -> None:
    """One panel per dtype, one bar per candidate: median seconds, the spread of the rounds as a line."""
    plt = start_plot()
    panels, (axes,) = plt.subplots(1, len(rows), figsize=(9, 2.4), layout="constrained", squeeze=False)
    for axis, (dtype, row) in zip(axes, rows.items(), strict=True):
        shown = {name: label for name, label in names.items() if name in row["results"]}
        for place, (candidate, label) in enumerate(reversed(shown.items())):
            seconds = [item["seconds"] for item in row["results"][candidate]]
            middle = statistics.median(seconds)
            colour = "#c8553d" if candidate in OURS else "#9aa5ad" if candidate in FLOORS else "#44617b"
            axis.barh(place, middle, color=colour, label=label)
            axis.plot([min(seconds), max(seconds)], [place, place], color="black", linewidth=1)
            axis.text(max(seconds), place, f"  {middle:.2f} s", va="center")
        axis.set_yticks(range(len(shown)), list(reversed(shown.values())))
        axis.set_title(f"{dtype}, {row['run_bytes'] / 1e9:.1f} GB", fontsize=10)
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


SECTIONS: dict[str, Callable[[argparse.Namespace], Parts]] = {
    "fold": bench_fold,
    "small-tensors": bench_small_tensors,
    "cold": bench_cold,
    "teachers": bench_teachers,
    "growth": bench_growth,
    "start": bench_start,
    "engine": functools.partial(bench_parts, "cpu"),
    "engine-cuda": functools.partial(bench_parts, "cuda"),
    "cuda": functools.partial(bench_cuda, is_cold=False),
    "cuda-cold": functools.partial(bench_cuda, is_cold=True),
    "online": bench_online,
    "online-cuda": bench_online_cuda,
    "sharded": bench_sharded,
    "ranks": bench_ranks_of_a_run,
}

if __name__ == "__main__":
    main()
