"""Lightning: a mean teacher as a callback, `Trainer(callbacks=[MeanTeacherCallback(momentum=0.001)])`."""

from __future__ import annotations

import contextlib
from typing import Any

from lightning.pytorch import Callback

from ckpt_ema.online.mean_teacher import MeanTeacher


class MeanTeacherCallback(Callback):
    """Follows the module with a `ckpt_ema.MeanTeacher`, and validates and tests with the teacher's numbers.

    An update comes after every batch that stepped an optimizer. The teacher's state travels in the checkpoints, whose
    `state_dict` stays the student's; `teacher` is the MeanTeacher, from the first training batch on. `validate=False`
    leaves validation and tests to the student. Further options are MeanTeacher's.
    """

    def __init__(
        self, momentum: float | None = None, interval: int = 1, *, validate: bool = True, **options: Any
    ) -> None:
        self.options = {"momentum": momentum, "interval": interval, **options}
        self.validate = validate
        self.teacher: MeanTeacher | None = None
        self._loaded_state: dict[str, Any] | None = None
        self._last_step = 0
        self._swap = contextlib.ExitStack()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin late: by now the module lies on its device and is wrapped."""
        self.teacher = MeanTeacher(pl_module, **self.options)
        if self._loaded_state is not None:
            self.teacher.load_state_dict(self._loaded_state)
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Update where an optimizer stepped; accumulated batches do not."""
        assert self.teacher is not None
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.teacher.update()

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the teacher in."""
        if self.validate and self.teacher is not None:
            self._swap.enter_context(self.teacher.swapped_into(pl_module))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the student back, before anything is saved."""
        self._swap.close()

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def on_exception(self, *_: Any) -> None:
        """Take the student back: a checkpoint may be saved on the way out."""
        self._swap.close()

    def state_dict(self) -> dict[str, Any]:
        """The teacher's state."""
        return {} if self.teacher is None else self.teacher.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training starts."""
        self._loaded_state = state_dict or None
