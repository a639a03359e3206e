"""Tensors whose stored numbers are not their values: none of them is folded, and each is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import ckpt_ema
from ckpt_ema.errors import CkptEmaError
from tests.conftest import assert_same_bits, hook_teacher, quiet_fold

COMPLEX = torch.tensor([1 + 2j, 3 + 4j])
UNSIGNED: dict[str, Callable[[], torch.Tensor]] = {
    "conj": COMPLEX.conj,
    "neg": lambda: COMPLEX.conj().imag,
    "both": lambda: torch._neg_view(COMPLEX).conj(),
    "parameter": lambda: torch.nn.Parameter(COMPLEX.conj()),
}


class Holder(torch.nn.Module):
    """A module with one tensor more than plain ones."""

    def __init__(self, odd: torch.Tensor) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)
        self.register_buffer("odd", odd)


WHOLES: dict[str, Callable[[torch.Tensor], Any]] = {
    "state dict": lambda odd: {"odd": odd, "v": torch.ones(2)},
    "nested": lambda odd: {"model": {"odd": odd, "v": torch.ones(2)}, "step": 3},
    "alone": lambda odd: {"model": {"odd": odd}},
    "sub-models": lambda odd: {"model": {"a": {"odd": odd, "v": torch.ones(2)}, "b": {"v": torch.ones(2)}}},
    "module": Holder,
}


def refusal_of(path: Path) -> CkptEmaError:
    """The error that planning this file ends with."""
    with pytest.raises(CkptEmaError) as caught:
        ckpt_ema.plan([path])
    return caught.value


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("whole", WHOLES)
@pytest.mark.parametrize("kind", UNSIGNED)
def test_tensors_that_are_stored_without_their_sign_are_refused(
    tmp_path: Path, kind: str, whole: str, legacy: bool
) -> None:
    """A view that conjugates or negates keeps its sign apart from its bytes: refused by name, and what to save."""
    path = tmp_path / "step_0.pt"
    torch.save(WHOLES[whole](UNSIGNED[kind]()), path, _use_new_zipfile_serialization=not legacy)
    error = refusal_of(path)
    assert str(path) in error.message
    assert "odd` is stored without its sign" in error.message
    assert error.hint == "save it as `tensor.resolve_conj().resolve_neg()`"


def test_the_way_out_of_tensors_without_their_sign_works(tmp_path: Path) -> None:
    """What the hint says gives a checkpoint that folds to torch's own numbers."""
    students = []
    for step in range(2):
        student = {name: make().detach() * (step + 1) for name, make in UNSIGNED.items()}
        students.append({name: tensor.resolve_conj().resolve_neg() for name, tensor in student.items()})
        torch.save(students[-1], tmp_path / f"step_{step}.pt")
    quiet_fold(tmp_path, tmp_path / "t.safetensors", momentum=0.25)
    assert_same_bits(load_file(tmp_path / "t.safetensors"), hook_teacher(students, 0.25))


def test_tensors_without_their_sign_beside_the_student_do_not_hinder(tmp_path: Path) -> None:
    """What is not folded may be stored in any way."""
    torch.save({"model": {"w": torch.ones(3)}, "optimizer": {"state": {"m": COMPLEX.conj()}}}, tmp_path / "step_0.pt")
    assert [tensor.name for tensor in ckpt_ema.plan(tmp_path).tensors] == ["w"]


def test_pieces_without_their_sign_are_refused(tmp_path: Path) -> None:
    """A distributed checkpoint keeps every piece as torch.save does, with the sign beside it."""
    dcp.save({"v": torch.ones(2), "odd": COMPLEX.conj()}, checkpoint_id=tmp_path / "step_0", no_dist=True)
    assert "`odd` is stored without its sign" in refusal_of(tmp_path / "step_0").message
