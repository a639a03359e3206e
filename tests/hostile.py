"""Checkpoints spoiled at random: a target and a source of chance in, the bytes of a file and what reading it did out.

Whatever is neither read nor refused with the tool's own error is a finding, and so is whatever takes seconds, opens a
file outside of the input's folder, starts a process or imports a module.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import pickletools
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ckpt_ema.cli import terminal
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.formats import pickle_trial, read_contents, reading_tables, torch_save
from ckpt_ema.formats.pickle_scan import MalformedPickleError
from ckpt_ema.inspection import inspect
from ckpt_ema.runs.students import choose_student

MAX_SECONDS = 10
MAX_INPUT_BYTES = 64 << 10

Input = dict[str, bytes]
"""The files of one checkpoint by name; a single one called `step_1...` is the checkpoint itself."""


# --- the tripwire ------------------------------------------------------------------------------------------------

FORBIDDEN = ("os.system", "os.exec", "os.spawn", "os.fork", "os.remove", "os.rename", "os.mkdir")
FORBIDDEN += ("os.rmdir", "os.chmod", "os.link", "os.symlink", "os.kill", "exec", "compile", "socket.connect")
FORBIDDEN += ("ctypes.dlopen", "marshal.loads", "code.__new__", "shutil.rmtree", "pickle.find_class", "import", "open")
OWN_CHILD = [sys.executable, "-I", "-c", pickle_trial._CHILD]


class _Tripwire:
    """What was done while a file was read that no reader does; an audit hook cannot be taken off, so there is one."""

    def __init__(self) -> None:
        self.folder = ""
        self.violations: list[str] = []
        self.is_installed = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder:
            return
        if event in ("subprocess.Popen", "os.posix_spawn"):  # from Python 3.13 on the one does the other
            if list(arguments[1])[:4] != OWN_CHILD:
                self.violations.append(f"{event} {arguments!r:.300}")
        elif event in FORBIDDEN:
            if event == "open" and (isinstance(arguments[0], int) or self._may_open(os.fsdecode(arguments[0]))):
                return
            if event == "import" and arguments[0].startswith("encodings"):
                return
            if event == "pickle.find_class":  # asked of C before our own method answers: nothing is imported by it
                return
            if event == "exec" and getattr(arguments[0], "co_filename", "").endswith("encodings/__init__.py"):
                return
            self.violations.append(f"{event} {arguments!r:.300}")

    def _may_open(self, path: str) -> bool:
        inside = path == self.folder or (path.startswith(self.folder + "/") and "/.." not in path)
        return inside or path == os.devnull or "/encodings/" in path

    @contextlib.contextmanager
    def armed(self, folder: Path) -> Iterator[None]:
        if not self.is_installed:
            sys.addaudithook(self)
            self.is_installed = True
        self.folder = str(folder)
        try:
            yield
        finally:
            self.folder = ""


TRIPWIRE = _Tripwire()


class Finding(Exception):  # noqa: N818  (none is an error of whoever raises it)
    """What no file may bring about."""


@contextlib.contextmanager
def few_trials(every: int) -> Iterator[list[int]]:
    """Most pickles that would be tried apart refused at once, since starting a process takes longer than a thousand.

    Yields how many were refused so.
    """
    try_pickle = torch_save.try_pickle
    skipped = [0]
    met = 0

    def seldom(content: bytes, num_tuples: int) -> None:
        nonlocal met
        met += 1
        if met % every == 0:
            try_pickle(content, num_tuples)
        else:
            skipped[0] += 1
            raise MalformedPickleError("not tried")

    torch_save.try_pickle = seldom
    try:
        yield skipped
    finally:
        torch_save.try_pickle = try_pickle


class _TooSlow(BaseException):
    """More time than any file may take."""


def _stop(*_: Any) -> None:
    raise _TooSlow


def write_input(files: Input, folder: Path) -> Path:
    """The path of a checkpoint whose files now lie in `folder`."""
    for name, content in files.items():
        with open(folder / name, "wb") as file:
            file.write(content)
    (name, *others) = files
    return folder if others else folder / name


def read_input(path: Path, *, keep_tables: bool = False) -> bool:
    """Whether a checkpoint is read, as `inspect` does; raises Finding where it is neither read nor refused."""
    before = signal.signal(signal.SIGALRM, _stop)
    begin = time.monotonic()
    TRIPWIRE.violations.clear()
    # The second kills: a call into C never comes back to raise anything.
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    signal.setitimer(signal.ITIMER_VIRTUAL, 2 * MAX_SECONDS)
    try:
        with TRIPWIRE.armed(path if path.is_dir() else path.parent):
            if keep_tables:
                choose_student(read_contents(path))
            else:
                inspect(path)
        return True
    except CkptEmaError as error:
        str(error).encode("utf-8", terminal._NAMES)  # as it is printed
        return False
    except _TooSlow:
        raise Finding(f"took more than {MAX_SECONDS} s") from None
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {error}"[:300]) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGALRM, before)
        if TRIPWIRE.violations:
            raise Finding(TRIPWIRE.violations[0])
        if time.monotonic() - begin > MAX_SECONDS:
            raise Finding(f"took {time.monotonic() - begin:.1f} s")


# --- seeds -------------------------------------------------------------------------------------------------------


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 3))
        self.register_buffer("mean", torch.zeros(3), persistent=False)


def _states() -> list[Any]:
    tied = torch.arange(6.0).reshape(2, 3)
    plain = {"a.weight": tied, "b.weight": tied.T, "c": torch.zeros(2, dtype=torch.bfloat16)}
    wide = {
        "model": {"w": torch.nn.Parameter(torch.ones(2)), "n": torch.tensor(3)},
        "optimizer": {
            "state": {0: {"step": 3, "exp_avg": torch.ones(2)}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        "step": 70000,
        "loss": [0.5, -1e9],
        "shape": torch.Size([2, 3]),
        "names": {"x", ("y", 2)},
        "large": 1 << 70,
        "scalar": torch.tensor([1.5]).numpy()[0],
    }
    return [plain, wide, {"student": _Net(), "epoch": 4}]


def _saved(state: Any, *, legacy: bool = False, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def _zip_of(records: dict[str, bytes]) -> bytes:
    """A zip without checksums, which no reader asks for."""
    body, directory = [], []
    position = 0
    for name, content in records.items():
        encoded = b"archive/" + name.encode()
        header = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0, 0, len(content), len(content), len(encoded), 0)
        directory.append(
            b"PK\x01\x02" + struct.pack("<H", 20) + header + struct.pack("<HHHII", 0, 0, 0, 0, position) + encoded
        )
        body += [b"PK\x03\x04", header, encoded, content]
        position += 30 + len(encoded) + len(content)
    table = b"".join(directory)
    end = struct.pack("<HHHHIIH", 0, 0, len(records), len(records), len(table), position, 0)
    return b"".join(body) + table + b"PK\x05\x06" + end


def _records(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def _dcp_seed() -> Input:
    import torch.distributed.checkpoint as dcp

    folder = Path(tempfile.mkdtemp())
    try:
        state = {"model": {"w": torch.ones(4, 2), "b": torch.zeros(3)}, "step": 7}
        dcp.save(state, checkpoint_id=str(folder), no_dist=True)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    finally:
        shutil.rmtree(folder)


def make_seeds(target: str) -> list[Input]:
    """Small checkpoints that are read."""
    plain = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}
    if target == "safetensors":
        return [
            {"step_1.safetensors": save(plain, metadata=metadata)} for metadata in (None, {"format": "pt", "x": "1"})
        ]
    if target in ("zip", "pickle"):
        protocols = (2,) if target == "zip" else (2, 4)
        return [{"step_1.pt": _saved(state, protocol=protocol)} for state in _states() for protocol in protocols]
    if target == "legacy":
        # A whole module is stored with its source text there, which is not read.
        return [{"step_1.pt": _saved(state, legacy=True)} for state in _states()[:2]]
    if target == "dcp":
        return [_dcp_seed()]
    shard = save(plain)
    index = {"metadata": {"total_size": 28}, "weight_map": dict.fromkeys(plain, "model-00001-of-00001.safetensors")}
    files = {"model.safetensors.index.json": json.dumps(index).encode(), "model-00001-of-00001.safetensors": shard}
    trainer = json.dumps({"global_step": 3, "epoch": 0.5, "log_history": [{"step": 1, "loss": 2.0}]}).encode()
    return [files, {**files, "trainer_state.json": trainer}]


# --- mutations ---------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1]
NUMBERS += [2**63, 2**64 - 1]


def mutate_bytes(content: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, taken away, doubled, or replaced by an integer at a border."""
    spoiled = bytearray(content)
    for _ in range(1 + int(chance.expovariate(0.7))):
        at = chance.randrange(len(spoiled) + 1)
        kind = chance.randrange(6)
        if kind == 0 and at < len(spoiled):
            spoiled[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(spoiled):
            spoiled[at] = chance.randrange(256)
        elif kind == 2:
            width = chance.choice((1, 2, 4, 8))
            value = chance.choice(NUMBERS) % (1 << 8 * width)
            spoiled[at : at + width] = value.to_bytes(width, "little")
        elif kind == 3:
            del spoiled[at : at + 1 + int(chance.expovariate(0.2))]
        elif kind == 4:
            begin = chance.randrange(len(spoiled) + 1)
            spoiled[at:at] = spoiled[begin : begin + 1 + int(chance.expovariate(0.1))]
        else:
            begin = chance.randrange(len(spoiled) + 1)
            part = spoiled[begin : begin + 1 + int(chance.expovariate(0.1))]
            spoiled[at : at + len(part)] = part
    return bytes(spoiled[:MAX_INPUT_BYTES])


TOKENS = [b"[", b"]", b"{", b"}", b",", b":", b'""', b"null", b"true", b"-1", b"1e999", b"NaN", b"0", b"1", b"12"]
TOKENS += [b"4611686018427387904", b"9223372036854775808", b"[" * 50, b'"\xff"', b'"\\ud800"', b'"a\\u0000b"']
TOKENS += [b'"../../etc/passwd"', b'"/etc/passwd"', b'".."', b'"F32"', b'"BF16"', b'"__metadata__"', b'"dtype"']
TOKENS += [b'"shape"', b'"data_offsets"', b'"weight_map"', b'"step_1.safetensors"']
CODES = [bytes([code]) for code in range(128, 152)] + [bytes([code]) for code in b"(.012NQR]})abdelostu"]
CODES += [b"h\x00", b"h\x01", b"h\x02", b"q\x00", b"q\x01", b"r\x00\x01\x00\x00", b"j\x00\x01\x00\x00", b"\x94"]
CODES += [b"K\x00", b"K\x02", b"J\xff\xff\xff\xff", b"I-1\n", b"\x8a\x09" + b"\xff" * 8 + b"\x7f"]
CODES += [b"G\x7f\xf8" + bytes(6), b"X\x01\x00\x00\x00a", b"U\x02id", b"ctorch\nSize\n", b"ctorch\nfloat16\n"]
CODES += [b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n", b"cantigravity\nfly\n", b"(ios\nsystem\n"]
CODES += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"ctorch\nHalfStorage\n"]
CODES += [b"ctorch._tensor\n_rebuild_from_type_v2\n", b"cnumpy.core.multiarray\nscalar\n"]
CODES += [b"\x8c\x02os\x8c\x06system\x93", b"X\x10\x00\x00\x00../../etc/passwd"]


def split_tokens(text: bytes) -> list[bytes]:
    """A JSON text cut where a value may end."""
    parts: list[bytes] = []
    for byte in text:
        letter = bytes([byte])
        if parts and letter not in b'[]{},:"' and parts[-1][-1:] not in b"[]{},:":
            parts[-1] += letter
        else:
            parts.append(letter)
    return parts


def split_opcodes(content: bytes) -> list[bytes]:
    """The operations of the pickle that `content` starts with, and whatever is behind it."""
    positions = [position for _, _, position in pickletools.genops(content)]
    ends = [*positions[1:], positions[-1] + 1]
    return [content[a:b] for a, b in zip(positions, ends, strict=True)]


def mutate_parts(parts: list[bytes], others: list[bytes], chance: random.Random) -> bytes:
    """Some parts taken away, doubled, exchanged, or put in from others."""
    spoiled = list(parts)
    for _ in range(1 + int(chance.expovariate(0.5))):
        at = chance.randrange(len(spoiled) + 1)
        kind = chance.randrange(7)
        if kind == 0:
            del spoiled[at : at + 1 + int(chance.expovariate(0.5))]
        elif kind == 1:
            begin = chance.randrange(len(spoiled) + 1)
            spoiled[at:at] = spoiled[begin : begin + 1 + int(chance.expovariate(0.2))]
        elif kind == 2:
            spoiled.insert(at, chance.choice(others))
        elif kind == 3 and at < len(spoiled):
            spoiled[at] = chance.choice(others)
        elif kind == 4 and at < len(spoiled):
            spoiled[at] = mutate_bytes(spoiled[at], chance)
        elif kind == 5 and at < len(spoiled):
            other = chance.randrange(len(spoiled))
            spoiled[at], spoiled[other] = spoiled[other], spoiled[at]
        elif at < len(spoiled):
            spoiled[at:at] = [spoiled[at]] * chance.choice((1, 2, 9, 70, 300))
    return b"".join(spoiled)[:MAX_INPUT_BYTES]


def _mutate_some(seed: Input, name: str, spoil: Callable[[], bytes], chance: random.Random) -> Input:
    return {**seed, name: mutate_bytes(seed[name], chance) if chance.random() < 0.1 else spoil()}


class Mutator:
    """The seeds of one target, cut into parts, and files made of them."""

    def __init__(self, target: str, seed: int) -> None:
        self.target = target
        self.chance = random.Random(f"{target} {seed}")
        self.seeds = make_seeds(target)
        self._parts = [self._cut(files) for files in self.seeds]

    def _cut(self, files: Input) -> Any:
        if self.target == "safetensors":
            (content,) = files.values()
            end = 8 + struct.unpack("<Q", content[:8])[0]
            return split_tokens(content[8:end]), content[end:]
        if self.target == "pickle":
            records = _records(files["step_1.pt"])
            return split_opcodes(records["data.pkl"]), records
        if self.target == "legacy":
            (content,) = files.values()
            pickles = []
            for _ in range(5):
                pickles.append(split_opcodes(content))
                content = content[sum(map(len, pickles[-1])) :]
            return pickles, content
        if self.target == "dcp":
            return split_opcodes(files[".metadata"])
        return {name: split_tokens(content) for name, content in files.items() if name.endswith(".json")}

    def make(self) -> Input:
        """The next file."""
        chance = self.chance
        number = chance.randrange(len(self.seeds))
        files, parts = self.seeds[number], self._parts[number]
        if self.target == "safetensors":
            name = "step_1.safetensors"
            if chance.random() < 0.1:
                return {name: mutate_bytes(files[name], chance)}
            header = mutate_parts(parts[0], TOKENS, chance)
            return {name: struct.pack("<Q", len(header)) + header + parts[1]}
        if self.target == "zip":
            content = files["step_1.pt"]
            # Mostly the directory, of which a file has more than of anything else once its tensors are small.
            begin = content.find(b"PK\x01\x02") if chance.random() < 0.8 else 0
            return {"step_1.pt": content[:begin] + mutate_bytes(content[begin:], chance)}
        if self.target == "pickle":
            return {"step_1.pt": _zip_of({**parts[1], "data.pkl": mutate_parts(parts[0], CODES, chance)})}
        if self.target == "legacy":
            if chance.random() < 0.1:
                return {"step_1.pt": mutate_bytes(files["step_1.pt"], chance)}
            chosen = chance.choice((0, 1, 2, 3, 3, 3, 3, 4, 5))
            pickles = [
                mutate_parts(one, CODES, chance) if place == chosen else b"".join(one)
                for place, one in enumerate(parts[0])
            ]
            return {"step_1.pt": b"".join(pickles) + (mutate_bytes(parts[1], chance) if chosen == 5 else parts[1])}
        if self.target == "dcp":
            if chance.random() < 0.2:
                name = next(name for name in files if name.endswith(".distcp"))
                return {**files, name: mutate_bytes(files[name], chance)}
            return _mutate_some(files, ".metadata", lambda: mutate_parts(parts, CODES, chance), chance)
        name = chance.choice(sorted(parts))
        return _mutate_some(files, name, lambda: mutate_parts(parts[name], TOKENS, chance), chance)


TARGETS = ("safetensors", "zip", "pickle", "legacy", "dcp", "index")


def warm_up(target: str, folder: Path) -> None:
    """Read the seeds, so that everything is imported that reading takes; all of them are readable."""
    subprocess.run([sys.executable, "-I", "-c", ""], check=True)
    for name in ("utf-8-sig", "utf-16-be", "utf-16-le", "utf-16", "utf-32-be", "utf-32-le", "utf-32", "latin-1"):
        codecs.lookup(name)
    for name in ("raw-unicode-escape", "unicode-escape", "ascii", "idna", "cp437"):
        codecs.lookup(name)
    with reading_tables():
        for files in make_seeds(target):
            read_contents(write_input(files, folder))
            clear(folder)


def clear(folder: Path) -> None:
    """Remove the files of an input."""
    for entry in os.scandir(folder):
        os.unlink(entry.path)
