"""What each rank of the distributed tests of the online teacher does; started by torchrun, fails by its exit code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_process import run_as_rank
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ckpt_ema import CkptEmaError, MeanTeacher


def make_model() -> nn.Sequential:
    """The same on every rank; 7 rows over 2 ranks make shards of different sizes, 1 row an empty one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))


def step(models: list[nn.Module], seed: int) -> None:
    """One step of plain SGD on the same batch."""
    batch = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
    for model in models:
        # After an evaluation FSDP2 still shows whole parameters, whose gradients are not the ones it accumulates.
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        model.zero_grad()
        (model(batch) - 1).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)


def main(folder: Path) -> None:
    """Sharded, replicated and bare students have one teacher."""
    dist.init_process_group("gloo")
    sharded, bare = make_model(), make_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    replicated = DistributedDataParallel(make_model())
    teachers = [MeanTeacher(model, momentum=0.1) for model in (sharded, replicated, bare)]
    for seed in range(4):
        step([sharded, replicated, bare], seed)
        for teacher in teachers:
            teacher.update()
    expected = teachers[2].tensors()
    for name, tensor in teachers[1].tensors().items():
        assert torch.equal(tensor, expected[name]), name
    for name, tensor in teachers[0].tensors().items():
        assert torch.equal(tensor.full_tensor(), expected[name]), name
        assert tensor.to_local().shape == sharded.get_parameter(name).to_local().shape, name

    dcp.save({"teacher": teachers[0].state_dict()}, checkpoint_id=folder / "state")
    resumed = MeanTeacher(sharded, momentum=0.1, device="cpu")
    state = {"teacher": resumed.state_dict()}
    dcp.load(state, checkpoint_id=folder / "state")
    resumed.load_state_dict(state["teacher"])
    assert (resumed.num_steps, resumed.num_updates) == (4, 4)
    for name, tensor in resumed.tensors().items():
        assert torch.equal(tensor.full_tensor(), expected[name]), name

    before = {name: parameter.full_tensor() for name, parameter in sharded.named_parameters()}
    with resumed.swapped_into(sharded):
        for name, parameter in sharded.named_parameters():
            assert torch.equal(parameter.full_tensor(), expected[name]), name
    for name, parameter in sharded.named_parameters():
        assert torch.equal(parameter.full_tensor(), before[name]), name

    with pytest.raises(CkptEmaError, match="sharded over ranks"):
        resumed.save(folder / "teacher.safetensors")
    if importlib.util.find_spec("transformers"):
        from ckpt_ema.integrations.transformers import MeanTeacherCallback

        with pytest.raises(CkptEmaError, match="sharded model's teacher cannot be saved by the Trainer"):
            MeanTeacherCallback().on_train_begin(None, None, None, model=sharded)
    check_forwards_inside_a_swap(mesh)
    check_that_converted_shards_are_told(mesh)
    check_all_ranks_skip_together(mesh)
    check_a_sharded_teacher_module(mesh)
    # Every rank has all of it, and nothing by its shape tells whole parameters from shards.
    check_a_sharded_teacher_module(init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("all", "one")))
    dist.barrier()
    dist.destroy_process_group()


def check_forwards_inside_a_swap(mesh: DeviceMesh) -> None:
    """A root that keeps whole parameters after a forward evaluates the teacher inside, the student afterwards."""
    model, bare = make_model(), make_model()
    fully_shard(model, mesh=mesh)
    teacher, reference = MeanTeacher(model, momentum=0.1), MeanTeacher(bare, momentum=0.1)
    batch = torch.randn(3, 5, generator=torch.Generator().manual_seed(7))
    for seed in range(3):
        step([model, bare], seed)
        with torch.no_grad():
            model(batch)
        teacher.update()
        reference.update()
        for _ in range(2):
            with teacher.swapped_into(model), reference.swapped_into(bare), torch.no_grad():
                assert torch.equal(model(batch), bare(batch))
            with torch.no_grad():
                assert torch.equal(model(batch), bare(batch))
    for name, tensor in teacher.tensors().items():
        assert torch.equal(tensor.full_tensor(), reference.tensors()[name]), name


def check_that_converted_shards_are_told(mesh: DeviceMesh) -> None:
    """They do not come back from a swap, unlike whole tensors."""
    model = make_model()
    fully_shard(model, mesh=mesh)
    teacher = MeanTeacher(model)
    with pytest.raises(CkptEmaError, match="is sharded and was converted"), teacher.swapped_into() as held:
        held.half()


def check_all_ranks_skip_together(mesh: DeviceMesh) -> None:
    """A NaN in one rank's part is every rank's."""
    model = make_model()
    fully_shard(model, mesh=mesh)
    lenient = MeanTeacher(model, on_nonfinite="skip")
    careful = MeanTeacher(model, on_nonfinite="raise", device="cpu")
    if dist.get_rank() == 0:
        with torch.no_grad():
            model.get_parameter("0.weight").to_local()[0, 0] = float("nan")
    assert not lenient.update()
    with pytest.raises(CkptEmaError, match="at step 1; the teacher is unchanged"):
        careful.update()


def check_a_sharded_teacher_module(mesh: DeviceMesh) -> None:
    """Its root keeps whole parameters after a forward, and nothing of a backward makes it give them up."""
    models = [make_model() for _ in range(4)]
    student, module, bare, bare_module = models
    for model in (student, module):
        fully_shard(model, mesh=mesh)
    batch = torch.randn(3, 5, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        module(batch)
    teacher, reference = MeanTeacher(student, module, momentum=0.1), MeanTeacher(bare, bare_module, momentum=0.1)
    calls = (MeanTeacher.update, MeanTeacher.tensors, MeanTeacher.stalled_fraction, MeanTeacher.check_finite)
    for seed in range(3):
        step([student, bare], seed)
        for call in (*calls, MeanTeacher.copy_student, MeanTeacher.update):
            for each in (teacher, reference):
                call(each)
            with torch.no_grad():
                assert torch.equal(module(batch), bare_module(batch)), call
        with teacher.swapped_into(), reference.swapped_into(), torch.no_grad():
            assert torch.equal(student(batch), bare(batch))
        with torch.no_grad():
            assert torch.equal(module(batch), bare_module(batch))
    for name, tensor in teacher.tensors().items():
        assert torch.equal(tensor.full_tensor(), reference.tensors()[name]), name


if __name__ == "__main__":
    run_as_rank(main)
