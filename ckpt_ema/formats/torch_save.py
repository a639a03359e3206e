"""torch.save files, zip and legacy: a file in, its tree of values with the byte ranges of its tensors out."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_ema.byte_ranges import (
    InputFile,
    SourceFile,
    TensorRange,
    is_contiguous,
    open_input,
    read_exactly,
    span_elements,
)
from ckpt_ema.errors import CkptEmaError, UnreadableCheckpointError
from ckpt_ema.formats.pickle_scan import IncompletePickleError, MalformedPickleError, PickleScan, scan_pickle
from ckpt_ema.formats.pickle_trial import load_with_stack, try_pickle
from ckpt_ema.formats.pickles import MetadataUnpickler, PickledStorage, PickledTensor
from ckpt_ema.formats.zip_archive import MAX_SMALL_BYTES, ZipArchive

LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True, slots=True)
class TorchSaveFile:
    """One file written by torch.save."""

    tree: Any
    """The object that was saved, with PickledTensor leaves."""

    source: SourceFile
    locate_storages: Callable[[InputFile, Iterable[str]], dict[str, tuple[int, int]]]
    """(file, storage keys) -> the byte range of each storage that the file has."""

    def locate(self, tensors: Mapping[str, PickledTensor]) -> dict[str, TensorRange]:
        """The byte range of each tensor, checked against its storage.

        Raises UnreadableCheckpointError where it does not lie in there, and CkptEmaError where its bytes are not its
        values.
        """
        file = open_input(self.source.path)
        try:
            self.source.check_unchanged(file)
            return self.locate_within(file, tensors)
        finally:
            file.close()

    def locate_within(self, file: InputFile, tensors: Mapping[str, PickledTensor]) -> dict[str, TensorRange]:
        """The same, of the file that is open."""
        located: dict[str, TensorRange] = {}
        geometries: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...] | None, int]] = {}
        source = self.source
        storages = self.locate_storages(file, {tensor.storage.key: None for tensor in tensors.values()})
        for name, (storage, dtype, offset, shape, strides, refusal) in tensors.items():
            if refusal is not None:
                raise CkptEmaError(f"`{source.path}`: tensor `{name}` {refusal.what}", hint=refusal.hint)
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
    file = open_input(path)
    try:
        return read_zip_within(file, file.source())
    finally:
        file.close()


def read_zip_within(
    file: InputFile,
    source: SourceFile,
    begin: int = 0,
    end: int | None = None,
    known: dict[bytes, Any] | None = None,
) -> TorchSaveFile:
    """Read a torch.save zip that takes `[begin, end)` of an open file, or all of it.

    `known` keeps what pickles were found to say: the pieces of a sharded checkpoint repeat each other.
    """
    archive = ZipArchive(file, source, begin, end)
    root = archive.find_root()
    written = f"{root}byteorder" in archive.records
    byteorder = archive.read_small(file, f"{root}byteorder") if written else b"little"
    if byteorder.strip() != b"little":
        raise UnreadableCheckpointError(
            f"`{source.path}` was written on a big-endian machine",
            hint="load and save it again on this machine with torch",
        )
    content = archive.read_small(file, f"{root}data.pkl")
    if known is not None and content in known:
        tree = known[content]
    else:
        tree = load_pickle(content, source.path)
        if known is not None:
            known[content] = tree

    def locate_storages(file: InputFile, keys: Iterable[str]) -> dict[str, tuple[int, int]]:
        present = {key: name for key in keys if (name := f"{root}data/{key}") in archive.records}
        return dict(zip(present, archive.locate(file, present.values()), strict=True))

    return TorchSaveFile(tree, source, locate_storages)


def load_pickle(content: bytes, path: Path) -> Any:
    """The root of a pickle, with PickledTensor leaves; raises UnreadableCheckpointError where it is malformed."""
    scan = _scan(content, 0, path)
    if scan is None:
        raise UnreadableCheckpointError(f"`{path}`: its pickle does not end")
    return _unpickle(content, scan, path)[0]


def read_torch_legacy(path: Path) -> TorchSaveFile:
    """Read the five pickles of a file from before torch 1.6 (or `_use_new_zipfile_serialization=False`)."""
    file = open_input(path)
    try:
        source = file.source()
        pickles = _LegacyPickles(file, source)
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
        storages = _locate_legacy_storages(keys, used, pickles.position, file, source)
    finally:
        file.close()
    return TorchSaveFile(tree, source, lambda _, keys: {key: storages[key] for key in keys if key in storages})


class _LegacyPickles:
    """The pickles at the start of a legacy file; no more of it is read than they take."""

    def __init__(self, file: InputFile, source: SourceFile) -> None:
        self._file = file
        self._source = source
        self._content = b""
        self.position = 0
        """Where the next pickle begins, and after the last one the storages."""
        self.storages: dict[str, PickledStorage] = {}
        """What the pickle loaded last refers to."""

    def load_next(self) -> Any:
        """The root of the next pickle."""
        path = self._source.path
        limit = min(self._source.size, MAX_SMALL_BYTES)
        while (scan := _scan(self._content, self.position, path)) is None:
            if len(self._content) == limit:
                raise UnreadableCheckpointError(f"`{path}` is truncated inside a pickle")
            size = min(max(1 << 20, 4 * len(self._content)), limit)
            self._content = read_exactly(self._file, size, 0)
        tree, self.storages = _unpickle(self._content[self.position : scan.end], scan, path)
        self.position = scan.end
        return tree


def _scan(content: bytes, begin: int, path: Path) -> PickleScan | None:
    """What is known of the pickle that starts at `begin`; None where `content` ends first."""
    try:
        return scan_pickle(content, begin)
    except IncompletePickleError:
        return None
    except MalformedPickleError as error:
        raise UnreadableCheckpointError(f"`{path}` cannot be unpickled: {error}") from error


def _unpickle(content: bytes, scan: PickleScan, path: Path) -> tuple[Any, dict[str, PickledStorage]]:
    """The root of one scanned pickle, and the storages it refers to."""
    unpickler = MetadataUnpickler(content)
    try:
        if scan.is_costly:
            try_pickle(content, scan.num_tuples)
        return load_with_stack(unpickler, scan.num_tuples), unpickler.storages
    except MalformedPickleError as error:
        raise UnreadableCheckpointError(f"`{path}` cannot be unpickled: {error}") from error


def _locate_legacy_storages(
    keys: list[str], storages: dict[str, PickledStorage], position: int, file: InputFile, source: SourceFile
) -> dict[str, tuple[int, int]]:
    located: dict[str, tuple[int, int]] = {}
    for key in keys:
        storage = storages.get(key)
        if storage is None or key in located:
            raise UnreadableCheckpointError(f"`{source.path}`: storage {key} is listed, but no tensor uses it once")
        (count,) = struct.unpack("<q", read_exactly(file, 8, position))
        begin, end = position + 8, position + 8 + count * storage.dtype.itemsize
        if count < 0 or end > source.size:
            raise UnreadableCheckpointError(
                f"`{source.path}` is truncated: storage {key} ends at byte {end}, the file at {source.size}"
            )
        located[key] = (begin, end)
        position = end
    return located
