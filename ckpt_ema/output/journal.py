"""What of a fold is done: finished blocks in, a file beside the teacher out that a later process goes on from.

A line of JSON says what is folded, into which files; after it lies a record per finished block. Blocks are recorded
once they are written, and now and then all is synced: after a power failure, or on another machine, only what lies
before such a moment counts. A record is two numbers, its kind and a CRC-32 of these, little-endian:

    finished    begin, end            bytes of the data section, written in every teacher
    session     machine, 0            a process begins to write, on a machine since it was started
    synced      position, 0           what was recorded before this byte of the file is on the disk
    committing  inode, 0              all is on the disk, and this file is about to get its name
    kept        0, 0                  nobody begins anew over this unasked, however short it took
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ckpt_ema.errors import BEGIN_ANEW, CkptEmaError
from ckpt_ema.output.descriptors import open_beside_streams
from ckpt_ema.output.fingerprints import differences_between
from ckpt_ema.output.teacher_folder import settle_old
from ckpt_ema.output.writer import Draft, SpreadFiles, explained, sync_folder, write_all

KEEP_SECONDS = 10.0
"""A fold that failed sooner is begun anew as fast as it is resumed, and leaves nothing behind unless it was told to."""

SYNC_SECONDS = 15.0
"""From one moment that counts everywhere to the next."""

JOURNAL_SUFFIX = ".journal"

_RECORD = struct.Struct("<QQII")
_CHECKED = struct.Struct("<QQI")
"""What of a record its checksum is of: the end of the file may be torn."""

_FINISHED, _SESSION, _SYNCED, _COMMITTING, _KEPT = range(5)
MAX_HEADER_BYTES = 64 << 20
MAX_RANKS = 4096
"""Whose records are asked for one by one where they cannot be listed."""


class Range(NamedTuple):
    """Bytes `[begin, end)` of the teacher's data section."""

    begin: int
    end: int


class _Records(NamedTuple):
    """What a journal tells of."""

    finished: list[Range]
    """The ranges that count."""

    written: frozenset[int]
    """The inodes of files that were about to get their names."""

    is_kept: bool
    """Whether it is to be asked about before it goes."""


class FinishedBlocks:
    """The record of the blocks that one process has finished."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path
        self._syncing = threading.Lock()
        self._synced = time.monotonic()
        self._was_synced = False
        self._teachers: Sequence[SpreadFiles] = ()
        self.any_finished = False
        self._is_torn = False
        """Whether a record could not be written whole; what would stand after it could not be read."""

    def begin_session(self, teachers: Sequence[SpreadFiles]) -> None:
        """A process begins to write to `teachers`."""
        self._teachers = teachers
        self._append(_SESSION, _machine(), 0)

    def add(self, begin: int, end: int) -> None:
        """Bytes `[begin, end)` of the data section are written, in every teacher; threads may call at once."""
        self._append(_FINISHED, begin, end)
        self.any_finished = True
        if time.monotonic() - self._synced >= SYNC_SECONDS and self._syncing.acquire(blocking=False):
            try:
                self.sync()
            finally:
                self._syncing.release()

    def sync(self) -> None:
        """What was added so far counts from now on, whatever happens to this machine."""
        self._synced = time.monotonic()
        position = os.lseek(self._descriptor, 0, os.SEEK_END)
        for teacher in self._teachers:
            teacher.sync(with_names=not self._was_synced)
        self._append(_SYNCED, position, 0)
        with explained(f"cannot write `{self._path}`"):
            os.fsync(self._descriptor)
        self._was_synced = True

    def keep(self) -> None:
        """What is recorded here, before and after, is thrown away by nobody unasked."""
        self._append(_KEPT, 0, 0)

    def begin_commit(self) -> None:
        """All is written and synced; files are about to get their names."""
        self.sync()
        for teacher in self._teachers:
            for inode in teacher.inodes:
                self._append(_COMMITTING, inode, 0)
        with explained(f"cannot write `{self._path}`"):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file, and of the lock on it."""
        os.close(self._descriptor)

    def _append(self, kind: int, first: int, second: int) -> None:
        # On a full disk, where the teacher has its space already, a fold must not fail for want of its journal: it can
        # only not be continued from here.
        if self._is_torn:
            return
        try:
            self._is_torn = os.write(self._descriptor, _encode(kind, first, second)) < _RECORD.size
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise CkptEmaError(f"cannot write `{self._path}`: {error.strerror}", may_pass=True) from error
            self._is_torn = True


def _encode(kind: int, first: int, second: int) -> bytes:
    return _RECORD.pack(first, second, kind, zlib.crc32(_CHECKED.pack(first, second, kind)))


def _read_records(content: bytes, offset: int) -> _Records:
    """The records of `content`, which begin at `offset`."""
    here = _machine()
    counted: list[Range] = []
    pending: list[tuple[int, Range]] = []
    written: set[int] = set()
    is_here = is_kept = False
    for position in range(offset, len(content) - _RECORD.size + 1, _RECORD.size):
        first, second, kind, checksum = _RECORD.unpack_from(content, position)
        if checksum != zlib.crc32(content[position : position + _CHECKED.size]):
            break
        if kind == _SESSION:
            pending = []
            is_here = first == here
        elif kind == _FINISHED:
            if is_here:
                counted.append(Range(first, second))
            else:
                pending.append((position, Range(first, second)))
        elif kind == _SYNCED:
            counted += [finished for where, finished in pending if where < first]
            pending = [(where, finished) for where, finished in pending if where >= first]
        elif kind == _COMMITTING:
            written.add(first)
        elif kind == _KEPT:
            is_kept = True
    return _Records(counted, frozenset(written), is_kept)


def _read_journal(path: Path, descriptor: int, header: Mapping[str, Any]) -> _Records:
    """What the journal at `path` and the records of other ranks beside it say, merged."""
    with explained(f"cannot read `{path}`"):
        content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        records = _read_records(content, header["size"])
        ranges = list(records.finished)
        for record in _records_of_ranks(path.parent, header["token"]):
            ranges += _read_records(record.read_bytes(), 0).finished
    return records._replace(finished=_merge(ranges))


def _records_of_ranks(folder: Path, token: str) -> list[Path]:
    start = f".{token}.rank"
    try:
        return [path for path in folder.iterdir() if path.name.startswith(start)]
    except PermissionError:  # a folder one may write to, but not list
        return [path for number in range(MAX_RANKS) if (path := folder / f"{start}{number}").exists()]


def _is_over(header: Mapping[str, Any], written: frozenset[int]) -> bool:
    """Whether a fold was killed when every file had its name, and nothing else of it is there any more."""
    draft = Draft(header["token"], written=written)
    try:
        for target in map(Path, header["targets"]):
            files = list(target.iterdir()) if target.is_dir() else [target]
            hidden = [draft.name(target), draft.name(target, "old"), *filter(draft.owns, files)]
            if any(map(os.path.lexists, hidden)) or not any(map(draft.has_named, files)):
                return False
    except (OSError, ValueError):  # names that somebody made up
        return False
    return True


def _merge(ranges: Sequence[Range]) -> list[Range]:
    merged: list[Range] = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1].end:
            merged[-1] = Range(merged[-1].begin, max(end, merged[-1].end))
        else:
            merged.append(Range(begin, end))
    return merged


def _machine() -> int:
    """A number of this machine since it was started: what a process wrote is seen by the next one until it ends."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text() + socket.gethostname()
    except OSError:
        boot = secrets.token_hex()
    return int.from_bytes(sha256(boot.encode()).digest()[:8], "little")


class Journal:
    """The journal of one fold, locked; the first process of several has it, and removes it when all is committed.

    Raises CkptEmaError where another fold has it, where an unfinished one would be lost, and where one is to be gone
    on with that was of something else.
    """

    def __init__(self, fingerprint: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """`fingerprint` says what is folded, and where to; `resume` goes on, `overwrite` begins anew."""
        self._fingerprint = fingerprint
        self._targets = [Path(target) for target in fingerprint["targets"]]
        self._resume, self._overwrite = resume, overwrite
        self.path = journal_path(self._targets)
        self.draft = Draft()
        self.finished: list[Range] = []
        """What an earlier process has done."""

        self._others: list[tuple[Path, int]] = []
        self._started = time.monotonic()

    def __enter__(self) -> Journal:
        self._descriptor = _open_locked(self.path, self._targets[0])
        try:
            # Those that folds of one of these teachers alone would have.
            for target in self._targets:
                if (path := journal_path([target])) != self.path:
                    self._others.append((path, _open_locked(path, target)))
            self._take_up()
            self.blocks = FinishedBlocks(self._descriptor, self.path)
            if self._resume:
                self.blocks.keep()
        except BaseException:
            if _read_header(self._descriptor) is None:  # nothing, or as much as the disk would take
                self.path.unlink(missing_ok=True)
            self._let_go_of_others()
            os.close(self._descriptor)
            raise
        self.draft.is_kept = self.draft.resumes  # what another process has done is never lost again
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The journal last: as long as it is there, somebody knows of the others.
        self._let_go_of_others()
        if kind is None or not self.draft.is_kept:
            for path in _records_of_ranks(self.path.parent, self.draft.token):
                path.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        self.blocks.close()

    def _let_go_of_others(self) -> None:
        for path, descriptor in self._others:
            _unlink_empty(path, descriptor)
            os.close(descriptor)
        self._others = []

    def begin_commit(self) -> None:
        """All blocks of all processes are written: what fails from now on fails for want of a name."""
        self.blocks.begin_commit()
        self.draft.is_kept = self.draft.is_kept or self._is_worth_keeping()

    def settle(self, error: BaseException) -> None:
        """The fold failed: its files stay where going on later may succeed, and saves time."""
        may_pass = not isinstance(error, CkptEmaError) or error.may_pass
        if not self.draft.is_kept and may_pass and self.blocks.any_finished and self._is_worth_keeping():
            self.draft.is_kept = True
        if self.draft.is_kept:
            with contextlib.suppress(CkptEmaError):  # a full disk
                self.blocks.keep()
                self.blocks.sync()

    def _is_worth_keeping(self) -> bool:
        return self._resume or time.monotonic() - self._started >= KEEP_SECONDS

    def _take_up(self) -> None:
        """Go on with what the journal tells of, or begin anew."""
        header = _read_header(self._descriptor)
        if header is not None:
            self.draft.token = header["token"]
            ranges, written, is_kept = _read_journal(self.path, self._descriptor, header)
            is_over = _is_over(header, written)
            if is_over:
                ranges = [Range(0, header["bytes"])]
            differences = list(differences_between(header, self._fingerprint))
            # What is over is nothing to continue, unless it is this very fold.
            if self._resume and (ranges or written) and not (is_over and differences):
                self._check_same(differences)
                self.finished = ranges
                self.draft.resumes = True
                self.draft.written = written
                return
            done = sum(end - begin for begin, end in ranges)
            seconds = os.fstat(self._descriptor).st_mtime - header["started"]
            is_kept = is_kept or seconds >= KEEP_SECONDS
            if done and not is_over and is_kept and not (self._resume or self._overwrite):
                raise CkptEmaError(
                    f"an unfinished fold into `{self._targets[0]}` is there, {done / max(1, header['bytes']):.0%} done",
                    hint="pass `--resume` to continue it, or `--overwrite` to begin anew",
                )
            self._discard(header)
            self.draft.token = secrets.token_hex(4)
        process = {"process": os.getpid(), "host": socket.gethostname()}
        with explained(f"cannot write `{self.path}`"):
            os.ftruncate(self._descriptor, 0)
            # By the file system's clock, as its later times are: that of a server may be another.
            os.utime(self._descriptor)
            started = os.fstat(self._descriptor).st_mtime
        header = {"token": self.draft.token, "started": started, **process}
        content = json.dumps({**header, **self._fingerprint}).encode("utf-8", "surrogateescape") + b"\n"
        with explained(f"cannot write `{self.path}`"):
            write_all(self._descriptor, memoryview(content), 0)
            # Before the files that it tells of: nobody else knows them from those of a fold that runs.
            os.fsync(self._descriptor)
            sync_folder(self.path.parent)

    def _check_same(self, differences: Sequence[str]) -> None:
        if differences:
            raise CkptEmaError(
                f"the unfinished fold into `{self._targets[0]}` cannot be resumed: inputs or options differ",
                details=differences,
                hint=f"give the same inputs and options again, or {BEGIN_ANEW}",
            )

    def _discard(self, header: Mapping[str, Any]) -> None:
        """Remove what an earlier fold left; a folder that it was replacing gets its name back."""
        token = header["token"]
        for path in _records_of_ranks(self.path.parent, token):
            path.unlink(missing_ok=True)
        draft = Draft(token)
        recorded = [Path(target) for target in header["targets"]]
        # Their folder may have been renamed since. Others are nobody's but the user's: somebody may have written the
        # journal for us to find.
        moved = [self.path.parent / target.name for target in recorded if target.parent == recorded[0].parent]
        for target in {*moved, *(set(recorded) & set(self._targets))}:
            if (path := journal_path([target])) not in (self.path, *(other for other, _ in self._others)):
                with contextlib.suppress(CkptEmaError):
                    descriptor = _open_locked(path, target)
                    _unlink_empty(path, descriptor)
                    os.close(descriptor)
            settle_old(target, draft)
            unfinished = draft.name(target)
            if unfinished.is_dir() and not unfinished.is_symlink():
                shutil.rmtree(unfinished, ignore_errors=True)
            else:
                unfinished.unlink(missing_ok=True)
            if target.is_dir():
                for path in target.glob(f".*.{token}.tmp"):
                    path.unlink(missing_ok=True)


def _open_locked(path: Path, target: Path) -> int:
    """The journal at `path`, this process's own; raises CkptEmaError where a fold into `target` has it."""
    with explained(f"cannot write `{path}`"):
        while True:
            descriptor = open_beside_streams(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    header = _read_header(descriptor) or {}
                    os.close(descriptor)
                    raise CkptEmaError(
                        f"another fold is writing `{target}`{_who(header)}",
                        hint="wait for it, or pass another `--output`",
                    ) from None
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    os.close(descriptor)
                    raise
            # The one that had it may have removed it while it was being opened.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    return descriptor
            os.close(descriptor)


def _unlink_empty(path: Path, descriptor: int) -> None:
    if os.fstat(descriptor).st_size == 0:
        path.unlink(missing_ok=True)


def open_finished_blocks(directory: Path, token: str, number: int) -> FinishedBlocks:
    """The record of rank `number`, beside the journal that the first rank has."""
    path = directory / f".{token}.rank{number}"
    with explained(f"cannot write `{path}`"):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        return FinishedBlocks(open_beside_streams(path, flags), path)


def journal_path(targets: Iterable[Path]) -> Path:
    """Where the journal of a fold into `targets` lies, whatever their order: beside the first by name."""
    target = min((each.parent.resolve() / each.name for each in targets), key=str)
    return target.with_name(f".{target.name}{JOURNAL_SUFFIX}")


def done_share(targets: Iterable[Path]) -> float | None:
    """How much of the fold into `targets` was done when it stopped, from 0 to 1; None where nothing was kept."""
    path = journal_path(targets)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        header = _read_header(descriptor)
        if header is None:
            return None
        ranges = _read_journal(path, descriptor, header).finished
    finally:
        os.close(descriptor)
    done = sum(end - begin for begin, end in ranges)
    return done / max(1, int(header["bytes"]))


def _read_header(descriptor: int) -> dict[str, Any] | None:
    """The first line, with its size in bytes; None where it is not whole."""
    size = min(os.fstat(descriptor).st_size, MAX_HEADER_BYTES)
    line, newline, _ = os.pread(descriptor, size, 0).partition(b"\n")
    if not newline:
        return None
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        return None
    needed: dict[str, Any] = {"token": str, "started": (int, float), "bytes": int, "targets": list}
    if not isinstance(header, dict) or not all(isinstance(header.get(key), kind) for key, kind in needed.items()):
        return None
    if not re.fullmatch("[0-9a-f]{8}", header["token"]):
        return None
    if not all(isinstance(target, str) for target in header["targets"]):
        return None
    return {**header, "size": len(line) + 1}


def _who(header: Mapping[str, Any]) -> str:
    return f" (process {header['process']} on {header['host']})" if "process" in header and "host" in header else ""
