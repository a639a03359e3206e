"""What lies where a teacher is to go: a folder in, the files of an older teacher of this tool out.

A file is ours by what it holds, never by its name alone: every library calls its weights `model.safetensors`.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from ckpt_ema.errors import CkptEmaError
from ckpt_ema.formats.contents import PROVENANCE_FILE, PROVENANCE_KEY, is_plain_name, read_file, read_json
from ckpt_ema.formats.dcp import METADATA_NAME, PIECE_SUFFIX, PIECES_NAME, own_provenance, read_metadata
from ckpt_ema.formats.folder import MODEL_STEM, SHARD_NAME, WEIGHTS_SUFFIX
from ckpt_ema.teacher_record import read_record

INDEX_SUFFIX = ".index.json"


def own_files(folder: Path) -> list[str]:
    """The files of teachers that this tool wrote into `folder`, in the order to remove them.

    Whatever a removal that was interrupted leaves is found by the next call.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    weights = [name for name in names if _is_own_weights(folder, name)]
    indices = [name for name in names if _is_index_of(folder, name, weights)]
    return [*indices, *weights, *_own_pieces(folder, names)]


def check_folder_replaceable(folder: Path, written: Collection[str] = ()) -> None:
    """Raise CkptEmaError unless `folder` is empty, or holds a teacher that this tool wrote and nothing like one.

    Files called `written` are going to be put there.
    """
    names = [path.name for path in folder.iterdir()]
    if not names:
        return
    own = own_files(folder)
    if not own:
        raise CkptEmaError(
            f"`{folder}` is not empty and holds no teacher that ckpt-ema wrote",
            hint="pass another `--output`, or remove the folder yourself",
        )
    for name in sorted(names):
        if name not in own and (name in written or _looks_like_weights(name)):
            raise CkptEmaError(
                f"`{folder / name}` lies beside a teacher, but ckpt-ema did not write it; it is never replaced",
                hint="pass another `--output`, or move it to another folder",
            )


def strays_in(folder: Path, names: Collection[str]) -> list[str]:
    """What lies in `folder` and may be loaded in the place of a teacher whose files are `names`."""
    return sorted(path.name for path in folder.iterdir() if path.name not in names and _looks_like_weights(path.name))


def remove_own(folder: Path, *, keep: Collection[str] = ()) -> None:
    """Remove the files of older teachers from `folder`, all but those called `keep`."""
    for name in own_files(folder):
        if name not in keep:
            (folder / name).unlink()


def move_rest(old: Path, target: Path, replaced: Collection[str]) -> None:
    """Remove `old`, the folder of an older teacher, in whose place `target` is now.

    Never a whole tree: what else is in it is somebody's work, and goes along. Of files called `replaced`, which belong
    to the model, the new ones stay.
    """
    remove_own(old)
    for path in old.iterdir():
        if not os.path.lexists(target / path.name):
            os.rename(path, target / path.name)
        elif path.name in replaced and not path.is_dir():
            path.unlink()
    old.rmdir()


def _is_own_weights(folder: Path, name: str) -> bool:
    stem = name.removesuffix(".safetensors")
    if stem == name or not (MODEL_STEM.match(stem) or SHARD_NAME.match(name)):
        return False
    try:
        metadata = read_file(folder / name).metadata
    except CkptEmaError:
        return False
    return PROVENANCE_KEY in metadata and not read_record(metadata).is_of_training


def _is_index_of(folder: Path, name: str, weights: Collection[str]) -> bool:
    """Whether `name` is an index, and all that it names and that is there are `weights`."""
    stem = name.removesuffix(f".safetensors{INDEX_SUFFIX}")
    if stem == name or not MODEL_STEM.match(stem):
        return False
    try:
        table = read_json(folder / name).get("weight_map")
    except CkptEmaError:
        return False
    shards = set(table.values()) if isinstance(table, dict) and all(map(is_plain_name, table.values())) else set()
    return bool(shards & set(weights)) and not any((folder / shard).exists() for shard in shards - set(weights))


def _own_pieces(folder: Path, names: Collection[str]) -> list[str]:
    """Of a teacher for torch.distributed.checkpoint; its provenance knows its table, so that another save ends it."""
    if PROVENANCE_FILE not in names:
        return []
    try:
        if METADATA_NAME in names:
            is_own = bool(own_provenance(folder, read_metadata(folder)))
        else:  # what a removal left that was interrupted
            is_own = PROVENANCE_KEY in read_json(folder / PROVENANCE_FILE)
    except CkptEmaError:
        return []
    if not is_own:
        return []
    # Without its table no piece is known to be ours.
    pieces = [PIECES_NAME] if PIECES_NAME in names and METADATA_NAME in names else []
    return [*pieces, *(name for name in (METADATA_NAME, PROVENANCE_FILE) if name in names)]


def _looks_like_weights(name: str) -> bool:
    """Whether what loads a folder may take a file of this name for a part of its model."""
    if name == METADATA_NAME or name.endswith(PIECE_SUFFIX):
        return True
    stem = WEIGHTS_SUFFIX.sub("", name.removesuffix(INDEX_SUFFIX))
    return stem != name and bool(MODEL_STEM.match(stem) or SHARD_NAME.match(name))
