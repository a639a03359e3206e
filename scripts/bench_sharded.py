"""The benchmark of what many ranks save and fold: planning a checkpoint of 216 GB, and one fold by 1, 2 and 4 ranks.

The 216 GB are files with holes: their tables are real, their numbers are zeros that take no room on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ckpt_ema import plan
from ckpt_ema.blocks import plan_of_rank
from ckpt_ema.dtypes import BY_NAME
from ckpt_ema.output.teacher_files import Entry, tensor_zip

NUM_LAYERS = 80
WIDTH = 7168
NUM_MACHINES = 64
Shapes = dict[str, tuple[int, ...]]


def large_model() -> Shapes:
    """80 layers of width 7168: 54 billion parameters, 216 GB in float32."""
    shapes: Shapes = {"embedding.weight": (32000, WIDTH), "head.weight": (32000, WIDTH)}
    for layer in range(NUM_LAYERS):
        for name in ("q", "k", "v", "o"):
            shapes[f"layers.{layer}.{name}.weight"] = (WIDTH, WIDTH)
        for name in ("up", "gate", "down"):
            shapes[f"layers.{layer}.{name}.weight"] = (3 * WIDTH, WIDTH)
        shapes[f"layers.{layer}.norm.weight"] = (WIDTH,)
    return shapes


def write_sparse_checkpoint(folder: Path, shapes: Shapes, num_ranks: int) -> None:
    """What FSDP2 saves on `num_ranks` ranks through torch.distributed.checkpoint, with holes for numbers."""
    import torch
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    folder.mkdir(parents=True)
    entries: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    ends = [0] * num_ranks
    files = [(folder / f"__{rank}_0.distcp").open("wb") for rank in range(num_ranks)]
    for name, shape in shapes.items():
        chunks = []
        rows = -(-shape[0] // num_ranks)
        for rank in range(num_ranks):
            count = max(0, min(rows, shape[0] - rank * rows))
            if not count:
                continue
            sizes, offsets = (count, *shape[1:]), (rank * rows, *(0 for _ in shape[1:]))
            num_bytes = 4 * int(torch.Size(sizes).numel())
            before, behind = tensor_zip(Entry(name, BY_NAME["float32"], sizes, 0, num_bytes))
            files[rank].seek(ends[rank])
            files[rank].write(before)
            files[rank].seek(ends[rank] + len(before) + num_bytes)
            files[rank].write(behind)
            length = len(before) + num_bytes + len(behind)
            places[dcp.MetadataIndex(name, offsets, rank)] = _StorageInfo(f"__{rank}_0.distcp", ends[rank], length)
            ends[rank] += length
            chunks.append(dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        properties = dcp.TensorProperties(dtype=torch.float32)
        entries[name] = dcp.TensorStorageMetadata(properties, torch.Size(shape), chunks)
    for file in files:
        file.close()
    table = dcp.Metadata(entries, {name: (name,) for name in entries}, places)
    (folder / ".metadata").write_bytes(pickle.dumps(table))


# The kernel's own count for a process that ended takes what its parent had for its own.
MEASURED = """
import atexit, re, sys
from pathlib import Path
from ckpt_ema.cli import main
status = Path("/proc/self/status")
atexit.register(lambda: print(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1], file=sys.stderr))
main()
"""


def timed(words: Sequence[str]) -> tuple[float, float]:
    """(seconds, peak memory in MiB) of `ckpt-ema WORDS` as a whole process."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURED, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"failed: ckpt-ema {' '.join(words)}\n{done.stderr}")
    return time.perf_counter() - started, int(done.stderr.split()[-1]) / 1024


def bench_sharded(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Print how long a checkpoint of 216 GB takes to plan, and what memory a part of it takes to fold."""
    shapes = large_model()
    print("\ncheckpoints of 216 GB in float32, torch.distributed.checkpoint (files with holes)\n")
    print("| ranks that saved it | pieces | plan of one | one layer (2.7 GB) of two, `--memory 64MiB` | peak memory |")
    print("|---|---|---|---|---|")
    for num_ranks in (8, 64):
        run = arguments.inputs / f"sparse-{num_ranks}"
        for step in (1, 2):
            if not (run / f"step-{step}" / ".metadata").exists():
                write_sparse_checkpoint(run / f"step-{step}", shapes, num_ranks)
        part = arguments.outputs / "part.safetensors"
        words = ["fold", str(run), "--prefix", "layers.7.", "--memory", "64MiB", "-o", str(part), "--overwrite", "-q"]
        plans = [timed(["plan", str(run / "step-1")])[0] for _ in range(arguments.rounds)]
        folds = [timed(words) for _ in range(arguments.rounds)]
        part.unlink()
        seconds, memory = statistics.median(s for s, _ in folds), max(m for _, m in folds)
        pieces = sum(min(num_ranks, shape[0]) for shape in shapes.values())
        print(f"| {num_ranks} | {pieces} | {statistics.median(plans):.2f} s | {seconds:.1f} s | {memory:.0f} MiB |")
        yield str(num_ranks), {"plan": plans, "fold": folds, "pieces": pieces}


def rank_processes(run: Path, output: Path, count: int, port: int) -> Iterator[subprocess.Popen[str]]:
    """`count` ranks of one fold, each on a core of its own as far as there are."""
    cores = sorted(os.sched_getaffinity(0))
    for number in range(count):
        environment = {
            "RANK": str(number),
            "WORLD_SIZE": str(count),
            "LOCAL_RANK": str(number),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        pinned = ["taskset", "-c", str(cores[number % len(cores)])]
        words = ["--momentum", "0.3", "-o", str(output), "--overwrite", "--json", "-q"]
        yield subprocess.Popen(
            [*pinned, sys.executable, "-m", "ckpt_ema", "fold", str(run), *words],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )


def bench_ranks(arguments: argparse.Namespace, run: Path) -> Iterator[tuple[str, Any]]:
    """Print what 1, 2 and 4 ranks take for one fold, each with one core, and what follows for 64 machines."""
    output = arguments.outputs / "ranks.safetensors"
    seconds: dict[int, list[float]] = {1: [], 2: [], 4: []}
    record: dict[str, Any] = {}
    for round_number in range(arguments.rounds):
        for count, found in seconds.items():
            processes = list(rank_processes(run, output, count, 29500 + 10 * round_number + count))
            outputs = [process.communicate()[0] for process in processes]
            if any(process.returncode for process in processes):
                raise SystemExit(f"a fold by {count} ranks failed")
            record = json.loads(outputs[0])
            found.append(record["seconds"])
    output.unlink()
    print(f"\none fold of {record['bytes_to_read'] / 1e9:.1f} GB by several ranks, a core each, warm\n")
    print("| ranks | seconds | times one rank |")
    print("|---|---|---|")
    single = statistics.median(seconds[1])
    for count, found in seconds.items():
        middle = statistics.median(found)
        print(f"| {count} | {middle:.2f} | {single / middle:.2f} |")
    rate = record["bytes_to_read"] / single / 1e9
    estimate(arguments.inputs / "sparse-64", rate)
    yield from ((str(count), found) for count, found in seconds.items())


def estimate(run: Path, rate: float) -> None:
    """What the plan says of 64 machines, with its arithmetic."""
    if not run.exists():
        return
    blocks = plan(run, "t.safetensors", momentum=0.3).blocks
    shares = [plan_of_rank(blocks, number, NUM_MACHINES).bytes_to_read for number in range(NUM_MACHINES)]
    checkpoints = 20
    largest = max(shares) / 2 * checkpoints  # the run has two
    written = blocks.data_bytes / NUM_MACHINES
    print(
        f"\n{checkpoints} checkpoints of {blocks.data_bytes / 1e9:.0f} GB on {NUM_MACHINES} machines: each reads"
        f" {largest / 1e9:.1f} GB and writes {written / 1e9:.1f} GB (shares differ by"
        f" {max(shares) / min(shares) - 1:.2%});"
        f" {largest / rate / 1e9:.0f} s at one core's {rate:.1f} GB/s, {largest / 1.25e9:.0f} s where the network gives"
        " 1.25 GB/s. Nothing is exchanged but the start and the end."
    )
