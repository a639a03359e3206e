"""What the tests share: real runs on disk, the command as a real process, and the hook's rule written once more."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

import ckpt_ema
from tests.warm_python import WarmPython

settings.register_profile("suite", max_examples=40, deadline=None)
settings.load_profile("suite")

StateDict = dict[str, torch.Tensor]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where there is none; `pytest -m gpu` runs them alone."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch finds none here"))


def make_student(seed: int) -> StateDict:
    """A small student with a Linear, a BatchNorm and its buffers; other values for every seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "fc.weight": torch.randn(37, 19, generator=generator),
        "fc.bias": torch.randn(37, generator=generator),
        "bn.weight": torch.randn(5, generator=generator),
        "bn.running_mean": torch.randn(5, generator=generator),
        "bn.num_batches_tracked": torch.tensor(seed * 10),
    }


def hook_teacher(students: Iterable[StateDict], momentum: float, buffers: Iterable[str] = ()) -> StateDict:
    """The teacher by MeanTeacherHook's own lines; `buffers` and integers come from the newest student."""
    students = list(students)
    teacher = {name: tensor.clone() for name, tensor in students[0].items()}
    for student in students[1:]:
        for name, tensor in student.items():
            if name in buffers or not (tensor.is_floating_point() or tensor.is_complex()):
                teacher[name] = tensor.clone()
            else:
                teacher[name].mul_(1 - momentum).add_(tensor, alpha=momentum)
    return teacher


def assert_same_bits(actual: StateDict, expected: StateDict) -> None:
    """Same names, dtypes, shapes and bytes."""
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert raw_bytes(actual[name]) == raw_bytes(tensor), name


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The elements in row-major order, as they lie in a file."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    if not tensor.numel():
        return b""
    flat.copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def save_students(folder: Path, count: int, *, suffix: str = ".safetensors") -> list[StateDict]:
    """`step_100 ... step_<count>00` of `make_student(1 ... count)` in `folder`; returns the students."""
    folder.mkdir(parents=True, exist_ok=True)
    students = [make_student(seed) for seed in range(1, count + 1)]
    for index, student in enumerate(students, start=1):
        path = folder / f"step_{index * 100}{suffix}"
        if suffix == ".safetensors":
            save_file(student, path)
        else:
            torch.save({"state_dict": student, "global_step": index * 100}, path)
    return students


def quiet_fold(run: Path | list[Path], output: Path | None, **options: Any) -> ckpt_ema.FoldReport:
    """A fold whose warning about the first share is not the point."""
    return ckpt_ema.fold(run, output, announce=lambda plan: None, **options)


@dataclass(frozen=True)
class Outcome:
    """What one call of the command left behind."""

    code: int
    stdout: str
    stderr: str


def bound_by_modes() -> list[str]:
    """What a command line begins with so that the modes of files bind root as well."""
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """A Python that has imported torch already: three quarters of what a call of the command takes."""
    python = WarmPython()
    yield python
    python.close()


@pytest.fixture
def cli(tmp_path: Path, warm_python: WarmPython) -> Callable[..., Outcome]:
    """`ckpt-ema` as a process of its own, started in the test's folder.

    torch is imported in it before, but where a test sets variables: what depends on imports starts a Python itself.
    """

    def call(*arguments: object, **environment: str) -> Outcome:
        words = list(map(str, arguments))
        if not environment and warm_python.finds_same_environment():
            return Outcome(*warm_python.call(tmp_path, words))
        done = subprocess.run(
            [sys.executable, "-m", "ckpt_ema", *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **environment},
            timeout=120,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with five safetensors checkpoints; its students are `make_student(1 ... 5)`."""
    folder = tmp_path / "run"
    save_students(folder, 5)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def lightning_trainer(root: Path, callbacks: list[Any], **settings: Any) -> Any:
    """A real Trainer of Lightning's on the CPU, which says nothing and writes nothing that its callbacks do not."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(default_root_dir=root, accelerator="cpu", callbacks=callbacks, **{**quiet, **settings})


def fit_lightning(
    module: Any, loader: Any, root: Path, callbacks: list[Any], *, steps: int, path: Path | None = None, **settings: Any
) -> None:
    """Train in a real Trainer, with a validation batch after every two steps."""
    validation = {"val_check_interval": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = lightning_trainer(root, callbacks, max_steps=steps, **validation, **settings)
    trainer.fit(module, loader, loader, ckpt_path=path)


def start_ranks(worker: str, count: int, folder: Path) -> None:
    """Run a worker of this folder on `count` ranks; it must end well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(worker)), str(folder)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def saved_once(factory: pytest.TempPathFactory, name: str, worker: str, count: int) -> Path:
    """What `worker` saves on `count` ranks: once for all processes of a test run, the first of which starts it."""
    base = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir()
            start_ranks(worker, count, folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def saved_by_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `deepspeed_ranks.py` saves on two ranks."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    return saved_once(tmp_path_factory, "deepspeed", "deepspeed_ranks.py", 2)


def save_hollow(path: Path, tensors: Mapping[str, tuple[str, int]]) -> None:
    """A safetensors file of flat tensors, each of a dtype (`F32`) and a number of elements, that takes no room."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, count) in tensors.items():
        begin, end = end, end + count * int(dtype[1:]) // 8
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [begin, end]}
    table = json.dumps(header).encode()
    path.write_bytes(len(table).to_bytes(8, "little") + table)
    os.truncate(path, 8 + len(table) + end)
