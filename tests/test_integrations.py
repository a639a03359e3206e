"""The online teacher inside real frameworks, from their own configuration to their own checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_ema import CkptEmaError, MisuseError
from tests.conftest import StateDict, assert_same_bits
from tests.test_frameworks import (
    _calm,  # noqa: F401  (a fixture for every test here as well)
    bits_of,
    make_net,
    mean_teacher_hook,
    mmengine_model,
    train_with_mmengine,
)

MOMENTUM = 0.1


# MMEngine ------------------------------------------------------------------------------------------------------------


def witness(seen: list[StateDict]) -> Any:
    """A hook that keeps the student after every iteration."""
    from mmengine.hooks import Hook

    class Witness(Hook):
        def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
            seen.append(bits_of(dict(runner.model.student.named_parameters())))

    return Witness()


def continued(teacher: StateDict, students: list[StateDict]) -> StateDict:
    """The hook's lines from a given teacher on."""
    for student in students:
        for name, tensor in teacher.items():
            tensor.mul_(1 - MOMENTUM).add_(student[name], alpha=MOMENTUM)
    return teacher


def part_of(state: StateDict, prefix: str) -> StateDict:
    """The parameters of the pair's `student.` or `teacher.`."""
    names = dict(make_net().named_parameters())
    return {name: state[f"{prefix}{name}"].clone() for name in names}


@pytest.mark.parametrize("skip_buffers", [True, False])
@pytest.mark.parametrize("interval", [1, 2])
def test_mmengine_by_mmdetections_configuration_has_the_upstream_teacher(
    tmp_path: Path, interval: int, skip_buffers: bool
) -> None:
    """A Runner with `dict(type="MeanTeacherHook", ...)` and one with the upstream rule end with the same bits."""
    pytest.importorskip("mmengine")
    import ckpt_ema.integrations.mmengine

    configuration = {"momentum": MOMENTUM, "interval": interval}
    hooks = [
        {"type": "MeanTeacherHook", **configuration, "skip_buffer": skip_buffers},
        {"type": "MeanTeacherHook", **configuration, "skip_buffers": skip_buffers},
        mean_teacher_hook(MOMENTUM, interval, skip_buffers=skip_buffers),
    ]
    teachers = []
    for number, hook in enumerate(hooks):
        torch.manual_seed(0)
        model = mmengine_model(pair=True)
        torch.manual_seed(0)
        runner = train_with_mmengine(model, tmp_path / str(number), [hook], randomness={"seed": 0})
        teachers.append(bits_of(runner.model.teacher.state_dict()))
    assert_same_bits(teachers[0], teachers[2])
    assert_same_bits(teachers[1], teachers[2])
    assert ckpt_ema.integrations.mmengine.STATE_KEY in torch.load(tmp_path / "0/iter_6.pth", weights_only=False)


def test_mmengine_resumes_in_the_middle_of_an_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher of the checkpoint goes on, nothing is copied again, and iterations count from where they stopped."""
    pytest.importorskip("mmengine")
    import ckpt_ema.integrations.mmengine  # noqa: F401

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # MMEngine's own resume needs it
    hook = {"type": "MeanTeacherHook", "momentum": MOMENTUM, "interval": 2}
    run = tmp_path / "run"
    train_with_mmengine(mmengine_model(pair=True), run, [hook], iterations=3)
    stored = torch.load(run / "iter_3.pth", weights_only=False)
    seen: list[StateDict] = []
    runner = train_with_mmengine(mmengine_model(pair=True), run, [hook, witness(seen)], iterations=7, resume=True)
    assert len(seen) == 4
    expected = continued(part_of(stored["state_dict"], "teacher."), [seen[0], seen[2]])  # iterations 4 and 6
    assert_same_bits(bits_of(dict(runner.model.teacher.named_parameters())), expected)
    final = torch.load(run / "iter_7.pth", weights_only=False)["mean_teacher"]
    assert (final["num_steps"], final["num_updates"]) == (7, 3)


@pytest.mark.parametrize("has_teacher", [True, False])
def test_mmengine_load_from_keeps_a_teacher_that_it_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_teacher: bool
) -> None:
    """The upstream hook overwrites it at iteration 0; a checkpoint without one still has the student copied."""
    pytest.importorskip("mmengine")
    import ckpt_ema.integrations.mmengine  # noqa: F401

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    model = mmengine_model(pair=True)
    state = {
        name: tensor for name, tensor in model.state_dict().items() if has_teacher or not name.startswith("teacher.")
    }
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "start.pth")
    seen: list[StateDict] = []
    runner = train_with_mmengine(
        mmengine_model(pair=True),
        tmp_path / "run",
        [{"type": "MeanTeacherHook", "momentum": MOMENTUM}, witness(seen)],
        iterations=2,
        load_from=str(tmp_path / "start.pth"),
    )
    start = part_of(state, "teacher." if has_teacher else "student.")
    expected = continued(start, seen)
    assert_same_bits(bits_of(dict(runner.model.teacher.named_parameters())), expected)


def test_mmengine_misuse_is_told(tmp_path: Path) -> None:
    """Two words for one thing that disagree, and a model without a pair."""
    pytest.importorskip("mmengine")
    from ckpt_ema.integrations.mmengine import MeanTeacherHook

    with pytest.raises(MisuseError, match="skip_buffer is True and skip_buffers False"):
        MeanTeacherHook(skip_buffer=True, skip_buffers=False)
    with pytest.raises(CkptEmaError, match="a Plain has no `student`"):
        train_with_mmengine(mmengine_model(pair=False), tmp_path / "run", [MeanTeacherHook()], iterations=1)
