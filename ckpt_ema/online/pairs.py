"""A teacher's tensors beside the student's: two modules in, pairs by name out, or every difference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch

from ckpt_ema.errors import CkptEmaError, warn
from ckpt_ema.online.tracking import BEGIN_ANEW, Slot, Tracking, is_sharded, local_part


class Pair:
    """One tensor of the teacher, in a module or of its own, and the student's that it follows."""

    __slots__ = ("names", "student", "teacher")

    def __init__(self, names: tuple[str, ...], student: Slot, teacher: torch.Tensor | Slot) -> None:
        self.names = names
        self.student = student
        self.teacher = teacher

    @property
    def local(self) -> torch.Tensor:
        """The teacher's numbers, of a sharded tensor this rank's."""
        return self.teacher.local if isinstance(self.teacher, Slot) else self.teacher


def pairs_of(students: Tracking, teachers: Tracking) -> list[Pair]:
    """Each tensor of a teacher module with the student's of the same name.

    Raises CkptEmaError with every name, shape and tie that does not fit, and where both are the same memory.
    """
    by_name = {name: slot for slot in students.averaged for name in slot.names}
    pairs: list[Pair] = []
    differences: list[str] = []
    seen: set[str] = set()
    for slot in teachers.averaged:
        found = {id(by_name[name]): by_name[name] for name in slot.names if name in by_name}
        seen.update(slot.names)
        differences += [f"{name}: missing in the student" for name in slot.names if name not in by_name]
        if len(found) > 1:
            differences.append(f"{' and '.join(slot.names)}: tied in the teacher, but not in the student")
        for student in found.values():
            if student.tensor.shape != slot.tensor.shape:
                shapes = f"{list(student.tensor.shape)} in the student, {list(slot.tensor.shape)} in the teacher"
                differences.append(f"{slot.name}: shape {shapes}")
            if _share_memory(student.local, slot.local):
                differences.append(f"{slot.name}: the same memory in both")
            pairs.append(Pair(slot.names, student, slot))
    differences += [f"{name}: missing in the teacher" for name in by_name if name not in seen]
    differences += [
        f"{one} and {other}: interleaved or overlapping memory in the teacher, which might be updated twice"
        for one, other in _overlaps(teachers.averaged)
    ]
    if differences:
        raise CkptEmaError(
            f"student and teacher differ in {len(differences)} tensors",
            details=differences,
            hint="build both from one configuration, or the teacher by copy.deepcopy(student); keep a part that both"
            " share outside of them",
        )
    return pairs


def places_in(tracking: Tracking, pairs: list[Pair]) -> list[tuple[Slot, Pair, bool]]:
    """Where each of the teacher's tensors goes, and whether it is the first place of its tensor; others come first.

    Raises CkptEmaError with everything that does not fit.
    """
    by_name = {name: slot for slot in tracking.averaged for name in slot.names}
    taken: dict[int, Pair] = {}
    places: list[tuple[Slot, Pair, bool]] = []
    differences: list[str] = []
    for pair in pairs:
        differences += [f"{name}: missing in the module" for name in pair.names if name not in by_name]
        slots = list({id(by_name[name]): by_name[name] for name in pair.names if name in by_name}.values())
        for number, slot in enumerate(slots):
            if taken.setdefault(id(slot), pair) is not pair:
                differences.append(f"{' and '.join(slot.names)}: tied in the module, but not in the teacher")
            if slot.local.shape != pair.local.shape:
                shapes = f"{list(slot.local.shape)} in the module, {list(pair.local.shape)} in the teacher"
                differences.append(f"{slot.name}: shape {shapes}")
            if any(size > 1 and not stride for size, stride in zip(slot.local.shape, slot.local.stride(), strict=True)):
                differences.append(f"{slot.name}: expanded, its elements share memory")
            places.append((slot, pair, number == 0))
    if differences:
        raise CkptEmaError(
            f"the module does not fit the teacher in {len(differences)} places",
            details=differences,
            hint="pass the student, or a module built from the same configuration",
        )
    # What is exchanged is no longer in the teacher: copies of it are made before.
    return sorted(places, key=lambda place: place[2])


def warn_of_stall(pairs: list[Pair]) -> None:
    """Warn of a teacher module in 16 bits."""
    narrow = [pair for pair in pairs if is_narrow(pair.local)]
    if narrow:
        dtype = str(narrow[0].local.dtype).removeprefix("torch.")
        warn(
            f"{len(narrow)} of the teacher module's tensors are {dtype}, in which small updates are lost: make it"
            " float32 with teacher.float(), which works with any student, or see stalled_fraction()"
        )


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


def is_narrow(tensor: torch.Tensor) -> bool:
    """Whether a teacher's tensor is in 16 bits or fewer, in which small updates are lost."""
    return tensor.is_floating_point() and tensor.itemsize < 4


def shadow_of(slot: Slot, dtype: str, device: str | None = None) -> torch.Tensor:
    """A copy of the student's tensor to start from, so that there is a teacher before the first update.

    On `device`, or where the student's is.
    """
    student = slot.local.detach()  # or the teacher would be part of the student's graph
    with torch.inference_mode(False):  # or no later update outside of it could change the copy
        wanted = torch.float32 if is_narrow(student) and dtype == "float32" else student.dtype
        return student.to(device or student.device, wanted, copy=True)


def check_stored(pairs: list[Pair], stored: Mapping[str, torch.Tensor]) -> None:
    """The same as `check_fit` for the teacher's tensors by their first names, sharded like the student's or whole."""
    expected = {}
    for pair in pairs:
        name, student = pair.names[0], pair.student.tensor
        is_whole = is_sharded(student) and name in stored and not is_sharded(stored[name])
        expected[name] = student.shape if is_whole else pair.local.shape
    check_fit(expected, stored)


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


def _overlaps(slots: Sequence[Slot]) -> Iterator[tuple[str, str]]:
    """Names of two tensors that have memory in common and are not tied: a transposed view, for instance."""
    spans = []
    for slot in slots:
        local = slot.local
        if local.numel() and local.layout == torch.strided:
            reach = sum((size - 1) * abs(stride) for size, stride in zip(local.shape, local.stride(), strict=True))
            spans.append(
                (str(local.device), local.data_ptr(), local.data_ptr() + (reach + 1) * local.itemsize, slot.name)
            )
    for (device, _, end, name), (next_device, begin, _, next_name) in itertools.pairwise(sorted(spans)):
        if device == next_device and begin < end:
            yield name, next_name


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(one.numel()) and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
