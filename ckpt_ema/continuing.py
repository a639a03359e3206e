"""The teacher that a fold starts from: its file in, what it is and what it was made of out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt_ema.dtypes import DType
from ckpt_ema.errors import MisuseError
from ckpt_ema.formats import Contents, read_contents
from ckpt_ema.formats.folder import SERIES_NAME, has_weights, is_sharded
from ckpt_ema.locations import as_path
from ckpt_ema.options import FoldOptions
from ckpt_ema.runs.candidates import has_series_name
from ckpt_ema.runs.steps import Unit, steps_in_name, steps_inside
from ckpt_ema.runs.students import tensors_of_teacher
from ckpt_ema.teacher_record import PastCheckpoint, TeacherRecord, read_record


@dataclass(frozen=True, slots=True)
class Beginning:
    """The teacher that a fold starts from."""

    path: Path
    record: TeacherRecord
    """What it says of itself."""

    dtypes: Mapping[str, DType] = field(default_factory=dict)
    """Those of its floating-point and complex tensors, where it has a record."""

    numbers: Mapping[Unit, int] = field(default_factory=dict)
    """What its contents and its name say of its step, by what they count, where it has no record."""

    @property
    def label(self) -> str:
        """Its name, for people."""
        return self.path.name

    @property
    def past(self) -> tuple[PastCheckpoint, ...]:
        """The checkpoints in it, oldest first, where it was folded or reconstructed."""
        return self.record.checkpoints

    @property
    def student_dtypes(self) -> Mapping[str, DType]:
        """Of tensors, the dtype that its students had, where it is written in that or says so."""
        return self.dtypes if self.record.asked_dtype == "student" else self.record.student_dtypes

    @property
    def rules(self) -> tuple[Mapping[str, Any], ...]:
        """How it was made, oldest first; one for each change of the rule."""
        return (*self.record.earlier_rules, self.record.own_rule) if self.past else ()

    @property
    def last(self) -> tuple[str, int | None]:
        """Unit and number of its newest checkpoint, or its own step where it lists none; None where that is unknown."""
        if self.past and self.record.made != "reconstruct":
            return self.past[-1].unit, self.past[-1].step
        if self.numbers:
            return next(iter(self.numbers.items()))
        return "step", self.record.step

    def training_step(self, options: FoldOptions) -> int:
        """The training step it is of; raises MisuseError where it does not say."""
        if self.record.step is not None:
            return self.record.step
        per_epoch = options.steps_per_epoch
        known: list[tuple[Unit, int | None]] = [(past.unit, past.step) for past in self.past[-1:]]
        if options.from_step is None:
            known = [*self.numbers.items(), *known]
        for unit, number in known:
            factor = {"step": 1, "number": per_epoch or 1, "epoch": per_epoch}.get(unit)
            if number is not None and factor:
                return number * factor
        raise MisuseError(
            f"`{self.path}` does not say of which step it is, so the gap to the first checkpoint is unknown",
            hint="count checkpoints instead: `--momentum M` without `--per step` and `--half-life`",
        )

    @property
    def counts_from_first(self) -> bool:
        """Whether an interval counts from its first checkpoint, so that whoever goes on need not say from where."""
        return bool(self.past) and self.record.origin is None and self.record.made != "reconstruct"

    def first_step(self, options: FoldOptions) -> int | None:
        """The training step from which an interval counts, mostly that of its first checkpoint; None if not known."""
        record = self.record
        if record.origin is not None:
            return record.origin
        if record.made == "reconstruct":
            return record.start
        if record.is_online and record.step is not None and record.num_steps is not None:
            return (record.step - record.num_steps) % record.interval
        if not self.past or self.past[0].step is None:
            return None
        return self.past[0].step * (1 if self.past[0].unit == "step" else options.steps_per_epoch or 1)


def read_beginning(options: FoldOptions) -> Beginning | None:
    """The teacher that `options` start from, if any; raises MisuseError where it is not there."""
    if options.init is None:
        return None
    path = as_path(options.init)
    if not path.exists():
        raise MisuseError(f"`{path}` does not exist", hint="pass a teacher that an earlier fold wrote with `--init`")
    if path.is_dir() and not has_weights(path) and not is_sharded(path):
        raise MisuseError(f"`{path}` is no teacher", hint="pass the file or the folder that an earlier fold wrote")
    contents = read_contents(path)
    record = read_record(contents.metadata)
    tensors = {} if record.table is None else tensors_of_teacher(contents)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype.kind != "integer"}
    return Beginning(path, record, dtypes, _numbers_of(contents) if record.tool is None else {})


def _numbers_of(contents: Contents) -> dict[Unit, int]:
    """The step of a teacher without a record, by its contents, its name or its checkpoint (`checkpoint-300/teacher/`).

    Steps first. A bare number counts only in names such as `checkpoint-300`: the 50 of `resnet50` is no step.
    """
    path = contents.path.absolute()
    places = [path, *(folder for folder in (path.parent, path.parent.parent) if SERIES_NAME.match(folder.name))]
    found = {unit: number for (_, unit), number in steps_inside(contents).items()}
    for place in places:
        numbers = {unit: number for (_, unit), number in steps_in_name(place.name).items()}
        if numbers and ("number" not in numbers or has_series_name(place)):
            found = {**numbers, **found}
            break
    order: tuple[Unit, ...] = ("step", "epoch", "date", "number")
    return {unit: found[unit] for unit in order if unit in found}
