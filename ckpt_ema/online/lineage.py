"""Where a teacher's numbers come from: what happens to them in, how they depend on the student's path out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ckpt_ema.averages.responses import Ema
from ckpt_ema.online.settings import Settings

Start = Literal["student", "teacher"]


@dataclass(slots=True)
class Lineage:
    """What a teacher began with, and whether a formula describes it since."""

    start: Start | None = None
    """`student` where the first update copied it, `teacher` where a module's numbers were kept; None before either."""

    copied: tuple[int, int] | None = None
    """The step whose student was copied last, and the number of updates then; None where no formula follows from it."""

    offset: int | None = None
    """What a snapshot's step had beyond the calls of `update`, once one was written."""

    is_captured: bool = False
    """Whether a graph may change the teacher, how often nobody tells: no formula describes it from then on."""

    def begin_with_student(self, step: int, num_updates: int, *, is_narrow: bool) -> None:
        """The teacher is a copy of the student of `step`; in 16 bits no formula follows from that."""
        self.start = "student"
        self.copied = None if is_narrow else (step, num_updates)

    def note_snapshot(self, step: int, num_steps: int) -> None:
        """The first one says what the others' steps have to go on from."""
        if self.offset is None:
            self.offset = step - num_steps

    def lose_formula(self) -> None:
        """Somebody else wrote to the teacher: none holds until it copies the student again."""
        self.copied = None

    def suspend_formula(self) -> tuple[int, int] | None:
        """None holds until `resume_formula` gets what this returns: an interrupted update leaves some tensors ahead.

        Two methods, no context manager, which would take a fortieth of a small student's update.
        """
        copied, self.copied = self.copied, None
        return copied

    def resume_formula(self, suspended: tuple[int, int] | None) -> None:
        """The update is complete."""
        self.copied = suspended

    def note_capture(self) -> None:
        """A graph has an update of the teacher in it from now on, and may do it at any time."""
        self.is_captured = True

    def without_formula(self) -> Lineage:
        """The same where none holds."""
        return replace(self, copied=None)

    def in_place_of(self, earlier: Lineage) -> Lineage:
        """That of numbers that were loaded where `earlier`'s were: a graph that changed those changes these."""
        return replace(self, is_captured=earlier.is_captured)

    def of_copy(self) -> Lineage:
        """That of a teacher's copy: no graph changes that, and what one did to the numbers is in them."""
        return replace(self, copied=None if self.is_captured else self.copied, is_captured=False)

    def entries(self) -> dict[str, Any]:
        """Its entries of a state dict: `start`, `copied`, `offset`."""
        copied = None if self.copied is None or self.is_captured else list(self.copied)
        return {"start": self.start, "copied": copied, "offset": self.offset}

    @classmethod
    def from_entries(cls, state: Mapping[str, Any]) -> Lineage:
        """What `entries` gave, or a KeyError, TypeError, ValueError or IndexError."""
        start, copied, offset = state["start"], state.get("copied"), state.get("offset")
        if start not in (None, *get_args(Start)):
            raise ValueError(f"start is {start!r}")
        return cls(
            start=start,
            copied=None if copied is None else (int(copied[0]), int(copied[1])),
            offset=None if offset is None else int(offset),
        )

    def response(self, step: int, settings: Settings, num_steps: int, num_updates: int) -> Ema | None:
        """How the teacher depends on the student's path, where the step now is `step`; None unless that is exact.

        After `num_steps` calls of `update`, `num_updates` of which changed it.
        """
        interval = settings.interval
        if self.is_captured or self.copied is None or self.copied[0] % interval:
            return None
        if self.offset is not None and self.offset != step - num_steps:
            return None  # what `step` counts are no calls of `update`
        steps_since, updates_since = num_steps - self.copied[0], num_updates - self.copied[1]
        start = step - steps_since
        if updates_since != steps_since // interval or start < 0:  # some were skipped, or somebody set num_steps
            return None
        # The steps after the last update have no share in it.
        return Ema(settings.momentum, start, start + updates_since * interval, interval)
