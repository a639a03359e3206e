"""A teacher's numbers in a module for a while: put in tensor by tensor, and taken out whatever happens."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch

from ckpt_ema.online.rule import Exchange, blocks_of

SWAPPED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
"""Modules that hold a teacher's numbers for now."""


def swap_in(tensor: torch.Tensor, teacher: torch.Tensor, undo: list[Callable[[], object]], *, exchanges: bool) -> None:
    """Put `teacher` into `tensor`, and on the list how to undo it, before anything has changed."""
    if exchanges and tensor.dtype is teacher.dtype and tensor.device == teacher.device:
        exchange = Exchange(list(blocks_of(tensor, teacher)))
        undo.append(exchange.undo)
        exchange.run()
    else:
        # Kept where the teacher is: a teacher in host memory is there because the student's device is full.
        undo.append(functools.partial(tensor.copy_, tensor.to(teacher.device, copy=True)))
        tensor.copy_(teacher)


def call_all(undo: list[Callable[[], object]]) -> BaseException | None:
    """Call from the last to the first, whatever is raised meanwhile; what was raised first comes back."""
    failure: BaseException | None = None
    while undo:
        try:
            while undo:
                undo[-1]()
                undo.pop()
        except Exception as error:
            failure = failure or error
            undo.pop()
        except BaseException as error:  # Ctrl-C: each of them can be called again
            failure = failure or error
    return failure
