"""Bytes between the host and a GPU: blocks go through two small page-locked buffers of a thread, a portion at a time.

While one buffer is filled, the other is copied. They are small so that they stay in the processor's cache: what preadv
writes there and the device fetches does not go through memory, where readers and the device would be in each other's
way. Threads filled buffers of 16 MiB at 31 GB/s, and of 4 MiB at 49.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from ckpt_ema.engine.buffers import Buffer
from ckpt_ema.errors import CkptEmaError, first_line


class StagingPair:
    """Two page-locked buffers that one thread at a time uses in turn."""

    def __init__(self, num_bytes: int, device: torch.device, stream: torch.cuda.Stream) -> None:
        """Of `num_bytes` each; copies are queued on `stream`, which is one of `device`'s."""
        self._num_bytes, self._device, self._stream = num_bytes, device, stream
        self._slots = [_Slot(num_bytes), _Slot(num_bytes)]
        self.waiting_seconds = 0.0
        """How long copies were waited for."""

    def upload(self, target: torch.Tensor, fill: Callable[[memoryview, int], None]) -> None:
        """Fill `target`, bytes on the device of shape [n]: `fill(buffer, position)` is called for each portion of it.

        The last portions may still be on their way when it returns: what is queued behind them on the stream comes
        after them.
        """
        with queueing(self._device, self._stream):
            for begin in range(0, len(target), self._num_bytes):
                part = target[begin : begin + self._num_bytes]
                slot = self._next()
                fill(slot.buffer.bytes[: len(part)], begin)
                self._copy(part, slot.buffer.tensor[: len(part)], slot)

    def download(self, source: torch.Tensor, put: Callable[[memoryview, int], None]) -> None:
        """Pass `source`, bytes on the device of shape [n], on to `put(content, position)`, each portion of it."""
        ahead: tuple[_Slot, int] | None = None
        with queueing(self._device, self._stream):
            for begin in range(0, len(source), self._num_bytes):
                part = source[begin : begin + self._num_bytes]
                slot = self._next()
                self._copy(slot.buffer.tensor[: len(part)], part, slot)
                if ahead is not None:
                    self._wait_for(ahead[0])
                    put(ahead[0].buffer.bytes[: self._num_bytes], ahead[1])
                ahead = slot, begin
            if ahead is not None:
                self._wait_for(ahead[0])
                put(ahead[0].buffer.bytes[: len(source) - ahead[1]], ahead[1])

    def close(self) -> None:
        """Give the memory back, whoever holds this, but for what a call that failed was at."""
        for slot in self._slots:
            vars(slot).pop("buffer", None)

    def _next(self) -> _Slot:
        """The buffer whose turn it is, with nothing on its way into it or out of it."""
        slot, _ = self._slots
        self._slots.reverse()
        slot.pin()
        # Mostly long done; waiting would give the interpreter's lock away, for which all the others wait.
        if not slot.copied.query():
            self._wait_for(slot)
        return slot

    def _copy(self, into: torch.Tensor, out_of: torch.Tensor, slot: _Slot) -> None:
        into.copy_(out_of, non_blocking=True)
        slot.copied.record(self._stream)

    def _wait_for(self, slot: _Slot) -> None:
        started = time.perf_counter()
        slot.copied.synchronize()
        self.waiting_seconds += time.perf_counter() - started


@contextlib.contextmanager
def queueing(device: torch.device, stream: torch.cuda.Stream) -> Iterator[None]:
    """What is called inside is queued on `stream`, one of `device`'s."""
    # The device by itself as well: a thread begins with the first one, and to leave a stream is to go back there, which
    # takes memory of it.
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield


class _Slot:
    """A page-locked buffer, and when what was queued for it last is done."""

    buffer: Buffer

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        # Whoever waits for it sleeps: readers and writers need the cores.
        self.copied = torch.cuda.Event(blocking=True)

    def pin(self) -> None:
        """Get the memory, where there is none yet: that takes as long as reading does, and small folds need little."""
        if hasattr(self, "buffer"):
            return
        try:
            self.buffer = Buffer(self._num_bytes, pinned=True)
        except RuntimeError as error:
            if not is_lack_of_memory(error):
                raise
            raise CkptEmaError(
                f"there is no room for a page-locked buffer of {self._num_bytes >> 10} KiB: {first_line(error)}",
                hint="pass a smaller `--memory`, or `--device cpu`",
            ) from error


def is_lack_of_memory(error: RuntimeError) -> bool:
    """Whether the device, or the host where memory is page-locked, had no room."""
    # Where there is no room for anything at all, nor for page-locked memory, it is no OutOfMemoryError.
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error)
