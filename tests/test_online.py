"""The online teacher: the hook's bits, the fold's bits, and what training does to a student while it is followed."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import random
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ckpt_ema
from ckpt_ema import CkptEmaError, MeanTeacher, MisuseError, Snapshots
from ckpt_ema.engine import arithmetic
from ckpt_ema.online import rule
from tests.conftest import Outcome, assert_same_bits, quiet_fold, start_ranks
from tests.test_snapshots import metadata

MOMENTUM = 0.1


class Student(nn.Module):
    """Everything that a model may hold: norm layers, tied and frozen weights, scalars, empty and transposed tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(7, 7)
        self.decoder = nn.Linear(7, 7, bias=False)
        self.decoder.weight = self.encoder.weight
        self.norm = nn.BatchNorm1d(7)
        self.frozen = nn.Parameter(torch.randn(13), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.transposed = nn.Parameter(torch.randn(5, 3).t())
        self.register_buffer("volatile", torch.zeros(2), persistent=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Everything that learns takes part."""
        hidden = self.norm(self.decoder(self.encoder(batch).relu())) * self.scale
        return hidden.sum(dim=1) + self.transposed.sum()


@pytest.fixture
def student() -> Student:
    """A student of its own for each test, the same each time."""
    torch.manual_seed(0)
    return Student()


def train(student: nn.Module, steps: int, *, seed: int = 0, optimizer: Any = None) -> Iterator[int]:
    """Train; hand out each step's number behind its `optimizer.step()`."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = optimizer or torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.01)
    for step in range(1, steps + 1):
        batch = torch.randn(8, 7, generator=generator).to(next(student.parameters()).dtype)
        loss = (student(batch) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step


def clones(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict as it is now."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def hooks_teacher(students: list[dict[str, torch.Tensor]], names: set[str]) -> dict[str, torch.Tensor]:
    """`names` of the students by MeanTeacherHook's own lines, the first copied."""
    teacher = {name: students[0][name].clone() for name in names}
    for student in students[1:]:
        for name, tensor in teacher.items():
            tensor.mul_(1 - MOMENTUM).add_(student[name], alpha=MOMENTUM)
    return teacher


def parameter_names(module: nn.Module) -> set[str]:
    """All of them, tied ones under each of their names."""
    return {name for name, _ in module.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("skip_buffers", [True, False])
def test_the_teacher_is_the_hooks_bit_for_bit(student: Student, skip_buffers: bool) -> None:
    """Parameters alone, or every floating-point entry of the state dict; a tied weight moves once."""
    teacher = MeanTeacher(student, momentum=MOMENTUM, skip_buffers=skip_buffers)
    students = []
    for _ in train(student, 6):
        teacher.update()
        students.append(clones(student))
    names = parameter_names(student) | (set() if skip_buffers else {"norm.running_mean", "norm.running_var"})
    assert_same_bits(teacher.tensors(), hooks_teacher(students, names))
    assert teacher.num_updates == 6
    copied = {"norm.num_batches_tracked": "int64"}
    if skip_buffers:
        copied |= dict.fromkeys(["norm.running_mean", "norm.running_var"], "buffer")
        copied["norm.num_batches_tracked"] = "int64"
    assert teacher.skipped == copied


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("skip_buffers", [True, False])
@pytest.mark.parametrize("interval", [1, 3])
def test_the_teacher_is_the_fold_of_checkpoints_saved_at_every_update(
    student: Student, tmp_path: Path, interval: int, skip_buffers: bool, suffix: str
) -> None:
    """One rule and one buffer policy: the two files hold the same tensors, bit for bit."""
    run = tmp_path / "run"
    run.mkdir()
    teacher = MeanTeacher(student, momentum=MOMENTUM, interval=interval, skip_buffers=skip_buffers)
    for step in train(student, 9):
        if teacher.update():
            state = {name: tensor.clone().contiguous() for name, tensor in student.state_dict().items()}
            path = run / f"step_{step}{suffix}"
            save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert teacher.num_updates == len(list(run.iterdir())) == 9 // interval
    online = load_file(teacher.save(tmp_path / "online.safetensors"))
    report = quiet_fold(run, tmp_path / "folded.safetensors", momentum=MOMENTUM, skip_buffers=skip_buffers)
    assert_same_bits(online, load_file(report.output))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_student_has_a_float32_teacher_as_the_fold_does(
    student: Student, tmp_path: Path, dtype: torch.dtype
) -> None:
    """In 16 bits most updates would be lost; the shadow is float32, also what the fold writes with that dtype."""
    student = student.to(dtype)
    (tmp_path / "run").mkdir()
    teacher = MeanTeacher(student, momentum=MOMENTUM)
    for step in train(student, 5):
        teacher.update()
        save_file(clones(student) | {"decoder.weight": student.decoder.weight.detach().clone(),
                                     "transposed": student.transposed.detach().contiguous()},
                  tmp_path / f"run/step_{step}.safetensors")  # fmt: skip
    for written, name in (("float32", "wide"), ("student", "narrow")):
        online = load_file(teacher.save(tmp_path / f"{name}-online.safetensors", dtype=written))
        report = quiet_fold(tmp_path / "run", tmp_path / f"{name}.safetensors", momentum=MOMENTUM, dtype=written)
        folded = load_file(report.output)
        names = parameter_names(student)
        assert_same_bits({k: online[k] for k in names}, {k: folded[k] for k in names})


def test_a_literal_16_bit_teacher_is_the_hooks_and_stalls(student: Student) -> None:
    """`dtype="student"` is what the hook does to a bfloat16 student; stalled_fraction tells what becomes of it."""
    student = student.to(torch.bfloat16)
    literal = MeanTeacher(student, momentum=0.001, dtype="student")
    wide = MeanTeacher(student, momentum=0.001)
    expected = {name: tensor.clone() for name, tensor in literal.tensors().items()}
    for step in train(student, 3):
        literal.update()
        wide.update()
        for name, tensor in expected.items():
            if step == 1:
                tensor.copy_(student.state_dict()[name])
            else:
                tensor.mul_(1 - 0.001).add_(student.state_dict()[name], alpha=0.001)
    assert_same_bits(literal.tensors(), expected)
    assert literal.stalled_fraction() > 0.9
    assert wide.stalled_fraction() < 0.1


def test_large_tensors_go_block_by_block_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a student is converted on the way, the borders of the blocks do not show."""
    monkeypatch.setattr("ckpt_ema.online.rule.BLOCK_ELEMENTS", 64)
    student = nn.Linear(31, 33).to(torch.bfloat16)
    teacher = MeanTeacher(student, momentum=MOMENTUM)
    teacher.update()
    expected = student.weight.detach().float()
    with torch.no_grad():
        student.weight.normal_()
    teacher.update()
    expected.mul_(1 - MOMENTUM).add_(student.weight.detach().float(), alpha=MOMENTUM)
    assert_same_bits({"w": teacher.tensors()["weight"]}, {"w": expected})


def test_lerp_has_the_bits_of_torchs_own(student: Student) -> None:
    """The arithmetic that is one rounding closer to the exact average."""
    teacher = MeanTeacher(student, momentum=MOMENTUM, arithmetic="lerp")
    expected: dict[str, torch.Tensor] = {}
    for step in train(student, 4):
        teacher.update()
        for name in parameter_names(student):
            tensor = student.state_dict()[name]
            expected[name] = tensor.clone() if step == 1 else expected[name].lerp_(tensor, MOMENTUM)
    assert_same_bits(teacher.tensors(), expected)


# --- a pair of modules ------------------------------------------------------------------------------------------------


def test_a_teacher_module_is_updated_in_place_by_name(student: Student) -> None:
    """As in mean-teacher training: its parameters move, tied ones once, and its buffers are never touched."""
    module = Student()
    buffers = {name: tensor.clone() for name, tensor in module.named_buffers()}
    teacher = MeanTeacher(student, module, momentum=MOMENTUM)
    students = []
    for _ in train(student, 4):
        teacher.update()
        students.append(clones(student))
    names = parameter_names(student)
    assert_same_bits({name: module.state_dict()[name] for name in names}, hooks_teacher(students, names))
    assert_same_bits(dict(module.named_buffers()), buffers)
    assert "tensors" not in teacher.state_dict()


def test_a_loaded_teacher_can_be_kept(student: Student) -> None:
    """`keep_teacher` averages from the first update on, as the fold does with `--init`."""
    module = Student()
    expected = module.frozen.detach().clone()
    MeanTeacher(student, module, momentum=MOMENTUM, keep_teacher=True).update()
    expected.mul_(1 - MOMENTUM).add_(student.frozen.detach(), alpha=MOMENTUM)
    assert_same_bits({"frozen": module.frozen.detach()}, {"frozen": expected})


class Reordered(Student):
    """The same tensors, but defined in another order."""

    def __init__(self) -> None:
        super().__init__()
        self._modules = dict(reversed(self._modules.items()))
        self._parameters = dict(reversed(self._parameters.items()))


def test_pairs_are_made_by_name_and_not_by_position(student: Student) -> None:
    """The hook zips two lists of parameters, and mixes up models that define them in another order."""
    module = Reordered()
    MeanTeacher(student, module).update()
    for name in parameter_names(student):
        assert torch.equal(module.state_dict()[name], student.state_dict()[name]), name


def test_modules_that_do_not_fit_are_refused_with_every_difference(student: Student) -> None:
    """Missing on either side, another shape, and ties that only the teacher has."""
    other = Student()
    del other.scale
    other.extra = nn.Parameter(torch.zeros(2))
    other.frozen = nn.Parameter(torch.zeros(12))
    with pytest.raises(CkptEmaError) as caught:
        MeanTeacher(student, other)
    text = str(caught.value)
    for part in (
        "differ in 3 tensors",
        "scale: missing in the teacher",
        "extra: missing in the student",
        "frozen: shape [13] in the student, [12] in the teacher",
    ):
        assert part in text
    untied = Student()
    untied.decoder.weight = nn.Parameter(torch.zeros(7, 7))
    with pytest.raises(CkptEmaError, match=r"encoder\.weight and decoder\.weight: tied in the teacher"):
        MeanTeacher(untied, student)


def test_a_16_bit_teacher_module_is_warned_of_and_has_the_hooks_bits(student: Student) -> None:
    """Small updates are lost there; what is computed is what the hook's own lines compute."""
    module = Student().to(torch.bfloat16)
    expected = module.frozen.detach().clone()
    with pytest.warns(UserWarning, match="bfloat16, in which small updates are lost"):
        teacher = MeanTeacher(student, module, momentum=MOMENTUM, keep_teacher=True)
    teacher.update()
    expected.mul_(1 - MOMENTUM).add_(student.frozen.detach(), alpha=MOMENTUM)
    assert_same_bits({"frozen": module.frozen.detach()}, {"frozen": expected})


# --- wrappers ---------------------------------------------------------------------------------------------------------


def wrap_compiled(student: nn.Module) -> nn.Module:
    """`torch.compile(model)`, which puts `_orig_mod.` before every name."""
    return torch.compile(student, backend="eager")


def compile_in_place(student: nn.Module) -> nn.Module:
    """`model.compile()`, which keeps the names."""
    student.compile(backend="eager")
    return student


def compile_a_part(student: nn.Module) -> nn.Module:
    """One submodule compiled: the prefix is in the middle of its names."""
    student.norm = torch.compile(student.norm, backend="eager")
    return student


def wrap_data_parallel(student: nn.Module) -> nn.Module:
    """What puts `module.` before every name."""
    return nn.DataParallel(student)


@pytest.mark.parametrize("wrap", [wrap_compiled, compile_in_place, compile_a_part, wrap_data_parallel])
def test_wrappers_do_not_show_in_the_names(student: Student, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """The shadow of a wrapped student is that of the bare one, trains on and can be swapped in."""
    bare = copy.deepcopy(student)
    reference, teacher = MeanTeacher(bare, momentum=MOMENTUM), None
    wrapped = wrap(student)
    teacher = MeanTeacher(wrapped, momentum=MOMENTUM)
    for _ in zip(train(wrapped, 3), train(bare, 3), strict=True):
        teacher.update()
        reference.update()
    assert_same_bits(teacher.tensors(), reference.tensors())
    with teacher.swapped_into(wrapped):
        assert torch.equal(student.encoder.weight, reference.tensors()["encoder.weight"])


def test_only_a_wrappers_own_name_is_taken_off(student: Student) -> None:
    """A module whose name merely ends like a wrapper's keeps it."""
    student.my_orig_mod = nn.Linear(1, 1)
    assert {"my_orig_mod.weight", "my_orig_mod.bias"} <= MeanTeacher(student).tensors().keys()


# --- what training does to a student ----------------------------------------------------------------------------------


def test_a_replaced_parameter_is_followed_and_a_frozen_one_too(student: Student) -> None:
    """What counts is what the module holds now, and freezing does not end the averaging."""
    teacher = MeanTeacher(student, momentum=0.5)
    teacher.update()
    student.scale = nn.Parameter(torch.tensor(3.5))
    student.encoder.weight.requires_grad_(False).fill_(2.0)
    before = teacher.tensors()["encoder.weight"].clone()
    teacher.update()
    assert teacher.tensors()["scale"] == 0.5 * 1.5 + 0.5 * 3.5
    assert torch.equal(teacher.tensors()["encoder.weight"], before * 0.5 + 1.0)


def test_a_student_that_gained_lost_or_reshaped_parameters_is_refused(student: Student) -> None:
    """A teacher that silently stops following a part is the worst of outcomes; replaced modules count as well."""
    teacher = MeanTeacher(student)
    student.head = nn.Linear(2, 2)
    with pytest.raises(CkptEmaError, match="`head` came, went or was replaced"):
        teacher.update()
    del student.head
    teacher.update()
    kept = student.frozen
    del student.frozen
    with pytest.raises(CkptEmaError, match=r"`frozen` came, went"):
        teacher.update()
    student.frozen = kept
    encoder, student.encoder = student.encoder, nn.Linear(7, 7)
    with pytest.raises(CkptEmaError, match=r"`encoder` came, went or was replaced"):
        teacher.update()
    student.encoder = encoder
    student.scale = nn.Parameter(torch.zeros(2))
    with pytest.raises(CkptEmaError, match=r"`scale` has shape \[2\], the teacher's \[\]"):
        teacher.update()
    assert teacher.num_steps == 1


def test_a_teacher_module_that_gained_or_lost_parameters_is_refused(student: Student) -> None:
    """A part of it that nothing moves any more would stay what it was."""
    module = Student()
    teacher = MeanTeacher(student, module)
    encoder, module.encoder = module.encoder, nn.Linear(7, 7)
    for call in (teacher.update, teacher.copy_student, teacher.tensors, teacher.state_dict):
        with pytest.raises(CkptEmaError, match=r"the teacher has changed: `encoder` came, went or was replaced"):
            call()
    module.encoder = encoder
    module.late = nn.Parameter(torch.zeros(2))
    with pytest.raises(CkptEmaError, match="the teacher has changed: `late` came, went"):
        teacher.update()
    del module.late
    teacher.update()
    assert teacher.num_steps == 1
    module.frozen = module.scale
    with pytest.raises(CkptEmaError, match=r"`frozen` and `scale` of the teacher are tied now|`scale` and `frozen` of"):
        teacher.update()
    assert teacher.num_steps == 1


def test_a_buffer_that_appears_is_refused_where_buffers_are_averaged(student: Student) -> None:
    """Also one that was registered as None."""
    student.register_buffer("late", None)
    careless, careful = MeanTeacher(student), MeanTeacher(student, skip_buffers=False)
    student.late = torch.zeros(2)
    careless.update()
    with pytest.raises(CkptEmaError, match="`late` came"):
        careful.update()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_student_that_is_not_finite_does_not_reach_the_teacher(
    student: Student, tmp_path: Path, value: float
) -> None:
    """Raised naming the tensor, or skipped and counted; a teacher that was not told to look cannot be saved."""
    careful, lenient = MeanTeacher(student, on_nonfinite="raise"), MeanTeacher(student, on_nonfinite="skip")
    blind = MeanTeacher(student)
    for teacher in (careful, lenient, blind):
        teacher.update()
    before = {name: tensor.clone() for name, tensor in careful.tensors().items()}
    with torch.no_grad():
        student.encoder.bias[3] = value
    with pytest.raises(CkptEmaError, match=r"`encoder.bias` holds a NaN or an infinity in the student at step 2"):
        careful.update()
    assert not lenient.update()
    assert (lenient.num_updates, lenient.num_skipped) == (1, 1)
    assert_same_bits(careful.tensors(), before)
    assert_same_bits(lenient.tensors(), before)
    blind.save(tmp_path / "teacher.safetensors")
    last_good = (tmp_path / "teacher.safetensors").read_bytes()
    blind.update()
    with pytest.raises(CkptEmaError, match=r"`encoder.bias` holds a NaN or an infinity in the teacher"):
        blind.save(tmp_path / "teacher.safetensors")
    assert (tmp_path / "teacher.safetensors").read_bytes() == last_good


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float16, 6e4), (torch.float64, 1e308)]
)
def test_numbers_whose_sum_overflows_are_finite(dtype: torch.dtype, value: float) -> None:
    """The quick look at a tensor is its sum; finite terms may overflow it."""
    student = nn.Linear(4, 4).to(dtype)
    with torch.no_grad():
        student.weight.fill_(value)
    teacher = MeanTeacher(student, on_nonfinite="raise")
    assert teacher.update()
    with torch.no_grad():
        student.weight[2, 1] = float("nan")
    with pytest.raises(CkptEmaError, match="`weight` holds a NaN"):
        teacher.update()


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [32767, 32768, 65536 + 32768 + 77, 10 * 32768 + 13])
def test_any_number_of_threads_has_the_hooks_bits(count: int, num_threads: int) -> None:
    """Large tensors are updated in one pass, in pieces that come out even on every thread."""
    student = nn.Module()
    student.weight = nn.Parameter(torch.randn(count))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        teacher = MeanTeacher(student, momentum=MOMENTUM)
        teacher.update()
        expected = student.weight.detach().clone()
        with torch.no_grad():
            student.weight.normal_()
        teacher.update()
    finally:
        torch.set_num_threads(before)
    expected.mul_(1 - MOMENTUM).add_(student.weight.detach(), alpha=MOMENTUM)
    assert_same_bits(teacher.tensors(), {"weight": expected})


@pytest.mark.parametrize("arithmetic", ["hook", "lerp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_small_tensors_have_the_bits_of_torchs_calls(dtype: torch.dtype, arithmetic: Any) -> None:
    """They are updated many at a time, those that are widened for it a buffer's worth at a time."""
    student = nn.ParameterList(torch.randn(20_000 + 501 * index).to(dtype) for index in range(50))
    assert sum(parameter.numel() for parameter in student) > rule.BLOCK_ELEMENTS
    teacher = MeanTeacher(student, momentum=MOMENTUM, arithmetic=arithmetic)
    teacher.update()
    expected = {name: tensor.clone() for name, tensor in teacher.tensors().items()}
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.normal_()
            if arithmetic == "lerp":
                expected[name].lerp_(parameter.float(), MOMENTUM)
            else:
                expected[name].mul_(1 - MOMENTUM).add_(parameter, alpha=MOMENTUM)
    teacher.update()
    assert_same_bits(teacher.tensors(), expected)


def test_attached_to_an_optimizer_it_updates_by_itself(student: Student) -> None:
    """After every step, until it is removed."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    teacher, reference = MeanTeacher(student, momentum=MOMENTUM), MeanTeacher(student, momentum=MOMENTUM)
    handle = teacher.attach(optimizer)
    for _ in train(student, 3, optimizer=optimizer):
        reference.update()
    assert_same_bits(teacher.tensors(), reference.tensors())
    handle.remove()
    list(train(student, 1, optimizer=optimizer))
    assert teacher.num_steps == 3
    with pytest.raises(MisuseError, match="a Linear calls nothing after its steps"):
        teacher.attach(nn.Linear(1, 1))  # type: ignore[arg-type]


# --- swapping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_in_it_evaluates_as_the_teacher_and_then_all_is_as_before(student: Student, dtype: torch.dtype) -> None:
    """Student and teacher come back bit for bit, also when the block raises."""
    student = student.to(dtype)
    teacher = MeanTeacher(student, momentum=MOMENTUM)
    for _ in train(student, 3):
        teacher.update()
    mine, theirs = clones(student), {name: tensor.clone() for name, tensor in teacher.tensors().items()}
    with teacher.swapped_into() as module:
        assert module is student
        for name, tensor in theirs.items():
            assert torch.equal(student.state_dict()[name], tensor.to(dtype)), name
    with pytest.raises(ZeroDivisionError), teacher.swapped_into(student):
        raise ZeroDivisionError
    assert_same_bits(clones(student), mine)
    assert_same_bits(teacher.tensors(), theirs)
    other = Student().to(dtype)
    with teacher.swapped_into(other):
        assert torch.equal(other.frozen, theirs["frozen"].to(dtype))


def test_while_swapped_it_can_be_neither_changed_nor_saved(student: Student, tmp_path: Path) -> None:
    """What would be saved, or copied, is the student under the teacher's name."""
    teacher = MeanTeacher(student)
    state = teacher.state_dict()
    with teacher.swapped_into(student):
        for call in (
            teacher.update,
            teacher.copy_student,
            teacher.state_dict,
            teacher.tensors,
            teacher.stalled_fraction,
            teacher.check_finite,
            lambda: copy.deepcopy(teacher),
            lambda: pickle.dumps(teacher),
            lambda: teacher.load_state_dict(state),
            lambda: teacher.save(tmp_path / "teacher.safetensors"),
            lambda: teacher.save_snapshot(tmp_path, 1),
            lambda: teacher.swapped_into(student).__enter__(),
        ):
            with pytest.raises(CkptEmaError, match="swapped into a module"):
                call()
    assert not list(tmp_path.iterdir())
    teacher.update()


def test_an_update_beside_an_attached_optimizer_is_told_once(student: Student) -> None:
    """A step would count twice; not where the optimizer was let go, nor of a copy, which is attached to none."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    teacher = MeanTeacher(student)
    handle = teacher.attach(optimizer)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(teacher).update()
    with pytest.warns(UserWarning, match="counted twice"):
        teacher.update()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.update()
        handle.remove()
        teacher.attach(optimizer).remove()
        teacher.update()
    assert teacher.num_steps == 4


def test_a_second_optimizer_is_told_after_an_update_beside_the_first(student: Student) -> None:
    """What was said of one mistake does not hide the other."""
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.01) for part in (student.encoder, student.norm)]
    teacher = MeanTeacher(student)
    teacher.attach(optimizers[0])
    with pytest.warns(UserWarning, match="counted twice"):
        teacher.update()
    with pytest.warns(UserWarning, match="attached to another optimizer as well"):
        teacher.attach(optimizers[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.update()


def test_an_update_beside_an_optimizer_that_is_gone_is_right(student: Student) -> None:
    """Nor is one that is refused warned of, nor are optimizers kept that were let go."""
    teacher = MeanTeacher(student)
    for _ in range(3):
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        teacher.attach(optimizer)
        del optimizer
        gc.collect()
    assert len(teacher._attachments.handles) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.update()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        teacher.attach(optimizer)
        with teacher.swapped_into(student), pytest.raises(CkptEmaError, match="swapped"):
            teacher.update()
    with pytest.warns(UserWarning, match="counted twice"):
        teacher.update()


def test_any_of_the_optimizers_makes_an_update_count_twice(student: Student) -> None:
    """Also the first one, when the second was let go; and what they hold is not the teacher's to copy."""
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.01) for part in (student.encoder, student.norm)]
    for optimizer in optimizers:
        optimizer.register_step_post_hook(lambda *_: None)
    teacher = MeanTeacher(student)
    _, second = (teacher.attach(optimizer) for optimizer in optimizers)
    second.remove()
    pickle.dumps(teacher)
    with pytest.warns(UserWarning, match="counted twice") as caught:
        teacher.update()
    assert [Path(str(warning.filename)).name for warning in caught] == [Path(__file__).name]


class Scheduled(MeanTeacher):
    """A teacher whose momentum is a schedule's, and that looks at more than numbers before it is saved."""

    num_looks = 0

    @property
    def momentum(self) -> float:
        """Smaller with each update."""
        return 0.5 / (1 + self.num_updates)

    def check_finite(self) -> None:
        """Count the calls."""
        self.num_looks += 1
        super().check_finite()


def test_what_a_subclass_defines_counts(student: Student, tmp_path: Path) -> None:
    """A momentum of its own in the update, the state and the file, with no formula claimed; its own look at numbers."""
    teacher = Scheduled(student, momentum=0.25)
    for _ in train(student, 3):
        teacher.update()
    state = teacher.state_dict()
    assert state["momentum"] == teacher.momentum == 0.125
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.load_state_dict(state)
    path = teacher.save_snapshot(tmp_path, 3)
    assert teacher.num_looks == 1
    assert metadata(path)["response"] is None


def test_an_attached_optimizer_calls_the_update_of_a_subclass(student: Student) -> None:
    """Who counts or logs in it is called behind each step, and is not warned."""
    calls = []

    class Logging(MeanTeacher):
        def update(self) -> bool:
            calls.append(self.num_steps)
            return super().update()

    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    Logging(student).attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.step()
    assert calls == [0, 1]


def test_attached_twice_it_would_count_twice(student: Student) -> None:
    """An error, until the first one is removed; others of its own are no error, foreign ones told."""
    teacher = MeanTeacher(student, momentum=MOMENTUM)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.01) for part in (student.encoder, student.norm)]
    handle, _ = (teacher.attach(optimizer) for optimizer in optimizers)
    with pytest.raises(MisuseError, match="attached to this optimizer already"):
        teacher.attach(optimizers[0])
    MeanTeacher(student).attach(optimizers[0])
    handle.remove()
    teacher.attach(optimizers[0])
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers[0].step()
    assert teacher.num_updates == 1
    with pytest.warns(UserWarning, match="none of the parameters"):
        teacher.attach(torch.optim.SGD(nn.Linear(2, 2).parameters()))


def test_a_teacher_that_was_never_updated_is_saved_with_a_word(student: Student, tmp_path: Path) -> None:
    """An optimizer that was replaced, or never calls its hooks, would else go unnoticed."""
    teacher = MeanTeacher(student)
    with pytest.warns(UserWarning, match="no update has come yet") as caught:
        teacher.save(tmp_path / "t.safetensors")
    assert caught[0].filename == __file__
    teacher.update()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.save(tmp_path / "t.safetensors")


def replace_parameter(module: nn.Module) -> None:
    module.encoder.bias = nn.Parameter(torch.zeros(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.double(),
        lambda module: module.half(),
        lambda module: module.double().to(next(iter(module.buffers())).dtype),
        lambda module: module.load_state_dict({n: t + 1 for n, t in module.state_dict().items()}, assign=True),
        replace_parameter,
    ],
)
def test_a_module_that_is_converted_while_swapped_is_the_student_again(
    student: Student, change: Callable[[nn.Module], object], dtype: torch.dtype
) -> None:
    """Whose tensors were replaced in the block gets its own back, which the optimizer knows, and the teacher its."""
    student = student.to(dtype)
    teacher = MeanTeacher(student, momentum=MOMENTUM)
    for _ in train(student, 3):
        teacher.update()
    theirs = {name: tensor.clone() for name, tensor in teacher.tensors().items()}
    parameters = dict(student.named_parameters())
    mine = {name: tensor.detach().clone() for name, tensor in parameters.items()}
    dtypes = {name: buffer.dtype for name, buffer in student.named_buffers()}
    student(torch.randn(4, 7).to(dtype)).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
    with teacher.swapped_into():
        change(student)
    assert_same_bits({name: tensor.detach() for name, tensor in student.named_parameters()}, mine)
    assert_same_bits({n: p.grad for n, p in student.named_parameters() if p.grad is not None}, gradients)
    if change is not replace_parameter:
        assert_same_bits(dict(student.named_buffers()), buffers)
    assert {name: buffer.dtype for name, buffer in student.named_buffers()} == dtypes
    assert_same_bits(teacher.tensors(), theirs)
    for name, parameter in student.named_parameters():
        assert parameter is parameters[name], name
    assert student.decoder.weight is student.encoder.weight
    teacher.update()


def test_forwards_that_count_in_train_mode_are_no_writes_to_parameters(student: Student) -> None:
    """With running statistics averaged too, these are the teacher's own to move."""
    teacher = MeanTeacher(student, skip_buffers=False)
    teacher.update()
    with warnings.catch_warnings(), teacher.swapped_into():
        warnings.simplefilter("error")
        student(torch.randn(4, 7))
    with torch.inference_mode():
        made_inside = Student()
    inside = MeanTeacher(made_inside)
    inside.update()
    with warnings.catch_warnings(), inside.swapped_into():
        warnings.simplefilter("error")


def test_what_is_written_to_a_swapped_module_is_told(student: Student) -> None:
    """The teacher would hold it, where its own tensors are exchanged; nothing is lost where the module has copies."""
    teacher = MeanTeacher(student)
    teacher.update()
    other = {name: tensor + 1 for name, tensor in student.state_dict().items()}
    mine = {name: tensor.detach().clone() for name, tensor in student.named_parameters()}
    with pytest.warns(UserWarning, match=r"`frozen`, .* written to.*load_state_dict") as caught, teacher.swapped_into():
        student.load_state_dict(other)
    assert caught[0].filename == __file__
    assert_same_bits({name: tensor.detach() for name, tensor in student.named_parameters()}, mine)

    def write_and_raise() -> None:
        with teacher.swapped_into():
            student.load_state_dict(other)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # it says more
        write_and_raise()
    narrow = copy.deepcopy(student).to(torch.bfloat16)
    beside = MeanTeacher(narrow)
    before = {name: tensor.clone() for name, tensor in beside.tensors().items()}
    with warnings.catch_warnings(), beside.swapped_into():
        warnings.simplefilter("error")
        narrow.load_state_dict(other)
    assert_same_bits(beside.tensors(), before)
    assert torch.equal(narrow.frozen, mine["frozen"].to(torch.bfloat16))


def test_an_embedding_that_renormalises_itself_is_evaluated_without_a_word() -> None:
    """Its forwards write to its weight, which an average of short vectors has no need of."""
    student = nn.Sequential(nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, 2))
    teacher = MeanTeacher(student, momentum=0.5)
    for _ in range(2):
        student(torch.arange(5))
        teacher.update()
    with warnings.catch_warnings(), teacher.swapped_into():
        warnings.simplefilter("error")
        student(torch.arange(5))


def test_parts_of_one_tensor_and_nested_swaps_are_no_foreign_writes() -> None:
    """Parameters cut out of one flat tensor share its counter; a swap within a swap writes to the same tensors."""
    flat = torch.randn(6)
    student = nn.Module()
    student.a, student.b = nn.Parameter(flat[:3]), nn.Parameter(flat[3:])
    teachers = [MeanTeacher(student), MeanTeacher(student)]
    for teacher in teachers:
        teacher.update()
    other = copy.deepcopy(student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with teachers[0].swapped_into():
            pass
        with teachers[0].swapped_into(other), teachers[1].swapped_into(other):
            pass


def test_a_module_that_does_not_fit_cannot_be_swapped_into(student: Student) -> None:
    """Missing names, other shapes, other ties: every difference is told, and nothing is changed."""
    teacher = MeanTeacher(student)
    other = Student()
    del other.scale
    other.frozen = nn.Parameter(torch.zeros(1))
    before = clones(other)
    with pytest.raises(CkptEmaError) as caught:
        teacher.swapped_into(other).__enter__()
    for part in ("in 2 places", "scale: missing in the module", "frozen: shape [1] in the module, [13] in the teacher"):
        assert part in str(caught.value)
    assert_same_bits(clones(other), before)
    untied = Student()
    untied.decoder.weight = nn.Parameter(torch.zeros(7, 7))
    with pytest.raises(CkptEmaError, match="tied in the module, but not in the teacher"):
        MeanTeacher(untied).swapped_into(student).__enter__()
    teacher.update()


def test_ties_that_only_the_student_has_are_swapped_and_saved_under_each_name(student: Student, tmp_path: Path) -> None:
    """Two tensors of a module may follow one of the student; all come back from a swap."""
    module = Student()
    module.decoder.weight = nn.Parameter(torch.ones(7, 7))
    teacher = MeanTeacher(student, module, momentum=0.5, keep_teacher=True)
    teacher.update()
    for name in ("encoder.weight", "decoder.weight"):
        assert torch.equal(teacher.tensors()[name], module.state_dict()[name]), name
    saved = load_file(teacher.save(tmp_path / "teacher.safetensors"))
    assert torch.equal(saved["decoder.weight"], module.decoder.weight)
    own = MeanTeacher(student)
    mine, theirs = clones(student), clones(module)
    with own.swapped_into(module):
        assert torch.equal(module.encoder.weight, student.encoder.weight)
        assert torch.equal(module.decoder.weight, student.encoder.weight)
    assert_same_bits(clones(module), theirs)
    assert_same_bits(clones(student), mine)
    assert torch.equal(own.tensors()["encoder.weight"], student.encoder.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interrupted_at_any_moment_a_swap_gives_all_back(dtype: torch.dtype) -> None:
    """A real signal while numbers are put in or taken out; neither student nor teacher loses one of them."""
    student = nn.Module()
    student.weight = nn.Parameter(torch.randn(6 << 20).to(dtype))
    teacher = MeanTeacher(student, momentum=0.5)
    teacher.update()
    with torch.no_grad():
        student.weight.normal_()
    teacher.update()
    mine, theirs = clones(student), {"weight": teacher.tensors()["weight"].clone()}
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    num_interrupts = 0
    try:
        for tick in range(1, 25):
            try:
                signal.setitimer(signal.ITIMER_REAL, tick * 0.0005)
                with teacher.swapped_into():
                    pass
                time.sleep(0.02)
            except KeyboardInterrupt:
                num_interrupts += 1
            assert torch.is_grad_enabled()
            assert torch.equal(student.weight, mine["weight"]), tick
            assert torch.equal(teacher.tensors()["weight"], theirs["weight"]), tick
    finally:
        signal.signal(signal.SIGALRM, handler)
    # Python itself swallows one that comes while it calls a finalizer.
    assert num_interrupts >= 16


def test_interrupted_between_any_two_lines_a_swap_is_ended() -> None:
    """Signals at random moments of short swaps hit the lines around the exchange as often as the exchange."""
    student = nn.Module()
    student.weight = nn.Parameter(torch.randn(1 << 14).to(torch.bfloat16))
    teacher = MeanTeacher(student, momentum=0.5)
    for _ in range(2):
        teacher.update()
        with torch.no_grad():
            student.weight.normal_()
    mine, theirs = clones(student), {"weight": teacher.tensors()["weight"].clone()}
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    generator = random.Random(0)
    try:
        for _ in range(1500):
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, generator.uniform(2e-5, 4e-4))
                with teacher.swapped_into():
                    pass
                with teacher.swapped_into():
                    pass
                time.sleep(0.01)
            assert torch.is_grad_enabled()
            assert torch.equal(student.weight, mine["weight"])
            assert torch.equal(teacher.tensors()["weight"], theirs["weight"])
    finally:
        signal.signal(signal.SIGALRM, handler)


def test_another_teacher_does_not_learn_from_swapped_numbers(student: Student) -> None:
    """While one teacher's numbers are in the student, no other one takes them for the student's."""
    one, other = MeanTeacher(student), MeanTeacher(student)
    with one.swapped_into(), pytest.raises(CkptEmaError, match="swapped into a module"):
        other.update()
    other.update()


# --- state and files --------------------------------------------------------------------------------------------------


def test_training_goes_on_from_a_saved_state_as_if_never_stopped(student: Student, tmp_path: Path) -> None:
    """Through a real file, loaded with weights_only; interval and first copy included."""
    options: dict[str, Any] = {"momentum": MOMENTUM, "interval": 2}
    teacher = MeanTeacher(student, **options)
    for step in train(student, 9):
        teacher.update()
        if step == 5:
            torch.save({"student": student.state_dict(), "teacher": teacher.state_dict()}, tmp_path / "state.pt")
        if step > 5:
            loaded = torch.load(tmp_path / "state.pt", weights_only=True)
            resumed = MeanTeacher(student, **options)
            resumed.load_state_dict(loaded["teacher"])
            resumed.update()
            torch.save({"teacher": resumed.state_dict()}, tmp_path / "state.pt")
    assert_same_bits(resumed.tensors(), teacher.tensors())
    assert (resumed.num_steps, resumed.num_updates) == (9, 4)


def test_a_state_that_does_not_fit_changes_nothing(student: Student) -> None:
    """Names, shapes and the filter are compared before a number is copied."""
    teacher = MeanTeacher(student)
    before = {name: tensor.clone() for name, tensor in teacher.tensors().items()}
    state = copy.deepcopy(teacher.state_dict())
    for tensor in state["tensors"].values():
        tensor.add_(1)
    for broken, message in (
        ({**state, "skip_buffers": False}, "made with skip_buffers=False, and here it is True"),
        ({key: value for key, value in state.items() if key != "start"}, "or a part is missing"),
    ):
        with pytest.raises(CkptEmaError, match=message):
            teacher.load_state_dict(broken)
    state["tensors"] = {**state["tensors"], "scale": torch.zeros(3), "other": torch.zeros(1)}
    del state["tensors"]["frozen"]
    with pytest.raises(CkptEmaError) as caught:
        teacher.load_state_dict({**state, "num_steps": 7})
    for part in ("frozen: missing in the state", "other: missing in the student", "scale: shape [3] in the state"):
        assert part in str(caught.value)
    assert teacher.num_steps == 0
    assert_same_bits(teacher.tensors(), before)
    with pytest.raises(CkptEmaError, match="no state of a MeanTeacher"):
        teacher.load_state_dict(student.state_dict())


def test_a_state_of_another_momentum_is_taken_with_a_warning(student: Student) -> None:
    """The constructor's configuration holds; a silent change would be found out weeks later."""
    state = MeanTeacher(student, momentum=0.2).state_dict()
    with pytest.warns(UserWarning, match=r"made with momentum=0.2, and continues with 0.1") as caught:
        MeanTeacher(student, momentum=0.1).load_state_dict(state)
    assert caught[0].filename == __file__
    student = student.to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"the stored teacher is torch.bfloat16, and goes on in torch.float32"):
        MeanTeacher(student).load_state_dict(MeanTeacher(student, dtype="student").state_dict())
    with pytest.raises(AttributeError):
        MeanTeacher(student).momentum = 0.5  # type: ignore[misc]


def test_the_teacher_is_no_part_of_the_students_graph(student: Student) -> None:
    """A loss against it must not send gradients into the student, and its state can be copied."""
    teacher = MeanTeacher(student)
    assert not any(tensor.requires_grad or tensor.grad_fn for tensor in teacher.tensors().values())
    teacher.update()
    prediction = torch.func.functional_call(student, teacher.tensors(), torch.randn(4, 7))
    assert not prediction.requires_grad
    copy.deepcopy(teacher.state_dict())


def test_saving_replaces_teachers_alone_and_never_writes_infinities(student: Student, tmp_path: Path) -> None:
    """A checkpoint of that name stays; a number that the written dtype cannot hold is an error."""
    save_file({"w": torch.ones(2)}, tmp_path / "student.safetensors")
    teacher = MeanTeacher(student)
    with pytest.raises(CkptEmaError, match="is no teacher that ckpt-ema wrote"):
        teacher.save(tmp_path / "student.safetensors")
    assert list(load_file(tmp_path / "student.safetensors")) == ["w"]
    with torch.no_grad():
        student.frozen[3] = 1e6
    teacher.update()
    with pytest.raises(CkptEmaError, match="`frozen` overflows float16"):
        teacher.save(tmp_path / "half.safetensors", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["student.safetensors"]
    with torch.no_grad():
        student.frozen[3] = 1
    teacher.copy_student()
    halves = load_file(teacher.save(tmp_path / "half.safetensors", dtype="float16"))
    assert_same_bits({"frozen": halves["frozen"]}, {"frozen": student.frozen.detach().half()})
    # As many bits, and other numbers.
    with torch.no_grad():
        student.frozen[3] = 1e6
    teacher = MeanTeacher(student.bfloat16(), dtype="student")
    teacher.update()
    with pytest.raises(CkptEmaError, match="`frozen` overflows float16"):
        teacher.save(tmp_path / "other.safetensors", dtype="float16")


def test_a_saved_teacher_loads_into_the_model(student: Student, tmp_path: Path) -> None:
    """Parameters from the teacher, buffers from the student; read by the safetensors library, strictly."""
    teacher = MeanTeacher(student, momentum=MOMENTUM)
    for _ in train(student, 3):
        teacher.update()
    path = teacher.save(tmp_path / "teacher.safetensors")
    loaded = Student()
    loaded.load_state_dict(load_file(path), strict=True)
    assert torch.equal(loaded.norm.running_var, student.norm.running_var)
    assert torch.equal(loaded.encoder.weight, teacher.tensors()["encoder.weight"])
    teacher.save(path)
    with pytest.raises(CkptEmaError, match="exists"):
        teacher.save(path, overwrite=False)
    with pytest.raises(MisuseError, match="dtype is 'int8'"):
        teacher.save(path, dtype="int8")


def test_a_snapshot_beside_checkpoints_is_an_average_to_the_fold(
    student: Student, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    """Left out of the fold aloud, and `inspect` tells how it was made."""
    run = tmp_path / "run"
    run.mkdir()
    teacher = MeanTeacher(student, momentum=MOMENTUM, interval=2)
    for step in train(student, 4):
        teacher.update()
        torch.save(student.state_dict(), run / f"step_{step}.pt")
    path = teacher.save_snapshot(run, 4)
    assert path == run / "teacher_step_4.safetensors"
    plan = ckpt_ema.plan(run, tmp_path / "teacher.safetensors")
    assert [item.step for item in plan.checkpoints] == [1, 2, 3, 4]
    assert ("teacher_step_4.safetensors", "a teacher that ckpt-ema wrote") in plan.left_out
    shown = cli("inspect", path)
    assert "momentum   0.1 per update, interval 2" in shown.stdout
    record = ckpt_ema.inspect(path).provenance
    assert record is not None
    assert (record["step"], record["steps"], record["updates"], record["start"]) == (4, 4, 2, "student")


def test_buffers_that_came_later_are_saved_and_masks_of_infinities_are_copied(student: Student, tmp_path: Path) -> None:
    """A file has all that the student's state dict has at that moment; a mask neither stops nor enters the average."""
    student.register_buffer("late", None)
    student.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    careful = MeanTeacher(student, skip_buffers=False, on_nonfinite="raise")
    assert careful.skipped["mask"] == "a buffer of infinities"
    assert careful.update()
    teacher = MeanTeacher(student)
    student.late = torch.ones(2)
    saved = load_file(teacher.save(tmp_path / "teacher.safetensors"))
    assert saved.keys() == student.state_dict().keys()
    assert torch.equal(saved["mask"], student.mask)


def test_inference_mode_leaves_nothing_behind_that_training_cannot_use(student: Student) -> None:
    """Made, updated or swapped there, the teacher goes on outside."""
    student = student.to(torch.bfloat16)
    with torch.inference_mode():
        teacher = MeanTeacher(student, momentum=MOMENTUM)
        teacher.update()
        teacher.update()
        with teacher.swapped_into():
            pass
    teacher.update()
    list(train(student, 1))
    teacher.update()


# --- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.0}, "must lie between 0 and 1"),
        ({"momentum": 1.0}, "must lie between 0 and 1"),
        ({"momentum": 0.1, "half_life": 10}, "say the same thing twice"),
        ({"half_life": 0}, "must be a finite number of steps above 0"),
        ({"half_life": float("inf")}, "must be a finite number of steps above 0"),
        ({"momentum": 10**400}, "larger than any float"),
        ({"interval": 0}, "whole number from 1"),
        ({"interval": 1.5}, "whole number from 1"),
        ({"arithmetic": "fast"}, "arithmetic is 'fast'"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore'"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'"),
        ({"momentum": "0.1"}, "must be a number"),
        ({"momentum": float("nan")}, "must lie between 0 and 1"),
        ({"skip_buffers": "yes"}, "skip_buffers is 'yes'"),
        ({"keep_teacher": True}, "needs a teacher module"),
    ],
)
def test_misuse_is_refused(student: Student, options: dict[str, Any], message: str) -> None:
    """With what was wrong and what to pass."""
    with pytest.raises(MisuseError, match=message):
        MeanTeacher(student, **options)


def test_what_cannot_be_followed_is_refused() -> None:
    """A module without parameters, one without shapes yet, one without numbers."""
    with pytest.raises(MisuseError, match="no parameter to average"):
        MeanTeacher(nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.LazyLinear(3)
    with pytest.raises(CkptEmaError, match="has no shape yet"):
        MeanTeacher(lazy)
    with pytest.raises(CkptEmaError, match="meta device"):
        MeanTeacher(nn.Linear(2, 2, device="meta"))
    gathered = nn.Linear(2, 2)
    gathered.weight.ds_id = 3
    with pytest.raises(CkptEmaError, match="ZeRO-3"):
        MeanTeacher(gathered)
    with pytest.raises(CkptEmaError, match="TorchScript"):
        MeanTeacher(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)))
    eight = nn.Module()
    eight.weight = nn.Parameter(torch.randn(4).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(MisuseError, match="no arithmetic"):
        MeanTeacher(eight, dtype="student")
    teacher = MeanTeacher(eight, momentum=MOMENTUM)
    teacher.update()
    teacher.update()
    assert teacher.tensors()["weight"].dtype is torch.float32


def test_a_teacher_that_shares_memory_with_its_student_is_refused(student: Student) -> None:
    """Forgetting the copy would shrink the student at every update."""
    with pytest.raises(CkptEmaError, match="the same memory in both"):
        MeanTeacher(student, student)
    module = Student()
    module.norm = student.norm
    with pytest.raises(CkptEmaError, match=r"norm.weight: the same memory in both"):
        MeanTeacher(student, module)


def test_a_tie_that_is_undone_is_told(student: Student) -> None:
    """Or one tensor would get the other's numbers."""
    teacher = MeanTeacher(student)
    student.decoder.weight = nn.Parameter(torch.zeros(7, 7))
    with pytest.raises(CkptEmaError, match="were tied when the teacher was made"):
        teacher.update()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.nn.Linear(2, 2), 0.001), "pass `momentum=0.001`"),
        ((torch.nn.Linear(2, 2), {"a": torch.ones(2)}), "the teacher is of type dict"),
        (({"a": torch.ones(2)},), "the student is of type dict"),
    ],
)
def test_what_is_no_module_is_named(arguments: tuple[Any, ...], text: str) -> None:
    """A momentum in the teacher's place, or a state dict in a module's."""
    with pytest.raises(MisuseError, match=re.escape(text)):
        MeanTeacher(*arguments)


def test_a_teacher_is_saved_under_the_name_of_what_it_is(tmp_path: Path) -> None:
    """`torch.load` would not read a `.pt` that is a safetensors file."""
    with pytest.raises(MisuseError, match="does not end with") as caught:
        MeanTeacher(torch.nn.Linear(2, 2)).save(tmp_path / "t.pt")
    assert caught.value.hint == f"pass `{tmp_path / 't.safetensors'}`"
    for path in ("", "/", "ema_0.999"):
        with pytest.raises(MisuseError, match="does not end with") as caught:
            MeanTeacher(torch.nn.Linear(2, 2)).save(path)
        assert str(caught.value.hint).endswith(("teacher.safetensors`", "ema_0.999.safetensors`"))
    with pytest.raises(MisuseError, match="is no path: embedded null byte"):
        MeanTeacher(torch.nn.Linear(2, 2)).save("a\0b.safetensors")
    with pytest.raises(MisuseError, match="is a URL, and a teacher is written to a local disk"):
        MeanTeacher(torch.nn.Linear(2, 2)).save("s3://bucket/t.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_snapshots_step_is_a_whole_number(student: Student, tmp_path: Path) -> None:
    """Neither None nor a tensor becomes part of a file's name."""
    for step in (None, 1.5, -1, torch.tensor(3)):
        with pytest.raises(MisuseError, match="must be a whole number from 0"):
            MeanTeacher(student).save_snapshot(tmp_path, step)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    assert MeanTeacher(student).save_snapshot(tmp_path, np.int64(3)).name == "teacher_step_3.safetensors"


def test_an_inverted_momentum_is_warned_of(student: Student) -> None:
    """Half of the public configurations write the teacher's share; with 0.999 there is no averaging at all."""
    with pytest.warns(UserWarning, match=r"momentum=0.001 here") as caught:
        MeanTeacher(student, momentum=0.999)
    with pytest.warns(UserWarning, match="momentum 0.51"):
        MeanTeacher(student, momentum=0.51)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MeanTeacher(student, momentum=0.5)
    assert caught[0].filename == __file__


def test_half_life_is_the_steps_after_which_a_share_has_halved(student: Student) -> None:
    """Whatever the interval."""
    for interval in (1, 5):
        teacher = MeanTeacher(student, half_life=100, interval=interval)
        assert (1 - teacher.momentum) ** (100 / interval) == pytest.approx(0.5)


# --- many processes ---------------------------------------------------------------------------------------------------


def test_sharded_replicated_and_bare_students_have_one_teacher(tmp_path: Path) -> None:
    """FSDP2 and DDP on two real ranks: same bits, each rank its own part, saved by torch.distributed.checkpoint."""
    start_ranks("online_ranks.py", 2, tmp_path)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """A context in which torch says that a CUDA graph is being captured."""

    @contextlib.contextmanager
    def capturing() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            yield

    return capturing


def test_what_a_graph_would_do_wrongly_at_every_replay_is_not_captured(
    student: Student, tmp_path: Path, captured: Any
) -> None:
    """The copy of the first update, tracks whose coefficients change, and what waits for the host."""
    some: list[tuple[str, dict[str, Any], int]] = [
        ("the first update, which copies the student,", {}, 0),
        ("an update with `snapshots`", {"snapshots": Snapshots(tmp_path, every=100)}, 1),
        ("an update with `on_nonfinite`", {"on_nonfinite": "skip"}, 1),
        ('an update with `device="cpu"`', {"device": "cpu"}, 1),
    ]
    for what, options, num_before in some:
        teacher = MeanTeacher(student, momentum=MOMENTUM, **options)
        for _ in range(num_before):
            teacher.update()
        with captured(), pytest.raises(CkptEmaError) as caught:
            teacher.update()
        assert caught.value.message == f"{what} cannot be captured in a CUDA graph"
        mended = "teacher.update()` outside of" if options else "teacher.copy_student()` before"
        assert caught.value.hint == f"call `{mended} `with torch.cuda.graph(...)`"
        assert (teacher.num_steps, teacher.num_updates) == (num_before, num_before)
        teacher.update()
        assert teacher.num_updates == num_before + 1


def test_a_captured_update_is_one_whatever_the_interval_and_no_formula_is_claimed_any_more(
    student: Student, tmp_path: Path, captured: Any
) -> None:
    """How often a graph is replayed, nobody counts."""
    teacher = MeanTeacher(student, momentum=MOMENTUM, interval=2)
    for _ in range(4):
        teacher.update()
    assert metadata(teacher.save_snapshot(tmp_path, 4))["response"] is not None
    with torch.no_grad():
        student.scale.fill_(2.5)
    with captured():
        assert teacher.update()
    assert teacher.tensors()["scale"].item() == pytest.approx(1.5 * (1 - MOMENTUM) + 2.5 * MOMENTUM)
    assert (teacher.num_steps, teacher.num_updates) == (4, 2)
    assert metadata(teacher.save_snapshot(tmp_path, 4))["response"] is None
    state = teacher.state_dict()
    assert state["copied"] is None
    # The graph is still there.
    teacher.copy_student()
    assert metadata(teacher.save_snapshot(tmp_path, 4))["response"] is None
    # It is not where the state or a copy goes.
    loaded = MeanTeacher(student, momentum=MOMENTUM, interval=2)
    loaded.load_state_dict(state)
    for other in (loaded, copy.deepcopy(teacher)):
        assert metadata(other.save_snapshot(tmp_path, 4))["response"] is None
        other.copy_student()
        assert metadata(other.save_snapshot(tmp_path, 4))["response"] is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_the_default_device_is(student: Student, dtype: torch.dtype) -> None:
    """What an update needs besides the student's and the teacher's tensors is where these are."""
    student = student.to(dtype)
    teachers = [MeanTeacher(student, momentum=MOMENTUM) for _ in range(2)]
    stalled = []
    for teacher, device in zip(teachers, ("cpu", "meta"), strict=True):
        for cached in (arithmetic.addr_has_the_hooks_bits, arithmetic._one, rule._pieces_have_the_hooks_bits):
            cached.cache_clear()
        with torch.device(device), torch.no_grad():
            for number in range(3):
                student.encoder.weight.fill_(number)
                teacher.update()
            stalled.append(teacher.stalled_fraction())
    assert stalled[0] == stalled[1] > 0
    assert_same_bits(*(teacher.tensors() for teacher in teachers))


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cpu, as on a GPU", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_one_number_that_is_none_among_many_is_found(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, device: str
) -> None:
    """In any tensor, at any place; the largest numbers that are some are not taken for one, nor is an empty tensor."""
    if "as on a GPU" in device:
        monkeypatch.setattr(rule, "_is_on_cpu", lambda tensor: False)
    device = device.partition(",")[0]
    greatest = torch.finfo(dtype).max
    tensors = [
        torch.full((size,), greatest, dtype=torch.float64, device=device).to(dtype) for size in (1, 0, 5000, 300_000)
    ]
    assert rule.is_finite(tensors)
    tensors.append(torch.ones(7, 3, dtype=torch.float64, device=device).t())
    assert rule.is_finite(tensors)
    numbers = [torch.nan] if dtype is torch.float8_e4m3fn else [torch.nan, torch.inf, -torch.inf]
    for number in numbers:
        for tensor, place in ((tensors[0], 0), (tensors[2], 4999), (tensors[3], 123_457)):
            before = tensor[place].clone()
            tensor[place] = number
            assert not rule.is_finite(tensors)
            tensor[place] = before
    assert rule.is_finite(tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_has_the_cpus_bits(student: Student, dtype: torch.dtype) -> None:
    """The same students give the same teacher; also one that was made before the student was moved."""
    student = student.to(dtype)
    on_gpu = copy.deepcopy(student)
    mine, theirs = (MeanTeacher(model, momentum=MOMENTUM) for model in (student, on_gpu))
    on_gpu.cuda()
    for _ in range(4):
        with torch.no_grad():
            for one, other in zip(student.parameters(), on_gpu.parameters(), strict=True):
                one.copy_(torch.randn(one.shape))
                other.copy_(one)
        mine.update()
        theirs.update()
    assert_same_bits({name: tensor.cpu() for name, tensor in theirs.tensors().items()}, mine.tensors())


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", ["hook", "lerp"])
@pytest.mark.parametrize("num_before", [0, 1, 3])
def test_an_update_is_captured_in_a_cuda_graph(student: Student, arithmetic: Any, num_before: int) -> None:
    """Right behind a copy or the first one, which copies, or when the kernel for all tensors is at work."""
    student.cuda()
    teachers = [MeanTeacher(student, momentum=MOMENTUM, arithmetic=arithmetic) for _ in range(2)]
    for teacher in teachers:
        teacher.copy_student()
    for _ in range(num_before):
        for teacher in teachers:
            teacher.update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        teachers[0].update()
    for _ in range(3):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.normal_()
        graph.replay()
        teachers[1].update()
    assert_same_bits(teachers[0].tensors(), teachers[1].tensors())


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", ["hook", "lerp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_waits_for_nothing_and_takes_no_memory(dtype: torch.dtype, arithmetic: Any) -> None:
    """The host does not wait for the device, and there is no temporary of a tensor's size."""
    student = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(4))).to("cuda", dtype)
    teacher = MeanTeacher(student, momentum=MOMENTUM, arithmetic=arithmetic)
    for _ in range(2):
        teacher.update()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        teacher.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


def test_a_state_is_loaded_whole_or_not_at_all(tmp_path: Path) -> None:
    """Where warnings are errors, everything is loaded by then; what is damaged changes nothing."""
    model = torch.nn.Linear(3, 2)
    made = MeanTeacher(model, momentum=0.1, snapshots=Snapshots(tmp_path / "a", every=100))
    for _ in range(4):
        with torch.no_grad():
            model.weight.add_(1.0)
        made.update()
    state = copy.deepcopy(made.state_dict())
    other = MeanTeacher(copy.deepcopy(model), momentum=0.2, snapshots=Snapshots(tmp_path / "b", every=100))
    for changed in ({"start": "nowhere"}, {"num_steps": "x"}, {"copied": 3}, {"copied": [1]}, {"offset": "x"}):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(CkptEmaError, match="the state is damaged"):
            other.load_state_dict({**state, **changed})
        assert_same_states(other.state_dict(), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"continues with 0\.2"):
            other.load_state_dict(state)
    assert other.num_steps == 4
    assert_same_states(other.state_dict()["tensors"], state["tensors"])
    assert_same_states(other.state_dict()["snapshots"], state["snapshots"])


def assert_same_states(one: Any, other: Any) -> None:
    """The same tables, tensors bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same_states(one[name], other[name])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other
