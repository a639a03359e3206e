"""A teacher as a Hugging Face folder: what must come along beside its weights, and how the folder is committed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from ckpt_ema.errors import CkptEmaError, LostWorkError, UnreadableCheckpointError
from ckpt_ema.formats import ModelFolder
from ckpt_ema.output.old_teacher import check_folder_replaceable, move_rest
from ckpt_ema.output.writer import Draft, sync_folder, write_small_file

# What from_pretrained reads beside weights: configuration, tokenizer, processor, chat template, custom model code.
COMPANION = re.compile(r".*\.(json|txt|model|jinja|tiktoken|py|vocab|bpe)$", re.IGNORECASE)
NEVER_COMPANION = re.compile(
    r"(trainer_state\.json|training_args.*|.*\.index\.json|.*results\.json|latest.*|.*zero_to_fp32\.py|\..*)$",
    re.IGNORECASE,
)
CONFIGURATIONS = ("config.json", "adapter_config.json", "model_index.json")
MAX_COMPANION_BYTES = 512 << 20

# Of Linux, in fcntl.h and fs.h.
AT_FDCWD = -100
RENAME_EXCHANGE = 2


def is_model_folder(folder: ModelFolder | None) -> bool:
    """Whether a configuration lies beside the weights, so that `from_pretrained` loads the folder."""
    return folder is not None and any((folder.path / name).is_file() for name in CONFIGURATIONS)


def replaced_in(folder: Path) -> list[str]:
    """Names of what `companions_of` may have put into `folder`."""
    return [path.name for path in folder.iterdir() if _is_companion(path)]


def _is_companion(path: Path) -> bool:
    return bool(COMPANION.match(path.name) and not NEVER_COMPANION.match(path.name) and path.is_file())


def companions_of(folder: ModelFolder) -> list[Path]:
    """Files beside the weights that belong to the model rather than to its training."""
    found = []
    for path in sorted(folder.path.iterdir()):
        if _is_companion(path):
            if path.stat().st_size > MAX_COMPANION_BYTES:
                raise UnreadableCheckpointError(f"`{path}` has {path.stat().st_size} bytes, too many to come along")
            found.append(path)
    return found


@contextlib.contextmanager
def folder_to_fill(target: Path, draft: Draft | None = None) -> Iterator[Path]:
    """A folder to write the teacher into: `target` where it exists, else one that becomes `target` at the end."""
    draft = draft or Draft()
    if target.is_dir() and not draft.name(target).is_dir() and not _mark(target, draft).exists():
        yield target
        return
    with new_folder(target, overwrite=False, draft=draft) as temporary:
        yield temporary


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool, draft: Draft, written: Collection[str] = ()) -> Iterator[Path]:
    """An empty folder that takes the place of `target` at the end, or the one that `draft` continues.

    With `overwrite` also that of an older teacher's folder; what else lies in there stays. `written` are the files of
    the teacher itself.
    """
    temporary = draft.name(target)
    try:
        if not draft.resumes:
            os.mkdir(temporary)
            try:
                _mark(temporary, draft).touch()
            except OSError:
                os.rmdir(temporary)
                raise
            sync_folder(target.parent)  # what is synced in it is lost with its name
        elif draft.was_committing and (_mark(target, draft).exists() or not temporary.is_dir()) and target.is_dir():
            temporary = target  # it took its place before the other process was stopped
        elif not temporary.is_dir():
            raise LostWorkError(f"the unfinished `{temporary}` is gone")
    except OSError as error:
        raise CkptEmaError(f"cannot write `{target}`: {error.strerror}") from error
    try:
        yield temporary
        try:
            sync_folder(temporary)
            if temporary != target:
                _take_place(temporary, target, draft, overwrite=overwrite, written=written)
            settle_old(target, draft)
        except OSError as error:
            raise CkptEmaError(f"cannot write `{target}`: {error.strerror}") from error
        sync_folder(target.parent)
    except BaseException:
        # Without its mark it is the old folder, and the new one has its name.
        if temporary != target and not draft.is_kept and _mark(temporary, draft).exists():
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _mark(folder: Path, draft: Draft) -> Path:
    """An empty file in the new folder, which tells it from the one whose place it takes, until that is gone."""
    return draft.name(folder / "new")


def settle_old(target: Path, draft: Draft) -> None:
    """Remove what of an older teacher lies under hidden names beside `target`, which took its place.

    Where the new folder did not come so far, the old one gets its name back.
    """
    old, temporary = draft.name(target, "old"), draft.name(target)
    if temporary.is_dir() and _mark(target, draft).exists():  # they have changed names
        os.rename(temporary, old)
    if old.is_dir() and not target.exists():
        os.rename(old, target)
    elif old.is_dir():
        move_rest(old, target, replaced_in(target))
    if target.is_dir():
        _mark(target, draft).unlink(missing_ok=True)


def _take_place(folder: Path, target: Path, draft: Draft, *, overwrite: bool, written: Collection[str]) -> None:
    """Rename `folder` to `target`, and what was there to a hidden name."""
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
    check_folder_replaceable(target, written)
    if _exchange(folder, target):
        return
    # In two steps then: for a moment there is neither.
    old = draft.name(target, "old")
    os.rename(target, old)
    try:
        os.rename(folder, target)
    except OSError:
        os.rename(old, target)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change their names in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def staged_companions(source: ModelFolder, target: Path, dtype: str, draft: Draft) -> Iterator[Callable[[], None]]:
    """Copy what belongs to the model under temporary names; calling what is yielded renames them into place.

    So nothing of an older teacher is replaced before the new weights are. The configuration says the dtype the weights
    are written in.
    """
    staged: list[tuple[Path, Path]] = []

    def commit() -> None:
        # Of a model of another kind, which would be loaded in this one's place.
        for name in {*CONFIGURATIONS} - {final.name for _, final in staged}:
            (target / name).unlink(missing_ok=True)
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
