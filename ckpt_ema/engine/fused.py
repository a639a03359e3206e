"""The update on a GPU in one pass over memory: teachers and students in, the teachers changed by one kernel.

torch's own calls read and write the teacher twice. Triton comes with torch's CUDA builds; where it is missing, cannot
compile or rounds otherwise than torch on a device, its kernel is not used there, and torch's calls remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BLOCK_ELEMENTS = 4096
NUM_WARPS = 8
ALIGNMENT_BYTES = 16
MAX_TABLES = 8
"""Kept of one rule: a teacher's, and those of the snapshot tracks that share it."""

TRIED_ELEMENTS = 16 * BLOCK_ELEMENTS + 7

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Pair = tuple[torch.Tensor, torch.Tensor]
"""A teacher's tensor and the student's of the same shape."""

_tried: dict[tuple[torch.device, torch.dtype, torch.dtype, bool], bool] = {}


def is_usable(device: torch.device, teacher: torch.dtype, student: torch.dtype, *, lerp: bool = False) -> bool:
    """Whether the kernel serves tensors of these dtypes on a device, with the bits of torch's own calls there.

    That is tried once, on some thousands of elements, which makes the host wait for the device; never while a CUDA
    graph is captured, where only what was tried before is usable.
    """
    if device.type != "cuda" or teacher not in DTYPES or student not in DTYPES:
        return False
    key = (device, teacher, student, lerp)
    if key not in _tried:
        if torch.cuda.is_current_stream_capturing():
            return False
        try:
            _tried[key] = _has_torchs_bits(*key)
        except Exception:  # no Triton, no compiler for its launcher, a device it does not know: whatever it is
            _tried[key] = False
    return _tried[key]


def _has_torchs_bits(device: torch.device, teacher: torch.dtype, student: torch.dtype, lerp: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, TRIED_ELEMENTS, generator=generator)
    values *= torch.exp2(torch.randint(-40, 40, values.shape, generator=generator))
    values[:, 1:20:3] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-42, 3e38])
    old, new = values[0].to(device, teacher), values[1].to(device, student)
    for take in (0.001, 0.1, 1 / 3):
        expected, found = old.clone(), [old.clone() for _ in range(1 if lerp else 2)]
        if lerp:
            expected.lerp_(new.to(teacher), take)
        else:
            expected.mul_(1 - take).add_(new, alpha=take)
            update_run_(found[1], new, 1 - take, take)
        _Table.of([(found[0], new)]).launch(1 - take, take, lerp=lerp)
        if not all(_are_the_same(expected, each) for each in found):
            return False
    return True


def _are_the_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Number by number, -0.0 not being 0.0; one NaN is as good as another."""
    same = (one == other) & (one.signbit() == other.signbit())
    return bool((same | (one.isnan() & other.isnan())).all())


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

    Nothing waits for the device, and once the tables are there (the addresses are those of an earlier call) a CUDA
    graph may be captured.
    """

    def __init__(self, *, lerp: bool) -> None:
        """For `lerp_(student, take)`, take below 0.5, or else for `mul_(keep).add_(student, alpha=take)`."""
        self._lerp = lerp
        self._divided: dict[tuple[object, ...], tuple[list[_Table], list[int]]] = {}

    def update_(self, pairs: Sequence[Pair], keep: float, take: float) -> list[Pair]:
        """Update every pair that the kernel serves; those that are left to torch come back."""
        key = tuple((t.data_ptr(), s.data_ptr(), t.numel(), t.dtype, s.dtype) for t, s in pairs)
        if key not in self._divided:
            if torch.cuda.is_current_stream_capturing():  # a table cannot be brought to the device now
                return list(pairs)
            while len(self._divided) >= MAX_TABLES:
                del self._divided[next(iter(self._divided))]
            self._divided[key] = self._divide(pairs)
        tables, others = self._divided[key]
        for table in tables:
            table.launch(keep, take, lerp=self._lerp)
        return [pairs[index] for index in others]

    def _divide(self, pairs: Sequence[Pair]) -> tuple[list[_Table], list[int]]:
        """What the kernel does, and the places of what it does not."""
        groups: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
        others = []
        for index, (teacher, student) in enumerate(pairs):
            kind = (teacher.device, teacher.dtype, student.dtype)
            # Of one dtype torch's lerp is one pass already.
            is_worth_it = teacher.numel() and not (self._lerp and teacher.dtype is student.dtype)
            if is_worth_it and _lie_alike(teacher, student) and is_usable(*kind, lerp=self._lerp):
                groups.setdefault(kind, []).append(index)
            else:
                others.append(index)
        return [_Table.of([pairs[index] for index in members]) for members in groups.values()], others


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
        chunks = torch.cat([torch.arange(number) + (index << 32) for index, number in enumerate(blocks)])
        addresses = [[tensor.data_ptr() for tensor in side] for side in zip(*pairs, strict=True)]
        device = pairs[0][0].device
        teachers, students, sizes = (torch.tensor(values).to(device) for values in (*addresses, counts))
        return _Table(chunks.to(device), teachers, students, sizes, (pairs[0][0].dtype, pairs[0][1].dtype))

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


def _lie_alike(teacher: torch.Tensor, student: torch.Tensor) -> bool:
    """Whether both hold the same elements in the same order without a gap, from addresses that the kernel can use."""
    if student.device != teacher.device or teacher.stride() != student.stride():
        return False
    is_dense = any(
        teacher.is_contiguous(memory_format=form)
        for form in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
        if form is torch.contiguous_format or teacher.dim() == _DIMENSIONS[form]
    )
    return is_dense and not any(tensor.data_ptr() % ALIGNMENT_BYTES for tensor in (teacher, student))


_DIMENSIONS = {torch.channels_last: 4, torch.channels_last_3d: 5}
