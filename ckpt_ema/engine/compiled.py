"""The update of a float32 teacher by 16-bit students on a CPU, in one pass: a loop that LLVM compiles for the machine.

torch has calls of one pass where both have one dtype, and none that widens the student on the way, or that narrows a
teacher and looks at it. llvmlite need not be installed: where it is missing, fails, or rounds otherwise than torch,
nothing is compiled and torch's calls remain.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import platform
import threading
from array import array
from collections.abc import Callable, Sequence

import torch

from ckpt_ema.engine import llvm_module
from ckpt_ema.engine.arithmetic import GRAIN, Pair, has_torchs_bits, is_dense
from ckpt_ema.engine.llvm_module import WIDTH

OLDEST_LLVM = (20,)
"""Of llvmlite 0.45."""

NEEDED_FEATURES = {"x86_64": ("fma", "f16c"), "aarch64": ()}
"""Of a processor, by what it is: without them LLVM would call functions for each element, or end the process where it
finds none."""

READ, WRITE, EXECUTE = 1, 2, 4
"""What Linux may let be done with memory."""

STRETCH_ELEMENTS = 16 * GRAIN
"""Elements that a thread updates before it asks for more: some tens of microseconds."""


class Kernel:
    """`teacher = keep * teacher + take * student`, and a teacher narrowed to the student's dtype, compiled.

    Other threads of Python go on meanwhile.
    """

    def __init__(self, fold: int, narrow: int, update_many: int) -> None:
        """By the addresses of the module's functions."""
        address, number = ctypes.c_void_p, ctypes.c_int64
        self._fold = ctypes.CFUNCTYPE(None, address, number, address, address, number)(fold)
        self._narrow = ctypes.CFUNCTYPE(ctypes.c_int32, address, address, number)(narrow)
        self.update_many = update_many
        """Address of a function that takes a _Job's and updates its stretches until none is left; for any number of
        threads at once."""

    def fold(self, teacher: int, count: int, students: Sequence[int], updates: Sequence[tuple[float, float]]) -> None:
        """Fold several students, at least one, into `count` elements of a teacher, by their addresses.

        `updates` has a student's keep and take each. All elements lie in the same order, without a gap; `count` is a
        multiple of WIDTH.
        """
        addresses = (ctypes.c_void_p * len(students))(*students)
        numbers = (ctypes.c_float * (2 * len(updates)))(*itertools.chain.from_iterable(updates))
        _check_whole(count)
        self._fold(teacher, count, addresses, numbers, len(students))

    def narrow(self, teacher: int, count: int, narrowed: int) -> bool:
        """Write `count` elements of a teacher in the student's dtype, by their addresses; whether all are finite there.

        `count` is a multiple of WIDTH. Rounded to the nearest, as torch does. Where not all are finite, what was
        written is nothing to go by.
        """
        _check_whole(count)
        return bool(self._narrow(teacher, narrowed, count))


def _check_whole(count: int) -> None:
    # Whatever is no whole vector would be written all the same, into somebody's memory.
    if count % WIDTH:
        raise ValueError(f"{count} elements are no multiple of {WIDTH}")


class _Job(ctypes.Structure):
    """What every thread is given: stretches, and the number of the next one that none has taken."""

    _fields_ = (
        ("next", ctypes.c_int64),  # first: the module counts at the job's own address
        ("count", ctypes.c_int64),
        ("stretches", ctypes.c_void_p),
        ("keep", ctypes.c_float),
        ("take", ctypes.c_float),
    )


_Stretch = tuple[int, int, int]
"""The addresses of a teacher's elements and of a student's, and how many, whole GRAINs; three int64 to the module."""

_Kind = tuple[torch.dtype, torch.dtype, bool]
"""A teacher's dtype, a student's, and whether it is lerp's arithmetic."""

_found: dict[_Kind, Kernel | str] = {}
"""Or the reason why there is none."""


class _UnfitError(Exception):
    """This machine is none for a kernel; it says why."""


def is_made_for(teacher: torch.dtype, student: torch.dtype) -> bool:
    """Whether there may be a kernel."""
    return teacher is torch.float32 and student in llvm_module.STUDENTS


def is_tried(teacher: torch.dtype, student: torch.dtype) -> bool:
    """Whether `find_kernel` answers at once."""
    return (teacher, student, False) in _found


def find_kernel(teacher: torch.dtype, student: torch.dtype, *, lerp: bool = False) -> Kernel | None:
    """The kernel for a teacher and a student of these dtypes; None where there is none, `why_not` tells why.

    It does what `mul_(keep).add_(student, alpha=take)` does, or `lerp_(student, take)` up to LARGEST_LERP, with the
    bits that torch gives whole GRAINs. It is made and tried once, which takes 40 ms of a processor for the first, less
    for others.
    """
    kind = (teacher, student, lerp)
    if kind not in _found:
        # In a thread of its own, which neither signals nor this one's modes reach, such as that of fake tensors.
        thread = threading.Thread(target=lambda: _found.setdefault(kind, _try_kernel(*kind)), name="ckpt-ema-compile")
        with contextlib.suppress(RuntimeError):  # there may be no thread left; then it is not for good
            thread.start()
            thread.join()
    found = _found.get(kind)
    return found if isinstance(found, Kernel) else None


def why_not(teacher: torch.dtype, student: torch.dtype, *, lerp: bool = False) -> str:
    """Why there is no kernel for a teacher and a student of these dtypes; empty where there is one."""
    if find_kernel(teacher, student, lerp=lerp) is not None:
        return ""
    return str(_found.get((teacher, student, lerp), "no thread could be started for it"))


def _try_kernel(teacher: torch.dtype, student: torch.dtype, lerp: bool) -> Kernel | str:
    if not is_made_for(teacher, student):
        return f"it is not made for {teacher} and {student}"
    try:
        kernel = _compile(llvm_module.write_module(student, lerp=lerp))

        def update_(old: torch.Tensor, new: torch.Tensor, keep: float, take: float) -> None:
            kernel.fold(old.data_ptr(), old.numel(), [new.data_ptr()], [(keep, take)])

        # update_many calls the same loop as fold; no teacher of lerp is narrowed.
        is_right = has_torchs_bits(update_, torch.device("cpu"), teacher, student, lerp=lerp) and (
            lerp or _narrows_as_torch(kernel, student)
        )
    except ImportError as error:
        return f"{error} (`pip install -U llvmlite`)"
    except _UnfitError as error:
        return str(error)
    except Exception as error:  # a processor it does not know, no memory: whatever it is
        return f"{type(error).__name__}: {error}"
    return kernel if is_right else "it rounds in another way than torch"


def _narrows_as_torch(kernel: Kernel, student: torch.dtype) -> bool:
    """Whether floats of any bits become a student's dtype as `to` makes them, and none that is infinite then passes."""
    generator = torch.Generator("cpu").manual_seed(0)
    # Few enough for one thread of torch's.
    bits = torch.randint(-(2**31), 2**31, (2, GRAIN // 2), generator=generator, dtype=torch.int32, device="cpu")
    bits[1] &= -(2**12)  # so that thousands lie half way between two
    teacher = bits.view(torch.float32).flatten()
    is_finite = teacher.to(student).isfinite()
    finite = teacher.where(is_finite, 0)
    found, expected = finite.to(student).zero_(), finite.to(student)
    if not kernel.narrow(finite.data_ptr(), finite.numel(), found.data_ptr()):
        return False
    if not torch.equal(found.view(torch.int16), expected.view(torch.int16)):
        return False
    special = torch.tensor((torch.inf, -torch.inf, torch.nan, torch.finfo(torch.float32).max), device="cpu")
    for place, other in enumerate((*special, *teacher[~is_finite][:WIDTH])):
        spoilt = finite[: 2 * WIDTH].clone()
        spoilt[2 * place % len(spoilt)] = other
        if kernel.narrow(spoilt.data_ptr(), len(spoilt), found.data_ptr()):
            return False
    return True


def _compile(module: str) -> Kernel:
    from llvmlite import __version__, binding  # noqa: PLC0415  (it is optional)

    if binding.llvm_version_info < OLDEST_LLVM:  # which would print what it does not understand
        raise ImportError(f"llvmlite {__version__} is older than 0.45")
    features = binding.get_host_cpu_features()
    kind = platform.machine()
    if kind not in NEEDED_FEATURES:
        raise _UnfitError(f"it is not made for processors of {kind}")
    if lacking := [name for name in NEEDED_FEATURES[kind] if not features.get(name)]:
        raise _UnfitError(f"this processor has no {' and no '.join(lacking)}")
    if not _may_become_executable():
        raise _UnfitError("this system lets no memory that was written be executed")
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=2
    )
    parsed = binding.parse_assembly(module)
    parsed.verify()
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    functions = [engine.get_function_address(name) for name in ("fold", "narrow", "update_many")]
    # Never unloaded: when a process ends, a thread may still be in there.
    engine.detach()
    return Kernel(*functions)


def _may_become_executable() -> bool:
    """Whether memory that was written may; hardened systems refuse it, which LLVM does not notice before the crash."""
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    page = os.sysconf("SC_PAGE_SIZE")
    memory = ctypes.create_string_buffer(1 << 20)  # too large for a heap, for which systems have other rules
    address = -(-ctypes.addressof(memory) // page) * page
    answer: int = libc.mprotect(address, page, READ | EXECUTE)
    libc.mprotect(address, page, READ | WRITE)
    return answer == 0


def update_all_(pairs: Sequence[Pair], keep: float, take: float, *, lerp: bool) -> list[Pair]:
    """Update what kernels serve of every pair, in torch's own threads; what is left to torch's calls comes back.

    As find_kernel's do. Left are other dtypes and devices, tensors that are not just elements without a gap, and of
    each the elements after the last whole GRAIN: how torch rounds its last few depends on where they are.
    """
    in_parallel = _find_torchs_parallel()
    if in_parallel is None:
        return list(pairs)
    kernels = [_find_kernel_of(pair, lerp=lerp) for pair in pairs]
    if _overlap([teacher for (teacher, _), kernel in zip(pairs, kernels, strict=True) if kernel]):
        return list(pairs)  # two threads would be at the same elements, in any order
    left: list[Pair] = []
    stretches: dict[int, list[_Stretch]] = {}
    for (teacher, student), kernel in zip(pairs, kernels, strict=True):
        if kernel is None:
            left.append((teacher, student))
            continue
        if not teacher.is_inference():  # so that autograd, which a kernel goes around, tells whom it concerns
            torch.autograd.graph.increment_version(teacher)
        whole = teacher.numel() // GRAIN * GRAIN
        own = stretches.setdefault(kernel.update_many, [])
        for begin in range(0, whole, STRETCH_ELEMENTS):
            at, student_at = (tensor.data_ptr() + begin * tensor.itemsize for tensor in (teacher, student))
            own.append((at, student_at, min(STRETCH_ELEMENTS, whole - begin)))
        if whole < teacher.numel():
            left.append((_behind(teacher, whole), _behind(student, whole)))
    for update_many, own in stretches.items():
        numbers = array("q", itertools.chain.from_iterable(own))
        job = _Job(0, len(own), numbers.buffer_info()[0], keep, take)
        # All of them, or none beside this one: OpenMP ends threads that are not asked for, and torch starts them again.
        num_threads = torch.get_num_threads() if len(own) > 1 else 1
        in_parallel(update_many, ctypes.addressof(job), num_threads, 0)
    return left


def _overlap(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether two of them have memory in common; each lies without a gap."""
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
    return any(end > begin for (_, end), (begin, _) in itertools.pairwise(spans))


def _find_kernel_of(pair: Pair, *, lerp: bool) -> Kernel | None:
    teacher, student = pair
    if (
        teacher.numel() < GRAIN
        or not is_made_for(teacher.dtype, student.dtype)
        or not (_is_plain(teacher) and _is_plain(student))
        or (teacher.shape, teacher.stride()) != (student.shape, student.stride())
    ):
        return None
    return find_kernel(teacher.dtype, student.dtype, lerp=lerp)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether there is nothing but numbers at its address: no class that keeps them elsewhere, no memory given back."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and is_dense(tensor)
        and not tensor.is_neg()
        and (tensor.storage_offset() + tensor.numel()) * tensor.itemsize <= tensor.untyped_storage().nbytes()
    )


def _behind(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Its elements after the first `count` in memory."""
    return tensor.as_strided((tensor.numel() - count,), (1,), tensor.storage_offset() + count)


@functools.cache
def _find_torchs_parallel() -> Callable[[int, int, int, int], None] | None:
    """What calls a function of one argument, by their addresses, in so many of torch's threads; None without OpenMP.

    It is what GCC makes of `#pragma omp parallel`, and every OpenMP on Linux has it. Threads of our own would have to
    share the cores with torch's, which look for more to do for milliseconds after each call of torch's.
    """
    # In the order in which the loader looked for torch: a preloaded OpenMP is torch's, too.
    for name in (None, torch._C.__file__):
        with contextlib.suppress(OSError, AttributeError):
            function = ctypes.CDLL(name).GOMP_parallel
            function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            function.restype = None
            return function
    return None
