"""NaN and infinity: pairs in, whether student or teacher is free of them out, and the error that names where not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ckpt_ema.errors import CkptEmaError
from ckpt_ema.online.pairs import Pair
from ckpt_ema.online.rule import is_finite
from ckpt_ema.online.tracking import is_sharded


def is_student_finite(pairs: Sequence[Pair], students: Sequence[torch.Tensor]) -> bool:
    """Whether the student, whose tensors `students` are, is finite on every rank that has a part of it.

    All of them skip an update, or none.
    """
    holds = is_finite(students)
    if not any(is_sharded(pair.student.tensor) for pair in pairs):
        return holds
    flag = torch.tensor(int(holds), device=pairs[0].student.local.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag.item())


def nonfinite_error(pairs: Sequence[Pair], step: int) -> CkptEmaError:
    """What to raise where it is not: the first tensor, or that it is another rank's."""
    bad = next((pair.names[0] for pair in pairs if not is_finite([pair.student.local])), None)
    what = f"`{bad}` holds a NaN or an infinity in the student" if bad else "another rank's student is not finite"
    return CkptEmaError(
        f"{what} at step {step}; the teacher is unchanged",
        hint='pass on_nonfinite="skip" to leave such updates out',
    )


def check_teacher_finite(pairs: Sequence[Pair]) -> None:
    """Raise CkptEmaError where the teacher, of a sharded one this rank's part, is not."""
    if not is_finite([pair.local for pair in pairs]):
        bad = next(pair.names[0] for pair in pairs if not is_finite([pair.local]))
        raise CkptEmaError(
            f"`{bad}` holds a NaN or an infinity in the teacher; nothing was written",
            hint='go on from the last state that was saved, with on_nonfinite="raise"',
        )
