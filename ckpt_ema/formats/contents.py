"""What one checkpoint holds, whatever wrote it: a path in, a tree of values with tensor leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ckpt_ema.assembly import StoredTensor
from ckpt_ema.byte_ranges import SourceFile, open_input, read_exactly
from ckpt_ema.errors import UnreadableCheckpointError
from ckpt_ema.formats import safetensors, torch_save
from ckpt_ema.formats.json_tables import parse_json
from ckpt_ema.formats.zip_archive import ZIP_MAGIC

PROVENANCE_KEY = "ckpt_ema"
"""Key of `__metadata__` under which this tool's teachers say how they were made."""

PROVENANCE_FILE = "ckpt_ema.json"
"""Beside a teacher in a format that has no `__metadata__`: the same table."""


# The index of a thousand billion parameters has 10 MB, the log of a long run as much.
MAX_JSON_BYTES = 64 << 20


class Locator(Protocol):
    """Finds the bytes of tensors that a table only describes."""

    def locate(self, tensors: Mapping[str, Any]) -> Mapping[str, StoredTensor]:
        """The checked byte ranges of some leaves, by name; raises UnreadableCheckpointError."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder in the Hugging Face manner: weights with a configuration beside them."""

    path: Path
    weights_name: str
    """What its weights are called without suffix: `model`, `adapter_model`, `diffusion_pytorch_model`."""


@dataclass(frozen=True, slots=True)
class Contents:
    """The values of one checkpoint; no tensor has been read."""

    path: Path
    format: str
    """For people: `safetensors`, `torch.save zip`, `folder of 3 safetensors shards`, ..."""

    files: tuple[SourceFile, ...]
    tree: Any
    """Nested mappings; tensors are TensorRange, AssembledTensor, PickledTensor or ShardedTensor."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    """`__metadata__` of a safetensors file."""

    locator: Locator | None = None
    """Finds the bytes of the tensors of `tree` that are only described there."""

    folders: Mapping[str, ModelFolder] = field(default_factory=dict)
    """Model folder by top-level key of `tree`; the key is "" where the tree is that of one model."""

    buffer_names: frozenset[str] | None = None
    """Which of the tensors are buffers, where the checkpoint records it."""

    trainer_state: Mapping[str, Any] = field(default_factory=dict)
    """`trainer_state.json`, where there is one."""

    @property
    def is_own_teacher(self) -> bool:
        """Whether it carries this tool's provenance."""
        return PROVENANCE_KEY in self.metadata

    def locate(self, tensors: Mapping[str, Any]) -> dict[str, StoredTensor]:
        """The checked byte ranges of tensors of `tree`, by name."""
        return dict(tensors if self.locator is None else self.locator.locate(tensors))


def read_file(path: Path) -> Contents:
    """Read the table of one checkpoint file, whatever its name ends with.

    Raises UnreadableCheckpointError when it is truncated, lies, or is in no format known here.
    """
    opened = open_input(path)
    try:
        size = opened.source().size
        head = read_exactly(opened, min(size, 64), 0)
    finally:
        opened.close()
    if not size:
        raise UnreadableCheckpointError(f"`{path}` is empty")
    if head.startswith(ZIP_MAGIC):
        torch_file = torch_save.read_torch_zip(path)
        return Contents(path, "torch.save zip", (torch_file.source,), torch_file.tree, locator=torch_file)
    if safetensors.looks_like_safetensors(head, size):
        file = safetensors.read_safetensors(path)
        return Contents(path, "safetensors", (file.source,), file.tensors, file.metadata)
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 1:
        torch_file = torch_save.read_torch_legacy(path)
        return Contents(path, "torch.save legacy", (torch_file.source,), torch_file.tree, locator=torch_file)
    if head.startswith(b"version https://git-lfs"):
        raise UnreadableCheckpointError(
            f"`{path}` is a Git LFS pointer, not the file itself", hint="run `git lfs pull`"
        )
    if not any(head):
        raise UnreadableCheckpointError(f"`{path}` starts with zeros: it was never written to its end")
    raise UnreadableCheckpointError(
        f"`{path}` is in no format known here: neither safetensors nor written by torch.save"
    )


def is_plain_name(name: object) -> bool:
    """Whether `name`, which a stranger wrote, is that of a file in the same folder, and never a path to elsewhere."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode("utf-8", "replace")) < 256
        and name not in (".", "..")
        and not any(character in name for character in "/\\\0")
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table beside weights; raises UnreadableCheckpointError for anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UnreadableCheckpointError(f"`{path}` has {path.stat().st_size} bytes, too many for a table")
        table = parse_json(path.read_bytes())
    except OSError as error:
        raise UnreadableCheckpointError(f"cannot read `{path}`: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnreadableCheckpointError(f"`{path}` is not valid JSON: {error}") from error
    if not isinstance(table, dict):
        raise UnreadableCheckpointError(f"`{path}` is not a JSON table")
    return table
