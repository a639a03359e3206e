"""Which tensors of a module a teacher follows: a module in, its tensors by name out, each of them once.

Names are those of the bare model: what DDP and torch.compile put before them comes off, so that they are the same in
every checkpoint and every wrapper.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ckpt_ema.errors import CkptEmaError, MisuseError
from ckpt_ema.online.rule import is_finite

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")

Table = dict[str, torch.Tensor | None]

BEGIN_ANEW = "make a new MeanTeacher after changing the model"
"""What to do where student or teacher are no longer what was looked through."""

Whose = Literal["student", "teacher"]


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """The place of one tensor in a module; what lies there may be replaced while training goes on."""

    names: tuple[str, ...]
    """All its names; a tied tensor has several."""

    places: tuple[tuple[Table, str], ...]
    """For each name the parameters or buffers of the module that owns it, and the key there."""

    @property
    def name(self) -> str:
        """Its first name."""
        return self.names[0]

    @property
    def tensor(self) -> torch.Tensor:
        """What the module holds, a DTensor under FSDP2."""
        table, key = self.places[0]
        tensor = table.get(key)
        if tensor is None:
            raise CkptEmaError(f"`{self.name}` is no longer in the model", hint=BEGIN_ANEW)
        return tensor

    @property
    def local(self) -> torch.Tensor:
        """The plain tensor, of which a sharded one has only this rank's part."""
        return local_part(self.tensor)


@dataclass(frozen=True, slots=True)
class Tracking:
    """The tensors of a module, as they were when it was looked through."""

    averaged: tuple[Slot, ...]
    """What the teacher follows."""

    copied: tuple[Slot, ...]
    """Of the state dict, but not averaged."""

    reasons: dict[str, str]
    """Why each of `copied` is not averaged, by name."""

    children: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...]
    """Every module's name, its table of submodules, and what was in it."""

    present: tuple[tuple[str, Table, frozenset[str]], ...]
    """Every module's name, its tables of tensors that are averaged, and which keys had one."""

    sharded: tuple[Any, ...]
    """The modules that FSDP2 shards."""

    skip_buffers: bool
    """Whether parameters alone are averaged."""

    whose: Whose = "student"
    """What the module is called in errors."""

    def check_complete(self) -> None:
        """Raise CkptEmaError where parameters or modules were added, replaced or taken away since."""
        for path, modules, before in self.children:
            if len(modules) != len(before) or any(modules.get(key) is not child for key, child in before.items()):
                changed = [key for key in modules.keys() | before.keys() if modules.get(key) is not before.get(key)]
                # Without a tensor that is averaged it is a metric, a loss or an activation, and no part of the teacher.
                parts = [key for key in changed if self._has_averaged(before.get(key), modules.get(key))]
                if parts:
                    raise self._changed(path, sorted(parts))
        for path, table, keys in self.present:
            found = {key for key, tensor in table.items() if tensor is not None}
            if found != keys:
                raise self._changed(path, sorted(found ^ keys))
        held_by: dict[int, Slot] = {}
        for slot in self.averaged:
            other = held_by.setdefault(id(slot.tensor), slot)
            if other is not slot:
                raise CkptEmaError(
                    f"`{other.name}` and `{slot.name}` of the {self.whose} are tied now, and were not when the teacher"
                    " was made",
                    hint=BEGIN_ANEW,
                )
            if len(slot.places) > 1 and len({id(table[key]) for table, key in slot.places}) > 1:
                held = [table[key] for table, key in slot.places]
                if len({_identity(tensor) for tensor in held if tensor is not None}) > 1:
                    raise CkptEmaError(
                        f"{' and '.join(f'`{name}`' for name in slot.names)} of the {self.whose} were tied when the"
                        " teacher was made, and are not any more",
                        hint=BEGIN_ANEW,
                    )

    def _has_averaged(self, *modules: torch.nn.Module | None) -> bool:
        return any(
            _reason_to_copy(tensor, is_parameter=is_parameter, skip_buffers=self.skip_buffers) == ""
            for module in modules
            if module is not None
            for _, tensor, _, _, is_parameter in _entries(module)
        )

    def reshard(self) -> None:
        """Make FSDP2 give up the whole parameters that it kept from a forward: the next one shall read the shards."""
        _reshard(self.sharded)

    def _changed(self, path: str, keys: list[str]) -> CkptEmaError:
        names = ", ".join(f"`{path}.{key}`" if path else f"`{key}`" for key in keys)
        return CkptEmaError(
            f"the {self.whose} has changed: {names} came, went or was replaced",
            hint=BEGIN_ANEW,
        )


def _reshard(modules: tuple[Any, ...]) -> None:
    for module in modules:
        module.reshard()


def track(module: torch.nn.Module, *, skip_buffers: bool, whose: Whose = "student") -> Tracking:
    """Look through `module`, which is the student or the teacher.

    Averaged are its parameters, or with `skip_buffers=False` every floating-point entry of its state dict, as
    MeanTeacherHook has it; frozen parameters too. Raises CkptEmaError for a module that cannot be followed.
    """
    root = unwrap(module)
    modules = list(root.named_modules())
    scripted = [path for path, part in modules if isinstance(part, torch.jit.ScriptModule)]
    if scripted:
        what = f"`{scripted[0]}` is a TorchScript program, and" if scripted[0] else "a TorchScript program"
        raise CkptEmaError(f"{what} cannot be followed", hint="pass the module it was made from")
    sharded = tuple(part for _, part in modules if any(c.__name__ == "FSDPModule" for c in type(part).__mro__))
    _reshard(sharded)
    groups: dict[object, list[tuple[str, tuple[Table, str], bool]]] = {}
    for name, tensor, table, key, is_parameter in _entries(root):
        groups.setdefault(_identity(tensor), []).append((name, (table, key), is_parameter))
    averaged, copied, reasons = [], [], {}
    for group in groups.values():
        names, places, are_parameters = zip(*group, strict=True)
        slot = Slot(names, places)
        if any(are_parameters) or (not skip_buffers and slot.tensor.dtype.is_floating_point):
            _check_dense(slot)
        # A buffer that is a parameter as well is trained.
        reason = _reason_to_copy(slot.tensor, is_parameter=any(are_parameters), skip_buffers=skip_buffers)
        if reason:
            copied.append(slot)
            reasons.update(dict.fromkeys(names, reason))
        else:
            averaged.append(slot)
    if not averaged:
        raise MisuseError(
            f"a {type(root).__name__} has no parameter to average", hint="pass the student, a torch.nn.Module"
        )
    tables = [(path, part._parameters) for path, part in modules]
    tables += [] if skip_buffers else [(path, part._buffers) for path, part in modules]
    return Tracking(
        tuple(averaged),
        tuple(copied),
        reasons,
        children=tuple((path, part._modules, dict(part._modules)) for path, part in modules),
        present=tuple(
            (path, table, frozenset(key for key, tensor in table.items() if tensor is not None))
            for path, table in tables
        ),
        sharded=sharded,
        skip_buffers=skip_buffers,
        whose=whose,
    )


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(module, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            module = module.module
        # Among its own modules: a wrapper that hands on the attributes of a compiled one is not that.
        elif not isinstance(module, torch.jit.ScriptModule) and "_orig_mod" in module._modules:
            inner = module._modules["_orig_mod"]
            assert inner is not None
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


def part_of(stored: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of what was stored for `tensor`: sharded like that, or whole.

    Of a whole one every rank takes its part at the same time; the first one's numbers count.
    """
    if is_sharded(stored) or not is_sharded(tensor):
        return local_part(stored)
    # Here, not above: it takes as long to import as all the rest of torch.
    from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: PLC0415

    assert isinstance(tensor, DTensor)
    return distribute_tensor(stored, tensor.device_mesh, tensor.placements).to_local()


def placed_like(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """What `part_of` undoes: `local` as this rank's part of a tensor that is sharded like `tensor`, or as it is."""
    if not is_sharded(tensor):
        return local
    # Here, not above: it takes as long to import as all the rest of torch.
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    assert isinstance(tensor, DTensor)
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def gather_on_first_rank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors in host memory on the first rank, nothing on the others; where none is sharded, what is given.

    Every rank has to call this.
    """
    if not any(map(is_sharded, tensors.values())):
        return tensors
    is_first = torch.distributed.get_rank() == 0
    # All take part in each; what the others get is gone at once.
    wholes = ((name, _whole_of(tensor)) for name, tensor in tensors.items())
    return {name: whole for name, whole in wholes if is_first}


def _whole_of(tensor: torch.Tensor) -> torch.Tensor:
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor().cpu()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, of which each rank has a part."""
    return hasattr(tensor, "to_local")


def _entries(root: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, Table, str, bool]]:
    """(name, tensor, owner's table, key, is a parameter) of all that a state dict holds, aliases included."""
    for path, module in root.named_modules(remove_duplicate=False):
        if type(module).__name__ == "FullyShardedDataParallel":
            raise CkptEmaError(
                "FSDP1 keeps its parameters flattened, which no teacher can follow by name",
                hint="shard the student with torch.distributed.fsdp.fully_shard (FSDP2)",
            )
        prefix = "".join(f"{part}." for part in path.split(".") if part and part not in WRAPPERS)
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
    if hasattr(tensor, "ds_id"):
        raise CkptEmaError(
            f"`{name}` is kept in parts by DeepSpeed's ZeRO-3, where this rank holds nothing of it between steps",
            hint="train with ZeRO stage 2, or shard the student with torch.distributed.fsdp.fully_shard",
        )


def _check_dense(slot: Slot) -> None:
    if kind := odd_kind_of(slot.tensor):
        raise CkptEmaError(
            f"`{slot.name}` is {kind}, which cannot be averaged",
            hint="make it dense, or follow the student without that module",
        )


def odd_kind_of(tensor: torch.Tensor) -> str:
    """What a tensor is that is no plain array of numbers; "" for one that is."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return str(tensor.layout).replace("torch._mkldnn", "an MKL-DNN tensor")
    return f"quantised ({tensor.dtype})" if tensor.is_quantized else ""


def _identity(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same memory, however they came to be tied."""
    local = local_part(tensor)
    if odd_kind_of(local) or not local.numel():
        return id(tensor)
    return local.device, local.data_ptr(), local.dtype, local.shape, local.stride()


def _reason_to_copy(tensor: torch.Tensor, *, is_parameter: bool, skip_buffers: bool) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not tensor.dtype.is_floating_point and not (tensor.dtype.is_complex and skip_buffers):
        return dtype
    if not is_parameter and not skip_buffers and not is_finite([local_part(tensor)]):
        return "a buffer of infinities"  # a mask: its average is itself
    return "buffer" if skip_buffers and not is_parameter else ""
