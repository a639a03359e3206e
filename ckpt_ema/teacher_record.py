"""What a teacher's file says of itself: the `__metadata__` of a file in, a record whose entries can be relied on out.

A file is what a stranger wrote: an entry that is not what this tool writes counts as one that is not there.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ckpt_ema.averages.profiles import POWER_RULE
from ckpt_ema.averages.response_records import read_response
from ckpt_ema.averages.responses import Response
from ckpt_ema.blocks import Accumulate
from ckpt_ema.dtypes import BY_NAME, DType, WrittenDtype
from ckpt_ema.formats.contents import PROVENANCE_KEY
from ckpt_ema.runs.steps import Unit
from ckpt_ema.sizes import MAX_COUNT

LARGE = 1e200
"""No squared length of a student; a sum of a few thousand is still a number."""

RULE_KEYS = (
    *("made", "profile", "momentum", "half_life", "sigma_rel"),
    *("per", "interval", "between", "steps_per_epoch"),
)
"""The entries that say how much each checkpoint brought."""

Made = Literal["fold", "reconstruct"]
Per = Literal["checkpoint", "step", "update"]

SELECTION = ("state", "prefix")
"""Options that say which of a checkpoint's tensors are the student's."""


@dataclass(frozen=True, slots=True)
class PastCheckpoint:
    """One file's part in a teacher that is there already."""

    name: str
    step: int | None
    unit: Unit
    """What `step` counts."""

    coefficient: float
    size: int
    """Bytes on disk, when it was folded; 0 for an average, of which that is not recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRecord:
    """How a teacher came about, by its own account; with nothing given, that of a file without one."""

    table: Mapping[str, Any] | None = None
    """As it stands in the file."""

    tool: str | None = None
    version: str | None = None
    rule: str | None = None
    """The formula, for people."""

    made: Made | None = None
    """None for a teacher of the training loop."""

    profile: str = "ema"
    momentum: float | None = None
    half_life: float | None = None
    """In steps."""

    sigma_rel: float | None = None
    per: Per | None = None
    """`update` for a teacher of the training loop."""

    interval: int = 1
    between: str | None = None
    steps_per_epoch: int | None = None
    earlier_rules: tuple[Mapping[str, Any], ...] = ()
    """The rules by which it was begun, where it was continued by others; entries of RULE_KEYS, oldest first."""

    skip_buffers: bool | None = None
    accumulate: Accumulate | None = None
    asked_dtype: WrittenDtype | None = None
    """What it was asked to be written in."""

    dtypes: tuple[str, ...] = ()
    """Names of its own."""

    student_dtypes: Mapping[str, DType] = field(default_factory=dict)
    """Of averaged tensors, the students' dtype where that decided in which they were computed, and is not their own."""

    initial_teacher: str | None = None
    """The name of the one that it began with, whose own checkpoints are not listed."""

    averages: tuple[PastCheckpoint, ...] = ()
    """The files of teachers in it."""

    checkpoints: tuple[PastCheckpoint, ...] = ()
    """The students in it, oldest first; of both lists nothing counts where one file is not what this tool writes."""

    first_share: float | None = None
    parts: int = 1
    """In how many folds it was made that cost last digits (see FoldPlan); 1 where it has those of one."""

    rounded_to: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """The dtypes of students and those that teachers on the way to this one were rounded to, with the share, 0 to 1."""

    origin: int | None = None
    """The training step from which an interval counts, where no first checkpoint tells."""

    step: int | None = None
    """Its own, of a reconstruction or a teacher of the training loop."""

    start: int | None = None
    """The step at which a reconstruction begins."""

    predicted_error: float | None = None
    nearest: str | None = None
    """Of a reconstruction: see Prediction."""

    state: str | None = None
    stripped: tuple[str, ...] = ()
    """Where in its checkpoints the student stood, and the prefixes that were taken off."""

    selection: Mapping[str, str] | None = None
    """What of that was asked for, by SELECTION; None where it does not say."""

    num_averaged: int | None = None
    copied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The names of tensors that came from the newest checkpoint as they were, by the reason why."""

    tied: tuple[frozenset[str], ...] = ()
    """The names of each averaged tensor that has several."""

    has_updates: bool = False
    """Whether it counts updates, as a teacher of the training loop does."""

    has_begun: bool = True
    """Whether the first update of the training loop has been."""

    num_steps: int | None = None
    """Steps of training that it saw."""

    arithmetic: str | None = None
    track: str | None = None
    """Which of the averages that are kept for reconstructions it is."""

    is_snapshot: bool = False
    """Whether a reconstruction may make other teachers of it, which nobody can make again."""

    response: Response | None = None
    """How it depends on the student's path, where it says so."""

    increments: tuple[tuple[int, float], ...] = ()
    """How far the student moved at some steps, squared, as a MeanTeacher measured it."""

    squared_norm: float | None = None
    """Of the student's averaged tensors, beside these."""

    unreadable: tuple[str, ...] = ()
    """Entries that are there, and are not what this tool writes."""

    @property
    def is_online(self) -> bool:
        """Whether it followed the student in training, and says by which momentum."""
        return self.per == "update" and self.momentum is not None and 0 < self.momentum < 1

    @property
    def is_of_training(self) -> bool:
        """Whether it followed the student in training, so that nobody can make it again."""
        return self.has_updates or self.is_snapshot

    @property
    def inputs(self) -> tuple[PastCheckpoint, ...]:
        """All files in it, in the order in which they entered."""
        return (*self.averages, *self.checkpoints)

    @property
    def own_rule(self) -> dict[str, Any]:
        """What says how much each of its checkpoints brought, as it stands in the file."""
        return rule_of(self.table or {})

    @property
    def copied_names(self) -> frozenset[str]:
        """The tensors that came from the newest checkpoint as they were."""
        return frozenset(itertools.chain.from_iterable(self.copied.values()))

    def shown(self, name: str) -> str:
        """An entry as it stands in the file, for people; `dtypes.teacher` is one of a table within."""
        value: Any = self.table
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return f"{str(value)[:60]!r} for `{name}`"

    def aliases_in(self, names: Collection[str]) -> frozenset[str]:
        """What it calls tied to one of `names`, and is none of these itself: the same tensor once more.

        Transformers and others leave all but one name of a tied tensor out of their checkpoints.
        """
        return frozenset().union(*(each for each in self.tied if not each.isdisjoint(names))).difference(names)


def read_provenance(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The table that a teacher's file holds of itself; None for a file of another origin."""
    try:
        table = json.loads(metadata.get(PROVENANCE_KEY, "null"))
    except (ValueError, RecursionError):
        return None
    return table if isinstance(table, dict) else None


def read_record(metadata: Mapping[str, str]) -> TeacherRecord:
    """What a file says of itself as a teacher; an empty record where it says nothing."""
    return record_of(read_provenance(metadata))


def record_of(table: Mapping[str, Any] | None) -> TeacherRecord:
    """The record that a table holds, by its entries that can be read; an empty one where there is no table."""
    if table is None:
        return TeacherRecord()
    entries = _Entries(table)
    dtypes = entries.inner("dtypes")
    selection = entries.take("selection", _is_table)
    rule = entries.take("rule", _is_text)
    per = entries.take("per", _one_of(get_args(Per)))
    is_online = per == "update"
    return TeacherRecord(
        table=table,
        tool=entries.take("tool", _is_text),
        version=entries.take("version", _is_text),
        rule=rule,
        made=entries.take("made", _one_of(get_args(Made))),
        profile="power" if rule == POWER_RULE else entries.take("profile", _is_text, "ema"),
        momentum=entries.take("momentum", _is_float),
        half_life=entries.take("half_life", _is_float),
        sigma_rel=entries.take("sigma_rel", _is_float),
        per=per,
        interval=entries.take("interval", _is_positive, 1),
        between=entries.take("between", _is_text),
        steps_per_epoch=entries.take("steps_per_epoch", _is_positive),
        earlier_rules=tuple(entries.take("earlier_rules", _list_of(_is_table), ())),
        skip_buffers=entries.take("skip_buffers", lambda value: isinstance(value, bool)),
        accumulate=dtypes.take("accumulate", _one_of(get_args(Accumulate))),
        asked_dtype=dtypes.take("asked", _one_of(get_args(WrittenDtype))),
        dtypes=tuple(dtypes.take("teacher", _list_of(_is_text), ())),
        student_dtypes={
            name: BY_NAME[dtype]
            for dtype, names in dtypes.take("tensors_by_student", _table_of(_list_of(_is_text)), {}).items()
            for name in names
            if dtype in BY_NAME
        },
        initial_teacher=entries.take("initial_teacher", _is_text),
        averages=entries.files("averages"),
        checkpoints=entries.files("checkpoints"),
        first_share=entries.take("first_share", _is_float),
        parts=entries.take("parts", _is_positive, 1),
        rounded_to=dict(_shares_of(entries.take("rounded_to", _table_of(_table_of(_is_share)), {}))),
        origin=entries.take("origin", _is_count),
        step=entries.take("step", _is_count),
        start=None if is_online else entries.take("start", _is_count),
        predicted_error=entries.take("predicted_error", _is_float),
        nearest=entries.take("nearest", _is_text),
        state=entries.take("state", _is_text),
        stripped=tuple(entries.take("stripped", _list_of(_is_text), ())),
        selection=selection and {name: selection[name] for name in SELECTION if _is_text(selection.get(name))},
        num_averaged=entries.inner("averaged").take("tensors", _is_count),
        copied={
            reason: tuple(names)
            for reason, names in entries.inner("copied").take("names", _table_of(_list_of(_is_text)), {}).items()
        },
        tied=tuple(map(frozenset, entries.take("tied", _list_of(_list_of(_is_text)), ()))),
        has_updates="updates" in table,
        has_begun=not (is_online and "start" in table and table["start"] is None),
        num_steps=entries.take("steps", _is_count),
        arithmetic=entries.take("arithmetic", _is_text),
        track=entries.take("track", _is_text),
        is_snapshot=table.get("response") is not None,
        response=read_response(table.get("response")),
        increments=tuple(_squares_of(entries.take("increments", _is_list, ()))),
        squared_norm=entries.take("squared_norm", _is_square),
        unreadable=tuple(entries.unreadable),
    )


def rule_of(table: Mapping[str, Any]) -> dict[str, Any]:
    """Of a table, the entries that say how much each of its checkpoints brought."""
    return {key: table[key] for key in RULE_KEYS if key in table}


def printable(name: str) -> str:
    """A name as a record has it: a file name may be bytes that are no text; a safetensors header may not."""
    return os.fsencode(name).decode("utf-8", "replace")


def is_snapshot(metadata: Mapping[str, str]) -> bool:
    """Whether a file is the snapshot of an online teacher, which nobody can make again."""
    return read_record(metadata).is_snapshot


class _Entries:
    """A table's entries by name, and the names of those that are something else than they should be."""

    def __init__(self, table: Mapping[str, Any], place: str = "", unreadable: list[str] | None = None) -> None:
        self._table = table
        self._place = place
        self.unreadable: list[str] = [] if unreadable is None else unreadable

    def take(self, name: str, is_right: Callable[[Any], bool], default: Any = None) -> Any:
        value = self._table.get(name)
        if value is None:
            return default
        if is_right(value):
            return value
        self.unreadable.append(self._place + name)
        return default

    def inner(self, name: str) -> _Entries:
        return _Entries(self.take(name, _is_table, {}), f"{name}.", self.unreadable)

    def files(self, name: str) -> tuple[PastCheckpoint, ...]:
        found = [_file_of(item, has_size=name == "checkpoints") for item in self.take(name, _is_list, [])]
        files = tuple(file for file in found if file is not None)
        if len(files) < len(found):
            self.unreadable.append(name)
            return ()
        return files


def _file_of(item: Any, *, has_size: bool) -> PastCheckpoint | None:
    if not isinstance(item, dict):
        return None
    unit: Unit | None = next((unit for unit in get_args(Unit) if unit in item), None)
    name: Any = item.get("name")
    share: Any = item.get("coefficient")
    size: Any = item.get("bytes") if has_size else 0
    if unit is None or not (item[unit] is None or _is_count(item[unit])):
        return None
    if not _is_text(name) or not _is_float(share) or not math.isfinite(share) or type(size) is not int:
        return None
    return PastCheckpoint(name, item[unit], unit, share, size)


def _shares_of(by_student: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[tuple[str, str], float]]:
    for student, shares in by_student.items():
        for written, share in shares.items():
            yield (student, written), share


def _squares_of(pairs: Any) -> Iterator[tuple[int, float]]:
    for pair in pairs:
        if _is_list(pair) and len(pair) == 2 and _is_count(pair[0]) and _is_square(pair[1]):
            yield pair[0], pair[1]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_float(value: Any) -> bool:
    # What is written is a float always; JSON's whole numbers may be larger than any.
    return isinstance(value, float)


def _is_square(value: Any) -> bool:
    return isinstance(value, float) and 0 <= value < LARGE


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_COUNT


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_share(value: Any) -> bool:
    return _is_float(value) and 0 <= value <= 1


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _one_of(allowed: Collection[str]) -> Callable[[Any], bool]:
    return lambda value: _is_text(value) and value in allowed


def _list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: _is_list(value) and all(map(is_right, value))


def _table_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: _is_table(value) and all(map(is_right, value.values()))
