"""After which step a checkpoint was saved: its contents and its name in, numbers by origin out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from ckpt_ema.formats import Contents
from ckpt_ema.formats.folder import WEIGHTS_SUFFIX

Unit = Literal["step", "epoch", "date", "number"]
Origin = tuple[Literal["inside", "name", "beside"], Unit]
"""Where a number was found, and what it counts; `beside` is a date beside a bare number in the name."""

# In order of trust. A date says what comes first, and nothing of the steps between two. A bare number in a name is the
# last resort: accelerate counts saves with it, timm epochs.
ORIGINS: tuple[Origin, ...] = (
    ("inside", "step"),
    ("name", "step"),
    ("inside", "epoch"),
    ("name", "epoch"),
    ("name", "date"),
    ("name", "number"),
)

INSIDE_PATHS: tuple[tuple[Unit, tuple[str, ...]], ...] = (
    ("step", ("meta", "iter")),
    ("step", ("state", "timestamp", "Timestamp", "batch")),
    ("step", ("state", "timestamp", "batch")),
    ("step", ("train_state", "step")),
    *(
        ("step", (key,))
        for key in (
            "global_step",
            "global_steps",
            "step",
            "iteration",
            "iter",
            "num_updates",
            "current_step",
            "train_step",
            "steps",
            "update",
            "ss_steps",  # Kohya's scripts
            "batch_idx_train",  # icefall
        )
    ),
    ("epoch", ("meta", "epoch")),
    *(("epoch", (key,)) for key in ("epoch", "epochs_run", "ss_epoch")),
)

VITS_KEYS = {"model", "iteration", "optimizer", "learning_rate"}
"""Of the checkpoints of VITS and its descendants, whose `iteration` is the epoch."""

VITS_NAME = re.compile(r"^[GD]_(?P<step>\d{1,18})$")
"""And their names, which have the step: WaveGlow saves the same keys, and a step under `iteration`."""

# Whole and plain: the 1 of `step_1M`, `step_1e3` or `loss_0.1` counts nothing.
_NUMBER = r"(?P<number>\d+)(?![\d.]*\d)(?![A-Za-z])"
NAME_PATTERNS: tuple[tuple[Unit, re.Pattern[str]], ...] = (
    ("step", re.compile(r"^checkpoint_\d+_" + _NUMBER + r"$")),  # fairseq: epoch, updates
    (
        "step",
        re.compile(
            r"(?:^|[^a-z])(?:global[_-]?steps?|steps?|iters?|iterations?|updates?|batch|ba)[-_=.]?" + _NUMBER,
            re.IGNORECASE,
        ),
    ),
    ("step", re.compile(r"-save-" + _NUMBER + r"-\d+-\d+$")),  # OneTrainer: step, epoch, step of the epoch
    ("epoch", re.compile(r"(?:^|[^a-z\d])(?:epochs?|ep|e)[-_=.]?" + _NUMBER, re.IGNORECASE)),
    ("epoch", re.compile(r"^(?P<number>\d+)[-_]?(?:epochs?|ep)$", re.IGNORECASE)),  # ESPnet
    (
        "number",
        re.compile(r"^(?:checkpoint|ckpt|model|student|weights|net)[-_.]?" + _NUMBER + r"(?:$|[-_])", re.IGNORECASE),
    ),
    ("number", re.compile(r"(?<![\d.])(?<!\d[A-Za-z])" + _NUMBER + r"$")),
    ("number", re.compile(r"^(?P<number>\d+)_(?:net_)?[A-Z](?:_[A-Z])?$")),  # the networks of a GAN: `5_net_G_A`
)
# Four digits after a date may as well be a step.
_TIME = (
    r"[T_ .+-](?P<hour>[01]\d|2[0-3])(?P<colon>[-_.:]?)(?P<minute>[0-5]\d)"
    r"(?:(?P=colon)(?P<second>[0-5]\d)|(?<=[-_.:]\d\d))(?!\d)"
)
_MONTH_AND_DAY = r"(?P<month>0[1-9]|1[0-2]){0}(?P<day>0[1-9]|[12]\d|3[01])(?!\d)"
DATE_PATTERNS = (
    re.compile(
        r"(?<!\d)(?P<year>(?:19|20)\d\d)(?P<between>[-_.])" + _MONTH_AND_DAY.format("(?P=between)") + f"(?:{_TIME})?"
    ),
    # Without a time `20240130` may as well be a step.
    re.compile(r"(?<!\d)(?P<year>(?:19|20)\d\d)" + _MONTH_AND_DAY.format("") + _TIME),
)
# But not with another number after it.
_DAY_OF_RUN = re.compile(r"(?<!\d)(?:19|20)\d\d" + _MONTH_AND_DAY.format("") + r"(?=[-_]\d)")
DATE_DIGITS = 14
"""Of a date: year, month, day, hour, minute and second, 0 where the name does not say."""

EDM2_NAME = re.compile(r"^network-snapshot-(?P<step>\d{1,18})-(?P<sigma_rel>0?\.\d{1,9})$")
"""EDM2's snapshots: thousands of images, and the width of the power average."""

_EMA_PYTORCH_NAME = re.compile(r"^\d{1,6}\.(?P<step>\d{1,18})$")
# The 16 of `model.fp16` counts nothing.
_PRECISION_SUFFIX = re.compile(r"[-_.](?:fp|bf|int)(?:8|16|32|64)$", re.IGNORECASE)
# Of many ranks' files of one checkpoint.
RANK_SUFFIX = re.compile(r"[-_.](?:rank|shard)[-_.]?(?P<rank>\d{1,6})$", re.IGNORECASE)
# Lightning appends a version where a name is taken.
_VERSION_SUFFIX = re.compile(r"-v\d+$")
_COPY_NAME = re.compile(r"(?:^|[^a-z])(last|latest|best|final|newest|current)(?:[^a-z]|$)|^checkpoint$", re.IGNORECASE)


def stem_of(name: str) -> str:
    """A file's name without what its format appends (`.pth.tar` as a whole)."""
    while (shorter := WEIGHTS_SUFFIX.sub("", name)) != name:
        name = shorter
    return name


def is_copy_name(name: str) -> bool:
    """Whether a checkpoint called `name` is by custom a copy or link of another one: last, best, final."""
    return bool(_COPY_NAME.search(stem_of(name)))


def steps_in_name(name: str) -> dict[Origin, int]:
    """Numbers that the file's or folder's name gives, by what they count."""
    stem = _VERSION_SUFFIX.sub("", _PRECISION_SUFFIX.sub("", RANK_SUFFIX.sub("", stem_of(name))))
    date = next((match for pattern in DATE_PATTERNS if (match := pattern.search(stem))), None)
    if date is None:
        return _numbers_in(_DAY_OF_RUN.sub("", stem))
    parts = (int(date[part] or 0) for part in ("month", "day", "hour", "minute", "second"))
    moment = int(date["year"] + "".join(f"{part:02}" for part in parts))
    # Where there are numbers beside the date, these count; and a step after a date may look like its time.
    beside = _numbers_in(stem[: date.start()] + stem[date.end() :])
    if ("name", "number") in beside:
        return {("beside", "date"): moment, **beside}
    return beside or {("name", "date"): moment, **_numbers_in(stem)}


def _numbers_in(stem: str) -> dict[Origin, int]:
    found: dict[Origin, int] = {}
    for unit, pattern in NAME_PATTERNS:
        if unit == "number" and found:
            break  # the 50 of `resnet50_step_100` counts nothing
        match = pattern.search(stem)
        if match and ("name", unit) not in found and len(match["number"]) < 19:
            found["name", unit] = int(match["number"])
    return found


def numbers_in_name(name: str) -> dict[str, int]:
    """The same by what they count alone: `step`, `epoch`, `date`, `number`."""
    return {unit: number for (_, unit), number in steps_in_name(name).items()}


def step_of_average(name: str) -> int | None:
    """The step in the name of an average as EDM2 and ema-pytorch give them; None for another name."""
    match = EDM2_NAME.match(stem_of(name)) or _EMA_PYTORCH_NAME.match(stem_of(name))
    return int(match["step"]) if match else None


def steps_inside(contents: Contents) -> dict[Origin, int]:
    """Numbers that the checkpoint itself records, by what they count."""
    found: dict[Origin, int] = {}
    for unit, number in _recorded_numbers(contents):
        found.setdefault(("inside", unit), number)
    return found


def _recorded_numbers(contents: Contents) -> Iterator[tuple[Unit, int]]:
    vits = VITS_NAME.match(stem_of(contents.path.name))
    if vits and isinstance(contents.tree, dict) and contents.tree.keys() == VITS_KEYS:
        yield "step", int(vits["step"])
        return
    number = _as_step(contents.trainer_state.get("global_step"))
    if number is not None:
        yield "step", number
    for unit, path in INSIDE_PATHS:
        number = _as_step(_value_at(contents.tree, path))
        if number is not None:
            yield unit, number
    for unit, path in INSIDE_PATHS:
        text = contents.metadata.get(path[0], "") if len(path) == 1 else ""
        if text.isascii() and text.isdigit() and len(text) < 19:
            yield unit, int(text)
    history = _value_at(contents.tree, ("optimizer_history",))
    if isinstance(history, list) and history:  # fairseq
        number = _as_step(_value_at(history[-1], ("num_updates",)))
        if number is not None:
            yield "step", number


def _value_at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def _as_step(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and 0 <= value < 1 << 62 else None
