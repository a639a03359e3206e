"""The kernel that updates a GPU's tensors: interpreted here, compiled here, and on a GPU against torch's own calls."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from ckpt_ema.engine import fused
from ckpt_ema.engine.fused import BLOCK_ELEMENTS, FusedUpdates, is_usable, update_run_, why_not
from ckpt_ema.online import rule

INTERPRETED = '''
"""What the kernels do, by Triton's interpreter, which rounds a multiply-add twice."""
import contextlib
import torch
from ckpt_ema.engine import fused
from ckpt_ema.engine.fused import BLOCK_ELEMENTS, FusedUpdates, update_run_

torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.is_current_stream_capturing = lambda: False
fused.is_usable = lambda *kind, lerp: True
generator = torch.Generator().manual_seed(0)
shapes = [(3,), (BLOCK_ELEMENTS,), (1,), (0,), (2, BLOCK_ELEMENTS + 5), (), (4, 3, 2, 2), (BLOCK_ELEMENTS - 1,)]
for teacher_dtype, student_dtype, lerp in (
    (torch.float32, torch.float32, False),
    (torch.float32, torch.float16, False),
    (torch.float16, torch.float16, False),
    (torch.float16, torch.float32, False),
    (torch.float32, torch.float16, True),
):
    teachers = [torch.randn(shape, generator=generator).to(teacher_dtype) for shape in shapes]
    students = [torch.randn(shape, generator=generator).to(student_dtype) for shape in shapes]
    for tensors in (teachers, students):
        tensors[6] = tensors[6].to(memory_format=torch.channels_last)
    transposed = torch.randn(5, 4, generator=generator).to(teacher_dtype)
    teachers += [transposed.t(), torch.zeros(9, dtype=teacher_dtype)[1:]]
    students += [torch.ones(4, 5, dtype=student_dtype), torch.ones(8, dtype=student_dtype)]
    before = [teacher.clone() for teacher in teachers]
    updates = FusedUpdates(lerp=lerp)
    for take in (0.25, 0.001):
        left = updates.update_(list(zip(teachers, students)), 1 - take, take)
        # Not lying alike, and not beginning at a multiple of 16 bytes.
        assert [teacher.data_ptr() for teacher, _ in left if teacher.numel()] == [
            teacher.data_ptr() for teacher in teachers[-2:]
        ]
        for old, new, student in zip(before[:-2], teachers, students):
            expected = old.double() * (1 - take) + student.double() * take
            tolerance = 4 * torch.finfo(teacher_dtype).eps
            assert torch.allclose(new.double(), expected, rtol=tolerance, atol=tolerance), teacher_dtype
            old.copy_(new)
        assert all(torch.equal(old, new) for old, new in zip(before[-2:], teachers[-2:]))
    if not lerp:
        teacher, student = teachers[4].view(-1), students[4].view(-1)
        expected = teacher.double() * 0.75 + student.double() * 0.25
        update_run_(teacher, student, 0.75, 0.25)
        assert torch.allclose(teacher.double(), expected, rtol=tolerance, atol=tolerance)

# What was worked out for tensors at the same addresses does not hold for others there.
teacher, other = torch.zeros(2, 64, 64)
student = torch.randn(64, 64, generator=generator).to(torch.float16)
updates = FusedUpdates(lerp=False)
assert not updates.update_([(teacher, student)], 0.5, 0.5)
for changed in (student.t(), student.view(torch.int16)):
    before = teacher.clone()
    fused.is_usable = lambda device, one, two, lerp: two is not torch.int16
    assert len(updates.update_([(teacher, changed)], 0.5, 0.5)) == 1
    assert torch.equal(teacher, before)
# Every second element of both: they lie alike, with something between them.
before = other.clone()
assert len(updates.update_([(other[:, ::2], torch.ones(64, 64)[:, ::2])], 0.5, 0.5)) == 1
assert torch.equal(other, before)
# The kernel tells autograd what it changed.
weight = torch.ones(8, requires_grad=True)
product = (weight * other[0, :8]).sum()
assert not updates.update_([(other[0, :8], torch.ones(8))], 0.5, 0.5)
try:
    product.backward()
    raise AssertionError("a gradient of numbers that are not there any more")
except RuntimeError as error:
    assert "modified by an inplace operation" in str(error)
print("as they should be")
'''


def test_the_kernels_reach_every_element_once() -> None:
    """Of tensors of any length, in one launch for all; what they do not serve comes back untouched."""
    pytest.importorskip("triton", reason="needs Triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout == "as they should be\n", done.stderr


TYPES = {"float32": "*fp32", "bfloat16": "*bf16"}


@pytest.mark.parametrize("kernel", ["update_many", "update_run"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("teacher", "student"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
)
def test_the_kernel_is_compiled_to_the_hooks_two_roundings(
    capability: int, teacher: str, student: str, kernel: str
) -> None:
    """A product that is rounded, then a multiply-add that is rounded once; 16 bytes at a time; nothing flushed to zero.

    Compiled for GPUs that need not be there (A100 and H100).
    """
    triton = pytest.importorskip("triton", reason="needs Triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ckpt_ema.engine import kernels

    constants = {"block": BLOCK_ELEMENTS}
    if kernel == "update_many":
        given = dict.fromkeys(("chunks", "teachers", "students", "counts"), "*i64")
        dtypes = {"teacher_dtype": teacher, "student_dtype": student}
        constants |= {name: getattr(triton.language, dtype) for name, dtype in dtypes.items()} | {"lerp": False}
        aligned = {}
    else:
        given = {"teacher": TYPES[teacher], "student": TYPES[student], "count": "i64"}
        # As Triton finds of the addresses that it is called with.
        aligned = {(place,): [["tt.divisibility", 16]] for place in (0, 1)}
    signature = given | {"keep": "fp32", "take": "fp32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(getattr(kernels, kernel), signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": fused.NUM_WARPS}
    program = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    arithmetic = set(re.findall(r"(?:mul|add|sub|fma)[\w.]*\.f32\b", program))
    assert arithmetic == {"mul.f32", "fma.rn.f32"}
    assert "ld.global.v4.b32" in program
    assert "st.global.v4.b32" in program
    # The product is what the multiply-add adds to: nothing is left that could be rounded together.
    products = set(re.findall(r"mul\.f32\s+(%\w+)", program))
    if teacher == "float32":
        sums = re.findall(r"fma\.rn\.f32\s+%\w+, %\w+, %\w+, (%\w+)", program)
        assert set(sums) == products
    else:
        rounded = set(re.findall(r"cvt\.rn\.bf16(?:x2)?\.f32\s+%\w+, (%\w+)", program))
        rounded |= set(re.findall(r"cvt\.rn\.bf16x2\.f32\s+%\w+, %\w+, (%\w+)", program))
        assert products <= rounded


def test_from_a_half_on_lerp_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """There torch counts from the other end, and rounds otherwise than the kernel."""
    monkeypatch.setattr(rule, "_any_on_gpu", lambda tensors: True)
    served: list[float] = []

    def update_(self: FusedUpdates, pairs: list[fused.Pair], keep: float, take: float) -> list[fused.Pair]:
        served.append(take)
        return pairs

    monkeypatch.setattr(FusedUpdates, "update_", update_)
    for momentum in (0.1, 0.49, 0.5, 0.9):
        teacher, student = torch.zeros(3), torch.ones(3)
        rule.Rule(lerp=True).average_all_([teacher], [student], momentum)
        assert torch.equal(teacher, torch.zeros(3).lerp(student, momentum))
    assert served == [0.1, 0.49]


@pytest.fixture
def has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One that only says that no graph is captured, and how waits are to be treated; what it is told comes back."""
    told: list[int] = []
    monkeypatch.setattr(fused, "_reasons", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: told[-1] if told else 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", told.append)
    return told


def test_a_full_device_is_no_reason_for_good(monkeypatch: pytest.MonkeyPatch, has_a_gpu: list[int]) -> None:
    """Any other is tried once."""
    errors: list[Exception] = [torch.cuda.OutOfMemoryError("full"), ImportError("no Triton")]

    def fail(*_: object) -> bool:
        raise errors.pop(0)

    monkeypatch.setattr(fused, "_has_torchs_bits", fail)
    kind = torch.device("cuda", 0), torch.float32, torch.float32
    assert [why_not(*kind) for _ in range(3)] == ["full", "ImportError: no Triton", "ImportError: no Triton"]
    assert not has_a_gpu


def test_who_looks_for_waits_does_not_find_the_trial(monkeypatch: pytest.MonkeyPatch, has_a_gpu: list[int]) -> None:
    """It waits once, which is allowed for as long as it takes and not longer."""
    has_a_gpu.append(2)
    monkeypatch.setattr(fused, "_has_torchs_bits", lambda *_: has_a_gpu == [2, 0])
    assert is_usable(torch.device("cuda", 0), torch.float32, torch.float32)
    assert has_a_gpu == [2, 0, 2]


@pytest.mark.usefixtures("has_a_gpu")
def test_tables_that_could_not_be_made_are_not_taken_for_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same tensors the next update tries again."""
    pairs = [(torch.zeros(4), torch.ones(4))]
    updates = FusedUpdates(lerp=False)
    assert updates.prepare(pairs)
    other = [(torch.zeros(8), torch.ones(8))]
    with monkeypatch.context() as patch:
        patch.setattr(updates, "_divide", lambda _: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                updates.prepare(other)
            with pytest.raises(ZeroDivisionError):
                updates.prepare(pairs)
    assert updates.update_(other, 0.5, 0.5) == other


def test_without_a_gpu_nothing_is_fused() -> None:
    """Tensors on the CPU, and dtypes that the kernel does not know, are left to torch."""
    assert not is_usable(torch.device("cpu"), torch.float32, torch.float32)
    assert not is_usable(torch.device("cuda", 0), torch.float64, torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("teacher", "student", "lerp"),
    [
        (torch.float32, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
        (torch.float32, torch.float16, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float16, torch.float16, False),
        (torch.float32, torch.bfloat16, True),
        (torch.float32, torch.float16, True),
    ],
)
def test_the_kernel_has_torchs_bits(teacher: torch.dtype, student: torch.dtype, lerp: bool) -> None:
    """Over many updates of many tensors; nothing of plain tensors is left to torch."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert not why_not(device, teacher, student, lerp=lerp)
    generator = torch.Generator(device).manual_seed(0)
    sizes = (1, 31, BLOCK_ELEMENTS, 3 * BLOCK_ELEMENTS + 1, 1 << 20)
    ours = [torch.randn(size, generator=generator, device=device).to(teacher) for size in sizes]
    torchs = [tensor.clone() for tensor in ours]
    students = [torch.randn(size, generator=generator, device=device).to(student) for size in sizes]
    updates = FusedUpdates(lerp=lerp)
    for number in range(20):
        take = 0.001 * (number + 1)
        assert not updates.update_(list(zip(ours, students, strict=True)), 1 - take, take)
        for mine, new in zip(torchs, students, strict=True):
            if lerp:
                mine.lerp_(new.to(teacher), take)
            else:
                mine.mul_(1 - take).add_(new, alpha=take)
            new.add_(0.01)
    assert all(torch.equal(one, other) for one, other in zip(ours, torchs, strict=True))
    if not lerp:
        one, other = ours[-1], torchs[-1]
        update_run_(one, students[-1], 0.9, 0.1)
        other.mul_(0.9).add_(students[-1], alpha=0.1)
        assert torch.equal(one, other)
