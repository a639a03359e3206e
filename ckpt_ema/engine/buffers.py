"""Memory of our own that preadv fills and torch computes on."""

from __future__ import annotations

import ctypes

import torch

from ckpt_ema.blocks import ELEMENT_MULTIPLE
from ckpt_ema.dtypes import DType
from ckpt_ema.errors import CkptEmaError

MAX_VIEWS = 16

# At the first slice of all, older releases of torch (2.3 is one) look for numpy behind a lock that is waited for with
# the interpreter's own held: two threads that come there at once wait for each other for ever. So one goes first.
torch.empty(1, device="cpu")[:1]


class Buffer:
    """A run of bytes, allocated once, seen as bytes and as a tensor of any dtype."""

    def __init__(self, num_bytes: int, *, pinned: bool = False) -> None:
        size = max(num_bytes, 16 * ELEMENT_MULTIPLE)
        if pinned:  # page-locked, so that a GPU copies from it while the processor does something else
            self.tensor = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
            array = (ctypes.c_char * size).from_address(self.tensor.data_ptr())
            # Whoever holds a part of it holds the memory.
            array.tensor = self.tensor  # type: ignore[attr-defined]
            self.bytes = memoryview(array).cast("B")
        else:
            memory = bytearray(size)
            self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
            self.bytes = memoryview(memory)
        self._views: dict[tuple[DType, int], torch.Tensor] = {}

    def split(self) -> list[Buffer]:
        """Its two halves, in the same memory."""
        size = len(self.bytes) // 2
        return [self._part(0, size), self._part(size, 2 * size)]

    def _part(self, begin: int, end: int) -> Buffer:
        part = Buffer.__new__(Buffer)
        part.tensor, part.bytes, part._views = self.tensor[begin:end], self.bytes[begin:end], {}
        return part

    @property
    def address(self) -> int:
        """Of the first byte."""
        return self.tensor.data_ptr()

    def elements(self, dtype: DType, count: int) -> torch.Tensor:
        """The first `count` elements of `dtype`, shape [count]."""
        # Kept, since nearly all blocks ask for the same, and a thread that makes views holds the others up.
        view = self._views.get((dtype, count))
        if view is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            view = self._views[dtype, count] = self.tensor[: count * dtype.itemsize].view(torch_dtype(dtype))
        return view


def torch_dtype(dtype: DType) -> torch.dtype:
    """torch's object for a dtype; raises CkptEmaError on a torch too old to know it."""
    found = getattr(torch, dtype.name, None)
    if not isinstance(found, torch.dtype):
        raise CkptEmaError(f"torch {torch.__version__} does not know {dtype}", hint="install a newer torch")
    return found
