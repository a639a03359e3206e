"""The tensors all students share: layouts in, one entry per tensor with its treatment out, or every disagreement."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ckpt_ema.dtypes import BY_NAME, DType, WrittenDtype
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.layouts import Layout, Schema
from ckpt_ema.sizes import counted

ASKED_FOR = "buffer (`--buffer`)"
"""Why a tensor is copied that the user named."""

# Buffers that move during training, by the names torch and the common libraries give them. A bare state dict does
# not say which of its tensors are buffers; one that never moves averages to itself and needs no rule.
KNOWN_BUFFERS = frozenset(
    word
    for words in (
        "running_mean running_var num_batches_tracked",  # BatchNorm, InstanceNorm
        "weight_u weight_orig_u weight_orig_v _u _v",  # spectral norm, old and parametrised
        "min_val max_val min_vals max_vals zero_point fake_quant_enabled observer_enabled",  # quantisation observers
        "ema_cluster_size cluster_size embed_avg ema_w code_count",  # vector quantisers
        "queue queue_ptr",  # MoCo
        "position_ids inv_freq freqs_cis cos_cached sin_cached attn_mask relative_position_index masked_bias",
        "pixel_mean pixel_std n_averaged",
    )
    for word in words.split()
)
# Names that are buffers only beside one of these, in the same module.
BUFFERS_BESIDE = {
    "weight_v": ("weight_u", "weight_orig"),  # spectral norm's; weight norm's lies beside `weight_g` and is trained
    "embed": ("embed_avg", "cluster_size"),  # vector quantisers
    "count": ("running_mean",),  # of observations that were normalised
    "_mean": ("_var",),
    "_var": ("_mean",),
    "_std": ("_var",),
}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")

MAX_CHANGES = 3
"""Of precision, that are told one by one."""


class PrecisionChange(NamedTuple):
    """Where the students' dtype became another one of its kind, as in training that went on in another precision."""

    before: DType
    after: DType
    when: str
    """`at` the first student in the new one, or since the beginning of a teacher that is continued."""


@dataclass(frozen=True, slots=True)
class TeacherTensor:
    """One tensor of the teacher."""

    name: str
    shape: tuple[int, ...]
    student_dtype: DType
    """The newest student's."""

    dtype: DType
    """Of the written teacher."""

    action: Literal["average", "copy"]
    reason: str
    """Why it is copied; "" for an averaged one."""

    index: int
    """Its place in every layout's schema."""

    changes: tuple[PrecisionChange, ...] = ()
    """Of the students' dtypes, oldest first; none where all of them have one."""

    @property
    def student_dtypes(self) -> tuple[DType, ...]:
        """Those of all its students, once each."""
        return tuple(dict.fromkeys((*(change.before for change in self.changes), self.student_dtype)))


@dataclass(frozen=True, slots=True)
class Treatment:
    """What decides whether a tensor is averaged, and what it is written as."""

    skip_buffers: bool = True
    """MeanTeacherHook's default: parameters only. Otherwise every floating-point tensor."""

    buffer_globs: tuple[str, ...] = ()
    """Names of buffers, as the user gave them."""

    model_buffers: frozenset[str] | None = None
    """The buffers of the model the user named; None when none was named."""

    dtype: WrittenDtype = "student"
    """Of the written teacher: `student`, or one of torch's floating-point names."""


def build_catalogue(
    layouts: Sequence[tuple[str, Layout]],
    treatment: Treatment,
    *,
    known_buffers: Collection[str] | None = None,
    steps: Mapping[str, int | None] | None = None,
    earlier: tuple[str, Mapping[str, DType]] = ("", {}),
) -> list[TeacherTensor]:
    """One entry per tensor, sorted by name.

    `layouts` are the students' by label, `steps` theirs for hints; `known_buffers` what the newest checkpoint
    itself records; `earlier` the label of a teacher that is continued, and what is known of its students' dtypes.
    Raises CkptEmaError with every difference when the students disagree on names, shapes or dtypes (on precision only
    where the teacher's dtype shall be theirs), when a `--buffer` pattern matches nothing, and for a tensor that
    safetensors cannot hold.
    """
    teacher, dtypes = earlier
    pairs = [_Pair(teacher, layouts[0][0], list(_differences_from(dtypes, layouts[0][1].schema)), is_continued=True)]
    pairs += itertools.starmap(_compared, itertools.pairwise(layouts))
    _check_agreement(pairs, steps or {}, may_change=treatment.dtype != "student")
    changes = _changes_by_name(pairs)
    schema = layouts[-1][1].schema
    unmatched = [glob for glob in treatment.buffer_globs if not fnmatch.filter(schema.names, glob)]
    if unmatched:
        raise CkptEmaError(
            f"`--buffer {unmatched[0]}` matches no tensor",
            details=[f"names look like `{name}`" for name in schema.names[:3]],
            hint="patterns match whole names: `--buffer '*.running_mean'`",
        )
    buffers = treatment.model_buffers if treatment.model_buffers is not None else known_buffers
    names = frozenset(schema.names)
    tensors = []
    for index, name in enumerate(schema.names):
        _check_name(name)
        student_dtype = schema.dtypes[index]
        reason = _reason_to_copy(name, student_dtype, treatment, buffers, names)
        dtype = _teacher_dtype(name, student_dtype, treatment.dtype)
        action: Literal["average", "copy"] = "copy" if reason else "average"
        changed = changes.get(name, ())
        tensors.append(TeacherTensor(name, schema.shapes[index], student_dtype, dtype, action, reason, index, changed))
    return tensors


def precision_notes(tensors: Sequence[TeacherTensor]) -> Iterator[str]:
    """What is said of averaged tensors whose precision changes on the way, where there are any."""
    changed = [tensor for tensor in tensors if tensor.action == "average" and tensor.changes]
    if not changed:
        return
    where = dict.fromkeys(change for tensor in changed for change in tensor.changes)
    told = [f"{before} to {after} {when}" for before, after, when in list(where)[:MAX_CHANGES]]
    if len(where) > MAX_CHANGES:
        told[-1] += f" and {counted(len(where) - MAX_CHANGES, 'more change')}"
    verb = "changes its" if len(changed) == 1 else "change their"
    yield (
        f"{counted(len(changed), 'tensor')} {verb} precision on the way ({', '.join(told)}): each student is widened as"
        " it is read"
    )


def _check_name(name: str) -> None:
    if name == "__metadata__" or LONE_SURROGATE.search(name):
        raise CkptEmaError(
            f"a tensor is called {name!a}, which a safetensors file cannot name",
            hint="rename it in the checkpoints, or fold a sub-model without it (`--prefix`)",
        )


def _reason_to_copy(
    name: str, dtype: DType, treatment: Treatment, buffers: Collection[str] | None, names: Collection[str]
) -> str:
    if dtype.kind == "integer":
        return dtype.name
    if treatment.buffer_globs and any(fnmatch.fnmatchcase(name, glob) for glob in treatment.buffer_globs):
        return ASKED_FOR
    if not treatment.skip_buffers:
        # The hook's rule for whole state dicts: `is_floating_point`, which complex numbers are not.
        return "" if dtype.is_floating_point else dtype.name
    if buffers is not None:
        return "buffer" if name in buffers else ""
    module, dot, leaf = name.rpartition(".")
    beside = (f"{module}{dot}{other}" for other in BUFFERS_BESIDE.get(leaf, ()))
    is_known = leaf in KNOWN_BUFFERS or any(other in names for other in beside)
    return "buffer (known name)" if is_known else ""


def _teacher_dtype(name: str, student_dtype: DType, wanted: str) -> DType:
    dtype = student_dtype
    if wanted != "student" and student_dtype.is_floating_point:
        dtype = BY_NAME[wanted]
    if wanted == "float32" and student_dtype.name == "complex128":
        dtype = BY_NAME["complex64"]
    if dtype.code is None:
        raise CkptEmaError(
            f"`{name}` is {dtype}, which a safetensors file cannot hold",
            hint="pass `--dtype float32` to write complex64" if dtype.name == "complex128" else None,
        )
    return dtype


class _Difference(NamedTuple):
    """What of a tensor is another in the next checkpoint."""

    name: str
    what: str
    precision: tuple[DType, DType] | None = None
    """Where nothing but that changed: the dtypes, of one kind."""


class _Pair(NamedTuple):
    """Two neighbours, by their labels."""

    label: str
    next_label: str
    differences: Sequence[_Difference]
    is_continued: bool = False
    """Whether the first is a teacher that the fold goes on from."""


def _check_agreement(pairs: Sequence[_Pair], steps: Mapping[str, int | None], *, may_change: bool) -> None:
    """Raise CkptEmaError with every difference; another precision is none where it `may_change`."""
    pairs = [
        pair._replace(differences=found)
        for pair in pairs
        if (found := [each for each in pair.differences if not (may_change and each.precision)])
    ]
    if not pairs:
        return
    first = f"`{pairs[0].label}` and `{pairs[0].next_label}` differ in {counted(len(pairs[0].differences), 'tensor')}"
    more = "" if len(pairs) == 1 else f", and {counted(len(pairs) - 1, 'later pair')} of checkpoints as well"
    lines = [
        f"{name}: {what}" if len(pairs) == 1 else f"{label} to {next_label}: {name}: {what}"
        for label, next_label, differences, _ in pairs
        for name, what, _ in differences
    ]
    newest = pairs[-1].next_label
    begin = f"pass `--from {steps[newest]}`" if steps.get(newest) is not None else f"begin with `{newest}`"
    hint = f"fold only checkpoints that agree: {begin} to fold the later ones, or `--exclude` some by name"
    if all(each.precision for pair in pairs for each in pair.differences):
        # A teacher that is continued is in the earlier precision, whatever is left out of what follows it.
        later = "" if pairs[0].is_continued else f", or {begin.removeprefix('pass ')} to fold the later ones"
        hint = f"pass `--dtype float32` to fold both precisions{later}"
    raise CkptEmaError(f"{first}{more}", details=lines, hint=hint)


def _changes_by_name(pairs: Sequence[_Pair]) -> dict[str, tuple[PrecisionChange, ...]]:
    changes: dict[str, tuple[PrecisionChange, ...]] = {}
    for label, next_label, differences, is_continued in pairs:
        when = f"since `{label}` was begun" if is_continued else f"at `{next_label}`"
        for name, _, precision in differences:
            if precision is not None:
                changes[name] = (*changes.get(name, ()), PrecisionChange(*precision, when))
    return changes


def _compared(one: tuple[str, Layout], other: tuple[str, Layout]) -> _Pair:
    (label, layout), (next_label, next_layout) = one, other
    return _Pair(label, next_label, list(_differences(layout.schema, next_layout.schema, label, next_label)))


def _differences_from(earlier: Mapping[str, DType], schema: Schema) -> Iterator[_Difference]:
    """Changes of precision since students of which no more is known than some dtypes."""
    for name, dtype in zip(schema.names, schema.dtypes, strict=True) if earlier else ():
        if (before := earlier.get(name, dtype)) != dtype and before.kind == dtype.kind != "integer":
            yield _difference_of_dtypes(name, before, dtype)


def _differences(one: Schema, other: Schema, label: str, next_label: str) -> Iterator[_Difference]:
    # Strides are no difference: the elements are the same in any memory order.
    if one is other or (one.names, one.dtypes, one.shapes) == (other.names, other.dtypes, other.shapes):
        return
    left = dict(zip(one.names, zip(one.shapes, one.dtypes, strict=True), strict=True))
    right = dict(zip(other.names, zip(other.shapes, other.dtypes, strict=True), strict=True))
    for name in sorted(left.keys() | right.keys()):
        if name not in right:
            yield _Difference(name, f"missing in `{next_label}`")
        elif name not in left:
            yield _Difference(name, f"missing in `{label}`")
        elif left[name][0] != right[name][0]:
            yield _Difference(name, f"shape {list(left[name][0])} became {list(right[name][0])}")
        elif left[name][1] != right[name][1]:
            yield _difference_of_dtypes(name, left[name][1], right[name][1])


def _difference_of_dtypes(name: str, before: DType, after: DType) -> _Difference:
    is_precision = before.kind == after.kind != "integer"
    return _Difference(name, f"{before} became {after}", (before, after) if is_precision else None)
