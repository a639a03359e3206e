"""The loop that LLVM compiles for a CPU: the bits of torch's calls, every element once; without it, torch's calls."""

from __future__ import annotations

import copy
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

from ckpt_ema import MeanTeacher, Snapshots, reconstruct
from ckpt_ema.engine import compiled, cpu, llvm_module
from ckpt_ema.engine.arithmetic import GRAIN, LARGEST_LERP
from ckpt_ema.engine.compiled import RUN_ELEMENTS, kernel_for, update_all_, why_not
from ckpt_ema.engine.llvm_module import PIECE_ELEMENTS
from tests.conftest import assert_same_bits, quiet_fold, save_students
from tests.test_arithmetic import values

pytest.importorskip("llvmlite", reason="needs llvmlite")

STUDENTS = (torch.bfloat16, torch.float16)


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has compiled nothing yet."""
    monkeypatch.setattr(compiled, "_reasons", {})
    monkeypatch.setattr(compiled, "_kernels", {})


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
    kernel = kernel_for(torch.float32, student)
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
    kernel = kernel_for(torch.float32, student, lerp=True)
    assert kernel is not None, why_not(torch.float32, student, lerp=True)
    found, new = values(2, torch.float32), values(3, student)
    expected = found.clone().lerp_(new.float(), take)
    kernel.fold(found.data_ptr(), found.numel(), [new.data_ptr()], [(1 - take, take)])
    assert torch.equal(found.isnan(), expected.isnan())
    assert_same_bits({"teacher": found.nan_to_num()}, {"teacher": expected.nan_to_num()})


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize(
    "count", [0, 1, 15, 16, 17, 64, 1023, PIECE_ELEMENTS, PIECE_ELEMENTS + 1, 3 * PIECE_ELEMENTS - 1]
)
@pytest.mark.parametrize("num_students", [1, 2, 3, 7])
def test_any_number_of_elements_is_folded_and_none_behind_them(
    num_students: int, count: int, student: torch.dtype
) -> None:
    """Whole pieces and vectors, and what is left; every student in its turn."""
    kernel = kernel_for(torch.float32, student)
    assert kernel is not None
    found = torch.randn(3 * PIECE_ELEMENTS)
    news = [torch.randn(3 * PIECE_ELEMENTS).to(student) for _ in range(num_students)]
    updates = [(1 - 0.1 * number, 0.1 * number) for number in range(1, num_students + 1)]
    before = found.clone()
    kernel.fold(found.data_ptr(), count, [new.data_ptr() for new in news], updates)
    exact = before[:count].double()
    for new, (keep, take) in zip(news, updates, strict=True):
        exact = exact * keep + new[:count].double() * take
    assert torch.allclose(found[:count].double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[count:], before[count:])


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("lerp", [False, True])
def test_every_element_of_many_tensors_is_updated_once(num_threads: int, student: torch.dtype, lerp: bool) -> None:
    """By the kernel or, of what comes back, by torch; on any number of threads."""
    sizes = (1, GRAIN - 1, GRAIN, 2 * GRAIN + 77, RUN_ELEMENTS + 5 * GRAIN, 0, 3 * RUN_ELEMENTS)
    found = [torch.randn(size) for size in sizes]
    news = [torch.randn(size).to(student) for size in sizes]
    found.append(torch.randn(4, GRAIN).t())
    news.append(torch.randn(GRAIN, 4).to(student))
    expected = [old.clone() for old in found]
    for old, new in zip(expected, news, strict=True):
        if lerp:
            old.lerp_(new.float(), 0.001)
        else:
            old.mul_(0.999).add_(new.float(), alpha=0.001)
    left = update_all_(list(zip(found, news, strict=True)), 0.999, 0.001, lerp=lerp)
    for old, new in left:
        if lerp:
            old.lerp_(new.float(), 0.001)
        else:
            old.mul_(0.999).add_(new.float(), alpha=0.001)
    for mine, torchs in zip(found, expected, strict=True):
        assert torch.equal(mine, torchs)
    assert sum(sizes) + 4 * GRAIN - sum(old.numel() for old, _ in left) == (1 + 2 + 21 + 48) * GRAIN


def test_what_is_left_to_torch_comes_back_untouched() -> None:
    """Of one dtype, or of others; on other devices; and with something between the elements."""
    shape = (2, GRAIN)
    pairs = [
        (torch.zeros(shape, dtype=torch.float64), torch.ones(shape)),
        (torch.zeros(shape, dtype=torch.bfloat16), torch.ones(shape)),
        (torch.zeros(shape, dtype=torch.complex64), torch.ones(shape)),
        (torch.zeros(shape), torch.ones(shape, dtype=torch.int16)),
        (torch.zeros(shape), torch.ones(shape, dtype=torch.float8_e4m3fn)),
        (torch.zeros(shape), torch.ones(shape)),
        (torch.zeros(shape), torch.ones(4, GRAIN, dtype=torch.bfloat16)[::2]),
        (torch.zeros(4, GRAIN)[::2], torch.ones(shape, dtype=torch.bfloat16)),
        (torch.zeros(shape, device="meta"), torch.ones(shape, dtype=torch.bfloat16, device="meta")),
    ]
    assert [(id(old), id(new)) for old, new in update_all_(pairs, 0.5, 0.5, lerp=False)] == [
        (id(old), id(new)) for old, new in pairs
    ]
    assert not any(old.double().any() for old, _ in pairs[:2] + pairs[3:-1])


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

TWO_ROUNDINGS = """%kept = fmul float %old, %keep
  %share = fmul float %student, %take
  %new = fadd float %kept, %share"""
OTHER_PRODUCT = """%share = fmul float %student, %take
  %new = call float @llvm.fma.f32(float %old, float %keep, float %share)"""


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("arithmetic", [TWO_ROUNDINGS, OTHER_PRODUCT])
@pytest.mark.parametrize("student", STUDENTS)
def test_a_kernel_that_rounds_otherwise_is_not_used(
    monkeypatch: pytest.MonkeyPatch, arithmetic: str, student: torch.dtype
) -> None:
    """Compared with this torch on this machine, not assumed."""
    monkeypatch.setattr(llvm_module, "_HOOK", arithmetic)
    assert why_not(torch.float32, student) == "it rounds in another way than torch"
    assert kernel_for(torch.float32, student) is None


@pytest.mark.usefixtures("untried")
def test_a_kernel_that_widens_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16's bits in the wrong place."""
    monkeypatch.setitem(llvm_module._WIDEN, torch.bfloat16, llvm_module._WIDEN[torch.bfloat16].replace("16\n", "15\n"))
    assert why_not(torch.float32, torch.bfloat16) == "it rounds in another way than torch"


@pytest.fixture(params=["no llvmlite", "an old one", "no OpenMP"])
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, untried: None) -> str:
    """What a kernel needs is missing."""
    if request.param == "no llvmlite":
        monkeypatch.setitem(sys.modules, "llvmlite", None)
    elif request.param == "no OpenMP":
        monkeypatch.setattr(compiled, "_in_torchs_threads", lambda: None)
    else:
        from llvmlite import binding

        monkeypatch.setattr(binding, "llvm_version_info", (15, 0, 7))
    return str(request.param)


@pytest.mark.parametrize("arithmetic", ["hook", "lerp"])
@pytest.mark.parametrize("dtype", STUDENTS)
def test_online_the_bits_are_the_same_without(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, arithmetic: Any, without: str
) -> None:
    """For every dtype of a student, whatever is missing."""
    torch.manual_seed(0)
    student = nn.Linear(1000, 333).to(dtype)
    students = [{name: torch.randn_like(one) for name, one in student.state_dict().items()} for _ in range(4)]

    def teacher() -> dict[str, torch.Tensor]:
        made = MeanTeacher(student, momentum=0.01, arithmetic=arithmetic)
        for state in students:
            student.load_state_dict(state)
            made.update()
        return made.tensors()

    poor = teacher()
    assert not any(compiled._kernels.values())
    monkeypatch.undo()
    assert_same_bits(poor, teacher())


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
    original = kernel_for

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

    monkeypatch.setattr(cpu, "COMPILED_UPDATES", 1)
    monkeypatch.setattr(cpu, "kernel_for", counted)
    return made


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
    for student in STUDENTS:
        kernel_for(torch.float32, student)
    found = folded(tmp_path / "found", **options)
    # Of six students behind the first, three at a time.
    assert set(calls) == ({3} if dtype in STUDENTS and "accumulate" not in options else set())
    monkeypatch.setattr(cpu, "kernel_for", lambda *_: None)
    num_calls = len(calls)
    expected = folded(tmp_path / "expected", **options)
    assert len(calls) == num_calls
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)


def test_while_a_kernel_is_compiled_the_fold_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    """With torch's calls; from then on with the kernel, and to the same bytes."""
    run = tmp_path / "run"
    run.mkdir()
    for number in range(3):
        torch.manual_seed(number)
        save_file({"weight": torch.randn(600_000).bfloat16()}, run / f"step_{number}.safetensors")
    half_way, compiled_by_then = threading.Event(), threading.Event()
    counted = cpu.kernel_for

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

    monkeypatch.setattr(cpu, "kernel_for", slowly)
    quiet_fold(run, tmp_path / "found.safetensors", momentum=0.3, memory_budget_bytes=1 << 17, progress=progress)
    assert half_way.is_set()
    assert calls
    monkeypatch.setattr(cpu, "kernel_for", lambda *_: None)
    quiet_fold(run, tmp_path / "expected.safetensors", momentum=0.3)
    assert_same_bits(load_file(tmp_path / "found.safetensors"), load_file(tmp_path / "expected.safetensors"))


def test_a_short_fold_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untried: None) -> None:
    """It would be done before; and what is copied needs no kernel."""
    save_students(tmp_path / "run", 3)
    quiet_fold(tmp_path / "run", tmp_path / "teacher.safetensors")
    assert not compiled._kernels


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
    for dtype in STUDENTS:
        kernel_for(torch.float32, dtype)
    teachers = []
    for kernels in (cpu.kernel_for, lambda *_: None):
        monkeypatch.setattr(cpu, "kernel_for", kernels)
        path = tmp_path / f"{len(teachers)}.safetensors"
        reconstruct(tmp_path / "run", path, momentum=0.05, announce=lambda plan: None)
        teachers.append(load_file(path))
    assert len(calls) > 1
    assert_same_bits(*teachers)
