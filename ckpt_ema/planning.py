"""What a fold is going to do: a run and options in, a FoldPlan out; byte ranges only, no tensor is read.

run -> checkpoints -> coefficients -> catalogue -> blocks
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ckpt_ema import advice
from ckpt_ema.agreement import EarlierStudents
from ckpt_ema.averages.profiles import (
    coefficients_of,
)
from ckpt_ema.blocks import accumulate_dtype, plan_blocks
from ckpt_ema.byte_ranges import TensorRange
from ckpt_ema.catalogue import TeacherTensor, Treatment, build_catalogue
from ckpt_ema.coefficients import Weighed, check_numbers_are_steps, weigh
from ckpt_ema.continuing import Beginning, read_beginning
from ckpt_ema.dtypes import DType, is_rounded
from ckpt_ema.errors import CkptEmaError, MisuseError, NoCheckpointError, NoUpdateError, quoted
from ckpt_ema.formats import read_contents
from ckpt_ema.inheriting import inherit
from ckpt_ema.layouts import Layout, SchemaPool, compact_layout
from ckpt_ema.locations import as_path
from ckpt_ema.model_buffers import read_model_buffers
from ckpt_ema.options import FoldOptions, PathLike
from ckpt_ema.output.targets import resolve_outputs
from ckpt_ema.plans import FoldedCheckpoint, FoldPlan, PlannedTeacher
from ckpt_ema.runs.checkpoints import Checkpoint, Run
from ckpt_ema.runs.find import find_checkpoints
from ckpt_ema.runs.selection import Selection
from ckpt_ema.runs.steps import is_copy_name, numbers_in_name
from ckpt_ema.runs.students import tensors_of_teacher
from ckpt_ema.sizes import counted
from ckpt_ema.teacher_record import printable, read_record


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
        may_be_widened=wanted.accumulate != "student",
    )
    unfollowed = _unfollowed(newest, followed)
    tensors = build_catalogue(
        [(checkpoint.label, checkpoint.layout) for checkpoint in checkpoints],
        treatment,
        known_buffers=newest.known_buffers if unfollowed is None else unfollowed,
        steps={checkpoint.label: checkpoint.step for checkpoint in checkpoints},
        earlier=EarlierStudents(weighed.averages[0].label, weighed.student_dtypes) if weighed.past else None,
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
    assumptions = (*advice.assumptions(checkpoints, tensors), *weighed.assumptions)
    rounding = list(_rounding_dtypes(weighed, layouts, tensors, wanted))
    losses = tuple(advice.losses(weighed, rounding))
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
        notes=(*assumptions, *advice.ordinary_notes(checkpoints), *weighed.further_notes),
        assumptions=assumptions,
        warnings=(
            *found.warnings,
            *found.order_warnings,
            *weighed.warnings,
            *losses,
            *advice.treated_otherwise(weighed, tensors),
            *advice.warnings(checkpoints, teachers, wanted, tensors, goes_on=weighed.goes_on),
        ),
        losses=losses,
        mended_options=advice.mended_options(checkpoints, teachers, wanted),
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
    found = tensors_of_teacher(contents)
    missing, differences = [], []
    for tensor in tensors:
        stored = found.get(tensor.name)
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
    differences += [f"{name}: missing in the students" for name in found if name not in averaged]
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
            t.name: found[t.name]
            if t.action == "average"
            else TensorRange(t.student_dtype, t.shape, None, absent, 0, 0)
            for t in tensors
        },
        pool,
    )


def _rounding_dtypes(
    weighed: Weighed, layouts: Sequence[Layout], tensors: Sequence[TeacherTensor], options: FoldOptions
) -> Iterator[tuple[DType, DType, DType]]:
    """For each tensor that was rounded in the continued teacher: its first student's dtype, the teacher's, the fold's.

    The first is the one that tells a tensor which was wider once from those that never were. The teacher's is the one
    it is written in, or was computed in.
    """
    for tensor in tensors if weighed.past else ():
        if tensor.action == "average":
            folded = accumulate_dtype(tensor, options.accumulate)
            written = layouts[0].schema.dtypes[tensor.index]
            computed = weighed.student_dtypes.get(tensor.name, written)
            narrower = min(written, computed, key=lambda dtype: dtype.itemsize)
            if is_rounded(folded, narrower):
                yield tensor.student_dtypes[0], narrower, folded
