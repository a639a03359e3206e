"""Elements of two tensors in, how far they are apart out."""

from __future__ import annotations

import math

import torch

from ckpt_ema.dtypes import DType
from ckpt_ema.engine.arithmetic import comparable
from ckpt_ema.engine.buffers import torch_dtype

PLAIN_SQUARES = (1e-140, 1e140)
"""Lengths whose squares float64 holds with all their digits."""


class Distance:
    """How far two tensors are apart, summed up portion by portion; or all tensors."""

    def __init__(self) -> None:
        self.distance = self.norm = self.largest = 0.0
        """||a - b||; ||b|| without the infinities that a has in the same places; the largest |a - b|."""
        self.num_different = 0

    @property
    def relative(self) -> float:
        """||a - b|| / ||b||; see `TensorDifference`."""
        if not self.distance:
            return 0.0
        if math.isnan(self.distance) or math.isnan(self.norm):
            return math.nan
        if math.isinf(self.distance):
            return math.inf
        return self.distance / self.norm if self.norm else math.inf

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add a portion of both, shape [n] each."""
        wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
        if not (a.is_floating_point() or a.is_complex() or b.is_floating_point() or b.is_complex()):
            differs = a != b if a.dtype is b.dtype else _different_integers(a, b)
            a, b = a.to(wide), b.to(wide)
        else:
            a, b = comparable(a).to(wide), comparable(b).to(wide)
            differs = (a != b) & ~(a.isnan() & b.isnan())
        apart = torch.where(differs, a - b, 0).abs()
        largest = float(apart.max()) if len(apart) else 0.0
        self.num_different += int(differs.sum())
        self._add(_length(apart), _length(torch.where(~differs & b.isinf(), 0, b).abs()), largest)

    def add_all(self, other: Distance) -> None:
        """Add another tensor's."""
        self.num_different += other.num_different
        self._add(other.distance, other.norm, other.largest)

    def _add(self, distance: float, norm: float, largest: float) -> None:
        # hypot takes a NaN beside an infinity for infinite.
        self.distance = math.nan if math.isnan(distance + self.distance) else math.hypot(self.distance, distance)
        self.norm = math.nan if math.isnan(norm + self.norm) else math.hypot(self.norm, norm)
        if math.isnan(largest) or largest > self.largest:
            self.largest = largest


def _different_integers(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where integers of two dtypes differ; what uint64 holds above int64's largest is in no other dtype."""
    differs = a.long() != b.long()
    for each in (a, b):
        if each.dtype is torch.uint64:
            differs |= each.view(torch.int64) < 0
    return differs


def _length(sizes: torch.Tensor) -> float:
    length = float(torch.linalg.vector_norm(sizes))
    largest = float(sizes.max()) if len(sizes) else 0.0
    if PLAIN_SQUARES[0] < length < PLAIN_SQUARES[1] or not largest or not math.isfinite(largest):
        return length
    return largest * float(torch.linalg.vector_norm(sizes / largest))


def first_not_finite(elements: torch.Tensor, *, may_be_infinite: bool) -> tuple[int, float] | None:
    """(index, value) of the first NaN, or infinity where none may be; None where there is none."""
    values = comparable(elements)
    bad = values.isnan() if may_be_infinite else ~values.isfinite()
    if not bool(bad.any()):
        return None
    index = int(bad.to(torch.uint8).argmax())
    return index, float(values[index].real)


def distance_of(one: bytes, other: bytes, dtype: DType) -> Distance:
    """Of the elements of `dtype` in two runs of bytes of one length."""
    found = Distance()
    found.add(_elements(one, dtype), _elements(other, dtype))
    return found


def length_of(elements: torch.Tensor) -> float:
    """||a|| of shape [n], of any dtype."""
    wide = torch.complex128 if elements.is_complex() else torch.float64
    return _length(comparable(elements).to(wide).abs())


def last_place_of(dtype: DType) -> tuple[float, float]:
    """Of a floating-point dtype, the distance from 1 to the next number, and that from 0; 0 of others."""
    wide = torch_dtype(dtype)
    if not (wide.is_floating_point or wide.is_complex):
        return 0.0, 0.0
    limits = torch.finfo(wide)
    return limits.eps, limits.smallest_normal * limits.eps


def shown_element(content: bytes, dtype: DType) -> str:
    """The value of one element's bytes, for people."""
    return str(comparable(_elements(content, dtype)).tolist()[0])


def _elements(content: bytes, dtype: DType) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch_dtype(dtype))
