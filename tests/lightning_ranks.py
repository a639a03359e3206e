"""What each rank of Lightning's test with FSDP2 does; started by torchrun, fails by its exit code."""

from __future__ import annotations

import logging
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

MOMENTUM = 0.1

Tensors = dict[str, torch.Tensor]


def whole(tensors: Any) -> Tensors:
    """All of each sharded tensor, copied."""
    return {name: tensor.full_tensor().detach().clone() for name, tensor in tensors}


class Sharded(lightning.LightningModule):
    """7 rows over 2 ranks make shards of different sizes, 1 row an empty one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))
        self.seen: list[Tensors] = []
        self.validated: list[Tensors] = []

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
    """Train with a validation batch after every two steps."""
    module = Sharded()
    samples = torch.utils.data.TensorDataset(torch.randn(32, 5, generator=torch.Generator().manual_seed(1)))
    loader = torch.utils.data.DataLoader(samples, batch_size=2)
    trainer = lightning.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=is_distributed
        ),
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, loader, loader, ckpt_path=path)
    return module


def teacher_of(students: list[Tensors]) -> Tensors:
    """The hook's lines."""
    teacher = {name: tensor.clone() for name, tensor in students[0].items()}
    for student in students[1:]:
        for name, tensor in teacher.items():
            tensor.mul_(1 - MOMENTUM).add_(student[name], alpha=MOMENTUM)
    return teacher


def assert_equal(found: Tensors, expected: Tensors) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def main(folder: Path) -> None:
    """Every rank goes on with its own part of the teacher, from a checkpoint in one file and from one in many."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for is_distributed in (False, True):
        root = folder / str(is_distributed)
        saver = ModelCheckpoint(root, save_top_k=-1, every_n_train_steps=4, filename="{step}")
        first = fit(root, [MeanTeacherCallback(momentum=MOMENTUM), saver], steps=4, is_distributed=is_distributed)
        assert_equal(first.validated[1], teacher_of(first.seen))
        (path,) = root.glob("*.ckpt")
        callback = MeanTeacherCallback(momentum=MOMENTUM)
        second = fit(root, [callback], steps=6, is_distributed=is_distributed, path=path)
        assert callback.teacher is not None
        assert callback.teacher.num_updates == 6
        # Of many processes on a machine each would have the whole teacher in host memory.
        assert bool(callback.state_dict()["tensors"]) == (torch.distributed.get_rank() == 0)
        expected = teacher_of(first.seen + second.seen)
        assert_equal(whole(callback.teacher.tensors().items()), expected)
        assert_equal(second.validated[-1], expected)


if __name__ == "__main__":
    run_as_rank(main)
