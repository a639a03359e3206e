"""What each rank of the DeepSpeed tests does: train with each stage of ZeRO and save; started by torchrun."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from rank_process import run_as_rank
from torch import nn

STEPS = (2, 4, 6)


class Model(nn.Module):
    """Buffers, a tied weight, a frozen one, and sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 7)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(3, 5), requires_grad=False)
        self.register_buffer("moved", torch.zeros(6))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """A loss."""
        hidden = self.embedding(tokens)
        self.moved.mul_(0.9).add_(hidden.detach().mean(0).to(self.moved.dtype))
        self.count += 1
        return self.inner(hidden).float().square().mean() + self.head(hidden).float().square().mean()


def main(folder: Path) -> None:
    """Runs `zero-0` to `zero-3`."""
    deepspeed.init_distributed("gloo")
    for stage in range(4):
        model = Model()
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=model.parameters(),
            config={
                "train_micro_batch_size_per_gpu": 4,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "torch_adam": True}},
                "bf16": {"enabled": True},
            },
        )
        for step in range(1, STEPS[-1] + 1):
            generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
            engine.backward(engine(torch.randint(0, 11, (4,), generator=generator)))
            engine.step()
            if step in STEPS:
                engine.save_checkpoint(str(folder / f"zero-{stage}"))
    dist.barrier()


if __name__ == "__main__":
    run_as_rank(main)
