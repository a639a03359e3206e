"""The teacher's files: headers and blocks in any order in, whole files under their final names out."""

from __future__ import annotations

import bisect
import contextlib
import errno
import json
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from ckpt_ema.dtypes import DType
from ckpt_ema.errors import CkptEmaError, LostWorkError
from ckpt_ema.output.descriptors import open_beside_streams

HEADER_MULTIPLE = 4096
"""Bytes; the data then starts on a page."""


TRIAL_BYTES = 8 << 20
TRIAL_SECONDS = 0.001


class Extent(NamedTuple):
    """A run of the teacher's data section that lies in one piece of a file."""

    begin: int
    end: int
    """Of the data section."""

    offset: int
    """Of the file, where `begin` goes."""


@dataclass(frozen=True, slots=True)
class FileParts:
    """A file before it is written: all that is known of it, and where the teacher's data go."""

    size: int
    """Bytes of the whole."""

    literals: tuple[tuple[int, bytes], ...]
    """(offset, content) of what is no tensor."""

    extents: tuple[Extent, ...]
    """By their begin."""

    @classmethod
    def of_header(cls, header: bytes, begin: int, end: int) -> FileParts:
        """A header and after it bytes `[begin, end)` of the data section: a safetensors file."""
        return cls(len(header) + end - begin, ((0, header),), (Extent(begin, end, len(header)),))

    def are_in(self, path: Path) -> bool:
        """Whether `path` is a file of that size with these literals."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if os.fstat(descriptor).st_size != self.size:
                return False
            return all(os.pread(descriptor, len(content), offset) == content for offset, content in self.literals)
        finally:
            os.close(descriptor)


@dataclass(slots=True)
class Draft:
    """What the unfinished files of one fold have in common: their names, and what becomes of them."""

    token: str = field(default_factory=lambda: secrets.token_hex(4))
    """Tells them from those of other folds."""

    resumes: bool = False
    """Whether an earlier process has begun them."""

    written: frozenset[int] = frozenset()
    """Inodes of the files of which it had written all, so that some may have their final names."""

    is_kept: bool = False
    """Whether they stay where the fold fails, for another one to continue."""

    @property
    def was_committing(self) -> bool:
        """Whether the earlier process was giving files their names when it was stopped."""
        return bool(self.written)

    def has_named(self, path: Path) -> bool:
        """Whether `path` is a file that the earlier process wrote whole, under its final name."""
        try:
            return os.lstat(path).st_ino in self.written
        except OSError:
            return False

    def owns(self, path: Path) -> bool:
        """Whether `path` has a name that `name` gave."""
        return path.name.startswith(".") and f".{self.token}." in path.name

    def name(self, target: Path, suffix: str = "tmp") -> Path:
        """A hidden name beside `target` that no reader of checkpoints looks at."""
        return target.with_name(f".{target.name}.{self.token}.{suffix}")


class TeacherFile:
    """A file that appears under its name only when the `with` block ends without an exception.

    Written beside its target under a temporary name; disk space is taken at once, so that a full disk is an error
    before the first tensor is read. Raises CkptEmaError for whatever the file system refuses.
    """

    def __init__(
        self, target: Path, parts: FileParts, *, overwrite: bool, needed_bytes: int = 0, draft: Draft | None = None
    ) -> None:
        """There must be room for `needed_bytes`: of this file and of those that are going to be written beside it."""
        self._target = target
        self._draft = draft or Draft()
        self._parts = parts
        self._begins = [extent.begin for extent in parts.extents]
        self._overwrite = overwrite
        self._needed = max(parts.size, needed_bytes)
        self._and_more = f" and {self._needed - parts.size} bytes more" if self._needed > parts.size else ""
        self._descriptor = -1
        self._was_committed = False
        self.temporary = self._draft.name(target)
        """Where it is until then."""

    def __enter__(self) -> TeacherFile:
        try:
            with explained(f"cannot write `{self._target}` of {self._parts.size} bytes{self._and_more}"):
                if self._is_committed():
                    self._was_committed = True
                    self.temporary = self._target
                    return self
                if self._draft.resumes:
                    self._reopen()
                else:
                    # O_EXCL: never somebody else's file.
                    self._descriptor = open_beside_streams(self.temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                    _reserve(self._descriptor, self._parts.size, self._needed)
                for offset, content in self._parts.literals:
                    write_all(self._descriptor, memoryview(content), offset)
        except BaseException:
            self._discard()
            raise
        return self

    def _is_committed(self) -> bool:
        """Whether the other process came so far that the file has its name; `write` is not called then."""
        # By its number as well: the teacher of an earlier fold may have the very same header.
        is_named = not os.path.lexists(self.temporary) and self._draft.has_named(self._target)
        return is_named and self._parts.are_in(self._target)

    def _reopen(self) -> None:
        try:
            self._descriptor = open_beside_streams(self.temporary, os.O_WRONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise LostWorkError(f"the unfinished `{self.temporary}` is gone") from None
        size = os.fstat(self._descriptor).st_size
        if size != self._parts.size:
            raise LostWorkError(
                f"the unfinished `{self.temporary}` has {size} bytes, and the teacher {self._parts.size}"
            )

    def write(self, block: memoryview, position: int) -> None:
        """Put what of `block`, at `position` of the data section, belongs here; threads may write at once."""
        with explained(f"cannot write `{self._target}`"):
            _write_extents(self._descriptor, self._parts.extents, self._begins, block, position)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._was_committed:
            if kind is None:
                with explained(f"cannot write `{self._target}`"):
                    sync_folder(self._target.parent)  # which the other process may not have come to
            return
        if kind is not None:
            self._discard()
            return
        try:
            with explained(f"cannot write `{self._target}`"):
                if self._overwrite:
                    _take_over_mode(self._descriptor, self._target)
                os.fsync(self._descriptor)
                os.close(self._descriptor)
                self._descriptor = -1
                # Rename last: a reader that has the old teacher open must never see it change.
                _commit(self.temporary, self._target, overwrite=self._overwrite)
                sync_folder(self._target.parent)
        except BaseException:
            self._discard()
            raise

    @property
    def inode(self) -> int:
        """Its number, which it keeps when it gets its name."""
        return os.stat(self._descriptor if self._descriptor >= 0 else self._target).st_ino

    def sync(self, *, with_name: bool) -> None:
        """Make what was written so far survive a power failure, and, asked for once, the temporary name."""
        with explained(f"cannot write `{self._target}`"):
            if self._descriptor >= 0:  # not committed before
                _sync(self._descriptor, self.temporary if with_name else None)

    def _discard(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._draft.is_kept:
            return
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(self.temporary)


class SharedFile:
    """The same file, opened by another process while its TeacherFile is being written: it only adds blocks."""

    def __init__(self, temporary: Path, parts: FileParts) -> None:
        self._path = temporary
        self._parts = parts
        self._begins = [extent.begin for extent in parts.extents]
        self._descriptor = -1

    def __enter__(self) -> SharedFile:
        with explained(f"cannot open `{self._path}`, which another rank made: is it on a shared file system?"):
            self._descriptor = open_beside_streams(self._path, os.O_WRONLY)
        return self

    def write(self, block: memoryview, position: int) -> None:
        """As `TeacherFile.write`."""
        with explained(f"cannot write `{self._path}`"):
            _write_extents(self._descriptor, self._parts.extents, self._begins, block, position)

    def sync(self, *, with_name: bool) -> None:
        """As `TeacherFile.sync`."""
        with explained(f"cannot write `{self._path}`"):
            _sync(self._descriptor, self._path if with_name else None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with explained(f"cannot write `{self._path}`"):
                    os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


class SpreadFiles:
    """A teacher in several files, each of which takes what belongs to it."""

    def __init__(self, files: Sequence[tuple[int, TeacherFile | SharedFile]]) -> None:
        """`files` with the begin of each in the data section, in that order."""
        self._begins = [begin for begin, _ in files]
        self._files = [file for _, file in files]

    def write(self, block: memoryview, position: int) -> None:
        """Put `block` at `position` of the data section; threads may write at once."""
        first = max(0, bisect.bisect_right(self._begins, position) - 1)
        stop = bisect.bisect_left(self._begins, position + len(block))
        for file in self._files[first : max(stop, first + 1)]:
            file.write(block, position)

    @property
    def inodes(self) -> list[int]:
        """Those of the files that this process gives their names."""
        return [file.inode for file in self._files if isinstance(file, TeacherFile)]

    def sync(self, *, with_names: bool) -> None:
        """Make what was written so far survive a power failure, and, asked for once, the temporary names."""
        for file in self._files:
            file.sync(with_name=with_names)


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


def write_small_file(path: Path, content: bytes, draft: Draft) -> None:
    """Create `path` with `content`, synced; where `draft` resumes, it may be there already, or half of it."""
    with contextlib.suppress(OSError):
        if draft.resumes and path.read_bytes() == content:
            return
    with explained(f"cannot write `{path}`"):
        flags = os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW
        descriptor = open_beside_streams(path, flags | (os.O_TRUNC if draft.resumes else os.O_EXCL))
        try:
            write_all(descriptor, memoryview(content), 0)
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


def behind_link(path: Path) -> Path:
    """What is to be replaced where `path` is a link to a teacher's file, so that the link stays; else `path`."""
    real = Path(os.path.realpath(path))
    return real if path.is_symlink() and real.suffix == ".safetensors" and real.is_file() else path


def _take_over_mode(descriptor: int, target: Path) -> None:
    """Give the file the group and the mode of the `target` that it replaces, as far as this process may."""
    try:
        old = os.stat(target)
    except OSError:
        return
    mode = stat.S_IMODE(old.st_mode) & 0o777 | 0o600  # its owner must be able to replace it
    try:
        os.fchown(descriptor, -1, old.st_gid)
    except OSError:  # the group cannot be kept: ours gets what everybody gets
        mode = (mode & 0o707) | (mode & 0o007) << 3
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, mode)


def _commit(temporary: Path, target: Path, *, overwrite: bool) -> None:
    if overwrite:
        os.replace(temporary, target)
        return
    try:
        # A link fails where the name is taken; a rename would replace what appeared there in the meantime.
        os.link(temporary, target)
    except FileExistsError as error:
        if os.path.samefile(temporary, target):  # linked by a process that was stopped then
            os.unlink(temporary)
            return
        raise CkptEmaError(
            f"`{target}` appeared while the teacher was being folded", hint="pass `--overwrite` or another `--output`"
        ) from error
    except OSError as error:  # no hard links here (FAT, some network file systems)
        if not os.path.lexists(temporary):
            raise LostWorkError(f"the unfinished `{temporary}` is gone") from error
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        if os.path.lexists(target):
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
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def _sync(descriptor: int, path: Path | None) -> None:
    os.fdatasync(descriptor)
    if path is not None:
        sync_folder(path.parent)


def _write_extents(
    descriptor: int, extents: Sequence[Extent], begins: Sequence[int], block: memoryview, position: int
) -> None:
    end = position + len(block)
    for number in range(max(0, bisect.bisect_right(begins, position) - 1), len(extents)):
        extent = extents[number]
        if extent.begin >= end:
            break
        first, stop = max(position, extent.begin), min(end, extent.end)
        if first < stop:
            write_all(descriptor, block[first - position : stop - position], extent.offset + first - extent.begin)


def write_all(descriptor: int, content: memoryview, position: int) -> None:
    """Write all of `content` at `position`, in as many calls as it takes."""
    while content:
        written = os.pwrite(descriptor, content, position)
        content = content[written:]
        position += written


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """What the file system refuses inside becomes a CkptEmaError: `what` failed, and what helps."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free some space, or pass an `--output` on another disk",
            errno.EDQUOT: "free some of your quota, or pass an `--output` on another disk",
            errno.EACCES: "pass an `--output` in a folder you may write to",
            errno.EPERM: "is it immutable (`lsattr`)? If so, pass another `--output`",
            errno.EROFS: "pass an `--output` in a folder you may write to",
            errno.ENOENT: "create the folder first, or pass another `--output`",
        }
        raise CkptEmaError(f"{what}: {error.strerror}", hint=hints.get(error.errno or 0), may_pass=True) from error
