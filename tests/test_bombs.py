"""Small files that would take hours or all memory: each is read or refused within seconds and a gigabyte."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import ckpt_ema
from ckpt_ema.formats.pickle_scan import scan_pickle
from tests.test_hostile_files import global_, storage, tensor, text, write_safetensors, write_zip

MAX_SECONDS = 10
MAX_BYTES = 1 << 30

# Peaks of a process of its own, without what importing the package took.
READER = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from ckpt_ema.errors import CkptEmaError
import ckpt_ema.inspection
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
begin = time.process_time()
try:
    ckpt_ema.inspection.inspect(Path(sys.argv[2]))
    end = "read"
except CkptEmaError as error:
    end = "refused: " + error.message[-150:]
# What a trial took came before what was read here, and was held beside what had been scanned.
trial = resource.getrusage(resource.RUSAGE_CHILDREN)
seconds = time.process_time() - begin + trial.ru_utime + trial.ru_stime
child = trial.ru_maxrss
print(seconds, max(peak() - before, child) << 10, end.encode("ascii", "replace").decode(), sep="|")
"""


def read_apart(path: Path) -> tuple[float, int, str]:
    """Seconds of processor time, bytes of memory and the end of reading one checkpoint in a process of its own."""
    command = [sys.executable, "-c", READER, str(Path(ckpt_ema.__file__).parents[1]), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, peak, end = done.stdout.split("|", 2)
    return float(seconds), int(peak), end


def put(index: int) -> bytes:
    """LONG_BINPUT."""
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    """LONG_BINGET."""
    return b"j" + struct.pack("<I", index)


def shared(opcodes: bytes, levels: int = 60) -> bytes:
    """A tuple of two of the same tuple, and so on; stays on the stack."""
    one = b")" + put(0)
    for level in range(levels):
        one += b"0" + get(level) * 2 + opcodes + put(level + 1)
    return one


def chained(levels: int = 60) -> bytes:
    """The same without leaving the stack: the next tuple is made behind each PUT."""
    return b")" + b"".join(put(level) + get(level) + b"\x86" for level in range(levels))


def wide(levels: int = 12) -> bytes:
    """Few levels, each with a hundred of the one below."""
    one = b")" + put(0)
    for level in range(levels):
        one += b"0(" + get(level) * 100 + b"t" + put(level + 1)
    return one


def memoized(levels: int = 60) -> bytes:
    """The same by MEMOIZE."""
    return b")\x94" + b"".join(b"h" + bytes([level]) + b"\x86\x94" for level in range(levels))


def colliding(count: int) -> bytes:
    """A table whose keys are integers of one hash."""
    keys = (8 * (2**61 - 1) * number for number in range(1, count))
    return b"}(" + b"".join(b"\x8a\x0b" + key.to_bytes(11, "little") + b"N" for key in keys) + b"u"


def same_places(count: int) -> bytes:
    """A full half of a table, and keys that are looked for in it from end to end."""
    size = 1 << (3 * count // 2).bit_length()
    slots, slot = [], 1
    for _ in range(count // 2):
        slots.append(slot)
        slot = (slot * 5 + 1) % size
    taken = set(slots)
    found: list[int] = []
    number = size * 17 + slots[0]
    while len(found) < 100:
        number += size
        at, perturb = number % size, number
        for _ in range(8):
            if at not in taken:
                break
            perturb >>= 5
            at = (at * 5 + perturb + 1) % size
        else:
            found.append(number)
    ints = b"".join(b"J" + struct.pack("<i", value) + b"N" for value in slots)
    again = b"".join(b"J" + struct.pack("<i", value & 0x7FFFFFFF) + b"N" for value in found)
    return b"}(" + ints + again * (count // 200) + b"u"


def keys_of(code: bytes) -> dict[str, bytes]:
    """Every way of making a stranger hash what `code` leaves on the stack."""
    return {
        "SETITEM": b"}" + code + b"Ns",
        "DICT": b"(" + code + b"Nd",
        "SETITEMS": b"}(" + code + b"Nu",
        "ADDITEMS": b"\x8f(" + code + b"\x90",
        "FROZENSET": b"(" + code + b"\x91",
        "OrderedDict of pairs": global_("collections.OrderedDict") + b"(]]" + code + b"aNaatR",
        "set of a list": global_("builtins.set") + b"(]" + code + b"atR",
        "frozenset of a list": global_("builtins.frozenset") + b"(]" + code + b"atR",
        "Inert": global_("a.B") + b")R" + code + b"Ns",
        "keywords": global_("a.B") + b")}" + code + b"Ns\x92",
    }


BOMBS: dict[str, Callable[[], bytes]] = {
    **{
        f"{name}: {kind}": lambda code=code: code
        for kind, one in (("shared", shared(b"\x86")), ("wide", wide()))
        for name, code in keys_of(one).items()
    },
    "chained": lambda: b"}" + chained() + b"Ns",
    "frozensets that share": lambda: b"}(" + b"(K\x01\x91" + put(0) + b"".join(
        b"0(" + get(n) + b"(" + get(n) + b"t" + b"\x91" + put(n + 1) for n in range(60)) + b"Nu",
    "DUP": lambda: b"})" + b"2\x86" * 60 + b"Ns",
    "parameter": lambda: b"}" + global_("torch._utils._rebuild_parameter") + b"(" + shared(b"\x86") + b"\x88}tRNs",
    "tensor of tuples": lambda: b"}" + tensor() + b"Ns",
    "storage as a key": lambda: b"}" + storage() + b"Ns",
    "integers of one hash": lambda: colliding(300_000),
    "integers of one place": lambda: same_places(200_000),
    "tables": lambda: b"(" + b"}" * 200_000_000 + b"l",
    "tables, few enough to be loaded": lambda: b"(" + b"}" * 6_000_000 + b"l",
    "lists": lambda: b"(" + b"]" * 100_000_000 + b"l",
    "sets": lambda: b"(" + b"\x8f" * 6_000_000 + b"l",
    "frozensets": lambda: b"(" + b"(\x91" * 3_000_000 + b"l",
    "nested tables": lambda: b"}" + b"N}" * 5_000_000 + b"s" * 5_000_000,
    "nested lists": lambda: b"]" * 3_000_000 + b"a" * 2_999_999,
    "nested tuples": lambda: b"}" + b")" + b"\x85" * 900_000 + b"Ns",
    "objects": lambda: global_("a.B") + put(0) + b"(" + (get(0) + b")\x81") * 5_000_000 + b"l",
    "short texts": lambda: b"(" + b"U\x01a" * 1_400_000 + b"l",
    "wide text": lambda: text("a" * 100_000_000 + "\U0001f600"),
    "long texts compared": lambda: b"}" + text("a" * 50_000_000) + b"Ns("
    + text("a" * 50_000_000) + put(0) + b"N" + (get(0) + b"N") * 300_000 + b"u",
    "distinct fetches": lambda: b"(" + b"".join(b"N" + put(n) + get(n) for n in range(700_000)) + b"l",
    "puts of names": lambda: b"(" + b"".join(b"U\x01a" + put(n) for n in range(1_400_000)) + b"l",
    "arguments copied": lambda: b"(" + b"N" * 900 + b"t" + put(0) + global_("a.B") + put(1)
    + b"(" + (get(1) + get(0) + b"R") * 500_000 + b"l",
    "classes": lambda: b"(" + b"".join(b"ca\nb%d\n" % n for n in range(1_000_000)) + b"l",
    "numpy scalars": lambda: global_("numpy.core.multiarray.scalar") + put(0) + global_("numpy.dtype")
    + b"(U\x02i8\x89\x88tR" + put(1) + b"}("
    + b"".join(get(0) + get(1) + b"U\x08" + struct.pack("<q", n) + b"\x86RN" for n in range(300_000)) + b"u",
    "one place of the memo": lambda: b"})" + put(1) + (get(1) + b"\x86" + put(1)) * 60 + b"Ns",
    "copies of a list": lambda: b"](" + b"N" * 1_000_000 + b"e" + put(1) + b"("
    + (global_("builtins.list") + get(1) + b"\x85R") * 20_000 + b"l",
    "copies of a text": lambda: text("x" * 1_000_000) + put(1) + b"("
    + (global_("_codecs.encode") + get(1) + b"\x85R") * 20_000 + b"l",
    "long names of classes": lambda: text("x" * 1_000_000) + put(1) + b"("
    + b"".join(get(1) + text(str(n)) + b"\x93" for n in range(20_000)) + b"l",
    # Read in portions, the operand of LONG_BINPUT would begin where the frame ends: a memo of 13 GB.
    "a frame that ends within an operand": lambda: b"\x95" + struct.pack("<Q", 4) + b"]r\0\0" + b"\0\0N0",
    "entries beside a tensor": lambda: b"}(" + text("w") + tensor()
    + b"".join(text(f"e{n}") + b"N" for n in range(700_000)) + b"u",
    "long numbers": lambda: b"(" + (b"I" + b"9" * 3990 + b"\n") * 25_000 + b"l",
}  # fmt: skip


# Those that take seconds, one of a kind; `python -m tests.test_bombs` reads all of them.
READ_APART = (
    "FROZENSET: wide",
    "SETITEM: shared",
    "a frame that ends within an operand",
    "distinct fetches",
    "entries beside a tensor",
    "integers of one place",
    "long texts compared",
    "nested tables",
    "nested tuples",
    "sets",
    "tables, few enough to be loaded",
)


def directory_of(count: int) -> bytes:
    """A zip of nothing but a directory."""
    entries = b"".join(
        b"PK\x01\x02" + struct.pack("<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, number)
        + b"%07d" % number
        for number in range(count)
    )  # fmt: skip
    end64 = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(entries), count + 64)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, count + 64 + len(entries), 1)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return b"PK\x03\x04" + bytes(count + 60) + entries + end64 + locator + end


def write_shared_pieces(folder: Path, count: int) -> Path:
    """A `.metadata` of `count` tensors that have one list of `count` pieces: some 200 kB."""
    dcp.save({"w": torch.ones(3)}, checkpoint_id=str(folder), no_dist=True)
    table = pickle.loads((folder / ".metadata").read_bytes())
    nothing = ChunkStorageMetadata(torch.Size([0]), torch.Size([0]))
    chunks = table.state_dict_metadata["w"].chunks + [nothing] * count
    one = TensorStorageMetadata(TensorProperties(), torch.Size([3]), chunks)
    [place] = table.storage_data.values()
    for number in range(count):
        table.state_dict_metadata[f"z{number}"] = one
        table.storage_data[MetadataIndex(f"z{number}", torch.Size([0]), 0)] = place
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    return folder


def write_bomb(folder: Path, name: str) -> Path:
    """A checkpoint that is one of the bombs below."""
    if name in BOMBS:
        return write_zip(folder / "step_1.pt", BOMBS[name]())
    path = folder / "step_1.safetensors"
    lists = b'{"a":[' + b"[]," * 30_000_000 + b"[]]}"
    if name == "lists in a header":
        return write_safetensors(path, lists)
    if name == "short header":
        return write_safetensors(path, b'{"a":[' + b"[]," * 2_000_000 + b"[]]}")
    if name == "wide letters in a header":
        return write_safetensors(path, b'{"a":"' + b"a" * 90_000_000 + "\U0001f600".encode() + b'"}')
    if name == "lists in an index":
        folder.joinpath("model").mkdir()
        folder.joinpath("model/model.safetensors.index.json").write_bytes(lists[:60_000_000] + b"[]]}")
        return folder / "model"
    if name == "pieces that tensors share":
        return write_shared_pieces(folder / "step_1", 3000)
    path = folder / "step_1.pt"
    path.write_bytes(directory_of(1_200_000 if name == "records" else 4_000_000))
    return path


OTHERS = (
    "lists in a header",
    "short header",
    "wide letters in a header",
    "lists in an index",
    "pieces that tensors share",
    "records",
    "too many records",
)


@pytest.mark.parametrize("name", [*READ_APART, *OTHERS])
def test_a_bomb_takes_no_more_than_seconds_and_a_gigabyte(tmp_path: Path, name: str) -> None:
    """Whatever a file makes its reader hash or hold."""
    seconds, peak, end = read_apart(write_bomb(tmp_path, name))
    assert seconds < MAX_SECONDS, end
    assert peak < MAX_BYTES, end


@pytest.mark.parametrize("name", sorted(name for name in BOMBS if ": " in name and "a list" not in name))
def test_tuples_that_share_parts_are_tried_first(name: str) -> None:
    """Wherever they are hashed."""
    assert scan_pickle(b"\x80\x02" + BOMBS[name]() + b".").is_costly


if __name__ == "__main__":
    for each in sorted({*BOMBS, *OTHERS}):
        with tempfile.TemporaryDirectory() as made:
            seconds, peak, end = read_apart(write_bomb(Path(made), each))
        print(f"{each:40} {seconds:6.2f} s {peak >> 20:5} MiB  {end.strip()[-100:]}", flush=True)
