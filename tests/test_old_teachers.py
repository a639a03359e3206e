"""A teacher in the place of an older one: what this tool wrote goes, what anybody else wrote never does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import ckpt_ema
from ckpt_ema.errors import CkptEmaError, MisuseError
from ckpt_ema.formats import read_contents
from ckpt_ema.output.old_teacher import own_files
from tests.conftest import StateDict, quiet_fold

MOMENTUM = 0.25
FORMS: dict[str, dict[str, Any]] = {
    "shards": {"shard_size_bytes": 200},
    "one": {"shard_size_bytes": 10**9},
    "dcp": {"output_format": "dcp"},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints of a few tensors."""
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2):
        state = {name: torch.full((30 + number,), float(step)) for number, name in enumerate("abcdef")}
        torch.save(state, run / f"step_{step}.pt")
    return run


def tensors_of(folder: Path) -> StateDict:
    """A teacher as the libraries of its format load it."""
    if (folder / ".metadata").exists():
        state: StateDict = {name: torch.zeros(30 + number) for number, name in enumerate("abcdef")}
        dcp.load(state, checkpoint_id=str(folder), no_dist=True)
        return state
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    tensors: StateDict = {}
    for name in names:
        tensors |= load_file(folder / name)
    return tensors


def names_in(folder: Path) -> set[str]:
    """Of all files."""
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("before", FORMS)
@pytest.mark.parametrize("after", FORMS)
def test_each_form_takes_the_place_of_each(run: Path, tmp_path: Path, before: str, after: str) -> None:
    """Nothing of the old teacher is left, whatever form either has, and a note that somebody put there is."""
    quiet_fold(run, tmp_path / "t", momentum=0.5, **FORMS[before])
    (tmp_path / "t" / "note.txt").write_text("mine")
    quiet_fold(run, tmp_path / "t", momentum=MOMENTUM, overwrite=True, **FORMS[after])
    quiet_fold(run, tmp_path / "fresh", momentum=MOMENTUM, **FORMS[after])
    assert names_in(tmp_path / "t") == names_in(tmp_path / "fresh") | {"note.txt"}
    assert names_in(tmp_path) == {"run", "t", "fresh"}
    for name, tensor in tensors_of(tmp_path / "t").items():
        assert torch.equal(tensor, torch.full_like(tensor, 1 + MOMENTUM)), name


def test_a_teachers_folder_that_a_trainer_saved_into_is_no_teacher(run: Path, tmp_path: Path) -> None:
    """Provenance counts for the table it was written with, not for whatever lies beside it later."""
    folder = run / "step_9"
    quiet_fold(run, folder, momentum=MOMENTUM, output_format="dcp")
    assert read_contents(folder).is_own_teacher
    assert len(ckpt_ema.plan(run, momentum=MOMENTUM).checkpoints) == 2
    student = {name: torch.full((30 + number,), 9.0) for number, name in enumerate("abcdef")}
    dcp.save(student, checkpoint_id=str(folder), no_dist=True)
    assert (folder / "ckpt_ema.json").exists()
    assert not read_contents(folder).is_own_teacher
    assert own_files(folder) == []
    plan = ckpt_ema.plan([run / "step_1.pt", folder], tmp_path / "t.safetensors", momentum=MOMENTUM)
    assert [item.name for item in plan.checkpoints][-1] == "step_9"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CkptEmaError, match="holds no teacher that ckpt-ema wrote"):
        quiet_fold(run, folder, momentum=MOMENTUM, output_format="dcp", overwrite=True, exclude=["step_9*"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("after", FORMS)
@pytest.mark.parametrize(
    "foreign",
    [
        ".metadata",
        "__0_0.distcp",
        "__3_0.distcp",
        "model-00001-of-00009.safetensors",
        "pytorch_model.bin",
        "adapter_model.safetensors",
        "model_1.safetensors",
        "model.safetensors.index.json",
    ],
)
def test_weights_of_somebody_else_are_never_removed(run: Path, tmp_path: Path, foreign: str, after: str) -> None:
    """Though they have a name that a teacher's file may have: nothing is folded, and the hint says what to do."""
    target = tmp_path / "t"
    quiet_fold(run, target, momentum=0.5, shard_size_bytes=10**9)
    if foreign.endswith(".safetensors"):
        save_file({"x": torch.ones(3)}, target / foreign)
    else:
        (target / foreign).write_bytes(b'{"weight_map": {"x": "elsewhere.safetensors"}}')
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(CkptEmaError, match="ckpt-ema did not write it") as caught:
        quiet_fold(run, target, momentum=MOMENTUM, overwrite=True, **FORMS[after])
    assert foreign in caught.value.message
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_snapshots_and_teachers_beside_each_other_are_not_one_old_teacher(run: Path, tmp_path: Path) -> None:
    """A folder of teachers that were folded into single files is no folder to replace."""
    folder = tmp_path / "teachers"
    folder.mkdir()
    for momentum in (0.1, 0.5):
        quiet_fold(run, folder / f"m{momentum}.safetensors", momentum=momentum)
    with pytest.raises(CkptEmaError, match="holds no teacher"):
        quiet_fold(run, folder, momentum=MOMENTUM, overwrite=True, shard_size_bytes=200)
    assert names_in(folder) == {"m0.1.safetensors", "m0.5.safetensors"}


@pytest.mark.parametrize("form", ["shards", "dcp"])
def test_a_way_that_leads_through_the_teacher_itself(run: Path, tmp_path: Path, form: str) -> None:
    """`t/../t`, and a link in `t` that leads back: the teacher keeps its name."""
    target = tmp_path / "t"
    for way in ("t", "t/../t", "t/back/t"):
        if way == "t/back/t":
            (target / "back").symlink_to(tmp_path)
        quiet_fold(run, tmp_path / way, momentum=MOMENTUM, overwrite=True, **FORMS[form])
        assert names_in(tmp_path) == {"run", "t"}, way
        assert tensors_of(target)["a"][0] == 1 + MOMENTUM


@pytest.mark.parametrize("form", FORMS)
def test_an_output_that_is_a_link_to_a_folder(run: Path, tmp_path: Path, form: str) -> None:
    """The teacher lies where the link leads, and the link stays."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "t").symlink_to("elsewhere")
    for overwrite in (False, True):
        quiet_fold(run, tmp_path / "t", momentum=MOMENTUM, overwrite=overwrite, **FORMS[form])
        assert (tmp_path / "t").is_symlink()
        assert tensors_of(tmp_path / "elsewhere")["a"][0] == 1 + MOMENTUM
        assert names_in(tmp_path) == {"run", "t", "elsewhere"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("output", "lies_in"), [(".", "here"), ("..", "."), ("deep/..", "here"), ("x/.", "here/x")])
def test_outputs_without_a_name_of_their_own(
    run: Path, tmp_path: Path, output: str, lies_in: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.` is an empty folder like another; where it is not empty, that is what is said."""
    here = tmp_path / "place" / "here"
    (here / "deep").mkdir(parents=True)
    monkeypatch.chdir(here)
    if output == ".":
        (here / "deep").rmdir()
    if output in (".", "x/."):
        quiet_fold(run, output, momentum=MOMENTUM, **FORMS[form])
        assert tensors_of(tmp_path / "place" / lies_in)["a"][0] == 1 + MOMENTUM
        return
    with pytest.raises(CkptEmaError, match="exists"):
        quiet_fold(run, output, momentum=MOMENTUM, **FORMS[form])
    with pytest.raises(CkptEmaError, match="holds no teacher"):
        quiet_fold(run, output, momentum=MOMENTUM, overwrite=True, **FORMS[form])


@pytest.mark.parametrize("output", ["/", "/proc"])
def test_where_a_disk_is_mounted_no_folder_can_be_replaced(run: Path, output: str) -> None:
    """Said before the fold, with a name that works."""
    with pytest.raises(MisuseError, match="mounted") as caught:
        quiet_fold(run, output, momentum=MOMENTUM, shard_size_bytes=200)
    assert f"--output {Path(output) / 'teacher'}`" in str(caught.value.hint)


@pytest.mark.parametrize("form", FORMS)
def test_a_name_that_leaves_no_room_for_hidden_ones(run: Path, tmp_path: Path, form: str) -> None:
    """The longest name works; the next says how long one may be, before the fold."""
    most = os.pathconf(tmp_path, "PC_NAME_MAX") - len("..0123abcd.tmp")
    quiet_fold(run, tmp_path / ("x" * most), momentum=MOMENTUM, **FORMS[form])
    with pytest.raises(CkptEmaError, match=f"has a name of {most + 1} bytes, and may have {most} here"):
        quiet_fold(run, tmp_path / ("x" * (most + 1)), momentum=MOMENTUM, **FORMS[form])


def test_a_journal_that_the_disk_did_not_take_is_not_left(run: Path, tmp_path: Path) -> None:
    """A limit on file sizes ends even the journal's first line."""
    names = {f"a{number}": torch.ones(1) for number in range(400)}
    for step in (1, 2):
        torch.save(names, run / f"step_{step}.pt")
    command = f"ulimit -f 1; exec {sys.executable} -m ckpt_ema fold {run} --momentum 0.5 -o z --shard-size 4 -q"
    process = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "File too large" in process.stderr
    assert names_in(tmp_path) == {"run"}


def test_what_a_stopped_removal_left_is_found_again(run: Path, tmp_path: Path) -> None:
    """However many of an old teacher's files are gone already, the rest are known as its."""
    for form in ("shards", "dcp"):
        whole = tmp_path / form
        quiet_fold(run, whole, momentum=MOMENTUM, **FORMS[form])
        names = own_files(whole)
        assert set(names) == names_in(whole)
        for count in range(1, len(names)):
            part = tmp_path / f"{form}-{count}"
            shutil.copytree(whole, part)
            for name in names[:count]:
                (part / name).unlink()
            assert own_files(part) == names[count:]
