"""What a fold leaves behind when it is stopped, misled or refused: the old teacher, no half file, one clear error."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pty
import select
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import ckpt_ema
from ckpt_ema.errors import CkptEmaError, MisuseError
from ckpt_ema.sizes import parse_size
from tests.conftest import Outcome, assert_same_bits, hook_teacher, make_student, save_students

Cli = Callable[..., Outcome]
# Carries provenance: in a run directory a file that this tool did not write is no teacher but a checkpoint.
OLD = save({"old": torch.zeros(2)}, {"ckpt_ema": "{}"})
SPARSE_BYTES = 2 << 30
BUFFERS = ("bn.running_mean",)


def write_sparse(path: Path, num_bytes: int) -> None:
    """A real safetensors file with one float32 tensor of zeros, none of which takes space on the disk."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [0, num_bytes]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + num_bytes)


@pytest.fixture
def long_run(tmp_path: Path) -> Path:
    """Checkpoints that take seconds to fold, with an old teacher beside them."""
    folder = tmp_path / "long"
    folder.mkdir()
    for step in range(1, 5):
        write_sparse(folder / f"step_{step}.safetensors", SPARSE_BYTES)
    (folder / "teacher.safetensors").write_bytes(OLD)
    return folder


def only_the_run(folder: Path, *, extra: tuple[str, ...] = ("teacher.safetensors",)) -> bool:
    """Whether nothing but the checkpoints and `extra` lies in `folder`, hidden files included."""
    return all(name.startswith("step_") or name in extra for name in os.listdir(folder))


def heed_signals() -> None:
    """What runs the tests may ignore signals (nohup, a background job), and a child inherits that."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start_fold(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """A fold as a process of its own, returned once it has begun to write."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ckpt_ema", "fold", str(folder), "--overwrite", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,  # noqa: PLW1509  (no other thread of this process is in the middle of anything)
    )
    deadline = time.monotonic() + 30
    while not any(name.endswith(".tmp") for name in os.listdir(folder)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_fold_leaves_the_old_teacher_alone(long_run: Path, number: signal.Signals) -> None:
    """SIGTERM, Ctrl-C and a closed terminal in the middle of a fold: old teacher untouched, no temporary file."""
    process = start_fold(long_run)
    time.sleep(0.2)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode not in (0, 1, 2)
    assert stdout == ""
    assert "Traceback" not in stderr
    assert (long_run / "teacher.safetensors").read_bytes() == OLD
    assert only_the_run(long_run), os.listdir(long_run)


def test_an_impatient_user_leaves_no_temporary_file_either(long_run: Path) -> None:
    """Ctrl-C hit many times in a row still removes the half file and prints no traceback."""
    process = start_fold(long_run)
    for _ in range(10):
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, stderr = process.communicate(timeout=30)
    assert (long_run / "teacher.safetensors").read_bytes() == OLD
    assert only_the_run(long_run), os.listdir(long_run)
    assert "Traceback" not in stderr


def test_a_killed_fold_leaves_the_old_teacher_and_the_next_one_works(long_run: Path) -> None:
    """SIGKILL leaves nothing new under the final name, and what it leaves beside it does not hinder the next plan."""
    process = start_fold(long_run)
    process.kill()
    process.communicate(timeout=30)
    assert (long_run / "teacher.safetensors").read_bytes() == OLD
    left = [name for name in os.listdir(long_run) if name.endswith(".tmp")]
    assert all(name.startswith(".") for name in left)
    (long_run / "teacher.safetensors").unlink()
    assert len(ckpt_ema.plan(long_run).checkpoints) == 4
    for name in left:
        (long_run / name).unlink()


# --- inputs that change ------------------------------------------------------------------------------------------


def rewrite(path: Path) -> None:
    """The same size, other bytes, a newer time."""
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\1\2\3\4")
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000))


def replace(path: Path) -> None:
    """Another file of the same bytes under the same name."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(other, path)


def truncate(path: Path) -> None:
    """Shorter by half."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    """Nothing left."""
    os.truncate(path, 0)


def grow(path: Path) -> None:
    """Four bytes more."""
    with path.open("ab") as file:
        file.write(bytes(4))


def touch(path: Path) -> None:
    """A newer time, the same bytes."""
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000))


def remove(path: Path) -> None:
    """No longer there."""
    path.unlink()


@pytest.mark.parametrize("change", [rewrite, replace, truncate, empty, grow, touch, remove])
@pytest.mark.parametrize("which", ["step_100", "step_300", "step_500"])
def test_a_file_that_changes_after_the_plan_stops_the_fold(
    run: Path, which: str, change: Callable[[Path], None]
) -> None:
    """Between the reading of the tables and of the tensors a file changed: an error, the old teacher untouched."""
    (run / "teacher.safetensors").write_bytes(OLD)
    with pytest.raises(CkptEmaError) as caught:
        ckpt_ema.fold(run, overwrite=True, announce=lambda plan: change(run / f"{which}.safetensors"))
    assert which in caught.value.message
    assert (run / "teacher.safetensors").read_bytes() == OLD
    assert only_the_run(run)


@pytest.mark.parametrize("change", [rewrite, truncate, empty, grow, touch])
@pytest.mark.parametrize("which", ["step_100", "step_500"])
def test_a_file_that_changes_during_the_fold_stops_it(run: Path, which: str, change: Callable[[Path], None]) -> None:
    """After the first block a file changed: an error with a hint, the old teacher untouched, no half file."""
    (run / "teacher.safetensors").write_bytes(OLD)
    done: list[int] = []

    def progress(read: int, total: int) -> None:
        if not done:
            change(run / f"{which}.safetensors")
        done.append(read)

    with pytest.raises(CkptEmaError) as caught:
        ckpt_ema.fold(run, overwrite=True, progress=progress, announce=lambda plan: None, memory_budget_bytes=1 << 16)
    assert which in caught.value.message
    assert caught.value.hint
    assert done
    assert (run / "teacher.safetensors").read_bytes() == OLD
    assert only_the_run(run)


@pytest.mark.parametrize("change", [replace, remove])
def test_a_file_replaced_during_the_fold_never_mixes_old_and_new(run: Path, change: Callable[[Path], None]) -> None:
    """A checkpoint renamed over or deleted while it is open: an error, or the teacher of what was opened."""
    students = [make_student(seed) for seed in range(1, 6)]
    done: list[int] = []

    def progress(read: int, total: int) -> None:
        if not done:
            save_file(make_student(99), run / "other")
            change(run / "step_300.safetensors")
            (run / "other").unlink(missing_ok=True)
        done.append(read)

    with contextlib.suppress(CkptEmaError):
        ckpt_ema.fold(run, progress=progress, announce=lambda plan: None, memory_budget_bytes=1 << 16, momentum=0.2)
        assert_same_bits(load_file(run / "teacher.safetensors"), hook_teacher(students, 0.2, BUFFERS))
    assert only_the_run(run)


def test_a_changed_file_exits_with_1_and_a_hint(long_run: Path) -> None:
    """The same through the command: exit 1, no traceback, a hint, and the old teacher."""
    process = start_fold(long_run)
    os.truncate(long_run / "step_4.safetensors", 1 << 20)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stdout == ""
    assert "step_4" in stderr
    assert "hint: " in stderr
    assert "Traceback" not in stderr
    assert (long_run / "teacher.safetensors").read_bytes() == OLD
    assert only_the_run(long_run)


# --- outputs -----------------------------------------------------------------------------------------------------


def assert_refused(done: Outcome, code: int, *words: str) -> None:
    """One error without a traceback, nothing on stdout."""
    assert done.code == code, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Error:") == 1
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.mark.parametrize(
    "output", ["missing/t.safetensors", "a_file/t.safetensors", "run/step_100.safetensors/t.safetensors"]
)
def test_an_output_in_no_folder_is_refused(run: Path, cli: Cli, output: str) -> None:
    """A parent that is missing or a file: exit 1 with a hint before anything is read."""
    (run.parent / "a_file").write_text("x")
    assert_refused(cli("fold", run, "-o", output), 1, "hint: ")
    assert (run.parent / "a_file").read_text() == "x"
    assert not (run.parent / "missing").exists()


@pytest.mark.parametrize(
    ("output", "in_the_way"),
    [
        ("a_file/t.safetensors", "a_file"),
        ("a_file/b/c/t.safetensors", "a_file"),
        ("a_file/", "a_file"),
        ("/dev/null/t.safetensors", "/dev/null"),
        ("dangling/t.safetensors", "dangling"),
        ("new/b/t.safetensors", None),
        ("new/", None),
        ("new/t.safetensors/", None),
    ],
)
def test_a_folder_that_cannot_be_created_is_not_asked_for(
    run: Path, cli: Cli, output: str, in_the_way: str | None
) -> None:
    """Where a file stands in its way the file is named; elsewhere the `mkdir` of the hint works, and the fold then."""
    (run.parent / "a_file").write_text("x")
    (run.parent / "dangling").symlink_to("nowhere/at/all")
    done = cli("fold", run, "-o", output)
    assert done.code in (1, 2)
    if in_the_way is not None:
        assert f"{in_the_way}` is no folder" in done.stderr
        assert "mkdir" not in done.stderr
        assert "hint: pass another `--output`" in done.stderr
    else:
        command = done.stderr.partition("create it first: `")[2].partition("`")[0]
        subprocess.run(command, shell=True, cwd=run.parent, check=True)
        assert cli("fold", run, "-o", output).code == 0
        assert not output.endswith("/") or (run.parent / output / "teacher.safetensors").is_file()


def test_an_existing_output_is_refused_without_overwrite(run: Path, cli: Cli) -> None:
    """An existing teacher is kept unless `--overwrite` is given, whatever it is."""
    target = run / "teacher.safetensors"
    target.write_bytes(OLD)
    assert_refused(cli("fold", run), 1, "exists", "--overwrite")
    assert target.read_bytes() == OLD
    assert cli("fold", run, "--overwrite").code == 0
    assert set(load_file(target)) == set(make_student(1))
    target.unlink()
    target.symlink_to("/nonexistent/x")
    assert_refused(cli("fold", run), 1)
    assert target.is_symlink()


def test_a_checkpoint_that_appears_at_the_output_is_not_replaced(run: Path, tmp_path: Path) -> None:
    """Also with `--overwrite`, after everything else was looked at."""
    target = tmp_path / "t.safetensors"
    student = (run / "step_100.safetensors").read_bytes()

    def appear(_: ckpt_ema.FoldPlan) -> None:
        target.write_bytes(student)

    with pytest.raises(CkptEmaError, match="it is never replaced"):
        ckpt_ema.fold(run, target, overwrite=True, announce=appear)
    assert target.read_bytes() == student
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "t.safetensors"]


@pytest.mark.parametrize("content", [b"", OLD[:40], b"rubbish"])
def test_a_damaged_teacher_is_replaced_with_overwrite(run: Path, content: bytes) -> None:
    """An existing output is refused unless `--overwrite` is given; one that cannot be read is no exception."""
    target = run / "teacher.safetensors"
    target.write_bytes(content)
    with pytest.raises(CkptEmaError):
        ckpt_ema.fold(run, announce=lambda plan: None)
    ckpt_ema.fold(run, announce=lambda plan: None, overwrite=True)
    assert set(load_file(target)) == set(make_student(1))


def test_a_teacher_of_somebody_else_is_not_replaced(run: Path) -> None:
    """A training loop's own `teacher.safetensors` stays, whatever is asked for: nobody could make it again."""
    target = run / "teacher.safetensors"
    save_file(make_student(7), target)
    with pytest.raises(CkptEmaError, match="holds tensors that ckpt-ema did not write"):
        ckpt_ema.fold(run, announce=lambda plan: None, overwrite=True)
    assert_same_bits(load_file(target), make_student(7))


def test_an_output_that_appears_meanwhile_is_kept(run: Path) -> None:
    """Without `--overwrite`, a teacher that somebody else wrote during the fold is not replaced."""
    target = run / "teacher.safetensors"
    with pytest.raises(CkptEmaError, match="appeared"):
        ckpt_ema.fold(run, announce=lambda plan: None, progress=lambda read, total: target.write_bytes(OLD) and None)
    assert target.read_bytes() == OLD
    assert only_the_run(run)


def test_overwriting_is_atomic_for_readers(run: Path) -> None:
    """A reader that has the old teacher open goes on seeing the old bytes; the name shows the new ones at once."""
    target = run / "teacher.safetensors"
    target.write_bytes(OLD)
    seen = []
    with target.open("rb") as reader:
        ckpt_ema.fold(
            run,
            overwrite=True,
            announce=lambda plan: None,
            progress=lambda read, total: seen.append(target.read_bytes()),
        )
        assert reader.read() == OLD
    assert set(seen) == {OLD}
    assert set(load_file(target)) == set(make_student(1))


@pytest.mark.parametrize(("mask", "mode"), [(0o027, 0o640), (0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_a_new_teachers_mode(run: Path, mask: int, mode: int) -> None:
    """The teacher is as readable as any program's output, not private as a temporary file."""
    before = os.umask(mask)
    try:
        ckpt_ema.fold(run, announce=lambda plan: None)
    finally:
        os.umask(before)
    assert stat.S_IMODE((run / "teacher.safetensors").stat().st_mode) == mode


@pytest.mark.parametrize("link", [None, "symlink", "hard link"])
def test_an_output_that_is_an_input_is_refused(run: Path, cli: Cli, link: str | None) -> None:
    """A checkpoint is never replaced by the teacher, under whatever name, even with `--overwrite`."""
    student = run / "step_300.safetensors"
    before = student.read_bytes()
    target = student if link is None else run.parent / "t.safetensors"
    if link == "symlink":
        target.symlink_to(student)
    elif link == "hard link":
        target.hardlink_to(student)
    assert_refused(cli("fold", run, "-o", target, "--overwrite"), 1, "input")
    assert student.read_bytes() == before
    options: tuple[dict[str, object], ...] = (
        {"last": 1},
        {"exclude": ("step_300*",)},
        {"interval": 4},
        {"until_step": 200},
    )
    for option in options:
        with pytest.raises(CkptEmaError):
            ckpt_ema.fold(run, student, overwrite=True, announce=lambda plan: None, **option)
        assert student.read_bytes() == before


def test_a_folder_is_never_replaced_by_a_file(run: Path) -> None:
    """An output that is a folder called *.safetensors is refused and kept."""
    (run / "teacher.safetensors").mkdir()
    (run / "teacher.safetensors" / "precious.txt").write_text("x")
    with contextlib.suppress(CkptEmaError):
        ckpt_ema.fold(run, run / "teacher.safetensors", overwrite=True, announce=lambda plan: None)
    assert (run / "teacher.safetensors" / "precious.txt").read_text() == "x"


def test_a_full_disk_is_an_error_before_anything_is_read(tmp_path: Path, cli: Cli, small_disk: Path) -> None:
    """A teacher that does not fit: exit 1 with a hint, the old teacher untouched, nothing left on the disk."""
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2):
        save_file({"w": torch.ones(300_000)}, run / f"step_{step}.safetensors")
    target = small_disk / "t.safetensors"
    target.write_bytes(OLD)
    assert_refused(cli("fold", run, "-o", target, "--overwrite"), 1, "No space left", "hint: ")
    assert os.listdir(small_disk) == ["t.safetensors"]
    assert target.read_bytes() == OLD


def test_a_disk_that_fills_up_during_the_fold_leaves_nothing(tmp_path: Path, small_disk: Path) -> None:
    """Somebody else takes the space while the fold runs: the old teacher stays, the half file goes, or it succeeds."""
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2):
        save_file({"w": torch.ones(200_000)}, run / f"step_{step}.safetensors")

    def fill(read: int, total: int) -> None:
        with contextlib.suppress(OSError):
            (small_disk / "other").write_bytes(bytes(1 << 20))

    with contextlib.suppress(CkptEmaError):
        ckpt_ema.fold(
            run, small_disk / "t.safetensors", announce=lambda plan: None, progress=fill, memory_budget_bytes=1 << 16
        )
        assert load_file(small_disk / "t.safetensors")["w"].eq(1).all()
    assert set(os.listdir(small_disk)) <= {"other", "t.safetensors"}


# --- students that do not fit ------------------------------------------------------------------------------------


def test_disagreeing_students_list_every_difference(run: Path, cli: Cli) -> None:
    """Missing, additional, reshaped and retyped tensors are all named, ten without `-v` and all with it."""
    student = make_student(3)
    student["fc.weight"] = torch.zeros(37, 20)
    student["fc.bias"] = student["fc.bias"].double()
    del student["bn.weight"]
    student |= {f"new.{i:02d}": torch.zeros(1) for i in range(20)}
    save_file(student, run / "step_300.safetensors")
    with pytest.raises(CkptEmaError) as caught:
        ckpt_ema.plan(run)
    text = str(caught.value)
    assert "fc.weight: shape [37, 19] became [37, 20]" in text
    assert "fc.bias: float32 became float64" in text
    assert "bn.weight: missing in `step_300.safetensors`" in text
    assert all(f"new.{i:02d}: missing in `step_200.safetensors`" in text for i in range(20))
    brief = cli("fold", run)
    assert_refused(brief, 1, "hint: ", "more")
    assert brief.stderr.count("\n  ") == 11
    full = cli("fold", run, "-v").stderr
    assert all(line in full for line in caught.value.details)
    assert only_the_run(run, extra=())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_broken_student_is_named(tmp_path: Path, cli: Cli, value: float, suffix: str) -> None:
    """A NaN or infinity: an error naming the tensor and the first checkpoint that brought it; nothing is written."""
    run = tmp_path / "run"
    students = save_students(run, 5, suffix=suffix)
    for index in (2, 4):
        students[index]["fc.bias"][36] = value
        if suffix == ".pt":
            torch.save({"state_dict": students[index]}, run / f"step_{index * 100 + 100}.pt")
        else:
            save_file(students[index], run / f"step_{index * 100 + 100}.safetensors")
    (run / "teacher.safetensors").write_bytes(OLD)
    with pytest.raises(CkptEmaError) as caught:
        ckpt_ema.fold(run, overwrite=True, announce=lambda plan: None, momentum=0.1)
    assert "`fc.bias`" in caught.value.message
    assert f"`step_300{suffix}`" in caught.value.message
    assert "step_500" not in str(caught.value)
    if suffix == ".pt" and math.isnan(value):
        assert_refused(cli("fold", run, "--overwrite"), 1, "`fc.bias`", f"`step_300{suffix}`", "hint: ")
    assert (run / "teacher.safetensors").read_bytes() == OLD
    assert only_the_run(run)


def test_opposite_infinities_are_named_by_the_first(tmp_path: Path) -> None:
    """inf and -inf make a NaN together; the first checkpoint that brought one is named."""
    for step, value in enumerate([1.0, float("inf"), float("-inf")]):
        save_file({"w": torch.tensor([0.0, value])}, tmp_path / f"step_{step}.safetensors")
    with pytest.raises(CkptEmaError, match=r"`w`.*step_1\.safetensors"):
        ckpt_ema.fold(tmp_path, announce=lambda plan: None, momentum=0.5)


def test_an_overflow_in_the_written_dtype_is_an_error(tmp_path: Path, cli: Cli) -> None:
    """70000 is finite in float32 and not in float16: an error that names the tensor and what to type."""
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2):
        save_file({"a": torch.ones(3), "big": torch.tensor([1.0, 7e4])}, run / f"step_{step}.safetensors")
    assert_refused(cli("fold", run, "--dtype", "float16"), 1, "`big` overflows float16", "--dtype float32")
    assert only_the_run(run, extra=())
    for step in (1, 2):
        save_file({"a": torch.ones(3), "attn_mask": torch.tensor([1.0, 7e4])}, run / f"step_{step}.safetensors")
    with pytest.raises(CkptEmaError, match="`attn_mask` overflows float16"):
        ckpt_ema.fold(run, announce=lambda plan: None, dtype="float16")


def test_the_hint_of_an_overflow_helps(tmp_path: Path, cli: Cli) -> None:
    """float64 students beyond float32 fit where nobody asks for that."""
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2):
        save_file({"w": torch.tensor([1.0, 1e300], dtype=torch.float64)}, run / f"step_{step}.safetensors")
    assert_refused(cli("fold", run, "--dtype", "float32"), 1, "`w` overflows float32", "omit `--dtype`")
    assert cli("fold", run).code == 0


def test_an_infinite_mask_in_a_copied_buffer_is_fine_and_a_nan_is_not(tmp_path: Path, cli: Cli) -> None:
    """-inf is what a mask is made of; a NaN in the newest student's buffer is refused, in an older one not read."""
    run = tmp_path / "run"
    run.mkdir()
    mask = torch.full((4, 4), float("-inf")).triu(1)
    nan = torch.tensor([float("nan")])
    for step in (1, 2):
        tensors = {"w": torch.ones(3), "attn_mask": mask, "running_mean": nan if step == 1 else torch.ones(1)}
        save_file(tensors, run / f"step_{step}.safetensors")
    ckpt_ema.fold(run, tmp_path / "a.safetensors", announce=lambda plan: None)
    assert_same_bits({"m": load_file(tmp_path / "a.safetensors")["attn_mask"]}, {"m": mask})
    ckpt_ema.fold(run, tmp_path / "b.safetensors", announce=lambda plan: None, dtype="bfloat16")
    save_file({"w": torch.ones(3), "attn_mask": mask, "running_mean": nan}, run / "step_2.safetensors")
    assert_refused(cli("fold", run, "-o", "c.safetensors"), 1, "`running_mean`", "step_2")
    assert not (tmp_path / "c.safetensors").exists()


# --- words and streams -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--momentum", "0"],
        ["--momentum", "1"],
        ["--momentum", "2"],
        ["--momentum", "-1"],
        ["--momentum", "nan"],
        ["--momentum", "inf"],
        ["--momentum", "x"],
        ["--interval", "0"],
        ["--interval", "-2"],
        ["--last", "0"],
        ["--memory", "1KB"],
        ["--memory", "0"],
        ["--memory", "-5MB"],
        ["--memory", "10 parsecs"],
        ["--memory", ""],
        ["--accumulate", "float16"],
        ["--dtype", "int8"],
        ["--device", "tpu"],
        ["--device", "cuda:x"],
        ["--prefix", ""],
        ["--unknown"],
        ["--model", "nonsense"],
    ],
)
def test_misuse_exits_with_2(run: Path, cli: Cli, words: list[str]) -> None:
    """Options that make no sense exit with 2 and write nothing."""
    assert_refused(cli("fold", run, *words), 2)
    assert only_the_run(run, extra=())


def test_no_run_and_unknown_commands_exit_with_2(cli: Cli) -> None:
    """A command without its argument, and a word that is no command, are misuse."""
    for words in (["fold"], ["plan"], ["inspect"], ["melt"]):
        assert_refused(cli(*words), 2)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_missing_gpu_is_a_clear_error(run: Path, cli: Cli, device: str) -> None:
    """`--device cuda` without a GPU says so and says what to type instead."""
    done = cli("fold", run, "--device", device, CUDA_VISIBLE_DEVICES="")
    assert done.code in (1, 2)
    assert_refused(done, done.code, device, "--device cpu")
    assert cli("fold", run, "--device", "cpu").code == 0


@pytest.mark.parametrize("path", ["nowhere", "run/nowhere.pt"])
@pytest.mark.parametrize("command", ["fold", "plan", "inspect"])
def test_a_missing_path_is_named(run: Path, cli: Cli, command: str, path: str) -> None:
    """A path that does not exist is one error with its name."""
    done = cli(command, path)
    assert done.code in (1, 2)
    assert_refused(done, done.code, path)


def test_memory_sizes_are_read_as_people_write_them(run: Path, cli: Cli) -> None:
    """`10MB` are ten million bytes, `10MiB` and `10M` powers of two; the plan stays below each."""
    assert [parse_size(text) for text in ("10MB", "10MiB", "10M", "1.5 GiB", "4096")] == [
        10_000_000,
        10 << 20,
        10 << 20,
        3 << 29,
        4096,
    ]
    for text in ("10MB", "64kib", "1.5G"):
        done = cli("plan", run, "--memory", text, "--json")
        assert done.code == 0
        assert 0 < json.loads(done.stdout)["buffer_bytes"] <= parse_size(text)


def test_stdout_carries_the_output_path_alone(run: Path, cli: Cli) -> None:
    """Scripts read one line, the teacher's path; summary and warnings go to stderr; without a terminal no bar."""
    done = cli("fold", run)
    assert done.code == 0
    assert done.stdout == f"{run / 'teacher.safetensors'}\n"
    assert "Warning: " in done.stderr
    assert "folded 5 checkpoints" in done.stderr
    assert "\r" not in done.stderr
    assert "%|" not in done.stderr


def test_json_is_json_and_nothing_else(run: Path, cli: Cli) -> None:
    """`--json` on each command prints one valid document on stdout, warnings on stderr."""
    for words in (["plan", run], ["fold", run], ["inspect", run / "step_100.safetensors"]):
        done = cli(*words, "--json")
        assert done.code == 0
        assert json.loads(done.stdout)
        assert ("Warning: " in done.stderr) == (words[0] != "inspect")
    assert json.loads(cli("fold", run, "--overwrite", "-q", "--json").stdout)["output"] == str(
        run / "teacher.safetensors"
    )


def test_quiet_prints_warnings_and_errors_only(run: Path, cli: Cli) -> None:
    """`-q` leaves stderr empty when all is well, and keeps warnings and errors."""
    assert cli("fold", run, "-q", "--momentum", "0.5").stderr == ""
    loud = cli("fold", run, "-q", "--overwrite").stderr.splitlines()
    assert loud
    assert all(line.startswith("Warning: ") for line in loud)
    assert_refused(cli("fold", run, "-q"), 1, "exists")


def test_a_terminal_gets_a_progress_bar(long_run: Path) -> None:
    """On a terminal the fold draws a bar over bytes on stderr; with `-q` it does not; stdout stays clean."""
    for path in sorted(long_run.glob("step_*"))[1:]:
        path.unlink()
    for step in (1, 2, 3):
        write_sparse(long_run / f"step_{step}.safetensors", 256 << 20)
    for words, has_bar in (([], True), (["-q"], False)):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
        process = subprocess.Popen(
            [sys.executable, "-m", "ckpt_ema", "fold", str(long_run), "--overwrite", *words],
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
        )
        os.close(theirs)
        drawn = b""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    part = os.read(ours, 65536)
                except OSError:  # the last writer closed the terminal
                    break
                drawn += part
        stdout, _ = process.communicate(timeout=30)
        os.close(ours)
        assert process.returncode == 0
        assert stdout == f"{long_run / 'teacher.safetensors'}\n"
        assert (b"folding" in drawn and b"B/s" in drawn) == has_bar, drawn


def test_library_errors_are_exceptions_and_misuse_is_told_apart(run: Path) -> None:
    """The library raises CkptEmaError, misuse as MisuseError, and prints nothing."""
    with pytest.raises(MisuseError):
        ckpt_ema.fold(run, momentum=1.0)
    with pytest.raises(MisuseError):
        ckpt_ema.plan([])
    (run / "step_100.safetensors").write_bytes(b"")
    with pytest.raises(CkptEmaError) as caught:
        ckpt_ema.plan(run)
    assert not isinstance(caught.value, MisuseError)


def test_the_python_fold_warns_about_the_first_share(run: Path) -> None:
    """Without `announce` the plan's warnings are Python warnings, with it they are not issued twice."""
    with pytest.warns(UserWarning, match="keeps 99"):
        ckpt_ema.fold(run)


def test_a_closed_stdout_is_no_traceback(run: Path) -> None:
    """`ckpt-ema plan | head -0` dies in silence."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "-m", "ckpt_ema", "plan", str(run)], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert "Traceback" not in process.communicate(timeout=30)[1]


ENDS = """
import os, signal, sys, time, weakref
from ckpt_ema.cli.exits import ends_in_order

class Kept:
    pass

kept = Kept()

@ends_in_order
def command():
    {body}

command()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_does_not_break_an_import_off(tmp_path: Path, number: signal.Signals) -> None:
    """Of half a numpy, torch made a traceback; the signal comes again when the module is there."""
    (tmp_path / "slow.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {number:d})\ntime.sleep(0.2)\nprint('whole')\n"
    )
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", ENDS.format(body="import slow; time.sleep(20); print('not stopped')")],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
        },
        cwd=Path(ckpt_ema.__file__).parent.parent,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "whole\n", "Stopped\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_behind_the_last_word_changes_nothing(number: signal.Signals) -> None:
    """What torch tears down at the very end would print a traceback, of a command that has done all it should."""
    body = f"weakref.finalize(kept, os.kill, os.getpid(), {number:d}); print('done')"
    done = subprocess.run(
        [sys.executable, "-c", ENDS.format(body=body)],
        capture_output=True,
        text=True,
        cwd=Path(ckpt_ema.__file__).parent.parent,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
