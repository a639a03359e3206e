"""A teacher's numbers in a module for a while: put in tensor by tensor, and taken out whatever happens."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence

import torch
from torch.nn.modules.batchnorm import _NormBase

from ckpt_ema.errors import CkptEmaError, warn
from ckpt_ema.online.pairs import Pair, Pairing
from ckpt_ema.online.rule import Exchange, blocks_of
from ckpt_ema.online.tracking import Slot, Tracking, is_sharded, local_part, track, unwrap

_SWAPPED: weakref.WeakKeyDictionary[torch.nn.Module | Pairing, set[object]] = weakref.WeakKeyDictionary()
"""Modules that hold another one's numbers for now, teachers whose numbers those are, and the swaps they are in."""


def _mark_swapped(root: torch.nn.Module, pairing: Pairing, undo: list[Callable[[], object]]) -> None:
    """Take both, and all within, for swapped; put on the list how to end that, before anything has changed."""
    swap = object()
    marked: list[torch.nn.Module | Pairing] = [pairing, *root.modules()]
    if pairing.module is not None:  # it holds what the other one held
        marked += pairing.module.modules()

    def unmark() -> None:
        for part in marked:
            swaps = _SWAPPED.get(part, set())
            swaps.discard(swap)
            if not swaps:
                _SWAPPED.pop(part, None)

    undo.append(unmark)
    for part in marked:
        _SWAPPED.setdefault(part, set()).add(swap)


def is_swapped(root: torch.nn.Module, pairing: Pairing) -> bool:
    """Whether a teacher's numbers are elsewhere now, or `root` or a module within it holds another one's."""
    return bool(_SWAPPED) and (bool(_SWAPPED.get(pairing)) or any(_SWAPPED.get(part) for part in root.modules()))


class Swapping:
    """A teacher's numbers in one module, from `put_in` to `take_back`."""

    def __init__(self, module: torch.nn.Module, pairing: Pairing) -> None:
        """Raises CkptEmaError where the teacher's tensors do not fit into `module`."""
        self._root = unwrap(module)
        self._pairing = pairing
        self._tracking = track(module, skip_buffers=pairing.student.skip_buffers)
        self._places = _places_in(self._tracking, pairing.pairs)
        self._swaps = [_Swap(slot) for slot, _, _ in self._places]
        self._undo: list[Callable[[], object]] = [_hold_buffers(self._root, self._swaps)]

    def put_in(self) -> None:
        """Begin; wherever this is interrupted, `take_back` ends it."""
        _mark_swapped(self._root, self._pairing, self._undo)
        for swap, (_, pair, is_first) in zip(self._swaps, self._places, strict=True):
            swap.put_in(pair.local, self._undo, exchanges=is_first)
        for swap in self._swaps:
            swap.watch()

    def written_names(self) -> list[str]:
        """Names of the module's parameters that somebody wrote to; to be asked before `take_back`.

        But for embeddings that shorten their vectors in forwards.
        """
        limited = [part for part in self._root.modules() if getattr(part, "max_norm", None) is not None]
        shortened = [getattr(part, "weight", None) for part in limited]
        return [
            swap.name
            for swap in self._swaps
            if swap.is_written_to and not any(swap.holds(tensor) for tensor in shortened)
        ]

    def take_back(self) -> BaseException | None:
        """End; called once more, it goes on where it was interrupted. What was raised meanwhile comes back."""
        self._tracking.reshard()
        failure = _call_all(self._undo)
        # Giving back wrote to tensors that other swaps watch: count from here.
        _WATCHED.difference_update(self._swaps)
        for swap in _WATCHED:
            swap.watch()
        return failure


def warn_of_writes(names: Sequence[str]) -> None:
    """Warn of parameters that were written to during a swap."""
    listed = ", ".join(f"`{name}`" for name in names[:3])
    warn(
        f"{listed}{' and more' if len(names) > 3 else ''} of the module were written to while the teacher's numbers"
        " were in it: the teacher holds what was written; go on from its last state (`teacher.load_state_dict`),"
        " and write to the module outside of the `with` block"
    )


def _places_in(tracking: Tracking, pairs: list[Pair]) -> list[tuple[Slot, Pair, bool]]:
    """Where each of the teacher's tensors goes, and whether it is the first place of its tensor; others come first.

    Raises CkptEmaError with everything that does not fit.
    """
    by_name = {name: slot for slot in tracking.averaged for name in slot.names}
    taken: dict[int, Pair] = {}
    places: list[tuple[Slot, Pair, bool]] = []
    differences: list[str] = []
    for pair in pairs:
        differences += [f"{name}: missing in the module" for name in pair.names if name not in by_name]
        slots = list({id(by_name[name]): by_name[name] for name in pair.names if name in by_name}.values())
        for number, slot in enumerate(slots):
            if taken.setdefault(id(slot), pair) is not pair:
                differences.append(f"{' and '.join(slot.names)}: tied in the module, but not in the teacher")
            if slot.local.shape != pair.local.shape:
                shapes = f"{list(slot.local.shape)} in the module, {list(pair.local.shape)} in the teacher"
                differences.append(f"{slot.name}: shape {shapes}")
            if any(size > 1 and not stride for size, stride in zip(slot.local.shape, slot.local.stride(), strict=True)):
                differences.append(f"{slot.name}: expanded, its elements share memory")
            places.append((slot, pair, number == 0))
    if differences:
        raise CkptEmaError(
            f"the module does not fit the teacher in {len(differences)} places",
            details=differences,
            hint="pass the student, or a module built from the same configuration",
        )
    # What is exchanged is no longer in the teacher: copies of it are made before.
    return sorted(places, key=lambda place: place[2])


class _Swap:
    """One place of a module that holds a teacher's numbers for a while."""

    def __init__(self, slot: Slot) -> None:
        self.name = slot.name
        """Of the tensor, for people."""

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
            _WATCHED.add(self)

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


_WATCHED: weakref.WeakSet[_Swap] = weakref.WeakSet()
"""Swaps of which it is known when somebody else writes to them."""


def _memory_of(tensor: torch.Tensor) -> object:
    local = local_part(tensor)
    begin = local.data_ptr() if local.numel() and local.layout == torch.strided else None
    return local.device, local.dtype, local.shape, begin


def _hold_buffers(module: torch.nn.Module, swaps: Sequence[_Swap]) -> Callable[[], None]:
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


def _call_all(undo: list[Callable[[], object]]) -> BaseException | None:
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
