"""One checkpoint or teacher looked at: a path in, what it holds out; no tensor is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_ema.assembly import StoredTensor
from ckpt_ema.errors import CkptEmaError, MisuseError, UnreadableCheckpointError
from ckpt_ema.formats import Contents, read_contents, reading_tables
from ckpt_ema.keywords import refuses_unknown_keywords
from ckpt_ema.locations import as_path, name_within
from ckpt_ema.runs.candidates import find_checkpoint_below
from ckpt_ema.runs.state_dicts import StateDict, find_state_dicts, key_of_teacher
from ckpt_ema.runs.steps import ORIGINS, steps_in_name, steps_inside
from ckpt_ema.runs.students import choose_student
from ckpt_ema.teacher_record import read_provenance


@dataclass(frozen=True, slots=True)
class Inspection:
    """What one checkpoint or teacher holds."""

    path: Path
    format: str
    size: int
    """Bytes of its weight files."""

    step: int | None
    step_origin: str
    """Where the step stands and what it counts: `step inside`, `epoch by name`; "" where there is none."""

    state_dicts: tuple[StateDict, ...]
    chosen: str | None
    """The state dict that a fold takes, "" for the checkpoint itself; None where it refuses to choose."""

    refusal: str
    """Why a fold would not take it; "" where it would."""

    tensors: dict[str, StoredTensor]
    """Those of the chosen state dict, under the names a fold gives them."""

    provenance: dict[str, Any] | None
    """How the teacher was made; None for a checkpoint."""


@refuses_unknown_keywords()
@reading_tables()
def inspect(path: str | os.PathLike[str], *, state: str | None = None, prefix: str | None = None) -> Inspection:
    """Look at one checkpoint or teacher, reading no tensor.

    `state` is the dotted path of a state dict inside it, the one that would be folded by default; `prefix` a sub-model,
    taken off the names. Raises CkptEmaError where it cannot be read, MisuseError where it is none.
    """
    path = as_path(path)
    if not path.exists():
        raise MisuseError(f"`{path}` does not exist")
    try:
        contents = read_contents(path)
        _check_is_one(contents)
    except UnreadableCheckpointError as error:
        if path.is_dir() and error.hint is None:
            raise CkptEmaError(error.message, hint=f"for a run directory: `ckpt-ema plan {path}`") from error
        raise
    numbers = {**steps_in_name(path.name), **steps_inside(contents)}
    origin = next((origin for origin in ORIGINS if origin in numbers), None)
    chosen: str | None = None
    refusal = ""
    tensors: dict[str, StoredTensor] = {}
    try:
        if contents.is_own_teacher:
            state = state or key_of_teacher(contents)
        student = choose_student(contents, state=state, prefix=prefix)
        chosen, tensors = student.key, student.tensors
    except UnreadableCheckpointError:
        raise
    except CkptEmaError as error:
        if state or prefix:
            raise
        refusal = error.message
    return Inspection(
        path=path,
        format=contents.format,
        size=sum(file.size for file in contents.files),
        step=numbers[origin] if origin else None,
        step_origin=f"{origin[1]} {'inside' if origin[0] == 'inside' else 'by name'}" if origin else "",
        state_dicts=tuple(find_state_dicts(contents)),
        chosen=chosen,
        refusal=refusal,
        tensors=tensors,
        provenance=read_provenance(contents.metadata),
    )


def _check_is_one(contents: Contents) -> None:
    """Raise MisuseError where weights one level down are the final models of runs, and not parts of one checkpoint."""
    path = contents.path
    if all(folder.path == path for folder in contents.folders.values()):
        return
    if (below := find_checkpoint_below(path)) is not None:
        raise MisuseError(
            f"`{path}` is no checkpoint: `{name_within(path, below)}` and the like lie below it",
            hint=f"pass one of them: `{below}`; for a run directory: `ckpt-ema plan {path}`",
        )
