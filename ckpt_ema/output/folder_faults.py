"""Whether the folder of a teacher is as this tool wrote it: what was found there in, its first fault out."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path

from ckpt_ema.byte_ranges import TensorRange, open_input, read_exactly
from ckpt_ema.formats.contents import PROVENANCE_FILE, read_file, read_json
from ckpt_ema.formats.dcp import FRAMING_KEY, METADATA_NAME, PIECES_NAME
from ckpt_ema.inspection import Inspection
from ckpt_ema.output.old_teacher import INDEX_SUFFIX, strays_in
from ckpt_ema.teacher_record import read_provenance


def fault_of_folder(found: Inspection) -> str | None:
    """What is wrong with the files of a teacher that is a folder; None where every library finds the same tensors."""
    ranges = [tensor for tensor in found.tensors.values() if isinstance(tensor, TensorRange)]
    if len(ranges) < len(found.tensors):
        return f"`{found.path}` stores tensors in pieces, which no teacher of ckpt-ema does"
    paths = sorted({tensor.file.path for tensor in ranges})
    folder, names = paths[0].parent, [path.name for path in paths]
    if PIECES_NAME in names:
        known = {PIECES_NAME, METADATA_NAME, PROVENANCE_FILE}
        return _fault_of_framing(folder, ranges) or _stray(folder, known)
    for name in names:
        if read_provenance(read_file(folder / name).metadata) != found.provenance:
            return f"`{folder / name}` is of another teacher than `{names[0]}`"
    if len(names) == 1:
        return _stray(folder, names)
    index = f"{names[0].split('-')[0]}.safetensors{INDEX_SUFFIX}"
    if not (folder / index).is_file():
        return f"`{folder / index}` is missing, by which its {len(names)} files are found"
    return _stray(folder, [*names, index])


def _stray(folder: Path, known: Collection[str]) -> str | None:
    strays = strays_in(folder, known)
    return f"`{folder / strays[0]}` lies beside it, and may be loaded in its place" if strays else None


def _fault_of_framing(folder: Path, ranges: Collection[TensorRange]) -> str | None:
    """Of the zips around the tensors, which readers differ in how closely they look at."""
    digest = sha256()
    with contextlib.closing(open_input(folder / PIECES_NAME)) as file:
        position, size = 0, file.source().size
        for begin, end in [*sorted((each.begin, each.end) for each in ranges), (size, size)]:
            if begin < position:
                return f"`{folder / PIECES_NAME}` has two tensors at byte {begin}"
            digest.update(read_exactly(file, begin - position, position))
            position = end
    if digest.hexdigest() != read_json(folder / PROVENANCE_FILE).get(FRAMING_KEY):
        return f"`{folder / PIECES_NAME}` was changed around its tensors, and may not load"
    return None
