"""What surrounds a fold and is none of its inputs: closed streams, folders that may not be listed, scarce limits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import quiet_fold

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
