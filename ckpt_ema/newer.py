"""What a run has beyond a teacher: the teacher and all checkpoints in, those that are to be folded into it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckpt_ema.continuing import Beginning
from ckpt_ema.errors import NoCheckpointError
from ckpt_ema.runs.checkpoints import Checkpoint
from ckpt_ema.runs.steps import Unit
from ckpt_ema.sizes import counted
from ckpt_ema.teacher_record import printable


@dataclass(frozen=True, slots=True)
class Newer:
    """What of a run is to be folded into a teacher."""

    checkpoints: list[Checkpoint]
    anchor: Checkpoint | None
    """The newest one of the teacher itself, where it is still there."""

    left_out: list[tuple[str, str]]
    """Names of what is not folded, each with the reason."""

    warnings: Sequence[str] = ()


def newer_of(beginning: Beginning, checkpoints: Sequence[Checkpoint], *, is_chosen: bool = False) -> Newer:
    """What to fold of a run.

    `is_chosen` says that somebody chose from which step on; that counts where the teacher lists no checkpoints.
    Raises CkptEmaError where nothing is left.
    """
    found = None if is_chosen else _newer_by_step(beginning, checkpoints) or _newer_by_name(beginning, checkpoints)
    return found or _newer_by_list(beginning, checkpoints, is_chosen=is_chosen)


def _newer_by_step(beginning: Beginning, checkpoints: Sequence[Checkpoint]) -> Newer | None:
    """What to fold where the teacher records its own training step; None unless all of the run count in those."""
    own, per_epoch = beginning.record.step, beginning.record.steps_per_epoch
    factors = {"step": 1, "number": per_epoch or 1} | ({} if per_epoch is None else {"epoch": per_epoch})
    steps = [
        (item.step * factors[item.unit], item) for item in checkpoints if item.step is not None and item.unit in factors
    ]
    if own is None or len(steps) < len(checkpoints):
        return None
    newer = [item for step, item in steps if step > own]
    left_out = [(item.label, f"not newer than `{beginning.label}`") for step, item in steps if step <= own]
    anchor = next((item for step, item in steps if step == own), None)
    return Newer(_some(beginning, newer), anchor, left_out)


def _newer_by_list(beginning: Beginning, checkpoints: Sequence[Checkpoint], *, is_chosen: bool) -> Newer:
    """What to fold by the checkpoints that the teacher lists."""
    inside = {id(item) for item in inside_of(beginning, checkpoints)}
    last = beginning.past[-1] if beginning.past else None
    is_unknown = any(item.step is None or last is None or item.unit != last.unit for item in checkpoints)
    if last is None or last.step is None or is_unknown:
        left_out = [(item.label, f"`{beginning.label}` has it") for item in checkpoints if id(item) in inside]
        newer = _some(beginning, [item for item in checkpoints if id(item) not in inside])
        unknown = f"`{beginning.label}` does not say which of these checkpoints it has"
        all_of_them = f"all {len(newer)} are folded, even those (`--from STEP` leaves older ones out)"
        warnings = [] if beginning.past or is_chosen else [f"{unknown}: {all_of_them}"]
        return Newer(newer, None, left_out, warnings)
    # A list may have been out of order; but a reconstruction of an earlier step takes later students as well.
    old = inside if beginning.record.made == "fold" else set()
    beyond = [item for item in checkpoints if item.step is not None and item.step > last.step and id(item) not in old]
    if not inside and len(beyond) < len(checkpoints):
        text = f"no checkpoint is in `{beginning.label}`, which is of {last.unit} {last.step}: it is of another run"
        return Newer(list(checkpoints), None, [], [text])
    taken = {id(item) for item in beyond}
    left_out = [
        (item.label, f"`{beginning.label}` has it" if id(item) in inside else f"older than `{beginning.label}`")
        for item in checkpoints
        if id(item) not in taken
    ]
    same = (item for item in checkpoints if item.step == last.step and id(item) in inside)
    anchor = next((item for item in same if item.size == last.size), None)
    return Newer(_some(beginning, beyond), anchor, left_out)


def _number_of(beginning: Beginning, unit: Unit) -> int | None:
    """Its step, or epoch, by its contents or its name; a bare number counts what the run does."""
    return beginning.numbers.get(unit, beginning.numbers.get("number"))


def _newer_by_name(beginning: Beginning, checkpoints: Sequence[Checkpoint]) -> Newer | None:
    """What to fold where nothing but the teacher's own contents or name tell its step; None where they do not."""
    own = _number_of(beginning, checkpoints[0].unit)
    if own is None or any(item.step is None or item.unit != checkpoints[0].unit for item in checkpoints):
        return None
    claim = f"of {checkpoints[0].unit} {own} by its contents or its name"
    newer = [item for item in checkpoints if (item.step or 0) > own]
    if not newer:
        raise NoCheckpointError(
            f"nothing is newer than `{beginning.label}`, which is {claim}",
            hint="where it is of another step, say what is newer: `--from STEP`",
        )
    left_out = [(item.label, f"not newer than `{beginning.label}`") for item in checkpoints if (item.step or 0) <= own]
    text = f"`{beginning.label}` is taken to be {claim}, and {counted(len(left_out), 'checkpoint')} to be in it"
    return Newer(newer, None, left_out, [f"{text}; `--from STEP` says otherwise"])


def _some(beginning: Beginning, checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    if checkpoints:
        return checkpoints
    unit, step = beginning.last
    if not beginning.past:
        raise NoCheckpointError(
            f"nothing is newer than `{beginning.label}`, which is of step {step}",
            hint="train on, then fold again; where it is another run's, pass `--from 0 --momentum M`",
        )
    known = "" if step is None else f", up to {unit} {step}"
    raise NoCheckpointError(
        f"nothing is newer than `{beginning.label}`: it has every checkpoint{known}", hint="train on, then fold again"
    )


def inside_of(beginning: Beginning, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those that are in it, as far as it says."""
    known = {(past.name, past.unit, past.step) for past in beginning.past}
    # What counts in a run may change with what comes to lie there: then it is the same file by name and size.
    files = {(past.name, past.size): past.unit for past in beginning.past}
    return [
        item
        for item in checkpoints
        if _key(item) in known or files.get((printable(item.label), item.size), item.unit) != item.unit
    ]


def changed_of(beginning: Beginning, checkpoints: Sequence[Checkpoint]) -> list[str]:
    """A warning where checkpoints of the teacher have another size than when it was folded."""
    sizes = {(past.name, past.unit, past.step): past.size for past in beginning.past}
    changed = [item for item in checkpoints if sizes.get(_key(item), item.size) != item.size]
    if not changed:
        return []
    first = changed[0]
    return [
        f"{len(changed)} of the checkpoints in `{beginning.label}` were written again since: `{first.label}` has"
        f" {first.size} bytes, and had {sizes[_key(first)]}"
    ]


def _key(item: Checkpoint) -> tuple[str, Unit, int | None]:
    """What a record knows a checkpoint by."""
    return printable(item.label), item.unit, item.step
