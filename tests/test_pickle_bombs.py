"""Pickles made to take time or memory: each is read or refused within 10 s and 1 GB."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_hostile_files import global_, table, tensor, text, write_zip

MAX_SECONDS = 10
MAX_BYTES = 1 << 30

# Reads the file and says by how many bytes that raised the peak, its own or that of the processes it started.
MEASURED = """
import resource, sys
from pathlib import Path
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.formats import read_contents
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_contents(Path(sys.argv[1]))
except CkptEmaError:
    pass
own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print((own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) << 10)
"""


def put(index: int) -> bytes:
    """LONG_BINPUT."""
    return b"r" + index.to_bytes(4, "little")


def get(index: int) -> bytes:
    """LONG_BINGET."""
    return b"j" + index.to_bytes(4, "little")


def doubled(first: bytes, index: int, levels: int, make: bytes = b"\x86") -> bytes:
    """An object that holds the one below twice, `levels` deep, each in a place of the memo of its own."""
    code = first + put(index)
    for level in range(index, index + levels):
        # Left on the stack below: taken away by POP_MARK in the end.
        code += get(level) + get(level) + make + put(level + 1)
    return b"(" + code + b"1" + get(index + levels)


def long_int(value: int) -> bytes:
    """LONG1."""
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


SHARED = doubled(b")", 1, 60)
BIG_LIST = b"](" + b"N" * 1_000_000 + b"e" + put(1) + b"0"
BIG_TUPLE = b"(" + b"N" * 1_000_000 + b"t" + put(1) + b"0"
BOMBS: dict[str, bytes] = {
    "shared tuples as a key": b"}" + SHARED + b"Ns",
    "shared tuples as a key of several": b"}(" + SHARED + b"Nu",
    "shared tuples as a key by DICT": b"(" + SHARED + b"Nd",
    "shared tuples in a set": b"\x8f(" + SHARED + b"\x90",
    "shared tuples in a frozenset": b"(" + SHARED + b"\x91",
    "shared tuples as a key of an OrderedDict": global_("collections.OrderedDict") + b")R" + SHARED + b"Ns",
    "shared tuples as a key of an inert object": global_("a.B") + b")R" + SHARED + b"Ns",
    "shared tuples in pairs": global_("collections.OrderedDict") + b"((" + SHARED + b"NllltR",
    "shared tuples as a parameter": b"}"
    + (global_("torch._utils._rebuild_parameter") + b"(" + SHARED + b"\x89NtR")
    + b"Ns",
    "shared tuples by DUP": b"})" + b"2\x86" * 60 + b"Ns",
    "shared tuples in one place of the memo": b"})" + put(1) + (get(1) + b"\x86" + put(1)) * 60 + b"Ns",
    "shared sets made of lists": b"}" + doubled(b")", 1, 60, b"\x86") + b"\x85" + b"Ns",
    "integers of one hash": b"}(" + b"".join(long_int(k * ((1 << 61) - 1)) + b"N" for k in range(100, 100_000)) + b"u",
    "a long integer as many keys": b"}(\x8b" + (1_000_000).to_bytes(4, "little") + b"\x01" * 1_000_000 + put(1) + b"N"
    + (get(1) + b"N") * 100_000 + b"u",
    "a million digits": b"I" + b"9" * 1_000_000 + b"\n",
    "empty tables": b"](" + b"}" * 40_000_000 + b"e",
    "empty sets": b"](" + b"\x8f" * 20_000_000 + b"e",
    "classes": b"](" + b"".join(b"ca\n%d\n" % n for n in range(500_000)) + b"e",
    "copies of a list": BIG_LIST + b"](" + (global_("builtins.list") + get(1) + b"\x85R") * 20_000 + b"e",
    "copies of arguments": BIG_TUPLE + b"](" + (global_("a.B") + get(1) + b"R") * 20_000 + b"e",
    "copies of a text": text("x" * 1_000_000) + put(1) + b"0](" + (global_("_codecs.encode") + get(1) + b"\x85R") * 20_000
    + b"e",
    "long names of classes": text("x" * 1_000_000) + put(1) + b"0]("
    + b"".join(get(1) + text(str(n)) + b"\x93" for n in range(20_000)) + b"e",
    "texts without a letter": b"](" + b"U\x00" * 20_000_000 + b"e",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_a_bomb_is_read_or_refused_in_seconds(tmp_path: Path, name: str) -> None:
    """Whatever a pickle is made to cost, reading it takes less than 10 s and 1 GB, and ends without a traceback."""
    path = write_zip(tmp_path / "a.pt", table({"w": tensor(), "x": BOMBS[name]}))
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    seconds = time.perf_counter() - begin
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < MAX_BYTES
    assert seconds < MAX_SECONDS
