"""The tensors of one student in little memory: names with ranges in, arrays of offsets under a shared schema out.

A run may have 50 checkpoints of 20000 tensors, each cut into as many pieces as there were ranks. What is equal in all
of them (names, shapes, dtypes, where the cuts are) is kept once; a checkpoint keeps 12 bytes per piece.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckpt_ema.assembly import AssembledTensor, Box, Geometry, Runs, StoredTensor
from ckpt_ema.byte_ranges import SourceFile, TensorRange
from ckpt_ema.dtypes import DType
from ckpt_ema.locations import RemotePath


@dataclass(frozen=True, slots=True)
class Schema:
    """What the tensors of a student are, sorted by name."""

    names: tuple[str, ...]
    dtypes: tuple[DType, ...]
    shapes: tuple[tuple[int, ...], ...]
    geometries: tuple[Geometry | None, ...]
    """How each is made of its pieces; None for one contiguous range."""

    firsts: Sequence[int]
    """The first piece of each tensor among all pieces, and the number of all pieces."""

    def is_scattered(self, index: int) -> bool:
        """Whether the tensor's elements lie in another order than row-major, and must be gathered."""
        geometry = self.geometries[index]
        return geometry is not None and not isinstance(geometry, Runs)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of one student lie; pieces `schema.firsts[i]` to `schema.firsts[i + 1]` are tensor i's."""

    schema: Schema
    files: tuple[SourceFile, ...]
    file_indices: array[int]
    begins: array[int]

    @property
    def is_remote(self) -> bool:
        """Whether any of it lies behind a URL."""
        return any(isinstance(file.path, RemotePath) for file in self.files)

    def place(self, index: int) -> tuple[int, int]:
        """(file, first byte) of a tensor's first piece."""
        first = self.schema.firsts[index]
        return self.file_indices[first], self.begins[first]

    def places(self, index: int) -> tuple[tuple[int, int], ...]:
        """(file, first byte) of each of a tensor's pieces."""
        pieces = range(self.schema.firsts[index], self.schema.firsts[index + 1])
        return tuple((self.file_indices[piece], self.begins[piece]) for piece in pieces)


NONE: tuple[tuple[()], ...] = ((),) * len(TensorRange._fields)


class SchemaPool:
    """Gives equal schemas as one object."""

    def __init__(self) -> None:
        self._schemas: list[Schema] = []

    def share(self, schema: Schema) -> Schema:
        """The schema seen before that equals `schema`, else `schema` itself."""
        for known in self._schemas:
            if known == schema:
                return known
        self._schemas.append(schema)
        return schema


def compact_layout(tensors: Mapping[str, StoredTensor], pool: SchemaPool) -> Layout:
    """Pack the ranges of one student."""
    names = sorted(tensors)
    values = list(map(tensors.__getitem__, names))
    firsts: Sequence[int] = range(len(names) + 1)
    geometries: tuple[Geometry | None, ...] | None = None
    if AssembledTensor in set(map(type, values)):
        geometries, values, parts = _unpack(values)
        firsts = tuple(itertools.accumulate(map(len, parts), initial=0))
        pieces = [piece for group in parts for piece in group]
    else:
        pieces = values  # type: ignore[assignment]
    dtypes, shapes, strides, _, _, _ = zip(*values, strict=True) if names else NONE
    _, _, _, files_of, begins, _ = zip(*pieces, strict=True) if pieces else NONE
    if geometries is None:
        geometries = strides if not any(strides) else tuple(map(_strided, shapes, strides))
    # By identity: a reader makes one SourceFile per file, and hashing it for every tensor is slow.
    keys = list(map(id, files_of))
    files = dict(zip(keys, files_of, strict=True))
    numbers = {key: number for number, key in enumerate(files)}
    schema = Schema(tuple(names), dtypes, shapes, geometries, firsts)
    file_indices = array("I", map(numbers.__getitem__, keys))
    return Layout(pool.share(schema), tuple(files.values()), file_indices, array("q", begins))


def _strided(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> Geometry | None:
    return None if strides is None else (Box((0,) * len(shape), shape, strides),)


def _unpack(
    values: Sequence[StoredTensor],
) -> tuple[tuple[Geometry | None, ...], list[StoredTensor], list[tuple[TensorRange, ...]]]:
    """Geometry, a range that stands for the whole tensor, and the pieces of each."""
    geometries: list[Geometry | None] = []
    whole: list[StoredTensor] = []
    parts: list[tuple[TensorRange, ...]] = []
    known: dict[Geometry, Geometry] = {}  # a model's layers are cut alike
    for value in values:
        if isinstance(value, AssembledTensor):
            geometries.append(known.setdefault(value.geometry, value.geometry))
            whole.append(value.parts[0]._replace(shape=value.shape))
            parts.append(value.parts)
        else:
            geometries.append(_strided(value.shape, value.strides))
            whole.append(value)
            parts.append((value,))
    return tuple(geometries), whole, parts
