"""Bytes between the host and a GPU: blocks go through page-locked buffers that threads take in turn, by portions.

The buffers are few and small, so that the processor's cache can hold them: what preadv writes there and the device
fetches does not go through memory, where readers and the device would be in each other's way. Twelve threads filled
buffers of 16 MiB at 31 GB/s, and of 4 MiB at 49. They are not smaller, since each portion takes the interpreter's lock
several times.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch

from ckpt_ema.engine.buffers import Buffer
from ckpt_ema.errors import CkptEmaError, first_line


class StagingBuffers:
    """Page-locked buffers; at most as many threads use them at once as there are buffers."""

    def __init__(self, count: int, num_bytes: int, device: torch.device, stream: torch.cuda.Stream) -> None:
        """`count` of `num_bytes` each; copies are queued on `stream`, which is one of `device`'s."""
        self._num_bytes, self._device, self._stream = num_bytes, device, stream
        self._slots = [_Slot(num_bytes) for _ in range(count)]
        # The one whose copy was queued first comes first; a deque needs no lock.
        self._free = deque(self._slots)

    @property
    def waiting_seconds(self) -> float:
        """How long all threads together waited for copies."""
        return sum(slot.waiting_seconds for slot in self._slots)

    def upload(self, target: torch.Tensor, fill: Callable[[memoryview, int], None]) -> None:
        """Fill `target`, bytes on the device of shape [n]: `fill(buffer, position)` is called for each portion of it.

        Its portions may still be on their way when it returns: what is queued on the stream from then on waits for
        them.
        """
        size = len(target)
        with queueing(self._device, self._stream):
            for begin in range(0, size, self._num_bytes):
                count = min(self._num_bytes, size - begin)
                with self._one() as slot:
                    # Mostly long done; waiting would give the interpreter's lock away, for which all the others wait.
                    if not slot.copied.query():
                        slot.wait()
                    fill(slot.buffer.bytes[:count], begin)
                    self._copy(target[begin : begin + count], slot.buffer.tensor[:count], slot)

    def download(self, source: torch.Tensor, put: Callable[[memoryview, int], None]) -> None:
        """Pass `source`, bytes on the device of shape [n], on to `put(content, position)`, each portion of it."""
        size = len(source)
        # One buffer, emptied before it is filled again: copying takes a twentieth of the time that writing takes.
        with queueing(self._device, self._stream), self._one() as slot:
            for begin in range(0, size, self._num_bytes):
                count = min(self._num_bytes, size - begin)
                self._copy(slot.buffer.tensor[:count], source[begin : begin + count], slot)
                slot.wait()
                put(slot.buffer.bytes[:count], begin)

    def close(self) -> None:
        """Give the memory back, whoever holds this, but for what a call that failed was at."""
        for slot in self._slots:
            vars(slot).pop("buffer", None)

    def _copy(self, into: torch.Tensor, out_of: torch.Tensor, slot: _Slot) -> None:
        into.copy_(out_of, non_blocking=True)
        slot.copied.record(self._stream)

    @contextlib.contextmanager
    def _one(self) -> Iterator[_Slot]:
        slot = self._free.popleft()
        try:
            slot.pin()
            yield slot
        finally:
            self._free.append(slot)


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
        self.waiting_seconds = 0.0

    def wait(self) -> None:
        """Until what was queued for it last is done."""
        started = time.perf_counter()
        self.copied.synchronize()
        self.waiting_seconds += time.perf_counter() - started

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
