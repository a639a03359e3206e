"""Checkpoints that many ranks wrote: their pieces fold as the whole does, and pieces that lie are refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

import ckpt_ema
from ckpt_ema.errors import CkptEmaError
from tests.conftest import (
    StateDict,
    assert_same_bits,
    hook_teacher,
    make_student,
    quiet_fold,
    raw_bytes,
    saved_once,
)
from tests.test_properties import temporary_folder

MOMENTUM = 0.3
Pieces = list[tuple[tuple[int, ...], tuple[int, ...]]]
"""First index and number of indices per dimension, of each piece of a tensor."""


@pytest.fixture(scope="session")
def saved_by_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `sharded_ranks.py` saves on four ranks."""
    return saved_once(tmp_path_factory, "sharded", "sharded_ranks.py", 4)


def whole_students(saved: Path, how: str) -> list[StateDict]:
    """What torch itself gathered of each step."""
    paths = sorted((saved / "whole" / how).iterdir())
    return [torch.load(path, weights_only=True) for path in paths]


def expected_teacher(students: list[StateDict]) -> StateDict:
    """The hook's, with the buffers of the newest student."""
    return hook_teacher(students, MOMENTUM, [name for name in students[0] if "running" in name])


def write_dcp(
    folder: Path, tensors: Mapping[str, torch.Tensor], cuts: Mapping[str, Pieces], num_files: int = 1
) -> None:
    """A folder of torch.distributed.checkpoint's own records, with the pieces that the test wants."""
    folder.mkdir(parents=True)
    entries: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    files = [(folder / f"__{number}_0.distcp").open("wb") for number in range(num_files)]
    for name, tensor in tensors.items():
        chunks = []
        for number, (offsets, sizes) in enumerate(cuts.get(name, [((0,) * tensor.dim(), tuple(tensor.shape))])):
            piece = tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].clone()
            file = files[number % num_files]
            begin = file.tell()
            torch.save(piece, file)
            index = dcp_metadata.MetadataIndex(name, torch.Size(offsets), number)
            places[index] = _StorageInfo(Path(file.name).name, begin, file.tell() - begin)
            chunks.append(dcp_metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        properties = dcp_metadata.TensorProperties(dtype=tensor.dtype)
        entries[name] = dcp_metadata.TensorStorageMetadata(properties, tensor.shape, chunks)
    for file in files:
        file.close()
    write_table(folder, dcp_metadata.Metadata(entries, {name: (name,) for name in tensors}, places))


def write_table(folder: Path, table: Any) -> None:
    """`.metadata`, as torch writes it."""
    (folder / ".metadata").write_bytes(pickle.dumps(table))


def read_table(folder: Path) -> Any:
    """`.metadata`, as torch reads it."""
    return pickle.loads((folder / ".metadata").read_bytes())


# --- torch.distributed.checkpoint -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["rows", "boxes", "replicas", "root", "background", "safetensors"])
@pytest.mark.parametrize("memory", ["128KiB", "64MiB"])
def test_pieces_fold_to_the_bits_of_the_whole(saved_by_ranks: Path, tmp_path: Path, how: str, memory: str) -> None:
    """FSDP2 on four ranks, with tensor parallelism or replicas; saved nested, flat, in the background, as safetensors.

    Whatever the way and the budget, the teacher is the hook's on what torch gathered.
    """
    students = whole_students(saved_by_ranks, how if how in ("boxes", "replicas") else "rows")
    budget = {"128KiB": 128 << 10, "64MiB": 64 << 20}[memory]
    quiet_fold(saved_by_ranks / how, tmp_path / "t.safetensors", momentum=MOMENTUM, memory_budget_bytes=budget)
    assert_same_bits(load_file(tmp_path / "t.safetensors"), expected_teacher(students))


def test_a_file_per_rank_folds_to_the_bits_of_the_whole(saved_by_ranks: Path, tmp_path: Path) -> None:
    """FSDP's ShardedTensor objects, of which no code is run; a missing rank and nameless parameters are refused."""
    report = quiet_fold(saved_by_ranks / "shards", tmp_path / "t.safetensors", momentum=MOMENTUM)
    assert [checkpoint.step for checkpoint in report.plan.checkpoints] == [100, 200, 300]
    expected = expected_teacher(whole_students(saved_by_ranks, "shards"))
    assert_same_bits(load_file(tmp_path / "t.safetensors"), expected)
    with pytest.raises(CkptEmaError, match="flattened parameters"):
        quiet_fold(saved_by_ranks / "flat", tmp_path / "f.safetensors")
    folder = tmp_path / "iter_100.pth"
    shutil.copytree(saved_by_ranks / "shards" / "iter_100.pth", folder)
    (folder / "rank1.pth").unlink()
    assert "lacks the file of rank 1" in refusal(folder)
    (folder / "rank3.pth").rename(folder / "rank1.pth")
    assert "its pieces hold" in refusal(folder)


def test_composers_folders_are_read(saved_by_ranks: Path, tmp_path: Path) -> None:
    """Composer puts model, optimizers and time under `state`."""
    for step in (100, 200):
        whole = torch.load(saved_by_ranks / "whole" / "rows" / f"step_{step}.pt", weights_only=True)
        state = {"state": {"model": whole, "optimizers": {"AdamW": {"state": {"0": torch.ones(3, 3)}}}}, "rng": [1]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is but one process
            dcp.save(state, checkpoint_id=tmp_path / "run" / f"ep1-ba{step}", no_dist=True)
    report = quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=MOMENTUM)
    assert [(item.step, item.state_key) for item in report.plan.checkpoints] == [
        (100, "state.model"),
        (200, "state.model"),
    ]
    expected = expected_teacher(whole_students(saved_by_ranks, "rows")[:2])
    assert_same_bits(load_file(tmp_path / "t.safetensors"), expected)


def test_a_run_that_went_on_with_other_ranks_folds(saved_by_ranks: Path, tmp_path: Path) -> None:
    """Step 100 in four rows, step 200 in two times two boxes, step 300 whole: where the cuts are is no difference."""
    paths = [saved_by_ranks / "rows" / "step-100", saved_by_ranks / "boxes" / "step-200"]
    paths.append(saved_by_ranks / "whole" / "rows" / "step_300.pt")
    quiet_fold(paths, tmp_path / "t.safetensors", momentum=MOMENTUM)
    students = [whole_students(saved_by_ranks, how)[i] for i, how in enumerate(["rows", "boxes", "rows"])]
    assert_same_bits(load_file(tmp_path / "t.safetensors"), expected_teacher(students))


@pytest.mark.parametrize("how", ["rows", "root"])
def test_of_a_training_state_only_the_model_is_folded(saved_by_ranks: Path, how: str) -> None:
    """The optimizer and the counters beside it are left out; the step they record is known."""
    found = ckpt_ema.inspect(saved_by_ranks / how / "step-200")
    assert (found.step, found.step_origin) == (200, "step inside")
    assert set(found.tensors) == set(whole_students(saved_by_ranks, "rows")[0])
    planned = ckpt_ema.plan(saved_by_ranks / how)
    assert [checkpoint.step for checkpoint in planned.checkpoints] == [100, 200, 300]
    assert len(planned.tensors) == len(found.tensors)


def test_an_unfinished_folder_is_left_out_aloud(saved_by_ranks: Path, tmp_path: Path) -> None:
    """`.metadata` is written last: without it the newest is left out with a warning, an older one is an error."""
    run = tmp_path / "run"
    shutil.copytree(saved_by_ranks / "rows", run)
    (run / "step-300" / ".metadata").unlink()
    with pytest.warns(UserWarning, match="step-300.*unfinished"):
        report = ckpt_ema.fold(run, momentum=0.9)
    assert [checkpoint.step for checkpoint in report.plan.checkpoints] == [100, 200]
    (run / "step-100" / ".metadata").unlink()
    with pytest.raises(CkptEmaError, match="step-100` is an unfinished checkpoint"):
        ckpt_ema.plan(run)


@pytest.mark.parametrize("place", ["checkpoint-{}/pytorch_model_fsdp_0", "checkpoint_{}/pytorch_model_fsdp_0"])
def test_the_trainers_fsdp_checkpoints_are_read(saved_by_ranks: Path, tmp_path: Path, place: str) -> None:
    """The Trainer and accelerate put the model's folder into the checkpoint's, beside the optimizer's."""
    for step in (100, 200, 300):
        model = tmp_path / "run" / place.format(step)
        shutil.copytree(saved_by_ranks / "background" / f"step-{step}", model)
        shutil.copytree(model, model.with_name("optimizer_0"))
        (model.parent / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=MOMENTUM)
    expected = expected_teacher(whole_students(saved_by_ranks, "rows"))
    assert_same_bits(load_file(tmp_path / "t.safetensors"), expected)


def test_lightnings_sharded_checkpoints_know_their_step(saved_by_ranks: Path, tmp_path: Path) -> None:
    """`meta.pt` beside the pieces holds everything but tensors."""
    for number, step in enumerate((100, 200)):
        folder = tmp_path / "run" / f"epoch={number}.ckpt"
        shutil.copytree(saved_by_ranks / "background" / f"step-{step}", folder)
        torch.save({"global_step": step, "epoch": number, "loops": {}, "callbacks": {}}, folder / "meta.pt")
    planned = ckpt_ema.plan(tmp_path / "run")
    assert [(item.step, item.unit) for item in planned.checkpoints] == [(100, "step"), (200, "step")]


def guillotine(shape: tuple[int, ...], numbers: Iterator[int], depth: int) -> Pieces:
    """A random way to cut a tensor into boxes."""
    pieces: Pieces = [((0,) * len(shape), shape)]
    for _ in range(depth):
        offsets, sizes = pieces.pop(next(numbers) % len(pieces))
        dimension = next(numbers) % max(1, len(shape))
        if not shape or sizes[dimension] < 2:
            pieces.append((offsets, sizes))
            continue
        at = 1 + next(numbers) % (sizes[dimension] - 1)
        left, right = list(sizes), list(sizes)
        left[dimension], right[dimension] = at, sizes[dimension] - at
        begin = list(offsets)
        begin[dimension] += at
        pieces += [(offsets, tuple(left)), (tuple(begin), tuple(right))]
    return pieces


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=4),
    numbers=st.lists(st.integers(0, 10**6), min_size=60, max_size=60),
    depth=st.integers(0, 6),
    num_files=st.integers(1, 3),
    budget=st.integers(1 << 17, 1 << 20),
)
@settings(max_examples=40)
def test_any_way_to_cut_tensors_folds_to_the_bits_of_the_rule(
    shapes: list[tuple[int, ...]], numbers: list[int], depth: int, num_files: int, budget: int
) -> None:
    """Boxes of any size in any order, of tensors of any shape and memory order; each step cut in its own way."""
    stream = iter(numbers * 20)
    generator = torch.Generator().manual_seed(numbers[0])
    with temporary_folder() as folder:
        students = []
        for step in (1, 2, 3):
            student = {f"t{i}.weight": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
            if next(stream) % 2:  # a transposed parameter's pieces keep their memory order
                student = {
                    name: tensor.T.contiguous().T if tensor.dim() == 2 else tensor for name, tensor in student.items()
                }
            student["other.weight"] = torch.randn(3, generator=generator)
            cuts = {name: guillotine(tuple(tensor.shape), stream, depth) for name, tensor in student.items()}
            write_dcp(folder / "run" / f"step-{step}", student, cuts, num_files)
            loaded = {name: torch.zeros_like(tensor) for name, tensor in student.items()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is but one process
                dcp.load(loaded, checkpoint_id=folder / "run" / f"step-{step}", no_dist=True)
            assert_same_bits(loaded, student)  # torch agrees that this is a checkpoint
            students.append(student)
        quiet_fold(folder / "run", folder / "t.safetensors", momentum=MOMENTUM, memory_budget_bytes=budget)
        assert_same_bits(load_file(folder / "t.safetensors"), hook_teacher(students, MOMENTUM))


# --- tables that lie --------------------------------------------------------------------------------------------------


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """A folder whose `fc.weight` lies in four boxes of two files."""
    boxes: Pieces = [((0, 0), (20, 10)), ((0, 10), (20, 9)), ((20, 0), (17, 10)), ((20, 10), (17, 9))]
    write_dcp(tmp_path / "run" / "step-1", make_student(1), {"fc.weight": boxes}, num_files=2)
    return tmp_path / "run" / "step-1"


def refusal(folder: Path) -> str:
    """What the tool says of a folder that it does not take."""
    with pytest.raises(CkptEmaError) as caught:
        quiet_fold([folder], folder.parent / "t.safetensors")
    return str(caught.value)


def test_the_folder_of_these_tests_is_read(cut: Path) -> None:
    """Or the refusals below would mean nothing."""
    quiet_fold([cut], cut.parent / "t.safetensors")
    assert_same_bits(load_file(cut.parent / "t.safetensors"), make_student(1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda chunks: chunks[0].__setattr__("offsets", torch.Size((0, 5))), "does not say where"),
        (lambda chunks: chunks.pop(), "hold"),
        (lambda chunks: chunks.append(chunks[0]), "hold"),
        (lambda chunks: chunks.__setitem__(1, chunks[0]), "hold"),
        (lambda chunks: chunks.__setitem__(slice(None), []), "stored nowhere"),
        (lambda chunks: chunks.__setitem__(0, "a chunk"), "ChunkStorageMetadata"),
        (lambda chunks: chunks[0].__setattr__("sizes", torch.Size((1 << 62, 10))), None),
        (lambda chunks: chunks[0].__setattr__("offsets", (-1, 0)), "not made of sizes"),
        (lambda chunks: chunks[0].__setattr__("offsets", "00"), "should be"),
    ],
)
def test_pieces_that_do_not_make_the_tensor_are_refused(cut: Path, change: Any, says: str | None) -> None:
    """Overlaps, holes, pieces beyond the tensor, things that are no pieces. Only the zips are believed in sizes."""
    table = read_table(cut)
    change(table.state_dict_metadata["fc.weight"].chunks)
    write_table(cut, table)
    if says is None:
        quiet_fold([cut], cut.parent / "t.safetensors")
        return
    assert says in refusal(cut)


def test_pieces_that_overlap_are_refused_even_if_their_sizes_add_up(tmp_path: Path) -> None:
    """Two boxes twice, two missing: as many elements as the tensor has."""
    boxes: Pieces = [((0, 0), (20, 10)), ((0, 9), (20, 10)), ((20, 0), (17, 9)), ((20, 9), (17, 10))]
    write_dcp(tmp_path / "step-1", make_student(1), {"fc.weight": boxes})
    assert "overlap" in refusal(tmp_path / "step-1")
    rows: Pieces = [((0, 0), (20, 19)), ((17, 0), (17, 19))]
    write_dcp(tmp_path / "step-2", make_student(1), {"fc.weight": rows})
    assert "overlap" in refusal(tmp_path / "step-2")
    rows = [((0, 0), (20, 19)), ((20, 0), (16, 19))]
    write_dcp(tmp_path / "step-3", make_student(1), {"fc.weight": rows})
    assert "its pieces hold 684" in refusal(tmp_path / "step-3")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("relative_path", "../step-1/__0_0.distcp", "names a file that is none"),
        ("relative_path", "/etc/passwd", "names a file that is none"),
        ("relative_path", "__9_0.distcp", "lacks `__9_0.distcp`"),
        ("relative_path", 7, "names a file that is none"),
        ("offset", -1, "no byte range"),
        ("offset", 3, "has a damaged directory"),
        ("offset", 1 << 70, "no byte range"),
        ("offset", 1 << 50, "truncated"),
        ("length", 100, "truncated"),
        ("length", "x", "no byte range"),
        ("transform_descriptors", ["zstd"], "were transformed"),
    ],
)
def test_places_that_are_none_are_refused(cut: Path, name: str, value: Any, says: str) -> None:
    """Paths out of the folder, missing files, ranges that hold no zip, compressed streams."""
    table = read_table(cut)
    place = next(place for index, place in table.storage_data.items() if index.fqn == "fc.weight")
    setattr(place, name, value)
    write_table(cut, table)
    assert says in refusal(cut)


def test_a_truncated_file_of_pieces_is_refused(cut: Path) -> None:
    """By name and size, before anything is read."""
    path = cut / "__1_0.distcp"
    os.truncate(path, path.stat().st_size - 1)
    assert "__1_0.distcp` is truncated" in refusal(cut)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"no pickle", pickle.dumps({}), pickle.dumps([1, 2])])
def test_a_table_that_is_none_is_refused(cut: Path, content: bytes) -> None:
    """Empty, cut off, something else."""
    (cut / ".metadata").write_bytes(content)
    assert ".metadata` " in refusal(cut)


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_table_never_runs(cut: Path) -> None:
    """torch's own reader would run it."""
    table = read_table(cut)
    table.planner_data["fc.weight"] = _Runs(cut / "ran")
    table.storage_meta = _Runs(cut / "ran")
    write_table(cut, table)
    quiet_fold([cut], cut.parent / "t.safetensors")
    assert not (cut / "ran").exists()


def test_values_of_a_dtype_other_than_the_table_says_are_refused(cut: Path) -> None:
    """A table of float32 over pieces of float64."""
    table = read_table(cut)
    table.state_dict_metadata["fc.weight"].properties.dtype = torch.float64
    write_table(cut, table)
    assert "is float64, and a piece of it float32" in refusal(cut)


def test_ranks_may_have_written_several_safetensors_files(tmp_path: Path) -> None:
    """Each tensor in the file that its name belongs to; a file that is missing is said, and no tensor is lost."""
    folder = tmp_path / "step-1"
    folder.mkdir()
    halves = {"a": torch.arange(8.0).view(4, 2), "b": torch.arange(6.0).view(2, 3)}
    for rank in (1, 2):
        for index, (name, tensor) in enumerate(halves.items(), start=1):
            rows = len(tensor) // 2
            info = json.dumps({name: {"saved_offsets": [(rank - 1) * rows, 0]}})
            part = {name: tensor[(rank - 1) * rows : rank * rows].clone()}
            path = folder / f"shard-{rank:05d}-model-{index:05d}-of-00002.safetensors"
            save_file(part, path, metadata={"DCP_SHARDING_INFO": info})
    quiet_fold([folder], tmp_path / "t.safetensors")
    assert_same_bits(load_file(tmp_path / "t.safetensors"), halves)
    for path in folder.glob("*-model-00002-*"):
        path.unlink()
    assert "1 of the 2 files" in refusal(folder)


def test_tables_that_hold_themselves_are_walked_once(tmp_path: Path) -> None:
    """A file per rank whose tables are nested in one another under many names."""
    folder = tmp_path / "iter_1.pth"
    folder.mkdir()
    table: dict[str, Any] = {"w.weight": torch.ones(3)}
    for number in range(200):
        table[f"t{number}"] = table
    torch.save({"state_dict": table, "meta": {"iter": 1}}, folder / "rank0.pth")
    quiet_fold([folder], tmp_path / "t.safetensors")
    assert set(load_file(tmp_path / "t.safetensors")) == {"w.weight"}


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


def masters(saved: Path, stage: int) -> list[StateDict]:
    """The float32 weights of each step, put together by DeepSpeed itself."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found = []
    for step in (2, 4, 6):
        student = get_fp32_state_dict_from_zero_checkpoint(str(saved / f"zero-{stage}"), tag=f"global_step{step}")
        found.append({name: tensor.contiguous() for name, tensor in student.items()})
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_partitions_fold_to_the_bits_of_deepspeeds_own_masters(
    saved_by_deepspeed: Path, tmp_path: Path, stage: int
) -> None:
    """Float32 weights out of the ranks' partitions; buffers, tied and frozen parameters are all there."""
    students = masters(saved_by_deepspeed, stage)
    report = quiet_fold(saved_by_deepspeed / f"zero-{stage}", tmp_path / "t.safetensors", momentum=MOMENTUM)
    assert [checkpoint.step for checkpoint in report.plan.checkpoints] == [2, 4, 6]
    teacher = load_file(tmp_path / "t.safetensors")
    expected = hook_teacher(students, MOMENTUM, ["moved"])
    if stage == 1:  # DeepSpeed's own tool loses what is not trained
        frozen = teacher.pop("frozen")
        assert raw_bytes(frozen) == raw_bytes(torch.load(module_file(saved_by_deepspeed, 1))["module"]["frozen"])
    assert_same_bits(teacher, expected)
    assert {tensor.name: tensor.reason for tensor in report.plan.tensors if tensor.action == "copy"} == {
        "moved": "buffer",
        "count": "int64",
    }


def module_file(saved: Path, stage: int) -> Path:
    """Where the model itself lies."""
    return saved / f"zero-{stage}" / "global_step6" / "mp_rank_00_model_states.pt"


def test_without_partitions_the_module_is_folded(saved_by_deepspeed: Path, tmp_path: Path) -> None:
    """Plain data parallelism, and ZeRO 2 whose optimizer states were deleted to save room."""
    quiet_fold(saved_by_deepspeed / "zero-0", tmp_path / "0.safetensors", momentum=MOMENTUM)
    run = tmp_path / "run"
    shutil.copytree(saved_by_deepspeed / "zero-2", run)
    for path in run.glob("*/*_optim_states.pt"):
        path.unlink()
    report = quiet_fold(run, tmp_path / "2.safetensors", momentum=MOMENTUM)
    assert {tensor.student_dtype.name for tensor in report.plan.tensors} == {"bfloat16", "float32", "int64"}
    modules = [
        torch.load(saved_by_deepspeed / "zero-0" / f"global_step{step}" / "mp_rank_00_model_states.pt")["module"]
        for step in (2, 4, 6)
    ]
    widened = [
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in module.items()}
        for module in modules
    ]
    expected = hook_teacher(widened, MOMENTUM, ["moved"])
    rounded = {name: tensor.to(modules[0][name].dtype) for name, tensor in expected.items()}
    assert_same_bits(load_file(tmp_path / "0.safetensors"), rounded)


def test_a_module_that_does_not_list_its_buffers_has_those_that_are_known_by_name(tmp_path: Path) -> None:
    """Older versions of DeepSpeed do not say; that is not the same as none."""
    for step in (2, 4):
        folder = tmp_path / "run" / f"global_step{step}"
        folder.mkdir(parents=True)
        table = {"module": {"weight": torch.randn(3, 2), "bn.running_mean": torch.randn(3)}, "global_steps": step}
        torch.save(table, folder / "mp_rank_00_model_states.pt")
    plan = ckpt_ema.plan(tmp_path / "run", momentum=0.5)
    assert {tensor.name: tensor.action for tensor in plan.tensors} == {"weight": "average", "bn.running_mean": "copy"}


def test_the_trainers_deepspeed_checkpoints_are_read(saved_by_deepspeed: Path, tmp_path: Path) -> None:
    """`checkpoint-4/` with `latest` and `global_step4/` inside, and no weights of its own."""
    for step in (2, 4, 6):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        shutil.copytree(saved_by_deepspeed / "zero-3" / f"global_step{step}", folder / f"global_step{step}")
        (folder / "latest").write_text(f"global_step{step}\n")
    quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=MOMENTUM)
    expected = hook_teacher(masters(saved_by_deepspeed, 3), MOMENTUM, ["moved"])
    assert_same_bits(load_file(tmp_path / "t.safetensors"), expected)


@pytest.mark.parametrize(
    ("stage", "pattern", "says"),
    [
        (2, "*rank_1_*optim_states.pt", "has files of 1 ranks, and 2 saved it"),
        (3, "*rank_0_*optim_states.pt", "lacks the file of rank 0"),
        (3, "*rank_0_*model_states.pt", "lacks the file of rank 0"),
        (3, "*optim_states.pt", "no rank's `*_optim_states.pt`"),
    ],
)
def test_a_missing_rank_is_said(saved_by_deepspeed: Path, tmp_path: Path, stage: int, pattern: str, says: str) -> None:
    """Never a teacher of half a model."""
    folder = tmp_path / "global_step6"
    shutil.copytree(saved_by_deepspeed / f"zero-{stage}" / "global_step6", folder)
    for path in folder.glob(pattern):
        path.unlink()
    with pytest.raises(CkptEmaError) as caught:
        quiet_fold([folder], tmp_path / "t.safetensors")
    assert says in str(caught.value)


def test_partitions_of_two_dtypes_are_refused(saved_by_deepspeed: Path, tmp_path: Path) -> None:
    """Never one rank's numbers read as another type."""
    folder = tmp_path / "global_step6"
    shutil.copytree(saved_by_deepspeed / "zero-2" / "global_step6", folder)
    [path] = folder.glob("*rank_1_*optim_states.pt")
    state = torch.load(path, weights_only=False)
    optimizer = state["optimizer_state_dict"]
    optimizer["single_partition_of_fp32_groups"] = [t.half() for t in optimizer["single_partition_of_fp32_groups"]]
    torch.save(state, path)
    assert "a piece of it float16" in refusal(folder)


def test_models_cut_across_ranks_say_what_converts_them(saved_by_deepspeed: Path, tmp_path: Path) -> None:
    """Tensor and pipeline parallelism need the model's own code."""
    folder = tmp_path / "global_step6"
    shutil.copytree(saved_by_deepspeed / "zero-1" / "global_step6", folder)
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_01_model_states.pt")
    with pytest.raises(CkptEmaError) as caught:
        quiet_fold([folder], tmp_path / "t.safetensors")
    assert "cut across ranks" in str(caught.value)
    assert "ds_to_universal.py" in (caught.value.hint or "")
