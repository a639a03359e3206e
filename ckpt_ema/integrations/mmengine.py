"""MMEngine: MMDetection's MeanTeacherHook by its own configuration, `dict(type="MeanTeacherHook", momentum=0.001)`.

Importing this module registers the hook in MMEngine's HOOKS:
`custom_imports = dict(imports=["ckpt_ema.integrations.mmengine"])`. Where MMDetection is imported too, its hook has the
shorter way; `type="mmengine.MeanTeacherHook"` is this one.
"""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from ckpt_ema.errors import CkptEmaError, MisuseError
from ckpt_ema.online.mean_teacher import MeanTeacher
from ckpt_ema.online.settings import check_settings
from ckpt_ema.online.snapshots import Snapshots

STATE_KEY = "mean_teacher"


@HOOKS.register_module()
class MeanTeacherHook(Hook):
    """After every `interval`-th iteration, `teacher = (1 - momentum) * teacher + momentum * student`.

    The runner's model has a `student` and a `teacher`. At iteration 0 the teacher becomes a copy of the student, unless
    the checkpoint that was loaded brought a teacher of its own. The counters travel in the checkpoints. `skip_buffer`
    and `skip_buffers` mean the same; further options are those of `ckpt_ema.MeanTeacher`, `snapshots` as a dict of
    what `ckpt_ema.Snapshots` takes. Raises MisuseError for options that make no sense, and CkptEmaError for a model
    without the two.
    """

    def __init__(
        self,
        momentum: float | None = None,
        interval: int = 1,
        skip_buffer: bool | None = None,
        skip_buffers: bool | None = None,
        **options: Any,
    ) -> None:
        if skip_buffer is not None and skip_buffers is not None and skip_buffer != skip_buffers:
            raise MisuseError(
                f"skip_buffer is {skip_buffer} and skip_buffers {skip_buffers}", hint="pass one of the two"
            )
        given = skip_buffer if skip_buffers is None else skip_buffers
        self.options = {
            "momentum": momentum,
            "interval": interval,
            "skip_buffers": True if given is None else given,
            **options,
        }
        """What each MeanTeacher is made with."""

        if options.get("device") is not None:
            raise MisuseError(
                f"device is {options['device']!r}, and this hook's teacher is the model's, where that is",
                hint="omit `device`",
            )
        if isinstance(snapshots := options.get("snapshots"), dict):  # configurations hold no objects
            self.options["snapshots"] = Snapshots(**snapshots)
        check_settings(**self.options)
        self.teacher: MeanTeacher | None = None
        """From the start of training on."""

        self._loaded_state: dict[str, Any] | None = None
        self._has_loaded_teacher = False

    def before_train(self, runner: Any) -> None:
        """Pair student and teacher; at iteration 0 copy the one to the other."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        for part in ("student", "teacher"):
            if not hasattr(model, part):
                raise CkptEmaError(
                    f"a {type(model).__name__} has no `{part}`, and MeanTeacherHook needs a model with `student` and"
                    " `teacher`",
                    hint="register this hook only for mean-teacher models; for others make a ckpt_ema.MeanTeacher",
                )
        self.teacher = MeanTeacher(model.student, model.teacher, keep_teacher=True, **self.options)
        if self._loaded_state is not None and runner.iter:
            self.teacher.load_state_dict(self._loaded_state)
        elif not runner.iter and not self._has_loaded_teacher:
            self.teacher.copy_student()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Count the runner's iterations, also those before a resume."""
        assert self.teacher is not None
        self.teacher.num_steps = runner.iter
        self.teacher.update()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Put the counters beside the model, whose state holds the teacher."""
        if self.teacher is not None:
            checkpoint[STATE_KEY] = self.teacher.state_dict()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Remember what a checkpoint brought, a resumed or a loaded one."""
        self._loaded_state = checkpoint.get(STATE_KEY)
        names = checkpoint.get("state_dict", checkpoint)
        self._has_loaded_teacher = any(
            isinstance(name, str) and name.removeprefix("module.").startswith("teacher.") for name in names
        )
