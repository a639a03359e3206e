"""A whole teacher in a file: its pairs and the student beside them in, one safetensors file of both out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from ckpt_ema.errors import CkptEmaError, MisuseError, warn
from ckpt_ema.formats.folder import WEIGHTS_SUFFIX
from ckpt_ema.locations import RemotePath
from ckpt_ema.online.pairs import Pairing
from ckpt_ema.online.teacher_file import OnlineRecord, write_teacher
from ckpt_ema.online.tracking import Tracking, is_sharded, odd_kind_of, track
from ckpt_ema.output.writer import behind_link


def check_suffix(path: Path) -> None:
    """Raise MisuseError for a name that nobody would take for a safetensors file's."""
    if path.suffix != ".safetensors":
        stem = WEIGHTS_SUFFIX.sub("", str(path)) if path.name else str(path / "teacher")
        raise MisuseError(
            f"`{path}` does not end with .safetensors, which is what it is written as",
            hint=f"pass `{stem}.safetensors`",
        )


def check_local(path: Path) -> None:
    """Raise MisuseError for a URL."""
    if isinstance(path, RemotePath):
        raise MisuseError(f"`{path}` is a URL, and a teacher is written to a local disk", hint="pass a local path")


def warn_of_unsavable(tracking: Tracking) -> None:
    """Warn of a tensor beside the averaged ones that `save_teacher` is going to refuse."""
    if odd := [slot for slot in tracking.copied if odd_kind_of(slot.tensor)]:
        warn(
            f"`{odd[0].name}` is {odd_kind_of(odd[0].tensor)}, which no safetensors file holds, so `save` will"
            " fail; register it with persistent=False"
        )


def save_teacher(
    path: Path, pairing: Pairing, student: torch.nn.Module, record: OnlineRecord, *, dtype: str, overwrite: bool
) -> None:
    """Write the teacher and what else `student` has in its state dict, as it is now; `record` says the rest.

    Whether the teacher is finite is not looked at here. Raises CkptEmaError, nothing written, where it is sharded, or
    where running statistics hold a NaN.
    """
    if any(is_sharded(pair.student.tensor) for pair in pairing.pairs):
        raise CkptEmaError(
            "the teacher is sharded over ranks, and no rank has all of it",
            hint='torch.distributed.checkpoint.save({"teacher": teacher.state_dict()}, checkpoint_id=PATH)',
        )
    averaged = {name: (pair.local, pair.student.tensor) for pair in pairing.pairs for name in pair.names}
    # Looked for now: a buffer may have come since.
    tracking = track(student, skip_buffers=pairing.student.skip_buffers)
    copied = _copied(tracking, averaged)
    record = replace(record, reasons={name: tracking.reasons[name] for name in copied})
    write_teacher(behind_link(path) if overwrite else path, averaged, copied, record, dtype=dtype, overwrite=overwrite)


def _copied(student: Tracking, averaged: Collection[str]) -> dict[str, torch.Tensor]:
    """What the file takes from the student as it is; raises CkptEmaError where running statistics hold a NaN."""
    copied = {name: slot.tensor for slot in student.copied for name in slot.names if name not in averaged}
    # Elsewhere an infinity is a mask, or the start of a minimum, and a NaN what nobody has measured yet.
    statistics = [name for name in copied if name.rpartition(".")[2] in ("running_mean", "running_var")]
    broken = [name for name in statistics if copied[name].isnan().any()]
    if broken:
        raise CkptEmaError(
            f"`{broken[0]}` of the student holds a NaN, which the teacher would have too; nothing was written",
            hint="go on from the last state that was saved; running statistics also move in steps that are skipped",
        )
    return copied
