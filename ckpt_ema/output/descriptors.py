"""Descriptors of what is written: a path in, a number that no standard stream has out."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

FIRST_FREE = 3
"""After stdin, stdout and stderr."""


def open_beside_streams(path: Path, flags: int) -> int:
    """Open `path` as `os.open`, closed on exec, readable and writable as the umask lets; never as a standard stream.

    In a process that was started without one, the next file gets its number, and all that libraries say.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    if descriptor >= FIRST_FREE:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE)
    finally:
        os.close(descriptor)
