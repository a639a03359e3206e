"""The fold itself: its bits, whatever the dtype, the layout in memory, the budget and the number of threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import StateDict, assert_same_bits, hook_teacher, make_student, quiet_fold, raw_bytes, save_students

BUFFERS = ("bn.running_mean",)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("momentum", [0.001, 0.3, 0.999])
def test_fold_has_the_bits_of_the_hook(tmp_path: Path, suffix: str, momentum: float) -> None:
    """On float32 students the fold is the hook's loop bit for bit; buffers come from the newest student."""
    students = save_students(tmp_path / "run", 5, suffix=suffix)
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=momentum)
    assert_same_bits(load_file(tmp_path / "t.safetensors"), hook_teacher(students, momentum, BUFFERS))


def test_without_skipping_every_floating_point_tensor_is_averaged(tmp_path: Path) -> None:
    """`skip_buffers=False` is the hook's other mode: running statistics are averaged, integers are not."""
    students = save_students(tmp_path / "run", 4)
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.2, skip_buffers=False)
    assert_same_bits(load_file(tmp_path / "t.safetensors"), hook_teacher(students, 0.2))


def test_closed_form_agrees_with_the_recurrence(tmp_path: Path) -> None:
    """The fold in float64 is the weighted sum with the planned coefficients, to float32's last place."""
    students = save_students(tmp_path / "run", 6)
    report = quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.1, accumulate="float64")
    shares = [checkpoint.coefficient for checkpoint in report.plan.checkpoints]
    assert sum(shares) == pytest.approx(1, abs=1e-15)
    expected = sum(share * student["fc.weight"].double() for share, student in zip(shares, students, strict=True))
    torch.testing.assert_close(
        load_file(tmp_path / "t.safetensors")["fc.weight"], expected.float(), rtol=1e-7, atol=1e-8
    )


def test_interval_counts_from_the_first_checkpoint(tmp_path: Path) -> None:
    """`interval=2` copies the first and folds every second one after it, as the hook skips iterations."""
    students = save_students(tmp_path / "run", 6)
    report = quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.1, interval=2)
    assert [checkpoint.step for checkpoint in report.plan.checkpoints] == [100, 300, 500]
    assert_same_bits(load_file(tmp_path / "t.safetensors"), hook_teacher(students[::2], 0.1, BUFFERS))


def test_an_initial_teacher_continues_a_fold(tmp_path: Path) -> None:
    """Folding three checkpoints and then two more onto the teacher equals folding all five at once."""
    students = save_students(tmp_path / "run", 5)
    quiet_fold(tmp_path / "run", tmp_path / "early.safetensors", momentum=0.1, until_step=300)
    quiet_fold(
        tmp_path / "run", tmp_path / "t.safetensors", momentum=0.1, from_step=400, init=tmp_path / "early.safetensors"
    )
    assert_same_bits(load_file(tmp_path / "t.safetensors"), hook_teacher(students, 0.1, BUFFERS))


def test_an_initial_teacher_may_be_wider_and_without_buffers(tmp_path: Path) -> None:
    """A float32 teacher starts a fold of bfloat16 students; what is copied need not be in it."""
    folder = tmp_path / "run"
    folder.mkdir()
    students = [{"w": torch.randn(300).bfloat16(), "n": torch.tensor(k)} for k in range(3)]
    for k, student in enumerate(students):
        torch.save(student, folder / f"step_{k}.pt")
    start = torch.randn(300)
    torch.save({"w": start}, tmp_path / "init.pt")
    quiet_fold(folder, tmp_path / "t.safetensors", momentum=0.1, init=tmp_path / "init.pt", dtype="float32")
    expected = start.clone()
    for student in students:
        expected.mul_(1 - 0.1).add_(student["w"].float(), alpha=0.1)
    assert_same_bits(load_file(tmp_path / "t.safetensors"), {"w": expected, "n": torch.tensor(2)})


def odd_student(seed: int) -> dict[str, torch.Tensor]:
    """Every kind of tensor that a checkpoint may hold."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weight = randn(300, 200)
    return {
        "weight": weight,
        "tied.weight": weight,
        "tied.view": weight[10:20],
        "scalar": randn(),
        "empty": torch.empty(0, 3),
        "transposed": randn(50, 60).t(),
        "channels_last": randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        "sliced": randn(40, 40)[:, ::3],
        "expanded": randn(1, 6).expand(4, 6),
        "permuted": randn(6, 7, 8).permute(2, 0, 1),
        "double": randn(9).double(),
        "half": randn(33, dtype=torch.float16),
        "brain": randn(4, 4, dtype=torch.bfloat16),
        "eight_bits": randn(100, dtype=torch.float8_e4m3fn),
        "complex": torch.randn(5, generator=generator, dtype=torch.complex64),
        "flag": torch.tensor([True, False, seed % 2 == 0]),
        "count": torch.tensor(seed),
        "short": torch.tensor([seed, -seed], dtype=torch.int16),
    }


def odd_teacher(count: int, momentum: float) -> dict[str, torch.Tensor]:
    """Narrow dtypes accumulate in float32 and are rounded once; everything else is the hook's."""
    narrow = ("half", "brain", "eight_bits")
    students = [odd_student(seed) for seed in range(1, count + 1)]
    widened = [{n: t.float() if n in narrow else t.contiguous() for n, t in student.items()} for student in students]
    teacher = hook_teacher(widened, momentum)
    return {name: tensor.to(students[0][name].dtype) for name, tensor in teacher.items()}


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize(("memory", "threads"), [(256 << 20, None), (1 << 17, 2), (1 << 16, 1)])
def test_every_kind_of_tensor_comes_out_right(
    tmp_path: Path, zip_format: bool, memory: int, threads: int | None
) -> None:
    """0-dim, empty, strided, tied, 8-bit, complex, bool and integer tensors, under any budget."""
    run = tmp_path / "run"
    run.mkdir()
    for seed in range(1, 5):
        torch.save(odd_student(seed), run / f"step_{seed}.pt", _use_new_zipfile_serialization=zip_format)
    quiet_fold(run, tmp_path / "t.safetensors", momentum=0.1, memory_budget_bytes=memory, num_threads=threads)
    assert_same_bits(load_file(tmp_path / "t.safetensors"), odd_teacher(4, 0.1))


def test_large_non_contiguous_tensors_are_gathered_in_pieces(tmp_path: Path) -> None:
    """A transposed tensor larger than the buffers comes out in row-major order."""
    run = tmp_path / "run"
    run.mkdir()
    students = []
    for seed in range(1, 4):
        generator = torch.Generator().manual_seed(seed)
        student = {
            "t": torch.randn(257, 129, generator=generator).t(),
            "c": torch.randn(9, 8, 17, 5, generator=generator).to(memory_format=torch.channels_last),
            "s": torch.randn(64, 64, 8, generator=generator).permute(1, 2, 0)[3:, ::2, ::3],
        }
        torch.save(student, run / f"step_{seed}.pt")
        students.append({name: tensor.contiguous() for name, tensor in student.items()})
    quiet_fold(run, tmp_path / "t.safetensors", momentum=0.1, memory_budget_bytes=40_000, num_threads=1)
    assert_same_bits(load_file(tmp_path / "t.safetensors"), hook_teacher(students, 0.1))


def test_tied_tensors_keep_all_their_names_and_are_read_once(tmp_path: Path) -> None:
    """Two names for one storage: both are in the teacher, the bytes are read once."""
    run = tmp_path / "run"
    run.mkdir()
    for seed in range(1, 3):
        weight = make_student(seed)["fc.weight"]
        torch.save({"wte.weight": weight, "lm_head.weight": weight}, run / f"step_{seed}.pt")
    report = quiet_fold(run, tmp_path / "t.safetensors", momentum=0.1)
    teacher = load_file(tmp_path / "t.safetensors")
    assert raw_bytes(teacher["wte.weight"]) == raw_bytes(teacher["lm_head.weight"])
    assert report.plan.bytes_to_read == 2 * 37 * 19 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_teacher_can_be_written_in_another_dtype(tmp_path: Path, dtype: str) -> None:
    """`dtype` rounds once, at the end, and leaves integers alone."""
    students = save_students(tmp_path / "run", 3)
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.1, dtype=dtype)
    expected = hook_teacher(students, 0.1, BUFFERS)
    wanted = {n: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for n, t in expected.items()}
    assert_same_bits(load_file(tmp_path / "t.safetensors"), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_accumulating_in_the_students_dtype_is_the_hooks_literal_loop(tmp_path: Path, dtype: torch.dtype) -> None:
    """`accumulate="student"` does what the hook does to half precision: in place, rounding every time."""
    run = tmp_path / "run"
    run.mkdir()
    # A multiple of the vector length: the hook's own last few float16 elements depend on the tensor's length.
    students = [{"w": torch.randn(64 * 9, generator=torch.Generator().manual_seed(s)).to(dtype)} for s in range(4)]
    for step, student in enumerate(students):
        torch.save(student, run / f"step_{step}.pt")
    quiet_fold(run, tmp_path / "t.safetensors", momentum=0.1, accumulate="student")
    assert_same_bits(load_file(tmp_path / "t.safetensors"), hook_teacher(students, 0.1))


def test_two_folds_of_the_same_input_are_byte_identical(tmp_path: Path) -> None:
    """Nothing in the teacher depends on the time, the machine or the order of threads."""
    save_students(tmp_path / "run", 4)
    for name in ("a", "b"):
        quiet_fold(tmp_path / "run", tmp_path / f"{name}.safetensors", momentum=0.1)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_an_initial_teacher_of_another_width_enters_scattered_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    """Blocks of many small tensors, whose reads are worked out once, are cut anew for a teacher of another dtype."""
    run = tmp_path / "run"
    run.mkdir()
    students = []
    for i in range(3):
        student: StateDict = {}
        for k in range(12):
            student[f"{k}.weight"] = torch.full((5 + k,), float(10 * k + i))
            # Further apart than is read along, so that the reads of both files look alike but for their widths.
            student[f"{k}.counts"] = torch.full((1000,), i)
        torch.save({"model": student, "step": i}, run / f"step_{i}.pt")
        students.append(student)
    start = {name: (tensor + 4).to(dtype) if "weight" in name else tensor for name, tensor in students[0].items()}
    torch.save(start, tmp_path / "start.pt")
    report = quiet_fold(run, tmp_path / "teacher.safetensors", momentum=0.5, init=tmp_path / "start.pt")
    widened = {name: tensor.float() if "weight" in name else tensor for name, tensor in start.items()}
    assert_same_bits(load_file(report.output), hook_teacher([widened, *students], 0.5))
