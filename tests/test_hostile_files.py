"""Files made to run code, to crash or to lie: each is refused with the tool's own error, and none of it ever runs."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckpt_ema
from ckpt_ema.dtypes import DTYPES
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.formats import Contents, pickles, read_contents
from ckpt_ema.runs.students import choose_student
from tests.conftest import Outcome, StateDict, assert_same_bits, hook_teacher, make_student

PACKAGE = Path(ckpt_ema.__file__).parent
# A module of the standard library that nothing here imports: whoever imports it ran a pickle.
CANARY = "antigravity"


# --- building blocks ---------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    """BINUNICODE."""
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def sizes(values: Iterable[int]) -> bytes:
    """A tuple of ints of any size."""
    return b"(" + b"".join(b"I%d\n" % value for value in values) + b"t"


def global_(qualified_name: str) -> bytes:
    """GLOBAL."""
    module, _, name = qualified_name.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def storage(key: str = "0", count: int = 4, kind: str = "FloatStorage") -> bytes:
    """A persistent reference to a storage."""
    return b"(" + text("storage") + global_(f"torch.{kind}") + text(key) + text("cpu") + b"I%d\n" % count + b"tQ"


def tensor(shape: Iterable[int] = (2, 2), strides: Iterable[int] = (2, 1), offset: int = 0, **options: Any) -> bytes:
    """What torch writes for a tensor, with any numbers in it."""
    return (
        global_("torch._utils._rebuild_tensor_v2")
        + b"("
        + storage(**options)
        + (b"I%d\n" % offset)
        + sizes(shape)
        + sizes(strides)
        + b"\x89}tR"
    )


def table(entries: Mapping[str, bytes]) -> bytes:
    """A dict of opcodes by name."""
    return b"}(" + b"".join(text(name) + code for name, code in entries.items()) + b"u"


def write_zip(path: Path, code: bytes, records: Mapping[str, bytes] | None = None) -> Path:
    """A torch.save zip around the pickle `code` (without PROTO and STOP)."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + code + b".")
        for name, content in (records if records is not None else {"data/0": bytes(16)}).items():
            archive.writestr(f"archive/{name}", content)
    return path


def write_legacy(path: Path, code: bytes, keys: tuple[str, ...] = ("0",), counts: tuple[int, ...] = (4,)) -> Path:
    """A legacy file around the pickle `code`."""
    content = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    content += pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2)
    content += b"\x80\x02" + code + b"." + pickle.dumps(list(keys), 2)
    for count in counts:
        content += struct.pack("<q", count) + bytes(16)
    path.write_bytes(content)
    return path


WRITERS: tuple[Callable[[Path, bytes], Path], ...] = (write_zip, write_legacy)


def read_whole(path: Path) -> Contents:
    """Everything that a plan does with one file: its table, its student, the range of each tensor."""
    contents = read_contents(path)
    choose_student(contents)
    return contents


def outcome(call: Callable[[], object]) -> CkptEmaError | None:
    """The tool's own error or None; whatever else is raised fails the test."""
    try:
        call()
    except CkptEmaError as error:
        return error
    return None


def write_safetensors(path: Path, header: object, content: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with any header."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + content)
    return path


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    """One tensor of a safetensors header."""
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def one_entry(begin: int) -> bytes:
    """An entry named `a`, as it stands in a header."""
    return b'"a":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}' % (begin, begin + 4)


ESCAPED = one_entry(0).replace(b"_", b"\\u005f")


# --- pickles that want to run ------------------------------------------------------------------------------------


def payloads(marker: Path) -> dict[str, bytes]:
    """Every way a pickle has of calling or importing something, each leaving `marker` or the canary if it does."""
    shell = f"touch {marker}"
    python = f"open({str(marker)!r}, 'w').close()"
    short = lambda value: b"\x8c" + bytes([len(value)]) + value.encode()  # noqa: E731  SHORT_BINUNICODE
    return {
        "os.system": global_("os.system") + b"(" + text(shell) + b"tR",
        "posix.system": global_("posix.system") + b"(" + text(shell) + b"tR",
        "subprocess": global_("subprocess.check_output") + b"((" + text("touch") + text(str(marker)) + b"ltR",
        "Popen by NEWOBJ": global_("subprocess.Popen") + b"(" + text("touch") + text(str(marker)) + b"l\x85\x81",
        "Popen by NEWOBJ_EX": global_("subprocess.Popen") + b")" + table({"args": text(shell)}) + b"\x92",
        "eval": global_("builtins.eval") + text(python) + b"\x85R",
        "exec": global_("builtins.exec") + text(python) + b"\x85R",
        "__builtin__.eval": global_("__builtin__.eval") + text(python) + b"\x85R",
        "INST": b"(" + text(shell) + b"ios\nsystem\n",
        "OBJ": b"(" + global_("os.system") + text(shell) + b"o",
        "getattr": global_("builtins.getattr")
        + global_("os.path")
        + text("os")
        + b"\x86R"
        + text("system")
        + b"\x86\x85",
        "getattr, called": global_("builtins.getattr")
        + (b"(" + global_("os.system") + text("__call__") + b"tR")
        + (text(shell) + b"\x85R"),
        "STACK_GLOBAL": text("os") + text("system") + b"\x93" + text(shell) + b"\x85R",
        "STACK_GLOBAL, dotted": short("os.path") + short("os.system") + b"\x93" + text(shell) + b"\x85R",
        "STACK_GLOBAL into a known module": short("torch._utils")
        + short("_rebuild_tensor_v2.__globals__")
        + b"\x93"
        + text(shell)
        + b"\x85R",
        "STACK_GLOBAL into our own": short("ckpt_ema.formats.pickles") + short("os.system") + b"\x93)R",
        "import": global_(f"{CANARY}.fly"),
        "import by INST": f"(i{CANARY}\nfly\n".encode(),
        "import by STACK_GLOBAL": short(CANARY) + short("fly.x.y") + b"\x93)R",
        "BUILD with a foreign __setstate__": global_("os.system") + b")R" + table({"x": text(shell)}) + b"b",
        "importlib": global_("importlib.import_module") + text(CANARY) + b"\x85R",
        "torch.load": global_("torch.load") + text(str(marker)) + b"\x85R",
        "load_from_bytes": global_("torch.storage._load_from_bytes")
        + (b"U" + bytes([len(python)]) + python.encode("latin-1"))
        + b"\x85R",
        "rebuild of a foreign function": global_("torch._tensor._rebuild_from_type_v2")
        + (b"(" + global_("os.system") + global_("torch.Tensor") + text(shell) + b"\x85}tR"),
        "key of a table": b"}" + global_("os.system") + text(shell) + b"\x85R" + text("x") + b"s",
        "shape of a tensor": global_("torch._utils._rebuild_tensor_v2")
        + (b"(" + storage() + b"K\x00" + global_("os.system") + text(shell) + b"\x85R" + sizes([1]) + b"\x89}tR"),
        "persistent reference": global_("os.system") + text(shell) + b"\x85RQ",
        "functools.partial": global_("functools.partial") + global_("os.system") + text(shell) + b"\x86R)R",
        "map over a list": global_("builtins.list")
        + global_("builtins.map")
        + (global_("os.system") + b"(" + text(shell) + b"l\x86R\x85R"),
    }


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", sorted(payloads(Path("marker"))))
def test_no_payload_ever_runs(tmp_path: Path, write: Callable[[Path, bytes], Path], name: str) -> None:
    """No opcode of a pickle calls or imports anything, at its top level or beside the student's tensors."""
    marker = tmp_path / "marker"
    payload = payloads(marker)[name]
    sys.modules.pop(CANARY, None)
    before = set(sys.modules)
    for code in (
        payload,
        table({"w": tensor(), "evil": payload}),
        table({"evil": payload, "model": table({"w": tensor()})}),
    ):
        outcome(lambda code=code: read_whole(write(tmp_path / "step_1.pt", code)))
    assert not marker.exists()
    assert CANARY not in sys.modules
    assert not {module for module in set(sys.modules) - before if not module.startswith(("ckpt_ema", "encodings"))}


def test_a_payload_beside_the_student_does_not_hinder_the_fold(tmp_path: Path) -> None:
    """A checkpoint with foreign objects (real ones have many) is folded, and they are not run."""
    marker = tmp_path / "marker"
    for step in (1, 2):
        code = table({"evil": payloads(marker)["os.system"], "state_dict": table({"w": tensor()})})
        write_zip(tmp_path / f"step_{step}.pt", code, {"data/0": struct.pack("<4f", 1, 2, 3, step)})
    ckpt_ema.fold(tmp_path, announce=lambda plan: None, momentum=0.5)
    assert not marker.exists()
    assert load_file(tmp_path / "teacher.safetensors")["w"].tolist() == [[1, 2], [3, 1.5]]


@pytest.mark.parametrize(
    "opcode", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"\x82\x00", b"\x84\xff\xff\xff\xff"]
)
def test_extension_opcodes_are_refused(tmp_path: Path, opcode: bytes) -> None:
    """EXT1, EXT2 and EXT4 name no class."""
    for write in WRITERS:
        assert outcome(lambda write=write: read_whole(write(tmp_path / "step_1.pt", table({"x": opcode + b")R"}))))


# --- pickles that want to change us ------------------------------------------------------------------------------


def snapshot() -> list[str]:
    """All module-level state that a pickle can get hold of."""
    found = [repr((d.name, d.itemsize, d.kind, d.code, d.storage)) for d in DTYPES]
    for key, value in sorted(pickles._CONSTRUCTORS.items()):
        members = {name: getattr(value, name) for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)}
        if isinstance(value, type):
            members |= {name: id(member) for name, member in vars(value).items()}
        found.append(repr((key, id(value), members)))
    for kind in (pickles.Inert, pickles.PickledDict, pickles.PickledTensor, pickles.PickledStorage):
        found.append(repr({name: id(member) for name, member in vars(kind).items()}))
    return found


TARGETS = {
    "dtype": global_("torch.float32"),
    "storage type": global_("torch.FloatStorage"),
    "constructor": global_("torch._utils._rebuild_tensor_v2"),
    "OrderedDict class": global_("collections.OrderedDict"),
    "OrderedDict": global_("collections.OrderedDict") + b")R",
    "inert class": global_("somewhere.Anything"),
    "inert object": global_("somewhere.Anything") + b")R",
    "tensor": tensor(),
    "storage": storage(),
    "parameter": global_("torch._utils._rebuild_parameter") + b"(" + tensor() + b"\x88}tR",
}
STATES = {
    "attributes": table({"itemsize": b"K\x01", "__call__": global_("os.system"), "function": global_("os.system")}),
    "slots": b"N" + table({"itemsize": b"K\x01", "dtype": b"N", "function": global_("os.system")}) + b"\x86",
    "list": b"](" + text("evil") + b"K\x01" + text("float") + text("I64") + b"Ne",
    "tuple": b"(" + text("evil") + b"K\x01" + text("float") + text("I64") + b"Nt",
    "class": table({"__setstate__": global_("os.system"), "__new__": global_("os.system"), "find_class": b"N"}),
    "one": global_("os.system") + b"\x85",
    "qualified name": b"N" + table({"qualified_name": text("torch.Size"), "__class__": global_("a.b")}) + b"\x86",
}


@pytest.mark.parametrize("state", sorted(STATES))
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_build_cannot_change_anything_that_outlives_the_file(tmp_path: Path, target: str, state: str) -> None:
    """BUILD on whatever a pickle can name leaves the dtype table, the constructors and the classes as they were."""
    before = snapshot()
    code = table({"x": TARGETS[target] + STATES[state] + b"b", "w": tensor()})
    for write in WRITERS:
        outcome(lambda write=write: read_whole(write(tmp_path / "step_1.pt", code)))
    assert snapshot() == before
    contents = read_contents(write_zip(tmp_path / "step_2.pt", table({"w": tensor()})))
    found = contents.locate(contents.tree)["w"]
    assert (found.dtype.name, found.dtype.itemsize, found.shape, found.end - found.begin) == (
        "float32",
        4,
        (2, 2),
        16,
    )


def test_a_built_tensor_keeps_its_checked_fields(tmp_path: Path) -> None:
    """BUILD on a tensor cannot move it to other bytes after it was described."""
    for state in (table({"offset": b"K\x63"}), b"N" + table({"offset": b"K\x63", "shape": sizes([9])}) + b"\x86"):
        error = outcome(
            lambda state=state: read_whole(write_zip(tmp_path / "a.pt", table({"w": tensor() + state + b"b"})))
        )
        assert error is not None


def test_keys_appended_to_our_own_values_stay_in_their_file(tmp_path: Path) -> None:
    """Inert objects collect what is stored in them per object, never in their class."""
    code = table({"x": global_("a.B") + b")R" + text("k") + b"K\x01s", "w": tensor()})
    first = read_contents(write_zip(tmp_path / "a.pt", code))
    second = read_contents(write_zip(tmp_path / "b.pt", table({"x": global_("a.B") + b")R", "w": tensor()})))
    assert first.tree["x"].entries == {"k": 1}
    assert second.tree["x"].entries == {}


# --- pickles that make no sense ----------------------------------------------------------------------------------

NONSENSE = (
    b"N",
    b"I-1\n",
    b"I99999999999999999999999999\n",
    text("x"),
    b")",
    b"]",
    b"}",
    b"G\x7f\xf8" + bytes(6),
    b"\x88",
)
FUNCTIONS = sorted(
    {
        f"{module}.{name}"
        for (module, name), value in pickles._CONSTRUCTORS.items()
        if not module.startswith("torch.cuda") and not isinstance(value, pickles.DType)
    }
)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_absurd_arguments_are_an_error_or_nothing(tmp_path: Path, function: str) -> None:
    """Each constructor that a pickle can reach takes any arguments, and any number of them, without another error."""
    generator = random.Random(function)
    choices = (*NONSENSE, tensor(), storage(), global_("torch.float32"), global_("a.B"), global_("a.B") + b")R")
    for count in range(8):
        for _ in range(3):
            arguments = b"(" + b"".join(generator.choice(choices) for _ in range(count)) + b"t"
            code = table({"w": tensor(), "x": global_(function) + arguments + b"R"})
            outcome(lambda code=code: read_whole(write_zip(tmp_path / "a.pt", code)))


@pytest.mark.parametrize(
    ("what", "code"),
    {
        "negative size": tensor(shape=(-2, 2)),
        "negative stride": tensor(strides=(-2, 1)),
        "negative offset": tensor(offset=-1),
        "negative count": tensor(count=-4),
        "offset beyond the record": tensor(offset=1),
        "huge offset": tensor(offset=1 << 62),
        "offset beyond 64 bits": tensor(offset=1 << 70),
        "offset beyond 64 bits of an empty tensor": tensor(shape=(0,), strides=(1,), offset=1 << 70),
        "huge shape": tensor(shape=(1 << 40, 1 << 40), strides=(1 << 40, 1)),
        "shape beyond 64 bits": tensor(shape=(1 << 64,), strides=(1,)),
        "one row too many": tensor(shape=(3, 2)),
        "wide stride": tensor(strides=(3, 1)),
        "huge stride": tensor(strides=(1 << 62, 1)),
        "fewer strides than sizes": tensor(strides=(1,)),
        "no strides": tensor(strides=()),
        "65 dimensions": tensor(shape=(1,) * 65, strides=(1,) * 65),
        "missing storage": tensor(key="7"),
        "storage named like a path": tensor(key="../data.pkl"),
        "wider dtype": tensor(kind="DoubleStorage"),
    }.items(),
)
def test_tensors_that_leave_their_storage_are_refused(tmp_path: Path, what: str, code: bytes) -> None:
    """Offsets, shapes and strides are checked against the record's bytes before any byte is read."""
    for write in WRITERS:
        path = write(tmp_path / "step_1.pt", table({"w": code}))
        assert outcome(lambda path=path: ckpt_ema.plan([path], tmp_path / "t.safetensors")) is not None, what


def test_a_count_that_lies_about_the_record_gives_no_tensor_outside_it(tmp_path: Path) -> None:
    """What the pickle says about a storage's length never counts, the record's own bytes do."""
    path = write_zip(tmp_path / "a.pt", table({"w": tensor(count=1 << 50, shape=(1 << 20,), strides=(1,))}))
    assert "beyond its storage" in str(outcome(lambda: read_whole(path)))


def test_negative_and_huge_counts_of_a_legacy_file_are_refused(tmp_path: Path) -> None:
    """The count before each storage of a legacy file must fit the file."""
    for count in (-1, -(1 << 63), 1 << 62, (1 << 63) - 1, 5):
        path = write_legacy(tmp_path / "a.pt", table({"w": tensor()}), counts=(count,))
        assert outcome(lambda path=path: read_whole(path)) is not None, count
    for keys in (("0", "0"), ("1",), ()):
        path = write_legacy(tmp_path / "a.pt", table({"w": tensor()}), keys=keys)
        assert outcome(lambda path=path: read_whole(path)) is not None, keys


def test_a_repeated_tensor_larger_than_any_disk_is_refused(tmp_path: Path) -> None:
    """Strides of 0 make 4 bytes look like exabytes; the fold is an error, not a loop or an overflow."""
    for shape in ((1 << 40,), (1 << 60, 4), (1 << 62, 1 << 62)):
        path = write_zip(tmp_path / "a.pt", table({"w": tensor(shape=shape, strides=(0,) * len(shape))}))
        error = outcome(lambda path=path: ckpt_ema.fold([path], tmp_path / "t.safetensors", announce=lambda plan: None))
        assert error is not None
        assert sorted(os.listdir(tmp_path)) == ["a.pt"]


@pytest.mark.parametrize(
    "code",
    [b"\x96" + struct.pack("<Q", 1 << 62), b"\x8e" + struct.pack("<Q", 1 << 62), b"\x8d" + struct.pack("<Q", 1 << 63)],
)
def test_lengths_beyond_all_memory_are_the_tools_own_error(tmp_path: Path, code: bytes) -> None:
    """BYTEARRAY8, BINBYTES8 and BINUNICODE8 that ask for exabytes end as a CkptEmaError, not as a MemoryError."""
    for write in WRITERS:
        assert outcome(lambda write=write: read_whole(write(tmp_path / "a.pt", code))) is not None


def run_in_process(path: Path, *, memory: int | None = None) -> subprocess.CompletedProcess[str]:
    """`inspect` in a process of its own, with a limit on its address space: these files aim at the process itself."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))\n" if memory else ""
    call = limit + f"from ckpt_ema.cli import main\nmain(['inspect', {str(path)!r}])"
    return subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, timeout=60, check=False)


def test_a_memo_index_beyond_all_memory_is_an_error(tmp_path: Path) -> None:
    """Six bytes that make the memo take 32 GiB end with exit 1 and no traceback."""
    done = run_in_process(write_zip(tmp_path / "a.pt", b"}r\xff\xff\xff\x7f"), memory=4 << 30)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_deeply_nested_keys_do_not_crash_the_process(tmp_path: Path) -> None:
    """A key of two million nested tuples (hashed recursively in C) ends with exit 1, not with a segmentation fault."""
    done = run_in_process(write_zip(tmp_path / "a.pt", b"})" + b"\x85" * 2_000_000 + b"K\x01s"))
    assert done.returncode == 1, done.returncode
    assert "Traceback" not in done.stderr


def test_a_shape_of_shared_tuples_is_not_printed(tmp_path: Path) -> None:
    """Each level holds the one below twice: a message with all of it would be four million numbers long."""
    doubling = b"K\x01K\x01\x86q\x010" + b"h\x01h\x01\x86q\x010" * 22
    code = global_("torch._utils._rebuild_tensor_v2") + b"(" + storage() + b"K\x00" + doubling
    for shape in (b"h\x01\x85", b"h\x01", b"h\x01\x85l"):
        path = write_zip(tmp_path / "a.pt", table({"w": code + shape + sizes(()) + b"\x89}tR"}))
        error = outcome(lambda path=path: read_whole(path))
        assert error is not None
        assert len(str(error)) < 1000


def test_deeply_nested_names_beside_tensors_are_no_recursion_error(tmp_path: Path) -> None:
    """A key of 5000 nested tuples among a state dict's names is an error or left out, never a RecursionError."""
    code = table({"model": table({"w": tensor()}) + b")" + b"\x85" * 5000 + b"K\x01s"})
    outcome(lambda: ckpt_ema.plan([write_zip(tmp_path / "a.pt", code)], tmp_path / "t.safetensors"))


@pytest.mark.parametrize("levels", [40])
def test_shared_tuples_as_names_cost_no_exponential_time(tmp_path: Path, levels: int) -> None:
    """A name of 2**40 shared tuples, 200 bytes in the file, is refused in seconds."""
    name = b")q\x05" + b"h\x05h\x05\x86q\x05" * levels
    code = table({"model": table({"w": tensor()}) + name + b"K\x01s"})
    done = run_in_process(write_zip(tmp_path / "a.pt", code))
    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stderr


def test_shared_tables_cost_no_exponential_time(tmp_path: Path) -> None:
    """Three thousand names for one table, three levels deep, are searched once and not 3000**3 times."""
    level = table({"w": tensor()}) + b"q\x01"
    for memo in range(1, 4):
        inner = b"h" + bytes([memo])
        level += b"0" + table({f"k{i}": inner for i in range(3000)}) + b"q" + bytes([memo + 1])
    done = run_in_process(write_zip(tmp_path / "a.pt", level))
    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stderr


def test_a_module_that_contains_itself_is_refused(tmp_path: Path) -> None:
    """A cycle of pickled modules ends with an error."""
    module = (
        global_("m.Net")
        + b")\x81q\x01"
        + table({"_parameters": b"}", "_modules": table({"a": b"h\x01", "b": b"h\x01"})})
        + b"b"
    )
    assert outcome(lambda: read_whole(write_zip(tmp_path / "a.pt", module))) is not None


def test_shared_modules_cost_no_exponential_time(tmp_path: Path) -> None:
    """Sixty levels of modules, each twice the same child, are not 2**60 modules."""
    code = global_("m.Net") + b")\x81" + table({"_parameters": table({"w": tensor()}), "_modules": b"}"}) + b"bq\x01"
    for memo in range(1, 60):
        child = b"h" + bytes([memo])
        state = table({"_parameters": b"}", "_modules": table({"a": child, "b": child})})
        code += b"0" + global_("m.Net") + b")\x81" + state + b"bq" + bytes([memo + 1])
    done = run_in_process(write_zip(tmp_path / "a.pt", code))
    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["\ud800", "a\udfffb"])
def test_names_that_are_no_text_are_refused(tmp_path: Path, name: str) -> None:
    """A tensor name with a lone surrogate cannot be written as JSON; the fold says so and leaves nothing."""
    inputs = {
        "a.pt": write_zip(tmp_path / "a.pt", table({name: tensor()})),
        "a.safetensors": write_safetensors(tmp_path / "a.safetensors", {name: entry(0, 16)}, bytes(16)),
    }
    for path in inputs.values():
        error = outcome(lambda path=path: ckpt_ema.fold([path], tmp_path / "t.safetensors", announce=lambda plan: None))
        assert error is not None, path
        assert sorted(os.listdir(tmp_path)) == ["a.pt", "a.safetensors"]


def test_a_tensor_called_metadata_does_not_spoil_the_teacher(tmp_path: Path) -> None:
    """`__metadata__` is no name a safetensors file can give a tensor: an error, or a file that loads."""
    path = write_zip(tmp_path / "a.pt", table({"__metadata__": tensor(), "w": tensor()}))
    target = tmp_path / "t.safetensors"
    if outcome(lambda: ckpt_ema.fold([path], target, announce=lambda plan: None)) is None:
        assert set(load_file(target)) == {"w"}


def test_sparse_and_foreign_tensors_are_named(tmp_path: Path) -> None:
    """A tensor that is not plain numbers is refused by its name, never dropped in silence."""
    torch.save({"w": torch.ones(3), "s": torch.eye(3).to_sparse()}, tmp_path / "a.pt")
    error = outcome(lambda: read_whole(tmp_path / "a.pt"))
    assert error is not None
    assert "`s`" in error.message


FLAGS = {
    "none": (b"N", ""),
    "empty": (b"}", ""),
    "not set": (table({"conj": b"\x89", "neg": b"\x89"}), ""),
    "one of two": (table({"conj": b"\x89", "neg": b"\x88"}), "without its sign"),
    "a number": (table({"conj": b"K\x01"}), "without its sign"),
    "unknown": (table({"conj": b"\x88", "swapped": b"\x88"}), "a flag that is not known"),
    "no table": (b"\x88", "something else"),
    "many": (table({f"flag{number}": b"\x89" for number in range(11)}), "something else"),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_of_a_tensor_that_change_its_numbers_are_refused(tmp_path: Path, flags: str) -> None:
    """Flags that are absent or false change nothing; any that is set is refused, also one no torch has yet."""
    code, what = FLAGS[flags]
    for write in WRITERS:
        path = write(tmp_path / "a.pt", table({"w": tensor().removesuffix(b"tR") + code + b"tR"}))
        error = outcome(lambda path=path: read_whole(path))
        assert (error is None) == (not what)
        assert error is None or what in error.message


# --- zip archives that lie ---------------------------------------------------------------------------------------


def real_zip() -> bytes:
    """A small file of torch.save."""
    buffer = io.BytesIO()
    torch.save({"state_dict": make_student(1), "global_step": 1}, buffer)
    return buffer.getvalue()


def real_legacy() -> bytes:
    """The same by torch before 1.6."""
    buffer = io.BytesIO()
    torch.save({"state_dict": make_student(1), "epoch": 1}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def real_safetensors() -> bytes:
    """The same as safetensors."""
    from safetensors.torch import save

    return save(make_student(1), {"format": "pt"})


REAL: dict[str, Callable[[], bytes]] = {"zip": real_zip, "legacy": real_legacy, "safetensors": real_safetensors}


def test_duplicate_record_names_are_refused(tmp_path: Path) -> None:
    """Two records of one name: which one is meant cannot be told."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + table({"w": tensor()}) + b".")
        archive.writestr("archive/data/0", bytes(16))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("archive/data/0", bytes(16))
    assert "twice" in str(outcome(lambda: read_whole(tmp_path / "a.pt")))


def test_two_pickles_in_one_archive_are_refused(tmp_path: Path) -> None:
    """An archive with two `data.pkl` is not what torch.save writes."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for root in ("a", "b"):
            archive.writestr(f"{root}/data.pkl", b"\x80\x02" + table({"w": tensor()}) + b".")
            archive.writestr(f"{root}/data/0", bytes(16))
    assert outcome(lambda: read_whole(tmp_path / "a.pt")) is not None


def test_compressed_records_are_refused_with_a_hint(tmp_path: Path) -> None:
    """A compressed record cannot be read by byte range; the error says what to do."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + table({"w": tensor()}) + b".")
        archive.writestr("archive/data/0", bytes(16))
    error = outcome(lambda: read_whole(tmp_path / "a.pt"))
    assert error is not None
    assert "compressed" in error.message
    assert error.hint


def directory_entries(content: bytes) -> list[int]:
    """Positions of the central directory's entries."""
    return [match.start() for match in re.finditer(rb"PK\x01\x02", content)]


def test_overlapping_records_are_refused(tmp_path: Path) -> None:
    """Two records at one place, or one reaching into the next, are a lie."""
    write_zip(
        tmp_path / "a.pt", table({"w": tensor(), "v": tensor(key="1")}), {"data/0": bytes(16), "data/1": bytes(16)}
    )
    content = (tmp_path / "a.pt").read_bytes()
    entries = directory_entries(content)
    same_place = bytearray(content)
    same_place[entries[2] + 42 : entries[2] + 46] = content[entries[1] + 42 : entries[1] + 46]
    too_long = bytearray(content)
    too_long[entries[1] + 20 : entries[1] + 28] = struct.pack("<II", 200, 200)
    into_directory = bytearray(content)
    into_directory[entries[2] + 20 : entries[2] + 28] = struct.pack("<II", 60, 60)
    outside = bytearray(content)
    outside[entries[2] + 42 : entries[2] + 46] = struct.pack("<I", 1 << 30)
    for forged in (same_place, too_long, into_directory, outside):
        (tmp_path / "b.pt").write_bytes(forged)
        assert outcome(lambda: read_whole(tmp_path / "b.pt")) is not None


@pytest.mark.parametrize("value", [0, 1, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("field", ["where", "count", "size", "offset"])
def test_lying_zip64_directories_are_refused(tmp_path: Path, field: str, value: int) -> None:
    """Each 64-bit number of a zip64 end record may be anything; the answer is an error."""
    write_zip(tmp_path / "a.pt", table({"w": tensor()}))
    content = (tmp_path / "a.pt").read_bytes()
    end = content.rfind(b"PK\x05\x06")
    count, size, offset = struct.unpack("<HII", content[end + 10 : end + 20])
    numbers = {"where": end, "count": count, "size": size, "offset": offset} | {field: value}
    record = b"PK\x06\x06" + struct.pack("<QHHIIQ", 44, 45, 45, 0, 0, numbers["count"])
    record += struct.pack("<QQQ", numbers["count"], numbers["size"], numbers["offset"])
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, numbers["where"], 1)
    tail = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "a.pt").write_bytes(content[:end] + record + locator + tail)
    error = outcome(lambda: read_whole(tmp_path / "a.pt"))
    assert error is not None or (field, value) == ("count", count)


@pytest.mark.parametrize("extra", [b"", struct.pack("<HH", 1, 0), struct.pack("<HHQ", 1, 8, 16), b"\x01\x00\xff\xff"])
def test_lying_zip64_records_are_refused(tmp_path: Path, extra: bytes) -> None:
    """A record whose 64-bit sizes are missing or cut is refused, one with huge ones as well."""
    huge = struct.pack("<HHQQQ", 1, 24, 1 << 63, 1 << 63, (1 << 64) - 1)
    for field in (extra, huge):
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02" + table({"w": tensor()}) + b".")
            archive.writestr("archive/data/0", bytes(16))
        content = bytearray((tmp_path / "a.pt").read_bytes())
        at = directory_entries(content)[1]
        content[at + 20 : at + 28] = b"\xff" * 8
        content[at + 42 : at + 46] = b"\xff" * 4
        name_end = at + 46 + len("archive/data/0")
        content[at + 30 : at + 32] = struct.pack("<H", len(field))
        content[name_end:name_end] = field
        end = content.rfind(b"PK\x05\x06")
        (size,) = struct.unpack("<I", content[end + 12 : end + 16])
        content[end + 12 : end + 16] = struct.pack("<I", size + len(field))
        (tmp_path / "a.pt").write_bytes(content)
        assert outcome(lambda: read_whole(tmp_path / "a.pt")) is not None


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    """A file whose `byteorder` record says big is named as such and not misread."""
    path = write_zip(tmp_path / "a.pt", table({"w": tensor()}), {"byteorder": b"big", "data/0": bytes(16)})
    assert "big-endian" in str(outcome(lambda: read_whole(path)))
    legacy = write_legacy(tmp_path / "b.pt", table({"w": tensor()}))
    legacy.write_bytes(
        legacy.read_bytes().replace(text("little_endian") + b"q\x02\x88", text("little_endian") + b"q\x02\x89")
    )
    assert "big-endian" in str(outcome(lambda: read_whole(legacy)))


def test_torchscript_archives_are_refused_with_a_hint(tmp_path: Path) -> None:
    """A TorchScript program holds code besides tensors; it is no checkpoint."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pt")
    error = outcome(lambda: read_whole(tmp_path / "a.pt"))
    assert error is not None
    assert "TorchScript" in error.message
    assert error.hint


@pytest.mark.parametrize("kind", sorted(REAL))
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    """Whatever byte a file ends at, it is refused as unreadable; nothing else is raised."""
    content = REAL[kind]()
    path = tmp_path / "a.pt"
    for size in sorted({*range(0, len(content), 7), *range(64), *range(len(content) - 64, len(content))}):
        path.write_bytes(content[:size])
        assert outcome(lambda: read_whole(path)) is not None, size


@pytest.mark.parametrize("kind", sorted(REAL))
def test_flipped_bits_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    """Damage anywhere in headers, directories and pickles gives the tool's own error or none, also while folding."""
    content = REAL[kind]()
    generator = random.Random(kind)
    path = tmp_path / "a.pt"
    for _ in range(1200):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 1, 1, 2, 8))):
            position = generator.choice(
                (generator.randrange(900), generator.randrange(len(content)), -1 - generator.randrange(900))
            )
            damaged[position] = generator.choice((damaged[position] ^ (1 << generator.randrange(8)), 0, 0xFF))
        path.write_bytes(damaged)
        outcome(lambda: read_whole(path))
    for _ in range(40):
        damaged = bytearray(content)
        damaged[generator.randrange(900)] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        outcome(lambda: ckpt_ema.fold([path], tmp_path / "t.safetensors", overwrite=True, announce=lambda plan: None))
        assert set(os.listdir(tmp_path)) <= {"a.pt", "t.safetensors"}


# --- safetensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "header", "content"),
    [
        ("duplicate name", b"{%s,%s}" % (one_entry(0), one_entry(4)), bytes(8)),
        ("duplicate name behind an escape", b"{%s,%s}" % (one_entry(0), ESCAPED), bytes(4)),
        ("metadata twice", b'{"__metadata__":{},"__metadata__":{"x":"y"},%s}' % one_entry(0), bytes(4)),
        ("duplicate key inside", b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        ("hole", {"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
        ("hole at the start", {"a": entry(4, 8)}, bytes(8)),
        ("overlap", {"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        ("same bytes twice", {"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
        ("trailing bytes", {"a": entry(0, 8)}, bytes(9)),
        ("truncated", {"a": entry(0, 8)}, bytes(7)),
        ("shape too small", {"a": entry(0, 8, [1])}, bytes(8)),
        ("shape too large", {"a": entry(0, 8, [3])}, bytes(8)),
        ("backwards", {"a": entry(8, 0, [2])}, bytes(8)),
        ("negative begin", {"a": entry(-4, 4, [2])}, bytes(4)),
        ("negative size", {"a": entry(0, 8, [-2])}, bytes(8)),
        ("two negative sizes", {"a": entry(0, 8, [-1, -2])}, bytes(8)),
        ("size of a float", {"a": entry(0, 8, [2.0])}, bytes(8)),
        ("size of a bool", {"a": entry(0, 4, [True])}, bytes(4)),
        ("size of a text", {"a": entry(0, 8, "2")}, bytes(8)),
        ("unknown dtype", {"a": entry(0, 8, [2], "F99")}, bytes(8)),
        ("dtype of a list", {"a": entry(0, 8, [2], ["F32"])}, bytes(8)),
        ("no dtype", {"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        ("no shape", {"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
        ("no range", {"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        ("three offsets", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, bytes(8)),
        ("huge shape", {"a": entry(0, 8, [1 << 40, 1 << 40])}, bytes(8)),
        ("shape that wraps to its size", {"a": entry(0, 8, [(1 << 62) + 2])}, bytes(8)),
        ("shape beyond 64 bits", {"a": entry(0, 0, [0, 1 << 70])}, b""),
        ("offsets beyond 64 bits", {"a": entry(1 << 70, 1 << 70, [0])}, b""),
        ("thousands of dimensions", {"a": entry(0, 4, [1] * 5000)}, bytes(4)),
        ("not JSON", b"{not json}", b""),
        ("JSON with rubbish behind", b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}x', bytes(4)),
        ("NaN", b'{"a":NaN}', b""),
        ("a list", b'{"a":[]}', b""),
        ("a number of many digits", b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % (b"9" * 9999), b""),
        ("deeply nested", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""),
        ("deeply nested lists", b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b""),
        ("not UTF-8", b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        ("metadata of numbers", {"__metadata__": {"a": 1}, "a": entry(0, 4)}, bytes(4)),
        ("metadata of a list", {"__metadata__": [], "a": entry(0, 4)}, bytes(4)),
        ("no tensors", {}, b""),
        ("no tensors but bytes", {}, bytes(4)),
    ],
)  # fmt: skip
def test_lying_safetensors_headers_are_refused(tmp_path: Path, what: str, header: object, content: bytes) -> None:
    """Ranges must tile the data section, names be unique, shapes and dtypes be what they say; else an error."""
    path = write_safetensors(tmp_path / "step_1.safetensors", header, content)
    assert outcome(lambda: ckpt_ema.plan([path], tmp_path / "t.safetensors")) is not None, what


@pytest.mark.parametrize("length", [0, 1, 3, 99_999_999, 100_000_000, 100_000_001, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_lying_header_lengths_are_refused(tmp_path: Path, length: int) -> None:
    """A header length that is too short, too long or beyond the format's limit is an error at once."""
    path = write_safetensors(tmp_path / "a.safetensors", {"a": entry(0, 4)}, bytes(4), length=length)
    assert outcome(lambda: read_whole(path)) is not None


# --- folders -----------------------------------------------------------------------------------------------------


def make_sharded(folder: Path, weight_map: object, shards: Mapping[str, StateDict]) -> Path:
    """A Hugging Face folder with any index."""
    folder.mkdir(parents=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../secret.safetensors"},
        {"a": "sub/../../secret.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "..\\secret.safetensors"},
        {"a": ".."},
        {"a": "."},
        {"a": ""},
        {"a": "x\0y"},
        {"a": 1},
        {"a": None},
        {"a": [ONE]},
        {},
        [],
        None,
        "text",
        {"a": ONE, "b": "missing.safetensors"},
        {"a": ONE, "b": ONE},
        {"a": TWO, "b": ONE},
        {"a": ONE, "b": TWO, "c": TWO},
        {"a": "x" * 5000},
    ],
)
def test_lying_indexes_are_refused(tmp_path: Path, weight_map: object) -> None:
    """An index names files beside it that hold exactly what it says; anything else is an error."""
    save_file({"a": torch.ones(3)}, tmp_path / "secret.safetensors")
    folder = make_sharded(
        tmp_path / "run" / "checkpoint-1", weight_map, {ONE: {"a": torch.ones(3)}, TWO: {"b": torch.ones(2)}}
    )
    assert outcome(lambda: read_whole(folder)) is not None
    assert outcome(lambda: ckpt_ema.plan(tmp_path / "run")) is not None


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Of two shards that hold one name, neither is silently preferred."""
    shards = {ONE: {"a": torch.ones(3)}, TWO: {"a": torch.zeros(3), "b": torch.ones(2)}}
    folder = make_sharded(tmp_path / "checkpoint-1", {"a": ONE, "b": TWO}, shards)
    error = outcome(lambda: read_whole(folder))
    assert error is not None
    assert "both hold `a`" in error.message


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 200_000, b"\xff\xfe", b'{"weight_map": {"a": 1e999}}'])
def test_an_index_that_is_no_table_is_refused(tmp_path: Path, content: bytes) -> None:
    """Broken JSON beside the shards is the tool's own error."""
    folder = make_sharded(tmp_path / "checkpoint-1", {}, {ONE: {"a": torch.ones(3)}})
    (folder / "model.safetensors.index.json").write_bytes(content)
    assert outcome(lambda: read_whole(folder)) is not None


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", *(b'{"global_step": %s}' % step for step in (b'"9"', b"1e400", b"-1", b"9" * 5000, b"NaN"))],
)
def test_a_broken_trainer_state_is_an_error_or_ignored(tmp_path: Path, content: bytes) -> None:
    """`trainer_state.json` is untrusted as well."""
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "trainer_state.json").write_bytes(content)
    outcome(lambda: ckpt_ema.inspect(tmp_path))


@pytest.mark.parametrize(
    "steps", [b"\x8a\x20" + b"\xff" * 31 + b"\x7f", b"G\x7f\xf0" + bytes(6), b"G\x7f\xf8" + bytes(6), b"I-5\n", b"\x88"]
)
def test_absurd_steps_are_an_error_or_ignored(tmp_path: Path, steps: bytes) -> None:
    """A step inside a checkpoint that is huge, infinite, NaN or negative raises nothing but the tool's own error."""
    for step in (1, 2):
        write_zip(tmp_path / f"step_{step}.pt", table({"global_step": steps, "model": table({"w": tensor()})}))
    outcome(lambda: ckpt_ema.plan(tmp_path))


# --- what is no checkpoint at all --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (bytes(5000), "zeros"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "git lfs pull"),
        (b"<html>404 Not Found</html>", "no format known"),
        (b"\x80\x02}q\x00.", "not one written by torch.save"),
        (b"\x80", "no format known"),
        (b"PK\x03\x04", "truncated"),
        (b"PK\x05\x06" + bytes(18), "no format known"),
        (b"\x7fELF" + bytes(60), "no format known"),
        (pickle.dumps({"w": [1.0]}), "not one written by torch.save"),
    ],
)
def test_files_that_are_no_checkpoint_are_named(tmp_path: Path, content: bytes, word: str) -> None:
    """Empty files, LFS pointers, web pages and plain pickles are each told apart in one error."""
    path = tmp_path / "step_1.pt"
    path.write_bytes(content)
    assert word in str(outcome(lambda: read_whole(path)))


@pytest.mark.parametrize("name", ["step_100.safetensors", "step_300.pt", "epoch_3.pth"])
def test_a_folder_named_like_a_checkpoint_file_is_an_error_or_left_out(run: Path, name: str) -> None:
    """A directory `step_100.safetensors/` is never opened as a file."""
    if (run / name).exists():
        (run / name).unlink()
    (run / name).mkdir()
    outcome(lambda: ckpt_ema.plan(run))
    assert outcome(lambda: ckpt_ema.plan([run / name], run / "t.safetensors")) is not None


def test_a_pipe_named_like_a_checkpoint_does_not_hang(run: Path, cli: Callable[..., Any]) -> None:
    """A FIFO is not waited for: given by name it is refused, in a run it takes no part."""
    os.mkfifo(run / "step_600.safetensors")
    done = cli("fold", run / "step_100.safetensors", run / "step_600.safetensors", "-o", run / "t.safetensors")
    assert done.code == 1
    assert "not a regular file" in done.stderr
    assert cli("plan", run).code in (0, 1)
    assert cli("inspect", run / "step_600.safetensors").code == 1
    assert cli("fold", run, "--init", run / "step_600.safetensors").code == 1


def test_pipes_inside_a_folder_do_not_hang(tmp_path: Path) -> None:
    """A FIFO as shard, index, trainer state or companion is refused or ignored."""
    for number, name in enumerate(
        (ONE, "model.safetensors.index.json", "trainer_state.json", "config.json", "tokenizer.json")
    ):
        folder = make_sharded(
            tmp_path / f"checkpoint-{number}",
            {"a": ONE, "b": TWO},
            {ONE: {"a": torch.ones(3)}, TWO: {"b": torch.ones(2)}},
        )
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        (folder / "generation_config.json").write_text("{}")
        outcome(
            lambda folder=folder: ckpt_ema.fold([folder], tmp_path / "t", overwrite=True, announce=lambda plan: None)
        )


@pytest.mark.parametrize("link", ["/nonexistent/step_9.pt", "step_9.pt", "/dev/zero", "/dev/null", "/proc/self/mem"])
def test_links_to_nowhere_and_to_devices_are_refused(run: Path, link: str) -> None:
    """A dangling link, a link to itself and a device are the tool's own error or left out."""
    (run / "step_9.pt").symlink_to(link)
    outcome(lambda: ckpt_ema.plan(run))
    assert outcome(lambda: ckpt_ema.plan([run / "step_9.pt"], run / "t.safetensors")) is not None


def test_names_that_are_no_utf8_are_folded_or_refused(tmp_path: Path) -> None:
    """A file name with bytes that are no UTF-8 gives a teacher that loads, or the tool's own error."""
    students = [make_student(seed) for seed in (1, 2)]
    for step, student in enumerate(students):
        save_file(student, tmp_path / "x.safetensors")
        os.rename(tmp_path / "x.safetensors", os.fsencode(tmp_path) + b"/caf\xe9_step_%d.safetensors" % step)
    target = tmp_path / "t" / "t.safetensors"
    target.parent.mkdir()
    if outcome(lambda: ckpt_ema.fold(tmp_path, target, announce=lambda plan: None, momentum=0.5)) is None:
        assert_same_bits(load_file(target), hook_teacher(students, 0.5, ("bn.running_mean",)))


# --- the source itself -------------------------------------------------------------------------------------------

SOURCES = sorted(PACKAGE.rglob("*.py"))
# What each module may import, lowest first; a module imports only what stands on an earlier line (or its own).
NO_TEXTS = {"\ud800x": "\\ud800x", "\x1b[31mred": "\\x1b[31mred", "\x9b1m": "\\x9b1m", "\x7f": "\\x7f"}


@pytest.mark.parametrize("command", ["inspect", "plan"])
@pytest.mark.parametrize("name", NO_TEXTS)
def test_names_that_are_no_text_are_shown_as_what_they_are(
    tmp_path: Path, cli: Callable[..., Outcome], command: str, name: str
) -> None:
    """Half a letter and control characters raise nothing and reach no terminal, on stdout and in errors."""
    run = tmp_path / "run"
    run.mkdir()
    for step, size in ((1, 3), (2, 4)):
        torch.save({name: torch.ones(size), "a": torch.ones(2) * step}, run / f"step_{step}.pt")
    outcome = cli(command, run / "step_1.pt" if command == "inspect" else run)
    assert outcome.code == (0 if command == "inspect" else 1)
    shown = outcome.stdout + outcome.stderr
    assert "Traceback" not in shown
    assert NO_TEXTS[name] in shown
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", shown)


def test_an_index_that_names_half_a_letter_is_refused_in_words(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    """Found by the fuzzer: the error itself could not be printed."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(3)}, folder / "model-00001-of-00001.safetensors")
    shard = '"model-00001-of-00001.safetensors"'
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": {shard}, "\\ud800": {shard}}}}}')
    outcome = cli("inspect", folder)
    assert outcome.code == 1
    assert "holds `\\ud800`, which it does not" in outcome.stderr


LEVELS: tuple[tuple[str, ...], ...] = (
    ("_version", "errors", "sizes", "timings", "averages.quadrature"),
    ("keywords",),
    ("cli.options", "cli.terminal"),  # of the library, errors and sizes only; the commands import all of it
    ("dtypes", "averages.responses", "ranks", "remote_store"),
    ("locations",),
    ("cli.working_folder",),
    ("cli.exits",),
    ("byte_ranges",),
    (
        "assembly",
        "formats.json_tables",
        "formats.names",
        "formats.pickle_scan",
        "formats.pickles",
        "formats.zip_archive",
    ),
    ("formats.pickle_trial",),
    ("formats.safetensors", "formats.torch_save"),
    ("formats.contents",),
    ("formats.dcp", "formats.deepspeed", "formats.rank_files"),
    ("formats.folder",),
    ("formats",),
    ("runs.steps", "runs.state_dicts", "layouts"),
    ("runs.students",),
    ("runs.learning_rates", "runs.collisions", "runs.checkpoints", "runs.candidates", "output.descriptors"),
    (
        "agreement",
        "averages.profiles",
        "runs.selection",
        "model_buffers",
        "averages.solver",
        "averages.response_records",
    ),
    ("catalogue", "runs.reading", "runs.order", "output.writer"),
    ("blocks",),
    (
        "engine",
        "runs.find",
        "options",
        "plans",
        "teacher_record",
        "inspection",
        "engine.buffers",
        "engine.arithmetic",
        "engine.kernels",
        "engine.llvm_module",
        "engine.device_plan",
        "engine.workers",
        "provenance",
    ),
    ("output.old_teacher", "engine.compiled", "engine.fused", "engine.staging"),
    ("output.teacher_folder",),
    ("continuing",),
    ("inheriting", "newer"),
    (
        "coefficients",
        "output.targets",
        "output.teacher_files",
        "online",
        "online.attachments",
        "online.tracking",
        "online.rule",
        "online.offload",
        "online.capture",
        "online.snapshot_folder",
    ),
    ("output.fingerprints", "advice", "online.shadows", "online.increments"),
    ("planning", "output.journal", "online.teacher_file", "online.pairs"),
    ("online.swap", "online.stalls", "online.finiteness", "online.snapshots"),
    ("reconstruction", "replanning", "watching", "online.settings", "online.saving"),
    ("online.lineage", "online.state_file"),
    ("online.state",),
    ("online.mean_teacher",),
    ("integrations", "integrations.mmengine", "integrations.lightning", "integrations.transformers"),
)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression, "" for anything else."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else node.attr
    return node.id if isinstance(node, ast.Name) else ""


def imports_of(path: Path, *, top_level: bool = False) -> set[str]:
    """Modules that a source file imports, those for type checkers left out."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and dotted(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            skipped |= set(ast.walk(node))
        if top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            skipped |= set(ast.walk(node))
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = PACKAGE.parent.joinpath(*f"{node.module}.{alias.name}".split(".")).with_suffix(".py")
                # `from package import module` imports the module; the package around it is not what is meant.
                found |= {f"{node.module}.{alias.name}"} | (set() if inner.is_file() else {node.module or ""})
    return found


def module_of(path: Path) -> str:
    """Dotted name within the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_source_runs_a_pickle_or_maps_a_file() -> None:
    """The package calls no torch.load, no pickle.load(s), no mapping of files, and never says weights_only=False."""
    forbidden = {"torch.load", "pickle.load", "pickle.loads", "_pickle.load", "np.load", "numpy.load", "np.memmap"}
    names = {
        "mmap",
        "memmap",
        "from_file",
        "safe_open",
        "load_file",
        "loads_file",
        "eval",
        "exec",
        "compile",
        "__import__",
    }
    modules = {
        "mmap",
        "dill",
        "cloudpickle",
        "joblib",
        "marshal",
        "shelve",
        "_pickle",
        "cPickle",
        "numpy",
        "safetensors",
    }
    assert SOURCES
    for path in SOURCES:
        for imported in imports_of(path):
            assert imported.partition(".")[0] not in modules, f"{path}: imports {imported}"
            assert imported not in forbidden, f"{path}: imports {imported}"
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute):
                assert dotted(node) not in forbidden, where
            if isinstance(node, ast.Call):
                name = dotted(node.func)
                assert name not in forbidden | names, where
                assert name.rpartition(".")[2] not in names - {"compile", "eval", "exec"}, where
                for keyword in node.keywords:
                    assert keyword.arg not in ("weights_only", "mmap", "mmap_mode"), where


def test_only_one_class_unpickles() -> None:
    """`pickle.Unpickler` is named once in the package, as the base of a class that overrides `find_class`.

    What writes a pickle for torch, reads none.
    """
    users = [
        (path.name, node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and dotted(node).startswith("pickle.")
    ]
    assert sorted((name, dotted(node)) for name, node in users) == [
        ("pickles.py", "pickle.Unpickler"),
        ("teacher_files.py", "pickle.Pickler"),
        ("teacher_files.py", "pickle.dumps"),
    ]
    assert pickles.MetadataUnpickler.find_class is not pickle.Unpickler.find_class
    assert pickles.MetadataUnpickler.persistent_load is not getattr(pickle.Unpickler, "persistent_load", None)


def import_graph() -> dict[str, set[str]]:
    """The modules that each of ours imports."""
    known = {module_of(path) for path in SOURCES}
    return {
        module_of(path): {
            name
            for imported in imports_of(path)
            if (name := imported.removeprefix("ckpt_ema.")) in known and imported.startswith("ckpt_ema.")
        }
        - {module_of(path)}
        for path in SOURCES
    }


def test_imports_point_only_downwards() -> None:
    """No module imports one that stands above it, so that there are no cycles, not even in functions."""
    graph = import_graph()
    order: list[str] = []
    visiting: list[str] = []

    def visit(module: str) -> None:
        assert module not in visiting, f"import cycle: {' -> '.join([*visiting, module])}"
        if module in order:
            return
        visiting.append(module)
        for below in sorted(graph[module]):
            visit(below)
        order.append(visiting.pop())

    for module in sorted(graph):
        visit(module)
    assert {name for level in LEVELS for name in level} <= graph.keys()
    for level, modules in enumerate(LEVELS):
        below = {name for lower in LEVELS[: level + 1] for name in lower}
        for module in set(modules) & graph.keys():
            stray = graph[module] - below
            assert not stray, f"{module} imports {sorted(stray)} from above"
    for module, imported in graph.items():
        outside = module not in ("", "__main__") and module.partition(".")[0] != "cli"
        stray = {name for name in imported if name.partition(".")[0] == "cli"}
        assert not (outside and stray), f"{module} imports the command line"


def test_every_folder_of_sources_is_a_package() -> None:
    """Or setuptools would leave it out of what is installed."""
    for path in SOURCES:
        assert (path.parent / "__init__.py").is_file(), path


def test_the_readme_lists_the_modules_from_the_ground_up() -> None:
    """Every module is in its table, and imports nothing of a later row."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    table = readme.partition("The modules, from the ground up:")[2].partition("Imports point only downwards")[0]
    rows = [re.findall(r"`(\w+)/?`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    row_of = {name: number for number, names in enumerate(rows) for name in names}
    for module, imported in import_graph().items():
        package = module.partition(".")[0]
        if package in ("", "__main__", "_version"):
            continue
        assert package in row_of, f"{module} is not in the table"
        later = [name for name in imported if row_of.get(name.partition(".")[0], 0) > row_of[package]]
        assert not later, f"{module} imports {later} of a later row"


# click, tqdm, printing, exit codes and the standard streams: what a module of the command line uses of them, no other
# module anything. `sys.stderr` takes what a model or a filesystem prints while a command works.
TALK = {
    "cli": {"click", "sys.exit", "sys.stderr"},
    "cli.exits": {"os._exit", "sys.exit", "sys.stderr", "sys.stdout"},
    "cli.options": {"click"},
    "cli.working_folder": {"click"},
    "cli.terminal": {"click", "sys.stderr", "sys.stdout", "tqdm"},
}


def test_only_the_command_line_talks_to_people() -> None:
    """click, tqdm, print, exit codes and the standard streams belong to `cli`, there to the module that needs them."""
    packages = {"argparse", "click", "logging", "tqdm"}
    names = {"breakpoint", "exit", "input", "os._exit", "print", "quit", "sys.exit", "sys.stderr", "sys.stdout"}
    for path in SOURCES:
        talk = {name.partition(".")[0] for name in imports_of(path)} & packages
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                talk |= {dotted(node.func)} & names
            elif isinstance(node, ast.Attribute):
                talk |= {dotted(node)} & names
        assert talk == TALK.get(module_of(path), set()), path


def test_torch_is_imported_only_where_it_computes() -> None:
    """Outside the engine, the solver and what runs inside training no module imports torch when it is imported."""
    for path in SOURCES:
        if path.parent.name not in ("engine", "online", "integrations") and path.name != "solver.py":
            assert not {name for name in imports_of(path, top_level=True) if name.partition(".")[0] == "torch"}, path


@pytest.mark.parametrize(
    "words", [None, ["--help"], ["--version"], ["plan"], ["plan", "--half-life", "9"], ["inspect"]]
)
def test_the_light_commands_never_import_torch(run: Path, words: list[str] | None) -> None:
    """`import ckpt_ema.cli`, `--help`, `plan` and `inspect` in a real process load neither torch nor numpy."""
    command = [sys.executable, "-X", "importtime"]
    if words is None:
        command += ["-c", "import ckpt_ema, ckpt_ema.cli"]
    else:
        path = {"plan": [str(run)], "inspect": [str(run / "step_100.safetensors")]}.get(words[0], [])
        command += ["-m", "ckpt_ema", *words, *path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    loaded = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "import time:" in line
    }
    assert "ckpt_ema" in loaded
    assert not loaded & {"torch", "numpy", "safetensors", "tqdm"}
