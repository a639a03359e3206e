"""Teachers after the fact: the solver against brute force, and reconstructions from real files against the real EMA."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ema_pytorch import PostHocEMA
from ema_pytorch.post_hoc_ema import KarrasEMA
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckpt_ema
from ckpt_ema.averages import solver
from ckpt_ema.averages.profiles import Profile, step_coefficients
from ckpt_ema.averages.responses import (
    Ema,
    Impulse,
    Power,
    Response,
    SteppedPower,
    Uniform,
    declared_response,
    gamma_of,
    tail_at,
)
from ckpt_ema.averages.solver import EVEN, IDLE, Item, Variance, interpolated, solve
from ckpt_ema.errors import CkptEmaError, MisuseError
from tests.conftest import Outcome

Cli = Callable[..., Outcome]
STEPS = 400
SIZE = 30000


def jumps(response: Ema | SteppedPower, step: int) -> float:
    """The tail sum of an average with an interval, from its updates after `step` and later."""
    every = response.interval
    updates = [at for at in range(response.start + every, response.end + 1, every) if at >= step]
    if isinstance(response, Ema):
        kept = (1 - response.momentum) ** len(updates)
    else:
        kept = math.prod((1 - 1 / (at + 1)) ** (response.gamma + 1) for at in updates)
    return 1.0 if step <= response.start else 1 - kept


def exact_tail(response: Response, step: int) -> float:
    """P(step), with every jump."""
    if isinstance(response, Ema | SteppedPower) and response.interval > 1:
        return jumps(response, step)
    return tail_at(response, step)


def brute_force(items: Sequence[Response], target: Response, v: Callable[[float], float]) -> tuple[float, float]:
    """The least sum over every step of v D**2 under sum c = 1, and the same of the nearest student alone."""
    last = max(each.end for each in (*items, target))
    steps = range(1, last + 1)
    weights = torch.tensor([v(step) for step in steps], dtype=torch.float64).sqrt()[:, None]
    tails = torch.tensor([[exact_tail(each, step) for each in items] for step in steps], dtype=torch.float64) * weights
    wanted = torch.tensor([[exact_tail(target, step)] for step in steps], dtype=torch.float64) * weights
    base = tails[:, -1:]
    found = torch.linalg.lstsq(tails[:, :-1] - base, wanted - base, driver="gelsd").solution
    least = float(((tails[:, :-1] - base) @ found + base - wanted).square().sum())
    students = [i for i, item in enumerate(items) if isinstance(item, Impulse)] or list(range(len(items)))
    return least, min(float((tails[:, i] - wanted[:, 0]).square().sum()) for i in students)


def objective(items: Sequence[Response], coefficients: Sequence[float], target: Response, v: Any) -> float:
    """The sum over every step of v D**2, one step at a time."""
    last = max(each.end for each in (*items, target))
    return math.fsum(
        v(step)
        * (
            math.fsum(c * exact_tail(item, step) for c, item in zip(coefficients, items, strict=True))
            - exact_tail(target, step)
        )
        ** 2
        for step in range(1, last + 1)
    )


@st.composite
def stored(draw: st.DrawFn) -> list[Response]:
    """Students at random steps, and a few snapshots of every kind."""
    steps = sorted(draw(st.sets(st.integers(1, 300), min_size=2, max_size=6)))
    items: list[Response] = [Impulse(step) for step in (0, *steps)]
    for end in draw(st.lists(st.sampled_from(steps), max_size=4, unique=True)):
        kind = draw(st.sampled_from(["power", "ema", "uniform", "jumps", "ema-pytorch"]))
        if kind == "power":
            items.append(Power(gamma_of(draw(st.sampled_from([0.05, 0.1, 0.2]))), 0, end))
        elif kind == "ema":
            items.append(Ema(draw(st.sampled_from([0.002, 0.02, 0.2])), 0, end))
        elif kind == "jumps":
            items.append(Profile("ema", 0.2).response(0, end, draw(st.integers(2, 40))))
        elif kind == "ema-pytorch":
            text = f"power:{draw(st.sampled_from([0.05, 0.2]))}:{draw(st.sampled_from([1, 3, 10]))}"
            items.append(declared_response("0.1.pt", text, end))
        else:
            items.append(Uniform(0, end))
    return items


@given(
    items=stored(),
    profile=st.sampled_from([*(Profile("ema", m) for m in (0.003, 0.05, 0.3, 0.9)), Profile("uniform")]),
    interval=st.sampled_from([1, 1, 2, 7, 10, 100, 500]),
    falls=st.booleans(),
)
def test_the_solution_is_the_least_that_brute_force_finds(
    items: list[Response], profile: Profile, interval: int, falls: bool
) -> None:
    """Few nodes find what a sum over every step finds, to a hundredth; and never worse than the nearest student."""
    end = max(item.end for item in items)
    target = profile.response(0, end, interval)
    variance = Variance(lambda step: math.exp(-step / 100), "falling") if falls else EVEN
    [solution] = solve([Item(item) for item in items], [target], variance)
    least, nearest = brute_force(items, target, variance.at)
    reached = objective(items, solution.coefficients, target, variance.at)
    assert math.fsum(solution.coefficients) == pytest.approx(1, abs=1e-9)
    assert reached <= least * 1.01 + nearest * 1e-9
    wanted = math.sqrt(reached / nearest) if nearest else 0.0
    assert solution.predicted_error == pytest.approx(wanted, rel=1e-2, abs=1e-4)
    assert solution.predicted_error <= 1


@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_of_many_jumps_those_at_the_end_are_exact(momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """More jumps than are taken one by one: the rest falls smoothly, and what that costs is in the prediction."""
    monkeypatch.setattr(solver, "MAX_JUMPS", 12)
    students = (0, 150, 301, 433, 500, 586, 594)  # off the interval's grid
    items: list[Response] = [*map(Impulse, students), Power(gamma_of(0.1), 0, 600), Ema(0.02, 0, 600)]
    target = Ema(momentum, 0, 600, 10)
    [solution] = solve([Item(item) for item in items], [target])
    least, nearest = brute_force(items, target, EVEN.at)
    reached = objective(items, solution.coefficients, target, EVEN.at)
    assert reached <= least * 1.02
    assert solution.predicted_error == pytest.approx(math.sqrt(reached / nearest), rel=0.02)


@pytest.mark.parametrize("every", [1, 3, 10])
def test_the_response_of_ema_pytorchs_power_averages_is_theirs(every: int) -> None:
    """One student after another marks its own place: the real module's weights, to the last digits."""
    model = torch.nn.Linear(1, 121, bias=False, dtype=torch.float64)
    average = KarrasEMA(model, sigma_rel=0.12, update_every=every)
    for step in range(1, 101):
        with torch.no_grad():
            model.weight.zero_()[step] = 1
        average.update()
    weights = average.ema_model.weight.detach()[:, 0].tolist()
    response = declared_response("0.100.pt", f"power:0.12:{every}", 100)
    assert isinstance(response, SteppedPower)
    for step in range(2, 101):
        assert jumps(response, step) == pytest.approx(math.fsum(weights[step:]), abs=1e-12)
    numbers = torch.arange(1, (response.end - 1) // every + 1, dtype=torch.float64)
    expected = [jumps(response, 1 + every * int(number)) for number in numbers]
    assert response.tail_before(numbers).tolist() == pytest.approx(expected, abs=1e-11)


def test_an_average_updated_now_and_then_ends_with_its_last_update() -> None:
    """A file of step 105 of an EMA that moves every 10 steps holds what step 100 left."""
    assert declared_response("ema.pt", "ema:0.3:10", 105) == Ema(0.3, 0, 100, 10)
    assert declared_response("0.105.pt", "power:0.1:10", 105) == SteppedPower(gamma_of(0.1), 101, 10)


@given(
    gaps=st.lists(st.integers(1, 5000), min_size=1, max_size=8),
    momentum=st.sampled_from([1e-4, 0.003, 0.1]),
)
@example(gaps=[1, 1, 146, 161, 3523], momentum=0.003)  # four of them together have twice as much
def test_students_alone_are_joined_by_straight_lines(gaps: list[int], momentum: float) -> None:
    """Without snapshots the solution is the fold per step."""
    steps = [0]
    for gap in gaps:
        steps.append(steps[-1] + gap)
    target = Ema(momentum, 0, steps[-1])
    [solution] = solve([Item(Impulse(step)) for step in steps], [target])
    expected = step_coefficients(target, steps, "linear")
    # Shares that no teacher shows are left out, and go to the others.
    left_out = [share for share, found in zip(expected, solution.coefficients, strict=True) if not found]
    assert max(left_out, default=0.0) <= 1.001 * IDLE[0]
    assert solution.coefficients == pytest.approx(expected, abs=sum(left_out) + 1e-8)


def test_what_is_stored_is_found() -> None:
    """The wanted teacher is among the files: it alone, and nothing is expected to be missing."""
    items = [Item(Impulse(step)) for step in (0, 100, 200)] + [Item(Ema(0.01, 0, 200)), Item(Ema(0.05, 0, 200))]
    [solution] = solve(items, [Ema(0.01, 0, 200)])
    assert solution.coefficients == pytest.approx([0, 0, 0, 1, 0], abs=1e-9)
    assert solution.predicted_error < 1e-7
    [student] = solve(items, [Impulse(100)])
    assert (student.coefficients, student.predicted_error) == ((0, 1, 0, 0, 0), 0)


def test_an_interval_in_whole_units_is_exact() -> None:
    """Updates every 10 steps, all stored at multiples of these, are updates at every step of a tenth of the time."""
    slow = [Item(Impulse(step)) for step in (0, 500, 1000)] + [Item(Ema(0.02, 0, 1000, 10))]
    fast = [Item(Impulse(step)) for step in (0, 50, 100)] + [Item(Ema(0.02, 0, 100))]
    [a], [b] = solve(slow, [Ema(0.05, 0, 1000, 10)]), solve(fast, [Ema(0.05, 0, 100)])
    assert a.coefficients == pytest.approx(b.coefficients, abs=1e-12)
    assert a.predicted_error == pytest.approx(b.predicted_error, rel=1e-9)


def test_coarse_files_are_not_amplified() -> None:
    """Of bfloat16 files less is asked than of float32 ones: rounding would cost more than it brings."""
    responses: list[Response] = [Impulse(step) for step in range(0, 10001, 1000)]
    responses += [Power(gamma_of(sigma), 0, end) for sigma in (0.05, 0.1) for end in range(1000, 10001, 1000)]
    target = Ema(0.01, 0, 10000)
    [fine] = solve([Item(each, 2.0**-24) for each in responses], [target])
    [coarse] = solve([Item(each, 2.0**-8) for each in responses], [target])
    assert sum(map(abs, coarse.coefficients)) < sum(map(abs, fine.coefficients))
    assert coarse.predicted_error > fine.predicted_error


# --- real files --------------------------------------------------------------------------------------------------


class Walk:
    """A student whose steps are unrelated, everything that follows it, and the files it leaves."""

    def __init__(self, run: Path, scale: Callable[[int], float], *, every: int = 100, is_coarse: bool = False) -> None:
        """Students and two power snapshots every `every` steps; float64 EMAs of momenta 0.01 and 0.05 beside."""
        run.mkdir()
        generator = torch.Generator().manual_seed(0)
        self.student = torch.randn(SIZE, generator=generator, dtype=torch.float64) * 0.01
        self.emas = {momentum: self.student.clone() for momentum in (0.01, 0.05)}
        tracks = {sigma: self.student.clone() for sigma in (0.05, 0.1)}
        self.increments: list[list[float]] = []
        for step in range(STEPS + 1):
            if step:
                change = torch.randn(SIZE, generator=generator, dtype=torch.float64) * scale(step)
                self.student += change
                self.increments.append([step, float(change.square().sum())])
                for momentum, ema in self.emas.items():
                    ema.lerp_(self.student, momentum)
                for sigma, track in tracks.items():
                    track.lerp_(self.student, 1 - (1 - 1 / step) ** (gamma_of(sigma) + 1))
            if step % every == 0:
                weight = self.student.to(torch.bfloat16 if is_coarse else torch.float32)
                state = {"w": weight, "running_mean": torch.full((3,), float(step))}
                save_file(state, run / f"step_{step}.safetensors")
                for sigma, track in tracks.items():
                    if step:
                        self.save_snapshot(run, sigma, step, track)

    def save_snapshot(self, run: Path, sigma: float, step: int, track: torch.Tensor) -> None:
        """As the online teacher's, written by another hand."""
        response = {"kind": "power", "sigma_rel": sigma, "gamma": gamma_of(sigma), "start": 0, "end": step}
        record = {
            "tool": "ckpt-ema",
            "response": response,
            "increments": self.increments[::7],
            "squared_norm": float(self.student.square().sum()),
        }
        path = run / f"teacher_power_{sigma}_step_{step}.safetensors"
        save_file({"w": track.float()}, path, metadata={"format": "pt", "ckpt_ema": json.dumps(record)})

    def error(self, teacher: Path, momentum: float, student: Path) -> float:
        """The distance to the true EMA, as a share of a student's."""
        found, nearest = (load_file(path)["w"].double() for path in (teacher, student))
        true = self.emas[momentum]
        return float((found - true).norm() / (nearest - true).norm())


def even(step: int) -> float:
    """Steps of one size."""
    return 1e-3


def falling(step: int) -> float:
    """Steps that become smaller, as under a rate that falls."""
    return 1e-3 * (1 - 0.95 * step / STEPS)


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Walk]]:
    """An even and a falling walk, each with its run directory."""
    root = tmp_path_factory.mktemp("walks")
    return {scale.__name__: (root / scale.__name__, Walk(root / scale.__name__, scale)) for scale in (even, falling)}


def quiet(run: Path, output: Path | None, **options: Any) -> ckpt_ema.FoldReport:
    """A reconstruction whose warnings are not the point."""
    return ckpt_ema.reconstruct(run, output, announce=lambda plan: None, **options)


@pytest.mark.parametrize("name", ["even", "falling"])
@pytest.mark.parametrize("momentum", [0.01, 0.05])
@pytest.mark.parametrize("exclude", [(), ("teacher_power_0.05*",), ("teacher*",)])
def test_the_error_is_what_was_predicted(
    walks: dict[str, tuple[Path, Walk]], tmp_path: Path, name: str, momentum: float, exclude: tuple[str, ...]
) -> None:
    """On a path of unrelated steps, with two tracks, one and none, from real files against the real EMA."""
    run, walk = walks[name]
    report = quiet(run, tmp_path / "t.safetensors", momentum=momentum, exclude=exclude)
    [prediction] = report.plan.predictions
    nearest = run / prediction.nearest
    measured = walk.error(report.output, momentum, nearest)
    assert all(walk.error(run / f"step_{step}.safetensors", momentum, nearest) >= 1 for step in (100, 200, 300, 400))
    # Without measured steps a falling walk is taken for an even one.
    tolerance = 0.06 if name == "even" or "teacher*" not in exclude else 0.6
    assert prediction.error == pytest.approx(measured, rel=tolerance, abs=3e-4)
    folded = ckpt_ema.fold(run, tmp_path / "f.safetensors", momentum=momentum, per="step", announce=lambda plan: None)
    if "teacher*" not in exclude:
        assert measured < 0.7 * walk.error(folded.output, momentum, nearest)


def test_measured_steps_help(walks: dict[str, tuple[Path, Walk]], tmp_path: Path) -> None:
    """Where steps shrink, knowing so brings the teacher nearer."""
    run, walk = walks["falling"]
    blind = tmp_path / "run"
    blind.mkdir()
    for path in run.iterdir():
        tensors = load_file(path)
        record = None
        if path.name.startswith("teacher"):
            _, _, sigma, _, step = path.stem.split("_")
            response = {"kind": "power", "sigma_rel": float(sigma), "gamma": gamma_of(float(sigma)), "start": 0}
            record = {"ckpt_ema": json.dumps({"response": {**response, "end": int(step)}})}
        save_file(tensors, blind / path.name, metadata=record)
    with_steps = quiet(run, tmp_path / "a.safetensors", momentum=0.05)
    without = quiet(blind, tmp_path / "b.safetensors", momentum=0.05)
    last = run / "step_400.safetensors"
    assert walk.error(with_steps.output, 0.05, last) < walk.error(without.output, 0.05, last)
    assert any("measured while training" in note for note in with_steps.plan.notes)
    assert any("not recorded, so all count the same" in note for note in without.plan.notes)


def test_what_the_online_teacher_stores_makes_another_teacher(tmp_path: Path) -> None:
    """A real training loop: students, two tracks and the teacher's own snapshots, and any half-life out of these."""
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 200, bias=False)
    others = {half_life: ckpt_ema.MeanTeacher(model, half_life=half_life) for half_life in (40, 150)}
    teacher = ckpt_ema.MeanTeacher(model, momentum=0.02, snapshots=ckpt_ema.Snapshots(tmp_path / "run", every=100))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(1, 401):
        optimizer.zero_grad()
        (model(torch.randn(8, 300)) - torch.randn(8, 200)).square().mean().backward()
        optimizer.step()
        for each in (teacher, *others.values()):
            each.update()
        if step % 100 == 0:
            save_file(model.state_dict(), tmp_path / "run" / f"step_{step}.safetensors")
            teacher.save_snapshot(tmp_path / "run", step)
    report = quiet(tmp_path / "run", tmp_path / "{half_life}.safetensors", half_life=[40, 150])
    kinds = {item.name.rpartition("_step")[0] for item in report.plan.averages}
    assert kinds == {"teacher", "teacher_power_0.05", "teacher_power_0.1"}
    assert any("measured while training" in note for note in report.plan.notes)
    for made, prediction, true in zip(report.plan.teachers, report.plan.predictions, others.values(), strict=True):
        wanted = true.tensors()["weight"].double()
        found = load_file(made.output)["weight"].double()
        nearest = load_file(tmp_path / "run" / prediction.nearest)["weight"].double()
        error = float((found - wanted).norm() / (nearest - wanted).norm())
        assert error < 0.1
        assert error == pytest.approx(prediction.error, rel=0.2)


def test_rates_of_the_optimizer_say_how_steps_shrink(tmp_path: Path) -> None:
    """torch's own optimizer state and the Transformers log: v is the squared rate, straight between records."""
    (tmp_path / "a").mkdir()
    for step in (0, 100, 200):
        state = {"model": {"w": torch.full((4,), float(step))}, "step": step}
        state["optimizer"] = {"state": {}, "param_groups": [{"lr": 0.1 * (1 - step / 400), "params": [0]}]}
        torch.save(state, tmp_path / "a" / f"step_{step}.pt")
    for step in (100, 200):
        folder = tmp_path / "b" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file({"w": torch.full((4,), float(step))}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        log = [{"step": s, "learning_rate": 1 - s / 400, "loss": 1.0} for s in range(10, step + 1, 10)]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    for name in "ab":
        plan = ckpt_ema.plan_reconstruction(tmp_path / name, momentum=0.01)
        assert any("squared learning rate" in note for note in plan.notes), name
    even_plan = ckpt_ema.plan(tmp_path / "a", momentum=0.01, per="step")
    uneven = ckpt_ema.plan_reconstruction(tmp_path / "a", momentum=0.01)
    # More of the movement lies at the start of each gap.
    assert uneven.checkpoints[-1].coefficient > even_plan.checkpoints[-1].coefficient


def test_an_earlier_teacher_takes_buffers_of_its_time(walks: dict[str, tuple[Path, Walk]], tmp_path: Path) -> None:
    """`--at 250` copies from step 200, and what came later plays no great part."""
    run, _ = walks["even"]
    report = quiet(run, tmp_path / "t.safetensors", momentum=0.05, at=250)
    assert load_file(report.output)["running_mean"].tolist() == [200.0] * 3
    assert report.plan.checkpoints[-1].name == "step_200.safetensors"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"at": 0}, "a teacher of step 0 would be the student of that step: it begins there"),
        ({"at": 100, "from_step": 100}, "a teacher of step 100 would be the student of that step: it begins there"),
        ({"at": 99, "from_step": 100}, "a teacher of step 99 cannot be made: what is stored begins at step 100"),
        ({"at": 401}, "a teacher of step 401 cannot be made: what is stored ends at step 400"),
        ({"at": 400, "from_step": 400}, "all that is stored is of step 400, and one step alone has nothing to average"),
        ({"from_step": 400}, "all that is stored is of step 400, and one step alone has nothing to average"),
    ],
)
def test_a_step_without_a_teacher_is_refused_with_the_reason(
    walks: dict[str, tuple[Path, Walk]], tmp_path: Path, options: dict[str, int], why: str
) -> None:
    """The first step has a student and no average yet, and none is made of what is not stored; the hint works."""
    run, _ = walks["even"]
    output = tmp_path / "u.safetensors"
    with pytest.raises(CkptEmaError) as caught:
        quiet(run, output, **options, exclude=("teacher*",))
    assert caught.value.message == why
    if offered := re.findall(r"`--at (\d+)`", caught.value.hint or ""):
        for at in map(int, offered):
            quiet(run, output, **{**options, "at": at}, exclude=("teacher*",), overwrite=True)
    else:
        assert caught.value.hint == "pass a folder with checkpoints of other steps, or a wider `--from` and `--until`"


def test_snapshots_may_be_finer_than_students(tmp_path: Path) -> None:
    """bfloat16 students beside float32 snapshots: each is read as it is stored."""
    walk = Walk(tmp_path / "run", even, is_coarse=True)
    report = quiet(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.01, dtype="float32")
    assert {item.name.partition("_")[0] for item in report.plan.averages} == {"teacher"}
    assert walk.error(report.output, 0.01, tmp_path / "run" / "step_400.safetensors") < 0.1


def test_the_combination_is_what_the_plan_says(walks: dict[str, tuple[Path, Walk]], tmp_path: Path) -> None:
    """Every coefficient times its file, summed here in float64."""
    run, _ = walks["even"]
    report = quiet(run, tmp_path / "t-{half_life}.safetensors", half_life=[20, 70])
    for number, teacher in enumerate(report.plan.teachers):
        total = sum(item.coefficients[number] * load_file(run / item.name)["w"].double() for item in report.plan.inputs)
        found = load_file(teacher.output)["w"].double()
        assert isinstance(total, torch.Tensor)
        assert float((found - total).norm() / total.norm()) < 1e-6


def test_the_command_says_what_to_expect(walks: dict[str, tuple[Path, Walk]], tmp_path: Path, cli: Cli) -> None:
    """Before reading: the error, the files, their coefficients; afterwards the path alone on stdout."""
    run, _ = walks["even"]
    outcome = cli("reconstruct", run, "--half-life", 50, "-o", "t.safetensors")
    assert (outcome.code, outcome.stdout) == (0, "t.safetensors\n")
    expected = r"^expected +half-life 50: (\S+) of the error of step_300.safetensors; \d+ files, most"
    assert len(re.findall(expected, outcome.stderr, re.MULTILINE)) == 1
    plan = cli("reconstruct", run, "--half-life", 50, "--plan")
    assert plan.stdout.startswith("5 checkpoints and 8 snapshots of")
    assert re.search(r"^teacher_power_0.05_step_400.safetensors +400 +-?0\.\d+", plan.stdout, re.MULTILINE)
    record = json.loads(cli("reconstruct", run, "--half-life", 50, "--plan", "--json").stdout)
    shares = [item["coefficients"][0] for item in record["averages"]]
    shares += [item["coefficient"] for item in record["checkpoints"]]
    assert math.fsum(shares) == pytest.approx(1, abs=1e-9)
    assert 0 < record["predictions"][0]["error"] < 0.1
    inspected = cli("inspect", "t.safetensors").stdout
    assert "half-life  50.0 steps" in inspected
    assert "teacher_power_0.05_step_400.safetensors" in inspected


def test_a_teacher_that_cannot_be_recovered_is_said_to_be_one(tmp_path: Path, cli: Cli) -> None:
    """Far apart students and a short half-life: the expected error is named, and what would help."""
    Walk(tmp_path / "run", even, every=200)
    outcome = cli("reconstruct", "run", "--half-life", 40, "--exclude", "teacher*", "--plan")
    assert outcome.code == 0
    assert re.search(r"half-life 40 cannot be recovered .* expected error is \d\d% of the distance", outcome.stderr)
    assert "snapshots of an online teacher" in outcome.stderr


def copy_of_students(source: Path, run: Path) -> Path:
    """A run directory with three of the students of `source`."""
    run.mkdir()
    for step in (0, 200, 400):
        (run / f"step_{step}.safetensors").write_bytes((source / f"step_{step}.safetensors").read_bytes())
    return run


@pytest.mark.parametrize(
    "response", [None, 7, "power", {"kind": "power"}, {"kind": "ema", "momentum": 7, "start": 0, "end": 400}]
)
def test_a_snapshot_that_does_not_say_what_it_is_takes_no_part(
    walks: dict[str, tuple[Path, Walk]], tmp_path: Path, response: Any
) -> None:
    """Better left out than wrongly weighed."""
    run = copy_of_students(walks["even"][0], tmp_path / "run")
    metadata = {"ckpt_ema": json.dumps({"response": response, "increments": "many", "squared_norm": "large"})}
    save_file({"w": torch.zeros(SIZE)}, run / "teacher_step_400.safetensors", metadata=metadata)
    plan = ckpt_ema.plan_reconstruction(run, momentum=0.05)
    assert plan.averages == ()
    assert ("teacher_step_400.safetensors", "a teacher that ckpt-ema wrote") in plan.left_out


@pytest.mark.parametrize(
    "record",
    [
        {"increments": [[1, 0.1], [10**400, 0.2]], "squared_norm": 10**400},
        {"increments": [[step, 1e308] for step in range(1, 9)]},
        {"increments": [[1, 0.1], [2], "x", [3, None], [-4, 0.1], [5, -1.0]]},
        {"response": {"kind": "power", "gamma": 1e5, "start": 0, "end": 10**15}},
        {"response": {"kind": "ema", "momentum": 0.1, "interval": 10**400, "start": 0, "end": 4}},
        {"response": {"kind": "ema", "momentum": 10**400, "start": 0, "end": 4}},
        None,
    ],
)
def test_lying_snapshots_are_no_traceback(
    walks: dict[str, tuple[Path, Walk]], tmp_path: Path, record: dict[str, Any] | None
) -> None:
    """Numbers beyond all measure, and nesting without end: left out, or weighed as what they claim."""
    run = copy_of_students(walks["even"][0], tmp_path / "run")
    response = {"kind": "power", "gamma": 5.0, "start": 0, "end": 400}
    text = "[" * 100000 if record is None else json.dumps({"response": response, **record})
    save_file({"w": torch.zeros(SIZE)}, run / "teacher_step_400.safetensors", metadata={"ckpt_ema": text})
    plan = ckpt_ema.plan_reconstruction(run, momentum=0.05)
    assert math.fsum(item.coefficient for item in plan.inputs) == pytest.approx(1, abs=1e-6)


def test_snapshots_may_lie_in_a_folder_of_their_own(walks: dict[str, tuple[Path, Walk]], tmp_path: Path) -> None:
    """One below the run directory; and `--until` is for them as well."""
    source, walk = walks["even"]
    run = tmp_path / "run"
    (run / "tracks").mkdir(parents=True)
    for path in source.iterdir():
        (run / ("tracks" if path.name.startswith("teacher") else ".") / path.name).write_bytes(path.read_bytes())
    report = quiet(run, tmp_path / "t.safetensors", momentum=0.01)
    assert len(report.plan.averages) == 8
    assert {str(Path(item.name).parent) for item in report.plan.averages} == {"tracks"}
    assert walk.error(report.output, 0.01, run / "step_400.safetensors") < 0.1
    early = ckpt_ema.plan_reconstruction(run, momentum=0.05, until_step=200)
    assert max(item.step or 0 for item in early.inputs) == 200
    for path in run.glob("step_*"):
        path.unlink()
    with pytest.raises(CkptEmaError, match="left to fold"):
        ckpt_ema.plan_reconstruction(run)


@pytest.mark.parametrize("place", ["beside", "above", "linked", "deep"])
def test_snapshots_are_found_around_the_checkpoints(
    walks: dict[str, tuple[Path, Walk]], tmp_path: Path, place: str
) -> None:
    """In a sibling of `checkpoints/`, above it, behind a link, two folders down; and a fold does not mind them."""
    source, _ = walks["even"]
    run = tmp_path / "run"
    folder = run / {"beside": "tracks", "above": ".", "linked": "tracks", "deep": "online/power"}[place]
    students = run / "checkpoints" if place in ("beside", "above") else run
    elsewhere = tmp_path / "scratch"
    for each in (run, students, elsewhere if place == "linked" else folder):
        each.mkdir(parents=True, exist_ok=True)
    if place == "linked":
        folder.symlink_to(elsewhere)
    for path in source.iterdir():
        (folder if path.name.startswith("teacher") else students).joinpath(path.name).write_bytes(path.read_bytes())
    whole = ckpt_ema.plan_reconstruction(source, momentum=0.01)
    planned = ckpt_ema.plan_reconstruction(run, momentum=0.01)
    assert len(planned.averages) == 8
    assert planned.predictions[0].error == pytest.approx(whole.predictions[0].error)
    assert len(ckpt_ema.plan(run, momentum=0.5).checkpoints) == 5


def test_a_truncated_snapshot_is_left_out_aloud(walks: dict[str, tuple[Path, Walk]], tmp_path: Path) -> None:
    """Beside the checkpoints or in a folder of their own: never silently a worse teacher."""
    source, _ = walks["even"]
    run = tmp_path / "run"
    (run / "tracks").mkdir(parents=True)
    for path in source.iterdir():
        name = f"tracks/{path.name}" if "0.05" in path.name else path.name
        content = path.read_bytes()
        (run / name).write_bytes(content[:3000] if "teacher" in name and "step_400" in name else content)
    planned = ckpt_ema.plan_reconstruction(run, momentum=0.01)
    left_out = dict(planned.left_out)
    for name in ("teacher_power_0.1_step_400.safetensors", "tracks/teacher_power_0.05_step_400.safetensors"):
        assert "truncated" in left_out[name]
        assert any(name in text for text in planned.warnings)


def test_a_truncated_average_is_left_out_aloud(walks: dict[str, tuple[Path, Walk]], tmp_path: Path) -> None:
    """One that is described with `averages`, as one that describes itself."""
    source, _ = walks["even"]
    run = tmp_path / "run"
    shutil.copytree(source, run, ignore=shutil.ignore_patterns("teacher*"))
    for step in (300, 400):
        torch.save(load_file(source / f"step_{step}.safetensors"), run / f"ema_{step}.pt")
    (run / "ema_400.pt").write_bytes((run / "ema_400.pt").read_bytes()[:100])
    averages = {"ema_*.pt": "ema:0.1"}
    planned = ckpt_ema.plan_reconstruction(run, momentum=0.01, averages=averages)
    assert "it cannot be read" in dict(planned.left_out)["ema_400.pt"]
    assert any("`ema_400.pt` takes no part" in text for text in planned.warnings)
    (run / "ema_300.pt").unlink()
    with pytest.raises(CkptEmaError, match="matches no file") as caught:
        ckpt_ema.plan_reconstruction(run, momentum=0.01, averages=averages)
    assert "ema_400.pt: it cannot be read" in str(caught.value)


def test_buffers_that_no_snapshot_has_are_named_as_the_cause(
    walks: dict[str, tuple[Path, Walk]], tmp_path: Path
) -> None:
    """Asked for by an option, not by a snapshot of which there are more of the same kind."""
    run, _ = walks["even"]
    with pytest.raises(CkptEmaError, match="running_mean: missing in") as caught:
        ckpt_ema.plan_reconstruction(run, tmp_path / "t.safetensors", momentum=0.01, skip_buffers=False)
    assert str(caught.value.hint).startswith("omit `--no-skip-buffers`")


def rename_to_epochs(source: Path, run: Path) -> None:
    """Students known by epochs of 100 steps, snapshots by their steps."""
    run.mkdir()
    for path in source.iterdir():
        match = re.fullmatch(r"step_(\d+)\.safetensors", path.name)
        name = path.name if match is None else f"epoch_{int(match[1]) // 100}.safetensors"
        (run / name).write_bytes(path.read_bytes())


def test_epochs_of_students_and_steps_of_snapshots_are_one_time(
    walks: dict[str, tuple[Path, Walk]], tmp_path: Path
) -> None:
    """`--from` and `--until` count what the students count; averages of other tools may know epochs, too."""
    source, _ = walks["even"]
    run = tmp_path / "run"
    rename_to_epochs(source, run)
    known = {"momentum": 0.01, "steps_per_epoch": 100}
    planned = ckpt_ema.plan_reconstruction(run, **known, until_step=3)
    expected = ckpt_ema.plan_reconstruction(source, momentum=0.01, until_step=300)
    assert [item.step for item in planned.inputs] == [item.step for item in expected.inputs]
    assert planned.predictions[0].error == pytest.approx(expected.predictions[0].error)
    assert ("teacher_power_0.1_step_400.safetensors", "after step 300") in planned.left_out
    state = load_file(source / "teacher_power_0.1_step_200.safetensors") | {"running_mean": torch.zeros(3)}
    for folder in (run, tmp_path):
        torch.save(state, folder / "averaged_epoch_2.pt")
    options: dict[str, Any] = {"averages": {"averaged_*": "power:0.1"}, "exclude": ("teacher*",)}
    planned = ckpt_ema.plan_reconstruction(run, **known, **options)
    assert {item.name: item.step for item in planned.inputs}["averaged_epoch_2.pt"] == 200
    late = ckpt_ema.plan_reconstruction(run, **known, **options, from_step=3)
    assert ("averaged_epoch_2.pt", "before step 300") in late.left_out
    paths = [source / "step_100.safetensors", source / "step_200.safetensors", tmp_path / "averaged_epoch_2.pt"]
    with pytest.raises(CkptEmaError, match="knows its epoch only"):
        ckpt_ema.plan_reconstruction(paths, momentum=0.01, averages={"averaged_*": "power:0.1"})


def test_files_may_be_listed_in_any_order(walks: dict[str, tuple[Path, Walk]], tmp_path: Path) -> None:
    """A shell sorts step_1000 before step_200; a reconstruction knows better."""
    source, _ = walks["even"]
    paths = sorted(source.iterdir(), reverse=True)
    planned = ckpt_ema.plan_reconstruction(paths, tmp_path / "t.safetensors", momentum=0.01)
    expected = ckpt_ema.plan_reconstruction(source, momentum=0.01)
    assert [item.coefficient for item in planned.inputs] == [item.coefficient for item in expected.inputs]
    assert not any("listed" in text for text in planned.warnings)


def test_what_the_online_teacher_did_not_follow_is_a_buffer(tmp_path: Path) -> None:
    """Whatever it is called: snapshots hold parameters alone."""

    class Scaled(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.register_buffer("scale", torch.zeros(()))

    model = Scaled()
    teacher = ckpt_ema.MeanTeacher(model, snapshots=ckpt_ema.Snapshots(tmp_path, every=10))
    for step in range(1, 31):
        with torch.no_grad():
            model.weight.add_(torch.randn(3, 3))
            model.scale.add_(1)
        teacher.update()
        if step % 10 == 0:
            save_file(model.state_dict(), tmp_path / f"step_{step}.safetensors")
    report = quiet(tmp_path, tmp_path / "t.safetensors", momentum=0.1)
    assert report.plan.averages
    assert [tensor.name for tensor in report.plan.tensors if tensor.action == "copy"] == ["scale"]
    assert load_file(report.output)["scale"] == 30


def test_the_hooks_own_rounding_is_expected(tmp_path: Path) -> None:
    """In float32 1 - m and m do not sum to 1: files of `save_snapshot` are not taken for better than they are."""
    model = torch.nn.Linear(100, 100, bias=False)
    generator = torch.Generator().manual_seed(0)
    teacher = ckpt_ema.MeanTeacher(model, momentum=0.001)
    true = None
    for step in range(2001):
        with torch.no_grad():
            model.weight.add_(torch.randn(100, 100, generator=generator) * 1e-4)
        teacher.update()
        student = model.weight.detach().double()
        true = student.clone() if true is None else true.lerp_(student, 0.0013)
        if step % 500 == 0 and step:
            save_file(model.state_dict(), tmp_path / f"step_{step + 1}.safetensors")
            teacher.save_snapshot(tmp_path, step + 1)
    assert true is not None
    report = quiet(tmp_path, tmp_path / "t.safetensors", momentum=0.0013)
    [prediction] = report.plan.predictions
    nearest = load_file(tmp_path / prediction.nearest)["weight"].double()
    measured = float((load_file(report.output)["weight"].double() - true).norm() / (nearest - true).norm())
    assert measured < 3 * prediction.error


def test_a_teacher_of_a_reconstruction_says_so(walks: dict[str, tuple[Path, Walk]], tmp_path: Path, cli: Cli) -> None:
    """Rule, span and expected error are in the file; a fold goes on from its step, not from its buffers'."""
    run, _ = walks["even"]
    report = quiet(run, tmp_path / "t.safetensors", profile="power", sigma_rel=0.15, at=350)
    with safe_open(report.output, "pt") as file:
        record = json.loads(file.metadata()["ckpt_ema"])
    assert (record["made"], record["start"], record["step"]) == ("reconstruct", 0, 350)
    assert record["rule"] == "teacher = b * teacher + (1 - b) * student, b = (1 - 1 / step) ** (gamma + 1)"
    assert record["predicted_error"] == report.plan.predictions[0].error
    inspected = cli("inspect", report.output).stdout
    assert "by reconstruct, steps 0 to 350, expected error" in inspected
    plan = ckpt_ema.plan(run, momentum=0.1, per="step", init=report.output, from_step=351, overwrite=True)
    assert plan.first_share == pytest.approx(0.9**50)


def test_a_snapshot_is_never_replaced(walks: dict[str, tuple[Path, Walk]], tmp_path: Path) -> None:
    """Nobody can make it again."""
    run, _ = walks["even"]
    target = run / "teacher_power_0.1_step_400.safetensors"
    for work, options in ((ckpt_ema.fold, {"momentum": 0.5}), (ckpt_ema.reconstruct, {"momentum": 0.9})):
        with pytest.raises(CkptEmaError, match=r"snapshot that an online teacher wrote|is one of the inputs"):
            work(run, target, overwrite=True, announce=lambda plan: None, **options)


@pytest.mark.parametrize(
    ("average", "message"),
    [("power:0.1", "names no file"), ("=ema:0.1", "names no file"), ("zzz*=ema:0.1", "matches no file")],
)
def test_descriptions_of_nothing_are_refused(
    walks: dict[str, tuple[Path, Walk]], cli: Cli, average: str, message: str
) -> None:
    """A typing error must not pass for an average."""
    outcome = cli("reconstruct", walks["even"][0], "--average", average, "--plan")
    assert outcome.code in (1, 2)
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "uniform", "interval": 10}, "`--interval` has no meaning"),
        ({"interval": 10**23}, "below 2"),
        ({"per": "step"}, "`--per` says how to weigh checkpoints"),
        ({"init": "t.safetensors"}, "`--init` says how to weigh"),
        ({"profile": "minus-sqrt"}, "is no average over training"),
        ({"at": -1}, "`--at` is -1"),
        ({"at": True}, "`--at` is True"),
    ],
)
def test_what_makes_no_sense_for_a_reconstruction_is_misuse(
    walks: dict[str, tuple[Path, Walk]], options: dict[str, Any], message: str
) -> None:
    """The solver weighs; the user says what is wanted."""
    with pytest.raises(MisuseError, match=message):
        ckpt_ema.plan_reconstruction(walks["even"][0], **options)


def test_ema_pytorchs_checkpoints_are_read(tmp_path: Path, cli: Cli) -> None:
    """Real PostHocEMA tracks, described by the user: a teacher between them, with their real response."""
    model = torch.nn.Linear(200, 100, bias=False)
    folder = tmp_path / "post_hoc"
    every = 4
    post_hoc = PostHocEMA(
        model,
        sigma_rels=(0.05, 0.2),
        update_every=every,
        checkpoint_every_num_steps=100,
        checkpoint_folder=str(folder),
        checkpoint_dtype=torch.float32,
    )
    generator = torch.Generator().manual_seed(0)
    path = []
    with torch.no_grad():
        for _ in range(STEPS):
            model.weight.add_(torch.randn(100, 200, generator=generator) * 1e-3)
            path.append(model.weight.clone())
            post_hoc.update()
    options = ["--average", f"0.*.pt=power:0.05:{every}", "--average", f"1.*.pt=power:0.2:{every}"]
    target = ["--profile", "power", "--sigma-rel", 0.26, "-o", "t.safetensors"]
    outcome = cli("reconstruct", folder, *options, *target, "--prefix", "ema_model.")
    assert outcome.code == 0, outcome.stderr
    found = load_file(tmp_path / "t.safetensors")["weight"].double()
    exponent = gamma_of(0.26) + 1
    true = sum(
        ((step / STEPS) ** exponent - ((step - 1) / STEPS) ** exponent) * student.double()
        for step, student in enumerate(path, start=1)
    )
    assert isinstance(true, torch.Tensor)
    stored = [load_file_of_torch(file)["ema_model.weight"].double() for file in sorted(folder.iterdir())]
    assert len(stored) == 8
    nearest = min(float((each - true).norm()) for each in stored)
    error = float((found - true).norm())
    expected = re.search(r"power 0.26: (\S+) of the error of ", outcome.stderr)
    assert expected is not None
    assert error / nearest == pytest.approx(float(expected[1]), rel=0.2)
    # Raw students beside them have other names; what is an average has its prefix taken off.
    for step in (200, 400):
        torch.save({"weight": path[step - 1]}, folder / f"step_{step}.pt")
    beside = cli("reconstruct", folder, *options, *target[:4], "-o", "u.safetensors")
    assert beside.code == 0, beside.stderr
    assert set(load_file(tmp_path / "u.safetensors")) == {"weight"}


def load_file_of_torch(path: Path) -> dict[str, torch.Tensor]:
    """A state dict that torch saved."""
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return state


def test_edm2_snapshots_are_known_by_their_name(walks: dict[str, tuple[Path, Walk]], tmp_path: Path) -> None:
    """`network-snapshot-IMAGES-WIDTH` says all there is to say."""
    source, walk = walks["even"]
    run = tmp_path / "run"
    run.mkdir()
    for sigma in ("0.05", "0.1"):
        for step in (200, 400):
            state = load_file(source / f"teacher_power_{sigma}_step_{step}.safetensors")
            name = f"network-snapshot-{step:07d}-{float(sigma):.3f}"
            if step == 200:
                torch.save(state, run / f"{name}.pt")
            else:
                save_file(state, run / f"{name}.safetensors")
    report = quiet(run, tmp_path / "t.safetensors", momentum=0.01)
    assert [item.step for item in report.plan.checkpoints] == [200, 200, 400, 400]
    assert walk.error(report.output, 0.01, source / "step_400.safetensors") < 0.2
    declared = quiet(run, tmp_path / "u.safetensors", momentum=0.01, averages={"*-0.050.*": "power:0.05"})
    assert [item.name for item in declared.plan.checkpoints] == [item.name for item in report.plan.checkpoints]
    for one, other in zip(declared.plan.checkpoints, report.plan.checkpoints, strict=True):
        assert one.coefficient == pytest.approx(other.coefficient, abs=1e-6)


@pytest.mark.parametrize(
    "averages", [["x=ema:0.1"], None, {"x": 0.05}, {"x": None}, {3: "ema:0.1"}, {"x": "ema:0.1:" + "9" * 400}]
)
def test_descriptions_of_the_wrong_kind_are_misuse(averages: Any) -> None:
    """From Python as well."""
    with pytest.raises(MisuseError):
        ckpt_ema.ReconstructOptions(averages=averages)


@pytest.mark.parametrize("text", ["", "power", "power:0.5", "ema:2", "ema:0.1:0", "ema:0.1:1:1", "swa:1", "ema:x"])
def test_descriptions_that_make_no_sense_are_misuse(text: str) -> None:
    """And the message shows how to write one."""
    with pytest.raises(MisuseError, match=r"relative width|must be power:SIGMA_REL or ema:MOMENTUM"):
        ckpt_ema.ReconstructOptions(averages={"a*": text})


def test_samples_are_joined_by_straight_lines() -> None:
    """And level outside."""
    v = interpolated([(10, 1.0), (20, 3.0)], "here")
    assert [v.at(step) for step in (0, 10, 15, 20, 99)] == [1, 1, 2, 3, 3]
