"""What holds for every run, whatever its tensors, files, budget and threads: properties, on real files."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ckpt_ema
from ckpt_ema.averages.profiles import coefficients_of, ema_updates
from ckpt_ema.errors import MisuseError
from tests.conftest import StateDict, assert_same_bits, hook_teacher, quiet_fold
from tests.test_safety import write_sparse

STORAGES = ("zip", "legacy", "safetensors")
EXACT = (torch.float32, torch.float64, torch.complex64)
NARROW = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
LAYOUTS = ("plain", "transposed", "strided", "expanded", "sliced")
MOMENTA = st.one_of(st.floats(1e-6, 1 - 1e-6), st.sampled_from([0.5, 1e-12, 0.001, 1 - 2**-53]))
BUDGETS = st.integers(1 << 17, 1 << 22)
THREADS = st.sampled_from([None, 1, 2, 3, 7])


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder per example: pytest's tmp_path is one per test."""
    folder = Path(tempfile.mkdtemp(prefix="ckpt-ema-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def random_tensor(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    """Values of any dtype, lying in memory in any of the orders that training code leaves behind."""

    def values(*size: int) -> torch.Tensor:
        if dtype in INTEGERS:
            return torch.randint(0, 2 if dtype is torch.bool else 100, size, generator=generator).to(dtype)
        return torch.randn(size, generator=generator, dtype=torch.float32).to(dtype)

    if layout == "transposed":
        return values(*reversed(shape)).permute(*reversed(range(len(shape)))) if shape else values()
    if layout == "strided" and shape:
        return values(*shape[:-1], shape[-1] * 2)[..., ::2]
    if layout == "expanded" and shape:
        return values(1, *shape[1:]).expand(shape)
    if layout == "sliced" and shape:
        return values(shape[0] + 3, *shape[1:])[2:-1]
    return values(*shape)


ENTRIES = st.tuples(
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.sampled_from((*EXACT, *NARROW, *INTEGERS)),
    st.sampled_from(LAYOUTS),
)
MODELS = st.dictionaries(st.text('ab.é"\\ /', min_size=1, max_size=6), ENTRIES, min_size=1, max_size=7)


def make_students(model: dict[str, tuple[tuple[int, ...], torch.dtype, str]], count: int, seed: int) -> list[StateDict]:
    """`count` students of one model."""
    generator = torch.Generator().manual_seed(seed)
    return [{name: random_tensor(generator, *entry) for name, entry in model.items()} for _ in range(count)]


def save_as(storage: str, student: StateDict, folder: Path, step: int) -> Path:
    """One checkpoint, written by the real libraries."""
    if storage == "safetensors":
        path = folder / f"step_{step}.safetensors"
        save_file({name: tensor.contiguous().clone() for name, tensor in student.items()}, path)
    else:
        path = folder / f"step_{step}.pt"
        torch.save(student, path, _use_new_zipfile_serialization=storage == "zip")
    return path


def expected_teacher(students: list[StateDict], momentum: float) -> StateDict:
    """The hook's rule; half precision and 8 bits accumulate in float32 and are rounded once. Complex is averaged."""
    widened = [
        {n: t.float() if t.dtype in NARROW else t.contiguous() for n, t in student.items()} for student in students
    ]
    return {n: t.to(students[0][n].dtype) for n, t in hook_teacher(widened, momentum).items()}


@given(
    model=MODELS,
    count=st.integers(1, 4),
    seed=st.integers(0, 999),
    storage=st.sampled_from(STORAGES),
    momentum=MOMENTA,
    budget=BUDGETS,
    threads=THREADS,
)
@settings(max_examples=60)
def test_any_state_dict_folds_to_the_bits_of_the_rule(
    model: dict[str, Any], count: int, seed: int, storage: str, momentum: float, budget: int, threads: int | None
) -> None:
    """Whatever the names, dtypes, shapes, strides, storage, budget and threads: the hook's rule bit for bit."""
    assume(any(shape and 0 not in shape for shape, _, _ in model.values()))
    students = make_students(model, count, seed)
    with temporary_folder() as folder:
        for step, student in enumerate(students):
            save_as(storage, student, folder, step)
        report = quiet_fold(
            folder, folder / "t.safetensors", momentum=momentum, memory_budget_bytes=budget, num_threads=threads
        )
        assert_same_bits(load_file(folder / "t.safetensors"), expected_teacher(students, momentum))
        assert report.plan.buffer_bytes <= budget


@given(model=MODELS, seed=st.integers(0, 999), storage=st.sampled_from(STORAGES))
@settings(max_examples=30)
def test_one_checkpoint_comes_back_unchanged(model: dict[str, Any], seed: int, storage: str) -> None:
    """The fold of a single checkpoint is that checkpoint, tensor for tensor, in row-major order."""
    assume(any(shape and 0 not in shape for shape, _, _ in model.values()))
    (student,) = make_students(model, 1, seed)
    with temporary_folder() as folder:
        path = save_as(storage, student, folder, 1)
        quiet_fold([path], folder / "t.safetensors")
        assert_same_bits(load_file(folder / "t.safetensors"), {n: t.contiguous() for n, t in student.items()})


@given(seed=st.integers(0, 999), sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=12), order=st.randoms())
@settings(max_examples=25)
def test_storage_budget_and_threads_never_show_in_the_bytes(seed: int, sizes: list[int], order: random.Random) -> None:
    """Zip, legacy and safetensors give the same tensors; budget and threads do not show in the file."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = [order.choice((*EXACT, *NARROW)) for _ in sizes]
    students = [
        {
            f"w.{i}": torch.randn(size, generator=generator).to(dtype)
            for i, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True))
        }
        for _ in range(3)
    ]
    with temporary_folder() as folder:
        teachers = []
        for storage in STORAGES:
            (folder / storage).mkdir()
            for step, student in enumerate(students):
                save_as(storage, student, folder / storage, step)
            files = set()
            for budget, threads in ((1 << 17, 1), (1 << 18, 3), (1 << 26, 2)):
                target = folder / f"{storage}-{budget}.safetensors"
                quiet_fold(folder / storage, target, momentum=0.3, memory_budget_bytes=budget, num_threads=threads)
                files.add(target.read_bytes())
            assert len(files) == 1, storage
            teachers.append(load_file(target))
        assert_same_bits(teachers[1], teachers[0])
        assert_same_bits(teachers[2], teachers[0])


@given(
    steps=st.lists(st.integers(0, 10**9), min_size=2, max_size=6, unique=True),
    shuffle=st.randoms(use_true_random=False),
    name=st.sampled_from(["step_{}", "iter_{:012d}", "model-step={}", "epoch_{}", "ckpt-{}"]),
)
@settings(max_examples=30)
def test_the_order_of_discovery_does_not_matter(steps: list[int], shuffle: random.Random, name: str) -> None:
    """Checkpoints are folded by their number, whatever order the file system lists and wrote them in."""
    steps = sorted(steps)
    students = {step: {"w": torch.tensor([float(index + 1)] * 5)} for index, step in enumerate(steps)}
    order = list(steps)
    shuffle.shuffle(order)
    listing = os.listdir
    iterdir = Path.iterdir

    def shuffled_iterdir(path: Path) -> Iterator[Path]:
        found = list(iterdir(path))
        shuffle.shuffle(found)
        return iter(found)

    def shuffled_listdir(*arguments: Any) -> list[Any]:
        found = listing(*arguments)
        shuffle.shuffle(found)
        return found

    with temporary_folder() as folder, pytest.MonkeyPatch.context() as patch:
        (folder / "run").mkdir()
        for step in order:
            save_file(students[step], folder / "run" / f"{name.format(step)}.safetensors")
        patch.setattr(os, "listdir", shuffled_listdir)
        patch.setattr(Path, "iterdir", shuffled_iterdir)
        quiet_fold(folder / "run", folder / "a.safetensors", momentum=0.3)
        report = quiet_fold(folder / "run", folder / "b.safetensors", momentum=0.3)
        assert [checkpoint.step for checkpoint in report.plan.checkpoints] == steps
        assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()
        assert_same_bits(load_file(folder / "a.safetensors"), hook_teacher([students[step] for step in steps], 0.3))


@given(count=st.integers(1, 300), momentum=MOMENTA, has_initial=st.booleans())
@example(count=1, momentum=0.5, has_initial=False)
def test_coefficients_sum_to_one_and_are_the_recurrence(count: int, momentum: float, has_initial: bool) -> None:
    """Each input's coefficient is what the recurrence, run on exact unit vectors, leaves of it; all sum to 1."""
    updates = ema_updates(count, momentum, has_initial_teacher=has_initial)
    coefficients = coefficients_of(updates)
    num_inputs = count + has_initial
    assert len(coefficients) == num_inputs
    assert sum(coefficients) == pytest.approx(1, rel=1e-12)
    assert all(0 <= share <= 1 for share in coefficients)
    teacher = [Fraction(int(i == 0)) for i in range(num_inputs)]
    if num_inputs <= 12:
        for student in range(1, num_inputs):
            teacher = [
                (1 - Fraction(momentum)) * share + Fraction(momentum) * int(i == student)
                for i, share in enumerate(teacher)
            ]
        assert sum(teacher) == 1
        assert coefficients == pytest.approx([float(share) for share in teacher], rel=1e-9, abs=1e-300)


@given(count=st.integers(2, 6), momentum=MOMENTA, interval=st.integers(1, 4))
@settings(max_examples=20)
def test_a_fold_of_unit_vectors_writes_its_coefficients(count: int, momentum: float, interval: int) -> None:
    """Student k is the k-th unit vector: the teacher then is the vector of the planned coefficients."""
    with temporary_folder() as folder:
        for step in range(count):
            save_file({"w": torch.eye(count, dtype=torch.float64)[step].clone()}, folder / f"step_{step}.safetensors")
        report = quiet_fold(folder, folder / "t.safetensors", momentum=momentum, interval=interval)
        expected = torch.zeros(count, dtype=torch.float64)
        for checkpoint in report.plan.checkpoints:
            expected[checkpoint.step] = checkpoint.coefficient
        torch.testing.assert_close(load_file(folder / "t.safetensors")["w"], expected, rtol=1e-12, atol=1e-300)
        assert [c.step for c in report.plan.checkpoints] == list(range(0, count, interval))


@given(
    model=MODELS,
    budget=st.integers(1, 1 << 24),
    threads=THREADS,
    accumulate=st.sampled_from(["float32", "float64"]),
    dtype=st.sampled_from(["student", "float32", "bfloat16"]),
)
def test_planned_memory_is_never_above_the_budget(
    model: dict[str, Any], budget: int, threads: int | None, accumulate: str, dtype: str
) -> None:
    """A plan fits its budget or is refused as misuse, for any model, dtype and number of threads."""
    with temporary_folder() as folder:
        torch.save(make_students(model, 1, 0)[0] | {"layer.weight": torch.ones(5000)}, folder / "step_1.pt")
        try:
            planned = ckpt_ema.plan(
                folder, memory_budget_bytes=budget, num_threads=threads, accumulate=accumulate, dtype=dtype
            )
        except MisuseError:
            assert budget < 64 * 1024
            return
        assert 0 < planned.buffer_bytes <= budget


@given(seed=st.integers(0, 99), split=st.integers(1, 4), momentum=MOMENTA)
@settings(max_examples=15)
def test_a_fold_can_be_continued_anywhere(seed: int, split: int, momentum: float) -> None:
    """Folding the first k checkpoints and then the others with `init` equals folding all at once, on float32."""
    generator = torch.Generator().manual_seed(seed)
    students = [{"w": torch.randn(40, 30, generator=generator)} for _ in range(5)]
    with temporary_folder() as folder:
        paths = [save_as("zip", student, folder, step) for step, student in enumerate(students)]
        early = folder / "early.safetensors"
        quiet_fold(paths[:split], early, momentum=momentum)
        quiet_fold(paths[split:], folder / "t.safetensors", momentum=momentum, init=early)
        assert_same_bits(load_file(folder / "t.safetensors"), hook_teacher(students, momentum))


@pytest.mark.parametrize("permutation", list(itertools.permutations(range(3))))
def test_a_list_is_folded_in_the_order_given(tmp_path: Path, permutation: tuple[int, ...]) -> None:
    """Explicit checkpoints are folded as listed, whatever their steps say."""
    students = [{"w": torch.full((3,), float(step + 1))} for step in range(3)]
    paths = [save_as("safetensors", student, tmp_path, step) for step, student in enumerate(students)]
    quiet_fold([paths[i] for i in permutation], tmp_path / "t.safetensors", momentum=0.3)
    assert_same_bits(load_file(tmp_path / "t.safetensors"), hook_teacher([students[i] for i in permutation], 0.3))


PEAK = """
import resource, sys
import torch
if sys.argv[1:]:
    import ckpt_ema
    run, output, budget = sys.argv[1:]
    ckpt_ema.fold(run, output, memory_budget_bytes=int(budget), announce=lambda plan: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak_bytes(*arguments: object) -> int:
    """Peak resident memory of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout)


@pytest.mark.parametrize(("size", "budget"), [(1 << 28, 16 << 20), (1 << 30, 256 << 20)])
def test_peak_memory_is_torch_and_the_budget(tmp_path: Path, size: int, budget: int) -> None:
    """Three checkpoints, of 0.25 and of 1 GiB, need no more memory than `import torch`, the budget and 50 MB."""
    # On tmpfs holes are read without filling the page cache, and nothing waits for a disk.
    folder = Path("/dev/shm") if os.path.isdir("/dev/shm") else tmp_path
    if shutil.disk_usage(folder).free < size * 1.25:
        folder = tmp_path
    if shutil.disk_usage(folder).free < size * 1.25:
        pytest.skip(f"no room for a teacher of {size >> 30} GiB in {folder}")
    run = Path(tempfile.mkdtemp(prefix="ckpt-ema-test-", dir=folder))
    try:
        for step in range(3):
            write_sparse(run / f"step_{step}.safetensors", size)
        peak = peak_bytes(run, run / "teacher.safetensors", budget)
        assert (run / "teacher.safetensors").stat().st_size > size
    finally:
        shutil.rmtree(run)
    assert peak <= peak_bytes() + budget + 50_000_000
