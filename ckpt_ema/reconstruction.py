"""Any teacher after the fact: all that a run has stored in, the combination nearest to the wanted teacher out."""

from __future__ import annotations

import fnmatch
import glob
import math
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckpt_ema.averages.profiles import updates_of
from ckpt_ema.averages.responses import Ema, Impulse, Power, Response, SteppedPower, declared_response, tail_at
from ckpt_ema.averages.solver import EVEN, Item, Solution, Variance, interpolated, solve
from ckpt_ema.coefficients import Average, Weighed, check_numbers_are_steps, training_steps
from ckpt_ema.dtypes import DType
from ckpt_ema.errors import CkptEmaError, MisuseError, quoted
from ckpt_ema.formats import read_contents
from ckpt_ema.options import PathLike, ReconstructOptions
from ckpt_ema.planning import find_run, plan_weighed
from ckpt_ema.plans import FoldPlan, Prediction
from ckpt_ema.runs.checkpoints import OWN_TEACHER, Checkpoint, Run
from ckpt_ema.runs.steps import EDM2_NAME, stem_of
from ckpt_ema.teacher_record import TeacherRecord, read_record

# Bits of the significand, the hidden one with it: what is stored is off by up to 2**-bits of itself.
SIGNIFICANT_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
FLOAT32_ROUNDING = 2.0**-24

DELICATE = 100
"""Sums of |coefficient| above this are warned of where averages are what a user says they are."""

POOR = 0.5
"""Predicted errors above this are warned of: the teacher is hardly nearer than the student is."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Something that may take part: a student, or an average whose response is known."""

    label: str
    response: Response
    rounding: float
    source: Average | Checkpoint
    record: TeacherRecord = field(default_factory=TeacherRecord)
    """The provenance of a snapshot of this tool."""

    @property
    def step(self) -> int:
        """After which it was saved; an average may have been updated last some steps before."""
        return self.response.end if self.source.step is None else self.source.step

    @property
    def is_student(self) -> bool:
        """Whether it is one student rather than an average of them."""
        return isinstance(self.response, Impulse)


def plan_reconstruct(
    run: PathLike | Sequence[PathLike], output: PathLike | None, wanted: ReconstructOptions
) -> FoldPlan:
    """Plan the one pass that makes every wanted teacher; raises CkptEmaError where the run's steps are not known."""
    found = find_run(run, wanted, tuple(wanted.averages))
    _check_patterns(found, wanted)
    found, limits, assumptions = _in_steps(found, wanted)
    snapshots, refused = _snapshots(found, limits)
    stored = [*snapshots, *_declared(found, wanted), *_students(found)]
    if not stored:
        raise CkptEmaError(
            f"no checkpoint of `{found.directory}` is left to reconstruct from",
            details=[f"{name}: {reason}" for name, reason in found.left_out],
        )
    variance = _variance(stored, found.checkpoints)
    start, last = min(each.response.start for each in stored), max(each.step for each in stored)
    end = _end_of_target(stored, wanted.at, start, last)
    targets = [profile.response(start, end, wanted.interval) for profile in wanted.profiles]
    solutions = solve([Item(each.response, each.rounding) for each in stored], targets, variance)
    copied = _nearest_checkpoint(stored, end)
    notes = [f"steps count by how far the student moved: {variance.origin}"]
    if all(each.is_student for each in stored):
        assumptions.append("no snapshots of an online teacher are here: students alone take part")
    if start > 1:
        assumptions.append(f"these teachers begin as the student of step {start}: what was before is not stored")
    if copied.response.end != end:
        notes.append(f"what is not averaged comes from `{copied.label}`")
    weighed = _weigh(stored, solutions, copied)
    reasons = refused | {each.label: "it brings nothing to this teacher" for each in snapshots}
    reasons |= {average.label: "" for average in weighed.averages}
    known = dict(found.left_out)
    left_out = [(name, reasons.get(name, reason)) for name, reason in {**reasons, **known}.items()]
    weighed = replace(
        weighed,
        assumptions=tuple(assumptions),
        further_notes=tuple(notes),
        warnings=tuple(_warnings(solutions, wanted, targets, start, has_described=bool(found.averages))),
        span=(start, end),
        predictions=tuple(_prediction(solution, stored) for solution in solutions),
    )
    kept = tuple((name, reason) for name, reason in left_out if reason)
    names = weighed.checkpoints[-1].layout.schema.names
    followed = frozenset().union(*(_followed_in(average.path, names) for average in weighed.averages))
    return plan_weighed(replace(found, left_out=kept), weighed, output, wanted, followed=followed)


def _followed_in(snapshot: Path, names: Collection[str]) -> frozenset[str]:
    """The tensors that an online teacher averaged, of a student that has `names`: its others are its buffers."""
    contents = read_contents(snapshot)
    return frozenset(map(str, contents.tree)) - read_record(contents.metadata).aliases_in(names)


def _in_steps(found: Run, wanted: ReconstructOptions) -> tuple[Run, tuple[int, float], list[str]]:
    """The run with all of it counted in steps and in their order, the first and last of them, and what that assumes.

    Raises CkptEmaError where epochs cannot be turned into steps.
    """
    checkpoints = found.checkpoints
    if len({item.unit for item in checkpoints}) == 1 and all(item.step is not None for item in checkpoints):
        checkpoints = tuple(sorted(checkpoints, key=lambda item: item.step or 0))
    check_numbers_are_steps(checkpoints, wanted)
    steps, assumptions = training_steps(checkpoints, wanted) if checkpoints else ([], [])
    factor = wanted.steps_per_epoch or 1
    # Epochs where the checkpoints know epochs, as for a fold.
    scale = factor if checkpoints and checkpoints[0].unit != "step" else 1
    first = (wanted.from_step or 0) * scale
    last = math.inf if wanted.until_step is None else wanted.until_step * scale
    averages, left_out = [], []
    for average in found.averages:
        if average.unit == "epoch" and wanted.steps_per_epoch is None:
            raise CkptEmaError(
                f"`{average.label}` knows its epoch only ({average.step}), and training steps are needed",
                hint="pass `--steps-per-epoch N`, the number of optimizer steps in an epoch",
            )
        assert average.step is not None
        step = average.step if average.unit == "step" else average.step * factor
        if first <= step <= last:
            averages.append(replace(average, step=step, unit="step"))
        else:
            left_out.append((average.label, _outside(step, first, last)))
    in_steps = tuple(replace(item, step=step, unit="step") for item, step in zip(checkpoints, steps, strict=True))
    run = replace(
        found,
        checkpoints=in_steps,
        averages=tuple(averages),
        left_out=(*found.left_out, *left_out),
        order_warnings=(),  # the coefficients are by step, whatever the list's order
    )
    return run, (first, last), assumptions


def _outside(step: int, first: int, last: float) -> str:
    return f"before step {first}" if step < first else f"after step {last}"


def _check_patterns(found: Run, wanted: ReconstructOptions) -> None:
    names = [average.path.name for average in found.averages]
    for pattern in wanted.averages:
        if not fnmatch.filter(names, pattern):
            others = [f"{name}: {why}" for name, why in found.left_out if fnmatch.fnmatchcase(name, pattern)]
            raise CkptEmaError(
                f"`--average {pattern}` matches no file of `{found.directory}` that would take part",
                details=others,
                hint=None if others else "patterns match whole names: `--average '0.*.pt=power:0.05'`",
            )


def _nearest_checkpoint(stored: Sequence[Stored], end: int) -> Stored:
    """Where what is not averaged comes from: the newest student up to the target's step, else the first after it.

    An average serves where no student is stored.
    """

    def rank(each: Stored) -> tuple[bool, bool, int]:
        step = each.response.end
        return each.is_student, step <= end, step if step <= end else -step

    return max((each for each in stored if isinstance(each.source, Checkpoint)), key=rank)


def _end_of_target(stored: Sequence[Stored], at: int | None, start: int, last: int) -> int:
    """The step of the wanted teacher: as asked for, else that of the newest student, else of the newest average."""
    students = [each.response.end for each in stored if each.is_student and each.response.end > start]
    end = at if at is not None else max(students, default=last)
    if start < end <= last:
        return end
    if start == last:
        raise CkptEmaError(
            f"all that is stored is of step {last}, and one step alone has nothing to average",
            hint="pass a folder with checkpoints of other steps, or a wider `--from` and `--until`",
        )
    if end > last:
        raise CkptEmaError(
            f"a teacher of step {end} cannot be made: what is stored ends at step {last}",
            hint=f"pass `--at {last}`, or omit it",
        )
    if end == start:
        what = f"a teacher of step {end} would be the student of that step: it begins there"
    else:
        what = f"a teacher of step {end} cannot be made: what is stored begins at step {start}"
    raise CkptEmaError(what, hint=f"pass a step above {start}, up to `--at {last}`")


def _snapshots(found: Run, limits: tuple[int, float]) -> tuple[list[Stored], dict[str, str]]:
    """The teachers of this tool that say how they depend on the path, by step; and why others take no part."""
    taken: list[Stored] = []
    refused: dict[str, str] = {}
    for teacher in found.teachers:
        record = read_record(teacher.metadata)
        response = record.response
        if response is None:
            refused[teacher.label] = OWN_TEACHER + (", of unknown weights" if record.has_updates else "")
        elif not limits[0] <= response.end <= limits[1]:
            refused[teacher.label] = _outside(response.end, *limits)
        else:
            stored = _coarsest([tensor.dtype for tensor in read_contents(teacher.path).tree.values()])
            rounding = max(stored, _rounding_of_updates(response, record.arithmetic))
            source = Average(teacher.path, teacher.label, response.end)
            taken.append(Stored(teacher.label, response, rounding, source, record))
    return sorted(taken, key=lambda each: (each.response.end, each.label)), refused


def _rounding_of_updates(response: Response, arithmetic: str | None) -> float:
    """What the recurrence in float32 is off by, relative to its result: what is still remembered adds up."""
    by_chance = FLOAT32_ROUNDING * math.sqrt(_remembered(response))
    if arithmetic != "hook" or not isinstance(response, Ema):
        return by_chance
    # `mul_(1 - m).add_(alpha=m)`: in float32 the two do not sum to 1, and each update makes the teacher a bit too long.
    excess = abs(_float32(1 - response.momentum) + _float32(response.momentum) - 1)
    return max(by_chance, FLOAT32_ROUNDING + excess * _remembered(response))


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _remembered(response: Response) -> float:
    """About how many updates an average holds."""
    if isinstance(response, Ema):
        return min(1 / response.momentum, (response.end - response.start) / response.interval + 1)
    assert isinstance(response, Power | SteppedPower)
    interval = response.interval if isinstance(response, SteppedPower) else 1
    return max(1.0, (response.end - response.start) / interval / (response.gamma + 1))


def _declared(found: Run, wanted: ReconstructOptions) -> Iterator[Stored]:
    """The averages that the user describes, or whose name does."""
    for average in found.averages:
        patterns = [pattern for pattern in wanted.averages if fnmatch.fnmatchcase(average.path.name, pattern)]
        if len({wanted.averages[pattern] for pattern in patterns}) > 1:
            raise MisuseError(
                f"`{average.path.name}` is said to be {' and '.join(wanted.averages[pattern] for pattern in patterns)}",
                hint=f"let one `--average` alone match it, not both {' and '.join(map(repr, patterns))}",
            )
        named = EDM2_NAME.match(stem_of(average.path.name))
        described = wanted.averages[patterns[0]] if patterns else f"power:{named['sigma_rel']}" if named else ""
        assert average.step is not None
        try:
            response = declared_response(average.path.name, described, average.step)
        except MisuseError as error:
            raise CkptEmaError(
                f"`{average.path.name}`: {error.message}",
                hint=f"leave it out: `--exclude {quoted(glob.escape(average.path.name))}`",
            ) from error
        rounding = max(_rounding(average), _rounding_of_updates(response, None))
        yield Stored(average.label, response, rounding, average)


def _students(found: Run) -> Iterator[Stored]:
    for checkpoint in found.checkpoints:
        assert checkpoint.step is not None
        yield Stored(checkpoint.label, Impulse(checkpoint.step), _rounding(checkpoint), checkpoint)


def _rounding(checkpoint: Checkpoint) -> float:
    return _coarsest(checkpoint.layout.schema.dtypes)


def _coarsest(dtypes: Sequence[DType]) -> float:
    return max((2.0 ** -SIGNIFICANT_BITS.get(d.name, 4) for d in dtypes if d.is_floating_point), default=0.0)


def _variance(stored: Sequence[Stored], checkpoints: Sequence[Checkpoint]) -> Variance:
    """How far the student moved at each step: as the hook measured it, else as its rate says, else always the same."""
    measured: dict[int, float] = {}
    squared_norm = None
    for snapshot in sorted(stored, key=lambda each: each.response.end):
        if snapshot.record.increments:
            measured.update(snapshot.record.increments)
            norm = snapshot.record.squared_norm
            squared_norm = squared_norm if norm is None else norm
    if len(measured) > 1:
        return interpolated(_smoothed(sorted(measured.items())), "measured while training", squared_norm)
    rates: dict[int, float] = {}
    for checkpoint in checkpoints:
        rates.update((checkpoint.step or 0 if at is None else at, rate) for at, rate in checkpoint.learning_rates)
    if len(set(rates.values())) > 1:
        return interpolated([(step, rate * rate) for step, rate in sorted(rates.items())], "squared learning rate")
    return EVEN


def _smoothed(samples: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean of each sample and its two neighbours: one batch's step says little of the next one's."""
    return [
        (step, math.fsum(value for _, value in samples[max(0, i - 1) : i + 2]) / len(samples[max(0, i - 1) : i + 2]))
        for i, (step, _) in enumerate(samples)
    ]


def _weigh(stored: Sequence[Stored], solutions: Sequence[Solution], copied: Stored) -> Weighed:
    """What has a coefficient in some teacher, in the order of folding: what buffers come from is last."""
    has_share = [any(solution.coefficients[i] for solution in solutions) for i in range(len(stored))]
    averages = [i for i, each in enumerate(stored) if isinstance(each.source, Average) and has_share[i]]
    checkpoints = [i for i, each in enumerate(stored) if isinstance(each.source, Checkpoint) and has_share[i]]
    last = next(i for i, each in enumerate(stored) if each is copied)
    order = [*averages, *(i for i in checkpoints if i != last), last]
    sources = [stored[i].source for i in order]
    left_out = [
        (each.label, "it brings nothing to this teacher")
        for i, each in enumerate(stored)
        if i not in order and isinstance(each.source, Checkpoint)
    ]
    given = tuple(tuple(solution.coefficients[i] for i in order) for solution in solutions)
    return Weighed(
        tuple(source for source in sources if isinstance(source, Average)),
        tuple(source for source in sources if isinstance(source, Checkpoint)),
        tuple(tuple(updates_of(shares)) for shares in given),
        given,
        left_out=tuple(left_out),
    )


def _prediction(solution: Solution, stored: Sequence[Stored]) -> Prediction:
    return Prediction(
        error=solution.predicted_error,
        nearest=stored[solution.nearest].label,
        amplification=math.fsum(map(abs, solution.coefficients)),
    )


def _warnings(
    solutions: Sequence[Solution],
    wanted: ReconstructOptions,
    targets: Sequence[Response],
    start: int,
    *,
    has_described: bool,
) -> Iterator[str]:
    for profile, solution, target in zip(wanted.profiles, solutions, targets, strict=True):
        amplification = math.fsum(map(abs, solution.coefficients))
        if has_described and amplification > DELICATE:
            yield (
                f"{profile.title}: the coefficients add up to {amplification:,.0f} in size; that is right only if the"
                " averages of other tools are exactly what they are said to be (`--average`)"
            )
        begun = 1 - tail_at(target, start + 1)
        if begun > POOR:
            yield f"{profile.title}: {begun:.0%} of that teacher is still the student of step {start}, its beginning"
        if solution.predicted_error > POOR:
            yield (
                f"{profile.title} cannot be recovered from what is stored: the expected error is"
                f" {solution.predicted_error:.0%} of the distance to the nearest student; it needs checkpoints that lie"
                " closer, or snapshots of an online teacher"
            )
