"""What every engine does, and how it reports a teacher that is no teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ckpt_ema.averages.profiles import Update
from ckpt_ema.blocks import Alias, Block, BlockPlan
from ckpt_ema.engine.inputs import InputFiles
from ckpt_ema.layouts import Layout
from ckpt_ema.timings import Timings


class Teacher(Protocol):
    """Where finished blocks go."""

    def write(self, block: memoryview, position: int) -> None:
        """Put `block` at `position` of the data section; threads may write at once."""


class Nowhere:
    """A teacher that is not kept: for a block that is folded to find out what is wrong with it, or how fast it goes."""

    def write(self, block: memoryview, position: int) -> None:
        """Forget `block`."""


def write_block(teacher: Teacher, aliases: Sequence[Alias], content: memoryview, position: int) -> None:
    """Write a finished block, and once more for every alias of what lies in it."""
    teacher.write(content, position)
    for alias in aliases:
        begin = max(alias.original, position)
        end = min(alias.original + alias.num_bytes, position + len(content))
        if begin < end:
            teacher.write(content[begin - position : end - position], begin - alias.original + alias.begin)


def _forget(block: Block) -> None:
    """Take no note of a finished block."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is folded: every block of a plan, over its inputs."""

    plan: BlockPlan
    layouts: Sequence[Layout]
    """The inputs, oldest first."""

    updates: Sequence[Sequence[Update]]
    """`updates[t][i]`: how layout i enters teacher t. The first copies."""

    files: InputFiles
    on_finished: Callable[[Block], None] = _forget
    """Called from any thread, once per block, when every teacher has it."""


class Engine(Protocol):
    """Folds every block of a plan and hands it to the teachers' files."""

    def __call__(self, task: Task, teachers: Sequence[Teacher], progress: Callable[[int], None]) -> Timings:
        """Run `teacher = keep * teacher + take * student` over the task's layouts, for each teacher.

        Copied lanes come from the last layout. `progress` is told the bytes read, from any thread but never from two
        at once. Raises NonFiniteBlockError, and what reading and writing raise; nothing of it runs any more when it
        returns.
        """


@dataclass(frozen=True, slots=True)
class NonFinite:
    """Where a NaN or an infinity of the teacher came from."""

    tensor: int
    """Index into every layout's schema."""

    layout: int | None
    """The first input that holds one there; None when all inputs are finite and the result is too large."""


class NonFiniteBlockError(Exception):
    """A block of the teacher holds a NaN or an infinity."""

    def __init__(self, origin: NonFinite) -> None:
        super().__init__(str(origin))
        self.origin = origin
