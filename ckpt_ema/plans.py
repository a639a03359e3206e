"""What a fold is going to do, and what it has done: the records that planning makes and people are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_ema.averages.profiles import Profile, Update
from ckpt_ema.blocks import BlockPlan
from ckpt_ema.byte_ranges import SourceFile
from ckpt_ema.catalogue import TeacherTensor
from ckpt_ema.layouts import Layout
from ckpt_ema.options import FoldOptions
from ckpt_ema.runs.checkpoints import Checkpoint
from ckpt_ema.runs.steps import Unit
from ckpt_ema.sizes import counted
from ckpt_ema.teacher_record import PastCheckpoint
from ckpt_ema.timings import Timings


@dataclass(frozen=True, slots=True)
class FoldedCheckpoint:
    """One student's part in the teachers."""

    name: str
    step: int | None
    unit: Unit
    """What `step` counts: step, epoch, or a bare number."""

    coefficients: tuple[float, ...]
    """Its share in each teacher."""

    size: int
    """Bytes on disk of the files that hold it."""

    state_key: str
    format: str

    @property
    def coefficient(self) -> float:
        """Its share in the only teacher, or in the first of several."""
        return self.coefficients[0]


@dataclass(frozen=True, slots=True)
class PlannedTeacher:
    """One of the teachers that a pass over the checkpoints makes."""

    profile: Profile
    output: Path
    """Its file, or its folder for `from_pretrained`."""

    updates: tuple[Update, ...]
    """One per input, the first of which copies."""

    first_share: float
    """Share that the initial teacher, or else the first checkpoint, has in it."""

    @property
    def momentum(self) -> float | None:
        """As it was asked for; None where it was not."""
        return self.profile.momentum


@dataclass(frozen=True, slots=True)
class Prediction:
    """How near a reconstructed teacher is expected to come to the one that it stands for."""

    error: float
    """Its distance to that one, as a share of the distance of the nearest stored student; from 0 to 1."""

    nearest: str
    """That student."""

    amplification: float
    """The sum of the coefficients' sizes: by how much rounding in the files is enlarged at most."""


@dataclass(frozen=True, slots=True, repr=False)
class FoldPlan:
    """All that a fold is going to do, before it reads a tensor."""

    options: FoldOptions
    teachers: tuple[PlannedTeacher, ...]
    """One per momentum, or per whatever tells them apart."""

    is_folder: bool
    """Whether each is written as a folder."""

    directory: Path
    checkpoints: tuple[FoldedCheckpoint, ...]
    """Those that take part, oldest first; in a reconstruction the one that buffers come from is last."""

    past: tuple[PastCheckpoint, ...]
    """Those that the initial teacher was folded from, where this fold continues with the same run."""

    rules_of_past: tuple[Mapping[str, Any], ...]
    """How these entered it, as its record says, oldest first."""

    rounded_to: Mapping[tuple[str, str], float]
    """Of students' dtypes, those that the continued teacher was rounded to, or those before it; with the share in it
    of what was rounded so."""

    parts: int
    """In how many folds the teachers are made, those counted that cost last digits: the continued one was rounded,
    or straight lines lead from its checkpoints to these. With 1 the bits are those of one fold."""

    averages: tuple[FoldedCheckpoint, ...]
    """Averages that enter before them: the initial teacher, or the snapshots of a reconstruction."""

    origin: int | None
    """The training step from which an interval counts, where no first checkpoint tells."""

    predictions: tuple[Prediction, ...]
    """One per teacher of a reconstruction; none for a fold."""

    span: tuple[int, int] | None
    """First and last step of a reconstruction's teachers; None for a fold."""

    tensors: tuple[TeacherTensor, ...]
    left_out: tuple[tuple[str, str], ...]
    """Checkpoints and files that do not take part, with the reason."""

    left_out_tensors: tuple[tuple[str, str], ...]
    """Entries of the newest checkpoint that are not folded, with the reason."""

    notes: tuple[str, ...]
    assumptions: tuple[str, ...]
    """Of `notes`, those that a fold says as well: what decides the teachers, and was not asked for."""

    warnings: tuple[str, ...]
    losses: tuple[str, ...]
    """Of `warnings`, what a teacher that is continued has lost since it was folded."""

    mended_options: tuple[str, ...]
    """What to add to the command where the first checkpoint dominates."""

    blocks: BlockPlan
    layouts: tuple[Layout, ...]
    newest: Checkpoint

    def __repr__(self) -> str:
        """One line for notebooks and debuggers; with every field it would be a page per checkpoint."""
        files = counted(len(self.inputs), "file")
        return f"<FoldPlan: {files} of {self.directory} into {', '.join(self.output_names)}>"

    @property
    def initial_teacher(self) -> str | None:
        """The name of the teacher that the fold starts from, if any."""
        return self.averages[0].name if self.options.init is not None else None

    @property
    def inputs(self) -> tuple[FoldedCheckpoint, ...]:
        """All that is folded, in order."""
        return (*self.averages, *self.checkpoints)

    @property
    def input_files(self) -> tuple[SourceFile, ...]:
        """Every file that is read, once."""
        return tuple(dict.fromkeys(file for layout in self.layouts for file in layout.files))

    @property
    def output(self) -> Path:
        """The only teacher, or the first of several."""
        return self.teachers[0].output

    @property
    def outputs(self) -> list[Path]:
        """Every teacher's path, as it was asked for."""
        return [teacher.output for teacher in self.teachers]

    @property
    def output_names(self) -> list[str]:
        """The same as texts."""
        return list(map(str, self.outputs))

    @property
    def first_share(self) -> float:
        """Of the only teacher, or of the first of several."""
        return self.teachers[0].first_share

    @property
    def num_averaged(self) -> int:
        """Tensors that are averaged."""
        return sum(tensor.action == "average" for tensor in self.tensors)

    @property
    def num_copied(self) -> int:
        """Tensors that come from the newest checkpoint as they are."""
        return len(self.tensors) - self.num_averaged

    @property
    def copied(self) -> dict[str, list[TeacherTensor]]:
        """The copied tensors by the reason why."""
        by_reason: dict[str, list[TeacherTensor]] = {}
        for tensor in self.tensors:
            if tensor.action == "copy":
                by_reason.setdefault(tensor.reason, []).append(tensor)
        return by_reason

    @property
    def bytes_to_read(self) -> int:
        """Tensor bytes read in all."""
        return self.blocks.bytes_to_read

    @property
    def bytes_to_write(self) -> int:
        """Size of all teachers' tensors."""
        return self.blocks.data_bytes * len(self.teachers)

    @property
    def buffer_bytes(self) -> int:
        """Memory for buffers, whatever the size of the model."""
        return self.blocks.buffer_bytes


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What a fold has done."""

    plan: FoldPlan
    device: str
    """`cpu`, or `cuda:0`."""

    device_reason: str
    """Why it."""

    seconds: float
    """From the first byte read to the committed files."""

    timings: Timings
    """Where these seconds went."""

    resumed_bytes: int = 0
    """Tensor bytes that an earlier process had read, with `resume`."""

    not_compiled: tuple[str, ...] = ()
    """What torch's calls did on a CPU though a compiled loop would have paid, and why."""

    @property
    def output(self) -> Path:
        """The only teacher, or the first of several: a file, or a folder for `from_pretrained`."""
        return self.plan.output

    @property
    def bytes_read(self) -> int:
        """Tensor bytes that were read, by all ranks."""
        return self.plan.bytes_to_read - self.resumed_bytes

    @property
    def gigabytes_per_second(self) -> float:
        """Tensor bytes read per second, in 1e9."""
        return self.bytes_read / max(self.seconds, 1e-9) / 1e9
