"""A teacher's record and the run it was folded from in, the plan that made it out, or why it cannot be made again."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from ckpt_ema.averages.profiles import Update, coefficients_of, updates_of
from ckpt_ema.coefficients import Average, Weighed, weigh
from ckpt_ema.dtypes import WrittenDtype
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.formats import reading_tables
from ckpt_ema.inspection import Inspection
from ckpt_ema.options import FoldOptions
from ckpt_ema.planning import find_run, plan_weighed
from ckpt_ema.plans import FoldPlan
from ckpt_ema.runs.candidates import find_run_folder
from ckpt_ema.runs.checkpoints import Checkpoint, Run
from ckpt_ema.teacher_record import PastCheckpoint, TeacherRecord, printable

SHARE_TOLERANCE = 1e-9
"""Relative, between a coefficient that was recorded and one that was worked out again."""


@reading_tables()
def plan_again(found: Inspection, record: TeacherRecord, run: Path, memory_budget_bytes: int) -> FoldPlan:
    """The plan of the fold that made the teacher; raises CkptEmaError where it cannot be found."""
    averages, past, copied = record.averages, record.checkpoints, record.copied_names
    paths = _locate(record.inputs, run)
    options = _options_of(record) | {
        "accumulate": record.accumulate,
        "memory_budget_bytes": memory_budget_bytes,
    }
    held = {name: (tensor.dtype, tensor.shape) for name, tensor in found.tensors.items()}
    dtypes = [record.asked_dtype] if record.asked_dtype is not None else ["student", *_writable(record.dtypes)]
    planned: FoldPlan | None = None
    failure: CkptEmaError | None = None
    for selection, dtype in itertools.product(_selections_of(record), dtypes):
        wanted = FoldOptions(**options | selection | {"dtype": dtype})
        try:
            students = _read_students(paths[len(averages) :], wanted, past)
            weighed = Weighed(
                tuple(Average(path, item.name, item.step) for item, path in zip(averages, paths, strict=False)),
                _with_buffers(students.checkpoints, copied),
                (_updates(students.checkpoints, wanted, record, run),),
            )
            planned = plan_weighed(students, weighed, "teacher.safetensors", wanted)
        except CkptEmaError as error:
            failure = failure or error
            continue
        if {tensor.name: (tensor.dtype, tensor.shape) for tensor in planned.tensors} == held:
            break
    else:
        raise failure or CkptEmaError("the checkpoints of the run have other tensors than the teacher")
    again = {tensor.name for tensor in planned.tensors if tensor.action == "copy"}
    if again != copied:
        raise CkptEmaError(
            f"{len(again)} tensors would be copied, and {len(copied)} were", details=sorted(again ^ copied)
        )
    return planned


@reading_tables()
def check_listed(record: TeacherRecord, run: Path) -> None:
    """Raise CkptEmaError where the checkpoints that a record lists are not those of the run."""
    paths = _locate(record.checkpoints, run)
    failure: CkptEmaError | None = None
    for selection in _selections_of(record):
        try:
            _read_students(paths, FoldOptions(**_options_of(record) | selection), record.checkpoints)
            return
        except CkptEmaError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def _selections_of(record: TeacherRecord) -> list[dict[str, str]]:
    """What of each checkpoint was asked for, or may have been: an older record does not say whether it was."""
    if record.selection is not None:
        return [dict(record.selection)]
    state = {"state": record.state} if record.state else {}
    return [state, *(state | {"prefix": prefix} for prefix in record.stripped)]


def _writable(dtypes: Sequence[str]) -> list[str]:
    return [name for name in dtypes if name in get_args(WrittenDtype)]


def _options_of(record: TeacherRecord) -> dict[str, Any]:
    """How a teacher was folded, as far as that decides how its checkpoints enter it."""
    if record.made == "reconstruct":
        return {}
    if record.profile == "given":
        return {"coefficients": {item.name: item.coefficient for item in record.checkpoints}}
    names = ["momentum", "half_life", "sigma_rel", "profile"]
    if record.per == "step":  # per checkpoint, the record lists what an interval selected
        names += ["per", "interval", "between", "steps_per_epoch"]
    return {name: getattr(record, name) for name in names}


def _read_students(paths: Sequence[Path], wanted: FoldOptions, past: Sequence[PastCheckpoint]) -> Run:
    """The checkpoints that the record lists, in its order; raises CkptEmaError where one is another by now."""
    # As for a reconstruction, where averages of other tools take part.
    found = find_run(paths, wanted, averages=())
    by_name = {printable(item.label): item for item in (*found.checkpoints, *found.averages)}
    if len(by_name) != len(past):
        raise CkptEmaError(f"{len(by_name)} checkpoints would take part, and {len(past)} did")
    # Listed alone, files of several folders may have shorter names; their order is the record's all the same.
    is_named = all(item.name in by_name for item in past)
    checkpoints = [by_name[item.name] for item in past] if is_named else list(found.checkpoints)
    for before, now in zip(past, checkpoints, strict=True):
        if before.size != now.size:
            raise CkptEmaError(f"`{now.label}` has {now.size} bytes, and had {before.size} when it was folded")
        if before.unit == now.unit and before.step != now.step:
            raise CkptEmaError(f"`{now.label}` is of {now.unit} {now.step}, and was of {before.step}")
    # Which of its numbers counted was decided among all checkpoints of the run.
    counted = (replace(now, step=before.step, unit=before.unit) for before, now in zip(past, checkpoints, strict=True))
    return replace(found, checkpoints=tuple(counted))


def _with_buffers(checkpoints: Sequence[Checkpoint], copied: frozenset[str]) -> tuple[Checkpoint, ...]:
    """The checkpoints, of which the newest says that what was copied is a buffer, and nothing else."""
    return (*checkpoints[:-1], replace(checkpoints[-1], known_buffers=copied))


def _updates(
    checkpoints: Sequence[Checkpoint], wanted: FoldOptions, record: TeacherRecord, run: Path
) -> tuple[Update, ...]:
    """How the checkpoints entered the teacher; raises CkptEmaError where that cannot be told to the last bit."""
    past, shares = record.checkpoints, [item.coefficient for item in record.inputs]
    found: list[tuple[Update, ...]] = []
    if record.made == "fold" and not record.earlier_rules:
        weighed = weigh(checkpoints, wanted)
        found = [weighed.updates[0]]
        if weighed.given is None and wanted.per_step:
            # Those of a share next to nothing are not in the record, and one of them may have been the first.
            with contextlib.suppress(CkptEmaError):
                everything = find_run(run, replace(wanted, until_step=past[-1].step))
                weighed = weigh(everything.checkpoints, wanted)
                if [printable(item.label) for item in weighed.checkpoints] == [item.name for item in past]:
                    found.append(weighed.updates[0])
        found = [updates for updates in found if _are_near(coefficients_of(updates), shares)]
        if not found and not wanted.per_step:
            raise CkptEmaError("its coefficients are not those of its rule")
    # The rule's own, of two the one that has the coefficients to the last bit.
    return max(found, key=lambda updates: coefficients_of(updates) == shares, default=tuple(updates_of(shares)))


def is_exact(planned: FoldPlan, record: TeacherRecord) -> bool:
    """Whether a plan makes a teacher to the last bit again that has this record.

    A running mean that is worked out of these moves its numbers by some 1e-16: nothing to float32.
    """
    if record.earlier_rules:
        return False
    if record.made == "reconstruct" or record.profile == "given":
        return True
    is_wide = any(lane.accumulate_dtype.name in ("float64", "complex128") for lane in planned.blocks.lanes)
    return not is_wide or coefficients_of(planned.teachers[0].updates) == [item.coefficient for item in record.inputs]


def _are_near(shares: Sequence[float], recorded: Sequence[float]) -> bool:
    return len(shares) == len(recorded) and all(
        math.isclose(share, before, rel_tol=SHARE_TOLERANCE) for share, before in zip(shares, recorded, strict=True)
    )


def _locate(items: Sequence[PastCheckpoint], run: Path) -> list[Path]:
    """What a teacher was made from; raises CkptEmaError naming those that are gone."""
    folders = [run]
    with contextlib.suppress(CkptEmaError):  # it is asked for nothing but where the checkpoints lie
        folders.append(find_run_folder(run)[0])
    paths, missing = [], []
    for item in items:
        # A record is what a stranger wrote: its names lead nowhere else. Snapshots may lie beside the checkpoints.
        parts = list(itertools.dropwhile(lambda part: part == "..", Path(item.name).parts))
        is_inside = bool(parts) and ".." not in parts and not Path(item.name).is_absolute()
        found = next((path for folder in folders if is_inside and _exists(path := folder.joinpath(*parts))), None)
        if found is None:
            missing.append(item.name)
        else:
            paths.append(found)
    if missing:
        raise CkptEmaError(f"{len(missing)} of {len(items)} checkpoints are not in `{run}`", details=missing)
    return paths


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False
