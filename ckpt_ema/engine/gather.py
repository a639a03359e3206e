"""Scattered tensors: elements in row-major order out of files that store them in another order, or in pieces.

A block of such a tensor is a few boxes (ranges of indices), each of which meets some of the pieces that the tensor is
stored in. What a box and a piece share is read in storage order, as units that are consecutive in the file, into a span
buffer, and copied from there with the strides that the unit has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from ckpt_ema.assembly import Box, Runs
from ckpt_ema.blocks import Block
from ckpt_ema.byte_ranges import contiguous_strides
from ckpt_ema.dtypes import DType
from ckpt_ema.engine.buffers import Buffer
from ckpt_ema.engine.inputs import InputFiles, LaneExtents, read_span, stored_dtype
from ckpt_ema.layouts import Layout

Region = tuple[tuple[int, int], ...]
"""First index and number of indices per dimension."""


def gather_block(
    files: InputFiles, layout: Layout, block: Block, target: Buffer, span: Buffer, trash: memoryview
) -> None:
    """Fill `target` with the block's elements in row-major order, dtype as stored.

    The block's lane holds one tensor; `span` has room for as many bytes as the block has.
    """
    index = block.lane.tensors[0]
    dtype = stored_dtype(layout, block)
    geometry = layout.schema.geometries[index]
    if geometry is None or isinstance(geometry, Runs):
        num_bytes = (block.end - block.begin) * dtype.itemsize
        LaneExtents(files, layout, block.lane).read(block.begin, block.end, target.bytes[:num_bytes], trash, {})
        return
    elements = target.elements(dtype, block.end - block.begin)
    position = 0
    for region in _regions(layout.schema.shapes[index], block.begin, block.end):
        sizes = [size for _, size in region]
        count = math.prod(sizes)
        whole = elements[position : position + count].view(sizes)
        position += count
        for number, box in enumerate(geometry):
            shared = _shared(region, box)
            if shared is None:
                continue
            out = whole
            for d, ((first, size), (begin, _)) in enumerate(zip(shared, region, strict=True)):
                out = out.narrow(d, first - begin, size)
            strides = box.strides or contiguous_strides(box.sizes)
            base = sum(
                (first - begin) * stride for (first, _), begin, stride in zip(shared, box.offsets, strides, strict=True)
            )
            # Dimensions in storage order, widest stride first; repeated ones (stride 0) are stored once.
            order = sorted(range(len(strides)), key=lambda d: -strides[d])
            dimensions = [(shared[d][1], strides[d], d) for d in order if shared[d][1] > 1 and strides[d] > 0]
            _read_region(files, layout, layout.schema.firsts[index] + number, base, dimensions, dtype, out, span)


def _shared(region: Region, box: Box) -> Region | None:
    """The indices that are in both; None where there are none."""
    shared = []
    for (begin, size), offset, length in zip(region, box.offsets, box.sizes, strict=True):
        first, stop = max(begin, offset), min(begin + size, offset + length)
        if first >= stop:
            return None
        shared.append((first, stop - first))
    return tuple(shared)


def _read_region(
    files: InputFiles,
    layout: Layout,
    piece: int,
    base: int,
    dimensions: Sequence[tuple[int, int, int]],
    dtype: DType,
    out: torch.Tensor,
    span: Buffer,
) -> None:
    """Fill `out` with the elements of a piece from `base` on, whose (size, stride, dimension) are `dimensions`."""
    room = len(span.bytes) // dtype.itemsize
    inner = len(dimensions)
    # As many of the innermost dimensions as fit the span buffer are read at once, gaps and all.
    while inner > 0 and 1 + sum((size - 1) * stride for size, stride, _ in dimensions[inner - 1 :]) <= room:
        inner -= 1
    unit = 1 + sum((size - 1) * stride for size, stride, _ in dimensions[inner:])
    outer = dimensions[:inner]
    batched = outer[-1] if outer else (1, 0, -1)
    batch = max(1, min(batched[0], room // unit))
    for indices in itertools.product(*(range(size) for size, _, _ in outer[:-1])):
        start = base + sum(i * stride for i, (_, stride, _) in zip(indices, outer[:-1], strict=True))
        for first in range(0, batched[0], batch):
            count = min(batch, batched[0] - first)
            for slot in range(count):
                offset = (start + (first + slot) * batched[1]) * dtype.itemsize
                begin = slot * unit * dtype.itemsize
                read_span(files, layout, piece, offset, span.bytes[begin : begin + unit * dtype.itemsize])
            part = out
            stored_strides = [0] * out.dim()
            for i, (_, _, d) in zip(indices, outer[:-1], strict=True):
                part = part.narrow(d, i, 1)
            if outer:
                part = part.narrow(batched[2], first, count)
                stored_strides[batched[2]] = unit
            for _, stride, d in dimensions[inner:]:
                stored_strides[d] = stride
            part.copy_(span.elements(dtype, count * unit).as_strided(part.shape, stored_strides))


def _regions(shape: Sequence[int], begin: int, end: int) -> Iterator[Region]:
    """Cut the row-major element range `[begin, end)` into regions that are consecutive in it."""
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, offset = divmod(begin, row)
    if offset or end - begin < row:
        stop = min(end, (first + 1) * row)
        for rest in _regions(shape[1:], offset, offset + stop - begin):
            yield ((first, 1), *rest)
        begin = stop
        first += 1
    if begin >= end:
        return
    rows = (end - begin) // row
    if rows:
        yield ((first, rows), *((0, size) for size in shape[1:]))
        begin += rows * row
    if begin < end:
        for rest in _regions(shape[1:], 0, end - begin):
            yield ((first + rows, 1), *rest)
