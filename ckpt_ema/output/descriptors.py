"""Opening what is written: a path in, a descriptor that is no standard stream's out."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

FIRST_BESIDE_STREAMS = 3
"""The first number after stdin, stdout and stderr."""


def open_beside_streams(path: Path, flags: int) -> int:
    """Open `path` as `os.open` does, closed on exec, with the mode that the umask leaves; above the standard streams.

    Where one of these is closed, the next file to be opened gets its number, and with it whatever libraries print.
    Raises OSError.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    if descriptor >= FIRST_BESIDE_STREAMS:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, FIRST_BESIDE_STREAMS)
    finally:
        os.close(descriptor)
