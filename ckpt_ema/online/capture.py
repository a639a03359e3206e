"""CUDA graphs: what an update would do in, whether a graph can capture it out."""

from __future__ import annotations

import torch

from ckpt_ema.errors import CkptEmaError

OUTSIDE = "call `teacher.update()` outside of `with torch.cuda.graph(...)`"


def is_capturing() -> bool:
    """Whether what is called now goes into a graph instead of happening."""
    # To ask where no GPU was used yet would begin to use one.
    is_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return is_used and torch.cuda.is_current_stream_capturing()


def check_capturable(*, has_snapshots: bool, looks_for_nonfinite: bool, is_offloaded: bool, is_first: bool) -> None:
    """Raise CkptEmaError for an update that waits for the GPU, needs the host, or happens once."""
    for kind, is_of_kind, hint in (
        ("an update with `snapshots`", has_snapshots, OUTSIDE),
        ("an update with `on_nonfinite`", looks_for_nonfinite, OUTSIDE),
        ('an update with `device="cpu"`', is_offloaded, OUTSIDE),
        (
            "the first update, which copies the student,",
            is_first,
            "call `teacher.copy_student()` before `with torch.cuda.graph(...)`",
        ),
    ):
        if is_of_kind:
            raise CkptEmaError(f"{kind} cannot be captured in a CUDA graph", hint=hint)
