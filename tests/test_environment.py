"""What surrounds a fold and is none of its inputs: closed streams, folders that may not be listed, scarce limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ckpt_ema
from ckpt_ema.errors import CkptEmaError, MisuseError
from tests.conftest import Outcome, bound_by_modes, make_student, quiet_fold, save_students

Shell = Callable[..., Outcome]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A line of `sh` in which `ckpt_ema` is the command, in the test's folder; modes of files bind root as well."""

    def call(line: str) -> Outcome:
        line = f'ckpt_ema() {{ "{sys.executable}" -m ckpt_ema "$@"; }}\n{line}'
        done = subprocess.run(
            [*bound_by_modes(), "sh", "-c", line],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


NOISY_SCRIPT = """
import contextlib, os, sys
import ckpt_ema

def chatter(*_):
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"what some library has to say")

ckpt_ema.fold(sys.argv[1], sys.argv[2], momentum=0.5, progress=chatter, announce=chatter)
"""


def test_what_is_written_to_closed_streams_never_comes_into_a_teacher(run: Path, tmp_path: Path) -> None:
    """In a process without stdin, stdout and stderr no file of a fold takes their numbers, to which libraries write."""
    quiet_fold(run, tmp_path / "expected.safetensors", momentum=0.5)
    script = tmp_path / "script.py"
    script.write_text(NOISY_SCRIPT)
    closed = f"{sys.executable} {script} {run} {tmp_path / 'teacher.safetensors'} <&- >&- 2>&-"
    done = subprocess.run(["sh", "-c", closed], timeout=60, check=False)
    assert done.returncode == 0
    assert (tmp_path / "teacher.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_a_folder_that_may_not_be_listed_is_passed_over_aloud(run: Path, shell: Shell) -> None:
    """A disk's `lost+found` in the run directory stops no command, is named, and is no news once it is excluded."""
    closed = run / "lost+found"
    closed.mkdir(mode=0)
    told = shell("ckpt_ema plan run --momentum 0.5 && ckpt_ema fold run --momentum 0.5 -o t.safetensors")
    assert told.code == 0
    assert "left out  lost+found: a folder that may not be listed" in told.stdout
    assert told.stderr.count("Warning: `lost+found` is passed over") == 2
    silent = shell("ckpt_ema plan run --momentum 0.5 --exclude lost+found")
    assert (silent.code, silent.stderr) == (0, "")
    assert shell("ckpt_ema reconstruct run --plan --half-life 100").code == 0


def test_a_folder_above_the_checkpoints_that_may_not_be_listed_is_named(tmp_path: Path, shell: Shell) -> None:
    """Checkpoints are found beside and below folders that may not be listed, which are named where there are none."""
    save_students(tmp_path / "run" / "checkpoints", 2)
    (tmp_path / "run" / "secret").mkdir(mode=0)
    found = shell("ckpt_ema plan run --momentum 0.5")
    assert found.code == 0
    assert "Warning: `secret` is passed over" in found.stderr
    (tmp_path / "empty" / "secret").mkdir(parents=True)
    (tmp_path / "empty" / "secret").chmod(0)
    nothing = shell("ckpt_ema plan empty")
    assert nothing.code == 1
    assert "secret: a folder that may not be listed" in nothing.stderr


@pytest.mark.parametrize("folder", ["run/online", "run/online/old", "run/checkpoints/online/old"])
def test_a_folder_where_snapshots_may_lie_that_may_not_be_listed_is_named(
    tmp_path: Path, shell: Shell, folder: str
) -> None:
    """Wherever a reconstruction looks: once, by a name that `--exclude` takes."""
    save_students(tmp_path / "run" / "checkpoints", 2)
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder).chmod(0)
    found = shell("ckpt_ema reconstruct run --half-life 100 -o t.safetensors")
    assert found.code == 0
    [told] = [line for line in found.stderr.splitlines() if "passed over" in line]
    name = Path(folder).name
    assert told.startswith("Warning: `")
    assert told.endswith(f"{name}` is passed over: it is a folder that may not be listed")
    silent = shell(f"ckpt_ema reconstruct run --half-life 100 --plan --exclude {name}")
    assert (silent.code, "passed over" in silent.stderr) == (0, False)


@pytest.mark.parametrize("mode", [0o444, 0o311, 0])
def test_a_run_directory_that_may_not_be_listed_is_an_error(run: Path, shell: Shell, mode: int) -> None:
    """What was named itself and may not be looked into stops the command, with what to type."""
    run.chmod(mode)
    for command in ("plan run", "fold run", "follow run", "reconstruct run --half-life 9"):
        found = shell(f"ckpt_ema {command}")
        assert found.code == 1, (command, found.stderr)
        assert found.stderr.startswith("Error: `run` may not be listed\n\nhint: `chmod u+rx run`")


def test_a_teacher_goes_to_a_folder_that_may_be_written_to_but_not_listed(
    run: Path, tmp_path: Path, shell: Shell
) -> None:
    """Nothing but the teacher is left in it, and the next fold replaces that."""
    folder = tmp_path / "box"
    folder.mkdir()
    folder.chmod(0o333)
    command = "ckpt_ema fold run --momentum 0.5 -q -o box/t.safetensors"
    first, second = shell(command), shell(f"{command} --overwrite")
    assert (first.code, first.stderr) == (second.code, second.stderr) == (0, "")
    folder.chmod(0o755)
    assert [path.name for path in folder.iterdir()] == ["t.safetensors"]


@pytest.mark.parametrize("given", ["run", "run/step_400.safetensors run/step_500.safetensors -o t.safetensors"])
def test_a_newest_checkpoint_that_may_not_be_read_is_no_unfinished_one(run: Path, shell: Shell, given: str) -> None:
    """Permission is refused for good: an error that names the file and what to type, and no teacher without it."""
    (run / "step_500.safetensors").chmod(0)
    found = shell(f"ckpt_ema fold {given} --momentum 0.5")
    assert found.code == 1
    assert "Error: cannot open `run/step_500.safetensors`: Permission denied" in found.stderr
    assert "hint: `chmod u+r run/step_500.safetensors`" in found.stderr
    if given == "run":
        assert "`--exclude 'step_500.safetensors'`" in found.stderr
        assert shell("ckpt_ema fold run --momentum 0.5 -q --exclude step_500.safetensors").code == 0


def test_a_newest_folder_that_may_not_be_read_is_no_unfinished_one(tmp_path: Path, shell: Shell) -> None:
    """So it is with a checkpoint that is a folder."""
    for step in (100, 200):
        save_students(tmp_path / "run" / f"checkpoint-{step}", 1)
        (tmp_path / "run" / f"checkpoint-{step}" / "step_100.safetensors").rename(
            tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors"
        )
    (tmp_path / "run" / "checkpoint-200").chmod(0)
    found = shell("ckpt_ema fold run --momentum 0.5")
    assert found.code == 1
    assert "`run/checkpoint-200`: Permission denied" in found.stderr
    assert "`chmod u+rx run/checkpoint-200`" in found.stderr


@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&1 | true", "2>&-"])
def test_a_stderr_that_takes_nothing_changes_no_fold(run: Path, tmp_path: Path, shell: Shell, stderr: str) -> None:
    """Warnings and the summary are lost; the teacher, its path on stdout and exit code 0 are not."""
    done = shell(f"({{ sleep 1; ckpt_ema fold run -o t.safetensors >path; echo $? >code; }} {stderr})")
    assert done.stderr == ""
    assert (tmp_path / "code").read_text() == "0\n"
    assert (tmp_path / "path").read_text() == "t.safetensors\n"
    assert set(load_file(tmp_path / "t.safetensors")) == set(make_student(1))


def test_an_error_that_cannot_be_told_keeps_its_exit_code(run: Path, shell: Shell) -> None:
    """Misuse is 2 and failure 1, whatever becomes of the message."""
    assert shell("ckpt_ema fold run --momentum 7 2>/dev/full").code == 2
    assert shell("ckpt_ema fold --none 2>/dev/full").code == 2
    assert shell("mkdir empty; ckpt_ema fold empty 2>/dev/full").code == 1


def test_a_broken_stdout_behind_the_commit_is_told(run: Path, tmp_path: Path, shell: Shell) -> None:
    """The path has no reader any more: exit 1, and one line says that the teacher is written."""
    shell("({ sleep 1; ckpt_ema fold run --momentum 0.5 -q -o t.safetensors 2>told; echo $? >code; } | true)")
    assert (tmp_path / "code").read_text() == "1\n"
    told = (tmp_path / "told").read_text().splitlines()
    assert told == ["Error: cannot write to stdout: Broken pipe", "  `t.safetensors` is written all the same"]


@pytest.mark.parametrize("words", ["--help", "--version", "fold --help"])
def test_help_that_cannot_be_written_is_no_traceback(shell: Shell, words: str) -> None:
    """Exit 1 and one line, as for everything else on a full stdout."""
    done = shell(f"ckpt_ema {words} >/dev/full")
    assert (done.code, done.stderr) == (1, "Error: cannot write to stdout: No space left on device\n")


RECONSTRUCTING = """
import sys, torch
import ckpt_ema
torch.set_default_device("meta")
torch.set_default_dtype(torch.float16)
ckpt_ema.reconstruct(sys.argv[1], sys.argv[2], half_life=100.0, announce=lambda plan: None)
ckpt_ema.fold(sys.argv[1], sys.argv[3], momentum=0.5, device="cpu")
ckpt_ema.verify(sys.argv[3], sys.argv[1], share=1.0)
ckpt_ema.compare(sys.argv[2], sys.argv[3])
"""


def test_torch_defaults_decide_nothing(run: Path, tmp_path: Path) -> None:
    """Whatever device and dtype a program has made torch's default, all is computed on the CPU, to the same bytes."""
    paths = [tmp_path / name for name in ("r.safetensors", "f.safetensors")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RECONSTRUCTING, run, *paths],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ckpt_ema.reconstruct(run, tmp_path / "r2.safetensors", half_life=100.0, announce=lambda plan: None)
    quiet_fold(run, tmp_path / "f2.safetensors", momentum=0.5, device="cpu")
    assert paths[0].read_bytes() == (tmp_path / "r2.safetensors").read_bytes()
    assert paths[1].read_bytes() == (tmp_path / "f2.safetensors").read_bytes()


def test_memory_too_scarce_for_torch_is_one_line(run: Path, tmp_path: Path, shell: Shell) -> None:
    """Under a low `ulimit -v` torch cannot be loaded: exit 1, no traceback, and no journal stays."""
    done = shell("ulimit -v 200000; OMP_NUM_THREADS=1 ckpt_ema fold run --momentum 0.5 -o t.safetensors")
    assert done.code == 1
    assert done.stderr.startswith("Error: cannot load ")
    assert done.stderr.endswith("\n\nhint: raise `ulimit -v`, or install again\n")
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("kibibytes", range(350000, 700000, 50000))
def test_memory_that_ends_the_process_leaves_nothing_behind(
    run: Path, tmp_path: Path, shell: Shell, kibibytes: int
) -> None:
    """Where torch's libraries abort while they are loaded there is no journal yet, and no other hidden file."""
    command = "OMP_NUM_THREADS=1 ckpt_ema fold run --momentum 0.5 -q -o t.safetensors"
    done = shell(f"ulimit -c 0; ulimit -v {kibibytes}; {command}")
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == (["run", "t.safetensors"] if done.code == 0 else ["run"])
    if done.code:
        assert shell(command).code == 0


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        ("bytes(1 << 60)", "out of memory\n\nhint: raise `ulimit -v`, or pass a smaller `--memory`"),
        (
            "raise RuntimeError('std::bad_alloc')",
            "out of memory\n\nhint: raise `ulimit -v`, or pass a smaller `--memory`",
        ),
        (
            "torch.empty(1 << 60, dtype=torch.uint8)",
            "out of memory\n\nhint: raise `ulimit -v`, or pass a smaller `--memory`",
        ),
        (
            "import half",
            "cannot load a library: error return without exception set\n\nhint: raise `ulimit -v`, or install again",
        ),
    ],
)
def test_memory_that_runs_out_is_one_line(tmp_path: Path, failure: str, told: str) -> None:
    """So is what is refused later, in the words of Python, C++ or torch; `--memory` is named where the command has it.

    A module of which the half was loaded is a SystemError.
    """
    (tmp_path / "half.py").write_text("raise SystemError('error return without exception set')")
    body = (
        "import torch\nfrom ckpt_ema.cli.exits import ends_in_order\n@ends_in_order\n"
        f"def f(memory_budget_bytes): {failure}\nf(memory_budget_bytes=1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", body], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (1, f"Error: {told}\n")


@pytest.mark.parametrize("kind", ["RuntimeError", "SystemError"])
def test_a_mistake_of_the_program_keeps_its_traceback(kind: str) -> None:
    """One of another kind is not said to be a want of memory, nor a library that cannot be loaded."""
    body = f"from ckpt_ema.cli.exits import ends_in_order\n@ends_in_order\ndef f(): raise {kind}('a mistake')\nf()"
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith(f"{kind}: a mistake\n")


CALLS = {
    "fold": ckpt_ema.fold,
    "fold a list": lambda given: ckpt_ema.fold([given]),
    "inspect": ckpt_ema.inspect,
    "compare": lambda given: ckpt_ema.compare(given, given),
    "verify": ckpt_ema.verify,
    "follow": ckpt_ema.follow,
    "save": lambda given: ckpt_ema.MeanTeacher(torch.nn.Linear(2, 2)).save(given),
    "save_snapshot": lambda given: ckpt_ema.MeanTeacher(torch.nn.Linear(2, 2)).save_snapshot(given, 1),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_path_is_misuse(call: str) -> None:
    """None, a number and bytes are named as what they are; a name that no file can have is too long."""
    for given in (None, 7, b"run"):
        with pytest.raises(MisuseError, match=rf"is of type {type(given).__name__}, and no path"):
            CALLS[call](given)
    with pytest.raises(MisuseError, match=r"^`aaa.*\.\.\.`: File name too long\n\nhint: pass a shorter path"):
        CALLS[call]("a" * 300 + ".safetensors")


def test_an_output_that_is_no_path_is_misuse(run: Path, tmp_path: Path) -> None:
    """As an input is; of a name that leaves no room for the hidden one, how long it may be is said."""
    with pytest.raises(MisuseError, match="7 is of type int, and no path"):
        quiet_fold(run, 7)
    with pytest.raises(MisuseError, match="File name too long"):
        quiet_fold(run, tmp_path / f"{'a' * 300}.safetensors")
    with pytest.raises(CkptEmaError, match="has a name of 252 bytes, and may have"):
        quiet_fold(run, tmp_path / f"{'a' * 240}.safetensors", momentum=0.5)


def test_a_current_folder_that_was_removed_is_told(run: Path, shell: Shell) -> None:
    """Relative paths lead nowhere then; whole ones are served."""
    gone = "mkdir gone; cd gone; rmdir ../gone; ckpt_ema"
    done = shell(f"{gone} fold {run} --momentum 0.5 -o t.safetensors")
    assert done.code == 1
    assert done.stderr.startswith(
        "Error: `t.safetensors` is a relative path, and the current folder was removed\n\nhint:"
    )
    assert shell(f"{gone} plan {run} --momentum 0.5").code == 0


@pytest.mark.parametrize(
    "command",
    [
        "fold {run} --momentum 0.5 -q",
        "reconstruct {run} --half-life 100 -q",
        "follow {run} --momentum 0.5 --idle 2s -q",
        "verify {teacher} {run} --share 1",
        "compare {teacher} {run}/step_100.safetensors",
    ],
)
def test_whole_paths_are_served_where_the_current_folder_was_removed(
    run: Path, tmp_path: Path, shell: Shell, command: str
) -> None:
    """By every command; torch's libraries would end the process without a word of it."""
    teacher = tmp_path / "t.safetensors"
    quiet_fold(run, teacher, momentum=0.5)
    words = command.format(run=run, teacher=teacher)
    done = shell(f"mkdir gone; cd gone; rmdir ../gone; ckpt_ema {words}")
    assert (done.code, "MKL" in done.stderr) == (0, False), done.stderr


def test_a_relative_path_never_leads_elsewhere(run: Path, tmp_path: Path, shell: Shell) -> None:
    """`tmp` in a folder that was removed is not `/tmp`, for any option that takes a path."""
    gone = "mkdir gone; cd gone; rmdir ../gone; ckpt_ema"
    for words in (
        "fold tmp",
        f"fold {run} -o tmp/t.safetensors",
        f"fold {run} --init tmp",
        "follow tmp",
        "compare tmp tmp",
        "fold ../run",  # the one above is known to a folder that was removed, too
        "plan .",
        "inspect ../run/step_100.safetensors",
    ):
        done = shell(f"{gone} {words}")
        assert done.code == 1, words
        assert "is a relative path, and the current folder was removed" in done.stderr


def test_coefficients_are_not_read_for_ever(run: Path, tmp_path: Path, shell: Shell) -> None:
    """A device that never ends is refused; a pipe is read, by its name or in the place of a command."""
    endless = shell("ckpt_ema plan run --coefficients /dev/zero")
    assert (endless.code, endless.stderr[:28]) == (2, "Error: `/dev/zero` has more ")
    table = '{"step_400.safetensors": 0.5, "step_500.safetensors": 0.5}'
    assert shell(f"echo '{table}' | ckpt_ema plan run --coefficients /dev/stdin").code == 0
    substituted = f"{sys.executable} -m ckpt_ema plan run --coefficients <(sleep 1; echo '{table}')"
    done = subprocess.run(["bash", "-c", substituted], cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pipe_that_nobody_writes_to_is_waited_for_until_a_signal(run: Path, tmp_path: Path, number: int) -> None:
    """Whoever writes to it may be late; Ctrl-C ends that with one line and the code of the signal."""
    os.mkfifo(tmp_path / "pipe")

    def heed() -> None:
        signal.signal(number, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-m", "ckpt_ema", "plan", "run", "--coefficients", "pipe"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,  # noqa: PLW1509  (no other thread is in the middle of anything)
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(4)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stdout) == (128 + number, "")
    assert stderr == "Stopped; no unfinished teacher was written\n"


@pytest.mark.parametrize(("limit", "code"), [(64, 0), (32, 0), (28, 1), (20, 1)])
def test_few_files_that_may_be_open_suffice_or_are_told(run: Path, shell: Shell, limit: int, code: int) -> None:
    """Five checkpoints fold under a low `ulimit -n`; where they cannot, the hint says what would do."""
    done = shell(f"ulimit -n {limit}; ckpt_ema fold run --momentum 0.5 -q -o t.safetensors")
    assert done.code == code, done.stderr
    assert code == 0 or "raise the limit to 30 (`ulimit -Hn`" in done.stderr
    assert ("--last N" in done.stderr) == (limit == 28)


def test_a_teacher_is_overwritten_as_it_was_named_and_may_be_read(run: Path, tmp_path: Path) -> None:
    """A link stays one, its target is replaced; the new teacher has the mode and the group of the old one."""
    real, link = tmp_path / "disk" / "t.safetensors", tmp_path / "t.safetensors"
    real.parent.mkdir()
    quiet_fold(run, real, momentum=0.5)
    link.symlink_to(real)
    real.chmod(0o640)
    group = 4 if os.geteuid() == 0 else real.stat().st_gid
    os.chown(real, -1, group)
    student = torch.nn.Linear(2, 2)
    for write in (
        lambda: quiet_fold(run, link, momentum=0.25, overwrite=True),
        lambda: ckpt_ema.MeanTeacher(student).save(link),
    ):
        before = real.read_bytes()
        write()
        assert link.is_symlink()
        assert real.read_bytes() != before
        assert (real.stat().st_mode & 0o777, real.stat().st_gid) == (0o640, group)


def test_a_link_at_the_default_output_stays_and_two_to_one_file_are_misuse(run: Path, tmp_path: Path) -> None:
    """As a link that was named; two teachers do not fit into one file. A link to no teacher's file is replaced."""
    real, link = tmp_path / "real.safetensors", run / "teacher.safetensors"
    quiet_fold(run, real, momentum=0.5)
    link.symlink_to(real)
    before = real.read_bytes()
    quiet_fold(run, None, momentum=0.25, overwrite=True)
    assert link.is_symlink()
    assert real.read_bytes() != before
    for momentum in (0.1, 0.3):
        (tmp_path / f"k-{momentum}.safetensors").symlink_to(real)
    with pytest.raises(MisuseError, match="lead to one file"):
        quiet_fold(run, tmp_path / "k-{momentum}.safetensors", momentum=[0.1, 0.3], overwrite=True)
    (tmp_path / "cache.bin").write_bytes(b"broken")
    other = tmp_path / "other.safetensors"
    other.symlink_to(tmp_path / "cache.bin")
    quiet_fold(run, other, momentum=0.5, overwrite=True)
    assert not other.is_symlink()
    assert (tmp_path / "cache.bin").read_bytes() == b"broken"


def test_a_pipe_at_the_default_output_is_never_replaced(run: Path) -> None:
    """As one that was named."""
    os.mkfifo(run / "teacher.safetensors")
    with pytest.raises(MisuseError, match="is a device or a pipe"):
        quiet_fold(run, None, momentum=0.5, overwrite=True)


def test_what_may_not_be_read_is_not_replaced(run: Path, tmp_path: Path, shell: Shell) -> None:
    """It may be a checkpoint; of a file that cannot be read for its contents the new teacher can be."""
    target = tmp_path / "t.safetensors"
    target.write_bytes(b"somebody's")
    target.chmod(0)
    refused = shell("ckpt_ema fold run --momentum 0.5 --overwrite -o t.safetensors")
    assert refused.code == 1
    assert "cannot open `t.safetensors`: Permission denied" in refused.stderr
    target.chmod(0o040)
    quiet_fold(run, target, momentum=0.5, overwrite=True)  # by whom it may be read
    assert target.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("names", ["ckpt-{}", "{}"])
def test_a_checkpoint_that_may_not_be_listed_is_an_error(tmp_path: Path, shell: Shell, names: str) -> None:
    """No teacher is made without it, whatever its folder is called."""
    for step in (100, 200, 300):
        save_students(tmp_path / "run" / names.format(step), 1)
        (tmp_path / "run" / names.format(step) / "step_100.safetensors").rename(
            tmp_path / "run" / names.format(step) / "model.safetensors"
        )
    (tmp_path / "run" / names.format(200)).chmod(0)
    found = shell("ckpt_ema fold run --momentum 0.5")
    assert found.code == 1
    assert "Permission denied" in found.stderr
    assert not (tmp_path / "run" / "teacher.safetensors").exists()


@pytest.mark.parametrize("output", ["pipe.safetensors", "null.safetensors", "/dev/null"])
def test_a_pipe_or_a_device_is_never_replaced(run: Path, tmp_path: Path, shell: Shell, output: str) -> None:
    """Whatever its name: exit 2, and what shows a fold without writing is named."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "null.safetensors").symlink_to("/dev/null")
    done = shell(f"ckpt_ema fold run --momentum 0.5 --overwrite -o {output}")
    assert done.code == 2
    assert "is a device or a pipe, and is never replaced" in done.stderr
    assert "`ckpt-ema plan`" in done.stderr
    assert (tmp_path / "pipe.safetensors").is_fifo()


@pytest.mark.parametrize(
    ("pattern", "typed"),
    [
        ("run/step_*", "run/step_*"),
        ("run/step_[1-3]00.safe?ensors", "run/step_[1-3]00.safe?ensors"),
        ("my run/**/step_*", "'my run/'**/step_*"),
    ],
)
def test_a_pattern_in_quotes_is_hinted_at(run: Path, tmp_path: Path, shell: Shell, pattern: str, typed: str) -> None:
    """What the hint says, typed in a shell, folds what the pattern matches; where it matches nothing there is none."""
    save_students(tmp_path / "my run" / "1", 2)
    refused = shell(f"ckpt_ema fold '{pattern}' --momentum 0.5 -o t.safetensors")
    assert refused.code == 2
    assert refused.stderr.startswith(f"Error: `{pattern}` does not exist\n\nhint: without its quotes: `{typed}`")
    assert shell(f"ckpt_ema fold {typed} --momentum 0.5 -q -o t.safetensors").code == 0
    nothing = shell("ckpt_ema plan 'run/epoch_*'")
    assert (nothing.code, "hint: pass a run directory, or checkpoints\n" in nothing.stderr) == (2, True)
