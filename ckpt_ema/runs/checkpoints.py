"""What is known of a run: its checkpoints, its teachers, and why what is left out is left out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ckpt_ema.errors import AverageAloneError, UnreadableCheckpointError
from ckpt_ema.formats import ModelFolder
from ckpt_ema.layouts import Layout
from ckpt_ema.locations import identity_of
from ckpt_ema.runs.steps import Origin, Unit

STEPLESS_COPY = "a copy by its name, without a step"
NOT_SELECTED = "not selected by name"
OWN_TEACHER = "a teacher that ckpt-ema wrote"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One finished save of the student."""

    path: Path
    label: str
    """Its name within the run, for people."""

    step: int | None
    """Step (or epoch, or number) after which it was saved; None where nothing says it."""

    unit: Unit
    """What `step` counts."""

    format: str
    size: int
    """Bytes of its files that hold the student."""

    layout: Layout
    state_key: str
    """Dotted path of the state dict inside the checkpoint, "" for the checkpoint itself."""

    stripped: tuple[str, ...]
    """Prefixes taken off the tensor names."""

    left_out: dict[str, str]
    """What of the checkpoint is not folded, and why."""

    known_buffers: frozenset[str] | None
    learning_rates: tuple[tuple[int | None, float], ...]
    """What it records of the learning rate, by step, None for its own; for a reconstruction alone."""

    model_folder: ModelFolder | None
    """Where its configuration and tokenizer lie, for a folder in the Hugging Face manner."""


Numbered = tuple[Checkpoint, dict[Origin, int]]
"""A checkpoint, and every number that may be its step."""


@dataclass(frozen=True, slots=True)
class OwnTeacher:
    """A teacher that this tool wrote, met among the checkpoints."""

    path: Path
    label: str
    """Its name within the run, for people."""

    metadata: Mapping[str, str]
    """`__metadata__` of its file."""


@dataclass(frozen=True, slots=True)
class Run:
    """The checkpoints of one training run, in the order they are folded."""

    directory: Path
    """The folder that the checkpoints lie in."""

    root: Path | None
    """The run directory as it was named, or the folder of all checkpoints listed; None where they share none."""

    checkpoints: tuple[Checkpoint, ...]
    left_out: tuple[tuple[str, str], ...]
    """Names of what is not folded, each with the reason."""

    unselected: frozenset[str] = frozenset()
    """Of `left_out`, names that were not selected."""

    beyond: frozenset[tuple[str, Unit]] = frozenset()
    """Of `left_out`, names of what lies after `until_step`, and what is counted."""

    stepless: frozenset[str] = frozenset()
    """Of `left_out`, names of copies without a step."""

    warnings: tuple[str, ...] = ()
    order_warnings: tuple[str, ...] = ()
    """Of a list that is not in step order."""

    teachers: tuple[OwnTeacher, ...] = ()
    """What of this tool lies among them."""

    averages: tuple[Checkpoint, ...] = ()
    """What was said to be an average, by step."""

    unfinished: tuple[tuple[Path, UnreadableCheckpointError], ...] = ()
    """Of a run that is being written: what cannot be read yet, and why."""


@dataclass(slots=True)
class Listing:
    """A run while it is being read."""

    checkpoints: list[Numbered] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    unselected: set[str] = field(default_factory=set)
    beyond: set[tuple[str, Unit]] = field(default_factory=set)
    stepless: set[str] = field(default_factory=set)
    """Names of `left_out`, as in Run."""

    unreadable: list[tuple[Path, UnreadableCheckpointError]] = field(default_factory=list)
    """What cannot be read: the newest may be half written."""

    averages: list[Checkpoint] = field(default_factory=list)
    """What was said to be an average."""

    averages_by_name: list[str] = field(default_factory=list)
    """Names of what is an average by its name alone, and left out."""

    averages_inside: list[tuple[str, AverageAloneError]] = field(default_factory=list)
    """Names of what holds nothing but an average, with what is to be said where there is nothing else."""

    teachers: list[OwnTeacher] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    order_warnings: list[str] = field(default_factory=list)
    seen: dict[Hashable, Path] = field(default_factory=dict)
    """The first name of every file."""

    def leaves_out_another_name(self, path: Path) -> bool:
        """Leave out what another path named before; whether it was. Raises OSError where there is nothing."""
        original = self.seen.setdefault(identity_of(path), path)
        if original is path:
            return False
        self.left_out.append((path.name, f"another name of `{original.name}`"))
        return True

    def leave_out_unselected(self, path: Path) -> None:
        """Leave out what was not selected by its name."""
        self.left_out.append((path.name, NOT_SELECTED))
        self.unselected.add(path.name)

    def set_aside(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Keep a teacher of this tool apart from the checkpoints."""
        self.left_out.append((path.name, OWN_TEACHER))
        self.teachers.append(OwnTeacher(path, path.name, metadata))

    def leave_out_average(self, label: str, error: UnreadableCheckpointError) -> None:
        """Leave an average that cannot be read out aloud: a reconstruction goes without it."""
        self.left_out.append((label, f"it cannot be read: {error.message}"))
        self.warnings.append(f"`{label}` takes no part: {error.message}")
