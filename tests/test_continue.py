"""Going on from a teacher: only what is newer is folded, and the result is the fold of all at once."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckpt_ema
from ckpt_ema.errors import CkptEmaError, MisuseError, NoCheckpointError
from tests.conftest import Outcome, assert_same_bits, hook_teacher, make_student, quiet_fold, save_students

Cli = Callable[..., Outcome]
BUFFERS = ("bn.running_mean",)


def record_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        record: dict[str, Any] = json.loads(file.metadata()["ckpt_ema"])
    return record


def test_only_what_is_newer_is_folded_by_the_teachers_own_rule(tmp_path: Path, cli: Cli) -> None:
    """`fold RUN --init TEACHER`, nothing else: the newer checkpoints by the momentum that made it, bit for bit."""
    run = tmp_path / "run"
    save_students(run, 3)
    assert cli("fold", run, "--momentum", 0.25, "-o", "t.safetensors").code == 0
    students = save_students(run, 6)
    done = cli("fold", run, "--init", "t.safetensors", "-o", "t.safetensors", "--overwrite", "--json")
    assert done.code == 0, done.stderr
    assert [item["name"] for item in json.loads(done.stdout)["checkpoints"]] == [
        f"step_{step}.safetensors" for step in (400, 500, 600)
    ]
    assert_same_bits(load_file(tmp_path / "t.safetensors"), hook_teacher(students, 0.25, BUFFERS))
    shown = cli("plan", run, "--init", "t.safetensors", "-o", "u.safetensors")
    assert shown.code == 1
    assert "nothing is newer than `t.safetensors`: it has every checkpoint, up to step 600" in shown.stderr


def test_what_is_newer_and_was_left_out_is_not_taken_for_part_of_the_teacher(tmp_path: Path, cli: Cli) -> None:
    """`--until`, `--include` and `--exclude` may leave nothing newer: that is said, and without them it folds."""
    run = tmp_path / "run"
    save_students(run, 3)
    quiet_fold(run, tmp_path / "t.safetensors", momentum=0.25)
    save_students(run, 6)
    words = ["plan", run, "--init", "t.safetensors", "-o", "u.safetensors"]
    shown = cli(*words, "--from", 100, "--until", 200)
    assert shown.code == 1
    assert "nothing up to step 200 is newer than `t.safetensors`, which is of step 300" in shown.stderr
    assert "step_600.safetensors: after step 200" in shown.stderr
    assert "hint: pass `--until 400`, or omit it" in shown.stderr
    assert cli(*words, "--from", 100, "--until", 400).code == 0
    for by_name in (["--exclude", "*[456]00*"], ["--include", "*[123]00*"]):
        shown = cli(*words, *by_name)
        assert shown.code == 1
        assert "nothing that is selected is newer than `t.safetensors`, which is of step 300" in shown.stderr
        assert "step_400.safetensors: not selected by name" in shown.stderr
        assert f"hint: omit `{by_name[0]}`" in shown.stderr
    assert cli(*words).code == 0


@pytest.mark.parametrize("cuts", [(1, 7), (3, 4, 7), tuple(range(1, 8))])
@pytest.mark.parametrize("options", [{}, {"interval": 2}, {"per": "step", "between": "hold"}, {"half_life": 150.0}])
def test_a_fold_in_parts_has_the_record_of_one_at_once(
    tmp_path: Path, cuts: tuple[int, ...], options: dict[str, Any]
) -> None:
    """However it is cut: the same tensors, and a record with the same checkpoints and shares."""
    run, output = tmp_path / "run", tmp_path / "t.safetensors"
    for count in cuts:
        save_students(run, count)
        if not output.exists():
            quiet_fold(run, output, **({} if "half_life" in options else {"momentum": 0.02}), **options)
        else:
            # Where every second one counts, one more may be none.
            with contextlib.suppress(MisuseError if "interval" in options else ()):
                quiet_fold(run, output, init=output, overwrite=True)
    at_once = quiet_fold(
        run, tmp_path / "all.safetensors", **({} if "half_life" in options else {"momentum": 0.02}), **options
    )
    mine, whole = record_of(output), record_of(at_once.output)
    for one, other in itertools.zip_longest(mine.pop("checkpoints"), whole.pop("checkpoints")):
        assert one.pop("coefficient") == pytest.approx(other.pop("coefficient"), rel=1e-9)
        assert one == other
    assert mine.pop("first_share") == pytest.approx(whole.pop("first_share"))
    exact = "half_life" not in options  # straight lines cross the cut: the same sum, in another order
    assert mine.pop("parts", 1) == (1 if exact else len(cuts))
    assert mine == whole
    for name, tensor in load_file(at_once.output).items():
        ours = load_file(output)[name]
        assert torch.equal(ours, tensor) if exact else torch.allclose(ours, tensor, rtol=1e-5, atol=1e-6), name


def test_the_line_from_the_last_student_is_drawn_where_it_is_still_there(tmp_path: Path) -> None:
    """Per step in straight lines, the teacher's newest student enters once more; without it the next one is held."""
    run = tmp_path / "run"
    save_students(run, 2)
    quiet_fold(run, tmp_path / "t.safetensors", half_life=100)
    save_students(run, 3)
    planned = ckpt_ema.plan(run, tmp_path / "u.safetensors", init=tmp_path / "t.safetensors")
    assert [item.step for item in planned.checkpoints] == [200, 300]
    for step in (100, 200):
        (run / f"step_{step}.safetensors").unlink()
    planned = ckpt_ema.plan(run, tmp_path / "u.safetensors", init=tmp_path / "t.safetensors")
    assert [item.step for item in planned.checkpoints] == [300]
    assert planned.first_share == pytest.approx(0.5)


def test_rotated_checkpoints_are_not_missed(tmp_path: Path) -> None:
    """The trainer removed what was folded: the rest goes on, though none of the teacher's checkpoints is there."""
    run = tmp_path / "run"
    students = save_students(run, 5)
    for step in (400, 500):
        (run / f"step_{step}.safetensors").rename(tmp_path / f"step_{step}.safetensors")
    quiet_fold(run, tmp_path / "t.safetensors", momentum=0.1)
    for path in run.iterdir():
        path.unlink()
    for step in (400, 500):
        (tmp_path / f"step_{step}.safetensors").rename(run / f"step_{step}.safetensors")
    quiet_fold(run, tmp_path / "u.safetensors", init=tmp_path / "t.safetensors")
    assert_same_bits(load_file(tmp_path / "u.safetensors"), hook_teacher(students, 0.1, BUFFERS))


def test_a_kept_best_checkpoint_is_not_folded_late(tmp_path: Path) -> None:
    """What the teacher passed over and is older than its newest is left out, with the reason."""
    run = tmp_path / "run"
    save_students(run, 4)
    quiet_fold(run, tmp_path / "t.safetensors", momentum=0.1, exclude=["step_200*"], until_step=300)
    planned = ckpt_ema.plan(run, tmp_path / "u.safetensors", init=tmp_path / "t.safetensors")
    assert [item.step for item in planned.checkpoints] == [400]
    assert ("step_200.safetensors", "older than `t.safetensors`") in planned.left_out


def test_a_teacher_of_another_run_starts_this_one(tmp_path: Path) -> None:
    """A second stage counts its steps from 0 again: all of it is folded, and that is said."""
    save_students(tmp_path / "one", 5)
    quiet_fold(tmp_path / "one", tmp_path / "t.safetensors", momentum=0.1)
    second = tmp_path / "two"
    second.mkdir()
    for step in (1, 2, 3):
        save_file(make_student(step + 50), second / f"step_{step}.safetensors")
    planned = ckpt_ema.plan(second, tmp_path / "u.safetensors", init=tmp_path / "t.safetensors", momentum=0.1)
    assert [item.step for item in planned.checkpoints] == [1, 2, 3]
    assert any("it is of another run" in text for text in planned.warnings)


def test_where_no_update_falls_nothing_is_folded_yet(tmp_path: Path, cli: Cli) -> None:
    """With an interval beyond the gap between checkpoints: said, and later folded."""
    run = tmp_path / "run"
    options = {"momentum": 0.1, "per": "step", "interval": 250, "between": "hold"}
    save_students(run, 2)
    quiet_fold(run, tmp_path / "t.safetensors", **options)
    save_students(run, 3)
    shown = cli("fold", run, "--init", "t.safetensors", "-o", "u.safetensors")
    assert shown.code == 1
    assert "no update falls on what is newer than `t.safetensors`" in shown.stderr
    save_students(run, 5)
    on = quiet_fold(run, tmp_path / "u.safetensors", init=tmp_path / "t.safetensors")
    whole = quiet_fold(run, tmp_path / "whole.safetensors", **options)
    assert_same_bits(load_file(on.output), load_file(whole.output))


def test_what_was_asked_for_goes_on(tmp_path: Path) -> None:
    """Tensors that are buffers by `--buffer` stay buffers, and what was folded in float64 is."""
    run = tmp_path / "run"
    options = {"momentum": 0.3, "buffers": ["fc.[bw]*"], "accumulate": "float64"}
    save_students(run, 2)
    quiet_fold(run, tmp_path / "t.safetensors", **options)
    save_students(run, 4)
    on = quiet_fold(run, tmp_path / "u.safetensors", init=tmp_path / "t.safetensors")
    whole = quiet_fold(run, tmp_path / "whole.safetensors", **options)
    assert record_of(on.output)["copied"] == record_of(whole.output)["copied"]
    assert record_of(on.output)["dtypes"] == record_of(whole.output)["dtypes"]
    assert torch.equal(load_file(on.output)["fc.weight"], load_file(whole.output)["fc.weight"])


def test_checkpoints_that_were_written_again_are_told(tmp_path: Path) -> None:
    """By their size; and no straight line begins at another student than was folded."""
    run = tmp_path / "run"
    save_students(run, 2)
    quiet_fold(run, tmp_path / "t.safetensors", half_life=100)
    save_file(
        {name: tensor * 1000 for name, tensor in make_student(2).items()},
        run / "step_200.safetensors",
        {"a": "b" * 9999},
    )
    shutil.copy(run / "step_100.safetensors", run / "step_300.safetensors")
    planned = ckpt_ema.plan(run, tmp_path / "u.safetensors", init=tmp_path / "t.safetensors")
    assert [item.step for item in planned.checkpoints] == [300]
    assert any("were written again since: `step_200.safetensors` has" in text for text in planned.warnings)


def test_checkpoints_listed_out_of_order_are_folded_once(tmp_path: Path) -> None:
    """What is in the teacher is not newer than it, whatever its step."""
    run = tmp_path / "run"
    save_students(run, 4)
    paths = [run / f"step_{step}.safetensors" for step in (300, 100, 200)]
    quiet_fold(paths, tmp_path / "t.safetensors", momentum=0.3)
    planned = ckpt_ema.plan(run, tmp_path / "u.safetensors", init=tmp_path / "t.safetensors")
    assert [item.step for item in planned.checkpoints] == [400]


def test_an_average_of_another_kind_is_told(tmp_path: Path) -> None:
    """A uniform mean goes on as a moving average: with a warning, and as an initial teacher of its own name."""
    run = tmp_path / "run"
    save_students(run, 2)
    quiet_fold(run, tmp_path / "t.safetensors", profile="uniform")
    save_students(run, 3)
    on = quiet_fold(run, tmp_path / "u.safetensors", init=tmp_path / "t.safetensors")
    assert any(
        "is of profile uniform, and continues as an exponential moving average" in text for text in on.plan.warnings
    )
    assert record_of(on.output)["initial_teacher"] == "t.safetensors"
    with pytest.raises(CkptEmaError, match="is of profile uniform"):
        ckpt_ema.follow(run, tmp_path / "t.safetensors", idle_seconds=0.1, poll_seconds=0.01)


def test_a_teacher_that_is_wider_than_its_students_goes_on_as_wide(tmp_path: Path) -> None:
    """A float32 teacher of bfloat16 students stays one, and is the fold of all at once, bit for bit."""
    run = tmp_path / "run"
    run.mkdir()
    for step in range(1, 6):
        student = {name: tensor.bfloat16() for name, tensor in make_student(step).items() if tensor.is_floating_point()}
        save_file(student, run / f"step_{step}.safetensors")
    quiet_fold(run, tmp_path / "part.safetensors", momentum=0.3, until_step=3, dtype="float32")
    done = quiet_fold(run, tmp_path / "on.safetensors", init=tmp_path / "part.safetensors")
    quiet_fold(run, tmp_path / "all.safetensors", momentum=0.3, dtype="float32")
    assert any("in float32" in note for note in done.plan.notes)
    assert_same_bits(load_file(tmp_path / "on.safetensors"), load_file(tmp_path / "all.safetensors"))


def test_what_was_rounded_is_said(tmp_path: Path) -> None:
    """A bfloat16 teacher has lost digits that a fold of all at once has; a float32 one has not, and equals it."""
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2, 3, 4):
        save_file(
            {"w": torch.randn(500, generator=torch.Generator().manual_seed(step)).bfloat16()},
            run / f"step_{step}.safetensors",
        )
    for dtype in ("student", "float32"):
        quiet_fold(run, tmp_path / f"{dtype}.safetensors", momentum=0.3, until_step=2, dtype=dtype)
        options = {"init": tmp_path / f"{dtype}.safetensors", "dtype": dtype}
        done = quiet_fold(run, tmp_path / f"{dtype}-on.safetensors", **options)
        at_once = quiet_fold(run, tmp_path / f"{dtype}-all.safetensors", momentum=0.3, dtype=dtype)
        told = [text for text in done.plan.warnings if "was rounded to bfloat16" in text]
        assert len(told) == (dtype == "student")
        if dtype == "float32":
            assert_same_bits(load_file(done.output), load_file(at_once.output))


def test_another_rule_is_said(tmp_path: Path) -> None:
    """A momentum that is not the one that made the teacher, or buffers treated otherwise, are warned of."""
    run = tmp_path / "run"
    save_students(run, 3)
    quiet_fold(run, tmp_path / "t.safetensors", momentum=0.1)
    save_students(run, 4)
    planned = ckpt_ema.plan(run, tmp_path / "u.safetensors", init=tmp_path / "t.safetensors", momentum=0.2)
    assert any("momentum 0.1 per checkpoint, and continues by another rule" in text for text in planned.warnings)
    planned = ckpt_ema.plan(run, tmp_path / "u.safetensors", init=tmp_path / "t.safetensors", skip_buffers=False)
    assert any("was made with `--skip-buffers`, and continues without" in text for text in planned.warnings)
    planned = ckpt_ema.plan(run, tmp_path / "u.safetensors", init=tmp_path / "t.safetensors", buffers=["fc.*"])
    assert "`fc.bias` and 1 more: averaged in `t.safetensors`, copied from now on" in planned.warnings
    quiet_fold(run, tmp_path / "c.safetensors", momentum=0.1, until_step=300, buffers=["fc.*"])
    planned = ckpt_ema.plan(run, tmp_path / "u.safetensors", init=tmp_path / "c.safetensors", buffers=["fc.b*"])
    assert "`fc.weight`: copied in `c.safetensors`, averaged from now on" in planned.warnings


@pytest.mark.parametrize(
    "changed",
    [
        {"momentum": 7.0},
        {"momentum": "x"},
        {"checkpoints": [{"name": 3}]},
        {"per": 9},
        {"selection": {"prefix": 3}, "stripped": [{}], "state": [[]], "rounded_to": {"float32": "x"}},
        {"rounded_to": {"float32": {"bfloat16": "x", "x": 1.0, "float16": 7.0}}, "parts": 2},
    ],
)
def test_a_record_that_lies_is_no_traceback(tmp_path: Path, changed: dict[str, Any]) -> None:
    """Provenance is what a stranger wrote: it is used, refused, or not believed."""
    run = tmp_path / "run"
    save_students(run, 2)
    quiet_fold(run, tmp_path / "t.safetensors", momentum=0.1)
    record = {**record_of(tmp_path / "t.safetensors"), **changed}
    tensors = load_file(tmp_path / "t.safetensors")
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt", "ckpt_ema": json.dumps(record)})
    save_students(run, 3)
    for asked in ({}, {"prefix": "fc."}, {"state": "model"}):
        with contextlib.suppress(CkptEmaError):
            ckpt_ema.plan(run, tmp_path / "u.safetensors", init=tmp_path / "t.safetensors", **asked)


def online_run(run: Path, *, interval: int = 1, named: int = 0, **options: Any) -> dict[int, Path]:
    """A checkpoint after each of thirteen steps, a snapshot of the online teacher beside each; it at the end."""
    run.mkdir()
    student = torch.nn.Linear(3, 2)
    teacher = ckpt_ema.MeanTeacher(student, momentum=0.3, interval=interval, **options)
    found = {}
    for step in range(1, 14):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.normal_()
        teacher.update()
        torch.save({"model": student.state_dict(), "step": named + step}, run / f"step_{named + step}.pt")
        found[step] = teacher.save_snapshot(run, named + step)
    teacher.save(run / "end.safetensors")
    return found


@pytest.mark.parametrize(("interval", "begin"), [(1, 3), (1, 7), (3, 3), (3, 4), (3, 5)])
@pytest.mark.parametrize("named", [0, 100])
def test_an_online_teacher_goes_on_by_its_own_rule_from_its_own_step(
    tmp_path: Path, interval: int, begin: int, named: int
) -> None:
    """The checkpoints behind its snapshot, at its momentum per step: what training would have made, to the bit."""
    run = tmp_path / "run"
    snapshots = online_run(run, interval=interval, named=named)
    report = quiet_fold(run, tmp_path / "on.safetensors", init=snapshots[begin])
    # With an interval, what lies between two updates has no share.
    assert {item.step for item in report.plan.checkpoints} <= set(range(named + begin, named + 14))
    assert not report.plan.warnings
    found, expected = load_file(report.output), load_file(run / "end.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) if interval == 1 else torch.allclose(found[name], tensor), name
    for told in ({"per": "step"}, {"per": "step", "between": "hold"}):  # what it is is no other rule
        again = ckpt_ema.plan(run, tmp_path / "t.safetensors", init=snapshots[begin], **told)
        assert (again.options.momentum, again.options.interval) == (0.3, interval)
    # In two parts: of the first one's record the phase of the interval is not that of its first checkpoint.
    part = tmp_path / "part.safetensors"
    quiet_fold(run, part, init=snapshots[begin], until_step=named + 8)
    quiet_fold(run, part, init=part, overwrite=True)
    for name, tensor in load_file(part).items():
        assert torch.allclose(tensor, expected[name]), name
    with pytest.raises(CkptEmaError, match=r"nothing is newer than `teacher_step_\d+\.safetensors`, which is of step"):
        ckpt_ema.plan(run, tmp_path / "t.safetensors", init=snapshots[13])
    with pytest.raises(CkptEmaError, match="nothing up to step") as cut_off:
        ckpt_ema.plan(run, tmp_path / "t.safetensors", init=snapshots[begin], until_step=named + begin)
    assert cut_off.value.hint == f"pass `--until {named + begin + 1}`, or omit it"
    asked = ckpt_ema.plan(run, tmp_path / "t.safetensors", init=snapshots[begin], momentum=0.1)
    assert [item.step for item in asked.checkpoints] == list(range(named + begin + 1, named + 14))


def test_a_teacher_that_does_not_say_of_which_step_it_is_asks_what_to_fold(tmp_path: Path) -> None:
    """All checkpoints may be in it already; where a rule is given they are folded, and that is said."""
    run, output = tmp_path / "run", tmp_path / "t.safetensors"
    online_run(run)
    init = run / "end.safetensors"
    with pytest.raises(MisuseError, match=r"`end\.safetensors` does not say of which step it is") as caught:
        ckpt_ema.plan(run, output, init=init)
    assert "--from STEP --momentum M" in (caught.value.hint or "")
    planned = ckpt_ema.plan(run, output, init=init, momentum=0.3)
    assert len(planned.checkpoints) == 13
    assert any("all 13 are folded, even those" in text for text in planned.warnings)
    planned = ckpt_ema.plan(run, output, init=run / "teacher_step_5.safetensors", momentum=0.3, from_step=2)
    assert [item.step for item in planned.checkpoints] == list(range(2, 14))
    planned = ckpt_ema.plan(run, output, init=init, momentum=0.3, from_step=12)
    assert [item.step for item in planned.checkpoints] == [12, 13]
    assert not any("also those" in text for text in planned.warnings)


def test_a_saved_teacher_that_knows_its_step_goes_on_from_it(tmp_path: Path) -> None:
    """`save(path, step=...)`, as a snapshot does."""
    student = torch.nn.Linear(3, 2)
    teacher = ckpt_ema.MeanTeacher(student, momentum=0.3)
    run = tmp_path / "run"
    run.mkdir()
    for step in range(1, 6):
        torch.nn.init.normal_(student.weight)
        teacher.update()
        save_file(student.state_dict(), run / f"step_{step}.safetensors")
        if step == 3:
            teacher.save(tmp_path / "at_3.safetensors", step=step)
    with pytest.raises(MisuseError, match="step is -1"):
        teacher.save(tmp_path / "x.safetensors", step=-1)
    report = quiet_fold(run, tmp_path / "t.safetensors", init=tmp_path / "at_3.safetensors")
    assert [item.step for item in report.plan.checkpoints if item.coefficient] == [4, 5]
    for name, tensor in load_file(teacher.save(tmp_path / "all.safetensors")).items():
        assert torch.allclose(load_file(tmp_path / "t.safetensors")[name], tensor), name


@pytest.mark.parametrize("place", ["run/step_200/teacher/model.safetensors", "ema_step_200.safetensors", "ema.pt"])
def test_a_foreign_teacher_says_its_step_by_its_name_or_contents(tmp_path: Path, place: str) -> None:
    """What is not newer is in it already; where nothing says its step, all is folded, with a warning."""
    run = tmp_path / "run"
    students = save_students(run, 4)
    init = tmp_path / place
    init.parent.mkdir(parents=True, exist_ok=True)
    if init.suffix == ".pt":
        torch.save({"model": students[1], "global_step": 200}, init)
    else:
        save_file(students[1], init)
    options: dict[str, Any] = {"momentum": 0.25, "exclude": ["step_200"]}
    planned = ckpt_ema.plan(run, tmp_path / "t.safetensors", init=init, **options)
    assert [item.step for item in planned.checkpoints] == [300, 400]
    assert any("is taken to be of step 200 by its contents or its name" in text for text in planned.warnings)
    per_step = ckpt_ema.plan(run, tmp_path / "t.safetensors", init=init, per="step", **options)
    assert [item.step for item in per_step.checkpoints] == [300, 400]
    with pytest.raises(NoCheckpointError, match="nothing up to step 200 is newer"):
        ckpt_ema.plan(run, tmp_path / "t.safetensors", init=init, until_step=200, **options)
    unknown = init.rename(tmp_path / "ema_of_somebody.safetensors")
    if init.suffix != ".pt":
        planned = ckpt_ema.plan(run, tmp_path / "t.safetensors", init=unknown, **options)
        assert any("all 4 are folded, even those" in text for text in planned.warnings)


@pytest.mark.parametrize(("name", "init"), [("epoch_{}", "ema_epoch_3"), ("model_{}", "checkpoint_3")])
def test_a_foreign_teachers_epoch_is_as_long_as_the_runs(tmp_path: Path, name: str, init: str) -> None:
    """With `--steps-per-epoch` its number counts steps as the checkpoints' do."""
    run = tmp_path / "run"
    run.mkdir()
    for number in range(1, 7):
        save_file(make_student(number), run / f"{name.format(number)}.safetensors")
    options: dict[str, Any] = {"half_life": 5000, "steps_per_epoch": 1250}
    own = quiet_fold(run, tmp_path / "own.safetensors", until_step=3, **options).output
    save_file(load_file(own), tmp_path / f"{init}.safetensors")
    expected = ckpt_ema.plan(run, tmp_path / "t.safetensors", init=own, **options)
    planned = ckpt_ema.plan(run, tmp_path / "t.safetensors", init=tmp_path / f"{init}.safetensors", **options)
    assert [item.step for item in planned.checkpoints if item.step != 3] == [4, 5, 6]
    assert planned.first_share == pytest.approx(0.5 ** (3 * 1250 / 5000), rel=0.2)
    assert planned.first_share == pytest.approx(expected.first_share, rel=0.2)


@pytest.mark.parametrize("name", ["resnet50.safetensors", "vit_patch16_224.safetensors", "teacher_2024.safetensors"])
def test_a_number_in_a_foreign_teachers_name_is_no_step(tmp_path: Path, name: str) -> None:
    """Unless the name says what it counts, or is a series' own: all is folded, with a warning."""
    run = tmp_path / "run"
    save_students(run, 3)
    save_file(make_student(1), tmp_path / name)
    planned = ckpt_ema.plan(run, tmp_path / "t.safetensors", init=tmp_path / name, momentum=0.3)
    assert [item.step for item in planned.checkpoints] == [100, 200, 300]
    assert any("all 3 are folded, even those" in text for text in planned.warnings)
    with pytest.raises(MisuseError, match="does not say of which step it is"):
        ckpt_ema.plan(run, tmp_path / "t.safetensors", init=tmp_path / name, half_life=50)


def test_a_teacher_that_followed_training_is_never_replaced(tmp_path: Path) -> None:
    """Nobody can make it again: `--overwrite` is for teachers that can be folded again."""
    run = tmp_path / "run"
    save_students(run, 3)
    written = ckpt_ema.MeanTeacher(torch.nn.Linear(2, 2), momentum=0.3).save(run / "teacher.safetensors")
    before = written.read_bytes()
    with pytest.raises(CkptEmaError, match="is a teacher that followed training, which nobody can make again"):
        quiet_fold(run, None, overwrite=True)
    assert written.read_bytes() == before
    online_run(tmp_path / "other")
    snapshot = tmp_path / "other" / "teacher_step_5.safetensors"
    with pytest.raises(CkptEmaError, match="which nobody can make again; it is never replaced"):
        quiet_fold(tmp_path / "other", snapshot, init=snapshot, overwrite=True)


def test_an_online_teacher_that_has_seen_nothing_is_not_gone_on_with(tmp_path: Path) -> None:
    """Its first update copies the student; what it holds before is no average of anything."""
    run = tmp_path / "run"
    snapshots = online_run(run, interval=3)
    with pytest.raises(CkptEmaError, match="is of before its first update, which copies the student"):
        ckpt_ema.plan(run, tmp_path / "t.safetensors", init=snapshots[2])


def test_what_was_left_out_on_purpose_and_is_not_newer_is_no_reason(tmp_path: Path) -> None:
    """A copy, and an older checkpoint: the teacher has all that there is."""
    run, output = tmp_path / "run", tmp_path / "t.safetensors"
    save_students(run, 3)
    save_file(make_student(2), run / "best.safetensors")
    options: dict[str, Any] = {"exclude": ("best*", "step_100*")}
    quiet_fold(run, output, momentum=0.25, **options)
    with pytest.raises(CkptEmaError, match="it has every checkpoint, up to step 300"):
        ckpt_ema.plan(run, tmp_path / "u.safetensors", init=output, **options)
    with pytest.raises(CkptEmaError, match="nothing that is selected is newer") as caught:
        ckpt_ema.plan(save_more(run), tmp_path / "u.safetensors", init=output, exclude=("best*", "step_400*"))
    assert caught.value.hint == "omit `--exclude`"


def save_more(run: Path) -> Path:
    """The same run with one checkpoint more."""
    save_students(run, 4)
    return run


def test_what_differs_from_an_online_teachers_own_rule_is_taken_or_said(tmp_path: Path) -> None:
    """What was asked for counts; whether buffers are averaged cannot be changed without a word."""
    run, output = tmp_path / "run", tmp_path / "t.safetensors"
    snapshots = online_run(run, interval=3, skip_buffers=False)
    planned = ckpt_ema.plan(run, output, init=snapshots[4])
    assert any("was made with `--no-skip-buffers`, and continues without" in text for text in planned.warnings)
    planned = ckpt_ema.plan(run, output, init=snapshots[4], interval=2, skip_buffers=False)
    assert (planned.options.interval, planned.warnings) == (2, ())
    planned = ckpt_ema.plan(run, output, init=snapshots[4], momentum=0.1, skip_buffers=False)
    assert any("was made with momentum 0.3 per step, interval 3" in text for text in planned.warnings)


def test_where_a_run_counts_in_another_unit_than_the_teacher_that_is_said(tmp_path: Path) -> None:
    """Steps do not tell which epochs are in it."""
    run = tmp_path / "run"
    snapshots = online_run(run)
    epochs = tmp_path / "epochs"
    epochs.mkdir()
    for epoch in (1, 2):
        torch.save(torch.load(run / f"step_{epoch}.pt")["model"], epochs / f"epoch_{epoch}.pt")
    planned = ckpt_ema.plan(epochs, tmp_path / "t.safetensors", init=snapshots[4], momentum=0.1)
    assert any("all 2 are folded, even those" in text for text in planned.warnings)


def test_checkpoints_that_come_to_count_otherwise_are_not_folded_again(tmp_path: Path) -> None:
    """Six digits behind a date are a time until one of them is none."""
    run, output = tmp_path / "run", tmp_path / "t.safetensors"
    run.mkdir()
    for step in (100000, 200000):
        save_file(make_student(step), run / f"exp-20240130-{step}.safetensors")
    quiet_fold(run, output, momentum=0.4)
    save_file(make_student(300000), run / "exp-20240130-300000.safetensors")
    planned = ckpt_ema.plan(run, tmp_path / "u.safetensors", init=output)
    assert [item.name for item in planned.checkpoints] == ["exp-20240130-300000.safetensors"]
    report = ckpt_ema.follow(run, output, momentum=0.4, idle_seconds=0.1, poll_seconds=0.01)
    assert (report.num_folded, report.missed) == (1, ())


@pytest.mark.parametrize("changed", [{"interval": value} for value in (None, 0, -1, "x", [1], 1 << 80)] + [{}])
def test_an_online_record_that_lies_is_no_traceback(tmp_path: Path, changed: dict[str, Any]) -> None:
    """It is an error with a message, or it does not matter."""
    run = tmp_path / "run"
    path = online_run(run, interval=2)[4]
    record = record_of(path)
    if not changed:
        del record["interval"]
    tensors = load_file(path)
    save_file(tensors, path, {"ckpt_ema": json.dumps({**record, **changed})})
    for options in ({}, {"momentum": 0.1, "per": "step"}, {"momentum": 0.1, "per": "step", "interval": 2}):
        with contextlib.suppress(CkptEmaError):
            ckpt_ema.plan(run, tmp_path / "t.safetensors", init=path, **options)


def save_halves(run: Path, count: int) -> None:
    """A raw state dict beside an average in each; in both a pair of halves with names alike."""
    run.mkdir(exist_ok=True)
    for step in range(1, count + 1):
        generator = torch.Generator().manual_seed(step)
        names = [f"{half}.{name}" for half in ("student", "teacher") for name in ("a", "b")]
        states = [{name: torch.randn(9, generator=generator) for name in names} for _ in range(2)]
        torch.save(dict(zip(("model", "model_ema"), states, strict=True)), run / f"step_{step}.pt")


SELECTIONS: list[dict[str, Any]] = [
    {"state": "model_ema"},
    {"prefix": "teacher."},
    {"state": "model_ema", "prefix": "teacher."},
]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_same_part_of_each_checkpoint_goes_on(tmp_path: Path, selection: dict[str, Any]) -> None:
    """By `--init` and by a follower that begins again, neither told which state dict or sub-model it was."""
    run = tmp_path / "run"
    save_halves(run, 4)
    whole = quiet_fold(run, tmp_path / "whole.safetensors", momentum=0.3, **selection).output
    begun = quiet_fold(run, tmp_path / "t.safetensors", momentum=0.3, until_step=2, **selection).output
    assert_same_bits(load_file(quiet_fold(run, tmp_path / "on.safetensors", init=begun).output), load_file(whole))
    assert record_of(tmp_path / "on.safetensors") == record_of(whole)
    if selection == {"prefix": "teacher."}:  # the same without its point
        again = quiet_fold(run, tmp_path / "again.safetensors", momentum=0.3, prefix="teacher").output
        assert again.read_bytes() == whole.read_bytes()
        assert not ckpt_ema.plan(run, tmp_path / "n.safetensors", init=begun, prefix="teacher").warnings
    ckpt_ema.follow(run, begun, until_step=4, poll_seconds=0.01)
    assert_same_bits(load_file(begun), load_file(whole))
    for teacher in (whole, begun):
        assert ckpt_ema.verify(teacher, run, share=1).is_ok


def test_another_part_of_each_checkpoint_is_told(tmp_path: Path) -> None:
    """Asked for where the teacher has another: a warning of a fold, an error of a follower."""
    run = tmp_path / "run"
    save_halves(run, 3)
    begun = quiet_fold(run, tmp_path / "t.safetensors", momentum=0.3, until_step=2).output
    plan = ckpt_ema.plan(run, tmp_path / "on.safetensors", init=begun, state="model_ema")
    assert "`t.safetensors` was made without `--state model_ema`" in plan.warnings
    other = quiet_fold(run, tmp_path / "o.safetensors", momentum=0.3, until_step=2, state="model_ema").output
    plan = ckpt_ema.plan(run, tmp_path / "on.safetensors", init=other, state="model")
    assert "`o.safetensors` was made with `--state model_ema`, not `--state model`" in plan.warnings
    assert plan.newest.state_key == "model"
    with pytest.raises(CkptEmaError, match="is the teacher of other options") as caught:
        ckpt_ema.follow(run, begun, state="model_ema", until_step=3, poll_seconds=0.01)
    assert caught.value.hint == "omit `--state` to continue it, or pass another `--output`"


def train(run: Path, saved: Collection[int], **options: Any) -> ckpt_ema.MeanTeacher:
    """A student that moves at random for as many steps, saved after some, and its teacher."""
    run.mkdir(exist_ok=True)
    student = torch.nn.Linear(6, 5)
    teacher = ckpt_ema.MeanTeacher(student, **options)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, max(saved) + 1):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        teacher.update()
        if step in saved:
            state = {name: tensor.detach() for name, tensor in student.named_parameters()}
            save_file(state, run / f"step_{step}.safetensors")
    return teacher


@pytest.mark.parametrize("has_snapshots", [False, True])
def test_a_reconstruction_goes_on_by_its_own_rule_from_its_own_step(tmp_path: Path, has_snapshots: bool) -> None:
    """Per step, near what training would have made; the record holds together, or says what it began with."""
    run = tmp_path / "run"
    tracks = ckpt_ema.Snapshots(run, every=20) if has_snapshots else None
    teacher = train(run, {*range(20, 101, 20), *range(101, 161)}, half_life=20, snapshots=tracks)
    made = ckpt_ema.reconstruct(run, tmp_path / "at.safetensors", half_life=20, at=100, announce=lambda plan: None)
    plan = ckpt_ema.plan(run, tmp_path / "on.safetensors", init=made.output)
    assert any("half-life 20 per step" in note for note in plan.notes)
    assert [item.step for item in plan.checkpoints] == list(range(101, 161))
    on = quiet_fold(run, tmp_path / "on.safetensors", init=made.output).output
    straight = quiet_fold(run, tmp_path / "straight.safetensors", half_life=20, from_step=100).output
    truth = teacher.tensors()

    def distance(path: Path) -> float:
        return sum(float((tensor - truth[name]).norm()) for name, tensor in load_file(path).items())

    assert distance(on) < distance(straight)
    assert ckpt_ema.verify(on, run).is_ok


def test_an_interval_counts_from_a_first_checkpoint_that_was_left_out(tmp_path: Path) -> None:
    """Its share is next to nothing by then, and its step is where the counting began."""
    run = tmp_path / "run"
    run.mkdir()
    for step in (3, 152, 251, 300):
        save_file(make_student(step), run / f"step_{step}.safetensors")
    options: dict[str, Any] = {"momentum": 0.9, "per": "step", "interval": 7, "between": "hold"}
    whole = quiet_fold(run, tmp_path / "whole.safetensors", **options).output
    begun = quiet_fold(run, tmp_path / "t.safetensors", until_step=251, **options).output
    # Of 49 steps seven are updates, all but for the phase: the last is after step 297, or 299 counted from 152.
    assert record_of(begun)["origin"] == 3
    on = quiet_fold(run, tmp_path / "on.safetensors", init=begun).output
    mine, expected = load_file(on), load_file(whole)
    for name, tensor in expected.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-6, atol=1e-6)
    assert ckpt_ema.verify(on, run, share=1).is_ok


@pytest.mark.parametrize("seed", range(8))
def test_held_students_in_float64_go_on_bit_for_bit(tmp_path: Path, seed: int) -> None:
    """The teacher's own newest checkpoint has no share then, and does not change how the others enter."""
    run = tmp_path / "run"
    run.mkdir()
    generator = torch.Generator().manual_seed(seed)
    steps = sorted(set(torch.randint(1, 200, (6,), generator=generator).tolist()))
    for step in steps:
        save_file({"w": torch.randn(500, generator=generator, dtype=torch.float64)}, run / f"step_{step}.safetensors")
    whole = quiet_fold(run, tmp_path / "whole.safetensors", half_life=20, between="hold").output
    begun = quiet_fold(run, tmp_path / "t.safetensors", half_life=20, between="hold", until_step=steps[0]).output
    teacher = quiet_fold(run, tmp_path / "on.safetensors", init=begun).output
    assert_same_bits(load_file(teacher), load_file(whole))
    assert "bit for bit" in ckpt_ema.verify(teacher, run, share=1).checks[-1].text


def save_walk(run: Path, names: dict[str, int]) -> None:
    """A student that moves at random, saved under each name after so many moves."""
    run.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(50)
    for name, moves in names.items():
        weight = weight + torch.randn(50, generator=generator) * moves**0.5
        torch.save({"weight": weight, "bias": weight[:3].clone()}, run / name)


def test_a_reconstructions_interval_counts_from_where_it_began(tmp_path: Path) -> None:
    """Not from the first student that has a share in it; also where what goes on from it is continued."""
    run = tmp_path / "run"
    save_walk(run, {f"step_{step}.pt": 10 for step in range(0, 1001, 10)})
    made = ckpt_ema.reconstruct(
        run, tmp_path / "t.safetensors", momentum=0.5, interval=7, until_step=700, announce=lambda plan: None
    )
    assert record_of(made.output)["checkpoints"][0]["step"] > 0
    plan = ckpt_ema.plan(run, tmp_path / "on.safetensors", init=made.output, until_step=710)
    assert plan.first_share == pytest.approx(0.5)  # one update, at 707
    on = quiet_fold(run, tmp_path / "on.safetensors", init=made.output, until_step=710).output
    assert record_of(on)["origin"] == 0
    plan = ckpt_ema.plan(run, tmp_path / "further.safetensors", init=on, until_step=730)
    assert plan.first_share == pytest.approx(0.125)  # three, at 714, 721 and 728


def test_a_reconstruction_that_goes_on_in_parts_keeps_its_interval(tmp_path: Path) -> None:
    """With snapshots in it nobody lists its students again, so that its beginning is written down."""
    run = tmp_path / "run"
    train(run, range(20, 201, 20), snapshots=ckpt_ema.Snapshots(run, every=20))
    options: dict[str, Any] = {"half_life": 20, "interval": 7, "at": 100}
    made = ckpt_ema.reconstruct(run, tmp_path / "t.safetensors", announce=lambda plan: None, **options).output
    start = record_of(made)["start"]
    on = quiet_fold(run, tmp_path / "on.safetensors", init=made, until_step=120).output
    assert record_of(on)["origin"] == start
    further = ckpt_ema.plan(run, tmp_path / "further.safetensors", init=on, until_step=140)
    num_updates = (140 - start) // 7 - (120 - start) // 7
    assert further.first_share == pytest.approx(0.5 ** (7 * num_updates / 20))


def test_a_reconstruction_of_numbered_epochs_goes_on_with_the_next(tmp_path: Path) -> None:
    """Its step counts training steps, the names what they count."""
    run = tmp_path / "run"
    save_walk(run, {f"ck_{number}.pt": 100 for number in range(11)})
    options: dict[str, Any] = {"half_life": 100.0, "steps_per_epoch": 100}
    made = ckpt_ema.reconstruct(run, tmp_path / "t.safetensors", until_step=5, announce=lambda plan: None, **options)
    for given in ({}, {"per": "step", **options}):
        plan = ckpt_ema.plan(run, tmp_path / "on.safetensors", init=made.output, **given)
        assert [item.step for item in plan.checkpoints][-5:] == [6, 7, 8, 9, 10]
        assert plan.options.steps_per_epoch == 100


def test_what_was_found_by_itself_may_be_asked_for(tmp_path: Path) -> None:
    """The state dict and the prefix that were chosen are the same ones when somebody names them."""
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2, 3):
        halves = {half: make_student(step + number) for number, half in enumerate(("student", "teacher"))}
        state = {f"{half}.{name}": tensor for half, each in halves.items() for name, tensor in each.items()}
        torch.save({"model": state, "epoch": step}, run / f"step_{step}.pt")
    begun = quiet_fold(run, tmp_path / "t.safetensors", momentum=0.3, until_step=2).output
    for given in ({"state": "model"}, {"prefix": "student."}, {"prefix": "student"}):
        assert not ckpt_ema.plan(run, tmp_path / "on.safetensors", init=begun, **given).warnings
    ckpt_ema.follow(run, begun, state="model", until_step=3, poll_seconds=0.01)


def test_a_follower_finds_the_part_again_that_the_run_does_not_tell(tmp_path: Path) -> None:
    """Of two state dicts with names of their own neither is the student by itself; the teacher says which it is."""
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2, 3):
        torch.save(
            {name: {"state_dict": make_student(step * i)} for i, name in ((1, "alpha"), (2, "beta"))},
            run / f"step_{step}.pt",
        )
    options: dict[str, Any] = {"momentum": 0.3, "state": "beta.state_dict"}
    ckpt_ema.follow(run, tmp_path / "t.safetensors", until_step=2, poll_seconds=0.01, **options)
    ckpt_ema.follow(run, tmp_path / "t.safetensors", until_step=3, poll_seconds=0.01)
    whole = quiet_fold(run, tmp_path / "whole.safetensors", **options).output
    assert_same_bits(load_file(tmp_path / "t.safetensors"), load_file(whole))


@pytest.mark.parametrize("state", ["model", "ema", "teacher", "nested.ema_model"])
def test_a_teacher_under_its_students_key_is_continued_whatever_the_key_is_called(tmp_path: Path, state: str) -> None:
    """A fold for torch.distributed.checkpoint of what looks like averages goes on without a word, and is verified."""
    run = tmp_path / "run"
    for step in range(1, 6):
        # A momentum encoder, which by itself would be left out as an average, is folded where the state is named.
        average = {f"{part}.{name}": t for part in ("encoder_q", "encoder_k") for name, t in make_student(step).items()}
        nested: Any = average
        for key in reversed(state.split(".")):
            nested = {key: nested}
        dcp.save({"net": make_student(step + 50), **nested}, checkpoint_id=run / f"step_{step}", no_dist=True)
    options: dict[str, Any] = {"momentum": 0.3, "state": state}
    begun = quiet_fold(run, tmp_path / "t", output_format="dcp", until_step=3, **options).output
    on = quiet_fold(run, tmp_path / "on", init=begun, output_format="dcp").output
    whole = quiet_fold(run, tmp_path / "whole.safetensors", **options).output
    assert ckpt_ema.compare(on, whole).is_identical
    assert ckpt_ema.inspect(on).chosen == state
    for teacher in (begun, on):
        found = ckpt_ema.verify(teacher, run, share=1.0)
        assert found.is_ok, found.checks
        assert [check.is_ok for check in found.checks] == [True] * 4


def test_the_only_table_of_a_foreign_teacher_may_be_called_an_average(tmp_path: Path) -> None:
    """A file with nothing but `ema` in it starts a fold, as the same tensors by themselves do."""
    run = tmp_path / "run"
    students = save_students(run, 3)
    torch.save({"ema": students[0]}, tmp_path / "nested.pt")
    torch.save(students[0], tmp_path / "flat.pt")
    outputs = [
        quiet_fold(run, tmp_path / f"{name}.safetensors", init=tmp_path / f"{name}.pt", momentum=0.3).output
        for name in ("nested", "flat")
    ]
    assert ckpt_ema.compare(*outputs).is_identical
