"""What a MeanTeacher is told, checked once: words in, the rule's numbers out."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any, Literal

import torch

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
    """Steps from one update to the next."""

    skip_buffers: bool
    """Whether parameters alone are averaged."""

    dtype: ShadowDtype
    """Of a teacher that is kept here, where the student has fewer bits."""

    device: ShadowDevice | None
    """Where such a teacher is kept; None for where the student is."""

    arithmetic: Arithmetic
    """`hook` or `lerp`."""

    on_nonfinite: OnNonfinite | None
    """What an update does when the student holds a NaN or an infinity; None not to look."""

    snapshots: Snapshots | None = None
    """Which averages are followed beside the teacher."""


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


def check_modules(student: object, teacher: object) -> None:
    """Raise MisuseError unless `student` is a module, and `teacher` one or None."""
    if not isinstance(student, torch.nn.Module):
        raise MisuseError(f"the student is of type {type(student).__name__}, and must be a torch.nn.Module")
    if isinstance(teacher, (int, float)):
        raise MisuseError(
            f"the teacher is {teacher!r}, and must be a torch.nn.Module", hint=f"pass `momentum={teacher}`"
        )
    if teacher is not None and not isinstance(teacher, torch.nn.Module):
        raise MisuseError(f"the teacher is of type {type(teacher).__name__}, and must be a torch.nn.Module")


def check_teacher_options(*, has_module: bool, device: ShadowDevice | None, keep_teacher: bool) -> None:
    """Raise MisuseError for what makes no sense with a teacher module, or without one."""
    if has_module and device is not None:
        raise MisuseError(
            "`device` is for a teacher that is kept here, and a teacher module stays where it is",
            hint="omit one of the two",
        )
    if keep_teacher and not has_module:
        raise MisuseError("`keep_teacher` needs a teacher module", hint="pass MeanTeacher(student, teacher)")


def as_step(step: Any) -> int:
    """A trainer's counter, numpy's integers as well; MisuseError for anything else."""
    if isinstance(step, bool) or not isinstance(step, numbers.Integral) or step < 0:
        raise MisuseError(f"step is {step!r}, and must be a whole number from 0", hint="pass the trainer's counter")
    return int(step)


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
