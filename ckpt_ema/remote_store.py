"""Files behind URLs: URLs in, listings and byte ranges out, through fsspec.

Every request is a round trip of tens of milliseconds: a folder is listed once, the ends of files, where tables lie, are
fetched together and kept, and nothing is asked of a single object that a listing has told.
"""

from __future__ import annotations

import bisect
import datetime
import errno
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from ckpt_ema.errors import CkptEmaError, MisuseError

URL = re.compile(r"^(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")

PAGE_BYTES = 64 << 10
"""What a small read brings along; the table of a model of some hundred tensors."""

MAX_KEPT_BYTES = 64 << 20
MAX_REQUEST_BYTES = 16 << 20
MAX_PREFETCH_GAP_BYTES = 64 << 10

MAX_TRIES = 4
FIRST_PAUSE_SECONDS = 0.25

# Another one of these after each write. Those that are made of the content come first: a listing and a question for
# one object may round times differently.
VERSION_KEYS = (
    *("ETag", "etag", "generation", "md5Hash", "content_md5", "oid", "blob_id"),
    *("mtime", "LastModified", "last_modified", "updated", "created"),
)

NEEDED_PACKAGES = {
    "s3": "ckpt-ema[remote]",
    "s3a": "ckpt-ema[remote]",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
}
"""What to install for a scheme whose filesystem is missing; fsspec's own words name the others."""

Result = TypeVar("Result")


class Entry(NamedTuple):
    """A file or a folder as a listing shows it."""

    name: str
    is_folder: bool
    size: int
    """Bytes; 0 for a folder."""

    version: str
    """What the store calls the present content: ETag, generation, or the time of the last write."""


def list_folder(url: str) -> Mapping[str, Entry]:
    """What lies in a folder, by name; raises FileNotFoundError where there is no such folder."""
    listing = _listings.get(url)
    if listing is None:
        filesystem, path = _locate(url)
        try:
            found = _ask(lambda: filesystem.ls(path, detail=True), f"cannot list `{url}`")
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from None
        listing = _listings[url] = {
            entry.name: entry
            for info in found
            # Some stores list the folder itself, as the empty object that marks it.
            if info["name"].strip("/") != path.strip("/")
            for entry in [_entry(info)]
        }
        for entry in listing.values():
            _entries[f"{url}/{entry.name}"] = entry
    return listing


def find_entry(url: str) -> Entry | None:
    """The file or folder at `url`; None where there is none."""
    if url in _entries:
        return _entries[url]
    parent, _, name = url.rpartition("/")
    around = _entries.get(parent)
    if around is not None:
        return list_folder(parent).get(name) if around.is_folder else None
    # Only what the user named: its parent may be a bucket of a million objects, or be closed to them.
    filesystem, path = _locate(url)
    try:
        entry = _entry(_ask(lambda: filesystem.info(path), f"cannot look at `{url}`"))
    except FileNotFoundError:
        entry = None
    _entries[url] = entry
    return entry


def read_range(url: str, begin: int, end: int) -> bytes:
    """The bytes `[begin, end)`, in one request; fewer where the file ends before.

    Raises FileNotFoundError where the file is gone, and CkptEmaError for any other failure that lasts.
    """
    filesystem, path = _locate(url)
    where = f"cannot read `{url}` at byte {begin}"
    try:
        content = _ask(lambda: filesystem.cat_file(path, start=begin, end=end), where)
    except CkptEmaError:
        # A store may refuse a range behind the end rather than answer with nothing.
        filesystem.invalidate_cache()
        if begin >= int(_ask(lambda: filesystem.info(path), where).get("size") or 0):
            return b""
        raise
    if len(content) > end - begin:
        raise CkptEmaError(
            f"`{url}`: its server sends whole files where byte ranges were asked for",
            hint="copy the checkpoints here, and fold the copies",
        )
    return bytes(content)


def read_kept(url: str, begin: int, end: int, size: int) -> bytes:
    """The bytes `[begin, end)` of a file of `size` bytes, from what is kept or with what lies around them."""
    content = _pages.find(url, begin, end)
    if content is None:
        first = max(0, min(begin, size - PAGE_BYTES))
        page = read_range(url, first, min(size, max(end, first + PAGE_BYTES)))
        _pages.keep(url, first, page)
        content = page[begin - first : end - first]
    return content


def prefetch(wanted: Iterable[tuple[str, int, int]]) -> None:
    """Fetch and keep `(url, begin, end)` ranges at once, as many as may be kept; failures show when they are read."""
    by_filesystem: dict[int, tuple[Any, list[tuple[str, str, int, int]]]] = {}
    room = MAX_KEPT_BYTES // 2
    for url, begin, end in _merge(wanted):
        room -= end - begin
        if room < 0:
            break
        if _pages.find(url, begin, end) is None:
            filesystem, path = _locate(url)
            by_filesystem.setdefault(id(filesystem), (filesystem, []))[1].append((url, path, begin, end))
    for filesystem, ranges in by_filesystem.values():
        _, paths, begins, ends = (list(column) for column in zip(*ranges, strict=True))
        contents = filesystem.cat_ranges(paths, begins, ends, on_error="return")
        for (url, _, begin, end), content in zip(ranges, contents, strict=True):
            if isinstance(content, bytes) and len(content) == end - begin:
                _pages.keep(url, begin, content)


def forget_listings() -> None:
    """Forget all that was listed and kept, so that what is asked next is asked of the store."""
    _listings.clear()
    _entries.clear()
    _filesystems.clear()
    _pages.clear()


class _Pages:
    """Parts of files that were read, by their first byte."""

    def __init__(self) -> None:
        self._pages: dict[str, tuple[list[int], list[bytes]]] = {}
        self._kept_bytes = 0

    def find(self, url: str, begin: int, end: int) -> bytes | None:
        """The bytes `[begin, end)`, where one page has them all."""
        begins, contents = self._pages.get(url, ([], []))
        at = bisect.bisect_right(begins, begin) - 1
        if at < 0 or end > begins[at] + len(contents[at]):
            return None
        return contents[at][begin - begins[at] : end - begins[at]]

    def keep(self, url: str, begin: int, content: bytes) -> None:
        """Keep a page, in place of all others where there are too many."""
        if self._kept_bytes + len(content) > MAX_KEPT_BYTES:
            self.clear()
        begins, contents = self._pages.setdefault(url, ([], []))
        at = bisect.bisect_left(begins, begin)
        begins.insert(at, begin)
        contents.insert(at, content)
        self._kept_bytes += len(content)

    def clear(self) -> None:
        """Drop everything."""
        self._pages.clear()
        self._kept_bytes = 0


# Of the command at hand; `forget_listings` ends it.
_listings: dict[str, dict[str, Entry]] = {}
_entries: dict[str, Entry | None] = {}
_filesystems: dict[str, Any] = {}
_pages = _Pages()


def _locate(url: str) -> tuple[Any, str]:
    """The filesystem that has `url`, and the path it knows it by."""
    root = "/".join(url.split("/", 3)[:3])
    filesystem = _filesystems.get(root)
    if filesystem is None:
        filesystem = _filesystems[root] = _open_filesystem(url)
    return filesystem, filesystem._strip_protocol(url)


def _open_filesystem(url: str) -> Any:
    try:
        import fsspec  # noqa: PLC0415  (local folds must not wait for it)
    except ImportError as error:
        raise CkptEmaError(f"reading `{url}` needs fsspec", hint="pip install 'ckpt-ema[remote]'") from error
    scheme = url.partition("://")[0]
    if scheme not in fsspec.available_protocols():
        raise MisuseError(
            f"`{url}`: fsspec knows no `{scheme}://`", hint="pass a path, or a URL such as s3://bucket/run"
        )
    try:
        filesystem, _ = fsspec.url_to_fs(url)
    except ImportError as error:
        package = NEEDED_PACKAGES.get(scheme)
        raise CkptEmaError(
            f"reading `{url}` needs a package that is not installed: {_reason(error)}",
            hint=f"pip install '{package}'" if package else None,
        ) from error
    except Exception as error:
        raise CkptEmaError(f"cannot reach `{url}`: {_reason(error)}") from error
    # fsspec keeps filesystems and their listings for as long as the process lives.
    filesystem.invalidate_cache()
    return filesystem


def _ask(request: Callable[[], Result], what_fails: str) -> Result:
    """Carry out a request, again where it fails for a reason that may pass.

    Raises FileNotFoundError where there is nothing, and CkptEmaError for what remains: filesystems raise errors of
    their own libraries, which have no common kind.
    """
    for attempt in range(MAX_TRIES):
        try:
            return request()
        except FileNotFoundError:
            raise
        except Exception as error:
            is_final = isinstance(error, (PermissionError, NotImplementedError, ValueError, TypeError))
            if is_final or attempt == MAX_TRIES - 1:
                raise CkptEmaError(f"{what_fails}: {_reason(error)}") from error
            time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
    raise AssertionError


def _reason(error: BaseException) -> str:
    """The first line of what an error says."""
    text = getattr(error, "strerror", None) or str(error)
    return next(iter(text.strip().splitlines()), "") or type(error).__name__


def _entry(info: Mapping[str, Any]) -> Entry:
    version = next((info[key] for key in VERSION_KEYS if info.get(key) is not None), "")
    if isinstance(version, datetime.datetime):  # where a listing has seconds since 1970
        version = version.timestamp()
    is_folder = info.get("type") == "directory"
    return Entry(
        info["name"].rstrip("/").rpartition("/")[2],
        is_folder,
        0 if is_folder else int(info.get("size") or 0),
        str(version),
    )


def _merge(wanted: Iterable[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
    """The ranges in order, those near one another as one."""
    merged: list[tuple[str, int, int]] = []
    for url, begin, end in sorted(wanted):
        if merged and _is_near(merged[-1], (url, begin, end)):
            merged[-1] = (url, merged[-1][1], max(merged[-1][2], end))
        else:
            merged.append((url, begin, end))
    return iter(merged)


def _is_near(one: tuple[str, int, int], next_one: tuple[str, int, int]) -> bool:
    fits = next_one[2] - one[1] <= MAX_REQUEST_BYTES
    return one[0] == next_one[0] and next_one[1] - one[2] <= MAX_PREFETCH_GAP_BYTES and fits
