"""Updates that 16 bits lose: pairs in, a warning beforehand or the share that is lost out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ckpt_ema.errors import warn
from ckpt_ema.online.pairs import Pair
from ckpt_ema.online.rule import Rule, blocks_of
from ckpt_ema.online.shadows import is_narrow


def warn_of_stall(pairs: Sequence[Pair]) -> None:
    """Warn of a teacher module in 16 bits."""
    narrow = [pair for pair in pairs if is_narrow(pair.local)]
    if narrow:
        dtype = str(narrow[0].local.dtype).removeprefix("torch.")
        warn(
            f"{len(narrow)} of the teacher module's tensors are {dtype}, in which small updates are lost: make it"
            " float32 with teacher.float(), which works with any student, or see stalled_fraction()"
        )


def stalled_fraction(pairs: Sequence[Pair], rule: Rule, momentum: float) -> float:
    """The share of the elements that differ which the next update would leave as they are; 0.0 where none differs."""
    differing = stalled = 0
    for pair in pairs:
        for teacher, part in blocks_of(pair.local, pair.student.local):
            student = part.to(teacher.device)
            moved = teacher.clone(memory_format=torch.contiguous_format)
            rule.average_(moved, student.contiguous(), momentum)
            differs = teacher != student.to(teacher.dtype)
            differing += int(differs.sum())
            stalled += int((differs & (moved == teacher)).sum())
    return stalled / differing if differing else 0.0
