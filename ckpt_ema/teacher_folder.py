"""A teacher as a Hugging Face folder: what must come along beside its weights, and how the folder is committed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ckpt_ema.errors import CkptEmaError, UnreadableCheckpointError
from ckpt_ema.formats import ModelFolder, read_contents
from ckpt_ema.provenance import read_provenance
from ckpt_ema.writer import sync_folder, write_small_files

# What from_pretrained reads beside weights: configuration, tokenizer, processor, chat template, custom model code.
COMPANION = re.compile(r".*\.(json|txt|model|jinja|tiktoken|py|vocab|bpe)$", re.IGNORECASE)
NEVER_COMPANION = re.compile(
    r"(trainer_state\.json|training_args.*|.*\.index\.json|.*results\.json|latest.*|.*zero_to_fp32\.py|\..*)$",
    re.IGNORECASE,
)
MAX_COMPANION_BYTES = 512 << 20


def is_model_folder(folder: ModelFolder | None) -> bool:
    """Whether a configuration lies beside the weights, so that `from_pretrained` loads the folder."""
    return folder is not None and any(
        (folder.path / name).is_file() for name in ("config.json", "adapter_config.json", "model_index.json")
    )


def companions_of(folder: ModelFolder) -> list[Path]:
    """Files beside the weights that belong to the model rather than to its training."""
    found = []
    for path in sorted(folder.path.iterdir()):
        if COMPANION.match(path.name) and not NEVER_COMPANION.match(path.name) and path.is_file():
            if path.stat().st_size > MAX_COMPANION_BYTES:
                raise UnreadableCheckpointError(f"`{path}` has {path.stat().st_size} bytes, too many to come along")
            found.append(path)
    return found


def check_replaceable(folder: Path) -> None:
    """Raise CkptEmaError unless `folder` is empty or holds a teacher that this tool wrote."""
    if not any(folder.iterdir()):
        return
    with contextlib.suppress(CkptEmaError):
        if read_provenance(read_contents(folder).metadata) is not None:
            return
    raise CkptEmaError(
        f"`{folder}` is not empty and holds no teacher that ckpt-ema wrote",
        hint="pass another `--output`, or remove the folder yourself",
    )


@contextlib.contextmanager
def folder_to_fill(target: Path) -> Iterator[Path]:
    """A folder to write the teacher into: `target` where it exists, else one that becomes `target` at the end."""
    if target.is_dir():
        yield target
        return
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        os.mkdir(temporary)
    except OSError as error:
        raise CkptEmaError(f"cannot write `{target}`: {error.strerror}") from error
    try:
        yield temporary
        try:
            os.rename(temporary, target)
        except OSError as error:
            raise CkptEmaError(f"cannot write `{target}`: {error.strerror}") from error
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_companions(source: ModelFolder, target: Path, dtype: str) -> None:
    """Copy what belongs to the model; the configuration says the dtype the weights were written in."""
    for path in companions_of(source):
        content = path.read_bytes()
        if path.name == "config.json" and dtype != "student":
            content = _with_dtype(content, dtype)
        write_small_files(target, {path.name: content})


def _with_dtype(config: bytes, dtype: str) -> bytes:
    # from_pretrained loads in the configuration's dtype, and would round the teacher back to the student's.
    try:
        table = json.loads(config)
    except ValueError:
        return config
    keys = [key for key in ("dtype", "torch_dtype") if isinstance(table, dict) and key in table]
    if not keys:
        return config
    table.update(dict.fromkeys(keys, dtype))
    return json.dumps(table, indent=2, ensure_ascii=False).encode() + b"\n"
