"""A bounded run of scripts/fuzz, and files kept because they once did harm or may: each is read or refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hostile import (
    TARGETS,
    TRIPWIRE,
    Finding,
    Mutator,
    clear,
    few_trials,
    make_seeds,
    read_input,
    warm_up,
    write_input,
)

CORPUS = sorted(path for path in Path(__file__).parent.joinpath("corpus").iterdir() if path.suffix != ".md")
NUM_RUNS = 600


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_are_read(tmp_path: Path, target: str) -> None:
    """A fuzzer whose seeds are refused tries nothing."""
    warm_up(target, tmp_path)
    for files in make_seeds(target):
        assert read_input(write_input(files, tmp_path), keep_tables=True)
        clear(tmp_path)


@pytest.mark.parametrize("target", TARGETS)
def test_spoiled_files_are_read_or_refused(tmp_path: Path, target: str) -> None:
    """No crash, no hang, nothing opened elsewhere, nothing imported, nothing run."""
    warm_up(target, tmp_path)
    mutator = Mutator(target, 0)
    with few_trials(100):
        for number in range(NUM_RUNS):
            read_input(write_input(mutator.make(), tmp_path), keep_tables=number % 8 == 0)


@pytest.mark.parametrize("path", CORPUS, ids=[path.name for path in CORPUS])
def test_a_kept_file_is_refused(path: Path) -> None:
    """Every file of the corpus, as its name says it is."""
    assert not read_input(path)


def test_the_tripwire_sees_what_no_reader_does(tmp_path: Path) -> None:
    """Without this, a fuzzer that finds nothing says nothing."""

    def outside() -> None:
        with TRIPWIRE.armed(tmp_path):
            os.close(os.open("/etc/hostname" if os.path.exists("/etc/hostname") else __file__, os.O_RDONLY))

    def process() -> None:
        with TRIPWIRE.armed(tmp_path):
            os.system("true")

    def code() -> None:
        with TRIPWIRE.armed(tmp_path):
            eval("1")

    for harm in (outside, process, code):
        TRIPWIRE.violations.clear()
        harm()
        assert TRIPWIRE.violations
    TRIPWIRE.violations.clear()
    assert issubclass(Finding, Exception)
