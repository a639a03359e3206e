"""The online teacher on disk: its tensors in, a safetensors file that appears whole out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ckpt_ema._version import __version__
from ckpt_ema.averages.profiles import POWER_RULE, RULE
from ckpt_ema.dtypes import BY_NAME, DType
from ckpt_ema.engine.buffers import Buffer, torch_dtype
from ckpt_ema.errors import CkptEmaError, MisuseError
from ckpt_ema.formats import read_contents, reading_tables
from ckpt_ema.formats.contents import PROVENANCE_KEY
from ckpt_ema.online.rule import is_finite
from ckpt_ema.output.writer import FileParts, TeacherFile, encode_header
from ckpt_ema.teacher_record import is_snapshot

WRITTEN_DTYPES = ("student", "teacher", "float32", "bfloat16", "float16")
BUFFER_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineRecord:
    """How an online teacher came about."""

    momentum: float | None
    """None where it changes from update to update."""

    interval: int
    """Steps from one update to the next."""

    skip_buffers: bool
    """Whether parameters alone were averaged."""

    arithmetic: str
    """`hook` or `lerp`."""

    start: str | None
    """`student` where the first update copied it, `teacher` where the module's was kept; None before the first."""

    num_steps: int
    """Calls of `update`."""

    num_updates: int
    """Those that changed the teacher."""

    num_skipped: int
    """Updates left out because the student was not finite."""

    step: int | None
    """The training step that the caller named, if any."""

    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why each copied tensor is not averaged, by name."""

    ties: Sequence[tuple[str, ...]] = ()
    """The names of each averaged tensor that has several: checkpoints of some trainers hold one of them."""

    more: Mapping[str, Any] = field(default_factory=dict)
    """Further entries, which JSON can hold."""

    def metadata(self) -> dict[str, str]:
        """`__metadata__` of the teacher's file: texts only."""
        copied: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            copied.setdefault(reason, []).append(name)
        record = {
            "tool": "ckpt-ema",
            "version": __version__,
            "rule": RULE if self.momentum is not None else POWER_RULE,
            "momentum": self.momentum,
            "per": "update",
            "interval": self.interval,
            "skip_buffers": self.skip_buffers,
            "arithmetic": self.arithmetic,
            "step": self.step,
            "start": self.start,
            "steps": self.num_steps,
            "updates": self.num_updates,
            "skipped": self.num_skipped,
            "copied": {"tensors": len(self.reasons), "names": copied},
            **({"tied": [list(names) for names in self.ties]} if self.ties else {}),
            **self.more,
        }
        return {"format": "pt", PROVENANCE_KEY: json.dumps(record, ensure_ascii=False)}


def write_teacher(
    path: Path,
    averaged: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    copied: Mapping[str, torch.Tensor],
    record: OnlineRecord,
    *,
    dtype: str,
    overwrite: bool,
) -> None:
    """Write `averaged`, (teacher, student) by name, and `copied` to `path`.

    `dtype` is that of the averaged tensors: the student's, the teacher's, or a floating-point name. Raises
    CkptEmaError for what the file system refuses and for a tensor that safetensors cannot hold.
    """
    if dtype not in WRITTEN_DTYPES:
        raise MisuseError(f"dtype is {dtype!r}", hint=f"pass one of {', '.join(map(repr, WRITTEN_DTYPES))}")
    tensors = {name: (tensor, dtype_of(name, tensor)) for name, tensor in copied.items()}
    for name, (teacher, student) in averaged.items():
        written = dtype_of(name, student if dtype == "student" else teacher)
        if dtype in BY_NAME and written.is_floating_point:
            written = BY_NAME[dtype]
        tensors[name] = (teacher, written)
    write_tensors(path, tensors, record.metadata(), overwrite=overwrite)


def write_tensors(
    path: Path, tensors: Mapping[str, tuple[torch.Tensor, DType]], metadata: Mapping[str, str], *, overwrite: bool
) -> None:
    """Write a safetensors file of `tensors`, each in the dtype that is given with it."""
    # Widest first: every tensor then begins at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    sizes = [tensors[name][0].numel() * tensors[name][1].itemsize for name in order]
    begins = list(itertools.accumulate(sizes, initial=0))
    entries = [
        (name, tensors[name][1], tensors[name][0].shape, begin, begin + size)
        for name, begin, size in zip(order, begins, sizes, strict=False)
    ]
    parts = FileParts.of_header(encode_header(entries, metadata), 0, begins[-1])
    try:
        with TeacherFile(path, parts, overwrite=overwrite) as file:
            for name, begin in zip(order, begins, strict=False):
                _write(file, name, *tensors[name], begin)
    except CkptEmaError as error:
        for option, words in (("`--overwrite`", "overwrite=True"), ("an `--output`", "a path"), ("`--output`", "path")):
            error.hint = error.hint.replace(option, words) if error.hint else None
        raise


def _write(file: TeacherFile, name: str, tensor: torch.Tensor, dtype: DType, begin: int) -> None:
    buffer = Buffer(BUFFER_BYTES)
    count = BUFFER_BYTES // dtype.itemsize
    flat = tensor.detach().reshape(-1)
    for first in range(0, flat.numel(), count):
        part = flat[first : first + count]
        written = buffer.elements(dtype, part.numel())
        written.copy_(part)
        if written.dtype is not part.dtype and not is_finite([written]) and is_finite([part]):
            raise CkptEmaError(f"`{name}` overflows {dtype}", hint='pass dtype="float32"')
        file.write(buffer.bytes[: part.numel() * dtype.itemsize], begin + first * dtype.itemsize)


def check_file_replaceable(path: Path, *, overwrite: bool, by_snapshot: bool) -> None:
    """Raise CkptEmaError where something lies at `path` that a teacher, or another snapshot, must not replace."""
    if not path.exists():
        return
    if not overwrite:
        raise CkptEmaError(f"`{path}` exists", hint="pass overwrite=True or another path")
    try:
        with reading_tables():
            contents = read_contents(path)
        is_own = contents.is_own_teacher
    except CkptEmaError:
        is_own = False
    if not is_own:
        raise CkptEmaError(
            f"`{path}` is no teacher that ckpt-ema wrote, and is not replaced",
            hint="pass another path, or remove the file",
        )
    if is_snapshot(contents.metadata) and not by_snapshot:
        raise CkptEmaError(
            f"`{path}` is a snapshot, from which a reconstruction makes other teachers, and is not replaced",
            hint="pass another path",
        )


def dtype_of(name: str, tensor: torch.Tensor) -> DType:
    """The dtype of a tensor that is to be written; raises CkptEmaError where safetensors has none."""
    if tensor.layout is not torch.strided:
        raise CkptEmaError(
            f"`{name}` is {tensor.layout}, and a safetensors file holds dense tensors alone",
            hint="make it dense (`tensor.to_dense()`), or register it with persistent=False",
        )
    dtype = BY_NAME.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or dtype.code is None or torch_dtype(dtype) is not tensor.dtype:
        raise CkptEmaError(
            f"`{name}` is {tensor.dtype}, which a safetensors file cannot hold", hint="cast it in the student"
        )
    return dtype
