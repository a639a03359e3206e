"""What LLVM compiles for a CPU: the update of a float32 teacher by 16-bit students, in its own language."""

from __future__ import annotations

import torch

PIECE_ELEMENTS = 4096
"""Elements of the teacher that all students are folded into before the next ones: they stay in the nearest cache."""

# As mul_ and add_ round: the product, and then the rest, which is one multiply-add.
_HOOK = """%kept = fmul float %old, %keep
  %new = call float @llvm.fma.f32(float %student, float %take, float %kept)"""

# As torch's lerp does while take is below a half.
_LERP = """%distance = fsub float %student, %old
  %new = call float @llvm.fma.f32(float %distance, float %take, float %old)"""

STUDENTS = {
    torch.float16: ("half", "%student = fpext half %stored to float"),
    # A bfloat16 is a float without its lower half. LLVM's own conversion is slower than a shift.
    torch.bfloat16: (
        "i16",
        """%bits = zext i16 %stored to i32
  %shifted = shl i32 %bits, 16
  %student = bitcast i32 %shifted to float""",
    ),
}
"""LLVM's type of a stored student, and what makes a float of one."""

_MODULE = """
declare float @llvm.fma.f32(float, float, float)
declare i64 @llvm.umin.i64(i64, i64)

; teacher = keep * teacher + take * student. Not inlined: it would be compiled twice.
define void @update(ptr noalias %teachers, ptr noalias readonly %students, i64 %count, float %keep, float %take)
    noinline {{
entry:
  %is_empty = icmp eq i64 %count, 0
  br i1 %is_empty, label %end, label %loop
loop:
  %index = phi i64 [ 0, %entry ], [ %next, %loop ]
  %teacher_at = getelementptr float, ptr %teachers, i64 %index
  %student_at = getelementptr {stored}, ptr %students, i64 %index
  %old = load float, ptr %teacher_at
  %stored = load {stored}, ptr %student_at
  {widen}
  {arithmetic}
  store float %new, ptr %teacher_at
  %next = add nuw nsw i64 %index, 1
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
    stored, widen = STUDENTS[student]
    return _MODULE.format(stored=stored, widen=widen, arithmetic=_LERP if lerp else _HOOK, piece=PIECE_ELEMENTS)
