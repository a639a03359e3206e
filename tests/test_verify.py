"""A teacher that is checked: what is wrong with it is found, and what is right is recomputed from its run."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckpt_ema
import ckpt_ema.verification
from ckpt_ema.byte_ranges import TensorRange
from tests.conftest import Outcome, make_student, quiet_fold, save_students

Cli = Callable[..., Outcome]


def failed(found: ckpt_ema.Verification) -> list[str]:
    return [f"{check.name}: {check.text}" for check in found.checks if check.is_ok is False]


def replace_tensors(teacher: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other numbers under the same record."""
    with safe_open(teacher, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, teacher, metadata)


def many_blocks(run: Path, dtype: torch.dtype = torch.float32) -> None:
    """Three checkpoints of a model that takes some fifty blocks of a small budget."""
    run.mkdir()
    for step in (100, 200, 300):
        generator = torch.Generator().manual_seed(step)
        student = {f"l{i}.weight": torch.randn(60, 500, generator=generator).to(dtype) for i in range(4)}
        student |= {"bn.running_mean": torch.randn(9, generator=generator), "n": torch.tensor(step)}
        save_file(student, run / f"step_{step}.safetensors")


OPTIONS: list[dict[str, Any]] = [
    {"momentum": 0.3},
    {"momentum": 0.3, "interval": 2},
    {"momentum": 0.004, "per": "step"},
    {"momentum": 0.004, "per": "step", "interval": 10, "between": "hold"},
    {"half_life": 120.0},
    {"profile": "uniform"},
    {"profile": "minus-sqrt"},
    {"profile": "power", "sigma_rel": 0.1},
    {"coefficients": {"step_100.safetensors": 0.25, "step_300.safetensors": 0.75}},
    {"momentum": 0.3, "skip_buffers": False},
    {"momentum": 0.3, "buffers": ["l1*"]},
    {"momentum": 0.3, "dtype": "bfloat16"},
    {"momentum": 0.3, "accumulate": "float64"},
    {"momentum": 0.3, "last": 2},
    {"momentum": 0.3, "shard_size_bytes": 200_000},
    {"momentum": 0.3, "output_format": "dcp"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)))
def test_a_teacher_is_recomputed_from_what_it_says(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    """However it was folded, the record and the run are enough to make every bit again."""
    many_blocks(tmp_path / "run", dtype)
    is_folder = "shard_size_bytes" in options or "output_format" in options
    output = tmp_path / ("t" if is_folder else "t.safetensors")
    quiet_fold(tmp_path / "run", output, **options)
    found = ckpt_ema.verify(output, tmp_path / "run", share=1, memory_budget_bytes=1 << 20)
    assert failed(found) == []
    assert "all of it from" in found.checks[-1].text


def test_one_flipped_bit_is_found(tmp_path: Path, cli: Cli) -> None:
    """In a tensor's last byte or its first: the tensor, the element, both values, exit 1."""
    many_blocks(tmp_path / "run")
    assert cli("fold", "run", "--momentum", 0.3, "-o", "t.safetensors").code == 0
    good = cli("verify", "t.safetensors", "run", "--share", 1)
    assert good.code == 0, good.stdout
    assert good.stdout.count("ok ") == 4
    path = tmp_path / "t.safetensors"
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    bad = cli("verify", "t.safetensors", "run", "--share", 1, "-q")
    assert bad.code == 1
    assert bad.stdout.startswith("failed    recomputed: `")
    assert " at element " in bad.stdout
    assert "and the fold makes" in bad.stdout
    table = json.loads(cli("verify", "t.safetensors", "run", "--share", 1, "--json").stdout)
    assert table["ok"] is False
    assert [check["ok"] for check in table["checks"]] == [True, True, True, False]


def test_verify_lets_go_of_the_teachers_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a checkpoint changes between the plan and the reading."""
    run, teacher = tmp_path / "run", tmp_path / "t.safetensors"
    save_students(run, 3)
    quiet_fold(run, teacher, momentum=0.1)
    plan_again = ckpt_ema.verification.plan_again

    def plan_then_touch(*arguments: Any) -> Any:
        found = plan_again(*arguments)
        os.utime(run / "step_200.safetensors")
        return found

    monkeypatch.setattr(ckpt_ema.verification, "plan_again", plan_then_touch)
    for _ in range(3):
        assert not ckpt_ema.verify(teacher, run).is_ok
    held = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert str(teacher) not in held


def test_a_sample_says_how_much_it_looked_at(tmp_path: Path) -> None:
    """At least 16 blocks, chosen by the seed; a fault outside of them is not seen, in all of them it is."""
    many_blocks(tmp_path / "run")
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.3)
    one, other = (
        ckpt_ema.verify(tmp_path / "t.safetensors", tmp_path / "run", seed=seed, memory_budget_bytes=1 << 15)
        for seed in (3, 3)
    )
    assert one == other
    assert "16 of " in one.checks[-1].text
    assert "`--seed 3`" in one.checks[-1].text
    assert "%" in one.checks[-1].text


def test_numbers_that_are_not_finite_are_found(tmp_path: Path) -> None:
    """A NaN or an infinity in an averaged tensor fails; an infinity in a copied one is a mask."""
    save_students(tmp_path / "run", 2)
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.3)
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        metadata = file.metadata()
    for name, value, is_ok in (
        ("fc.weight", float("nan"), False),
        ("fc.weight", float("inf"), False),
        ("bn.running_mean", float("inf"), True),
        ("bn.running_mean", float("nan"), False),
    ):
        tensors = load_file(tmp_path / "t.safetensors")
        tensors[name].view(-1)[3] = value
        save_file(tensors, tmp_path / "u.safetensors", metadata=metadata)
        found = ckpt_ema.verify(tmp_path / "u.safetensors")
        assert found.is_ok is is_ok, found
        if not is_ok:
            assert failed(found) == [f"finite: `{name}` holds {value} at element 3"]


def test_a_file_that_is_damaged_fails_its_structure(tmp_path: Path, cli: Cli) -> None:
    """Cut short: one line that says so, exit 1, no traceback."""
    save_students(tmp_path / "run", 2)
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.3)
    content = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "t.safetensors").write_bytes(content[:-10])
    done = cli("verify", "t.safetensors")
    assert done.code == 1
    assert done.stdout.startswith("failed    structure: ")
    assert "Traceback" not in done.stderr


def take_shard_of_another(folder: Path) -> None:
    shutil.copy(folder.with_name("other") / "model-00002-of-00004.safetensors", folder)


FAULTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("shards", lambda folder: (folder / "model-00002-of-00004.safetensors").unlink(), "lacks 1 of its 4 shards"),
    ("shards", lambda folder: (folder / "model.safetensors.index.json").unlink(), "index.json` is missing"),
    ("shards", take_shard_of_another, "00002-of-00004.safetensors` is of another teacher than"),
    ("shards", lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"), "may be loaded in its place"),
    ("single", lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"), "may be loaded in its place"),
    ("dcp", lambda folder: (folder / "__1_0.distcp").write_bytes(b"x"), "may be loaded in its place"),
    ("dcp", lambda folder: (folder / ".metadata").unlink(), ".metadata"),
]


@pytest.mark.parametrize(("kind", "spoil", "says"), FAULTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_folder_that_is_not_as_it_was_written_fails_its_structure(
    tmp_path: Path, cli: Cli, kind: str, spoil: Callable[[Path], object], says: str
) -> None:
    """Whatever another library would stumble over, or load in the teacher's place; what is beside it is no matter."""
    many_blocks(tmp_path / "run")
    shape = {"shards": ["--shard-size", 200_000], "single": ["--shard-size", "1GB"], "dcp": ["--output-format", "dcp"]}
    for name, momentum in (("t", 0.3), ("other", 0.4)):
        assert cli("fold", "run", "--momentum", momentum, "-o", name, *shape[kind]).code == 0
    (tmp_path / "t" / "notes.md").write_text("mine")
    assert cli("verify", "t", "run", "--share", 1).code == 0
    spoil(tmp_path / "t")
    done = cli("verify", "t", "--json")
    assert done.code == 1, done.stderr
    (check,) = [check for check in json.loads(done.stdout)["checks"] if not check["ok"]]
    assert check["name"] == "structure"
    assert says in check["text"]


def test_a_byte_around_the_tensors_of_a_dcp_teacher_is_found(tmp_path: Path) -> None:
    """Readers differ in how closely they look at a zip: not one byte of its framing may be another one."""
    many_blocks(tmp_path / "run")
    quiet_fold(tmp_path / "run", tmp_path / "t", momentum=0.3, output_format="dcp")
    path = tmp_path / "t" / "__0_0.distcp"
    content = path.read_bytes()
    ranges = [
        (tensor.begin, tensor.end)
        for tensor in ckpt_ema.inspect(tmp_path / "t").tensors.values()
        if isinstance(tensor, TensorRange)
    ]
    around = [at for at in range(len(content)) if not any(begin <= at < end for begin, end in ranges)]
    for at in random.Random(5).sample(around, 200):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        assert [text.split(":")[0] for text in failed(ckpt_ema.verify(tmp_path / "t"))] == ["structure"], at


def test_a_file_without_a_record_says_what_was_not_checked(tmp_path: Path) -> None:
    """Structure and numbers are checked, and that there is nothing else is said; not who wrote it, which it hides."""
    save_file(make_student(1), tmp_path / "model.safetensors")
    found = ckpt_ema.verify(tmp_path / "model.safetensors")
    assert found.is_ok
    text = "none: nothing in it says how it was made, so nothing else can be checked"
    assert found.checks[-1] == ckpt_ema.Check("provenance", None, text)


def test_a_run_that_has_changed_is_told(tmp_path: Path) -> None:
    """Checkpoints that are gone or were written again are named; nothing is called verified that was not."""
    save_students(tmp_path / "run", 3)
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.3)
    shutil.copytree(tmp_path / "run", tmp_path / "gone")
    (tmp_path / "gone" / "step_200.safetensors").unlink()
    (message,) = failed(ckpt_ema.verify(tmp_path / "t.safetensors", tmp_path / "gone"))
    assert "1 of 3 checkpoints are not in" in message
    assert "step_200.safetensors" in message
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    save_file(make_student(9), tmp_path / "other" / "step_200.safetensors")
    (message,) = failed(ckpt_ema.verify(tmp_path / "t.safetensors", tmp_path / "other", share=1))
    assert "and the fold makes" in message
    (tmp_path / "other" / "step_200.safetensors").unlink()
    save_file({**make_student(2), "more": torch.ones(1)}, tmp_path / "other" / "step_200.safetensors")
    (message,) = failed(ckpt_ema.verify(tmp_path / "t.safetensors", tmp_path / "other", share=1))
    assert "bytes, and had" in message


def test_another_step_than_the_recorded_one_is_told(tmp_path: Path) -> None:
    """A file of the same size under the same name that is of another step is not what was folded."""
    save_students(tmp_path / "run", 3, suffix=".pt")
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.3)
    torch.save({"state_dict": make_student(2), "global_step": 201}, tmp_path / "run" / "step_200.pt")
    (message,) = failed(ckpt_ema.verify(tmp_path / "t.safetensors", tmp_path / "run"))
    assert "`step_200.pt` is of step 201, and was of 200" in message


def test_a_run_that_is_not_there_is_misuse(tmp_path: Path, cli: Cli) -> None:
    """A mistyped RUN says nothing of the teacher: exit 2, as elsewhere."""
    save_students(tmp_path / "run", 2)
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.3)
    done = cli("verify", "t.safetensors", "rnu")
    assert (done.code, done.stdout) == (2, "")
    assert "`rnu` is no folder" in done.stderr


@pytest.mark.parametrize("accumulate", ["float32", "float64"])
@pytest.mark.parametrize("options", [{"half_life": 100.0}, {"half_life": 90.0, "interval": 30}])
def test_checkpoints_of_next_to_no_share_are_not_missed(
    tmp_path: Path, accumulate: str, options: dict[str, Any]
) -> None:
    """Per step, what brings less than 1e-12 is not read and not recorded; the teacher is recomputed all the same."""
    save_students(tmp_path / "run", 50)
    path = tmp_path / "t.safetensors"
    quiet_fold(tmp_path / "run", path, accumulate=accumulate, **options)
    recorded = (ckpt_ema.inspect(path).provenance or {})["checkpoints"]
    assert len(recorded) < 50
    assert failed(ckpt_ema.verify(path, tmp_path / "run", share=1)) == []
    # Without them the record's own coefficients are all there is: enough for float32, and said where digits are lost.
    for index in range(1, 51 - len(recorded)):
        (tmp_path / "run" / f"step_{index * 100}.safetensors").unlink()
    again = ckpt_ema.verify(path, tmp_path / "run", share=1)
    assert again.is_ok
    assert accumulate == "float64" or "bit for bit" in again.checks[-1].text


def test_a_reconstruction_is_recomputed_from_its_coefficients(tmp_path: Path) -> None:
    """Snapshots take part by their names, wherever in the run they lie; a flipped bit shows as in a fold."""
    model = torch.nn.Linear(40, 30)
    run = tmp_path / "run"
    for folder in ("checkpoints", "snapshots"):
        (run / folder).mkdir(parents=True)
    teacher = ckpt_ema.MeanTeacher(model, snapshots=ckpt_ema.Snapshots(run / "snapshots", every=20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 101):
        optimizer.zero_grad()
        model(torch.randn(8, 40, generator=generator)).square().mean().backward()
        optimizer.step()
        teacher.update()
        if step % 20 == 0:
            save_file(model.state_dict(), run / "checkpoints" / f"step_{step}.safetensors")
    path = tmp_path / "t.safetensors"
    ckpt_ema.reconstruct(run, path, half_life=25.0, announce=lambda plan: None)
    assert (ckpt_ema.inspect(path).provenance or {})["averages"]
    found = ckpt_ema.verify(path, run, share=1)
    assert failed(found) == []
    assert "all of it from" in found.checks[-1].text
    content = bytearray(path.read_bytes())
    content[-2] ^= 16
    path.write_bytes(content)
    (message,) = failed(ckpt_ema.verify(path, run, share=1))
    assert message.startswith("recomputed: `")


def test_buffers_are_those_that_the_record_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says better than the list of names what a buffer is, is not needed again."""
    source = "import torch\nclass M(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    source += (
        "        self.queue = torch.nn.Parameter(torch.ones(4))\n        self.register_buffer('b', torch.ones(3))\n"
    )
    (tmp_path / "queue_model.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "run").mkdir()
    for step in (1, 2, 3):
        save_file(
            {"queue": torch.full((4,), 1.0 * step), "b": torch.rand(3)}, tmp_path / "run" / f"step_{step}.safetensors"
        )
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.3, model="queue_model:M")
    assert failed(ckpt_ema.verify(tmp_path / "t.safetensors", tmp_path / "run", share=1)) == []


def make_somebodys(run: Path, path: Path) -> None:
    save_file(make_student(7), path)


def make_of_another_profile(run: Path, path: Path) -> None:
    quiet_fold(run, path, profile="uniform", until_step=200)


def make_online(run: Path, path: Path) -> None:
    model = torch.nn.Module()
    model.fc, model.bn = torch.nn.Linear(19, 37), torch.nn.BatchNorm1d(5, affine=False)
    model.bn.weight = torch.nn.Parameter(torch.ones(5))
    del model.bn.running_var
    teacher = ckpt_ema.MeanTeacher(model, momentum=0.1)
    teacher.update()
    teacher.save(path)


@pytest.mark.parametrize("make", [make_somebodys, make_of_another_profile, make_online])
def test_what_no_run_can_tell_is_unchecked_and_no_failure(
    tmp_path: Path, make: Callable[[Path, Path], None], cli: Cli
) -> None:
    """A teacher that began with another one: said in words of its own, exit 0; but what is known of it must fit."""
    run, start, teacher = tmp_path / "run", tmp_path / "start.safetensors", tmp_path / "t.safetensors"
    save_students(run, 4)
    make(run, start)
    quiet_fold(run, teacher, momentum=0.3, init=start)
    done = cli("verify", teacher, run)
    text = "cannot be done from a run alone: it goes on from `start.safetensors`"
    assert (done.code, done.stdout.splitlines()[-1]) == (0, f"unchecked recomputed: {text}")
    assert done.stdout.count("ok ") == 3
    assert cli("verify", teacher, run, "-q").stdout == ""
    table = json.loads(cli("verify", teacher, run, "--json").stdout)
    assert (table["ok"], [check["ok"] for check in table["checks"]]) == (True, [True, True, True, None])
    save_file({**make_student(4), "more": torch.ones(1)}, run / "step_400.safetensors")
    assert "bytes, and had" in failed(ckpt_ema.verify(teacher, run))[0]
    (run / "step_400.safetensors").unlink()
    assert "checkpoints are not in" in failed(ckpt_ema.verify(teacher, run))[0]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (make_somebodys, "nothing in it says how it was made"),
        (make_online, "an online teacher saw the student of every step"),
    ],
)
def test_what_does_not_say_what_it_is_of_is_unchecked(
    tmp_path: Path, make: Callable[[Path, Path], None], why: str
) -> None:
    """No run can tell whether it is right; that is no fault of the file."""
    save_students(tmp_path / "run", 2)
    make(tmp_path / "run", tmp_path / "t.safetensors")
    found = ckpt_ema.verify(tmp_path / "t.safetensors", tmp_path / "run")
    assert found.is_ok
    assert found.checks[-1] == ckpt_ema.Check("recomputed", None, f"cannot be done from a run alone: {why}")


def test_a_sub_model_that_began_with_another_teacher_fits_its_run(tmp_path: Path) -> None:
    """Averages alone are no student until their prefix is asked for, which the record remembers."""
    run, teacher = tmp_path / "run", tmp_path / "t.safetensors"
    run.mkdir()
    for step in (1, 2):
        averages = {f"ema_model.{name}": tensor for name, tensor in make_student(step).items()}
        save_file(averages, run / f"step_{step}.safetensors")
    save_file(make_student(3), tmp_path / "start.safetensors")
    quiet_fold(run, teacher, momentum=0.3, prefix="ema_model.", init=tmp_path / "start.safetensors")
    assert failed(ckpt_ema.verify(teacher, run)) == []


def test_a_teacher_in_parts_is_recomputed_as_one(tmp_path: Path) -> None:
    """Folded, then continued: its record has all checkpoints, and they make its bits."""
    save_students(tmp_path / "run", 2)
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.3)
    save_students(tmp_path / "run", 5)
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", init=tmp_path / "t.safetensors", overwrite=True)
    assert failed(ckpt_ema.verify(tmp_path / "t.safetensors", tmp_path / "run", share=1)) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"momentum": 0.3, "dtype": "bfloat16"}, "up to the rounding of its 3 parts"),
        ({"half_life": 150.0}, "up to the rounding of its 3 parts"),
        ({"half_life": 150.0, "between": "hold"}, "bit for bit"),
    ],
)
def test_a_teacher_in_parts_is_held_to_its_rounding(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    """Where going on cost last digits, it is near the fold of all at once, and a change beyond them is found."""
    teacher = tmp_path / "t.safetensors"
    for count in (2, 4, 5):
        save_students(tmp_path / "run", count)
        before = {"init": teacher, "overwrite": True} if teacher.exists() else options
        quiet_fold(tmp_path / "run", teacher, **{"dtype": options.get("dtype", "student"), **before})
    found = ckpt_ema.verify(teacher, tmp_path / "run", share=1)
    assert failed(found) == []
    assert says in found.checks[-1].text
    changed = {name: tensor.clone() for name, tensor in load_file(teacher).items()}
    changed["fc.weight"] *= 1.05
    replace_tensors(teacher, changed)
    assert "and the fold makes" in failed(ckpt_ema.verify(teacher, tmp_path / "run", share=1))[0]


def test_a_teacher_that_went_on_by_another_rule_says_so_and_is_recomputed(tmp_path: Path) -> None:
    """Its record has the rules in their order, each once, and its coefficients are what it is held to."""
    teacher = tmp_path / "t.safetensors"
    for count, momentum in ((2, 0.3), (4, 0.3), (6, 0.1)):
        save_students(tmp_path / "run", count)
        before = {"init": teacher, "overwrite": True} if teacher.exists() else {}
        quiet_fold(tmp_path / "run", teacher, momentum=momentum, **before)
    record = ckpt_ema.inspect(teacher).provenance or {}
    assert record["momentum"] == 0.1
    assert [rule["momentum"] for rule in record["earlier_rules"]] == [0.3]
    found = ckpt_ema.verify(teacher, tmp_path / "run", share=1)
    assert failed(found) == []
    changed = {name: tensor.clone() for name, tensor in load_file(teacher).items()}
    changed["fc.weight"] *= 1.00001
    replace_tensors(teacher, changed)
    assert "and the fold makes" in failed(ckpt_ema.verify(teacher, tmp_path / "run", share=1))[0]


@pytest.mark.parametrize(
    "changed",
    [
        {"rule": "teacher = student"},
        {"parts": 3},
        {"parts": 10**11},
        {"first_share": 0.123},
        {"checkpoints": [{"name": "../../etc/passwd", "step": 1, "coefficient": 1.0, "bytes": 3}]},
        {"stripped": 3, "dtypes": {"teacher": 3}},
        {"momentum": "x"},
        {"copied": {"names": {"a": [1]}}},
        {"averaged": None},
        {"averages": [{"name": "x", "step": 1, "coefficient": 10**400}]},
        {"averages": [{"name": "x", "step": 1, "coefficient": share} for share in (1e999, -1e999)]},
        {"averages": [{"name": "x", "step": 1, "coefficient": 1.7e308}] * 2},
        {"averages": 3},
        {"checkpoints": [{"name": "x" * 5000, "step": 1, "coefficient": 1.0, "bytes": 3}]},
        {"checkpoints": [{"name": "", "step": 1, "coefficient": 1.0, "bytes": 3}]},
        {"momentum": [0.3, 0.4]},
    ],
)
def test_a_record_that_lies_fails_and_nothing_more(tmp_path: Path, changed: dict[str, Any]) -> None:
    """Provenance is what a stranger wrote: no traceback, no path outside of the run."""
    save_students(tmp_path / "run", 2)
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.3)
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        record = json.loads(file.metadata()["ckpt_ema"])
    tensors = load_file(tmp_path / "t.safetensors")
    lying = {"format": "pt", "ckpt_ema": json.dumps({**record, **changed})}
    save_file(tensors, tmp_path / "u.safetensors", metadata=lying)
    assert not ckpt_ema.verify(tmp_path / "u.safetensors", tmp_path / "run").is_ok


def test_students_that_lie_under_different_keys_are_recomputed(tmp_path: Path) -> None:
    """Each checkpoint is looked at by itself, as it was when it was folded; the plan names every place."""
    (tmp_path / "run").mkdir()
    torch.save(make_student(1), tmp_path / "run" / "step_1.pt")
    for step in (2, 3):
        torch.save({"model": make_student(step), "step": step}, tmp_path / "run" / f"step_{step}.pt")
    report = quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.3)
    assert "the student is all of `step_1.pt`, `model` of 2 checkpoints" in report.plan.notes
    assert failed(ckpt_ema.verify(tmp_path / "t.safetensors", tmp_path / "run", share=1)) == []


def test_a_state_dict_by_itself_that_was_asked_for_is_recomputed(tmp_path: Path) -> None:
    """`--state ''` is what the hint says for averages by themselves; verify takes them the same way."""
    (tmp_path / "run").mkdir()
    for step in (1, 2, 3):
        average = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(3, 2))
        torch.save(average.state_dict(), tmp_path / "run" / f"step_{step}.pt")
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.3, state="")
    assert failed(ckpt_ema.verify(tmp_path / "t.safetensors", tmp_path / "run", share=1)) == []


def test_complex_students_written_narrower_are_recomputed(tmp_path: Path) -> None:
    """The dtype that was asked for is in the record: which one it was need not be guessed."""
    (tmp_path / "run").mkdir()
    for step in (1, 2, 3):
        generator = torch.Generator().manual_seed(step)
        student = {"w": torch.randn(40, dtype=torch.complex128, generator=generator)}
        torch.save(student, tmp_path / "run" / f"step_{step}.pt")
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.3, dtype="float32")
    assert failed(ckpt_ema.verify(tmp_path / "t.safetensors", tmp_path / "run", share=1)) == []


def test_a_teacher_under_a_key_is_read_by_every_command(tmp_path: Path) -> None:
    """One for torch.distributed.checkpoint lies under its students' key: inspected, compared, verified."""
    import torch.distributed.checkpoint as dcp

    for step in (1, 2, 3):
        dcp.save({"model": make_student(step)}, checkpoint_id=tmp_path / "run" / f"step_{step}", no_dist=True)
    for name, options in (("t", {"output_format": "dcp"}), ("t.safetensors", {})):
        quiet_fold(tmp_path / "run", tmp_path / name, momentum=0.3, **options)
    assert set(ckpt_ema.inspect(tmp_path / "t").tensors) == set(make_student(1))
    assert ckpt_ema.compare(tmp_path / "t", tmp_path / "t.safetensors").is_identical
    assert failed(ckpt_ema.verify(tmp_path / "t", tmp_path / "run", share=1)) == []


def test_what_a_record_holds_is_printed_as_json(tmp_path: Path, cli: Cli) -> None:
    """NaN and infinities, which Python writes and nobody else reads, are texts."""
    record = '{"made": "fold", "momentum": NaN, "averages": [{"coefficient": 1e999}, -Infinity]}'
    save_file(make_student(1), tmp_path / "t.safetensors", metadata={"ckpt_ema": record})

    def refuse(text: str) -> None:
        raise AssertionError(text)

    shown = json.loads(cli("inspect", "t.safetensors", "--json").stdout, parse_constant=refuse)
    assert shown["provenance"]["momentum"] == "NaN"
    assert shown["provenance"]["averages"] == [{"coefficient": "Infinity"}, "-Infinity"]


def save_numbers(
    run: Path, steps: list[int], dtype: torch.dtype, *, shape: tuple[int, ...] = (3000,), size: float = 1.0
) -> None:
    """Unrelated numbers of either sign, a scalar among them: straight lines make small differences of large ones."""
    run.mkdir(exist_ok=True)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        student = {"a.weight": torch.randn(shape, generator=generator), "scale": torch.randn((), generator=generator)}
        torch.save({name: (tensor * size).to(dtype) for name, tensor in student.items()}, run / f"step_{step}.pt")


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (list(range(1, 11)), {"momentum": 0.3, "by_hand": True}),
        ([34, 145, 195], {"half_life": 1.0}),
        ([0, 50, 100, 150], {"half_life": [1.0, 100.0]}),
        (list(range(1, 31)), {"half_life": 7.0, "reconstructs": True}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_last_digits_that_no_record_holds_are_no_failure(
    tmp_path: Path, steps: list[int], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """In float64 a coefficient's own last digit shows: it is recorded, found again, or allowed for and said."""
    run, options = tmp_path / "run", {**options}
    save_numbers(run, steps, dtype)
    output = tmp_path / ("t-{half_life}.safetensors" if isinstance(options.get("half_life"), list) else "t.safetensors")
    if options.pop("by_hand", False):
        plan = ckpt_ema.plan(run, output, **options)
        options = {"coefficients": {item.name: item.coefficient for item in plan.checkpoints}}
    work = ckpt_ema.reconstruct if options.pop("reconstructs", False) else ckpt_ema.fold
    report = work(run, output, announce=lambda plan: None, **options)
    for teacher in report.plan.outputs:
        found = ckpt_ema.verify(teacher, run, share=1)
        assert found.is_ok, failed(found)
        if len(report.plan.outputs) == 1 or dtype is torch.float32:
            assert "bit for bit" in found.checks[-1].text
        change_last_digits(teacher)
        assert failed(ckpt_ema.verify(teacher, run, share=1))


def change_last_digits(teacher: Path) -> None:
    """A few of the last digits of one element, more than any rounding."""
    tensors = load_file(teacher)
    tensors["a.weight"][7] *= 1 + 64 * torch.finfo(tensors["a.weight"].dtype).eps * len(tensors["a.weight"]) ** 0.5
    replace_tensors(teacher, tensors)


@pytest.mark.parametrize(
    ("dtype", "first", "then"),
    [
        (torch.bfloat16, {"momentum": 0.25}, {"dtype": "float32"}),
        (torch.float32, {"momentum": 0.25, "dtype": "bfloat16"}, {"dtype": "float32"}),
        (
            torch.bfloat16,
            {"momentum": 0.01, "per": "step", "accumulate": "student", "dtype": "float32"},
            {"dtype": "float32"},
        ),
    ],
)
def test_a_teacher_that_was_rounded_on_the_way_is_held_to_that(
    tmp_path: Path, dtype: torch.dtype, first: dict[str, Any], then: dict[str, Any]
) -> None:
    """A part in 16 bits has cost more than the last digits of the float32 it is continued in; a third part knows it."""
    run = tmp_path / "run"
    save_numbers(run, [10, 43, 101, 103, 121, 127, 132], dtype)
    teacher = quiet_fold(run, tmp_path / "0.safetensors", until_step=103, **first).output
    for number, until in enumerate((121, 132), start=1):
        options = {"init": teacher, "until_step": until, **then}
        teacher = quiet_fold(run, tmp_path / f"{number}.safetensors", **options).output
        found = ckpt_ema.verify(teacher, run, share=1)
        assert found.is_ok, failed(found)
        assert re.search(r"up to the rounding of its [23] parts", found.checks[-1].text)
    tensors = load_file(teacher)
    replace_tensors(teacher, {**tensors, "a.weight": tensors["a.weight"] * 1.1})
    assert failed(ckpt_ema.verify(teacher, run, share=1))


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float16, "bfloat16"), (torch.bfloat16, "float16")])
def test_another_dtype_of_as_many_bits_rounds_as_a_smaller_one(tmp_path: Path, dtype: torch.dtype, stored: str) -> None:
    """Each of the two 16-bit dtypes has numbers that the other has not: going on from it says so, and verify knows."""
    run = tmp_path / "run"
    save_numbers(run, [10, 43, 101, 103, 121, 127, 132], dtype)
    options: dict[str, Any] = {"momentum": 0.3, "accumulate": "student", "dtype": stored}
    teacher = quiet_fold(run, tmp_path / "0.safetensors", until_step=103, **options).output
    report = quiet_fold(run, tmp_path / "1.safetensors", init=teacher, **options)
    assert any(f"rounded to {stored}" in warning for warning in report.plan.warnings), report.plan.warnings
    found = ckpt_ema.verify(report.output, run, share=1)
    assert found.is_ok, failed(found)


@pytest.mark.parametrize(
    ("dtype", "first", "always"),
    [
        (torch.float32, {}, {}),
        (torch.bfloat16, {}, {}),
        (torch.bfloat16, {}, {"accumulate": "student"}),
        (torch.float32, {"dtype": "bfloat16"}, {}),
    ],
)
def test_numbers_below_the_smallest_normal_one_are_held_to_their_own_last_place(
    tmp_path: Path, dtype: torch.dtype, first: dict[str, Any], always: dict[str, Any]
) -> None:
    """Which is no small part of them, of each dtype on the way; the weights that decay has let go are such."""
    run = tmp_path / "run"
    save_numbers(run, [10, 43, 101, 103, 121, 127, 132], dtype, size=1e-39)
    options: dict[str, Any] = {"momentum": 0.01, "per": "step", "dtype": "float32", **first, **always}
    teacher = quiet_fold(run, tmp_path / "0.safetensors", until_step=103, **options).output
    for until in (121, 127, 132):
        name = tmp_path / f"{until}.safetensors"
        teacher = quiet_fold(run, name, init=teacher, until_step=until, dtype="float32", **always).output
    found = ckpt_ema.verify(teacher, run, share=1)
    assert found.is_ok, failed(found)
    assert re.search(r", up to the rounding of its \d parts$", found.checks[-1].text), found.checks[-1].text
    tensors = load_file(teacher)
    replace_tensors(teacher, {**tensors, "a.weight": tensors["a.weight"] * 2})
    assert failed(ckpt_ema.verify(teacher, run, share=1))


@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.002, "per": "step", "accumulate": "student"}, {"momentum": 0.05, "dtype": "student"}],
)
@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16])
def test_what_a_tensor_was_rounded_to_excuses_no_other_one(
    tmp_path: Path, other: torch.dtype, options: dict[str, Any]
) -> None:
    """A float32 one beside those of 16 bits keeps its digits in every part, however small it is (LayerScale is)."""
    run = tmp_path / "run"
    run.mkdir()
    for step in range(100, 900, 100):
        generator = torch.Generator().manual_seed(step)
        student = {name: 1e-6 * (1 + 0.1 * torch.randn(64, generator=generator)) for name in ("a.gamma", "b.gamma")}
        student["weight"] = torch.randn(64, 64, generator=generator).to(other)
        save_file(student, run / f"step_{step}.safetensors")
    begun = quiet_fold(run, tmp_path / "begun.safetensors", until_step=600, **options).output
    kept = {name: value for name, value in options.items() if name != "momentum"}
    teacher = quiet_fold(run, tmp_path / "on.safetensors", init=begun, **kept).output
    found = ckpt_ema.verify(teacher, run, share=1)
    assert found.is_ok, failed(found)
    assert "up to the rounding of its 2 parts" in found.checks[-1].text
    tensors = load_file(teacher)
    for wrong in (tensors["a.gamma"] * 1.0001, tensors["b.gamma"].clone(), tensors["a.gamma"].flip(0).contiguous()):
        replace_tensors(teacher, {**tensors, "a.gamma": wrong})
        assert failed(ckpt_ema.verify(teacher, run, share=1))


@pytest.mark.parametrize(("size", "spread"), [(0.02, 1.0), (1.0, 0.0), (1e-41, 0.0)])
@pytest.mark.parametrize(("momentum", "gap"), [(2e-5, 500), (0.003, 7)])
def test_roundings_of_many_equal_parts_add_up(
    tmp_path: Path, size: float, spread: float, momentum: float, gap: int
) -> None:
    """The share of each part is rounded alike, and so is a number that stays what it is; a changed one is found."""
    run = tmp_path / "run"
    run.mkdir()
    steps = range(gap, 80 * gap + 1, gap)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        students = {"a": size * (1 + spread * torch.randn(3000, generator=generator)), "norm": torch.ones(20_000)}
        save_file(students, run / f"step_{step}.safetensors")
    teacher = quiet_fold(run, tmp_path / "0.safetensors", momentum=momentum, per="step", until_step=2 * gap).output
    for step in steps[2:]:
        output = tmp_path / f"{step}.safetensors"
        teacher = quiet_fold(run, output, init=teacher, momentum=momentum, per="step", until_step=step).output
    found = ckpt_ema.verify(teacher, run, share=1)
    assert found.is_ok, failed(found)
    tensors = load_file(teacher)
    replace_tensors(teacher, {**tensors, "norm": tensors["norm"] * (1 + 3e-5)})
    assert failed(ckpt_ema.verify(teacher, run, share=1))


def test_a_small_difference_of_large_numbers_is_held_to_these(tmp_path: Path) -> None:
    """A scalar that goes through zero has few digits left, whatever it was made of; another number is found."""
    steps = [5, 33, 49, 53, 65, 97]
    for seed in range(6):
        run = tmp_path / f"run{seed}"
        run.mkdir()
        generator = torch.Generator().manual_seed(seed)
        for step in steps:
            scalars = {f"s{i}": torch.randn((), generator=generator) for i in range(40)}
            torch.save({"weight": torch.randn(9, generator=generator), **scalars}, run / f"step_{step}.pt")
        teacher = quiet_fold(run, tmp_path / f"{seed}-0.safetensors", half_life=30, until_step=33).output
        for until in steps[2:]:
            name = tmp_path / f"{seed}-{until}.safetensors"
            teacher = quiet_fold(run, name, init=teacher, until_step=until).output
        found = ckpt_ema.verify(teacher, run, share=1)
        assert found.is_ok, failed(found)
    tensors = load_file(teacher)
    replace_tensors(teacher, {**tensors, "s7": tensors["s7"] + 1e-5})
    assert failed(ckpt_ema.verify(teacher, run, share=1))


def test_what_was_rounded_long_ago_excuses_little(tmp_path: Path) -> None:
    """Of a part in bfloat16 at the beginning nothing is left after forty more; nor does it excuse a copied tensor."""
    run = tmp_path / "run"
    run.mkdir()
    for step in range(1, 41):
        generator = torch.Generator().manual_seed(step)
        student = {"w": torch.randn(60, 50, generator=generator), "running_mean": torch.randn(9, generator=generator)}
        torch.save(student, run / f"step_{step}.pt")
    options: dict[str, Any] = {"momentum": 0.5}
    begun = quiet_fold(run, tmp_path / "t.safetensors", until_step=2, dtype="bfloat16", **options).output
    teacher = quiet_fold(run, tmp_path / "on.safetensors", init=begun, dtype="float32").output
    assert ckpt_ema.verify(teacher, run, share=1).is_ok
    tensors = load_file(teacher)
    changed = tensors["w"].clone()
    changed[3] *= 1.0001
    nudged = tensors["running_mean"] * (1 + 1e-7)
    for name, other in (("w", changed), ("running_mean", nudged)):
        replace_tensors(teacher, {**tensors, name: other})
        assert failed(ckpt_ema.verify(teacher, run, share=1)), name
