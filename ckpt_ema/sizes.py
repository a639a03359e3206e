"""Sizes as people write them: `256MiB` in, bytes out, and back."""

from __future__ import annotations

import re

DEFAULT_MEMORY_BUDGET_BYTES = 256 << 20

MAX_COUNT = 1 << 53
"""Steps and the like stay below: beyond, whole numbers are no numbers of float64 any more."""

_UNITS = {
    "": 1,
    "b": 1,
    "k": 1 << 10,
    "kib": 1 << 10,
    "kb": 1000,
    "m": 1 << 20,
    "mib": 1 << 20,
    "mb": 1000**2,
    "g": 1 << 30,
    "gib": 1 << 30,
    "gb": 1000**3,
    "t": 1 << 40,
    "tib": 1 << 40,
    "tb": 1000**4,
}


def counted(number: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class SizeError(ValueError):
    """A text that is no size."""


def parse_size(text: str) -> int:
    """Bytes of `256MiB`, `1.5G`, `2GB`, `4096`; a bare letter means the power of two."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if not match or match[2].lower() not in _UNITS:
        raise SizeError(f"{text!r} is no size; write for example 256MiB or 2GB")
    num_bytes = float(match[1]) * _UNITS[match[2].lower()]
    if num_bytes >= 2**63:
        raise SizeError(f"{text[:40]!r} is more memory than there is")
    return int(num_bytes)


def format_size(num_bytes: float) -> str:
    """`256MiB`, `1.32GiB`, `512B`: at most four digits."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while num_bytes >= 1024 and len(units) > 1:
        num_bytes /= 1024
        units.pop(0)
    text = f"{num_bytes:.0f}" if num_bytes >= 100 or num_bytes == int(num_bytes) else f"{num_bytes:.2f}"
    return f"{text}{units[0]}"


DURATIONS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """Seconds in `90`, `90s`, `10m`, `1.5h` or `2d`; raises SizeError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in DURATIONS:
        raise SizeError(f"{text!r} is no time; pass for example 10m, 90s or 2h")
    return float(match[1]) * DURATIONS[match[2]]
