"""Transformers: a mean teacher as a callback, `Trainer(callbacks=[MeanTeacherCallback(momentum=0.001)])`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ckpt_ema.errors import CkptEmaError, MisuseError, warn
from ckpt_ema.online.mean_teacher import MeanTeacher
from ckpt_ema.online.settings import check_settings
from ckpt_ema.online.state_file import read_state, write_state
from ckpt_ema.online.tracking import is_sharded
from ckpt_ema.output.teacher_folder import folder_to_fill

STATE_NAME = "mean_teacher.safetensors"


class MeanTeacherCallback(TrainerCallback):
    """Follows the model with a `ckpt_ema.MeanTeacher` after every optimizer step.

    Every `checkpoint-N/` gets a folder `teacher` that `from_pretrained` loads (adapters by PEFT from `teacher/adapter`;
    of another module than Transformers' own its state dict, as the Trainer saves it), and the file
    `mean_teacher.safetensors` from which a resumed training goes on. The Trainer's own evaluation is the student's.
    Options are MeanTeacher's; `teacher` is there once training has begun.
    """

    def __init__(
        self,
        momentum: float | None = None,
        interval: int = 1,
        *,
        resume_from: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        """`resume_from` is the checkpoint that training resumes from, where that lies outside of `output_dir`."""
        self.options = {"momentum": momentum, "interval": interval, **options}
        """What each MeanTeacher is made with."""

        check_settings(**self.options)
        self.resume_from = resume_from
        """The checkpoint that training resumes from; None for the one in `output_dir`."""

        self.teacher: MeanTeacher | None = None
        """From the start of training on."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Start, or go on from the checkpoint that training resumes from.

        The Trainer does not tell which that is, so the student that a teacher belongs to is compared with the one that
        was loaded. Raises CkptEmaError where they differ, and for a sharded model; MisuseError beside another of these.
        """
        if any(is_sharded(parameter) for parameter in model.parameters()):
            raise CkptEmaError(
                "a sharded model's teacher cannot be saved by the Trainer's first process",
                hint="follow it with a ckpt_ema.MeanTeacher, and save its state_dict with torch.distributed.checkpoint",
            )
        if "has_mean_teacher" in vars(state):
            raise MisuseError(
                "two MeanTeacherCallbacks would write the same files",
                hint="follow the other with a ckpt_ema.MeanTeacher",
            )
        state.has_mean_teacher = True
        self.teacher = MeanTeacher(model, **self.options)
        if not state.global_step:
            return
        folder = _folder_of(args, state) if self.resume_from is None else Path(self.resume_from)
        path = folder / STATE_NAME
        if not path.is_file():
            warn(
                f"`{folder}` holds no `{STATE_NAME}`: the teacher begins anew with a copy of the student; where"
                " training resumes from another folder, pass MeanTeacherCallback(resume_from=...)"
            )
            self.teacher.num_steps = state.global_step
            return
        self.teacher.load_state_dict(read_state(path, model))

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
        self.teacher.check_finite()
        folder = _folder_of(args, state)
        write_state(folder / STATE_NAME, self.teacher.state_dict(), model)
        # One level down the Trainer does not take the teacher for a second adapter of the student's.
        where = folder / "teacher" / "adapter" if hasattr(model, "peft_config") else folder / "teacher"
        where.parent.mkdir(exist_ok=True)
        with folder_to_fill(where) as filled:
            if processing_class is not None:
                processing_class.save_pretrained(filled)
            if not hasattr(model, "save_pretrained"):  # any module, whose state dict is what the Trainer saves
                self.teacher.save(filled / "model.safetensors", step=state.global_step)
                return
            # By the model itself: it knows its configuration, and under which names its weights are loaded again.
            with self.teacher.swapped_into(model):
                model.save_pretrained(filled)


def _folder_of(args: Any, state: Any) -> Path:
    """Where the Trainer saves now, or loads from where nothing else is said."""
    name = f"checkpoint-{state.global_step}"
    if state.is_hyper_param_search:  # each trial has a folder of its own, and the newest is the one just saved
        trials = (path for path in Path(args.output_dir).rglob(name) if not (path / STATE_NAME).exists())
        return max(trials, key=lambda path: path.stat().st_mtime_ns, default=Path(args.output_dir) / name)
    return Path(args.output_dir) / name
