"""What real models and loops do beside the plain case: wrappers, views, scripts, 16 bits, writes, compilers."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ckpt_ema
from ckpt_ema import CkptEmaError, MeanTeacher, Snapshots
from ckpt_ema.online.state_file import read_state, write_state
from tests.conftest import assert_same_bits
from tests.test_snapshots import metadata

MOMENTUM = 0.1


def move(module: nn.Module, seed: int) -> None:
    """Change every parameter, as an optimizer would; the same for each seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters as they are now."""
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}


# --- what is followed -------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """Hands on every attribute of the model in it, as PEFT's models do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.logit_scale = nn.Parameter(torch.ones(3))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.net, name)


def test_a_wrapper_around_a_compiled_model_is_followed_as_a_whole() -> None:
    """Its own parameters belong to the student, though it answers as the compiled model would."""
    model = Wrapper(torch.compile(nn.Linear(2, 3)))
    assert set(MeanTeacher(model).tensors()) == {"logit_scale", "net.weight", "net.bias"}
    assert set(MeanTeacher(torch.compile(nn.Linear(2, 3))).tensors()) == {"weight", "bias"}


def test_a_buffer_that_is_a_parameter_as_well_is_averaged() -> None:
    """Whichever of the two names comes first."""
    student = nn.Module()
    student.a, student.b = nn.Module(), nn.Linear(2, 2, bias=False)
    student.a.register_buffer("codebook", student.b.weight.detach())
    teacher = MeanTeacher(student)
    assert set(teacher.tensors()) == {"a.codebook", "b.weight"}
    assert teacher.skipped == {}


@pytest.mark.parametrize("tie", ["transposed", "row"])
def test_a_teacher_module_with_overlapping_tensors_is_refused(tie: str) -> None:
    """A view of another tensor would be updated twice."""

    def build() -> nn.Module:
        module = nn.Module()
        module.encoder = nn.Parameter(torch.randn(3, 3))
        view = module.encoder.data.t() if tie == "transposed" else module.encoder.data[1]
        module.decoder = nn.Parameter(view)
        return module

    with pytest.raises(CkptEmaError) as caught:
        MeanTeacher(build(), build())
    assert [line for line in caught.value.details if "might be updated twice" in line]
    flat = torch.randn(8)
    packed = nn.Module()
    packed.one, packed.two = nn.Parameter(flat[:4]), nn.Parameter(flat[4:])
    MeanTeacher(copy.deepcopy(packed), packed)  # side by side in one piece of memory is no overlap


def test_a_scripted_part_is_refused_by_name() -> None:
    """TorchScript keeps its parameters elsewhere."""
    student = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(CkptEmaError, match="`1` is a TorchScript program"):
        MeanTeacher(student)


def test_modules_without_weights_come_and_go() -> None:
    """A metric, a loss or an activation is no part of the teacher; a layer is."""
    student = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    teacher = MeanTeacher(student, momentum=MOMENTUM)
    teacher.update()
    student[1] = nn.GELU()
    student.criterion = nn.CrossEntropyLoss(weight=torch.ones(2))
    teacher.update()
    del student.criterion
    teacher.update()
    student[2] = nn.Linear(2, 2)
    with pytest.raises(CkptEmaError, match="`2` came, went or was replaced"):
        teacher.update()


def test_a_student_without_numbers_leaves_the_teacher_its_own() -> None:
    """On the meta device there is nothing to fold, and nowhere for the teacher to go."""
    student = nn.Linear(2, 2)
    teacher = MeanTeacher(student, momentum=MOMENTUM)
    teacher.update()
    before = {name: tensor.clone() for name, tensor in teacher.tensors().items()}
    student.to("meta")
    with pytest.raises(CkptEmaError, match="is on the meta device now"):
        teacher.update()
    assert_same_bits(teacher.tensors(), before)
    assert teacher.num_steps == 1


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_16_bit_teacher_module_follows_the_other_16_bits_as_the_hook_does(narrow: torch.dtype) -> None:
    """By the literal calls, which compute in float32."""
    other = torch.float16 if narrow is torch.bfloat16 else torch.bfloat16
    student, module = nn.Linear(64, 64).to(other), nn.Linear(64, 64).to(narrow)
    with pytest.warns(UserWarning, match="small updates are lost"):
        teacher = MeanTeacher(student, module, momentum=MOMENTUM)
    teacher.update()
    expected = values(module)
    for step in range(3):
        move(student, step)
        teacher.update()
        for name, tensor in student.named_parameters():
            expected[name].mul_(1 - MOMENTUM).add_(tensor.detach(), alpha=MOMENTUM)
    assert_same_bits(values(module), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_training_step_leaves_the_update_its_bits(dtype: torch.dtype) -> None:
    """Whether the compiled function steps an attached optimizer or calls `update`: Inductor would round otherwise."""
    student = nn.Linear(300, 300).to(dtype)
    students = [student, copy.deepcopy(student)]
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, foreach=True) for each in students]
    teachers = [MeanTeacher(each, momentum=MOMENTUM) for each in students]
    teachers[0].attach(optimizers[0])

    @torch.compile
    def step() -> None:
        optimizers[0].step()

    @torch.compile
    def step_and_update() -> None:
        optimizers[1].step()
        teachers[1].update()

    expected: dict[str, torch.Tensor] = {}
    for number in range(4):
        for each in students:
            generator = torch.Generator().manual_seed(number)
            for parameter in each.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        step()
        step_and_update()
        for name, value in values(student).items():
            wide = value.float()
            old = expected.setdefault(name, wide)
            expected[name] = wide if number == 0 else old.mul(1 - MOMENTUM).add(wide, alpha=MOMENTUM)
    for teacher in teachers:
        assert teacher.num_updates == 4
        assert_same_bits(teacher.tensors(), expected)


def test_two_attached_optimizers_are_warned_of() -> None:
    """Muon for some parameters and AdamW for the others step once each, which counts twice."""
    student = nn.Linear(2, 2)
    teacher = MeanTeacher(student)
    one, two = (torch.optim.SGD([parameter], lr=0.1) for parameter in student.parameters())
    handle = teacher.attach(one)
    with pytest.warns(UserWarning, match="counts each step of both"):
        teacher.attach(two).remove()
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.attach(two)


# --- swaps ------------------------------------------------------------------------------------------------------------


def test_no_part_of_a_swapped_module_is_followed_meanwhile() -> None:
    """Neither a submodule's teacher, nor the whole's, nor one that follows the teacher module."""
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module = copy.deepcopy(student)
    whole, part = MeanTeacher(student, module), MeanTeacher(student[0])
    second = MeanTeacher(module)
    for each in (whole, part, second):
        each.update()
    with whole.swapped_into():
        for other in (part, second):
            with pytest.raises(CkptEmaError, match="swapped into a module"):
                other.update()
    with part.swapped_into(), pytest.raises(CkptEmaError, match="swapped into a module"):
        whole.update()
    for each in (whole, part, second):
        assert each.update()


@pytest.mark.parametrize("way", ["forward", "update_bn"])
def test_running_statistics_come_back(way: str) -> None:
    """Moved by a forward in training mode or recalibrated for the teacher, they are the student's again behind it."""
    student = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    teacher = MeanTeacher(student)
    teacher.update()
    before = {name: tensor.clone() for name, tensor in student[1].state_dict().items()}
    with teacher.swapped_into():
        if way == "forward":
            student(torch.randn(8, 2))
        else:
            torch.optim.swa_utils.update_bn([torch.randn(8, 2)], student)
        assert not torch.equal(student[1].running_mean, before["running_mean"])
    assert_same_bits(student[1].state_dict(), before)


def test_a_write_is_told_though_the_block_raises() -> None:
    """The teacher is no longer what it was, and no formula is claimed for it."""
    student = nn.Linear(2, 2)
    teacher = MeanTeacher(student)
    teacher.update()

    def write_and_raise() -> None:
        with teacher.swapped_into():
            move(student, 0)
            raise ZeroDivisionError

    with pytest.warns(UserWarning, match="written to"), pytest.raises(ZeroDivisionError):
        write_and_raise()
    assert teacher.state_dict()["copied"] is None


def test_a_swap_before_the_first_update_is_told() -> None:
    """What is evaluated is the student as it was when the teacher was made."""
    student = nn.Linear(2, 2)
    teacher = MeanTeacher(student, interval=100)
    with (
        pytest.warns(UserWarning, match="no update has come yet: what is swapped in is") as caught,
        teacher.swapped_into(),
    ):
        pass
    assert caught[0].filename == __file__


# --- states and files -------------------------------------------------------------------------------------------------


def test_what_was_kept_in_16_bits_claims_no_response(tmp_path: Path) -> None:
    """Most of its updates were lost, whatever it is kept in now."""
    student = nn.Linear(2, 2).to(torch.bfloat16)
    narrow, wide = MeanTeacher(student, dtype="student"), MeanTeacher(student)
    narrow.update()
    with pytest.warns(UserWarning, match="the stored teacher is torch.bfloat16"):
        wide.load_state_dict(narrow.state_dict())
    wide.update()
    module = nn.Linear(2, 2).to(torch.bfloat16)
    with pytest.warns(UserWarning, match="small updates are lost"):
        in_place = MeanTeacher(student, module)
    in_place.update()
    module.float()
    for teacher in (narrow, wide, in_place):
        assert metadata(teacher.save_snapshot(tmp_path, teacher.num_steps))["response"] is None


def test_a_reconstruction_averages_all_that_was_followed(tmp_path: Path) -> None:
    """Also parameters that are called as buffers elsewhere, and in a student that has no buffer."""
    student = nn.Module()
    student.weight_u, student.running_mean = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))
    teacher = MeanTeacher(student, snapshots=Snapshots(tmp_path, every=4))
    for step in range(1, 13):
        move(student, step)
        teacher.update()
        if step % 4 == 0:
            save_file(student.state_dict(), tmp_path / f"step_{step}.safetensors")
    plan = ckpt_ema.plan_reconstruction(tmp_path, half_life=4)
    assert {tensor.action for tensor in plan.tensors} == {"average"}


def test_a_damaged_state_changes_nothing(tmp_path: Path) -> None:
    """Of the tracks, too, the last part that is read may be wrong."""
    student = nn.Linear(2, 2)
    teachers = [MeanTeacher(student, snapshots=Snapshots(tmp_path / str(k), every=100)) for k in (1, 2)]
    for teacher in teachers:
        teacher.update()
    state = teachers[0].state_dict()
    move(student, 0)
    teachers[1].update()
    before = {name: tensor.clone() for name, tensor in teachers[1].tensors().items()}
    for damage in (
        {"spacing": "many"},
        {"measured": [(1,)]},
        {"sample": None},
        {"squared_norm": 1.0, "sampled_at": None},
    ):
        snapshots = {**state["snapshots"], "increments": {**state["snapshots"]["increments"], **damage}}
        with pytest.raises(CkptEmaError, match="tracks' state is damaged"):
            teachers[1].load_state_dict({**state, "snapshots": snapshots})
        assert teachers[1].num_steps == 2
        assert_same_bits(teachers[1].tensors(), before)


def test_a_state_file_belongs_to_one_student(tmp_path: Path) -> None:
    """A change of a single number anywhere is another student."""
    student = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(3, 2, dtype=torch.complex64), nn.Linear(2, 2).half())
    write_state(tmp_path / "state.safetensors", MeanTeacher(student[0]).state_dict(), student)
    read_state(tmp_path / "state.safetensors", copy.deepcopy(student))
    for parameter in student.parameters():
        other = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        with pytest.raises(CkptEmaError, match="the teacher of another student"):
            read_state(tmp_path / "state.safetensors", student)
        with torch.no_grad():
            parameter.copy_(other)
    read_state(tmp_path / "state.safetensors", student)


def test_spoilt_running_statistics_are_never_written(tmp_path: Path) -> None:
    """One overflowing batch spoils running statistics, though its step is skipped; masks and placeholders are none."""
    student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    student.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    student.register_buffer("mean_loss", torch.tensor(torch.nan))
    teacher = MeanTeacher(student, on_nonfinite="raise")
    teacher.update()
    assert load_file(teacher.save(tmp_path / "teacher.safetensors"))["mask"][1] == -torch.inf
    student(torch.full((2, 2), torch.inf))
    with pytest.raises(CkptEmaError, match=r"`1\.running_.*` of the student holds a NaN"):
        teacher.save(tmp_path / "teacher.safetensors")
    assert not load_file(tmp_path / "teacher.safetensors")["1.running_mean"].isnan().any()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_buffer_is_an_error_with_its_name(tmp_path: Path, layout: torch.layout) -> None:
    """A safetensors file has no place for it."""
    student = nn.Linear(2, 2)
    student.register_buffer("graph", torch.eye(3).to_sparse(layout=layout))
    teacher = MeanTeacher(student)
    teacher.update()
    with pytest.raises(CkptEmaError, match="`graph` is " + re.escape(str(layout))):
        teacher.save(tmp_path / "teacher.safetensors")


def test_hints_of_the_library_are_in_its_words(tmp_path: Path) -> None:
    """No option of the command where there is no command."""
    teacher = MeanTeacher(nn.Linear(2, 2))
    teacher.update()
    with pytest.raises(CkptEmaError) as caught:
        teacher.save(tmp_path / "missing" / "teacher.safetensors")
    assert caught.value.hint == "create the folder first, or pass another path"


class Odd(torch.nn.Module):
    """A student with one plain parameter, and one odd tensor."""

    def __init__(self, odd: torch.Tensor, *, is_parameter: bool) -> None:
        super().__init__()
        self.plain = torch.nn.Parameter(torch.ones(2))
        if is_parameter:
            self.odd = torch.nn.Parameter(odd, requires_grad=False)
        else:
            self.register_buffer("odd", odd)


ODD_TENSORS = {
    "torch.sparse_coo": lambda: torch.eye(3).to_sparse(),
    "torch.sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "a nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "an MKL-DNN tensor": lambda: torch.ones(3, 3).to_mkldnn(),
    "quantised (torch.qint8)": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR).*:UserWarning")
def test_a_tensor_that_is_no_plain_array_is_told_when_the_teacher_is_made(kind: str) -> None:
    """As a parameter it is refused by name; as a buffer, which an update leaves alone, it is warned of."""
    odd = ODD_TENSORS[kind]()
    with pytest.raises(CkptEmaError, match=rf"`odd` is {re.escape(kind)}, which cannot be averaged"):
        MeanTeacher(Odd(odd, is_parameter=True))
    with pytest.warns(UserWarning, match=rf"`odd` is {re.escape(kind)}.*persistent=False"):
        teacher = MeanTeacher(Odd(odd, is_parameter=False))
    assert teacher.update()
