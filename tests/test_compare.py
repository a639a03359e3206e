"""Two checkpoints side by side: every figure as torch computes it on whole tensors."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckpt_ema
from tests.conftest import Outcome, make_student, quiet_fold, save_students

Cli = Callable[..., Outcome]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", [None, torch.float32])
def test_figures_are_torchs_own(tmp_path: Path, dtype: torch.dtype, other: torch.dtype | None) -> None:
    """Relative distance, largest difference and number of elements, whatever the dtypes, beyond one portion."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(300, 1100, generator=generator).to(dtype)
    b = torch.randn(300, 1100, generator=generator).to(dtype)
    b[:100] = a[:100]
    if other is not None and not dtype.is_complex:
        b = b.to(other)
    torch.save({"w": a}, tmp_path / "a.pt")
    torch.save({"w": b}, tmp_path / "b.pt")
    found = ckpt_ema.compare(tmp_path / "a.pt", tmp_path / "b.pt", memory_budget_bytes=1 << 20)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    left, right = (x.float().to(wide) if x.itemsize == 1 else x.to(wide) for x in (a, b))
    (tensor,) = found.tensors
    assert tensor.relative == pytest.approx(float((left - right).norm() / right.norm()), rel=1e-12)
    assert tensor.largest == pytest.approx(float((left - right).abs().max()), rel=1e-12)
    assert tensor.num_different == int((left != right).sum())
    assert found.relative == pytest.approx(tensor.relative)
    assert not found.is_identical


def test_any_two_formats_are_compared(tmp_path: Path) -> None:
    """A file, shards, a folder for torch, a transposed tensor in a torch.save file: the same values are identical."""
    save_students(tmp_path / "run", 3)
    for name, options in (("f.safetensors", {}), ("s", {"shard_size_bytes": 500}), ("d", {"output_format": "dcp"})):
        quiet_fold(tmp_path / "run", tmp_path / name, momentum=0.2, **options)
    assert ckpt_ema.compare(tmp_path / "f.safetensors", tmp_path / "s").is_identical
    assert ckpt_ema.compare(tmp_path / "d", tmp_path / "f.safetensors").is_identical
    student = make_student(1)
    save_file(student, tmp_path / "plain.safetensors")
    student["fc.weight"] = student["fc.weight"].T.contiguous().T
    torch.save({"state_dict": student}, tmp_path / "strided.pt")
    assert ckpt_ema.compare(tmp_path / "strided.pt", tmp_path / "plain.safetensors").is_identical


def test_what_only_one_has_is_told(tmp_path: Path, cli: Cli) -> None:
    """Names, shapes, integers; the most different tensor comes first."""
    a = {
        "x": torch.ones(4),
        "y": torch.ones(4),
        "n": torch.tensor([1, 2, 3]),
        "s": torch.ones(2, 3),
        "only": torch.ones(1),
    }
    b = {
        "x": torch.ones(4) * 2,
        "y": torch.ones(4) * 4,
        "n": torch.tensor([1, 2, 4]),
        "s": torch.ones(3, 2),
        "z": torch.ones(1),
    }
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    done = cli("compare", "a.safetensors", "b.safetensors")
    assert done.code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("3 of 3 tensors differ")
    assert [line.split()[0] for line in lines[3:6]] == ["y", "x", "n"]
    assert "only in a.safetensors: only" in lines
    assert "only in b.safetensors: z" in lines
    assert "another shape: s is [2, 3] and [3, 2]" in lines
    table = json.loads(cli("compare", "a.safetensors", "b.safetensors", "--json").stdout)
    assert table["tensors"][0] == {
        "name": "y",
        "shape": [4],
        "dtypes": ["float32", "float32"],
        "relative": 0.75,
        "largest": 3.0,
        "different_elements": 4,
    }
    assert table["relative"] == pytest.approx(math.sqrt(4 * 9 + 4 * 1) / math.sqrt(4 * 16 + 4 * 4))
    assert cli("compare", "a.safetensors", "a.safetensors").stdout == "identical: 5 tensors, value for value\n"


def test_a_nan_is_seen(tmp_path: Path) -> None:
    """A NaN where the other has a number comes first; two NaNs, and two infinities, are the same."""
    a = {
        "w": torch.tensor([1.0, float("nan")]),
        "same": torch.tensor([float("nan"), float("inf")]),
        "v": torch.zeros(2),
    }
    b = {"w": torch.tensor([1.0, 2.0]), "same": torch.tensor([float("nan"), float("inf")]), "v": torch.ones(2)}
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    found = ckpt_ema.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [tensor.name for tensor in found.tensors] == ["w", "v", "same"]
    assert math.isnan(found.tensors[0].relative)
    assert found.tensors[1].relative == 1
    assert found.tensors[2].relative == found.tensors[2].num_different == 0
    back = ckpt_ema.compare(tmp_path / "b.safetensors", tmp_path / "a.safetensors")
    assert next(tensor for tensor in back.tensors if tensor.name == "v").relative == math.inf


def test_what_cannot_be_compared_is_an_error(tmp_path: Path, cli: Cli) -> None:
    """A path that is not there is misuse; a file that holds an average and no student says how to choose."""
    save_students(tmp_path / "run", 1)
    done = cli("compare", "run/step_100.safetensors", "nowhere")
    assert done.code == 2
    assert "`nowhere` does not exist" in done.stderr
    torch.save({"ema_state_dict": make_student(1)}, tmp_path / "average.pt")
    done = cli("compare", "run/step_100.safetensors", "average.pt")
    assert done.code == 1
    assert "--state" in done.stderr
    assert "Traceback" not in done.stderr


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("a", "b", "relative", "largest"),
    [
        ([INF, 3.0], [INF, 4.0], 0.25, 1),
        ([-INF, 3.0], [INF, 3.0], INF, INF),
        ([1.0, 3.0], [INF, 3.0], INF, INF),
        ([NAN, 3.0], [NAN, 4.0], NAN, 1),
        ([INF, NAN], [1.0, 1.0], NAN, NAN),
        ([3e-200, 0.0], [4e-200, 0.0], 0.25, 1e-200),
        ([3e200, 0.0], [4e200, 0.0], 0.25, 1e200),
        ([0.0, 0.0], [0.0, 0.0], 0, 0),
        ([1.0, 0.0], [0.0, 0.0], INF, 1),
    ],
)
def test_no_number_hides_a_difference(
    tmp_path: Path, a: list[float], b: list[float], relative: float, largest: float
) -> None:
    """An infinity that both hold, as masks do, is in no norm; no square is lost or overflows; a NaN shows."""
    for name, values in (("a", a), ("b", b)):
        tensors = {"x": torch.tensor(values, dtype=torch.float64), "mask": torch.full((3,), -INF)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    found = ckpt_ema.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    tensor = next(tensor for tensor in found.tensors if tensor.name == "x")
    assert (tensor.relative, tensor.largest) == pytest.approx((relative, largest), nan_ok=True, abs=0)
    assert found.relative == pytest.approx(relative, nan_ok=True)


@pytest.mark.parametrize(
    ("dtypes", "values", "num_different"),
    [
        ((torch.uint8, torch.int64), ([1, 255], [1, 255]), 0),
        ((torch.int8, torch.uint8), ([-1, 7], [255, 7]), 1),
        ((torch.uint64, torch.int64), ([2**64 - 1, 7], [-1, 7]), 1),
    ],
)
def test_integers_of_two_dtypes_are_compared_by_value(
    tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype], values: tuple[list[int], list[int]], num_different: int
) -> None:
    """An int8 -1 is no uint8 255, and a uint64 above all int64 none of them."""
    for name, dtype, numbers in zip(("a", "b"), dtypes, values, strict=True):
        save_file({"x": torch.tensor(numbers, dtype=dtype)}, tmp_path / f"{name}.safetensors")
    [tensor] = ckpt_ema.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors").tensors
    assert tensor.num_different == num_different


def test_the_words_of_the_fold_choose_in_a_checkpoint_and_leave_the_teacher_alone(tmp_path: Path, cli: Cli) -> None:
    """A teacher folded with `--state` and `--prefix` is compared with its student by the same words."""
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        student = {f"student.{name}": tensor for name, tensor in make_student(step).items()}
        torch.save({"ema": student, "state_dict": make_student(9)}, tmp_path / "run" / f"step_{step}.pt")
    words = ("--state", "ema", "--prefix", "student.")
    assert cli("fold", "run", "--momentum", 0.25, *words, "-o", "t.safetensors").code == 0
    done = cli("compare", "t.safetensors", "run/step_2.pt", *words)
    assert done.code == 0, done.stderr
    assert done.stdout.startswith("3 of 5 tensors differ; ")


def test_nothing_in_common_is_an_error(tmp_path: Path, cli: Cli) -> None:
    """Two models of other names are not compared: the names are shown, and the option that may help."""
    save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"model.x": torch.ones(2)}, tmp_path / "b.safetensors")
    done = cli("compare", "a.safetensors", "b.safetensors")
    assert done.code == 1
    assert "no tensor of one name and shape in common" in done.stderr
    assert "--prefix" in done.stderr


def test_another_dtype_is_said_of_equal_values(tmp_path: Path, cli: Cli) -> None:
    """What bfloat16 holds exactly is the same value in float32; that the dtypes differ is in the verdict."""
    weight = make_student(1)["fc.weight"].bfloat16()
    save_file({"x": weight, "y": weight * 2}, tmp_path / "a.safetensors")
    save_file({"x": weight.float(), "y": weight * 2}, tmp_path / "b.safetensors")
    done = cli("compare", "a.safetensors", "b.safetensors")
    assert done.stdout == "identical: 2 tensors, value for value; 1 of them in another dtype\n"


def test_calls_at_once_give_torch_its_threads_back(tmp_path: Path) -> None:
    """Beside training several may run, and end in any order; what begins later has all threads of torch's again."""
    for step in (1, 2):
        save_file({"w": torch.randn(400, 400)}, tmp_path / f"step_{step}.safetensors")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen: list[int] = []

    def work(number: int) -> None:
        for _ in range(10):
            ckpt_ema.compare(tmp_path / "step_1.safetensors", tmp_path / "step_2.safetensors")
            output = tmp_path / f"teacher_{number}.safetensors"
            quiet_fold(tmp_path, output, momentum=0.5, overwrite=True, include=["step_*"])

    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        last = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        last.start()
        last.join()
        assert seen == [3]
    finally:
        torch.set_num_threads(before)
