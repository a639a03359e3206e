"""A fold that is killed, and goes on: every moment, every call that writes, every way an input may change meanwhile."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckpt_ema
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.output import journal, writer
from ckpt_ema.output.fingerprints import fingerprint
from tests.conftest import Outcome, quiet_fold, save_hollow

Cli = Callable[..., Outcome]


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    """A folder for `fault_driver.py`: runs of small students, and what lies where their teachers go."""
    for name in ("run", "model_run"):
        for step in (1, 2, 3):
            generator = torch.Generator().manual_seed(step)
            student = {f"layer{i}.weight": torch.randn(40, 30, generator=generator) for i in range(12)}
            student["layer1.running_mean"] = torch.randn(8, generator=generator)
            folder = tmp_path / name / (f"checkpoint-{step}" if name == "model_run" else "")
            folder.mkdir(parents=True, exist_ok=True)
            if name == "model_run":
                (folder / "config.json").write_text('{"model_type": "none"}')
            file_name = "model.safetensors" if name == "model_run" else f"step_{step}.safetensors"
            save_file(student, folder / file_name, metadata={"format": "pt"})
    begin = tmp_path / "begin"
    begin.mkdir()
    quiet_fold(tmp_path / "run", begin / "old.safetensors", momentum=0.7)
    quiet_fold(tmp_path / "run", begin / "shards", momentum=0.7, shard_size_bytes=20_000)
    quiet_fold(tmp_path / "model_run", begin / "model", momentum=0.7)
    quiet_fold(tmp_path / "run", begin / "apart", momentum=0.7, shard_size_bytes=40_000)
    quiet_fold(tmp_path / "run", begin / "joined", momentum=0.7, shard_size_bytes=20_000)
    quiet_fold(tmp_path / "run", begin / "dcp", momentum=0.7, output_format="dcp")
    for name in ("shards", "apart", "joined", "dcp", "model"):
        (begin / name / "notes.md").write_text("somebody's own")
    return tmp_path


def drive(*arguments: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fault_driver.py")), *map(str, arguments)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    wrong: list[str] = json.loads(done.stdout)
    return wrong


@pytest.mark.parametrize(
    "scenario", ["file", "overwritten", "several", "shards", "apart", "joined", "new", "dcp", "model"]
)
def test_a_fold_killed_at_any_writing_call_goes_on_to_the_same_bytes(faults: Path, scenario: str) -> None:
    """Killed before, after and within every call that writes: no half teacher, `resume` ends with the same bytes, and
    nothing is left beside them."""
    assert drive("calls", faults, scenario) == []


@pytest.mark.parametrize(
    "scenario", ["file", "overwritten", "several", "shards", "apart", "joined", "new", "dcp", "model"]
)
def test_when_power_fails_what_was_synced_is_gone_on_with(faults: Path, scenario: str) -> None:
    """At every call that writes: of what was not synced any part may be lost, sectors and names; the teacher that was
    there is whole, and `resume` ends with the bytes of an undisturbed fold."""
    assert drive("power", faults, scenario, 1) == []


def test_a_fold_killed_at_200_random_moments_goes_on_to_the_same_bytes(faults: Path) -> None:
    """Up to three SIGKILLs in a row, wherever they fall; the teacher is that of an undisturbed fold."""
    assert drive("random", faults, "overwritten", 200) == []


# --- going on, and what hinders it ------------------------------------------------------------------------------------


class StoppedError(BaseException):
    """Stands for a signal."""


def stop_at(share: float) -> Callable[[int, int], None]:
    """A progress callback that stops the fold when that much is read."""

    def stop(read: int, total: int) -> None:
        if read > total * share:
            raise StoppedError

    return stop


def stop_fold(run: Path, output: Path, **options: Any) -> None:
    """A fold in small blocks that is stopped half way, and keeps what it has done."""
    with pytest.raises(StoppedError):
        quiet_fold(
            run,
            output,
            progress=stop_at(0.5),
            **{"num_threads": 1, "memory_budget_bytes": 1 << 15, "resume": True, **options},
        )


@pytest.fixture
def long_students(tmp_path: Path) -> Path:
    """A run whose fold has some twenty blocks."""
    folder = tmp_path / "long"
    folder.mkdir()
    for step in (100, 200, 300):
        generator = torch.Generator().manual_seed(step)
        save_file(
            {"w": torch.randn(40_000, generator=generator), "n": torch.tensor(step)},
            folder / f"step_{step}.safetensors",
        )
    return folder


def unfinished(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def test_resume_reads_the_rest_alone_and_with_any_memory(long_students: Path, tmp_path: Path) -> None:
    """What was finished is not read again; another budget and other threads go on to the same bytes."""
    whole = quiet_fold(long_students, tmp_path / "whole.safetensors")
    stop_fold(long_students, tmp_path / "t.safetensors")
    done = quiet_fold(
        long_students, tmp_path / "t.safetensors", resume=True, memory_budget_bytes=1 << 20, num_threads=3
    )
    assert 0.4 < done.resumed_bytes / whole.plan.bytes_to_read < 0.7
    assert done.bytes_read + done.resumed_bytes == whole.plan.bytes_to_read
    assert (tmp_path / "t.safetensors").read_bytes() == whole.output.read_bytes()
    assert unfinished(tmp_path) == []


def test_links_lead_to_the_same_fold(long_students: Path, tmp_path: Path) -> None:
    """Of the run and of the output's folder, and back."""
    whole = quiet_fold(long_students, tmp_path / "whole.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "linked-out").symlink_to("out")
    (tmp_path / "linked-run").symlink_to(long_students)
    stop_fold(tmp_path / "linked-run", tmp_path / "out" / "t.safetensors")
    done = quiet_fold(long_students, tmp_path / "linked-out" / "t.safetensors", resume=True)
    assert done.resumed_bytes > 0
    assert (tmp_path / "out" / "t.safetensors").read_bytes() == whole.output.read_bytes()
    assert os.listdir(tmp_path / "out") == ["t.safetensors"]


def test_resume_without_anything_to_go_on_with_is_a_fold(long_students: Path, tmp_path: Path) -> None:
    """A script may always pass it."""
    done = quiet_fold(long_students, tmp_path / "t.safetensors", resume=True)
    assert done.resumed_bytes == 0
    assert unfinished(tmp_path) == []


def test_only_what_was_synced_counts_on_another_machine(
    long_students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power failure blocks that were written and not synced hold anything; they are folded again."""
    whole = quiet_fold(long_students, tmp_path / "whole.safetensors").output.read_bytes()
    monkeypatch.setattr(journal.Journal, "settle", lambda self, error: setattr(self.draft, "is_kept", True))
    stop_fold(long_students, tmp_path / "t.safetensors")
    (half,) = tmp_path.glob(".t.safetensors.*.tmp")
    content = half.read_bytes()
    half.write_bytes(content[:4096] + bytes(len(content) - 4096))
    monkeypatch.setattr(journal, "_machine", lambda: 7)
    done = quiet_fold(long_students, tmp_path / "t.safetensors", resume=True)
    assert done.resumed_bytes == 0
    assert (tmp_path / "t.safetensors").read_bytes() == whole


def test_what_was_synced_counts_on_another_machine(
    long_students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fold that is stopped in order syncs, and another machine goes on with all of it."""
    whole = quiet_fold(long_students, tmp_path / "whole.safetensors").output.read_bytes()
    stop_fold(long_students, tmp_path / "t.safetensors")
    monkeypatch.setattr(journal, "_machine", lambda: 7)
    assert quiet_fold(long_students, tmp_path / "t.safetensors", resume=True).resumed_bytes > 0
    assert (tmp_path / "t.safetensors").read_bytes() == whole


def rewrite(run: Path) -> None:
    path = run / "step_200.safetensors"
    save_file({"w": torch.zeros(40_000), "n": torch.tensor(200)}, path)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10_000_000))


def shorten(run: Path) -> None:
    for path in run.iterdir():
        save_file({"w": torch.zeros(30_000), "n": torch.tensor(200)}, path)


def rename_a_tensor(run: Path) -> None:
    """Same size, same times, another name in the header."""
    for path in run.iterdir():
        times = path.stat()
        path.write_bytes(path.read_bytes().replace(b'"w"', b'"v"'))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "options", "word"),
    [
        (rewrite, {}, "step_200.safetensors: was written again"),
        (shorten, {}, "size "),
        (rename_a_tensor, {}, "step_100.safetensors: its header became another one"),
        (lambda run: (run / "step_300.safetensors").unlink(), {}, "step_300.safetensors: takes no part any more"),
        (lambda run: save_file({"w": torch.zeros(40_000), "n": torch.tensor(0)}, run / "step_400.safetensors"), {},
         "step_400.safetensors: is new"),
        (lambda run: None, {"momentum": 0.2}, "momentum: 0.1 became 0.2"),
        (lambda run: None, {"dtype": "bfloat16"}, 'dtype: "student" became "bfloat16"'),
        (lambda run: None, {"buffers": ["w"]}, "buffers: "),
    ],
)  # fmt: skip
def test_anything_that_changed_is_named(
    long_students: Path, tmp_path: Path, change: Callable[[Path], object], options: dict[str, Any], word: str
) -> None:
    """Inputs and options are those of the fold that was stopped, or nothing is written and each difference is told;
    what was done stays, and goes on once they are the same again."""
    stop_fold(long_students, tmp_path / "t.safetensors", momentum=0.1)
    change(long_students)
    with pytest.raises(CkptEmaError, match="inputs or options differ") as caught:
        quiet_fold(long_students, tmp_path / "t.safetensors", resume=True, **{"momentum": 0.1, **options})
    assert any(word in line for line in caught.value.details), caught.value.details
    assert "--overwrite" in str(caught.value.hint)
    assert len(unfinished(tmp_path)) == 2
    assert not (tmp_path / "t.safetensors").exists()
    quiet_fold(long_students, tmp_path / "t.safetensors", overwrite=True, **{"momentum": 0.1, **options})
    assert unfinished(tmp_path) == []


@pytest.mark.parametrize("in_place", [True, False])
def test_other_content_with_the_time_put_back_is_noticed(long_students: Path, tmp_path: Path, in_place: bool) -> None:
    """Of one size, as `cp -p` and `rsync` leave it: never a teacher of old and new halves."""
    stop_fold(long_students, tmp_path / "t.safetensors")
    path = long_students / "step_200.safetensors"
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-100_000:] = bytes(100_000)
    if not in_place:
        path.unlink()
    with path.open("r+b" if in_place else "wb") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CkptEmaError) as caught:
        quiet_fold(long_students, tmp_path / "t.safetensors", resume=True)
    assert any("step_200.safetensors: was written again" in line for line in caught.value.details)


def test_an_input_that_goes_away_before_the_journal_is_an_error_of_ours(long_students: Path, tmp_path: Path) -> None:
    """A follower looks again then, and only heeds errors that the fold explains."""
    planned = ckpt_ema.plan(long_students, tmp_path / "t.safetensors")
    (long_students / "step_200.safetensors").unlink()
    with pytest.raises(CkptEmaError, match=r"step_200.safetensors` went away before it was folded"):
        fingerprint(planned, [])


def test_a_folder_that_was_renamed_is_tidied_up(long_students: Path, tmp_path: Path) -> None:
    """Begun anew under its new name, an unfinished fold leaves nothing of the first one."""
    (tmp_path / "one").mkdir()
    stop_fold(long_students, tmp_path / "one" / "t.safetensors")
    (tmp_path / "one").rename(tmp_path / "two")
    quiet_fold(long_students, tmp_path / "two" / "t.safetensors", overwrite=True)
    assert os.listdir(tmp_path / "two") == ["t.safetensors"]


def test_a_checkpoint_that_came_meanwhile_is_kept_out_by_until(long_students: Path, tmp_path: Path) -> None:
    """Training goes on while a fold is stopped; `until` is what that fold had seen."""
    whole = quiet_fold(long_students, tmp_path / "whole.safetensors").output.read_bytes()
    stop_fold(long_students, tmp_path / "t.safetensors")
    save_file({"w": torch.zeros(40_000), "n": torch.tensor(0)}, long_students / "step_400.safetensors")
    assert quiet_fold(long_students, tmp_path / "t.safetensors", resume=True, until_step=300).resumed_bytes > 0
    assert (tmp_path / "t.safetensors").read_bytes() == whole


def kill_fold(run: Path, output: Path, **options: Any) -> None:
    """A fold in small blocks whose process is killed half way, within seconds."""
    code = """
import json, os, pathlib, signal, sys
import ckpt_ema
run, output, options = sys.argv[1:]
kill = lambda read, total: read > total * 0.5 and os.kill(os.getpid(), signal.SIGKILL)
quiet = lambda plan: None
ckpt_ema.fold(pathlib.Path(run), output, progress=kill, announce=quiet, **json.loads(options))
"""
    options = {"num_threads": 1, "memory_budget_bytes": 1 << 15, **options}
    command = [sys.executable, "-c", code, run, output, json.dumps(options)]
    assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL


def assert_asks(run: Path, output: Path) -> None:
    """A fold without `resume` says what is there and how to go on, and leaves it."""
    for _ in range(2):
        with pytest.raises(CkptEmaError, match=r"an unfinished fold into .* is there, \d+% done") as caught:
            quiet_fold(run, output)
        assert caught.value.hint == "pass `--resume` to continue it, or `--overwrite` to begin anew"


def test_hours_of_work_are_not_thrown_away_unasked(
    long_students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `resume` a fold that would begin anew over a long one says so, whether that was killed or failed."""
    output = tmp_path / "t.safetensors"
    kill_fold(long_students, output)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "KEEP_SECONDS", 0)
        assert_asks(long_students, output)
    # It was worth keeping by one clock; the other, of the file system, may be slower by a moment.
    with monkeypatch.context() as patch:
        patch.setattr(journal, "KEEP_SECONDS", 0)
        stop_fold(long_students, output, resume=False, overwrite=True)
    assert_asks(long_students, output)
    assert quiet_fold(long_students, output, overwrite=True).resumed_bytes == 0
    assert unfinished(tmp_path) == []


def test_what_was_begun_to_be_resumed_is_not_thrown_away_unasked(long_students: Path, tmp_path: Path) -> None:
    """However short it took, and whichever of several processes was told `resume`."""
    outputs = [tmp_path / name / "t.safetensors" for name in ("killed", "stopped", "gone-on-with")]
    for output in outputs:
        output.parent.mkdir()
    kill_fold(long_students, outputs[0], resume=True)
    stop_fold(long_students, outputs[1])
    kill_fold(long_students, outputs[2])
    stop_fold(long_students, outputs[2])
    for output in outputs:
        assert_asks(long_students, output)
        assert quiet_fold(long_students, output, resume=True).resumed_bytes > 0
        assert os.listdir(output.parent) == ["t.safetensors"]


def test_a_short_fold_that_was_killed_is_begun_anew(long_students: Path, tmp_path: Path) -> None:
    """Within seconds, and told nothing: going on would save nothing, and asking would only cost."""
    kill_fold(long_students, tmp_path / "t.safetensors")
    assert len(unfinished(tmp_path)) == 2
    assert quiet_fold(long_students, tmp_path / "t.safetensors").resumed_bytes == 0
    assert unfinished(tmp_path) == []


def test_a_short_fold_that_fails_leaves_nothing(long_students: Path, tmp_path: Path) -> None:
    """Without `resume`, and within seconds, there is nothing worth keeping."""
    with pytest.raises(StoppedError):
        quiet_fold(long_students, tmp_path / "t.safetensors", progress=stop_at(0.5), memory_budget_bytes=1 << 15)
    assert unfinished(tmp_path) == []


def test_a_long_fold_that_is_stopped_keeps_what_it_has_done(
    long_students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From ten seconds on also where nobody thought of `resume`."""
    monkeypatch.setattr(journal, "KEEP_SECONDS", 0)
    with pytest.raises(StoppedError):
        quiet_fold(
            long_students, tmp_path / "t.safetensors", progress=stop_at(0.5), num_threads=1, memory_budget_bytes=1 << 15
        )
    assert quiet_fold(long_students, tmp_path / "t.safetensors", resume=True).resumed_bytes > 0


def test_a_broken_student_is_no_reason_to_keep_anything(long_students: Path, tmp_path: Path) -> None:
    """A NaN will be there the next time, too."""
    student = {"w": torch.zeros(40_000), "n": torch.tensor(200)}
    student["w"][-1] = float("nan")
    save_file(student, long_students / "step_200.safetensors")
    with pytest.raises(CkptEmaError, match="NaN"):
        quiet_fold(long_students, tmp_path / "t.safetensors", resume=True, memory_budget_bytes=1 << 15)
    assert unfinished(tmp_path) == []


def test_a_read_error_in_the_middle_loses_nothing(
    long_students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk or a server that fails for a while: the error names the file and the byte, and the fold goes on later."""
    whole = quiet_fold(long_students, tmp_path / "whole.safetensors").output.read_bytes()
    real = os.preadv
    calls = 0

    def failing(descriptor: int, buffers: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CkptEmaError, match=r"cannot read .*step_.* at byte \d+: Input/output error"):
        quiet_fold(long_students, tmp_path / "t.safetensors", resume=True, memory_budget_bytes=1 << 15, num_threads=1)
    monkeypatch.setattr(os, "preadv", real)
    assert quiet_fold(long_students, tmp_path / "t.safetensors", resume=True).resumed_bytes > 0
    assert (tmp_path / "t.safetensors").read_bytes() == whole


def test_a_full_disk_loses_nothing(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that reserves no space fills up meanwhile; with space again the fold goes on to the same bytes."""

    def reserve_nothing(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", reserve_nothing)
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2):
        save_file({"w": torch.full((150_000,), float(step))}, run / f"step_{step}.safetensors")
    whole = quiet_fold(run, tmp_path / "whole.safetensors").output.read_bytes()

    def fill(read: int, total: int) -> None:
        with contextlib.suppress(OSError), (small_disk / "other").open("ab") as file:
            file.write(bytes(1 << 20))

    with pytest.raises(CkptEmaError, match="No space left"):
        quiet_fold(run, small_disk / "t.safetensors", resume=True, progress=fill, memory_budget_bytes=1 << 15)
    (small_disk / "other").unlink()
    quiet_fold(run, small_disk / "t.safetensors", resume=True)
    assert (small_disk / "t.safetensors").read_bytes() == whole
    assert os.listdir(small_disk) == ["t.safetensors"]


def test_a_journal_that_cannot_be_written_does_not_stop_the_fold(
    long_students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk with space for the teacher and not for its journal: the fold ends well all the same."""
    whole = quiet_fold(long_students, tmp_path / "whole.safetensors").output.read_bytes()
    real, count = os.write, 0

    def full(descriptor: int, content: bytes) -> int:
        nonlocal count
        count += len(content) == 24
        if count == 6:
            return real(descriptor, content[:7])
        if count > 6:
            raise OSError(28, "No space left on device")
        return real(descriptor, content)

    monkeypatch.setattr(os, "write", full)
    stop_fold(long_students, tmp_path / "t.safetensors")
    count = 0
    quiet_fold(long_students, tmp_path / "u.safetensors", memory_budget_bytes=1 << 15)
    monkeypatch.setattr(os, "write", real)
    done = quiet_fold(long_students, tmp_path / "t.safetensors", resume=True)
    assert 0 < done.resumed_bytes < 0.4 * done.plan.bytes_to_read
    assert (tmp_path / "t.safetensors").read_bytes() == (tmp_path / "u.safetensors").read_bytes() == whole


def test_two_folds_into_one_output_at_once(long_students: Path, tmp_path: Path) -> None:
    """The second says who has it, and the first is not disturbed."""
    refused: list[str] = []

    def begin_another(read: int, total: int) -> None:
        if not refused:
            with pytest.raises(CkptEmaError, match="another fold is writing") as caught:
                quiet_fold(long_students, tmp_path / "t.safetensors", overwrite=True)
            refused.append(caught.value.message)

    quiet_fold(long_students, tmp_path / "t.safetensors", progress=begin_another, memory_budget_bytes=1 << 15)
    assert f"(process {os.getpid()} on " in refused[0]
    assert unfinished(tmp_path) == []


@pytest.mark.parametrize("momenta", [(0.2,), (0.2, 0.3), (0.1, 0.9)])
def test_two_folds_of_which_one_teacher_is_the_same(
    long_students: Path, tmp_path: Path, momenta: tuple[float, ...]
) -> None:
    """Whichever of several it is, the second fold leaves it, and nothing of itself."""
    refused: list[str] = []

    def begin_another(read: int, total: int) -> None:
        if not refused:
            with pytest.raises(CkptEmaError, match="another fold is writing") as caught:
                quiet_fold(long_students, tmp_path / "t{momentum}.safetensors", momentum=momenta, overwrite=True)
            refused.append(caught.value.message)

    output = tmp_path / "t{momentum}.safetensors"
    quiet_fold(long_students, output, momentum=[0.1, 0.2], progress=begin_another, memory_budget_bytes=1 << 15)
    assert refused
    assert unfinished(tmp_path) == []
    assert sorted(path.name for path in tmp_path.glob("t*")) == ["t0.1.safetensors", "t0.2.safetensors"]


def test_two_folds_of_several_folders_exclude_each_other(long_students: Path, tmp_path: Path) -> None:
    """Each teacher has its lock, wherever it lies; of the second fold and of the locks nothing is left."""
    for momentum in ("0.1", "0.3"):
        (tmp_path / f"ema-{momentum}").mkdir()
    refused: list[str] = []

    def begin_another(read: int, total: int) -> None:
        if not refused:
            with pytest.raises(CkptEmaError, match=r"another fold is writing `.*ema-0.3/t.safetensors`") as caught:
                quiet_fold(long_students, tmp_path / "ema-0.3" / "t.safetensors", momentum=0.3)
            refused.append(caught.value.message)

    output = tmp_path / "ema-{momentum}" / "t.safetensors"
    quiet_fold(long_students, output, momentum=[0.1, 0.3], progress=begin_another, memory_budget_bytes=1 << 15)
    assert refused
    assert [unfinished(tmp_path / f"ema-{momentum}") for momentum in ("0.1", "0.3")] == [[], []]


def test_the_locks_of_a_killed_fold_of_several_are_removed(long_students: Path, tmp_path: Path) -> None:
    """Whoever comes next to its first teacher."""
    stop_fold(long_students, tmp_path / "t{momentum}.safetensors", momentum=[0.1, 0.2])
    (tmp_path / ".t0.2.safetensors.journal").touch()  # as a killed process leaves it
    quiet_fold(long_students, tmp_path / "t0.1.safetensors", overwrite=True)
    assert unfinished(tmp_path) == []


def test_an_empty_folder_is_gone_on_with_as_well(long_students: Path, tmp_path: Path) -> None:
    """What a fold left in it is its own, not somebody's."""
    run = tmp_path / "run"
    for path in long_students.iterdir():
        folder = run / path.stem.replace("step_", "checkpoint-")
        folder.mkdir(parents=True)
        path.rename(folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    (tmp_path / "t").mkdir()
    stop_fold(run, tmp_path / "t")
    assert unfinished(tmp_path / "t")
    done = quiet_fold(run, tmp_path / "t", resume=True)
    assert done.resumed_bytes > 0
    assert sorted(os.listdir(tmp_path / "t")) == ["config.json", "model.safetensors"]
    assert unfinished(tmp_path) == []


def test_a_fold_that_was_killed_when_all_was_done_is_over(
    long_students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its journal may be left; nobody is asked to continue it, least of all a fold that began from its own output."""
    path = tmp_path / "t.safetensors"
    quiet_fold(long_students, path, until_step=200)

    def leave(self: journal.Journal, *error: object) -> None:
        self.blocks.close()

    monkeypatch.setattr(journal, "KEEP_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "__exit__", leave)
        quiet_fold(long_students, path, init=path, overwrite=True)
    assert unfinished(tmp_path) == [".t.safetensors.journal"]
    save_file({"w": torch.ones(40_000), "n": torch.tensor(1)}, long_students / "step_400.safetensors")
    quiet_fold(long_students, path, init=path, overwrite=True, resume=True)
    assert len((ckpt_ema.inspect(path).provenance or {})["checkpoints"]) == 4
    assert unfinished(tmp_path) == []


def test_the_blocks_of_all_ranks_are_counted(long_students: Path, tmp_path: Path) -> None:
    """What `--resume` finds is what the command says is done."""
    path = tmp_path / "t.safetensors"
    stop_fold(long_students, path)
    before = journal.done_share([path]) or 0.0
    header = json.loads(next(tmp_path.glob(".t*.journal")).read_bytes().partition(b"\n")[0])
    blocks = journal.open_finished_blocks(tmp_path, header["token"], 1)
    blocks.begin_session([])
    blocks.add(header["bytes"] * 3 // 4, header["bytes"])
    blocks.close()
    assert (journal.done_share([path]) or 0.0) >= before + 0.2


def test_an_initial_teacher_may_be_named_otherwise(
    long_students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another directory, or by a whole path: it is the same file."""
    quiet_fold(long_students, tmp_path / "early.safetensors", until_step=100)
    monkeypatch.chdir(tmp_path)
    stop_fold(long_students, tmp_path / "t.safetensors", init="early.safetensors")
    done = quiet_fold(long_students, tmp_path / "t.safetensors", init=tmp_path / "early.safetensors", resume=True)
    assert done.resumed_bytes > 0


def test_the_order_of_several_teachers_does_not_hide_the_unfinished(long_students: Path, tmp_path: Path) -> None:
    """Their journal is found, and the other order told, or begun anew without leaving the old one's files."""
    output = tmp_path / "t{momentum}.safetensors"
    stop_fold(long_students, output, momentum=[0.2, 0.1])
    with pytest.raises(CkptEmaError, match="inputs or options differ") as caught:
        quiet_fold(long_students, output, momentum=[0.1, 0.2], resume=True)
    assert "momentum" in caught.value.details[0]
    quiet_fold(long_students, output, momentum=[0.1, 0.2], overwrite=True)
    assert unfinished(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{}\n", b"x" * 100, b'{"token": "../../x"}\n' + bytes(240)])
def test_a_journal_that_is_none_is_begun_anew(long_students: Path, tmp_path: Path, content: bytes) -> None:
    """Torn by a power failure, or laid there by somebody: no traceback, no trust, no foreign file touched."""
    (tmp_path / ".t.safetensors.journal").write_bytes(content)
    quiet_fold(long_students, tmp_path / "t.safetensors", resume=True)
    assert unfinished(tmp_path) == []


def test_records_that_are_torn_do_not_count(long_students: Path, tmp_path: Path) -> None:
    """The end of a journal may hold anything after a power failure; what lies before it still counts."""
    whole = quiet_fold(long_students, tmp_path / "whole.safetensors").output.read_bytes()
    stop_fold(long_students, tmp_path / "t.safetensors")
    path = tmp_path / ".t.safetensors.journal"
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"\n") + 1 + 24 * 4 + 7])
    done = quiet_fold(long_students, tmp_path / "t.safetensors", resume=True)
    assert 0 < done.resumed_bytes < 0.4 * done.plan.bytes_to_read
    assert (tmp_path / "t.safetensors").read_bytes() == whole


def test_a_half_file_that_is_gone_or_cut_is_told(long_students: Path, tmp_path: Path, cli: Cli) -> None:
    """Somebody tidied up: an error that says how to begin anew, which then works."""
    for spoil in (Path.unlink, lambda path: os.truncate(path, 1000)):
        stop_fold(long_students, tmp_path / "t.safetensors")
        (half,) = tmp_path.glob(".t.safetensors.*.tmp")
        spoil(half)
        with pytest.raises(CkptEmaError, match=r"the unfinished `.*\.tmp` (is gone|has 1000 bytes)") as caught:
            quiet_fold(long_students, tmp_path / "t.safetensors", resume=True)
        assert "`--overwrite` without `--resume`" in str(caught.value.hint)
        outcome = cli("fold", long_students, "-o", "t.safetensors", "--resume")
        assert outcome.code == 1
        assert "the unfinished" in outcome.stderr
        assert "goes on from there" not in outcome.stderr
        quiet_fold(long_students, tmp_path / "t.safetensors", overwrite=True)
        assert unfinished(tmp_path) == []
        (tmp_path / "t.safetensors").unlink()


def stop_in_commit(run: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A fold that is stopped when all is written, before anything has its name."""

    def stop(*args: object, **kwargs: object) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_commit", stop)
        with pytest.raises(StoppedError):
            quiet_fold(run, output, resume=True, memory_budget_bytes=1 << 15, **options)


def test_an_older_teacher_with_the_same_header_is_not_taken_for_the_new_one(
    long_students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Students trained again under the same names and sizes; the half file of their teacher was tidied away."""
    old = quiet_fold(long_students, tmp_path / "t.safetensors").output.read_bytes()
    for path in long_students.iterdir():
        save_file({"w": torch.ones(40_000), "n": torch.tensor(1)}, path)
    stop_in_commit(long_students, tmp_path / "t.safetensors", monkeypatch, overwrite=True)
    (half,) = tmp_path.glob(".t.safetensors.*.tmp")
    half.unlink()
    with pytest.raises(CkptEmaError, match="is gone"):
        quiet_fold(long_students, tmp_path / "t.safetensors", overwrite=True, resume=True)
    assert (tmp_path / "t.safetensors").read_bytes() == old
    assert quiet_fold(long_students, tmp_path / "t.safetensors", overwrite=True).output.read_bytes() != old


@pytest.mark.parametrize("several", [False, True])
def test_a_checkpoint_that_came_to_the_output_of_a_stopped_commit_stays(
    long_students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    """`--overwrite` replaces teachers, and what lies there is none, however far the fold had come."""
    options: dict[str, Any] = {"overwrite": True, **({"momentum": [0.1, 0.2]} if several else {})}
    output = tmp_path / ("m{momentum}.safetensors" if several else "mine.safetensors")
    stop_in_commit(long_students, output, monkeypatch, **options)
    foreign = tmp_path / ("m0.2.safetensors" if several else "mine.safetensors")
    save_file({"w": torch.zeros(3)}, foreign)
    content = foreign.read_bytes()
    with pytest.raises(CkptEmaError, match="holds tensors that ckpt-ema did not write"):
        quiet_fold(long_students, output, resume=True, **options)
    assert foreign.read_bytes() == content
    foreign.unlink()
    quiet_fold(long_students, output, resume=True, **options)
    assert unfinished(tmp_path) == []


def test_the_command_says_how_to_go_on(tmp_path: Path, cli: Cli) -> None:
    """SIGTERM in the middle of a long fold: what is done, in words to be typed; then the rest, and what it saved."""
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2, 3):
        save_hollow(run / f"step_{step}.safetensors", {"w": ("F32", 1 << 28)})
    command = [sys.executable, "-m", "ckpt_ema", "fold", str(run), "--momentum", "0.4", "--resume"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal_file = run / ".teacher.safetensors.journal"
    deadline = time.monotonic() + 60
    while not journal_file.exists() or (journal.done_share([run / "teacher.safetensors"]) or 0) < 0.2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "% is done: the same command with `--resume` goes on from there" in stderr
    assert not (run / "teacher.safetensors").exists()
    done = cli(*command[3:])
    assert done.code == 0, done.stderr
    assert "more had been read when it was stopped before" in done.stderr
    assert unfinished(run) == []


def test_a_lock_that_the_file_system_does_not_know_is_done_without(
    long_students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems have none; the fold works all the same."""

    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    quiet_fold(long_students, tmp_path / "t.safetensors")
    assert unfinished(tmp_path) == []
