"""What a MeanTeacher is told, checked once: words in, the rule's numbers out."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any, Literal

from ckpt_ema.averages.profiles import DEFAULT_MOMENTUM, check_momentum
from ckpt_ema.averages.responses import momentum_of_half_life
from ckpt_ema.errors import MisuseError
from ckpt_ema.online.snapshots import Snapshots

Arithmetic = Literal["hook", "lerp"]
OnNonfinite = Literal["raise", "skip"]
ShadowDtype = Literal["float32", "student"]
ShadowDevice = Literal["cpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A MeanTeacher's configuration; see there for what each means."""

    momentum: float
    """The student's share at each update, also where a half-life was given."""

    interval: int
    skip_buffers: bool
    dtype: ShadowDtype
    device: ShadowDevice | None
    arithmetic: Arithmetic
    on_nonfinite: OnNonfinite | None
    snapshots: Snapshots | None = None


def check_settings(
    *,
    momentum: float | None = None,
    half_life: float | None = None,
    interval: int = 1,
    skip_buffers: bool = True,
    dtype: ShadowDtype = "float32",
    device: ShadowDevice | None = None,
    arithmetic: Arithmetic = "hook",
    on_nonfinite: OnNonfinite | None = None,
    snapshots: Snapshots | None = None,
) -> Settings:
    """The settings, or MisuseError for those that make no sense."""
    if type(interval) is not int or interval < 1:
        raise MisuseError(f"interval is {interval!r}, and must be a whole number from 1", hint="pass interval=1")
    if half_life is None:
        momentum = DEFAULT_MOMENTUM if momentum is None else _as_number("momentum", momentum)
        check_momentum(momentum)
    else:
        if momentum is not None:
            raise MisuseError("momentum and half_life say the same thing twice", hint="pass one of them")
        momentum = momentum_of_half_life(_as_number("half_life", half_life), interval)
    if snapshots is not None and not isinstance(snapshots, Snapshots):
        raise MisuseError(
            f"snapshots is {snapshots!r}, and must be a ckpt_ema.Snapshots", hint='pass snapshots=Snapshots("FOLDER")'
        )
    return Settings(
        momentum=momentum,
        interval=interval,
        skip_buffers=_one_of("skip_buffers", skip_buffers, (True, False)),
        dtype=_one_of("dtype", dtype, ("float32", "student")),
        device=_one_of("device", device, ("cpu", None)),
        arithmetic=_one_of("arithmetic", arithmetic, ("hook", "lerp")),
        on_nonfinite=_one_of("on_nonfinite", on_nonfinite, ("raise", "skip", None)),
        snapshots=snapshots,
    )


def _as_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise MisuseError(f"{name} is {value!r}, and must be a number", hint=f"pass {name} as a plain float")
    try:
        return float(value)
    except OverflowError:
        raise MisuseError(f"{name} is larger than any float", hint=f"pass {name} as a plain float") from None


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if not any(value is each or value == each for each in allowed):
        raise MisuseError(f"{name} is {value!r}", hint=f"pass one of {', '.join(map(repr, allowed))}")
    return value
