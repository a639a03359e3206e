"""Runs whose floating-point precision changes on the way: every student is widened as it is read, or it is refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckpt_ema
from ckpt_ema.blocks import plan_blocks
from ckpt_ema.byte_ranges import TensorRange, open_input
from ckpt_ema.catalogue import Treatment, build_catalogue
from ckpt_ema.dtypes import BY_NAME
from ckpt_ema.engine import cpu
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.layouts import Layout, SchemaPool, compact_layout
from ckpt_ema.sizes import counted
from tests.conftest import Outcome, StateDict, assert_same_bits, hook_teacher, quiet_fold
from tests.device_model import modelled
from tests.test_cuda import fold_on_a_model, fold_on_cpu

Cli = Callable[..., Outcome]

FLOAT32, FLOAT64 = torch.float32, torch.float64
BFLOAT16, FLOAT16, FLOAT8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn

CHANGES: dict[str, list[torch.dtype]] = {
    "float32 to bfloat16": [FLOAT32, FLOAT32, BFLOAT16, BFLOAT16, BFLOAT16],
    "bfloat16 to float32": [BFLOAT16, BFLOAT16, FLOAT32, FLOAT32],
    "bfloat16 to float16": [BFLOAT16, BFLOAT16, FLOAT16, FLOAT16],
    "float16 to float64": [FLOAT16, FLOAT64, FLOAT64],
    "float64 to float32": [FLOAT64, FLOAT64, FLOAT32, FLOAT32],
    "8 bits to bfloat16": [FLOAT8, FLOAT8, BFLOAT16, BFLOAT16],
    "to and fro": [FLOAT32, BFLOAT16, FLOAT32, FLOAT16, FLOAT16, FLOAT32],
}


def make(seed: int, dtype: torch.dtype, *, only: str = "") -> StateDict:
    """A student in one precision, or with one tensor in it and the others in float32; scattered and tied ones too."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(90, 40, generator=generator)
    student = {
        "embed.weight": embedding,
        "body.weight": torch.randn(130, 70, generator=generator),
        "body.bias": torch.randn(131, generator=generator),
        "conv.weight": torch.randn(60, 50, generator=generator).t(),
        "norm.weight": torch.randn(70, generator=generator),
        "bn.running_mean": torch.randn(5, generator=generator),
    }
    student = {name: tensor.to(dtype if only in name else FLOAT32) for name, tensor in student.items()}
    return {**student, "head.weight": student["embed.weight"], "bn.num_batches_tracked": torch.tensor(seed)}


def save(run: Path, students: Sequence[StateDict], suffix: str = ".pt", *, first: int = 1) -> None:
    """`step_100`, ...; safetensors hold neither ties nor other orders than row-major."""
    run.mkdir(parents=True, exist_ok=True)
    for number, student in enumerate(students, start=first):
        path = run / f"step_{number * 100}{suffix}"
        if suffix == ".safetensors":
            save_file({name: tensor.contiguous().clone() for name, tensor in student.items()}, path)
        elif suffix == ".pt":
            torch.save({"state_dict": student, "global_step": number * 100}, path)
        else:
            dcp.save({"model": student}, checkpoint_id=path, no_dist=True)


def widened(students: Sequence[StateDict], dtype: torch.dtype) -> list[StateDict]:
    return [{n: t.to(dtype) if t.is_floating_point() else t for n, t in student.items()} for student in students]


def widest_of(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return FLOAT64 if FLOAT64 in dtypes else FLOAT32


def expected_teacher(
    students: Sequence[StateDict], momentum: float, computed_in: torch.dtype, written: torch.dtype = FLOAT32
) -> StateDict:
    """The hook's loop on students that were widened first; what it copies comes from the newest as it is."""
    teacher = hook_teacher(widened(students, computed_in), momentum, ("bn.running_mean",))
    teacher["bn.running_mean"] = students[-1]["bn.running_mean"]
    return {n: t.to(written).contiguous() if t.is_floating_point() else t for n, t in teacher.items()}


# --- the bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
@pytest.mark.parametrize("change", CHANGES)
def test_it_is_the_hooks_teacher_of_widened_students(tmp_path: Path, change: str, suffix: str) -> None:
    """Bit for bit the hook's loop on students that are widened first, and the fold of files that were."""
    dtypes = CHANGES[change]
    if suffix == "" and FLOAT8 in dtypes:
        pytest.skip("torch's DCP of this version is not asked for 8 bits")
    students = [make(seed, dtype) for seed, dtype in enumerate(dtypes, start=1)]
    computed_in = widest_of(dtypes)
    save(tmp_path / "run", students, suffix)
    save(tmp_path / "wide", widened(students, computed_in), suffix)
    for momentum in (0.001, 0.3):
        expected = expected_teacher(students, momentum, computed_in)
        for name in ("run", "wide"):
            output = tmp_path / f"{name}-{momentum}.safetensors"
            quiet_fold(tmp_path / name, output, momentum=momentum, dtype="float32")
            assert_same_bits(load_file(output), expected)


@pytest.mark.parametrize("options", [{}, {"memory_budget_bytes": 1 << 16, "num_threads": 1}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_tensor_alone_may_change(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    """As a norm that is kept in float32 at first, and in bfloat16 later; or only then in float64, and no other is."""
    for kind, only in ((BFLOAT16, "norm"), (FLOAT64, "body.weight")):
        students = [make(1, FLOAT32), make(2, FLOAT32), make(3, kind, only=only), make(4, kind, only=only)]
        run = tmp_path / only
        save(run, students)
        quiet_fold(run, tmp_path / f"{only}.safetensors", momentum=0.3, dtype=dtype, **options)
        expected = expected_teacher(students, 0.3, FLOAT32, getattr(torch, dtype))
        wide = expected_teacher(students, 0.3, FLOAT64, getattr(torch, dtype))
        if kind is FLOAT64:  # every other tensor is computed in float32, as it is without a float64 one
            expected[only] = wide[only]
        assert_same_bits(load_file(tmp_path / f"{only}.safetensors"), expected)


def long_run(run: Path, dtypes: Sequence[torch.dtype]) -> list[StateDict]:
    """Students of more than one block, and of many where the memory is small."""
    students = []
    for seed, dtype in enumerate(dtypes):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(300_007, generator=generator)
        students.append({"a": weight[:100_003].to(dtype), "b": weight[100_003:].to(dtype), "n": torch.tensor(seed)})
    save(run, students)
    return students


LONG = [FLOAT32, FLOAT32, BFLOAT16, BFLOAT16, BFLOAT16, BFLOAT16, FLOAT16, BFLOAT16, FLOAT32, BFLOAT16, BFLOAT16]


@pytest.mark.parametrize("budget", [1 << 16, 1 << 19, 256 << 20])
def test_many_blocks_and_several_teachers_have_the_same_bits(tmp_path: Path, budget: int) -> None:
    """More checkpoints than a kernel folds at once, blocks of any size, three momenta in one pass."""
    students = long_run(tmp_path / "run", LONG)
    report = quiet_fold(
        tmp_path / "run",
        tmp_path / "t-{momentum}.safetensors",
        momentum=[0.003, 0.1, 0.7],
        dtype="float32",
        memory_budget_bytes=budget,
    )
    assert report.plan.buffer_bytes <= budget
    assert (len(list(report.plan.blocks.blocks())) > 10) == (budget < 1 << 20)
    for teacher in report.plan.teachers:
        assert teacher.momentum is not None
        assert_same_bits(load_file(teacher.output), hook_teacher(widened(students, FLOAT32), teacher.momentum))


def test_the_compiled_loop_folds_narrow_students_among_wide_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three 16-bit students at a time, in buffers of half a wide one's size, and wide ones between them."""
    pytest.importorskip("llvmlite", reason="llvmlite is not installed")
    monkeypatch.setattr(cpu, "COMPILED_UPDATES", 1)
    students = long_run(tmp_path / "run", LONG)
    for _ in range(2):  # by the second time it is compiled
        quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.1, dtype="float32", overwrite=True)
        assert_same_bits(load_file(tmp_path / "t.safetensors"), hook_teacher(widened(students, FLOAT32), 0.1))


def test_float64_may_be_computed_in(tmp_path: Path) -> None:
    """`accumulate="float64"` widens both precisions to that."""
    students = [make(seed, dtype) for seed, dtype in enumerate(CHANGES["float32 to bfloat16"])]
    save(tmp_path / "run", students)
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.3, dtype="float32", accumulate="float64")
    assert_same_bits(load_file(tmp_path / "t.safetensors"), expected_teacher(students, 0.3, FLOAT64))


@pytest.mark.parametrize("dtypes", [(torch.complex128, torch.complex64), (torch.complex64, torch.complex128)])
def test_complex_numbers_may_change_too(tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Computed in complex128, and written as complex64."""
    students = [{"w": torch.randn(77, dtype=dtype)} for dtype in (*dtypes, dtypes[-1])]
    save(tmp_path / "run", students)
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.3, dtype="float32")
    expected = hook_teacher([{"w": student["w"].to(torch.complex128)} for student in students], 0.3)
    assert_same_bits(load_file(tmp_path / "t.safetensors"), {"w": expected["w"].to(torch.complex64)})


def test_every_floating_point_tensor_is_averaged_where_that_is_asked_for(tmp_path: Path) -> None:
    """`skip_buffers=False`: running statistics in two precisions as well."""
    students = [make(seed, dtype) for seed, dtype in enumerate(CHANGES["float32 to bfloat16"])]
    save(tmp_path / "run", students)
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.3, dtype="float32", skip_buffers=False)
    expected = hook_teacher(widened(students, FLOAT32), 0.3)
    assert_same_bits(load_file(tmp_path / "t.safetensors"), {n: t.contiguous() for n, t in expected.items()})


def test_one_place_read_in_two_precisions_holds_two_tensors(tmp_path: Path) -> None:
    """Tied where they are of one dtype, not where an older checkpoint reads the same bytes as two."""
    (tmp_path / "file").write_bytes(bytes(400))
    with contextlib.closing(open_input(tmp_path / "file")) as opened:
        file = opened.source()

    def layout_of(*dtypes: str) -> Layout:
        ranges = {
            name: TensorRange(BY_NAME[dtype], (100,), None, file, 0, 100 * BY_NAME[dtype].itemsize)
            for name, dtype in zip("ab", dtypes, strict=True)
        }
        return compact_layout(ranges, SchemaPool())

    same, other, narrow = ("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")
    for stored, num_aliases in (((same, narrow, same), 1), ((same, other, narrow, same), 0)):
        layouts = [layout_of(*dtypes) for dtypes in stored]
        labelled = [(f"step_{number}", layout) for number, layout in enumerate(layouts)]
        tensors = build_catalogue(labelled, Treatment(dtype="float32"))
        blocks = plan_blocks(tensors, layouts, accumulate="float32", memory_budget_bytes=1 << 20)
        assert len(blocks.aliases) == num_aliases


@pytest.mark.parametrize("change", ["float32 to bfloat16", "float16 to float64"])
def test_a_run_in_a_bucket_has_the_same_bits(tmp_path: Path, change: str) -> None:
    """Requests and their buffers are as long as the widest student's blocks."""
    students = [make(seed, dtype) for seed, dtype in enumerate(CHANGES[change])]
    save(tmp_path / "run", students)
    bucket = f"memory://{change.replace(' ', '-')}"
    fsspec.filesystem("memory").put(str(tmp_path / "run"), bucket, recursive=True)
    options: dict[str, Any] = {"momentum": 0.3, "dtype": "float32", "memory_budget_bytes": 1 << 18}
    ckpt_ema.fold(bucket, tmp_path / "t.safetensors", announce=lambda plan: None, **options)
    expected = expected_teacher(students, 0.3, widest_of(CHANGES[change]))
    assert_same_bits(load_file(tmp_path / "t.safetensors"), expected)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_without_a_dtype_it_is_refused_and_the_hint_works(tmp_path: Path, cli: Cli) -> None:
    """The student's dtype is no longer one: every tensor is named, and what to type."""
    students = [make(seed, dtype) for seed, dtype in enumerate(CHANGES["float32 to bfloat16"])]
    save(tmp_path / "run", students)
    for command in ("plan", "fold"):
        done = cli(command, "run")
        assert done.code == 1
        assert "`step_200.pt` and `step_300.pt` differ in 7 tensors" in done.stderr
        assert "body.bias: float32 became bfloat16" in done.stderr
        assert "hint: pass `--dtype float32` to fold all of them; or pass `--from 300` to fold the later" in done.stderr
    assert cli("fold", "run", "--dtype", "float32").code == 0
    assert cli("fold", "run", "--from", 300, "--overwrite").code == 0
    # `--dtype` would lead to the next error.
    own = cli("fold", "run", "--accumulate", "student", "--overwrite")
    assert "hint: fold only checkpoints that agree: pass `--from 300` to fold the later ones" in own.stderr
    assert cli("fold", "run", "--accumulate", "student", "--from", 300, "--overwrite").code == 0


def test_where_more_than_the_precision_differs_no_dtype_helps(tmp_path: Path) -> None:
    """A shape, a name, an integer in place of a float: the same error with `dtype` as without, and the old hint."""
    students = [make(1, FLOAT32), make(2, BFLOAT16), make(3, BFLOAT16)]
    students[2]["body.bias"] = students[2]["body.bias"].to(torch.int16)
    students[2]["norm.weight"] = torch.zeros(71, dtype=BFLOAT16)
    students[2]["body.weight"] = students[2]["body.weight"].to(torch.complex64)
    students[2]["new"] = torch.zeros(1)
    save(tmp_path / "run", students)
    with pytest.raises(CkptEmaError) as plain:
        ckpt_ema.plan(tmp_path / "run")
    with pytest.raises(CkptEmaError) as asked:
        ckpt_ema.plan(tmp_path / "run", dtype="float32")
    agree = "fold only checkpoints that agree: pass `--from 300` to fold the later ones, or `--exclude` some by name"
    assert plain.value.hint == asked.value.hint == agree
    assert asked.value.message == "`step_200.pt` and `step_300.pt` differ in 4 tensors"
    assert asked.value.details == (
        "body.bias: bfloat16 became int16",
        "body.weight: bfloat16 became complex64",
        "new: missing in `step_200.pt`",
        "norm.weight: shape [70] became [71]",
    )
    assert "step_100.pt to step_200.pt: body.weight: float32 became bfloat16" in plain.value.details


def test_no_teacher_is_kept_in_two_precisions(tmp_path: Path, cli: Cli) -> None:
    """`--accumulate student` names a tensor and its dtypes; where only a copied one changes, it is possible."""
    save(tmp_path / "run", [make(1, FLOAT32), make(2, BFLOAT16)])
    done = cli("fold", "run", "--dtype", "float32", "--accumulate", "student")
    assert done.code == 2
    assert "`--accumulate student` is impossible for `embed.weight`, which is float32 and bfloat16" in done.stderr
    assert "hint: pass `--accumulate float64`" in done.stderr
    save(tmp_path / "other", [make(1, FLOAT32), make(2, BFLOAT16, only="running")])
    quiet_fold(tmp_path / "other", tmp_path / "t.safetensors", dtype="float32", accumulate="student", momentum=0.3)
    running = make(2, BFLOAT16)["bn.running_mean"].float()
    assert torch.equal(load_file(tmp_path / "t.safetensors")["bn.running_mean"], running)


@pytest.mark.parametrize("number", [1, 4])
def test_a_number_that_is_not_finite_is_named_in_either_precision(tmp_path: Path, number: int) -> None:
    """The tensor, and the checkpoint that brought it, before the change and after it."""
    students = [make(seed, dtype) for seed, dtype in enumerate(CHANGES["float32 to bfloat16"], start=1)]
    students[number - 1]["body.bias"][17] = float("nan")
    save(tmp_path / "run", students)
    with pytest.raises(CkptEmaError, match=rf"`body\.bias`.*step_{number}00\.pt"):
        quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.3, dtype="float32")


# --- what is said -------------------------------------------------------------------------------------------------


def test_the_plan_and_a_fold_say_so_in_a_line(tmp_path: Path, cli: Cli) -> None:
    """How many tensors, from what to what, and where; nothing of it where nothing changes."""
    save(tmp_path / "run", [make(1, FLOAT32), make(2, FLOAT32), make(3, BFLOAT16), make(4, BFLOAT16)])
    note = (
        "6 tensors change their precision on the way (float32 to bfloat16 at `step_300.pt`): each student is widened"
        " as it is read"
    )
    words = ("run", "--momentum", 0.3, "--dtype", "float32")
    assert f"note      {note}\n" in cli("plan", *words).stdout
    assert "  body.bias  float32, bfloat16 -> float32 [131]  average" in cli("plan", *words, "-v").stdout
    assert note in json.loads(cli("plan", *words, "--json").stdout)["notes"]
    assert f"note      {note}\n" in cli("fold", *words).stderr
    later = cli("fold", *words, "--from", 300, "--overwrite")
    assert "precision" not in later.stderr
    save(tmp_path / "one", [make(1, FLOAT32), make(2, BFLOAT16, only="norm"), make(3, FLOAT16, only="norm")])
    one = ckpt_ema.plan(tmp_path / "one", dtype="float32")
    assert (
        "1 tensor changes its precision on the way (float32 to bfloat16 at `step_200.pt`, bfloat16 to float16 at"
        " `step_300.pt`): each student is widened as it is read"
    ) in one.notes
    fro = CHANGES["to and fro"]
    save(tmp_path / "fro", [make(seed, dtype) for seed, dtype in enumerate(fro)])
    [told] = [note for note in ckpt_ema.plan(tmp_path / "fro", dtype="float32").notes if "precision" in note]
    assert "float16 at `step_400.pt` and 1 more change)" in told


def test_the_record_knows_all_precisions(tmp_path: Path) -> None:
    """`dtypes.students` of the teacher's record, and of `plan`'s buffers the widest student."""
    save(tmp_path / "run", [make(1, FLOAT64), make(2, BFLOAT16)])
    report = quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", dtype="float32", momentum=0.3)
    with safe_open(report.output, "pt") as file:
        record = json.loads(file.metadata()["ckpt_ema"])
    assert record["dtypes"]["students"] == ["bfloat16", "float64", "int64"]
    lanes = [lane for lane in report.plan.blocks.lanes if lane.action == "average"]
    assert {lane.accumulate_dtype.name for lane in lanes} == {"float64"}
    assert {lane.input_itemsize for lane in lanes} == {8}


# --- everything else that reads such a run ------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
def test_such_a_teacher_is_verified(tmp_path: Path, change: str) -> None:
    """Bit for bit from its run, and a flipped bit is found."""
    students = [make(seed, dtype) for seed, dtype in enumerate(CHANGES[change])]
    save(tmp_path / "run", students)
    teacher = quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=0.3, dtype="float32").output
    found = ckpt_ema.verify(teacher, tmp_path / "run", share=1)
    assert found.is_ok
    assert found.checks[-1].text.endswith("bit for bit")
    content = bytearray(teacher.read_bytes())
    content[-1] ^= 1
    teacher.write_bytes(content)
    assert not ckpt_ema.verify(teacher, tmp_path / "run", share=1).is_ok


def record_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        record: dict[str, Any] = json.loads(file.metadata()["ckpt_ema"])
    return record


@pytest.mark.parametrize("asked", ["student", "float32"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.004, "per": "step", "between": "hold"}])
def test_a_teacher_is_continued_across_the_change(tmp_path: Path, asked: str, options: dict[str, Any]) -> None:
    """In parts it is the fold of all at once, bit for bit, and can be verified."""
    options = {"momentum": 0.3, **options}
    students = [make(seed, dtype) for seed, dtype in enumerate(CHANGES["float32 to bfloat16"])]
    run = tmp_path / "run"
    save(run, students)
    part = quiet_fold(run, tmp_path / "part.safetensors", until_step=200, dtype=asked, **options).output
    on = quiet_fold(run, tmp_path / "on.safetensors", init=part, dtype="float32")
    whole = quiet_fold(run, tmp_path / "whole.safetensors", dtype="float32", **options).output
    assert_same_bits(load_file(on.output), load_file(whole))
    assert record_of(on.output).keys() == record_of(whole).keys()
    assert [item.name for item in on.plan.checkpoints] == ["step_300.pt", "step_400.pt", "step_500.pt"]
    # A teacher that does not say in what its students were has nothing to say of a change either.
    noted = any("float32 to bfloat16 since `part.safetensors` was begun" in note for note in on.plan.notes)
    assert noted == (asked == "student")
    found = ckpt_ema.verify(on.output, run, share=1)
    assert found.is_ok
    assert found.checks[-1].text.endswith("bit for bit")


@pytest.mark.parametrize("options", [{}, {"per": "step"}])
def test_a_teacher_in_the_students_dtype_is_not_continued_into_another_one(
    tmp_path: Path, cli: Cli, options: dict[str, Any]
) -> None:
    """As one fold of all is refused; the hint says what continues it."""
    run = tmp_path / "run"
    save(run, [make(seed, dtype) for seed, dtype in enumerate(CHANGES["float32 to bfloat16"])])
    quiet_fold(run, tmp_path / "part.safetensors", momentum=0.3, until_step=200, **options)
    done = cli("fold", "run", "--init", "part.safetensors", "-o", "on.safetensors")
    assert done.code == 1
    assert "differ in 7 tensors" in done.stderr
    assert "body.bias: float32 became bfloat16" in done.stderr
    # No `--from`: the teacher is in the earlier precision, whatever is left out of what comes after it.
    assert done.stderr.endswith("hint: pass `--dtype float32` to fold all of them\n")
    assert cli("fold", "run", "--init", "part.safetensors", "-o", "on.safetensors", "--dtype", "float32").code == 0
    assert load_file(tmp_path / "on.safetensors")["body.bias"].dtype is FLOAT32


def test_a_teacher_of_many_files_is_not_continued_in_two_precisions_either(tmp_path: Path) -> None:
    """Where it lies under the students' key, its tensors are found there."""
    run = tmp_path / "run"
    save(run, [make(seed, dtype) for seed, dtype in enumerate(CHANGES["float32 to bfloat16"])], "")
    part = quiet_fold(run, tmp_path / "part", momentum=0.3, until_step=200, output_format="dcp").output
    with pytest.raises(CkptEmaError, match="`part` and `step_300` differ in 7 tensors"):
        ckpt_ema.plan(run, tmp_path / "on.safetensors", init=part)
    quiet_fold(run, tmp_path / "on.safetensors", init=part, dtype="float32")
    whole = quiet_fold(run, tmp_path / "whole.safetensors", momentum=0.3, dtype="float32").output
    assert_same_bits(load_file(tmp_path / "on.safetensors"), load_file(whole))


@pytest.mark.parametrize("change", ["bfloat16 to float32", "float32 to bfloat16"])
def test_a_teacher_in_its_students_arithmetic_is_not_continued_in_another(tmp_path: Path, change: str) -> None:
    """Its arithmetic is that of its students so far, whether it is written in their dtype or not; a wider one helps."""
    run = tmp_path / "run"
    save(run, [make(seed, dtype) for seed, dtype in enumerate(CHANGES[change])])
    options: dict[str, Any] = {"momentum": 0.3, "dtype": "float32", "accumulate": "student"}
    part = quiet_fold(run, tmp_path / "1.safetensors", until_step=100, **options).output
    part = quiet_fold(run, tmp_path / "2.safetensors", until_step=200, init=part).output
    before, after = change.split(" to ")
    with pytest.raises(CkptEmaError, match=rf"`embed\.weight`, which is {before} and {after}") as caught:
        quiet_fold(run, tmp_path / "3.safetensors", init=part)
    assert "pass `--accumulate float64`" in (caught.value.hint or "")
    report = quiet_fold(run, tmp_path / "3.safetensors", init=part, accumulate="float64")
    assert report.plan.losses == (
        f"`2.safetensors` was rounded to {before} (6 tensors), and what goes on from it is near the fold of all at"
        " once, not equal",
    )


@pytest.mark.parametrize(
    ("change", "cut"),
    [("float64 to float32", 2), ("float16 to float64", 1), ("float16 to float64", 2), ("bfloat16 to float32", 2)],
)
@pytest.mark.parametrize("written", ["float32", "bfloat16"])
def test_parts_that_round_say_so_and_are_verified(tmp_path: Path, change: str, cut: int, written: str) -> None:
    """A teacher of float64 students that is float32 in between has lost digits, whatever its later students are."""
    students = [make(seed, dtype) for seed, dtype in enumerate(CHANGES[change])]
    run = tmp_path / "run"
    save(run, students)
    options = {"dtype": written, "momentum": 0.3}
    teacher = quiet_fold(run, tmp_path / "1.safetensors", until_step=cut * 100, **options).output
    for until in range(cut + 1, len(students) + 1):
        plan = ckpt_ema.plan(run, tmp_path / "x.safetensors", init=teacher, until_step=until * 100, **options)
        rounds = written == "bfloat16" or "64" in change
        assert any("was rounded to" in warning for warning in plan.warnings) == rounds
        output = tmp_path / f"{until}.safetensors"
        teacher = quiet_fold(run, output, init=teacher, until_step=until * 100, **options).output
    found = ckpt_ema.verify(teacher, run, share=1)
    assert found.is_ok, found.checks
    assert ("up to the rounding of" in found.checks[-1].text) == rounds
    whole = quiet_fold(run, tmp_path / "whole.safetensors", **options).output
    assert ckpt_ema.compare(teacher, whole).relative < (1e-6 if written == "float32" else 2e-2)


def test_what_was_wide_once_stays_so_in_a_teacher(tmp_path: Path) -> None:
    """One float64 tensor among others: it alone counts as rounded, however many parts later."""
    wide = [make(seed, FLOAT64, only="norm") for seed in (1, 2)]
    students = [*wide, *(make(seed, FLOAT32) for seed in (3, 4, 5))]
    run = tmp_path / "run"
    save(run, students)
    options: dict[str, Any] = {"dtype": "float32", "momentum": 0.3}
    teacher = quiet_fold(run, tmp_path / "2.safetensors", until_step=200, **options).output
    for until in (300, 400, 500):
        on = quiet_fold(run, tmp_path / f"{until}.safetensors", init=teacher, until_step=until, **options)
        [warning] = [text for text in on.plan.warnings if "was rounded to" in text]
        assert "(1 tensor)" in warning
        assert list(record_of(on.output)["rounded_to"]) == ["float64"]
        computed_in = {lane.accumulate_dtype.name: len(lane.tensors) for lane in on.plan.blocks.lanes if lane.tensors}
        assert computed_in["float64"] == 1
        teacher = on.output
    whole = load_file(quiet_fold(run, tmp_path / "whole.safetensors", **options).output)
    assert_same_bits(load_file(teacher) | {"norm.weight": whole["norm.weight"]}, whole)
    assert ckpt_ema.verify(teacher, run, share=1).is_ok


def test_compare_reads_both_precisions(tmp_path: Path) -> None:
    """Of one run before and after the change, and a teacher of both."""
    save(tmp_path / "run", [make(1, FLOAT32), make(1, BFLOAT16)])
    found = ckpt_ema.compare(tmp_path / "run" / "step_100.pt", tmp_path / "run" / "step_200.pt")
    assert 0 < found.relative < 2**-8
    assert {tensor.dtypes for tensor in found.tensors if tensor.num_different} == {("float32", "bfloat16")}


def test_a_reconstruction_takes_both_precisions(tmp_path: Path) -> None:
    """Its coefficients are solved for by how coarse each student is, and each is widened as it is read."""
    students = [make(seed, dtype) for seed, dtype in enumerate(CHANGES["float32 to bfloat16"])]
    save(tmp_path / "run", students)
    with pytest.raises(CkptEmaError, match="differ in 7 tensors") as caught:
        ckpt_ema.reconstruct(tmp_path / "run", tmp_path / "t.safetensors", half_life=100.0)
    assert (caught.value.hint or "").startswith("pass `--dtype float32` to fold all of them")
    options: dict[str, Any] = {"half_life": 100.0, "dtype": "float32", "announce": lambda plan: None}
    report = ckpt_ema.reconstruct(tmp_path / "run", tmp_path / "t.safetensors", **options)
    assert any("change their precision" in note for note in report.plan.notes)
    total = sum(
        item.coefficient * load["state_dict"]["body.weight"].double()
        for item in report.plan.checkpoints
        for load in [torch.load(tmp_path / "run" / item.name)]
    )
    assert isinstance(total, torch.Tensor)
    found = load_file(report.output)["body.weight"].double()
    assert float((found - total).norm() / total.norm()) < 1e-6
    assert ckpt_ema.verify(report.output, tmp_path / "run", share=1).is_ok


def test_a_stopped_fold_goes_on_across_the_change(tmp_path: Path) -> None:
    """`resume` compares every checkpoint's dtypes: the same go on, another precision is named."""
    long_run(tmp_path / "run", LONG)
    options: dict[str, Any] = {"momentum": 0.1, "dtype": "float32", "memory_budget_bytes": 1 << 17, "num_threads": 1}
    whole = quiet_fold(tmp_path / "run", tmp_path / "whole.safetensors", **options).output.read_bytes()

    def stop(done: int, total: int) -> None:
        if done > 0.5 * total:
            raise RuntimeError("stopped")

    for change in (False, True):
        output = tmp_path / f"t-{change}.safetensors"
        with pytest.raises(RuntimeError, match="stopped"):
            quiet_fold(tmp_path / "run", output, progress=stop, resume=True, **options)
        if change:
            path = tmp_path / "run" / "step_300.pt"
            saved = torch.load(path)
            saved["state_dict"] = {
                n: t.to(FLOAT16) if t.is_floating_point() else t for n, t in saved["state_dict"].items()
            }
            torch.save(saved, path)
            with pytest.raises(CkptEmaError, match="inputs or options differ"):
                quiet_fold(tmp_path / "run", output, resume=True, **options)
        else:
            assert quiet_fold(tmp_path / "run", output, resume=True, **options).resumed_bytes > 0
            assert output.read_bytes() == whole


def test_ranks_write_the_bytes_of_one(tmp_path: Path) -> None:
    """Three ranks share the reading by what each student takes there."""
    long_run(tmp_path / "run", LONG)
    options = ("--momentum", "0.1", "--dtype", "float32", "--memory", "1MiB")
    for count in (1, 3):
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "ckpt_ema"]
        words += ["fold", str(tmp_path / "run"), "-o", str(tmp_path / f"{count}.safetensors"), *options]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


@pytest.mark.parametrize("seed", range(6))
def test_a_gpu_makes_the_cpus_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """On a model of its streams, with blocks smaller than the tensors: buffers hold the widest student."""
    dtypes = [random.Random(seed).choice((FLOAT32, FLOAT64, BFLOAT16, FLOAT16, FLOAT8)) for _ in range(5)]
    long_run(tmp_path / "run", [FLOAT32, BFLOAT16, *dtypes])
    options: dict[str, Any] = {"momentum": [0.1, 0.3], "dtype": "float32", "memory_budget_bytes": 1 << 19}
    expected = fold_on_cpu(tmp_path / "run", tmp_path / "cpu-{momentum}.safetensors", **options)
    with modelled(monkeypatch, seed):
        assert fold_on_a_model(tmp_path / "run", tmp_path / "t-{momentum}.safetensors", **options) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [LONG, [FLOAT32, FLOAT8, FLOAT64, BFLOAT16]])
def test_a_real_gpu_makes_the_cpus_bytes(tmp_path: Path, dtypes: list[torch.dtype]) -> None:
    """The same where there is one."""
    long_run(tmp_path / "run", dtypes)
    made = [
        quiet_fold(tmp_path / "run", tmp_path / f"{device}.safetensors", momentum=0.1, dtype="float32", device=device)
        for device in ("cpu", "cuda")
    ]
    assert made[0].output.read_bytes() == made[1].output.read_bytes()


# --- a run that changes while it is followed ----------------------------------------------------------------------


def follow_changes(run: Path, output: Path, parts: Sequence[Sequence[torch.dtype]], **options: Any) -> list[str]:
    """Follow a run that gets its next part when the last one is folded; what was told."""
    lines: list[str] = []
    stop = threading.Event()
    errors: list[BaseException] = []

    def follow() -> None:
        try:
            given = {"poll_seconds": 0.05, "momentum": 0.3, "tell": lines.append, "stop": stop, **options}
            ckpt_ema.follow(run, output, **given)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=follow)
    run.mkdir(exist_ok=True)
    thread.start()
    try:
        number = 1
        for dtypes in parts:
            # In one step, so that all of it is there at one look.
            save(run / ".coming", [make(number + i, dtype) for i, dtype in enumerate(dtypes)], first=number)
            for path in sorted((run / ".coming").iterdir()):
                path.rename(run / path.name)
            number += len(dtypes)
            deadline = time.monotonic() + 30
            while f"{counted(number - 1, 'checkpoint')} in" not in "\n".join(lines):
                assert not errors, errors
                assert time.monotonic() < deadline, lines
                time.sleep(0.02)
    finally:
        stop.set()
        thread.join(30)
    assert not errors, errors
    return lines


@pytest.mark.parametrize(
    ("change", "cut"), [("float32 to bfloat16", 2), ("float32 to bfloat16", 4), ("bfloat16 to float32", 2)]
)
def test_following_goes_on_when_the_precision_changes(tmp_path: Path, change: str, cut: int) -> None:
    """The teacher is float32 from then on, bit for bit the fold of all at once, and so when following begins anew."""
    dtypes = CHANGES[change]
    run, output = tmp_path / "run", tmp_path / "t.safetensors"
    lines = follow_changes(run, output, [dtypes[:cut], dtypes[cut:]])
    students = [make(seed, dtype) for seed, dtype in enumerate(dtypes, start=1)]
    assert_same_bits(load_file(output), expected_teacher(students, 0.3, FLOAT32))
    told = "step_300.pt is bfloat16, and what was before is float32: the teacher is float32"
    if cut == 2:
        told += " from now on"
    # 16-bit students were followed in float32 before: that theirs is float32 now changes nothing.
    assert [line for line in lines if "the teacher " in line] == ([told] if change.startswith("float32") else [])
    assert ckpt_ema.verify(output, run, share=1).is_ok


def test_straight_lines_cross_the_change_while_following(tmp_path: Path) -> None:
    """From the newest checkpoint in the teacher, in the old precision, to the first in the new one."""
    dtypes = CHANGES["float32 to bfloat16"]
    run, output = tmp_path / "run", tmp_path / "t.safetensors"
    follow_changes(run, output, [dtypes[:2], dtypes[2:]], momentum=None, half_life=150.0)
    whole = quiet_fold(run, tmp_path / "whole.safetensors", half_life=150.0, dtype="float32").output
    assert ckpt_ema.compare(output, whole).relative < 1e-6
    found = ckpt_ema.verify(output, run, share=1)
    assert found.is_ok, found.checks


@pytest.mark.parametrize(
    ("change", "cuts", "told"),
    [
        (
            "float64 to float32",
            (1, 2),
            "step_300.pt is float32, and what was before is float64: the teacher is float32",
        ),
        (
            "float16 to float64",
            (1, 2),
            "`bn.running_mean` of step_200.pt is float64: the teacher stays float32",
        ),
        ("float64 to bfloat16", (), "step_300.pt is bfloat16, and what was before is float64: the teacher is float32"),
        (
            "bfloat16 to float64",
            (2,),
            "`bn.running_mean` of step_300.pt is float64: the teacher stays float32",
        ),
        (
            "to and fro float64",
            (1, 2, 3),
            "step_200.pt is float64, and what was before is float32: the teacher is float32",
        ),
    ],
)
def test_following_float64_students_says_what_is_lost(
    tmp_path: Path, change: str, cuts: tuple[int, ...], told: str
) -> None:
    """A follower that ended would lose checkpoints: it goes on in float32, and warns once, whatever it was before."""
    dtypes = {
        **CHANGES,
        "float64 to bfloat16": [FLOAT64, FLOAT64, BFLOAT16],
        "bfloat16 to float64": [BFLOAT16, BFLOAT16, FLOAT64],
        "to and fro float64": [FLOAT32, FLOAT64, FLOAT32, FLOAT64],
    }[change]
    run, output = tmp_path / "run", tmp_path / "t.safetensors"
    lines = follow_changes(run, output, [dtypes[a:b] for a, b in itertools.pairwise([0, *cuts, len(dtypes)])])
    since = " from now on" if cuts and told.endswith("is float32") else ""
    assert [line for line in lines if "the teacher " in line] == [
        f"Warning: {told}{since}, and loses digits that float64 has"
    ]
    whole = quiet_fold(run, tmp_path / "whole.safetensors", momentum=0.3, dtype="float32").output
    assert ckpt_ema.compare(output, whole).relative < 1e-6
    found = ckpt_ema.verify(output, run, share=1)
    assert found.is_ok, found.checks


def test_a_float64_tensor_among_narrow_ones_is_said_to_lose_digits(tmp_path: Path) -> None:
    """Nothing changes, and nobody asked for float32."""
    students = [make(seed, BFLOAT16) for seed in (1, 2)]
    for student in students:
        student["norm.weight"] = student["norm.weight"].double()
    save(tmp_path / "run", students)
    lines: list[str] = []
    for _ in range(2):
        ckpt_ema.follow(tmp_path / "run", momentum=0.3, until_step=200, poll_seconds=0.05, tell=lines.append)
    assert [line for line in lines if "the teacher " in line] == [
        "Warning: `norm.weight` of step_100.pt is float64: the teacher is float32, and loses digits that float64 has"
    ]


def test_what_a_fold_has_lost_already_is_not_told_anew(tmp_path: Path) -> None:
    """Somebody asked that fold for float32: float64 students are no news to whoever follows on."""
    run, output = tmp_path / "run", tmp_path / "t.safetensors"
    save(run, [make(1, FLOAT64)])
    quiet_fold(run, output, momentum=0.3, dtype="float32")
    save(run, [make(2, FLOAT64)], first=2)
    lines: list[str] = []
    ckpt_ema.follow(run, output, until_step=200, poll_seconds=0.05, tell=lines.append)
    assert not [line for line in lines if "the teacher " in line]
    assert load_file(output)["body.weight"].dtype == FLOAT32


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_a_dtype_that_was_asked_for_is_no_news(tmp_path: Path, asked: str) -> None:
    """Whatever the students are and become."""
    dtypes = [FLOAT64, BFLOAT16, FLOAT32]
    lines = follow_changes(tmp_path / "run", tmp_path / "t.safetensors", [dtypes[:2], dtypes[2:]], dtype=asked)
    assert not [line for line in lines if "the teacher " in line]
    assert load_file(tmp_path / "t.safetensors")["body.weight"].dtype == getattr(torch, asked)


@pytest.mark.parametrize("dtypes", [[FLOAT32, BFLOAT16], [BFLOAT16, FLOAT32]])
def test_accumulating_in_the_students_dtype_ends_at_the_change_and_says_what_goes_on(
    tmp_path: Path, cli: Cli, dtypes: list[torch.dtype]
) -> None:
    """The teacher before is kept, nothing is said of one that never was, and the hint works as it stands."""
    save(tmp_path / "run", [make(1, dtypes[0])])
    arguments = ("follow", "run", "--momentum", "0.3", "--until")
    assert cli(*arguments, "100", "--accumulate", "student").code == 0
    before = (tmp_path / "run" / "teacher.safetensors").read_bytes()
    save(tmp_path / "run", [make(2, dtypes[1])], first=2)
    ended = cli(*arguments, "200", "--accumulate", "student")
    assert ended.code == 2
    assert "`--accumulate student` is impossible for `embed.weight`" in ended.stderr
    assert "hint: pass `--accumulate float64`" in ended.stderr
    assert "the teacher is" not in ended.stderr
    assert (tmp_path / "run" / "teacher.safetensors").read_bytes() == before
    went_on = cli(*arguments, "200", "--accumulate", "float64")
    assert went_on.code == 0, went_on.stderr
    students = [make(1, dtypes[0]), make(2, dtypes[1])]
    expected = expected_teacher(students, 0.3, FLOAT64)
    for name, tensor in load_file(tmp_path / "run" / "teacher.safetensors").items():
        assert torch.allclose(tensor, expected[name], rtol=1e-6, atol=1e-7), name


def test_a_follower_that_begins_anew_after_the_change_goes_on(tmp_path: Path) -> None:
    """Stopped before the change, started after it: as if it had never ended."""
    dtypes = CHANGES["float32 to bfloat16"]
    run, output = tmp_path / "run", tmp_path / "t.safetensors"
    students = [make(seed, dtype) for seed, dtype in enumerate(dtypes, start=1)]
    save(run, students[:2])
    for _ in range(2):
        stop = threading.Event()
        stop.set()
        ckpt_ema.follow(run, output, momentum=0.3, stop=stop, poll_seconds=0.05)
        save(run, students)
    assert_same_bits(load_file(output), expected_teacher(students, 0.3, FLOAT32))
