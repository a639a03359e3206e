"""The bytes of one lane in one checkpoint: elements asked for in, a buffer filled by preadv out."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
from collections.abc import Sequence
from types import TracebackType

from ckpt_ema.blocks import Block
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


def read_block(files: InputFiles, layout: Layout, block: Block, buffer: memoryview, trash: memoryview) -> None:
    """Fill `buffer` with the block's elements as `layout`'s checkpoint stores them, packed in the lane's order.

    `buffer` has the block's size in the stored dtype; `trash` at least MAX_GAP_BYTES, for what lies between two
    tensors in a file. The lane's tensors are contiguous.
    """
    itemsize = stored_dtype(layout, block).itemsize
    file_indices, begins = layout.file_indices, layout.begins
    buffers: list[memoryview] = []
    read_file, read_begin, file_end = -1, 0, 0
    filled = piece_begin = 0
    for index, first, count in block.lane.tensors_between(block.begin, block.end):
        begin = begins[index] + first * itemsize
        num_bytes = count * itemsize
        if file_indices[index] == read_file and begin == file_end:
            # The neighbour in the lane is the neighbour in the file: one longer piece.
            filled += num_bytes
            file_end += num_bytes
            continue
        if filled > piece_begin:
            buffers.append(buffer[piece_begin:filled])
        gap = begin - file_end
        if file_indices[index] == read_file and 0 < gap <= MAX_GAP_BYTES and len(buffers) < MAX_BUFFERS_PER_READ:
            buffers.append(trash[:gap])
        else:
            if buffers:
                _preadv_all(files, layout.files[read_file], buffers, read_begin)
            buffers = []
            read_file, read_begin = file_indices[index], begin
        piece_begin = filled
        filled += num_bytes
        file_end = begin + num_bytes
    buffers.append(buffer[piece_begin:filled])
    _preadv_all(files, layout.files[read_file], buffers, read_begin)


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
