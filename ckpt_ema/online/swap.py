"""A teacher's numbers in a module for a while: put in tensor by tensor, and taken out whatever happens."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence

import torch
from torch.nn.modules.batchnorm import _NormBase

from ckpt_ema.errors import CkptEmaError
from ckpt_ema.online.rule import Exchange, blocks_of
from ckpt_ema.online.tracking import Slot, is_sharded, local_part

_SWAPPED: weakref.WeakKeyDictionary[torch.nn.Module, set[object]] = weakref.WeakKeyDictionary()
"""Modules that hold another one's numbers for now, and the swaps they are in."""


def mark_swapped(roots: Sequence[torch.nn.Module], undo: list[Callable[[], object]]) -> None:
    """Take these modules and all within for swapped; put on the list how to end that, before anything has changed."""
    swap = object()
    marked = [part for root in roots for part in root.modules()]

    def unmark() -> None:
        for part in marked:
            swaps = _SWAPPED.get(part, set())
            swaps.discard(swap)
            if not swaps:
                _SWAPPED.pop(part, None)

    undo.append(unmark)
    for part in marked:
        _SWAPPED.setdefault(part, set()).add(swap)


def any_swapped(root: torch.nn.Module) -> bool:
    """Whether a module or one within it holds another one's numbers."""
    return bool(_SWAPPED) and any(_SWAPPED.get(part) for part in root.modules())


class Swap:
    """One place of a module that holds a teacher's numbers for a while."""

    def __init__(self, slot: Slot) -> None:
        self.name = slot.name
        self._slot = slot
        self._held = [(table, key, table[key]) for table, key in slot.places]
        gradients = ((tensor, tensor.grad) for _, _, tensor in self._held if tensor is not None)
        self._gradients = [(tensor, grad, grad.data) for tensor, grad in gradients if grad is not None]
        # Detached, not under torch.no_grad: an interrupt on the way into or out of that would leave training without
        # gradients.
        self._local = slot.local.detach()
        self._is_sharded = is_sharded(slot.tensor)
        self._is_exchanged = False
        self._version: int | None = None
        self.was_replaced = False
        """Whether the module held other memory at the end, known once it has been given back what it held."""

    def put_in(self, teacher: torch.Tensor, undo: list[Callable[[], object]], *, exchanges: bool) -> None:
        """Put `teacher` in, and on the list how to undo it, before anything has changed.

        With `exchanges` the teacher's tensor holds what was here, where the two are alike; else a copy is kept.
        """
        here, teacher = self._local, teacher.detach()
        undo.append(self._give_back)
        if exchanges and here.dtype is teacher.dtype and here.device == teacher.device:
            exchange = Exchange(list(blocks_of(here, teacher)))
            undo.append(exchange.undo)
            exchange.run()
            self._is_exchanged = True
        else:
            # Kept where the teacher is: a teacher in host memory is there because the student's device is full.
            undo.append(functools.partial(here.copy_, here.to(teacher.device, copy=True)))
            here.copy_(teacher)

    def watch(self) -> None:
        """Take what is written from now on for somebody else's: all swaps that share memory have put theirs in."""
        is_parameter = isinstance(self._held[0][2], torch.nn.Parameter)
        if self._is_exchanged and is_parameter and not self._local.is_inference():
            self._version = self._local._version
            WATCHED.add(self)

    @property
    def is_written_to(self) -> bool:
        """Whether somebody wrote to a parameter of the module that is the teacher's for now, as far as torch counts."""
        return self._version is not None and self._local._version != self._version

    def holds(self, tensor: object) -> bool:
        """Whether `tensor` is the one that has these numbers."""
        return any(held is tensor for _, _, held in self._held)

    def _give_back(self) -> None:
        """Let the module hold the tensors it held: `module.half()` gives them other memory, others replace them."""
        for table, key, tensor in self._held:
            if table.get(key) is not tensor:  # or torch.compile would look through the module anew
                table[key], self.was_replaced = tensor, True
            if tensor is not None and _memory_of(tensor) != _memory_of(self._local):
                self.was_replaced = True
                if not self._is_sharded:
                    tensor.data = self._local
        if self.was_replaced:
            for tensor, grad, content in self._gradients:
                grad.data = content
                tensor.grad = grad
        if self._is_sharded and _memory_of(self._slot.tensor) != _memory_of(self._local):
            raise CkptEmaError(
                f"`{self.name}` is sharded and was converted while the teacher's numbers were in the module: it holds"
                " these numbers now",
                hint="load the student again; convert a copy of the module",
            )


WATCHED: weakref.WeakSet[Swap] = weakref.WeakSet()
"""Swaps of which it is known when somebody else writes to them."""


def written_in(module: torch.nn.Module, swaps: Sequence[Swap]) -> list[str]:
    """The parameters of `module` that were written to, but for embeddings, which shorten their vectors in forwards."""
    limited = [part for part in module.modules() if getattr(part, "max_norm", None) is not None]
    shortened = [getattr(part, "weight", None) for part in limited]
    return [swap.name for swap in swaps if swap.is_written_to and not any(swap.holds(tensor) for tensor in shortened)]


def watch_anew(ended: Sequence[Swap]) -> None:
    """These have been taken back; what that wrote to others' tensors was not somebody else."""
    WATCHED.difference_update(ended)
    for swap in WATCHED:
        swap.watch()


def _memory_of(tensor: torch.Tensor) -> object:
    local = local_part(tensor)
    begin = local.data_ptr() if local.numel() and local.layout == torch.strided else None
    return local.device, local.dtype, local.shape, begin


def hold_buffers(module: torch.nn.Module, swaps: Sequence[Swap]) -> Callable[[], None]:
    """What gives back the buffers of `module` that were converted since, and what running statistics held.

    What was written to other buffers stays.
    """
    held = [(part._buffers, key, tensor) for part in module.modules() for key, tensor in part._buffers.items()]
    # A forward in training mode moves them, and so does torch.optim.swa_utils.update_bn.
    statistics = [
        (tensor, tensor.detach().clone())
        for part in module.modules()
        if isinstance(part, _NormBase)
        for tensor in part._buffers.values()
        if tensor is not None and not tensor.is_inference()
    ]

    def give_back() -> None:
        was_converted = any(swap.was_replaced for swap in swaps)
        for table, key, tensor in held:
            now = table.get(key)
            if tensor is None or now is None or now is tensor:
                continue
            # Forwards replace buffers as well, such as tables of positions that have become too short.
            is_conversion = was_converted and now.shape == tensor.shape
            if is_conversion or (now.dtype, now.device) != (tensor.dtype, tensor.device):
                table[key] = tensor
        for tensor, before in statistics:  # always: torch counts no writes of a forward's
            tensor.detach().copy_(before)

    return give_back


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
