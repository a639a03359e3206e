"""One update of one tensor: student and teacher in, the teacher changed in place."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch

from ckpt_ema.engine.arithmetic import (
    GRAIN,
    LARGEST_LERP,
    Pair,
    addr_has_the_hooks_bits,
    comparable,
    sign_of_finiteness,
    update_,
)
from ckpt_ema.engine.compiled import update_all_
from ckpt_ema.engine.fused import FusedUpdates

BLOCK_ELEMENTS = 1 << 20
"""Of what is converted, exchanged or tried at once: small enough for the cache, large enough for all cores."""

NORMED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes whose norms torch takes of many tensors at once."""


class Rule:
    """`teacher = (1 - momentum) * teacher + momentum * student`, in the teacher's dtype.

    With the bits of `mul_(1 - momentum).add_(student, alpha=momentum)`, or of `lerp_(student, momentum)`. A GPU does
    all tensors of a pair of dtypes in one kernel where it can, a CPU large 16-bit students. What a CPU converts beside
    goes through one buffer of BLOCK_ELEMENTS: fresh memory costs as much as the update.
    """

    def __init__(self, *, lerp: bool) -> None:
        self._lerp = lerp
        self._fused = FusedUpdates(lerp=lerp)
        self._scratch: dict[torch.dtype, torch.Tensor] = {}

    def prepare(self, teachers: Sequence[torch.Tensor], students: Sequence[torch.Tensor]) -> None:
        """Do what the first update on a GPU would wait for, or could not do while a CUDA graph is captured."""
        if _any_on_gpu(teachers):
            self._fused.prepare(list(zip(teachers, students, strict=True)))

    def average_all_(self, teachers: Sequence[torch.Tensor], students: Sequence[torch.Tensor], momentum: float) -> None:
        """Fold every student's tensor into the teacher's of the same place, with few calls where torch has them."""
        pairs = list(zip(teachers, students, strict=True))
        if not self._lerp or momentum <= LARGEST_LERP:
            if _any_on_gpu(teachers):
                pairs = self._fused.update_(pairs, 1 - momentum, momentum)
            pairs = update_all_(pairs, 1 - momentum, momentum, lerp=self._lerp)
        many: list[Pair] = []
        widened = 0
        for teacher, student in pairs:
            if self._is_for_foreach(teacher, student):
                many.append((teacher, student))
            elif self._is_to_be_widened(teacher, student):
                many.append((teacher, student.to(teacher.dtype)))
                widened += student.numel()
                if widened >= BLOCK_ELEMENTS:
                    self._average_many_(many, momentum)
                    many, widened = [], 0
            else:
                self.average_(teacher, student, momentum)
        self._average_many_(many, momentum)

    def _is_for_foreach(self, teacher: torch.Tensor, student: torch.Tensor) -> bool:
        if self._lerp or not _is_on_cpu(teacher):
            return teacher.dtype is student.dtype
        # Two calls go over a large tensor twice; of a small one the calls themselves take longest. In 16 bits a CPU's
        # _foreach_mul_ rounds otherwise than its mul_.
        return _is_small_and_wide(teacher, student)

    def _is_to_be_widened(self, teacher: torch.Tensor, student: torch.Tensor) -> bool:
        # lerp_ takes one dtype alone, where add_ widens as it goes.
        return self._lerp and _is_on_cpu(teacher) and _is_small_and_wide(teacher, student)

    def _average_many_(self, pairs: Sequence[Pair], momentum: float) -> None:
        if not pairs:
            return
        teachers, students = (list(side) for side in zip(*pairs, strict=True))
        if self._lerp:
            torch._foreach_lerp_(teachers, students, weight=momentum)
        else:
            torch._foreach_mul_(teachers, 1 - momentum)
            torch._foreach_add_(teachers, students, alpha=momentum)

    def average_(self, teacher: torch.Tensor, student: torch.Tensor, momentum: float) -> None:
        """Fold `student` in; both have one shape and are on one device."""
        if teacher.dtype is student.dtype:
            self._average_alike_(teacher, student, momentum)
        elif not self._lerp and (teacher.itemsize <= student.itemsize or not _is_on_cpu(teacher)):
            # The hook's own calls: they compute in the wider dtype, and a GPU's kernels convert while they read.
            teacher.mul_(1 - momentum).add_(student, alpha=momentum)
        else:
            for part, student_part in blocks_of(teacher, student):
                self._average_alike_(part, self._converted(student_part, part), momentum)

    def _average_alike_(self, teacher: torch.Tensor, student: torch.Tensor, momentum: float) -> None:
        keep, take = 1 - momentum, momentum
        if self._lerp:
            teacher.lerp_(student, take)
        elif not _is_on_cpu(teacher) or not (teacher.is_contiguous() and student.is_contiguous()):
            teacher.mul_(keep).add_(student, alpha=take)
        else:
            update_by_pieces_(teacher.view(-1), student.view(-1), keep, take)

    def _converted(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        # Of a layout that cannot be cut into blocks; and a GPU's allocator gives the same memory block after block.
        if student.numel() > BLOCK_ELEMENTS or not _is_on_cpu(teacher):
            return student.to(teacher.dtype)
        scratch = self._scratch.get(teacher.dtype)
        if scratch is None:
            with torch.inference_mode(False):  # or no later update outside of it could use it
                scratch = torch.empty(BLOCK_ELEMENTS, dtype=teacher.dtype, device="cpu")
            self._scratch[teacher.dtype] = scratch
        return scratch[: student.numel()].view(student.shape).copy_(student)


def update_by_pieces_(teacher: torch.Tensor, student: torch.Tensor, keep: float, take: float) -> None:
    """`teacher.mul_(keep).add_(student, alpha=take)` for contiguous tensors of one dimension, on all threads.

    The kernel that does both in one pass rounds what is left of a thread's part after its last whole vector in
    another way. So it gets pieces that come out even on every thread; the rest, less than GRAIN, is done in two calls.
    """
    count = teacher.numel()
    num_threads = torch.get_num_threads()
    even = 0
    if count >= GRAIN and _pieces_have_the_hooks_bits(teacher.dtype, num_threads):
        for multiple in (GRAIN * num_threads, GRAIN):
            begin, even = even, count - count % multiple
            if begin < even:
                update_(teacher[begin:even].view(1, -1), student[begin:even], keep, take)
    if even < count:
        teacher[even:].mul_(keep).add_(student[even:], alpha=take)


@functools.cache
def _pieces_have_the_hooks_bits(dtype: torch.dtype, num_threads: int) -> bool:
    """Whether the pieces come out even on this many threads; torch does not promise how it divides its work."""
    if not addr_has_the_hooks_bits(dtype):
        return False
    count = GRAIN * (3 * num_threads - 1)
    generator = torch.Generator("cpu").manual_seed(0)
    teacher, student = torch.randn(2, count, generator=generator, dtype=dtype, device="cpu")
    expected = teacher.clone().mul_(0.999).add_(student, alpha=0.001)
    for begin, end in ((0, GRAIN * 2 * num_threads), (GRAIN * 2 * num_threads, count)):
        if begin < end:
            update_(teacher[begin:end].view(1, -1), student[begin:end], 0.999, 0.001)
    return torch.equal(teacher, expected)


class Exchange:
    """The contents of two tensors of one shape and dtype exchanged, block by block, and back again.

    It may be interrupted between any two of its lines: called once more, `run` and `undo` go on where they stopped.
    """

    def __init__(self, blocks: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._blocks = blocks
        # Blocks done; what the first tensor held in the one at hand; whether it holds the other's by now. In one
        # tuple: whoever interrupts finds all three of the same moment.
        self._state: tuple[int, torch.Tensor | None, bool] = (0, None, False)
        self._way_back: Exchange | None = None

    def run(self) -> None:
        """Exchange what has not been exchanged yet."""
        while self._state[0] < len(self._blocks):
            self._finish_block()

    def undo(self) -> None:
        """Exchange back what has been exchanged."""
        if self._way_back is None:
            if self._state[1] is not None:
                self._finish_block()
            self._way_back = Exchange(self._blocks[: self._state[0]])
        self._way_back.run()

    def _finish_block(self) -> None:
        done, kept, is_half = self._state
        one, other = self._blocks[done]
        if kept is None:
            kept = one.clone()
            self._state = (done, kept, False)
        if not is_half:
            one.copy_(other)
            self._state = (done, kept, True)
        other.copy_(kept)
        self._state = (done + 1, None, False)


def blocks_of(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of two tensors of one shape, block by block; of the whole where they lie differently in memory."""
    if not (one.is_contiguous() and other.is_contiguous()) or one.numel() <= BLOCK_ELEMENTS:
        yield one, other
        return
    one, other = one.view(-1), other.view(-1)
    for begin in range(0, one.numel(), BLOCK_ELEMENTS):
        yield one[begin : begin + BLOCK_ELEMENTS], other[begin : begin + BLOCK_ELEMENTS]


def is_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity; waits once for each GPU."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    signs: dict[torch.device, list[torch.Tensor]] = {}
    alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        if _is_on_cpu(tensor) or tensor.dtype not in NORMED:
            signs.setdefault(tensor.device, []).append(sign_of_finiteness(tensor).abs().double())
        else:
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for (device, _), group in alike.items():
        # A GPU does all of these in a few calls; a NaN or an infinity stays what it is in a sum of squares.
        signs.setdefault(device, []).append(torch.stack(torch._foreach_norm(group)).double().sum())
    return all(math.isfinite(torch.stack(each).sum().item()) for each in signs.values()) or all(
        bool(comparable(tensor).isfinite().all()) for tensor in tensors
    )


def _is_small_and_wide(teacher: torch.Tensor, student: torch.Tensor) -> bool:
    is_wide = teacher.dtype in (torch.float32, torch.float64) and teacher.itemsize >= student.itemsize
    return is_wide and teacher.numel() < GRAIN and student.dtype in NORMED


def _is_on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _any_on_gpu(tensors: Sequence[torch.Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors)
