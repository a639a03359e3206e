"""A teacher in host memory: the bits of one beside the student, whatever the device does when."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from ckpt_ema import MeanTeacher, MisuseError
from ckpt_ema.online import offload
from tests.conftest import assert_same_bits
from tests.device_model import modelled

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch finds none here")


class Student(nn.Module):
    """Two parameters, one of them tied, and a buffer that every forward changes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(40, 30, generator=generator).to(dtype))
        self.bias = nn.Parameter(torch.randn(17, generator=generator).to(dtype).t())
        self.tied = self.weight
        self.register_buffer("mean", torch.zeros(30, dtype=dtype))


Place = Callable[[], contextlib.AbstractContextManager[Any]]


def follow(
    student: Student, options: dict[str, Any], steps: int, place: Place = contextlib.nullcontext
) -> Iterator[MeanTeacher]:
    """Train a student, with its teacher, whose every number is known: forward and backward are a few additions.

    Handed out is the teacher behind each update. `place` is where training happens.
    """
    teacher = MeanTeacher(student, momentum=0.1, **options)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for step in range(steps):
        with place():
            with torch.no_grad():
                student.mean.mul_(0.5).add_(step)
            for number, parameter in enumerate(student.parameters()):
                assert parameter.grad is not None
                parameter.grad.fill_(0.01 * step + number)
            optimizer.step()
            teacher.update()
        yield teacher


def clones(teacher: MeanTeacher) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in teacher.tensors().items()}


def last(teachers: Iterator[MeanTeacher]) -> MeanTeacher:
    """The teacher after the last step."""
    *_, teacher = teachers
    return teacher


def teacher_on_a_model(dtype: torch.dtype, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The teacher in host memory after eight steps, all of the training queued on the model's stream."""
    training = torch.cuda.current_stream()
    return clones(last(follow(Student(dtype), {**options, "device": "cpu"}, 8, lambda: torch.cuda.stream(training))))


@pytest.fixture
def _all_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the CPU is the model's."""
    monkeypatch.setattr(offload, "is_on_gpu", lambda tensor: True)


OPTIONS: list[dict[str, Any]] = [{}, {"interval": 3}, {"arithmetic": "lerp"}, {"skip_buffers": False}]


@pytest.mark.usefixtures("_all_on_gpu")
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_on_a_model_of_a_gpu_it_has_the_bits_of_a_teacher_beside_the_student(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dtype: torch.dtype, seed: int
) -> None:
    """Whenever the device does what is queued: training neither waits for the copy nor runs into it."""
    expected = clones(last(follow(Student(dtype), options, 8)))
    with modelled(monkeypatch, seed):
        assert_same_bits(teacher_on_a_model(dtype, options), expected)


@pytest.mark.usefixtures("_all_on_gpu")
@pytest.mark.parametrize("forgets", ["wait_stream", "wait_event", "synchronize"])
def test_the_model_shows_what_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, forgets: str) -> None:
    """Without any one of the three ways of waiting, some of a few trainings have another teacher."""
    expected = clones(last(follow(Student(torch.float32), {}, 8)))

    def is_right(seed: int) -> bool:
        with modelled(monkeypatch, seed, forgets=forgets):
            found = teacher_on_a_model(torch.float32, {})
        return all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    assert not all(is_right(seed) for seed in range(8))


def test_beside_a_student_on_the_cpu_it_is_any_other_teacher() -> None:
    """One configuration serves a laptop and a cluster."""
    beside, in_host_memory = (follow(Student(torch.bfloat16), options, 5) for options in ({}, {"device": "cpu"}))
    for one, other in zip(beside, in_host_memory, strict=True):
        assert_same_bits(clones(one), clones(other))


@pytest.mark.usefixtures("_all_on_gpu")
def test_what_goes_wrong_in_the_thread_is_told_by_whoever_looks_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not lost with the thread."""
    with modelled(monkeypatch, 0):
        teacher = MeanTeacher(Student(torch.float32), momentum=0.1, device="cpu")
        teacher.update()
        teacher.wait()

        def fail(*_: Any) -> None:
            raise MemoryError("no room")

        monkeypatch.setattr(teacher._rule, "average_all_", fail)
        teacher.update()
        with pytest.raises(MemoryError, match="no room"):
            teacher.tensors()
        assert teacher.tensors().keys() == {"weight", "bias", "tied"}


def test_optimizers_are_held_back_no_longer_than_there_is_a_teacher() -> None:
    """A notebook that makes a teacher per run does not collect hooks."""
    gc.collect()  # of other tests
    before = len(_global_optimizer_pre_hooks)
    teacher = MeanTeacher(Student(torch.float32), device="cpu")
    assert len(_global_optimizer_pre_hooks) == before + 1
    del teacher
    gc.collect()
    assert len(_global_optimizer_pre_hooks) == before


def test_a_teacher_module_stays_where_it_is() -> None:
    """`device` with one is misuse, and so is a device that is none."""
    with pytest.raises(MisuseError, match="a teacher module stays where it is"):
        MeanTeacher(Student(torch.float32), Student(torch.float32), device="cpu")
    with pytest.raises(MisuseError, match="device is 'cuda'"):
        MeanTeacher(Student(torch.float32), device="cuda")  # type: ignore[arg-type]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_beside_a_student_on_a_gpu_it_has_the_bits_of_a_teacher_on_the_cpu(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Its numbers stay in host memory, through swaps, states and statistics of stalling."""
    expected = clones(last(follow(Student(dtype), options, 12)))
    student = Student(dtype).cuda()
    teacher = last(follow(student, {**options, "device": "cpu"}, 12))
    assert all(tensor.device.type == "cpu" for tensor in teacher.tensors().values())
    assert_same_bits(clones(teacher), expected)
    before = student.weight.clone()
    with teacher.swapped_into(student):
        assert torch.equal(student.weight.cpu(), expected["weight"].to(dtype))
    assert torch.equal(student.weight, before)
    assert teacher.stalled_fraction() == 0.0
    other = MeanTeacher(student, momentum=0.1, **options, device="cpu")
    other.load_state_dict(teacher.state_dict())
    assert_same_bits(clones(other), expected)


@needs_gpu
def test_training_goes_on_while_a_large_student_is_copied_out() -> None:
    """Steps that follow at once, on a student whose copy takes longer than they do, change nothing of the teacher."""
    teachers = []
    for options in ({}, {"device": "cpu"}):
        torch.manual_seed(0)
        student = nn.Linear(8192, 8192, device="cuda")
        teacher = MeanTeacher(student, momentum=0.1, **options)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for step in range(6):
            for parameter in student.parameters():
                parameter.grad = torch.full_like(parameter, float(step))
            optimizer.step()
            teacher.update()
        teachers.append({name: tensor.cpu() for name, tensor in clones(teacher).items()})
    assert_same_bits(*teachers)
