"""Any teacher after the fact: all that a run has stored in, the combination nearest to the wanted teacher out."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ckpt_ema.coefficients import Average, Weighed, training_steps
from ckpt_ema.dtypes import DType
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.formats import read_contents
from ckpt_ema.planning import find_run, plan_weighed
from ckpt_ema.profiles import updates_of
from ckpt_ema.provenance import read_provenance
from ckpt_ema.records import FoldPlan, PathLike, Prediction, ReconstructOptions
from ckpt_ema.response_records import read_response
from ckpt_ema.responses import Impulse, Response, declared_response
from ckpt_ema.runs import OWN_TEACHER, Checkpoint, Run
from ckpt_ema.solver import EVEN, Item, Solution, Variance, interpolated, solve
from ckpt_ema.steps import EDM2_NAME, stem_of

# Bits of the significand, the hidden one with it: what is stored is off by up to 2**-bits of itself.
SIGNIFICANT_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
EDM2_GLOB = "network-snapshot-*-*.*"
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
    found = find_run(run, wanted, (EDM2_GLOB, *wanted.averages))
    steps, notes = training_steps(found.checkpoints, wanted) if found.checkpoints else ([], [])
    stored = [
        *sorted(_snapshots(found), key=lambda each: (each.response.end, each.label)),
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
    if copied.response.end != end:
        notes.append(f"what is not averaged comes from `{copied.label}`")
    weighed = _weigh(stored, solutions, copied)
    used = {average.label for average in weighed.averages}
    left_out = tuple((name, reason) for name, reason in found.left_out if not (reason == OWN_TEACHER and name in used))
    weighed = replace(
        weighed,
        notes=tuple(notes),
        warnings=tuple(_warnings(solutions, wanted)),
        predictions=tuple(_prediction(solution, stored) for solution in solutions),
    )
    return plan_weighed(replace(found, left_out=left_out), weighed, output, wanted)


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
    students = [each.response.end for each in stored if each.is_student]
    end = at if at is not None else max(students, default=last)
    if not start < end <= last:
        raise CkptEmaError(
            f"a teacher of step {end} cannot be made: what is stored spans steps {start} to {last}",
            hint=f"pass `--at {last}`, or leave it away" if start < last else "one step alone has nothing to average",
        )
    return end


def _snapshots(found: Run) -> Iterator[Stored]:
    """The teachers of this tool that say how they depend on the path; the others stay left out."""
    for teacher in found.teachers:
        record = read_provenance(teacher.metadata) or {}
        response = read_response(record.get("response"))
        if response is not None:
            rounding = _coarsest([tensor.dtype for tensor in read_contents(teacher.path).tree.values()])
            average = Average(teacher.path, teacher.path.name, response.end)
            yield Stored(average.label, response, rounding, average, record)


def _declared(found: Run, wanted: ReconstructOptions) -> Iterator[Stored]:
    """The averages that the user describes, or whose name does."""
    for average in found.averages:
        patterns = [pattern for pattern in wanted.averages if fnmatch.fnmatchcase(average.path.name, pattern)]
        named = EDM2_NAME.match(stem_of(average.path.name))
        described = wanted.averages[patterns[0]] if patterns else f"power:{named['sigma_rel']}" if named else ""
        assert average.step is not None
        response = declared_response(average.path.name, described, average.step)
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
        if isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and _is_number(pair[1]):
            yield pair[0], float(pair[1])


def _is_number(value: Any) -> bool:
    # A float alone: JSON's whole numbers may be larger than any.
    return isinstance(value, float) and 0 <= value < math.inf


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


def _warnings(solutions: Sequence[Solution], wanted: ReconstructOptions) -> Iterator[str]:
    for profile, solution in zip(wanted.profiles, solutions, strict=True):
        if solution.predicted_error > POOR:
            yield (
                f"{profile.title} cannot be recovered from what is stored: the expected error is"
                f" {solution.predicted_error:.0%} of the distance to the nearest student; it needs checkpoints that lie"
                " closer, or snapshots of an online teacher"
            )
