"""What is said of a plan: its parts in, notes, warnings and options that mend out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ckpt_ema.averages.profiles import (
    Profile,
    coefficients_of,
    inverted_momentum_warning,
    momentum_for_first_share,
    step_updates,
)
from ckpt_ema.averages.responses import half_life_of
from ckpt_ema.catalogue import TeacherTensor
from ckpt_ema.coefficients import Weighed
from ckpt_ema.dtypes import DType
from ckpt_ema.locations import as_path
from ckpt_ema.options import FoldOptions, ReconstructOptions
from ckpt_ema.plans import PlannedTeacher
from ckpt_ema.runs.checkpoints import Checkpoint
from ckpt_ema.runs.students import NUMPY_ARRAY
from ckpt_ema.sizes import counted

LARGEST_NEWEST_SHARE = 0.9
"""Of a teacher by steps; what is nearly its newest checkpoint is no average."""

MAX_CHANGES = 3
"""Changes of precision that a note lists; the rest are counted."""


def assumptions(checkpoints: Sequence[Checkpoint], tensors: Sequence[TeacherTensor]) -> Iterator[str]:
    """What of the checkpoints is not alike, and is folded all the same."""
    yield from _differing_states(checkpoints)
    yield from _precision_changes(tensors)


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


def _precision_changes(tensors: Sequence[TeacherTensor]) -> Iterator[str]:
    """Where the precision of averaged tensors changes on the way, and what is done then."""
    changed = [tensor for tensor in tensors if tensor.action == "average" and tensor.changes]
    if not changed:
        return
    changes = list(dict.fromkeys(change for tensor in changed for change in tensor.changes))
    listed = [f"{before} to {after} {when}" for before, after, when in changes[:MAX_CHANGES]]
    if len(changes) > MAX_CHANGES:
        listed[-1] += f" and {counted(len(changes) - MAX_CHANGES, 'more change')}"
    verb = "changes its" if len(changed) == 1 else "change their"
    yield (
        f"{counted(len(changed), 'tensor')} {verb} precision on the way ({', '.join(listed)}): each student is widened"
        " as it is read"
    )


def ordinary_notes(checkpoints: Sequence[Checkpoint]) -> Iterator[str]:
    """What of each checkpoint is the student, where that is the same in all; for who wants the plan."""
    newest = checkpoints[-1]
    if newest.state_key and all(checkpoint.state_key == newest.state_key for checkpoint in checkpoints):
        yield f"the student is `{newest.state_key}` of each checkpoint"
    for prefix in newest.stripped:
        yield f"`{prefix}` is taken off the tensor names"


def warnings(
    checkpoints: Sequence[Checkpoint],
    teachers: Sequence[PlannedTeacher],
    options: FoldOptions,
    tensors: Sequence[TeacherTensor],
    *,
    goes_on: bool,
) -> Iterator[str]:
    """What a fold says of its teachers where somebody should look; `goes_on`: their beginning was told before."""
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
    if mended_options(checkpoints, teachers, options):
        mended = "`--per step` makes it work as in training"
    else:
        mended = f"`--momentum {momentum_for_first_share(len(worst.updates) - 1, 0.1):g}` would leave it 10 %"
    yield f"{keeps}: {works} once per checkpoint here, not once per training step; {mended}"


def mended_options(
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


def losses(weighed: Weighed, rounding: Sequence[tuple[DType, DType, DType]]) -> Iterator[str]:
    """What a teacher that is continued has lost since it was folded."""
    if rounding:
        dtypes = " and ".join(sorted({stored.name for _, stored, _ in rounding}))
        hint = "; `--dtype float32` keeps all digits" if all(folded.itemsize <= 4 for _, _, folded in rounding) else ""
        yield (
            f"`{weighed.averages[0].label}` was rounded to {dtypes}"
            f" ({counted(len(rounding), 'tensor')}), and what goes on from it is near the fold of all at once, not"
            f" equal{hint}"
        )


def treated_otherwise(weighed: Weighed, tensors: Sequence[TeacherTensor]) -> Iterator[str]:
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
