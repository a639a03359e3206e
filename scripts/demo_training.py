"""Trains a classifier on scikit-learn's digits with the mean-teacher rule beside it, then folds its checkpoints.

The rule works every 25 steps on the student, a checkpoint is saved every 25 steps: the folded teacher must be the
online teacher, bit for bit.
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

RUN = Path("runs/digits")
MOMENTUM = 0.1
INTERVAL = 25
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
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir(parents=True)

    def save(step: int) -> None:
        torch.save({"state_dict": student.state_dict(), "global_step": step}, RUN / f"step_{step}.pt")

    save(0)
    for step in range(1, NUM_STEPS + 1):
        batch = train[torch.randint(len(train), (8,))]
        loss = nn.functional.cross_entropy(student(images[batch]), noisy[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % INTERVAL == 0:
            with torch.no_grad():
                for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                    old.mul_(1 - MOMENTUM).add_(new, alpha=MOMENTUM)
            save(step)

    command = ["ckpt-ema", "fold", str(RUN), "--momentum", str(MOMENTUM)]
    print(f"$ {' '.join(command)}")
    sys.stdout.flush()
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_ema", *command[1:]], stdout=subprocess.PIPE, text=True, check=True
    )
    print(done.stdout, flush=True)
    folded = make_student()
    folded.load_state_dict(load_file(done.stdout.strip()))

    print(f"{'':16}{'test accuracy':>14}   largest difference to the online teacher")
    for name, model in (("last student", student), ("online teacher", teacher), ("folded teacher", folded)):
        difference = largest_difference(model, teacher)
        note = "itself" if model is teacher else "none, bit for bit" if difference == 0 else f"{difference:.3g}"
        print(f"{name:16}{accuracy(model, images[test], labels[test]):>13.1%}    {note}")
    if largest_difference(folded, teacher) != 0:
        sys.exit("the folded teacher is not the online teacher")


if __name__ == "__main__":
    main()
