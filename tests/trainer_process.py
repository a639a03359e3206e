"""A real Trainer that rotates its checkpoints: `python trainer_process.py RUN KEPT` keeps a copy of each in KEPT."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

SECONDS_PER_STEP = 1.2
"""A real step takes that long, and more; a follower that looks once a second must keep up."""


class Keep(TrainerCallback):
    """Copies each checkpoint's weights away, for the test to compare with."""

    def __init__(self, kept: Path) -> None:
        self._kept = kept

    def on_step_end(self, *_: Any, **__: Any) -> None:
        time.sleep(SECONDS_PER_STEP)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        source = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "model.safetensors"
        shutil.copy(source, self._kept / f"{state.global_step}.safetensors")


def main(run: Path, kept: Path) -> None:
    kept.mkdir()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=32))
    rows = [{"input_ids": (row := torch.randint(0, 64, (16,))), "labels": row} for _ in range(64)]
    arguments = TrainingArguments(
        str(run),
        max_steps=12,
        save_steps=2,
        save_total_limit=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[Keep(kept)]).train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
