"""MeanTeacher: a student that trains in, its exponential moving average out, one update at a time.

The student's tensors are found by name once and read where they lie at each update; the teacher's are changed in place.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ckpt_ema.averages.profiles import inverted_momentum_warning
from ckpt_ema.averages.response_records import response_record
from ckpt_ema.errors import CkptEmaError, warn
from ckpt_ema.keywords import made_of_known_keywords
from ckpt_ema.locations import as_path
from ckpt_ema.online.attachments import Attachments
from ckpt_ema.online.capture import check_capturable, is_capturing
from ckpt_ema.online.finiteness import check_teacher_finite, is_student_finite, nonfinite_error
from ckpt_ema.online.lineage import Lineage
from ckpt_ema.online.offload import Offload, hold_back_all
from ckpt_ema.online.pairs import Pairing
from ckpt_ema.online.rule import Rule
from ckpt_ema.online.saving import check_local, check_suffix, save_teacher, warn_of_unsavable
from ckpt_ema.online.settings import (
    Arithmetic,
    OnNonfinite,
    Settings,
    ShadowDevice,
    ShadowDtype,
    as_step,
    check_modules,
    check_settings,
    check_teacher_options,
)
from ckpt_ema.online.snapshots import Snapshots, SnapshotTracks
from ckpt_ema.online.stalls import stalled_fraction, warn_of_stall
from ckpt_ema.online.state import COUNTERS, state_entries, stored_state
from ckpt_ema.online.swap import Swapping, is_swapped, warn_of_writes
from ckpt_ema.online.teacher_file import OnlineRecord, check_file_replaceable
from ckpt_ema.online.tracking import track, unwrap


@made_of_known_keywords
class MeanTeacher:
    """A teacher that follows a student: `teacher = (1 - momentum) * teacher + momentum * student`.

    The rule, the choice of tensors and on float32 the bits are those of MMDetection's MeanTeacherHook, and of
    `ckpt_ema.fold` on checkpoints saved at every update: the first update copies the student, every later one
    averages. Tensors are paired by name; a tied weight is updated once; frozen parameters take part.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        teacher: torch.nn.Module | None = None,
        *,
        momentum: float | None = None,
        half_life: float | None = None,
        interval: int = 1,
        skip_buffers: bool = True,
        dtype: ShadowDtype = "float32",
        device: ShadowDevice | None = None,
        arithmetic: Arithmetic = "hook",
        on_nonfinite: OnNonfinite | None = None,
        keep_teacher: bool = False,
        snapshots: Snapshots | None = None,
    ) -> None:
        """Follow `student`, bare or wrapped by DDP, FSDP2 or torch.compile.

        Without `teacher` the teacher's numbers are kept here, beside the student's and as large; a `teacher` module
        is updated in place instead, in its own dtype.

        `momentum` (default 0.001) is the share that the student brings at each update, 0 < momentum < 1; or
        `half_life` is the number of steps after which a student's share has halved. Every `interval`-th call of
        `update` counts. `skip_buffers` averages parameters alone, otherwise every floating-point entry of the state
        dict. `dtype="float32"` keeps 16- and 8-bit students' teacher in float32; "student" in their own, where small
        updates are lost. `arithmetic="lerp"` is one rounding closer to the exact average, with other bits than the
        hook's. `device="cpu"` keeps the teacher in host memory: the student is copied there on a stream beside
        training's, and a thread does the arithmetic (which no CUDA graph captures); `wait` says what it asks of you.
        `on_nonfinite` says what an update does when the student holds a NaN or an infinity: "raise", "skip", or with
        None not look, which would take about half as long as the update and make the host wait for a GPU.
        `keep_teacher` starts from what the teacher module holds instead of a copy of the student.
        `snapshots` follows further averages at every step, whatever the interval, and writes them to files of their
        own, from which `ckpt-ema reconstruct` makes any other average later. Each costs a teacher's memory beside the
        student and one update per step. The step in their files is `num_steps`, which is to be set where training
        goes on without a state. With torch.distributed the first rank alone writes.

        Raises MisuseError for options that make no sense and CkptEmaError where the modules do not fit.
        """
        check_modules(student, teacher)
        self._settings = check_settings(
            momentum=momentum,
            half_life=half_life,
            interval=interval,
            skip_buffers=skip_buffers,
            dtype=dtype,
            device=device,
            arithmetic=arithmetic,
            on_nonfinite=on_nonfinite,
            snapshots=snapshots,
        )
        if half_life is None and (inverted := inverted_momentum_warning(self._settings.momentum, "momentum={:g}")):
            warn(inverted)
        check_teacher_options(has_module=teacher is not None, device=device, keep_teacher=keep_teacher)
        self.num_steps = 0
        """Calls of `update` that came to their end, but for captured ones."""

        self.num_updates = 0
        """Those that changed the teacher; the first of them copied the student."""

        self.num_skipped = 0
        """Updates left out because the student was not finite."""

        self._student = student
        self._lineage = Lineage("teacher" if keep_teacher else None)
        self._attachments = Attachments()
        self._rule = Rule(lerp=arithmetic == "lerp")
        self._offload = None if device is None else Offload()
        tracking = track(student, skip_buffers=skip_buffers)
        self._pairing = Pairing(tracking, teacher, dtype=dtype, device=device)
        if teacher is not None:
            warn_of_stall(self._pairing.pairs)
        self._pairing.check_dtypes()
        self._tracks = None if snapshots is None else SnapshotTracks(snapshots, tracking)
        warn_of_unsavable(tracking)

    @property
    def student(self) -> torch.nn.Module:
        """The module that is followed, as it was passed."""
        return self._student

    @property
    def momentum(self) -> float:
        """The student's share at each update."""
        return self._settings.momentum

    @property
    def interval(self) -> int:
        """Steps from one update to the next."""
        return self._settings.interval

    @property
    def skip_buffers(self) -> bool:
        """Whether parameters alone are averaged."""
        return self._settings.skip_buffers

    @property
    def arithmetic(self) -> Arithmetic:
        """`hook` or `lerp`."""
        return self._settings.arithmetic

    @property
    def skipped(self) -> dict[str, str]:
        """The student's tensors that are not averaged, and why."""
        return dict(self._pairing.student.reasons)

    def update(self) -> bool:
        """Count one training step; at every `interval`-th one fold the student in. True when the teacher changed.

        Snapshot tracks take one update each at every call, and are written where a file is due. Call it after
        `optimizer.step()`. Raises CkptEmaError, the teacher, the tracks and the counters unchanged, where the student
        is not finite or has lost or gained parameters; and, with the step counted, where a snapshot cannot be written.
        With `device="cpu"` it may raise what `wait` raises.

        While a CUDA graph is captured it puts one update of the teacher into the graph, whatever the interval, and
        counts nothing, nor does a replay. Keep this object as long as the graph. An update that would copy the student
        (the first), snapshots, `on_nonfinite` and `device="cpu"` cannot be captured, and raise CkptEmaError. After
        `load_state_dict` update once before: the graph would get torch's own calls, which take longer.
        """
        if torch.compiler.is_compiling():
            # Inductor would round otherwise, so torch.compile must not trace this call.
            return bool(torch._dynamo.disable(self.update)())  # type: ignore[no-untyped-call]
        self._refuse_swapped("update the teacher")
        if self._attachments.handles:
            self._attachments.warn_of_update_beside()
        with torch.no_grad():
            return self._update()

    def _update(self) -> bool:
        if is_capturing():
            self._capture()
            return True
        step = self.num_steps + 1
        is_due = step % self.interval == 0
        if not is_due and self._tracks is None:
            self.num_steps = step
            return False
        students, teachers = self._pairing.tensors()
        on_nonfinite = self._settings.on_nonfinite
        is_left_out = on_nonfinite is not None and not is_student_finite(self._pairing.pairs, students)
        if is_left_out and on_nonfinite == "raise":
            raise nonfinite_error(self._pairing.pairs, step)
        if is_due and is_left_out:
            self.num_skipped += 1
        elif is_due:
            self._average(students, teachers, step)
        self.num_steps = step
        if self._tracks is not None:
            if not is_left_out:
                self._tracks.update(step)
            self._tracks.write_due(step, self._record(step))
        return is_due and not is_left_out

    def _capture(self) -> None:
        check_capturable(
            has_snapshots=self._tracks is not None,
            looks_for_nonfinite=self._settings.on_nonfinite is not None,
            is_offloaded=self._offload is not None,
            is_first=self._lineage.start is None,
        )
        students, teachers = self._pairing.tensors()
        self._fold(teachers, students, is_first=False)
        self._lineage.note_capture()

    def _average(self, students: list[torch.Tensor], teachers: list[torch.Tensor], step: int) -> None:
        lineage = self._lineage
        is_first = lineage.start is None
        fold = functools.partial(self._fold, teachers, is_first=is_first)
        suspended = lineage.suspend_formula()
        if self._offload is None:
            fold(students)
        else:
            is_parameter = [isinstance(pair.student.tensor, torch.nn.Parameter) for pair in self._pairing.pairs]
            self._offload.update(students, is_parameter, fold)
            if is_first:
                self._offload.wait()  # one that fails is no copy to average on from
        self.num_updates += 1
        lineage.resume_formula(suspended)
        if is_first:
            lineage.begin_with_student(step, self.num_updates, is_narrow=self._pairing.is_narrow)

    def _fold(self, teachers: Sequence[torch.Tensor], students: Sequence[torch.Tensor], *, is_first: bool) -> None:
        if is_first:
            for teacher, student in zip(teachers, students, strict=True):
                teacher.copy_(student)
            self._rule.prepare(teachers, students)
        else:
            self._rule.average_all_(teachers, students, self.momentum)

    def wait(self) -> None:
        """Wait until the teacher has what the last `update` brought; nothing to wait for without `device="cpu"`.

        With it `update`, but for one that copies the student, returns while that is still being copied out. A step of
        any optimizer of torch's comes after that by itself, and whatever reads the teacher here waits. Call this
        before you change the student in another way: load a state dict into it, write to a parameter, replay a CUDA
        graph with the optimizer's step.
        Raises what went wrong while that update was folded, as the next `update` does.
        """
        if self._offload is not None:
            self._offload.wait()

    @torch.no_grad()
    def copy_student(self) -> None:
        """Make the teacher a copy of the student as it is now, from which the next update averages on.

        Snapshot tracks stay as they are.
        """
        self._begin("copy the student")
        students, teachers = self._pairing.tensors()
        self._fold(teachers, students, is_first=True)
        self._lineage.begin_with_student(self.num_steps, self.num_updates, is_narrow=self._pairing.is_narrow)

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Update after every `optimizer.step()` from now on; `remove()` of what is returned ends that.

        An `update` of your own beside it counts one step more, and is warned of once.
        A step that GradScaler skips is none, but for a fused optimizer, which is called and changes nothing: the
        teacher moves towards the same student once more then. Warns where the optimizer has none of the student's
        parameters. Raises MisuseError for what is no optimizer of torch's, nor accelerate's wrapper around one, and
        where this teacher is attached to it already.
        """
        self._pairing.prepare()  # FSDP2 may hold others since a forward
        return self._attachments.add(optimizer, self, [pair.student.tensor for pair in self._pairing.pairs])

    @contextlib.contextmanager
    def swapped_into(self, module: torch.nn.Module | None = None) -> Iterator[torch.nn.Module]:
        """Put the teacher's numbers into `module` (default: the student) for the length of a `with` block.

        The tensors that the module held come back afterwards, also when the block raises or converts the module. In
        between the teacher can be neither updated nor saved, nor can another that follows one of the two modules.
        Tensors of the teacher's dtype are exchanged in place: a teacher module holds what `module` held meanwhile;
        of others a copy is kept. What is not averaged stays the module's own; running statistics come back as they
        were. Not between a forward of the student's and its backward, which autograd would refuse. Raises
        CkptEmaError, nothing changed, where names, shapes or ties do not fit, and at the end where a sharded
        parameter was converted, which does not come back. Warns where the block wrote to a parameter that was
        exchanged (not by way of `.data`, nor to shards: nobody counts that): the teacher holds that then.
        """
        self._begin("swap it in again")
        self._warn_of_beginning("is swapped in")
        target = self._student if module is None else module
        swapping = Swapping(target, self._pairing)
        written: list[str] = []
        ends_well = False
        hold_back_all()
        try:
            try:
                swapping.put_in()
                yield target
                ends_well = True
            finally:
                written = swapping.written_names()
        finally:
            try:
                failure = swapping.take_back()
            except BaseException as error:  # Ctrl-C between two of its lines: what is left is done now
                failure = swapping.take_back() or error
            if written:
                self._lineage.lose_formula()
                # Where warnings are errors, what the block raised says more.
                with contextlib.nullcontext() if ends_well else contextlib.suppress(UserWarning):
                    warn_of_writes(written)
            if failure is not None:
                raise failure

    def tensors(self) -> dict[str, torch.Tensor]:
        """The teacher's averaged tensors by name, tied ones under each of their names.

        They are the teacher's own, and change with the next update. Under FSDP2 each is a DTensor with the student's
        placement and on its device, with `device="cpu"` a copy.
        """
        self._begin("read the teacher")
        return self._pairing.by_name()

    def state_dict(self) -> dict[str, Any]:
        """Counters, configuration and, unless a teacher module keeps them, the teacher's tensors; snapshot tracks too.

        The tensors are the teacher's own: save them, or copy them, before the next update.
        """
        self._begin("save the state")
        counters = {name: getattr(self, name) for name in COUNTERS}
        snapshots = None if self._tracks is None else self._tracks.state_dict()
        return state_entries(self._lineage, self._current_settings(), self._pairing, counters, snapshots)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Under FSDP2 the state is each rank's own, sharded the same way, or the same on all of them with whole tensors.
        Raises CkptEmaError with every name and shape that does not fit, nothing changed then; warns where momentum,
        interval or arithmetic are others now, which hold from here on, where the teacher's dtype is another, and where
        snapshot tracks begin anew or end because the state or this MeanTeacher has none.
        """
        self._begin("load a state")
        stored = stored_state(state, skip_buffers=self.skip_buffers)
        self._pairing.check_stored(stored.tensors)
        changes = stored.changes(self._current_settings(), self._pairing, has_tracks=self._tracks is not None)
        if self._tracks is not None and stored.snapshots is not None:
            self._tracks.check_state(stored.snapshots)
            self._tracks.load_state_dict(stored.snapshots)
        # From here on nothing fails, so that it is loaded as a whole; warnings, which may be errors, come last.
        self._pairing.load(stored.tensors)
        self._lineage = stored.lineage_under(self._current_settings()).in_place_of(self._lineage)
        for name, value in stored.counters.items():
            setattr(self, name, value)
        if self._tracks is not None and stored.snapshots is None:
            self._tracks.start_anew()
        for text in changes:
            warn(text)

    def save(
        self, path: str | os.PathLike[str], *, step: int | None = None, dtype: str = "student", overwrite: bool = True
    ) -> Path:
        """Write the teacher as a safetensors file with all parameters and buffers of the student's state dict.

        What is not averaged is the student's, as it is now. `step`, the trainer's counter, is what a fold needs to
        continue it (`ckpt-ema fold --init`). `dtype` of averaged tensors: "student", "teacher",
        "float32", "bfloat16" or "float16". The file appears whole or not at all; `overwrite` replaces a teacher that
        ckpt-ema wrote, and never a snapshot or another file. Raises CkptEmaError where the teacher is not finite, and
        for a sharded one, whose `state_dict()` is for torch.distributed.checkpoint.
        """
        step = None if step is None else as_step(step)
        path = as_path(path)
        check_suffix(path)
        return self._write(path, step, is_snapshot=False, dtype=dtype, overwrite=overwrite)

    def save_snapshot(self, run: str | os.PathLike[str], step: int) -> Path:
        """Write `RUN/teacher_step_STEP.safetensors`, in full precision, with how it was averaged in its metadata.

        Beside the run's checkpoints it does not disturb a fold, which leaves averages of this tool out; a
        reconstruction takes it for what it is, where its response is known exactly. `step`, from 0 on,
        counts calls of `update`; where it does not from one file to the next, no response is claimed.
        Where training goes back to an earlier step, remove those of later ones: they are of another path.
        """
        step = as_step(step)
        path = as_path(run) / f"teacher_step_{step}.safetensors"
        written = self._write(path, step, is_snapshot=True, dtype="teacher", overwrite=True)
        self._lineage.note_snapshot(step, self.num_steps)
        return written

    @torch.no_grad()
    def stalled_fraction(self) -> float:
        """How much of the teacher the next update would not move though the student differs there, from 0 to 1.

        In 16 bits, momentum times the difference is often less than half of the teacher's last place, and lost.
        """
        self._begin("measure the teacher")
        return stalled_fraction(self._pairing.pairs, self._rule, self.momentum)

    def check_finite(self) -> None:
        """Raise CkptEmaError where the teacher, under FSDP2 this rank's part, holds a NaN or an infinity.

        Waits for a GPU.
        """
        self._begin("look at the teacher")
        check_teacher_finite(self._pairing.pairs)

    def __getstate__(self) -> dict[str, Any]:
        """What copying and pickling take, when no thread changes it any more."""
        self._begin("copy the teacher")
        # No optimizer updates the copy, and no graph.
        return {**self.__dict__, "_attachments": Attachments(), "_lineage": self._lineage.of_copy()}

    @torch.no_grad()
    def _write(self, path: Path, step: int | None, *, is_snapshot: bool, dtype: str, overwrite: bool) -> Path:
        check_local(path)
        self._begin("save the teacher")
        self._warn_of_beginning("is written")
        check_file_replaceable(path, overwrite=overwrite, by_snapshot=is_snapshot)
        record = self._record(step)
        if is_snapshot:
            assert step is not None
            response = self._lineage.response(step, self._settings, self.num_steps, self.num_updates)
            if self._pairing.is_narrow or self.momentum != self._settings.momentum:
                response = None  # most of its updates were lost, or a subclass has a schedule
            record = replace(record, more={"response": None if response is None else response_record(response)})
        self.check_finite()
        save_teacher(path, self._pairing, self._student, record, dtype=dtype, overwrite=overwrite)
        return path

    def _warn_of_beginning(self, what: str) -> None:
        if self._lineage.start is None:
            beginning = "the student as it was when this teacher was made"
            whose = beginning if self._pairing.has_shadows else "the module as it is"
            warn(f"no update has come yet: what {what} is {whose}")

    def _record(self, step: int | None) -> OnlineRecord:
        return OnlineRecord(
            momentum=self.momentum,
            interval=self.interval,
            skip_buffers=self.skip_buffers,
            arithmetic=self.arithmetic,
            start=self._lineage.start,
            num_steps=self.num_steps,
            num_updates=self.num_updates,
            num_skipped=self.num_skipped,
            step=step,
            ties=[pair.names for pair in self._pairing.pairs if len(pair.names) > 1],
        )

    def _current_settings(self) -> Settings:
        """With the momentum and the interval of a subclass that has its own, such as a schedule's."""
        return replace(self._settings, momentum=self.momentum, interval=self.interval)

    def _begin(self, what: str) -> None:
        """All that looks at the teacher or changes it begins so."""
        self._refuse_swapped(what)
        self.wait()
        self._pairing.prepare()

    def _refuse_swapped(self, what: str) -> None:
        # Also another teacher's: it would take those numbers for the student's.
        if is_swapped(unwrap(self._student), self._pairing):
            raise CkptEmaError(
                f"cannot {what} while the teacher's numbers are swapped into a module",
                hint="do it after the `with teacher.swapped_into(...)` block",
            )
