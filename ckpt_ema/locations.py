"""Where inputs lie: words of the user in, paths out; a URL is a path whose questions go to its store."""

from __future__ import annotations

import errno
import itertools
import os
import re
import stat
from collections.abc import Generator, Hashable, Sequence
from pathlib import Path, PosixPath

from ckpt_ema.errors import CkptEmaError, MisuseError, UnreadableCheckpointError, hint_of_permission
from ckpt_ema.remote_store import URL, find_entry, list_folder, read_range

LOCAL_SCHEMES = ("file", "local")
VERSION = re.compile(r"[?#&](versionId|generation)=")


class RemotePath(PosixPath):
    """A URL as a path: `s3://bucket/run` has the parts `s3:`, `bucket` and `run`.

    Only what readers of checkpoints ask of a path is answered by the store. All else finds nothing, since no local
    file has such a name. Links there are none.
    """

    __slots__ = ()

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is a file or a folder."""
        return find_entry(str(self)) is not None

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a folder."""
        entry = find_entry(str(self))
        return entry is not None and entry.is_folder

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a file."""
        entry = find_entry(str(self))
        return entry is not None and not entry.is_folder

    def is_symlink(self) -> bool:
        """Never."""
        return False

    def resolve(self, strict: bool = False) -> RemotePath:
        """Itself."""
        return self

    def absolute(self) -> RemotePath:
        """Itself."""
        return self

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Kind and size; all else is 0. Raises FileNotFoundError."""
        entry = find_entry(str(self))
        if entry is None:
            raise FileNotFoundError(2, os.strerror(2), str(self))
        mode = stat.S_IFDIR if entry.is_folder else stat.S_IFREG
        return os.stat_result((mode, 0, 0, 1, 0, 0, entry.size, 0, 0, 0))

    def iterdir(self) -> Generator[RemotePath, None, None]:
        """What lies in the folder."""
        yield from [self / name for name in list_folder(str(self))]

    def read_bytes(self) -> bytes:
        """All of a small file."""
        return read_range(str(self), 0, self.stat().st_size)


def as_path(given: str | os.PathLike[str]) -> Path:
    """The path that a user's word names; a RemotePath for a URL.

    Raises MisuseError for what is neither a str nor a path, for a URL of nothing and for what no file can be called;
    CkptEmaError for a relative path where the current folder was removed.
    """
    text = os.fspath(given) if isinstance(given, (str, os.PathLike)) else given
    if not isinstance(text, str):
        raise MisuseError(
            f"{given!r:.80} is of type {type(given).__name__}, and no path", hint="pass a str or a pathlib.Path"
        )
    url = URL.match(text)
    if url is None:
        _check_nameable(text)
        return Path(text)
    scheme, rest = url["scheme"].lower(), text[url.end() :]
    if scheme in LOCAL_SCHEMES:
        return Path(rest)
    if not rest.strip("/."):
        raise MisuseError(f"`{text}` names nothing", hint="pass a URL such as s3://bucket/run")
    if VERSION.search(rest):
        raise MisuseError(f"`{text}` asks for a version of an object, and only the newest are read")
    return RemotePath(f"{scheme}://{rest}")


def _check_nameable(text: str) -> None:
    """Raise MisuseError for a name that is too long, CkptEmaError for one in a current folder that was removed."""
    try:
        os.lstat(text)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise MisuseError(f"`{text[:80]}...`: {error.strerror}", hint="pass a shorter path") from error
    except ValueError as error:
        raise MisuseError(f"{text[:80]!r} is no path: {error}") from error
    else:
        return
    if not os.path.isabs(text):
        try:
            os.getcwd()
        except FileNotFoundError as error:
            raise relative_path_error(text) from error


def relative_path_error(text: str) -> CkptEmaError:
    """What is said of a path that is not absolute where the current folder was removed."""
    return CkptEmaError(
        f"`{text}` is a relative path, and the current folder was removed",
        hint="`cd` to a folder that exists, or pass absolute paths",
    )


def children_of(folder: Path) -> list[Path]:
    """What lies in `folder`, by name: nothing where a trainer has removed it since it was seen.

    Raises UnreadableCheckpointError where it cannot be listed.
    """
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UnreadableCheckpointError(
            f"cannot list `{folder}`: {error.strerror}", hint=hint_of_permission(error, folder)
        ) from error


def may_be_listed(folder: Path) -> bool:
    """Whether this process may look into `folder`: into a disk's `lost+found` root alone may."""
    return isinstance(folder, RemotePath) or os.access(folder, os.R_OK | os.X_OK)


def is_dead_link(path: Path) -> bool:
    """Whether `path` is a link whose target is missing, may not be seen, or is the link itself."""
    if not path.is_symlink():
        return False
    try:
        path.stat()
    except OSError:  # some of which pathlib's own questions raise
        return True
    return False


def identity_of(path: Path) -> Hashable:
    """Equal for two names of one file; raises OSError where there is none."""
    if isinstance(path, RemotePath):
        return str(path)
    status = path.stat()
    return status.st_dev, status.st_ino


def common_folder(paths: Sequence[Path]) -> Path:
    """The deepest folder that all paths lie in; the first one's own where they share none."""
    folders = [path.absolute().parent for path in paths]
    if len({isinstance(folder, RemotePath) for folder in folders}) > 1:
        return folders[0]
    same = itertools.takewhile(
        lambda parts: len(set(parts)) == 1, zip(*(folder.parts for folder in folders), strict=False)
    )
    shared = [parts[0] for parts in same]
    return type(folders[0])(*shared) if shared else folders[0]


def name_within(folder: Path, path: Path) -> str:
    """What `path` is called seen from `folder`; its whole name where they lie on different machines."""
    if isinstance(path, RemotePath) is not isinstance(folder, RemotePath):
        return str(path)
    return os.path.relpath(path.absolute(), folder)
