"""Where a tensor's bytes lie: the one thing every on-disk format is reduced to."""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ckpt_ema.dtypes import DType
from ckpt_ema.errors import CkptEmaError, UnreadableCheckpointError


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One input file as it was when its table of tensors was read."""

    path: Path
    size: int
    mtime_ns: int
    device: int
    inode: int

    @classmethod
    def from_descriptor(cls, path: Path, descriptor: int) -> SourceFile:
        """The identity of the file that `descriptor` has open."""
        status = os.fstat(descriptor)
        return cls(path, status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)

    def check_unchanged(self, descriptor: int) -> None:
        """Raise CkptEmaError when `descriptor` no longer shows the file whose table was read."""
        now = SourceFile.from_descriptor(self.path, descriptor)
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
    """Offset behind the last byte that belongs to the tensor; `[begin, end)` is the span that strides reach."""


def open_input(path: Path) -> int:
    """A descriptor to read `path` with; raises UnreadableCheckpointError for what is no regular file."""
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer that never comes.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UnreadableCheckpointError(f"cannot open `{path}`: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableCheckpointError(f"`{path}` is not a regular file")
    return descriptor


def read_exactly(descriptor: int, size: int, offset: int, path: Path) -> bytes:
    """`size` bytes at `offset`; raises UnreadableCheckpointError where the file ends before."""
    parts = []
    while size:
        try:
            part = os.pread(descriptor, min(size, 1 << 30), offset)
        except OSError as error:
            raise UnreadableCheckpointError(f"cannot read `{path}` at byte {offset}: {error.strerror}") from error
        if not part:
            raise UnreadableCheckpointError(f"`{path}` is truncated: it ends before byte {offset + size}")
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


def count_elements(shape: tuple[int, ...]) -> int:
    """Number of elements of a tensor; 1 for a 0-dim one."""
    return math.prod(shape)


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
    """Elements from the first to behind the last one that a tensor with these strides touches."""
    if strides is None:
        return count_elements(shape)
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
