"""Snapshot tracks: averages of known response beside the online teacher, against the weights written out."""

from __future__ import annotations

import copy
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import ckpt_ema
from ckpt_ema import CkptEmaError, MeanTeacher, MisuseError, Snapshots
from ckpt_ema.averages.response_records import read_response, response_record
from ckpt_ema.averages.responses import Ema, Power, gamma_of, momentum_of_half_life, tail_at
from ckpt_ema.online.increments import Increments
from ckpt_ema.online.state_file import read_state, write_state
from tests.conftest import assert_same_bits

Path64 = list[dict[str, torch.Tensor]]


def make_student(width: int = 5) -> nn.Module:
    """Tied, transposed, frozen, empty and scalar tensors, and buffers; the same each time."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width, bias=False))
    student[2].weight = student[0].weight
    student.scale = nn.Parameter(torch.tensor(1.5))
    student.nothing = nn.Parameter(torch.empty(0, 3))
    student.frozen = nn.Parameter(torch.randn(3, 4).t(), requires_grad=False)
    return student


def walk(student: nn.Module, steps: int, *, first: int = 1) -> Iterator[int]:
    """Move every parameter at random, less and less; hand out the step. The same for each step's number."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in student.parameters():
                # Divided here: a GPU multiplies by the reciprocal, which rounds in another way.
                parameter.add_((torch.randn(parameter.shape, generator=generator) / step).to(parameter))
        yield step


def clones(student: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters as they are now, in float64, tied ones under each name."""
    return {name: p.detach().double().clone() for name, p in student.named_parameters(remove_duplicate=False)}


def metadata(path: Path) -> dict[str, Any]:
    """What the file says of itself."""
    with safe_open(path, "pt") as file:
        record: dict[str, Any] = json.loads(file.metadata()["ckpt_ema"])
    return record


def weighed(path: Path64, weights: list[float]) -> dict[str, torch.Tensor]:
    """sum of weights[t] * path[t]."""
    assert math.fsum(weights) == pytest.approx(1)
    return {name: sum(w * p[name] for w, p in zip(weights, path, strict=True)) for name in path[0]}


def weights_of(response: Any, num_steps: int) -> list[float]:
    """b(t) for t = 1 ... num_steps: differences of the tail sums."""
    return [tail_at(response, step) - tail_at(response, step + 1) for step in range(1, num_steps + 1)]


def recurrence(shares: list[float]) -> list[float]:
    """The weight of each student where each update takes its share, in float64; the first takes all."""
    weights: list[float] = []
    for share in [1.0, *shares[1:]]:
        weights = [weight * (1 - share) for weight in weights] + [share]
    return weights


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """To `tolerance` of the largest value of each tensor."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max().item() if tensor.numel() else 1.0
        assert torch.allclose(actual[name].double(), tensor, rtol=0, atol=tolerance * scale), name


SHARES = {
    "power_0.05": lambda t: 1 - (1 - 1 / t) ** (gamma_of(0.05) + 1),
    "power_0.2": lambda t: 1 - (1 - 1 / t) ** (gamma_of(0.2) + 1),
    "ema_0.1": lambda t: 0.1,
    "ema_hl7": lambda t: momentum_of_half_life(7),
}
TRACKS: dict[str, Any] = {"sigma_rel": (0.05, 0.2), "momentum": 0.1, "half_life": [7]}


@pytest.mark.parametrize("interval", [1, 4])
def test_every_track_is_the_sum_that_its_files_response_says(tmp_path: Path, interval: int) -> None:
    """Recurrence, closed form and file agree, whatever the interval of the teacher beside them."""
    student = make_student()
    teacher = MeanTeacher(student, interval=interval, snapshots=Snapshots(tmp_path, every=15, **TRACKS))
    path = []
    for _ in walk(student, 47):
        teacher.update()
        path.append(clones(student))
    assert len(list(tmp_path.iterdir())) == 4 * 3
    for name, share in SHARES.items():
        for step in (15, 30, 45):
            file = tmp_path / f"teacher_{name}_step_{step}.safetensors"
            weights = recurrence([share(t) for t in range(1, step + 1)])
            assert_close(load_file(file), weighed(path[:step], weights))
            record = metadata(file)
            response = read_response(record["response"])
            assert weights_of(response, step) == pytest.approx(weights, abs=1e-12)
            assert (record["step"], record["steps"], record["updates"], record["skipped"]) == (step, step, step, 0)
    power = metadata(tmp_path / "teacher_power_0.05_step_30.safetensors")
    gamma = gamma_of(0.05)
    assert power["response"] == {"kind": "power", "gamma": gamma, "start": 0, "end": 30, "sigma_rel": 0.05}
    assert (power["momentum"], power["sigma_rel"], power["interval"]) == (None, 0.05, 1)
    ema = metadata(tmp_path / "teacher_ema_0.1_step_30.safetensors")
    assert ema["response"] == {"kind": "ema", "momentum": 0.1, "interval": 1, "start": 1, "end": 30}


@pytest.mark.parametrize("shadow", ["float32", "student"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ema_track_is_the_mean_teacher_of_that_momentum(tmp_path: Path, dtype: torch.dtype, shadow: Any) -> None:
    """Bit for bit with the closer arithmetic, in float32 for a 16-bit student and a 16-bit teacher too."""
    student = make_student(40).to(dtype)
    reference = MeanTeacher(student, momentum=0.1, arithmetic="lerp")
    settings = Snapshots(tmp_path, every=20, momentum=0.1)
    teacher = MeanTeacher(student, momentum=0.3, interval=3, dtype=shadow, snapshots=settings)
    for _ in walk(student, 20):
        teacher.update()
        reference.update()
    assert_same_bits(load_file(tmp_path / "teacher_ema_0.1_step_20.safetensors"), reference.tensors())


def test_tracks_leave_the_teacher_alone_and_swapping_leaves_the_tracks_alone(tmp_path: Path) -> None:
    """The teacher has the bits it has without them, a teacher module included; files have only what is averaged."""
    student, other = make_student(), make_student()
    module = make_student()
    plain = MeanTeacher(other, momentum=0.1, interval=2)
    teacher = MeanTeacher(student, module, momentum=0.1, interval=2, snapshots=Snapshots(tmp_path, every=9))
    for _ in zip(walk(student, 10), walk(other, 10), strict=True):
        assert teacher.update() == plain.update()
        with teacher.swapped_into():
            pass
    assert_same_bits(teacher.tensors(), plain.tensors())
    path = []
    for _ in walk(replay := make_student(), 9):
        path.append(clones(replay))
    weights = weights_of(Power(gamma_of(0.1), 0, 9), 9)
    assert_close(load_file(tmp_path / "teacher_power_0.1_step_9.safetensors"), weighed(path, weights))


@pytest.mark.parametrize(("dtype", "stored"), [("student", torch.bfloat16), ("float16", torch.float16)])
def test_files_have_the_dtype_that_was_asked_for(tmp_path: Path, dtype: str, stored: torch.dtype) -> None:
    """The float32 average, rounded once."""
    for each in (dtype, "float32"):
        student = make_student().to(torch.bfloat16)
        settings = Snapshots(tmp_path / each, every=3, momentum=0.1, dtype=each)
        teacher = MeanTeacher(student, snapshots=settings)
        for _ in walk(student, 3):
            teacher.update()
    name = "teacher_ema_0.1_step_3.safetensors"
    wide, narrow = load_file(tmp_path / "float32" / name), load_file(tmp_path / dtype / name)
    assert_same_bits(narrow, {name: tensor.to(stored) for name, tensor in wide.items()})


# --- increments -------------------------------------------------------------------------------------------------------


def test_increments_are_what_the_student_moved(tmp_path: Path) -> None:
    """Of a small student all elements count: each early step, and later every `every // 16`-th at least."""
    student = make_student()
    teacher = MeanTeacher(student, snapshots=Snapshots(tmp_path, every=160, momentum=0.1))
    path = []
    for _ in walk(student, 320):
        teacher.update()
        path.append({id(p): p.detach().double().clone() for p in student.parameters()})
    record = metadata(tmp_path / "teacher_ema_0.1_step_320.safetensors")
    measured = dict(record["increments"])
    assert {*range(2, 17), *range(20, 321, 10)} <= measured.keys()
    assert 1 not in measured
    assert len(measured) < 120
    for step, value in measured.items():
        moved = sum((path[step - 1][key] - before).square().sum().item() for key, before in path[step - 2].items())
        assert value == pytest.approx(moved, rel=1e-4), step
    last = path[max(measured) - 1]
    assert record["squared_norm"] == pytest.approx(sum(p.square().sum().item() for p in last.values()), rel=1e-5)


def test_of_large_students_a_sample_stands_for_all() -> None:
    """A part of every tensor, scaled by its size: within a few per cent where elements move alike."""
    torch.manual_seed(0)
    shapes = [(700, 900), (900,), (8, 300, 3, 3), (5,), ()]
    before = [torch.randn(shape) for shape in shapes]
    before[2] = before[2].to(memory_format=torch.channels_last)
    before.append(torch.randn(500, 600).t())
    after = [tensor + 0.1 * (1 + i) * torch.randn(tensor.shape) for i, tensor in enumerate(before)]
    increments = Increments(before, every=1)
    increments.observe(1, before)
    increments.observe(2, after)
    [[step, value]], squared_norm = increments.read()
    exact = sum((new - old).square().sum().item() for new, old in zip(after, before, strict=True))
    assert step == 2
    assert value == pytest.approx(exact, rel=0.05)
    assert squared_norm == pytest.approx(sum(tensor.square().sum().item() for tensor in after), rel=0.05)
    assert 60000 < increments.state_dict()["sample"].numel() < 70000


def test_a_long_run_keeps_a_bounded_number_of_increments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread over the whole run, the early steps among them."""
    monkeypatch.setattr("ckpt_ema.online.increments.MAX_SAMPLES", 300)
    tensor = torch.zeros(3)
    increments = Increments([tensor], every=1)
    for step in range(1, 4000):
        increments.observe(step, [tensor.fill_(step)])
    steps = [int(step) for step, value in increments.read()[0] if value == pytest.approx(3)]
    assert 150 < len(steps) <= 300
    assert set(range(2, 17)) <= set(steps)
    assert max(b - a for a, b in itertools.pairwise([*steps, 4000])) <= 32


@pytest.mark.parametrize("every", [1, 10])
def test_a_resumed_run_measures_the_steps_of_an_undisturbed_one(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where so many steps have passed that fewer are measured."""
    monkeypatch.setattr("ckpt_ema.online.increments.MAX_SAMPLES", 300)
    tensor = torch.zeros(3)
    whole = Increments([tensor], every=every)
    for step in range(1, 6000):
        whole.observe(step, [tensor.fill_(step)])
        if step == 4000:
            state = copy.deepcopy(whole.state_dict())
    resumed = Increments([tensor], every=every)
    resumed.load_state_dict(state)
    for step in range(4001, 6000):
        resumed.observe(step, [tensor.fill_(step)])
    assert resumed.read() == whole.read()


# --- retention --------------------------------------------------------------------------------------------------------


def test_the_newest_files_of_each_track_stay_and_nothing_else_goes(tmp_path: Path) -> None:
    """Older files go only if they say that they are of this track; later steps of an earlier run are left alone."""
    student = make_student()
    name = "teacher_ema_0.1_step_{}.safetensors".format
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    abandoned = tmp_path / "abandoned"
    for folder, every in ((abandoned, 100), (elsewhere, 4)):
        earlier = MeanTeacher(student, snapshots=Snapshots(folder, every=every, momentum=0.1))
        for _ in walk(student, every):
            earlier.update()
    teacher = MeanTeacher(student, snapshots=Snapshots(run, every=5, momentum=(0.1, 0.2), keep=2))
    teacher.update()
    (run / name(100)).write_bytes((abandoned / name(100)).read_bytes())
    save_file({"w": torch.ones(2)}, run / name(1))
    (run / name(2)).write_bytes(b"")
    MeanTeacher(student).save(run / name(3))
    (run / name(4)).symlink_to(elsewhere / name(4))
    (run / name(6)).write_bytes((elsewhere / name(4)).read_bytes())
    untouched = {path.name for path in run.iterdir()}
    for _ in walk(student, 21):
        teacher.update()
    kept = {f"teacher_ema_{m}_step_{step}.safetensors" for m in (0.1, 0.2) for step in (15, 20)}
    assert {path.name for path in run.iterdir()} == untouched | kept


def test_a_training_that_begins_anew_leaves_an_earlier_ones_files_alone(tmp_path: Path) -> None:
    """A resume without the teacher's state would write over them, with responses that are not theirs."""
    student = make_student()
    settings = Snapshots(tmp_path, every=2, momentum=0.1)
    first = MeanTeacher(student, snapshots=settings)
    for _ in walk(student, 4):
        first.update()
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    forgetful = MeanTeacher(student, snapshots=settings)
    with pytest.raises(CkptEmaError, match=r"holds 2 snapshots of the track ema_0\.1.*begins anew"):
        forgetful.update()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    resumed = MeanTeacher(student, snapshots=settings)
    resumed.load_state_dict(first.state_dict())
    for _ in walk(student, 2):
        resumed.update()
    assert len(list(tmp_path.iterdir())) == 3


def test_what_another_future_wrote_is_set_aside(tmp_path: Path) -> None:
    """A training that goes on from an earlier step has other students from there on, whatever files it writes later."""
    student = make_student()
    teacher = MeanTeacher(student, snapshots=Snapshots(tmp_path, every=2, momentum=(0.1, 0.2)))
    for step in walk(student, 8):
        teacher.update()
        if step == 4:
            state, weights = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    student.load_state_dict(weights)
    resumed = MeanTeacher(student, snapshots=Snapshots(tmp_path, every=3, momentum=(0.1, 0.2)))
    resumed.load_state_dict(state)
    assert {path.name for path in tmp_path.iterdir()} == written.keys()  # it may be loaded to look at it
    other_steps = walk(student, 2, first=105)
    next(other_steps)
    with pytest.warns(UserWarning, match=r"4 snapshots of later steps than 4 .*\.abandoned"):
        resumed.update()
    next(other_steps)
    resumed.update()
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {f"teacher_ema_{momentum}_step_{step}.safetensors" for momentum in (0.1, 0.2) for step in (2, 4)}
    gone = written.keys() - kept
    new = {f"teacher_ema_{momentum}_step_6.safetensors" for momentum in (0.1, 0.2)}
    assert found.keys() == kept | new | {f"{name}.abandoned" for name in gone}
    assert all(found[name] == written[name] for name in kept)
    assert all(found[f"{name}.abandoned"] == written[name] for name in gone)


def test_going_back_twice_loses_nothing_unless_little_is_to_be_kept(tmp_path: Path) -> None:
    """Every future that was left stays, under a name of its own; with `keep` until training has come as far again."""
    for keep in (None, 2):
        folder = tmp_path / str(keep)
        student = make_student()
        settings = Snapshots(folder, every=2, momentum=0.1, keep=keep)
        teacher = MeanTeacher(student, snapshots=settings)
        for step in walk(student, 8):
            teacher.update()
            if step == 2:
                state = copy.deepcopy(teacher.state_dict())
        for last in (6, 10):
            teacher = MeanTeacher(student, snapshots=settings)
            teacher.load_state_dict(state)
            with pytest.warns(UserWarning, match="are called"):
                teacher.update()
            for _ in range(3, last):
                teacher.update()
        names = sorted(path.name.removeprefix("teacher_ema_0.1_step_") for path in folder.iterdir())
        live = [f"{step}.safetensors" for step in ((2, 4, 6, 8, 10) if keep is None else (8, 10))]
        left = ["4.safetensors.abandoned", "4.safetensors.abandoned-1", "6.safetensors.abandoned"]
        left += ["6.safetensors.abandoned-1", "8.safetensors.abandoned"]
        assert names == sorted(live + (left if keep is None else []))


def test_a_state_of_before_the_first_step_is_gone_on_with(tmp_path: Path) -> None:
    """Beside files of its own future."""
    student = make_student()
    settings = Snapshots(tmp_path, every=2, momentum=0.1)
    teacher = MeanTeacher(student, snapshots=settings)
    state = copy.deepcopy(teacher.state_dict())
    for _ in walk(student, 4):
        teacher.update()
    again = MeanTeacher(student, snapshots=settings)
    again.load_state_dict(state)
    with pytest.warns(UserWarning, match="2 snapshots of later steps than 0"):
        again.update()


def test_copies_and_other_tracks_are_no_second_writers(tmp_path: Path) -> None:
    """What goes on with a copy takes over; tracks of other names have files of their own."""
    student = make_student()
    teacher = MeanTeacher(student, snapshots=Snapshots(tmp_path, every=1, momentum=0.1))
    beside = MeanTeacher(student, snapshots=Snapshots(tmp_path, every=1, momentum=0.2))
    for _ in walk(student, 3):
        teacher.update()
        beside.update()
    _, copied = copy.deepcopy((student, teacher))
    for _ in range(3):
        copied.update()
    with pytest.raises(CkptEmaError, match="another MeanTeacher writes into"):
        teacher.update()


def test_two_teachers_in_one_folder_are_told(tmp_path: Path) -> None:
    """Each would write over the other's files; one that takes over from another does not."""
    one, other = make_student(), make_student()
    settings = Snapshots(tmp_path, every=1, momentum=0.1)
    teachers = [MeanTeacher(student, snapshots=settings) for student in (one, other)]
    teachers[0].update()
    teachers[1].load_state_dict(teachers[0].state_dict())
    for _ in range(3):
        teachers[1].update()
    with pytest.raises(CkptEmaError, match="another MeanTeacher writes into"):
        teachers[0].update()
    both = Snapshots(tmp_path / "both", every=2, momentum=0.1)
    (tmp_path / "link").symlink_to(tmp_path / "both")
    by_link = Snapshots(tmp_path / "link", every=2, momentum=0.1)
    fresh = [MeanTeacher(student, snapshots=each) for student, each in ((one, both), (other, by_link))]
    for each in (*fresh, fresh[0]):
        each.update()
    before = [path.read_bytes() for path in (tmp_path / "both").iterdir()]
    with pytest.raises(CkptEmaError, match="another MeanTeacher writes into"):
        fresh[1].update()
    assert [path.read_bytes() for path in (tmp_path / "both").iterdir()] == before
    apart = MeanTeacher(one, snapshots=Snapshots(tmp_path / "apart", every=1, momentum=0.1))
    for _ in range(2):
        apart.update()
        teachers[1].update()


def test_a_folder_stays_where_it_was_when_the_trainer_changes_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra changes the working directory after the configuration was read."""
    monkeypatch.chdir(tmp_path)
    student = make_student()
    teacher = MeanTeacher(student, snapshots=Snapshots("run", every=2, momentum=0.1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for _ in walk(student, 2):
        teacher.update()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["teacher_ema_0.1_step_2.safetensors"]


def test_nothing_goes_before_the_newer_file_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails leaves the older files; the step is counted, and training can go on."""
    student = make_student()
    teacher = MeanTeacher(student, snapshots=Snapshots(tmp_path, every=2, momentum=0.1, keep=1))
    for _ in walk(student, 3):
        teacher.update()
    next(walk(student, 1, first=4))
    with monkeypatch.context() as patch:
        patch.setattr("ckpt_ema.output.writer._commit", failing_commit)
        with pytest.raises(CkptEmaError, match="no space on disk"):
            teacher.update()
    assert [path.name for path in tmp_path.iterdir()] == ["teacher_ema_0.1_step_2.safetensors"]
    assert teacher.num_steps == 4
    for _ in walk(student, 2, first=5):
        teacher.update()
    assert [path.name for path in tmp_path.iterdir()] == ["teacher_ema_0.1_step_6.safetensors"]
    assert metadata(tmp_path / "teacher_ema_0.1_step_6.safetensors")["response"]["end"] == 6


def failing_commit(*_: object, **__: object) -> None:
    """As a file system that fails at the last moment."""
    raise OSError(28, "no space on disk")


def test_a_checkpoint_of_that_name_is_never_replaced(tmp_path: Path) -> None:
    """What is no teacher of this tool stays, and is told."""
    save_file({"w": torch.ones(2)}, tmp_path / "teacher_ema_0.1_step_1.safetensors")
    teacher = MeanTeacher(make_student(), snapshots=Snapshots(tmp_path, every=1, momentum=0.1))
    with pytest.raises(CkptEmaError, match="is no teacher that ckpt-ema wrote"):
        teacher.update()
    assert list(load_file(tmp_path / "teacher_ema_0.1_step_1.safetensors")) == ["w"]


def test_a_saved_teacher_does_not_take_a_snapshots_place(tmp_path: Path) -> None:
    """A reconstruction would lose it; another snapshot of that step replaces it."""
    teacher = MeanTeacher(make_student())
    teacher.update()
    path = teacher.save_snapshot(tmp_path, 1)
    before = path.read_bytes()
    with pytest.raises(CkptEmaError, match="is a snapshot, from which"):
        teacher.save(path)
    assert path.read_bytes() == before
    teacher.update()
    assert teacher.save_snapshot(tmp_path, 1).read_bytes() != before


# --- skipped steps, states --------------------------------------------------------------------------------------------


def test_after_a_skipped_step_no_response_is_claimed(tmp_path: Path) -> None:
    """Teacher and tracks leave the step out; a wrong response would be worse than none."""
    student = make_student()
    settings = Snapshots(tmp_path, every=4, momentum=0.1)
    teacher = MeanTeacher(student, momentum=0.1, interval=2, on_nonfinite="skip", snapshots=settings)
    path = []
    for step in walk(student, 8):
        if step == 6:
            healthy = student.scale.detach().clone()
            student.scale.data.fill_(math.nan)
        teacher.update()
        if step == 6:
            student.scale.data.copy_(healthy)
        else:
            path.append(clones(student))
    exact, broken = (metadata(tmp_path / f"teacher_ema_0.1_step_{step}.safetensors") for step in (4, 8))
    assert exact["response"] is not None
    assert (broken["response"], broken["skipped"], broken["updates"]) == (None, 1, 7)
    assert {6, 7}.isdisjoint(dict(broken["increments"]))
    expected = weighed(path, recurrence([0.1] * 7))
    assert_close(load_file(tmp_path / "teacher_ema_0.1_step_8.safetensors"), expected)
    assert metadata(teacher.save_snapshot(tmp_path, 8))["response"] is None


def test_a_track_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    """Nobody looked while training: the file would be worthless, and is told of."""
    student = make_student()
    teacher = MeanTeacher(student, snapshots=Snapshots(tmp_path, every=2))
    teacher.update()
    student.scale.data.fill_(math.nan)
    with pytest.raises(CkptEmaError, match=r"track power_0.05 holds a NaN or an infinity at step 2"):
        teacher.update()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("through", ["torch.save", "state file"])
@pytest.mark.parametrize("stop", [7, 41])
def test_a_resumed_run_writes_what_an_undisturbed_one_does(tmp_path: Path, stop: int, through: str) -> None:
    """Tensors, responses and increments, byte for byte; between two measured steps and among them."""
    settings: dict[str, Any] = {"every": 48, "sigma_rel": 0.1, "momentum": 0.1}
    student = make_student()
    teacher = MeanTeacher(student, snapshots=Snapshots(tmp_path / "whole", **settings))
    for step in walk(student, 48):
        teacher.update()
        if step == stop:
            weights = copy.deepcopy(student.state_dict())
            if through == "torch.save":
                torch.save(teacher.state_dict(), tmp_path / "state")
            else:
                write_state(tmp_path / "state", teacher.state_dict(), student)
    student = make_student()
    resumed = MeanTeacher(student, snapshots=Snapshots(tmp_path / "resumed", **settings))
    student.load_state_dict(weights)
    loaded = torch.load(tmp_path / "state", weights_only=True) if through == "torch.save" else None
    resumed.load_state_dict(read_state(tmp_path / "state", student) if loaded is None else loaded)
    for _ in walk(student, 48 - stop, first=stop + 1):
        resumed.update()
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "resumed" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "whole").iterdir())) == 2


def test_states_with_and_without_tracks(tmp_path: Path) -> None:
    """Tracks begin anew aloud, or end aloud; other tracks and other shapes change nothing."""
    student = make_student()
    plain = MeanTeacher(student)
    for _ in walk(student, 3):
        plain.update()
    teacher = MeanTeacher(student, snapshots=Snapshots(tmp_path, every=5))
    teacher.update()
    with pytest.warns(UserWarning, match="begin anew after step 3") as caught:
        teacher.load_state_dict(plain.state_dict())
    assert caught[0].filename == __file__
    for _ in walk(student, 2, first=4):
        teacher.update()
    record = metadata(tmp_path / "teacher_power_0.05_step_5.safetensors")
    assert (record["response"]["start"], record["response"]["end"]) == (3, 5)
    with pytest.warns(UserWarning, match="has snapshot tracks, which end here"):
        plain.load_state_dict(teacher.state_dict())
    other = MeanTeacher(student, snapshots=Snapshots(tmp_path, momentum=0.1))
    with pytest.raises(CkptEmaError) as raised:
        other.load_state_dict(teacher.state_dict())
    assert "has the snapshot tracks power_0.05, power_0.1, and here are ema_0.1" in str(raised.value)
    broken = teacher.state_dict()
    del broken["snapshots"]["increments"]
    with pytest.raises(CkptEmaError, match="a part of the snapshot tracks' state is missing"):
        other.load_state_dict(broken)
    assert other.num_steps == 0


def test_tracks_that_began_in_inference_mode_go_on_outside(tmp_path: Path) -> None:
    """Nothing is left behind that training cannot use."""
    student = make_student()
    with torch.inference_mode():
        teacher = MeanTeacher(student, snapshots=Snapshots(tmp_path, every=4))
        teacher.update()
        teacher.update()
    for _ in walk(student, 2, first=3):
        teacher.update()
    assert [step for step, _ in metadata(tmp_path / "teacher_power_0.1_step_4.safetensors")["increments"]] == [2, 3, 4]


# --- the teacher's own response ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("interval", "copies_at"), [(1, None), (3, None), (1, 0), (3, 6)])
def test_a_snapshot_of_the_teacher_says_how_it_depends_on_the_path(
    tmp_path: Path, interval: int, copies_at: int | None
) -> None:
    """Shifted to the step that the caller names; evaluated at each update it is the brute-force sum."""
    student = make_student()
    teacher = MeanTeacher(student, momentum=0.2, interval=interval)
    path = [clones(student)]
    if copies_at == 0:
        teacher.copy_student()
    for step in walk(student, 14):
        teacher.update()
        path.append(clones(student))
        if step == copies_at:
            teacher.copy_student()
    file = teacher.save_snapshot(tmp_path, 1014)
    start = interval if copies_at is None else copies_at
    end = 14 - 14 % interval
    assert read_response(metadata(file)["response"]) == Ema(0.2, 1000 + start, 1000 + end, interval)
    weights = recurrence([0.2] * ((end - start) // interval + 1))
    saved = load_file(file)
    expected = weighed(path[start : end + 1 : interval], weights)
    assert_close({name: saved[name] for name in expected}, expected)


def test_a_teacher_whose_past_is_not_known_claims_no_response(tmp_path: Path) -> None:
    """A kept teacher, a changed momentum, a copy between two updates, a counter that was set, a step too small."""
    student = make_student()

    def response(teacher: MeanTeacher, step: int = 100) -> Any:
        return metadata(teacher.save_snapshot(tmp_path, step))["response"]

    kept = MeanTeacher(student, make_student(), keep_teacher=True)
    kept.update()
    changed = MeanTeacher(student, momentum=0.1)
    changed.update()
    state = changed.state_dict()
    assert response(changed) is not None
    resumed = MeanTeacher(student, momentum=0.1)
    resumed.load_state_dict(state)
    assert response(resumed) == response(changed)
    edge = MeanTeacher(student, momentum=0.1)
    edge.load_state_dict(state)
    assert response(edge, 0) is not None
    edge.update()
    assert response(edge, 5) is None  # 5 steps of the caller's are one update
    gone_on = MeanTeacher(student, momentum=0.1)
    gone_on.load_state_dict(edge.state_dict())
    assert response(gone_on, 5) is None
    assert response(gone_on, 1) is not None
    other = MeanTeacher(student, momentum=0.2)
    with pytest.warns(UserWarning, match=r"made with momentum=0\.1"):
        other.load_state_dict(state)
    again = MeanTeacher(student, momentum=0.2)
    again.load_state_dict(other.state_dict())
    misaligned = MeanTeacher(student, interval=2)
    misaligned.update()
    misaligned.copy_student()
    jumped = MeanTeacher(student)
    jumped.update()
    jumped.num_steps = 50
    jumped.update()
    early = MeanTeacher(student)
    for _ in range(3):
        early.update()
    fresh = MeanTeacher(student)
    assert [response(each) for each in (kept, other, again, misaligned, jumped, fresh)] == [None] * 6
    assert response(early, 1) is None


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("response", [Ema(0.001, 1, 5000), Ema(0.5, 0, 30, 3), Power(16.97, 0, 9), Power(0.0, 7, 8)])
def test_a_response_survives_its_record(response: Any) -> None:
    """Through JSON, to the last digit."""
    assert read_response(json.loads(json.dumps(response_record(response)))) == response


good = {"kind": "ema", "momentum": 0.1, "interval": 1, "start": 1, "end": 5}
values = st.one_of(
    st.none(), st.booleans(), st.text(max_size=3), st.floats(), st.integers(), st.just(10**400), st.lists(st.integers())
)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "uniform"},
        {"momentum": 0},
        {"momentum": 1.0},
        {"momentum": float("nan")},
        {"momentum": True},
        {"momentum": "0.1"},
        {"interval": 0},
        {"interval": 1.0},
        {"start": 6},
        {"start": -1},
        {"start": 1.0},
        {"end": True},
        {"end": 1 << 60},
        {"kind": "power", "gamma": -1.0},
        {"kind": "power", "gamma": float("inf")},
        {"kind": "power", "gamma": 10**400},
        {"kind": "power", "gamma": 6.9, "start": 5},
        {"kind": ["power"]},
    ],
)
def test_a_malformed_record_is_no_response(change: dict[str, Any]) -> None:
    """Files come from anywhere: one wrong entry, and there is no response rather than a wrong one."""
    assert read_response(good) == Ema(0.1, 1, 5)
    assert read_response({**good, **change}) is None
    for key in ("kind", "momentum", "start", "end"):
        assert read_response({name: value for name, value in good.items() if name != key}) is None


@given(st.one_of(values, st.dictionaries(st.sampled_from([*good, "gamma"]), st.one_of(values, st.just("power")))))
def test_no_record_makes_the_reader_fail(record: Any) -> None:
    """Whatever JSON can hold gives a response, or None."""
    response = read_response(record)
    assert response is None or 0 <= response.start <= response.end


# --- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0, and must be a whole number from 1"),
        ({"every": 1.5}, "every is 1.5"),
        ({"keep": 0}, "keep is 0"),
        ({"sigma_rel": ()}, "without a track"),
        ({"sigma_rel": (0.1, 0.1)}, "two of the tracks are the same"),
        ({"momentum": 0.5, "half_life": 1}, "two of the tracks are the same: ema_0.5, ema_hl1"),
        ({"sigma_rel": 0.3}, "the relative width is 0.3"),
        ({"momentum": (0.1, 1.0)}, "must lie between 0 and 1"),
        ({"half_life": -3}, "must be a finite number of steps above 0"),
        ({"half_life": "3"}, "half_life is '3', and must be a number or several"),
        ({"momentum": [True]}, "must be a number or several"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"directory": ""}, "directory is ''"),
        ({"directory": None}, "directory is None"),
    ],
)
def test_misuse_is_refused(options: dict[str, Any], message: str) -> None:
    """Before training begins, with what to pass."""
    with pytest.raises(MisuseError, match=message):
        Snapshots(**{"directory": "runs", **options})


def test_what_is_no_snapshots_or_no_folder_is_refused(tmp_path: Path) -> None:
    """A plain path is a likely slip; a file in the folder's place is found now rather than after hours."""
    with pytest.raises(MisuseError, match=r"must be a ckpt_ema\.Snapshots"):
        MeanTeacher(make_student(), snapshots="runs")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(CkptEmaError, match="cannot create the folder"):
        MeanTeacher(make_student(), snapshots=Snapshots(tmp_path / "file"))


def test_without_a_word_two_power_averages_are_followed(tmp_path: Path) -> None:
    """Their files lie beside checkpoints, are left out of a fold, and are told by `inspect`."""
    assert [track.name for track in Snapshots("runs").tracks] == ["power_0.05", "power_0.1"]
    assert [track.name for track in Snapshots("runs", half_life=500.0).tracks] == ["ema_hl500"]
    student = make_student()
    teacher = MeanTeacher(student, snapshots=Snapshots(tmp_path / "a" / "b", every=2))
    for step in walk(student, 4):
        teacher.update()
        torch.save(student.state_dict(), tmp_path / "a" / "b" / f"step_{step}.pt")
    plan = ckpt_ema.plan(tmp_path / "a" / "b", tmp_path / "teacher.safetensors")
    assert [item.step for item in plan.checkpoints] == [1, 2, 3, 4]
    assert ("teacher_power_0.1_step_4.safetensors", "a teacher that ckpt-ema wrote") in plan.left_out
    assert ckpt_ema.inspect(tmp_path / "a/b/teacher_power_0.1_step_4.safetensors").step == 4


# --- many processes ---------------------------------------------------------------------------------------------------

RANK = """
import os, sys
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from ckpt_ema import MeanTeacher, MisuseError, Snapshots

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
student = nn.parallel.DistributedDataParallel(nn.Linear(3, 3))
teacher = MeanTeacher(student, snapshots=Snapshots(f"{folder}/of-{rank}", every=1, momentum=0.1))
teacher.update()
sharded = nn.Linear(4, 4)
fully_shard(sharded)
try:
    MeanTeacher(sharded, snapshots=Snapshots(f"{folder}/sharded"))
except MisuseError as error:
    assert "snapshots of a sharded student cannot be written" in str(error)
else:
    raise AssertionError("a sharded student was taken")
dist.barrier()
sys.stderr.flush()
os._exit(0)
"""


def test_of_several_ranks_the_first_writes_and_sharded_students_are_refused(tmp_path: Path) -> None:
    """Two real processes: replicas are written once, and no rank writes a part of a student for all of it."""
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    assert [path.name for path in (tmp_path / "of-0").iterdir()] == ["teacher_ema_0.1_step_1.safetensors"]
    assert not list((tmp_path / "of-1").iterdir())
    assert not (tmp_path / "sharded").exists()


@pytest.mark.gpu
def test_on_a_gpu_tracks_are_those_of_the_cpu(tmp_path: Path) -> None:
    """Also where the student moves there while it is followed; increments agree to rounding."""
    records = []
    for device in ("cpu", "cuda"):
        student = make_student(40)
        teacher = MeanTeacher(student, snapshots=Snapshots(tmp_path / device, every=20, momentum=0.1))
        for step in range(1, 21):
            next(walk(student, 1, first=step))
            teacher.update()
            if step == 10:
                student.to(device)
        records.append(metadata(tmp_path / device / "teacher_ema_0.1_step_20.safetensors"))
    name = "teacher_ema_0.1_step_20.safetensors"
    assert_same_bits(load_file(tmp_path / "cuda" / name), load_file(tmp_path / "cpu" / name))
    for one, other in zip(*(record["increments"] for record in records), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.gpu
def test_an_update_with_tracks_does_not_wait_for_the_gpu(tmp_path: Path) -> None:
    """Between two files no number is read back."""
    student = make_student(40).cuda()
    teacher = MeanTeacher(student, snapshots=Snapshots(tmp_path, every=1000))
    teacher.update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(30):
            teacher.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
