"""How an average depends on the path that the student took: the weight it gives to each step. float64, no I/O.

A response is known by its tail sums, P(s) = the weight of the student after step s and after every later one. With the
student's increments d(s) = student(s) - student(s - 1) the average is student(start) + sum over s of P(s) d(s).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from ckpt_ema.errors import MisuseError, quoted

MAX_MOMENTUM = 1 - 2**-53
MAX_EVERY = 1 << 53
TINY = 1e-9
"""Below, a decay is a straight line to all digits."""

MIN_SIGMA_REL = 1e-6
MAX_SIGMA_REL = 12**-0.5
"""A power average with exponent 0 is the mean of the whole path; wider ones there are not."""


class Response(Protocol):
    """The weights of one average over the steps of training; they sum to 1."""

    @property
    def start(self) -> int:
        """P(s) is 1 up to here."""

    @property
    def end(self) -> int:
        """P(s) is 0 after it."""

    def inner_tail(self, step: Any) -> Any:
        """P(s) for start < s <= end; `step` is a number or a torch tensor of any shape, in float64."""


@dataclass(frozen=True, slots=True)
class Impulse:
    """The student itself, after one step."""

    step: int
    """After which it was saved."""

    @property
    def start(self) -> int:
        """Its step."""
        return self.step

    @property
    def end(self) -> int:
        """Its step."""
        return self.step

    def inner_tail(self, step: Any) -> Any:
        """Never asked: no step lies between start and end."""
        return step * 0.0

    def scaled(self, unit: int) -> Impulse:
        """In units of `unit` steps."""
        return Impulse(self.step // unit)


@dataclass(frozen=True, slots=True)
class Ema:
    """A copy of the student after step `start`, then `teacher = (1 - momentum) * teacher + momentum * student`.

    Once every `interval` steps, up to `end`, which is the step of the last update.
    """

    momentum: float
    """The student's share at each update."""

    start: int
    """The step of the copy."""

    end: int
    """The step of the last update."""

    interval: int = 1
    """Steps from one update to the next."""

    def inner_tail(self, step: Any) -> Any:
        """1 - (1 - momentum) ** (updates from `step` on).

        With an interval these come in jumps; here they are spread evenly between, with the same mean over each.
        """
        updates = (self.end - step) / self.interval + (1 + 1 / self.interval) / 2
        half = -math.log1p(-self.momentum) / 2
        within = half / self.interval
        mean = math.sinh(half) / (self.interval * math.sinh(within)) if within > TINY else 1.0
        return 1 - (1 - self.momentum) ** updates / mean

    def tail_before(self, number: Any) -> Any:
        """P(s) where the next update is the `number`-th after `start`."""
        return 1 - (1 - self.momentum) ** ((self.end - self.start) // self.interval - number + 1)

    def scaled(self, unit: int) -> Ema:
        """In units of `unit` steps."""
        return Ema(self.momentum, self.start // unit, self.end // unit, self.interval // unit)


@dataclass(frozen=True, slots=True)
class Power:
    """The weight of a step grows with the power `gamma` of its distance from `start` (Karras et al. 2024, EDM2).

    As the recurrence makes it: teacher = b * teacher + (1 - b) * student with b = (1 - 1/t) ** (gamma + 1) at the t-th
    step after `start`, the first of which copies.
    """

    gamma: float
    """The exponent; `gamma_of` a width."""

    start: int
    """The last step before the first update."""

    end: int
    """The step of the last update."""

    def inner_tail(self, step: Any) -> Any:
        """1 - ((step - 1 - start) / (end - start)) ** (gamma + 1)."""
        return 1 - ((step - 1 - self.start) / (self.end - self.start)) ** (self.gamma + 1)


@dataclass(frozen=True, slots=True)
class SteppedPower:
    """ema-pytorch's power average: updated after steps 1, 1 + interval, 1 + 2 * interval, ...; the first copies.

    b = (1 - 1/(step + 1)) ** (gamma + 1) at each update, whatever the interval (`KarrasEMA.beta`, ema-pytorch 0.8).
    """

    gamma: float
    """The exponent; `gamma_of` a width."""

    end: int
    """The step of the last update."""

    interval: int
    """Steps from one update to the next."""

    @property
    def start(self) -> int:
        """The step of the first update."""
        return 1

    def inner_tail(self, step: Any) -> Any:
        """As `tail_before`, spread evenly between the updates."""
        return self.tail_before((step - 1) / self.interval + (1 - 1 / self.interval) / 2)

    def tail_before(self, number: Any) -> Any:
        """P(s) where the next update is the `number`-th after `start`.

        1 - (product of (j + 1/interval) / (j + 2/interval)) ** (gamma + 1) over updates j from `number` on.
        """
        one, two, behind = 1 / self.interval, 2 / self.interval, (self.end - 1) // self.interval + 1
        kept = math.lgamma(behind + one) - math.lgamma(behind + two) + _log_gamma(number + two)
        return 1 - math.e ** ((self.gamma + 1) * (kept - _log_gamma(number + one)))


def _log_gamma(x: Any) -> Any:
    return math.lgamma(x) if isinstance(x, (int, float)) else x.lgamma()


@dataclass(frozen=True, slots=True)
class Uniform:
    """The mean over the steps after `start` up to `end`."""

    start: int
    """The last step before those that count."""

    end: int
    """The last step that counts."""

    def inner_tail(self, step: Any) -> Any:
        """Falls in a straight line."""
        return (self.end - step + 1) / (self.end - self.start)


def declared_response(name: str, text: str, end: int) -> Response:
    """The response of an average called `name` that somebody describes as `power:SIGMA_REL` or `ema:MOMENTUM`.

    From step 0 to `end`. `ema:MOMENTUM:EVERY` was updated every so many steps, `power:SIGMA_REL:EVERY` by
    ema-pytorch with that `update_every`. Raises MisuseError.
    """
    kind, *numbers = text.split(":") if isinstance(text, str) else [""]
    try:
        value = float(numbers[0])
        every = int(numbers[1]) if len(numbers) > 1 else 1
    except (ValueError, IndexError):
        kind, value, every = "", 0.0, 1
    if len(numbers) <= 2 and 1 <= every < MAX_EVERY:
        if kind == "ema" and 0 < value < 1:
            return Ema(value, 0, end - end % every, every)
        if kind == "power" and len(numbers) == 1:
            return Power(gamma_of(value), 0, end)
        if kind == "power":
            return SteppedPower(gamma_of(value), 1 + max(0, end - 1) // every * every, every)
    raise MisuseError(
        f"`{name}` is said to be {text!r}, and must be power:SIGMA_REL or ema:MOMENTUM, with :EVERY after it where"
        " it was updated every so many steps only (of powers: ema-pytorch's `update_every`)",
        hint=f"pass for example `--average {quoted(f'{name}=power:0.1')}`",
    )


def tail_at(response: Response, step: float) -> float:
    """P(step), whichever side of start and end it lies on."""
    if step <= response.start:
        return 1.0
    return float(response.inner_tail(step)) if step <= response.end else 0.0


def momentum_of_half_life(half_life: float, interval: int = 1) -> float:
    """1 - 0.5 ** (interval / half_life): after `half_life` steps half of a student's share is left.

    Below 1 also where it would round to that. Raises MisuseError for a half-life that is not a finite number above 0.
    """
    if not 0 < half_life < math.inf:
        raise MisuseError(
            f"the half-life is {half_life}, and must be a finite number of steps above 0", hint="pass for example 1000"
        )
    return min(-math.expm1(-math.log(2) * interval / half_life), MAX_MOMENTUM)


def half_life_of(momentum: float, interval: int = 1) -> float:
    """Steps after which half of a student's share is left."""
    return -math.log(2) / math.log1p(-momentum) * interval


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power average whose width is `sigma_rel` times its length, below 12 ** -0.5.

    The largest root of g**3 + 7 g**2 + (16 - sigma**-2) g + (12 - sigma**-2) = 0 (Karras et al. 2024, EDM2,
    algorithm 2), from above by Newton's method. Raises MisuseError for another width.
    """
    if not MIN_SIGMA_REL <= sigma_rel < MAX_SIGMA_REL:
        raise MisuseError(
            f"the relative width is {sigma_rel}, and must lie between {MIN_SIGMA_REL:g} and {MAX_SIGMA_REL:.4f}",
            hint="pass for example `--sigma-rel 0.1`",
        )
    wide = sigma_rel**-2
    gamma = 1 / sigma_rel
    for _ in range(100):
        value = ((gamma + 7) * gamma + 16 - wide) * gamma + 12 - wide
        lower = gamma - value / ((3 * gamma + 14) * gamma + 16 - wide)
        if lower >= gamma:
            break
        gamma = lower
    return gamma
