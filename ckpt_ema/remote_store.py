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
# Many small ranges are fetched in windows of up to this size, as many at once as make a batch.
MAX_WINDOW_BYTES = 1 << 20
MAX_WINDOW_GAP_BYTES = 64 << 10
MAX_BATCH_BYTES = 32 << 20

MAX_TRIES = 4
FIRST_PAUSE_SECONDS = 0.25
# A library that took as long as this to fail has tried again itself.
PATIENCE_SECONDS = 5.0

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

# Of its own accord it opens ten connections, and all other requests wait for one.
FILESYSTEM_OPTIONS: Mapping[str, Mapping[str, Any]] = {"s3": {"config_kwargs": {"max_pool_connections": 64}}}

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
        _folders.add(url)
        for entry in listing.values():
            _entries[f"{url}/{entry.name}"] = entry
    return listing


def find_entry(url: str) -> Entry | None:
    """The file or folder at `url`; None where there is none."""
    if url in _entries:
        return _entries[url]
    parent, _, name = url.rpartition("/")
    around = _entries.get(parent)
    if parent in _folders or (around is not None and around.is_folder):
        try:
            return list_folder(parent).get(name)
        except FileNotFoundError:
            return None
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
    # Filesystems that are not asynchronous read through a file object, which would read ahead.
    options = {} if filesystem.async_impl else {"cache_type": "none"}
    try:
        content = _ask(lambda: filesystem.cat_file(path, start=begin, end=end, **options), where)
    except CkptEmaError:
        # A store may refuse a range after the end rather than answer with nothing.
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
    """Fetch and keep `(url, begin, end)` ranges, many at once; one that fails is asked for again when it is read."""
    missing = sorted(part for part in wanted if part[1] < part[2] and _pages.find(*part) is None)
    if sum(end - begin for _, begin, end in missing) > MAX_KEPT_BYTES:
        return  # read one by one, each is dropped when it has served
    batch: list[list[tuple[str, int, int]]] = []
    room = MAX_BATCH_BYTES
    for window in _windows(missing):
        size = window[-1][2] - window[0][1]
        if batch and size > room:
            _fetch(batch)
            batch, room = [], MAX_BATCH_BYTES
        batch.append(window)
        room -= size
    _fetch(batch)


def _windows(ranges: Iterable[tuple[str, int, int]]) -> Iterator[list[tuple[str, int, int]]]:
    """Sorted ranges in groups that one request each brings."""
    window: list[tuple[str, int, int]] = []
    for url, begin, end in ranges:
        if window and (
            url != window[0][0]
            or begin - window[-1][2] > MAX_WINDOW_GAP_BYTES
            or max(end, window[-1][2]) - window[0][1] > MAX_WINDOW_BYTES
        ):
            yield window
            window = []
        window.append((url, begin, end if not window else max(end, window[-1][2])))
    if window:
        yield window


def _fetch(windows: list[list[tuple[str, int, int]]]) -> None:
    by_filesystem: dict[int, list[list[tuple[str, int, int]]]] = {}
    for window in windows:
        by_filesystem.setdefault(id(_locate(window[0][0])[0]), []).append(window)
    for group in by_filesystem.values():
        filesystem, _ = _locate(group[0][0][0])
        paths = [_locate(window[0][0])[1] for window in group]
        begins, ends = [window[0][1] for window in group], [window[-1][2] for window in group]
        try:
            contents = filesystem.cat_ranges(paths, begins, ends, on_error="return")
        except Exception:  # whatever it is, the reads themselves meet it again, and say what was read
            return
        for window, content in zip(group, contents, strict=True):
            first = window[0][1]
            if isinstance(content, bytes) and len(content) == window[-1][2] - first:
                for url, begin, end in window:
                    _pages.keep(url, begin, content[begin - first : end - first])


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
        if begins[at : at + 1] == [begin]:  # a longer one, or it would not have been asked for
            self._kept_bytes -= len(contents[at])
            contents[at] = content
        else:
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
_folders: set[str] = set()
"""What was ever listed: what lies in these is asked of their listings again, not object by object."""

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
        filesystem, _ = fsspec.url_to_fs(url, **FILESYSTEM_OPTIONS.get(scheme, {}))
    except ImportError as error:
        package = NEEDED_PACKAGES.get(scheme)
        raise CkptEmaError(
            f"reading `{url}` needs a package that is not installed: {_reason(error)}",
            hint=f"pip install '{package}'" if package else None,
        ) from error
    except Exception as error:
        raise CkptEmaError(f"cannot reach `{url}`: {_reason(error)}", may_pass=True) from error
    # fsspec keeps filesystems and their listings for as long as the process lives.
    filesystem.invalidate_cache()
    return filesystem


def _ask(request: Callable[[], Result], what_fails: str) -> Result:
    """Carry out a request, again where it fails for a reason that may pass.

    Raises FileNotFoundError where there is nothing, and CkptEmaError for what remains: filesystems raise errors of
    their own libraries, which have no common kind.
    """
    for attempt in range(MAX_TRIES):
        started = time.monotonic()
        try:
            return request()
        except FileNotFoundError:
            raise
        except Exception as error:
            stays = isinstance(error, (PermissionError, NotImplementedError, ValueError, TypeError))
            if stays or attempt == MAX_TRIES - 1 or time.monotonic() - started > PATIENCE_SECONDS:
                raise CkptEmaError(f"{what_fails}: {_reason(error)}", may_pass=not stays) from error
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
