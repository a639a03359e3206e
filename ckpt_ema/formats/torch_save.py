"""torch.save files, zip and legacy: a file in, its tree of values with the byte ranges of its tensors out."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    source: SourceFile
    locate_storages: Callable[[int, Iterable[str]], dict[str, tuple[int, int]]]
    """(descriptor, storage keys) -> the byte range of each storage that the file has."""

    def locate(self, tensors: Mapping[str, PickledTensor]) -> dict[str, TensorRange]:
        """The byte range of each tensor, checked against its storage."""
        located: dict[str, TensorRange] = {}
        geometries: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...] | None, int]] = {}
        source = self.source
        descriptor = open_input(source.path)
        try:
            source.check_unchanged(descriptor)
            storages = self.locate_storages(descriptor, {tensor.storage.key: None for tensor in tensors.values()})
        finally:
            os.close(descriptor)
        for name, (storage, dtype, offset, shape, strides) in tensors.items():
            record = storages.get(storage.key)
            if record is None:
                raise self._refuse(name, f"lies in storage {storage.key}, which is missing")
            # A model's layers repeat each other.
            geometry = geometries.get((shape, strides))
            if geometry is None:
                gaps = None if is_contiguous(shape, strides) else strides
                geometry = geometries[shape, strides] = gaps, span_elements(shape, gaps)
            gaps, span = geometry
            begin = record[0] + offset * dtype.itemsize if span else record[0]
            end = begin + span * dtype.itemsize
            if end > record[1]:
                raise self._refuse(
                    name,
                    f"of shape {list(shape)} reaches {end - record[1]} bytes beyond its storage"
                    f" of {record[1] - record[0]}",
                )
            located[name] = tuple.__new__(TensorRange, (dtype, shape, gaps, source, begin, end))
        return located

    def _refuse(self, name: str, what: str) -> UnreadableCheckpointError:
        return UnreadableCheckpointError(f"`{self.source.path}`: tensor `{name}` {what}")


def read_torch_zip(path: Path) -> TorchSaveFile:
    """Read the directory and the pickle of a zip that torch.save wrote (torch 1.6 or later)."""
    descriptor = open_input(path)
    try:
        source = SourceFile.from_descriptor(path, descriptor)
        archive = _ZipArchive(descriptor, source)
        root = archive.find_root()
        written = f"{root}byteorder" in archive.records
        byteorder = archive.read_small(descriptor, f"{root}byteorder") if written else b"little"
        if byteorder.strip() != b"little":
            raise UnreadableCheckpointError(
                f"`{path}` was written on a big-endian machine",
                hint="load and save it again on this machine with torch",
            )
        content = archive.read_small(descriptor, f"{root}data.pkl")
        found = _find_end(content, 0, path)
        if found is None:
            raise UnreadableCheckpointError(f"`{path}`: its pickle does not end")
        tree, _ = _unpickle(content, found[1], path)
    finally:
        os.close(descriptor)

    def locate_storages(descriptor: int, keys: Iterable[str]) -> dict[str, tuple[int, int]]:
        present = {key: name for key in keys if (name := f"{root}data/{key}") in archive.records}
        return dict(zip(present, archive.locate(descriptor, present.values()), strict=True))

    return TorchSaveFile(tree, source, locate_storages)


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
        tree = pickles.load_next()
        used = pickles.storages
        keys = pickles.load_next()
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise UnreadableCheckpointError(f"`{path}`: the list of storages is missing")
        storages = _locate_legacy_storages(keys, used, pickles.position, descriptor, source)
    finally:
        os.close(descriptor)
    return TorchSaveFile(tree, source, lambda _, keys: {key: storages[key] for key in keys if key in storages})


class _LegacyPickles:
    """The pickles at the start of a legacy file; no more of it is read than they take."""

    def __init__(self, descriptor: int, source: SourceFile) -> None:
        self._descriptor = descriptor
        self._source = source
        self._content = b""
        self.position = 0
        """Where the next pickle begins, and behind the last one the storages."""
        self.storages: dict[str, PickledStorage] = {}
        """What the pickle loaded last refers to."""

    def load_next(self) -> Any:
        """The root of the next pickle."""
        path = self._source.path
        limit = min(self._source.size, MAX_PICKLE_BYTES)
        while (found := _find_end(self._content, self.position, path)) is None:
            if len(self._content) == limit:
                raise UnreadableCheckpointError(f"`{path}` is truncated inside a pickle")
            size = min(max(1 << 20, 4 * len(self._content)), limit)
            self._content = read_exactly(self._descriptor, size, 0, path)
        end, num_tuples = found
        tree, self.storages = _unpickle(self._content[self.position : end], num_tuples, path)
        self.position = end
        return tree


def _find_end(content: bytes, begin: int, path: Path) -> tuple[int, int] | None:
    try:
        return find_pickle_end(content, begin)
    except IncompletePickleError:
        return None
    except MalformedPickleError as error:
        raise UnreadableCheckpointError(f"`{path}` cannot be unpickled: {error}") from error


def _unpickle(content: bytes, num_tuples: int, path: Path) -> tuple[Any, dict[str, PickledStorage]]:
    """The root of one scanned pickle, and the storages it refers to."""
    unpickler = MetadataUnpickler(content)
    try:
        if num_tuples < SHALLOW_TUPLES:
            return unpickler.load(), unpickler.storages
        return _with_deep_stack(unpickler.load, num_tuples * STACK_BYTES_PER_TUPLE), unpickler.storages
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


# Local header of a record: magic, the lengths of its name and of its extra field, both of which follow.
_LOCAL_HEADER = struct.Struct("<4s22xHH")
# Entry of the central directory: magic, flags, method, the two sizes, three lengths, offset of the local header.
_ENTRY = struct.Struct("<4s4xHH8xIIHHH8xI")


_Record = tuple[int, int, int, int]
"""Offset of the local header, stored size, size, method; a bare tuple, since there is one per tensor."""


class _ZipArchive:
    """The central directory of a zip, read with pread alone."""

    def __init__(self, descriptor: int, source: SourceFile) -> None:
        self._source = source
        self.records: dict[str, _Record] = {}
        self._read_directory(descriptor)

    def _refuse(self, what: str) -> UnreadableCheckpointError:
        return UnreadableCheckpointError(f"`{self._source.path}` {what}")

    def find_root(self) -> str:
        """`archive/` or whatever folder torch.save put its records in."""
        roots = [name.removesuffix("data.pkl") for name in self.records if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise self._refuse("is a zip file, but not one written by torch.save")
        if f"{roots[0]}constants.pkl" in self.records:
            raise UnreadableCheckpointError(
                f"`{self._source.path}` is a TorchScript program, not a checkpoint",
                hint="save `model.state_dict()` with torch.save instead",
            )
        return roots[0]

    def read_small(self, descriptor: int, name: str) -> bytes:
        """The content of a record that is no storage."""
        ((begin, end),) = self.locate(descriptor, [name])
        if end - begin > MAX_PICKLE_BYTES:
            raise self._refuse(f"has a `{name}` of {end - begin} bytes, above the limit of {MAX_PICKLE_BYTES}")
        return read_exactly(descriptor, end - begin, begin, self._source.path)

    def locate(self, descriptor: int, names: Iterable[str]) -> Iterator[tuple[int, int]]:
        """The byte range of each record's content."""
        pread, records, limits = os.pread, self.records, self._limits
        unpack, header_size = _LOCAL_HEADER.unpack, _LOCAL_HEADER.size
        for name in names:
            header_offset, stored_size, size, method = records[name]
            if method != 0 or stored_size != size:
                raise UnreadableCheckpointError(
                    f"`{self._source.path}`: record `{name}` is compressed; torch.save never does that",
                    hint="unpack it and save the state dict again with torch.save",
                )
            # Asked of the record itself: its directory does not say where the content begins.
            try:
                header = pread(descriptor, header_size, header_offset)
            except OSError as error:
                raise self._refuse(f"cannot be read at byte {header_offset}: {error.strerror}") from error
            if len(header) < header_size:
                raise self._refuse(f"is truncated: record `{name}` begins behind its end")
            magic, name_length, extra_length = unpack(header)
            if magic != ZIP_MAGIC:
                raise self._refuse(f"has no record where its directory says `{name}` is")
            begin = header_offset + header_size + name_length + extra_length
            end = begin + size
            if end > limits[header_offset]:
                raise self._refuse(f"has a record `{name}` that overlaps the next one")
            yield begin, end

    def _read_directory(self, descriptor: int) -> None:
        def read(size: int, offset: int) -> bytes:
            return read_exactly(descriptor, size, offset, self._source.path)

        size = self._source.size
        tail_size = min(size, 65557)  # the end record's 22 bytes and the longest comment
        tail = read(tail_size, size - tail_size)
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) - at < 22:
            raise self._refuse("is truncated: the directory of its records is missing")
        count, directory_size, directory_offset = struct.unpack("<HII", tail[at + 10 : at + 20])
        end_offset = size - tail_size + at
        if count == 0xFFFF or directory_size == 0xFFFFFFFF or directory_offset == 0xFFFFFFFF:
            locator = read(20, end_offset - 20) if end_offset >= 20 else b""
            if locator[:4] == b"PK\x06\x07":
                (zip64_offset,) = struct.unpack("<Q", locator[8:16])
                zip64 = read(56, zip64_offset) if zip64_offset + 56 <= end_offset else b""
                if zip64[:4] != b"PK\x06\x06":
                    raise self._refuse("lies about where its directory is")
                count, directory_size, directory_offset = struct.unpack("<QQQ", zip64[32:56])
        if directory_offset + directory_size > end_offset:
            raise self._refuse("lies about where its directory is")
        directory = read(directory_size, directory_offset)
        self._read_entries(directory, count)
        if not self.records:
            raise self._refuse("is a zip file without a record")
        offsets = sorted(record[0] for record in self.records.values())
        if len(set(offsets)) < len(offsets) or offsets[-1] >= directory_offset:
            raise self._refuse("has records that overlap")
        self._limits = dict(zip(offsets, [*offsets[1:], directory_offset], strict=True))

    def _read_entries(self, directory: bytes, count: int) -> None:
        records, unpack, entry_size, limit = self.records, _ENTRY.unpack_from, _ENTRY.size, len(directory)
        position = 0
        for _ in range(count):
            if limit - position < entry_size:
                raise self._refuse("has a damaged directory")
            magic, flags, method, stored_size, size, name_length, extra_length, comment_length, header_offset = unpack(
                directory, position
            )
            extra_begin = position + entry_size + name_length
            end = extra_begin + extra_length + comment_length
            if magic != b"PK\x01\x02" or end > limit:
                raise self._refuse("has a damaged directory")
            name = directory[position + entry_size : extra_begin].decode("utf-8", "replace")
            if stored_size == 0xFFFFFFFF or size == 0xFFFFFFFF or header_offset == 0xFFFFFFFF:
                size, stored_size, header_offset = self._read_zip64_extra(
                    directory[extra_begin : extra_begin + extra_length], size, stored_size, header_offset
                )
            if flags & 1:
                raise self._refuse(f"has an encrypted record `{name}`")
            if name in records:
                raise self._refuse(f"names the record `{name}` twice")
            records[name] = (header_offset, stored_size, size, method)
            position = end

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
