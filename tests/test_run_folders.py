"""Which folder is the run, which the checkpoint, and what must not be written where a trainer looks."""

from __future__ import annotations

import glob
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckpt_ema
from tests.conftest import assert_same_bits
from tests.test_layouts import STUDENTS, assert_folds_to, make_average, names_of, plan, refusal_of, steps_of


def write_trainer_run(run: Path) -> None:
    """As transformers.Trainer leaves it: numbered checkpoints, and the final model beside them."""
    for step, student in zip((500, 1000, 1500, 2000), STUDENTS, strict=True):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        save_file(student, run / f"checkpoint-{step}" / "model.safetensors")
        (run / f"checkpoint-{step}" / "config.json").write_text("{}")
    save_file(STUDENTS[3], run / "model.safetensors")
    (run / "config.json").write_text("{}")


def test_a_sweep_of_runs_with_final_models_is_no_run(tmp_path: Path) -> None:
    """`seed_1/` with a final model beside its checkpoints is a run; nothing is folded across seeds."""
    for seed in (1, 2):
        write_trainer_run(tmp_path / f"seed_{seed}")
    error = refusal_of(tmp_path)
    assert f"`{tmp_path}` holds 2 folders with checkpoints" in error.message
    assert error.details == ("seed_1", "seed_2")


def test_a_run_whose_name_has_a_number_is_found_below(tmp_path: Path) -> None:
    """`run_2024/` with a final model in it is the run, and no checkpoint of step 2024."""
    write_trainer_run(tmp_path / "outputs" / "run_2024")
    planned = assert_folds_to(tmp_path / "outputs", tmp_path, STUDENTS)
    assert steps_of(planned) == [500, 1000, 1500, 2000]


def test_a_checkpoint_that_carries_its_teacher_is_one_checkpoint(tmp_path: Path) -> None:
    """`checkpoint-500/teacher/`, which the callback writes, makes no run of `checkpoint-500/`."""
    run = tmp_path / "run"
    write_trainer_run(run)
    for step in (500, 1000):
        (run / f"checkpoint-{step}" / "teacher").mkdir()
        save_file(make_average(step), run / f"checkpoint-{step}" / "teacher" / "model.safetensors")
    planned = plan(run / "checkpoint-500")
    assert names_of(planned) == ["checkpoint-500"]
    ckpt_ema.fold(run / "checkpoint-500", tmp_path / "out.safetensors", announce=lambda planned: None)
    assert_same_bits(load_file(tmp_path / "out.safetensors"), STUDENTS[0])
    assert steps_of(assert_folds_to(run, tmp_path, STUDENTS)) == [500, 1000, 1500, 2000]


def test_a_run_over_two_folders_is_folded_by_the_hint(tmp_path: Path) -> None:
    """Lightning's `version_1` goes on where `version_0` was stopped: what the hint types is one run in step order."""
    for version, steps in ((0, (500, 1000)), (1, (1500, 2000))):
        folder = tmp_path / "logs" / f"version_{version}" / "checkpoints"
        folder.mkdir(parents=True)
        for step in steps:
            torch.save({"state_dict": STUDENTS[step // 500 - 1], "global_step": step}, folder / f"step={step}.ckpt")
        torch.save({"state_dict": STUDENTS[step // 500 - 1], "global_step": step}, folder / "last.ckpt")
    hint = refusal_of(tmp_path / "logs").hint
    assert hint is not None
    typed = hint.rpartition(": ")[2].strip("`")
    listed = [Path(path) for pattern in shlex.split(typed) for path in sorted(glob.glob(pattern))]
    planned = assert_folds_to(listed, tmp_path, STUDENTS)
    assert steps_of(planned) == [500, 1000, 1500, 2000]
    assert any(
        "as a shell sorts what a pattern matches; it is folded in step order" in text for text in planned.warnings
    )


def test_runs_that_overlap_are_not_hinted_at_as_one(tmp_path: Path) -> None:
    """A step that is in both was trained twice: which of them counts nobody knows."""
    for version, steps in ((0, (500, 1000)), (1, (1000, 1500))):
        (tmp_path / f"version_{version}").mkdir()
        for step in steps:
            torch.save(STUDENTS[0], tmp_path / f"version_{version}" / f"step={step}.ckpt")
    assert refusal_of(tmp_path).hint == f"pass one of them: `{tmp_path / 'version_0'}`"


@pytest.mark.parametrize(("name", "inside"), [("ckpt-{}", "global_step{}"), ("{}", "step_{}"), ("save-{}", "iter_{}")])
def test_a_checkpoint_with_a_part_of_its_own_number_is_no_run(tmp_path: Path, name: str, inside: str) -> None:
    """DeepSpeed's `global_step100/` in `ckpt-100/`, whatever the latter is called."""
    run = tmp_path / "run"
    for step, student in zip((100, 200, 300, 400), STUDENTS, strict=True):
        folder = run / name.format(step)
        (folder / inside.format(step)).mkdir(parents=True)
        save_file(student, folder / "model.safetensors")
        save_file(student, folder / inside.format(step) / "model.safetensors")
    assert steps_of(assert_folds_to(run, tmp_path, STUDENTS)) == [100, 200, 300, 400]
    assert steps_of(assert_folds_to(sorted(run.iterdir()), tmp_path, STUDENTS)) == [100, 200, 300, 400]


def test_a_final_model_with_a_teacher_beside_it_is_still_a_run(tmp_path: Path) -> None:
    """What the trainer has removed was folded; the final model is none of the series, also while it is followed."""
    run = tmp_path / "run"
    write_trainer_run(run)
    ckpt_ema.fold(run, momentum=0.5)
    assert (run / "teacher").is_dir()
    for step in (500, 1000, 1500, 2000):
        shutil.rmtree(run / f"checkpoint-{step}")
    assert refusal_of(run).message == f"no checkpoint of `{run}` is left to fold"
    assert not (tmp_path / "teacher").exists()


def test_what_is_followed_is_never_one_checkpoint(tmp_path: Path) -> None:
    """A final model that appears in the run directory is not folded a second time."""
    run = tmp_path / "run"
    for step, student in zip((100, 200), STUDENTS, strict=False):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        save_file(student, run / f"checkpoint-{step}" / "model.safetensors")
        (run / f"checkpoint-{step}" / "config.json").write_text("{}")
    options: dict[str, Any] = {"momentum": 0.5, "poll_seconds": 0.01, "idle_seconds": 0.5}
    first = ckpt_ema.follow(run, **options)
    before = load_file(first.output / "model.safetensors")
    for step in (100, 200):
        shutil.rmtree(run / f"checkpoint-{step}")
    save_file(STUDENTS[1], run / "model.safetensors")
    (run / "config.json").write_text("{}")
    again = ckpt_ema.follow(run, **options)
    assert again.num_folded == 0
    assert_same_bits(load_file(again.output / "model.safetensors"), before)
