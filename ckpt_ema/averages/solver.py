"""Which combination of stored tensors is nearest to a wanted average: responses in, coefficients out. float64.

An average is student(start) + sum over s of P(s) d(s), d(s) the student's increments (see `responses`). What a
combination c of stored items misses is sum over s of D(s) d(s) with D(s) = sum_i c_i B_i(s) - P(s). Increments of
training are nearly unrelated, like those of a random walk, so its expected square is sum over s of v(s) D(s)**2,
v(s) = E|d(s)|**2. That is minimised under sum c = 1. EDM2's post-hoc EMA (Karras et al. 2024) minimises the square of
the weights themselves, as if students, not their increments, were unrelated; then a stored student can take no part.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ckpt_ema.averages.quadrature import nodes_between
from ckpt_ema.averages.responses import Ema, Impulse, Response, SteppedPower

# A file is left out where its coefficient is this small, the largest of these that costs no more than EXTRA_ERROR.
# Smaller than the model of unrelated steps would ask for: real paths are smoother, and distant students far away.
IDLE = (1e-5, 1e-7, 1e-9)
EXTRA_ERROR = 1.001
NOTHING = 1e-24
"""A square below is rounding; the whole path's is 1."""

MAX_JUMPS = 400
"""So many of the jumps of an average that has an interval are taken one by one, those where it jumps most; what is
between falls smoothly."""

ROWS_AT_ONCE = 1 << 14

FLOOR = 1e-12
"""Of v, relative to its mean: a step whose student does not move must not make the problem singular."""


@dataclass(frozen=True, slots=True)
class Item:
    """Something stored: how it depends on the student's path, and how finely it is stored."""

    response: Response
    """How it depends on the student's path."""

    rounding: float = 0.0
    """Largest relative rounding error of its numbers: 2**-24 for float32, 2**-8 for bfloat16."""


@dataclass(frozen=True, slots=True)
class Variance:
    """v(s), the expected square of the student's step, up to a common factor."""

    at: Callable[[float], float]
    """v at a step, which need not be whole."""

    origin: str
    """Where it was taken from, for people."""

    squared_norm: float | None = None
    """The student's own square, in the same unit; what rounding is relative to."""


EVEN = Variance(lambda step: 1.0, "not recorded, so all count the same")


def interpolated(samples: Sequence[tuple[int, float]], origin: str, squared_norm: float | None = None) -> Variance:
    """v(s) from samples (step, value) at ascending steps: straight between them, level outside."""
    steps = [float(step) for step, _ in samples]
    values = [value for _, value in samples]

    def at(step: float) -> float:
        i = bisect.bisect_left(steps, step)
        if i == 0:
            return values[0]
        if i == len(steps):
            return values[-1]
        share = (step - steps[i - 1]) / (steps[i] - steps[i - 1])
        return values[i - 1] + share * (values[i] - values[i - 1])

    return Variance(at, origin, squared_norm)


@dataclass(frozen=True, slots=True)
class Solution:
    """The combination for one target."""

    coefficients: tuple[float, ...]
    """One per item, 0 for those that are not needed; they sum to 1."""

    predicted_error: float
    """Expected distance to the target, as a share of that of the nearest student (nearest item without one)."""

    nearest: int
    """That item."""


def solve(items: Sequence[Item], targets: Sequence[Response], variance: Variance = EVEN) -> list[Solution]:
    """The best coefficients for each target.

    `items` and `targets` count the same steps. The cost grows with the number of items and the logarithm of the
    steps between them. Rounding enters as a penalty: a coefficient multiplies the rounding error of its file.
    """
    unit = _common_unit([*(item.response for item in items), *targets])
    problem = _Problem(items, targets, variance, unit)
    return [problem.solve(number) for number in range(len(targets))]


def _common_unit(responses: Sequence[Response]) -> int:
    """The number of steps that may count as one without losing anything.

    More than 1 only where all is a multiple of it, and no average moves in between.
    """
    averages = [each for each in responses if not isinstance(each, Impulse)]
    intervals = [each.interval for each in averages if isinstance(each, Ema)]
    if not intervals or len(intervals) < len(averages):
        return 1
    return max(1, math.gcd(*(step for each in responses for step in (each.start, each.end)), *intervals))


def _scaled(response: Response, unit: int) -> Response:
    # What moves at every step has a unit of 1.
    return response.scaled(unit) if isinstance(response, Impulse | Ema) else response


class _Problem:
    """The least-squares problem that all targets share: a row per node, a column per item."""

    def __init__(self, items: Sequence[Item], targets: Sequence[Response], variance: Variance, unit: int) -> None:
        stored = [_scaled(item.response, unit) for item in items]
        wanted = [_scaled(target, unit) for target in targets]
        borders = sorted({step for each in (*stored, *wanted) for step in (each.start, each.end, *_jump_steps(each))})
        nodes = [
            (node, weight, begin, end)
            for begin, end in itertools.pairwise(borders)
            for node, weight in nodes_between(begin, end)
        ]
        self._students = [i for i, item in enumerate(items) if isinstance(item.response, Impulse)]
        if nodes:
            steps, weights, begins, ends = (
                torch.tensor(column, dtype=torch.float64, device="cpu") for column in zip(*nodes, strict=True)
            )
        else:
            steps = weights = begins = ends = torch.zeros(0, dtype=torch.float64, device="cpu")
        # Of the middle of what counts as one step.
        values = torch.tensor(
            [variance.at(float(step) * unit - (unit - 1) / 2) for step in steps], dtype=torch.float64, device="cpu"
        )
        values = values.clamp(min=0.0)
        total = float((values * weights).sum())
        values = values + (FLOOR * total / max(float(weights.sum()), 1.0) or 1.0)
        total = float((values * weights).sum()) or 1.0
        responses = [*stored, *wanted]
        scales = (values * weights / total).sqrt()[:, None]
        # Rows need not be kept: a rotation makes a triangle of them, some at a time. Squaring the matrix, as normal
        # equations do, would square its condition.
        triangle = torch.zeros(0, len(responses), dtype=torch.float64, device="cpu")
        for begin in range(0, len(scales), ROWS_AT_ONCE):
            rows = slice(begin, begin + ROWS_AT_ONCE)
            tails = [_tails(each, steps[rows], begins[rows], ends[rows]) for each in responses]
            part = torch.cat([triangle, torch.stack(tails, dim=1) * scales[rows]])
            triangle = torch.linalg.qr(part, mode="r")[1]
        self._matrix, self._wanted = triangle[:, : len(items)], triangle[:, len(items) :]
        jumps = [float((_jumps(each, steps, begins, ends) * values * weights).sum()) / total for each in responses]
        self._jumps = jumps[len(items) :]
        # Without a measure of the student's size: as large as the way it has come, as from a small start.
        size = 1.0 if variance.squared_norm is None else variance.squared_norm / (total * unit)
        roundings = [item.rounding**2 * size / 3 for item in items]
        # What a stored average differs by from its own smooth tails is an error of the file as rounding is.
        self._penalties = torch.tensor(
            list(map(float.__add__, roundings, jumps)), dtype=torch.float64, device="cpu"
        ).sqrt()

    def solve(self, number: int) -> Solution:
        """The best coefficients for one target, of as few items as do."""
        wanted = self._wanted[:, number]
        distances = (self._matrix - wanted[:, None]).square().sum(dim=0)
        singles = distances + self._penalties.square()
        pool = self._students or range(len(singles))
        nearest = min(pool, key=lambda i: float(singles[i]))
        reference = float(singles[nearest])
        if float(distances[nearest]) <= NOTHING:
            alone = [0.0] * len(singles)
            alone[nearest] = 1.0
            return Solution(tuple(alone), 0.0, nearest)
        everything = list(range(len(singles)))
        coefficients, best = self._fit(everything, wanted)
        # The combination is never worse than the nearest item alone, whatever the digits say.
        for idle in IDLE:
            kept = [i for i in everything if abs(coefficients[i]) > idle]
            if not kept or len(kept) == len(everything):
                continue
            fewer, error = self._fit(kept, wanted)
            if error <= best * EXTRA_ERROR**2 + 1e-18 * reference:
                coefficients, best = fewer, error
                break
        if best > reference:
            coefficients, best = [float(i == nearest) for i in everything], reference
        jumps = self._jumps[number]
        return Solution(tuple(coefficients), math.sqrt((best + jumps) / (reference + jumps)), nearest)

    def _fit(self, kept: Sequence[int], wanted: torch.Tensor) -> tuple[list[float], float]:
        """Coefficients of the items `kept`, 0 elsewhere, and the expected square that they leave."""
        coefficients = [0.0] * self._matrix.shape[1]
        # The sum is 1: one item takes what the others leave. By a stable one, so that no digits are lost.
        last = kept[-1]
        others = list(kept[:-1])
        rows = self._matrix[:, others] - self._matrix[:, last : last + 1]
        target = wanted - self._matrix[:, last]
        penalties = torch.diag(self._penalties[others])
        closing = -self._penalties[last] * torch.ones(1, len(others), dtype=torch.float64, device="cpu")
        system = torch.cat([rows, penalties, closing])
        right = torch.cat(
            [target, torch.zeros(len(others), dtype=torch.float64, device="cpu"), -self._penalties[last : last + 1]]
        )
        found = torch.zeros(0, dtype=torch.float64, device="cpu")
        if others:
            # By singular values: two files may hold the same, and torch's other drivers fail on that.
            found = torch.linalg.lstsq(system, right[:, None], rcond=1e-13, driver="gelsd").solution[:, 0]
        for i, value in zip(others, found.tolist(), strict=True):
            coefficients[i] = value
        coefficients[last] = 1.0 - math.fsum(found.tolist())
        return coefficients, float((system @ found - right).square().sum())


_Stepped = Ema | SteppedPower


def _jumps(response: Response, steps: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """At the nodes, the expected square of what an average with an interval differs by from its own smooth tails.

    It stays the same for `interval` steps while those fall in a straight line; averages of every step cannot follow.
    """
    squares = torch.zeros_like(steps)
    if isinstance(response, _Stepped) and response.interval > 1:
        smooth = (begins >= response.start) & (ends <= response.end) & ~_lies_between_jumps(response, begins, ends)
        slope = response.inner_tail(steps[smooth] + 0.5) - response.inner_tail(steps[smooth] - 0.5)
        squares[smooth] = slope.square() * (response.interval**2 - 1) / 12
    return squares


def _tails(response: Response, steps: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """P(s) at the nodes; each lies in (begin, end], within which no response starts or ends."""
    tails = (ends <= response.start).double()
    inside = (begins >= response.start) & (ends <= response.end)
    if isinstance(response, _Stepped) and response.interval > 1:
        exact = inside & _lies_between_jumps(response, begins, ends)
        inside &= ~exact
        tails[exact] = response.tail_before(_next_update(response, ends[exact]))
    if bool(inside.any()):
        values: Any = response.inner_tail(steps[inside])
        tails[inside] = values
    return tails


def _next_update(response: _Stepped, steps: torch.Tensor) -> torch.Tensor:
    """The number, counted from `start`, of the first update that is not before each of `steps`."""
    return torch.div(steps - response.start + response.interval - 1, response.interval, rounding_mode="floor")


def _num_single_jumps(response: Response) -> tuple[int, int]:
    """How many jumps are taken one by one: at the start and at the end of an average with an interval.

    An exponential one jumps most at its end, a power one at its start as well.
    """
    if not isinstance(response, _Stepped) or response.interval == 1:
        return 0, 0
    count = (response.end - response.start) // response.interval
    early = 0 if isinstance(response, Ema) or count <= MAX_JUMPS else MAX_JUMPS // 2
    return early, min(count, MAX_JUMPS - early)


def _lies_between_jumps(response: _Stepped, begins: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Whether no jump lies inside each of the panels (begin, end]."""
    early, late = _num_single_jumps(response)
    early_end, late_begin = response.start + early * response.interval, response.end - late * response.interval
    return (ends <= early_end) | (begins >= late_begin)


def _jump_steps(response: Response) -> Iterator[int]:
    """The steps of the updates that are borders."""
    if isinstance(response, _Stepped):
        early, late = _num_single_jumps(response)
        yield from range(response.start, response.start + (early + bool(early)) * response.interval, response.interval)
        yield from range(response.end, response.end - (late + bool(late)) * response.interval, -response.interval)
