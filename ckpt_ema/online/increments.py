"""How far the student moves at a step: its tensors in, squared distances on a sample of steps and elements out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ckpt_ema.engine.arithmetic import comparable

MAX_ELEMENTS = 65536
"""Of the student that are looked at, about: of every tensor a share that its size is worth, at least one run."""

RUN_ELEMENTS = 16
"""Elements that are taken together: a cache line costs as much as one number of it."""

DENSE_STEPS = 16
"""Up to here every step is measured: the first steps move most."""

RATIO = 1.05
"""From there on at least one step in each such factor."""

MIN_SPACING = 8
"""Of the evenly spaced ones: measured at every step, a large student's would cost several per cent of its updates."""

MAX_SAMPLES = 2048
"""Measurements that are kept; where they are more, the even spacing doubles."""


class Increments:
    """|student(t) - student(t - 1)|^2 at some steps t, estimated from some of the elements.

    Exact for students of up to MAX_ELEMENTS. Results stay where the student is until they are asked for, so that no
    step waits for a GPU. Which steps and which elements depends on nothing but their numbers.
    """

    def __init__(self, students: Sequence[torch.Tensor], every: int) -> None:
        """Of tensors like these; files are written `every` so many steps.

        Beside the dense steps and these each `every // 16`-th is measured, or each MIN_SPACING-th.
        """
        self._num_runs = _num_runs([_real(tensor).numel() for tensor in students])
        self._scales = torch.cat(_scales(students, self._num_runs))
        self._every = every
        self._spacing = max(MIN_SPACING, every // 16)
        # Of the steps that files are written after, each so-many-th is measured.
        self._thinning = 1
        self._measured: list[tuple[int, float]] = []
        self._pending: list[tuple[int, torch.Tensor]] = []
        self._squared_norm: float | torch.Tensor | None = None
        self._sample = torch.zeros_like(self._scales)
        self._sampled_at = -1

    def is_due(self, step: int) -> bool:
        """Whether the student's movement at `step`, a whole number from 1, is to be measured."""
        # The steps that files are written after are the ends of averages, where all depends on the last movements.
        if step <= DENSE_STEPS or step % self._spacing == 0 or step % (self._every * self._thinning) == 0:
            return True
        return int(math.log(step) / math.log(RATIO)) != int(math.log(step - 1) / math.log(RATIO))

    def observe(self, step: int, students: Sequence[torch.Tensor]) -> None:
        """Look at the student after `step`; a step is measured only if the one before was looked at as well."""
        # The first step's movement would need the student before it, which may have been loaded since.
        is_measured = self.is_due(step) and self._sampled_at == step - 1
        if not is_measured and not self.is_due(step + 1):
            return
        sample = self._take(students)
        if is_measured:
            scales = self._scales = self._scales.to(sample.device)
            moved = sample - self._sample.to(sample.device)
            self._pending.append((step, torch.dot(moved * scales, moved)))
            self._squared_norm = torch.dot(sample * scales, sample)
            self._thin()
        self._sample, self._sampled_at = sample, step

    def read(self) -> tuple[list[list[float]], float | None]:
        """[[step, squared distance], ...] and the newest |student|^2; waits for a GPU."""
        if self._pending:
            device = self._pending[-1][1].device
            values = torch.stack([value.to(device) for _, value in self._pending]).tolist()
            self._measured += [
                (step, value) for (step, _), value in zip(self._pending, values, strict=True) if math.isfinite(value)
            ]
            self._pending = []
        if isinstance(self._squared_norm, torch.Tensor):
            norm = self._squared_norm.item()
            self._squared_norm = norm if math.isfinite(norm) else None
        return [[step, value] for step, value in self._measured], self._squared_norm

    def state_dict(self) -> dict[str, Any]:
        """Under the same keys at any time, `sample` the one tensor; waits for a GPU."""
        measured, squared_norm = self.read()
        return {
            "spacing": self._spacing,
            "thinning": self._thinning,
            "measured": measured,
            "squared_norm": squared_norm,
            "sampled_at": self._sampled_at,
            "sample": self._sample,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; a sample of another size than the student's here is not compared with.

        Raises KeyError, TypeError, ValueError or AttributeError, nothing changed, for anything else.
        """
        spacing, thinning = int(state["spacing"]), int(state.get("thinning", 1))
        measured = [(int(step), float(value)) for step, value in state["measured"]]
        squared_norm, sampled_at = state["squared_norm"], int(state["sampled_at"])
        sample = state["sample"].to(self._scales.dtype, copy=True)
        self._spacing, self._thinning, self._squared_norm = spacing, thinning, squared_norm
        self._measured, self._pending = measured, []
        fits = sample.shape == self._scales.shape
        self._sampled_at = sampled_at if fits else -1
        if fits:
            self._sample = sample

    def _take(self, students: Sequence[torch.Tensor]) -> torch.Tensor:
        """The looked-at elements in one dimension: whole tensors first, so that few calls do for all."""
        whole: list[torch.Tensor] = []
        runs: list[torch.Tensor] = []
        device = students[0].device
        # Few calls for each tensor: there may be hundreds, and on a GPU their number is what an update costs the host.
        for tensor, num_runs in zip(students, self._num_runs, strict=True):
            flat = tensor if tensor.is_contiguous() and not tensor.is_complex() else _in_memory_order(_real(tensor))
            if num_runs is None:
                part = flat.reshape(-1)
            else:
                part = flat.as_strided((num_runs, RUN_ELEMENTS), (flat.numel() // num_runs, 1))
            part = comparable(part) if part.device == device else comparable(part).to(device)
            (whole if num_runs is None else runs).append(part)
        joined = [torch.cat(parts).view(-1) for parts in (whole, runs) if parts]
        return (joined[0] if len(joined) == 1 else torch.cat(joined)).to(self._scales.dtype)

    def _thin(self) -> None:
        while len(self._measured) + len(self._pending) > MAX_SAMPLES:
            self._spacing *= 2
            self._thinning *= 1 if self._spacing <= self._every * self._thinning else 2
            self._measured = [item for item in self._measured if self.is_due(item[0])]
            self._pending = [item for item in self._pending if self.is_due(item[0])]


def _num_runs(sizes: Sequence[int]) -> list[int | None]:
    """How many runs of RUN_ELEMENTS are taken of each tensor; None for all of it."""
    total = sum(sizes)
    if total <= MAX_ELEMENTS:
        return [None] * len(sizes)
    return [
        None if size < 2 * RUN_ELEMENTS else max(1, size * MAX_ELEMENTS // (total * RUN_ELEMENTS)) for size in sizes
    ]


def _scales(students: Sequence[torch.Tensor], num_runs: Sequence[int | None]) -> list[torch.Tensor]:
    """For each looked-at element how many of its tensor it stands for, in the order of `Increments._take`."""
    wide = any(_real(tensor).dtype is torch.float64 for tensor in students)
    dtype = torch.float64 if wide else torch.float32
    # There from the start: a copy to a GPU would make the host wait.
    device = students[0].device
    sizes = [_real(tensor).numel() for tensor in students]
    counted = list(zip(sizes, num_runs, strict=True))
    whole = [torch.ones(size, dtype=dtype, device=device) for size, runs in counted if runs is None]
    return whole + [
        torch.full((runs * RUN_ELEMENTS,), size / (runs * RUN_ELEMENTS), dtype=dtype, device=device)
        for size, runs in counted
        if runs is not None
    ]


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()


def _in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """All elements in one dimension; a transposed or channels-last tensor needs no copy for that."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dimension: -strides[dimension])
    return tensor.permute(order).reshape(-1)
