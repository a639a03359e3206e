"""What a disk may hold when the power fails: the calls of a process in, one of the possible remains out.

The model is that of a journaling file system. What was written reaches the disk sector by sector, in any order, unless
the file was synced; names change in order, and none is lost that was there when its folder was synced.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECTOR_BYTES = 512
NAMING_CALLS = frozenset(("open", "rename", "replace", "renameat2", "link", "unlink", "mkdir", "rmdir"))

FileId = tuple[int, int]
"""An inode, and how many files had it before."""


@dataclass(frozen=True)
class Moment:
    """A folder as a process sees it: its folders (None) and files by relative path, and what each file holds."""

    names: dict[str, FileId | None]
    contents: dict[FileId, bytes]


@dataclass
class Disk:
    """Told of every call that writes below `folder`."""

    folder: Path
    synced: dict[FileId, bytes] = field(default_factory=dict)
    moments: list[Moment] = field(default_factory=list)
    """Those that the names on the disk may be of, and the present at last."""

    _generations: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self.moments.append(self._look())
        self.synced.update(self.moments[0].contents)

    def told(self, call: str, arguments: tuple[Any, ...]) -> None:
        """`call` was made."""
        with self._lock:
            if call in ("fsync", "fdatasync"):
                self._sync(arguments[0])
            elif call in NAMING_CALLS:
                self.moments.append(self._look())

    def save(self, path: Path) -> None:
        """Write down what is known, now that the power fails."""
        with self._lock:
            self.moments.append(self._look())
            path.write_bytes(pickle.dumps((self.synced, self.moments)))

    def _sync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self.moments = [self._look()]
            return
        number = (status.st_ino, self._generations.get(status.st_ino, 0))
        self.synced[number] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def _look(self) -> Moment:
        here = set(self.moments[-1].contents) if self.moments else set()
        moment = Moment({}, {})
        for parent, folders, files in os.walk(self.folder):
            moment.names.update((os.path.relpath(os.path.join(parent, name), self.folder), None) for name in folders)
            for name in files:
                path = os.path.join(parent, name)
                inode = os.stat(path).st_ino
                number = (inode, self._generations.get(inode, 0))
                if number not in here and number not in moment.contents:
                    self._generations[inode] = number[1] + 1
                    number = (inode, number[1] + 1)
                moment.names[os.path.relpath(path, self.folder)] = number
                with open(path, "rb") as file:
                    moment.contents[number] = file.read()
        return moment


def leave_remains(folder: Path, saved: Path, chance: random.Random) -> None:
    """Make of `folder`, as a process left it, one of those that the disk may hold; files that live on keep inodes."""
    synced, moments = pickle.loads(saved.read_bytes())
    now, then = moments[-1], chance.choice(moments)
    known = {number: content for moment in moments for number, content in moment.contents.items()}
    side = folder.with_name(f"{folder.name}.side")
    side.mkdir()
    for path, number in now.names.items():
        if number is not None and not (side / str(number)).exists():
            os.rename(folder / path, side / str(number))
    shutil.rmtree(folder)
    folder.mkdir()
    for path, number in sorted(then.names.items()):
        if number is None:
            (folder / path).mkdir()
            continue
        content = _remains(synced.get(number, b""), known[number], chance)
        if not (side / str(number)).exists():
            (side / str(number)).touch()
        with open(side / str(number), "r+b") as file:
            file.truncate(0)
            file.write(content)
        os.link(side / str(number), folder / path)
    shutil.rmtree(side)


def _remains(synced: bytes, written: bytes, chance: random.Random) -> bytes:
    """Of one file: what was synced, what was written since, or some of each; zeros where there was never anything."""
    size = chance.choice((len(synced), len(written)))
    share = chance.choice((0.0, 0.5, 1.0))
    sectors = []
    for begin in range(0, size, SECTOR_BYTES):
        source = written if chance.random() < share else synced
        end = min(begin + SECTOR_BYTES, size)
        sectors.append(source[begin:end].ljust(end - begin, b"\0"))
    return b"".join(sectors)
