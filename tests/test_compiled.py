"""The loop that LLVM compiles for a CPU: the bits of torch's calls, every element once; without it, torch's calls."""

from __future__ import annotations

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

from ckpt_ema import MeanTeacher
from ckpt_ema.engine import compiled, cpu
from ckpt_ema.engine.arithmetic import GRAIN, LARGEST_LERP
from ckpt_ema.engine.compiled import RUN_ELEMENTS, kernel_for, update_all_, why_not
from tests.conftest import assert_same_bits, quiet_fold, save_students
from tests.test_arithmetic import values

pytest.importorskip("llvmlite", reason="needs llvmlite")

STUDENTS = (torch.float32, torch.bfloat16, torch.float16)


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
    kernel.update(found.data_ptr(), new.data_ptr(), found.numel(), keep, take)
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
    kernel.update(found.data_ptr(), new.data_ptr(), found.numel(), 1 - take, take)
    assert torch.equal(found.isnan(), expected.isnan())
    assert_same_bits({"teacher": found.nan_to_num()}, {"teacher": expected.nan_to_num()})


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("count", [0, 1, 3, 15, 16, 17, 63, 64, 100, 1023])
def test_any_number_of_elements_is_updated_and_none_behind_them(count: int, student: torch.dtype) -> None:
    """Whole vectors, what is left of one, or nothing."""
    kernel = kernel_for(torch.float32, student)
    assert kernel is not None
    found, new = torch.randn(2048), torch.randn(2048).to(student)
    before = found.clone()
    kernel.update(found.data_ptr(), new.data_ptr(), count, 0.75, 0.25)
    exact = before[:count].double() * 0.75 + new[:count].double() * 0.25
    assert torch.allclose(found[:count].double(), exact, rtol=2e-7, atol=2e-7)
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
    # Of one dtype torch's lerp is one pass already.
    served = sum(sizes) + 4 * GRAIN - sum(old.numel() for old, _ in left)
    assert served == (0 if lerp and student is torch.float32 else (1 + 2 + 37 + 96) * GRAIN)


def test_what_is_left_to_torch_comes_back_untouched() -> None:
    """Other dtypes, other devices, and tensors with something between their elements."""
    shape = (2, GRAIN)
    pairs = [
        (torch.zeros(shape, dtype=torch.float64), torch.ones(shape)),
        (torch.zeros(shape, dtype=torch.bfloat16), torch.ones(shape)),
        (torch.zeros(shape, dtype=torch.complex64), torch.ones(shape)),
        (torch.zeros(shape), torch.ones(shape, dtype=torch.int16)),
        (torch.zeros(shape), torch.ones(shape, dtype=torch.float8_e4m3fn)),
        (torch.zeros(shape), torch.ones(4, GRAIN)[::2]),
        (torch.zeros(4, GRAIN)[::2], torch.ones(shape)),
        (torch.zeros(shape, device="meta"), torch.ones(shape, device="meta")),
    ]
    assert [(id(old), id(new)) for old, new in update_all_(pairs, 0.5, 0.5, lerp=False)] == [
        (id(old), id(new)) for old, new in pairs
    ]
    assert not any(old.double().any() for old, _ in pairs[:2] + pairs[3:-1])


def test_autograd_is_told_what_a_kernel_changed() -> None:
    """As of any change in place; a tensor of inference mode has nobody to tell."""
    weight, teacher = torch.ones(GRAIN, requires_grad=True), torch.zeros(GRAIN)
    product = (weight * teacher).sum()
    assert not update_all_([(teacher, torch.ones(GRAIN))], 0.5, 0.5, lerp=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        teacher = torch.zeros(GRAIN)
        assert not update_all_([(teacher, torch.ones(GRAIN))], 0.5, 0.5, lerp=False)
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
    monkeypatch.setattr(compiled, "_HOOK", arithmetic)
    assert why_not(torch.float32, student) == "it rounds in another way than torch"
    assert kernel_for(torch.float32, student) is None


@pytest.mark.usefixtures("untried")
def test_a_kernel_that_widens_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16's bits in the wrong place."""
    monkeypatch.setitem(compiled._WIDEN, torch.bfloat16, compiled._WIDEN[torch.bfloat16].replace("16\n", "15\n"))
    assert why_not(torch.float32, torch.bfloat16) == "it rounds in another way than torch"


@pytest.fixture(params=["no llvmlite", "one of another age", "no OpenMP"])
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
    assert "llvmlite" in why_not(torch.float32, torch.float32)
    assert why_not(torch.float64, torch.float32) == "it is not made for torch.float64 and torch.float32"


# --- in the fold ------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Everything is worth a kernel; (keep, take) of each call of one."""
    made: list[tuple[float, float]] = []
    original = kernel_for

    def counted(teacher: torch.dtype, student: torch.dtype) -> Any:
        kernel = original(teacher, student)

        def update(*arguments: Any) -> None:
            made.append(arguments[-2:])
            kernel.update(*arguments)

        return kernel and kernel._replace(update=update)

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
@pytest.mark.parametrize("dtype", [*STUDENTS, torch.float64])
def test_a_fold_has_the_bytes_that_torchs_calls_make(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[tuple[float, float]],
    dtype: torch.dtype,
    options: dict[str, Any],
) -> None:
    """By a kernel where there is one; several teachers, the last block not full."""
    run = tmp_path / "run"
    run.mkdir()
    for number in range(4):
        torch.manual_seed(number)
        students = {"one": torch.randn(300, 301).to(dtype), "other": torch.randn(77).to(dtype)}
        save_file(students, run / f"step_{number}.safetensors")
    for student in STUDENTS:
        kernel_for(torch.float32, student)
    found = folded(tmp_path / "found", **options)
    is_served = dtype in STUDENTS and "accumulate" not in options
    assert bool(calls) == is_served
    monkeypatch.setattr(cpu, "kernel_for", lambda *_: None)
    num_calls = len(calls)
    expected = folded(tmp_path / "expected", **options)
    assert len(calls) == num_calls
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)


def test_while_a_kernel_is_compiled_the_fold_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[float, float]]
) -> None:
    """With torch's calls; from then on with the kernel, and to the same bytes."""
    run = tmp_path / "run"
    run.mkdir()
    for number in range(3):
        torch.manual_seed(number)
        save_file({"weight": torch.randn(300_000)}, run / f"step_{number}.safetensors")
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
