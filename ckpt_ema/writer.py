"""The teacher's file: a header and blocks in any order in, a whole safetensors file under its final name out."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from ckpt_ema.dtypes import DType
from ckpt_ema.errors import CkptEmaError

HEADER_MULTIPLE = 4096
"""Bytes; the data then starts on a page."""

TRIAL_BYTES = 8 << 20
TRIAL_SECONDS = 0.001


class TeacherFile:
    """A safetensors file that appears under its name only when the `with` block ends without an exception.

    Written beside its target under a temporary name; disk space is taken at once, so that a full disk is an error
    before the first tensor is read. Raises CkptEmaError for whatever the file system refuses.
    """

    def __init__(self, target: Path, header: bytes, data_bytes: int, *, overwrite: bool, num_alike: int = 1) -> None:
        """`num_alike` files of this size are going to be written, this one among them; there must be room for all."""
        self._target = target
        self._header = header
        self._size = len(header) + data_bytes
        self._overwrite = overwrite
        self._needed = self._size * num_alike
        self._and_more = f" and {num_alike - 1} more like it" if num_alike > 1 else ""
        self._temporary = temporary_name(target)
        self._descriptor = -1

    def __enter__(self) -> TeacherFile:
        try:
            with _explained(f"cannot write `{self._target}` of {self._size} bytes{self._and_more}"):
                # 0o666 without the umask's bits, as any program's output; O_EXCL: never somebody else's file.
                self._descriptor = os.open(self._temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
                _reserve(self._descriptor, self._size, self._needed)
                _write_all(self._descriptor, memoryview(self._header), 0)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, block: memoryview, position: int) -> None:
        """Put `block` at `position` of the data section; threads may write at once."""
        with _explained(f"cannot write `{self._target}`"):
            _write_all(self._descriptor, block, len(self._header) + position)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            with _explained(f"cannot write `{self._target}`"):
                os.fsync(self._descriptor)
                os.close(self._descriptor)
                self._descriptor = -1
                # Rename last: a reader that has the old teacher open must never see it change.
                _commit(self._temporary, self._target, overwrite=self._overwrite)
                sync_folder(self._target.parent)
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(self._temporary)


def encode_header(entries: Iterable[tuple[str, DType, Sequence[int], int, int]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors header with its length before it, from (name, dtype, shape, begin, end) in the data's order."""
    parts = [f'"__metadata__":{json.dumps(dict(metadata), separators=(",", ":"), ensure_ascii=False)}']
    for name, dtype, shape, begin, end in entries:
        # By hand: a table of 20000 tables takes json as long as a hundred megabytes of tensors take the fold.
        sizes = ",".join(map(str, shape))
        key = json.encoder.encode_basestring(name)
        parts.append(f'{key}:{{"dtype":"{dtype.code}","shape":[{sizes}],"data_offsets":[{begin},{end}]}}')
    text = f"{{{','.join(parts)}}}".encode()
    text += b" " * (-(8 + len(text)) % HEADER_MULTIPLE)
    return len(text).to_bytes(8, "little") + text


def temporary_name(target: Path) -> Path:
    """A hidden name beside `target` that no reader of checkpoints looks at."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def write_small_file(path: Path, content: bytes) -> None:
    """Create `path` with `content`, synced."""
    with _explained(f"cannot write `{path}`"):
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        try:
            _write_all(descriptor, memoryview(content), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power failure, where its file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # a folder one may write to, but not list
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def _commit(temporary: Path, target: Path, *, overwrite: bool) -> None:
    if overwrite:
        os.replace(temporary, target)
        return
    try:
        # A link fails where the name is taken; a rename would replace what appeared there in the meantime.
        os.link(temporary, target)
    except FileExistsError as error:
        raise CkptEmaError(
            f"`{target}` appeared while the teacher was being folded", hint="pass `--overwrite` or another `--output`"
        ) from error
    except OSError:  # no hard links here (FAT, some network file systems)
        if target.exists():
            raise CkptEmaError(f"`{target}` exists", hint="pass `--overwrite` or another `--output`") from None
        os.replace(temporary, target)
    else:
        os.unlink(temporary)


def _reserve(descriptor: int, size: int, needed: int) -> None:
    """Take the disk space now, so that a full disk is an error before the first tensor is read."""
    status = os.fstatvfs(descriptor)
    # Some network file systems know nothing of their size and say 0 blocks.
    if status.f_blocks and needed > status.f_bavail * status.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(descriptor, size)
    # Reserving is free where a file system keeps extents. Where it writes zeros instead (tmpfs, NFS), it would cost
    # as much as the teacher itself: a slice tells, and the free space found above has to do.
    started = time.perf_counter()
    try:
        os.posix_fallocate(descriptor, 0, min(size, TRIAL_BYTES))
        if time.perf_counter() - started < TRIAL_SECONDS:
            os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # macOS
        return
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def _write_all(descriptor: int, content: memoryview, position: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, position)
        content = content[written:]
        position += written


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free some space, or pass an `--output` on another disk",
            errno.EDQUOT: "free some of your quota, or pass an `--output` on another disk",
            errno.EACCES: "pass an `--output` in a folder you may write to",
            errno.EROFS: "pass an `--output` in a folder you may write to",
            errno.ENOENT: "create the folder first, or pass another `--output`",
        }
        raise CkptEmaError(f"{what}: {error.strerror}", hint=hints.get(error.errno or 0)) from error
