"""The benchmark of fidelity: how near each reconstruction from stored files comes to the true online EMA.

Small students are trained on real data, with the true EMAs of several momenta beside them, updated after every step in
float64. What a run would have stored is kept: the student and two power averages, as float32, every so many steps. From
these each method makes the EMA at the last step again. Its error is

    |reconstruction - true EMA| / |last student - true EMA|

so that 1 is as good as taking the last student, and 0 is the EMA itself.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_fold import describe_machine, start_plot
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ckpt_ema
from ckpt_ema import MeanTeacher, Snapshots
from ckpt_ema.averages.profiles import Profile, coefficients_of, ema_updates, step_updates
from ckpt_ema.averages.responses import Ema, Impulse, Power, gamma_of, momentum_of_half_life
from ckpt_ema.averages.solver import EVEN, Item, Solution, Variance, interpolated, solve

NUM_STEPS = 10_000
GRID = 40
"""Files are stored this many times in a run; the gaps between those used are multiples of that."""

GAPS = (1, 4, 10)
"""In units of the grid: a fortieth, a tenth and a quarter of the run."""

GOAL_GAP = 4
GOAL_HALF_LIVES = 1 / math.log(2)
HALF_LIVES = (0.1, 0.5, 1.0, GOAL_HALF_LIVES, 2.5)
"""Gaps between checkpoints, in half-lives of the EMA; the goal's is where momentum * gap is 1."""

SIGMAS = (0.05, 0.10)
FLOAT32 = 2.0**-24
BATCH_SIZE = 32
CONTEXT = 64

GROUPS: dict[str, tuple[str, ...]] = {
    "students": ("student",),
    "2 tracks": ("0.05", "0.1"),
    "students + 1 track": ("student", "0.1"),
    "students + 2 tracks": ("student", "0.05", "0.1"),
}
"""What is stored: students, and tracks (power averages, by their relative width)."""

# --- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Task:
    """A model and its data; the loss is the cross entropy of the last axis of the model's output."""

    make_model: Callable[[], nn.Module]
    draw_batch: Callable[[], tuple[Tensor, Tensor]]
    """Inputs and labels, from torch's own generator."""

    calibration: Tensor | None
    """Training inputs from which BatchNorm's statistics are taken anew."""

    validation: tuple[Tensor, Tensor]
    rates: dict[str, float]
    """The (highest) learning rate per optimizer."""

    length: float = 1.0
    """Steps, as a share of the others'."""


class ConvNet(nn.Sequential):
    """Three 3x3 convolutions with BatchNorm on one-channel images; (n, 1, 8, 8) in, (n, 10) out."""

    def __init__(self, width: int = 16) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


class Transformer(nn.Module):
    """A causal transformer over characters; (n, length) numbers of characters in, (n, length, alphabet) out."""

    def __init__(self, alphabet: int, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(alphabet, width)
        self.places = nn.Embedding(CONTEXT, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, alphabet)

    def forward(self, text: Tensor) -> Tensor:
        """Scores of the next character at each place."""
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        hidden = self.characters(text) + self.places.weight[: text.shape[1]]
        scores: Tensor = self.head(self.blocks(hidden, mask=mask, is_causal=True))
        return scores


def digits_task(make_model: Callable[[], nn.Module], shape: tuple[int, ...], rates: dict[str, float]) -> Task:
    """scikit-learn's digits: two thirds to train on, the rest to validate; images of `shape`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (torch.tensor(digits.data, dtype=torch.float32) / 16).reshape(-1, *shape)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:1200], order[1200:]

    def draw_batch() -> tuple[Tensor, Tensor]:
        batch = train[torch.randint(len(train), (BATCH_SIZE,))]
        return images[batch], labels[batch]

    return Task(make_model, draw_batch, images[train], (images[held_out], labels[held_out]), rates)


def mlp_task() -> Task:
    """An MLP on digits."""

    def make_model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    return digits_task(make_model, (64,), {"SGD": 0.05, "AdamW": 1e-3})


def conv_task() -> Task:
    """A convolutional net with BatchNorm on digits."""
    return digits_task(ConvNet, (1, 8, 8), {"SGD": 0.05, "AdamW": 1e-3})


def transformer_task() -> Task:
    """A character-level transformer on the text of Python's own help topics."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = sorted(set(text))
    number = {character: i for i, character in enumerate(alphabet)}
    numbers = torch.tensor([number[character] for character in text])
    border = len(numbers) * 9 // 10
    places = torch.arange(CONTEXT)

    def windows(starts: Tensor) -> tuple[Tensor, Tensor]:
        at = starts[:, None] + places
        return numbers[at], numbers[at + 1]

    def draw_batch() -> tuple[Tensor, Tensor]:
        return windows(torch.randint(border - CONTEXT - 1, (BATCH_SIZE // 4,)))

    held_out = windows(torch.linspace(border, len(numbers) - CONTEXT - 2, 128).long())
    rates = {"SGD": 0.1, "AdamW": 2e-3}
    return Task(lambda: Transformer(len(alphabet)), draw_batch, None, held_out, rates, length=0.4)


TASKS: dict[str, Callable[[], Task]] = {"MLP": mlp_task, "conv": conv_task, "transformer": transformer_task}
OPTIMIZERS = ("SGD", "AdamW")
SCHEDULES = ("constant", "cosine")
RUNS = {
    f"{task}-{optimizer}-{schedule}".lower(): (task, optimizer, schedule)
    for task in TASKS
    for optimizer in OPTIMIZERS
    for schedule in SCHEDULES
}

# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """One EMA to be made again from files that lie `gap` steps apart."""

    gap: int
    momentum: float
    half_lives: float
    """The gap in half-lives; where momentum * gap is 1, what that tends to for long gaps."""

    @property
    def is_goal(self) -> bool:
        """Whether momentum * gap is 1."""
        return self.half_lives == GOAL_HALF_LIVES


def cells_of(num_steps: int) -> list[Cell]:
    """Every pair of gap and momentum, gap by gap."""
    gaps = [num_steps // GRID * gap for gap in GAPS]
    return [
        Cell(gap, 1 / gap if count == GOAL_HALF_LIVES else momentum_of_half_life(gap / count), count)
        for gap in gaps
        for count in HALF_LIVES
    ]


@dataclass(frozen=True, slots=True)
class Recording:
    """What a run leaves behind."""

    num_steps: int
    files: dict[str, dict[int, Tensor]]
    """float32 vectors of all parameters by kind (`student`, or a track's width) and step."""

    emas: Tensor
    """(cells, parameters): the true EMAs at the last step, float64."""

    increments: list[tuple[int, float]]
    """(step, |student(step) - student(step - 1)|**2) on a sample of steps."""

    rate: Callable[[int], float]
    """The learning rate of each step."""

    model: nn.Module
    run: Path
    """Where the same files lie as a user has them: students, and the snapshots of a MeanTeacher."""


def sampled_steps(num_steps: int) -> set[int]:
    """Where the student's step is measured: everywhere at first, then 5 % apart or 200 times a run."""
    steps = {*range(1, 20), *range(num_steps, 0, -max(1, num_steps // 200))}
    step = 20.0
    while step < num_steps:
        steps.add(round(step))
        step *= 1.05
    return {step for step in steps if step <= num_steps}


def rate_of(schedule: str, highest: float, num_steps: int) -> Callable[[int], float]:
    """The learning rate of step 1, ..., num_steps; a cosine ends at 0."""
    if schedule == "constant":
        return lambda step: highest
    return lambda step: highest * (1 + math.cos(math.pi * (step - 1) / num_steps)) / 2


def make_optimizer(name: str, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW as it comes."""
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, fused=True)
    return torch.optim.AdamW(model.parameters(), lr=rate, fused=True)


def train(task: Task, optimizer_name: str, schedule: str, num_steps: int, seed: int, run: Path) -> Recording:
    """Train one student, with its EMAs and power tracks beside it; a MeanTeacher writes its files to `run`."""
    torch.manual_seed(seed)
    model = task.make_model()
    rate = rate_of(schedule, task.rates[optimizer_name], num_steps)
    student = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    # The parameters become views of the vector: it is the student after every step, and nothing needs copying.
    nn.utils.vector_to_parameters(student, model.parameters())
    optimizer = make_optimizer(optimizer_name, model, rate(1))
    cells = cells_of(num_steps)
    exponents = torch.tensor([[gamma_of(sigma) + 1] for sigma in SIGMAS], dtype=torch.float64)
    takes = torch.tensor([[cell.momentum] for cell in cells] + [[1.0] for _ in SIGMAS], dtype=torch.float64)
    averages = student.double().repeat(len(takes), 1)
    files: dict[str, dict[int, Tensor]] = {"student": {0: student.clone()}, **{f"{sigma:g}": {} for sigma in SIGMAS}}
    sampled = sampled_steps(num_steps)
    increments = []
    teacher = MeanTeacher(model, snapshots=Snapshots(run, every=num_steps // GRID, sigma_rel=SIGMAS))
    save_file(dict(model.named_parameters()), run / "step_0.safetensors")
    for step in range(1, num_steps + 1):
        before = student.clone() if step in sampled else None
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        inputs, labels = task.draw_batch()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs).flatten(0, -2), labels.flatten()).backward()
        optimizer.step()
        takes[len(cells) :] = 1 - (1 - 1 / step) ** exponents
        averages.lerp_(student.double(), takes)
        teacher.update()
        if before is not None:
            increments.append((step, float((student.double() - before.double()).square().sum())))
        if step % (num_steps // GRID) == 0:
            files["student"][step] = student.clone()
            save_file(dict(model.named_parameters()), run / f"step_{step}.safetensors")
            for sigma, average in zip(SIGMAS, averages[len(cells) :], strict=True):
                files[f"{sigma:g}"][step] = average.float()
    return Recording(num_steps, files, averages[: len(cells)], increments, rate, model, run)


def validation_loss(task: Task, model: nn.Module, parameters: Tensor) -> float:
    """The loss of a model with these parameters; BatchNorm's statistics are those of the training inputs."""
    nn.utils.vector_to_parameters(parameters.float(), model.parameters())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        if task.calibration is not None:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all that is shown
            model.train()
            model(task.calibration)
        model.eval()
        inputs, labels = task.validation
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, -2), labels.flatten()).item()
        model.train()
    return loss


# --- reconstruction ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one method did in one cell."""

    error: float
    """Over the distance of the last student to the true EMA."""

    amplification: float
    """sum |coefficient|: by how much rounding of the files is multiplied."""

    predicted: float | None = None
    """The solver's expectation, over the distance of the student it finds nearest (or item, without students)."""

    measured: float | None = None
    """The error over the same distance."""

    loss: float | None = None
    """Validation loss, where momentum * gap is 1."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One file: what kind it is and after which step it was written."""

    kind: str
    step: int

    def item(self) -> Item:
        """As the solver takes it."""
        if self.kind == "student":
            return Item(Impulse(self.step), FLOAT32)
        return Item(Power(gamma_of(float(self.kind)), 0, self.step), FLOAT32)

    def weights(self, num_steps: int) -> Tensor:
        """The weight of the student after each step 0, ..., num_steps."""
        weights = torch.zeros(num_steps + 1, dtype=torch.float64)
        if self.kind == "student":
            weights[self.step] = 1
        else:
            share = torch.arange(self.step + 1, dtype=torch.float64) / self.step
            weights[1 : self.step + 1] = (share ** (gamma_of(float(self.kind)) + 1)).diff()
        return weights


def ema_weights(momentum: float, num_steps: int) -> Tensor:
    """The weight of the student after each step 0, ..., num_steps in the EMA that started as a copy of the first."""
    kept = (1 - momentum) ** torch.arange(num_steps, -1, -1, dtype=torch.float64)
    return torch.cat([kept[:1], momentum * kept[1:]])


def stored_at(gap: int, num_steps: int) -> list[Stored]:
    """Every file of a run that stores once in `gap` steps; a track has nothing to store before the first step."""
    steps = range(0, num_steps + 1, gap)
    tracks = [Stored(f"{sigma:g}", step) for sigma in SIGMAS for step in steps[1:]]
    return [*(Stored("student", step) for step in steps), *tracks]


@functools.cache
def edm2_coefficients(group: str, cells: tuple[Cell, ...], num_steps: int) -> Tensor:
    """(cells, files of the group): what Karras et al. (2024) minimise, the square of the difference of the weights.

    Over every step, in float64, with coefficients that sum to 1; cells of one gap.
    """
    files = [file for file in stored_at(cells[0].gap, num_steps) if file.kind in GROUPS[group]]
    columns = torch.stack([file.weights(num_steps) for file in files], dim=1)
    wanted = torch.stack([ema_weights(cell.momentum, num_steps) for cell in cells], dim=1)
    last = columns[:, -1:]
    found = torch.linalg.lstsq(columns[:, :-1] - last, wanted - last, rcond=1e-13, driver="gelsd").solution
    return torch.cat([found, 1 - found.sum(dim=0, keepdim=True)]).T


def variances_of(recording: Recording, schedule: str) -> dict[str, Variance]:
    """The ways to know v(s), the expected square of the student's step."""
    size = float(recording.files["student"][recording.num_steps].double().square().sum())
    variances = {"even": EVEN, "measured": interpolated(recording.increments, "measured", squared_norm=size)}
    if schedule != "constant":
        rate = recording.rate
        variances["rate"] = Variance(lambda step: rate(round(step)) ** 2, "squared learning rate")
    return variances


def reconstruct(recording: Recording, schedule: str, task: Task) -> list[tuple[Cell, dict[str, Outcome]]]:
    """Every method in every cell of a run."""
    num_steps = recording.num_steps
    rows = []
    for gap in dict.fromkeys(cell.gap for cell in cells_of(num_steps)):
        stored = stored_at(gap, num_steps)
        vectors = torch.stack([recording.files[file.kind][file.step] for file in stored]).double()
        cells = tuple(cell for cell in cells_of(num_steps) if cell.gap == gap)
        methods, solutions = coefficients_by_method(recording, schedule, stored, cells)
        for number, cell in enumerate(cells):
            ema = recording.emas[cells_of(num_steps).index(cell)]
            distances = (vectors - ema).norm(dim=1)
            last = distances[stored.index(Stored("student", num_steps))]
            outcomes = {}
            for name, coefficients in methods.items():
                made = coefficients[number] @ vectors
                error = float((made - ema).norm())
                outcome: dict[str, Any] = {}
                if name in solutions:
                    solution, nearest = solutions[name][number]
                    outcome = {"predicted": solution.predicted_error, "measured": error / float(distances[nearest])}
                if cell.is_goal:
                    outcome["loss"] = validation_loss(task, recording.model, made)
                outcomes[name] = Outcome(error / float(last), float(coefficients[number].abs().sum()), **outcome)
            if cell.is_goal:
                for name, (made, amplification) in reconstructed_files(recording, cell).items():
                    error, loss = float((made - ema).norm() / last), validation_loss(task, recording.model, made)
                    outcomes[name] = Outcome(error, amplification, loss=loss)
            rows.append((cell, outcomes))
    return rows


def reconstructed_files(recording: Recording, cell: Cell) -> dict[str, tuple[Tensor, float]]:
    """What `ckpt_ema.reconstruct` makes of the files that lie a cell's gap apart, by what of them it may use.

    With the sum of the coefficients' sizes.
    """
    folder = recording.run / f"gap_{cell.gap}"
    folder.mkdir()
    for step in range(0, recording.num_steps + 1, cell.gap):
        for path in recording.run.glob(f"*step_{step}.safetensors"):
            (folder / path.name).symlink_to(path)
    made = {}
    for name, excluded in FILES.items():
        report = ckpt_ema.reconstruct(
            folder, momentum=cell.momentum, exclude=excluded, overwrite=True, announce=lambda plan: None
        )
        tensors = load_file(report.output)
        vector = torch.cat([tensors[each].double().reshape(-1) for each, _ in recording.model.named_parameters()])
        made[name] = vector, report.plan.predictions[0].amplification
    return made


def coefficients_by_method(
    recording: Recording, schedule: str, stored: list[Stored], cells: tuple[Cell, ...]
) -> tuple[dict[str, Tensor], dict[str, list[tuple[Solution, int]]]]:
    """(cells, stored) coefficients of each method; of the solver's also its solutions and their nearest files."""
    num_steps, gap = recording.num_steps, cells[0].gap
    steps = list(range(0, num_steps + 1, gap))
    methods: dict[str, Tensor] = {}
    solutions: dict[str, list[tuple[Solution, int]]] = {}

    def add(name: str, places: list[int], coefficients: Tensor) -> None:
        methods[name] = torch.zeros(len(cells), len(stored), dtype=torch.float64)
        methods[name][:, places] = coefficients

    def add_updates(name: str, updates: Callable[[float], Any]) -> None:
        found = [coefficients_of(updates(cell.momentum)) for cell in cells]
        add(name, list(range(len(steps))), torch.tensor(found, dtype=torch.float64))

    add_updates("per checkpoint", lambda momentum: ema_updates(len(steps), momentum))
    add_updates("hold", lambda momentum: step_updates(Profile("ema", momentum), steps, between="hold"))
    add_updates("linear", lambda momentum: step_updates(Profile("ema", momentum), steps))
    targets = [Ema(cell.momentum, 0, num_steps) for cell in cells]
    variances = variances_of(recording, schedule)
    for group, kinds in GROUPS.items():
        places = [i for i, file in enumerate(stored) if file.kind in kinds]
        if group != "students":  # EDM2's objective has no use for them alone
            add(f"EDM2, {group}", places, edm2_coefficients(group, cells, num_steps))
        for origin, variance in variances.items():
            name = f"cumulative, {group}, {origin}"
            found = solve([stored[i].item() for i in places], targets, variance)
            add(name, places, torch.tensor([solution.coefficients for solution in found], dtype=torch.float64))
            solutions[name] = [(solution, places[solution.nearest]) for solution in found]
    return methods, solutions


# --- report -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One method in one cell of one run."""

    run: str
    schedule: str
    cell: Cell
    gap: int
    """The cell's, in units of the grid."""

    method: str
    outcome: Outcome


FILES = {
    "files, students": ("teacher*",),
    "files, students + 1 track": ("teacher_power_0.05*",),
    "files, students + 2 tracks": (),
}
"""The same through files: what of a run is left out."""

COLUMNS = {
    "per checkpoint": "per checkpoint",
    "hold": "hold",
    "linear": "linear",
    "EDM2, 2 tracks": "EDM2: 2 tracks",
    "EDM2, students + 1 track": "EDM2: students + 1",
    "cumulative, students, measured": "students",
    "cumulative, students + 1 track, measured": "students + 1 track",
    "cumulative, 2 tracks, measured": "2 tracks",
    "cumulative, students + 2 tracks, measured": "students + 2 tracks",
}
"""Methods that the tables show, and their heads."""


def number(value: float) -> str:
    """Two digits."""
    if value >= 10:
        return f"{value:.0f}" if value < 1e4 else f"{value:.0e}"
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.0e}"


def mean_of(values: Iterable[float]) -> float:
    """The geometric mean."""
    return math.exp(statistics.fmean(math.log(max(value, 1e-12)) for value in values))


def print_table(title: str, head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """A markdown table under a line that says what it shows."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")
    sys.stdout.flush()


def print_goal_cells(rows: list[Row]) -> None:
    """One line per run: the cells with momentum * gap = 1 at the middle gap, and their means by schedule."""
    goal = [row for row in rows if row.cell.is_goal and row.gap == GOAL_GAP]
    lines = []
    for run in dict.fromkeys(row.run for row in goal):
        errors = {row.method: row.outcome.error for row in goal if row.run == run}
        lines.append([run, *(number(errors[method]) for method in COLUMNS)])
    for schedule in dict.fromkeys(row.schedule for row in goal):
        of_schedule = [row for row in goal if row.schedule == schedule]
        means = [mean_of(row.outcome.error for row in of_schedule if row.method == method) for method in COLUMNS]
        lines.append([f"**{schedule}, mean**", *(f"**{number(mean)}**" for mean in means)])
    print_table(
        "Error at momentum * gap = 1, ten gaps in the run (last student = 1; geometric means; cumulative: measured v)",
        ["run", *COLUMNS.values()],
        lines,
    )


def print_files(rows: list[Row]) -> None:
    """One line per run: what the command makes of what the online teacher wrote."""
    goal = [row for row in rows if row.cell.is_goal and row.gap == GOAL_GAP]
    errors = {(row.run, row.method): row.outcome.error for row in goal}
    lines = [[run, *(number(errors[run, name]) for name in FILES)] for run in dict.fromkeys(row.run for row in goal)]
    for schedule in dict.fromkeys(row.schedule for row in goal):
        runs = dict.fromkeys(row.run for row in goal if row.schedule == schedule)
        means = [mean_of(errors[run, name] for run in runs) for name in FILES]
        lines.append([f"**{schedule}, mean**", *(f"**{number(mean)}**" for mean in means)])
    print_table(
        "The same through files: MeanTeacher's snapshots, ckpt_ema.reconstruct",
        ["run", *(name.removeprefix("files, ") for name in FILES)],
        lines,
    )


def print_by_half_lives(rows: list[Row]) -> None:
    """One line per gap in half-lives: geometric means over runs and gaps."""
    lines = []
    for half_lives in HALF_LIVES:
        of_gap = [row for row in rows if row.cell.half_lives == half_lives]
        means = [mean_of(row.outcome.error for row in of_gap if row.method == method) for method in COLUMNS]
        lines.append(
            [f"{half_lives:.2g}{' (momentum * gap = 1)' if half_lives == GOAL_HALF_LIVES else ''}", *map(number, means)]
        )
    print_table(
        "Error by the gap in half-lives (geometric mean over all runs and over gaps of 1/40, 1/10 and 1/4 of the run)",
        ["gap / half-life", *COLUMNS.values()],
        lines,
    )


def print_predictions(rows: list[Row]) -> None:
    """Predicted against measured error, by what is stored, by schedule and by v."""
    lines = []
    for group in GROUPS:
        for schedule in dict.fromkeys(row.schedule for row in rows):
            line = [group, schedule]
            for origin in ("even", "rate", "measured"):
                method = f"cumulative, {group}, {origin}"
                found = [row.outcome for row in rows if row.method == method and row.schedule == schedule]
                line.append(describe_prediction(found) if found else "")
            lines.append(line)
    print_table(
        "Error, and measured / predicted error (geometric mean over all cells; a tenth of the cells lie below, a tenth "
        "above the range)",
        ["files", "rate", "v = 1", "v = squared rate", "v measured"],
        lines,
    )


def describe_prediction(outcomes: list[Outcome]) -> str:
    """`0.0031, x 1.1 (0.5 ... 2.3)`."""
    ratios = sorted(
        outcome.measured / max(outcome.predicted, 1e-12)
        for outcome in outcomes
        if outcome.measured is not None and outcome.predicted is not None
    )
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    error = mean_of(outcome.error for outcome in outcomes)
    return f"{number(error)}, × {number(mean_of(ratios))} ({number(low)} … {number(high)})"


def print_losses(rows: list[Row], losses: dict[str, dict[str, float]]) -> None:
    """One line per run: validation losses at momentum * gap = 1 and the middle gap."""
    goal = [row for row in rows if row.cell.is_goal and row.gap == GOAL_GAP]
    shown = {"per checkpoint": "per checkpoint", "linear": "linear"}
    shown |= {name: name.removeprefix("files, ") for name in FILES}
    lines = []
    for run in dict.fromkeys(row.run for row in goal):
        found = {row.method: row.outcome.loss for row in goal if row.run == run}
        ema = losses[run][f"true EMA, gap {next(row.cell.gap for row in goal if row.run == run)}"]
        values = [losses[run]["last student"], ema, *(found[method] or math.nan for method in shown)]
        lines.append([run, *(f"{value:.4f}" for value in values)])
    print_table(
        "Validation loss at momentum * gap = 1, ten gaps in the run",
        ["run", "last student", "true EMA", *shown.values()],
        lines,
    )


def print_comparison(rows: list[Row]) -> dict[str, Any]:
    """In how many cells EDM2's objective did better on the same files, and where."""
    errors = {(row.run, row.cell, row.method): row.outcome.error for row in rows}
    comparison: dict[str, Any] = {}
    print("\ncumulative objective (measured v) against EDM2's on the same files:\n")
    for group in list(GROUPS)[1:]:
        cells = dict.fromkeys((row.run, row.cell) for row in rows)
        pairs = {
            (run, cell): (
                errors[run, cell, f"cumulative, {group}, measured"],
                errors[run, cell, f"EDM2, {group}"],
            )
            for run, cell in cells
        }
        worse = {place: pair for place, pair in pairs.items() if pair[0] > pair[1]}
        print(f"- {group}: worse in {len(worse)} of {len(pairs)} cells", flush=True)
        for (run, cell), (ours, theirs) in worse.items():
            print(f"  - {run}, gap {cell.gap}, {cell.half_lives:.3g} half-lives: {number(ours)} / {number(theirs)}")
        comparison[group] = {
            "cells": len(pairs),
            "worse": [
                {"run": run, "gap": cell.gap, "momentum": cell.momentum, "cumulative": ours, "EDM2": theirs}
                for (run, cell), (ours, theirs) in worse.items()
            ],
        }
    return comparison


def print_solving() -> float:
    """Seconds that the coefficients of a long run take: a million steps, 201 students, 200 snapshots; best of three."""
    steps = range(0, 1_000_001, 5000)
    items = [Item(Impulse(step), FLOAT32) for step in steps]
    items += [Item(Power(gamma_of(0.1), 0, step), FLOAT32) for step in steps[1:]]
    target = Ema(1e-4, 0, steps[-1])
    seconds = math.inf
    for _ in range(3):
        started = time.perf_counter()
        solve(items, [target])
        seconds = min(seconds, time.perf_counter() - started)
    print(f"\nsolving for the coefficients of {len(items)} files over {steps[-1]:,} steps: {seconds:.2f} s")
    return seconds


def draw_losses(axis: Any, rows: list[Row], losses: dict[str, dict[str, float]]) -> None:
    """Validation loss over that of the true EMA, a column per run, where momentum * gap is 1."""
    goal = [row for row in rows if row.cell.is_goal and row.gap == GOAL_GAP]
    runs = list(dict.fromkeys(row.run for row in goal))
    true = {row.run: losses[row.run][f"true EMA, gap {row.cell.gap}"] for row in goal}
    found = {(row.run, row.method): row.outcome.loss for row in goal}
    shown = {
        "last student": ("#6b6b6b", [losses[run]["last student"] for run in runs]),
        "linear": ("#7a9cc6", [found[run, "linear"] for run in runs]),
        **{
            name.removeprefix("files, "): (colour, [found[run, name] for run in runs])
            for name, colour in zip(FILES, ("#e3a857", "#7fb285", "#c8553d"), strict=True)
        },
    }
    for place, (head, (colour, values)) in enumerate(shown.items()):
        places = [i + 0.14 * (place - 2) for i in range(len(runs))]
        ratios = [(value or math.nan) / true[run] for run, value in zip(runs, values, strict=True)]
        axis.plot(places, ratios, "o", color=colour, markersize=4, label=head)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(yscale="log", ylabel="validation loss (true EMA = 1)")
    axis.set_xticks(range(len(runs)), [run.replace("-", "\n") for run in runs], fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.15))


def draw(rows: list[Row], losses: dict[str, dict[str, float]], path: Path) -> None:
    """Error against the gap in half-lives, a panel per gap: medians over the runs, with the quartiles as a band.

    Below it the validation losses.
    """
    plt = start_plot()
    colours = ("#9aa5ad", "#b8b08d", "#6b6b6b", "#7a9cc6", "#44617b", "#e3a857", "#7fb285", "#a05a8c", "#c8553d")
    picture = plt.figure(figsize=(9, 8.2), layout="constrained")
    upper, lower = picture.subfigures(2, 1, height_ratios=[1.15, 1])
    axes = upper.subplots(1, len(GAPS), sharey=True)
    for axis, gap in zip(axes, GAPS, strict=True):
        for (method, head), colour in zip(COLUMNS.items(), colours, strict=True):
            found = [row for row in rows if row.method == method and row.gap == gap]
            errors = [[row.outcome.error for row in found if row.cell.half_lives == place] for place in HALF_LIVES]
            middles = [statistics.median(each) for each in errors]
            is_ours = method.startswith("cumulative")
            style = "o-" if is_ours else "s--" if method.startswith("EDM2") else "^:"
            label = f"cumulative: {head}" if is_ours else head
            axis.plot(HALF_LIVES, middles, style, color=colour, markersize=3.5, linewidth=1.3, label=label)
            if len(found) > len(HALF_LIVES):
                quartiles = [statistics.quantiles(each, n=4, method="inclusive") for each in errors]
                low, high = [each[0] for each in quartiles], [each[2] for each in quartiles]
                axis.fill_between(HALF_LIVES, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=f"{GRID // gap} gaps in the run")
        axis.title.set_fontsize(10)
        axis.set_xticks(HALF_LIVES, [f"{place:.2g}" for place in HALF_LIVES])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].text(HALF_LIVES[0], 1.15, "last student", fontsize=8, va="bottom")
    axes[0].set_ylabel("distance to the true EMA (last student = 1)")
    axes[len(GAPS) // 2].set_xlabel("gap between checkpoints, in half-lives of the EMA")
    handles, labels = axes[0].get_legend_handles_labels()
    upper.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    draw_losses(lower.subplots(), rows, losses)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, metadata={"Date": None})


# --- the whole --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Result:
    """All of one run."""

    rows: list[Row]
    losses: dict[str, float]
    """Validation losses of the last student and of the true EMAs."""

    note: str
    """How long it was and took, for people."""


def run_one(name: str, num_steps: int) -> Result:
    """Train one run and reconstruct its EMAs, in a thread: the bits do not depend on how many runs go on beside it."""
    torch.set_num_threads(1)
    steps = max(1, round(num_steps * TASKS[RUNS[name][0]]().length / GRID)) * GRID
    with tempfile.TemporaryDirectory(prefix="bench-fidelity-") as folder:
        return follow(name, steps, Path(folder))


def follow(name: str, steps: int, folder: Path) -> Result:
    """Train one run, with its files in `folder`, and reconstruct its EMAs."""
    started = time.perf_counter()
    task_name, optimizer, schedule = RUNS[name]
    task = TASKS[task_name]()
    recording = train(task, optimizer, schedule, steps, seed=list(RUNS).index(name), run=folder)
    trained = time.perf_counter() - started
    last_student = recording.files["student"][steps]
    losses = {"last student": validation_loss(task, recording.model, last_student)}
    for cell, ema in zip(cells_of(steps), recording.emas, strict=True):
        if cell.is_goal:
            losses[f"true EMA, gap {cell.gap}"] = validation_loss(task, recording.model, ema)
    rows = [
        Row(name, schedule, cell, cell.gap // (steps // GRID), method, outcome)
        for cell, outcomes in reconstruct(recording, schedule, task)
        for method, outcome in outcomes.items()
    ]
    seconds = time.perf_counter() - started
    note = f"{name}: {steps} steps of {len(last_student)} parameters, {trained:.0f} s of training, {seconds:.0f} s"
    return Result(rows, losses, note)


def run_all(names: list[str], num_steps: int, jobs: int) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """Every run, `jobs` at a time in processes of their own; all rows, and the losses per run."""
    # Spawned, not forked: torch's threads do not survive a fork.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        # The longest come last in the table; they start first.
        futures = {name: pool.submit(run_one, name, num_steps) for name in reversed(RUNS) if name in names}
        for future in as_completed(futures.values()):
            print(future.result().note, file=sys.stderr, flush=True)
    results = {name: futures[name].result() for name in RUNS if name in names}
    rows = [row for result in results.values() for row in result.rows]
    return rows, {name: result.losses for name, result in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="of the MLP and conv; the transformer's are 0.4 x")
    parser.add_argument(
        "--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="RUN", help=", ".join(RUNS)
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--plot", type=Path, help="also draw the errors here, as SVG (needs matplotlib)")
    arguments = parser.parse_args()
    machine = describe_machine()
    print(machine, flush=True)
    started = time.perf_counter()
    rows, losses = run_all(arguments.only, arguments.steps, arguments.jobs)
    print_goal_cells(rows)
    print_files(rows)
    print_by_half_lives(rows)
    print_predictions(rows)
    print_losses(rows, losses)
    comparison = print_comparison(rows)
    solving = print_solving()
    if arguments.plot:
        draw(rows, losses, arguments.plot)
    if arguments.json:
        figures = {
            "machine": machine,
            "steps": arguments.steps,
            "seconds": time.perf_counter() - started,
            "losses": losses,
            "solving": solving,
            "comparison": comparison,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
