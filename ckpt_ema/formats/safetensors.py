"""The safetensors format: a file in, tensor names with their byte ranges out."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ckpt_ema.byte_ranges import SourceFile, TensorRange, count_elements, open_input, read_exactly
from ckpt_ema.dtypes import BY_CODE
from ckpt_ema.errors import UnreadableCheckpointError

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
    descriptor = open_input(path)
    try:
        source = SourceFile.from_descriptor(path, descriptor)
        if source.size < 8:
            raise UnreadableCheckpointError(f"`{path}` is truncated: {source.size} bytes are no safetensors file")
        (header_size,) = struct.unpack("<Q", read_exactly(descriptor, 8, 0, path))
        if header_size > MAX_HEADER_BYTES:
            raise UnreadableCheckpointError(
                f"`{path}` is no safetensors file: a header of {header_size} bytes is above the format's limit"
                f" of {MAX_HEADER_BYTES}"
            )
        if 8 + header_size > source.size:
            raise UnreadableCheckpointError(
                f"`{path}` is truncated: its header ends at byte {8 + header_size}, the file at {source.size}"
            )
        header = _parse_header(read_exactly(descriptor, header_size, 8, path), path)
    finally:
        os.close(descriptor)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UnreadableCheckpointError(f"`{path}`: `__metadata__` is not a table of texts")
    data_begin = 8 + header_size
    tensors = {name: _tensor_range(name, entry, source, data_begin) for name, entry in header.items()}
    _check_tiling(tensors, source, data_begin)
    return SafetensorsFile(tensors, metadata, source)


def _parse_header(text: bytes, path: Path) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            seen: set[str] = set()
            name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise UnreadableCheckpointError(f"`{path}`: the header names `{name}` twice")
        return table

    try:
        header = json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise UnreadableCheckpointError(f"`{path}`: the safetensors header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise UnreadableCheckpointError(f"`{path}`: the safetensors header is not a table")
    return header


def _tensor_range(name: str, entry: Any, source: SourceFile, data_begin: int) -> TensorRange:
    def refuse(what: str) -> UnreadableCheckpointError:
        return UnreadableCheckpointError(f"`{source.path}`: tensor `{name}` {what}")

    if not isinstance(entry, dict):
        raise refuse("is not described by a table")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    dtype = BY_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise refuse(f"has the unknown dtype {code!r}")
    if not _is_list_of_sizes(shape):
        raise refuse(f"has no valid shape: {str(shape)[:100]}")
    if not _is_list_of_sizes(offsets) or len(offsets) != 2:
        raise refuse(f"has no valid byte range: {str(offsets)[:100]}")
    begin, end = offsets
    num_bytes = count_elements(tuple(shape)) * dtype.itemsize
    if end - begin != num_bytes:
        raise refuse(f"of shape {shape} and dtype {dtype} takes {num_bytes} bytes, its range [{begin}, {end}) does not")
    return TensorRange(dtype, tuple(shape), None, source, data_begin + begin, data_begin + end)


def _is_list_of_sizes(value: Any) -> TypeGuard[list[int]]:
    # More than 64 dimensions is more than torch has; without the bound a product of a million sizes takes minutes.
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(size) is int and 0 <= size < 1 << 63 for size in value)
    )


def _check_tiling(tensors: dict[str, TensorRange], source: SourceFile, data_begin: int) -> None:
    position = data_begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            what = "overlaps the tensor before it" if tensor.begin < position else "leaves a hole before it"
            raise UnreadableCheckpointError(f"`{source.path}`: tensor `{name}` {what}")
        position = tensor.end
    if position > source.size:
        raise UnreadableCheckpointError(
            f"`{source.path}` is truncated: its tensors end at byte {position}, the file at {source.size}"
        )
    if position < source.size:
        raise UnreadableCheckpointError(
            f"`{source.path}`: {source.size - position} bytes behind the last tensor belong to none"
        )
