"""Which files a teacher is written to: its tensors in, what each file is made of out.

One safetensors file, shards with an index as Hugging Face has them, or a folder for torch.distributed.checkpoint.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

from ckpt_ema.byte_ranges import contiguous_strides, count_elements
from ckpt_ema.dtypes import DType
from ckpt_ema.formats.contents import PROVENANCE_FILE
from ckpt_ema.formats.dcp import FRAMING_KEY, METADATA_NAME, PIECES_NAME, TABLE_KEY
from ckpt_ema.output.writer import Extent, FileParts, encode_header

ALIGNMENT = 64
"""torch's own for what is stored in a zip."""

ZIP64_SIZE = 0xFFFFFFFF


class Entry(NamedTuple):
    """A tensor of the teacher."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int
    """Its bytes in the data section."""


@dataclass(frozen=True, slots=True)
class TeacherFiles:
    """All files of one teacher."""

    parts: tuple[tuple[str, FileParts], ...]
    """Name and content of those that hold tensors, by their place in the data section."""

    closing: tuple[tuple[str, bytes], ...] = ()
    """Those that make the others count; small, and written first, so that they find a full disk early."""

    @property
    def names(self) -> list[str]:
        """Of all of them."""
        return [name for name, _ in (*self.parts, *self.closing)]

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(part.size for _, part in self.parts) + sum(len(content) for _, content in self.closing)


def one_file(name: str, entries: Sequence[Entry], metadata: Mapping[str, str]) -> TeacherFiles:
    """A safetensors file of all `entries`, in the order of their bytes."""
    end = max((entry.end for entry in entries), default=0)
    return TeacherFiles(((name, FileParts.of_header(encode_header(entries, metadata), 0, end)),))


def shard_files(stem: str, entries: Sequence[Entry], metadata: Mapping[str, str], shard_bytes: int) -> TeacherFiles:
    """Safetensors files of up to `shard_bytes` of tensors each, and the index that names them.

    A larger tensor has a file of its own; where one file does, there is no index.
    """
    groups: list[list[Entry]] = [[]]
    for entry in entries:
        if groups[-1] and entry.end - groups[-1][0].begin > shard_bytes:
            groups.append([])
        groups[-1].append(entry)
    if len(groups) == 1:
        return one_file(f"{stem}.safetensors", entries, metadata)
    parts = []
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        begin, end = group[0].begin, group[-1].end
        shifted = [entry._replace(begin=entry.begin - begin, end=entry.end - begin) for entry in group]
        parts.append((name, FileParts.of_header(encode_header(shifted, metadata), begin, end)))
        weight_map |= {entry.name: name for entry in group}
    index = {"metadata": {"total_size": entries[-1].end}, "weight_map": dict(sorted(weight_map.items()))}
    content = json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"
    return TeacherFiles(tuple(parts), ((f"{stem}.safetensors.index.json", content),))


def dcp_files(key: str, entries: Sequence[Entry], metadata: Mapping[str, str]) -> TeacherFiles:
    """A folder for `torch.distributed.checkpoint.load`: one whole tensor after the other, each a torch.save zip.

    Under `key` in the state dict that is loaded, at its root where that is empty. The zips carry no checksums, as
    those of torch itself with `set_crc32_options(False)`.
    """
    literals: list[tuple[int, bytes]] = []
    extents: list[Extent] = []
    places: list[tuple[int, int]] = []
    position = 0
    for entry in entries:
        before, behind = tensor_zip(entry)
        offset = position + len(before)
        end = offset + entry.end - entry.begin
        literals += [(position, before), (end, behind)]
        extents.append(Extent(entry.begin, entry.end, offset))
        places.append((position, end + len(behind) - position))
        position = end + len(behind)
    table = _table(key, entries, places)
    framing = sha256(b"".join(content for _, content in literals))
    record = {**metadata, TABLE_KEY: sha256(table).hexdigest(), FRAMING_KEY: framing.hexdigest()}
    provenance = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    closing = ((PROVENANCE_FILE, provenance), (METADATA_NAME, table))
    return TeacherFiles(((PIECES_NAME, FileParts(position, tuple(literals), tuple(extents))),), closing)


def _table(key: str, entries: Sequence[Entry], places: Sequence[tuple[int, int]]) -> bytes:
    """`.metadata`: torch's own records, pickled as torch does."""
    # Here, not above: a plan must not wait for torch.
    import torch  # noqa: PLC0415
    from torch.distributed.checkpoint import metadata as dcp  # noqa: PLC0415
    from torch.distributed.checkpoint.filesystem import _StorageInfo  # noqa: PLC0415

    tensors: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    paths: dict[str, tuple[str, ...]] = {}
    for entry, (begin, length) in zip(entries, places, strict=True):
        name = f"{key}.{entry.name}" if key else entry.name
        offsets, sizes = torch.Size([0] * len(entry.shape)), torch.Size(entry.shape)
        properties = dcp.TensorProperties(dtype=getattr(torch, entry.dtype.name))
        tensors[name] = dcp.TensorStorageMetadata(properties, sizes, [dcp.ChunkStorageMetadata(offsets, sizes)])
        storage[dcp.MetadataIndex(name, offsets, 0)] = _StorageInfo(PIECES_NAME, begin, length)
        paths[name] = (key, entry.name) if key else (entry.name,)
    return pickle.dumps(dcp.Metadata(tensors, paths, storage))


class _StorageStub:
    """Stands for the bytes of a tensor while its pickle is made."""


def _tensor_pickle(dtype: DType, shape: tuple[int, ...]) -> bytes:
    """What torch.save pickles for a contiguous tensor that fills its storage."""
    import torch  # noqa: PLC0415

    storage = _StorageStub()
    # Younger dtypes have no storage class, and are named beside untyped bytes.
    typed = getattr(torch, dtype.storage or "", None)
    num_stored = count_elements(shape) * (1 if typed else dtype.itemsize)

    class Tensor:
        def __reduce__(self) -> Any:
            arguments: tuple[Any, ...] = (storage, 0, shape, contiguous_strides(shape), False, OrderedDict())
            if typed is None:
                return torch._utils._rebuild_tensor_v3, (*arguments, getattr(torch, dtype.name))
            return torch._utils._rebuild_tensor_v2, arguments

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", typed or torch.UntypedStorage, "0", "cpu", num_stored) if obj is storage else None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(Tensor())
    return stream.getvalue()


def tensor_zip(entry: Entry) -> tuple[bytes, bytes]:
    """What of a torch.save zip lies before and after the bytes of one tensor."""
    size = entry.end - entry.begin
    before = b""
    directory = b""
    small = (("data.pkl", _tensor_pickle(entry.dtype, entry.shape)), ("byteorder", b"little"), ("version", b"3\n"))
    for name, content in small:
        directory += _directory_entry(name, len(content), len(before))
        before += _local_header(name, len(content), b"") + content
    extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= ZIP64_SIZE else b""
    # As torch pads: an extra field of zeros, so that the numbers are aligned within the zip.
    padding = -(len(before) + len(_local_header("data/0", size, extra)) + 4) % ALIGNMENT
    extra += struct.pack("<2sH", b"FB", padding) + b"\0" * padding
    directory += _directory_entry("data/0", size, len(before))
    before += _local_header("data/0", size, extra)
    return before, directory + _end_of_zip(len(small) + 1, len(directory), len(before) + size)


def _local_header(name: str, size: int, extra: bytes) -> bytes:
    shown = min(size, ZIP64_SIZE)
    path = f"archive/{name}".encode()
    return struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, shown, shown, len(path), len(extra)) + path + extra


def _directory_entry(name: str, size: int, offset: int) -> bytes:
    shown = min(size, ZIP64_SIZE)
    extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= ZIP64_SIZE else b""
    path = f"archive/{name}".encode()
    fields = (b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, shown, shown, len(path), len(extra), 0, 0, 0, 0, offset)
    return struct.pack("<4s6H3I5H2I", *fields) + path + extra


def _end_of_zip(count: int, directory_size: int, directory_offset: int) -> bytes:
    if directory_offset < ZIP64_SIZE:
        return struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, directory_size, directory_offset, 0)
    at = directory_offset + directory_size
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, directory_size, directory_offset)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, at, 1)
    return wide + locator + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, directory_size, ZIP64_SIZE, 0)
