"""Several momenta, one pass: every teacher is the one that a fold of its own would have made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckpt_ema
from ckpt_ema import CkptEmaError, MisuseError
from tests.conftest import Outcome, StateDict, assert_same_bits, hook_teacher, make_student, quiet_fold, save_students

Cli = Callable[..., Outcome]

MOMENTA = (0.1, 0.3, 0.5, 0.75)
BUFFERS = ("bn.running_mean",)


def varied_student(seed: int) -> StateDict:
    """What a lane can hold: narrow, wide, empty, transposed, tied and integer tensors."""
    student = make_student(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    student["half.weight"] = torch.randn(300, 7, generator=generator).to(torch.bfloat16)
    student["double.weight"] = torch.randn(11, generator=generator, dtype=torch.float64)
    student["turned.weight"] = torch.randn(13, 29, generator=generator).t()
    student["empty.weight"] = torch.zeros(0, 3)
    student["scalar"] = torch.randn((), generator=generator)
    student["tied.weight"] = student["fc.weight"]
    return student


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    for i in range(5):
        torch.save({"model": varied_student(i), "step": 10 * i}, folder / f"step_{10 * i}.pt")
    return folder


@pytest.mark.parametrize("options", [{}, {"skip_buffers": False}, {"dtype": "float16"}, {"accumulate": "float64"}])
@pytest.mark.parametrize("budget", [1 << 17, 1 << 28])
def test_each_teacher_is_the_one_of_its_own_fold(
    run: Path, tmp_path: Path, budget: int, options: dict[str, Any]
) -> None:
    """Byte for byte, the provenance included, for every treatment and any memory."""
    pattern = tmp_path / "teacher-{momentum}.safetensors"
    report = quiet_fold(run, pattern, momentum=MOMENTA, memory_budget_bytes=budget, **options)
    assert [teacher.output for teacher in report.plan.teachers] == [
        tmp_path / f"teacher-{momentum}.safetensors" for momentum in MOMENTA
    ]
    assert report.plan.buffer_bytes <= budget
    for teacher in report.plan.teachers:
        alone = quiet_fold(run, tmp_path / "alone.safetensors", momentum=teacher.momentum, overwrite=True, **options)
        assert teacher.output.read_bytes() == alone.output.read_bytes()


def test_each_teacher_is_the_hooks(tmp_path: Path) -> None:
    """Against the hook's own lines, bit for bit on float32."""
    students = save_students(tmp_path / "plain", 4)
    report = quiet_fold(tmp_path / "plain", tmp_path / "t-{momentum}.safetensors", momentum=[0.9, 1e-9])
    for teacher in report.plan.teachers:
        assert_same_bits(load_file(teacher.output), hook_teacher(students, teacher.momentum, BUFFERS))


def test_an_initial_teacher_starts_all_of_them(run: Path, tmp_path: Path) -> None:
    """--init is the start of every teacher."""
    start = quiet_fold(run, tmp_path / "start.safetensors", momentum=0.5, until_step=10).output
    pattern = tmp_path / "t-{momentum}.safetensors"
    report = quiet_fold(run, pattern, momentum=MOMENTA, init=start, from_step=20)
    for teacher in report.plan.teachers:
        alone = quiet_fold(
            run, tmp_path / "alone.safetensors", momentum=teacher.momentum, init=start, from_step=20, overwrite=True
        )
        assert teacher.output.read_bytes() == alone.output.read_bytes()


def test_the_checkpoints_are_read_once(tmp_path: Path) -> None:
    """Eight teachers read as many bytes as one: the kernel's own count of this process says so."""

    def bytes_read() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("rchar")))

    folder = tmp_path / "run"
    folder.mkdir()
    for i in range(4):
        save_file({"w": torch.full((1 << 20,), float(i))}, folder / f"step_{i}.safetensors")
    quiet_fold(folder, tmp_path / "warm-up.safetensors", momentum=0.5)
    before = bytes_read()
    report = quiet_fold(folder, tmp_path / "t-{momentum}.safetensors", momentum=[k / 10 for k in range(1, 9)])
    assert report.plan.bytes_to_read == 4 * 4 << 20
    assert 4 * 4 << 20 <= bytes_read() - before < (4 * 4 << 20) * 1.05


@pytest.mark.parametrize("where", ["folder", "nothing", "pattern in a folder's name"])
def test_names_tell_the_teachers_apart(run: Path, tmp_path: Path, where: str) -> None:
    """A folder, or nothing at all, gets `teacher-0.1.safetensors`; a pattern is filled wherever it stands."""
    for momentum in MOMENTA:
        (tmp_path / f"{momentum}").mkdir()
    output = {"folder": tmp_path, "nothing": None}.get(where, tmp_path / "{momentum}" / "teacher.safetensors")
    report = quiet_fold(run, output, momentum=MOMENTA)
    found = [teacher.output for teacher in report.plan.teachers]
    if where.startswith("pattern"):
        assert found == [tmp_path / f"{momentum}" / "teacher.safetensors" for momentum in MOMENTA]
    else:
        home = tmp_path if where == "folder" else run
        assert found == [home / f"teacher-{momentum}.safetensors" for momentum in MOMENTA]
    assert all(path.is_file() for path in found)
    # They lie in the run directory then, and are no students.
    assert len(ckpt_ema.plan(run, tmp_path / "next.safetensors").checkpoints) == 5


def test_momenta_may_come_as_anything_that_yields_numbers(run: Path, tmp_path: Path) -> None:
    """A generator, a tensor's or numpy's numbers: the names are plain."""
    given = (value for value in np.array([0.1, 0.25]))
    plan = ckpt_ema.plan(run, tmp_path / "t-{momentum}.safetensors", momentum=given)
    assert [teacher.output.name for teacher in plan.teachers] == ["t-0.1.safetensors", "t-0.25.safetensors"]


def test_one_teacher_may_have_its_momentum_in_its_name_too(run: Path, tmp_path: Path) -> None:
    """A pattern means the same for one momentum as for several."""
    report = quiet_fold(run, tmp_path / "t-{momentum}.safetensors", momentum=0.25)
    assert report.output == tmp_path / "t-0.25.safetensors"


def test_one_name_for_several_teachers_is_refused_with_the_pattern(run: Path, tmp_path: Path, cli: Cli) -> None:
    """Exit 2, and the hint can be typed."""
    done = cli("fold", run, "--momentum", "0.1", "--momentum", "0.2", "-o", tmp_path / "t.safetensors")
    assert done.code == 2
    assert "is one name for 2 teachers" in done.stderr
    assert "t-{momentum}.safetensors" in done.stderr
    assert not list(tmp_path.glob("t*"))


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("t.safetensors", "--output '{here}/t-{momentum}.safetensors'"),
        ("t.pt", "--output '{here}/t-{momentum}.safetensors'"),
        ("a.{momentum}", "--output '{here}/a.{momentum}.safetensors'"),
        ("{momentum}", "--output '{here}/{momentum}.safetensors'"),
        ("t-{momentum}.pt", "--output '{here}/t-{momentum}.safetensors'"),
        ("new/", "mkdir -p {here}/new/"),
    ],
)
def test_the_hint_for_a_name_that_will_not_do_can_be_typed(run: Path, tmp_path: Path, given: str, hint: str) -> None:
    """What it says to pass is then taken."""
    with pytest.raises(MisuseError) as caught:
        ckpt_ema.plan(run, f"{tmp_path}/{given}", momentum=[0.1, 0.3])
    assert hint.replace("{here}", str(tmp_path)) in str(caught.value)
    if "--output" in hint:
        ckpt_ema.plan(run, str(caught.value).split("--output '")[1].split("'")[0], momentum=[0.1, 0.3])


@pytest.mark.parametrize(
    ("momenta", "message"),
    [
        ([0.1, 0.1], "given twice"),
        ([], "empty list"),
        ([0.1, 1.0], "must lie between 0 and 1"),
        ([0.1, "0.2"], "'0.2', a str"),
        ([0.1, True], "True, a bool"),
        ("0.5", "'0.5', a str"),
        ([None], "None, a NoneType"),
    ],
)
def test_momenta_that_make_no_sense_are_misuse(run: Path, momenta: list[Any], message: str) -> None:
    """Before anything is read."""
    with pytest.raises(MisuseError, match=message):
        ckpt_ema.plan(run, momentum=momenta)


def test_a_broken_student_leaves_no_teacher(run: Path, tmp_path: Path) -> None:
    """A NaN found on the way discards all of them."""
    broken = varied_student(2)
    broken["fc.bias"][3] = torch.nan
    torch.save({"model": broken, "step": 20}, run / "step_20.pt")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CkptEmaError, match=r"`fc.bias` holds a NaN or an infinity in `step_20.pt`"):
        quiet_fold(run, tmp_path / "t-{momentum}.safetensors", momentum=MOMENTA)
    assert sorted(tmp_path.iterdir()) == before


def test_one_taken_name_stops_all(run: Path, tmp_path: Path) -> None:
    """Nothing is folded for the others first, and the existing teacher stays."""
    taken = tmp_path / "t-0.5.safetensors"
    taken.write_bytes(b"mine")
    with pytest.raises(CkptEmaError, match=r"`.*t-0.5.safetensors` exists"):
        quiet_fold(run, tmp_path / "t-{momentum}.safetensors", momentum=MOMENTA)
    assert taken.read_bytes() == b"mine"
    assert [path.name for path in tmp_path.glob("*t-*")] == ["t-0.5.safetensors"]


def test_the_plan_shows_a_column_per_teacher(run: Path, tmp_path: Path, cli: Cli) -> None:
    """And its JSON all of them; every column sums to 1."""
    words = ["plan", run, "--momentum", "0.1", "--momentum", "0.5", "-o", tmp_path / "t-{momentum}.safetensors"]
    text = cli(*words).stdout
    assert "momentum 0.1, 0.5 per checkpoint" in text
    header = next(line for line in text.splitlines() if line.startswith("checkpoint"))
    assert header.split() == ["checkpoint", "step", "momentum", "0.1", "momentum", "0.5"]
    record = json.loads(cli(*words, "--json").stdout)
    assert [teacher["momentum"] for teacher in record["teachers"]] == [0.1, 0.5]
    columns = zip(*(item["coefficients"] for item in record["checkpoints"]), strict=True)
    assert [sum(column) for column in columns] == pytest.approx([1, 1])
    assert record["bytes_to_write"] == 2 * json.loads(cli(*words[:4], "--json").stdout)["bytes_to_write"]


def test_stdout_is_the_paths_alone(run: Path, tmp_path: Path, cli: Cli) -> None:
    """One per line, in the order of the momenta."""
    pattern = tmp_path / "t-{momentum}.safetensors"
    done = cli("fold", run, "--momentum", "0.5", "--momentum", "0.1", "-o", pattern)
    assert done.stdout.split("\n") == [f"{tmp_path}/t-0.5.safetensors", f"{tmp_path}/t-0.1.safetensors", ""]
    assert "share in the teacher of momentum 0.1: step_0.pt 65.6%" in done.stderr


def test_the_summary_says_where_the_time_went(run: Path, tmp_path: Path) -> None:
    """Shares of the time, and they sum to all of it."""
    shares = quiet_fold(run, tmp_path / "t.safetensors", momentum=0.5).timings.shares()
    assert set(shares) == {"reading", "computing", "writing"}
    assert sum(shares.values()) == pytest.approx(1)
