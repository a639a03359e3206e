"""The bytes of one lane in one checkpoint: elements asked for in, a buffer filled by preadv out."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import resource
from array import array
from collections.abc import Sequence
from types import TracebackType

from ckpt_ema.blocks import Block, Lane
from ckpt_ema.byte_ranges import SourceFile, open_input
from ckpt_ema.dtypes import DType
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.layouts import Layout

# Between the records of a torch.save zip lie some 100 bytes; reading them along is cheaper than another call.
MAX_GAP_BYTES = 4096
MAX_BUFFERS_PER_READ = 512


class InputFiles:
    """Every input file, opened once and checked against what its table was read from."""

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self._files = list(dict.fromkeys(file for layout in layouts for file in layout.files))
        self._descriptors: dict[SourceFile, int] = {}

    def __enter__(self) -> InputFiles:
        _allow_open_files(len(self._files))
        try:
            for file in self._files:
                descriptor = open_input(file.path)
                self._descriptors[file] = descriptor
                file.check_unchanged(descriptor)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def check_unchanged(self) -> None:
        """Raise CkptEmaError when one of them was written to since its table was read."""
        for file, descriptor in self._descriptors.items():
            file.check_unchanged(descriptor)

    def descriptor(self, file: SourceFile) -> int:
        """The open descriptor of `file`."""
        return self._descriptors[file]

    def _close(self) -> None:
        for descriptor in self._descriptors.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._descriptors.clear()


def _allow_open_files(count: int) -> None:
    """50 checkpoints of 30 shards are more files than a shell allows by default; raise our own soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 64
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise CkptEmaError(
            f"{count} input files are more than this process may open ({hard})",
            hint="fold fewer checkpoints at once (`--last`), or ask for a higher limit: `ulimit -Hn`",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class LaneExtents:
    """Where a lane's elements lie in one checkpoint: runs of bytes that are consecutive in a file.

    Tensors that are neighbours in the lane and in the file are one extent, so that a block of a hundred small tensors
    is one read. 18 bytes each, since a torch.save file has one per tensor.
    """

    def __init__(self, layout: Layout, lane: Lane) -> None:
        self._layout = layout
        self._itemsize = itemsize = layout.schema.dtypes[lane.tensors[0]].itemsize
        self._starts = array("q")  # first element within the lane
        self._begins = array("q")  # first byte in the file
        self._file_indices = array("H")
        file_index, file_end = -1, 0
        for index, start, stop in zip(lane.tensors, lane.starts, lane.starts[1:], strict=False):
            begin = layout.begins[index]
            if begin != file_end or layout.file_indices[index] != file_index:
                file_index = layout.file_indices[index]
                self._starts.append(start)
                self._begins.append(begin)
                self._file_indices.append(file_index)
            file_end = begin + (stop - start) * itemsize
        self._starts.append(lane.num_elements)

    def read(self, files: InputFiles, first: int, stop: int, buffer: memoryview, trash: memoryview) -> None:
        """Fill `buffer` with the lane's elements `[first, stop)` as they are stored, packed.

        `trash` takes what lies between two extents of a file and has at least MAX_GAP_BYTES.
        """
        itemsize = self._itemsize
        buffers: list[memoryview] = []
        read_file, read_begin, file_end, filled = -1, 0, 0, 0
        extent = bisect.bisect_right(self._starts, first) - 1
        while first < stop:
            end = min(self._starts[extent + 1], stop)
            file_index = self._file_indices[extent]
            begin = self._begins[extent] + (first - self._starts[extent]) * itemsize
            num_bytes = (end - first) * itemsize
            gap = begin - file_end
            if file_index == read_file and 0 <= gap <= MAX_GAP_BYTES and len(buffers) < MAX_BUFFERS_PER_READ:
                buffers.append(trash[:gap])
            else:
                if buffers:
                    _preadv_all(files, self._layout.files[read_file], buffers, read_begin)
                buffers = []
                read_file, read_begin = file_index, begin
            buffers.append(buffer[filled : filled + num_bytes])
            filled += num_bytes
            file_end = begin + num_bytes
            first = end
            extent += 1
        _preadv_all(files, self._layout.files[read_file], buffers, read_begin)


def read_span(files: InputFiles, layout: Layout, index: int, first_byte: int, buffer: memoryview) -> None:
    """Fill `buffer` with what a checkpoint stores from `first_byte` of tensor `index` on, gaps included."""
    file = layout.files[layout.file_indices[index]]
    _preadv_all(files, file, [buffer], layout.begins[index] + first_byte)


def stored_dtype(layout: Layout, block: Block) -> DType:
    """The dtype that a checkpoint stores the tensors of a block's lane in."""
    return layout.schema.dtypes[block.lane.tensors[0]]


def _preadv_all(files: InputFiles, file: SourceFile, buffers: list[memoryview], offset: int) -> None:
    descriptor = files.descriptor(file)
    wanted = sum(map(len, buffers))
    try:
        got = os.preadv(descriptor, buffers, offset)
        while got < wanted:
            # A signal or a network file system may cut a read short; only no byte at all is the file's end.
            offset += got
            wanted -= got
            buffers = _skip(buffers, got)
            got = os.preadv(descriptor, buffers, offset)
            if got == 0:
                raise CkptEmaError(
                    f"`{file.path}` became shorter while it was being folded: it ends before byte {offset + wanted}",
                    hint="wait until the trainer has finished the checkpoint, then run the same command again",
                )
    except OSError as error:
        raise CkptEmaError(f"cannot read `{file.path}` at byte {offset}: {error.strerror}") from error


def _skip(buffers: list[memoryview], num_bytes: int) -> list[memoryview]:
    ends = list(itertools.accumulate(map(len, buffers)))
    keep = next(i for i, end in enumerate(ends) if end > num_bytes)
    return [buffers[keep][len(buffers[keep]) - (ends[keep] - num_bytes) :], *buffers[keep + 1 :]]
