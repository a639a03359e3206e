"""The update `teacher = keep * teacher + take * student` with the bits of the hook's own `mul_` and `add_`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

SMALLEST_KEEP = 1e-30

GRAIN = 32768
"""Elements that torch gives a thread at least, a multiple of every vector: whole ones of these it rounds alike, since
borders between its threads fall on them."""

TRIED_ELEMENTS = GRAIN
"""Enough that any other rounding shows in thousands of them, and still for one thread of torch's."""

LARGEST_LERP = 0.4999
"""From a half on torch's lerp counts from the other end; so near to it, a share may become one as a float32."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""A teacher's tensor and the student's of the same shape."""


def update_(teacher: torch.Tensor, student: torch.Tensor, keep: float, take: float) -> None:
    """In place, `teacher.mul_(keep).add_(student, alpha=take)`, in one pass over memory where torch offers one.

    `teacher` has shape [1, n], `student` [n]; both are contiguous, of one dtype, and n is a multiple of
    blocks.ELEMENT_MULTIPLE for each of torch's threads: past the last whole vector torch rounds in another way.
    """
    # addr ignores its input when beta is 0, or rounds to 0 in the dtype; mul_ lets a NaN through.
    if abs(keep) > SMALLEST_KEEP and addr_has_the_hooks_bits(teacher.dtype):
        teacher.addr_(_one(teacher.dtype), student, beta=keep, alpha=take)
    else:
        teacher.mul_(keep).add_(student, alpha=take)


@functools.cache
def addr_has_the_hooks_bits(dtype: torch.dtype) -> bool:
    """Whether `addr`, which is `beta * teacher + alpha * (1 * student)`, rounds here as the hook's two calls do.

    It does where the compiler of this torch made a multiply-add of the same one of its two products, as add_ is
    written. Nobody promises that, so it is tried: any other choice shows in thousands of these elements.
    """
    if dtype not in (torch.float32, torch.float64):
        return False

    def update(teacher: torch.Tensor, student: torch.Tensor, keep: float, take: float) -> None:
        teacher.view(1, -1).addr_(_one(dtype), student, beta=keep, alpha=take)

    return has_torchs_bits(update, torch.device("cpu"), dtype, dtype, lerp=False)


def has_torchs_bits(
    update: Callable[[torch.Tensor, torch.Tensor, float, float], None],
    device: torch.device,
    teacher: torch.dtype,
    student: torch.dtype,
    *,
    lerp: bool,
    count: int = TRIED_ELEMENTS,
) -> bool:
    """Whether `update(teacher, student, keep, take)` changes `count` elements of a device as torch's own calls do.

    These are `mul_(keep).add_(student, alpha=take)`, or `lerp_(student, take)` up to LARGEST_LERP. Waits for the
    device.
    """
    # Whatever device is the default one.
    generator = torch.Generator("cpu").manual_seed(0)
    # One after the other: few enough for one thread of torch's.
    scales = [torch.randint(-40, 40, (count,), generator=generator, device="cpu") for _ in range(2)]
    values = [torch.randn(count, generator=generator, device="cpu") * torch.exp2(scale) for scale in scales]
    special = (0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-42, 3e38)
    for row in values:
        row[: len(special)] = torch.tensor(special, device="cpu")
    values[1][1 : len(special) + 1] = torch.tensor(special, device="cpu")
    old, new = values[0].to(device, teacher), values[1].to(device, student)
    for take in (0.001, 0.1, 1 / 3):
        expected, found = old.clone(), old.clone()
        if lerp:
            expected.lerp_(new.to(teacher), take)
        else:
            expected.mul_(1 - take).add_(new, alpha=take)
        update(found, new, 1 - take, take)
        # Number by number, -0.0 not being 0.0; one NaN is as good as another.
        same = (expected == found) & (expected.signbit() == found.signbit())
        if not (same | (expected.isnan() & found.isnan())).all():
            return False
    return True


@functools.cache
def _one(dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(1, dtype=dtype, device="cpu")


def sign_of_finiteness(elements: torch.Tensor) -> torch.Tensor:
    """A number, still on the device, that is finite only when every one of `elements` (at least one) is.

    In one pass without a temporary. It may be infinite for finite elements; then each has to be looked at.
    """
    elements = comparable(elements)
    # In float16 a sum would overflow at once, in bfloat16 not; a sum in another dtype than the elements' takes torch
    # 20 times as long.
    if elements.dtype is torch.float16:
        least, greatest = torch.aminmax(elements)
        return least.float() - greatest.float()
    return elements.sum()


def comparable(elements: torch.Tensor) -> torch.Tensor:
    """8-bit floats know no arithmetic; float32 holds all of them."""
    return elements.float() if elements.dtype.itemsize == 1 else elements


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements lie without a gap: row by row, or with the channels last."""
    if tensor.is_contiguous():
        return True
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    return channels_last is not None and tensor.is_contiguous(memory_format=channels_last)
