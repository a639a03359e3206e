"""What Triton compiles for a GPU: the update of one run of elements, or of many tensors at once, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl


# A number of elements that is a multiple of 16, or not, would be compiled twice.
@triton.jit(do_not_specialize=["count"])
def update_run(teacher, student, count, keep, take, block: tl.constexpr):
    """`teacher = keep * teacher + take * student` for `count` elements at two addresses."""
    begin = tl.program_id(0).to(tl.int64) * block
    _update(teacher + begin, student + begin, count - begin, keep, take, False, block)


@triton.jit
def update_many(
    chunks,
    teachers,
    students,
    counts,
    keep,
    take,
    teacher_dtype: tl.constexpr,
    student_dtype: tl.constexpr,
    lerp: tl.constexpr,
    block: tl.constexpr,
):
    """The same for many tensors, by their addresses and numbers of elements.

    Each of `chunks` is the tensor's index times 2**32, and which of its runs of `block` elements. All tensors begin at
    a multiple of 16 bytes.
    """
    chunk = tl.load(chunks + tl.program_id(0))
    index = chunk >> 32
    begin = (chunk & 0xFFFFFFFF) * block
    teacher = tl.multiple_of(tl.load(teachers + index).to(tl.pointer_type(teacher_dtype)), 16) + begin
    student = tl.multiple_of(tl.load(students + index).to(tl.pointer_type(student_dtype)), 16) + begin
    _update(teacher, student, tl.load(counts + index) - begin, keep, take, lerp, block)


@triton.jit
def _update(teacher, student, count, keep, take, lerp: tl.constexpr, block: tl.constexpr):
    place = tl.arange(0, block)
    # Two ways, since a mask that may be anything keeps the compiler from reading 16 bytes at once.
    if count >= block:
        old = tl.load(teacher + place)
        tl.store(teacher + place, _updated(old, tl.load(student + place), keep, take, lerp))
    else:
        mask = place < count
        old = tl.load(teacher + place, mask=mask)
        tl.store(teacher + place, _updated(old, tl.load(student + place, mask=mask), keep, take, lerp), mask=mask)


@triton.jit
def _updated(teacher, student, keep, take, lerp: tl.constexpr):
    wide = teacher.to(tl.float32)
    student = student.to(tl.float32)
    if lerp:
        new = tl.fma(student - wide, take, wide)
    else:
        # As mul_ and add_ round: the product to the teacher's own dtype, the rest once.
        new = tl.fma(student, take, (wide * keep).to(teacher.dtype).to(tl.float32))
    return new.to(teacher.dtype)
