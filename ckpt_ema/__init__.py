"""Fold the checkpoints of a training run into a mean teacher."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ckpt_ema._version import __version__

if TYPE_CHECKING:
    from ckpt_ema.comparison import Comparison, TensorDifference, compare
    from ckpt_ema.errors import CkptEmaError, MisuseError
    from ckpt_ema.folding import fold, plan, plan_reconstruction, reconstruct
    from ckpt_ema.following import FollowReport, OutOfReachError, follow
    from ckpt_ema.inspection import Inspection, inspect
    from ckpt_ema.online.mean_teacher import MeanTeacher
    from ckpt_ema.online.snapshots import Snapshots
    from ckpt_ema.options import FoldOptions, ReconstructOptions
    from ckpt_ema.plans import FoldedCheckpoint, FoldPlan, FoldReport, PlannedTeacher, Prediction
    from ckpt_ema.ranks import Ranks, ranks_of_environment
    from ckpt_ema.verification import Check, Verification, verify

__all__ = [
    "Check",
    "CkptEmaError",
    "Comparison",
    "FoldOptions",
    "FoldPlan",
    "FoldReport",
    "FoldedCheckpoint",
    "FollowReport",
    "Inspection",
    "MeanTeacher",
    "MisuseError",
    "OutOfReachError",
    "PlannedTeacher",
    "Prediction",
    "Ranks",
    "ReconstructOptions",
    "Snapshots",
    "TensorDifference",
    "Verification",
    "__version__",
    "compare",
    "fold",
    "follow",
    "inspect",
    "plan",
    "plan_reconstruction",
    "ranks_of_environment",
    "reconstruct",
    "verify",
]

_HOMES = {
    "Check": "verification",
    "CkptEmaError": "errors",
    "Comparison": "comparison",
    "FoldOptions": "options",
    "FoldPlan": "plans",
    "FoldReport": "plans",
    "FoldedCheckpoint": "plans",
    "FollowReport": "following",
    "Inspection": "inspection",
    "MeanTeacher": "online.mean_teacher",
    "MisuseError": "errors",
    "OutOfReachError": "following",
    "PlannedTeacher": "plans",
    "Prediction": "plans",
    "Ranks": "ranks",
    "ReconstructOptions": "options",
    "Snapshots": "online.snapshots",
    "TensorDifference": "comparison",
    "Verification": "verification",
    "compare": "comparison",
    "fold": "folding",
    "follow": "following",
    "inspect": "inspection",
    "plan": "folding",
    "plan_reconstruction": "folding",
    "ranks_of_environment": "ranks",
    "reconstruct": "folding",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    # On first use: `ckpt-ema --help` must not wait for the library, nor `import ckpt_ema` for torch.
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    # What a shell or an editor offers, before anything was used.
    return list(__all__)
