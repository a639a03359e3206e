"""Tensors that are stored in pieces: boxes or runs with their byte ranges in, one tensor out, or why they make none.

Sharded checkpoints cut a tensor into boxes of indices (torch.distributed.checkpoint), or its row-major elements into
runs (DeepSpeed's partitions). Boxes of whole rows are runs as well, and are read as fast as a tensor in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ckpt_ema.byte_ranges import TensorRange, contiguous_strides, count_elements
from ckpt_ema.dtypes import DType

# A grid of 100 times 100; more is no sharding, and finding overlaps among them would take for ever.
MAX_BOXES = 10_000
MAX_COMPARISONS = 1_000_000


class AssemblyError(Exception):
    """The pieces of a tensor overlap, leave a hole or do not fit it."""


class Box(NamedTuple):
    """A piece of a tensor: a range of indices per dimension, and how its elements lie in the file."""

    offsets: tuple[int, ...]
    """First index per dimension."""

    sizes: tuple[int, ...]
    """Number of indices per dimension."""

    strides: tuple[int, ...] | None
    """Elements between neighbours per dimension; None when the piece is contiguous."""


class Runs(NamedTuple):
    """A tensor's row-major elements, cut into runs that lie in different places."""

    starts: tuple[int, ...]
    """First element of each run, and the number of elements of all."""


Geometry = Runs | tuple[Box, ...]
"""How a tensor that is not one contiguous range is made of its pieces."""


class AssembledTensor(NamedTuple):
    """A tensor that is stored in several pieces."""

    dtype: DType
    shape: tuple[int, ...]
    geometry: Geometry
    parts: tuple[TensorRange, ...]
    """The bytes of each piece, in the order of `geometry`."""


StoredTensor = TensorRange | AssembledTensor


def assemble_boxes(
    dtype: DType, shape: tuple[int, ...], pieces: Sequence[tuple[tuple[int, ...], TensorRange]]
) -> StoredTensor:
    """One tensor of `shape` from (first index per dimension, stored piece) pairs.

    Raises AssemblyError unless the pieces have the tensor's dtype and cover each of its elements once.
    """
    for offsets, part in pieces:
        if part.dtype is not dtype:
            raise AssemblyError(f"is {dtype}, and a piece of it {part.dtype}")
        if len(offsets) != len(shape) or len(part.shape) != len(shape):
            raise AssemblyError(f"has {len(shape)} dimensions, and a piece of it {len(part.shape)}")
        if any(first + size > whole for first, size, whole in zip(offsets, part.shape, shape, strict=True)):
            raise AssemblyError(f"of shape {list(shape)} has a piece that reaches beyond it")
    if not pieces:
        raise AssemblyError("is stored nowhere")
    filled = [(offsets, part) for offsets, part in pieces if 0 not in part.shape] or list(pieces[:1])
    stored = sum(count_elements(part.shape) for _, part in filled)
    if stored != count_elements(shape):
        raise AssemblyError(f"has {count_elements(shape)} elements, and its pieces hold {stored}")
    if len(filled) == 1:
        return filled[0][1]._replace(shape=shape)
    if len(filled) > MAX_BOXES:
        raise AssemblyError(f"is stored in {len(filled)} pieces, above the limit of {MAX_BOXES}")
    steps = contiguous_strides(shape)
    firsts = [sum(map(int.__mul__, offsets, steps)) for offsets, _ in filled]
    order = sorted(range(len(filled)), key=firsts.__getitem__)
    filled = [filled[i] for i in order]
    parts = tuple(part for _, part in filled)
    if all(part.strides is None and _is_run(part.shape, shape) for part in parts):
        return assemble_runs(dtype, shape, parts, [firsts[i] for i in order])
    boxes = tuple(Box(offsets, part.shape, part.strides) for offsets, part in filled)
    _check_disjoint(boxes, shape)
    return AssembledTensor(dtype, shape, boxes, parts)


def assemble_runs(
    dtype: DType, shape: tuple[int, ...], parts: Sequence[TensorRange], firsts: Sequence[int] | None = None
) -> StoredTensor:
    """One tensor of `shape` whose row-major elements are those of `parts`, one after another.

    `firsts` says where each begins, where that is known; raises AssemblyError unless they follow each other.
    """
    starts = [0]
    for number, part in enumerate(parts):
        if part.dtype is not dtype:
            raise AssemblyError(f"is {dtype}, and a piece of it {part.dtype}")
        if firsts is not None and firsts[number] != starts[-1]:
            what = "overlap" if firsts[number] < starts[-1] else "leave a hole"
            raise AssemblyError(f"of shape {list(shape)} has pieces that {what}")
        starts.append(starts[-1] + count_elements(part.shape))
    if starts[-1] != count_elements(shape):
        raise AssemblyError(f"has {count_elements(shape)} elements, and its pieces hold {starts[-1]}")
    if len(parts) == 1:
        return parts[0]._replace(shape=shape)
    return AssembledTensor(dtype, shape, Runs(tuple(starts)), tuple(parts))


def _is_run(sizes: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a box of `sizes` is consecutive in row-major order: single indices first, whole dimensions last."""
    cut = next((d for d, size in enumerate(sizes) if size != 1), len(sizes))
    return tuple(sizes[cut + 1 :]) == tuple(shape[cut + 1 :])


def _check_disjoint(boxes: Sequence[Box], shape: Sequence[int]) -> None:
    """Raise AssemblyError where two boxes overlap, or where there are too many side by side to tell."""
    # Along the dimension with the most cuts, few boxes lie side by side.
    d = max(range(len(shape)), key=lambda d: len({box.offsets[d] for box in boxes}))
    active: list[Box] = []
    compared = 0
    for box in sorted(boxes, key=lambda box: box.offsets[d]):
        # Those that end before this one begins can meet none that follows.
        active = [other for other in active if other.offsets[d] + other.sizes[d] > box.offsets[d]]
        compared += len(active)
        if compared > MAX_COMPARISONS:
            raise AssemblyError(f"is stored in {len(boxes)} pieces, too many of them side by side")
        for other in active:
            if all(
                a < b + size_b and b < a + size_a
                for a, size_a, b, size_b in zip(box.offsets, box.sizes, other.offsets, other.sizes, strict=True)
            ):
                raise AssemblyError(f"of shape {list(shape)} has pieces that overlap")
        active.append(box)
