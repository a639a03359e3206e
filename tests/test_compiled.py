"""The loop that LLVM compiles for a CPU: the bits of torch's calls, every element once; without it, torch's calls."""

from __future__ import annotations

import contextlib
import copy
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ckpt_ema import MeanTeacher, Snapshots, reconstruct
from ckpt_ema.blocks import ELEMENT_MULTIPLE
from ckpt_ema.dtypes import BY_NAME
from ckpt_ema.engine import compiled, cpu, llvm_module
from ckpt_ema.engine.arithmetic import GRAIN, LARGEST_LERP, Pair
from ckpt_ema.engine.buffers import Buffer
from ckpt_ema.engine.compiled import STRETCH_ELEMENTS, find_kernel, update_all_, why_not
from ckpt_ema.engine.llvm_module import PIECE_ELEMENTS, WIDTH
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.online import rule
from ckpt_ema.report import summary_text
from tests.conftest import assert_same_bits, quiet_fold
from tests.test_arithmetic import values

binding = pytest.importorskip("llvmlite.binding", reason="needs llvmlite")

STUDENTS = (torch.bfloat16, torch.float16)


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has compiled nothing yet."""
    monkeypatch.setattr(compiled, "_found", {})


@pytest.fixture(params=[1, 2, 3, 5])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("student", STUDENTS)
@given(keep=st.floats(0, 1), take=st.floats(0, 1))
@example(keep=0.0, take=1.0)
@example(keep=1.0, take=0.0)
@example(keep=0.999, take=0.001)
@settings(max_examples=20, deadline=None)
def test_an_update_has_the_bits_of_the_hooks_two_calls(keep: float, take: float, student: torch.dtype) -> None:
    """Of numbers of any size, infinities and NaN included."""
    kernel = find_kernel(torch.float32, student)
    assert kernel is not None, why_not(torch.float32, student)
    found, new = values(2, torch.float32), values(3, student)
    expected = found.clone().mul_(keep).add_(new.float(), alpha=take)
    kernel.fold(found.data_ptr(), found.numel(), [new.data_ptr()], [(keep, take)])
    assert torch.equal(found.isnan(), expected.isnan())
    assert_same_bits({"teacher": found.nan_to_num()}, {"teacher": expected.nan_to_num()})


@pytest.mark.parametrize("student", STUDENTS)
@given(take=st.floats(0, LARGEST_LERP))
@example(take=LARGEST_LERP)
@settings(max_examples=20, deadline=None)
def test_below_a_half_it_has_the_bits_of_lerp(take: float, student: torch.dtype) -> None:
    """As torch computes it there; above LARGEST_LERP it may count from the other end."""
    kernel = find_kernel(torch.float32, student, lerp=True)
    assert kernel is not None, why_not(torch.float32, student, lerp=True)
    found, new = values(2, torch.float32), values(3, student)
    expected = found.clone().lerp_(new.float(), take)
    kernel.fold(found.data_ptr(), found.numel(), [new.data_ptr()], [(1 - take, take)])
    assert torch.equal(found.isnan(), expected.isnan())
    assert_same_bits({"teacher": found.nan_to_num()}, {"teacher": expected.nan_to_num()})


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize(
    "count", [0, WIDTH, 2 * WIDTH, 31 * WIDTH, PIECE_ELEMENTS, PIECE_ELEMENTS + WIDTH, 3 * PIECE_ELEMENTS - WIDTH]
)
@pytest.mark.parametrize("num_students", [1, 2, 3, 7])
def test_whole_vectors_are_folded_and_none_behind_them(num_students: int, count: int, student: torch.dtype) -> None:
    """Whole pieces, and what is left; every student in its turn."""
    kernel = find_kernel(torch.float32, student)
    assert kernel is not None
    found = torch.randn(3 * PIECE_ELEMENTS)
    news = [torch.randn(3 * PIECE_ELEMENTS).to(student) for _ in range(num_students)]
    updates = [(1 - 0.1 * number, 0.1 * number) for number in range(1, num_students + 1)]
    expected = found.clone()
    whole = found.clone()
    for new, (keep, take) in zip(news, updates, strict=True):
        whole.mul_(keep).add_(new.float(), alpha=take)
    expected[:count] = whole[:count]
    kernel.fold(found.data_ptr(), count, [new.data_ptr() for new in news], updates)
    assert torch.equal(found, expected)


LOWER_HALVES = (0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xEFFF, 0xF000, 0xFFFF)
"""Of a float, at the borders of what is rounded one way and the other, and beside them."""


@pytest.mark.parametrize("student", STUDENTS)
def test_a_teacher_is_narrowed_as_torch_does(student: torch.dtype) -> None:
    """Numbers of every size and sign; what is infinite then, or is no number, is told."""
    kernel = find_kernel(torch.float32, student)
    assert kernel is not None
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    teacher = torch.stack([upper + lower for lower in LOWER_HALVES]).view(torch.float32).flatten()
    is_finite = teacher.to(student).isfinite()
    finite = teacher.where(is_finite, 0)
    found = torch.full((len(finite) + 1,), 7, dtype=student)
    assert kernel.narrow(finite.data_ptr(), len(finite), found.data_ptr())
    assert torch.equal(found[:-1].view(torch.int16), finite.to(student).view(torch.int16))
    assert found[-1] == 7
    others = teacher[~is_finite]
    assert others.isfinite().any()
    assert others.isnan().any()
    least = others[others.isfinite()].abs().min()
    for index, other in enumerate((least, -least, *others[:: len(others) // 1000])):
        spoilt = finite[: 5 * WIDTH].clone()
        spoilt[37 * index % len(spoilt)] = other
        assert not kernel.narrow(spoilt.data_ptr(), len(spoilt), found.data_ptr()), other
    assert kernel.narrow(0, 0, 0)


def test_what_is_no_whole_vector_is_refused() -> None:
    """It would be written behind somebody's elements; whoever calls has whole ones."""
    kernel = find_kernel(torch.float32, torch.bfloat16)
    assert kernel is not None
    memory = torch.zeros(WIDTH)
    with pytest.raises(ValueError, match="no multiple of"):
        kernel.fold(memory.data_ptr(), WIDTH - 1, [memory.data_ptr()], [(1.0, 0.0)])
    with pytest.raises(ValueError, match="no multiple of"):
        kernel.narrow(memory.data_ptr(), 1, memory.data_ptr())
    assert not any(number % WIDTH for number in (ELEMENT_MULTIPLE, GRAIN, PIECE_ELEMENTS))


def update_by_torch(pairs: list[Pair], *, lerp: bool) -> None:
    """By its own calls, at momentum 0.001."""
    for old, new in pairs:
        if lerp:
            old.lerp_(new.float(), 0.001)
        else:
            old.mul_(0.999).add_(new.float(), alpha=0.001)


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("lerp", [False, True])
def test_every_element_of_many_tensors_is_updated_once(num_threads: int, student: torch.dtype, lerp: bool) -> None:
    """By the kernel or, of what comes back, by torch; on any number of threads."""
    sizes = (1, GRAIN - 1, GRAIN, 2 * GRAIN + 77, STRETCH_ELEMENTS + 5 * GRAIN, 0, 3 * STRETCH_ELEMENTS)
    found = [torch.randn(size) for size in sizes]
    news = [torch.randn(size).to(student) for size in sizes]
    found.append(torch.randn(4, GRAIN).t())
    news.append(torch.randn(GRAIN, 4).to(student))
    expected = [old.clone() for old in found]
    update_by_torch(list(zip(expected, news, strict=True)), lerp=lerp)
    left = update_all_(list(zip(found, news, strict=True)), 0.999, 0.001, lerp=lerp)
    update_by_torch(left, lerp=lerp)
    for mine, torchs in zip(found, expected, strict=True):
        assert torch.equal(mine, torchs)
    assert sum(sizes) + 4 * GRAIN - sum(old.numel() for old, _ in left) == (1 + 2 + 21 + 48) * GRAIN


class Wrapped(torch.Tensor):
    """As quantised weights are: a dtype and a shape, and the numbers elsewhere."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


def freed(tensor: torch.Tensor) -> torch.Tensor:
    """Its memory given back, as some offload parameters."""
    tensor.untyped_storage().resize_(0)
    return tensor


ONES = torch.ones(2, GRAIN, dtype=torch.bfloat16)
LEFT = {
    "float64 teacher": lambda: (torch.zeros(2, GRAIN, dtype=torch.float64), ONES),
    "bfloat16 teacher": lambda: (torch.zeros(2, GRAIN, dtype=torch.bfloat16), ONES),
    "complex teacher": lambda: (torch.zeros(2, GRAIN, dtype=torch.complex64), ONES),
    "integers": lambda: (torch.zeros(2, GRAIN), ONES.to(torch.int16)),
    "8 bits": lambda: (torch.zeros(2, GRAIN), ONES.to(torch.float8_e4m3fn)),
    "one dtype": lambda: (torch.zeros(2, GRAIN), ONES.float()),
    "too small": lambda: (torch.zeros(GRAIN - 1), ONES[0, 1:]),
    "gaps in the student": lambda: (torch.zeros(2, GRAIN), ONES.repeat(2, 1)[::2]),
    "gaps in the teacher": lambda: (torch.zeros(4, GRAIN)[::2], ONES),
    "transposed": lambda: (torch.zeros(2, GRAIN), ONES.t().contiguous().t()),
    "other shape": lambda: (torch.zeros(2, GRAIN), ONES[0]),
    "another device": lambda: (torch.zeros(2, GRAIN, device="meta"), ONES.to("meta")),
    "a class of its own": lambda: (torch.zeros(2, GRAIN), Wrapped(ONES)),
    "no memory": lambda: (torch.zeros(2, GRAIN), freed(ONES.clone())),
    "no memory for the teacher": lambda: (freed(torch.zeros(2, GRAIN)), ONES),
    "negative": lambda: (torch.zeros(2, GRAIN), torch._neg_view(ONES)),
    "sparse": lambda: (torch.zeros(2, GRAIN), ONES.to_sparse()),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_torch_comes_back_untouched(case: str) -> None:
    """Whatever is not just numbers of the right dtypes in a row; torch computes or refuses it."""
    pair = LEFT[case]()
    served = torch.zeros(2, GRAIN), ONES
    version = pair[0]._version
    left = update_all_([pair, served], 0.5, 0.5, lerp=False)
    assert len(left) == 1
    assert left[0][0] is pair[0]
    assert left[0][1] is pair[1]
    assert pair[0]._version == version
    assert served[0].eq(0.5).all()


def test_teachers_that_overlap_are_updated_one_after_the_other() -> None:
    """Two threads would be at the same elements, in any order."""
    flat = torch.zeros(3 * GRAIN)
    pairs = [(flat[: 2 * GRAIN], ONES.view(-1)), (flat[GRAIN:], ONES.view(-1))]
    assert update_all_(pairs, 0.5, 0.5, lerp=False) == pairs
    assert not flat.any()
    assert not update_all_([(flat[:GRAIN], ONES[0]), (flat[GRAIN : 2 * GRAIN], ONES[0])], 0.5, 0.5, lerp=False)


def test_channels_may_be_last() -> None:
    """Of both; the elements behind the last GRAIN are those behind it in memory."""
    shape = (7, 96, 9, 11)
    assert torch.Size(shape).numel() % GRAIN
    teacher = torch.randn(shape).to(memory_format=torch.channels_last)
    student = torch.randn(shape).bfloat16().to(memory_format=torch.channels_last)
    expected = teacher.clone().mul_(0.75).add_(student.float(), alpha=0.25)
    ((old, new),) = update_all_([(teacher, student)], 0.75, 0.25, lerp=False)
    assert old.numel() == torch.Size(shape).numel() % GRAIN
    old.mul_(0.75).add_(new.float(), alpha=0.25)
    assert torch.equal(teacher, expected)


def test_a_compiler_that_traces_an_update_sees_torchs_calls() -> None:
    """It would not come through llvmlite."""
    torch.manual_seed(0)
    student = nn.Linear(300, 701).bfloat16()
    teachers = [MeanTeacher(student, momentum=0.1) for _ in range(2)]
    compiled_step = torch.compile(teachers[0].update, backend="eager")
    for _ in range(3):
        with torch.no_grad():
            student.weight.normal_()
        compiled_step()
        teachers[1].update()
    assert_same_bits(*(teacher.tensors() for teacher in teachers))


@pytest.mark.usefixtures("untried")
def test_under_fake_tensors_it_is_tried_with_real_ones() -> None:
    """Whose addresses are none; modes belong to a thread."""
    with FakeTensorMode():
        assert find_kernel(torch.float32, torch.bfloat16) is not None
        pair = torch.zeros(GRAIN), torch.zeros(GRAIN, dtype=torch.bfloat16)
        ((old, new),) = update_all_([pair], 0.5, 0.5, lerp=False)
    assert old is pair[0]
    assert new is pair[1]


def test_threads_of_python_may_update_at_once() -> None:
    """A teacher in host memory and one beside the student are, in threads of their own."""
    teachers = [torch.zeros(9 * STRETCH_ELEMENTS) for _ in range(4)]
    student = torch.randn(9 * STRETCH_ELEMENTS).bfloat16()

    def work(teacher: torch.Tensor) -> None:
        for _ in range(10):
            assert not update_all_([(teacher, student)], 0.9, 0.1, lerp=False)

    threads = [threading.Thread(target=work, args=(teacher,)) for teacher in teachers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = torch.zeros_like(teachers[0])
    for _ in range(10):
        expected.mul_(0.9).add_(student.float(), alpha=0.1)
    for teacher in teachers:
        assert torch.equal(teacher, expected)


def test_autograd_is_told_what_a_kernel_changed() -> None:
    """As of any change in place; a tensor of inference mode has nobody to tell."""
    weight, teacher = torch.ones(GRAIN, requires_grad=True), torch.zeros(GRAIN)
    product = (weight * teacher).sum()
    assert not update_all_([(teacher, torch.ones(GRAIN, dtype=torch.bfloat16))], 0.5, 0.5, lerp=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        teacher = torch.zeros(GRAIN)
        assert not update_all_([(teacher, torch.ones(GRAIN, dtype=torch.bfloat16))], 0.5, 0.5, lerp=False)
        assert teacher.eq(0.5).all()


# --- where there is no kernel -----------------------------------------------------------------------------------------

TWO_ROUNDINGS = """%kept = fmul %Floats %old, %keeps
  %share = fmul %Floats %student, %takes
  %new = fadd %Floats %kept, %share"""
OTHER_PRODUCT = """%share = fmul %Floats %student, %takes
  %new = call %Floats @llvm.fma.v{width}f32(%Floats %old, %Floats %keeps, %Floats %share)"""


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("arithmetic", [TWO_ROUNDINGS, OTHER_PRODUCT])
@pytest.mark.parametrize("student", STUDENTS)
def test_a_kernel_that_rounds_otherwise_is_not_used(
    monkeypatch: pytest.MonkeyPatch, arithmetic: str, student: torch.dtype
) -> None:
    """Compared with this torch on this machine, not assumed."""
    monkeypatch.setattr(llvm_module, "_HOOK", arithmetic)
    assert why_not(torch.float32, student) == "it rounds in another way than torch"
    assert find_kernel(torch.float32, student) is None


@pytest.mark.usefixtures("untried")
def test_a_kernel_that_widens_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16's bits in the wrong place."""
    own = llvm_module.STUDENTS[torch.bfloat16]
    other = own._replace(widen=own.widen.replace("i32 16", "i32 15"))
    monkeypatch.setitem(llvm_module.STUDENTS, torch.bfloat16, other)
    assert why_not(torch.float32, torch.bfloat16) == "it rounds in another way than torch"


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize(
    ("student", "changed"),
    [
        (torch.bfloat16, {"narrow": ("add %Ints %odd", "add %Ints zeroinitializer")}),
        (torch.bfloat16, {"narrow": ("add %Ints %odd", "add %Ints splat (i32 1)")}),
        (torch.bfloat16, {"narrow": ("%bits, %almost_half", "%bits, zeroinitializer")}),
        (torch.bfloat16, {"overflow": 0x7F800001}),
        (torch.bfloat16, {"overflow": 0x7F800000}),
        (torch.float16, {"overflow": 0x7F800001}),
        (torch.float16, {"overflow": 0x7F800000}),
        (torch.float16, {"overflow": 0x47000000}),
    ],
)
def test_a_kernel_that_narrows_otherwise_is_not_used(
    monkeypatch: pytest.MonkeyPatch, student: torch.dtype, changed: dict[str, Any]
) -> None:
    """Halves rounded down, up or cut; infinities that pass, or finite numbers that do not."""
    own = llvm_module.STUDENTS[student]
    if "narrow" in changed:
        assert changed["narrow"][0] in own.narrow
        changed = {"narrow": own.narrow.replace(*changed["narrow"])}
    monkeypatch.setitem(llvm_module.STUDENTS, student, own._replace(**changed))
    assert why_not(torch.float32, student) == "it rounds in another way than torch"


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize(
    ("kind", "lacks", "reason"),
    [
        ("x86_64", ["fma"], "this processor has no fma"),
        ("x86_64", ["f16c", "fma"], "this processor has no fma and no f16c"),
        ("riscv64", [], "it is not made for processors of riscv64"),
    ],
)
def test_a_processor_without_its_instructions_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, student: torch.dtype, kind: str, lacks: list[str], reason: str
) -> None:
    """As virtual machines hide them: LLVM would end the process where a conversion of float16 is a function of none."""
    features = binding.get_host_cpu_features()
    features.update(dict.fromkeys(lacks, False))
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: features)
    monkeypatch.setattr(platform, "machine", lambda: kind)
    assert why_not(torch.float32, student) == reason
    assert find_kernel(torch.float32, student) is None


REFUSED = """
import ctypes, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE: what was written is not executed
    sys.exit("no such call")
import torch
from ckpt_ema import MeanTeacher
from ckpt_ema.engine.compiled import why_not
print(why_not(torch.float32, torch.bfloat16))
student = torch.nn.Linear(300, 300).bfloat16()
teacher = MeanTeacher(student, momentum=0.5)
teacher.update()
teacher.update()
assert torch.equal(teacher.tensors()["weight"], student.weight.float())
"""


def test_where_no_memory_becomes_executable_torchs_calls_remain() -> None:
    """As services are hardened (`MemoryDenyWriteExecute`): LLVM goes on, and what it made is a crash."""
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=False)
    if done.stderr == "no such call\n":
        pytest.skip("this Linux cannot be asked to refuse it")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "this system lets no memory that was written be executed\n"


def raise_memory_error(*_: object, **__: object) -> bool:
    raise RuntimeError("not enough memory")


@pytest.fixture(params=["no llvmlite", "an old one", "no OpenMP", "no memory for its trial"])
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, untried: None) -> str:
    """What a kernel needs is missing."""
    if request.param == "no llvmlite":
        monkeypatch.setitem(sys.modules, "llvmlite", None)
    elif request.param == "no OpenMP":
        monkeypatch.setattr(compiled, "_find_torchs_parallel", lambda: None)
    elif request.param == "no memory for its trial":
        monkeypatch.setattr(compiled, "has_torchs_bits", raise_memory_error)
    else:
        monkeypatch.setattr(binding, "llvm_version_info", (15, 0, 7))
    return str(request.param)


def online_teacher(dtype: torch.dtype, **options: Any) -> dict[str, torch.Tensor]:
    """Of a student with a large and a small tensor, after some updates."""
    torch.manual_seed(0)
    student = nn.Linear(1000, 333).to(dtype)
    made = MeanTeacher(student, **options)
    for _ in range(4):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.normal_()
        made.update()
    return made.tensors()


@pytest.fixture
def num_served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many elements each online update left to kernels."""
    counts: list[int] = []

    def count(pairs: list[Pair], keep: float, take: float, *, lerp: bool) -> list[Pair]:
        left = update_all_(pairs, keep, take, lerp=lerp)
        counts.append(sum(old.numel() for old, _ in pairs) - sum(old.numel() for old, _ in left))
        return left

    monkeypatch.setattr(rule, "update_all_", count)
    return counts


@pytest.mark.parametrize("arithmetic", ["hook", "lerp"])
@pytest.mark.parametrize("dtype", STUDENTS)
def test_online_the_bits_are_the_same_without(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, arithmetic: Any, without: str
) -> None:
    """For every dtype of a student, whatever is missing."""
    poor = online_teacher(dtype, momentum=0.01, arithmetic=arithmetic)
    assert not any(isinstance(found, compiled.Kernel) for found in compiled._found.values()), without
    monkeypatch.undo()
    rich = online_teacher(dtype, momentum=0.01, arithmetic=arithmetic)
    assert isinstance(compiled._found[torch.float32, dtype, arithmetic == "lerp"], compiled.Kernel)
    assert_same_bits(poor, rich)


@pytest.mark.parametrize("momentum", [0.1, 0.4999999999, 0.5, 0.9])
def test_online_lerp_has_torchs_bits_on_both_sides_of_a_half(momentum: float, num_served: list[int]) -> None:
    """From there on torch counts from the other end, and as a float32 what is very near to a half is one."""
    torch.manual_seed(0)
    student = nn.Linear(1000, 333).bfloat16()
    with pytest.warns(UserWarning, match="momentum") if momentum > 0.5 else contextlib.nullcontext():
        teacher = MeanTeacher(student, momentum=momentum, arithmetic="lerp")
    teacher.update()
    expected = {name: tensor.clone() for name, tensor in teacher.tensors().items()}
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.normal_()
            expected[name].lerp_(parameter.float(), momentum)
    teacher.update()
    assert_same_bits(teacher.tensors(), expected)
    assert num_served == ([10 * GRAIN] if momentum < 0.4 else [])


@pytest.mark.usefixtures("untried")
def test_without_llvmlite_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason names what is missing, or what it is not made for."""
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    assert "llvmlite" in why_not(torch.float32, torch.bfloat16)
    assert why_not(torch.float64, torch.bfloat16) == "it is not made for torch.float64 and torch.bfloat16"


# --- in the fold ------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Everything is worth a kernel; how many students each call of one folds."""
    made: list[int] = []
    original = find_kernel

    def counted(teacher: torch.dtype, student: torch.dtype) -> Any:
        kernel = original(teacher, student)
        if kernel is None:
            return None
        kernel = copy.copy(kernel)
        fold = kernel.fold

        def told(place: int, count: int, students: list[int], updates: Any) -> None:
            made.append(len(students))
            fold(place, count, students, updates)

        kernel.fold = told  # type: ignore[method-assign]
        return kernel

    for dtype in STUDENTS:  # so that they are there from the first block on
        original(torch.float32, dtype)
    monkeypatch.setattr(cpu, "COMPILED_UPDATES", 1)
    monkeypatch.setattr(cpu, "find_kernel", counted)
    return made


def saved_run(folder: Path, size: int) -> Path:
    """Three students of one tensor in bfloat16."""
    run = folder / "run"
    run.mkdir()
    for number in range(3):
        torch.manual_seed(number)
        save_file({"weight": torch.randn(size).bfloat16()}, run / f"step_{number}.safetensors")
    return run


def folded(folder: Path, **options: Any) -> list[dict[str, torch.Tensor]]:
    """The teachers of the run beside `folder`, folded in small blocks."""
    output = folder / ("{momentum}.safetensors" if isinstance(options["momentum"], list) else "teacher.safetensors")
    folder.mkdir()
    quiet_fold(folder.parent / "run", output, memory_budget_bytes=1 << 17, num_threads=2, **options)
    return [load_file(path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize(
    "options", [{"momentum": 0.3}, {"momentum": [0.001, 0.5, 0.9]}, {"momentum": 0.3, "accumulate": "float64"}]
)
@pytest.mark.parametrize("dtype", [*STUDENTS, torch.float32, torch.float64])
def test_a_fold_has_the_bytes_that_torchs_calls_make(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[int],
    dtype: torch.dtype,
    options: dict[str, Any],
) -> None:
    """By a kernel where there is one; several teachers, the last block not full."""
    run = tmp_path / "run"
    run.mkdir()
    for number in range(7):
        torch.manual_seed(number)
        students = {"one": torch.randn(300, 301).to(dtype), "other": torch.randn(77).to(dtype)}
        save_file(students, run / f"step_{number}.safetensors")
    found = folded(tmp_path / "found", **options)
    # Of six students behind the first, three at a time.
    assert set(calls) == ({3} if dtype in STUDENTS and "accumulate" not in options else set())
    monkeypatch.setattr(cpu, "find_kernel", lambda *_: None)
    num_calls = len(calls)
    expected = folded(tmp_path / "expected", **options)
    assert len(calls) == num_calls
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", ["student", "bfloat16", "float16", "float32"])
def test_each_dtype_has_its_own_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[int], dtype: str
) -> None:
    """Of a model of several, for widening and for narrowing; written in the student's dtype or in another one."""
    run = tmp_path / "run"
    run.mkdir()
    for number in range(4):
        torch.manual_seed(number)
        tensors = {f"{student}": torch.randn(4097).to(student) for student in (*STUDENTS, torch.float32)}
        save_file(tensors, run / f"step_{number}.safetensors")
    found = folded(tmp_path / "found", momentum=0.3, dtype=dtype)
    assert calls
    monkeypatch.setattr(cpu, "find_kernel", lambda *_: None)
    expected = folded(tmp_path / "expected", momentum=0.3, dtype=dtype)
    assert_same_bits(found[0], expected[0])


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("dtype", STUDENTS)
def test_what_lies_behind_the_last_element_is_not_looked_at(tmp_path: Path, dtype: torch.dtype) -> None:
    """A buffer keeps what was in it before, such as integers that are NaN as numbers of another dtype."""
    run = tmp_path / "run"
    run.mkdir()
    for number in range(3):
        tensors = {"counter": torch.full((4096,), -1), "weight": torch.full((33,), float(number)).to(dtype)}
        save_file(tensors, run / f"step_{number}.safetensors")
    output = tmp_path / "teacher.safetensors"
    quiet_fold(run, output, momentum=0.5, num_threads=1)
    assert load_file(output)["weight"].eq(1.25).all()


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("dtype", STUDENTS)
@pytest.mark.parametrize("momentum", [0.3, [0.3, 0.9]])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_what_is_not_finite_is_found_behind_a_kernel(
    tmp_path: Path, dtype: torch.dtype, momentum: Any, value: float
) -> None:
    """The tensor and the checkpoint are named as torch's calls let them be; none is written."""
    run = tmp_path / "run"
    run.mkdir()
    for number in range(4):
        students = {f"layer_{index}": torch.full((50_001,), 0.5, dtype=dtype) for index in range(3)}
        if number == 2:
            students["layer_1"][37_777] = value
        save_file(students, run / f"step_{number}.safetensors")
    with pytest.raises(CkptEmaError, match=r"layer_1.*step_2|step_2.*layer_1"):
        folded(tmp_path / "found", momentum=momentum)
    assert not list((tmp_path / "found").iterdir())


def test_while_a_kernel_is_compiled_the_fold_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    """With torch's calls; from then on with the kernel, and to the same bytes."""
    run = saved_run(tmp_path, 600_000)
    monkeypatch.setattr(compiled, "_found", {})
    half_way, compiled_by_then = threading.Event(), threading.Event()
    counted = cpu.find_kernel

    def slowly(*dtypes: torch.dtype) -> Any:
        half_way.wait(20)
        try:
            return counted(*dtypes)
        finally:
            compiled_by_then.set()

    def progress(num_bytes: int, num_bytes_in_all: int) -> None:
        if num_bytes > num_bytes_in_all / 2 and not half_way.is_set():
            assert not calls
            half_way.set()
            compiled_by_then.wait(20)

    monkeypatch.setattr(cpu, "find_kernel", slowly)
    quiet_fold(run, tmp_path / "found.safetensors", momentum=0.3, memory_budget_bytes=1 << 17, progress=progress)
    assert half_way.is_set()
    assert calls
    monkeypatch.setattr(cpu, "find_kernel", lambda *_: None)
    quiet_fold(run, tmp_path / "expected.safetensors", momentum=0.3)
    assert_same_bits(load_file(tmp_path / "found.safetensors"), load_file(tmp_path / "expected.safetensors"))


@pytest.mark.usefixtures("untried")
def test_only_what_pays_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is averaged; a short fold would be done before."""
    run = tmp_path / "run"
    run.mkdir()
    for number in range(3):
        model = {"weight": torch.randn(1000).bfloat16(), "running_mean": torch.randn(5000).half()}
        save_file(model, run / f"step_{number}.safetensors")
    quiet_fold(run, tmp_path / "teacher.safetensors")
    for number, worth in enumerate((6001, 6000)):  # three teachers, two students behind the first
        assert not compiled._found
        monkeypatch.setattr(cpu, "COMPILED_UPDATES", worth)
        quiet_fold(run, tmp_path / f"{number}-{{momentum}}.safetensors", momentum=[0.1, 0.2, 0.3])
    assert list(compiled._found) == [(torch.float32, torch.bfloat16, False)]


def test_a_kernel_that_cannot_be_tried_fails_no_fold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    """Torch's calls do it, to the same bytes."""
    run = saved_run(tmp_path, 5000)
    monkeypatch.setattr(cpu, "COMPILED_UPDATES", 1)
    report = quiet_fold(run, tmp_path / "found.safetensors", momentum=0.3)
    monkeypatch.undo()
    quiet_fold(run, tmp_path / "expected.safetensors", momentum=0.3)
    # Who asks for more words is told; online alone needs threads of torch's.
    lines = summary_text(report, verbose=True)
    reason = {"no llvmlite": "llvmlite", "an old one": "is older than 0.45", "no OpenMP": None}.get(without, "memory")
    assert ("bfloat16 by torch's calls: " in lines) == (reason is not None)
    assert reason is None or reason in lines
    assert "by torch's calls" not in summary_text(report)
    assert_same_bits(load_file(tmp_path / "found.safetensors"), load_file(tmp_path / "expected.safetensors"))


def test_where_no_more_threads_start_torchs_calls_fold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untried: None
) -> None:
    """One for the fold is there, none for compiling; and online there is none at all."""
    run = saved_run(tmp_path, 5000)
    monkeypatch.setattr(cpu, "COMPILED_UPDATES", 1)
    original, started = threading.Thread.start, []

    def begin(self: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(self)
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", begin)
        quiet_fold(run, tmp_path / "found.safetensors", momentum=0.3, num_threads=1)
        assert why_not(torch.float32, torch.bfloat16) == "no thread could be started for it"
    assert find_kernel(torch.float32, torch.bfloat16) is not None
    quiet_fold(run, tmp_path / "expected.safetensors", momentum=0.3)
    assert_same_bits(load_file(tmp_path / "found.safetensors"), load_file(tmp_path / "expected.safetensors"))


def test_inputs_are_taken_together_where_one_kernel_serves_them() -> None:
    """In their order, up to three; the first is the teacher, and what has no kernel comes alone."""
    one, other = (find_kernel(torch.float32, student) for student in STUDENTS)
    kernels = [one, one, one, one, one, None, None, one, other, other]
    assert list(cpu.batches(kernels, 3)) == [
        (one, [1, 2, 3]),
        (one, [4]),
        (None, [5]),
        (None, [6]),
        (one, [7]),
        (other, [8, 9]),
    ]
    assert not list(cpu.batches([one], 3))


def test_halves_of_a_buffer_share_its_memory_and_no_more() -> None:
    """What is written into one is not in the other, by bytes or by elements."""
    buffer = Buffer(4096)
    bfloat16 = BY_NAME["bfloat16"]
    buffer.elements(bfloat16, 2048).zero_()
    left, right = buffer.split()
    left.elements(bfloat16, 1024).fill_(1)
    right.bytes[:2] = b"\x00\x40"
    assert buffer.elements(bfloat16, 2048).tolist() == [1.0] * 1024 + [2.0] + [0.0] * 1023
    assert [left.address, right.address] == [buffer.address, buffer.address + 2048]
    assert len(left.bytes) == len(right.bytes) == 2048


def test_averages_of_another_dtype_are_folded_in_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    """Snapshots in float32 between students in bfloat16: by torch's calls and by the kernel."""
    torch.manual_seed(0)
    student = nn.Sequential(*(nn.Linear(30 + index, 30 + index + 1, bias=False) for index in range(20))).bfloat16()
    teacher = MeanTeacher(student, snapshots=Snapshots(tmp_path / "run", every=4))
    for step in range(1, 25):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        teacher.update()
        if step % 3 == 0:
            save_file(student.state_dict(), tmp_path / "run" / f"step_{step}.safetensors")
    teachers = []
    for kernels in (cpu.find_kernel, lambda *_: None):
        monkeypatch.setattr(cpu, "find_kernel", kernels)
        path = tmp_path / f"{len(teachers)}.safetensors"
        reconstruct(tmp_path / "run", path, momentum=0.05, announce=lambda plan: None)
        teachers.append(load_file(path))
    assert len(calls) > 1
    assert_same_bits(*teachers)
