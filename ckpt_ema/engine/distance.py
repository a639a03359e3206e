"""Elements of two tensors in, how far they are apart out."""

from __future__ import annotations

import math

import torch

from ckpt_ema.dtypes import DType
from ckpt_ema.engine.arithmetic import comparable
from ckpt_ema.engine.buffers import torch_dtype


class Distance:
    """How far two tensors are apart, summed up portion by portion; or all tensors."""

    def __init__(self) -> None:
        self.distance = self.norm = self.largest_squared = 0.0
        """||a - b||^2, ||b||^2, and the largest |a - b|^2."""
        self.num_different = 0

    @property
    def relative(self) -> float:
        """||a - b|| / ||b||; see `TensorDifference`."""
        if not self.num_different:
            return 0.0
        if math.isnan(self.distance) or math.isnan(self.norm):
            return math.nan
        if math.isinf(self.distance):
            return math.inf
        return math.sqrt(self.distance / self.norm) if self.norm else math.inf

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add a portion of both, shape [n] each."""
        wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
        if not (a.is_floating_point() or a.is_complex() or b.is_floating_point() or b.is_complex()):
            differs = a != b if a.dtype is b.dtype else a.long() != b.long()
            a, b = a.to(wide), b.to(wide)
        else:
            a, b = comparable(a).to(wide), comparable(b).to(wide)
            differs = (a != b) & ~(a.isnan() & b.isnan())
        squared = torch.where(differs, a - b, 0).abs().square_()
        norm = float(b.abs().square_().sum())
        self.norm += norm
        self.num_different += int(differs.sum())
        self.distance += float(squared.sum())
        if squared.numel():
            largest = float(squared.max())
            if math.isnan(largest) or largest > self.largest_squared:
                self.largest_squared = largest


def first_not_finite(elements: torch.Tensor, *, may_be_infinite: bool) -> tuple[int, float] | None:
    """(index, value) of the first NaN, or infinity where none may be; None where there is none."""
    values = comparable(elements)
    bad = values.isnan() if may_be_infinite else ~values.isfinite()
    if not bool(bad.any()):
        return None
    index = int(bad.to(torch.uint8).argmax())
    return index, float(values[index].real)


def shown_element(content: bytes, dtype: DType) -> str:
    """The value of one element's bytes, for people."""
    return str(comparable(torch.frombuffer(bytearray(content), dtype=torch_dtype(dtype))).tolist()[0])
