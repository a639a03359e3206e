"""What a fold is going to do: a run and options in, a FoldPlan out; byte ranges only, no tensor is read.

run -> checkpoints -> coefficients -> catalogue -> blocks
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ckpt_ema.averages.profiles import (
    Profile,
    coefficients_of,
    inverted_momentum_warning,
    momentum_for_first_share,
    step_updates,
)
from ckpt_ema.averages.responses import half_life_of
from ckpt_ema.blocks import accumulate_dtype, plan_blocks
from ckpt_ema.byte_ranges import TensorRange
from ckpt_ema.catalogue import TeacherTensor, Treatment, build_catalogue, precision_notes
from ckpt_ema.coefficients import Weighed, check_numbers_are_steps, weigh
from ckpt_ema.continuing import Beginning, read_beginning
from ckpt_ema.dtypes import DType, is_rounded
from ckpt_ema.errors import CkptEmaError, MisuseError, NoCheckpointError, NoUpdateError, quoted
from ckpt_ema.formats import read_contents
from ckpt_ema.inheriting import inherit
from ckpt_ema.layouts import Layout, SchemaPool, compact_layout
from ckpt_ema.locations import as_path
from ckpt_ema.model_buffers import read_model_buffers
from ckpt_ema.options import FoldOptions, PathLike, ReconstructOptions
from ckpt_ema.output.targets import resolve_outputs
from ckpt_ema.plans import FoldedCheckpoint, FoldPlan, PlannedTeacher
from ckpt_ema.runs.checkpoints import Checkpoint, Run
from ckpt_ema.runs.find import find_checkpoints
from ckpt_ema.runs.selection import Selection
from ckpt_ema.runs.state_dicts import is_flat
from ckpt_ema.runs.steps import is_copy_name, numbers_in_name
from ckpt_ema.runs.students import NUMPY_ARRAY, choose_student
from ckpt_ema.sizes import counted
from ckpt_ema.teacher_record import printable, read_record

LARGEST_NEWEST_SHARE = 0.9
"""Of a teacher by steps; what is nearly its newest checkpoint is no average."""

ROUNDED = "was rounded to"
"""In the warning of what a teacher that is continued has lost."""


def plan_fold(run: PathLike | Sequence[PathLike], output: PathLike | None, wanted: FoldOptions) -> FoldPlan:
    """Plan the fold of a run, or of checkpoints in the order given; raises CkptEmaError where it cannot be."""
    beginning = read_beginning(wanted)
    if beginning is None:
        found = find_run(run, wanted)
        check_numbers_are_steps(found.checkpoints, wanted)
        return plan_weighed(found, weigh(found.checkpoints, wanted), output, wanted)
    has_rule = wanted.momentum is not None or wanted.half_life is not None
    inherited = inherit(beginning, wanted)
    wanted = inherited.options
    found = find_run(run, wanted)
    check_numbers_are_steps(found.checkpoints, wanted, beginning.past, is_inherited=not has_rule)
    weighed = _weigh_newer(found, wanted, beginning)
    weighed = replace(
        weighed,
        assumptions=(*weighed.assumptions, *inherited.notes),
        warnings=(*weighed.warnings, *inherited.warnings),
        goes_on=weighed.goes_on or (beginning.record.is_online and bool(inherited.notes)),
    )
    return plan_weighed(found, weighed, output, wanted)


def _weigh_newer(found: Run, wanted: FoldOptions, beginning: Beginning) -> Weighed:
    """`weigh`; raises NoCheckpointError with what options left out where nothing else is newer than the teacher."""
    try:
        return weigh(found.checkpoints, wanted, beginning)
    except NoUpdateError:
        raise
    except NoCheckpointError as error:
        cut_off = _cut_off(found, wanted, beginning)
        if cut_off is None:
            raise
        raise cut_off from error


def _cut_off(found: Run, wanted: FoldOptions, beginning: Beginning) -> NoCheckpointError | None:
    """What to say where `--until`, `--include` or `--exclude` left out what may be newer; None where nothing is."""
    unit, last_step = beginning.last
    if last_step is None:
        return None
    inside = {past.name for past in beginning.past}
    steps = {name: numbers_in_name(name).get(unit) for name, _ in found.left_out if printable(name) not in inside}
    # Where its step was read, what has no number in its name may be newer as well.
    maybe = {name for name, step in steps.items() if step is None or step > last_step}
    late = [name for name, _ in found.left_out if name in maybe and (name, unit) in found.beyond]
    newer = {name for name, step in steps.items() if step is not None and step > last_step and not is_copy_name(name)}
    unselected = [name for name, _ in found.left_out if name in newer and name in found.unselected]
    if late:
        which = f"up to {unit} {wanted.until_step}"
        first = min((step for name in late if (step := steps[name]) is not None), default=None)
        hint = f"pass `--until {first}`, or omit it" if first is not None else "omit `--until`"
    elif unselected:
        given = {"--include": wanted.include, "--exclude": wanted.exclude}
        which = "that is selected"
        hint = f"omit {' and '.join(f'`{name}`' for name, patterns in given.items() if patterns)}"
    else:
        return None
    return NoCheckpointError(
        f"nothing {which} is newer than `{beginning.label}`, which is of {unit} {last_step}",
        details=[f"{name}: {why}" for name, why in found.left_out if name in (late or unselected)],
        hint=hint,
    )


def _as_paths(run: PathLike | Sequence[PathLike]) -> list[Path]:
    given = list(run) if isinstance(run, Iterable) and not isinstance(run, (str, bytes, os.PathLike)) else [run]
    if not given or "" in given:
        raise MisuseError("no run directory and no checkpoint was given", hint="is a variable of your shell empty?")
    return [as_path(path) for path in given]


def find_run(
    run: PathLike | Sequence[PathLike],
    wanted: FoldOptions,
    averages: Sequence[str] | None = None,
    *,
    is_live: bool = False,
    has_steps: bool = False,
    finished: frozenset[str] = frozenset(),
) -> Run:
    """The checkpoints that `wanted` selects; raises CkptEmaError where there are none, but of a run that is live.

    Of such a run `has_steps` says whether checkpoints had a step that are left out or gone; `finished` are the names of
    those that were folded.

    For a reconstruction `averages` are the names of what holds averages; teachers of this tool are found then, too.
    """
    selection = Selection(
        include=tuple(wanted.include),
        exclude=tuple(wanted.exclude),
        from_step=wanted.from_step,
        until_step=wanted.until_step,
        last=wanted.last,
        state=wanted.state,
        prefix=wanted.prefix,
        takes_teachers=averages is not None,
        averages=tuple(averages or ()),
        is_live=is_live,
        has_steps=has_steps,
        finished=finished,
    )
    return find_checkpoints(_as_paths(run), selection)


def plan_weighed(
    found: Run,
    weighed: Weighed,
    output: PathLike | None,
    wanted: FoldOptions,
    *,
    followed: frozenset[str] = frozenset(),
) -> FoldPlan:
    """Plan the one pass that makes every teacher of `weighed`: its averages first, then its checkpoints.

    `followed` are the tensors that an online teacher averaged, where one tells what of a student is a buffer.
    """
    checkpoints = weighed.checkpoints
    newest = checkpoints[-1]
    treatment = Treatment(
        skip_buffers=wanted.skip_buffers,
        buffer_globs=tuple(wanted.buffers),
        model_buffers=read_model_buffers(wanted.model, newest.layout.schema.names) if wanted.model else None,
        dtype=wanted.dtype,
    )
    unfollowed = _unfollowed(newest, followed)
    tensors = build_catalogue(
        [(checkpoint.label, checkpoint.layout) for checkpoint in checkpoints],
        treatment,
        known_buffers=newest.known_buffers if unfollowed is None else unfollowed,
        steps={checkpoint.label: checkpoint.step for checkpoint in checkpoints},
        earlier=(weighed.averages[0].label if weighed.past else "", weighed.student_dtypes),
    )
    pool = SchemaPool()
    layouts = [_average_layout(average.path, tensors, pool, wanted) for average in weighed.averages]
    sizes = [sum(file.size for file in layout.files) for layout in layouts]
    layouts += [checkpoint.layout for checkpoint in checkpoints]
    blocks = plan_blocks(
        tensors,
        layouts,
        accumulate=wanted.accumulate,
        memory_budget_bytes=wanted.memory_budget_bytes,
        num_threads=wanted.num_threads,
        num_teachers=len(weighed.updates),
    )
    is_folder, targets = resolve_outputs(output, found, newest, wanted)
    coefficients = weighed.given or [coefficients_of(updates) for updates in weighed.updates]
    teachers = tuple(
        PlannedTeacher(profile, target, tuple(updates), shares[0])
        for profile, target, updates, shares in zip(
            wanted.profiles, targets, weighed.updates, coefficients, strict=True
        )
    )
    assumptions = (*_differing_states(checkpoints), *precision_notes(tensors), *weighed.assumptions)
    rounding = _rounding_dtypes(weighed, layouts, tensors, wanted)
    by_input = list(zip(*coefficients, strict=True))
    num_averages = len(weighed.averages)
    return FoldPlan(
        options=wanted,
        teachers=teachers,
        is_folder=is_folder,
        directory=found.directory,
        averages=tuple(
            FoldedCheckpoint(item.label, item.step, "step", shares, size, "", "safetensors")
            for item, shares, size in zip(weighed.averages, by_input[:num_averages], sizes, strict=True)
        ),
        checkpoints=tuple(
            FoldedCheckpoint(item.label, item.step, item.unit, shares, item.size, item.state_key, item.format)
            for item, shares in zip(checkpoints, by_input[num_averages:], strict=True)
        ),
        past=weighed.past,
        rules_of_past=weighed.rules,
        parts=weighed.parts + (weighed.is_cut or bool(rounding)),
        rounded_to={**weighed.rounded_to, **{(student.name, stored.name): 1.0 for student, stored, _ in rounding}},
        origin=weighed.origin,
        predictions=weighed.predictions,
        span=weighed.span,
        tensors=tuple(tensors),
        left_out=(*found.left_out, *weighed.left_out),
        left_out_tensors=tuple(newest.left_out.items()),
        notes=(*assumptions, *_notes(checkpoints), *weighed.notes),
        assumptions=assumptions,
        warnings=(
            *found.warnings,
            *found.order_warnings,
            *weighed.warnings,
            *_rounded(weighed, rounding),
            *_treated_otherwise(weighed, tensors),
            *_warnings(checkpoints, teachers, wanted, tensors, goes_on=weighed.goes_on),
        ),
        mended_options=_mended_options(checkpoints, teachers, wanted),
        blocks=blocks,
        layouts=tuple(layouts),
        newest=newest,
    )


def _unfollowed(newest: Checkpoint, followed: frozenset[str]) -> frozenset[str] | None:
    """What a student has beside the tensors that an online teacher averaged; None where that is another model's."""
    names = frozenset(newest.layout.schema.names)
    return names - followed if followed and followed <= names else None


def _average_layout(path: Path, tensors: Sequence[TeacherTensor], pool: SchemaPool, wanted: FoldOptions) -> Layout:
    """The tensors of an average that takes part, an initial teacher or a snapshot, under the students' indices."""
    contents = read_contents(path)
    # A teacher may be one of ours, or a state dict by itself, whose names look like an average's.
    teacher = choose_student(contents, state="" if is_flat(contents) else None)
    missing, differences = [], []
    for tensor in tensors:
        stored = teacher.tensors.get(tensor.name)
        if tensor.action == "copy":
            continue
        if stored is None:
            missing.append(f"{tensor.name}: missing in `{path.name}`")
        elif stored.shape != tensor.shape:
            differences.append(f"{tensor.name}: shape {list(stored.shape)}, the students' is {list(tensor.shape)}")
        elif stored.dtype.kind != tensor.student_dtype.kind:
            differences.append(f"{tensor.name}: {stored.dtype}, the students' is {tensor.student_dtype}")
    averaged = {tensor.name for tensor in tensors}
    averaged |= read_record(contents.metadata).aliases_in(averaged)
    differences += [f"{name}: missing in the students" for name in teacher.tensors if name not in averaged]
    if missing or differences:
        hint = (
            f"leave it out: `--exclude {quoted(glob.escape(path.name))}`; snapshots hold what the online teacher"
            " averaged, mostly parameters alone, under the names of the student that was followed (`--prefix`)"
        )
        if wanted.init is not None:
            hint = "pass a teacher of the same model with `--init`"
        elif not wanted.skip_buffers and not differences:
            hint = "omit `--no-skip-buffers`: these are buffers, which the online teacher did not average"
        raise CkptEmaError(
            f"{counted(len(missing) + len(differences), 'difference')} between the tensors of `{path.name}` and the"
            " students'",
            details=[*missing, *differences],
            hint=hint,
        )
    # Copied tensors come from the newest student; the initial teacher's are never read, and need not exist.
    absent = contents.files[0]
    return compact_layout(
        {
            t.name: teacher.tensors[t.name]
            if t.action == "average"
            else TensorRange(t.student_dtype, t.shape, None, absent, 0, 0)
            for t in tensors
        },
        pool,
    )


def _differing_states(checkpoints: Sequence[Checkpoint]) -> Iterator[str]:
    """Which state dict of which checkpoint is the student, where that is not the same in all."""
    labels: dict[str, list[str]] = {}
    for checkpoint in checkpoints:
        labels.setdefault(checkpoint.state_key, []).append(checkpoint.label)
    if len(labels) > 1:
        places = ((f"`{key}`" if key else "all", names) for key, names in labels.items())
        yield "the student is " + ", ".join(
            f"{what} of " + (f"`{names[0]}`" if len(names) == 1 else counted(len(names), "checkpoint"))
            for what, names in places
        )


def _notes(checkpoints: Sequence[Checkpoint]) -> Iterator[str]:
    newest = checkpoints[-1]
    if newest.state_key and all(checkpoint.state_key == newest.state_key for checkpoint in checkpoints):
        yield f"the student is `{newest.state_key}` of each checkpoint"
    for prefix in newest.stripped:
        yield f"`{prefix}` is taken off the tensor names"


def _warnings(
    checkpoints: Sequence[Checkpoint],
    teachers: Sequence[PlannedTeacher],
    options: FoldOptions,
    tensors: Sequence[TeacherTensor],
    *,
    goes_on: bool,
) -> Iterator[str]:
    if all(tensor.action == "copy" for tensor in tensors):
        yield f"nothing is averaged: all {len(tensors)} tensors are copied from `{checkpoints[-1].label}`"
    yield from _lacking(checkpoints[-1])
    if goes_on:  # what dominates was told when the teacher was begun
        return
    if len(teachers[0].updates) == 1:
        yield f"`{checkpoints[0].label}` alone takes part: the teacher is a copy of it"
        return
    momenta = [teacher.profile.momentum for teacher in teachers if teacher.profile.momentum is not None]
    inverted = inverted_momentum_warning(min(momenta), "`--momentum {:g}`") if momenta else None
    if inverted:
        yield inverted
    if options.per_step and not isinstance(options, ReconstructOptions) and len(checkpoints) > 1:
        yield from _too_fast(checkpoints, teachers, options)
    dominated = _dominated(teachers, options)
    if not dominated:
        return
    if options.init is not None:
        first = f"the initial teacher `{as_path(options.init).name}`"
    else:
        first = f"the first checkpoint `{checkpoints[0].label}`"
    worst = dominated[0]
    keeps = f"{first} keeps {worst.first_share:.1%} of the teacher"
    if len(teachers) > 1:
        shares = ", ".join(f"{teacher.first_share:.1%} ({teacher.profile.title})" for teacher in dominated)
        keeps = f"{first} keeps {shares} of the teacher"
    if options.per_step:
        yield f"{keeps}: {_too_slow(checkpoints, worst, options)}"
        return
    works = f"momentum {worst.momentum:g} works" if len(teachers) == 1 else "momentum works"
    if _mended_options(checkpoints, teachers, options):
        mended = "`--per step` makes it work as in training"
    else:
        mended = f"`--momentum {momentum_for_first_share(len(worst.updates) - 1, 0.1):g}` would leave it 10 %"
    yield f"{keeps}: {works} once per checkpoint here, not once per training step; {mended}"


def _lacking(newest: Checkpoint) -> Iterator[str]:
    """Arrays that may be weights, which the teacher does not have."""
    arrays = [f"`{name}`" for name, reason in newest.left_out.items() if reason == NUMPY_ARRAY]
    if arrays:
        named = ", ".join(arrays[:3]) + (f" and {len(arrays) - 3} more" if len(arrays) > 3 else "")
        what = "1 numpy array is" if len(arrays) == 1 else f"{len(arrays)} numpy arrays are"
        yield (
            f"{what} in `{newest.label}` and will not be in the teacher: {named}; save weights as tensors"
            " (`torch.from_numpy`)"
        )


def _treated_otherwise(weighed: Weighed, tensors: Sequence[TeacherTensor]) -> Iterator[str]:
    """Tensors of a teacher that is continued which were averaged so far and are copied now, or the other way."""
    if not weighed.past:
        return
    copied = {tensor.name for tensor in tensors if tensor.action == "copy"}
    averaged = {tensor.name for tensor in tensors} - copied
    for names, before, now in (
        (sorted(copied - weighed.copied), "averaged", "copied"),
        (sorted(averaged & weighed.copied), "copied", "averaged"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield f"`{names[0]}`{more}: {before} in `{weighed.averages[0].label}`, {now} from now on"


def _rounding_dtypes(
    weighed: Weighed, layouts: Sequence[Layout], tensors: Sequence[TeacherTensor], options: FoldOptions
) -> list[tuple[DType, DType, DType]]:
    """For each tensor that was rounded in the continued teacher: its first student's dtype, the teacher's, the fold's.

    The first is the one that tells a tensor which was wider once from those that never were.
    """
    if not weighed.past:
        return []
    dtypes = [
        (
            tensor.student_dtypes[0],
            layouts[0].schema.dtypes[tensor.index],
            accumulate_dtype(tensor, options.accumulate),
        )
        for tensor in tensors
        if tensor.action == "average"
    ]
    return [(student, stored, folded) for student, stored, folded in dtypes if is_rounded(folded, stored)]


def _rounded(weighed: Weighed, rounding: Sequence[tuple[DType, DType, DType]]) -> Iterator[str]:
    """What a teacher that is continued has lost since it was folded."""
    if rounding:
        dtypes = " and ".join(sorted({stored.name for _, stored, _ in rounding}))
        hint = "; `--dtype float32` keeps all digits" if all(folded.itemsize <= 4 for _, _, folded in rounding) else ""
        yield (
            f"`{weighed.averages[0].label}` {ROUNDED} {dtypes} when it was written"
            f" ({counted(len(rounding), 'tensor')}), and what goes on from it is near the fold of all at once, not"
            f" equal{hint}"
        )


def _dominated(teachers: Sequence[PlannedTeacher], options: FoldOptions) -> list[PlannedTeacher]:
    """Those of which the oldest input is most, where that was not asked for."""
    if isinstance(options, ReconstructOptions):
        return []
    return [teacher for teacher in teachers if teacher.profile.kind == "ema" and teacher.first_share > 0.5]


def _too_slow(checkpoints: Sequence[Checkpoint], teacher: PlannedTeacher, options: FoldOptions) -> str:
    half_life = teacher.profile.half_life or half_life_of(teacher.profile.momentum_over(1), options.interval)
    first, last = checkpoints[0].step, checkpoints[-1].step
    if first is None or last is None or first == last:
        return f"half of it is forgotten in {half_life:,.0f} steps"
    factor = options.steps_per_epoch or 1
    span = (last - first) * factor
    shorter = Profile("ema", half_life=float(max(1, span // 4)))
    steps = [(item.step or 0) * factor for item in checkpoints]
    share = coefficients_of(step_updates(shorter, steps, interval=options.interval))[0]
    return (
        f"half of it is forgotten in {half_life:,.0f} steps, and these checkpoints span {span:,};"
        f" `--half-life {shorter.half_life:.0f}` in place of it would leave it {share:.0%}"
        f"{' or less' if options.init is not None else ''}"
    )


def _too_fast(
    checkpoints: Sequence[Checkpoint], teachers: Sequence[PlannedTeacher], options: FoldOptions
) -> Iterator[str]:
    for teacher in teachers:
        _, share = teacher.updates[-1]
        if teacher.profile.kind != "ema" or share <= LARGEST_NEWEST_SHARE:
            continue
        half_life = teacher.profile.half_life or half_life_of(teacher.profile.momentum_over(1), options.interval)
        gap = ((checkpoints[-1].step or 0) - (checkpoints[-2].step or 0)) * (options.steps_per_epoch or 1)
        steps = f"{half_life:,.3g} step{'' if half_life == 1 else 's'}"
        yield (
            f"`{checkpoints[-1].label}` alone is {share:.1%} of the teacher ({teacher.profile.title}):"
            f" a share halves in {steps}, and the newest two checkpoints are {gap:,} steps apart; `--half-life"
            f" {2 * gap}` would average several"
        )


def _mended_options(
    checkpoints: Sequence[Checkpoint], teachers: Sequence[PlannedTeacher], options: FoldOptions
) -> tuple[str, ...]:
    """What to add to the command where the first checkpoint dominates because momentum works per checkpoint."""
    steps = [item.step for item in checkpoints if item.step is not None and item.unit == "step"]
    dominated = _dominated(teachers, options)
    if not dominated or options.per is not None or options.per_step or options.init is not None:
        return ()
    if len(steps) < max(2, len(checkpoints)):
        return ()
    if steps != sorted(set(steps)):
        return ()
    for teacher in dominated:
        shares = coefficients_of(step_updates(teacher.profile, steps, interval=options.interval))
        if shares[0] > 0.5 or shares[-1] > LARGEST_NEWEST_SHARE:
            return ()
    return ("--per", "step")
