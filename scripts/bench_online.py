"""The benchmark of the online teacher: one update against the memory traffic it cannot avoid, and against others.

All candidates of a table live in one process and take turns, so that a machine that gets slower slows all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

MODELS = {"124M": (768, 12), "355M": (1024, 24)}
MOMENTUM = 0.001


def bench_online(arguments: argparse.Namespace, device: str = "cpu") -> Iterator[tuple[str, Any]]:
    """Print one table per model and dtype."""
    for model in MODELS:
        for dtype in arguments.dtypes:
            yield f"{model} {dtype}", _compare(model, dtype, device, 8 * arguments.rounds)


def bench_online_cuda(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """The same on a GPU; nothing where there is none."""
    import torch

    if not torch.cuda.is_available():
        print("\nno GPU here: the online teacher on a GPU was not measured", flush=True)
        return
    yield "device", torch.cuda.get_device_name()
    yield from bench_online(arguments, "cuda")


def _compare(model: str, dtype: str, device: str, rounds: int) -> dict[str, list[float]]:
    import torch

    updates = _candidates(model, dtype, device)
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    # In training a GPU has work queued while the host prepares the next: several in a row, not one after the other.
    in_a_row = 10 if device == "cuda" else 1
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for round_number in range(rounds + 3):
        for name, update in updates.items():
            wait()
            started = time.perf_counter()
            for _ in range(in_a_row):
                update()
            wait()
            if round_number >= 3:
                seconds[name].append((time.perf_counter() - started) / in_a_row)
    where = f" on {torch.cuda.get_device_name()}" if device == "cuda" else ""
    print(f"\none update{where}, {model} parameters, {dtype} student, float32 teacher\n")
    print("| | ms | times the floor |")
    print("|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds["floor"], strict=True))
        print(f"| {name} | {1e3 * statistics.median(values):.2f} | {ratio:.2f} |", flush=True)
    return seconds


def _candidates(model: str, dtype: str, device: str) -> dict[str, Callable[[], object]]:
    import torch

    from ckpt_ema import MeanTeacher

    torch.manual_seed(0)
    student = _gpt2(*MODELS[model]).to(device, getattr(torch, dtype))
    parameters = [parameter.detach() for parameter in student.parameters()]
    count = sum(parameter.numel() for parameter in parameters)
    # As many bytes as an update must move: the student and the teacher read, the teacher written.
    moved = count * (parameters[0].itemsize + 4 + 4) // 12
    flat = [torch.rand(moved, device=device) for _ in range(2)]

    def floor() -> None:
        flat[0].lerp_(flat[1], MOMENTUM)

    teachers = [parameter.to(torch.float32, copy=True) for parameter in parameters]

    def literal() -> None:
        for teacher, parameter in zip(teachers, parameters, strict=True):
            teacher.mul_(1 - MOMENTUM).add_(parameter, alpha=MOMENTUM)

    updates: dict[str, Callable[[], object]] = {"floor": floor}
    for label, options in (
        ("ckpt-ema", {}),
        ('ckpt-ema, arithmetic="lerp"', {"arithmetic": "lerp"}),
        ('ckpt-ema, on_nonfinite="raise"', {"on_nonfinite": "raise"}),
    ):
        teacher = MeanTeacher(student, momentum=MOMENTUM, **options)
        updates[label] = teacher.update
    if device == "cuda":
        updates |= _more_on_a_gpu(student)
    elif dtype == "bfloat16":  # it has a part in 16-bit students' alone
        updates |= _without_llvmlite(student)
    updates["the hook's mul_/add_ loop"] = literal
    if dtype == "float32":  # the others keep their average in the student's dtype
        updates |= _peers(student, parameters, teachers)
    return updates


def _without_llvmlite(student: Any) -> dict[str, Callable[[], object]]:
    """As where llvmlite is not installed: torch's calls update the teacher."""
    from unittest import mock

    from ckpt_ema import MeanTeacher
    from ckpt_ema.online import rule

    def in_torchs_calls(update: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with mock.patch.object(rule, "update_all_", lambda pairs, keep, take, *, lerp: pairs):
                update()

        return run

    return {
        f"{label}, without llvmlite": in_torchs_calls(MeanTeacher(student, momentum=MOMENTUM, **options).update)
        for label, options in (("ckpt-ema", {}), ('ckpt-ema, arithmetic="lerp"', {"arithmetic": "lerp"}))
    }


def _more_on_a_gpu(student: Any) -> dict[str, Callable[[], object]]:
    """What the host's calls cost is in the other figures; in a captured update it is not."""
    import torch

    from ckpt_ema import MeanTeacher

    captured = MeanTeacher(student, momentum=MOMENTUM)
    for _ in range(3):
        captured.update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.update()
    in_host_memory = MeanTeacher(student, momentum=MOMENTUM, device="cpu")

    def replay() -> None:
        graph.replay()
        assert captured.num_updates  # the graph writes to its tensors, which have to live as long

    def to_the_end() -> None:
        in_host_memory.update()
        in_host_memory.wait()

    return {
        "ckpt-ema, in a CUDA graph": replay,
        'ckpt-ema, device="cpu", to its end': to_the_end,
    }


def _peers(student: Any, parameters: list[Any], teachers: list[Any]) -> dict[str, Callable[[], object]]:
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(1 - MOMENTUM))
    peers: dict[str, Callable[[], object]] = {
        "_foreach_mul_ and _foreach_add_": lambda: (
            torch._foreach_mul_(teachers, 1 - MOMENTUM),
            torch._foreach_add_(teachers, parameters, alpha=MOMENTUM),
        ),
        "torch's swa_utils": lambda: averaged.update_parameters(student),
        "timm's ModelEmaV3 rule": lambda: torch._foreach_lerp_(teachers, parameters, weight=MOMENTUM),
    }
    if importlib.util.find_spec("ema_pytorch"):
        from ema_pytorch import EMA

        ema = EMA(student, beta=1 - MOMENTUM, update_every=1, update_after_step=0)
        peers["ema-pytorch"] = ema.update
    else:
        print("ema-pytorch is not installed, and left out", file=sys.stderr)
    return peers


def _gpt2(width: int, depth: int) -> Any:
    """The parameters of GPT-2 by their shapes, the output tied to the embedding."""
    from torch import nn

    def block() -> nn.Module:
        sizes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
        return nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width), *(nn.Linear(a, b) for a, b in sizes)])

    return nn.ModuleList(
        [nn.Embedding(50257, width), nn.Embedding(1024, width), *(block() for _ in range(depth)), nn.LayerNorm(width)]
    )
