"""Checkpoints and the numbers they give in, the same in the order of their steps out, or why that cannot be told."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ckpt_ema.errors import CkptEmaError, NoCheckpointError
from ckpt_ema.runs.checkpoints import STEPLESS_COPY, Checkpoint, Listing, Numbered
from ckpt_ema.runs.collisions import collision_of, hint_of_unknown
from ckpt_ema.runs.selection import Selection
from ckpt_ema.runs.steps import ORIGINS, Origin, Unit, is_copy_name, numbers_in_name, steps_in_name

DATE_BESIDE: Origin = ("beside", "date")
NUMBER: Origin = ("name", "number")


def give_steps(listing: Listing) -> None:
    """Listed checkpoints get their steps and keep their order, unless a shell sorted them by name: then by step.

    Either way a list that is not in step order is warned of.
    """
    origin = _common_origin(listing.checkpoints)
    unit: Unit = origin[1] if origin else "step"
    listing.checkpoints = [
        (replace(checkpoint, step=numbers[origin] if origin else None, unit=unit), numbers)
        for checkpoint, numbers in listing.checkpoints
    ]
    known = [checkpoint.step for checkpoint, _ in listing.checkpoints if checkpoint.step is not None]
    if known != sorted(known):
        older, newer = next((a, b) for a, b in itertools.pairwise(known) if a > b)
        by_step = sorted(listing.checkpoints, key=lambda item: item[0].step or 0)
        if _is_sorted_by_name(listing.checkpoints, by_step):
            listing.checkpoints = by_step
            listing.warnings.append(
                f"the list is sorted by name ({unit} {older} before {unit} {newer}), as a shell sorts what a pattern"
                " matches; it is folded in step order"
            )
            return
        listing.order_warnings.append(
            f"the list is not in step order: {unit} {newer} comes after {unit} {older}, and is folded so; pass the run"
            " directory to fold in step order"
        )
    elif not known and (pair := _descending_names([str(checkpoint.path) for checkpoint, _ in listing.checkpoints])):
        listing.order_warnings.append(
            f"the list is not in step order, by the numbers in the names: `{pair[1]}` comes after `{pair[0]}`, and is"
            " folded so; a shell sorts 10 before 9"
        )


def _is_sorted_by_name(listed: Sequence[Numbered], by_step: Sequence[Numbered]) -> bool:
    """Whether names that count on with the steps stand as a shell lists what a pattern matches: as texts.

    Of fewer than three, or where a step is unknown or occurs twice, it cannot be told.
    """
    names = [str(checkpoint.path) for checkpoint, _ in listed]
    steps = {checkpoint.step for checkpoint, _ in listed}
    if len(names) < 3 or None in steps or len(steps) < len(names):
        return False
    counted_on = [str(checkpoint.path) for checkpoint, _ in by_step]
    if counted_on != sorted(names, key=lambda name: [int(part) for part in re.findall(r"\d+", name)]):
        return False  # `epoch_0_step_200`, `epoch_1_step_100`
    # Most locales ignore case and punctuation when they sort.
    plain = [re.sub(r"[\W_]", "", name).lower() for name in names]
    return names == sorted(names) or plain == sorted(plain)


def _descending_names(names: Sequence[str]) -> tuple[str, str] | None:
    """The first two neighbours that differ in numbers alone and descend by them."""
    for name, next_name in itertools.pairwise(names):
        parts, next_parts = re.split(r"(\d+)", name), re.split(r"(\d+)", next_name)
        numbers, next_numbers = ([int(number) for number in each[1::2]] for each in (parts, next_parts))
        if parts[::2] == next_parts[::2] and next_numbers < numbers:
            return name, next_name
    return None


def sort_by_step(listing: Listing, directory: Path, selection: Selection) -> None:
    """Checkpoints of a run directory get their steps and their order; copies are left out.

    So is a newest one that cannot be read, aloud. Raises CkptEmaError where the order cannot be told, where several
    claim one step, and where one of the others cannot be read; of a run that is live these are told by whoever asked.
    """
    is_live = selection.is_live
    _leave_out_stepless_copies(listing, has_steps=selection.has_steps)
    if is_live and not listing.checkpoints:
        return
    if not listing.checkpoints:
        _forgive_newest(listing)
        raise NoCheckpointError(
            f"no checkpoint of `{directory}` is left to fold",
            details=[f"{name}: {reason}" for name, reason in listing.left_out],
            hint="snapshots need a student beside them: what is not averaged comes from it"
            if listing.teachers
            else None,
        )
    origin = _common_origin(listing.checkpoints)
    if origin is None:
        if len(listing.checkpoints) > 1:
            common = max(ORIGINS, key=lambda o: sum(o in numbers for _, numbers in listing.checkpoints))
            unknown = [item.label for item, numbers in listing.checkpoints if common not in numbers]
            raise CkptEmaError(
                f"the order of the checkpoints in `{directory}` cannot be told: neither their contents nor their names"
                " give all of them a step",
                details=[f"{name}: no {common[1]}" for name in unknown],
                hint=hint_of_unknown([item.label for item, _ in listing.checkpoints], unknown, selection.include),
            )
        if not is_live:
            _forgive_newest(listing)
        return
    if not is_live:
        _forgive_newest(listing)
    _check_epochs_ascend(listing, origin, directory)
    _order_without_copies(listing, origin, directory, selection.include)


def _common_origin(checkpoints: Sequence[Numbered]) -> Origin | None:
    """The most trusted kind of number that all of them give."""
    common = next((origin for origin in ORIGINS if all(origin in numbers for _, numbers in checkpoints)), None)
    if common == NUMBER and all(DATE_BESIDE in numbers for _, numbers in checkpoints) and not _count_on(checkpoints):
        return DATE_BESIDE
    return common


def _count_on(checkpoints: Sequence[Numbered]) -> bool:
    """Whether bare numbers beside dates tell the steps: each another one, and in the order of the dates.

    Where all dates are one, it is the run's.
    """
    pairs = sorted((numbers[DATE_BESIDE], numbers[NUMBER]) for _, numbers in checkpoints)
    if pairs[0][0] == pairs[-1][0]:
        return True
    return all(number < next_number for (_, number), (_, next_number) in itertools.pairwise(pairs))


def _check_epochs_ascend(listing: Listing, origin: Origin, directory: Path) -> None:
    """Steps that begin anew with every epoch are no order; epochs beside them tell."""
    epoch: Origin = (origin[0], "epoch")
    pairs = sorted((n[origin], n[epoch], c.label) for c, n in listing.checkpoints if epoch in n)
    for (step, older, label), (next_step, newer, next_label) in itertools.pairwise(pairs):
        if newer < older or (newer != older and step == next_step):
            raise CkptEmaError(
                f"the order of the checkpoints in `{directory}` cannot be told: their steps begin anew with each epoch",
                details=[f"{label}: epoch {older}, step {step}", f"{next_label}: epoch {newer}, step {next_step}"],
                hint="list the checkpoints in the order they are to be folded, oldest first",
            )


def _leave_out_stepless_copies(listing: Listing, *, has_steps: bool) -> None:
    """`final.pt` without a step beside checkpoints with one is the last of them again; so is `best_57.pt` beside two.

    The number after `best` is a metric, a fold or a stage, where the others count without it.
    """
    stepless = [item for item in listing.checkpoints if not item[1] and (has_steps or is_copy_name(item[0].label))]
    numbered = [item for item in listing.checkpoints if item[1].keys() == {NUMBER} and is_copy_name(item[0].label)]
    others = [item for item in listing.checkpoints if item[1] and not is_copy_name(item[0].label)]
    if len(others) > 1:
        stepless += numbered
    if stepless and (has_steps or len(stepless) < len(listing.checkpoints)):
        dropped = {id(item) for item in stepless}
        listing.checkpoints = [item for item in listing.checkpoints if id(item) not in dropped]
        listing.left_out += [(item[0].label, STEPLESS_COPY) for item in stepless]
        listing.stepless.update(item[0].label for item in stepless)


def _order_without_copies(listing: Listing, origin: Origin, directory: Path, include: Sequence[str]) -> None:
    """Put one checkpoint of each step in their order; raises CkptEmaError for two that are no copies."""
    by_step: dict[int, list[Checkpoint]] = defaultdict(list)
    for checkpoint, numbers in listing.checkpoints:
        by_step[numbers[origin]].append(replace(checkpoint, step=numbers[origin], unit=origin[1]))
    ordered = []
    for step, same in sorted(by_step.items()):
        originals = [checkpoint for checkpoint in same if not is_copy_name(checkpoint.label)]
        if len(originals) > 1:
            claims = {
                each: [item.label for item in found if not is_copy_name(item.label)]
                for each, found in sorted(by_step.items())
            }
            raise collision_of(claims, origin, directory, include)
        kept = (originals or same)[0]
        ordered.append((kept, {origin: step}))
        listing.left_out += [(copy.label, f"a copy of {origin[1]} {step}") for copy in same if copy is not kept]
    listing.checkpoints = ordered


def _forgive_newest(listing: Listing) -> None:
    """Leave an unreadable newest checkpoint out aloud; raise for any other, and for one that may not be read."""
    readable: dict[str, int] = defaultdict(lambda: -1)
    for checkpoint, numbers in listing.checkpoints:
        for (_, unit), number in {**steps_in_name(checkpoint.label), **numbers}.items():
            readable[unit] = max(readable[unit], number)
    numbered = []
    for path, error in listing.unreadable:
        if error.is_refused:
            raise error  # which waiting does not mend
        names = numbers_in_name(path.name)
        if is_copy_name(path.name) and not names:
            if "best" in path.name.lower() or not listing.checkpoints:
                raise error
            numbered.append((float("inf"), path, error))
        elif names and all(number > readable[unit] for unit, number in names.items()) and listing.checkpoints:
            numbered.append((float(next(iter(names.values()))), path, error))
        else:
            raise error
    steps = [item for item in numbered if item[0] != float("inf")]
    if len(steps) > 1:
        raise min(steps, key=lambda item: item[0])[2]
    for _, path, error in numbered:
        listing.left_out.append((path.name, f"unfinished: {error.message}"))
        listing.warnings.append(f"`{path.name}` is left out, it looks unfinished: {error.message}")
