"""The safetensors format: a file in, tensor names with their byte ranges out."""

from __future__ import annotations

import functools
import itertools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ckpt_ema.byte_ranges import SourceFile, TensorRange, count_elements, open_input, read_exactly
from ckpt_ema.dtypes import BY_CODE, DType
from ckpt_ema.errors import UnreadableCheckpointError
from ckpt_ema.formats.json_tables import parse_json

# The format's own limit; a larger length is a lie or a different format.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """The header of one safetensors file."""

    tensors: dict[str, TensorRange]
    metadata: dict[str, str]
    """The free-text part, `__metadata__`."""

    source: SourceFile


def looks_like_safetensors(head: bytes, file_size: int) -> bool:
    """Whether a file that starts with `head` (16 bytes will do) may be safetensors."""
    if len(head) < 9:
        return False
    (header_size,) = struct.unpack("<Q", head[:8])
    return head[8:9] == b"{" and 2 <= header_size <= MAX_HEADER_BYTES and file_size >= 8


def read_safetensors(path: Path) -> SafetensorsFile:
    """Read the header of `path`, and no tensor.

    Raises UnreadableCheckpointError for a truncated file, a duplicate name, an unknown dtype, or ranges that do
    not tile the data section exactly.
    """
    opened = open_input(path)
    try:
        source = opened.source()
        if source.size < 8:
            raise UnreadableCheckpointError(f"`{path}` is truncated: {source.size} bytes are no safetensors file")
        (header_size,) = struct.unpack("<Q", read_exactly(opened, 8, 0))
        if header_size > MAX_HEADER_BYTES:
            raise UnreadableCheckpointError(
                f"`{path}` is no safetensors file: a header of {header_size} bytes is above the format's limit"
                f" of {MAX_HEADER_BYTES}"
            )
        if 8 + header_size > source.size:
            raise UnreadableCheckpointError(
                f"`{path}` is truncated: its header ends at byte {8 + header_size}, the file at {source.size}"
            )
        header = _read_header(read_exactly(opened, header_size, 8), path)
    finally:
        opened.close()
    data_begin = 8 + header_size
    data_bytes = source.size - data_begin
    if header.data_bytes > data_bytes:
        raise UnreadableCheckpointError(
            f"`{path}` is truncated: its tensors end at byte {data_begin + header.data_bytes},"
            f" the file at {source.size}"
        )
    if header.data_bytes < data_bytes:
        raise UnreadableCheckpointError(
            f"`{path}`: {data_bytes - header.data_bytes} bytes after the last tensor belong to none"
        )
    names, dtypes, shapes, begins, ends = zip(*header.tensors, strict=True) if header.tensors else ((),) * 5
    columns = zip(
        dtypes,
        shapes,
        itertools.repeat(None),
        itertools.repeat(source),
        map(data_begin.__add__, begins),
        map(data_begin.__add__, ends),
        strict=False,
    )
    # Without a call into Python per tensor: a run has a million of them, and most of a plan's time went here.
    ranges = map(functools.partial(tuple.__new__, TensorRange), columns)
    return SafetensorsFile(dict(zip(names, ranges, strict=True)), dict(header.metadata), source)


@dataclass(frozen=True, slots=True)
class _Header:
    """A checked header; ranges are relative to the data section."""

    tensors: tuple[tuple[str, DType, tuple[int, ...], int, int], ...]
    metadata: dict[str, str]
    data_bytes: int


# The checkpoints of a run have the same header byte for byte: what was parsed and checked last is kept.
_last_header: tuple[bytes, _Header] | None = None


def forget_last_header() -> None:
    """Free the header kept for the next checkpoint; it may be 100 MB."""
    global _last_header  # noqa: PLW0603
    _last_header = None


def _read_header(text: bytes, path: Path) -> _Header:
    global _last_header  # noqa: PLW0603
    last = _last_header
    if last is not None and last[0] == text:
        return last[1]
    header = _check_header(_parse_header(text, path), path)
    _last_header = (text, header)
    return header


def _check_header(table: dict[str, Any], path: Path) -> _Header:
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UnreadableCheckpointError(f"`{path}`: `__metadata__` is not a table of texts")
    tensors = tuple(_check_entry(name, entry, path) for name, entry in table.items())
    position = 0
    for name, _, _, begin, end in sorted(tensors, key=lambda tensor: tensor[3:]):
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise UnreadableCheckpointError(f"`{path}`: tensor `{name}` {what}")
        position = end
    return _Header(tensors, metadata, position)


def _parse_header(text: bytes, path: Path) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            seen: set[str] = set()
            name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise UnreadableCheckpointError(f"`{path}`: the header names `{name}` twice")
        return table

    try:
        header = parse_json(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise UnreadableCheckpointError(f"`{path}`: the safetensors header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise UnreadableCheckpointError(f"`{path}`: the safetensors header is not a table")
    return header


def _check_entry(name: str, entry: Any, path: Path) -> tuple[str, DType, tuple[int, ...], int, int]:
    def refuse(what: str) -> UnreadableCheckpointError:
        return UnreadableCheckpointError(f"`{path}`: tensor `{name}` {what}")

    if not isinstance(entry, dict):
        raise refuse("is not described by a table")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    dtype = BY_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise refuse(f"has the unknown dtype {str(code)[:40]}")
    if not _is_list_of_sizes(shape):
        raise refuse(f"has no valid shape: {str(shape)[:80]}")
    if not _is_list_of_sizes(offsets) or len(offsets) != 2:
        raise refuse(f"has no valid byte range: {str(offsets)[:80]}")
    begin, end = offsets
    num_bytes = count_elements(tuple(shape)) * dtype.itemsize
    if end - begin != num_bytes:
        raise refuse(f"of shape {shape} and dtype {dtype} takes {num_bytes} bytes, its range [{begin}, {end}) does not")
    return name, dtype, tuple(shape), begin, end


def _is_list_of_sizes(value: Any) -> TypeGuard[list[int]]:
    # More than 64 dimensions is more than torch has; without the bound a product of a million sizes takes minutes.
    if not isinstance(value, list) or len(value) > 64:
        return False
    for size in value:  # noqa: SIM110  (a generator takes three times as long)
        if type(size) is not int or not 0 <= size < 1 << 63:
            return False
    return True
