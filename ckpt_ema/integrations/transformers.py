"""Transformers: a mean teacher as a callback, `Trainer(callbacks=[MeanTeacherCallback(momentum=0.001)])`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ckpt_ema.online.mean_teacher import MeanTeacher
from ckpt_ema.online.state_file import read_state, write_state
from ckpt_ema.teacher_folder import folder_to_fill

STATE_NAME = "mean_teacher.safetensors"


class MeanTeacherCallback(TrainerCallback):
    """Follows the model with a `ckpt_ema.MeanTeacher` after every optimizer step.

    Every `checkpoint-N/` gets a folder `teacher` that `from_pretrained` loads, and the file `mean_teacher.safetensors`
    from which a resumed training goes on. Options are MeanTeacher's; `teacher` is there once training has begun.
    """

    def __init__(self, momentum: float | None = None, interval: int = 1, **options: Any) -> None:
        self.options = {"momentum": momentum, "interval": interval, **options}
        self.teacher: MeanTeacher | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Start, or go on from the checkpoint that training resumes from."""
        self.teacher = MeanTeacher(model, **self.options)
        if state.global_step:
            path = next((path for path in _state_files(args, state) if path.is_file()), None)
            if path is None:
                warnings.warn(
                    f"no `{STATE_NAME}` in the checkpoint of step {state.global_step}: the teacher begins anew with a"
                    " copy of the student",
                    stacklevel=2,
                )
            else:
                self.teacher.load_state_dict(read_state(path))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Update; the Trainer counts optimizer steps here, not accumulated batches."""
        assert self.teacher is not None
        self.teacher.update()

    def on_save(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **_: Any
    ) -> None:
        """Put the teacher into the checkpoint's folder, which is complete by now."""
        if self.teacher is None or not state.is_world_process_zero:
            return
        folder = _folder_of(args, state)
        write_state(folder / STATE_NAME, self.teacher.state_dict())
        with folder_to_fill(folder / "teacher") as filled:
            if processing_class is not None:
                processing_class.save_pretrained(filled)
            # By the model itself: it knows its configuration, and under which names its weights are loaded again.
            with self.teacher.swapped_into(model):
                model.save_pretrained(filled)


def _folder_of(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _state_files(args: Any, state: Any) -> Iterator[Path]:
    if isinstance(args.resume_from_checkpoint, str):
        yield Path(args.resume_from_checkpoint) / STATE_NAME
    yield _folder_of(args, state) / STATE_NAME
