"""The bytes of one lane in one checkpoint: elements asked for in, a buffer filled by preadv out."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import operator
import resource
import threading
from array import array
from collections.abc import Iterator, Sequence
from types import TracebackType

from ckpt_ema.assembly import Runs
from ckpt_ema.blocks import Block, Lane
from ckpt_ema.byte_ranges import InputFile, LocalFile, SourceFile, open_input
from ckpt_ema.dtypes import DType
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.layouts import Layout
from ckpt_ema.remote_store import forget_listings

MAX_BUFFERS_PER_READ = 512


class InputFiles:
    """Every input file, opened once and checked against what its table was read from."""

    def __init__(self, layouts: Sequence[Layout], answer_bytes: int = 0) -> None:
        """`answer_bytes` may be the length of one request behind a URL, what is skipped on the way among it."""
        self.answer_bytes = answer_bytes
        self._files = list(dict.fromkeys(file for layout in layouts for file in layout.files))
        self._opened: dict[SourceFile, InputFile] = {}

    def __enter__(self) -> InputFiles:
        allow_open_files(len(self._files))
        # What was listed for the plan may be old.
        forget_listings()
        try:
            for file in self._files:
                self._opened[file] = opened = open_input(file.path)
                file.check_unchanged(opened)
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
        forget_listings()
        for file, opened in self._opened.items():
            file.check_unchanged(opened)

    def opened(self, file: SourceFile) -> InputFile:
        """`file`, open for reading."""
        return self._opened[file]

    def new_trash(self, buffer_bytes: int) -> memoryview:
        """A buffer for what lies between the ranges of one read; behind URLs no larger than what is read into."""
        sizes = (
            min(opened.max_gap_bytes, buffer_bytes) if opened.is_remote else opened.max_gap_bytes
            for opened in self._opened.values()
        )
        return memoryview(bytearray(max(sizes, default=0)))

    def _close(self) -> None:
        for opened in self._opened.values():
            with contextlib.suppress(OSError):
                opened.close()
        self._opened.clear()


SPARE_FILES = 64
"""That may be open beside the inputs."""

FEWEST_SPARE_FILES = 24
"""With which a fold still gets by: the streams, the journals, what is loaded meanwhile."""


def allow_open_files(count: int) -> None:
    """50 checkpoints of 30 shards are more files than a shell allows by default; raise our own soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_FILES
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        needed, room = count + FEWEST_SPARE_FILES, hard - FEWEST_SPARE_FILES
        if needed > hard:
            fewer = "fold fewer checkpoints at once (`--last N`), or " if room > 1 else ""
            raise CkptEmaError(
                f"{count} files and {FEWEST_SPARE_FILES} others are more than this process may open ({hard})",
                hint=f"{fewer}raise the limit to {needed} (`ulimit -Hn`, which takes an administrator)",
            )
        wanted = hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


Scatters = dict[tuple[int, tuple[int, ...], bytes], list[tuple[int, list[memoryview]]]]
"""How a block's extents go into one buffer, by their lengths and the gaps between them; see LaneExtents.read."""


class LaneExtents:
    """Where a lane's elements lie in one checkpoint: runs of bytes that are consecutive in a file.

    Tensors that are neighbours in the lane and in the file are one extent, so that a block of a hundred small tensors
    is one read. 14 to 22 bytes each, since a torch.save file has one per tensor, a sharded checkpoint one per piece.
    """

    def __init__(self, files: InputFiles, layout: Layout, lane: Lane) -> None:
        self._files = [files.opened(file) for file in layout.files]
        self._answer_bytes = files.answer_bytes
        self._itemsize = itemsize = layout.schema.dtypes[lane.tensors[0]].itemsize
        pieces, starts = _pieces_of(layout, lane)
        begins = [layout.begins[piece] for piece in pieces]
        indices = [layout.file_indices[piece] for piece in pieces]
        ends = [begin + size * itemsize for begin, size in zip(begins, _differences(starts), strict=True)]
        gaps = [-1] + [
            begin - end if index == index_before else -1
            for begin, end, index, index_before in zip(begins[1:], ends, indices[1:], indices, strict=False)
        ]
        heads = [i for i, gap in enumerate(gaps) if gap]
        # Where nothing is merged, as in torch.save files, all checkpoints share the lane's own starts.
        all_heads = len(heads) == len(gaps)
        self._starts = starts if all_heads else tuple(starts[i] for i in (*heads, -1))
        """First element within the lane, and the lane's number of elements."""
        self._begins = array("q", [begins[i] for i in heads])
        """First byte in the file."""
        self._file_indices = array("I", [indices[i] for i in heads])
        max_gap = LocalFile.max_gap_bytes
        self._gaps = array("h", [gaps[i] if 0 < gaps[i] <= max_gap else -1 for i in heads])
        """Bytes since the extent before; -1 where reading them along would not pay."""

    def read(self, first: int, stop: int, buffer: memoryview, trash: memoryview, scatters: Scatters) -> None:
        """Fill `buffer` with the lane's elements `[first, stop)` as they are stored, packed.

        `trash` takes what lies between two extents of a file; see InputFiles.new_trash. `scatters` keeps what
        was worked out for these elements, this buffer and this trash: the other checkpoints of a run mostly need
        the same, and a thread that works it out holds the others up.
        """
        itemsize = self._itemsize
        extent = bisect.bisect_right(self._starts, first) - 1
        begin = self._begins[extent] + (first - self._starts[extent]) * itemsize
        if stop <= self._starts[extent + 1]:
            _preadv_all(self._files[self._file_indices[extent]], [buffer], begin)
            return
        last = bisect.bisect_left(self._starts, stop)
        if self._files[0].is_remote:
            self._read_by_file(range(extent, last), first, stop, buffer, trash)
            return
        key = itemsize, self._starts[extent:last], self._gaps[extent + 1 : last].tobytes()
        scatter = scatters.get(key)
        if scatter is None:
            scatter = scatters[key] = self._scatter(range(extent, last), first, stop, buffer, trash)
        for offset, buffers in scatter:
            file = self._files[self._file_indices[extent + offset]]
            _preadv_all(file, buffers, self._begins[extent + offset] if offset else begin)

    def _read_by_file(self, extents: range, first: int, stop: int, buffer: memoryview, trash: memoryview) -> None:
        """The same in as few requests as can be: what lies near in a file is read together, however far in the lane.

        The ranks of a sharded checkpoint have a piece of every tensor each, in a file of their own.
        """
        parts: list[tuple[int, int, memoryview]] = []
        filled = 0
        for extent in extents:
            end = min(self._starts[extent + 1], stop)
            num_bytes = (end - first) * self._itemsize
            begin = self._begins[extent] + (first - self._starts[extent]) * self._itemsize
            parts.append((self._file_indices[extent], begin, buffer[filled : filled + num_bytes]))
            filled += num_bytes
            first = end
        parts.sort(key=operator.itemgetter(0, 1))
        reads: list[tuple[InputFile, int, list[memoryview]]] = []
        index_before, end_before = -1, 0
        for index, begin, part in parts:
            gap = begin - end_before
            if (
                index == index_before
                and 0 <= gap <= len(trash)
                and begin + len(part) - reads[-1][1] <= self._answer_bytes
            ):
                reads[-1][2].extend((trash[:gap], part))
            else:
                reads.append((self._files[index], begin, [part]))
            index_before, end_before = index, begin + len(part)
        for file, begin, buffers in reads:
            _preadv_all(file, buffers, begin)

    def _scatter(
        self, extents: range, first: int, stop: int, buffer: memoryview, trash: memoryview
    ) -> list[tuple[int, list[memoryview]]]:
        """The reads that fill `buffer`: at which extent each begins, counted from the first, and its buffers."""
        reads: list[tuple[int, list[memoryview]]] = []
        buffers: list[memoryview] = []
        filled = 0
        for extent in extents:
            end = min(self._starts[extent + 1], stop)
            num_bytes = (end - first) * self._itemsize
            gap = self._gaps[extent]
            if buffers and gap >= 0 and len(buffers) < MAX_BUFFERS_PER_READ:
                buffers.append(trash[:gap])
            else:
                buffers = []
                reads.append((extent - extents.start, buffers))
            buffers.append(buffer[filled : filled + num_bytes])
            filled += num_bytes
            first = end
        return reads


class ExtentTable:
    """The extents of every lane in every checkpoint, found on first use and shared by the threads."""

    def __init__(self, files: InputFiles) -> None:
        self._files = files
        self._table: dict[tuple[int, int], LaneExtents] = {}
        self._lock = threading.Lock()

    def of(self, layout: Layout, lane: Lane) -> LaneExtents:
        """Those of one lane in one checkpoint."""
        # Parts of a lane, as what is left of it or a sample, have its tensors in common, and its extents.
        key = (id(layout), id(lane.tensors))
        extents = self._table.get(key)
        if extents is None:
            with self._lock:
                extents = self._table.get(key) or LaneExtents(self._files, layout, lane)
                self._table[key] = extents
        return extents


def _pieces_of(layout: Layout, lane: Lane) -> tuple[Sequence[int], tuple[int, ...]]:
    """The pieces that a lane's tensors are stored in, in order, and the first element of each within the lane."""
    schema = layout.schema
    if len(layout.begins) == len(schema.names):
        return lane.tensors, lane.starts
    pieces: list[int] = []
    starts: list[int] = []
    for index, start in zip(lane.tensors, lane.starts, strict=False):
        geometry = schema.geometries[index]
        own = geometry.starts[:-1] if isinstance(geometry, Runs) else (0,)
        first = schema.firsts[index]
        pieces += range(first, first + len(own))
        starts += [start + run for run in own]
    return pieces, (*starts, lane.starts[-1])


def _differences(values: tuple[int, ...]) -> Iterator[int]:
    return map(operator.sub, values[1:], values)


def read_span(files: InputFiles, layout: Layout, piece: int, first_byte: int, buffer: memoryview) -> None:
    """Fill `buffer` with what a checkpoint stores from `first_byte` of a piece on, gaps included."""
    file = files.opened(layout.files[layout.file_indices[piece]])
    _preadv_all(file, [buffer], layout.begins[piece] + first_byte)


def stored_dtype(layout: Layout, block: Block) -> DType:
    """The dtype that a checkpoint stores the tensors of a block's lane in."""
    return layout.schema.dtypes[block.lane.tensors[0]]


def _preadv_all(file: InputFile, buffers: list[memoryview], offset: int) -> None:
    wanted = sum(map(len, buffers))
    try:
        got = file.preadv(buffers, offset)
        while got < wanted:
            # A signal or a network file system may cut a read short; only no byte at all is the file's end.
            offset += got
            wanted -= got
            buffers = _skip(buffers, got)
            got = file.preadv(buffers, offset)
            if got == 0:
                raise CkptEmaError(
                    f"`{file.path}` became shorter while it was being folded: it ends before byte {offset + wanted}",
                    hint="wait until the trainer has finished the checkpoint, then run the same command again",
                )
    except OSError as error:
        raise CkptEmaError(
            f"cannot read `{file.path}` at byte {offset}: {error.strerror or error}", may_pass=True
        ) from error


def _skip(buffers: list[memoryview], num_bytes: int) -> list[memoryview]:
    ends = list(itertools.accumulate(map(len, buffers)))
    keep = next(i for i, end in enumerate(ends) if end > num_bytes)
    return [buffers[keep][len(buffers[keep]) - (ends[keep] - num_bytes) :], *buffers[keep + 1 :]]
