"""The tensors all students share: layouts in, one entry per tensor with its treatment out, or every disagreement."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ckpt_ema.agreement import EarlierStudents, PrecisionChange, precision_changes
from ckpt_ema.dtypes import BY_NAME, DType, WrittenDtype
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.layouts import Layout

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
        if not self.changes:  # asked of each of many thousand tensors
            return (self.student_dtype,)
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

    may_be_widened: bool = True
    """Whether a tensor may be computed in another dtype than its students': not with `--accumulate student`."""


def build_catalogue(
    layouts: Sequence[tuple[str, Layout]],
    treatment: Treatment,
    *,
    known_buffers: Collection[str] | None = None,
    steps: Mapping[str, int | None] | None = None,
    earlier: EarlierStudents | None = None,
) -> list[TeacherTensor]:
    """One entry per tensor, sorted by name.

    `layouts` are the students' by label, `steps` theirs for hints; `known_buffers` what the newest checkpoint
    itself records; `earlier` what is known of the students of a teacher that is continued.
    Raises CkptEmaError with every difference when the students disagree on names, shapes or dtypes (on precision only
    where the teacher's dtype shall be theirs), when a `--buffer` pattern matches nothing, and for a tensor that
    safetensors cannot hold.
    """
    changes = precision_changes(
        layouts,
        earlier=earlier,
        steps=steps or {},
        are_allowed=treatment.dtype != "student",
        may_be_widened=treatment.may_be_widened,
    )
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
