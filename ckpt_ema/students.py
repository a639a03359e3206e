"""Which of a checkpoint's state dicts is the student: a tree of values in, the raw tensors by name out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ckpt_ema.byte_ranges import TensorRange
from ckpt_ema.errors import CkptEmaError, MisuseError, UnreadableCheckpointError
from ckpt_ema.formats import Contents
from ckpt_ema.formats.pickles import Inert, MalformedPickleError, PickledTensor, module_state

Kind = Literal["raw", "average"]

# Where frameworks put the state dict of the model as trained, the most telling first.
RAW_KEYS = (
    "student",
    "current_model_state",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "params",
    "weights",
    "state",
)
# A word of a key or of the first part of a tensor name that says: these are averages.
AVERAGE_WORD = re.compile(
    r"(^|[._\-])(ema|swa|avg|average|averaged|teacher|shadow|polyak|litema)(\d*)([._\-]|$)", re.IGNORECASE
)
NEVER_A_MODEL = re.compile(
    r"^(optim|optimi[sz]er|(lr_)?sched|scaler|grad_scaler|amp([_.]|$)|rng|random_|loss(es)?$|callbacks|loops|criterion|metrics?$"
    r"|ema_updater|averaging_state|dataloader|train_state|hyper_parameters|message_hub|meta|args|cfg|config)",
    re.IGNORECASE,
)
MAX_DEPTH = 4

Candidate = tuple[str, Kind, dict[Any, Any]]
"""A table that holds tensors: its dotted path, what its place says about it, the table."""


@dataclass(frozen=True, slots=True)
class StateDict:
    """One state dict found inside a checkpoint."""

    key: str
    """Dotted path inside the checkpoint, "" for the checkpoint itself."""

    kind: Kind
    num_tensors: int


@dataclass(frozen=True, slots=True)
class Student:
    """The tensors of one checkpoint that are to be folded."""

    key: str
    """Dotted path of the state dict inside the checkpoint, "" for the checkpoint itself."""

    kind: Kind
    """`average` only where the user asked for it."""

    tensors: dict[str, TensorRange]
    stripped: tuple[str, ...] = ()
    """Prefixes taken off the names."""

    left_out: dict[str, str] | None = None
    """What of the state dict is not folded, and why."""

    known_buffers: frozenset[str] | None = None
    """Names of the buffers, where the checkpoint records which they are."""


def find_state_dicts(contents: Contents) -> list[StateDict]:
    """Every state dict in a checkpoint, the one that a fold would take first."""
    return _as_state_dicts(list(_candidates(contents.tree)))


def _as_state_dicts(candidates: list[Candidate]) -> list[StateDict]:
    found = sorted(candidates, key=lambda item: (item[1] != "raw", _rank(item[0]), -len(item[2])))
    return [StateDict(key, kind, len(tensors)) for key, kind, tensors in found]


def is_flat(contents: Contents) -> bool:
    """Whether the checkpoint is one state dict and nothing else."""
    table = _as_mapping(contents.tree)
    return bool(table) and all(_is_tensor(value) for value in (table or {}).values())


def choose_student(contents: Contents, *, state: str | None = None, prefix: str | None = None) -> Student:
    """Pick the raw student of a checkpoint.

    `state` names the state dict by its dotted path and overrides every rule; `prefix` keeps the tensors whose names
    begin with it and strips it. Raises CkptEmaError where only an average is there, where several state dicts
    could be meant, and where a tensor cannot be read without running code.
    """
    candidates = list(_candidates(contents.tree))
    if state is not None:
        student = _student_of(contents, state, _kind_of_key(state), _state_at(contents, state))
    else:
        key, tensors = _find_raw(contents, candidates)
        student = _student_of(contents, key, "raw", tensors)
    others = {
        found.key: "an average" if found.kind == "average" else "another state dict"
        for found in _as_state_dicts(candidates)
        if found.key and found.key != student.key and not found.key.startswith(f"{student.key}.")
    }
    student = replace(student, left_out={**(student.left_out or {}), **others})
    student = _strip_wrappers(student)
    if prefix:
        return _take_prefix(contents, student, prefix)
    return _take_student_half(contents, student, averages_allowed=state is not None)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (TensorRange, PickledTensor))


def _as_mapping(value: Any) -> dict[Any, Any] | None:
    """`value` as a table when it is one: a dict, a dict of a class we do not run, or a pickled module."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Inert):
        try:
            module = module_state(value)
        except MalformedPickleError as error:
            raise UnreadableCheckpointError(str(error)) from error
        if module is not None:
            return module[0]
        if value.entries:
            return value.entries
    return None


def _is_state_dict(table: Mapping[Any, Any]) -> bool:
    """Whether a table holds weights itself; a single number (a loss, a step) stored as a tensor is none."""
    return any(
        isinstance(name, str) and _is_tensor(value) and (len(value.shape) > 0 or "." in name)
        for name, value in table.items()
    )


def _kind_of_key(key: str) -> Kind:
    return "average" if AVERAGE_WORD.search(key) else "raw"


def _rank(key: str) -> int:
    leaf = key.rpartition(".")[2]
    return RAW_KEYS.index(leaf) if leaf in RAW_KEYS else len(RAW_KEYS)


def _candidates(tree: Any) -> Iterator[Candidate]:
    """Every table that holds tensors, with its dotted path and what its place says about it."""
    root = _as_mapping(tree)
    pending: list[tuple[str, Any, int]] = [("", root, 0)]
    while pending:
        key, value, depth = pending.pop(0)
        table = _as_mapping(value)
        if table is None:
            continue
        if _is_state_dict(table):
            yield key, _kind_at(root or {}, key, table), table
        if depth < MAX_DEPTH:
            for name, child in table.items():
                if isinstance(name, str) and not _is_tensor(child) and not NEVER_A_MODEL.match(name):
                    pending.append((f"{key}.{name}" if key else name, child, depth + 1))


def _kind_at(root: Mapping[Any, Any], key: str, table: Mapping[Any, Any]) -> Kind:
    # MMEngine's EMAHook and Lightning's WeightAveraging swap: the average takes the model's usual place.
    if "ema_state_dict" in root and ("message_hub" in root or "param_schedulers" in root or _is_mmengine(root)):
        if key == "ema_state_dict":
            return "raw"
        if key == "state_dict":
            return "average"
    if "current_model_state" in root and key == "state_dict":
        return "average"
    # Composer's EMA algorithm swaps as well; what it keeps of the raw model is no state dict of its own.
    if key == "state.model" and _has_composer_ema(root):
        return "average"
    # torch's AveragedModel, saved as it is.
    if "n_averaged" in table and key not in ("ema_state_dict",):
        return "average"
    return _kind_of_key(key)


def _is_mmengine(root: Mapping[Any, Any]) -> bool:
    meta = root.get("meta")
    return isinstance(meta, dict) and "mmengine_version" in meta


def _has_composer_ema(root: Mapping[Any, Any]) -> bool:
    state = root.get("state")
    algorithms = state.get("algorithms") if isinstance(state, dict) else None
    names: list[Any] = []
    if isinstance(algorithms, dict):
        names = list(algorithms)
    elif isinstance(algorithms, (list, tuple)):
        names = [item[0] if isinstance(item, (list, tuple)) and item else item for item in algorithms]
    return any(isinstance(name, str) and name in ("EMA", "SWA") for name in names)


def _find_raw(contents: Contents, candidates: list[Candidate]) -> tuple[str, Any]:
    raw = [(key, table) for key, kind, table in candidates if kind == "raw"]
    averages = [key for key, kind, _ in candidates if kind == "average"]
    if not raw:
        if averages:
            raise CkptEmaError(
                f"`{contents.path}` holds an average, and no raw student: {_list_keys(averages)}",
                hint=f"pass `--state {averages[0]}` if you mean to fold averages" if averages[0] else None,
            )
        raise UnreadableCheckpointError(f"`{contents.path}` holds no state dict that can be read")
    # A state dict under a known key wins over a stray tensor beside it and over what lies deeper.
    known = [item for item in raw if item[0] and _rank(item[0]) < len(RAW_KEYS)]
    swapped = [item for item in raw if item[0] == "ema_state_dict"]  # raw only where MMEngine swapped
    if swapped:
        return swapped[0]
    if known:
        depth = min(key.count(".") for key, _ in known)
        return min((item for item in known if item[0].count(".") == depth), key=lambda item: _rank(item[0]))
    # Sub-models under a known key: {"model": {"encoder": {...}, "decoder": {...}}} is one state dict in two levels.
    tops = {key.partition(".")[0] for key, _ in raw}
    if "" not in tops and len(raw) > 1 and len(tops) == 1 and (top := tops.pop()) in RAW_KEYS:
        return top, _flatten(contents, top, raw)
    if len(raw) == 1:
        return raw[0]
    if raw[0][0] == "" and all(not key for key, _ in raw):
        return raw[0]
    flat = [item for item in raw if item[0] == ""]
    if flat and len(flat[0][1]) > 1:
        return flat[0]
    raise CkptEmaError(
        f"`{contents.path}` holds {len(raw)} state dicts, and which one is the student cannot be told",
        details=[f"{key or '(the checkpoint itself)'}: {len(table)} entries" for key, table in raw],
        hint=f"pass `--state {next(key for key, _ in raw if key)}`",
    )


def _flatten(contents: Contents, top: str, raw: list[tuple[str, Any]]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, table in raw:
        inner = key.removeprefix(top).removeprefix(".")
        for name, value in table.items():
            full_name = f"{inner}.{name}" if inner else str(name)
            if full_name in flat:
                raise UnreadableCheckpointError(f"`{contents.path}` names `{full_name}` twice")
            if _is_tensor(value):
                flat[full_name] = value
    return flat


def _list_keys(keys: list[str]) -> str:
    return ", ".join(f"`{key}`" if key else "the checkpoint itself (AveragedModel)" for key in keys)


def _state_at(contents: Contents, state: str) -> Any:
    """The value at a dotted path; a key that contains dots itself is found as well."""
    value: Any = contents.tree
    rest = state
    while rest:
        table = _as_mapping(value)
        parts = rest.split(".")
        head = next(
            (
                ".".join(parts[:n])
                for n in range(len(parts), 0, -1)
                if table is not None and ".".join(parts[:n]) in table
            ),
            None,
        )
        if table is None or head is None:
            found = [item.key for item in find_state_dicts(contents) if item.key]
            raise CkptEmaError(
                f"`{contents.path}` has no state dict `{state}`",
                details=[f"it has: {', '.join(found)}"] if found else ["it has only the one at its top level"],
                hint=f"pass `--state {found[0]}`" if found else "leave `--state` away",
            )
        value = table[head]
        rest = rest[len(head) + 1 :]
    table = _as_mapping(value)
    if table is None or not any(_is_tensor(item) for item in table.values()):
        raise CkptEmaError(f"`{contents.path}`: `{state}` is no state dict")
    return value


def _student_of(contents: Contents, key: str, kind: Kind, value: Any) -> Student:
    buffers: frozenset[str] | None = None
    if isinstance(value, Inert):
        module = module_state(value)
        if module is not None:
            value, buffers = module[0], frozenset(module[1])
    at_root = _as_mapping(contents.tree)
    if not key and isinstance(contents.tree, Inert):
        module = module_state(contents.tree)
        if module is not None:
            buffers = frozenset(module[1])
    table = _as_mapping(value) or {}
    tensors: dict[str, TensorRange] = {}
    left_out: dict[str, str] = {}
    for name, leaf in table.items():
        if _is_tensor(leaf):
            if not isinstance(name, str):
                raise UnreadableCheckpointError(f"`{contents.path}`: a tensor of `{key}` has no text for a name")
            tensors[name] = contents.locate(name, leaf)
        elif isinstance(leaf, Inert) and _was_a_tensor(leaf):
            raise CkptEmaError(
                f"`{contents.path}`: `{name}` is a tensor of a kind that is not stored as plain numbers"
                f" ({leaf.qualified_name})",
                hint="save the student's state dict with plain dense tensors",
            )
        elif table is not at_root:
            left_out[str(name)] = "not a tensor"
    return Student(key, kind, tensors, left_out=left_out, known_buffers=buffers)


def _was_a_tensor(leaf: Inert) -> bool:
    name = leaf.qualified_name
    return name.startswith(("torch._utils._rebuild", "torch.storage._load_from_bytes", "torch.distributed")) or any(
        isinstance(argument, PickledTensor) for argument in leaf.arguments
    )


def _renamed(student: Student, names: dict[str, str], stripped: str) -> Student:
    tensors = {new: student.tensors[old] for old, new in names.items()}
    if len(tensors) < len(names):
        raise UnreadableCheckpointError(f"without `{stripped}`, two tensors have the same name")
    buffers = student.known_buffers
    if buffers is not None:
        buffers = frozenset(new for old, new in names.items() if old in buffers)
    return replace(student, tensors=tensors, stripped=(*student.stripped, stripped), known_buffers=buffers)


def _strip_wrappers(student: Student) -> Student:
    """Take off what DDP, torch.compile and averaging wrappers put before every name."""
    names = list(student.tensors)
    counters = {"n_averaged", "steps", "num_updates", "step", "initted"}
    if any("_orig_mod." in name for name in names):
        student = _renamed(student, {name: name.replace("_orig_mod.", "") for name in names}, "_orig_mod.")
        names = list(student.tensors)
    wrapped = [name for name in names if name.startswith("module.")]
    if wrapped and all(name in counters for name in names if not name.startswith("module.")):
        left_out = {
            **(student.left_out or {}),
            **{name: "a counter of the averaging" for name in names if name in counters},
        }
        student = _renamed(student, {name: name.removeprefix("module.") for name in wrapped}, "module.")
        student = replace(student, left_out=left_out)
    return student


def _take_prefix(contents: Contents, student: Student, prefix: str) -> Student:
    if not prefix.endswith(".") and any(name.startswith(f"{prefix}.") for name in student.tensors):
        prefix = f"{prefix}."
    taken = {name: name.removeprefix(prefix) for name in student.tensors if name.startswith(prefix) and name != prefix}
    if not taken:
        tops = sorted({f"{name.partition('.')[0]}." for name in student.tensors})
        raise CkptEmaError(
            f"`{contents.path}`: no tensor name begins with `{prefix}`",
            details=[f"names begin with: {', '.join(tops[:10])}"],
            hint=f"pass `--prefix {tops[0]}`" if tops else None,
        )
    rest = {name: f"not under `{prefix}`" for name in student.tensors if name not in taken}
    student = _renamed(student, taken, prefix)
    return replace(student, left_out={**(student.left_out or {}), **rest})


def _take_student_half(contents: Contents, student: Student, *, averages_allowed: bool) -> Student:
    """Fold the student of a mean-teacher pair, and no average that lies beside the raw weights."""
    tops = {name.partition(".")[0] for name in student.tensors if "." in name}
    if "student" in tops and "teacher" in tops:
        taken = {name: name.removeprefix("student.") for name in student.tensors if name.startswith("student.")}
        rest = {
            name: "the teacher's" if name.startswith("teacher.") else "neither student's nor teacher's"
            for name in student.tensors
            if name not in taken
        }
        student = _renamed(student, taken, "student.")
        return replace(student, left_out={**(student.left_out or {}), **rest})
    averages = {top for top in tops if AVERAGE_WORD.search(top)}
    if not averages or averages_allowed:
        return student
    rest = {
        name: f"an average (`{name.partition('.')[0]}.`)"
        for name in student.tensors
        if name.partition(".")[0] in averages
    }
    if len(rest) == len(student.tensors):
        raise CkptEmaError(
            f"`{contents.path}` holds an average, and no raw student: every name begins with"
            f" {_list_keys(sorted(averages))}",
            hint=f"pass `--prefix {sorted(averages)[0]}.` if you mean to fold averages",
        )
    tensors = {name: tensor for name, tensor in student.tensors.items() if name not in rest}
    return replace(student, tensors=tensors, left_out={**(student.left_out or {}), **rest})


def check_prefix(prefix: str | None) -> None:
    """Raise MisuseError for a prefix that would take every tensor as it is."""
    if prefix is not None and not prefix.strip("."):
        raise MisuseError("`--prefix` is empty", hint="pass for example `--prefix student.`")
