"""Averaging profiles: a number of checkpoints in, one (keep, take) pair per checkpoint out. float64, no I/O.

Every rule is run as the same recurrence, `teacher = keep * teacher + take * student`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ckpt_ema.errors import MisuseError


class Update(NamedTuple):
    """One step of the recurrence `teacher = keep * teacher + take * student`."""

    keep: float
    take: float


# The first student becomes the teacher. A real copy: 0 * NaN is NaN, and 1 * x + 0 * y is not always x.
COPY = Update(0.0, 1.0)


def check_momentum(momentum: float) -> None:
    """Raise MisuseError unless 0 < momentum < 1."""
    if not 0 < momentum < 1:
        raise MisuseError(
            f"the momentum is {momentum}, and must lie between 0 and 1 (both excluded)",
            hint="pass the share that each new student brings, for example 0.001",
        )


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
