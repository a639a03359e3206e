"""Where a tensor's bytes lie: the one thing every on-disk format is reduced to."""

from __future__ import annotations

import errno
import functools
import math
import os
import stat
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from ckpt_ema.dtypes import DType
from ckpt_ema.errors import CkptEmaError, UnreadableCheckpointError, hint_of_permission
from ckpt_ema.locations import RemotePath
from ckpt_ema.remote_store import MAX_REQUEST_BYTES, PAGE_BYTES, find_entry, prefetch, read_kept, read_range


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One input file as it was when its table of tensors was read."""

    path: Path
    size: int
    version: int | str
    """Another one after each write: its time in nanoseconds, or what a store calls the content."""

    identity: Hashable
    """Equal for two names of one file; see `locations.identity_of`."""

    def check_unchanged(self, file: InputFile) -> None:
        """Raise CkptEmaError when `file` no longer shows the file whose table was read."""
        now = file.source()
        if now != self:
            raise CkptEmaError(
                f"`{self.path}` changed while it was being folded",
                details=[f"size {self.size} became {now.size}"] if now.size != self.size else ["it was written again"],
                hint="wait until the trainer has finished the checkpoint, then run the same command again",
            )


class TensorRange(NamedTuple):
    """One stored tensor: what it is, and the bytes that hold it.

    A NamedTuple rather than a dataclass: a run has a million of them, and these are made four times as fast.
    """

    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    """Elements between neighbours per dimension; None when the tensor is contiguous."""

    file: SourceFile
    begin: int
    """Absolute offset of the first element's first byte."""

    end: int
    """Offset after the last byte that belongs to the tensor; `[begin, end)` is the span that strides reach."""


class InputFile(Protocol):
    """An input that is open for reading, here or behind a URL."""

    max_gap_bytes: int
    """Bytes between two wanted ranges up to which reading them along is cheaper than another read."""

    is_remote: bool
    """Whether every read is a request, whose time hardly depends on its size."""

    @property
    def path(self) -> Path:
        """What it is called."""

    @property
    def pread(self) -> Callable[[int, int], bytes]:
        """(size, offset) -> bytes, fewer at the file's end; raises OSError or CkptEmaError."""

    @property
    def preadv(self) -> Callable[[Sequence[memoryview], int], int]:
        """(buffers, offset) -> how many bytes were filled, none at the file's end; raises OSError or CkptEmaError."""

    def source(self) -> SourceFile:
        """The file as it is now."""

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Told that these byte ranges are about to be read with `pread`, one by one."""

    def close(self) -> None:
        """Let go of it."""


class LocalFile:
    """An InputFile on this machine; its reads are the system's own calls, without any Python around them."""

    # Between the records of a torch.save zip lie some 100 bytes.
    max_gap_bytes = 4096
    is_remote = False

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self.pread = functools.partial(os.pread, descriptor)
        self.preadv = functools.partial(os.preadv, descriptor)

    def source(self) -> SourceFile:
        """See InputFile."""
        status = os.fstat(self._descriptor)
        return SourceFile(self.path, status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino))

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Nothing to do: the kernel reads ahead."""

    def close(self) -> None:
        """See InputFile."""
        os.close(self._descriptor)


class RemoteFile:
    """An InputFile behind a URL; threads may read it at once."""

    # What a request takes before its first byte, a connection carries some megabytes in.
    max_gap_bytes = 1 << 20
    is_remote = True

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        self._url = str(path)
        self._size = self.source().size

    def source(self) -> SourceFile:
        """See InputFile; as the folder's listing at hand shows it."""
        entry = find_entry(self._url)
        if entry is None:
            raise UnreadableCheckpointError(f"cannot open `{self.path}`: {os.strerror(errno.ENOENT)}")
        if entry.is_folder:
            raise UnreadableCheckpointError(f"`{self.path}` is not a regular file")
        return SourceFile(self.path, entry.size, entry.version, self._url)

    def pread(self, size: int, offset: int) -> bytes:
        """See InputFile; for tables, of which neighbouring parts are read next."""
        return read_kept(self._url, offset, max(offset, min(offset + size, self._size)), self._size)

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """See InputFile; for tensors, in requests of up to MAX_REQUEST_BYTES."""
        end = offset + sum(map(len, buffers))
        content = read_range(self._url, offset, min(end, offset + MAX_REQUEST_BYTES))
        begin = 0
        for buffer in buffers:
            part = content[begin : begin + len(buffer)]
            buffer[: len(part)] = part
            begin += len(part)
        return begin

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """See InputFile; they are fetched at once."""
        prefetch((self._url, begin, min(end, self._size)) for begin, end in ranges if begin < self._size)

    def close(self) -> None:
        """Nothing is held."""


def open_input(path: Path) -> InputFile:
    """Open `path` for reading; raises UnreadableCheckpointError for what is no regular file."""
    if isinstance(path, RemotePath):
        return RemoteFile(path)
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer that never comes.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UnreadableCheckpointError(
            f"cannot open `{path}`: {error.strerror or error}", hint=hint_of_permission(error, path)
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableCheckpointError(f"`{path}` is not a regular file")
    return LocalFile(path, descriptor)


def expect_tables(paths: Iterable[Path]) -> None:
    """Told that the tables of these files are about to be read: those behind URLs are fetched at once."""
    ranges = []
    for path in paths:
        entry = find_entry(str(path)) if isinstance(path, RemotePath) else None
        if entry is not None and not entry.is_folder:
            url, size = str(path), entry.size
            ranges.append((url, 0, min(PAGE_BYTES, size)))
            if path.suffix != ".safetensors":  # whose table is at its beginning
                ranges.append((url, max(0, size - PAGE_BYTES), size))
    prefetch(ranges)


def read_exactly(file: InputFile, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`; raises UnreadableCheckpointError where the file ends before."""
    parts = []
    while size:
        try:
            part = file.pread(min(size, 1 << 30), offset)
        except OSError as error:
            raise UnreadableCheckpointError(
                f"cannot read `{file.path}` at byte {offset}: {error.strerror or error}"
            ) from error
        if not part:
            raise UnreadableCheckpointError(f"`{file.path}` is truncated: it ends before byte {offset + size}")
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


def count_elements(shape: tuple[int, ...]) -> int:
    """Number of elements of a tensor; 1 for a 0-dim one."""
    return math.prod(shape)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements between neighbours per dimension, in row-major order without gaps."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements lie in row-major order without gaps; strides of dimensions of size 1 do not matter."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 0:
            return True
        if size != 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True


def span_elements(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> int:
    """How many elements lie from the first to the last one, both counted, that a tensor with these strides touches."""
    if strides is None:
        return count_elements(shape)
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
