"""The state of a MeanTeacher in a file of its own, for frameworks whose checkpoints are folders.

A safetensors file: the tensors in the teacher's own dtype, all else in its metadata. Nothing in it can run. It says
which student it was saved with: such a framework does not tell a callback from which folder training resumes.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch

from ckpt_ema._version import __version__
from ckpt_ema.averages.profiles import RULE
from ckpt_ema.byte_ranges import open_input, read_exactly
from ckpt_ema.engine.buffers import torch_dtype
from ckpt_ema.errors import CkptEmaError, UnreadableCheckpointError
from ckpt_ema.formats.contents import PROVENANCE_KEY
from ckpt_ema.formats.safetensors import read_safetensors
from ckpt_ema.online.teacher_file import dtype_of, write_tensors

STATE_KEY = "ckpt_ema_state"
STUDENT_KEY = "student_checksum"
SAMPLE_NAME = "increments:sample"
CHECKED_ELEMENTS = 64


def write_state(path: Path, state: dict[str, Any], student: torch.nn.Module) -> None:
    """Write what `MeanTeacher.state_dict()` returned beside `student`; the file appears whole or not at all."""
    rest, found = _split_tensors({**state, STUDENT_KEY: _checksum(student)})
    tensors = {name: (tensor, dtype_of(name, tensor)) for name, tensor in found.items()}
    # Known as a teacher's, so that nobody folds it for a student.
    record = {
        "tool": "ckpt-ema",
        "version": __version__,
        "rule": RULE,
        "momentum": rest["momentum"],
        "per": "update",
        "interval": rest["interval"],
    }
    metadata = {"format": "pt", PROVENANCE_KEY: json.dumps(record), STATE_KEY: json.dumps(rest)}
    write_tensors(path, tensors, metadata, overwrite=True)


def read_state(path: Path, student: torch.nn.Module) -> dict[str, Any]:
    """What `write_state` wrote.

    Raises UnreadableCheckpointError for any other file, and CkptEmaError where `student` is not the one of then.
    """
    stored = read_safetensors(path)
    try:
        state = dict(json.loads(stored.metadata[STATE_KEY]))
        checksum = state.pop(STUDENT_KEY)
    except (KeyError, ValueError, TypeError) as error:
        raise UnreadableCheckpointError(
            f"`{path}` holds no state of a MeanTeacher", hint="pass a file that the callback wrote"
        ) from error
    if checksum != _checksum(student):
        raise CkptEmaError(
            f"`{path}` is the teacher of another student than the one that training resumes with",
            hint="pass resume_from=PATH to the callback, with the checkpoint's folder",
        )
    file = open_input(path)
    try:
        tensors = {}
        for name, item in stored.tensors.items():
            content = bytearray(read_exactly(file, item.end - item.begin, item.begin))
            dtype = torch_dtype(item.dtype)
            flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype, device="cpu")
            tensors[name] = flat.view(item.shape)
    finally:
        file.close()
    return _join_tensors(state, tensors)


def _checksum(student: torch.nn.Module) -> int:
    """CRC-32 of each parameter's first numbers and of the sum of all its bits, read as integers.

    The sum is exact, the same on every device, and sees a change anywhere: of an embedding few rows may have moved.
    """
    checksum = 0
    for parameter in student.parameters():
        flat = parameter.detach().reshape(-1).contiguous()
        head = flat[:CHECKED_ELEMENTS].cpu()
        checksum = zlib.crc32(bytes(head.view(torch.uint8).tolist()), checksum)
        if flat.nbytes % 8 == 0:  # eight bytes at a time: the sum wraps around, in any order to the same number
            aligned = flat if flat.storage_offset() * flat.itemsize % 8 == 0 else flat.clone()
            whole = aligned.view(torch.int64)
        else:
            whole = flat.view(torch.int16 if flat.itemsize > 1 else torch.uint8)
        checksum = zlib.crc32(str(whole.sum(dtype=torch.int64).item()).encode(), checksum)
    return checksum


def _split_tensors(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What JSON can hold, and the tensors: the teacher's by their names, a track's with its name before them."""
    rest = {key: value for key, value in state.items() if key != "tensors"}
    tensors: dict[str, torch.Tensor] = dict(state.get("tensors", {}))
    if "snapshots" in rest:
        snapshots = rest["snapshots"]
        tracks: dict[str, dict[str, torch.Tensor]] = snapshots["tracks"]
        tensors.update((f"{track}:{name}", t) for track, each in tracks.items() for name, t in each.items())
        tensors[SAMPLE_NAME] = snapshots["increments"]["sample"]
        rest["snapshots"] = {
            **snapshots,
            "tracks": {track: list(each) for track, each in tracks.items()},
            "increments": {key: value for key, value in snapshots["increments"].items() if key != "sample"},
        }
    return rest, tensors


def _join_tensors(rest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    if "snapshots" in rest:
        snapshots = rest["snapshots"]
        snapshots["increments"]["sample"] = tensors.pop(SAMPLE_NAME)
        snapshots["tracks"] = {
            track: {name: tensors.pop(f"{track}:{name}") for name in names}
            for track, names in snapshots["tracks"].items()
        }
    return {**rest, "tensors": tensors}
