"""Snapshot tracks: the student at every step in, averages of known response out, each file with what it depends on.

From such files `ckpt-ema reconstruct` makes the average of any other momentum afterwards.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ckpt_ema.averages.profiles import check_momentum
from ckpt_ema.averages.response_records import response_record
from ckpt_ema.averages.responses import Ema, Power, Response, gamma_of, momentum_of_half_life
from ckpt_ema.errors import CkptEmaError, MisuseError, warn
from ckpt_ema.keywords import made_of_known_keywords
from ckpt_ema.online.increments import Increments
from ckpt_ema.online.rule import Rule, is_finite
from ckpt_ema.online.shadows import beside, check_fit, shadow_of
from ckpt_ema.online.snapshot_folder import SnapshotFolder, is_first_rank
from ckpt_ema.online.teacher_file import OnlineRecord, check_file_replaceable, write_teacher
from ckpt_ema.online.tracking import Tracking, is_sharded

SNAPSHOT_DTYPES = ("float32", "student", "bfloat16", "float16")
DEFAULT_SIGMA_REL = (0.05, 0.10)

Numbers = float | Sequence[float]


@dataclass(frozen=True, slots=True)
class Track:
    """One average that is followed beside the teacher, updated at every step."""

    given: Literal["sigma_rel", "momentum", "half_life"]
    """What says how wide it is."""

    value: float
    """The relative width, the share at each step, or the number of steps."""

    @property
    def name(self) -> str:
        """As in the names of its files: `power_0.05`, `ema_0.001`, `ema_hl500`."""
        prefix = {"sigma_rel": "power_", "momentum": "ema_", "half_life": "ema_hl"}[self.given]
        return prefix + repr(self.value).removesuffix(".0")

    @property
    def momentum(self) -> float | None:
        """The student's share at each update; None for a power average, where it falls."""
        if self.given == "sigma_rel":
            return None
        return self.value if self.given == "momentum" else momentum_of_half_life(self.value)

    def momentum_at(self, update: int) -> float:
        """The student's share at the `update`-th update, from 2 on: the first copies.

        Of a power average 1 - (1 - 1/t)**(gamma + 1) (Karras et al. 2024, EDM2).
        """
        if self.momentum is not None:
            return self.momentum
        return -math.expm1((gamma_of(self.value) + 1) * math.log1p(-1 / update))

    def response(self, start: int, end: int) -> Response:
        """After step `end`, where step `start` was the last before its first update."""
        if self.momentum is not None:
            return Ema(self.momentum, start + 1, end)
        return Power(gamma_of(self.value), start, end)


@made_of_known_keywords
@dataclass(frozen=True, slots=True)
class Snapshots:
    """Which tracks a MeanTeacher follows beside the teacher, and how they are written."""

    directory: str | os.PathLike[str]
    """Where the files go, of one MeanTeacher alone, created with it. A training that begins anew is refused where an
    earlier one's files are; one that goes on from its state gives those of later steps another name."""

    every: int = 1000
    """Steps from one file to the next."""

    sigma_rel: Numbers | None = None
    """Relative widths of power averages, 0 < sigma_rel < 12 ** -0.5; (0.05, 0.10) where nothing else is asked for."""

    momentum: Numbers = ()
    """Of exponential averages: the student's share at each step, 0 < momentum < 1."""

    half_life: Numbers = ()
    """Of exponential averages: steps after which a student's share has halved."""

    dtype: str = "float32"
    """Of the written tensors: `float32`, `student`, `bfloat16` or `float16`."""

    keep: int | None = None
    """Files of each track that stay, the newest ones; None for all, also for those of later steps that got another
    name."""

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            value = getattr(self, name)
            if not (value is None and name == "keep") and (type(value) is not int or value < 1):
                raise MisuseError(f"{name} is {value!r}, and must be a whole number from 1", hint=f"pass {name}=1000")
        if not isinstance(self.directory, (str, os.PathLike)) or not os.fspath(self.directory):
            raise MisuseError(f"directory is {self.directory!r}", hint="pass the folder that the files shall go to")
        if self.dtype not in SNAPSHOT_DTYPES:
            raise MisuseError(
                f"dtype is {self.dtype!r}", hint=f"pass one of {', '.join(map(repr, SNAPSHOT_DTYPES))} to Snapshots"
            )
        momentum, half_life = _numbers("momentum", self.momentum), _numbers("half_life", self.half_life)
        default = () if momentum or half_life else DEFAULT_SIGMA_REL
        sigma_rel = default if self.sigma_rel is None else _numbers("sigma_rel", self.sigma_rel)
        for name, values in (("sigma_rel", sigma_rel), ("momentum", momentum), ("half_life", half_life)):
            object.__setattr__(self, name, values)
        _check_tracks(self.tracks)

    @property
    def tracks(self) -> tuple[Track, ...]:
        """One for each width, momentum and half-life."""
        return (
            *(Track("sigma_rel", value) for value in _numbers("sigma_rel", self.sigma_rel)),
            *(Track("momentum", value) for value in _numbers("momentum", self.momentum)),
            *(Track("half_life", value) for value in _numbers("half_life", self.half_life)),
        )


class SnapshotTracks:
    """The tracks of one student: their numbers, and what their files need to tell."""

    def __init__(self, settings: Snapshots, tracking: Tracking) -> None:
        """Follow what `tracking` averages; refuses sharded students.

        In float32 at least, and with one rounding less than the hook: the files say what weight each step has, and
        in 16 bits most updates are lost.
        """
        if any(is_sharded(slot.tensor) for slot in tracking.averaged):
            raise MisuseError(
                "snapshots of a sharded student cannot be written: no rank has all of it",
                hint="omit `snapshots`, and save the teacher's state_dict with torch.distributed.checkpoint",
            )
        self._settings = settings
        self._slots = tracking.averaged
        self._rules = {track: Rule(lerp=True) for track in settings.tracks}
        self._shadows = {track: [shadow_of(slot, "float32") for slot in self._slots] for track in settings.tracks}
        self._has_warned = False
        self._increments = Increments([slot.local for slot in self._slots], settings.every)
        self._start = 0
        self._num_updates = 0
        self._has_begun = self._is_resumed = False
        self._folder = SnapshotFolder(settings.directory, [track.name for track in settings.tracks])

    def update(self, step: int) -> None:
        """Fold the student after `step` into every track, one update for each; the first copies it."""
        students = [slot.local for slot in self._slots]
        if not self._has_begun:
            self._folder.check_empty()
            self._has_begun = True
        self._take_over(step)
        if not self._num_updates:
            self._start = step - 1
        for track, shadows in self._shadows.items():
            for number, (slot, student) in enumerate(zip(self._slots, students, strict=True)):
                shadows[number] = beside(shadows[number], student, slot.name)
            if self._num_updates:
                self._rules[track].average_all_(shadows, students, track.momentum_at(self._num_updates + 1))
            else:
                for shadow, student in zip(shadows, students, strict=True):
                    shadow.copy_(student)
                self._rules[track].prepare(shadows, students)
        self._num_updates += 1
        self._increments.observe(step, students)

    def write_due(self, step: int, record: OnlineRecord) -> None:
        """Write every track where `step` asks for it; of several ranks, the first does.

        `record` is the teacher's. Raises CkptEmaError where a track is not finite or a file cannot be written.
        """
        if step % self._settings.every or not self._num_updates or not is_first_rank():
            return
        self._take_over(step)  # where this step's update was left out
        self._folder.begin_writing(step)
        for track, shadows in self._shadows.items():
            self._write(track, shadows, step, record)
            if self._settings.keep is not None:
                self._folder.remove_older(track.name, step, keep=self._settings.keep)

    def _take_over(self, step: int) -> None:
        """After `load_state_dict`, before `step` counts: what others wrote of it and later is of another path."""
        if self._is_resumed:
            self._folder.take_over(step - 1)
            self._is_resumed = False

    def state_dict(self) -> dict[str, Any]:
        """Counters, increments, and every track's tensors by its name, all of them this object's own."""
        return {
            "start": self._start,
            "num_updates": self._num_updates,
            "increments": self._increments.state_dict(),
            "tracks": {track.name: self._tensors(track) for track in self._shadows},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise CkptEmaError where a state of other tracks or another student is to be loaded."""
        if not {"start", "num_updates", "increments", "tracks"} <= state.keys():
            raise CkptEmaError(
                "a part of the snapshot tracks' state is missing", hint="pass what `MeanTeacher.state_dict()` returned"
            )
        here = [track.name for track in self._shadows]
        if sorted(state["tracks"]) != sorted(here):
            raise CkptEmaError(
                f"the state has the snapshot tracks {', '.join(state['tracks'])}, and here are {', '.join(here)}",
                hint="pass Snapshots with the tracks of the state",
            )
        stored = {f"{name}: {key}": tensor for name, each in state["tracks"].items() for key, tensor in each.items()}
        check_fit(
            {f"{track.name}: {key}": t.shape for track in self._shadows for key, t in self._tensors(track).items()},
            stored,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; raises CkptEmaError, nothing changed, for a damaged one."""
        try:
            start, num_updates = int(state["start"]), int(state["num_updates"])
            self._increments.load_state_dict(state["increments"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CkptEmaError(
                f"the snapshot tracks' state is damaged ({type(error).__name__}: {error})",
                hint="pass what `MeanTeacher.state_dict()` returned",
            ) from error
        for track in self._shadows:
            for name, tensor in self._tensors(track).items():
                tensor.copy_(state["tracks"][track.name][name])
        self._start, self._num_updates = start, num_updates
        self._has_begun = self._is_resumed = True

    def start_anew(self) -> None:
        """Let the next update copy the student."""
        self._num_updates = 0

    def _tensors(self, track: Track) -> dict[str, torch.Tensor]:
        return {slot.name: shadow for slot, shadow in zip(self._slots, self._shadows[track], strict=True)}

    def _write(self, track: Track, shadows: list[torch.Tensor], step: int, record: OnlineRecord) -> None:
        path = self._folder.path_of(track.name, step)
        check_file_replaceable(path, overwrite=True, by_snapshot=True)
        if not is_finite(shadows):
            raise CkptEmaError(
                f"the track {track.name} holds a NaN or an infinity at step {step}; nothing was written",
                hint='go on from the last state that was saved, with on_nonfinite="raise"',
            )
        averaged = {
            name: (shadow, slot.tensor)
            for slot, shadow in zip(self._slots, shadows, strict=True)
            for name in slot.names
        }
        write_teacher(path, averaged, {}, self._record(track, step, record), dtype=self._settings.dtype, overwrite=True)

    def _record(self, track: Track, step: int, record: OnlineRecord) -> OnlineRecord:
        increments, squared_norm = self._increments.read()
        num_skipped = step - self._start - self._num_updates
        if num_skipped and not self._has_warned:
            self._has_warned = True
            missed = f"missed {num_skipped} of {step - self._start} steps"
            what = missed if num_skipped > 0 else "saw the step counter set back"
            warn(
                f"the snapshot tracks {what}: which weight each step has in their files is not known any more, and"
                " `ckpt-ema reconstruct` is going to leave them out"
            )
        # After a step that was left out the weights are no longer those of the formula.
        response = None if num_skipped else response_record(track.response(self._start, step))
        return replace(
            record,
            momentum=track.momentum,
            interval=1,
            start="student",
            num_steps=step,
            num_updates=self._num_updates,
            num_skipped=num_skipped,
            step=step,
            ties=[slot.names for slot in self._slots if len(slot.names) > 1],
            more={
                "track": track.name,
                track.given: track.value,
                "response": response and {**response, track.given: track.value},
                "increments": increments,
                "squared_norm": squared_norm,
            },
        )


def _numbers(name: str, given: Any) -> tuple[float, ...]:
    """One number or several as a tuple; raises MisuseError for anything else."""
    values = tuple(given) if isinstance(given, Iterable) and not isinstance(given, (str, bytes)) else (given,)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise MisuseError(f"{name} is {given!r}, and must be a number or several", hint=f"pass {name}=(0.05, 0.1)")
    try:
        return tuple(float(value) for value in values)
    except OverflowError as error:
        raise MisuseError(f"{name} is larger than any number a computer takes") from error


def _check_tracks(tracks: Sequence[Track]) -> None:
    if not tracks:
        raise MisuseError("snapshots without a track", hint="pass sigma_rel, momentum or half_life")
    for track in tracks:
        if track.momentum is None:
            gamma_of(track.value)
        else:
            check_momentum(track.momentum)
    alike = {(track.momentum, track.value if track.momentum is None else None) for track in tracks}
    if len(alike) < len(tracks):
        raise MisuseError(
            f"two of the tracks are the same: {', '.join(track.name for track in tracks)}",
            hint="omit one of them",
        )
