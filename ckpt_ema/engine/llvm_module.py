"""What LLVM compiles for a CPU: the update of a float32 teacher by 16-bit students, in its own language.

In vectors already: there is nothing left for LLVM to optimise, which would take longer than the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

WIDTH = 32
"""Elements of a vector, which LLVM makes of several of the machine's. Counts are multiples of it."""

PIECE_ELEMENTS = 4096
"""Elements of the teacher that all students are folded into before the next ones: they stay in the nearest cache."""

# As mul_ and add_ round: the product, and then the rest, which is one multiply-add.
_HOOK = """%kept = fmul %Floats %old, %keeps
  %new = call %Floats @llvm.fma.v{width}f32(%Floats %student, %Floats %takes, %Floats %kept)"""

# As torch's lerp does while take is below a half.
_LERP = """%distance = fsub %Floats %student, %old
  %new = call %Floats @llvm.fma.v{width}f32(%Floats %distance, %Floats %takes, %Floats %old)"""


class _Student(NamedTuple):
    stored: str
    """LLVM's type of an element."""

    widen: str
    """What makes %student of %stored."""

    narrow: str
    """What makes %narrowed of %teacher, or of its %bits: to the nearest, of two to the even one."""

    overflow: int
    """Bits of the least float that is infinite then."""


STUDENTS = {
    torch.float16: _Student(
        stored="half",
        widen="%student = fpext %Stored %stored to %Floats",
        narrow="%narrowed = fptrunc %Floats %teacher to %Stored",
        overflow=0x477FF000,  # 65520
    ),
    # A bfloat16 is a float without its lower half. LLVM's own conversions are slower than shifts.
    torch.bfloat16: _Student(
        stored="i16",
        widen="""%bits = zext %Stored %stored to %Ints
  %shifted = shl %Ints %bits, splat (i32 16)
  %student = bitcast %Ints %shifted to %Floats""",
        narrow="""%upper = lshr %Ints %bits, splat (i32 16)
  %odd = and %Ints %upper, splat (i32 1)
  %almost_half = add %Ints %odd, splat (i32 32767)
  %rounded = add %Ints %bits, %almost_half
  %narrowed_bits = lshr %Ints %rounded, splat (i32 16)
  %narrowed = trunc %Ints %narrowed_bits to %Stored""",
        overflow=0x7F7F8000,
    ),
}
"""What kernels are made for."""

_MODULE = """
%Floats = type <{width} x float>
%Ints = type <{width} x i32>
%Stored = type <{width} x {stored}>

declare %Floats @llvm.fma.v{width}f32(%Floats, %Floats, %Floats)
declare %Ints @llvm.umax.v{width}i32(%Ints, %Ints)
declare i32 @llvm.vector.reduce.umax.v{width}i32(%Ints)
declare i64 @llvm.umin.i64(i64, i64)

; teacher = keep * teacher + take * student. Not inlined: it would be compiled twice.
define void @update(ptr noalias %teachers, ptr noalias readonly %students, i64 %count, float %keep, float %take)
    noinline {{
entry:
  %first_keep = insertelement %Floats poison, float %keep, i64 0
  %keeps = shufflevector %Floats %first_keep, %Floats poison, %Ints zeroinitializer
  %first_take = insertelement %Floats poison, float %take, i64 0
  %takes = shufflevector %Floats %first_take, %Floats poison, %Ints zeroinitializer
  %is_empty = icmp eq i64 %count, 0
  br i1 %is_empty, label %end, label %loop
loop:
  %index = phi i64 [ 0, %entry ], [ %next, %loop ]
  %teacher_at = getelementptr float, ptr %teachers, i64 %index
  %student_at = getelementptr {stored}, ptr %students, i64 %index
  %old = load %Floats, ptr %teacher_at, align 4
  %stored = load %Stored, ptr %student_at, align 2
  {widen}
  {arithmetic}
  store %Floats %new, ptr %teacher_at, align 4
  %next = add nuw nsw i64 %index, {width}
  %goes_on = icmp ult i64 %next, %count
  br i1 %goes_on, label %loop, label %end
end:
  ret void
}}

%Update = type {{ float, float }}

; Several students, piece by piece of the teacher.
define void @fold(ptr %teachers, i64 %count, ptr %all_students, ptr %updates, i64 %num_students) {{
entry:
  %is_empty = icmp eq i64 %count, 0
  br i1 %is_empty, label %end, label %piece
piece:
  %begin = phi i64 [ 0, %entry ], [ %stop, %end_of_piece ]
  %left = sub i64 %count, %begin
  %elements = call i64 @llvm.umin.i64(i64 %left, i64 {piece})
  %teacher = getelementptr float, ptr %teachers, i64 %begin
  br label %one
one:
  %number = phi i64 [ 0, %piece ], [ %next, %one ]
  %students_at = getelementptr ptr, ptr %all_students, i64 %number
  %keep_at = getelementptr %Update, ptr %updates, i64 %number, i32 0
  %take_at = getelementptr %Update, ptr %updates, i64 %number, i32 1
  %students = load ptr, ptr %students_at
  %keep = load float, ptr %keep_at
  %take = load float, ptr %take_at
  %student = getelementptr {stored}, ptr %students, i64 %begin
  call void @update(ptr %teacher, ptr %student, i64 %elements, float %keep, float %take)
  %next = add nuw nsw i64 %number, 1
  %goes_on = icmp ult i64 %next, %num_students
  br i1 %goes_on, label %one, label %end_of_piece
end_of_piece:
  %stop = add nuw nsw i64 %begin, {piece}
  %is_more = icmp ult i64 %stop, %count
  br i1 %is_more, label %piece, label %end
end:
  ret void
}}

; The teacher in the student's dtype, and whether all of it is finite then; where not, only that is to be relied on.
define i32 @narrow(ptr noalias readonly %teachers, ptr noalias %all_narrowed, i64 %count) {{
entry:
  %is_empty = icmp eq i64 %count, 0
  br i1 %is_empty, label %end, label %loop
loop:
  %index = phi i64 [ 0, %entry ], [ %next, %loop ]
  %largest = phi %Ints [ zeroinitializer, %entry ], [ %larger, %loop ]
  %teacher_at = getelementptr float, ptr %teachers, i64 %index
  %narrowed_at = getelementptr {stored}, ptr %all_narrowed, i64 %index
  %teacher = load %Floats, ptr %teacher_at, align 4
  %bits = bitcast %Floats %teacher to %Ints
  %magnitude = and %Ints %bits, splat (i32 2147483647)
  %larger = call %Ints @llvm.umax.v{width}i32(%Ints %largest, %Ints %magnitude)
  {narrow}
  store %Stored %narrowed, ptr %narrowed_at, align 2
  %next = add nuw nsw i64 %index, {width}
  %goes_on = icmp ult i64 %next, %count
  br i1 %goes_on, label %loop, label %end
end:
  %all_largest = phi %Ints [ zeroinitializer, %entry ], [ %larger, %loop ]
  %most = call i32 @llvm.vector.reduce.umax.v{width}i32(%Ints %all_largest)
  %is_finite = icmp ult i32 %most, {overflow}
  %answer = zext i1 %is_finite to i32
  ret i32 %answer
}}

%Job = type {{ i64, i64, ptr, float, float }}
%Stretch = type {{ ptr, ptr, i64 }}

; One student for many tensors, in any number of threads: each takes the next stretch that none has taken, of which
; the job's first number keeps count.
define void @update_many(ptr %job) {{
entry:
  %count_at = getelementptr %Job, ptr %job, i32 0, i32 1
  %stretches_at = getelementptr %Job, ptr %job, i32 0, i32 2
  %keep_at = getelementptr %Job, ptr %job, i32 0, i32 3
  %take_at = getelementptr %Job, ptr %job, i32 0, i32 4
  %count = load i64, ptr %count_at
  %stretches = load ptr, ptr %stretches_at
  %keep = load float, ptr %keep_at
  %take = load float, ptr %take_at
  br label %look
look:
  %mine = atomicrmw add ptr %job, i64 1 monotonic
  %is_there = icmp ult i64 %mine, %count
  br i1 %is_there, label %do, label %end
do:
  %teachers_at = getelementptr %Stretch, ptr %stretches, i64 %mine, i32 0
  %students_at = getelementptr %Stretch, ptr %stretches, i64 %mine, i32 1
  %elements_at = getelementptr %Stretch, ptr %stretches, i64 %mine, i32 2
  %teachers = load ptr, ptr %teachers_at
  %students = load ptr, ptr %students_at
  %elements = load i64, ptr %elements_at
  call void @update(ptr %teachers, ptr %students, i64 %elements, float %keep, float %take)
  br label %look
end:
  ret void
}}
"""


def write_module(student: torch.dtype, *, lerp: bool) -> str:
    """The module that compiled.Kernel calls, for `mul_` and `add_`, or for `lerp_`."""
    arithmetic = (_LERP if lerp else _HOOK).format(width=WIDTH)
    return _MODULE.format(arithmetic=arithmetic, width=WIDTH, piece=PIECE_ELEMENTS, **STUDENTS[student]._asdict())
