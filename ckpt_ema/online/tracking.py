"""Which tensors of a module a teacher follows: a module in, its tensors by name out, each of them once.

Names are those of the bare model: what DDP and torch.compile put before them comes off, so that they are the same in
every checkpoint and every wrapper.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ckpt_ema.errors import CkptEmaError, MisuseError

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """The place of one tensor in a module; what lies there may be replaced while training goes on."""

    names: tuple[str, ...]
    """All its names; a tied tensor has several."""

    table: dict[str, torch.Tensor | None]
    """The parameters or buffers of the module that owns it."""

    key: str

    @property
    def name(self) -> str:
        """Its first name."""
        return self.names[0]

    @property
    def tensor(self) -> torch.Tensor:
        """What the module holds, a DTensor under FSDP2."""
        tensor = self.table.get(self.key)
        if tensor is None:
            raise CkptEmaError(
                f"`{self.name}` is no longer in the student", hint="make a new MeanTeacher after changing the model"
            )
        return tensor

    @property
    def local(self) -> torch.Tensor:
        """The plain tensor, of which a sharded one has only this rank's part."""
        return local_part(self.tensor)


@dataclass(frozen=True, slots=True)
class Tracking:
    """The tensors of a module, as they were when it was looked through."""

    averaged: tuple[Slot, ...]
    copied: tuple[Slot, ...]
    """Of the state dict, but not averaged."""

    reasons: dict[str, str]
    """Why each of `copied` is not averaged, by name."""

    sizes: tuple[tuple[dict[str, Any], int], ...]
    """Every module's tables, and how many entries they had."""

    def check_complete(self) -> None:
        """Raise CkptEmaError where parameters or modules were added or taken away since."""
        for table, size in self.sizes:
            if len(table) != size:
                raise CkptEmaError(
                    f"the student has changed: {size} entries of one of its modules became {len(table)}"
                    f" ({', '.join(map(repr, table))})",
                    hint="make a new MeanTeacher after adding or removing parameters",
                )


def track(module: torch.nn.Module, *, skip_buffers: bool) -> Tracking:
    """Look through `module`.

    Averaged are its parameters, or with `skip_buffers=False` every floating-point entry of its state dict, as
    MeanTeacherHook has it; frozen parameters too. Raises CkptEmaError for a module that cannot be followed.
    """
    root = unwrap(module)
    groups: dict[object, tuple[list[str], dict[str, torch.Tensor | None], str, bool]] = {}
    sizes: list[tuple[dict[str, Any], int]] = []
    for name, tensor, table, key, is_parameter in _entries(root, sizes):
        names, *_ = groups.setdefault(_identity(name, tensor), ([], table, key, is_parameter))
        names.append(name)
    averaged, copied, reasons = [], [], {}
    for names, table, key, is_parameter in groups.values():
        slot = Slot(tuple(names), table, key)
        reason = _reason_to_copy(slot.tensor, is_parameter=is_parameter, skip_buffers=skip_buffers)
        if reason:
            copied.append(slot)
            reasons.update(dict.fromkeys(names, reason))
        else:
            averaged.append(slot)
    if not averaged:
        raise MisuseError(
            f"a {type(root).__name__} has no parameter to average", hint="pass the student, a torch.nn.Module"
        )
    return Tracking(tuple(averaged), tuple(copied), reasons, tuple(sizes))


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(module, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            module = module.module
        elif isinstance(inner := module._modules.get("_orig_mod"), torch.nn.Module):
            module = inner
        else:
            return module


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, detached; any other tensor itself."""
    # Asked for every tensor at every update; looking for an attribute that is not there is slow.
    if type(tensor) is torch.nn.Parameter or type(tensor) is torch.Tensor:
        return tensor
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local().detach()


def _entries(
    root: torch.nn.Module, sizes: list[tuple[dict[str, Any], int]]
) -> Iterator[tuple[str, torch.Tensor, dict[str, torch.Tensor | None], str, bool]]:
    """(name, tensor, owner's table, key, is a parameter) of all that a state dict holds, aliases included."""
    for path, module in root.named_modules(remove_duplicate=False):
        if type(module).__name__ == "FullyShardedDataParallel":
            raise CkptEmaError(
                "FSDP1 keeps its parameters flattened, which no teacher can follow by name",
                hint="shard the student with torch.distributed.fsdp.fully_shard (FSDP2)",
            )
        sizes += [(module._parameters, len(module._parameters)), (module._modules, len(module._modules))]
        prefix = f"{path}." if path else ""
        for wrapper in WRAPPERS:
            prefix = prefix.replace(wrapper, "")
        volatile = module._non_persistent_buffers_set
        for table, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for key, tensor in table.items():
                if tensor is not None and (is_parameter or key not in volatile):
                    _check_exists(prefix + key, tensor)
                    yield prefix + key, tensor, table, key, is_parameter


def _check_exists(name: str, tensor: torch.Tensor) -> None:
    if torch.nn.parameter.is_lazy(tensor):
        raise CkptEmaError(f"`{name}` has no shape yet", hint="run a batch through the student first")
    if tensor.is_meta:
        raise CkptEmaError(f"`{name}` is on the meta device, without numbers", hint="load the student first")


def _identity(name: str, tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same memory, however they came to be tied."""
    local = local_part(tensor)
    if not local.numel() or local.layout != torch.strided:
        return id(tensor)
    return local.device, local.data_ptr(), local.dtype, local.shape, local.stride()


def _reason_to_copy(tensor: torch.Tensor, *, is_parameter: bool, skip_buffers: bool) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not tensor.dtype.is_floating_point and not (tensor.dtype.is_complex and skip_buffers):
        return dtype
    return "buffer" if skip_buffers and not is_parameter else ""
