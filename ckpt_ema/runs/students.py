"""The student of a checkpoint: its state dicts in, the raw tensors by the names of a bare model out."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckpt_ema.assembly import StoredTensor
from ckpt_ema.errors import AverageAloneError, CkptEmaError, MisuseError, UnreadableCheckpointError
from ckpt_ema.formats import TENSOR_LEAVES, Contents
from ckpt_ema.formats.names import AVERAGE_WORDS, is_average_name
from ckpt_ema.formats.pickles import Inert, PickledTensor, module_state
from ckpt_ema.runs.state_dicts import (
    as_mapping,
    as_state_dicts,
    find_raw_state_dict,
    find_tensor_tables,
    is_trainers_name,
    key_of_teacher,
    quoted_keys,
    state_at,
)

# How self-supervised models call what follows another part of them, and that part. Other pairs, such as a `target_head`
# beside a `head`, are trained as often.
_TWINS = (
    (re.compile(r"^encoder_k$"), ("encoder_q",)),
    (re.compile(r"^momentum_(.+)$"), (r"\1", r"base_\1")),
    (re.compile(r"^(.+)_momentum$"), (r"\1",)),
    (re.compile(r"^target_(.+)$"), (r"online_\1",)),
    (re.compile(r"^(.+)_target$"), (r"\1_online",)),
)
# Megatron's distributed checkpoints have names of the model and of all else in one table.
_OF_THE_TRAINER = re.compile(r"^((chained_\d+\.)?optimizer\.(state|param_groups)\.|rng_state/)")
# What trainers count, beside the tensors of a flat state dict.
_COUNTER = re.compile(r"(^|_)(steps?|epochs?|iter(ation)?s?|updates|n_averaged)(_|$)", re.IGNORECASE)
COMPILED = "_orig_mod."
"""torch.compile's mark, wherever in a name a compiled module stands."""

MMCV_EMA = "ema_"
"""Before the names of the second model that MMCV 1.x's EMAHook keeps, whose dots it makes `_`."""

NOT_A_TENSOR = "not a tensor"
NUMPY_ARRAY = "a numpy array, not a tensor"
"""Why an entry of the student's state dict is left out; the second may be a weight."""


@dataclass(frozen=True, slots=True)
class Student:
    """The tensors of one checkpoint that are to be folded."""

    key: str
    """Dotted path of the state dict inside the checkpoint, "" for the checkpoint itself."""

    tensors: dict[str, StoredTensor]
    stripped: tuple[str, ...] = ()
    """Prefixes taken off the names."""

    left_out: dict[str, str] = field(default_factory=dict)
    """What of the state dict is not folded, and why."""

    known_buffers: frozenset[str] | None = None
    """Names of the buffers, where the checkpoint records which they are."""

    def telling(self, reasons: Mapping[str, str]) -> Student:
        """The same, with more that is not folded, and why."""
        return replace(self, left_out={**self.left_out, **reasons})

    def without(self, reasons: Mapping[str, str]) -> Student:
        """The same without the tensors of these names, and why; a name may be that of no tensor."""
        tensors = {name: tensor for name, tensor in self.tensors.items() if name not in reasons}
        return replace(self.telling(reasons), tensors=tensors)


def choose_student(contents: Contents, *, state: str | None = None, prefix: str | None = None) -> Student:
    """Pick the raw student of a checkpoint.

    `state` names the state dict by its dotted path and overrides every rule; `prefix` keeps the tensors whose names
    begin with it and strips it. Raises CkptEmaError where only an average is there, where several state dicts
    could be meant, and where a tensor cannot be read without running code.
    """
    passed_over: dict[str, Any] = {}
    tables = list(find_tensor_tables(contents.tree, passed_over))
    if state is not None:
        student = _student_of(contents, state, state_at(contents, state))
    else:
        key, tensors = find_raw_state_dict(contents, tables)
        student = _student_of(contents, key, tensors)
    others = {
        found.key: "an average" if found.kind == "average" else "another state dict"
        for found in as_state_dicts(tables)
        if found.key and found.key != student.key and not found.key.startswith(f"{student.key}.")
    }
    beside = student.key.rpartition(".")[0]
    for name, value in passed_over.items():
        is_near = name.startswith(f"{student.key}.") or (beside and name.startswith(f"{beside}."))
        if is_near and any(find_tensor_tables(value)):
            others[name] = "the trainer's, by its name"
    student = _strip_wrappers(student.telling(others))
    if twins := _mmcv_twins(contents, student):
        prefix = prefix or ""
        takes_twins = prefix.startswith(MMCV_EMA)
        student = _take_mmcv_half(contents, student, twins, takes_twins=takes_twins, is_chosen=state is not None)
        prefix = prefix.removeprefix(MMCV_EMA)
    if prefix:
        student = _take_prefix(contents, student, prefix)
    else:
        student = _take_student_half(contents, student, averages_allowed=state is not None)
    # Last: what is not folded may be stored in ways that are not read.
    return replace(student, tensors=contents.locate(student.tensors))


def tensors_of_teacher(contents: Contents) -> dict[str, StoredTensor]:
    """The tensors of a teacher, of this tool's or another's, by the names of a bare model.

    Raises CkptEmaError where `choose_student` does, but for a file that holds an average alone: a teacher is one.
    """
    return choose_student(contents, state=key_of_teacher(contents)).tensors


def _student_of(contents: Contents, key: str, value: Any) -> Student:
    """The whole of a state dict, its tensors not yet located."""
    buffers = contents.buffer_names
    if isinstance(value, Inert):
        module = module_state(value)
        if module is not None:
            value, buffers = module[0], frozenset(module[1])
    table = as_mapping(value) or {}
    leaves: dict[str, Any] = {}
    trainers: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, leaf in table.items():
        if isinstance(leaf, TENSOR_LEAVES):
            if not isinstance(name, str):
                raise UnreadableCheckpointError(f"`{contents.path}`: a tensor of `{key}` has no text for a name")
            (trainers if _OF_THE_TRAINER.match(name) else leaves)[name] = leaf
        elif isinstance(leaf, Inert) and _was_a_tensor(leaf):
            raise CkptEmaError(
                f"`{contents.path}`: `{name}` is a tensor of a kind that is not stored as plain numbers"
                f" ({leaf.qualified_name})",
                hint="save the student's state dict with plain dense tensors",
            )
        elif not isinstance(name, str):
            left_out["(an entry without a name)"] = NOT_A_TENSOR
        elif not _is_trainers_own(name, leaf):
            left_out[name] = NUMPY_ARRAY if _is_numpy_array(leaf) else NOT_A_TENSOR
    if leaves:
        left_out |= dict.fromkeys(trainers, "the trainer's, by its name")
    else:
        leaves = trainers
    return Student(key, leaves, left_out=left_out, known_buffers=buffers)


def _was_a_tensor(leaf: Inert) -> bool:
    name = leaf.qualified_name
    return name.startswith(("torch._utils._rebuild", "torch.storage._load_from_bytes", "torch.distributed")) or any(
        isinstance(argument, PickledTensor) for argument in leaf.arguments
    )


def _is_trainers_own(name: str, leaf: Any) -> bool:
    """Whether an entry counts steps or never is a model's; what has a place in a model has a dot."""
    counts = isinstance(leaf, (int, float)) and _COUNTER.search(name) is not None
    return "." not in name and (counts or is_trainers_name(name))


def _is_numpy_array(leaf: Any) -> bool:
    name = leaf.qualified_name if isinstance(leaf, Inert) else ""
    return name.startswith("numpy.") and name.endswith(("._reconstruct", "._frombuffer"))


def _renamed(student: Student, names: dict[str, str], stripped: str) -> Student:
    tensors = {new: student.tensors[old] for old, new in names.items()}
    if len(tensors) < len(names):
        raise UnreadableCheckpointError(f"without `{stripped}`, two tensors have the same name")
    buffers = student.known_buffers
    if buffers is not None:
        buffers = frozenset(new for old, new in names.items() if old in buffers)
    # What is no tensor is told under the name that a model misses it by.
    left_out = dict(student.left_out)
    for name in _entries_of(student):
        reason = left_out.pop(name)
        left_out[name.replace(stripped, "") if stripped == COMPILED else name.removeprefix(stripped)] = reason
    return replace(
        student, tensors=tensors, stripped=(*student.stripped, stripped), left_out=left_out, known_buffers=buffers
    )


def _entries_of(student: Student) -> list[str]:
    """The names of what is no tensor."""
    return [name for name, reason in student.left_out.items() if reason in (NOT_A_TENSOR, NUMPY_ARRAY)]


def _strip_wrappers(student: Student) -> Student:
    """Take off what DDP, torch.compile and averaging wrappers put before every name."""
    names = list(student.tensors)
    counters = {"n_averaged", "steps", "num_updates", "step", "initted"}
    if COMPILED in "\n".join(names):
        student = _renamed(student, {name: name.replace(COMPILED, "") for name in names}, COMPILED)
        names = list(student.tensors)
    wrapped = [name for name in names if name.startswith("module.")]
    if wrapped and all(name in counters for name in names if not name.startswith("module.")):
        counted = {name: "a counter of the averaging" for name in names if name in counters}
        student = _renamed(student, {name: name.removeprefix("module.") for name in wrapped}, "module.")
        student = student.telling(counted)
    return student


def _take_prefix(contents: Contents, student: Student, prefix: str) -> Student:
    if not prefix.endswith(".") and any(name.startswith(f"{prefix}.") for name in student.tensors):
        prefix = f"{prefix}."
    taken = {name: name.removeprefix(prefix) for name in student.tensors if name.startswith(prefix) and name != prefix}
    if not taken:
        tops = sorted({f"{top}." for top, dot, _ in (name.partition(".") for name in student.tensors) if top and dot})
        names = (
            f"names begin with: {', '.join(tops[:10])}" if tops else f"names are: {', '.join([*student.tensors][:10])}"
        )
        raise CkptEmaError(
            f"`{contents.path}`: no tensor name begins with `{prefix}`",
            details=[names],
            hint=f"pass `--prefix {shlex.quote(tops[0])}`" if tops else "omit `--prefix`",
        )
    outside = [name for name in _entries_of(student) if not name.startswith(prefix)]
    rest = {name: f"not under `{prefix}`" for name in (*student.tensors, *outside) if name not in taken}
    return _renamed(student, taken, prefix).telling(rest)


def _take_student_half(contents: Contents, student: Student, *, averages_allowed: bool) -> Student:
    """Fold the student of a mean-teacher pair, and no average that lies beside the raw weights."""
    pair = _student_prefix(student.tensors)
    if pair is not None:
        taken = {name: name.removeprefix(pair) for name in student.tensors if name.startswith(pair)}
        teacher = pair.removesuffix("student.") + "teacher."
        outside = [name for name in _entries_of(student) if not name.startswith(pair)]
        rest = {
            name: "the teacher's" if name.startswith(teacher) else "neither student's nor teacher's"
            for name in (*student.tensors, *outside)
            if name not in taken
        }
        return _renamed(student, taken, pair).telling(rest)
    if averages_allowed:
        return student
    # All names at once first: they are many, and hardly ever is one of them an average's.
    text = "\n".join(student.tensors).lower()
    student = _without_twins(student, text)
    if not any(word in text for word in AVERAGE_WORDS):
        return student
    under = {name: prefix for name in student.tensors if (prefix := _average_prefix(name))}
    if not under:
        return student
    if len(under) == len(student.tensors):
        prefixes = sorted(set(under.values()))
        raise AverageAloneError(
            f"`{contents.path}` holds an average, and no raw student: every name begins with {quoted_keys(prefixes)}",
            hint=f"pass `--prefix {shlex.quote(prefixes[0])}` if you mean to fold averages",
        )
    mirrored = _mirrored_prefixes(student.tensors, under)
    under |= {name: prefix for name in _entries_of(student) if (prefix := _average_prefix(name))}
    rest = {name: f"an average (`{prefix}`)" for name, prefix in under.items() if prefix in mirrored}
    return student.without(rest)


def _without_twins(student: Student, text: str) -> Student:
    """Without the parts that follow another one, as a momentum encoder does: by their names, and tensor by tensor."""
    if not any(word in text for word in ("momentum", "target", "encoder_k")):
        return student
    parts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in student.tensors:
        path = name.split(".")
        for depth, part in enumerate(path[:-1]):
            if any(pattern.match(part) for pattern, _ in _TWINS):
                parts[".".join((*path[:depth], "")), part].append(name)
                break
    left_out: dict[str, str] = {}
    for (place, part), names in parts.items():
        for leader in (
            match.expand(each) for pattern, ways in _TWINS if (match := pattern.match(part)) for each in ways
        ):
            led = [f"{place}{leader}{name.removeprefix(place + part)}" for name in names]
            if all(
                other in student.tensors and student.tensors[other].shape == student.tensors[name].shape
                for other, name in zip(led, names, strict=True)
            ):
                left_out |= dict.fromkeys(names, f"an average (`{place}{part}.`)")
    return student.without(left_out)


def _mmcv_twins(contents: Contents, student: Student) -> dict[str, str]:
    """By the name of a parameter that of its twin, where MMCV 1.x's EMAHook put a second model among the buffers."""
    meta = contents.tree.get("meta") if isinstance(contents.tree, dict) else None
    if not isinstance(meta, dict) or "mmcv_version" not in meta:
        return {}
    twins = {name: MMCV_EMA + name.replace(".", "_") for name in student.tensors}
    return {name: twin for name, twin in twins.items() if twin in student.tensors}


def _take_mmcv_half(
    contents: Contents, student: Student, twins: Mapping[str, str], *, takes_twins: bool, is_chosen: bool
) -> Student:
    """One of two models: the hook swaps them at the end of an epoch, before or after the checkpoint is saved."""
    if not (takes_twins or is_chosen):
        raise CkptEmaError(
            f"`{contents.path}` holds two models of MMCV's EMAHook, of which one is the average, and which depends on"
            " when the hook ran",
            details=[
                f"{len(twins)} tensors such as `{next(iter(twins))}`: the student, where EMAHook runs after"
                " CheckpointHook",
                f"{len(twins)} such as `{next(iter(twins.values()))}`: the student, where EMAHook runs first, as with"
                " mmdet's `priority=49`",
            ],
            hint=f"pass `--state {shlex.quote(student.key)}` to fold `{next(iter(twins))}` and the like, or"
            f" `--prefix {MMCV_EMA}` to fold the `{MMCV_EMA}*` tensors under those names",
        )
    if takes_twins:
        raw = {name: student.tensors[twin] for name, twin in twins.items()}
        student = replace(student, tensors={**student.tensors, **raw})
    reason = "folded under their own names" if takes_twins else "of the other model (MMCV's EMAHook)"
    return student.without(dict.fromkeys(twins.values(), reason))


def _student_prefix(names: Iterable[str]) -> str | None:
    """`student.`, or `model.student.`, where the same place has a `teacher.` as well."""
    places: dict[str, set[str]] = {"student": set(), "teacher": set()}
    for name in names:
        if "student" not in name and "teacher" not in name:
            continue
        parts = name.split(".")[:-1]
        for half, found in places.items():
            if half in parts:
                found.add(".".join(parts[: parts.index(half)]))
    common = places["student"] & places["teacher"]
    if not common:
        return None
    place = min(common, key=len)
    return f"{place}.student." if place else "student."


def _average_prefix(name: str) -> str | None:
    """The start of a tensor's name up to the part that says `ema`, `teacher`, ..., with its dot."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if is_average_name(part):
            return ".".join(parts[: i + 1]) + "."
    return None


def _mirrored_prefixes(names: Iterable[str], under: Mapping[str, str]) -> set[str]:
    """Those prefixes under which most names are names of the raw model once more.

    An average repeats the model it averages. A layer that is merely called so (an attention block named EMA, a head
    named avg) does not, and is a part of the student like any other.
    """
    raw_endings: set[str] = set()
    for name in names:
        if name not in under:
            parts = name.split(".")
            raw_endings.update("".join(parts[i:]) for i in range(len(parts)))
    counts: dict[str, list[int]] = {}
    for name, prefix in under.items():
        seen = counts.setdefault(prefix, [0, 0])
        # Without dots: some averages cannot have them in the names of their buffers.
        seen[0] += name.removeprefix(prefix).removeprefix("module.").replace(".", "") in raw_endings
        seen[1] += 1
    return {prefix for prefix, (repeated, total) in counts.items() if 2 * repeated > total}


def check_prefix(prefix: str | None) -> None:
    """Raise MisuseError for a prefix that would take every tensor as it is."""
    if prefix is not None and not prefix.strip("."):
        raise MisuseError("`--prefix` is empty", hint="pass for example `--prefix student.`")
