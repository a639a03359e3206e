"""What each rank of the sharded tests does: train for three steps and save in every way; started by torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_process import run_as_rank
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

STEPS = (100, 200, 300)


def make_model() -> nn.Sequential:
    """The same on every rank; rows that do not divide evenly over 4 ranks, one row that only one rank has."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 13), nn.BatchNorm1d(13), nn.Linear(13, 8), nn.Linear(8, 1))


def shard(model: nn.Module, how: str) -> None:
    """`rows`: FSDP2 over all ranks; `boxes`: tensor parallelism as well; `replicas`: FSDP2 in two groups."""
    if how == "rows":
        fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    if how == "boxes":
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    else:
        fully_shard(model, mesh=mesh)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Gradients by hand: a forward of a model that is both sharded and split needs wrapped inputs."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) * float(torch.rand((), generator=generator))
    optimizer.step()
    for buffer in model.buffers():
        buffer.add_(1)


def save(folder: Path, how: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The ways in which trainers save: nested, at the root as torchtitan does, in the background, as safetensors."""
    tensors = get_model_state_dict(model)
    rest: dict[str, Any] = {
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "train_state": {"step": step, "loss": torch.tensor(0.5)},
    }
    dcp.save({"model": tensors, **rest}, checkpoint_id=folder / how / f"step-{step}")
    if how == "rows":
        dcp.save({**tensors, **rest}, checkpoint_id=folder / "root" / f"step-{step}")
        dcp.async_save({"model": tensors}, checkpoint_id=folder / "background" / f"step-{step}").result()
        writer = HuggingFaceStorageWriter(path=str(folder / "safetensors" / f"step-{step}"), save_distributed=True)
        dcp.save(dict(tensors), storage_writer=writer)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        (folder / "whole" / how).mkdir(parents=True, exist_ok=True)
        torch.save(whole, folder / "whole" / how / f"step_{step}.pt")


def save_per_rank(folder: Path) -> None:
    """What MMEngine's strategy for FSDP saves: a file per rank with this rank's shards, or with flat parameters."""
    for how in ("shards", "flat"):
        bare = nn.Sequential(nn.Linear(6, 13), nn.Linear(13, 8)) if how == "flat" else make_model()
        model = FullyShardedDataParallel(bare, device_id=torch.device("cpu"), use_orig_params=False)
        for step in STEPS:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(step)
            kind = StateDictType.SHARDED_STATE_DICT if how == "shards" else StateDictType.LOCAL_STATE_DICT
            with FullyShardedDataParallel.state_dict_type(model, kind):
                tensors = model.state_dict()
            state = {"state_dict": tensors, "meta": {"iter": step, "mmengine_version": "0.10.7"}}
            target = folder / how / f"iter_{step}.pth"
            target.mkdir(parents=True, exist_ok=True)
            torch.save(state, target / f"rank{dist.get_rank()}.pth")
            with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
                whole = model.state_dict()
            if dist.get_rank() == 0:
                (folder / "whole" / how).mkdir(parents=True, exist_ok=True)
                torch.save(whole, folder / "whole" / how / f"step_{step}.pt")


def main(folder: Path) -> None:
    """Runs `rows`, `boxes`, `replicas`, `root`, `background`, `safetensors`, `shards`; what they hold in `whole`."""
    dist.init_process_group("gloo")
    for how in ("rows", "boxes", "replicas"):
        model = make_model()
        shard(model, how)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for step in STEPS:
            train_step(model, optimizer, step)
            save(folder, how, step, model, optimizer)
    save_per_rank(folder)
    dist.barrier()


if __name__ == "__main__":
    run_as_rank(main)
