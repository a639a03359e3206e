"""A teacher's own tensors: the student's in, copies to average in out, which follow it to other devices."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ckpt_ema.errors import CkptEmaError
from ckpt_ema.online.tracking import BEGIN_ANEW, Slot, local_part


def shadow_of(slot: Slot, dtype: str, device: str | None = None) -> torch.Tensor:
    """A copy of the student's tensor to start from, so that there is a teacher before the first update.

    On `device`, or where the student's is.
    """
    student = slot.local.detach()  # or the teacher would be part of the student's graph
    with torch.inference_mode(False):  # or no later update outside of it could change the copy
        wanted = torch.float32 if is_narrow(student) and dtype == "float32" else student.dtype
        return student.to(device or student.device, wanted, copy=True)


def is_narrow(tensor: torch.Tensor) -> bool:
    """Whether a teacher's tensor is in 16 bits or fewer, in which small updates are lost."""
    return tensor.is_floating_point() and tensor.itemsize < 4


def beside(shadow: torch.Tensor, student: torch.Tensor, name: str) -> torch.Tensor:
    """A teacher's own tensor where the student's is by now; raises CkptEmaError where that has another shape."""
    if student.is_meta:
        raise CkptEmaError(
            f"`{name}` of the student is on the meta device now, without numbers",
            hint="update the teacher while the student is on a device",
        )
    if shadow.device != student.device:
        with torch.inference_mode(False):
            shadow = shadow.to(student.device)
    check_shape(shadow, student, name)
    return shadow


def check_shape(teacher: torch.Tensor, student: torch.Tensor, name: str) -> None:
    """Raise CkptEmaError where a tensor of the student was replaced by one of another shape."""
    if teacher.shape != student.shape:
        raise CkptEmaError(
            f"`{name}` has shape {list(student.shape)}, the teacher's {list(teacher.shape)}",
            hint=BEGIN_ANEW,
        )


def check_fit(expected: Mapping[str, torch.Size], stored: Mapping[str, torch.Tensor]) -> None:
    """Raise CkptEmaError with every name and shape in which a stored state differs from what is expected."""
    differences = [f"{name}: missing in the state" for name in expected if name not in stored]
    differences += [f"{name}: missing in the student" for name in stored if name not in expected]
    differences += [
        f"{name}: shape {list(local_part(stored[name]).shape)} in the state, {list(shape)} in the student"
        for name, shape in expected.items()
        if name in stored and local_part(stored[name]).shape != shape
    ]
    if differences:
        raise CkptEmaError(
            f"the teacher's state and the student differ in {len(differences)} tensors",
            details=differences,
            hint="load it for the model it was saved with, sharded the same way or whole",
        )
