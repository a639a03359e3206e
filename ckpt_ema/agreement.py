"""Students beside one another: their layouts in, the changes of precision by tensor out, or every disagreement."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ckpt_ema.dtypes import DType, is_change_of_precision
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.layouts import Layout, Schema
from ckpt_ema.sizes import counted


class PrecisionChange(NamedTuple):
    """Where the students' dtype became another one of its kind, as in training that went on in another precision."""

    before: DType
    after: DType
    when: str
    """As a note says it: at `step_300.pt`, or since `teacher.safetensors` was begun."""


class EarlierStudents(NamedTuple):
    """Those of a teacher that is continued, as far as it tells."""

    teacher: str
    """Its label."""

    dtypes: Mapping[str, DType]
    """By tensor, where the teacher knows."""


class _Difference(NamedTuple):
    """What of a tensor is another in the next checkpoint."""

    name: str
    what: str
    change: PrecisionChange | None = None
    """Where nothing but the precision is."""


class _Pair(NamedTuple):
    """Two neighbours, by their labels."""

    label: str
    next_label: str
    differences: tuple[_Difference, ...]
    is_continued: bool = False
    """Whether the first is a teacher that the fold goes on from."""


def precision_changes(
    layouts: Sequence[tuple[str, Layout]],
    *,
    earlier: EarlierStudents | None,
    steps: Mapping[str, int | None],
    are_allowed: bool,
    may_be_widened: bool,
) -> dict[str, tuple[PrecisionChange, ...]]:
    """Of each tensor whose precision changes, the changes, oldest first.

    `layouts` are the students' by label, `steps` theirs for hints; `may_be_widened` says whether these may propose to
    allow a change. Raises CkptEmaError with every difference between neighbours, of which another precision is none
    where changes `are_allowed`.
    """
    pairs = [
        _Pair(label, next_label, tuple(_differences(layout.schema, next_layout.schema, label, next_label)))
        for (label, layout), (next_label, next_layout) in itertools.pairwise(layouts)
    ]
    if earlier is not None:
        label, layout = layouts[0]
        since = tuple(_differences_since(earlier, layout.schema))
        pairs.insert(0, _Pair(earlier.teacher, label, since, is_continued=True))
    refused = [
        pair._replace(differences=found)
        for pair in pairs
        if (found := tuple(each for each in pair.differences if not (are_allowed and each.change)))
    ]
    if refused:
        raise _disagreement(refused, steps, may_be_widened=may_be_widened)
    changes: dict[str, tuple[PrecisionChange, ...]] = {}
    for difference in itertools.chain.from_iterable(pair.differences for pair in pairs):
        if difference.change is not None:
            changes[difference.name] = (*changes.get(difference.name, ()), difference.change)
    return changes


def _disagreement(pairs: Sequence[_Pair], steps: Mapping[str, int | None], *, may_be_widened: bool) -> CkptEmaError:
    first = f"`{pairs[0].label}` and `{pairs[0].next_label}` differ in {counted(len(pairs[0].differences), 'tensor')}"
    more = "" if len(pairs) == 1 else f", and {counted(len(pairs) - 1, 'later pair')} of checkpoints as well"
    lines = [
        f"{name}: {what}" if len(pairs) == 1 else f"{label} to {next_label}: {name}: {what}"
        for label, next_label, differences, _ in pairs
        for name, what, _ in differences
    ]
    newest = pairs[-1].next_label
    later = f"begin with `{newest}`" if steps.get(newest) is None else f"pass `--from {steps[newest]}`"
    if may_be_widened and all(each.change for pair in pairs for each in pair.differences):
        hint = "pass `--dtype float32` to fold all of them"
        if not pairs[
            0
        ].is_continued:  # that teacher is in the earlier precision, whatever is left out of what comes after it
            hint = f"{hint}; or {later} to fold the later ones"
    else:
        hint = f"fold only checkpoints that agree: {later} to fold the later ones, or `--exclude` some by name"
    return CkptEmaError(f"{first}{more}", details=lines, hint=hint)


def _differences_since(earlier: EarlierStudents, schema: Schema) -> Iterator[_Difference]:
    for name, dtype in zip(schema.names, schema.dtypes, strict=True):
        before = earlier.dtypes.get(name, dtype)
        if is_change_of_precision(before, dtype):
            change = PrecisionChange(before, dtype, f"since `{earlier.teacher}` was begun")
            yield _Difference(name, f"{before} became {dtype}", change)


def _differences(one: Schema, other: Schema, label: str, next_label: str) -> Iterator[_Difference]:
    # Strides are no difference: the elements are the same in any memory order.
    if one is other or (one.names, one.dtypes, one.shapes) == (other.names, other.dtypes, other.shapes):
        return
    left = dict(zip(one.names, zip(one.shapes, one.dtypes, strict=True), strict=True))
    right = dict(zip(other.names, zip(other.shapes, other.dtypes, strict=True), strict=True))
    for name in sorted(left.keys() | right.keys()):
        if name not in right:
            yield _Difference(name, f"missing in `{next_label}`")
            continue
        if name not in left:
            yield _Difference(name, f"missing in `{label}`")
            continue
        (shape, before), (next_shape, after) = left[name], right[name]
        if shape != next_shape:
            yield _Difference(name, f"shape {list(shape)} became {list(next_shape)}")
        elif before != after:
            change = PrecisionChange(before, after, f"at `{next_label}`")
            is_precision = is_change_of_precision(before, after)
            yield _Difference(name, f"{before} became {after}", change if is_precision else None)
