"""Whole tensors a portion at a time: layouts of one set of tensors in, their elements side by side out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType

import torch

from ckpt_ema.blocks import ELEMENT_MULTIPLE, Block, Lane
from ckpt_ema.byte_ranges import count_elements
from ckpt_ema.engine.buffers import Buffer
from ckpt_ema.engine.gather import gather_block
from ckpt_ema.engine.inputs import InputFiles
from ckpt_ema.engine.workers import TORCH_THREADS
from ckpt_ema.errors import MisuseError
from ckpt_ema.layouts import Layout

# Results in between stay in the cache: portions of 4 MiB took two to five times as long.
MAX_PORTION_BYTES = 1 << 20
WIDEST = 16
"""Bytes of a complex128 element."""


class Streams:
    """The same tensors in one or several files, read in row-major order within a budget, however they are stored."""

    def __init__(self, layouts: Sequence[Layout], memory_budget_bytes: int) -> None:
        """`layouts` have the same names and shapes; dtypes may differ."""
        self._layouts = layouts
        # What is computed on a portion takes some four times as much again.
        if memory_budget_bytes < 1:
            raise MisuseError(f"`memory_budget_bytes` is {memory_budget_bytes}, and must be 1 or more")
        portion = min(MAX_PORTION_BYTES, memory_budget_bytes // (6 * (len(layouts) + 1)))
        self._count = max(ELEMENT_MULTIPLE, portion // WIDEST // ELEMENT_MULTIPLE * ELEMENT_MULTIPLE)
        self._files = InputFiles(layouts, self._count * WIDEST)
        self._buffers = [Buffer(self._count * WIDEST) for _ in layouts]
        self._span = Buffer(self._count * WIDEST)
        self._threads = contextlib.ExitStack()

    def __enter__(self) -> Streams:
        self._files.__enter__()
        self._trash = self._files.new_trash(self._count * WIDEST)
        self._threads.enter_context(TORCH_THREADS.given_back())
        # Torch's own threads wait for each other after every portion: ten times as long where the cores are busy.
        torch.set_num_threads(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._threads.close()
        try:
            if kind is None:
                self._files.check_unchanged()
        finally:
            self._files.__exit__(kind, error, traceback)

    def portions(self, index: int) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """(first element, the elements from there in each layout, shape [n]) of tensor `index`, one by one."""
        shape = self._layouts[0].schema.shapes[index]
        size = count_elements(shape)
        for begin in range(0, size, self._count):
            end = min(begin + self._count, size)
            read = []
            for layout, buffer in zip(self._layouts, self._buffers, strict=True):
                dtype = layout.schema.dtypes[index]
                is_scattered = layout.schema.is_scattered(index)
                lane = Lane(
                    action="copy",
                    student_dtype=dtype,
                    accumulate_dtype=dtype,
                    dtype=dtype,
                    input_dtypes=(dtype,),
                    begin=0,
                    tensors=(index,),
                    starts=(0, size),
                    span=(0, size),
                    is_scattered=is_scattered,
                )
                gather_block(self._files, layout, Block(lane, begin, end), buffer, self._span, self._trash)
                read.append(buffer.elements(dtype, end - begin))
            yield begin, read
