"""Any teacher after the fact: all that a run has stored in, the combination nearest to the wanted teacher out."""

from __future__ import annotations

import fnmatch
import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ckpt_ema.coefficients import Average, Weighed, training_steps
from ckpt_ema.dtypes import DType
from ckpt_ema.errors import CkptEmaError, MisuseError
from ckpt_ema.formats import read_contents
from ckpt_ema.planning import find_run, plan_weighed
from ckpt_ema.profiles import updates_of
from ckpt_ema.provenance import read_provenance
from ckpt_ema.records import FoldPlan, PathLike, Prediction, ReconstructOptions
from ckpt_ema.response_records import MAX_STEP, read_response
from ckpt_ema.responses import Ema, Impulse, Power, Response, declared_response, tail_at
from ckpt_ema.runs import Checkpoint, Run
from ckpt_ema.solver import EVEN, Item, Solution, Variance, interpolated, solve
from ckpt_ema.steps import EDM2_NAME, stem_of

# Bits of the significand, the hidden one with it: what is stored is off by up to 2**-bits of itself.
SIGNIFICANT_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
FLOAT32_ROUNDING = 2.0**-24
LARGE = 1e200
"""No squared length of a student; a sum of a few thousand is still a number."""

POOR = 0.5
"""Predicted errors above this are warned of: the teacher is hardly nearer than the student is."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Something that may take part: a student, or an average whose response is known."""

    label: str
    response: Response
    rounding: float
    source: Average | Checkpoint
    record: Mapping[str, Any] = field(default_factory=dict)
    """The provenance of a snapshot of this tool."""

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
    steps, notes = training_steps(found.checkpoints, wanted) if found.checkpoints else ([], [])
    stored = [
        *sorted(_snapshots(found, wanted), key=lambda each: (each.response.end, each.label)),
        *_declared(found, wanted),
        *_students(found, steps),
    ]
    variance = _variance(stored, found.checkpoints, steps)
    start, last = min(each.response.start for each in stored), max(each.response.end for each in stored)
    end = _end_of_target(stored, wanted.at, start, last)
    targets = [profile.response(start, end, wanted.interval) for profile in wanted.profiles]
    solutions = solve([Item(each.response, each.rounding) for each in stored], targets, variance)
    copied = _nearest_checkpoint(stored, end)
    notes.append(f"steps count by how far the student moved: {variance.origin}")
    if all(each.is_student for each in stored):
        notes.append("no snapshots of an online teacher are here: students alone take part")
    if start > 1:
        notes.append(f"these teachers begin as the student of step {start}: what was before is not stored")
    if copied.response.end != end:
        notes.append(f"what is not averaged comes from `{copied.label}`")
    weighed = _weigh(stored, solutions, copied)
    reasons = {each.label: "it brings nothing to this teacher" for each in stored}
    reasons |= {average.label: "" for average in weighed.averages}
    left_out = [(name, reasons.get(name, reason)) for name, reason in found.left_out]
    weighed = replace(
        weighed,
        notes=tuple(notes),
        warnings=tuple(_warnings(solutions, wanted, targets, start)),
        span=(start, end),
        predictions=tuple(_prediction(solution, stored) for solution in solutions),
    )
    kept = tuple((name, reason) for name, reason in left_out if reason)
    return plan_weighed(replace(found, left_out=kept), weighed, output, wanted)


def _check_patterns(found: Run, wanted: ReconstructOptions) -> None:
    names = [average.path.name for average in found.averages]
    for pattern in wanted.averages:
        if not fnmatch.filter(names, pattern):
            raise CkptEmaError(
                f"`--average {pattern}` matches no file of `{found.directory}` but snapshots that say themselves what"
                " they are",
                hint="patterns match whole names: `--average '0.*.pt=power:0.05'`",
            )


def _nearest_checkpoint(stored: Sequence[Stored], end: int) -> Stored:
    """Where what is not averaged comes from: the newest student up to the target's step, else the first behind it.

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
    if not start < end <= last:
        raise CkptEmaError(
            f"a teacher of step {end} cannot be made: what is stored spans steps {start} to {last}",
            hint=f"pass `--at {last}`, or leave it away" if start < last else "one step alone has nothing to average",
        )
    return end


def _snapshots(found: Run, wanted: ReconstructOptions) -> Iterator[Stored]:
    """The teachers of this tool that say how they depend on the path; the others stay left out."""
    first, last = wanted.from_step or 0, math.inf if wanted.until_step is None else wanted.until_step
    for teacher in found.teachers:
        record = read_provenance(teacher.metadata) or {}
        response = read_response(record.get("response"))
        if response is not None and first <= response.end <= last:
            stored = _coarsest([tensor.dtype for tensor in read_contents(teacher.path).tree.values()])
            # Every update of the recurrence rounded as well; those that are still remembered add up.
            rounding = max(stored, FLOAT32_ROUNDING * math.sqrt(_remembered(response)))
            yield Stored(teacher.label, response, rounding, Average(teacher.path, teacher.label, response.end), record)


def _remembered(response: Response) -> float:
    """About how many updates an average holds."""
    if isinstance(response, Power):
        return (response.end - response.start) / (response.gamma + 1)
    assert isinstance(response, Ema)
    return min(1 / response.momentum, (response.end - response.start) / response.interval + 1)


def _declared(found: Run, wanted: ReconstructOptions) -> Iterator[Stored]:
    """The averages that the user describes, or whose name does."""
    for average in found.averages:
        patterns = [pattern for pattern in wanted.averages if fnmatch.fnmatchcase(average.path.name, pattern)]
        named = EDM2_NAME.match(stem_of(average.path.name))
        described = wanted.averages[patterns[0]] if patterns else f"power:{named['sigma_rel']}" if named else ""
        assert average.step is not None
        try:
            response = declared_response(average.path.name, described, average.step)
        except MisuseError as error:
            raise CkptEmaError(
                f"`{average.path.name}`: {error.message}",
                hint=f"leave it out: `--exclude '{glob.escape(average.path.name)}'`",
            ) from error
        yield Stored(average.label, response, _rounding(average), average)


def _students(found: Run, steps: Sequence[int]) -> Iterator[Stored]:
    for checkpoint, step in zip(found.checkpoints, steps, strict=True):
        yield Stored(checkpoint.label, Impulse(step), _rounding(checkpoint), checkpoint)


def _rounding(checkpoint: Checkpoint) -> float:
    return _coarsest(checkpoint.layout.schema.dtypes)


def _coarsest(dtypes: Sequence[DType]) -> float:
    return max((2.0 ** -SIGNIFICANT_BITS.get(d.name, 4) for d in dtypes if d.is_floating_point), default=0.0)


def _variance(stored: Sequence[Stored], checkpoints: Sequence[Checkpoint], steps: Sequence[int]) -> Variance:
    """How far the student moved at each step: as the hook measured it, else as its rate says, else always the same."""
    measured: dict[int, float] = {}
    squared_norm = None
    for snapshot in sorted(stored, key=lambda each: each.response.end):
        samples = dict(_number_pairs(snapshot.record.get("increments")))
        if samples:
            measured.update(samples)
            norm: Any = snapshot.record.get("squared_norm")
            squared_norm = float(norm) if _is_number(norm) else squared_norm
    if len(measured) > 1:
        return interpolated(_smoothed(sorted(measured.items())), "measured while training", squared_norm)
    rates: dict[int, float] = {}
    for checkpoint, step in zip(checkpoints, steps, strict=True):
        rates.update((step if at is None else at, rate) for at, rate in checkpoint.learning_rates)
    if len(set(rates.values())) > 1:
        return interpolated([(step, rate * rate) for step, rate in sorted(rates.items())], "squared learning rate")
    return EVEN


def _smoothed(samples: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean of each sample and its two neighbours: one batch's step says little of the next one's."""
    return [
        (step, math.fsum(value for _, value in samples[max(0, i - 1) : i + 2]) / len(samples[max(0, i - 1) : i + 2]))
        for i, (step, _) in enumerate(samples)
    ]


def _number_pairs(given: Any) -> Iterator[tuple[int, float]]:
    for pair in given if isinstance(given, list) else ():
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int:
            continue
        if 0 <= pair[0] < MAX_STEP and _is_number(pair[1]):
            yield pair[0], float(pair[1])


def _is_number(value: Any) -> bool:
    # A float alone: JSON's whole numbers may be larger than any.
    return isinstance(value, float) and 0 <= value < LARGE


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
    return Weighed(
        tuple(source for source in sources if isinstance(source, Average)),
        tuple(source for source in sources if isinstance(source, Checkpoint)),
        tuple(tuple(updates_of([solution.coefficients[i] for i in order])) for solution in solutions),
        tuple(left_out),
    )


def _prediction(solution: Solution, stored: Sequence[Stored]) -> Prediction:
    return Prediction(
        error=solution.predicted_error,
        nearest=stored[solution.nearest].label,
        amplification=math.fsum(map(abs, solution.coefficients)),
    )


def _warnings(
    solutions: Sequence[Solution], wanted: ReconstructOptions, targets: Sequence[Response], start: int
) -> Iterator[str]:
    for profile, solution, target in zip(wanted.profiles, solutions, targets, strict=True):
        begun = 1 - tail_at(target, start + 1)
        if begun > POOR:
            yield f"{profile.title}: {begun:.0%} of that teacher is still the student of step {start}, its beginning"
        if solution.predicted_error > POOR:
            yield (
                f"{profile.title} cannot be recovered from what is stored: the expected error is"
                f" {solution.predicted_error:.0%} of the distance to the nearest student; it needs checkpoints that lie"
                " closer, or snapshots of an online teacher"
            )
