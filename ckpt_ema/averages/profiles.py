"""Averaging profiles: checkpoints with their steps in, one (keep, take) pair per checkpoint out. float64, no I/O.

Every rule is run as the same recurrence, `teacher = keep * teacher + take * student`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ckpt_ema.averages.quadrature import nodes_between
from ckpt_ema.averages.responses import Ema, Power, Response, Uniform, gamma_of, momentum_of_half_life, tail_at
from ckpt_ema.errors import MisuseError

DEFAULT_MOMENTUM = 0.001
"""MeanTeacherHook's."""

RULE = "teacher = (1 - momentum) * teacher + momentum * student"
POWER_RULE = "teacher = b * teacher + (1 - b) * student, b = (1 - 1 / step) ** (gamma + 1)"
SMALLEST_COEFFICIENT = 1e-12
"""A student with less shows in no digit of a float32 teacher, and is not read."""

Kind = Literal["ema", "uniform", "minus-sqrt", "power", "given"]
Between = Literal["linear", "hold"]


class Update(NamedTuple):
    """One step of the recurrence `teacher = keep * teacher + take * student`."""

    keep: float
    """The teacher's share."""

    take: float
    """The student's."""


# The first student becomes the teacher. A real copy: 0 * NaN is NaN, and 1 * x + 0 * y is not always x.
COPY = Update(0.0, 1.0)


def check_momentum(momentum: float) -> None:
    """Raise MisuseError unless 0 < momentum < 1."""
    if not 0 < momentum < 1:
        raise MisuseError(
            f"the momentum is {momentum}, and must lie between 0 and 1 (both excluded)",
            hint="pass the share that each new student brings, for example 0.001",
        )


def inverted_momentum_warning(momentum: float, spelling: str) -> str | None:
    """What to say of a momentum that is probably the teacher's share, as many frameworks have it; None for others.

    `spelling` is how momenta are given here, with a place for the number: `momentum={:g}`.
    """
    if momentum <= 0.5:
        return None
    return (
        f"momentum {momentum:g} makes the teacher nearly the student: here it is the student's share. Where it is the"
        f" teacher's, {momentum:g} is written {spelling.format(1 - momentum)} here"
    )


@dataclass(frozen=True, slots=True)
class Profile:
    """What one teacher is to be: how much each checkpoint, or each step, counts in it."""

    kind: Kind
    """Its name in `--profile`; `given` where somebody gave the coefficients."""

    momentum: float | None = None
    """Of an `ema`: the share that a student brings."""

    half_life: float | None = None
    """The same in steps, where it was asked for in these."""

    sigma_rel: float | None = None
    """Of a `power`: its width relative to the length of training."""

    @property
    def title(self) -> str:
        """For people: `momentum 0.001`, `half-life 500`."""
        if self.kind == "ema":
            name, value = ("momentum", self.momentum) if self.half_life is None else ("half-life", self.half_life)
            return f"{name} {value:.12g}"
        return f"power {self.sigma_rel:.12g}" if self.kind == "power" else self.kind

    @property
    def rule(self) -> str:
        """In a formula, for the record."""
        if self.kind == "ema":
            return RULE
        if self.kind == "power":
            return POWER_RULE
        return "teacher = sum of coefficient * student"

    @property
    def tag(self) -> tuple[str, str]:
        """What tells it from other teachers in the name of a file: a word and its value."""
        if self.half_life is not None:
            return "half_life", repr(self.half_life).removesuffix(".0")
        if self.sigma_rel is not None:
            return "sigma_rel", repr(self.sigma_rel)
        return ("momentum", repr(self.momentum)) if self.momentum is not None else ("profile", self.kind)

    def momentum_over(self, interval: int) -> float:
        """The momentum of updates that are `interval` steps apart."""
        if self.half_life is not None:
            return momentum_of_half_life(self.half_life, interval)
        assert self.momentum is not None
        return self.momentum

    def response(self, start: int, end: int, interval: int = 1) -> Response:
        """How the teacher depends on the path from step `start` to step `end`; not for what counts checkpoints."""
        if self.kind == "ema":
            last_update = end - (end - start) % interval
            return Ema(self.momentum_over(interval), start, last_update, interval)
        if self.kind == "power":
            assert self.sigma_rel is not None
            # Its width is relative to the whole of training, whatever of that is stored.
            return Power(gamma_of(self.sigma_rel), 0, end)
        assert self.kind == "uniform"
        return Uniform(start, end)


def ema_updates(num_students: int, momentum: float, *, has_initial_teacher: bool = False) -> list[Update]:
    """The updates of a mean teacher, MeanTeacherHook's rule: keep 1 - momentum, take momentum.

    One per student, after the first, which is copied; with an initial teacher that one is copied, and every student
    takes part: `num_students + 1` updates. Shape: a list of float64 pairs.
    """
    check_momentum(momentum)
    num_updates = num_students if has_initial_teacher else num_students - 1
    return [COPY] + [Update(1 - momentum, momentum)] * num_updates


def coefficients_of(updates: Sequence[Update]) -> list[float]:
    """The share that each input of the recurrence has in the final teacher; they sum to 1 for an average.

    Input i enters with `take_i` and is multiplied by every later `keep`.
    """
    coefficients = []
    kept = 1.0
    for update in reversed(updates):
        coefficients.append(update.take * kept)
        kept *= update.keep
    return coefficients[::-1]


def effective_momentum(momentum: float, gap: int) -> float:
    """Momentum that folds `gap` equal per-step updates into one.

    1 - (1 - momentum)**gap, kept exact for tiny momenta (expm1/log1p).
    """
    return -math.expm1(gap * math.log1p(-momentum))


def momentum_for_first_share(num_updates: int, share: float) -> float:
    """The momentum that leaves the first input `share` of the teacher after `num_updates` updates.

    Solves (1 - momentum)**num_updates = share; rounded up to two significant digits.
    """
    momentum = -math.expm1(math.log(share) / num_updates)
    digits = 1 - math.floor(math.log10(momentum))
    scale = 10.0**digits
    return min(math.ceil(momentum * scale) / scale, 0.99)


def step_updates(
    profile: Profile,
    steps: Sequence[int],
    *,
    interval: int = 1,
    between: Between = "linear",
    has_copy_first: bool = False,
    knows_first_student: bool = False,
    origin: int | None = None,
) -> list[Update]:
    """The updates of a profile that counts training steps, for students saved after `steps` (strictly ascending).

    Between two checkpoints the student is taken to have moved in a straight line, or, with `hold`, to have been the
    newer one from the first step on. An `ema` works once every `interval` steps, counted from step `origin`, steps[0]
    by default. With `has_copy_first` the first input is a teacher rather than a student, and the student is held at the
    next checkpoint from there; unless `knows_first_student`, the one of steps[0], which is the second input then.
    Where the checkpoints lie `interval` apart, or with `hold`, these are the recurrence's own; else those of the
    collapsed coefficients.
    """
    if len(steps) == 1:
        return [COPY]
    if profile.kind != "ema":
        return updates_of(step_coefficients(profile.response(steps[0], steps[-1]), steps, between))
    momentum = profile.momentum_over(interval)
    start = steps[0] if origin is None else origin
    gaps = [_gap_shares(momentum, interval, start, a, b) for a, b in itertools.pairwise(steps)]
    if between == "hold" or all(gap.older == 0 for gap in gaps):
        first = [COPY, Update(1.0, 0.0)] if knows_first_student else [COPY]
        return first + [Update(gap.keep, gap.older + gap.newer) for gap in gaps]
    if has_copy_first and not knows_first_student:
        gaps[0] = gaps[0]._replace(older=0.0, newer=gaps[0].older + gaps[0].newer)
    shares = [0.0] * len(steps)
    kept = 1.0
    for i in range(len(gaps) - 1, -1, -1):
        shares[i + 1] += gaps[i].newer * kept
        shares[i] += gaps[i].older * kept
        kept *= gaps[i].keep
    if knows_first_student:
        return updates_of([kept, *shares])
    shares[0] += kept
    return updates_of(shares)


class _Gap(NamedTuple):
    """What an EMA does between two checkpoints: teacher = keep * teacher + older * student_a + newer * student_b."""

    keep: float
    older: float
    newer: float


def _gap_shares(momentum: float, interval: int, start: int, a: int, b: int) -> _Gap:
    """The updates after steps start + interval, start + 2 interval, ... in (a, b], of a student on a line from a to b.

    The j-th of n finds the student at (t + (j - 1) interval - a) / (b - a) of the way, t the first; the geometric sums
    over j are closed.
    """
    before = (a - start) // interval
    count = (b - start) // interval - before
    if not count:
        return _Gap(1.0, 0.0, 0.0)
    moved = momentum if count == 1 else effective_momentum(momentum, count)
    keep = 1 - moved
    gap = b - a
    # By how much the update before the first lies before a; 0 where a is a multiple of the interval.
    late = start + before * interval - a
    newer = (late * moved + interval * (count - (1 - momentum) * moved / momentum)) / gap
    if count == 1 and late + interval == gap:
        newer = moved
    return _Gap(keep, moved - newer, newer)


def step_coefficients(response: Response, steps: Sequence[int], between: Between) -> list[float]:
    """The coefficient of each student, saved after `steps`, in the average that `response` describes; they sum to 1.

    On a straight line from step a to step b every increment is the same, so what counts is the mean of the tail sums
    P(a + 1), ..., P(b); where the student is the one of b from step a + 1 on, P(a + 1) alone.
    """
    tails = [1.0]
    for a, b in itertools.pairwise(steps):
        if between == "hold":
            tails.append(tail_at(response, a + 1))
        else:
            tails.append(math.fsum(weight * tail_at(response, node) for node, weight in nodes_between(a, b)) / (b - a))
    return [older - newer for older, newer in itertools.pairwise([*tails, 0.0])]


def checkpoint_coefficients(kind: Kind, count: int) -> list[float]:
    """The coefficients of `count` checkpoints, oldest first, in a profile that counts these.

    `uniform`: all the same (LAWA, SWA). `minus-sqrt`: sqrt((i + 1) / n) - sqrt(i / n), the merge that stands for
    training's last part under a rate that falls as 1 - sqrt (WSM); the oldest has most.
    """
    if kind == "uniform":
        return [1 / count] * count
    assert kind == "minus-sqrt"
    return [math.sqrt((i + 1) / count) - math.sqrt(i / count) for i in range(count)]


def updates_of(shares: Sequence[float]) -> list[Update]:
    """The recurrence that gives each input its coefficient; `shares` are these and sum to 1.

    Where none is negative as a running mean, which needs no more digits than the students have. The first is copied,
    so one input alone has all.
    """
    if len(shares) == 1:
        return [COPY]
    if min(shares) < 0:
        return [COPY, Update(shares[0], shares[1]), *(Update(1.0, share) for share in shares[2:])]
    updates = [COPY]
    total = shares[0]
    for share in shares[1:]:
        before, total = total, total + share
        updates.append(Update(before / total, share / total) if total else COPY)
    return updates
