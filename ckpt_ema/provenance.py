"""Where a teacher came from: a plan in, the `__metadata__` of its file out, and back."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ckpt_ema._version import __version__
from ckpt_ema.records import FoldPlan
from ckpt_ema.runs import PROVENANCE_KEY


def teacher_metadata(plan: FoldPlan) -> dict[str, str]:
    """`__metadata__` of the teacher: texts only, the same for the same input (no date, no path of this machine)."""
    copied: dict[str, list[str]] = defaultdict(list)
    for tensor in plan.tensors:
        if tensor.action == "copy":
            copied[tensor.reason].append(tensor.name)
    options = plan.options
    record = {
        "tool": "ckpt-ema",
        "version": __version__,
        "rule": "teacher = (1 - momentum) * teacher + momentum * student",
        "momentum": options.momentum,
        "per": "checkpoint",
        "interval": options.interval,
        "skip_buffers": options.skip_buffers,
        "initial_teacher": None if plan.initial_teacher is None else _printable(plan.initial_teacher),
        "checkpoints": [
            {
                "name": _printable(item.name),
                item.unit: item.step,
                "coefficient": item.coefficient,
                "bytes": item.size,
            }
            for item in plan.checkpoints
        ],
        "averaged": {"tensors": plan.num_averaged},
        "copied": {"tensors": plan.num_copied, "names": dict(copied)},
        "dtypes": {
            "students": sorted({tensor.student_dtype.name for tensor in plan.tensors}),
            "accumulate": options.accumulate,
            "teacher": sorted({tensor.dtype.name for tensor in plan.tensors}),
        },
    }
    return {"format": "pt", PROVENANCE_KEY: json.dumps(record, ensure_ascii=False)}


def _printable(name: str) -> str:
    """A file name may be bytes that are no text; a safetensors header may not."""
    return os.fsencode(name).decode("utf-8", "replace")


def read_provenance(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What `teacher_metadata` wrote; None for a file of another origin."""
    try:
        record = json.loads(metadata.get(PROVENANCE_KEY, "null"))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
