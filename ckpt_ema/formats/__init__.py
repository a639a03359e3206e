"""Readers of on-disk formats: a path in, the byte ranges of its tensors out."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

from ckpt_ema.assembly import AssembledTensor
from ckpt_ema.byte_ranges import TensorRange
from ckpt_ema.formats.contents import Contents, ModelFolder, read_file
from ckpt_ema.formats.dcp import ShardedTensor
from ckpt_ema.formats.folder import is_weights_file_name, read_folder
from ckpt_ema.formats.pickle_scan import forget_last_scan
from ckpt_ema.formats.pickles import PickledTensor
from ckpt_ema.formats.safetensors import forget_last_header
from ckpt_ema.remote_store import forget_listings

TENSOR_LEAVES = (TensorRange, AssembledTensor, PickledTensor, ShardedTensor)
"""What stands for a tensor in a tree of contents; all have a dtype and a shape."""

__all__ = ["TENSOR_LEAVES", "Contents", "ModelFolder", "is_weights_file_name", "read_contents", "reading_tables"]


def read_contents(path: Path) -> Contents:
    """Read the table of a checkpoint file or folder; see `read_file` and `read_folder` for what is raised."""
    return read_folder(path) if path.is_dir() else read_file(path)


@contextlib.contextmanager
def reading_tables() -> Iterator[None]:
    """No garbage collection while tables are read: a million new tuples would set it off a thousand times.

    What is kept of one table for the next, and what was listed, is let go at the end.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        forget_last_header()
        forget_last_scan()
        forget_listings()
        if was_enabled:
            gc.enable()
