"""Where a teacher came from: a plan in, the `__metadata__` of its file out."""

from __future__ import annotations

import itertools
import json
from typing import Any

from ckpt_ema._version import __version__
from ckpt_ema.averages.profiles import SMALLEST_COEFFICIENT, Profile
from ckpt_ema.formats.contents import PROVENANCE_KEY
from ckpt_ema.options import FoldOptions, ReconstructOptions
from ckpt_ema.plans import FoldPlan
from ckpt_ema.teacher_record import SELECTION, printable, rule_of


def teacher_metadata(plan: FoldPlan, number: int) -> dict[str, str]:
    """`__metadata__` of one teacher: texts only, the same for the same input (no date, no path of this machine)."""
    options = plan.options
    teacher = plan.teachers[number]
    record = {
        "tool": "ckpt-ema",
        "version": __version__,
        "rule": teacher.profile.rule,
        **profile_record(teacher.profile),
        **counting_record(options),
        "skip_buffers": options.skip_buffers,
        "initial_teacher": None if plan.initial_teacher is None or plan.past else printable(plan.initial_teacher),
        **made_record(plan, number),
        **({} if plan.parts == 1 else {"parts": plan.parts}),
        **_rounded_record(plan, number),
        **({} if plan.origin is None else {"origin": plan.origin}),
        "state": plan.newest.state_key,
        "stripped": list(plan.newest.stripped),
        "selection": _selection_record(plan),
        "averages": [
            {"name": printable(item.name), "step": item.step, "coefficient": item.coefficients[number]}
            for item in (() if plan.past else plan.averages)
        ],
        "checkpoints": _checkpoints_record(plan, number),
        "averaged": {"tensors": plan.num_averaged},
        "copied": {
            "tensors": plan.num_copied,
            "names": {reason: [tensor.name for tensor in tensors] for reason, tensors in plan.copied.items()},
        },
        "dtypes": {
            "students": sorted({dtype.name for tensor in plan.tensors for dtype in tensor.student_dtypes}),
            "accumulate": options.accumulate,
            "asked": options.dtype,
            "teacher": sorted({tensor.dtype.name for tensor in plan.tensors}),
            **_tensors_by_student(plan),
        },
    }
    rules = [rule for rule, _ in itertools.groupby((*plan.rules_of_past, rule_of(record)))]
    if len(rules) > 1:
        record["earlier_rules"] = rules[:-1]
    return {"format": "pt", PROVENANCE_KEY: json.dumps(record, ensure_ascii=False)}


def _tensors_by_student(plan: FoldPlan) -> dict[str, Any]:
    """Averaged tensors by the student dtype in which they were computed, where the file does not show it.

    A fold that goes on with narrower students would compute in less, and not know that digits were lost.
    """
    options = plan.options
    is_own = options.accumulate == "student" and options.dtype != "student"
    names: dict[str, list[str]] = {}
    for tensor in plan.tensors:
        for dtype in tensor.student_dtypes if tensor.action == "average" else ():
            if is_own or (dtype is not tensor.dtype and dtype.is_wide):
                names.setdefault(dtype.name, []).append(tensor.name)
    return {"tensors_by_student": names} if names else {}


def _selection_record(plan: FoldPlan) -> dict[str, str]:
    """What was asked for of each checkpoint; a prefix as it was found, with its point."""
    options = plan.options
    asked = {name: getattr(options, name) for name in SELECTION if getattr(options, name) is not None}
    if options.prefix is not None and f"{options.prefix}." in plan.newest.stripped:
        asked["prefix"] = f"{options.prefix}."
    return asked


def _rounded_record(plan: FoldPlan, number: int) -> dict[str, Any]:
    """What was rounded on the way, and the share it still has; nothing of what shows in no digit any more."""
    if not plan.past:
        return {}
    kept = plan.averages[0].coefficients[number]
    shares: dict[str, dict[str, float]] = {}
    for (student, written), share in sorted(plan.rounded_to.items()):
        if share * kept >= SMALLEST_COEFFICIENT:
            shares.setdefault(student, {})[written] = share * kept
    return {"rounded_to": shares} if shares else {}


def _checkpoints_record(plan: FoldPlan, number: int) -> list[dict[str, Any]]:
    """The checkpoints of a teacher, those of the one that it goes on from among them."""
    share_of_past = plan.averages[0].coefficients[number] if plan.past else 0.0
    shares = {(item.name, item.unit, item.step): [item.coefficient * share_of_past, item.size] for item in plan.past}
    for item in plan.checkpoints:
        share = shares.setdefault((printable(item.name), item.unit, item.step), [0.0, item.size])
        share[0] += item.coefficients[number]
    return [
        {"name": name, unit: step, "coefficient": share, "bytes": size}
        for (name, unit, step), (share, size) in shares.items()
    ]


def made_record(plan: FoldPlan, number: int) -> dict[str, Any]:
    """Whether a teacher was folded or reconstructed, and what is to be known of that."""
    if not plan.predictions or plan.span is None:
        first_share = plan.teachers[number].first_share
        if plan.past:
            first_share = _checkpoints_record(plan, number)[0]["coefficient"]
        return {"made": "fold", "first_share": first_share}
    prediction = plan.predictions[number]
    return {
        "made": "reconstruct",
        "start": plan.span[0],
        "step": plan.span[1],
        "predicted_error": prediction.error,
        "nearest": printable(prediction.nearest),
    }


def profile_record(profile: Profile) -> dict[str, Any]:
    """What a teacher was asked to be, as a table that JSON can hold; what it has not is not in it."""
    given = {"momentum": profile.momentum, "half_life": profile.half_life, "sigma_rel": profile.sigma_rel}
    return {"profile": profile.kind, **{name: value for name, value in given.items() if value is not None}}


def counting_record(options: FoldOptions) -> dict[str, Any]:
    """What the profile counts, and how often."""
    if not options.per_step:
        return {"per": "checkpoint", "interval": options.interval}
    epochs = {} if options.steps_per_epoch is None else {"steps_per_epoch": options.steps_per_epoch}
    if isinstance(options, ReconstructOptions):
        return {"per": "step", "interval": options.interval, **epochs}
    return {"per": "step", "interval": options.interval, "between": options.between or "linear", **epochs}
