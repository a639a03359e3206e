"""torch.save files, zip and legacy: a file in, its tree of values with the byte ranges of its tensors out."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_ema.byte_ranges import (
    SourceFile,
    TensorRange,
    is_contiguous,
    open_input,
    read_exactly,
    span_elements,
)
from ckpt_ema.errors import UnreadableCheckpointError
from ckpt_ema.formats.pickle_scan import IncompletePickleError, MalformedPickleError, find_pickle_end
from ckpt_ema.formats.pickles import MetadataUnpickler, PickledStorage, PickledTensor

# Real ones take a few MB; the largest seen hold histories of metrics. What is larger is no table of tensors.
MAX_PICKLE_BYTES = 256 << 20
# Hashing nested tuples recurses in C. Any thread's stack holds this many; for more, a stack is made that does.
SHALLOW_TUPLES = 5000
STACK_BYTES_PER_TUPLE = 512

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True, slots=True)
class TorchSaveFile:
    """One file written by torch.save."""

    tree: Any
    """The object that was saved, with PickledTensor leaves."""

    storages: dict[str, tuple[int, int]]
    """Byte range of each storage by its key."""

    source: SourceFile

    def locate(self, name: str, tensor: PickledTensor) -> TensorRange:
        """The byte range of `tensor`, checked against its storage; `name` is for the error."""
        where = f"`{self.source.path}`: tensor `{name}`"
        record = self.storages.get(tensor.storage.key)
        if record is None:
            raise UnreadableCheckpointError(f"{where} lies in storage {tensor.storage.key}, which is missing")
        storage_begin, storage_end = record
        if 0 in tensor.shape:
            return TensorRange(tensor.dtype, tensor.shape, None, self.source, storage_begin, storage_begin)
        begin = storage_begin + tensor.offset * tensor.dtype.itemsize
        strides = None if is_contiguous(tensor.shape, tensor.strides) else tensor.strides
        end = begin + span_elements(tensor.shape, strides) * tensor.dtype.itemsize
        if end > storage_end:
            raise UnreadableCheckpointError(
                f"{where} of shape {list(tensor.shape)} reaches {end - storage_end} bytes beyond its storage"
                f" of {storage_end - storage_begin}"
            )
        return TensorRange(tensor.dtype, tensor.shape, strides, self.source, begin, end)


def read_torch_zip(path: Path) -> TorchSaveFile:
    """Read the directory and the pickle of a zip that torch.save wrote (torch 1.6 or later)."""
    descriptor = open_input(path)
    try:
        source = SourceFile.from_descriptor(path, descriptor)
        archive = _ZipArchive(descriptor, source)
        root = archive.find_root()
        byteorder = archive.read_small(f"{root}byteorder") if f"{root}byteorder" in archive.records else b"little"
        if byteorder.strip() != b"little":
            raise UnreadableCheckpointError(
                f"`{path}` was written on a big-endian machine",
                hint="load and save it again on this machine with torch",
            )
        content = archive.read_small(f"{root}data.pkl")
        found = _find_end(content, 0, path)
        if found is None:
            raise UnreadableCheckpointError(f"`{path}`: its pickle does not end")
        tree = _unpickle(content, found[1], path)
        prefix = f"{root}data/"
        storages = {
            name.removeprefix(prefix): archive.locate(name) for name in archive.records if name.startswith(prefix)
        }
    finally:
        os.close(descriptor)
    return TorchSaveFile(tree, storages, source)


def read_torch_legacy(path: Path) -> TorchSaveFile:
    """Read the five pickles of a file from before torch 1.6 (or `_use_new_zipfile_serialization=False`)."""
    descriptor = open_input(path)
    try:
        source = SourceFile.from_descriptor(path, descriptor)
        pickles = _LegacyPickles(descriptor, source)
        if pickles.load_next() != LEGACY_MAGIC_NUMBER:
            raise UnreadableCheckpointError(
                f"`{path}` is a pickle, but not one written by torch.save",
                hint="load it with what wrote it and save its state dict with torch.save or safetensors",
            )
        pickles.load_next()  # protocol version
        system = pickles.load_next()
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise UnreadableCheckpointError(f"`{path}` was written on a big-endian machine")
        used: dict[str, PickledStorage] = {}
        tree = pickles.load_next(used)
        keys = pickles.load_next()
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise UnreadableCheckpointError(f"`{path}`: the list of storages is missing")
        storages = _locate_legacy_storages(keys, used, pickles.position, descriptor, source)
    finally:
        os.close(descriptor)
    return TorchSaveFile(tree, storages, source)


class _LegacyPickles:
    """The pickles at the start of a legacy file; no more of it is read than they take."""

    def __init__(self, descriptor: int, source: SourceFile) -> None:
        self._descriptor = descriptor
        self._source = source
        self._content = b""
        self.position = 0
        """Where the next pickle begins, and behind the last one the storages."""

    def load_next(self, storages: dict[str, PickledStorage] | None = None) -> Any:
        """The next root; storages that its pickle refers to are put into `storages`."""
        path = self._source.path
        limit = min(self._source.size, MAX_PICKLE_BYTES)
        while (found := _find_end(self._content, self.position, path)) is None:
            if len(self._content) == limit:
                raise UnreadableCheckpointError(f"`{path}` is truncated inside a pickle")
            size = min(max(1 << 20, 4 * len(self._content)), limit)
            self._content = read_exactly(self._descriptor, size, 0, path)
        end, num_tuples = found
        tree = _unpickle(self._content[self.position : end], num_tuples, path, storages)
        self.position = end
        return tree


def _find_end(content: bytes, begin: int, path: Path) -> tuple[int, int] | None:
    try:
        return find_pickle_end(content, begin)
    except IncompletePickleError:
        return None
    except MalformedPickleError as error:
        raise UnreadableCheckpointError(f"`{path}` cannot be unpickled: {error}") from error


def _unpickle(content: bytes, num_tuples: int, path: Path, storages: dict[str, PickledStorage] | None = None) -> Any:
    """The root of one scanned pickle; storages it refers to are put into `storages`."""
    try:
        load = _StorageCollector(content, storages).load
        return load() if num_tuples < SHALLOW_TUPLES else _with_deep_stack(load, num_tuples * STACK_BYTES_PER_TUPLE)
    except MalformedPickleError as error:
        raise UnreadableCheckpointError(f"`{path}` cannot be unpickled: {error}") from error


def _with_deep_stack(load: Callable[[], Any], stack_bytes: int) -> Any:
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(load())
        except BaseException as error:
            outcome.append(error)

    before = threading.stack_size((4 << 20) + stack_bytes // 4096 * 4096)
    thread = threading.Thread(target=work, name="unpickle", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # a limit on address space
        raise MalformedPickleError(f"a stack of {stack_bytes >> 20} MiB for its nested tuples cannot be had") from error
    finally:
        threading.stack_size(before)
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


class _StorageCollector(MetadataUnpickler):
    """Remembers every storage the pickle refers to: a legacy file says their sizes nowhere else."""

    def __init__(self, content: bytes, storages: dict[str, PickledStorage] | None) -> None:
        super().__init__(content)
        self._storages = storages

    def persistent_load(self, reference: Any, /) -> PickledStorage:
        storage = super().persistent_load(reference)
        if self._storages is not None:
            self._storages[storage.key] = storage
        return storage


def _locate_legacy_storages(
    keys: list[str], storages: dict[str, PickledStorage], position: int, descriptor: int, source: SourceFile
) -> dict[str, tuple[int, int]]:
    located: dict[str, tuple[int, int]] = {}
    for key in keys:
        storage = storages.get(key)
        if storage is None or key in located:
            raise UnreadableCheckpointError(f"`{source.path}`: storage {key} is listed, but no tensor uses it once")
        (count,) = struct.unpack("<q", read_exactly(descriptor, 8, position, source.path))
        begin, end = position + 8, position + 8 + count * storage.dtype.itemsize
        if count < 0 or end > source.size:
            raise UnreadableCheckpointError(
                f"`{source.path}` is truncated: storage {key} ends at byte {end}, the file at {source.size}"
            )
        located[key] = (begin, end)
        position = end
    return located


# Entry of the central directory: magic, flags, method, the two sizes, three lengths, offset of the local header.
_ENTRY = struct.Struct("<4s4xHH8xIIHHH8xI")


class _Record(NamedTuple):
    header_offset: int
    stored_size: int
    size: int
    method: int


class _ZipArchive:
    """The central directory of a zip, read with pread alone."""

    def __init__(self, descriptor: int, source: SourceFile) -> None:
        self._descriptor = descriptor
        self._source = source
        self.records: dict[str, _Record] = {}
        self._read_directory()

    def _refuse(self, what: str) -> UnreadableCheckpointError:
        return UnreadableCheckpointError(f"`{self._source.path}` {what}")

    def _read(self, size: int, offset: int) -> bytes:
        return read_exactly(self._descriptor, size, offset, self._source.path)

    def find_root(self) -> str:
        """`archive/` or whatever folder torch.save put its records in."""
        roots = [name.removesuffix("data.pkl") for name in self.records if name.endswith(("/data.pkl",))]
        if len(roots) != 1:
            raise self._refuse("is a zip file, but not one written by torch.save")
        if f"{roots[0]}constants.pkl" in self.records:
            raise UnreadableCheckpointError(
                f"`{self._source.path}` is a TorchScript program, not a checkpoint",
                hint="save `model.state_dict()` with torch.save instead",
            )
        return roots[0]

    def read_small(self, name: str) -> bytes:
        """The content of a record that is no storage."""
        begin, end = self.locate(name)
        if end - begin > MAX_PICKLE_BYTES:
            raise self._refuse(f"has a `{name}` of {end - begin} bytes, above the limit of {MAX_PICKLE_BYTES}")
        return self._read(end - begin, begin)

    def locate(self, name: str) -> tuple[int, int]:
        """The byte range of a record's content."""
        record = self.records[name]
        if record.method != 0 or record.stored_size != record.size:
            raise UnreadableCheckpointError(
                f"`{self._source.path}`: record `{name}` is compressed; torch.save never does that",
                hint="unpack it and save the state dict again with torch.save",
            )
        header = os.pread(self._descriptor, 30, record.header_offset)
        if len(header) < 30:
            raise self._refuse(f"is truncated: record `{name}` begins behind its end")
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        if header[:4] != ZIP_MAGIC:
            raise self._refuse(f"has no record where its directory says `{name}` is")
        begin = record.header_offset + 30 + name_length + extra_length
        end = begin + record.size
        if end > self._limits[record.header_offset]:
            raise self._refuse(f"has a record `{name}` that overlaps the next one")
        return begin, end

    def _read_directory(self) -> None:
        size = self._source.size
        tail_size = min(size, 65557)  # the end record's 22 bytes and the longest comment
        tail = self._read(tail_size, size - tail_size)
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) - at < 22:
            raise self._refuse("is truncated: the directory of its records is missing")
        count, directory_size, directory_offset = struct.unpack("<HII", tail[at + 10 : at + 20])
        end_offset = size - tail_size + at
        if count == 0xFFFF or directory_size == 0xFFFFFFFF or directory_offset == 0xFFFFFFFF:
            locator = self._read(20, end_offset - 20) if end_offset >= 20 else b""
            if locator[:4] == b"PK\x06\x07":
                (zip64_offset,) = struct.unpack("<Q", locator[8:16])
                zip64 = self._read(56, zip64_offset) if zip64_offset + 56 <= end_offset else b""
                if zip64[:4] != b"PK\x06\x06":
                    raise self._refuse("lies about where its directory is")
                count, directory_size, directory_offset = struct.unpack("<QQQ", zip64[32:56])
        if directory_offset + directory_size > end_offset:
            raise self._refuse("lies about where its directory is")
        directory = self._read(directory_size, directory_offset)
        position = 0
        for _ in range(count):
            position = self._read_entry(directory, position)
        if not self.records:
            raise self._refuse("is a zip file without a record")
        offsets = sorted(record.header_offset for record in self.records.values())
        if len(set(offsets)) < len(offsets) or offsets[-1] >= directory_offset:
            raise self._refuse("has records that overlap")
        self._limits = dict(zip(offsets, [*offsets[1:], directory_offset], strict=True))

    def _read_entry(self, directory: bytes, position: int) -> int:
        if len(directory) - position < _ENTRY.size:
            raise self._refuse("has a damaged directory")
        magic, flags, method, stored_size, size, name_length, extra_length, comment_length, header_offset = (
            _ENTRY.unpack_from(directory, position)
        )
        extra_begin = position + _ENTRY.size + name_length
        end: int = extra_begin + extra_length + comment_length
        if magic != b"PK\x01\x02" or end > len(directory):
            raise self._refuse("has a damaged directory")
        name = directory[position + _ENTRY.size : extra_begin].decode("utf-8", "replace")
        if stored_size == 0xFFFFFFFF or size == 0xFFFFFFFF or header_offset == 0xFFFFFFFF:
            size, stored_size, header_offset = self._read_zip64_extra(
                directory[extra_begin : extra_begin + extra_length], size, stored_size, header_offset
            )
        if flags & 1:
            raise self._refuse(f"has an encrypted record `{name}`")
        if name in self.records:
            raise self._refuse(f"names the record `{name}` twice")
        self.records[name] = _Record(header_offset, stored_size, size, method)
        return end

    def _read_zip64_extra(self, extra: bytes, size: int, stored_size: int, header_offset: int) -> tuple[int, int, int]:
        position = 0
        while position + 4 <= len(extra):
            kind, length = struct.unpack_from("<HH", extra, position)
            field = extra[position + 4 : position + 4 + length]
            position += 4 + length
            if kind != 1:
                continue
            # The fields that overflowed, in this order, and only those.
            values = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            try:
                size = next(values) if size == 0xFFFFFFFF else size
                stored_size = next(values) if stored_size == 0xFFFFFFFF else stored_size
                header_offset = next(values) if header_offset == 0xFFFFFFFF else header_offset
            except StopIteration:
                break
            return size, stored_size, header_offset
        raise self._refuse("has a damaged directory")
