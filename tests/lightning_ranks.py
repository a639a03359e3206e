"""What each rank of Lightning's test with FSDP2 does; started by torchrun, fails by its exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from rank_process import run_as_rank
from torch import nn
from torch.distributed.fsdp import fully_shard

from ckpt_ema.integrations.lightning import MeanTeacherCallback
from tests.conftest import StateDict, assert_same_bits, fit_lightning, hook_teacher

MOMENTUM = 0.1


def whole(tensors: Any) -> StateDict:
    """All of each sharded tensor, copied."""
    return {name: tensor.full_tensor().detach().clone() for name, tensor in tensors}


class Sharded(lightning.LightningModule):
    """7 rows over 2 ranks make shards of different sizes, 1 row an empty one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))
        self.seen: list[StateDict] = []
        self.validated: list[StateDict] = []

    def configure_model(self) -> None:
        """Shard it, once a Trainer has a mesh for it."""
        for part in (self.net[0], self.net[2], self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """One batch, another on each rank."""
        return (self.net(batch[0]) - 1).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        """Keep the student."""
        self.seen.append(whole(self.named_parameters()))

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        """Keep what is validated."""
        self.validated.append(whole(self.named_parameters()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """With state: Lightning cannot load an optimizer that has none."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


def fit(root: Path, callbacks: list[Any], *, steps: int, is_distributed: bool, path: Path | None = None) -> Sharded:
    """Train over both ranks."""
    module = Sharded()
    samples = torch.utils.data.TensorDataset(torch.randn(32, 5, generator=torch.Generator().manual_seed(1)))
    loader = torch.utils.data.DataLoader(samples, batch_size=2)
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=is_distributed
    )
    fit_lightning(module, loader, root, callbacks, steps=steps, path=path, devices=2, strategy=strategy)
    return module


def main(folder: Path) -> None:
    """Every rank goes on with its own part of the teacher, from a checkpoint in one file and from one in many."""
    for is_distributed in (False, True):
        root = folder / str(is_distributed)
        saver = ModelCheckpoint(root, save_top_k=-1, every_n_train_steps=4, filename="{step}")
        first = fit(root, [MeanTeacherCallback(momentum=MOMENTUM), saver], steps=4, is_distributed=is_distributed)
        assert_same_bits(first.validated[1], hook_teacher(first.seen, MOMENTUM))
        (path,) = root.glob("*.ckpt")
        callback = MeanTeacherCallback(momentum=MOMENTUM)
        second = fit(root, [callback], steps=6, is_distributed=is_distributed, path=path)
        assert callback.teacher is not None
        assert callback.teacher.num_updates == 6
        # Of many processes on a machine each would have the whole teacher in host memory.
        assert bool(callback.state_dict()["tensors"]) == (torch.distributed.get_rank() == 0)
        expected = hook_teacher(first.seen + second.seen, MOMENTUM)
        assert_same_bits(whole(callback.teacher.tensors().items()), expected)
        assert_same_bits(second.validated[-1], expected)


if __name__ == "__main__":
    run_as_rank(main)
