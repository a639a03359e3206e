"""Runs behind URLs: folded by byte ranges to the bytes of the local fold, or refused with the URL and the reason."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckpt_ema
from ckpt_ema.errors import CkptEmaError, MisuseError
from ckpt_ema.locations import as_path
from ckpt_ema.remote_store import _Pages
from tests.conftest import Outcome, StateDict, assert_same_bits, hook_teacher, make_student, quiet_fold, save_students
from tests.s3_server import BUCKET, S3Server, serve
from tests.test_sharded import write_dcp

Cli = Callable[..., Outcome]


@pytest.fixture(scope="session")
def s3_of_session() -> Iterator[S3Server]:
    """One server for all tests, which use prefixes of their own."""
    yield from serve()


@pytest.fixture
def s3(s3_of_session: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, which this process and those it starts find by the environment."""
    for name, value in s3_of_session.environment.items():
        monkeypatch.setenv(name, value)
    s3_of_session.requests.clear()
    s3_of_session.failures.clear()
    return s3_of_session


def write_zip(run: Path) -> None:
    """torch.save of today."""
    save_students(run, 3, suffix=".pt")


def write_legacy(run: Path) -> None:
    """torch.save from before torch 1.6."""
    run.mkdir()
    for seed in (1, 2, 3):
        state = {"state_dict": make_student(seed), "global_step": seed * 100}
        torch.save(state, run / f"step_{seed * 100}.pt", _use_new_zipfile_serialization=False)


def write_folders(run: Path) -> None:
    """The Trainer's folders: shards with an index, a configuration, a tokenizer."""
    for seed in (1, 2, 3):
        folder = run / f"checkpoint-{seed * 100}"
        folder.mkdir(parents=True)
        student = make_student(seed)
        names = sorted(student)
        shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for shard, held in shards.items():
            save_file({name: student[name] for name in held}, folder / shard)
        weight_map = {name: shard for shard, held in shards.items() for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "config.json").write_text('{"model_type": "none", "dtype": "float32"}')
        (folder / "tokenizer.json").write_text("{}")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": seed * 100}))
        (folder / "optimizer.pt").write_bytes(b"never read")


def write_pieces(run: Path) -> None:
    """torch.distributed.checkpoint's folders, a matrix in four boxes."""
    boxes = [((row, column), (size, width)) for row, size in ((0, 20), (20, 17)) for column, width in ((0, 9), (9, 10))]
    for seed in (1, 2, 3):
        write_dcp(run / f"step-{seed * 100}", make_student(seed), {"fc.weight": boxes}, num_files=2)


WRITERS = (save_students, write_zip, write_legacy, write_folders, write_pieces)


def write_run(write: Callable[..., object], run: Path) -> None:
    """Three checkpoints in one of the formats."""
    _ = write(run, 3) if write is save_students else write(run)


def all_bytes(teacher: Path) -> dict[str, bytes]:
    """The content of a teacher's files, by their names in its folder."""
    files = [path for path in teacher.rglob("*") if path.is_file()] if teacher.is_dir() else [teacher]
    return {path.name if teacher.is_dir() else "": path.read_bytes() for path in files}


# --- the same bytes ---------------------------------------------------------------------------------------------------


def fold_both(local: Path, remote: str, tmp_path: Path, **options: Any) -> list[dict[str, bytes]]:
    """What a fold of the same checkpoints writes, here and behind a URL."""
    teachers = []
    is_folder = any(local.glob("*/config.json"))
    for number, run in enumerate((local, remote)):
        teacher = tmp_path / (f"teacher-{number}" if is_folder else f"teacher-{number}.safetensors")
        ckpt_ema.fold(run, teacher, momentum=0.3, announce=lambda plan: None, overwrite=True, **options)
        teachers.append(all_bytes(teacher))
    return teachers


@pytest.mark.parametrize("write", WRITERS)
def test_a_run_in_a_bucket_folds_to_the_bytes_of_the_local_fold(
    s3: S3Server, tmp_path: Path, write: Callable[..., object]
) -> None:
    """Every format: s3:// gives what the same files give on disk, configuration and tokenizer as well."""
    write_run(write, tmp_path / "run")
    url = s3.upload(tmp_path / "run", f"same-{write.__name__}")
    local, remote = fold_both(tmp_path / "run", url, tmp_path)
    assert remote == local
    assert set(remote) == ({"config.json", "tokenizer.json", "model.safetensors"} if write is write_folders else {""})


@pytest.mark.parametrize("write", WRITERS)
def test_a_run_in_memory_folds_to_the_bytes_of_the_local_fold(tmp_path: Path, write: Callable[..., object]) -> None:
    """memory:// is read like any other filesystem of fsspec, which need not be asynchronous; in small blocks, too."""
    write_run(write, tmp_path / "run")
    fsspec.filesystem("memory").put(str(tmp_path / "run"), f"/{write.__name__}", recursive=True)
    local, remote = fold_both(tmp_path / "run", f"memory://{write.__name__}", tmp_path, memory_budget_bytes=128 << 10)
    assert remote == local


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_in_a_bucket_folds_to_the_bytes_of_the_local_fold(
    s3: S3Server, saved_by_deepspeed: Path, tmp_path: Path, stage: int
) -> None:
    """Every rank's partitions are read from s3:// as from disk."""
    local = saved_by_deepspeed / f"zero-{stage}"
    url = s3.upload(local, f"zero{stage}")
    here, there = fold_both(local, url, tmp_path)
    assert here == there


def test_listed_checkpoints_and_the_initial_teacher_may_be_remote(s3: S3Server, tmp_path: Path) -> None:
    """Checkpoints in a given order, one of them local, and a teacher in another bucket folder to start from."""
    students = save_students(tmp_path / "run", 3)
    save_file(make_student(9), tmp_path / "start.safetensors")
    url = s3.upload(tmp_path / "run", "listed")
    s3.put(f"s3://{BUCKET}/start/teacher.safetensors", (tmp_path / "start.safetensors").read_bytes())
    listed = [
        f"{url}/step_100.safetensors",
        str(tmp_path / "run" / "step_200.safetensors"),
        f"{url}/step_300.safetensors",
    ]
    out = tmp_path / "teacher.safetensors"
    init = f"s3://{BUCKET}/start/teacher.safetensors"
    report = ckpt_ema.fold(listed, out, momentum=0.3, init=init, announce=lambda plan: None)
    assert [item.name for item in report.plan.checkpoints] == [f"step_{n}00.safetensors" for n in (1, 2, 3)]
    assert_same_bits(load_file(out), hook_teacher([make_student(9), *students], 0.3, ["bn.running_mean"]))


def test_plan_inspect_and_reconstruct_take_urls(s3: S3Server, tmp_path: Path, cli: Cli) -> None:
    """Their output is that for the same files on disk, but for the place."""
    save_students(tmp_path / "run", 3)
    url = s3.upload(tmp_path / "run", "words")
    for words in (
        ("plan", "{}", "--momentum", "0.3", "-o", "t.safetensors"),
        ("inspect", "{}/step_200.safetensors", "--json"),
        ("reconstruct", "{}", "--momentum", "0.01", "-o", "t.safetensors", "--plan"),
    ):
        local, remote = (cli(*(word.format(place) for word in words)) for place in (tmp_path / "run", url))
        assert remote.code == local.code == 0, remote.stderr
        outputs = [local.stdout, remote.stdout.replace(url, str(tmp_path / "run"))]
        # A remote fold has more threads, which mostly wait.
        assert len({re.sub(r"memory .*", "", output) for output in outputs}) == 1
    done = cli("reconstruct", url, "--momentum", 0.01, "-o", "t.safetensors")
    assert done.code == 0, done.stderr
    assert len(load_file(tmp_path / "t.safetensors")) == len(make_student(1))


def test_a_checkpoint_that_was_added_is_seen_by_the_next_fold(s3: S3Server, tmp_path: Path) -> None:
    """Listings are kept for one call, not for the process."""
    save_students(tmp_path / "run", 2)
    url = s3.upload(tmp_path / "run", "growing")
    out = tmp_path / "teacher.safetensors"
    assert len(ckpt_ema.plan(url, out).checkpoints) == 2
    save_students(tmp_path / "run", 3)
    s3.upload(tmp_path / "run", "growing")
    assert len(ckpt_ema.plan(url, out).checkpoints) == 3


def test_urls_keep_their_parts() -> None:
    """A URL as a path: its text, its name, its parent and what lies below are those of the URL."""
    path = as_path("s3://bucket/run/step_100.pt/")
    assert str(path) == os.fspath(path) == "s3://bucket/run/step_100.pt"
    assert (path.name, path.suffix, str(path.parent)) == ("step_100.pt", ".pt", "s3://bucket/run")
    assert str(as_path("memory://run") / "a") == "memory://run/a"
    assert as_path("s3://bucket/a") == as_path("s3://bucket/a/") != as_path("s3://bucket/b")
    assert as_path("file:///tmp/run") == Path("/tmp/run")
    assert as_path("run:/a") == Path("run:/a")


def test_a_longer_page_takes_the_place_of_a_shorter_one() -> None:
    """What is read twice is asked for once, whatever was kept of it before."""
    pages = _Pages()
    pages.keep("s3://b/f", 0, b"0123")
    pages.keep("s3://b/f", 8, b"89")
    pages.keep("s3://b/f", 0, b"01234567")
    assert pages.find("s3://b/f", 0, 8) == b"01234567"
    assert pages.find("s3://b/f", 8, 10) == b"89"
    assert pages.find("s3://b/f", 6, 10) is None
    assert pages._kept_bytes == 10


# --- few requests -----------------------------------------------------------------------------------------------------


def many_small_tensors(seed: int) -> StateDict:
    """2000 tensors of some kilobytes, every fourth a buffer."""
    generator = torch.Generator().manual_seed(seed)
    kinds = ("weight", "bias", "scale", "running_mean")
    return {f"layers.{i}.{kind}": torch.randn(1000, generator=generator) for i in range(500) for kind in kinds}


@pytest.mark.parametrize(("suffix", "reads_of_table"), [(".safetensors", 2), (".pt", 14)])
def test_many_small_tensors_take_few_requests(s3: S3Server, tmp_path: Path, suffix: str, reads_of_table: int) -> None:
    """2000 tensors of 8 MB take one read, the newest's buffers another; a zip's table as many as it has megabytes."""
    run = tmp_path / "run"
    run.mkdir()
    for seed in (1, 2, 3):
        path = run / f"step_{seed}00{suffix}"
        save = save_file if suffix == ".safetensors" else torch.save
        save(many_small_tensors(seed), path)
    url = s3.upload(run, f"small{suffix}")
    quiet_fold(url, tmp_path / "remote.safetensors", momentum=0.3)
    assert len(s3.reads) <= 3 * reads_of_table + 3 + 1
    assert len(s3.requests) - len(s3.reads) <= 6
    quiet_fold(run, tmp_path / "local.safetensors", momentum=0.3)
    assert all_bytes(tmp_path / "local.safetensors") == all_bytes(tmp_path / "remote.safetensors")


def test_pieces_of_many_tensors_take_few_requests(s3: S3Server, tmp_path: Path) -> None:
    """200 tensors of which each of two ranks saved a half: a read of each rank's file, not one for each half."""
    names = [f"layers.{i}.weight" for i in range(200)]
    halves = [((0, 0), (8, 64)), ((8, 0), (8, 64))]
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        student = {name: torch.randn(16, 64, generator=generator) for name in names}
        write_dcp(tmp_path / "run" / f"step-{seed}", student, dict.fromkeys(names, halves), num_files=2)
    url = s3.upload(tmp_path / "run", "halves")
    ckpt_ema.plan(url, tmp_path / "teacher.safetensors")
    num_for_plan = len(s3.reads)
    s3.requests.clear()
    here, there = fold_both(tmp_path / "run", url, tmp_path)
    assert here == there
    assert num_for_plan <= 2 * (2 + 2 * 3)
    assert len(s3.reads) == num_for_plan + 2 * 2


def test_large_tensors_are_read_in_ranges_of_8_to_16_mib(s3: S3Server, tmp_path: Path) -> None:
    """Whatever the number of cores, a tensor of 40 MiB is read in a few large ranges, and every byte once."""
    run = tmp_path / "run"
    run.mkdir()
    for seed in (1, 2):
        save_file(
            {"weight": torch.full((10 << 20,), float(seed)), "n": torch.tensor(seed)}, run / f"step_{seed}.safetensors"
        )
    url = s3.upload(run, "large")
    for budget in (256 << 20, 1 << 30):
        s3.requests.clear()
        quiet_fold(url, tmp_path / "teacher.safetensors", momentum=0.5, overwrite=True, memory_budget_bytes=budget)
        sizes = [request.num_bytes for request in s3.reads if request.num_bytes > 1 << 20]
        assert sum(sizes) == 2 * (40 << 20)
        assert max(sizes) <= 16 << 20
        assert sorted(sizes)[2:] >= [8 << 20]
        assert bool((load_file(tmp_path / "teacher.safetensors")["weight"] == 1.5).all())


def test_a_table_is_read_without_a_stat_for_every_object(s3: S3Server, tmp_path: Path) -> None:
    """A plan lists each folder once: six checkpoints take no question for a single object but for the run itself."""
    for seed in range(1, 7):
        folder = tmp_path / "run" / f"checkpoint-{seed}"
        folder.mkdir(parents=True)
        save_file(make_student(seed), folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    url = s3.upload(tmp_path / "run", "listings")
    ckpt_ema.plan(url, tmp_path / "teacher")
    assert sum(request.method == "HEAD" for request in s3.requests) == 1
    listings = [request for request in s3.requests if request.method == "GET" and not request.is_read]
    assert len(listings) <= 1 + 1 + 6
    assert len(s3.reads) <= 6 * 2


# --- what goes wrong --------------------------------------------------------------------------------------------------


def refused(done: Outcome, code: int) -> str:
    """What the command said as it ended with `code`, without a traceback."""
    assert done.code == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Error: " in done.stderr
    return done.stderr


NOWHERE = ("s3://no-such-bucket/run", f"s3://{BUCKET}/no-such-run")


@pytest.mark.parametrize("place", NOWHERE)
def test_the_command_says_what_does_not_exist(s3: S3Server, cli: Cli, place: str) -> None:
    """A bucket or a key that is not there is misuse, like a path that is not."""
    assert f"`{place}` does not exist" in refused(cli("plan", place, "-o", "t.safetensors"), 2)


@pytest.mark.parametrize("place", NOWHERE)
@pytest.mark.parametrize("call", [ckpt_ema.plan, ckpt_ema.fold, ckpt_ema.plan_reconstruction, ckpt_ema.inspect])
def test_every_function_says_what_does_not_exist(s3: S3Server, place: str, call: Callable[..., object]) -> None:
    """The library's functions raise MisuseError with the URL."""
    options: dict[str, Any] = {} if call is ckpt_ema.inspect else {"output": "t.safetensors", "momentum": 0.1}
    with pytest.raises(MisuseError, match=f"`{place}` does not exist"):
        call(place, **options)


@pytest.mark.parametrize("place", NOWHERE)
def test_an_initial_teacher_that_does_not_exist_is_said(s3: S3Server, run: Path, tmp_path: Path, place: str) -> None:
    """`--init` may be a URL, and is looked for there."""
    with pytest.raises(MisuseError, match=f"`{place}` does not exist"):
        ckpt_ema.plan(run, tmp_path / "t.safetensors", momentum=0.1, init=place)


def test_a_remote_run_needs_a_local_output(s3: S3Server, tmp_path: Path, cli: Cli) -> None:
    """Without `-o`, or with a URL for it, the command says what to type, and that works."""
    save_students(tmp_path / "run", 2)
    url = s3.upload(tmp_path / "run", "output")
    said = refused(cli("fold", url, "--momentum", 0.3), 2)
    assert "`--output` is needed" in said
    assert "hint: pass `-o teacher.safetensors`" in said
    said = refused(cli("fold", url, "--momentum", 0.3, "-o", f"{url}/teacher.safetensors"), 2)
    assert "is a URL" in said
    assert "hint: pass `-o teacher.safetensors`" in said
    assert cli("fold", url, "--momentum", 0.3, "-o", "teacher.safetensors").code == 0


@pytest.mark.parametrize("write", [write_zip, write_pieces])
def test_verify_recomputes_from_a_bucket(s3: S3Server, tmp_path: Path, cli: Cli, write: Callable[..., object]) -> None:
    """A teacher is recomputed from the run behind its URL, and a checkpoint that became another one is found."""
    write_run(write, tmp_path / "run")
    url = s3.upload(tmp_path / "run", f"verified-{write.__name__}")
    report = quiet_fold(url, tmp_path / "t", momentum=0.3, output_format="dcp")
    outcome = cli("verify", report.output, url, "--share", 1)
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    assert "bit for bit" in outcome.stdout
    files = sorted(path for path in (tmp_path / "run").rglob("*") if path.suffix in (".safetensors", ".pt", ".distcp"))
    weights = [path for path in files if path.stem != "optimizer"]
    same = [path for path in weights if path.name == weights[0].name or path.parent == tmp_path / "run"]
    s3.put(f"{url}/{same[0].relative_to(tmp_path / 'run').as_posix()}", same[-1].read_bytes())
    assert cli("verify", report.output, url, "--share", 1).code == 1


@pytest.mark.parametrize(
    ("url", "says"),
    [("s3://", "names nothing"), ("s3:///.", "names nothing"), ("s3://runs/run?versionId=x", "a version of an object")],
)
def test_urls_that_name_no_run_are_misuse(url: str, says: str, cli: Cli) -> None:
    """Words that a store would understand in its own way."""
    assert says in refused(cli("plan", url, "-o", "t.safetensors"), 2)


def test_a_scheme_may_be_written_large(s3: S3Server, tmp_path: Path) -> None:
    """As RFC 3986 says of schemes; a path of it would not exist."""
    save_students(tmp_path / "run", 2)
    url = s3.upload(tmp_path / "run", "scheme")
    assert len(ckpt_ema.plan(url.replace("s3://", "S3://"), tmp_path / "t.safetensors", momentum=0.3).checkpoints) == 2


def test_a_server_that_is_not_there_is_said(s3: S3Server, cli: Cli) -> None:
    """Nothing listens at the endpoint: the error names the URL."""
    said = refused(cli("plan", f"s3://{BUCKET}/run", "-o", "t.safetensors", AWS_ENDPOINT_URL="http://127.0.0.1:9"), 1)
    assert f"s3://{BUCKET}/run" in said


def test_missing_credentials_are_said(s3: S3Server, cli: Cli, tmp_path: Path) -> None:
    """Where there are none, the error is the library's own words."""
    nothing = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}
    said = refused(cli("plan", f"s3://{BUCKET}/run", "-o", "t.safetensors", **nothing), 1)
    assert "credentials" in said.lower()


def test_a_failure_that_passes_is_tried_again(s3: S3Server, tmp_path: Path) -> None:
    """A server that is busy now and then delays the fold, and changes no bit."""
    students = save_students(tmp_path / "run", 3)
    url = s3.upload(tmp_path / "run", "busy")
    s3.failures.extend([503, 500, 503])
    quiet_fold(url, tmp_path / "teacher.safetensors", momentum=0.3)
    assert not s3.failures
    assert_same_bits(load_file(tmp_path / "teacher.safetensors"), hook_teacher(students, 0.3, ["bn.running_mean"]))


def test_a_failure_that_lasts_ends_the_fold(s3: S3Server, tmp_path: Path) -> None:
    """A forbidden read is no reason to leave the newest checkpoint out as unfinished."""
    save_students(tmp_path / "run", 3)
    url = s3.upload(tmp_path / "run", "forbidden")
    s3.failures.extend([403] * 100)
    with pytest.raises(CkptEmaError, match=r"cannot read `s3://runs/forbidden/step_100.safetensors`"):
        quiet_fold(url, tmp_path / "teacher.safetensors", momentum=0.3)
    assert not (tmp_path / "teacher.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [(lambda old: bytes(len(old)), "changed while it was being folded"), (lambda old: old[: len(old) // 2], "shorter")],
)
def test_an_object_that_changes_during_the_fold_ends_it(
    s3: S3Server, tmp_path: Path, content: Callable[[bytes], bytes], says: str
) -> None:
    """Replaced by as many other bytes, or by fewer, after the first block: no teacher, and the reason."""
    run = tmp_path / "run"
    run.mkdir()
    for seed in (1, 2):
        save_file({"weight": torch.full((100_000,), float(seed))}, run / f"step_{seed}.safetensors")
    url = s3.upload(run, f"changes-{says[:7]}")
    name = f"{url}/step_2.safetensors"

    def replace(done: int, total: int) -> None:
        s3.put(name, content((run / "step_2.safetensors").read_bytes()))

    with pytest.raises(CkptEmaError) as caught:
        quiet_fold(
            url, tmp_path / "t.safetensors", momentum=0.3, progress=replace, num_threads=1, memory_budget_bytes=1 << 20
        )
    assert name in caught.value.message
    assert says in caught.value.message
    assert not list(tmp_path.glob("*t.safetensors*"))


def test_an_object_that_changes_after_the_plan_is_noticed(s3: S3Server, tmp_path: Path) -> None:
    """Between the plan and the first tensor, too."""
    save_students(tmp_path / "run", 2)
    url = s3.upload(tmp_path / "run", "later")
    changed = (tmp_path / "run" / "step_100.safetensors").read_bytes()
    with pytest.raises(CkptEmaError, match=r"step_200.safetensors` changed"):
        ckpt_ema.fold(
            url,
            tmp_path / "t.safetensors",
            momentum=0.3,
            announce=lambda plan: s3.put(f"{url}/step_200.safetensors", changed),
        )


def test_a_truncated_newest_checkpoint_is_left_out_aloud(s3: S3Server, tmp_path: Path) -> None:
    """As on disk: an upload that was cut off is unfinished."""
    save_students(tmp_path / "run", 3)
    newest = tmp_path / "run" / "step_300.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    url = s3.upload(tmp_path / "run", "cut-off")
    planned = ckpt_ema.plan(url, tmp_path / "t.safetensors")
    assert [item.step for item in planned.checkpoints] == [100, 200]
    assert any("step_300" in text and "truncated" in text for text in planned.warnings)


def run_without(module: str, *words: str) -> Outcome:
    """The command in a process where `module` cannot be imported."""
    code = f"import sys; sys.modules[{module!r}] = None; from ckpt_ema.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("module", ["fsspec", "s3fs"])
def test_a_missing_package_is_named(s3: S3Server, module: str) -> None:
    """Without fsspec or s3fs the error says what to install."""
    said = refused(run_without(module, "plan", f"s3://{BUCKET}/run", "-o", "t.safetensors"), 1)
    assert module in said
    assert "hint: pip install 'ckpt-ema[remote]'" in said


def test_an_unknown_scheme_is_misuse() -> None:
    """A kind of URL that fsspec does not know is named."""
    with pytest.raises(MisuseError, match="fsspec knows no `carrier-pigeon://`"):
        ckpt_ema.plan("carrier-pigeon://loft/run", "t.safetensors")


def test_local_folds_never_import_fsspec(run: Path) -> None:
    """What needs no network does not wait for its libraries."""
    assert run_without("fsspec", "plan", str(run)).code == 0


def test_nothing_of_a_remote_run_is_left_on_disk(s3: S3Server, tmp_path: Path) -> None:
    """A fold leaves the teacher, and no copy of a checkpoint, here or in a temporary folder."""
    save_students(tmp_path / "run", 2)
    url = s3.upload(tmp_path / "run", "traces")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "scratch").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_ema", "fold", url, "--momentum", "0.3", "-o", "t.safetensors"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path / "scratch"), "HOME": str(tmp_path / "scratch")},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["scratch", "t.safetensors"]
