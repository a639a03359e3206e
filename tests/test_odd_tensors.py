"""Tensors whose stored numbers are not their values: none of them is folded, and each is named."""

from __future__ import annotations

import warnings
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


def quantised(dtype: str) -> torch.Tensor:
    """Three numbers in few bits, with a scale for all of them or for each row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is going to drop them; files stay
        if dtype == "qint8":
            return torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)
        scales, zeros = torch.ones(2), torch.zeros(2)
        return torch.quantize_per_channel(torch.randn(2, 4), scales, zeros, 0, getattr(torch, dtype))


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


def refusal_of(path: Path, **options: str) -> CkptEmaError:
    """The error that planning this file ends with."""
    with pytest.raises(CkptEmaError) as caught:
        ckpt_ema.plan([path], **options)
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


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("whole", WHOLES)
@pytest.mark.parametrize("dtype", ["qint8", "quint8", "quint4x2"])
def test_quantised_tensors_are_refused_in_words(tmp_path: Path, dtype: str, whole: str, legacy: bool) -> None:
    """Nothing is wrong with the file: the tensor is named, and that it cannot be averaged as it is."""
    path = tmp_path / "step_0.pt"
    torch.save(WHOLES[whole](quantised(dtype)), path, _use_new_zipfile_serialization=not legacy)
    error = refusal_of(path)
    assert str(path) in error.message
    assert "odd` is quantised, and such tensors cannot be averaged" in error.message
    assert "`tensor.dequantize()`" in (error.hint or "")


@pytest.mark.parametrize("whole", WHOLES)
def test_tensors_of_a_dtype_that_is_not_known_are_refused_with_its_name(tmp_path: Path, whole: str) -> None:
    """A dtype that torch has and this tool has not is named, and so is its tensor."""
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no dtype that is not known here")
    path = tmp_path / "step_0.pt"
    torch.save(WHOLES[whole](torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)), path)
    error = refusal_of(path)
    assert str(path) in error.message
    assert "odd` is of dtype torch.float4_e2m1fn_x2, which is not known here" in error.message
    assert "`--prefix`" in (error.hint or "")


@pytest.mark.parametrize("legacy", [False, True])
def test_quantised_and_unknown_tensors_beside_the_student_do_not_hinder(tmp_path: Path, legacy: bool) -> None:
    """What is not folded may be of any dtype, also where the bytes behind it are the student's."""
    path = tmp_path / "step_0.pt"
    weight = torch.arange(6.0)
    tree: dict[str, Any] = {"ema": {"w": quantised("quint8")}, "model": {"w": weight}}
    if hasattr(torch, "float4_e2m1fn_x2") and not legacy:
        tree["optimizer"] = {"m": torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}
    torch.save(tree, path, _use_new_zipfile_serialization=not legacy)
    quiet_fold(tmp_path, tmp_path / "t.safetensors")
    assert_same_bits(load_file(tmp_path / "t.safetensors"), {"w": weight})


@pytest.mark.parametrize("options", [{"prefix": "student."}, {}])
def test_tensors_outside_of_what_is_folded_may_be_odd(tmp_path: Path, options: dict[str, str]) -> None:
    """A sub-model by `--prefix`, as hints have it, or the student's half of a pair: the other part is not looked at."""
    odd = {"a": quantised("qint8"), "b": COMPLEX.conj()}
    if hasattr(torch, "float4_e2m1fn_x2"):
        odd["c"] = torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    tree = {"student.w": torch.ones(3), "teacher.w": torch.zeros(3), **{f"teacher.{n}": t for n, t in odd.items()}}
    torch.save(tree, tmp_path / "step_0.pt")
    quiet_fold(tmp_path, tmp_path / "t.safetensors", **options)
    assert_same_bits(load_file(tmp_path / "t.safetensors"), {"w": torch.ones(3)})
    assert "is quantised" in refusal_of(tmp_path / "step_0.pt", prefix="teacher.").message


def test_pieces_that_are_quantised_or_of_an_unknown_dtype_are_refused(tmp_path: Path) -> None:
    """A distributed checkpoint has the dtype in its table, and may hold such tensors beside the student."""
    odd = {"odd": quantised("qint8")}
    if hasattr(torch, "float4_e2m1fn_x2"):
        odd["odder"] = torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    for name, tensor in odd.items():
        dcp.save({"v": torch.ones(2), name: tensor}, checkpoint_id=tmp_path / name / "step_0", no_dist=True)
        what = "is quantised" if name == "odd" else "is of dtype torch.float4_e2m1fn_x2"
        assert f"`{name}` {what}" in refusal_of(tmp_path / name / "step_0").message
    dcp.save({"model": {"v": torch.ones(2)}, "optimizer": odd}, checkpoint_id=tmp_path / "a" / "step_0", no_dist=True)
    assert [tensor.name for tensor in ckpt_ema.plan(tmp_path / "a").tensors] == ["v"]
