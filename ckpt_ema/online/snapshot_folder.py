"""The folder of snapshot files: track names and a step in, their files out; refuses two writers.

Several MeanTeachers of one process may be given one folder by mistake, and a training that goes on from an earlier step
finds files of a path that it does not take.
"""

from __future__ import annotations

import itertools
import os
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ckpt_ema.errors import CkptEmaError, warn
from ckpt_ema.formats import reading_tables
from ckpt_ema.formats.safetensors import read_safetensors
from ckpt_ema.teacher_record import TeacherRecord, read_record

ABANDONED = ".abandoned"
"""After the name of a snapshot whose training went on from an earlier step."""


class SnapshotFolder:
    """Where one MeanTeacher writes the files of its tracks; of several ranks, the first does."""

    def __init__(self, directory: str | os.PathLike[str], names: Sequence[str]) -> None:
        """Of the tracks called `names`; creates the folder."""
        # Absolute: a trainer may change its folder later.
        self._directory = Path(directory).absolute()
        self._names = tuple(names)
        self._last_written: int | None = None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CkptEmaError(
                f"cannot create the folder `{self._directory}`: {error.strerror}",
                hint="pass another directory to Snapshots",
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes: it has written nothing yet."""
        return {**self.__dict__, "_last_written": None}

    def path_of(self, name: str, step: int) -> Path:
        """The file of a track after `step`."""
        return self._directory / f"teacher_{name}_step_{step}.safetensors"

    def check_empty(self) -> None:
        """Refuse to begin anew among the files of an earlier training, which nobody can make again."""
        if not is_first_rank():
            return
        for name in self._names:
            found = self._files_of(name)
            if found:
                raise CkptEmaError(
                    f"`{self._directory}` holds {len(found)} snapshots of the track {name}, which an earlier"
                    " training wrote, and this one begins anew",
                    hint="go on from its state (`teacher.load_state_dict`), or pass another directory to Snapshots",
                )

    def take_over(self, step: int) -> None:
        """Go on after `step`: what others wrote of later steps is of another path, and is renamed."""
        self._set_aside_later(step)
        _WRITERS.update({place: weakref.ref(self) for place in self._places()})

    def begin_writing(self, step: int) -> None:
        """Raise CkptEmaError where another MeanTeacher of this process still writes these tracks.

        That is one that has come since this one wrote, or has written `step` as well. Taking over from one that ended
        is allowed.
        """
        writers = [_WRITERS.get(place, lambda: None)() for place in self._places()]
        others = [writer for writer in writers if writer is not None and writer is not self]
        if any(self._last_written is not None or other._last_written == step for other in others):
            raise CkptEmaError(
                f"another MeanTeacher writes into `{self._directory}` as well, over the files of this one",
                hint="pass each of them a directory of its own to Snapshots",
            )
        _WRITERS.update({place: weakref.ref(self) for place in self._places()})
        self._last_written = step

    def remove_older(self, name: str, step: int, *, keep: int) -> None:
        """Leave the `keep` newest files of a track up to `step`; what was written just now is on disk by then."""
        older = [path for number, path in self._files_of(name) if number < step]
        for path in older[keep - 1 :]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                warn(f"`{path}` cannot be removed: {error.strerror}")
        # Of those that were set aside none is needed where this path has come as far.
        for number, path in self._abandoned_of(name):
            if number <= step:
                path.unlink(missing_ok=True)

    def _places(self) -> list[tuple[Path, str]]:
        """Where each track is written, whatever the folder is called."""
        folder = self._directory.resolve()
        return [(folder, name) for name in self._names]

    def _set_aside_later(self, step: int) -> None:
        """Rename what was written after `step`: the student took another path from there, which is not continued."""
        if not is_first_rank():
            return
        later = [path for name in self._names for number, path in self._files_of(name) if number > step]
        if later:
            warn(
                f"{len(later)} snapshots of later steps than {step} in `{self._directory}` are called *{ABANDONED} now:"
                " training goes on from there on another path, and a reconstruction would mix the two"
            )
        for path in later:
            names = (path.name + ABANDONED + (f"-{number}" if number else "") for number in itertools.count())
            free = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
            try:
                path.rename(free)
            except OSError as error:
                raise CkptEmaError(f"cannot rename `{path}`: {error.strerror}", hint="remove it") from error

    def _files_of(self, name: str) -> list[tuple[int, Path]]:
        """A track's files and their steps, the newest first."""
        pattern = re.compile(rf"teacher_{re.escape(name)}_step_([1-9][0-9]*)\.safetensors")
        matches = [(path, pattern.fullmatch(path.name)) for path in self._directory.iterdir()]
        found = sorted(((int(match[1]), path) for path, match in matches if match), reverse=True)
        return [(number, path) for number, path in found if _is_own(path, name, number)]

    def _abandoned_of(self, name: str) -> list[tuple[int, Path]]:
        """The same of those that were set aside, by their names."""
        escaped, end = re.escape(name), re.escape(ABANDONED)
        pattern = re.compile(rf"teacher_{escaped}_step_([1-9][0-9]*)\.safetensors{end}(-[0-9]+)?")
        matches = [(path, pattern.fullmatch(path.name)) for path in self._directory.iterdir()]
        return [(int(match[1]), path) for path, match in matches if match]


_WRITERS: dict[tuple[Path, str], weakref.ref[SnapshotFolder]] = {}
"""Who wrote a track in a folder last, of this process."""


def is_first_rank() -> bool:
    """Whether this process writes."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _is_own(path: Path, name: str, step: int) -> bool:
    """Whether it is a file that was written for this track at this step, by what it says itself."""
    try:
        with reading_tables():
            record = TeacherRecord() if path.is_symlink() else read_record(read_safetensors(path).metadata)
    except (CkptEmaError, OSError):
        return False
    return (record.track, record.step) == (name, step)
