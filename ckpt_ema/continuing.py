"""Going on from a teacher: its file in, what it was made of and what a run has beyond that out."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckpt_ema.catalogue import ASKED_FOR
from ckpt_ema.dtypes import DType
from ckpt_ema.errors import CkptEmaError, MisuseError, NoCheckpointError
from ckpt_ema.formats import Contents, read_contents
from ckpt_ema.formats.folder import SERIES_NAME, has_weights, is_sharded
from ckpt_ema.locations import as_path
from ckpt_ema.options import FoldOptions
from ckpt_ema.runs.candidates import has_series_name
from ckpt_ema.runs.checkpoints import Checkpoint
from ckpt_ema.runs.state_dicts import is_flat
from ckpt_ema.runs.steps import Unit, steps_in_name, steps_inside
from ckpt_ema.runs.students import choose_student
from ckpt_ema.sizes import counted
from ckpt_ema.teacher_record import RULE_KEYS, SELECTION, PastCheckpoint, TeacherRecord, printable, read_record


@dataclass(frozen=True, slots=True)
class Newer:
    """What of a run is to be folded into a teacher."""

    checkpoints: list[Checkpoint]
    anchor: Checkpoint | None
    """The newest one of the teacher itself, where it is still there."""

    left_out: list[tuple[str, str]]
    """Names of what is not folded, each with the reason."""

    warnings: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Inherited:
    """How a teacher is continued."""

    options: FoldOptions
    notes: list[str]
    warnings: list[str]
    clashing: list[str]
    """Names of options that say something else than the teacher does of itself."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """The teacher that a fold starts from."""

    path: Path
    record: TeacherRecord
    """What it says of itself."""

    dtypes: Mapping[str, DType] = field(default_factory=dict)
    """Those of its floating-point and complex tensors."""

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

    def inside_of(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Those that are in it, as far as it says."""
        known = {(past.name, past.unit, past.step) for past in self.past}
        # What counts in a run may change with what comes to lie there: then it is the same file by name and size.
        files = {(past.name, past.size): past.unit for past in self.past}
        return [
            item
            for item in checkpoints
            if _key(item) in known or files.get((printable(item.label), item.size), item.unit) != item.unit
        ]

    def changed_of(self, checkpoints: Sequence[Checkpoint]) -> list[str]:
        """A warning where checkpoints of the teacher have another size than when it was folded."""
        sizes = {(past.name, past.unit, past.step): past.size for past in self.past}
        changed = [item for item in checkpoints if sizes.get(_key(item), item.size) != item.size]
        if not changed:
            return []
        first = changed[0]
        return [
            f"{len(changed)} of the checkpoints in `{self.label}` were written again since: `{first.label}` has"
            f" {first.size} bytes, and had {sizes[_key(first)]}"
        ]

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
    def knows_origin(self) -> bool:
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

    def inherit(self, options: FoldOptions) -> Inherited:
        """`options`, with how the teacher was made and of what where they say nothing of it.

        Raises MisuseError or CkptEmaError where that cannot be continued.
        """
        if unreadable := [name for name in self.record.unreadable if name in RULE_KEYS]:
            raise CkptEmaError(f"`{self.path}` says of itself what cannot be: {self.record.shown(unreadable[0])}")
        selected, warnings, clashing = self._select_for(options)
        found, notes, more, is_other_rule = self._options_for(selected)
        if is_other_rule:
            clashing += [name for name in ("momentum", "half_life", "per") if getattr(options, name) is not None]
        return Inherited(found, notes, [*warnings, *more], clashing)

    def _select_for(self, options: FoldOptions) -> tuple[FoldOptions, list[str], list[str]]:
        """`options`, with what of each checkpoint is the student; warnings; the options that these are about."""
        if self.record.selection is None:
            return options, [], []
        made: dict[str, Any] = dict(self.record.selection)
        # What was found without being asked for is the same when it is asked for.
        found: dict[str, Sequence[str | None]] = {"state": [self.record.state], "prefix": self.record.stripped}
        warnings, clashing = [], []
        for name in SELECTION:
            asked, before = getattr(options, name), made.pop(name, None)
            if asked is None and before is not None:
                made[name] = before
            elif asked is not None and not any(each in (asked, f"{asked}.") for each in (before, *found[name])):
                how = "without" if before is None else f"with `--{name} {before}`, not"
                warnings.append(f"`{self.label}` was made {how} `--{name} {asked}`")
                clashing.append(name)
        try:
            return replace(options, **made), warnings, clashing
        except MisuseError as error:
            raise self._impossible(error) from None

    def _impossible(self, error: MisuseError) -> CkptEmaError:
        return CkptEmaError(f"`{self.path}` says of itself what cannot be: {error.message}")

    def _options_for(self, options: FoldOptions) -> tuple[FoldOptions, list[str], list[str], bool]:
        """`options`, with how the teacher was made where they say nothing of it; notes, and warnings.

        Last, whether they ask for another rule.
        """
        record = self.record
        # An online teacher is updated once every `interval` steps, too.
        per = "step" if record.is_online else record.per
        is_asked = options.momentum is not None or options.half_life is not None or options.per not in (None, per)
        if not record.is_online and (record.made is None or record.profile != "ema"):
            if record.profile == "ema" or is_asked:
                return options, [], [], False
            what = f"`{self.label}` is of profile {record.profile}"
            return options, [], [f"{what}, and continues as an exponential moving average"], False
        if record.is_online and record.step is None and not is_asked:
            raise MisuseError(
                f"`{self.label}` does not say of which step it is, so what is newer cannot be told",
                hint="say what to fold, and with which momentum per checkpoint: `--from STEP --momentum M`; what"
                " `teacher.save(path, step=STEP)` writes knows its step",
            )
        if record.is_online and not record.has_begun and not is_asked:
            raise CkptEmaError(
                f"`{self.label}` is of before its first update, which copies the student",
                hint="fold the checkpoints after that, without `--init`",
            )
        given = {"momentum": record.momentum, "half_life": record.half_life}
        made: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        warnings = []
        if record.skip_buffers is not options.skip_buffers:
            flag = "--no-skip-buffers" if options.skip_buffers else "--skip-buffers"
            warnings.append(f"`{self.label}` was made with `{flag}`, and continues without")
        options = self._with_treatment(options)
        counting: dict[str, Any] = {"per": per, "interval": record.interval}
        if per == "step":
            counting |= {"between": record.between, "steps_per_epoch": record.steps_per_epoch}
        if is_asked:
            asked = {name: getattr(options, name) for name in ("momentum", "half_life")}
            is_other = any(asked[name] not in (None, value) for name, value in made.items())
            is_other = is_other or options.per_step != (per == "step")
            if is_other:
                warnings.append(f"`{self.label}` was made with {_told(made, counting)}, and continues by another rule")
            return options, [], warnings, is_other
        for name, default in (("interval", 1), ("between", None), ("steps_per_epoch", None)):
            if getattr(options, name) != default:
                counting[name] = getattr(options, name)
        try:
            inherited = replace(options, **made, **counting)
        except MisuseError as error:
            raise self._impossible(error) from None
        written = "" if inherited.dtype == "student" else f", in {inherited.dtype}"
        return inherited, [f"continues as `{self.label}` was made: {_told(made, counting)}{written}"], warnings, False

    def _with_treatment(self, options: FoldOptions) -> FoldOptions:
        """`options`, with what was copied on request and how wide it was made where they say nothing of that."""
        if not options.buffers:
            options = replace(options, buffers=tuple(map(glob.escape, self.record.copied.get(ASKED_FOR, ()))))
        if options.accumulate == "float32" and self.record.accumulate is not None:
            options = replace(options, accumulate=self.record.accumulate)
        if options.dtype == "student":
            # A teacher that followed training is wider than 16-bit students, and says nothing of that.
            floats = {dtype.name for dtype in self.dtypes.values() if dtype.is_floating_point}
            is_wide = self.record.is_online and floats == {"float32"}
            options = replace(options, dtype="float32" if is_wide else self.record.asked_dtype or "student")
        return options

    def newer_of(self, checkpoints: Sequence[Checkpoint], *, is_told: bool = False) -> Newer:
        """What to fold of a run.

        `is_told` says that somebody chose from which step on; that counts where the teacher lists no checkpoints.
        Raises CkptEmaError where nothing is left.
        """
        own = None if is_told else self.record.step
        per_epoch = self.record.steps_per_epoch
        factors = {"step": 1, "number": per_epoch or 1} | ({} if per_epoch is None else {"epoch": per_epoch})
        steps = [
            (item.step * factors[item.unit], item)
            for item in checkpoints
            if item.step is not None and item.unit in factors
        ]
        if own is not None and len(steps) == len(checkpoints):
            newer = [item for step, item in steps if step > own]
            older = [item for step, item in steps if step <= own]
            anchor = next((item for step, item in steps if step == own), None)
            return Newer(self._some(newer), anchor, [(item.label, f"not newer than `{self.label}`") for item in older])
        by_name = None if is_told else self._newer_by_name(checkpoints)
        if by_name is not None:
            return by_name
        inside = {id(item) for item in self.inside_of(checkpoints)}
        last = self.past[-1] if self.past else None
        is_unknown = any(item.step is None or last is None or item.unit != last.unit for item in checkpoints)
        if last is None or last.step is None or is_unknown:
            left_out = [(item.label, f"`{self.label}` has it") for item in checkpoints if id(item) in inside]
            newer = self._some([item for item in checkpoints if id(item) not in inside])
            unknown = f"`{self.label}` does not say which of these checkpoints it has"
            all_of_them = f"all {len(newer)} are folded, even those (`--from STEP` leaves older ones out)"
            warnings = [] if self.past or is_told else [f"{unknown}: {all_of_them}"]
            return Newer(newer, None, left_out, warnings)
        # A list may have been out of order; but a reconstruction of an earlier step takes later students as well.
        old = inside if self.record.made == "fold" else set()
        beyond = [
            item for item in checkpoints if item.step is not None and item.step > last.step and id(item) not in old
        ]
        if not inside and len(beyond) < len(checkpoints):
            text = f"no checkpoint is in `{self.label}`, which is of {last.unit} {last.step}: it is of another run"
            return Newer(list(checkpoints), None, [], [text])
        taken = {id(item) for item in beyond}
        left_out = [
            (item.label, f"`{self.label}` has it" if id(item) in inside else f"older than `{self.label}`")
            for item in checkpoints
            if id(item) not in taken
        ]
        same = (item for item in checkpoints if item.step == last.step and id(item) in inside)
        anchor = next((item for item in same if item.size == last.size), None)
        return Newer(self._some(beyond), anchor, left_out)

    def _number_of(self, unit: Unit) -> int | None:
        """Its step, or epoch, by its contents or its name; a bare number counts what the run does."""
        return self.numbers.get(unit, self.numbers.get("number"))

    def _newer_by_name(self, checkpoints: Sequence[Checkpoint]) -> Newer | None:
        """What to fold where nothing but the teacher's own contents or name tell its step; None where they do not."""
        own = self._number_of(checkpoints[0].unit)
        if own is None or any(item.step is None or item.unit != checkpoints[0].unit for item in checkpoints):
            return None
        claim = f"of {checkpoints[0].unit} {own} by its contents or its name"
        newer = [item for item in checkpoints if (item.step or 0) > own]
        if not newer:
            raise NoCheckpointError(
                f"nothing is newer than `{self.label}`, which is {claim}",
                hint="where it is of another step, say what is newer: `--from STEP`",
            )
        left_out = [(item.label, f"not newer than `{self.label}`") for item in checkpoints if (item.step or 0) <= own]
        text = f"`{self.label}` is taken to be {claim}, and {counted(len(left_out), 'checkpoint')} to be in it"
        return Newer(newer, None, left_out, [f"{text}; `--from STEP` says otherwise"])

    def _some(self, checkpoints: list[Checkpoint]) -> list[Checkpoint]:
        if checkpoints:
            return checkpoints
        unit, step = self.last
        if not self.past:
            raise NoCheckpointError(
                f"nothing is newer than `{self.label}`, which is of step {step}",
                hint="train on, then fold again; where it is another run's, pass `--from 0 --momentum M`",
            )
        known = "" if step is None else f", up to {unit} {step}"
        raise NoCheckpointError(
            f"nothing is newer than `{self.label}`: it has every checkpoint{known}", hint="train on, then fold again"
        )


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
    tensors = contents.tree if is_flat(contents) else choose_student(contents).tensors if record.tool else {}
    dtypes = {str(name): tensor.dtype for name, tensor in tensors.items() if tensor.dtype.kind != "integer"}
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


def _key(item: Checkpoint) -> tuple[str, Unit, int | None]:
    """What a record knows a checkpoint by."""
    return printable(item.label), item.unit, item.step


def _told(made: Mapping[str, Any], counting: Mapping[str, Any]) -> str:
    told = ", ".join(f"{name.replace('_', '-')} {value:g}" for name, value in made.items() if isinstance(value, float))
    interval = counting.get("interval")
    return f"{told} per {counting.get('per')}{f', interval {interval}' if interval not in (None, 1) else ''}"
