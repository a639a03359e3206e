"""Entries of a state dict that are no tensors: each is named, and an array that may be weights is warned of."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import ckpt_ema
from ckpt_ema.errors import CkptEmaError
from tests.conftest import Outcome, StateDict, quiet_fold

WEIGHTS: StateDict = {"fc.weight": torch.ones(3, 2), "fc.bias": torch.ones(3), "bn.running_mean": torch.zeros(3)}
ODD: dict[str, Any] = {"bn._extra_state": io.BytesIO(b"x"), "scale": 3.5}


def plan_of(tmp_path: Path, tree: Any, *, protocol: int = 2, **options: Any) -> ckpt_ema.FoldPlan:
    """The plan of one checkpoint that holds `tree`."""
    torch.save(tree, tmp_path / "step_0.pt", pickle_protocol=protocol)
    return ckpt_ema.plan(tmp_path, **options)


def test_a_teacher_lacks_what_is_no_tensor_and_the_plan_says_so(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    """A flat state dict with an extra state, an array and a number: each is named on a page and in JSON."""
    run = tmp_path / "run"
    run.mkdir()
    torch.save({**WEIGHTS, **ODD, "prior": np.ones(2, "f4"), "step": 100}, run / "step_0.pt")
    shown = cli("plan", run)
    assert "not used  bn._extra_state, scale: not a tensor\n" in shown.stdout
    assert "not used  prior: a numpy array, not a tensor\n" in shown.stdout
    assert "step:" not in shown.stdout
    assert "Warning: 1 numpy array is in `step_0.pt` and will not be in the teacher: `prior`" in shown.stderr
    assert "`torch.from_numpy`" in shown.stderr
    record = json.loads(cli("plan", run, "--json").stdout)
    assert {"name": "bn._extra_state", "reason": "not a tensor"} in record["left_out_tensors"]
    assert "prior" in cli("fold", run, "-q").stderr


@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_are_told_from_numbers_in_either_protocol(tmp_path: Path, protocol: int) -> None:
    """numpy pickles an array in two ways, and a scalar in a third, which is a number like any other."""
    planned = plan_of(
        tmp_path,
        {**WEIGHTS, "array": np.ones(2), "step_embedding": np.ones((2, 3)).T, "scalar": np.float32(2)},
        protocol=protocol,
    )
    reasons = dict(planned.left_out_tensors)
    assert reasons == {
        **dict.fromkeys(["array", "step_embedding"], "a numpy array, not a tensor"),
        "scalar": "not a tensor",
    }
    assert any("2 numpy arrays" in warning and "`array`, `step_embedding`" in warning for warning in planned.warnings)


@pytest.mark.parametrize(
    "beside",
    [
        {"step": 100},
        {"global_step": 7, "epoch": 1, "iter_num": 3, "num_updates": 4, "epochs_run": 1},
        {"optimizer": {"state": {}}, "lr_scheduler": {}, "args": {"lr": 1}, "config": "x", "rng_state": np.ones(3)},
    ],
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_what_a_trainer_keeps_beside_the_tensors_is_not_told(
    tmp_path: Path, beside: dict[str, Any], is_nested: bool
) -> None:
    """Counters, optimizers and settings are no part of the model, wherever they lie."""
    trees = [{**WEIGHTS, **beside}]
    if is_nested:
        trees = [{"model": WEIGHTS, **beside}, {"model": {**WEIGHTS, **beside}}]
    for tree in trees:
        planned = plan_of(tmp_path, tree)
        assert not planned.left_out_tensors
        assert not any("numpy" in warning for warning in planned.warnings)


def test_entries_are_told_under_the_names_of_the_teacher(tmp_path: Path) -> None:
    """Wrappers come off their names; what lies outside a prefix is left out for that, without a warning."""
    tree = {
        "module._orig_mod.student.fc.weight": torch.ones(3),
        "module._orig_mod.student.fc._extra_state": io.BytesIO(),
        "module._orig_mod.head.weight": torch.ones(3),
        "module._orig_mod.head.table": np.ones(3),
    }
    planned = plan_of(tmp_path, tree, prefix="student")
    assert dict(planned.left_out_tensors) == {
        "fc._extra_state": "not a tensor",
        "head.weight": "not under `student.`",
        "head.table": "not under `student.`",
    }
    assert not any("numpy" in warning for warning in planned.warnings)


@pytest.mark.parametrize("teacher", ["teacher", "model_ema"])
def test_entries_of_an_average_are_the_averages(tmp_path: Path, teacher: str) -> None:
    """What is no tensor in the teacher's half is not missed in the student's."""
    student = "student." if teacher == "teacher" else ""
    tree = {f"{half}{name}": value for half in (student, f"{teacher}.") for name, value in WEIGHTS.items()}
    planned = plan_of(tmp_path, {**tree, f"{teacher}.fc.table": np.ones(3), f"{student}fc.table": np.ones(2)})
    reasons = dict(planned.left_out_tensors)
    assert reasons["fc.table"] == "a numpy array, not a tensor"
    assert reasons[f"{teacher}.fc.table"] == reasons[f"{teacher}.fc.weight"]
    assert any("1 numpy array is" in warning and "`fc.table`" in warning for warning in planned.warnings)


def write_shards(folder: Path, odd: dict[str, Any]) -> None:
    """Transformers' older shards, with the index beside them."""
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    torch.save({"fc.weight": WEIGHTS["fc.weight"], **odd}, folder / names[0])
    torch.save({"fc.bias": WEIGHTS["fc.bias"]}, folder / names[1])
    homes = {"fc.weight": names[0], "fc.bias": names[1], **dict.fromkeys(odd, names[0])}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": homes}))


def write_nameless_shards(folder: Path, odd: dict[str, Any]) -> None:
    """Shards without an index."""
    write_shards(folder, odd)
    (folder / "pytorch_model.bin.index.json").unlink()


def write_two_models(folder: Path, odd: dict[str, Any]) -> None:
    """A model and its average side by side, as diffusers has them."""
    for name, state in (("unet", {**WEIGHTS, **odd}), ("unet_ema", WEIGHTS)):
        (folder / name).mkdir()
        torch.save(state, folder / name / "pytorch_model.bin")


def write_deepspeed(folder: Path, odd: dict[str, Any]) -> None:
    """DeepSpeed without ZeRO."""
    torch.save({"module": {**WEIGHTS, **odd}, "global_steps": 1}, folder / "mp_rank_00_model_states.pt")


def write_ranks(folder: Path, odd: dict[str, Any]) -> None:
    """A file per rank, as MMEngine has them."""
    torch.save({"state_dict": {**WEIGHTS, **odd}}, folder / "rank0.pth")


def write_sub_models(folder: Path, odd: dict[str, Any]) -> None:
    """Two levels of one model, in the only file of a folder."""
    model = {"encoder": {**WEIGHTS, **odd}, "decoder": WEIGHTS}
    torch.save({"model": model}, folder / "model.pt")


def write_dcp(folder: Path, odd: dict[str, Any]) -> None:
    """torch.distributed.checkpoint, nested as trainers do."""
    folder.rmdir()
    dcp.save({"model": {**WEIGHTS, **odd}}, checkpoint_id=folder, no_dist=True)


FOLDERS = [
    write_shards,
    write_nameless_shards,
    write_two_models,
    write_deepspeed,
    write_ranks,
    write_sub_models,
    write_dcp,
]


@pytest.mark.parametrize("write", FOLDERS)
def test_entries_are_told_in_every_layout(tmp_path: Path, write: Callable[[Path, dict[str, Any]], None]) -> None:
    """Whatever wrote a folder: what is no tensor of the student is named."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    write(folder, ODD)
    named = {name.removeprefix("encoder.") for name, _ in ckpt_ema.plan(tmp_path).left_out_tensors}
    assert named >= ODD.keys()


@pytest.mark.parametrize("write", [write for write in FOLDERS if write is not write_dcp])
def test_sparse_tensors_are_refused_in_every_layout(
    tmp_path: Path, write: Callable[[Path, dict[str, Any]], None]
) -> None:
    """A tensor that is not stored as plain numbers is missing in no teacher in silence."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    write(folder, {"odd.weight": torch.eye(3).to_sparse()})
    with pytest.raises(CkptEmaError, match=r"odd\.weight` is a tensor of a kind that is not stored as plain numbers"):
        quiet_fold(tmp_path, tmp_path / "t.safetensors")
    shutil.rmtree(folder)
    folder.mkdir()
    write(folder, {"odd.weight": torch.eye(3)})
    quiet_fold(tmp_path, tmp_path / "t.safetensors")


def test_an_entry_that_is_no_tensor_does_not_vouch_for_the_index(tmp_path: Path) -> None:
    """What the index places in a shard, and is nowhere, is still missing."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    write_shards(folder, {"prior": np.ones(2)})
    index = folder / "pytorch_model.bin.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["head.weight"] = next(iter(table["weight_map"].values()))
    index.write_text(json.dumps(table))
    with pytest.raises(CkptEmaError, match=r"holds `head\.weight`, which it does not"):
        ckpt_ema.plan(folder, tmp_path / "t")
