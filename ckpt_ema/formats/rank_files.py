"""Folders of a torch.save file per rank (`rank0.pth`, `rank1.pth`, ...), as MMEngine has them under FSDP: tensors out.

Each file holds the whole state, with `ShardedTensor` objects whose local shards are this rank's boxes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckpt_ema.assembly import AssemblyError, StoredTensor, assemble_boxes
from ckpt_ema.byte_ranges import TensorRange
from ckpt_ema.errors import UnreadableCheckpointError
from ckpt_ema.formats.contents import Contents, read_file
from ckpt_ema.formats.pickle_scan import MalformedPickleError
from ckpt_ema.formats.pickles import Inert, PickledTensor, sizes_of

RANK_FILE = re.compile(r"^rank(?P<rank>\d{1,6})\.pth$")
MAX_DEPTH = 4
Box = tuple[tuple[int, ...], PickledTensor]
"""First index per dimension, and the piece."""


def is_rank_folder(folder: Path) -> bool:
    """Whether `folder` holds a file per rank."""
    return (folder / "rank0.pth").is_file()


def read_rank_files(folder: Path) -> Contents:
    """Read the tables of all ranks; what is not cut is the first rank's.

    Raises UnreadableCheckpointError where a rank's file is missing, and for flattened parameters, which have no names.
    """
    ranks = {int(match["rank"]): path for path in folder.iterdir() if (match := RANK_FILE.match(path.name))}
    missing = sorted(set(range(max(ranks) + 1)) - ranks.keys())
    if missing:
        raise UnreadableCheckpointError(f"`{folder}` lacks the file of rank {missing[0]}")
    parts = [read_file(ranks[rank]) for rank in sorted(ranks)]
    boxes: dict[tuple[str, ...], list[tuple[tuple[int, ...], TensorRange]]] = {}
    for part in parts:
        found = {
            (*path, str(number)): box
            for path, value in _sharded(part.tree)
            for number, box in enumerate(_local_shards(value))
        }
        located = part.locate({str(number): piece for number, (_, piece) in enumerate(found.values())})
        for (path, (offsets, _)), stored in zip(found.items(), located.values(), strict=True):
            if isinstance(stored, TensorRange):
                boxes.setdefault(path[:-1], []).append((offsets, stored))
    tree = _located(parts[0], parts[0].tree, 0, {})
    for path, value in _sharded(parts[0].tree):
        if path[-1].endswith("_flat_param"):
            raise UnreadableCheckpointError(
                f"`{folder}` holds flattened parameters, whose names it does not say",
                hint="save it with `state_dict_type='full'` or 'sharded' (FSDP)",
            )
        table = tree
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = _assembled(folder, ".".join(path), value, boxes.get(path, []))
    files = tuple(file for part in parts for file in part.files)
    return Contents(folder, f"torch.save files of {len(parts)} ranks", files, tree)


def _sharded(
    tree: Any, path: tuple[str, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[tuple[str, ...], Inert]]:
    # Each table once: one that holds itself under a hundred names has more paths than can be walked.
    seen = set() if seen is None else seen
    seen.add(id(tree))
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if not isinstance(key, str):
            continue
        if _is_sharded_tensor(value):
            yield (*path, key), value
        elif len(path) < MAX_DEPTH and id(value) not in seen:
            yield from _sharded(value, (*path, key), seen)


def _is_sharded_tensor(value: Any) -> bool:
    """Whether it is torch's ShardedTensor: a tensor without bytes of its own, made from its class and a state."""
    if not isinstance(value, Inert) or not value.qualified_name.endswith("._rebuild_wrapper_subclass"):
        return False
    kind = value.arguments[0] if value.arguments else None
    return isinstance(kind, type) and issubclass(kind, Inert) and kind.qualified_name.endswith(".ShardedTensor")


def _located(part: Contents, tree: Any, depth: int, known: dict[int, dict[Any, Any]]) -> Any:
    """A copy of a tree whose tensors are byte ranges, so that they may come from several files."""
    if not isinstance(tree, dict) or depth > MAX_DEPTH:
        return tree
    if id(tree) in known:
        return known[id(tree)]
    copy = known[id(tree)] = {}
    found = part.locate({str(key): value for key, value in tree.items() if isinstance(value, PickledTensor)})
    for key, value in tree.items():
        copy[key] = found.get(str(key)) or _located(part, value, depth + 1, known)
    return copy


def _local_shards(value: Inert) -> Iterator[Box]:
    shards = value.state[0] if isinstance(value.state, tuple) and value.state else ()
    for shard in shards if isinstance(shards, (list, tuple)) else ():
        state = _table(shard)
        piece = state.get("tensor")
        if isinstance(piece, PickledTensor):
            with contextlib.suppress(MalformedPickleError):
                yield sizes_of(_table(state.get("metadata")).get("shard_offsets")), piece


def _assembled(folder: Path, name: str, value: Inert, boxes: list[tuple[tuple[int, ...], TensorRange]]) -> StoredTensor:
    metadata = value.state[1] if isinstance(value.state, tuple) and len(value.state) > 1 else None
    try:
        shape = sizes_of(_table(metadata).get("size"))
    except MalformedPickleError:
        shape = None
    if shape is None or not boxes:
        raise UnreadableCheckpointError(f"`{folder}`: tensor `{name}` is cut into pieces that are not described")
    try:
        return assemble_boxes(boxes[0][1].dtype, shape, boxes)
    except AssemblyError as error:
        raise UnreadableCheckpointError(f"`{folder}`: tensor `{name}` {error}") from None


def _table(value: Any) -> dict[Any, Any]:
    state = value.state if isinstance(value, Inert) else None
    if isinstance(state, tuple) and len(state) == 2:  # of a class with slots: (no dict, slots)
        state = state[1]
    return state if isinstance(state, dict) else {}
