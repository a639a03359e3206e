"""A pickle stream in, its plain values and a description of each tensor out; nothing it names is ever run.

A pickle is a program. This unpickler gives it no machine to run on: `find_class` hands out our own constructors for
the few names that build tensors and an inert class for every other name, so that no module is imported and no
foreign callable is called. Everything handed out refuses changes, because pickle's BUILD sets attributes on whatever
lies on its stack.
"""

from __future__ import annotations

import functools
import io
import pickle
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

from ckpt_ema.dtypes import BY_NAME, BY_STORAGE, DType
from ckpt_ema.formats.pickle_scan import MalformedPickleError

MAX_MODULES = 100_000
# Each costs 20 microseconds and a kilobyte, however short its name. Real files name a few dozen.
MAX_CLASSES = 10_000
MAX_NAME_LENGTH = 1000
# What an object is made of is copied, each time, from a tuple that is in the pickle once.
MAX_ARGUMENTS = 1000
MAX_DIMENSIONS = 64
# torch has two. Each is looked at for every tensor, and a table of them may be in the pickle once.
MAX_FLAGS = 10

_FRAME = b"\x95"

_new_tuple = tuple.__new__  # of a NamedTuple, without the call of its own __new__: there is one per tensor


class _SealedType(type):
    """A class that BUILD cannot change."""

    def __setattr__(cls, name: str, value: Any) -> NoReturn:
        raise MalformedPickleError(f"the pickle tries to set `{name}` on a class")

    def __delattr__(cls, name: str) -> NoReturn:
        raise MalformedPickleError(f"the pickle tries to delete `{name}` from a class")


class _Sealed(metaclass=_SealedType):
    """An object that BUILD cannot change: no `__dict__`, no attribute that can be set."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise MalformedPickleError(f"the pickle tries to set `{name}` on a {type(self).__name__}")


def _fill(target: _Sealed, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(target, name, value)


class Inert(_Sealed):
    """Stands for an object of a class that is not to be run: its name, and the plain values it was built from."""

    __slots__ = ("arguments", "entries", "items", "state")

    qualified_name = ""
    arguments: tuple[Any, ...]
    """What the class or function would have been called with."""

    state: Any
    """What BUILD would have put into the object, usually its attributes."""

    entries: dict[Any, Any]
    """What the pickle stored under keys."""

    items: list[Any]
    """What the pickle appended."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> Inert:
        if len(arguments) > MAX_ARGUMENTS or len(keywords) > MAX_ARGUMENTS:
            raise MalformedPickleError(f"an object made of {len(arguments) + len(keywords)} arguments")
        self = object.__new__(cls)
        _fill(self, arguments=arguments, state=keywords or None, entries={}, items=[])
        return self

    def __setstate__(self, state: Any) -> None:
        object.__setattr__(self, "state", state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, item: Any) -> None:
        """APPEND."""
        self.items.append(item)

    def extend(self, items: Iterable[Any]) -> None:
        """APPENDS."""
        self.items.extend(items)

    def add(self, item: Any) -> None:
        """ADDITEMS."""
        self.items.append(item)


def _name_inert(qualified_name: str) -> type[Inert]:
    class Named(Inert):
        __slots__ = ()

    type.__setattr__(Named, "qualified_name", qualified_name)
    return Named


class PickledDict(dict[Any, Any], metaclass=_SealedType):
    """An OrderedDict without the attributes that `state_dict()` hangs on it."""

    __slots__ = ()

    def __init__(self, pairs: Any = None, *_rest: Any) -> None:
        # Python 2 writes an OrderedDict as a list of pairs made for it. Emptied, since a list that stands in the pickle
        # once might be given to a million tables.
        if pairs:
            if type(pairs) is not list:
                raise MalformedPickleError(f"a table made of a {type(pairs).__name__}")
            self.update(pairs)
            pairs.clear()

    def __setstate__(self, state: Any) -> None:
        pass


class PickledStorage(NamedTuple):
    """A run of bytes outside the pickle; a tuple, so BUILD finds nothing to set."""

    key: str
    dtype: DType
    num_elements: int
    """Elements of `dtype`."""

    view_offset: int = 0
    """Elements of the root storage to skip; only the oldest files have views."""

    def __hash__(self) -> int:
        """Never: as keys of a table, many can be made to have the same hash."""
        raise MalformedPickleError("a storage as a key")


class Refusal(NamedTuple):
    """Why the numbers that are stored for a tensor are not its values."""

    what: str
    """What it is, after the tensor's name."""

    hint: str | None = None
    """What to do about it."""


class PickledTensor(NamedTuple):
    """A tensor as the pickle describes it; not yet checked against the storage's bytes."""

    storage: PickledStorage
    dtype: DType
    offset: int
    """Elements of `dtype` from the storage's start."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    refusal: Refusal | None = None
    """Why it cannot be located, although nothing is wrong with the file; None for plain numbers."""

    def __hash__(self) -> int:
        """Never; see PickledStorage."""
        raise MalformedPickleError("a tensor as a key")


class _StorageType(_Sealed):
    __slots__ = ("dtype",)
    dtype: DType

    def __init__(self, dtype: DType) -> None:
        _fill(self, dtype=dtype)


class _Constructor(_Sealed):
    """One of the functions below, wrapped so that BUILD finds nothing to change."""

    __slots__ = ()
    __call__: Callable[..., Any]


def _wrapped(function: Callable[..., Any]) -> _Constructor:
    # A class per function, whose instance is the callable: a wrapper's own call would double the cost per tensor.
    class Wrapped(_Constructor):
        __slots__ = ()
        __call__ = staticmethod(function)

    return Wrapped()


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Inert) and value.qualified_name == "torch.Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, (list, tuple)):
        raise MalformedPickleError("something else where a shape should be")
    return tuple(value)


def sizes_of(value: Any) -> tuple[int, ...]:
    """A shape, or the first index per dimension of a part of a tensor; raises MalformedPickleError for what is none."""
    sizes = _as_tuple(value)
    if len(sizes) > MAX_DIMENSIONS:
        raise MalformedPickleError("something else where a shape should be")
    for size in sizes:  # three times as fast as `all` of a generator, and a sharded checkpoint has three per piece
        if type(size) is not int or not 0 <= size < 1 << 63:
            raise MalformedPickleError("a shape that is not made of sizes")
    return sizes


_SIGN_APART = Refusal(
    "is stored without its sign, as a conjugate or negative view", "save it as `tensor.resolve_conj().resolve_neg()`"
)
_UNKNOWN_FLAG = Refusal("is stored with a flag that is not known here, and that may change its numbers")
_QUANTISED = Refusal(
    "is quantised, and such tensors cannot be averaged",
    "fold checkpoints from before quantisation, or save `tensor.dequantize()` in its place",
)


def _refusal_of(flags: Any) -> Refusal | None:
    """What the flags of a tensor say of its numbers; torch writes those that are set."""
    if not flags:
        return None
    if not isinstance(flags, dict) or len(flags) > MAX_FLAGS:
        raise MalformedPickleError("something else where the flags of a tensor should be")
    raised = [name for name, is_set in flags.items() if is_set is not False]
    if not raised:
        return None
    return _SIGN_APART if all(name in ("conj", "neg") for name in raised) else _UNKNOWN_FLAG


def _rebuild_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _grad: Any = None,
    _hooks: Any = None,
    flags: Any = None,
    *_rest: Any,
) -> PickledTensor:
    if type(storage) is not PickledStorage:
        raise MalformedPickleError("a tensor without a storage")
    if type(offset) is not int or not 0 <= offset < 1 << 63:
        raise MalformedPickleError(f"a {type(offset).__name__} where a storage offset should be")
    if type(shape) is not tuple or type(strides) is not tuple:
        shape, strides = _as_tuple(shape), _as_tuple(strides)
    # Their lengths alone: printing what a stranger nested can take for ever.
    if len(shape) != len(strides):
        raise MalformedPickleError(f"a shape of {len(shape)} dimensions with strides of {len(strides)}")
    if len(shape) > MAX_DIMENSIONS:
        raise MalformedPickleError(f"a tensor of {len(shape)} dimensions")
    for size in shape + strides:
        if type(size) is not int or not 0 <= size < 1 << 63:
            raise MalformedPickleError("a shape that is not made of sizes")
    _, dtype, _, view_offset = storage
    refusal = None if flags is None else _refusal_of(flags)
    return _new_tuple(PickledTensor, (storage, dtype, offset + view_offset, shape, strides, refusal))


def _rebuild_tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    flags: Any = None,
    *_rest: Any,
) -> PickledTensor:
    tensor = _rebuild_tensor(storage, offset, shape, strides, flags=flags)
    if isinstance(dtype, DType):
        return tensor._replace(dtype=dtype)
    if is_unknown_dtype(dtype):
        return tensor._replace(refusal=_of_unknown_dtype(dtype.qualified_name))
    raise MalformedPickleError(f"a {type(dtype).__name__} where a dtype should be")


@functools.lru_cache(maxsize=16)  # a stranger's name may be long, and stand in every tensor
def _of_unknown_dtype(name: str) -> Refusal:
    hint = "fold a sub-model without it (`--prefix`), or save it in another dtype"
    return Refusal(f"is of dtype {name}, which is not known here", hint)


def is_unknown_dtype(value: Any) -> bool:
    """Whether a dtype may be meant that torch has and this tool has not."""
    return isinstance(value, _SealedType) and issubclass(value, Inert) and value.qualified_name.startswith("torch.")


def _rebuild_quantised(storage: Any, offset: Any, shape: Any, strides: Any, *_rest: Any) -> PickledTensor:
    return _rebuild_tensor(storage, offset, shape, strides)._replace(refusal=_QUANTISED)


def _rebuild_parameter(tensor: Any, *_rest: Any) -> Any:
    if isinstance(tensor, (PickledTensor, Inert)):
        return tensor
    raise MalformedPickleError("a parameter without a tensor")


def _rebuild_from_type(function: Any, _type: Any, arguments: Any, _state: Any = None) -> Any:
    if isinstance(function, (_Constructor, _SealedType)) and isinstance(arguments, tuple):
        made = function(*arguments)
        if isinstance(made, Inert) and _state is not None:
            made.__setstate__(_state)
        return made
    raise MalformedPickleError("a tensor subclass without its constructor")


_NUMPY_FORMATS = {"i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "f8": "d", "f4": "f", "b1": "?"}


def _numpy_scalar(dtype: Any = None, content: Any = None, *_rest: Any) -> Any:
    """The number in a numpy scalar; scripts store steps and metrics as such."""
    code = dtype.arguments[0] if isinstance(dtype, Inert) and dtype.arguments else None
    layout = _NUMPY_FORMATS.get(code) if isinstance(code, str) else None
    if isinstance(content, str) and len(content) <= 8:
        content = content.encode("latin-1", "replace")  # protocol 2 of Python 3 stores bytes as text
    if layout is None or not isinstance(content, bytes) or struct.calcsize("<" + layout) != len(content):
        return None
    return struct.unpack("<" + layout, content)[0]


def _encode(text: Any = "", *_rest: Any) -> str:
    """`_codecs.encode(text, "latin1")`, how protocol 2 writes bytes; left a text, as a copy can be asked for often."""
    return text if isinstance(text, str) else ""


_CONSTRUCTORS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): PickledDict,
    ("builtins", "dict"): PickledDict,
    ("_codecs", "encode"): _wrapped(_encode),
    ("numpy._core.multiarray", "scalar"): _wrapped(_numpy_scalar),
    ("numpy.core.multiarray", "scalar"): _wrapped(_numpy_scalar),
    ("torch._utils", "_rebuild_tensor"): _wrapped(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _wrapped(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _wrapped(_rebuild_tensor_v3),
    ("torch._utils", "_rebuild_qtensor"): _wrapped(_rebuild_quantised),
    ("torch._utils", "_rebuild_parameter"): _wrapped(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _wrapped(_rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): _wrapped(_rebuild_from_type),
    ("torch._tensor", "_rebuild_from_type"): _wrapped(_rebuild_from_type),
}
_CONSTRUCTORS |= {
    ("__builtin__", name): value for (module, name), value in _CONSTRUCTORS.items() if module == "builtins"
}
_CONSTRUCTORS |= {("torch", name): dtype for name, dtype in BY_NAME.items()}
_CONSTRUCTORS |= {
    (module, name): _StorageType(dtype)
    for module in ("torch", "torch.cuda", "torch.storage")
    for name, dtype in {**BY_STORAGE, "UntypedStorage": BY_NAME["uint8"]}.items()
}


def _view_offset(view: Any) -> int:
    if view is None:
        return 0
    if type(view) is tuple and len(view) == 3 and type(view[1]) is int and view[1] >= 0:
        return view[1]
    raise MalformedPickleError("a storage with a view that is none")


class MetadataUnpickler(pickle.Unpickler):
    """Reads one pickle: plain values stay, tensors become PickledTensor, all else Inert."""

    def __init__(self, content: bytes) -> None:
        # Within one frame, so that all of it is read at once. In portions, as other frames in it or none at all would
        # have it, an operand that a frame's end cuts is read from beyond that end: not what was scanned. And each
        # portion would be a call. latin-1 reads what Python 2 wrote as 8-bit strings without an error.
        frame = _FRAME + struct.pack("<Q", len(content))
        super().__init__(io.BytesIO(frame + content), encoding="latin-1")
        self.storages: dict[str, PickledStorage] = {}
        """Every storage the pickle refers to, by its key; a legacy file says their sizes nowhere else."""
        self._inert_classes: dict[tuple[str, str], type[Inert]] = {}
        self._attribute: _Constructor | None = None

    def find_class(self, module: str, name: str, /) -> Any:
        """Our stand-in for `module.name`; imports nothing."""
        known = _CONSTRUCTORS.get((module, name))
        if known is not None:
            return known
        if name == "getattr" and module in ("builtins", "__builtin__"):
            if self._attribute is None:
                self._attribute = _wrapped(self._find_attribute)
            return self._attribute
        return self._inert_class(module, name)

    def _find_attribute(self, owner: Any = None, name: Any = None, *_rest: Any) -> Any:
        """`getattr(Outer, "Inner")`, how protocol 2 names a class inside a class; nothing is looked up."""
        if isinstance(owner, _SealedType) and issubclass(owner, Inert) and isinstance(name, str):
            return self._inert_class(owner.qualified_name, name)
        return Inert(owner, name)

    def _inert_class(self, owner: str, name: str) -> type[Inert]:
        inert = self._inert_classes.get((owner, name))
        if inert is None:
            if len(owner) + len(name) > MAX_NAME_LENGTH or len(self._inert_classes) >= MAX_CLASSES:
                raise MalformedPickleError("names of classes that are too long, or too many of them")
            inert = self._inert_classes[owner, name] = _name_inert(f"{owner}.{name}")
        return inert

    def persistent_load(self, reference: Any, /) -> Any:
        """The storage of torch's `('storage', type, key, location, count[, view])`.

        Legacy files have `('module', class, file, source)` as well, for a class whose source they carry along; the
        class alone counts, and stays inert.
        """
        if type(reference) is tuple and len(reference) == 4 and reference[0] == "module":
            if isinstance(reference[1], _SealedType) and issubclass(reference[1], Inert):
                return reference[1]
            raise MalformedPickleError("a module's source without its class")
        if type(reference) is not tuple or len(reference) not in (5, 6) or reference[0] != "storage":
            raise MalformedPickleError("a persistent reference that is no storage")
        kind, key, count = reference[1], reference[2], reference[4]
        if isinstance(kind, _SealedType) and issubclass(kind, Inert):
            raise MalformedPickleError(f"a storage of type {kind.qualified_name}, which is not known here")
        if type(kind) is not _StorageType or type(key) is not str or type(count) is not int or count < 0:
            raise MalformedPickleError("a storage without a type, a key or a size")
        view_offset = _view_offset(reference[5]) if len(reference) == 6 else 0
        storage = self.storages[key] = _new_tuple(PickledStorage, (key, kind.dtype, count, view_offset))
        return storage

    def load(self) -> Any:
        """The pickle's root; raises MalformedPickleError for whatever goes wrong inside."""
        try:
            return super().load()
        except MalformedPickleError:
            raise
        except Exception as error:  # any opcode out of place raises whatever it stumbles over
            raise MalformedPickleError(f"{type(error).__name__}: {error}") from error


def module_state(value: Any) -> tuple[dict[str, Any], set[str]] | None:
    """The state dict of a pickled `torch.nn.Module` and the names of its buffers; None when `value` is none."""
    if not _is_module(value):
        return None
    tensors: dict[str, Any] = {}
    buffers: set[str] = set()
    pending: list[tuple[str, Any, int]] = [("", value, 0)]
    visited = 0
    while pending:
        prefix, module, depth = pending.pop()
        visited += 1
        # A module may be shared, but one that holds another twice, sixty levels deep, has 2**60 parts.
        if depth > 100 or visited > MAX_MODULES:
            raise MalformedPickleError("modules nested too deep, or too many of them")
        state = module.state
        recorded = state.get("_non_persistent_buffers_set")
        # A set that no opcode makes (before protocol 4) is one of a list.
        if isinstance(recorded, Inert) and recorded.arguments:
            recorded = recorded.arguments[0]
        volatile = recorded if isinstance(recorded, (list, set)) else ()
        buffer_table = state.get("_buffers")
        for name, tensor in state["_parameters"].items():
            if tensor is not None and isinstance(name, str):
                tensors[f"{prefix}{name}"] = tensor
        for name, tensor in (buffer_table if isinstance(buffer_table, dict) else {}).items():
            if tensor is not None and isinstance(name, str) and name not in volatile:
                tensors[f"{prefix}{name}"] = tensor
                buffers.add(f"{prefix}{name}")
        children = [
            (f"{prefix}{name}.", child, depth + 1)
            for name, child in state["_modules"].items()
            if isinstance(name, str) and _is_module(child)
        ]
        pending += reversed(children)
    return tensors, buffers


def _is_module(value: Any) -> bool:
    return (
        isinstance(value, Inert)
        and isinstance(value.state, dict)
        and isinstance(value.state.get("_parameters"), dict)
        and isinstance(value.state.get("_modules"), dict)
    )
