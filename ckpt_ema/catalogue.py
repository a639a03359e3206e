"""The tensors all students share: layouts in, one entry per tensor with its treatment out, or every disagreement."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True, slots=True)
class TeacherTensor:
    """One tensor of the teacher."""

    name: str
    shape: tuple[int, ...]
    student_dtype: DType
    dtype: DType
    """Of the written teacher."""

    action: Literal["average", "copy"]
    reason: str
    """Why it is copied; "" for an averaged one."""

    index: int
    """Its place in every layout's schema."""


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
) -> list[TeacherTensor]:
    """One entry per tensor, sorted by name.

    `layouts` are the students' by label, `steps` theirs for hints; `known_buffers` what the newest checkpoint
    itself records. Raises CkptEmaError with every difference when the students disagree on names, shapes or dtypes,
    when a `--buffer` pattern matches nothing, and for a tensor that safetensors cannot hold.
    """
    _check_agreement(layouts, steps or {})
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
        tensors.append(TeacherTensor(name, schema.shapes[index], student_dtype, dtype, action, reason, index))
    return tensors


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


def _check_agreement(layouts: Sequence[tuple[str, Layout]], steps: Mapping[str, int | None]) -> None:
    """Raise CkptEmaError with every difference between neighbours in `layouts`."""
    differences: list[list[str]] = []
    pairs: list[tuple[str, str]] = []
    for (label, layout), (next_label, next_layout) in itertools.pairwise(layouts):
        found = _differences(layout.schema, next_layout.schema, label, next_label)
        if found:
            differences.append(found)
            pairs.append((label, next_label))
    if not pairs:
        return
    first = f"`{pairs[0][0]}` and `{pairs[0][1]}` differ in {counted(len(differences[0]), 'tensor')}"
    more = "" if len(pairs) == 1 else f", and {counted(len(pairs) - 1, 'later pair')} of checkpoints as well"
    lines = [
        line if len(pairs) == 1 else f"{label} to {next_label}: {line}"
        for (label, next_label), found in zip(pairs, differences, strict=True)
        for line in found
    ]
    newest = pairs[-1][1]
    begin = f"pass `--from {steps[newest]}`" if steps.get(newest) is not None else f"begin with `{newest}`"
    raise CkptEmaError(
        f"{first}{more}",
        details=lines,
        hint=f"fold only checkpoints that agree: {begin} to fold the later ones, or `--exclude` some by name",
    )


def _differences(one: Schema, other: Schema, label: str, next_label: str) -> list[str]:
    # Strides are no difference: the elements are the same in any memory order.
    if one is other or (one.names, one.dtypes, one.shapes) == (other.names, other.dtypes, other.shapes):
        return []
    left = dict(zip(one.names, zip(one.shapes, one.dtypes, strict=True), strict=True))
    right = dict(zip(other.names, zip(other.shapes, other.dtypes, strict=True), strict=True))
    lines = []
    for name in sorted(left.keys() | right.keys()):
        if name not in right:
            lines.append(f"{name}: missing in `{next_label}`")
        elif name not in left:
            lines.append(f"{name}: missing in `{label}`")
        elif left[name][0] != right[name][0]:
            lines.append(f"{name}: shape {list(left[name][0])} became {list(right[name][0])}")
        elif left[name][1] != right[name][1]:
            lines.append(f"{name}: {left[name][1]} became {right[name][1]}")
    return lines
