"""A run directory that is written to in; which of its checkpoints are ready to be folded, and what was missed, out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ckpt_ema.errors import NoCheckpointError
from ckpt_ema.formats import reading_tables
from ckpt_ema.options import FoldOptions
from ckpt_ema.planning import find_run
from ckpt_ema.runs.checkpoints import STEPLESS_COPY, Checkpoint, Run
from ckpt_ema.runs.steps import numbers_in_name

Signature = tuple[tuple[str, int, int], ...]
"""Path, bytes, and a number that changes with the time, of each file."""


@dataclass(slots=True)
class _Waiting:
    """A checkpoint that is not folded yet."""

    signature: Signature
    """What it consisted of at the last look."""

    since: float
    """Since when it has been the same, in seconds of a clock that only goes forward."""


@dataclass(slots=True)
class WatchedRun:
    """What is known of a run between two looks at it."""

    path: Path
    """The run directory."""

    until_step: int | None
    """The last step that was asked for."""

    poll_seconds: float
    """How long a checkpoint must have been the same to count as finished."""

    patience_seconds: float
    """How long an unreadable one must have been the same to hold up newer ones no longer."""

    tell: Callable[[str], None]
    """Gets a line for what happens."""

    warn: Callable[[str], None]
    """Gets a line where somebody should look."""

    last_step: int | None = None
    """Of the newest checkpoint in the teacher."""

    last_unit: str | None = None
    """What `last_step` counts: checkpoints of another unit cannot be compared with it."""

    done: dict[Path, Signature] = field(default_factory=dict)
    """What is not to be read again, unless it is written again."""

    folded: dict[Path, Signature] = field(default_factory=dict)
    """What the tensors lay in that were folded."""

    waiting: dict[Path, _Waiting] = field(default_factory=dict)
    """What was seen and is not done."""

    left_out: set[Path] = field(default_factory=set)
    """Copies without a step, each of which is told once."""

    refused: dict[Path, str] = field(default_factory=dict)
    """What at the last look could not be read since this process may not, and what was said of it."""

    missed: list[str] = field(default_factory=list)
    """Names of what was seen, and vanished, stayed unreadable, or was of a step before the teacher's."""

    has_passed: bool = False
    """Whether the run has come beyond `until_step`."""

    is_seen: bool = False
    """Whether the last look found a checkpoint that can be read and is not done."""

    @property
    def last_written(self) -> float:
        """When one that waits was last written to, in seconds of a clock that only goes forward."""
        return max((waiting.since for waiting in self.waiting.values()), default=-math.inf)

    @reading_tables()
    def find(self, options: FoldOptions) -> Run | None:
        """Look at what is there and not done, of what `options` select; None where that is nothing."""
        # A trainer may write every checkpoint under the same name.
        self.done = {path: before for path, before in self.done.items() if signature_below(path) == before}
        finished = frozenset(path.name for path in self.done)
        try:
            has_steps = self.last_step is not None
            found = find_run(self.path, options, is_live=True, has_steps=has_steps, finished=finished)
        except NoCheckpointError:
            found = None
        self.is_seen = found is not None and bool(found.checkpoints)
        now = time.monotonic()
        seen: dict[Path, Signature] = {}
        if found is not None:
            seen = {item.path: _signature_of(item) for item in found.checkpoints}
            seen |= {path: signature_below(path) for path, _ in found.unfinished}
            for name in sorted(found.stepless):
                self._leave_out(found.directory / name)
            self.has_passed = self.has_passed or bool(found.beyond)
            self._tell_refused(found)
        for path in [path for path in self.waiting if path not in seen]:
            if not path.exists():
                self._miss(path, "vanished before it was folded")
            del self.waiting[path]
        for path, signature in seen.items():
            known = self.waiting.get(path)
            if known is None or known.signature != signature:
                self.waiting[path] = _Waiting(signature, now)
        return found

    def ready(self, found: Run, *, is_last: bool) -> list[Checkpoint]:
        """The finished checkpoints that can be folded now, oldest first.

        None behind one that an older, unfinished checkpoint may still precede; but at the last look all of them.
        """
        now = time.monotonic()
        held_up: list[dict[str, int]] = []
        for path, error in found.unfinished:
            numbers = numbers_in_name(path.name)
            # A refused one costs nothing until a newer checkpoint waits for it, or the run has passed the last step.
            is_waited_for = any(not error.is_refused or _may_precede(numbers, item) for item in found.checkpoints)
            is_overdue = now - self.waiting[path].since >= self.patience_seconds
            if is_overdue and (is_waited_for or self.has_passed):
                self._miss(path, f"cannot be read: {error.message}")
                self.forget(path)
                continue
            held_up.append(numbers)
        ready = []
        for item in found.checkpoints:
            is_settled = now - self.waiting[item.path].since >= self.poll_seconds
            may_be_preceded = any(_may_precede(numbers, item) for numbers in held_up)
            if not is_last and (not is_settled or may_be_preceded):
                break
            if self.is_older(item):
                self._tell_older(item)
                self.forget(item.path)
                continue
            ready.append(item)
        return ready

    def _tell_refused(self, found: Run) -> None:
        """What this process may not read, once each: time alone changes nothing there."""
        refused = {path: error for path, error in found.unfinished if error.is_refused and not self._is_beyond(path)}
        for path, error in refused.items():
            if path not in self.refused:
                hint = f" ({error.hint})" if error.hint else ""
                self.warn(f"Warning: {error.message}; it is folded when it may be read{hint}")
        self.refused = {path: error.message for path, error in refused.items()}

    def is_older(self, item: Checkpoint) -> bool:
        """Whether the teacher has come as far already."""
        if item.step is None or self.last_step is None or item.unit != self.last_unit:
            return False
        return item.step <= self.last_step

    def _tell_older(self, item: Checkpoint) -> None:
        """What a trainer writes that went back; but a copy of the newest checkpoint under another name is no news."""
        if item.path in self.folded:
            if self.folded[item.path] != _signature_of(item):
                self._miss(item.path, "was written again after it was folded")
        elif item.step != self.last_step:
            self._miss(item.path, f"is of {item.unit} {item.step}, and the teacher of {item.unit} {self.last_step}")

    def _leave_out(self, path: Path) -> None:
        if path not in self.left_out:
            self.left_out.add(path)
            self.tell(f"left out {path.name}: {STEPLESS_COPY}")
        self.forget(path)

    def note_folded(self, item: Checkpoint, before: Signature) -> None:
        """Take `item` for folded, which consisted of `before` when that began."""
        self.last_step, self.last_unit = item.step, item.unit
        self.done[item.path] = before
        self.folded[item.path] = _signature_of(item)
        self.waiting.pop(item.path, None)

    def put_off(self, item: Checkpoint) -> None:
        """Do not miss it whatever becomes of it: it goes in with later ones, where it is there still."""
        self.waiting.pop(item.path, None)

    def forget(self, path: Path) -> None:
        """Do not read it again, unless it is written again."""
        self.done[path] = signature_below(path)
        self.waiting.pop(path, None)

    def miss_the_rest(self) -> None:
        """Take what still waits for missed: nobody is going to look again."""
        for path in self.waiting:
            reason = self.refused.get(path)
            self._miss(path, f"cannot be read: {reason}" if reason else "was not finished when following ended")

    def _miss(self, path: Path, why: str) -> None:
        if self._is_beyond(path):
            return
        if path.name not in self.missed:
            self.missed.append(path.name)
        self.warn(f"missed {path.name}: it {why}")

    def _is_beyond(self, path: Path) -> bool:
        """Whether a checkpoint is by its name of a step that was not asked for."""
        # Of what the run counts: steps may be inside, and names have dates or images.
        step = numbers_in_name(path.name).get(self.last_unit or "")
        return self.until_step is not None and step is not None and step > self.until_step


def is_whole(item: Checkpoint) -> bool:
    """Whether all files are there that its tensors were found in."""
    return all(file.path.exists() for file in item.layout.files)


def signature_below(path: Path) -> Signature:
    """Names, sizes and times of what a checkpoint consists of so far, read or not."""
    found = []
    try:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            status = os.stat(file)
            found.append((str(file), status.st_size, status.st_mtime_ns))
    except PermissionError:  # which stays so until somebody permits it
        found.append(("", 0, 0))
    except OSError:  # it is being written, or removed
        found.append(("", 0, time.monotonic_ns()))
    return tuple(found)


def _signature_of(item: Checkpoint) -> Signature:
    return tuple((str(file.path), file.size, hash(file.version)) for file in item.layout.files)


def _may_precede(numbers: Mapping[str, int], item: Checkpoint) -> bool:
    """Whether what cannot be read yet, and has `numbers` in its name, may be of a step before that of `item`."""
    if item.step is None:
        return False
    same = numbers.get(item.unit)
    return any(number < item.step for number in (numbers.values() if same is None else (same,)))
