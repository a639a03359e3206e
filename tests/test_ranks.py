"""One fold by many processes, and teachers of many files: the bytes of one process, or nothing at all."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckpt_ema
from ckpt_ema.blocks import plan_of_rank
from ckpt_ema.byte_ranges import open_input
from ckpt_ema.dtypes import BY_NAME
from ckpt_ema.errors import CkptEmaError, MisuseError
from ckpt_ema.formats.zip_archive import ZipArchive
from ckpt_ema.output.teacher_files import Entry, tensor_zip
from ckpt_ema.ranks import Ranks, StoreRanks, ranks_of_environment
from tests.conftest import Outcome, StateDict, assert_same_bits, hook_teacher, quiet_fold

MOMENTUM = 0.3


def make_large(seed: int) -> StateDict:
    """More than one block of float32 and of bfloat16, a transposed tensor, buffers, tied and empty ones."""
    generator = torch.Generator().manual_seed(seed)
    tied = torch.randn(300, 1000, generator=generator)
    return {
        "a.weight": torch.randn(1300, 700, generator=generator),
        "b.weight": torch.randn(100, 9000, generator=generator).T,
        "c.weight": torch.randn(1_100_000, generator=generator).bfloat16(),
        "d.running_mean": torch.randn(50_000, generator=generator),
        "e.weight": tied,
        "f.weight": tied,
        "g.weight": torch.empty(0, 3),
        "h.count": torch.tensor(seed),
    }


@pytest.fixture(scope="module")
def large_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of `make_large`."""
    run = tmp_path_factory.mktemp("large") / "run"
    run.mkdir()
    for seed in (1, 2, 3):
        torch.save(make_large(seed), run / f"step_{seed}.pt")
    return run


def start(count: int, *arguments: object) -> subprocess.Popen[str]:
    """`ckpt-ema` on `count` ranks."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "ckpt_ema"]
    return _process([*command, *map(str, arguments)])


def alone(*arguments: object) -> subprocess.Popen[str]:
    """`ckpt-ema` as one process."""
    return _process(["-m", "ckpt_ema", *map(str, arguments)])


def _process(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code and what was printed."""
    try:
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- one rank and many ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("-o", "t.safetensors"),
        ("-o", "t", "--shard-size", "2MB"),
        ("-o", "t", "--output-format", "dcp"),
        ("-o", "t-{momentum}.safetensors", "--momentum", "0.5"),
    ],
)
def test_many_ranks_write_the_bytes_of_one(large_run: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """One file, shards, a folder for torch, two teachers: the same files, and one rank alone prints their names."""
    one, many = tmp_path / "one", tmp_path / "many"
    printed = []
    for folder, ranks in ((one, 1), (many, 3 if options[1] == "t.safetensors" else 2)):
        folder.mkdir()
        arguments = ["fold", large_run, "--momentum", MOMENTUM, "--memory", "3MiB", *options]
        arguments[arguments.index("-o") + 1] = folder / options[1]
        code, stdout, stderr = end(start(ranks, *arguments) if ranks > 1 else alone(*arguments))
        assert code == 0, stderr
        printed.append(stdout.replace(str(folder), ""))
    assert contents(one) == contents(many)
    assert printed[0] == printed[1]
    if options[1] == "t.safetensors":
        students = [make_large(seed) for seed in (1, 2, 3)]
        widened = [
            {name: tensor.float() if tensor.dtype is torch.bfloat16 else tensor for name, tensor in s.items()}
            for s in students
        ]
        expected = hook_teacher(widened, MOMENTUM, ["d.running_mean"])
        expected["c.weight"] = expected["c.weight"].bfloat16()
        assert_same_bits(load_file(one / "t.safetensors"), expected)


def test_every_rank_has_a_part_of_the_reading(large_run: Path) -> None:
    """Parts are disjoint, make the whole, and are of one size up to a page of each input."""
    plan = ckpt_ema.plan(large_run, momentum=MOMENTUM).blocks
    for count in (2, 5, 64):
        parts = [plan_of_rank(plan, number, count) for number in range(count)]
        assert sum(part.bytes_to_read for part in parts) == plan.bytes_to_read
        spans: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for part in parts:
            for lane in part.lanes:
                spans.setdefault(lane.tensors, []).append(lane.span)
        for lane in plan.lanes:
            found = sorted(spans[lane.tensors])
            assert (found[0][0], found[-1][1]) == lane.span
            assert all(one[1] == other[0] for one, other in itertools.pairwise(found))
        share = plan.bytes_to_read / count
        assert all(abs(part.bytes_to_read - share) <= 2 * 4096 * 3 * 4 for part in parts)


def test_a_rank_that_fails_fails_the_command(large_run: Path, tmp_path: Path) -> None:
    """A NaN that one rank meets: its message is there, no rank writes anything, and the exit code is not 0."""
    run = tmp_path / "run"
    run.mkdir()
    for seed in (1, 2, 3):
        student = make_large(seed)
        if seed == 2:
            student["c.weight"][-1] = float("nan")
        torch.save(student, run / f"step_{seed}.pt")
    output = tmp_path / "out" / "t.safetensors"
    output.parent.mkdir()
    output.write_bytes(b"the old one")
    code, stdout, stderr = end(start(2, "fold", run, "-o", output, "--overwrite"))
    assert code != 0
    assert stdout == ""
    assert "`c.weight` holds a NaN or an infinity in `step_2.pt`" in stderr
    assert "folding.py" not in stderr  # torchrun prints tracebacks of its own
    assert contents(output.parent) == {"t.safetensors": b"the old one"}


def test_a_rank_that_is_killed_fails_the_command(large_run: Path, tmp_path: Path) -> None:
    """The scheduler ends the others; no teacher appears."""
    process = start(2, "fold", large_run, "-o", tmp_path / "t.safetensors")
    victim = None
    for _ in range(600):
        victim = next(iter(ranks_below(process.pid)), None)
        if victim is not None or process.poll() is not None:
            break
        time.sleep(0.05)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    code, stdout, _ = end(process)
    assert code != 0
    assert stdout == ""
    assert not (tmp_path / "t.safetensors").exists()


def test_what_killed_ranks_have_done_is_gone_on_with_by_any_number(tmp_path: Path) -> None:
    """Every rank's finished blocks count, also for another number of ranks; the bytes are those of one undisturbed."""
    run = tmp_path / "run"
    run.mkdir()
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        save_file({"w": torch.randn(40_000_000, generator=generator)}, run / f"step_{seed}.safetensors")
    arguments = ("fold", run, "--momentum", "0.3", "--memory", "1MiB", "--resume", "-o")
    process = start(2, *arguments, tmp_path / "t.safetensors")
    records: list[Path] = []
    while not (records and records[0].stat().st_size > 24 * 30):
        assert process.poll() is None, process.communicate()
        records = [path for path in tmp_path.iterdir() if path.name.endswith(".rank1")]
        time.sleep(0.01)
    for victim in ranks_below(process.pid):
        os.kill(victim, signal.SIGKILL)
    assert end(process)[0] != 0
    code, stdout, stderr = end(start(3, *arguments, tmp_path / "t.safetensors", "--json"))
    assert code == 0, stderr
    assert json.loads(stdout)["resumed_bytes"] > 0
    code, _, stderr = end(alone(*arguments, tmp_path / "whole.safetensors"))
    assert code == 0, stderr
    assert (tmp_path / "t.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["run", "t.safetensors", "whole.safetensors"]


def ranks_below(parent: int) -> Iterator[int]:
    """Processes that torchrun started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in map(int, children):
        if b"ckpt_ema" in Path(f"/proc/{child}/cmdline").read_bytes():
            yield child


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_a_plan_is_printed_once(run: Path, cli: Callable[..., Outcome]) -> None:
    """Whatever the number of ranks that are started to print it."""
    environment = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1"}
    outcomes = [cli("plan", run, SLURM_PROCID=str(rank), **environment) for rank in range(2)]
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert [bool(outcome.stdout) for outcome in outcomes] == [True, False]


def test_slurms_variables_are_enough(large_run: Path, tmp_path: Path) -> None:
    """srun gives each process its number; the first machine and the job's number give the address."""
    common = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": str(free_port()),  # any number; the port follows from it
        "SLURM_STEP_ID": "0",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "ckpt_ema",
                "fold",
                large_run,
                "--momentum",
                "0.3",
                "-o",
                tmp_path / "t.safetensors",
            ],
            env={**environment, **common, "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (1, 0)
    ]
    ended = [end(process) for process in processes]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert [stdout for _, stdout, _ in ended] == ["", f"{tmp_path / 't.safetensors'}\n"]
    quiet_fold(large_run, tmp_path / "one.safetensors", momentum=MOMENTUM)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "t.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "0", "WORLD_SIZE": "4"}, (0, 1, 0)),  # somebody else's variables, without an address
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (3, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (0, 1, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1, 0)),  # in a batch script, outside of srun
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2"}, (5, 8, 2)),
    ],
)
def test_the_environment_says_which_rank_this_is(environment: dict[str, str], place: tuple[int, int, int]) -> None:
    """torchrun's variables, srun's, or none."""
    ranks = ranks_of_environment(environment)
    assert (ranks.number, ranks.count, ranks.local) == place
    assert isinstance(ranks, StoreRanks if place[1] > 1 else Ranks)


@pytest.mark.parametrize("changed", [{"RANK": "x"}, {"RANK": "4"}, {"MASTER_PORT": ""}])
def test_an_environment_that_makes_no_sense_is_misuse(changed: dict[str, str]) -> None:
    """Not a fold by one rank of a world that is not there."""
    environment = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    with pytest.raises(MisuseError, match="environment"):
        ranks_of_environment(environment | changed)


def test_the_library_is_alone_inside_a_training_job(
    large_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that torchrun started may fold on its first rank only: nobody is waited for unless asked."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    quiet_fold(large_run, tmp_path / "t.safetensors", momentum=MOMENTUM)


class SilentStore:
    """A store in which only rank 0 ever said something."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, name: str, value: str) -> None:
        """As torch's."""
        self.values[name] = value.encode()

    def get(self, name: str) -> bytes:
        """As torch's."""
        return self.values[name]

    def check(self, names: list[str]) -> bool:
        """As torch's."""
        return all(name in self.values for name in names)


@pytest.mark.parametrize(("beats", "says"), [(True, "gave no sign for"), (False, "did not start in")])
def test_a_rank_that_is_never_heard_of_is_not_waited_for_for_ever(
    beats: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that went down cannot say so; of one that has not begun people hear long before that is an error."""
    monkeypatch.setattr("ckpt_ema.ranks.SILENCE_SECONDS", 0.4)
    monkeypatch.setattr("ckpt_ema.ranks.START_SECONDS", 0.4)
    monkeypatch.setattr("ckpt_ema.ranks.TELL_SECONDS", 0.1)
    store = SilentStore()
    told: list[str] = []
    if beats:
        store.set("alive/1", "7")
    ranks = StoreRanks(0, 2, 0, lambda: store)
    ranks.tell = told.append
    with pytest.raises(CkptEmaError, match=f"rank 1 of 2 {says}") as caught, ranks:
        ranks.wait_for_all("folded")
    assert len(told) == (0 if beats else 1)
    assert all("waiting for rank 1 of 2" in text and "`unset RANK SLURM_PROCID`" in text for text in told)
    assert (caught.value.hint is None) is beats


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CkptEmaError("it is full", hint="make room"), "rank 0: it is full"),
        (ValueError("odd"), "rank 0: ValueError: odd"),
        (KeyboardInterrupt(15), "rank 0: it was stopped"),
    ],
)
def test_others_are_told_why_in_words(error: BaseException, told: str) -> None:
    """Whatever ended a rank; not the number of a signal."""
    store = SilentStore()
    with pytest.raises(type(error)), StoreRanks(0, 2, 0, lambda: store):
        raise error
    assert store.values["failed"] == told.encode()


def test_ranks_that_see_other_files_do_not_fold(run: Path, tmp_path: Path) -> None:
    """A stale view of a network file system: an error, not a teacher of two halves."""
    store = SilentStore()
    store.values = {"plan": b"another", "alive/0": b"1"}
    with pytest.raises(CkptEmaError, match="rank 1 sees other checkpoints than the first rank does"):
        quiet_fold(run, tmp_path / "t.safetensors", ranks=StoreRanks(1, 2, 1, lambda: store))
    assert b"sees other checkpoints" in store.values["failed"]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ((("--state", "other"), ("--state", "state_dict")), 'state: "other" there, "state_dict" here'),
        ((("--shard-size", "2MB"), ("--shard-size", "3MB")), "shard-size-bytes: 2000000 there, 3000000 here"),
        ((("--output-format", "dcp"), ("--shard-size", "100MB")), 'output-format: "dcp" there, "safetensors" here'),
        ((("--memory", "2MiB"), ("--memory", "3MiB", "--resume")), ""),
    ],
)
def test_ranks_of_different_options_write_no_mixture(
    large_run: Path, tmp_path: Path, own: tuple[tuple[str, ...], tuple[str, ...]], said: str
) -> None:
    """What one rank was told otherwise is an error of all, but for what only decides how it works."""
    run, output = large_run, "t.safetensors"
    if "--shard-size" in own[1]:
        output = "t"
    if "--state" in own[0]:
        run = tmp_path / "run"
        run.mkdir()
        for step in (1, 2):
            one, other = ({"a": torch.full((1 << 20,), float(step * way))} for way in (1, 9))
            torch.save({"state_dict": one, "other": other}, run / f"step_{step}.pt")
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "ckpt_ema", "fold", run, "--momentum", "0.3", "-o", output, *options],
            env={
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parent.parent),
                **{"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            },
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, options in enumerate(own)
    ]
    ended = [end(process) for process in processes]
    if not said:
        assert [code for code, _, _ in ended] == [0, 0], ended
        return
    assert [code for code, _, _ in ended] == [1, 1], ended
    assert said in ended[1][2]
    assert "start all ranks with the same version and options" in ended[1][2]
    assert not [path for path in tmp_path.iterdir() if path.name != "run"]


# --- many files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 300, 2000, 10**9])
def test_shards_are_what_hugging_face_reads(run: Path, tmp_path: Path, size: int) -> None:
    """Whole tensors, in files of up to the size; the index names each; one file has its plain name and no index."""
    report = quiet_fold(run, tmp_path / "t", momentum=MOMENTUM, shard_size_bytes=size)
    expected = quiet_fold(run, tmp_path / "t.safetensors", momentum=MOMENTUM)
    tensors: StateDict = {}
    files = sorted(report.output.glob("*.safetensors"))
    for path in files:
        part = load_file(path)
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= size
        assert not tensors.keys() & part.keys()
        tensors |= part
        with safe_open(path, "pt") as opened:
            assert json.loads(opened.metadata()["ckpt_ema"])["momentum"] == MOMENTUM
    assert_same_bits(tensors, load_file(expected.output))
    if len(files) == 1:
        assert [path.name for path in report.output.iterdir()] == ["model.safetensors"]
        return
    index = json.loads((report.output / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert [path.name for path in files] == names
    assert ckpt_ema.inspect(report.output).provenance is not None


def test_transformers_loads_a_sharded_teacher(tmp_path: Path) -> None:
    """from_pretrained of the folder gives the teacher's numbers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    for step in (1, 2):
        torch.manual_seed(step)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    report = quiet_fold(tmp_path / "run", None, momentum=MOMENTUM, shard_size_bytes=10_000)
    assert len(list(report.output.glob("model-*.safetensors"))) > 2
    whole = load_file(quiet_fold(tmp_path / "run", tmp_path / "t.safetensors", momentum=MOMENTUM).output)
    loaded = GPT2LMHeadModel.from_pretrained(report.output).state_dict()
    for name, tensor in whole.items():
        assert torch.equal(loaded[name], tensor), name


def test_torch_loads_a_teacher_for_torch(large_run: Path, tmp_path: Path) -> None:
    """torch.distributed.checkpoint.load: every tensor, in the teacher's dtypes; and the tool reads it again."""
    report = quiet_fold(large_run, tmp_path / "t", momentum=MOMENTUM, output_format="dcp", until_step=2)
    expected = load_file(quiet_fold(large_run, tmp_path / "t.safetensors", momentum=MOMENTUM, until_step=2).output)
    loaded = {name: torch.full_like(tensor, 7) for name, tensor in expected.items()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(loaded, checkpoint_id=report.output)
    assert_same_bits(loaded, expected)
    found = ckpt_ema.inspect(report.output)
    assert found.provenance is not None
    assert found.provenance["momentum"] == MOMENTUM
    gone_on = quiet_fold(large_run, tmp_path / "u.safetensors", momentum=MOMENTUM, init=report.output)
    assert gone_on.plan.initial_teacher == "t"


@pytest.mark.parametrize("dtype", [name for name in BY_NAME if BY_NAME[name].code])
def test_every_dtype_is_pickled_as_torch_does(dtype: str, tmp_path: Path) -> None:
    """torch.load of one tensor's zip, weights only; also those that no storage class is named after."""
    value = torch.arange(24, dtype=torch.uint8).view(getattr(torch, dtype)) if dtype != "bool" else torch.ones(24) > 0
    content = bytes(value.view(torch.uint8).tolist())
    before, behind = tensor_zip(Entry("x", BY_NAME[dtype], tuple(value.shape), 0, len(content)))
    path = tmp_path / "x.pt"
    path.write_bytes(before + content + behind)
    loaded = torch.load(path, weights_only=True)
    assert loaded.dtype is getattr(torch, dtype)
    assert bytes(loaded.view(torch.uint8).tolist()) == content
    assert zipfile.ZipFile(path).getinfo("archive/data/0").file_size == len(content)


def test_a_tensor_above_four_gigabytes_has_a_zip_of_its_size(tmp_path: Path) -> None:
    """An embedding of 5 GB, as a file with a hole: Python, torch and this tool find its bytes in the same place."""
    size = 5 << 30
    before, behind = tensor_zip(Entry("x", BY_NAME["float32"], (size // 4,), 0, size))
    path = tmp_path / "x.pt"
    with path.open("wb") as file:
        file.write(before)
        file.truncate(len(before) + size)
        file.seek(len(before) + size)
        file.write(behind)
    assert zipfile.ZipFile(path).getinfo("archive/data/0").file_size == size
    reader = torch._C.PyTorchFileReader(str(path))
    assert reader.get_record_offset("data/0") == len(before)
    assert len(before) % 64 == 0
    opened = open_input(path)
    try:
        archive = ZipArchive(opened, opened.source())
        assert list(archive.locate(opened, ["archive/data/0"])) == [(len(before), len(before) + size)]
    finally:
        opened.close()


@pytest.mark.parametrize("options", [{"shard_size_bytes": 500}, {"output_format": "dcp"}])
def test_a_folder_of_many_files_is_replaced_as_a_whole(run: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Only with `overwrite`, only where a teacher of this tool is, and no file of the older one stays."""
    target = tmp_path / "t"
    quiet_fold(run, target, momentum=MOMENTUM, shard_size_bytes=100)
    with pytest.raises(CkptEmaError, match="exists"):
        quiet_fold(run, target, momentum=MOMENTUM, **options)
    quiet_fold(run, target, momentum=0.5, overwrite=True, **options)
    fresh = quiet_fold(run, tmp_path / "fresh", momentum=0.5, **options)
    assert contents(target) == contents(fresh.output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "run", "t"]
    (target / "notes.txt").write_text("mine")
    for path in target.glob("ckpt_ema.json"):
        path.unlink()
    for path in target.glob("*.safetensors"):
        save_file({"w": torch.ones(2)}, path)
    with pytest.raises(CkptEmaError):
        quiet_fold(run, target, momentum=0.5, overwrite=True, **options)
    assert (target / "notes.txt").exists()


@pytest.mark.parametrize("options", [{"shard_size_bytes": 500}, {"output_format": "dcp"}])
def test_a_fold_that_fails_leaves_no_folder(tmp_path: Path, options: dict[str, Any]) -> None:
    """Nor a part of one."""
    run = tmp_path / "run"
    run.mkdir()
    for seed in (1, 2):
        save_file({"w": torch.full((300,), float("nan" if seed == 2 else 1))}, run / f"step_{seed}.safetensors")
    with pytest.raises(CkptEmaError, match="NaN"):
        quiet_fold(run, tmp_path / "t", momentum=MOMENTUM, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shard_size_bytes": 0}, "1 byte or more"),
        ({"shard_size_bytes": 5, "output_format": "dcp"}, "has none"),
        ({"output_format": "pt"}, "must be one of safetensors, dcp"),
        ({"shard_size_bytes": "5GB"}, "must be a whole number"),
        ({"output_format": "dcp", "output": "t.safetensors"}, "the name of a file"),
    ],
)
def test_outputs_that_make_no_sense_are_misuse(run: Path, options: dict[str, Any], says: str) -> None:
    """Said before anything is read."""
    output = options.pop("output", "t")
    with pytest.raises(MisuseError, match=says):
        ckpt_ema.plan(run, output, momentum=MOMENTUM, **options)


@pytest.mark.parametrize("options", [{"shard_size_bytes": 500}, {"output_format": "dcp"}])
def test_a_folder_that_students_lie_in_is_never_replaced(run: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Also where a teacher of this tool lies among them; and what else lies in a teacher's folder stays there."""
    quiet_fold(run, run / "model.safetensors", momentum=MOMENTUM)
    before = contents(run)
    with pytest.raises(CkptEmaError):
        quiet_fold(run, run, momentum=MOMENTUM, overwrite=True, **options)
    assert contents(run) == before
    target = quiet_fold(run, tmp_path / "t", momentum=MOMENTUM, shard_size_bytes=100).output
    (target / "evaluation").mkdir()
    (target / "evaluation" / "scores.json").write_text("{}")
    (target / "notes.txt").write_text("mine")
    quiet_fold(run, target, momentum=0.5, overwrite=True, **options)
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / "evaluation" / "scores.json").exists()
    fresh = quiet_fold(run, tmp_path / "fresh", momentum=0.5, **options).output
    assert contents(fresh).items() <= contents(target).items()
    assert len(contents(target)) == len(contents(fresh)) + 2


@pytest.mark.parametrize("options", [{"shard_size_bytes": 500}, {"output_format": "dcp"}])
def test_a_folder_that_appears_meanwhile_is_left_alone(run: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Somebody else's result of the same name."""

    def appear(plan: Any) -> None:
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / "precious.txt").write_text("theirs")

    with pytest.raises(CkptEmaError, match="appeared while"):
        ckpt_ema.fold(run, tmp_path / "t", momentum=MOMENTUM, announce=appear, **options)
    assert contents(tmp_path / "t") == {"precious.txt": b"theirs"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "t"]


@pytest.mark.parametrize("options", [{"shard_size_bytes": 500}, {"output_format": "dcp"}])
@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_may_be_called_like_a_file_of_weights(
    run: Path, tmp_path: Path, options: dict[str, Any], exists: bool
) -> None:
    """Lightning's sharded checkpoints are folders called `x.ckpt`."""
    if exists:
        (tmp_path / "teacher.ckpt").mkdir()
    report = quiet_fold(run, tmp_path / "teacher.ckpt", momentum=MOMENTUM, **options)
    assert set(ckpt_ema.inspect(report.output).tensors) == {tensor.name for tensor in report.plan.tensors}


TWICE = """
import sys, time, ckpt_ema
for number in (1, 2):
    ranks = ckpt_ema.ranks_of_environment()
    if number == 2 and ranks.number == 1:
        time.sleep(2)
    output = f"{sys.argv[2]}/{number}.safetensors"
    ckpt_ema.fold(sys.argv[1], output, momentum=0.3, announce=lambda plan: None, ranks=ranks)
"""


def test_a_second_fold_waits_for_all_ranks_again(large_run: Path, tmp_path: Path) -> None:
    """What was said in the first means nothing: a slow rank's part is not missing from the second teacher."""
    script = tmp_path / "twice.py"
    script.write_text(TWICE)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    code, _, stderr = end(_process([*command, str(large_run), str(tmp_path)]))
    assert code == 0, stderr
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_a_rank_that_cannot_plan_tells_the_others(run: Path, tmp_path: Path) -> None:
    """It does not leave them waiting for somebody who never comes."""
    store = SilentStore()
    with pytest.raises(MisuseError, match="does not exist"):
        quiet_fold(tmp_path / "nowhere", tmp_path / "t.safetensors", ranks=StoreRanks(1, 2, 1, lambda: store))
    assert b"does not exist" in store.values["failed"]
    store.set("folded/1", "1")  # what is there already does not count any more
    with pytest.raises(CkptEmaError, match="another rank failed"), StoreRanks(0, 2, 0, lambda: store) as ranks:
        ranks.wait_for_all("folded")
