"""Trains a classifier on scikit-learn's digits with the mean-teacher rule beside it, then folds its checkpoints.

The rule works every 25 steps on the student, a checkpoint is saved every 25 steps: the folded teacher must be the
online teacher, bit for bit. Another teacher follows every step; of that the folds know no more than five checkpoints,
and two snapshot tracks beside them.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn

from ckpt_ema import MeanTeacher, Snapshots

RUN = Path("runs/digits")
MOMENTUM = 0.1
INTERVAL = 25

SPARSE_RUN = Path("runs/sparse")
STEP_MOMENTUM = 0.01
SPARSE_INTERVAL = 200
NUM_STEPS = 1000
LEARNING_RATE = 0.1


def make_student() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def largest_difference(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def distance(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return sum((a - b).double().square().sum().item() for a, b in pairs) ** 0.5


def run_command(command: str, run: Path, *options: object) -> nn.Module:
    """The model that `ckpt-ema COMMAND RUN OPTIONS` writes; shows the command as it is typed."""
    words = [command, str(run), *map(str, options)]
    print(f"$ ckpt-ema {' '.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "ckpt_ema", *words], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, flush=True)
    model = make_student()
    model.load_state_dict(load_file(done.stdout.strip()))
    return model


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    train, test = order[:600], order[600:]
    # A fifth of the training labels is wrong, as in real life: the student jumps about, its mean does not.
    noisy = torch.where(torch.rand(len(labels)) < 0.2, torch.randint(10, labels.shape), labels)

    student = make_student()
    teacher = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
    for run in (RUN, SPARSE_RUN):
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
    snapshots = Snapshots(SPARSE_RUN, every=SPARSE_INTERVAL)
    step_teacher = MeanTeacher(student, momentum=STEP_MOMENTUM, snapshots=snapshots)

    def save(step: int, run: Path) -> None:
        torch.save({"state_dict": student.state_dict(), "global_step": step}, run / f"step_{step}.pt")

    save(0, RUN)
    for step in range(1, NUM_STEPS + 1):
        batch = train[torch.randint(len(train), (8,))]
        loss = nn.functional.cross_entropy(student(images[batch]), noisy[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step_teacher.update()
        if step % SPARSE_INTERVAL == 0:
            save(step, SPARSE_RUN)
        if step % INTERVAL == 0:
            with torch.no_grad():
                for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                    old.mul_(1 - MOMENTUM).add_(new, alpha=MOMENTUM)
            save(step, RUN)

    folded = run_command("fold", RUN, "--momentum", MOMENTUM)
    print(f"{'':16}{'test accuracy':>14}   largest difference to the online teacher")
    for name, model in (("last student", student), ("online teacher", teacher), ("folded teacher", folded)):
        difference = largest_difference(model, teacher)
        note = "itself" if model is teacher else "none, bit for bit" if difference == 0 else f"{difference:.3g}"
        print(f"{name:16}{accuracy(model, images[test], labels[test]):>13.1%}    {note}")
    if largest_difference(folded, teacher) != 0:
        sys.exit("the folded teacher is not the online teacher")

    print(f"\nA teacher of every step, from checkpoints {SPARSE_INTERVAL} steps apart:\n")
    online = make_student()
    online.load_state_dict(step_teacher.tensors())
    near = SPARSE_RUN / "near.safetensors"
    models = {
        "last student": student,
        "online teacher": online,
        "fold, per checkpoint": run_command("fold", SPARSE_RUN, "--momentum", STEP_MOMENTUM),
        "fold, per step": run_command("fold", SPARSE_RUN, "--momentum", STEP_MOMENTUM, "--per", "step", "--overwrite"),
        "reconstructed": run_command("reconstruct", SPARSE_RUN, "--momentum", STEP_MOMENTUM, "-o", near),
    }
    whole = distance(student, online)
    print(f"{'':21}{'test accuracy':>14}   distance to the online teacher (last student: 1)")
    for name, model in models.items():
        note = "0" if model is online else f"{distance(model, online) / whole:.2g}"
        print(f"{name:21}{accuracy(model, images[test], labels[test]):>13.1%}    {note}")


if __name__ == "__main__":
    main()
