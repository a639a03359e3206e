"""The update on a GPU in one pass over memory: teachers and students in, the teachers changed by one kernel.

torch's own calls read and write the teacher twice. Triton comes with torch's CUDA builds; where it is missing, cannot
compile or rounds otherwise than torch on a device, its kernel is not used there, and torch's calls remain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ckpt_ema.engine.arithmetic import Pair, has_torchs_bits, is_dense

BLOCK_ELEMENTS = 4096
"""Of one program of the kernel: 16 for each of its threads, so that each has several reads of 16 bytes under way."""

NUM_WARPS = 8
ALIGNMENT_BYTES = 16
"""Of a read; tensors that begin elsewhere are left to torch."""

TRIED_ELEMENTS = 16 * BLOCK_ELEMENTS + 7
"""Enough that any other rounding shows in thousands of them, and an end that fills no block."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_reasons: dict[tuple[torch.device, torch.dtype, torch.dtype, bool], str] = {}


def is_usable(device: torch.device, teacher: torch.dtype, student: torch.dtype, *, lerp: bool = False) -> bool:
    """Whether the kernel serves tensors of these dtypes on a device, with the bits of torch's own calls there."""
    return not why_not(device, teacher, student, lerp=lerp)


def why_not(device: torch.device, teacher: torch.dtype, student: torch.dtype, *, lerp: bool = False) -> str:
    """Why the kernel is not usable; empty where it is.

    That is tried once, on some thousands of elements, which makes the host wait for the device; never while a CUDA
    graph is captured, where only what was tried before is usable.
    """
    if device.type != "cuda" or teacher not in DTYPES or student not in DTYPES:
        return f"it is not made for {teacher} and {student} on {device}"
    key = (device, teacher, student, lerp)
    if key not in _reasons:
        if torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured"
        try:
            with _syncs_allowed():
                _reasons[key] = "" if _has_torchs_bits(*key) else "it rounds in another way than torch"
        except torch.cuda.OutOfMemoryError as error:  # not for good: the next teacher, or the next fold, may have room
            return str(error)
        except Exception as error:  # no Triton, no compiler for its launcher, a device it does not know: whatever it is
            _reasons[key] = f"{type(error).__name__}: {error}"
    return _reasons[key]


@contextlib.contextmanager
def _syncs_allowed() -> Iterator[None]:
    """A user who looks for waits shall not find this one: it comes once."""
    mode = torch.cuda.get_sync_debug_mode()
    if not mode:  # setting it warns, whatever it is set to
        yield
        return
    torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _has_torchs_bits(device: torch.device, teacher: torch.dtype, student: torch.dtype, lerp: bool) -> bool:
    def update_many_(old: torch.Tensor, new: torch.Tensor, keep: float, take: float) -> None:
        _Table.of([(old, new)]).launch(keep, take, lerp=lerp)

    return all(
        has_torchs_bits(update_, device, teacher, student, lerp=lerp, count=TRIED_ELEMENTS)
        for update_ in ((update_many_,) if lerp else (update_many_, update_run_))
    )


def update_run_(teacher: torch.Tensor, student: torch.Tensor, keep: float, take: float) -> None:
    """`teacher.mul_(keep).add_(student, alpha=take)` for contiguous tensors of shape [n], where that is usable.

    Both begin at a multiple of ALIGNMENT_BYTES.
    """
    from ckpt_ema.engine import kernels  # noqa: PLC0415  (Triton is there only with a GPU)

    grid = (-(-teacher.numel() // BLOCK_ELEMENTS),)
    with torch.cuda.device(teacher.device):
        kernels.update_run[grid](
            teacher, student, teacher.numel(), keep, take, block=BLOCK_ELEMENTS, num_warps=NUM_WARPS
        )


class FusedUpdates:
    """Many pairs with one kernel per device and pair of dtypes, by tables of their addresses that stay on the device.

    Nothing waits for the device, and where the addresses are those of the call before a CUDA graph may be captured.
    """

    def __init__(self, *, lerp: bool) -> None:
        """For `lerp_(student, take)`, take up to LARGEST_LERP, or else for `mul_(keep).add_(student, alpha=take)`."""
        self._lerp = lerp
        self._key: object = None
        self._tables: list[_Table] = []
        self._served: list[int] = []
        self._others: list[int] = []

    def prepare(self, pairs: Sequence[Pair]) -> bool:
        """Try the kernel and make the tables for these pairs, now or for an update that is still to come.

        False where that is not possible.
        """
        key = tuple((t.data_ptr(), s.data_ptr(), t.stride(), s.stride(), t.shape, t.dtype, s.dtype) for t, s in pairs)
        # While a graph is captured no table can be brought to the device.
        if key != self._key and not torch.cuda.is_current_stream_capturing():
            self._key = None  # until all of it is worked out
            self._divide(pairs)
            self._key = key
        return key == self._key

    def update_(self, pairs: Sequence[Pair], keep: float, take: float) -> list[Pair]:
        """Update every pair that the kernel serves; those that are left to torch come back."""
        if not self.prepare(pairs):
            return list(pairs)
        for table in self._tables:
            table.launch(keep, take, lerp=self._lerp)
        for index in self._served:
            teacher = pairs[index][0]
            if not teacher.is_inference():  # so that autograd, which the kernel goes around, tells whom it concerns
                torch.autograd.graph.increment_version(teacher)
        return [pairs[index] for index in self._others]

    def _divide(self, pairs: Sequence[Pair]) -> None:
        groups: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
        self._others = []
        for index, (teacher, student) in enumerate(pairs):
            kind = (teacher.device, teacher.dtype, student.dtype)
            # Of one dtype torch's lerp is one pass already.
            is_worth_it = teacher.numel() and not (self._lerp and teacher.dtype is student.dtype)
            if is_worth_it and _lie_alike(teacher, student) and is_usable(*kind, lerp=self._lerp):
                groups.setdefault(kind, []).append(index)
            else:
                self._others.append(index)
        self._served = [index for members in groups.values() for index in members]
        self._tables = [_Table.of([pairs[index] for index in members]) for members in groups.values()]


@dataclass(frozen=True, slots=True)
class _Table:
    """Tensors of one pair of dtypes on one device; the arrays are int64, on the device."""

    chunks: torch.Tensor
    """Per program of the kernel: a tensor's index times 2**32, and which of its blocks."""

    teachers: torch.Tensor
    students: torch.Tensor
    counts: torch.Tensor
    dtypes: tuple[torch.dtype, torch.dtype]

    @staticmethod
    def of(pairs: Sequence[Pair]) -> _Table:
        counts = [teacher.numel() for teacher, _ in pairs]
        blocks = [-(-count // BLOCK_ELEMENTS) for count in counts]
        chunks = [torch.arange(number, device="cpu") + (index << 32) for index, number in enumerate(blocks)]
        addresses = [[tensor.data_ptr() for tensor in side] for side in zip(*pairs, strict=True)]
        device = pairs[0][0].device
        arrays = (torch.tensor(values, dtype=torch.int64, device="cpu") for values in (*addresses, counts))
        moved = [_moved(array, device) for array in (torch.cat(chunks), *arrays)]
        return _Table(moved[0], moved[1], moved[2], moved[3], (pairs[0][0].dtype, pairs[0][1].dtype))

    def launch(self, keep: float, take: float, *, lerp: bool) -> None:
        """`lerp_(student, take)` of all of them, or else `mul_(keep).add_(student, alpha=take)`."""
        import triton  # noqa: PLC0415

        from ckpt_ema.engine import kernels  # noqa: PLC0415

        teacher, student = (getattr(triton.language, str(dtype).removeprefix("torch.")) for dtype in self.dtypes)
        with torch.cuda.device(self.chunks.device):
            kernels.update_many[(len(self.chunks),)](
                self.chunks,
                self.teachers,
                self.students,
                self.counts,
                keep,
                take,
                teacher_dtype=teacher,
                student_dtype=student,
                lerp=lerp,
                block=BLOCK_ELEMENTS,
                num_warps=NUM_WARPS,
            )


def _moved(array: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device, without waiting for what that has still to do."""
    return array.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else array


def _lie_alike(teacher: torch.Tensor, student: torch.Tensor) -> bool:
    """Whether both hold the same elements in the same order without a gap, from addresses that the kernel can use."""
    return (
        student.device == teacher.device
        and student.stride() == teacher.stride()
        and is_dense(teacher)
        and not any(tensor.data_ptr() % ALIGNMENT_BYTES for tensor in (teacher, student))
    )
