"""Lightning: a mean teacher as a callback, `Trainer(callbacks=[MeanTeacherCallback(momentum=0.001)])`."""

from __future__ import annotations

import contextlib
from typing import Any

from lightning.pytorch import Callback

from ckpt_ema.errors import MisuseError, warn
from ckpt_ema.online.mean_teacher import MeanTeacher
from ckpt_ema.online.settings import check_settings
from ckpt_ema.online.tracking import gather_on_first_rank


class MeanTeacherCallback(Callback):
    """Follows the module with a `ckpt_ema.MeanTeacher`, and validates, tests and predicts with the teacher's numbers.

    An update comes after every batch in which Lightning counts an optimizer's step, also one that a GradScaler
    skips. The teacher's state travels in the checkpoints, whose `state_dict` stays the student's; `teacher` is the
    MeanTeacher, from the start of training on, in the process that trains. `validate=False` leaves all that to the
    student; so is, with a warning, what is no part of this training: a module that was not followed, a checkpoint
    without a teacher. Further options are MeanTeacher's.
    """

    def __init__(
        self, momentum: float | None = None, interval: int = 1, *, validate: bool = True, **options: Any
    ) -> None:
        self.options = {"momentum": momentum, "interval": interval, **options}
        """What each MeanTeacher is made with."""

        check_settings(**self.options)
        self.validate = validate
        """Whether the module has the teacher's numbers where it is not trained."""

        self.teacher: MeanTeacher | None = None
        """From the start of training on, in the process that trains."""

        self._loaded_state: dict[str, Any] | None = None
        self._is_from_checkpoint = False
        self._last_step = 0
        self._swap = contextlib.ExitStack()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Of an earlier training only what is trained on keeps its teacher; a checkpoint's is loaded after this."""
        self._loaded_state, self._is_from_checkpoint = None, False
        goes_on = self._follows(pl_module) and 0 < trainer.global_step == self._last_step
        if stage == "fit" and (trainer.ckpt_path or not goes_on):
            self.teacher = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin late: by now the module lies on its device and is wrapped."""
        self._load_stored(pl_module)
        if self.teacher is None:
            if trainer.global_step:
                warn(
                    f"training goes on from step {trainer.global_step} without a teacher's state: the teacher begins"
                    " anew with a copy of the student"
                )
            self.teacher = MeanTeacher(pl_module, **self.options)
            self.teacher.num_steps = trainer.global_step
        self._last_step = trainer.global_step

    def _follows(self, pl_module: Any) -> bool:
        return self.teacher is not None and self.teacher.student is pl_module

    def _load_stored(self, pl_module: Any) -> None:
        if self._loaded_state is not None:
            self.teacher = MeanTeacher(pl_module, **self.options)
            self.teacher.load_state_dict(self._loaded_state)
            self._loaded_state, self._is_from_checkpoint, self._last_step = None, True, -1

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Update where an optimizer stepped; accumulated batches do not."""
        assert self.teacher is not None
        if trainer.global_step != self._last_step:
            if trainer.global_step > self._last_step + 1 and self.options.get("snapshots") is not None:
                raise MisuseError(
                    "snapshots count batches, and this training's checkpoints several optimizer steps in each",
                    hint="omit `snapshots`: no reconstruction could tell which student belongs to which",
                )
            self._last_step = trainer.global_step
            self.teacher.update()

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the teacher in, that of the checkpoint where one was loaded."""
        self._load_stored(pl_module)
        if not self.validate:
            return
        if self.teacher is None:
            if trainer.state.fn != "fit":
                warn(
                    "the module is evaluated as it is, without the mean teacher: there is none in this process, and no"
                    " checkpoint that holds one was given"
                )
            return
        lacks_teacher = trainer.state.fn != "fit" and trainer.ckpt_path and not self._is_from_checkpoint
        if lacks_teacher or not self._follows(pl_module):
            why = "its checkpoint holds no teacher" if lacks_teacher else "it is not the module that was trained"
            warn(f"the module is evaluated as it is, without the mean teacher: {why}")
        else:
            self._swap.enter_context(self.teacher.swapped_into(pl_module))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the student back: after the module's own end of the epoch, before ModelCheckpoint saves."""
        self._swap.close()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, *_: Any) -> None:
        """Take the student back: a checkpoint may be saved on the way out."""
        self._swap.close()

    def state_dict(self) -> dict[str, Any]:
        """The teacher's state; of a sharded one the first rank has all, in host memory, since its state is saved."""
        if self.teacher is None:
            return {}
        state = self.teacher.state_dict()
        return {**state, "tensors": gather_on_first_rank(state["tensors"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until the module lies where it is to be used."""
        self._loaded_state = state_dict or None
