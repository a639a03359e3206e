"""A run that is followed while it trains: every finished checkpoint is in the teacher, whatever becomes of it later."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckpt_ema
from ckpt_ema.errors import CkptEmaError, MisuseError, NoCheckpointError
from ckpt_ema.sizes import SizeError, parse_duration
from tests.conftest import (
    StateDict,
    assert_same_bits,
    bound_by_modes,
    hook_teacher,
    make_student,
    quiet_fold,
    save_students,
)

BUFFERS = ("bn.running_mean",)


class Following:
    """`follow` in a thread of this process; its lines, its end."""

    def __init__(self, run: Path, output: Path | None = None, **options: Any) -> None:
        self.lines: list[str] = []
        self.stop = threading.Event()
        self.report: ckpt_ema.FollowReport | None = None
        self.error: BaseException | None = None
        self._arguments = (run, output)
        self._options = {"poll_seconds": 0.05, "momentum": 0.1, **options}
        self._thread = threading.Thread(target=self._follow)

    def _follow(self) -> None:
        try:
            self.report = ckpt_ema.follow(*self._arguments, stop=self.stop, tell=self.lines.append, **self._options)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Following:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join(60)

    def wait(self, word: str, count: int = 1) -> None:
        """Until `count` lines have the word."""
        deadline = time.monotonic() + 30
        while sum(word in line for line in self.lines) < count:
            if self.error is not None:
                raise self.error
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.01)

    def end(self) -> ckpt_ema.FollowReport:
        self.stop.set()
        self._thread.join(60)
        if self.error is not None:
            raise self.error
        assert self.report is not None
        return self.report


def test_a_run_directory_that_is_out_of_reach_is_waited_for(tmp_path: Path) -> None:
    """As a network's is now and then: told once, nothing is missed or folded twice, and what came meanwhile goes in."""
    run, teacher = tmp_path / "run", tmp_path / "t.safetensors"
    save(run, 1)
    with Following(run, teacher) as following:
        following.wait("folded in")
        run.rename(tmp_path / "away")
        following.wait("Warning: ")
        time.sleep(0.3)
        save(tmp_path / "away", 2)
        (tmp_path / "away").rename(run)
        following.wait("folded in", 2)
        report = following.end()
    assert (report.num_folded, report.missed) == (2, ())
    assert [line for line in following.lines if "folded in" not in line] == [
        f"Warning: `{run}` is out of reach: No such file or directory; it is waited for",
        f"`{run}` is there again",
    ]
    assert_same_bits(load_file(teacher), hook_teacher([make_student(1), make_student(2)], 0.1, BUFFERS))


def test_following_that_ends_out_of_reach_says_so(tmp_path: Path) -> None:
    """What is there at the end nobody knows: an error, and no claim that nothing was."""
    run = tmp_path / "run"
    save(run, 1)
    with Following(run, tmp_path / "t.safetensors") as following:
        following.wait("folded in")
        run.rename(tmp_path / "away")
        following.wait("Warning: ")
        with pytest.raises(CkptEmaError, match="is out of reach: No such file") as raised:
            following.end()
    assert isinstance(raised.value, ckpt_ema.OutOfReachError)
    assert raised.value.report is not None
    assert (raised.value.report.num_folded, raised.value.report.missed) == (1, ())


def test_the_report_of_following_that_ends_out_of_reach_is_printed(
    tmp_path: Path, follower: Callable[..., subprocess.Popen[str]]
) -> None:
    """What was folded, and where the teacher is; the error as well, and exit code 1."""
    run, teacher = tmp_path / "run", tmp_path / "t.safetensors"
    save(run, 1)
    (run / "step_200.safetensors").write_bytes(b"x" * 50)
    process = follower(run, "-o", teacher, "--momentum", 0.1)
    assert process.stderr is not None
    assert "step_100.safetensors folded" in process.stderr.readline()
    (run / "step_200.safetensors").unlink()
    assert "missed step_200" in process.stderr.readline()
    run.rename(tmp_path / "away")
    assert "Warning: " in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert stdout == f"{teacher}\n"
    assert stderr.splitlines() == [
        "folded 1 checkpoint, missed 1: step_200.safetensors",
        f"Error: `{run}` is out of reach: No such file or directory",
        "",
        "hint: follow again when it is back",
    ]


def test_a_teacher_that_is_out_of_reach_is_no_path_on_stdout(
    tmp_path: Path, follower: Callable[..., subprocess.Popen[str]]
) -> None:
    """It lies in the run directory; how many checkpoints it has is said all the same, and is in the library's error."""
    run = tmp_path / "run"
    save(run, 1)
    process = follower(run, "--momentum", 0.1)
    assert process.stderr is not None
    assert "step_100.safetensors folded" in process.stderr.readline()
    run.rename(tmp_path / "away")
    assert "Warning: " in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (1, "")
    assert stderr.startswith("folded 1 checkpoint\nError: ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "half of the first one is left after 693 more; `--per step` makes it work as in training"),
        ({"momentum": 0.999}, "is written `--momentum 0.001` here"),
        ({"momentum": 0.1}, ""),
        ({"half_life": 5000.0}, ""),
    ],
)
def test_a_momentum_that_cannot_be_meant_is_told(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    """Once, when the teacher is begun: how many checkpoints are going to come nobody knows."""
    run, teacher = tmp_path / "run", tmp_path / "t.safetensors"
    save(run, 1)
    save(run, 2)
    lines: list[str] = []
    for _ in range(2):
        ckpt_ema.follow(run, teacher, until_step=200, poll_seconds=0.01, tell=lines.append, **options)
    assert sum(line.startswith("Warning: ") for line in lines) == bool(said)
    assert not said or any(said in line for line in lines)


def test_a_name_that_counts_something_else_does_not_hide_what_is_missed(tmp_path: Path) -> None:
    """Steps are inside, dates in the names: `--until 300` says nothing of these."""
    run = tmp_path / "run"
    run.mkdir()
    for number, name in enumerate(("2024-01-30", "2024-02-10", "2024-03-05"), start=1):
        torch.save({"model": make_student(number), "global_step": 100 * number}, run / f"{name}.pt")
    os.truncate(run / "2024-02-10.pt", 1000)
    report = ckpt_ema.follow(
        run,
        tmp_path / "t.safetensors",
        momentum=0.1,
        until_step=300,
        poll_seconds=0.01,
        patience_seconds=0.3,
    )
    assert report.missed == ("2024-02-10.pt",)


def test_what_is_lost_at_the_last_step_that_was_asked_for_is_missed(tmp_path: Path) -> None:
    """And what is lost beyond it is not."""
    run, stop = tmp_path / "run", threading.Event()
    save(run, 1)
    save(run, 2)
    stop.set()
    for step in (300, 400):
        (run / f"step_{step}.safetensors").write_bytes(b"half")
    report = ckpt_ema.follow(
        run, tmp_path / "t.safetensors", momentum=0.1, until_step=300, poll_seconds=0.01, stop=stop
    )
    assert report.missed == ("step_300.safetensors",)


def test_a_run_that_has_passed_the_last_step_is_not_followed_for_ever(tmp_path: Path) -> None:
    """Though what was saved at that step cannot be read: it is missed when its patience is at its end."""
    run = tmp_path / "run"
    save(run, 1)
    save(run, 3)
    (run / "step_200.safetensors").write_bytes(b"half")
    with Following(run, tmp_path / "t.safetensors", until_step=200, patience_seconds=0.5) as following:
        following._thread.join(20)
        assert not following._thread.is_alive()
        assert following.end().missed == ("step_200.safetensors",)


def test_a_restart_beside_a_run_that_is_over(tmp_path: Path) -> None:
    """The trainer has removed what was folded: the teacher that is there is what comes of it, with or without more."""
    run, teacher = tmp_path / "run", tmp_path / "t.safetensors"
    save(run, 1)
    save(run, 2)
    ckpt_ema.follow(run, teacher, momentum=0.1, until_step=200, poll_seconds=0.01)
    for path in run.iterdir():
        path.unlink()
    for _ in range(2):
        again = ckpt_ema.follow(run, teacher, momentum=0.1, until_step=200, poll_seconds=0.01)
        assert (again.output, again.num_folded) == (teacher, 0)
        save(run, 3)


@pytest.mark.parametrize("until_step", [300, 200])
def test_a_restart_misses_nothing_that_the_teacher_has(tmp_path: Path, until_step: int) -> None:
    """Up to the teacher's step or less far: what it has is said to be in it, and nobody is told of a loss."""
    run, options = tmp_path / "run", {"momentum": 0.1, "poll_seconds": 0.01}
    save_students(run, 4)
    assert ckpt_ema.follow(run, until_step=300, **options).num_folded == 3
    before = (run / "teacher.safetensors").read_bytes()
    lines: list[str] = []
    again = ckpt_ema.follow(run, until_step=until_step, tell=lines.append, **options)
    assert (again.num_folded, again.missed) == (0, ())
    assert lines == [f"{run / 'teacher.safetensors'} has step_100.safetensors to step_{until_step}.safetensors already"]
    assert (run / "teacher.safetensors").read_bytes() == before


def test_another_teacher_beside_the_run_does_not_end_it(tmp_path: Path) -> None:
    """A file of that step where these checkpoints make a folder: they are folded all the same."""
    run = tmp_path / "run"
    save(tmp_path / "other", 3)
    for number in (1, 2):
        folder = run / f"checkpoint-{number}"
        folder.mkdir(parents=True)
        save_file(make_student(number), folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    quiet_fold(tmp_path / "other", run / "teacher.safetensors", momentum=0.1)
    report = ckpt_ema.follow(run, momentum=0.1, until_step=2, poll_seconds=0.01)
    assert (report.output, report.num_folded, report.missed) == (run / "teacher", 2, ())


def test_what_is_half_written_beyond_the_last_step_is_not_missed(tmp_path: Path) -> None:
    """The trainer goes on when the follower has all it was to fold."""
    run = tmp_path / "run"
    save(run, 1)
    (run / "step_200.safetensors").write_bytes(b"x" * 50)
    for num_folded in (1, 0):
        report = ckpt_ema.follow(run, momentum=0.1, until_step=100, poll_seconds=0.01)
        assert (report.num_folded, report.missed) == (num_folded, ())


def test_a_first_fold_that_was_killed_in_an_empty_folder_is_begun_anew(tmp_path: Path) -> None:
    """Hidden files are no teacher, and no reason to end."""
    run = tmp_path / "run"
    for number in (1, 2):
        folder = run / f"checkpoint-{number}"
        folder.mkdir(parents=True)
        save_file(make_student(number), folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    (tmp_path / "t").mkdir()

    def stop(read: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet_fold([run / "checkpoint-1"], tmp_path / "t", resume=True, progress=stop)
    assert os.listdir(tmp_path / "t")
    assert ckpt_ema.follow(run, tmp_path / "t", momentum=0.1, idle_seconds=0.2, poll_seconds=0.01).num_folded == 2
    assert sorted(os.listdir(tmp_path / "t")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("options", [{"poll_seconds": 0}, {"idle_seconds": -1.0}, {"patience_seconds": float("nan")}])
def test_times_that_make_no_sense_are_misuse(tmp_path: Path, options: dict[str, Any]) -> None:
    """None of them makes a busy loop, or one that ends at once."""
    with pytest.raises(MisuseError, match="must be above 0"):
        ckpt_ema.follow(tmp_path, momentum=0.1, **options)


def test_a_remote_run_is_not_followed(tmp_path: Path) -> None:
    """It says so at once, and what to do instead."""
    with pytest.raises(MisuseError, match="is remote"):
        ckpt_ema.follow("memory://run", tmp_path / "t.safetensors", momentum=0.1)


def test_a_checkpoint_that_is_slowly_written_is_no_idleness(tmp_path: Path) -> None:
    """`idle` counts from the last byte that came, not from the last checkpoint that was whole."""
    save(tmp_path / "run", 1)
    save_file(make_student(2), tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    with Following(tmp_path / "run", idle_seconds=0.6) as following:
        following.wait("folded")
        with open(tmp_path / "run" / "step_200.safetensors", "wb", buffering=0) as file:
            for part in range(10):
                file.write(content[part * len(content) // 10 : (part + 1) * len(content) // 10])
                time.sleep(0.2)
        following.wait("folded", 2)


def save(run: Path, number: int) -> StateDict:
    """The checkpoint of step `number` * 100, whole from the first moment."""
    student = make_student(number)
    run.mkdir(exist_ok=True)
    save_file(student, run.parent / "being-written")
    (run.parent / "being-written").rename(run / f"step_{number}00.safetensors")
    return student


def test_every_checkpoint_is_folded_before_the_trainer_removes_it(tmp_path: Path) -> None:
    """One checkpoint is kept at a time; the teacher is whole after each of them, and right bit for bit."""
    run = tmp_path / "run"
    run.mkdir()
    students = []
    with Following(run) as following:
        for number in range(1, 7):
            students.append(save(run, number))
            following.wait("folded in", number)
            (run / f"step_{number}00.safetensors").unlink()
            assert_same_bits(load_file(run / "teacher.safetensors"), hook_teacher(students, 0.1, BUFFERS))
        report = following.end()
    assert (report.num_folded, report.missed) == (6, ())
    assert following.lines[-1].endswith(f"6 checkpoints in {run / 'teacher.safetensors'}")


def test_a_restart_goes_on_where_it_was_left(tmp_path: Path) -> None:
    """By the rule that the teacher records, without folding anything twice, with what came meanwhile in one pass."""
    run = tmp_path / "run"
    students = [save(run, 1), save(run, 2)]
    with Following(run) as following:
        following.wait("folded in")
        following.end()
    students += [save(run, 3), save(run, 4)]
    with Following(run, momentum=None) as following:
        following.wait("step_300.safetensors to step_400.safetensors folded")
        assert following.end().num_folded == 2
    assert_same_bits(load_file(run / "teacher.safetensors"), hook_teacher(students, 0.1, BUFFERS))
    with pytest.raises(CkptEmaError, match="by another rule"):
        ckpt_ema.follow(run, momentum=0.2, idle_seconds=0.1, poll_seconds=0.01)


def test_a_teacher_that_a_fold_wrote_is_gone_on_with(tmp_path: Path) -> None:
    """Folded so far, followed from here."""
    run = tmp_path / "run"
    students = [save(run, 1), save(run, 2)]
    quiet_fold(run, None, momentum=0.1)
    with Following(run, momentum=None) as following:
        students.append(save(run, 3))
        following.wait("folded in")
        following.end()
    assert_same_bits(load_file(run / "teacher.safetensors"), hook_teacher(students, 0.1, BUFFERS))


def test_a_half_written_checkpoint_is_waited_for(tmp_path: Path) -> None:
    """Written in pieces, with pauses, a newer one finished before it: folded whole, and in step order."""
    run = tmp_path / "run"
    students = [save(run, 1)]
    with Following(run) as following:
        following.wait("folded in")
        save_file(make_student(2), tmp_path / "whole")
        content = (tmp_path / "whole").read_bytes()
        with (run / "step_200.safetensors").open("wb", buffering=0) as file:
            for begin in range(0, len(content), len(content) // 4 + 1):
                file.write(content[begin : begin + len(content) // 4 + 1])
                if not begin:
                    students += [make_student(2), save(run, 3)]
                time.sleep(0.2)
        following.wait("step_300.safetensors folded")
        following.end()
    assert_same_bits(load_file(run / "teacher.safetensors"), hook_teacher(students, 0.1, BUFFERS))


def test_a_checkpoint_that_is_never_finished_is_told_and_passed_over(tmp_path: Path) -> None:
    """Half a file that nobody writes to any more holds up the next ones for a while, not for ever."""
    run = tmp_path / "run"
    students = [save(run, 1)]
    with Following(run, patience_seconds=0.5) as following:
        following.wait("folded in")
        (run / "step_200.safetensors").write_bytes(b"x" * 50)
        students.append(save(run, 3))
        following.wait("missed step_200.safetensors: it cannot be read")
        following.wait("step_300.safetensors folded")
        assert following.end().missed == ("step_200.safetensors",)
    assert_same_bits(load_file(run / "teacher.safetensors"), hook_teacher(students, 0.1, BUFFERS))


def test_a_checkpoint_that_vanishes_is_told(tmp_path: Path) -> None:
    """Seen, and removed before it was finished: said, and no reason to stop."""
    run = tmp_path / "run"
    students = [save(run, 1)]
    with Following(run) as following:
        following.wait("folded in")
        (run / "step_200.safetensors").write_bytes(b"x" * 50)
        time.sleep(0.3)
        (run / "step_200.safetensors").unlink()
        following.wait("missed step_200.safetensors: it vanished")
        students.append(save(run, 3))
        following.wait("step_300.safetensors folded")
        following.end()
    assert_same_bits(load_file(run / "teacher.safetensors"), hook_teacher(students, 0.1, BUFFERS))


def test_checkpoints_without_an_update_go_in_with_the_next(tmp_path: Path) -> None:
    """An interval beyond the gap between checkpoints: they wait, are not missed, and the sum is that of one fold."""
    run = tmp_path / "run"
    options = {"momentum": 0.1, "per": "step", "interval": 250, "between": "hold"}
    save(run, 1)
    with Following(run, **options) as following:
        following.wait("folded in")
        save(run, 2)
        time.sleep(0.5)
        assert following.end().missed == ()
    with Following(run, **options) as following:
        for number in (3, 4):
            save(run, number)
        following.wait("folded in")
        assert following.end().missed == ()
    whole = quiet_fold(run, tmp_path / "whole.safetensors", **options)
    assert_same_bits(load_file(run / "teacher.safetensors"), load_file(whole.output))


def test_a_follower_beside_another_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other one folded is nothing to wait for."""
    run = tmp_path / "run"
    save(run, 1)
    with Following(run) as following:
        following.wait("folded in")
        students = [make_student(1), save(tmp_path / "next", 2)]
        monkeypatch.setattr("ckpt_ema.following._Follower.look", lambda self, is_last: False)
        (tmp_path / "next" / "step_200.safetensors").rename(run / "step_200.safetensors")
        quiet_fold(run, run / "teacher.safetensors", init=run / "teacher.safetensors", overwrite=True)
        monkeypatch.undo()
        with pytest.raises(NoCheckpointError, match="nothing is newer than"):
            following.wait("never")
    assert_same_bits(load_file(run / "teacher.safetensors"), hook_teacher(students, 0.1, BUFFERS))


def test_a_trainer_that_went_back_is_told(tmp_path: Path) -> None:
    """Steps before the teacher's, and ones that it has and that are written again: not folded, and each is said."""
    run = tmp_path / "run"
    students = [save(run, 1), save(run, 3)]
    with Following(run) as following:
        following.wait("folded in")
        save(run, 2)
        following.wait("missed step_200.safetensors: it is of step 200, and the teacher of step 300")
        save_file(make_student(9), run / "step_300.safetensors")
        following.wait("missed step_300.safetensors: it was written again after it was folded")
        students.append(save(run, 4))
        following.wait("step_400.safetensors folded")
        report = following.end()
    assert report.missed == ("step_200.safetensors", "step_300.safetensors")
    assert_same_bits(load_file(run / "teacher.safetensors"), hook_teacher(students, 0.1, BUFFERS))


def test_copies_without_a_step_are_left_out(tmp_path: Path) -> None:
    """`last` and `best` beside checkpoints with a step, while these are there and when they are gone, and rewritten;
    an average beside them is none either."""
    run = tmp_path / "run"
    students = [save(run, 1)]
    shutil.copy(run / "step_100.safetensors", run / "last.safetensors")
    with Following(run) as following:
        following.wait("folded in")
        for number in (2, 3):
            students.append(save(run, number))
            shutil.copy(run / f"step_{number}00.safetensors", run / "last.safetensors")
            shutil.copy(run / f"step_{number}00.safetensors", run / "best.safetensors")
            save_file(make_student(9), run / "model_ema.safetensors")
            following.wait("folded in", number)
            (run / f"step_{number}00.safetensors").unlink()
            time.sleep(0.5)
        assert following.end().missed == ()
    assert_same_bits(load_file(run / "teacher.safetensors"), hook_teacher(students, 0.1, BUFFERS))
    assert sum("left out" in line for line in following.lines) == 2


def test_a_teacher_that_is_gone_is_not_begun_anew_in_silence(tmp_path: Path) -> None:
    """It had checkpoints that may not be there any more."""
    run = tmp_path / "run"
    save(run, 1)
    with Following(run) as following:
        following.wait("folded in")
        (run / "teacher.safetensors").unlink()
        save(run, 2)
        with pytest.raises(CkptEmaError, match="the teacher of the checkpoints so far, is gone"):
            following.wait("never")
    assert not (run / "teacher.safetensors").exists()


def test_a_trainer_that_writes_one_name_again_and_again_is_followed(tmp_path: Path) -> None:
    """`last.pt`, replaced each time: its step inside tells that it is another one."""
    run = tmp_path / "run"
    run.mkdir()
    students = []
    with Following(run) as following:
        for number in (1, 2, 3):
            students.append(make_student(number))
            torch.save({"state_dict": students[-1], "global_step": number * 100}, tmp_path / "new.pt")
            (tmp_path / "new.pt").rename(run / "last.pt")
            following.wait("folded in", number)
        following.end()
    assert_same_bits(load_file(run / "teacher.safetensors"), hook_teacher(students, 0.1, BUFFERS))


def test_it_ends_at_a_step_or_when_nothing_comes(tmp_path: Path) -> None:
    """`until`: that step is the last one in the teacher, though there are newer ones; `idle`: so long without any."""
    run = tmp_path / "run"
    students = save_students(run, 4)
    with Following(run, until_step=300) as following:
        following._thread.join(30)
        assert following.end().num_folded == 3
    assert_same_bits(load_file(run / "teacher.safetensors"), hook_teacher(students[:3], 0.1, BUFFERS))
    started = time.monotonic()
    with Following(run, idle_seconds=0.5) as following:
        following._thread.join(30)
        assert following.end().num_folded == 1
    assert 0.5 <= time.monotonic() - started < 10


def test_sixteen_bits_are_followed_in_float32(tmp_path: Path) -> None:
    """So that nothing is rounded between two checkpoints: the bits of one fold of all, written in float32."""
    run = tmp_path / "run"
    run.mkdir()
    with Following(run) as following:
        for step in (1, 2, 3):
            student = {"w": torch.randn(300, generator=torch.Generator().manual_seed(step)).bfloat16()}
            save_file(student, run / f"step_{step}.safetensors")
            following.wait("folded in", step)
        following.end()
    whole = quiet_fold(run, tmp_path / "whole.safetensors", momentum=0.1, dtype="float32")
    assert_same_bits(load_file(run / "teacher.safetensors"), load_file(whole.output))


def test_per_step_the_last_student_is_used_while_it_is_there(tmp_path: Path) -> None:
    """A half-life in steps: as the fold of all at once, up to rounding, where the trainer keeps two checkpoints."""
    run = tmp_path / "run"
    run.mkdir()
    with Following(run, momentum=None, half_life=150.0) as following:
        for number in (1, 2, 3, 4):
            save(run, number)
            following.wait("folded in", number)
            if number > 2:
                (run / f"step_{number - 2}00.safetensors").rename(tmp_path / f"step_{number - 2}00.safetensors")
        following.end()
    for path in tmp_path.glob("step_*"):
        path.rename(run / path.name)
    whole = load_file(quiet_fold(run, tmp_path / "whole.safetensors", half_life=150.0).output)
    for name, tensor in load_file(run / "teacher.safetensors").items():
        assert torch.allclose(tensor, whole[name], rtol=1e-5, atol=1e-6), name
    assert not any("is gone" in line for line in following.lines)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"momentum": [0.1, 0.2]}, "one exponential moving average"),
        ({"momentum": None, "profile": "uniform"}, "one exponential moving average"),
        ({"init": "t.safetensors"}, "`--init` has no meaning"),
        ({"shard_size_bytes": 1000}, "`--shard-size` has no meaning"),
        ({"output_format": "dcp"}, "not replaced in one step"),
        ({"interval": 2}, "counts checkpoints"),
    ],
)
def test_what_cannot_be_followed_is_misuse(tmp_path: Path, options: dict[str, Any], word: str) -> None:
    """Said at once, rather than when the first checkpoint comes."""
    with pytest.raises(MisuseError, match=word):
        ckpt_ema.follow(tmp_path, **{"momentum": 0.1, **options})


def test_a_run_that_is_not_there_or_stays_empty_is_an_error(tmp_path: Path) -> None:
    """A typing error must not wait for ever beside a run that loses its checkpoints."""
    with pytest.raises(MisuseError, match="is no folder"):
        ckpt_ema.follow(tmp_path / "nowhere", momentum=0.1)
    with pytest.raises(NoCheckpointError, match="had no finished checkpoint"):
        ckpt_ema.follow(tmp_path, momentum=0.1, idle_seconds=0.1, poll_seconds=0.05)


def test_somebodys_file_in_the_teachers_place_is_not_replaced(tmp_path: Path) -> None:
    """What this tool did not write stays."""
    run = tmp_path / "run"
    save(run, 1)
    save_file({"w": torch.zeros(3)}, tmp_path / "precious.safetensors")
    before = (tmp_path / "precious.safetensors").read_bytes()
    with pytest.raises(CkptEmaError, match="does not say what it was folded from"):
        ckpt_ema.follow(run, tmp_path / "precious.safetensors", momentum=0.1, poll_seconds=0.05)
    assert (tmp_path / "precious.safetensors").read_bytes() == before


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1.5h", 5400), ("10m", 600), ("2 d", 172800)])
def test_times_are_read_as_people_write_them(text: str, seconds: float) -> None:
    """Seconds, minutes, hours and days."""
    assert parse_duration(text) == seconds
    with pytest.raises(SizeError):
        parse_duration(text + "x")


# --- processes --------------------------------------------------------------------------------------------------------


def start(run: Path, *arguments: object) -> subprocess.Popen[str]:
    """`ckpt-ema follow` as a process of its own, that heeds signals, and that the modes of files bind."""

    def heed() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(
        [*bound_by_modes(), sys.executable, "-m", "ckpt_ema", "follow", str(run), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,  # noqa: PLW1509  (no other thread of this process is in the middle of anything)
    )


@pytest.fixture
def follower(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts followers, and ends what is left of them."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: Any) -> subprocess.Popen[str]:
        started.append(start(*arguments))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def test_a_checkpoint_that_may_not_be_read_is_told_and_taken_when_it_may(
    tmp_path: Path, follower: Callable[..., subprocess.Popen[str]]
) -> None:
    """Once, with what to type; it is folded when that was typed, before a newer one that waited for it."""
    run = tmp_path / "run"
    students = save_students(run, 2)
    closed = run / "step_200.safetensors"
    closed.chmod(0)
    process = follower(run, "--momentum", 0.1)
    assert process.stderr is not None
    assert f"Warning: cannot open `{closed}`: Permission denied; it is folded when" in process.stderr.readline()
    assert "step_100.safetensors folded" in process.stderr.readline()
    students.append(save(run, 3))
    time.sleep(2.5)
    closed.chmod(0o600)
    assert "step_200.safetensors to step_300.safetensors folded" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "folded 3 checkpoints\n")
    assert_same_bits(load_file(run / "teacher.safetensors"), hook_teacher(students, 0.1, BUFFERS))


IMPATIENT = """
import sys, ckpt_ema
options = {"momentum": 0.1, "poll_seconds": 0.05, "patience_seconds": 0.4, "idle_seconds": 2.0}
done = ckpt_ema.follow(sys.argv[1], tell=lambda text: print(text, flush=True), **options)
print(done.num_folded, done.missed)
"""


def test_newer_checkpoints_wait_for_one_that_may_not_be_read_and_not_for_ever(tmp_path: Path) -> None:
    """It is missed when their patience is at its end; one that nothing newer waits for is taken however late."""
    run = tmp_path / "run"
    save_students(run, 4)
    (run / "step_200.safetensors").chmod(0)
    (run / "step_400.safetensors").chmod(0)
    command = [*bound_by_modes(), sys.executable, "-c", IMPATIENT, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        time.sleep(0.8)
        (run / "step_400.safetensors").chmod(0o600)
        rest = process.stdout.read().splitlines()
    assert all(line.startswith("Warning: cannot open") for line in lines[:2])
    assert lines[2].startswith("step_100.safetensors folded")
    assert lines[3].startswith("missed step_200.safetensors: it cannot be read: cannot open")
    assert lines[4].startswith("step_300.safetensors folded")
    assert rest[0].startswith("step_400.safetensors folded")
    assert rest[1:] == ["3 ('step_200.safetensors',)"]


@pytest.mark.parametrize("kind", ["file", "folder", "folder that may be listed"])
def test_a_checkpoint_that_may_never_be_read_is_told_with_the_reason(
    tmp_path: Path, kind: str, follower: Callable[..., subprocess.Popen[str]]
) -> None:
    """When it is seen, with what to type; and at the end, when it is missed."""
    run = tmp_path / "run"
    save_students(run, 2)
    closed = run / "step_200.safetensors"
    if kind != "file":
        for number in (1, 2):
            (run / f"checkpoint-{number}00").mkdir()
            (run / f"step_{number}00.safetensors").rename(run / f"checkpoint-{number}00" / "model.safetensors")
        closed = run / "checkpoint-200"
    closed.chmod(0o444 if kind == "folder that may be listed" else 0)
    process = follower(run, "--momentum", 0.1, "--idle", "3s", "-o", tmp_path / "t.safetensors")
    _, stderr = process.communicate(timeout=60)
    closed.chmod(0o700)
    assert process.returncode == 0, stderr
    [told] = [line for line in stderr.splitlines() if "Warning: " in line]
    assert f"{closed}" in told
    assert "Permission denied; it is folded when it may be read (`chmod u+r" in told
    assert f"{closed}`, if it is yours" in told
    [missed] = [line for line in stderr.splitlines() if f" missed {closed.name}: " in line]
    assert missed.endswith("Permission denied")
    assert "it cannot be read: cannot" in missed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_a_last_look(
    tmp_path: Path, number: signal.Signals, follower: Callable[..., subprocess.Popen[str]]
) -> None:
    """What was saved a moment before is in the teacher; the exit code is 0, and stdout has the teacher's path."""
    run = tmp_path / "run"
    students = [save(run, 1)]
    process = follower(run, "--momentum", 0.1)
    assert process.stderr is not None
    assert "step_100.safetensors folded" in process.stderr.readline()
    students.append(save(run, 2))
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert stdout == f"{run / 'teacher.safetensors'}\n"
    assert "step_200.safetensors folded" in stderr
    assert "folded 2 checkpoints" in stderr
    assert_same_bits(load_file(run / "teacher.safetensors"), hook_teacher(students, 0.1, BUFFERS))


def test_a_signal_in_the_middle_of_a_wait_is_heard() -> None:
    """The handler may interrupt the waiting itself, which holds the event's lock then."""
    code = """
import os, signal
from ckpt_ema.cli import exits
with exits._signals_raise(), exits.first_signal_sets() as stop:
    with stop._cond:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.wait(20)
"""
    subprocess.run([sys.executable, "-c", code], timeout=30, check=True)


def test_a_follower_that_is_killed_loses_nothing(
    tmp_path: Path, follower: Callable[..., subprocess.Popen[str]]
) -> None:
    """SIGKILL at any moment: the teacher is that of some checkpoint, and the next follower goes on to the same bits."""
    run = tmp_path / "run"
    run.mkdir()
    students = []
    for number in range(1, 4):
        process = follower(run, "--momentum", 0.1)
        students.append(save(run, number))
        time.sleep(2 + 0.3 * number)
        process.kill()
        process.wait()
    process = follower(run, "--momentum", 0.1, "--idle", "3s")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert_same_bits(load_file(run / "teacher.safetensors"), hook_teacher(students, 0.1, BUFFERS))
    assert [name for name in os.listdir(run) if name.startswith(".")] == []


def test_beside_a_real_trainer_that_keeps_one_checkpoint(
    tmp_path: Path, follower: Callable[..., subprocess.Popen[str]]
) -> None:
    """Transformers' Trainer with `save_total_limit=1`: the teacher is the hook's over every checkpoint it ever wrote,
    a folder that `from_pretrained` loads, and nothing was missed."""
    transformers = pytest.importorskip("transformers")
    run = tmp_path / "run"
    run.mkdir()
    process = follower(run, "--momentum", 0.3, "-o", tmp_path / "teacher")
    trained = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("trainer_process.py")), str(run), str(tmp_path / "kept")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert trained.returncode == 0, trained.stderr[-3000:]
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    kept = sorted((tmp_path / "kept").iterdir(), key=lambda path: int(path.stem))
    assert len(kept) == 6
    assert len(list(run.glob("checkpoint-*"))) == 1
    assert "missed" not in stderr, stderr
    students = [load_file(path) for path in kept]
    expected = hook_teacher(students, 0.3)
    assert_same_bits(load_file(tmp_path / "teacher" / "model.safetensors"), expected)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    for name, tensor in model.state_dict().items():
        if name in expected:
            assert torch.equal(tensor, expected[name]), name


def test_a_teacher_is_readable_at_every_moment(tmp_path: Path) -> None:
    """A reader that opens it again and again while it is replaced meets whole teachers only, none older than before."""
    run = tmp_path / "run"
    save(run, 1)
    with Following(run) as following:
        following.wait("folded in")
        counts = []
        for number in range(2, 8):
            save(run, number)
            for _ in range(40):
                counts.append(int(load_file(run / "teacher.safetensors")["bn.num_batches_tracked"]))
                time.sleep(0.005)
        following.end()
    assert counts == sorted(counts)
    assert set(counts) <= {number * 10 for number in range(1, 8)}
    shutil.rmtree(run)


ROTATING_TRAINER = """
import os, shutil, sys, time
from pathlib import Path
import torch
from safetensors.torch import save_file
run, end = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2])
number = 0
while time.monotonic() < end:
    number += 1
    for name, others in ((f"checkpoint-{number}", ["config.json"]), (f"step_{number}.safetensors", [])):
        if name.endswith(".safetensors"):
            save_file({"w": torch.full((4,), float(number))}, run / f".{name}")
        else:
            (run / f".{name}").mkdir()
            save_file({"w": torch.full((4,), float(number))}, run / f".{name}" / "model.safetensors")
            (run / f".{name}" / "config.json").write_text("{}")
        if sys.argv[3] in name:
            os.rename(run / f".{name}", run / name)
    old = run / f"checkpoint-{number - 10}"
    shutil.rmtree(old, ignore_errors=True)
    (run / f"step_{number - 10}.safetensors").unlink(missing_ok=True)
    time.sleep(0.01)
"""
"""Keeps ten checkpoints of the last 0.2 s: some go in the middle of every look."""


@pytest.mark.parametrize("kind", ["checkpoint-", "step_"])
def test_a_trainer_that_removes_checkpoints_while_they_are_looked_at_is_followed(tmp_path: Path, kind: str) -> None:
    """Folders and files that vanish between being listed and being read are missed, and end nothing."""
    run, output = tmp_path / "run", tmp_path / ("teacher" if kind == "checkpoint-" else "t.safetensors")
    run.mkdir()
    trainer = subprocess.Popen([sys.executable, "-c", ROTATING_TRAINER, str(run), "3", kind])
    try:
        while not any(path.name.startswith(kind) for path in run.iterdir()):
            time.sleep(0.01)
        with Following(run, output, poll_seconds=0.01) as following:
            trainer.wait(60)
            report = following.end()
    finally:
        trainer.kill()
    assert report.num_folded > 0
    assert report.output == output


def test_a_disk_that_is_full_for_a_while_ends_nothing(
    tmp_path: Path, small_disk: Path, cli: Callable[..., Any]
) -> None:
    """Told once, tried again at every look; where following ends before it passes, it is the error."""
    run, output = tmp_path / "run", small_disk / "t.safetensors"
    save(run, 1)
    (small_disk / "filler").write_bytes(b"x" * (1 << 20))
    with Following(run, output) as following:
        following.wait("is tried again from time to time")
        time.sleep(0.3)
        (small_disk / "filler").unlink()
        following.wait("folded in")
        following.end()
    [told] = [line for line in following.lines if "tried again" in line]
    assert told.startswith("Warning: ")
    assert "No space left" in told or "needs" in told
    save(run, 2)
    (small_disk / "filler").write_bytes(b"x" * ((1 << 20) - 8192))
    ended = cli("follow", run, "-o", output, "--momentum", 0.1, "--idle", "0.5s", "-q")
    assert ended.code == 1
    assert "Error: " in ended.stderr
    assert_same_bits(load_file(output), make_student(1))


def test_warnings_are_heard_with_quiet(tmp_path: Path, cli: Callable[..., Any]) -> None:
    """`-q` leaves what `fold -q` leaves: warnings."""
    run = tmp_path / "run"
    save(run, 1)
    done = cli("follow", run, "-o", "t.safetensors", "--momentum", 0.999, "--until", 100, "-q")
    assert done.code == 0
    assert "Warning: " in done.stderr
    assert "is written `--momentum 0.001` here" in done.stderr
    assert "folded" not in done.stderr


def test_a_place_that_cannot_be_written_to_is_an_error_at_once(tmp_path: Path) -> None:
    """Nothing that passes by itself."""
    save(tmp_path / "run", 1)
    with pytest.raises(CkptEmaError, match="cannot write"):
        ckpt_ema.follow(tmp_path / "run", "/proc/t.safetensors", momentum=0.1, until_step=100, poll_seconds=0.01)


def test_a_best_model_for_users_ends_no_follower(tmp_path: Path) -> None:
    """What holds an average alone is left out, also where all students are folded already."""
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"epoch": -1, "model": make_student(9), "ema": None, "updates": None}, run / "best.pt")
    torch.save({"model": make_student(1), "step": 1}, run / "step_1.pt")
    with Following(run) as following:
        following.wait("step_1.pt folded")
        time.sleep(0.3)
        torch.save({"model": make_student(2), "step": 2}, run / "step_2.pt")
        following.wait("step_2.pt folded")
        assert following.end().num_folded == 2
