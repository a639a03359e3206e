"""The state dicts of a checkpoint: a tree of values in, each table of tensors out with what its place says about it."""

from __future__ import annotations

import functools
import re
import shlex
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ckpt_ema.errors import AverageAloneError, CkptEmaError, UnreadableCheckpointError
from ckpt_ema.formats import TENSOR_LEAVES, Contents
from ckpt_ema.formats.names import in_snake_case, is_average_name
from ckpt_ema.formats.pickle_scan import MalformedPickleError
from ckpt_ema.formats.pickles import Inert, module_state

Kind = Literal["raw", "average"]

# Where frameworks put the state dict of the model as trained, the most telling first.
_RAW_KEYS = (
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
# A key that says: this is the trainer's. Whole words, since a model may have a `metanet` or a `random_proj`.
_TRAINERS_WORD = re.compile(
    r"^(optimi[sz]er.*|random_generators?|rng_?states?.*"
    r"|(optims?|(lr_)?sched(uler)?s?|((grad|amp|loss)_)?scalers?|amp|loss(es)?|callbacks?|criterion|metrics?|data_?loaders?"
    r"|rngs?)([-._/ \[]*(\d+\]?|[a-z]|states?(_dict)?|history|fn))?"
    r"|(random_)?rngs?(_states?)?(_\d+)?|random_(rng_)?states?(_\d+)?|loops|ema_updater|averaging_state|train_state"
    r"|hyper_parameters|message_hub|meta(data|info)?|args|cfg|configs?|configuration)$",
    re.IGNORECASE,
)
_MAX_DEPTH = 4


class TensorTable(NamedTuple):
    """A table that holds tensors."""

    key: str
    """Its dotted path inside the checkpoint."""

    kind: Kind
    """What its place says about it."""

    table: dict[Any, Any]
    value: Any
    """What the table was found as: a dict, or the module that was pickled."""


@dataclass(frozen=True, slots=True)
class StateDict:
    """One state dict found inside a checkpoint."""

    key: str
    """Dotted path inside the checkpoint, "" for the checkpoint itself."""

    kind: Kind
    num_tensors: int


def find_state_dicts(contents: Contents) -> list[StateDict]:
    """Every state dict in a checkpoint, the one that a fold would take first."""
    return as_state_dicts(list(find_tensor_tables(contents.tree)))


def as_state_dicts(tables: list[TensorTable]) -> list[StateDict]:
    """Tables as StateDicts, without their tensors: raw ones first, then the most telling keys, then the largest."""
    found = sorted(tables, key=lambda item: (item.kind != "raw", _rank(item.key), -len(item.table)))
    return [StateDict(item.key, item.kind, len(item.table)) for item in found]


def is_flat(contents: Contents) -> bool:
    """Whether the checkpoint is one state dict and nothing else."""
    table = as_mapping(contents.tree)
    return bool(table) and all(_is_tensor(value) for value in (table or {}).values())


def key_of_teacher(contents: Contents) -> str | None:
    """The dotted path of the only state dict of a teacher; None where it is to be looked for as a student is.

    A teacher for torch.distributed.checkpoint lies under its students' key, which may be called `ema`.
    """
    if is_flat(contents):
        return ""
    table = as_mapping(contents.tree) or {}
    if contents.is_own_teacher and len(table) == 1:
        return str(next(iter(table)))
    found = find_state_dicts(contents)
    return found[0].key if len(found) == 1 and found[0].kind == "average" else None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, TENSOR_LEAVES)


def as_mapping(value: Any) -> dict[Any, Any] | None:
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


def _own_tensors(table: Mapping[Any, Any]) -> Iterator[str]:
    """Names of a model's tensors that a table holds itself; a loss, a step or a random state stored as one is none."""
    for name, value in table.items():
        if (
            isinstance(name, str)
            and _is_tensor(value)
            and ("." in name or (len(value.shape) > 0 and not is_trainers_name(name)))
        ):
            yield name


def _kind_of_key(key: str) -> Kind:
    return "average" if is_average_name(key) else "raw"


@functools.lru_cache(maxsize=4096)
def is_trainers_name(name: str) -> bool:
    """Whether a key says that it holds what a trainer keeps beside the model: `optimizerG`, `rng_state`."""
    return bool(_TRAINERS_WORD.match(in_snake_case(name)))


def _rank(key: str) -> int:
    leaf = key.rpartition(".")[2]
    return _RAW_KEYS.index(leaf) if leaf in _RAW_KEYS else len(_RAW_KEYS)


def find_tensor_tables(tree: Any, passed_over: dict[str, Any] | None = None) -> Iterator[TensorTable]:
    """Every table that holds tensors, with its dotted path and what its place says about it.

    What is the trainer's by its name is put into `passed_over`, by its path.
    """
    root = as_mapping(tree)
    pending: deque[tuple[str, Any, int]] = deque([("", root, 0)])  # of a list, taking the first moves all others
    seen: set[int] = set()
    named: set[int] = set()
    while pending:
        key, value, depth = pending.popleft()
        # One table under many names is one table; hostile files have 3000 names for it, on every level.
        if id(value) in seen or (table := as_mapping(value)) is None:
            continue
        seen.add(id(value))
        if next(_own_tensors(table), None) is not None:
            yield TensorTable(key, _kind_at(root or {}, key, table), table, value if depth else tree)
        if depth < _MAX_DEPTH:
            for name, child in table.items():
                # What can be no table is not asked for its name: a stranger's file may have a million numbers here.
                if not isinstance(child, (dict, Inert)) or not isinstance(name, str):
                    continue
                path = f"{key}.{name}" if key else name
                if not is_trainers_name(name):
                    pending.append((path, child, depth + 1))
                elif passed_over is not None and id(child) not in named:
                    named.add(id(child))
                    passed_over[path] = child


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
    # YOLOX saves whichever model it evaluates, by default the average, and says nothing of it.
    if key == "model" and {"start_epoch", "best_ap", "curr_ap"} <= root.keys():
        return "average"
    # Ultralytics' end of training puts the average in the model's place.
    if key == "model" and root.get("epoch") == -1 and root.get("ema", root) is None and "updates" in root:
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


def find_raw_state_dict(contents: Contents, tables: list[TensorTable]) -> tuple[str, Any]:
    """The dotted path of the model as trained, and what lies there.

    `tables` are all that the checkpoint has. Raises AverageAloneError where only averages are there, CkptEmaError where
    several tables could be meant, UnreadableCheckpointError where there is none, or one that names a tensor twice.
    """
    raw = [item for item in tables if item.kind == "raw"]
    averages = [item.key for item in tables if item.kind == "average"]
    if not raw:
        if averages:
            raise AverageAloneError(
                f"`{contents.path}` holds an average, and no raw student: {quoted_keys(averages)}",
                hint=f"pass `--state {shlex.quote(averages[0])}` if you mean to fold averages",
            )
        raise UnreadableCheckpointError(f"`{contents.path}` holds no state dict that can be read")
    swapped = [item for item in raw if item.key == "ema_state_dict"]  # raw only where MMEngine swapped
    if swapped:
        return swapped[0].key, swapped[0].value
    # A state dict under a known key wins over a stray tensor beside it and over what lies deeper.
    known = [item for item in raw if item.key and _rank(item.key) < len(_RAW_KEYS)]
    if known:
        depth = min(item.key.count(".") for item in known)
        known = sorted((item for item in known if item.key.count(".") == depth), key=lambda item: _rank(item.key))
        if len(known) > 1 and _rank(known[0].key) > _RAW_KEYS.index("current_model_state"):
            raise _ambiguous(contents, known)
        numbered = [item for item in raw if re.fullmatch(re.escape(known[0].key) + r"_\d+", item.key)]
        if numbered:  # accelerate's second model
            raise _ambiguous(contents, [known[0], *numbered])
        return known[0].key, known[0].value
    # Sub-models under a known key: {"model": {"encoder": {...}, "decoder": {...}}} is one state dict in two levels.
    tops = {item.key.partition(".")[0] for item in raw}
    if "" not in tops and len(raw) > 1 and len(tops) == 1 and (top := tops.pop()) in _RAW_KEYS:
        return top, _flatten(contents, top, raw)
    flat = next((item for item in raw if not item.key), None)
    nested = [item for item in raw if item.key]
    if flat is not None and nested:
        # A stray tensor at the top does not make the checkpoint a state dict; weights have dotted names there.
        names = list(_own_tensors(flat.table))
        most = max(sum(1 for _ in _own_tensors(item.table)) for item in nested)
        if any("." in name for name in names) or len(names) > most:
            return flat.key, flat.value
        raw = nested
    if len(raw) > 1:
        raise _ambiguous(contents, raw)
    return raw[0].key, raw[0].value


def _ambiguous(contents: Contents, tables: list[TensorTable]) -> CkptEmaError:
    return CkptEmaError(
        f"`{contents.path}` holds {len(tables)} state dicts, and which one is the student cannot be told",
        details=[f"{item.key}: {len(item.table)} entries" for item in tables],
        hint=f"pass `--state {shlex.quote(tables[0].key)}`",
    )


def _flatten(contents: Contents, top: str, raw: list[TensorTable]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for item in raw:
        inner = item.key.removeprefix(top).removeprefix(".")
        for name, value in item.table.items():
            if not isinstance(name, str):
                continue
            full_name = f"{inner}.{name}" if inner else name
            if full_name in flat:
                raise UnreadableCheckpointError(f"`{contents.path}` names `{full_name}` twice")
            if _is_tensor(value) or as_mapping(value) is None:
                flat[full_name] = value
    return flat


def quoted_keys(keys: list[str]) -> str:
    """Dotted paths as an error shows them."""
    return ", ".join(f"`{key}`" if key else "the checkpoint itself (AveragedModel)" for key in keys)


def state_at(contents: Contents, state: str) -> Any:
    """The value at a dotted path; a key that contains dots itself is found as well."""
    value: Any = contents.tree
    rest = state
    while rest:
        table = as_mapping(value)
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
                hint=f"pass `--state {shlex.quote(found[0])}`" if found else "omit `--state`",
            )
        value = table[head]
        rest = rest[len(head) + 1 :]
    table = as_mapping(value)
    if table is None or not any(_is_tensor(item) for item in table.values()):
        raise CkptEmaError(f"`{contents.path}`: `{state}` is no state dict")
    return value
