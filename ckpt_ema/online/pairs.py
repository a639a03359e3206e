"""A teacher's tensors beside the student's: modules in, pairs by name out, or every difference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch

from ckpt_ema.errors import CkptEmaError, MisuseError
from ckpt_ema.online.shadows import beside, check_fit, check_shape, is_narrow, shadow_of
from ckpt_ema.online.tracking import Slot, Tracking, is_sharded, part_of, placed_like, track, unwrap


class Pair:
    """One tensor of the teacher, in a module or of its own, and the student's that it follows."""

    __slots__ = ("names", "student", "teacher")

    def __init__(self, names: tuple[str, ...], student: Slot, teacher: torch.Tensor | Slot) -> None:
        self.names = names
        """All that the teacher's tensor has; a tied one has several."""

        self.student = student
        """The place of the tensor that is followed."""

        self.teacher = teacher
        """Its tensor, or the place of a module's, which may get another one."""

    @property
    def local(self) -> torch.Tensor:
        """The teacher's numbers, of a sharded tensor this rank's."""
        return self.teacher.local if isinstance(self.teacher, Slot) else self.teacher


class Pairing:
    """A student and its teacher, tensor by tensor, for as long as neither is built anew."""

    def __init__(
        self, student: Tracking, teacher: torch.nn.Module | None, *, dtype: str = "float32", device: str | None = None
    ) -> None:
        """The teacher's tensors are those of the module `teacher`, or else shadows: copies of the student's.

        Shadows of 16-bit tensors are in float32, or with `dtype="student"` in 16 bits; they are on `device`, or
        wherever the student's are by then. Raises CkptEmaError where two modules do not fit.
        """
        self.student = student
        """What is followed."""

        self.module = None if teacher is None else unwrap(teacher)
        """Whose tensors the teacher's are; None where it has its own."""

        self._teacher = None if teacher is None else track(teacher, skip_buffers=student.skip_buffers, whose="teacher")
        self._has_moving_shadows = teacher is None and device is None
        self.pairs: list[Pair]
        """One for each of the teacher's tensors."""

        if self._teacher is None:
            self.pairs = [Pair(slot.names, slot, shadow_of(slot, dtype, device)) for slot in student.averaged]
        else:
            self.pairs = pairs_of(student, self._teacher)

    def check_dtypes(self) -> None:
        """Raise MisuseError where the teacher has a dtype that nothing can be averaged in."""
        for pair in self.pairs:
            if pair.local.is_floating_point() and pair.local.itemsize == 1:
                raise MisuseError(
                    f"`{pair.names[0]}` of the teacher is {pair.local.dtype}, in which torch has no arithmetic",
                    hint='pass dtype="float32", or make the teacher module float32',
                )

    def prepare(self) -> None:
        """Refuse a teacher module that has changed, and undo what forwards left.

        FSDP2's root keeps whole parameters after one; that of a teacher module, which has no backward, does for good.
        """
        self.student.reshard()
        if self._teacher is not None:
            self._teacher.check_complete()
            self._teacher.reshard()

    def tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The student's tensors and the teacher's, as they are now; shadows follow to another device.

        Raises CkptEmaError for modules that have changed.
        """
        self.student.check_complete()
        self.prepare()
        students, teachers = [], []
        for pair in self.pairs:
            student, teacher = pair.student.local, pair.local
            if self._has_moving_shadows:
                teacher = pair.teacher = beside(teacher, student, pair.names[0])
            else:
                check_shape(teacher, student, pair.names[0])
            students.append(student)
            teachers.append(teacher)
        return students, teachers

    def by_name(self) -> dict[str, torch.Tensor]:
        """The teacher's tensors under all of their names, each placed like the student's."""
        return {name: placed_like(pair.student.tensor, pair.local) for pair in self.pairs for name in pair.names}

    def by_first_name(self) -> dict[str, torch.Tensor]:
        """The same with each of them once."""
        return {pair.names[0]: placed_like(pair.student.tensor, pair.local) for pair in self.pairs}

    @property
    def has_shadows(self) -> bool:
        """Whether the teacher's tensors are its own, rather than a module's."""
        return self.module is None

    @property
    def is_narrow(self) -> bool:
        """Whether the teacher has a tensor in 16 bits or fewer, in which small updates are lost."""
        return any(is_narrow(pair.local) for pair in self.pairs)

    def check_stored(self, stored: Mapping[str, torch.Tensor]) -> None:
        """Raise CkptEmaError where `stored`, by first names, sharded like the student's or whole, does not fit."""
        if not self.has_shadows:
            if stored:
                raise CkptEmaError(
                    "the state is that of a MeanTeacher without a teacher module, and here there is one",
                    hint="load it into MeanTeacher(student)",
                )
            return
        expected = {}
        for pair in self.pairs:
            name, student = pair.names[0], pair.student.tensor
            is_whole = is_sharded(student) and name in stored and not is_sharded(stored[name])
            expected[name] = student.shape if is_whole else pair.local.shape
        check_fit(expected, stored)

    def load(self, stored: Mapping[str, torch.Tensor]) -> None:
        """Take over what `check_stored` has let pass; a teacher module keeps what it has."""
        for pair in self.pairs if self.has_shadows else ():
            pair.local.copy_(part_of(stored[pair.names[0]], pair.student.tensor))


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
