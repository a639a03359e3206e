"""The benchmark keeps what it measured, whatever fails or stops it, and reads no file for nothing."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/bench_fold.py as a module, with nothing failed yet."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "scripts")
    import bench_fold

    monkeypatch.setattr(bench_fold, "FAILURES", [])
    return bench_fold


def compare(bench: Any, monkeypatch: pytest.MonkeyPatch, bases: tuple[str, ...]) -> dict[str, list[dict[str, float]]]:
    """A comparison of three rounds in which `weak` does not survive the second."""
    calls: list[str] = []

    def run_candidate(case: Any, arguments: argparse.Namespace) -> dict[str, float]:
        calls.append(case.what)
        if case.what == "weak" and calls.count("weak") == 2:
            raise bench.CandidateError("exit code 1: RuntimeError: no more")
        return {"seconds": float(len(calls))}

    monkeypatch.setattr(bench, "run_candidate", run_candidate)
    cases = {name: bench.Case(name, Path("run")) for name in ("first", "weak", "last")}
    return bench.compare(cases, argparse.Namespace(rounds=2), bases)  # type: ignore[no-any-return]


def test_a_candidate_that_fails_is_left_out_of_all_rounds(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others go on; each measurement is told of as it comes, on stderr, for stdout has the tables."""
    found = compare(bench, monkeypatch, ("first",))
    assert found == {"first": [{"seconds": 4.0}, {"seconds": 7.0}], "last": [{"seconds": 6.0}, {"seconds": 8.0}]}
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "run, round 0 of 2: first took 1.000 s",
        "run, round 0 of 2: weak took 2.000 s",
        "run, round 0 of 2: last took 3.000 s",
        "run, round 1 of 2: first took 4.000 s",
        "run, round 1 of 2: weak failed and is left out, exit code 1: RuntimeError: no more",
        "run, round 1 of 2: last took 6.000 s",
        "run, round 2 of 2: first took 7.000 s",
        "run, round 2 of 2: last took 8.000 s",
    ]
    assert len(bench.FAILURES) == 1


def test_without_what_all_are_compared_with_a_section_fails(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: a table without its base says nothing."""
    with pytest.raises(bench.SectionError, match=r"^run, round 1 of 2: weak failed, .* RuntimeError: no more$"):
        compare(bench, monkeypatch, ("last", "weak"))


def test_the_error_of_a_candidate_is_the_last_of_its_process(bench: Any, tmp_path: Path) -> None:
    """Not the hint behind it."""
    (tmp_path / "step_1.safetensors").write_bytes(b"no checkpoint")
    arguments = argparse.Namespace(outputs=tmp_path / "outputs")
    with pytest.raises(bench.CandidateError, match=r"^exit code 1: \S+Error: .* is in no format known here: .*[^`]$"):
        bench.run_candidate(bench.Case("fold", tmp_path), arguments)


def call_main(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sections: dict[str, Any]) -> dict[str, Any]:
    """What main leaves in its JSON file, however it ends."""
    monkeypatch.setattr(bench, "SECTIONS", sections)
    words = ["--inputs", str(tmp_path), "--outputs", str(tmp_path), "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:
        bench.main()
    figures: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    return {"exit": getattr(caught.value, "code", None), **{name: figures[name] for name in sections}}


def test_a_section_that_fails_keeps_its_parts_and_the_others(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code says that something is missing, stderr what."""

    def failing(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
        yield "float32", 1.5
        raise bench.SectionError("run, round 1 of 2: dd failed, exit code 1")

    def fine(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
        yield "float32", 2.5
        yield "bfloat16", 3.5

    found = call_main(bench, monkeypatch, tmp_path, {"cold": failing, "fold": fine})
    assert found == {"exit": 1, "cold": {"float32": 1.5}, "fold": {"float32": 2.5, "bfloat16": 3.5}}
    assert "Error: section `cold`: run, round 1 of 2: dd failed, exit code 1" in capsys.readouterr().err


def test_stopped_it_has_written_every_part_that_was_finished(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An hour's figures of a section are not lost to its last dtype."""

    def stopped(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
        yield "float32", 1.5
        raise KeyboardInterrupt

    assert call_main(bench, monkeypatch, tmp_path, {"cuda": stopped})["cuda"] == {"float32": 1.5}


def test_only_checkpoints_of_an_earlier_call_are_read_to_warm_them(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was just written is in the page cache: to read gigabytes of it takes time for nothing."""
    read: list[str] = []
    monkeypatch.setattr(bench, "warm", lambda path: read.append(path.name))

    def write(checkpoints: int) -> list[str]:
        read.clear()
        arguments = argparse.Namespace(checkpoints=checkpoints)
        bench.write_run(tmp_path / "run", [(3, 5)], "float32", arguments, "safetensors")
        return sorted(read)

    assert write(2) == []
    assert write(2) == ["step_0.safetensors", "step_1.safetensors"]
    assert write(1) == []  # of other options, and so written anew


@pytest.mark.parametrize("dtypes", [["bfloat16"], ["float32", "bfloat16"]])
@pytest.mark.parametrize("section", ["fold", "cold", "cuda", "cuda-cold"])
def test_every_comparison_has_the_floors_the_fold_and_the_same_others(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, section: str, dtypes: list[str]
) -> None:
    """In each of the dtypes that were asked for; nothing is left out for a disk or a GPU."""
    compared: list[dict[str, Any]] = []

    def compare(cases: dict[str, Any], *_: object) -> dict[str, list[dict[str, float]]]:
        compared.append(cases)
        return {name: [{"seconds": 1.0, "peak": 2.0, "peak_before": 1.0}] for name in cases}

    (tmp_path / "step_0.safetensors").write_bytes(b"a student")
    monkeypatch.setattr(bench, "OTHERS", ("loop", "AveragedModel", "mergekit"))
    monkeypatch.setattr(bench, "write_run", lambda *_: tmp_path)
    monkeypatch.setattr(bench, "compare", compare)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    arguments = argparse.Namespace(dtypes=dtypes, inputs=tmp_path, elements=1.0, checkpoints=1, keep=True)
    assert [part for part, _ in bench.SECTIONS[section](arguments)] == dtypes
    for dtype, cases in zip(dtypes, compared, strict=True):
        whats = {"read", "floor", "fold", "loop", "AveragedModel", "mergekit"}
        whats |= {"pinned"} if "cuda" in section else set()
        whats |= {"dd"} if "cold" in section else set()
        whats |= {"fold without llvmlite"} if (section, dtype) == ("fold", "bfloat16") else set()
        assert {case.what for case in cases.values()} == whats
        for case in cases.values():
            assert case.is_cold == ("cold" in section and case.what != "pinned")
            if "cuda" in section and case.what in ("loop", "AveragedModel", "mergekit"):
                assert case.options == {"device": "cuda"}
