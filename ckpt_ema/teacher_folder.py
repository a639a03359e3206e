"""A teacher as a Hugging Face folder: what must come along beside its weights, and how the folder is committed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from ckpt_ema.errors import CkptEmaError, UnreadableCheckpointError
from ckpt_ema.formats import ModelFolder, read_contents
from ckpt_ema.formats.contents import PROVENANCE_FILE
from ckpt_ema.formats.dcp import METADATA_NAME
from ckpt_ema.formats.folder import MODEL_STEM, SHARD_NAME, WEIGHTS_SUFFIX
from ckpt_ema.writer import BEGIN_ANEW, Draft, sync_folder, write_small_file

# What from_pretrained reads beside weights: configuration, tokenizer, processor, chat template, custom model code.
COMPANION = re.compile(r".*\.(json|txt|model|jinja|tiktoken|py|vocab|bpe)$", re.IGNORECASE)
NEVER_COMPANION = re.compile(
    r"(trainer_state\.json|training_args.*|.*\.index\.json|.*results\.json|latest.*|.*zero_to_fp32\.py|\..*)$",
    re.IGNORECASE,
)
CONFIGURATIONS = ("config.json", "adapter_config.json", "model_index.json")
MAX_COMPANION_BYTES = 512 << 20
PIECES_NAME = "__0_0.distcp"
"""The tensors of a teacher that torch.distributed.checkpoint loads."""


def is_model_folder(folder: ModelFolder | None) -> bool:
    """Whether a configuration lies beside the weights, so that `from_pretrained` loads the folder."""
    return folder is not None and any((folder.path / name).is_file() for name in CONFIGURATIONS)


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
        if read_contents(folder).is_own_teacher:
            return
    raise CkptEmaError(
        f"`{folder}` is not empty and holds no teacher that ckpt-ema wrote",
        hint="pass another `--output`, or remove the folder yourself",
    )


@contextlib.contextmanager
def folder_to_fill(target: Path, draft: Draft | None = None) -> Iterator[Path]:
    """A folder to write the teacher into: `target` where it exists, else one that becomes `target` at the end."""
    draft = draft or Draft()
    if target.is_dir() and not draft.name(target).is_dir():
        yield target
        return
    with new_folder(target, overwrite=False, draft=draft) as temporary:
        yield temporary


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool, draft: Draft) -> Iterator[Path]:
    """An empty folder that takes the place of `target` at the end, or the one that `draft` goes on with.

    With `overwrite` also that of an older teacher's folder; what else lies in there stays.
    """
    temporary = draft.name(target)
    try:
        if not draft.resumes:
            os.mkdir(temporary)
        elif draft.was_committing and not temporary.is_dir() and target.is_dir():
            temporary = target  # it took its place before the other process was stopped
        elif not temporary.is_dir():
            raise CkptEmaError(f"the unfinished `{temporary}` is gone", hint=BEGIN_ANEW)
    except OSError as error:
        raise CkptEmaError(f"cannot write `{target}`: {error.strerror}") from error
    try:
        yield temporary
        try:
            sync_folder(temporary)
            old = draft.name(target, "old")
            if temporary != target:
                _take_place(temporary, target, old, overwrite=overwrite)
            if old.is_dir():
                move_rest(old, target)
        except OSError as error:
            raise CkptEmaError(f"cannot write `{target}`: {error.strerror}") from error
        sync_folder(target.parent)
    except BaseException:
        if temporary != target and not draft.is_kept:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _take_place(folder: Path, target: Path, old: Path, *, overwrite: bool) -> None:
    """Rename `folder` to `target`, and what was there to `old`."""
    try:
        os.rename(folder, target)  # where nothing or an empty folder is
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if not overwrite:
        raise CkptEmaError(
            f"`{target}` appeared while the teacher was being folded", hint="pass `--overwrite` or another `--output`"
        )
    check_replaceable(target)
    # Folders cannot replace each other in one step: for a moment the old one has a hidden name.
    os.rename(target, old)
    try:
        os.rename(folder, target)
    except OSError:
        os.rename(old, target)
        raise


def move_rest(old: Path, target: Path) -> None:
    """Remove an older teacher's folder. Never a whole tree: what else is in it is somebody's work, and goes along."""
    for path in old.iterdir():
        if path.is_dir() and not path.is_symlink():
            os.rename(path, target / path.name)
        elif (target / path.name).exists() or _is_of_a_teacher(path.name):
            path.unlink()
        else:
            os.rename(path, target / path.name)
    old.rmdir()


def _is_of_a_teacher(name: str) -> bool:
    """Whether this tool calls files so that hold a teacher in a folder, whatever the format."""
    if name in (METADATA_NAME, PIECES_NAME, PROVENANCE_FILE):
        return True
    stem = name.removesuffix(".index.json").removesuffix(".safetensors")
    return stem != name and bool(MODEL_STEM.match(stem) or SHARD_NAME.match(name))


@contextlib.contextmanager
def staged_companions(
    source: ModelFolder, target: Path, dtype: str, written: Collection[str], draft: Draft
) -> Iterator[Callable[[], None]]:
    """Copy what belongs to the model under temporary names; calling what is yielded renames them into place.

    So nothing of an older teacher is replaced before the new weights are, files called `written`. The configuration
    says the dtype the weights are written in.
    """
    staged: list[tuple[Path, Path]] = []

    def commit() -> None:
        for path in target.iterdir():
            if _is_stale(path, {*written, *(final.name for _, final in staged)}):
                path.unlink()
        while staged:
            temporary, final = staged.pop()
            os.replace(temporary, final)
        sync_folder(target)

    try:
        for path in companions_of(source):
            content = path.read_bytes()
            if path.name == "config.json" and dtype != "student":
                content = _with_dtype(content, dtype)
            temporary = draft.name(target / path.name)
            staged.append((temporary, target / path.name))
            write_small_file(temporary, content, draft)
        yield commit
    except OSError as error:
        raise CkptEmaError(f"cannot write `{target}`: {error.strerror}") from error
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def _is_stale(path: Path, names: Collection[str]) -> bool:
    """Whether a file of an older teacher would make `from_pretrained` load something else beside the new weights."""
    if path.name in names:
        return False
    stem = WEIGHTS_SUFFIX.sub("", path.name.removesuffix(".index.json"))
    is_weights = stem != path.name and (MODEL_STEM.match(stem) or SHARD_NAME.match(path.name))
    return bool(is_weights) or path.name in CONFIGURATIONS


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
