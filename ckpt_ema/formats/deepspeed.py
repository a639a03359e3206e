"""DeepSpeed checkpoints: a folder of every rank's files in, the student's tensors out.

With ZeRO the optimizer holds the weights in float32, cut into partitions: those are the student, since what the model
trains in is rounded. How partitions make parameters is DeepSpeed's own zero_to_fp32.py: with ZeRO 1 and 2 a group of
parameters is one long vector, cut into one piece per rank; with ZeRO 3 every parameter is cut, and a rank's pieces of
all of them lie one after the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_ema.assembly import AssemblyError, StoredTensor, assemble_runs
from ckpt_ema.byte_ranges import TensorRange, count_elements, expect_tables
from ckpt_ema.errors import UnreadableCheckpointError
from ckpt_ema.formats.contents import Contents, is_plain_name, read_file
from ckpt_ema.formats.pickle_scan import MalformedPickleError
from ckpt_ema.formats.pickles import Inert, PickledTensor, sizes_of
from ckpt_ema.locations import children_of

LATEST_NAME = "latest"
MODEL_FILE = re.compile(r"^(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<part>\d+)_model_states\.pt$")
OPTIMIZER_FILE = re.compile(r"^(?:bf16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<part>\d+)_optim_states\.pt$")
LAYER_FILE = re.compile(r"^layer_\d+.*-model_.*states\.pt$")
EXPERT_FILE = re.compile(r"^(?:layer_-?\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt$")
CONVERTER = "python zero_to_fp32.py"


def is_deepspeed_folder(folder: Path) -> bool:
    """Whether a folder like `global_step100` holds what DeepSpeed's ranks saved."""
    return any(MODEL_FILE.match(path.name) or LAYER_FILE.match(path.name) for path in children_of(folder))


def folder_of_latest(folder: Path) -> Path | None:
    """The folder that `latest` in `folder` names, where it is there."""
    path = folder / LATEST_NAME
    # A link of that name points to a checkpoint; DeepSpeed's is a small text.
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 4096:
            return None
        name = path.read_bytes().decode("utf-8", "replace").strip()
    except OSError:  # a trainer has removed it since it was seen
        return None
    return folder / name if is_plain_name(name) and (folder / name).is_dir() else None


def read_deepspeed(folder: Path) -> Contents:
    """Read the tables of all ranks' files.

    Raises UnreadableCheckpointError where a rank's file is missing, and for models that were cut across ranks
    themselves (tensor or pipeline parallelism, experts).
    """
    names = sorted(path.name for path in folder.iterdir())
    parts = {int(match["part"]) for name in names if (match := MODEL_FILE.match(name))}
    if any(LAYER_FILE.match(name) for name in names) or parts != {0}:
        raise UnreadableCheckpointError(
            f"`{folder}` is a DeepSpeed checkpoint of a model that is itself cut across ranks (tensor or pipeline"
            " parallelism), which is not read",
            hint="convert it with DeepSpeed's ds_to_universal.py, or Megatron's converter, and fold what that writes",
        )
    if experts := [name for name in names if EXPERT_FILE.match(name)]:
        raise UnreadableCheckpointError(
            f"`{folder}` is a DeepSpeed checkpoint of a mixture of experts, which lie in files of their own"
            f" (`{experts[0]}`), and are not read",
            hint="gather the experts into one state dict in a training process, save that, and fold it",
        )
    models = _in_rank_order(folder, names, MODEL_FILE)
    optimizers = _in_rank_order(folder, names, OPTIMIZER_FILE)
    expect_tables([*models, *optimizers])
    states = [_read_table(path) for path in models]
    first = states[0]
    counters = {name: first.table[name] for name in ("global_steps",) if type(first.table.get(name)) is int}
    listed = first.table.get("buffer_names")  # of older versions nothing says which they are
    buffers = frozenset(name for name in listed if isinstance(name, str)) if isinstance(listed, list) else None
    module = first.table.get("module")
    if optimizers:
        partitions = [_read_table(path) for path in optimizers]
        stage, tensors = _masters(folder, states, partitions)
        kind = f"DeepSpeed ZeRO-{stage}, float32 of {len(partitions)} ranks"
    else:
        if not isinstance(module, dict) or any(
            isinstance(tensor, PickledTensor) and 0 in tensor.shape for tensor in module.values()
        ):
            raise UnreadableCheckpointError(
                f"`{folder}` has the model cut into partitions, and no rank's `*_optim_states.pt` to take them from"
            )
        partitions = []
        tensors = {**first.locate({name: leaf for name, leaf in module.items() if isinstance(leaf, PickledTensor)})}
        kind = "DeepSpeed module"
    files = tuple(file for table in (*states, *partitions) for file in table.contents.files)
    others = {
        name: leaf
        for name, leaf in (module.items() if isinstance(module, dict) else ())
        if not isinstance(leaf, PickledTensor)
    }
    return Contents(folder, kind, files, {"module": {**others, **tensors}, **counters}, buffer_names=buffers)


@dataclass(frozen=True, slots=True)
class _Table:
    """What one rank saved."""

    contents: Contents
    table: dict[Any, Any]

    def locate(self, tensors: Mapping[str, Any]) -> dict[str, TensorRange]:
        located = self.contents.locate(tensors)
        return {name: tensor for name, tensor in located.items() if isinstance(tensor, TensorRange)}

    def refuse(self, what: str) -> UnreadableCheckpointError:
        return UnreadableCheckpointError(f"`{self.contents.path}` {what}", hint=f"convert it first: `{CONVERTER} ...`")


def _read_table(path: Path) -> _Table:
    contents = read_file(path)
    if not isinstance(contents.tree, dict):
        raise UnreadableCheckpointError(f"`{path}` is none of DeepSpeed's files")
    return _Table(contents, contents.tree)


def _in_rank_order(folder: Path, names: Sequence[str], pattern: re.Pattern[str]) -> list[Path]:
    ranks = {int(match["rank"] or 0): name for name in names if (match := pattern.match(name))}
    missing = sorted(set(range(len(ranks))) - ranks.keys())
    if missing:
        raise UnreadableCheckpointError(f"`{folder}` lacks the file of rank {missing[0]}")
    return [folder / ranks[rank] for rank in sorted(ranks)]


def _masters(
    folder: Path, states: Sequence[_Table], partitions: Sequence[_Table]
) -> tuple[int, dict[str, StoredTensor]]:
    """The ZeRO stage and the student's tensors: masters, frozen parameters, buffers, and shared names."""
    optimizer = partitions[0].table.get("optimizer_state_dict")
    optimizer = optimizer if isinstance(optimizer, dict) else {}
    stage = optimizer.get("zero_stage")
    if isinstance(stage, Inert) and stage.arguments:
        stage = stage.arguments[0]
    if type(stage) is not int or stage not in (1, 2, 3):
        raise partitions[0].refuse("does not say which stage of ZeRO it belongs to")
    counts = optimizer.get("partition_count")
    world_size = max((count for count in _as_list(counts) if type(count) is int), default=counts)
    if world_size != len(partitions):
        raise UnreadableCheckpointError(
            f"`{folder}` has files of {len(partitions)} ranks, and {world_size} saved it",
            hint="wait until the trainer has finished the checkpoint",
        )
    first = states[0]
    shapes = [_shapes(first, group) for group in _as_list(first.table.get("param_shapes"))]
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    flats = [_flats(partition, key) for partition in partitions]
    if any(len(flat) != len(flats[0]) for flat in flats):
        raise first.refuse("disagrees with the partitions about the groups of parameters")
    tensors: dict[str, StoredTensor] = {}
    try:
        if stage == 3:
            tensors.update(_masters_by_parameter({n: s for group in shapes for n, s in group.items()}, flats))
        else:
            paddings = _as_list(optimizer.get("param_alignment_paddings"))
            tensors.update(_masters_by_group(shapes, flats, paddings))
        tensors.update(_frozen(states, stage))
    except AssemblyError as error:
        raise first.refuse(f"does not fit the partitions: {error}") from None
    shared = first.table.get("shared_params")
    for name, original in shared.items() if isinstance(shared, dict) else ():
        if isinstance(name, str) and isinstance(original, str) and original in tensors:
            tensors[name] = tensors[original]
    # What is in no partition the model holds itself: buffers, and with ZeRO 1 and 2 what is not trained.
    module = first.table.get("module")
    buffers = {name for name in _as_list(first.table.get("buffer_names")) if isinstance(name, str)}
    rest = {
        name: leaf
        for name, leaf in (module.items() if isinstance(module, dict) else ())
        if isinstance(name, str) and isinstance(leaf, PickledTensor) and name not in tensors
    }
    lost = next((name for name, leaf in rest.items() if 0 in leaf.shape and name not in buffers), None)
    if lost is not None:
        raise first.refuse(f"does not say in which partitions `{lost}` lies")
    tensors.update(first.locate(rest))
    return stage, tensors


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def _shapes(state: _Table, group: Any) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, size in group.items() if isinstance(group, dict) else ():
        if not isinstance(name, str):
            raise state.refuse("gives a parameter a name that is no text")
        try:
            shapes[name] = sizes_of(size)
        except MalformedPickleError:
            raise state.refuse("gives a parameter a shape that is none") from None
    return shapes


def _flats(partition: _Table, key: str) -> list[TensorRange]:
    """A rank's vectors of float32, one per group."""
    optimizer = partition.table.get("optimizer_state_dict")
    groups = optimizer.get(key) if isinstance(optimizer, dict) else None
    if (
        not isinstance(groups, (list, tuple))
        or not groups
        or not all(isinstance(group, PickledTensor) and len(group.shape) == 1 for group in groups)
    ):
        raise partition.refuse(f"holds no `{key}`")
    located = partition.locate({str(number): group for number, group in enumerate(groups)})
    flats = list(located.values())
    if any(flat.strides is not None or flat.dtype is not flats[0].dtype for flat in flats):
        raise partition.refuse(f"holds a `{key}` that is not one run of numbers")
    return flats


def _masters_by_group(
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
    flats: Sequence[Sequence[TensorRange]],
    paddings: Sequence[Any],
) -> Iterator[tuple[str, StoredTensor]]:
    """ZeRO 1 and 2: group i is one vector, of which each rank has a piece."""
    if len(shapes) != len(flats[0]) or (paddings and len(paddings) != len(shapes)):
        raise AssemblyError(f"{len(shapes)} groups of parameters, {len(flats[0])} in the partitions")
    for number, group in enumerate(shapes):
        pieces = [rank[number] for rank in flats]
        behind = list(_as_list(paddings[number])) if paddings else []
        if paddings and (len(behind) != len(group) or not all(type(n) is int and n >= 0 for n in behind)):
            raise AssemblyError(f"{len(group)} parameters with {len(behind)} paddings")
        first = 0
        for i, (name, shape) in enumerate(group.items()):
            count = count_elements(shape)
            yield name, assemble_runs(pieces[0].dtype, shape, _cut(pieces, first, first + count))
            first += count + (behind[i] if behind else 0)
        # Every group is padded to a multiple of twice the number of ranks, in ways that its options decide.
        align = 2 * len(flats)
        if math.ceil(first / align) != math.ceil(sum(count_elements(piece.shape) for piece in pieces) / align):
            raise AssemblyError(f"group {number} has another number of elements than its parameters")


def _masters_by_parameter(
    shapes: Mapping[str, tuple[int, ...]], flats: Sequence[Sequence[TensorRange]]
) -> Iterator[tuple[str, StoredTensor]]:
    """ZeRO 3: each rank has an equal part of every parameter, the last one padded."""
    first = 0
    for name, shape in shapes.items():
        count = count_elements(shape)
        part = -(-count // len(flats))
        runs = []
        for rank, groups in enumerate(flats):
            filled = min(part, max(0, count - rank * part))
            runs += _cut(groups, first, first + filled) if filled else []
        yield name, assemble_runs(flats[0][0].dtype, shape, runs or [_part(flats[0][0], 0, 0)])
        first += part
    if any(sum(count_elements(group.shape) for group in groups) != first for groups in flats):
        raise AssemblyError("the partitions have another number of elements than the parameters")


def _frozen(states: Sequence[_Table], stage: int) -> Iterator[tuple[str, StoredTensor]]:
    """Parameters that are not trained: whole, or with ZeRO 3 cut evenly across the ranks' model files."""
    shapes = _shapes(states[0], states[0].table.get("frozen_param_shapes"))
    if not shapes:
        return
    fragments = []
    for state in states if stage == 3 else states[:1]:
        found = state.table.get("frozen_param_fragments")
        own = found if isinstance(found, dict) else {}
        if not all(isinstance(own.get(name), PickledTensor) for name in shapes):
            raise state.refuse("lacks frozen parameters")
        fragments.append(state.locate({name: own[name] for name in shapes}))
    for name, shape in shapes.items():
        pieces = [fragment[name] for fragment in fragments]
        if any(piece.strides is not None or piece.dtype is not pieces[0].dtype for piece in pieces):
            raise AssemblyError(f"`{name}` is not stored as runs of one dtype")
        yield name, assemble_runs(pieces[0].dtype, shape, _cut(pieces, 0, count_elements(shape)))


def _cut(pieces: Sequence[TensorRange], begin: int, end: int) -> list[TensorRange]:
    """Elements `[begin, end)` of runs that lie one after the other."""
    runs = []
    position = 0
    for piece in pieces:
        count = count_elements(piece.shape)
        first, stop = max(begin - position, 0), min(end - position, count)
        if first < stop:
            runs.append(_part(piece, first, stop))
        position += count
    return runs or [_part(pieces[0], 0, 0)]


def _part(piece: TensorRange, first: int, stop: int) -> TensorRange:
    begin = piece.begin + first * piece.dtype.itemsize
    return TensorRange(
        piece.dtype, (stop - first,), None, piece.file, begin, begin + (stop - first) * piece.dtype.itemsize
    )
