"""Lightning: a mean teacher as a callback, `Trainer(callbacks=[MeanTeacherCallback(momentum=0.001)])`."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from lightning.pytorch import Callback

from ckpt_ema.online.mean_teacher import MeanTeacher
from ckpt_ema.online.settings import check_settings
from ckpt_ema.online.tracking import is_sharded, whole_of


class MeanTeacherCallback(Callback):
    """Follows the module with a `ckpt_ema.MeanTeacher`, and validates and tests with the teacher's numbers.

    An update comes after every batch that stepped an optimizer. The teacher's state travels in the checkpoints, whose
    `state_dict` stays the student's; `teacher` is the MeanTeacher, from the start of training on, in the process that
    trains. `validate=False` leaves validation and tests to the student. Further options are MeanTeacher's.
    """

    def __init__(
        self, momentum: float | None = None, interval: int = 1, *, validate: bool = True, **options: Any
    ) -> None:
        self.options = {"momentum": momentum, "interval": interval, **options}
        check_settings(**self.options)
        self.validate = validate
        self.teacher: MeanTeacher | None = None
        self._loaded_state: dict[str, Any] | None = None
        self._last_step = 0
        self._swap = contextlib.ExitStack()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """A new training has a new teacher, unless a checkpoint brings one, which is loaded after this."""
        if stage == "fit":
            self.teacher = self._loaded_state = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin late: by now the module lies on its device and is wrapped."""
        self._take_loaded(pl_module)
        if self.teacher is None:
            self.teacher = MeanTeacher(pl_module, **self.options)
            self.teacher.num_steps = trainer.global_step
        self._last_step = trainer.global_step

    def _take_loaded(self, pl_module: Any) -> None:
        if self._loaded_state is not None:
            self.teacher = MeanTeacher(pl_module, **self.options)
            self.teacher.load_state_dict(self._loaded_state)
            self._loaded_state = None

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Update where an optimizer stepped; accumulated batches do not."""
        assert self.teacher is not None
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.teacher.update()

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the teacher in, that of the checkpoint where one was loaded."""
        self._take_loaded(pl_module)
        if self.validate and self.teacher is not None:
            self._swap.enter_context(self.teacher.swapped_into(pl_module))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the student back: behind the module's own end of the epoch, before ModelCheckpoint saves."""
        self._swap.close()

    on_test_epoch_start = on_validation_epoch_start
    on_test_end = on_validation_end

    def on_exception(self, *_: Any) -> None:
        """Take the student back: a checkpoint may be saved on the way out."""
        self._swap.close()

    def state_dict(self) -> dict[str, Any]:
        """The teacher's state; of a sharded one the first rank has all, in host memory, since its state is saved."""
        if self.teacher is None:
            return {}
        state = self.teacher.state_dict()
        tensors = state["tensors"]
        if any(map(is_sharded, tensors.values())):
            is_first = torch.distributed.get_rank() == 0
            wholes = ((name, whole_of(tensor)) for name, tensor in tensors.items())
            # Every rank takes part in each; what the others get is gone at once.
            state["tensors"] = {name: whole for name, whole in wholes if is_first}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until the module lies where it is to be used."""
        self._loaded_state = state_dict or None
