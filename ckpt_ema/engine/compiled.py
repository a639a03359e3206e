"""The update of a float32 teacher by 16-bit students on a CPU, in one pass: a loop that LLVM compiles for the machine.

torch has calls of one pass where both have one dtype, and none that widens the student on the way. llvmlite need not be
installed: where it is missing, fails, or rounds otherwise than torch, nothing is compiled and torch's calls remain.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from array import array
from collections.abc import Callable, Sequence

import torch

from ckpt_ema.engine import llvm_module
from ckpt_ema.engine.arithmetic import GRAIN, Pair, has_torchs_bits

OLDEST_LLVM = (20,)

RUN_ELEMENTS = 16 * GRAIN
"""Of a tensor that a thread updates before it looks for more to do: some tens of microseconds."""


class Kernel:
    """`teacher = keep * teacher + take * student`, compiled. Other threads of Python go on meanwhile."""

    def __init__(self, fold: int, share: int) -> None:
        """By the addresses of the module's functions."""
        arguments = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        self._fold = ctypes.CFUNCTYPE(None, *arguments)(fold)
        self.share = share
        """The address of what takes that of a _Job, and does of it what no other thread does."""

    def fold(self, teacher: int, count: int, students: Sequence[int], updates: Sequence[tuple[float, float]]) -> None:
        """Fold several students, at least one, into `count` elements of a teacher, by their addresses.

        `updates` has a student's keep and take each. All elements lie in the same order, without a gap.
        """
        places = (ctypes.c_void_p * len(students))(*students)
        shares = (ctypes.c_float * (2 * len(updates)))(*itertools.chain.from_iterable(updates))
        self._fold(teacher, count, places, shares, len(students))


_RUN_NUMBERS = 3


class _Job(ctypes.Structure):
    """Many runs for several threads: each of the numbered ones is its addresses and its number of elements."""

    _fields_ = (
        ("next", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("runs", ctypes.c_void_p),
        ("keep", ctypes.c_float),
        ("take", ctypes.c_float),
    )


_Kind = tuple[torch.dtype, torch.dtype, bool]

_kernels: dict[_Kind, Kernel | None] = {}
_reasons: dict[_Kind, str] = {}


def kernel_for(teacher: torch.dtype, student: torch.dtype, *, lerp: bool = False) -> Kernel | None:
    """What does `mul_(keep).add_(student, alpha=take)`, or `lerp_(student, take)` up to LARGEST_LERP, in one pass.

    With the bits that torch's calls give whole GRAINs. None where there is no such kernel; `why_not` tells. It is made
    and tried once, which takes 40 ms of a processor for the first, less for others.
    """
    kind = (teacher, student, lerp)
    if kind not in _kernels:
        _kernels[kind] = _tried_kernel(*kind)
    return _kernels[kind]


def why_not(teacher: torch.dtype, student: torch.dtype, *, lerp: bool = False) -> str:
    """Why there is no kernel for a teacher and a student of these dtypes; empty where there is one."""
    return "" if kernel_for(teacher, student, lerp=lerp) else _reasons[teacher, student, lerp]


def _tried_kernel(teacher: torch.dtype, student: torch.dtype, lerp: bool) -> Kernel | None:
    kind = (teacher, student, lerp)
    if teacher is not torch.float32 or student not in llvm_module.STUDENTS:
        _reasons[kind] = f"it is not made for {teacher} and {student}"
        return None
    try:
        kernel = _compiled(llvm_module.text(student, lerp=lerp))
    except Exception as error:  # no llvmlite, or one of another age, a processor it does not know: whatever it is
        _reasons[kind] = f"{type(error).__name__}: {error}"
        return None

    def update_(old: torch.Tensor, new: torch.Tensor, keep: float, take: float) -> None:
        kernel.fold(old.data_ptr(), old.numel(), [new.data_ptr()], [(keep, take)])

    if has_torchs_bits(update_, torch.device("cpu"), teacher, student, lerp=lerp):
        return kernel
    _reasons[kind] = "it rounds in another way than torch"
    return None


def _compiled(module: str) -> Kernel:
    from llvmlite import __version__, binding  # noqa: PLC0415  (it is optional)

    if binding.llvm_version_info < OLDEST_LLVM:  # which would print what it does not understand
        raise ImportError(f"llvmlite {__version__} is older than 0.45")
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
    )
    parsed = binding.parse_assembly(module)
    parsed.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = True
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    fold, share = map(engine.get_function_address, ("fold", "share"))
    # Never unloaded: when a process ends, a thread may still be in there.
    engine.detach()
    return Kernel(fold, share)


def update_all_(pairs: Sequence[Pair], keep: float, take: float, *, lerp: bool) -> list[Pair]:
    """Update what kernels serve of every pair, in torch's own threads; what is left to torch's calls comes back.

    That is `mul_(keep).add_(student, alpha=take)`, or `lerp_(student, take)` up to LARGEST_LERP. Left are tensors on
    other devices, or with something between their elements, and of each the elements behind the last whole GRAIN: how
    torch rounds its last few depends on where they are.
    """
    in_threads = _in_torchs_threads()
    if in_threads is None:
        return list(pairs)
    left: list[Pair] = []
    runs: dict[int, array[int]] = {}
    for teacher, student in pairs:
        whole = teacher.numel() // GRAIN * GRAIN
        kernel = _kernel_of(teacher, student, lerp=lerp) if whole else None
        if kernel is None:
            left.append((teacher, student))
            continue
        if not teacher.is_inference():  # so that autograd, which a kernel goes around, tells whom it concerns
            torch.autograd.graph.increment_version(teacher)
        teacher_at, student_at = teacher.data_ptr(), student.data_ptr()
        own = runs.setdefault(kernel.share, array("q"))
        for begin in range(0, whole, RUN_ELEMENTS):
            count = min(RUN_ELEMENTS, whole - begin)
            own.extend((teacher_at + begin * teacher.itemsize, student_at + begin * student.itemsize, count))
        if whole < teacher.numel():
            left.append((teacher.view(-1)[whole:], student.view(-1)[whole:]))
    for share, own in runs.items():
        address, size = own.buffer_info()
        job = _Job(0, size // _RUN_NUMBERS, address, keep, take)
        in_threads(share, ctypes.addressof(job), min(torch.get_num_threads(), job.count), 0)
    return left


def _kernel_of(teacher: torch.Tensor, student: torch.Tensor, *, lerp: bool) -> Kernel | None:
    if not all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in (teacher, student)):
        return None
    return kernel_for(teacher.dtype, student.dtype, lerp=lerp)


@functools.cache
def _in_torchs_threads() -> Callable[[int, int, int, int], None] | None:
    """What calls a function of one argument, by their addresses, in so many threads of torch's; None without OpenMP.

    Threads of our own would have to share the cores with those, which look for more to do for milliseconds behind each
    call of torch's. On Linux every OpenMP has this entry, which is what GCC makes of `#pragma omp parallel`.
    """
    try:
        # Found as torch's own code finds it: there may be several in a process, each with threads of its own.
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function
