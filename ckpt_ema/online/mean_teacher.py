"""MeanTeacher: a student that trains in, its exponential moving average out, one update at a time.

The student's tensors are found by name once and read where they lie at each update; the teacher's are changed in place.
"""

from __future__ import annotations

import contextlib
import functools
import numbers
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.utils.hooks import RemovableHandle

from ckpt_ema.averages.profiles import inverted_momentum_warning
from ckpt_ema.averages.response_records import response_record
from ckpt_ema.averages.responses import Ema
from ckpt_ema.errors import CkptEmaError, MisuseError, first_line, warn
from ckpt_ema.formats.folder import WEIGHTS_SUFFIX
from ckpt_ema.locations import RemotePath, as_path
from ckpt_ema.online.attachments import Attachments
from ckpt_ema.online.offload import Offload, hold_back_all
from ckpt_ema.online.pairs import (
    Pair,
    beside,
    check_shape,
    check_stored,
    is_narrow,
    pairs_of,
    places_in,
    shadow_of,
    warn_of_stall,
)
from ckpt_ema.online.rule import Rule, blocks_of, is_finite
from ckpt_ema.online.settings import Arithmetic, OnNonfinite, ShadowDevice, ShadowDtype, check_settings
from ckpt_ema.online.snapshots import Snapshots, SnapshotTracks
from ckpt_ema.online.swap import (
    Swap,
    any_swapped,
    call_all,
    hold_buffers,
    mark_swapped,
    watch_anew,
    written_in,
)
from ckpt_ema.online.teacher_file import OnlineRecord, check_file_replaceable, write_teacher
from ckpt_ema.online.tracking import Tracking, is_sharded, odd_kind_of, part_of, track, unwrap
from ckpt_ema.output.writer import behind_link

STATE_VERSION = 1

_COUNTERS = ("num_steps", "num_updates", "num_skipped")
_CONFIGURATION = ("momentum", "interval", "arithmetic")

Start = Literal["student", "teacher"]


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
        _check_modules(student, teacher)
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
        if half_life is None and (inverted := inverted_momentum_warning(self.momentum, "momentum={:g}")):
            warn(inverted)
        self._rule = Rule(lerp=arithmetic == "lerp")
        self.num_steps = 0
        """Calls of `update` that came to their end, but for captured ones."""
        self.num_updates = 0
        """Those that changed the teacher; the first of them copied the student."""
        self.num_skipped = 0
        """Updates left out because the student was not finite."""
        self._student = student
        self._tracking = track(student, skip_buffers=skip_buffers)
        self._start: Start | None = "teacher" if keep_teacher else None
        # The step whose student was copied last, and num_updates then.
        self._copied: tuple[int, int] | None = None
        # What a snapshot's step had beyond num_steps, once one was written.
        self._offset: int | None = None
        # Whether a graph may change the teacher, how often nobody tells: no formula describes it from then on.
        self._is_captured = False
        self._is_swapped = False
        self._attachments = Attachments()
        self._owns_tensors = teacher is None
        if teacher is not None and device is not None:
            raise MisuseError(
                "`device` is for a teacher that is kept here, and a teacher module stays where it is",
                hint="omit one of the two",
            )
        self._offload = None if device is None else Offload()
        self._teacher = None if teacher is None else unwrap(teacher)
        self._module_tracking = None if teacher is None else track(teacher, skip_buffers=skip_buffers, whose="teacher")
        if self._module_tracking is not None:
            self._pairs = pairs_of(self._tracking, self._module_tracking)
            warn_of_stall(self._pairs)
        elif keep_teacher:
            raise MisuseError("`keep_teacher` needs a teacher module", hint="pass MeanTeacher(student, teacher)")
        else:
            self._pairs = [Pair(slot.names, slot, shadow_of(slot, dtype, device)) for slot in self._tracking.averaged]
        for pair in self._pairs:
            if pair.local.is_floating_point() and pair.local.itemsize == 1:
                raise MisuseError(
                    f"`{pair.names[0]}` of the teacher is {pair.local.dtype}, in which torch has no arithmetic",
                    hint='pass dtype="float32", or make the teacher module float32',
                )
        self._tracks = None if snapshots is None else SnapshotTracks(snapshots, self._tracking)
        if odd := [slot for slot in self._tracking.copied if odd_kind_of(slot.tensor)]:
            warn(
                f"`{odd[0].name}` is {odd_kind_of(odd[0].tensor)}, which no safetensors file holds, so `save` will"
                " fail; register it with persistent=False"
            )

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
        return dict(self._tracking.reasons)

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
        if _is_capturing():
            self._capture()
            return True
        step = self.num_steps + 1
        is_due = step % self.interval == 0
        if not is_due and self._tracks is None:
            self.num_steps = step
            return False
        students, teachers = self._tensors()
        is_left_out = self._settings.on_nonfinite is not None and not self._all_ranks(is_finite(students))
        if is_left_out and self._settings.on_nonfinite == "raise":
            raise self._not_finite(step)
        if is_due and is_left_out:
            self.num_skipped += 1
        elif is_due:
            self._average(students, teachers, step)
        self.num_steps = step
        if self._tracks is not None:
            if not is_left_out:
                self._tracks.update(step)
            self._tracks.write_due(step, self._record(step, {}))
        return is_due and not is_left_out

    def _capture(self) -> None:
        outside = "call `teacher.update()` outside of `with torch.cuda.graph(...)`"
        copy_first = "call `teacher.copy_student()` before `with torch.cuda.graph(...)`"
        for what, is_one, hint in (
            ("an update with `snapshots`", self._tracks is not None, outside),
            ("an update with `on_nonfinite`", self._settings.on_nonfinite is not None, outside),
            ('an update with `device="cpu"`', self._offload is not None, outside),
            ("the first update, which copies the student,", self._start is None, copy_first),
        ):
            if is_one:
                raise CkptEmaError(f"{what} cannot be captured in a CUDA graph", hint=hint)
        students, teachers = self._tensors()
        self._fold(teachers, students, is_first=False)
        self._is_captured = True

    def _average(self, students: list[torch.Tensor], teachers: list[torch.Tensor], step: int) -> None:
        fold = functools.partial(self._fold, teachers, is_first=self._start is None)
        # None until this update is complete: an interrupted one leaves some tensors a step ahead.
        copied, self._copied = self._copied, None
        if self._offload is None:
            fold(students)
        else:
            is_parameter = [isinstance(pair.student.tensor, torch.nn.Parameter) for pair in self._pairs]
            self._offload.update(students, is_parameter, fold)
            if self._start is None:
                self._offload.wait()  # one that fails is no copy to average on from
        self.num_updates += 1
        self._copied = copied
        if self._start is None:
            self._begin_from_student(step, teachers)

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

    def __getstate__(self) -> dict[str, Any]:
        """What copying and pickling take, when no thread changes it any more."""
        self._begin("copy the teacher")
        state = {**self.__dict__, "_attachments": Attachments()}  # no optimizer updates the copy
        if self._is_captured:
            # No graph changes the copy; what one did to the numbers is in them.
            state |= {"_copied": None, "_is_captured": False}
        return state

    @torch.no_grad()
    def copy_student(self) -> None:
        """Make the teacher a copy of the student as it is now, from which the next update averages on.

        Snapshot tracks stay as they are.
        """
        self._begin("copy the student")
        students, teachers = self._tensors()
        for teacher, student in zip(teachers, students, strict=True):
            teacher.copy_(student)
        self._rule.prepare(teachers, students)
        self._begin_from_student(self.num_steps, teachers)

    def _begin_from_student(self, step: int, teachers: Sequence[torch.Tensor]) -> None:
        """Remember that `teachers` hold a copy of the student of `step`; in 16 bits no formula follows from that."""
        self._start = "student"
        self._copied = None if any(map(is_narrow, teachers)) else (step, self.num_updates)

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Update after every `optimizer.step()` from now on; `remove()` of what is returned ends that.

        An `update` of your own beside it counts one step more, and is warned of once.
        A step that GradScaler skips is none, but for a fused optimizer, which is called and changes nothing: the
        teacher moves towards the same student once more then. Warns where the optimizer has none of the student's
        parameters. Raises MisuseError for what is no optimizer of torch's, nor accelerate's wrapper around one, and
        where this teacher is attached to it already.
        """
        self._prepare_modules()  # FSDP2 may hold others since a forward
        return self._attachments.add(optimizer, self, [pair.student.tensor for pair in self._pairs])

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
        if self._start is None:
            self._warn_of_beginning("is swapped in")
        target = self._student if module is None else module
        tracking = track(target, skip_buffers=self.skip_buffers)
        places = places_in(tracking, self._pairs)
        swaps = [Swap(place) for place, _, _ in places]
        root = unwrap(target)
        undo: list[Callable[[], object]] = [hold_buffers(root, swaps)]
        written: list[str] = []
        ends_well = False
        hold_back_all()
        try:
            try:
                self._is_swapped = True
                # The teacher module, too: it holds what the other one held.
                mark_swapped([root] if self._teacher is None else [root, self._teacher], undo)
                for swap, (_, pair, is_first) in zip(swaps, places, strict=True):
                    swap.put_in(pair.local, undo, exchanges=is_first)
                for swap in swaps:
                    swap.watch()
                yield target
                ends_well = True
            finally:
                written = written_in(root, swaps)
        finally:
            try:
                failure = self._take_back(tracking, undo)
            except BaseException as error:  # Ctrl-C between two of its lines: what is left is done now
                failure = self._take_back(tracking, undo) or error
            watch_anew(swaps)
            if written:
                self._copied = None  # no formula describes it any more
                # Where warnings are errors, what the block raised says more.
                with contextlib.nullcontext() if ends_well else contextlib.suppress(UserWarning):
                    self._warn_of_writes(written)
            if failure is not None:
                raise failure

    def _warn_of_writes(self, names: Sequence[str]) -> None:
        listed = ", ".join(f"`{name}`" for name in names[:3])
        warn(
            f"{listed}{' and more' if len(names) > 3 else ''} of the module were written to while the teacher's numbers"
            " were in it: the teacher holds what was written; go on from its last state (`teacher.load_state_dict`),"
            " and write to the module outside of the `with` block"
        )

    def _take_back(self, tracking: Tracking, undo: list[Callable[[], object]]) -> BaseException | None:
        """End a swap; called once more, it goes on where it was interrupted. What was raised meanwhile comes back."""
        tracking.reshard()
        failure = call_all(undo)
        self._is_swapped = False
        return failure

    def tensors(self) -> dict[str, torch.Tensor]:
        """The teacher's averaged tensors by name, tied ones under each of their names.

        They are the teacher's own, and change with the next update. Under FSDP2 each is a DTensor with the student's
        placement and on its device, with `device="cpu"` a copy.
        """
        self._begin("read the teacher")
        return {name: _like(pair.student.tensor, pair.local) for pair in self._pairs for name in pair.names}

    def state_dict(self) -> dict[str, Any]:
        """Counters, configuration and, unless a teacher module keeps them, the teacher's tensors; snapshot tracks too.

        The tensors are the teacher's own: save them, or copy them, before the next update.
        """
        self._begin("save the state")
        state: dict[str, Any] = {
            "version": STATE_VERSION,
            "start": self._start,
            "copied": None if self._copied is None or self._is_captured else list(self._copied),
            "offset": self._offset,
            "skip_buffers": self.skip_buffers,
            **{name: getattr(self, name) for name in (*_COUNTERS, *_CONFIGURATION)},
        }
        if self._owns_tensors:
            state["tensors"] = {pair.names[0]: _like(pair.student.tensor, pair.local) for pair in self._pairs}
        if self._tracks is not None:
            state["snapshots"] = self._tracks.state_dict()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Under FSDP2 the state is each rank's own, sharded the same way, or the same on all of them with whole tensors.
        Raises CkptEmaError with every name and shape that does not fit, nothing changed then; warns where momentum,
        interval or arithmetic are others now, which hold from here on, where the teacher's dtype is another, and where
        snapshot tracks begin anew or end because the state or this MeanTeacher has none.
        """
        self._begin("load a state")
        required = {"version", "start", "skip_buffers", *_COUNTERS, *_CONFIGURATION}
        if state.get("version") != STATE_VERSION or not required <= state.keys():
            raise CkptEmaError(
                f"no state of a MeanTeacher: its version is {state.get('version')!r}, not {STATE_VERSION}, or a part is"
                " missing",
                hint="pass what `MeanTeacher.state_dict()` returned",
            )
        if bool(state["skip_buffers"]) != self.skip_buffers:
            raise CkptEmaError(
                f"the state was made with skip_buffers={state['skip_buffers']}, and here it is {self.skip_buffers}",
                hint=f"make the MeanTeacher with skip_buffers={state['skip_buffers']}",
            )
        stored: Mapping[str, torch.Tensor] = state.get("tensors", {})
        if self._owns_tensors:
            check_stored(self._pairs, stored)
        elif stored:
            raise CkptEmaError(
                "the state is that of a MeanTeacher without a teacher module, and here there is one",
                hint="load it into MeanTeacher(student)",
            )
        snapshots = state.get("snapshots")
        if self._tracks is not None and snapshots is not None:
            self._tracks.check_state(snapshots)
        counters, copied, offset = _counts_in(state)
        told = [
            f"the teacher was made with {name}={state[name]!r}, and continues with {getattr(self, name)!r}"
            for name in _CONFIGURATION
            if state[name] != getattr(self, name)
        ]
        if self._tracks is not None and snapshots is not None:
            self._tracks.load_state_dict(snapshots)
        # From here on nothing fails, so that it is loaded as a whole; warnings, which may be errors, come last.
        if self._owns_tensors:
            other = [pair for pair in self._pairs if stored[pair.names[0]].dtype is not pair.local.dtype]
            if other:
                dtypes = stored[other[0].names[0]].dtype, other[0].local.dtype
                told.append(f"the stored teacher is {dtypes[0]}, and goes on in {dtypes[1]}")
            for pair in self._pairs:
                pair.local.copy_(part_of(stored[pair.names[0]], pair.student.tensor))
        self._start = state["start"]
        # A state of another momentum or interval is no average that a formula describes any more.
        is_alike = all(state[name] == getattr(self, name) for name in ("momentum", "interval"))
        # In 16 bits most updates were lost, whatever it is kept in from here on.
        was_narrow = any(is_narrow(tensor) for tensor in stored.values())
        self._copied = copied if is_alike and not was_narrow else None
        self._offset = offset
        for name, value in counters.items():
            setattr(self, name, value)
        if self._tracks is None and snapshots is not None:
            told.append("the state has snapshot tracks, which end here: pass snapshots=")
        elif self._tracks is not None and snapshots is None:
            told.append(f"the state has no snapshot tracks: they begin anew after step {self.num_steps}")
            self._tracks.start_anew()
        for text in told:
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
        step = None if step is None else _as_step(step)
        path = as_path(path)
        if path.suffix != ".safetensors":
            stem = WEIGHTS_SUFFIX.sub("", str(path)) if path.name else str(path / "teacher")
            raise MisuseError(
                f"`{path}` does not end with .safetensors, which is what it is written as",
                hint=f"pass `{stem}.safetensors`",
            )
        return self._write(path, step, is_snapshot=False, dtype=dtype, overwrite=overwrite)

    def save_snapshot(self, run: str | os.PathLike[str], step: int) -> Path:
        """Write `RUN/teacher_step_STEP.safetensors`, in full precision, with how it was averaged in its metadata.

        Beside the run's checkpoints it does not disturb a fold, which leaves averages of this tool out; a
        reconstruction takes it for what it is, where its response is known exactly. `step`, from 0 on,
        counts calls of `update`; where it does not from one file to the next, no response is claimed.
        Where training goes back to an earlier step, remove those of later ones: they are of another path.
        """
        step = _as_step(step)
        path = as_path(run) / f"teacher_step_{step}.safetensors"
        written = self._write(path, step, is_snapshot=True, dtype="teacher", overwrite=True)
        if self._offset is None:
            self._offset = step - self.num_steps
        return written

    @torch.no_grad()
    def stalled_fraction(self) -> float:
        """How much of the teacher the next update would not move though the student differs there, from 0 to 1.

        In 16 bits, momentum times the difference is often less than half of the teacher's last place, and lost.
        """
        self._begin("measure the teacher")
        differing = stalled = 0
        for pair in self._pairs:
            for teacher, part in blocks_of(pair.local, pair.student.local):
                student = part.to(teacher.device)
                moved = teacher.clone(memory_format=torch.contiguous_format)
                self._rule.average_(moved, student.contiguous(), self.momentum)
                differs = teacher != student.to(teacher.dtype)
                differing += int(differs.sum())
                stalled += int((differs & (moved == teacher)).sum())
        return stalled / differing if differing else 0.0

    @torch.no_grad()
    def _write(self, path: Path, step: int | None, *, is_snapshot: bool, dtype: str, overwrite: bool) -> Path:
        if isinstance(path, RemotePath):
            raise MisuseError(f"`{path}` is a URL, and a teacher is written to a local disk", hint="pass a local path")
        self._begin("save the teacher")
        if self._start is None:
            self._warn_of_beginning("is written")
        check_file_replaceable(path, overwrite=overwrite, by_snapshot=is_snapshot)
        if any(is_sharded(pair.student.tensor) for pair in self._pairs):
            raise CkptEmaError(
                "the teacher is sharded over ranks, and no rank has all of it",
                hint='torch.distributed.checkpoint.save({"teacher": teacher.state_dict()}, checkpoint_id=PATH)',
            )
        self.check_finite()
        averaged = {name: (pair.local, pair.student.tensor) for pair in self._pairs for name in pair.names}
        # Looked for now: a buffer may have come since.
        tracking = track(self._student, skip_buffers=self.skip_buffers)
        copied = {name: slot.tensor for slot in tracking.copied for name in slot.names if name not in averaged}
        # Elsewhere an infinity is a mask, or the start of a minimum, and a NaN what nobody has measured yet.
        statistics = [name for name in copied if name.rpartition(".")[2] in ("running_mean", "running_var")]
        broken = [name for name in statistics if copied[name].isnan().any()]
        if broken:
            raise CkptEmaError(
                f"`{broken[0]}` of the student holds a NaN, which the teacher would have too; nothing was written",
                hint="go on from the last state that was saved; running statistics also move in steps that are skipped",
            )
        record = self._record(step, {name: tracking.reasons[name] for name in copied})
        if is_snapshot:
            assert step is not None
            response = self._response(step)
            record = replace(record, more={"response": None if response is None else response_record(response)})
        write_teacher(
            behind_link(path) if overwrite else path, averaged, copied, record, dtype=dtype, overwrite=overwrite
        )
        return path

    def _warn_of_beginning(self, what: str) -> None:
        whose = "the student as it was when this teacher was made" if self._owns_tensors else "the module as it is"
        warn(f"no update has come yet: what {what} is {whose}")

    def _record(self, step: int | None, reasons: Mapping[str, str]) -> OnlineRecord:
        return OnlineRecord(
            momentum=self.momentum,
            interval=self.interval,
            skip_buffers=self.skip_buffers,
            arithmetic=self.arithmetic,
            start=self._start,
            num_steps=self.num_steps,
            num_updates=self.num_updates,
            num_skipped=self.num_skipped,
            step=step,
            reasons=reasons,
            ties=[pair.names for pair in self._pairs if len(pair.names) > 1],
        )

    def _response(self, step: int) -> Ema | None:
        """How the teacher depends on the student's path, where the step now is `step`; None unless that is exact."""
        if self._is_captured or self._copied is None or self._copied[0] % self.interval:
            return None
        if any(is_narrow(pair.local) for pair in self._pairs):
            return None  # most of its updates were lost
        if self._offset is not None and self._offset != step - self.num_steps:
            return None  # what `step` counts are no calls of `update`
        num_steps, num_updates = self.num_steps - self._copied[0], self.num_updates - self._copied[1]
        start = step - num_steps
        if num_updates != num_steps // self.interval or start < 0:  # some were skipped, or somebody set num_steps
            return None
        # The steps after the last update have no share in it.
        return Ema(self.momentum, start, start + num_updates * self.interval, self.interval)

    def check_finite(self) -> None:
        """Raise CkptEmaError where the teacher, under FSDP2 this rank's part, holds a NaN or an infinity.

        Waits for a GPU.
        """
        self._begin("look at the teacher")
        if not is_finite([pair.local for pair in self._pairs]):
            bad = next(pair.names[0] for pair in self._pairs if not is_finite([pair.local]))
            raise CkptEmaError(
                f"`{bad}` holds a NaN or an infinity in the teacher; nothing was written",
                hint='go on from the last state that was saved, with on_nonfinite="raise"',
            )

    def _tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The student's tensors and the teacher's, which follow a student that was moved to another device."""
        self._tracking.check_complete()
        self._prepare_modules()
        students, teachers = [], []
        for pair in self._pairs:
            student = pair.student.local
            if isinstance(pair.teacher, torch.Tensor) and self._offload is None:
                pair.teacher = beside(pair.teacher, student, pair.names[0])
            else:
                check_shape(pair.local, student, pair.names[0])
            students.append(student)
            teachers.append(pair.local)
        return students, teachers

    def _all_ranks(self, holds: bool) -> bool:
        """Whether it holds on every rank that has a part of the student: all skip an update, or none."""
        if not any(is_sharded(pair.student.tensor) for pair in self._pairs):
            return holds
        flag = torch.tensor(int(holds), device=self._pairs[0].student.local.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return bool(flag.item())

    def _not_finite(self, step: int) -> CkptEmaError:
        bad = next((pair.names[0] for pair in self._pairs if not is_finite([pair.student.local])), None)
        what = f"`{bad}` holds a NaN or an infinity in the student" if bad else "another rank's student is not finite"
        return CkptEmaError(
            f"{what} at step {step}; the teacher is unchanged",
            hint='pass on_nonfinite="skip" to leave such updates out',
        )

    def _begin(self, what: str) -> None:
        """All that looks at the teacher or changes it begins so."""
        self._refuse_swapped(what)
        self.wait()
        self._prepare_modules()

    def _prepare_modules(self) -> None:
        """Refuse a teacher module that has changed, and undo what forwards left.

        FSDP2's root keeps whole parameters after one; that of a teacher module, which has no backward, does for good.
        """
        self._tracking.reshard()
        if self._module_tracking is not None:
            self._module_tracking.check_complete()
            self._module_tracking.reshard()

    def _refuse_swapped(self, what: str) -> None:
        # Also another teacher's: it would take those numbers for the student's.
        if self._is_swapped or any_swapped(unwrap(self._student)):
            raise CkptEmaError(
                f"cannot {what} while the teacher's numbers are swapped into a module",
                hint="do it after the `with teacher.swapped_into(...)` block",
            )


def _counts_in(state: Mapping[str, Any]) -> tuple[dict[str, int], tuple[int, int] | None, int | None]:
    """Of a state the counters, the step that was copied last with the updates of then, and the offset of its steps.

    Raises CkptEmaError for what no MeanTeacher writes.
    """
    copied, offset = state.get("copied"), state.get("offset")
    try:
        if state["start"] not in (None, *get_args(Start)):
            raise ValueError(f"start is {state['start']!r}")
        counters = {name: int(state[name]) for name in _COUNTERS}
        step_and_updates = None if copied is None else (int(copied[0]), int(copied[1]))
        return counters, step_and_updates, None if offset is None else int(offset)
    except (TypeError, ValueError, IndexError) as error:
        raise CkptEmaError(
            f"the state is damaged: {first_line(error)}", hint="pass what `MeanTeacher.state_dict()` returned"
        ) from error


def _check_modules(student: object, teacher: object) -> None:
    if not isinstance(student, torch.nn.Module):
        raise MisuseError(f"the student is of type {type(student).__name__}, and must be a torch.nn.Module")
    if isinstance(teacher, (int, float)):
        raise MisuseError(
            f"the teacher is {teacher!r}, and must be a torch.nn.Module", hint=f"pass `momentum={teacher}`"
        )
    if teacher is not None and not isinstance(teacher, torch.nn.Module):
        raise MisuseError(f"the teacher is of type {type(teacher).__name__}, and must be a torch.nn.Module")


def _as_step(step: Any) -> int:
    # numpy's integers as well.
    if isinstance(step, bool) or not isinstance(step, numbers.Integral) or step < 0:
        raise MisuseError(f"step is {step!r}, and must be a whole number from 0", hint="pass the trainer's counter")
    return int(step)


def _is_capturing() -> bool:
    # To ask where no GPU was used yet would begin to use one.
    is_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return is_used and torch.cuda.is_current_stream_capturing()


def _like(student: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """The teacher's tensor in the form of the student's: sharded where that is."""
    if not is_sharded(student):
        return local
    # Here, not above: it takes as long to import as all the rest of torch.
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    assert isinstance(student, DTensor)
    mesh, placements = student.device_mesh, student.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=student.shape, stride=student.stride())
