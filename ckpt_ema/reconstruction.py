"""Any teacher after the fact: all that a run has stored in, the combination nearest to the wanted teacher out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_ema.dtypes import DType
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.formats import read_contents
from ckpt_ema.planning import find_run, plan_weighed
from ckpt_ema.profiles import updates_of
from ckpt_ema.provenance import read_provenance
from ckpt_ema.records import FoldPlan, PathLike, Prediction, ReconstructOptions
from ckpt_ema.response_records import read_response
from ckpt_ema.responses import Impulse, Response
from ckpt_ema.runs import OWN_TEACHER, Checkpoint, Run
from ckpt_ema.shares import Average, Weighed, training_steps
from ckpt_ema.solver import EVEN, Item, Solution, Variance, interpolated, solve

# Bits of the significand, the hidden one with it: what is stored is off by up to 2**-bits of itself.
SIGNIFICANT_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
POOR = 0.5
"""Predicted errors above this are warned of: the teacher is hardly nearer than the student is."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A stored average whose response is known."""

    average: Average
    response: Response
    rounding: float
    record: dict[str, Any]
    """Its provenance."""


def plan_reconstruct(
    run: PathLike | Sequence[PathLike], output: PathLike | None, wanted: ReconstructOptions
) -> FoldPlan:
    """Plan the one pass that makes every wanted teacher; raises CkptEmaError where the run's steps are not known."""
    found = find_run(run, wanted, takes_teachers=True)
    steps, notes = training_steps(found.checkpoints, wanted)
    snapshots = list(_snapshots(found))
    end = steps[-1] if wanted.at is None else wanted.at
    if not steps[0] < end <= steps[-1]:
        raise CkptEmaError(
            f"a teacher of step {end} cannot be made: the checkpoints span steps {steps[0]} to {steps[-1]}",
            hint=f"pass `--at {steps[-1]}`, or leave it away",
        )
    impulses = [Impulse(step) for step in steps]
    start = min(response.start for response in (*impulses, *(snapshot.response for snapshot in snapshots)))
    variance = _variance(snapshots, found.checkpoints, steps)
    solutions = solve(
        [
            *(Item(snapshot.response, snapshot.rounding) for snapshot in snapshots),
            *(Item(each, _rounding(c)) for each, c in zip(impulses, found.checkpoints, strict=True)),
        ],
        [profile.response(start, end, wanted.interval) for profile in wanted.profiles],
        variance,
    )
    newest = max(i for i, step in enumerate(steps) if step <= end)
    weighed = _weigh(found, snapshots, solutions, newest)
    used = {average.label for average in weighed.averages}
    left_out = tuple((name, reason) for name, reason in found.left_out if not (reason == OWN_TEACHER and name in used))
    notes = [*notes, *_notes(solutions, found, snapshots, variance, steps[newest] != end)]
    warnings = tuple(_warnings(solutions, wanted))
    found = Run(found.directory, found.root, found.checkpoints, left_out, found.warnings)
    weighed = Weighed(
        weighed.averages,
        weighed.checkpoints,
        weighed.updates,
        weighed.left_out,
        tuple(notes),
        warnings,
        tuple(_prediction(solution, found, snapshots) for solution in solutions),
    )
    return plan_weighed(found, weighed, output, wanted)


def _snapshots(found: Run) -> Iterator[Snapshot]:
    """The teachers of this tool that say how they depend on the path; the others stay left out."""
    for teacher in found.teachers:
        record = read_provenance(teacher.metadata) or {}
        response = read_response(record.get("response"))
        if response is not None:
            dtypes = [tensor.dtype for tensor in read_contents(teacher.path).tree.values()]
            average = Average(teacher.path, teacher.path.name, response.end)
            yield Snapshot(average, response, _coarsest(dtypes), record)


def _rounding(checkpoint: Checkpoint) -> float:
    return _coarsest(checkpoint.layout.schema.dtypes)


def _coarsest(dtypes: Sequence[DType]) -> float:
    return max((2.0 ** -SIGNIFICANT_BITS.get(d.name, 4) for d in dtypes if d.is_floating_point), default=0.0)


def _variance(snapshots: Sequence[Snapshot], checkpoints: Sequence[Checkpoint], steps: Sequence[int]) -> Variance:
    """How far the student moved at each step: as the hook measured it, else as its rate says, else always the same."""
    measured: dict[int, float] = {}
    squared_norm = None
    for snapshot in sorted(snapshots, key=lambda each: each.response.end):
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
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _weigh(found: Run, snapshots: Sequence[Snapshot], solutions: Sequence[Solution], newest: int) -> Weighed:
    """What has a coefficient in some teacher, in the order of folding: the student that buffers come from is last."""
    num = len(snapshots)
    used = {i for solution in solutions for i, share in enumerate(solution.coefficients) if share}
    averages = [i for i in range(num) if i in used]
    students = [i for i in range(len(found.checkpoints)) if num + i in used and i != newest]
    order = [*averages, *(num + i for i in students), num + newest]
    left_out = [
        (checkpoint.label, "it brings nothing to this teacher")
        for i, checkpoint in enumerate(found.checkpoints)
        if num + i not in order
    ]
    return Weighed(
        tuple(snapshots[i].average for i in averages),
        tuple(found.checkpoints[i] for i in (*students, newest)),
        tuple(tuple(updates_of([solution.coefficients[i] for i in order])) for solution in solutions),
        tuple(left_out),
    )


def _prediction(solution: Solution, found: Run, snapshots: Sequence[Snapshot]) -> Prediction:
    return Prediction(
        error=solution.predicted_error,
        nearest=found.checkpoints[solution.nearest - len(snapshots)].label,
        amplification=math.fsum(map(abs, solution.coefficients)),
    )


def _notes(
    solutions: Sequence[Solution], found: Run, snapshots: Sequence[Snapshot], variance: Variance, is_between: bool
) -> Iterator[str]:
    kinds = "" if snapshots else "; no snapshots of an online teacher are here"
    yield f"steps are weighed by the size of the student's movement: {variance.origin}{kinds}"
    if is_between:
        yield "what is not averaged comes from the newest student up to that step"


def _warnings(solutions: Sequence[Solution], wanted: ReconstructOptions) -> Iterator[str]:
    for profile, solution in zip(wanted.profiles, solutions, strict=True):
        if solution.predicted_error > POOR:
            yield (
                f"{profile.title} cannot be recovered from what is stored: the expected error is"
                f" {solution.predicted_error:.0%} of the distance to the nearest student; it needs checkpoints that lie"
                " closer, or snapshots of an online teacher"
            )
