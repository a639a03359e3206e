"""The tensors of one student in little memory: names with ranges in, arrays of offsets under a shared schema out.

A run may have 50 checkpoints of 20000 tensors. What is equal in all of them (names, shapes, dtypes) is kept once; a
checkpoint keeps 10 bytes per tensor.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass

from ckpt_ema.byte_ranges import SourceFile, TensorRange
from ckpt_ema.dtypes import DType


@dataclass(frozen=True, slots=True)
class Schema:
    """What the tensors of a student are, sorted by name."""

    names: tuple[str, ...]
    dtypes: tuple[DType, ...]
    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of one student lie; entry i belongs to `schema.names[i]`."""

    schema: Schema
    files: tuple[SourceFile, ...]
    file_indices: array[int]
    begins: array[int]


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


def compact_layout(tensors: Mapping[str, TensorRange], pool: SchemaPool) -> Layout:
    """Pack the ranges of one student."""
    names = sorted(tensors)
    dtypes, shapes, strides, files_of, begins, _ = zip(*map(tensors.__getitem__, names), strict=True) if names else NONE
    # By identity: a reader makes one SourceFile per file, and hashing it for every tensor is slow.
    keys = list(map(id, files_of))
    files = dict(zip(keys, files_of, strict=True))
    numbers = {key: number for number, key in enumerate(files)}
    schema = Schema(tuple(names), dtypes, shapes, strides)
    file_indices = array("H", map(numbers.__getitem__, keys))
    return Layout(pool.share(schema), tuple(files.values()), file_indices, array("q", begins))
