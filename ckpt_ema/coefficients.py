"""How each checkpoint enters each teacher: a run's checkpoints and the options in, updates and those needed out."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckpt_ema.averages.profiles import (
    SMALLEST_COEFFICIENT,
    Profile,
    Update,
    checkpoint_coefficients,
    coefficients_of,
    ema_updates,
    step_updates,
    updates_of,
)
from ckpt_ema.continuing import Beginning
from ckpt_ema.dtypes import DType
from ckpt_ema.errors import CkptEmaError, MisuseError, NoUpdateError
from ckpt_ema.formats.contents import MAX_JSON_BYTES
from ckpt_ema.locations import RemotePath, as_path
from ckpt_ema.newer import changed_of, newer_of
from ckpt_ema.options import FoldOptions, ReconstructOptions
from ckpt_ema.plans import Prediction
from ckpt_ema.runs.checkpoints import Checkpoint
from ckpt_ema.teacher_record import PastCheckpoint

SUM_TOLERANCE = 1e-6
MAX_COEFFICIENT = 1e6
"""Larger ones would leave nothing but the students' rounding."""


@dataclass(frozen=True, slots=True)
class Average:
    """A stored average that takes part: the teacher to start from, or a snapshot."""

    path: Path
    label: str
    step: int | None


@dataclass(frozen=True, slots=True)
class Weighed:
    """What takes part, and how."""

    averages: tuple[Average, ...]
    checkpoints: tuple[Checkpoint, ...]
    updates: tuple[tuple[Update, ...], ...]
    """`updates[t][i]`: how input i enters teacher t, the averages before the checkpoints."""

    given: tuple[tuple[float, ...], ...] | None = None
    """`given[t][i]`: the coefficients where updates were made of them, which do not tell them to the last bit."""

    left_out: tuple[tuple[str, str], ...] = ()
    assumptions: tuple[str, ...] = ()
    """What a fold says of itself."""

    further_notes: tuple[str, ...] = ()
    """What its plan says beyond that."""

    warnings: tuple[str, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    span: tuple[int, int] | None = None
    origin: int | None = None
    """The training step from which an interval counts, where no first checkpoint tells."""

    goes_on: bool = False
    """Whether a teacher is continued, of which all was said when it was begun."""

    past: tuple[PastCheckpoint, ...] = ()
    """The checkpoints in the teacher that is continued."""

    copied: frozenset[str] = frozenset()
    """The tensors of that teacher that are no average."""

    student_dtypes: Mapping[str, DType] = field(default_factory=dict)
    """What is known of the dtypes that its students had, by tensor."""

    rules: tuple[Mapping[str, Any], ...] = ()
    """How that teacher was made, oldest first."""

    parts: int = 1
    """In how many folds that teacher was made (see FoldPlan)."""

    rounded_to: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Dtypes that it was rounded to on the way (see FoldPlan)."""

    is_cut: bool = False
    """Whether straight lines cross from that teacher to these checkpoints."""


def weigh(checkpoints: Sequence[Checkpoint], options: FoldOptions, beginning: Beginning | None = None) -> Weighed:
    """The updates of every teacher that `options` asks for, and the checkpoints that have a share in one.

    `beginning` is the teacher to start from; the checkpoints that are in it already are left out. Raises CkptEmaError
    where steps are needed and not known.
    """
    if options.coefficients is not None:
        if options.interval > 1:
            raise MisuseError("`--interval` has no meaning for coefficients given by hand", hint="omit it")
        return _by_hand(checkpoints, options.coefficients)
    if beginning is None:
        return _per_step(checkpoints, options) if options.per_step else _per_checkpoint(checkpoints, options)
    newer = newer_of(beginning, checkpoints, is_chosen=options.from_step is not None)
    if options.per_step:
        weighed = _per_step(newer.checkpoints, options, beginning, newer.anchor)
    else:
        weighed = _per_checkpoint(newer.checkpoints, options)
    if not weighed.checkpoints:
        raise NoUpdateError(
            f"no update falls on what is newer than `{beginning.label}`: the average is updated once in"
            f" {options.interval} steps",
            hint="train on, then fold again",
        )
    # What is not an average of listed checkpoints alone stays one input, whose parts nobody lists again.
    record = beginning.record
    is_mixed = record.initial_teacher is not None or "averages" in record.unreadable or bool(record.averages)
    is_other = bool(newer.warnings) or record.profile != "ema" or is_mixed
    past = () if is_other else record.checkpoints
    return replace(
        weighed,
        averages=(Average(beginning.path, beginning.label, None),),
        left_out=(*newer.left_out, *weighed.left_out),
        warnings=(*newer.warnings, *changed_of(beginning, checkpoints), *weighed.warnings),
        goes_on=bool(past),
        past=past,
        origin=None if past and beginning.counts_from_first else weighed.origin,
        copied=record.copied_names if past else frozenset(),
        student_dtypes=beginning.student_dtypes if past else {},
        rules=beginning.rules if past else (),
        parts=record.parts if past else 1,
        rounded_to=record.rounded_to if past else {},
        is_cut=bool(past) and options.per_step and options.between != "hold",
    )


def _per_checkpoint(checkpoints: Sequence[Checkpoint], options: FoldOptions) -> Weighed:
    kept, left_out = _every(checkpoints, options)
    updates = [_checkpoint_updates(profile, len(kept), options) for profile in options.profiles]
    return Weighed((), tuple(kept), tuple(map(tuple, updates)), left_out=tuple(left_out))


def _checkpoint_updates(profile: Profile, count: int, options: FoldOptions) -> list[Update]:
    if profile.kind == "ema":
        assert profile.momentum is not None
        return ema_updates(count, profile.momentum, has_initial_teacher=options.init is not None)
    return updates_of(checkpoint_coefficients(profile.kind, count))


def _every(checkpoints: Sequence[Checkpoint], options: FoldOptions) -> tuple[list[Checkpoint], list[tuple[str, str]]]:
    """The checkpoints that the interval selects: the first is the teacher's start, then every interval-th."""
    first = options.interval - 1 if options.init is not None else 0
    kept = list(checkpoints[first :: options.interval])
    if not kept:
        raise MisuseError(
            f"`--interval {options.interval}` leaves none of {len(checkpoints)} checkpoints to fold",
            hint=f"pass `--interval {len(checkpoints)}` or less",
        )
    taken = {id(item) for item in kept}
    left_out = [(item.label, f"not one in {options.interval}") for item in checkpoints if id(item) not in taken]
    return kept, left_out


def _per_step(
    checkpoints: Sequence[Checkpoint],
    options: FoldOptions,
    beginning: Beginning | None = None,
    anchor: Checkpoint | None = None,
) -> Weighed:
    """Of a run, or of what is newer than `beginning`, with the student that is of its step where that is there."""
    steps, assumptions = training_steps(checkpoints, options)
    origin = None
    if beginning is not None:
        start = beginning.training_step(options)
        if start >= steps[0]:
            raise CkptEmaError(
                f"the initial teacher is of step {start}, and the first checkpoint `{checkpoints[0].label}` of step"
                f" {steps[0]}",
                hint=f"fold the newer ones: `--from {start // (options.steps_per_epoch or 1) + 1}`",
            )
        steps.insert(0, start)
        if options.interval > 1:
            origin = beginning.first_step(options)
    kept = list(checkpoints) if anchor is None else [anchor, *checkpoints]
    updates = [
        step_updates(
            profile,
            steps,
            interval=options.interval,
            between=options.between or "linear",
            has_copy_first=beginning is not None,
            knows_first_student=anchor is not None,
            origin=origin,
        )
        for profile in options.profiles
    ]
    kept, updates, left_out = _without_idle(kept, updates, num_leading=int(beginning is not None))
    # The teacher's own newest student is left out already, as one that is in it.
    left_out = [item for item in left_out if anchor is None or item[0] != anchor.label]
    if options.interval == 1 or (beginning is None and kept[0] is checkpoints[0]):  # which tells it
        counted_from = None
    else:
        counted_from = steps[0] if origin is None else origin
    return Weighed(
        (),
        tuple(kept),
        tuple(map(tuple, updates)),
        left_out=tuple(left_out),
        assumptions=tuple(assumptions),
        origin=counted_from,
    )


def _without_idle(
    checkpoints: Sequence[Checkpoint], updates: Sequence[list[Update]], *, num_leading: int
) -> tuple[list[Checkpoint], list[list[Update]], list[tuple[str, str]]]:
    """Leave out the checkpoints whose coefficients are next to nothing in any teacher, and are never to be read."""
    all_shares = [coefficients_of(each) for each in updates]
    idle = [
        i
        for i in range(len(checkpoints))
        if all(abs(shares[num_leading + i]) < SMALLEST_COEFFICIENT for shares in all_shares)
    ]
    if not idle:
        return list(checkpoints), list(updates), []
    dropped = {num_leading + i for i in idle}
    # What changes nothing goes without the others being worked out anew, which would cost float64 its last digits.
    silent = all(each[i] == Update(1.0, 0.0) for each in updates for i in dropped)
    remaining = [[share for i, share in enumerate(shares) if i not in dropped] for shares in all_shares]
    kept = [item for i, item in enumerate(checkpoints) if i not in set(idle)]
    left_out = [(checkpoints[i].label, f"its coefficient would be below {SMALLEST_COEFFICIENT:g}") for i in idle]
    if silent:
        return kept, [[update for i, update in enumerate(each) if i not in dropped] for each in updates], left_out
    return kept, [updates_of(shares) for shares in remaining], left_out


def training_steps(checkpoints: Sequence[Checkpoint], options: FoldOptions) -> tuple[list[int], list[str]]:
    """The training step of each checkpoint, and what that assumes.

    Raises CkptEmaError where one is unknown, or where they do not ascend; `check_numbers_are_steps` comes before.
    """
    unit = checkpoints[0].unit
    is_reconstruction = isinstance(options, ReconstructOptions)
    unknown = [item.label for item in checkpoints if item.step is None or item.unit != unit]
    if unknown:
        raise CkptEmaError(
            "training steps are needed, and not all checkpoints have a known one",
            details=unknown,
            hint=None if is_reconstruction else "omit `--per step`, and pass `--momentum` per checkpoint",
        )
    numbers = [item.step for item in checkpoints if item.step is not None]
    for older, newer in itertools.pairwise(checkpoints):
        if older.step is not None and newer.step is not None and older.step >= newer.step:
            raise CkptEmaError(
                f"`{newer.label}` ({unit} {newer.step}) is folded after `{older.label}` ({unit} {older.step}), and per"
                " step their order is that of their steps",
                hint="list every step once, oldest first",
            )
    if unit == "date":
        raise CkptEmaError(
            f"the checkpoints know dates only ({numbers[0]} to {numbers[-1]})",
            hint=None if is_reconstruction else "omit `--per step`, and pass `--momentum` per checkpoint",
        )
    if options.steps_per_epoch is not None:
        if unit == "step":
            raise MisuseError("`--steps-per-epoch` has no use here: the checkpoints know their steps", hint="omit it")
        return [number * options.steps_per_epoch for number in numbers], []
    if unit == "epoch":
        raise CkptEmaError(
            f"the checkpoints know epochs only ({numbers[0]} to {numbers[-1]}), and the momentum works per step",
            hint="pass `--steps-per-epoch N`, the number of optimizer steps in an epoch",
        )
    if unit == "number":
        return numbers, [f"the numbers in the names ({numbers[0]} to {numbers[-1]}) are taken for training steps"]
    return numbers, []


def check_numbers_are_steps(
    checkpoints: Sequence[Checkpoint],
    options: FoldOptions,
    past: Sequence[PastCheckpoint] = (),
    *,
    is_inherited: bool = False,
) -> None:
    """Raise CkptEmaError where bare numbers in names mostly go up by one: they hardly count training steps.

    `past` are the checkpoints of the teacher that is continued, by its own rule where `is_inherited`.
    """
    if not options.per_step or options.steps_per_epoch is not None or options.coefficients is not None:
        return
    known = {item.step: item.name for item in past if item.unit == "number" and item.step is not None}
    known |= {item.step: item.label for item in checkpoints if item.unit == "number" and item.step is not None}
    pairs = list(itertools.pairwise(sorted(known.items())))
    close = [(older, newer) for (number, older), (next_number, newer) in pairs if next_number == number + 1]
    if 2 * len(close) > len(pairs):
        rule = "--per step --momentum M " if is_inherited else ""
        raise CkptEmaError(
            "the numbers in the names seem to count epochs or saves, and training steps are needed:"
            f" `{close[0][1]}` comes next after `{close[0][0]}`",
            hint=f"pass `{rule}--steps-per-epoch N`, the number of optimizer steps from one number to the next (1 where"
            " they are steps)",
        )


def _by_hand(checkpoints: Sequence[Checkpoint], given: Any) -> Weighed:
    shares = read_coefficients(given)
    labels = [item.label for item in checkpoints]
    unknown = [name for name in shares if name not in labels]
    if unknown:
        raise CkptEmaError(
            f"{len(unknown)} of {len(shares)} coefficients belong to no checkpoint of this run",
            details=unknown,
            hint=f"`ckpt-ema plan` shows the names: `{labels[0]}`",
        )
    kept = [item for item in checkpoints if shares.get(item.label)]
    left_out = [(label, "its coefficient is 0, or not given") for label in labels if not shares.get(label)]
    given = tuple(shares[item.label] for item in kept)
    return Weighed((), tuple(kept), (tuple(updates_of(given)),), (given,), tuple(left_out))


def read_coefficients(given: Any) -> dict[str, float]:
    """Coefficients by the names of checkpoints, from a mapping or a JSON file of one; `plan --json` will do.

    Raises CkptEmaError where they are not numbers or do not sum to 1.
    """
    if isinstance(given, Mapping):
        table: Any = dict(given)
        where = "the coefficients"
    else:
        path = as_path(given)
        where = f"`{path}`"
        try:
            table = json.loads(_read_table(path).decode("utf-8"), object_pairs_hook=_without_repeated_names)
        except OSError as error:
            raise MisuseError(f"cannot read `{path}`: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise CkptEmaError(f"`{path}` is no JSON: {error}", hint='write {"step_100.pt": 0.5, ...}') from error
    if isinstance(table, dict) and isinstance(table.get("checkpoints"), list):
        table = _of_plan(table, where)
    if not isinstance(table, dict) or not table:
        raise CkptEmaError(
            f"{where} must map names of checkpoints to coefficients", hint='write {"step_100.pt": 0.5, ...}'
        )
    for name, share in table.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not abs(share) < MAX_COEFFICIENT:
            raise CkptEmaError(
                f"{where}: the coefficient of `{name}` is {str(share)[:40]!r}, and must be a number below"
                f" {MAX_COEFFICIENT:g}"
            )
    total = math.fsum(table.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise CkptEmaError(f"{where} sum to {total:g}, and must sum to 1", hint="divide each by their sum")
    return {str(name): float(share) for name, share in table.items()}


def _read_table(path: Path) -> bytes:
    if isinstance(path, RemotePath):
        return path.read_bytes()
    with path.open("rb") as file:  # a pipe as well, which has no size: `--coefficients <(command)`
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise MisuseError(f"`{path}` has more than {MAX_JSON_BYTES} bytes, too many for a table")
    return content


def _without_repeated_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"`{max(names, key=names.count)}` is given twice")
    return dict(pairs)


def _of_plan(table: dict[str, Any], where: str) -> dict[str, Any]:
    """The coefficients of what `plan --json` printed, where those of the checkpoints are all there is."""
    if table.get("averages") or table.get("initial_teacher") or "teachers" in table:
        what = "several teachers" if "teachers" in table else "averages beside the checkpoints"
        raise CkptEmaError(f"{where} is a plan of {what}", hint="print one of a single fold without `--init`")
    items = [item for item in table["checkpoints"] if isinstance(item, dict) and isinstance(item.get("name"), str)]
    return _without_repeated_names([(item["name"], item.get("coefficient")) for item in items])
