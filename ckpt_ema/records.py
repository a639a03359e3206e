"""What a fold is asked for, plans and reports: the records between the library and its callers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ckpt_ema.blocks import Accumulate, BlockPlan
from ckpt_ema.catalogue import TeacherTensor
from ckpt_ema.errors import MisuseError
from ckpt_ema.layouts import Layout
from ckpt_ema.profiles import Update, check_momentum
from ckpt_ema.runs import Checkpoint
from ckpt_ema.sizes import DEFAULT_MEMORY_BUDGET_BYTES
from ckpt_ema.students import check_prefix
from ckpt_ema.timings import Timings

RULE = "teacher = (1 - momentum) * teacher + momentum * student"
PathLike = str | os.PathLike[str]


_OPTIONAL_INTEGER = (int, type(None))
_OPTIONAL_TEXT = (str, type(None))
_TYPES: dict[str, tuple[type, ...]] = {
    "interval": (int,),
    "from_step": _OPTIONAL_INTEGER,
    "until_step": _OPTIONAL_INTEGER,
    "last": _OPTIONAL_INTEGER,
    "num_threads": _OPTIONAL_INTEGER,
    "memory_budget_bytes": (int,),
    "model": _OPTIONAL_TEXT,
    "state": _OPTIONAL_TEXT,
    "prefix": _OPTIONAL_TEXT,
    "device": (str,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldOptions:
    """What a fold can be asked for; the defaults are MeanTeacherHook's."""

    momentum: float | Sequence[float] = 0.001
    """Share that each new student brings, 0 < momentum < 1; several make as many teachers from one pass."""

    interval: int = 1
    """Fold every interval-th checkpoint, the hook's interval."""

    skip_buffers: bool = True
    """Average parameters only; otherwise every floating-point tensor."""

    buffers: tuple[str, ...] = ()
    """Patterns of tensor names that are buffers."""

    model: str | None = None
    """`MODULE:FACTORY` of the student, built on the meta device to learn its buffers exactly."""

    init: PathLike | None = None
    """Teacher to start from; the first checkpoint otherwise."""

    from_step: int | None = None
    until_step: int | None = None
    last: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    """Which checkpoints: by step (both ends included), the newest only, or by name."""

    state: str | None = None
    """Dotted path of the state dict inside each checkpoint; found by itself otherwise."""

    prefix: str | None = None
    """Sub-model to fold, its prefix stripped from the names."""

    accumulate: Accumulate = "float32"
    """Dtype of the running teacher: never narrower than the student's, unless `student` is asked for."""

    dtype: Literal["student", "float32", "bfloat16", "float16"] = "student"
    """Dtype of the written teacher's floating-point tensors."""

    device: str = "auto"
    """`auto`, `cpu` or `cuda[:i]`."""

    memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES
    """For all buffers together."""

    num_threads: int | None = None
    """Reading and folding threads; as many as there are processors, at most 16, otherwise."""

    overwrite: bool = False
    """Replace an existing teacher."""

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "buffers"):
            patterns = getattr(self, name)
            if isinstance(patterns, str):  # its characters would be patterns, and `*` matches everything
                raise MisuseError(
                    f"`{name}` is a text, and must be a list of patterns", hint=f"pass `{name}=[{patterns!r}]`"
                )
            object.__setattr__(self, name, tuple(patterns))
        for name, kinds in _TYPES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise MisuseError(f"`{name}` is {value!r}, a {type(value).__name__}")
        object.__setattr__(self, "momentum", _as_momenta(self.momentum))
        check_prefix(self.prefix)
        for name in ("interval", "last", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MisuseError(f"`--{name.replace('num_', '')}` is {value}, and must be 1 or more")
        if self.from_step is not None and self.until_step is not None and self.from_step > self.until_step:
            raise MisuseError(f"`--from {self.from_step}` lies behind `--until {self.until_step}`")
        for name, choices in (
            ("accumulate", ("float32", "float64", "student")),
            ("dtype", ("student", "float32", "bfloat16", "float16")),
        ):
            if getattr(self, name) not in choices:
                raise MisuseError(f"`{name}` is {getattr(self, name)!r}, and must be one of {', '.join(choices)}")

    @property
    def momenta(self) -> tuple[float, ...]:
        """One per teacher, in the order given."""
        return (self.momentum,) if isinstance(self.momentum, float) else tuple(self.momentum)


def _as_momenta(given: object) -> float | tuple[float, ...]:
    """A momentum as a float, several as a tuple of them; raises MisuseError for anything else."""
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes)):
        momenta = tuple(_as_momentum(momentum) for momentum in given)
        if not momenta:
            raise MisuseError("`momentum` is an empty list", hint="pass for example `momentum=[0.1, 0.3]`")
        if len(set(momenta)) < len(momenta):
            raise MisuseError(f"`--momentum {max(momenta, key=momenta.count)}` is given twice")
        return momenta
    return _as_momentum(given)


def _as_momentum(given: object) -> float:
    if isinstance(given, bool) or not isinstance(given, (float, int)):
        raise MisuseError(f"`momentum` is {given!r}, a {type(given).__name__}")
    check_momentum(given)
    return float(given)


@dataclass(frozen=True, slots=True)
class FoldedCheckpoint:
    """One student's part in the teachers."""

    name: str
    step: int | None
    unit: str
    """What `step` counts: step, epoch, or a bare number."""

    coefficients: tuple[float, ...]
    """Its share in each teacher."""

    size: int
    """Bytes on disk of the files that hold it."""

    state_key: str
    format: str

    @property
    def coefficient(self) -> float:
        """Its share in the only teacher, or in the first of several."""
        return self.coefficients[0]


@dataclass(frozen=True, slots=True)
class PlannedTeacher:
    """One of the teachers that a pass over the checkpoints makes."""

    momentum: float
    output: Path
    """Its file, or its folder for `from_pretrained`."""

    updates: tuple[Update, ...]
    """One per input, the first of which copies."""

    first_share: float
    """Share that the initial teacher, or else the first checkpoint, has in it."""


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """All that a fold is going to do, before it reads a tensor."""

    options: FoldOptions
    teachers: tuple[PlannedTeacher, ...]
    """One per momentum."""

    is_folder: bool
    """Whether each is written as a Hugging Face folder."""

    directory: Path
    checkpoints: tuple[FoldedCheckpoint, ...]
    """Those that take part, oldest first."""

    initial_teacher: str | None
    tensors: tuple[TeacherTensor, ...]
    left_out: tuple[tuple[str, str], ...]
    """Checkpoints and files that do not take part, with the reason."""

    left_out_tensors: tuple[tuple[str, str], ...]
    """Entries of the newest checkpoint that are not folded, with the reason."""

    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    blocks: BlockPlan
    layouts: tuple[Layout, ...]
    newest: Checkpoint

    @property
    def output(self) -> Path:
        """The only teacher, or the first of several."""
        return self.teachers[0].output

    @property
    def output_names(self) -> list[str]:
        """Every teacher's path, as it was asked for."""
        return [str(teacher.output) for teacher in self.teachers]

    @property
    def first_share(self) -> float:
        """Of the only teacher, or of the first of several."""
        return self.teachers[0].first_share

    @property
    def num_averaged(self) -> int:
        """Tensors that are averaged."""
        return sum(tensor.action == "average" for tensor in self.tensors)

    @property
    def num_copied(self) -> int:
        """Tensors that come from the newest checkpoint as they are."""
        return len(self.tensors) - self.num_averaged

    @property
    def copied(self) -> dict[str, list[TeacherTensor]]:
        """The copied tensors by the reason why."""
        by_reason: dict[str, list[TeacherTensor]] = {}
        for tensor in self.tensors:
            if tensor.action == "copy":
                by_reason.setdefault(tensor.reason, []).append(tensor)
        return by_reason

    @property
    def bytes_to_read(self) -> int:
        """Tensor bytes read in all."""
        return self.blocks.bytes_to_read

    @property
    def bytes_to_write(self) -> int:
        """Size of all teachers' tensors."""
        return self.blocks.data_bytes * len(self.teachers)

    @property
    def buffer_bytes(self) -> int:
        """Memory for buffers, whatever the size of the model."""
        return self.blocks.buffer_bytes


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What a fold has done."""

    plan: FoldPlan
    device: str
    """`cpu`, or `cuda:0`."""

    device_reason: str
    """Why it."""

    seconds: float
    """From the first byte read to the committed files."""

    timings: Timings
    """Where these seconds went."""

    @property
    def output(self) -> Path:
        """The only teacher, or the first of several: a file, or a folder for `from_pretrained`."""
        return self.plan.output

    @property
    def gigabytes_per_second(self) -> float:
        """Tensor bytes read per second, in 1e9."""
        return self.plan.bytes_to_read / max(self.seconds, 1e-9) / 1e9
