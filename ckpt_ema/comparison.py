"""Two checkpoints or teachers side by side: their paths in, how far each tensor of one is from the other's out."""

from __future__ import annotations

import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from ckpt_ema.engine.distance import Distance
from ckpt_ema.engine.streams import Streams
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.inspection import Inspection, inspect
from ckpt_ema.keywords import refuses_unknown_keywords
from ckpt_ema.layouts import SchemaPool, compact_layout
from ckpt_ema.sizes import DEFAULT_MEMORY_BUDGET_BYTES


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor of two checkpoints."""

    name: str
    """In both, after `prefix` was taken off."""

    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    """Of a, of b."""

    relative: float
    """||a - b|| / ||b||: 0 where all values are the same, inf where b alone is zero, NaN where a NaN meets a number."""

    largest: float
    """The largest |a - b| of an element."""

    num_different: int
    """Elements that differ; two NaNs do not."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two checkpoints have in common, and what not."""

    a: Path
    b: Path
    tensors: tuple[TensorDifference, ...]
    """Of those that both have in one shape, the most different first."""

    relative: float
    """||a - b|| / ||b|| over all of these that are floating-point or complex."""

    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    """Names of what the other has not."""

    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """Names with the shape in each."""

    @property
    def is_identical(self) -> bool:
        """Whether both hold the same tensors with the same values."""
        apart = self.only_in_a or self.only_in_b or self.reshaped
        return not apart and not any(tensor.num_different for tensor in self.tensors)


@refuses_unknown_keywords()
def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    state: str | None = None,
    prefix: str | None = None,
    memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
) -> Comparison:
    """Compare the tensors of two checkpoints or teachers, of any format; dtypes may differ.

    `state` and `prefix` choose among the state dicts of both, as in `inspect`, but not in a teacher of this tool, whose
    names are those that a fold gave them. Values are compared in float64 (complex ones in complex128), a portion at a
    time, in buffers of `memory_budget_bytes` in all. Raises CkptEmaError where one cannot be read, or where they have
    no tensor in common.
    """
    found = [_look_at(path, state, prefix) for path in (a, b)]
    for each in found:
        if each.refusal:
            keys = [found.key for found in each.state_dicts if found.key]
            raise CkptEmaError(
                f"`{each.path}`: {each.refusal}",
                hint=f"pass for example `--state {shlex.quote(keys[0])}`" if keys else None,
            )
    one, other = (each.tensors for each in found)
    shared = sorted(name for name in one if name in other and one[name].shape == other[name].shape)
    if not shared:
        raise CkptEmaError(
            f"`{found[0].path}` and `{found[1].path}` have no tensor of one name and shape in common",
            details=[f"{each.path}: {', '.join(sorted(each.tensors)[:3])}, ..." for each in found],
            hint="`--prefix` takes off what stands before the names of a sub-model; `ckpt-ema inspect` shows them",
        )
    differences = []
    pool = SchemaPool()
    layouts = [compact_layout({name: tensors[name] for name in shared}, pool) for tensors in (one, other)]
    with Streams(layouts, memory_budget_bytes) as streams:
        for index, name in enumerate(shared):
            sums = Distance()
            for _, (first, second) in streams.portions(index):
                sums.add(first, second)
            dtypes = one[name].dtype, other[name].dtype
            difference = TensorDifference(
                name,
                one[name].shape,
                (dtypes[0].name, dtypes[1].name),
                sums.relative,
                sums.largest,
                sums.num_different,
            )
            differences.append((difference, sums, all(dtype.kind != "integer" for dtype in dtypes)))
    whole = Distance()
    for _, sums, is_float in differences:
        if is_float:
            whole.add_all(sums)
    tensors = sorted((difference for difference, _, _ in differences), key=_most_different_first)
    return Comparison(
        a=found[0].path,
        b=found[1].path,
        tensors=tuple(tensors),
        relative=whole.relative,
        only_in_a=tuple(sorted(name for name in one if name not in other)),
        only_in_b=tuple(sorted(name for name in other if name not in one)),
        reshaped=tuple(
            (name, one[name].shape, other[name].shape)
            for name in sorted(one)
            if name in other and one[name].shape != other[name].shape
        ),
    )


def _look_at(path: str | os.PathLike[str], state: str | None, prefix: str | None) -> Inspection:
    found = inspect(path)
    is_own = found.provenance is not None
    return found if is_own or not (state is not None or prefix) else inspect(path, state=state, prefix=prefix)


def _most_different_first(item: TensorDifference) -> tuple[bool, float, bool, str]:
    return not math.isnan(item.relative), -item.relative, not item.num_different, item.name
