"""Momentum in steps and other profiles: closed forms against the recurrence run step by step, and real folds."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ckpt_ema
from ckpt_ema.averages.profiles import (
    COPY,
    Profile,
    Update,
    checkpoint_coefficients,
    coefficients_of,
    step_coefficients,
    step_updates,
    updates_of,
)
from ckpt_ema.averages.quadrature import NUM_NODES, nodes_between, sum_rule
from ckpt_ema.averages.responses import Ema, Power, Uniform, gamma_of, half_life_of, momentum_of_half_life, tail_at
from ckpt_ema.errors import CkptEmaError, MisuseError
from tests.conftest import Outcome, assert_same_bits, hook_teacher, make_student, quiet_fold, save_students

Cli = Callable[..., Outcome]

STEPS = st.lists(st.integers(1, 90), min_size=1, max_size=7).flatmap(
    lambda gaps: st.integers(0, 50).map(lambda start: list(itertools.accumulate(gaps, initial=start)))
)


def path_weights(steps: Sequence[int], between: str) -> list[list[float]]:
    """The student after each step from the first to the last, as weights of the stored ones."""
    path = []
    for step in range(steps[0], steps[-1] + 1):
        newer = next(i for i, stored in enumerate(steps) if stored >= step)
        weights = [0.0] * len(steps)
        if between == "hold" or steps[newer] == step:
            weights[newer] = 1.0
        else:
            share = (step - steps[newer - 1]) / (steps[newer] - steps[newer - 1])
            weights[newer - 1], weights[newer] = 1 - share, share
        path.append(weights)
    return path


def run_recurrence(path: list[list[float]], momentum_at: Callable[[int], float]) -> list[float]:
    """The teacher's weights after the recurrence ran over the whole path; the first is copied."""
    teacher = path[0]
    for count, student in enumerate(path[1:], start=1):
        momentum = momentum_at(count)
        teacher = [(1 - momentum) * t + momentum * s for t, s in zip(teacher, student, strict=True)]
    return teacher


@pytest.mark.parametrize("between", ["linear", "hold"])
@given(steps=STEPS, momentum=st.sampled_from([1e-6, 0.001, 0.03, 0.5, 0.99]), interval=st.integers(1, 13))
def test_shares_are_those_of_the_hook_run_step_by_step(
    between: Any, steps: list[int], momentum: float, interval: int
) -> None:
    """The closed forms are the hook's own recurrence over a student that moves as `between` says."""
    expected = run_recurrence(path_weights(steps, between), lambda count: momentum if count % interval == 0 else 0.0)
    updates = step_updates(Profile("ema", momentum), steps, interval=interval, between=between)
    assert coefficients_of(updates) == pytest.approx(expected, rel=1e-7, abs=1e-11)


@example(steps=[0, 21], sigma_rel=0.03)
@given(steps=STEPS, sigma_rel=st.sampled_from([0.03, 0.1, 0.25, 0.288]))
def test_power_and_uniform_shares_are_the_recurrences_too(steps: list[int], sigma_rel: float) -> None:
    """The power profile is EDM2's (1 - 1/t) ** (gamma + 1) from step 0 on, the uniform one a mean over steps."""
    exponent = gamma_of(sigma_rel) + 1
    path = path_weights(steps, "linear")
    # Before the first checkpoint the student is taken to be that one.
    from_zero = [path[0]] * steps[0] + path
    expected = run_recurrence(from_zero, lambda count: 1 - (1 - 1 / count) ** exponent)
    updates = step_updates(Profile("power", sigma_rel=sigma_rel), steps)
    assert coefficients_of(updates) == pytest.approx(expected, rel=1e-7, abs=1e-11)
    count = len(path) - 1
    mean = [sum(weights[i] for weights in path[1:]) / count for i in range(len(steps))]
    assert coefficients_of(step_updates(Profile("uniform"), steps)) == pytest.approx(mean, rel=1e-9, abs=1e-12)


def test_the_width_of_a_power_profile_is_what_it_is_called() -> None:
    """sigma_rel is the standard deviation of p(t) ~ t**gamma on [0, 1]; 0.05 and 0.10 are EDM2's 16.97 and 6.94."""
    assert (round(gamma_of(0.05), 2), round(gamma_of(0.1), 2)) == (16.97, 6.94)
    for sigma_rel in (0.01, 0.05, 0.2, 0.288):
        gamma = gamma_of(sigma_rel)
        points = [(i + 0.5) / 20000 for i in range(20000)]
        weights = [point**gamma for point in points]
        mean = math.fsum(w * p for w, p in zip(weights, points, strict=True)) / math.fsum(weights)
        square = math.fsum(w * (p - mean) ** 2 for w, p in zip(weights, points, strict=True)) / math.fsum(weights)
        assert math.sqrt(square) == pytest.approx(sigma_rel, rel=1e-3)
    for bad in (0.0, 0.2887, 1.0, math.nan):
        with pytest.raises(MisuseError, match="relative width"):
            gamma_of(bad)


@given(count=st.integers(1, 5000), degree=st.integers(0, 2 * NUM_NODES - 1))
def test_a_sum_rule_sums_polynomials_exactly(count: int, degree: int) -> None:
    """Up to degree 2 * NUM_NODES - 1, over any number of steps."""
    exact = sum(step**degree for step in range(1, count + 1))
    assert math.fsum(weight * node**degree for node, weight in sum_rule(count)) == pytest.approx(exact, rel=1e-9)


@given(begin=st.integers(0, 1000), length=st.integers(1, 20000), momentum=st.floats(1e-6, 0.9))
def test_nodes_sum_what_decays_from_the_end(begin: int, length: int, momentum: float) -> None:
    """Few nodes, and the sum of an EMA's tails over all steps to nine digits."""
    response = Ema(momentum, begin, begin + length)
    nodes = list(nodes_between(begin, begin + length))
    exact = length - (1 - momentum) * -math.expm1(length * math.log1p(-momentum)) / momentum
    assert math.fsum(weight * tail_at(response, node) for node, weight in nodes) == pytest.approx(exact, rel=1e-8)
    assert len(nodes) <= 2 * NUM_NODES * (2 + math.log2(length))


def test_minus_sqrt_is_wsms_merge() -> None:
    """The shares of averaging by 1 - sqrt: of five, the oldest has most."""
    assert [round(share, 3) for share in checkpoint_coefficients("minus-sqrt", 5)] == [0.447, 0.185, 0.142, 0.12, 0.106]


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=9))
def test_any_shares_that_sum_to_one_have_a_recurrence(given_shares: list[float]) -> None:
    """Also negative and vanishing ones."""
    shares = [*given_shares, 1 - math.fsum(given_shares)]
    assert coefficients_of(updates_of(shares)) == pytest.approx(shares, abs=1e-12)


def test_half_life_is_what_it_is_called() -> None:
    """After so many steps half of a share is left."""
    for half_life in (0.5, 10, 693.147, 1e7):
        momentum = momentum_of_half_life(half_life)
        assert (1 - momentum) ** half_life == pytest.approx(0.5, rel=1e-8)
        assert half_life_of(momentum) == pytest.approx(half_life, rel=1e-6)
    assert momentum_of_half_life(100, interval=10) == pytest.approx(1 - 0.5 ** (1 / 10))


def test_gaps_of_one_interval_are_the_hook_bit_for_bit() -> None:
    """Checkpoints at every update: the very numbers of the hook, not merely near them."""
    steps = list(range(30, 100, 10))
    updates = step_updates(Profile("ema", 0.3), steps, interval=10)
    assert updates == [COPY] + [Update(0.7, 0.3)] * (len(steps) - 1)


@pytest.mark.parametrize("options", [{"momentum": 0.2, "per": "step", "interval": 100}, {"half_life": 310.6283719505}])
def test_per_step_and_per_checkpoint_meet(run: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """With the interval as the gap the fold per step is the fold per checkpoint; a half-life says it in steps."""
    report = quiet_fold(run, tmp_path / "t.safetensors", **options, between="hold")
    students = [make_student(seed) for seed in range(1, 6)]
    expected = hook_teacher(students, 0.2, {"bn.running_mean"})
    found = load_file(report.output)
    if "interval" in options:
        assert_same_bits(found, expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_fold_per_step_is_the_online_teacher_of_a_straight_path(tmp_path: Path) -> None:
    """MeanTeacher beside a student that moves in straight lines, and the fold of every 25th step of it."""
    model = torch.nn.Linear(7, 3)
    corners = [torch.randn(3, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    teacher = ckpt_ema.MeanTeacher(model, momentum=0.02)
    with torch.no_grad():
        for step in range(101):
            i, rest = divmod(step, 25)
            model.weight.copy_(torch.lerp(corners[i], corners[min(i + 1, 4)], rest / 25))
            teacher.update()
            if not rest:
                save_file(model.state_dict(), tmp_path / f"step_{step}.safetensors")
    report = quiet_fold(tmp_path, None, momentum=0.02, per="step")
    torch.testing.assert_close(load_file(report.output)["weight"], teacher.tensors()["weight"], rtol=1e-5, atol=1e-6)


def test_a_student_without_a_share_is_not_read(tmp_path: Path) -> None:
    """A half-life of 10 steps needs only the end of a run of 3000, and gets by without the rest."""
    save_students(tmp_path / "run", 30)
    plan = ckpt_ema.plan(tmp_path / "run", half_life=10)
    assert [item.step for item in plan.checkpoints] == [2600, 2700, 2800, 2900, 3000]
    assert ("step_100.safetensors", "its coefficient would be below 1e-12") in plan.left_out
    assert sum(item.coefficient for item in plan.checkpoints) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("name", ["epoch_{}.safetensors", "model_{}.safetensors"])
def test_epochs_are_steps_when_their_length_is_known(tmp_path: Path, name: str, cli: Cli) -> None:
    """A run of epochs, and one whose bare numbers go up by one, ask for `--steps-per-epoch`."""
    for epoch in range(1, 5):
        save_file(make_student(epoch), tmp_path / name.format(epoch))
    outcome = cli("plan", tmp_path, "--half-life", 100)
    assert outcome.code == 1
    assert ("epochs only (1 to 4)" if "epoch" in name else "seem to count epochs or saves") in outcome.stderr
    assert "hint: pass `--steps-per-epoch N`" in outcome.stderr
    plan = ckpt_ema.plan(tmp_path, half_life=100, steps_per_epoch=50)
    expected = step_updates(Profile("ema", half_life=100), [50, 100, 150, 200])
    assert plan.teachers[0].updates == tuple(expected)


def test_bare_numbers_far_apart_are_steps(tmp_path: Path, cli: Cli) -> None:
    """Numbers that say nothing else are taken for steps, aloud; those that go up by one where that is said."""
    for number in (500, 501, 502, 1000):
        save_file(make_student(number), tmp_path / f"model_{number}.safetensors")
    assert "`model_501.safetensors` comes next after `model_500" in cli("plan", tmp_path, "--half-life", 100).stderr
    planned = ckpt_ema.plan(tmp_path, half_life=100, steps_per_epoch=1)
    assert planned.teachers[0].updates == tuple(step_updates(Profile("ema", half_life=100), [500, 501, 502, 1000]))
    (tmp_path / "model_501.safetensors").unlink()
    (tmp_path / "model_502.safetensors").unlink()
    outcome = cli("plan", tmp_path, "--half-life", 100)
    assert "the numbers in the names (500 to 1000) are taken for training steps" in outcome.stdout


def test_one_save_right_after_another_is_no_count_of_saves(tmp_path: Path) -> None:
    """`model_3001` at the end of a run that saved every 1000 steps."""
    for number in (1000, 2000, 3000, 3001):
        save_file(make_student(number), tmp_path / f"model_{number}.safetensors")
    assert [item.step for item in ckpt_ema.plan(tmp_path, half_life=500).checkpoints] == [1000, 2000, 3000, 3001]


def test_saves_that_come_one_by_one_are_refused_as_together(tmp_path: Path) -> None:
    """A teacher of `model_1` alone, which nothing is said against, is not continued per step with `model_2`."""
    run, output = tmp_path / "run", tmp_path / "t.safetensors"
    run.mkdir()
    save_file(make_student(1), run / "model_1.safetensors")
    quiet_fold(run, output, half_life=5)
    save_file(make_student(2), run / "model_2.safetensors")
    with pytest.raises(CkptEmaError, match="seem to count epochs or saves") as caught:
        ckpt_ema.plan(run, tmp_path / "u.safetensors", init=output)
    assert "--per step --momentum M --steps-per-epoch N" in str(caught.value.hint)
    quiet_fold(run, output, half_life=5, steps_per_epoch=1, overwrite=True)
    assert all(check.is_ok for check in ckpt_ema.verify(output, run).checks)


def test_steps_that_are_not_known_or_do_not_ascend_are_named(run: Path) -> None:
    """Per step needs every step once, in order."""
    steps = [run / f"step_{step}.safetensors" for step in (200, 100, 300)]
    with pytest.raises(CkptEmaError, match=r"`step_100.safetensors` \(step 100\) is folded after `step_200"):
        ckpt_ema.plan(steps, per="step")
    (run / "step_100.safetensors").rename(run / "early.safetensors")
    with pytest.raises(CkptEmaError, match="training steps are needed") as caught:
        ckpt_ema.plan([run / "early.safetensors", steps[0]], per="step")
    assert caught.value.details == ("early.safetensors", "step_200.safetensors")


def test_an_initial_teacher_knows_its_step(run: Path, tmp_path: Path) -> None:
    """Held between checkpoints, a fold in two parts is the fold at once, bit for bit in float32."""
    options: dict[str, Any] = {"momentum": 0.004, "per": "step", "between": "hold"}
    at_once = quiet_fold(run, tmp_path / "all.safetensors", **options)
    first = quiet_fold(run, tmp_path / "first.safetensors", until_step=300, **options)
    second = quiet_fold(run, tmp_path / "second.safetensors", init=first.output, from_step=301, **options)
    assert_same_bits(load_file(second.output), load_file(at_once.output))
    foreign = tmp_path / "other"
    save_students(foreign, 2, suffix=".pt")
    with pytest.raises(CkptEmaError, match="initial teacher is of step 300") as caught:
        ckpt_ema.plan(foreign, init=first.output, **options)
    assert caught.value.hint == "fold the newer ones: `--from 301`"
    save_file({name: make_student(0)[name] for name in make_student(0)}, tmp_path / "nobody.safetensors")
    with pytest.raises(MisuseError, match="does not say of which step it is"):
        ckpt_ema.plan(run, init=tmp_path / "nobody.safetensors", **options)


@pytest.mark.parametrize("name", ["epoch_{}", "model_{}"])
def test_an_initial_teacher_of_epochs_knows_its_step(tmp_path: Path, name: str, cli: Cli) -> None:
    """100 steps lie between epochs 4 and 6, whatever the names call them: half a half-life of 100."""
    for number, student in enumerate(map(make_student, range(1, 7)), start=1):
        save_file(student, tmp_path / f"{name.format(number)}.safetensors")
    options: dict[str, Any] = {"half_life": 100, "steps_per_epoch": 50, "announce": lambda plan: None}
    part = ckpt_ema.fold(tmp_path, tmp_path / "part.safetensors", until_step=4, **options)
    rest = ckpt_ema.fold(tmp_path, tmp_path / "rest.safetensors", init=part.output, from_step=5, **options)
    assert rest.plan.first_share == pytest.approx(0.5)
    again = cli("plan", tmp_path, "--half-life", 100, "--steps-per-epoch", 50, "--init", part.output)
    assert again.code == 0, again.stderr
    assert "part.safetensors` has it" in again.stdout


def test_a_folder_of_a_model_is_an_initial_teacher(tmp_path: Path) -> None:
    """As the fold of a Hugging Face run writes it."""
    for number in (1, 2, 3):
        folder = tmp_path / "run" / f"checkpoint-{number}00"
        folder.mkdir(parents=True)
        save_file(make_student(number), folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    first = quiet_fold(tmp_path / "run", tmp_path / "t", half_life=100, until_step=200)
    planned = ckpt_ema.plan(tmp_path / "run", tmp_path / "u", half_life=100, init=first.output, from_step=201)
    assert planned.first_share == pytest.approx(0.5)
    with pytest.raises(MisuseError, match="nowhere` does not exist"):
        ckpt_ema.plan(tmp_path / "run", half_life=100, init=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"profile": "uniform"}, [0.2] * 5),
        ({"profile": "uniform", "per": "step"}, [99 / 800, 0.25, 0.25, 0.25, 101 / 800]),
        ({"profile": "minus-sqrt"}, [0.4472, 0.1852, 0.1421, 0.1198, 0.1056]),
        ({"coefficients": {"step_100.safetensors": -0.5, "step_400.safetensors": 1.5}}, [-0.5, 0, 0, 1.5, 0]),
    ],
)
def test_profiles_write_their_shares(run: Path, tmp_path: Path, options: dict[str, Any], expected: list[float]) -> None:
    """The teacher is the sum of the students times the shares, worked out here in float64."""
    students = [make_student(seed) for seed in range(1, 6)]
    report = quiet_fold(run, tmp_path / "t.safetensors", **options)
    found = load_file(report.output)
    for name in ("fc.weight", "fc.bias", "bn.weight"):
        total = sum(share * student[name].double() for share, student in zip(expected, students, strict=True))
        torch.testing.assert_close(found[name].double(), total, rtol=2e-4, atol=2e-4)
    newest = 3 if "coefficients" in options else 4
    assert torch.equal(found["bn.running_mean"], students[newest]["bn.running_mean"])


def test_a_printed_plan_is_a_file_of_coefficients(run: Path, tmp_path: Path, cli: Cli) -> None:
    """`plan --json` of one command folds the same teacher in another."""
    (tmp_path / "plan.json").write_text(cli("plan", run, "--half-life", 150, "--json").stdout)
    expected = quiet_fold(run, tmp_path / "a.safetensors", half_life=150)
    outcome = cli("fold", run, "--coefficients", "plan.json", "-o", "b.safetensors")
    assert outcome.code == 0, outcome.stderr
    found = load_file(tmp_path / "b.safetensors")
    for name, tensor in load_file(expected.output).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing", "is no JSON"),
        ("[1, 2]", "must map names of checkpoints"),
        ("{}", "must map names of checkpoints"),
        ('{"step_100.safetensors": "much"}', "the coefficient of `step_100.safetensors` is 'much'"),
        ('{"step_100.safetensors": 1%s}' % ("0" * 400), "must be a number below"),
        ('{"step_100.safetensors": NaN}', "'nan', and must be a number"),
        ('{"step_100.safetensors": 0.7}', "sum to 0.7, and must sum to 1"),
        ('{"step_101.safetensors": 1}', "1 of 1 coefficients belong to no checkpoint"),
        ("[" * 100000, "is no JSON"),
        ('{"step_100.safetensors": 2, "step_100.safetensors": 1}', "`step_100.safetensors` is given twice"),
        ('{"checkpoints": [{"name": [1], "coefficient": 1}]}', "must map names of checkpoints"),
        ('{"checkpoints": [], "averages": [{}]}', "is a plan of averages beside the checkpoints"),
        (None, "cannot read"),
    ],
)
def test_coefficients_that_make_no_sense_are_refused(run: Path, tmp_path: Path, content: str, message: str) -> None:
    """Before a tensor is read, in words."""
    path = tmp_path / "shares.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CkptEmaError, match=message):
        ckpt_ema.plan(run, coefficients=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.1, "half_life": 10}, "`--momentum` and `--half-life` say different things"),
        ({"half_life": 0}, "half-life is 0"),
        ({"half_life": math.nan}, "half-life is nan"),
        ({"per": "step", "steps_per_epoch": -5}, "`--steps-per-epoch` is -5"),
        ({"profile": "power", "sigma_rel": 0.1, "interval": 5}, "`--interval` has no meaning"),
        ({"profile": "power", "sigma_rel": 1e-200}, "relative width is 1e-200"),
        ({"half_life": [10, 10]}, "`--half-life 10.0` is given twice"),
        ({"half_life": 10, "per": "checkpoint"}, "counts steps, not checkpoints"),
        ({"profile": "power"}, "needs a width"),
        ({"sigma_rel": 0.1}, "width of a power profile"),
        ({"profile": "power", "sigma_rel": 0.3}, "relative width is 0.3"),
        ({"profile": "uniform", "momentum": 0.1}, "has no momentum"),
        ({"profile": "minus-sqrt", "per": "step"}, "counts checkpoints, not steps"),
        ({"coefficients": {}, "per": "step"}, "counts checkpoints, not steps"),
        ({"between": "hold"}, "`--between` has no meaning where checkpoints are counted"),
        ({"steps_per_epoch": 5}, "`--steps-per-epoch` has no meaning"),
        ({"steps_per_epoch": 5, "per": "step"}, "the checkpoints know their steps"),
        ({"per": "batch"}, "must be one of checkpoint, step"),
        ({"profile": "uniform", "init": "t.safetensors"}, "continues an exponential moving average only"),
    ],
)
def test_options_that_contradict_each_other_are_misuse(run: Path, options: dict[str, Any], message: str) -> None:
    """Each says which two, or which value."""
    with pytest.raises(MisuseError, match=message):
        ckpt_ema.plan(run, **options)


def test_several_half_lives_make_as_many_teachers(run: Path, tmp_path: Path, cli: Cli) -> None:
    """One pass; each file is named by its half-life, says so inside, and is what a fold of its own writes."""
    outcome = cli("fold", run, "--half-life", 100, "--half-life", 2.5e3)
    assert outcome.stdout.split() == [str(run / "teacher-100.safetensors"), str(run / "teacher-2500.safetensors")]
    alone = quiet_fold(run, tmp_path / "alone.safetensors", half_life=100)
    assert_same_bits(load_file(run / "teacher-100.safetensors"), load_file(alone.output))
    inspected = cli("inspect", run / "teacher-2500.safetensors").stdout
    assert re.search(r"^half-life +2500.0 steps, interval 1$", inspected, re.MULTILINE)
    record = json.loads(cli("plan", run, "--half-life", 100, "--json").stdout)
    assert (record["profile"], record["half_life"], record["per"], record["between"]) == (
        "ema",
        100.0,
        "step",
        "linear",
    )


@pytest.mark.parametrize("half_life", [1e-9, 0.01, 1e18])
def test_half_lives_beyond_all_measure_are_no_traceback(run: Path, half_life: float) -> None:
    """The newest student alone, or the first."""
    plan = ckpt_ema.plan(run, half_life=half_life)
    assert [item.step for item in plan.checkpoints] == ([100] if half_life > 1 else [500])


def test_half_lives_next_to_each_other_have_files_of_their_own(run: Path, tmp_path: Path) -> None:
    """No name is rounded until it is another's."""
    plan = ckpt_ema.plan(run, tmp_path / "t-{half_life}.safetensors", half_life=[1000000, 1000001, 10.00001])
    assert [item.output.name for item in plan.teachers] == [
        "t-1000000.safetensors",
        "t-1000001.safetensors",
        "t-10.00001.safetensors",
    ]
    with pytest.raises(MisuseError, match=r"are told apart by \{half_life\}"):
        ckpt_ema.plan(run, tmp_path / "t-{momentum}.safetensors", half_life=10)


def test_a_run_too_short_for_its_half_life_is_warned_of(run: Path, cli: Cli) -> None:
    """And the number in the warning mends it."""
    outcome = cli("plan", run, "--per", "step", "--momentum", 0.0001)
    assert "keeps 96.6% of the teacher: half of it is forgotten in 6,931 steps" in outcome.stderr
    half_life = re.search(r"`--half-life (\d+)`", outcome.stderr)
    assert half_life is not None
    assert cli("plan", run, "--half-life", half_life[1]).stderr == ""


def test_responses_agree_with_the_shares_of_a_checkpoint_at_every_step() -> None:
    """Nothing lies between such checkpoints: the shares are the responses' own weights, whatever is assumed."""
    steps = list(range(3, 40))
    for response in (Ema(0.1, 3, 39), Power(gamma_of(0.1), 3, 39), Uniform(3, 39)):
        linear, hold = (step_coefficients(response, steps, between) for between in ("linear", "hold"))
        assert linear == pytest.approx(hold, abs=1e-12)
        assert sum(linear) == pytest.approx(1, rel=1e-12)
