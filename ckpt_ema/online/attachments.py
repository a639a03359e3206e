"""Optimizers that step: what is to follow them in, an update after each of their steps out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from ckpt_ema.errors import MisuseError, warn


class Updated(Protocol):
    """What is updated after an optimizer's steps: a teacher."""

    def update(self) -> bool:
        """Called after each step."""


class Attachments:
    """The optimizers that one teacher is attached to."""

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []
        """Of the hooks that update this teacher."""

        self._has_warned = False
        """Whether somebody was told what an `update` beside them does."""

        self._is_updating = False
        """Whether one of the hooks calls `update` now."""

    def add(
        self, optimizer: torch.optim.Optimizer, teacher: Updated, followed: Iterable[torch.Tensor]
    ) -> RemovableHandle:
        """Let `optimizer` update `teacher`, which follows the tensors `followed`; gives back the hook's handle.

        Warns where the optimizer has none of these, or is not the only one. Raises MisuseError for what is no
        optimizer, and where it updates this teacher already.
        """
        inner = _with_hooks(optimizer)
        hooks = inner._optimizer_step_post_hooks.values()
        if any(isinstance(hook, _Hook) and hook.teacher is teacher for hook in hooks):
            raise MisuseError(
                "the teacher is attached to this optimizer already, and would count each step twice",
                hint="call `remove()` of what the first `attach` returned, or omit this one",
            )
        own = set(map(id, followed))
        if not any(id(tensor) in own for group in inner.param_groups for tensor in group["params"]):
            warn(
                "the optimizer has none of the parameters that this teacher follows; where it steps copies of them, all"
                " is well"
            )
        if any(map(_is_registered, self.handles)):
            warn(
                "the teacher is attached to another optimizer as well, and counts each step of both: attach it to the"
                " one that steps last"
            )
        handle: RemovableHandle = inner.register_step_post_hook(_Hook(teacher, self))
        self.handles = [*filter(_is_registered, self.handles), handle]
        return handle

    def warn_of_update_beside(self) -> None:
        """Warn, once, where an `update` is none of the hooks' while there are some."""
        if not (self._is_updating or self._has_warned) and any(map(_is_registered, self.handles)):
            self._has_warned = True
            warn(
                "the teacher is attached to an optimizer, which calls `update` after each of its steps: with this call"
                " beside them a step is counted twice; omit one of the two"
            )


class _Hook:
    """What an optimizer calls after its step."""

    def __init__(self, teacher: Updated, attachments: Attachments) -> None:
        self.teacher = teacher
        """Whose `update` is called."""

        self._attachments = attachments

    def __call__(self, *_: object) -> None:
        self._attachments._is_updating = True
        try:
            self.teacher.update()
        finally:
            self._attachments._is_updating = False


def _with_hooks(optimizer: Any) -> Any:
    """The optimizer that calls hooks after its steps: accelerate's wrapper is one by its class alone.

    Others, such as DeepSpeed's, may step the one inside several times, or before the student is whole.
    """
    inner = optimizer
    while isinstance(inner, torch.optim.Optimizer) and not hasattr(inner, "_optimizer_step_post_hooks"):
        inner = getattr(inner, "optimizer", None)
    if not hasattr(inner, "_optimizer_step_post_hooks"):
        raise MisuseError(
            f"a {type(optimizer).__name__} calls nothing after its steps", hint="call `teacher.update()` after each"
        )
    return inner


def _is_registered(handle: RemovableHandle) -> bool:
    return handle.id in (handle.hooks_dict_ref() or ())
