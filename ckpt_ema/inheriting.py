"""How a teacher is continued: what it says of itself and the options in, the options to fold with out."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckpt_ema.catalogue import ASKED_FOR
from ckpt_ema.continuing import Beginning
from ckpt_ema.errors import CkptEmaError, MisuseError
from ckpt_ema.options import FoldOptions
from ckpt_ema.teacher_record import RULE_KEYS, SELECTION


@dataclass(frozen=True, slots=True)
class Inherited:
    """How a teacher is continued."""

    options: FoldOptions
    notes: list[str]
    warnings: list[str]
    clashing: list[str]
    """Names of options that say something else than the teacher does of itself."""


def inherit(beginning: Beginning, options: FoldOptions) -> Inherited:
    """`options`, with how the teacher was made and of what where they say nothing of it.

    Raises MisuseError or CkptEmaError where that cannot be continued.
    """
    if unreadable := [name for name in beginning.record.unreadable if name in RULE_KEYS]:
        raise CkptEmaError(f"`{beginning.path}` says of itself what cannot be: {beginning.record.shown(unreadable[0])}")
    selected, warnings, clashing = _select_for(beginning, options)
    found, notes, more, is_other_rule = _options_for(beginning, selected)
    if is_other_rule:
        clashing += [name for name in ("momentum", "half_life", "per") if getattr(options, name) is not None]
    return Inherited(found, notes, [*warnings, *more], clashing)


def _select_for(beginning: Beginning, options: FoldOptions) -> tuple[FoldOptions, list[str], list[str]]:
    """`options`, with what of each checkpoint is the student; warnings; the options that these are about."""
    if beginning.record.selection is None:
        return options, [], []
    made: dict[str, Any] = dict(beginning.record.selection)
    # What was found without being asked for is the same when it is asked for.
    found: dict[str, Sequence[str | None]] = {"state": [beginning.record.state], "prefix": beginning.record.stripped}
    warnings, clashing = [], []
    for name in SELECTION:
        asked, before = getattr(options, name), made.pop(name, None)
        if asked is None and before is not None:
            made[name] = before
        elif asked is not None and not any(each in (asked, f"{asked}.") for each in (before, *found[name])):
            how = "without" if before is None else f"with `--{name} {before}`, not"
            warnings.append(f"`{beginning.label}` was made {how} `--{name} {asked}`")
            clashing.append(name)
    try:
        return replace(options, **made), warnings, clashing
    except MisuseError as error:
        raise _impossible(beginning, error) from None


def _impossible(beginning: Beginning, error: MisuseError) -> CkptEmaError:
    return CkptEmaError(f"`{beginning.path}` says of itself what cannot be: {error.message}")


def _options_for(beginning: Beginning, options: FoldOptions) -> tuple[FoldOptions, list[str], list[str], bool]:
    """`options`, with how the teacher was made where they say nothing of it; notes, and warnings.

    Last, whether they ask for another rule.
    """
    record = beginning.record
    # An online teacher is updated once every `interval` steps, too.
    per = "step" if record.is_online else record.per
    is_asked = options.momentum is not None or options.half_life is not None or options.per not in (None, per)
    if not record.is_online and (record.made is None or record.profile != "ema"):
        if record.profile == "ema" or is_asked:
            return options, [], [], False
        what = f"`{beginning.label}` is of profile {record.profile}"
        return options, [], [f"{what}, and continues as an exponential moving average"], False
    if record.is_online and record.step is None and not is_asked:
        raise MisuseError(
            f"`{beginning.label}` does not say of which step it is, so what is newer cannot be told",
            hint="say what to fold, and with which momentum per checkpoint: `--from STEP --momentum M`; what"
            " `teacher.save(path, step=STEP)` writes knows its step",
        )
    if record.is_online and not record.has_begun and not is_asked:
        raise CkptEmaError(
            f"`{beginning.label}` is of before its first update, which copies the student",
            hint="fold the checkpoints after that, without `--init`",
        )
    given = {"momentum": record.momentum, "half_life": record.half_life}
    made: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    warnings = []
    if record.skip_buffers is not options.skip_buffers:
        flag = "--no-skip-buffers" if options.skip_buffers else "--skip-buffers"
        warnings.append(f"`{beginning.label}` was made with `{flag}`, and continues without")
    options = _with_treatment(beginning, options)
    counting: dict[str, Any] = {"per": per, "interval": record.interval}
    if per == "step":
        counting |= {"between": record.between, "steps_per_epoch": record.steps_per_epoch}
    if is_asked:
        asked = {name: getattr(options, name) for name in ("momentum", "half_life")}
        is_other = any(asked[name] not in (None, value) for name, value in made.items())
        is_other = is_other or options.per_step != (per == "step")
        if is_other:
            warnings.append(f"`{beginning.label}` was made with {_told(made, counting)}, and continues by another rule")
        return options, [], warnings, is_other
    for name, default in (("interval", 1), ("between", None), ("steps_per_epoch", None)):
        if getattr(options, name) != default:
            counting[name] = getattr(options, name)
    try:
        inherited = replace(options, **made, **counting)
    except MisuseError as error:
        raise _impossible(beginning, error) from None
    written = "" if inherited.dtype == "student" else f", in {inherited.dtype}"
    return inherited, [f"continues as `{beginning.label}` was made: {_told(made, counting)}{written}"], warnings, False


def _with_treatment(beginning: Beginning, options: FoldOptions) -> FoldOptions:
    """`options`, with what was copied on request and how wide it was made where they say nothing of that."""
    if not options.buffers:
        options = replace(options, buffers=tuple(map(glob.escape, beginning.record.copied.get(ASKED_FOR, ()))))
    if options.accumulate == "float32" and beginning.record.accumulate is not None:
        options = replace(options, accumulate=beginning.record.accumulate)
    if options.dtype == "student":
        # A teacher that followed training is wider than 16-bit students, and says nothing of that.
        floats = {dtype.name for dtype in beginning.dtypes.values() if dtype.is_floating_point}
        is_wide = beginning.record.is_online and floats == {"float32"}
        options = replace(options, dtype="float32" if is_wide else beginning.record.asked_dtype or "student")
    return options


def _told(made: Mapping[str, Any], counting: Mapping[str, Any]) -> str:
    told = ", ".join(f"{name.replace('_', '-')} {value:g}" for name, value in made.items() if isinstance(value, float))
    interval = counting.get("interval")
    return f"{told} per {counting.get('per')}{f', interval {interval}' if interval not in (None, 1) else ''}"
