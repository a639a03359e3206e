"""The fold: a run directory in, a teacher out.

run -> checkpoints -> catalogue -> updates -> blocks -> engine -> teacher files
"""

from __future__ import annotations

import contextlib
import gc
import glob
import operator
import os
import time
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt_ema.blocks import plan_blocks
from ckpt_ema.catalogue import TeacherTensor, Treatment, build_catalogue
from ckpt_ema.engine.contract import Engine, NonFinite, NonFiniteBlockError, Task
from ckpt_ema.engine.inputs import InputFiles
from ckpt_ema.errors import CkptEmaError, MisuseError
from ckpt_ema.formats import forget_tables, read_contents
from ckpt_ema.formats.folder import has_weights
from ckpt_ema.layouts import Layout, Schema, SchemaPool, compact_layout
from ckpt_ema.model_buffers import read_model_buffers
from ckpt_ema.outputs import check_outputs, resolve_outputs
from ckpt_ema.profiles import coefficients_of, effective_momentum, ema_updates, momentum_for_first_share
from ckpt_ema.provenance import teacher_metadata
from ckpt_ema.records import FoldedCheckpoint, FoldOptions, FoldPlan, FoldReport, PathLike, PlannedTeacher
from ckpt_ema.runs import Checkpoint, Selection, find_checkpoints
from ckpt_ema.students import choose_student, is_flat
from ckpt_ema.teacher_folder import folder_to_fill, staged_companions
from ckpt_ema.timings import Timings
from ckpt_ema.writer import TeacherFile, encode_header

Progress = Callable[[int, int], None]
"""Told (bytes read so far, bytes to read in all)."""


def plan(run: PathLike | Sequence[PathLike], output: PathLike | None = None, **options: Any) -> FoldPlan:
    """Plan a fold without reading a tensor; arguments are those of `fold`."""
    with _reading_tables():
        return _plan(run, output, FoldOptions(**options))


@contextlib.contextmanager
def _reading_tables() -> Iterator[None]:
    """No garbage collection while tables are read: a million new tuples would set it off a thousand times.

    What is kept of one table for the next is let go at the end.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        forget_tables()
        if was_enabled:
            gc.enable()


def _plan(run: PathLike | Sequence[PathLike], output: PathLike | None, wanted: FoldOptions) -> FoldPlan:
    paths = _as_paths(run)
    _check_device(wanted.device)
    selection = Selection(
        include=wanted.include,
        exclude=wanted.exclude,
        from_step=wanted.from_step,
        until_step=wanted.until_step,
        last=wanted.last,
        state=wanted.state,
        prefix=wanted.prefix,
    )
    found = find_checkpoints(paths, selection)
    checkpoints, by_interval = _every(found.checkpoints, wanted)
    newest = checkpoints[-1]
    treatment = Treatment(
        skip_buffers=wanted.skip_buffers,
        buffer_globs=wanted.buffers,
        model_buffers=read_model_buffers(wanted.model, newest.layout.schema.names) if wanted.model else None,
        dtype=wanted.dtype,
    )
    tensors = build_catalogue(
        [(checkpoint.label, checkpoint.layout) for checkpoint in checkpoints],
        treatment,
        known_buffers=newest.known_buffers,
    )
    layouts = [checkpoint.layout for checkpoint in checkpoints]
    if wanted.init is not None:
        layouts.insert(0, _initial_layout(Path(wanted.init), tensors))
    blocks = plan_blocks(
        tensors,
        layouts,
        accumulate=wanted.accumulate,
        memory_budget_bytes=wanted.memory_budget_bytes,
        num_threads=wanted.num_threads,
        num_teachers=len(wanted.momenta),
    )
    is_folder, targets = resolve_outputs(output, found, newest, wanted.momenta)
    all_updates = [
        ema_updates(len(checkpoints), momentum, has_initial_teacher=wanted.init is not None)
        for momentum in wanted.momenta
    ]
    coefficients = [coefficients_of(updates) for updates in all_updates]
    teachers = tuple(
        PlannedTeacher(momentum, target, tuple(updates), shares[0])
        for momentum, target, updates, shares in zip(wanted.momenta, targets, all_updates, coefficients, strict=True)
    )
    by_checkpoint = zip(*(shares[-len(checkpoints) :] for shares in coefficients), strict=True)
    return FoldPlan(
        options=wanted,
        teachers=teachers,
        is_folder=is_folder,
        directory=found.directory,
        checkpoints=tuple(
            FoldedCheckpoint(item.label, item.step, item.unit, shares, item.size, item.state_key, item.format)
            for item, shares in zip(checkpoints, by_checkpoint, strict=True)
        ),
        initial_teacher=Path(wanted.init).name if wanted.init is not None else None,
        tensors=tuple(tensors),
        left_out=(*found.left_out, *by_interval),
        left_out_tensors=tuple(newest.left_out.items()),
        notes=tuple(_notes(newest)),
        warnings=(*found.warnings, *_warnings(checkpoints, teachers, wanted, tensors)),
        blocks=blocks,
        layouts=tuple(layouts),
        newest=newest,
    )


def fold(
    run: PathLike | Sequence[PathLike],
    output: PathLike | None = None,
    *,
    progress: Progress | None = None,
    announce: Callable[[FoldPlan], None] | None = None,
    **options: Any,
) -> FoldReport:
    """Fold the checkpoints of a training run into a teacher, or into several in one pass.

    teacher = (1 - momentum) * teacher + momentum * student, once per checkpoint in step order, the first of which
    is copied: the rule, and on float32 students the bits, of MMDetection's MeanTeacherHook.

    `run` is a run directory, or a list of checkpoints in the order they are to be folded. `output` defaults to
    `teacher.safetensors` in the run directory, or to the folder `teacher` for Hugging Face folders; with a list of
    momenta it is a pattern with `{momentum}`, or a folder. `options` are the fields of `FoldOptions`. `announce` gets
    the plan before a tensor is read; without it, its warnings are issued as Python warnings. `progress` is told
    (bytes read, bytes to read) as it goes, from the folding threads.

    Raises CkptEmaError; then nothing was written and an existing teacher is untouched. Of several teachers each
    appears whole or not at all, one after the other when all are finished.
    """
    planned = plan(run, output, **options)
    with _reading_tables():
        check_outputs(planned)
    if announce is not None:
        announce(planned)
    else:
        for text in planned.warnings:
            warnings.warn(text, stacklevel=2)
    # Here, not above: a plan must not wait for torch.
    from ckpt_ema.engine.choice import choose_engine  # noqa: PLC0415

    updates = [teacher.updates for teacher in planned.teachers]
    choice = choose_engine(
        planned.options.device, planned.blocks, planned.layouts, updates, planned.options.memory_budget_bytes
    )
    started = time.perf_counter()
    read_so_far = 0

    def count(num_bytes: int) -> None:
        nonlocal read_so_far
        read_so_far += num_bytes
        if progress is not None:
            progress(read_so_far, planned.bytes_to_read)

    with contextlib.ExitStack() as stack:
        teachers = [stack.enter_context(_teacher_file(planned, number)) for number in range(len(planned.teachers))]
        timings = _fold_into(teachers, planned, choice.engine, count)
    return FoldReport(planned, choice.device, choice.reason, time.perf_counter() - started, timings)


def _fold_into(
    teachers: Sequence[TeacherFile], planned: FoldPlan, engine: Engine, count: Callable[[int], None]
) -> Timings:
    updates = [teacher.updates for teacher in planned.teachers]
    with InputFiles(planned.layouts) as files:
        try:
            timings = engine(Task(planned.blocks, planned.layouts, updates, files), teachers, count)
        except NonFiniteBlockError as error:
            files.check_unchanged()
            raise _non_finite(planned, error.origin) from error
        files.check_unchanged()
    return timings


@contextlib.contextmanager
def _teacher_file(planned: FoldPlan, number: int) -> Iterator[TeacherFile]:
    """One teacher's file, within its folder where it has one; it appears when the block is left without an error."""
    target, overwrite = planned.teachers[number].output, planned.options.overwrite
    data_bytes, num_alike = planned.blocks.data_bytes, len(planned.teachers) - number
    offsets = planned.blocks.offsets
    entries = sorted(
        ((tensor.name, tensor.dtype, tensor.shape, *offsets[tensor.name]) for tensor in planned.tensors),
        key=operator.itemgetter(3),
    )
    header = encode_header(entries, teacher_metadata(planned, number))
    if not planned.is_folder:
        with TeacherFile(target, header, data_bytes, overwrite=overwrite, num_alike=num_alike) as teacher:
            yield teacher
        return
    source = planned.newest.model_folder
    assert source is not None
    with (
        folder_to_fill(target) as filled,
        staged_companions(source, filled, planned.options.dtype) as commit_companions,
    ):
        weights = filled / f"{source.weights_name}.safetensors"
        with TeacherFile(weights, header, data_bytes, overwrite=overwrite, num_alike=num_alike) as teacher:
            yield teacher
        commit_companions()


def _as_paths(run: PathLike | Sequence[PathLike]) -> list[Path]:
    given = [run] if isinstance(run, (str, os.PathLike)) else list(run)
    if not given or not all(os.fspath(path) for path in given):
        raise MisuseError("no run directory and no checkpoint was given", hint="is a variable of your shell empty?")
    return [Path(path) for path in given]


def _check_device(device: str) -> None:
    # Whether the GPU is there is asked when folding: a plan must not wait for torch.
    if device not in ("auto", "cpu", "cuda") and not (device.startswith("cuda:") and device[5:].isdigit()):
        raise MisuseError(f"`--device` is {device!r}, and must be auto, cpu or cuda[:i]")


def _every(checkpoints: Sequence[Checkpoint], options: FoldOptions) -> tuple[list[Checkpoint], list[tuple[str, str]]]:
    """The checkpoints that the interval selects: the first is the teacher's start, then every interval-th."""
    first = options.interval - 1 if options.init is not None else 0
    kept = list(checkpoints[first :: options.interval])
    if not kept:
        raise MisuseError(
            f"`--interval {options.interval}` leaves none of {len(checkpoints)} checkpoints to fold",
            hint=f"pass `--interval {len(checkpoints)}` or less",
        )
    taken = {id(item) for item in kept}
    left_out = [(item.label, f"not one in {options.interval}") for item in checkpoints if id(item) not in taken]
    return kept, left_out


def _initial_layout(path: Path, tensors: Sequence[TeacherTensor]) -> Layout:
    """The initial teacher's tensors under the students' indices."""
    if not path.exists():
        raise MisuseError(f"`{path}` does not exist", hint="pass a teacher that an earlier fold wrote with `--init`")
    if path.is_dir() and not has_weights(path):
        raise MisuseError(f"`{path}` is no teacher", hint="pass the file or the folder that an earlier fold wrote")
    contents = read_contents(path)
    # A teacher may be one of ours, or a state dict by itself, whose names look like an average's.
    teacher = choose_student(contents, state="" if is_flat(contents) else None)
    differences = []
    for tensor in tensors:
        stored = teacher.tensors.get(tensor.name)
        if tensor.action == "copy":
            continue
        if stored is None:
            differences.append(f"{tensor.name}: missing in `{path.name}`")
        elif stored.shape != tensor.shape:
            differences.append(f"{tensor.name}: shape {list(stored.shape)}, the students' is {list(tensor.shape)}")
        elif stored.dtype.kind != tensor.student_dtype.kind:
            differences.append(f"{tensor.name}: {stored.dtype}, the students' is {tensor.student_dtype}")
    averaged = {tensor.name for tensor in tensors}
    differences += [f"{name}: missing in the students" for name in teacher.tensors if name not in averaged]
    if differences:
        raise CkptEmaError(
            f"{len(differences)} tensors differ between `{path.name}` and the students",
            details=differences,
            hint="pass a teacher of the same model with `--init`",
        )
    # Copied tensors come from the newest student; the initial teacher's are never read, and need not exist.
    layout = compact_layout({t.name: teacher.tensors[t.name] for t in tensors if t.action == "average"}, SchemaPool())
    place = {name: i for i, name in enumerate(layout.schema.names)}
    own = [place.get(tensor.name) for tensor in tensors]
    schema = Schema(
        tuple(tensor.name for tensor in tensors),
        tuple(t.student_dtype if i is None else layout.schema.dtypes[i] for t, i in zip(tensors, own, strict=True)),
        tuple(tensor.shape for tensor in tensors),
        tuple(None if i is None else layout.schema.strides[i] for i in own),
    )
    return replace(
        layout,
        schema=schema,
        file_indices=array("H", [0 if i is None else layout.file_indices[i] for i in own]),
        begins=array("q", [0 if i is None else layout.begins[i] for i in own]),
    )


def _notes(newest: Checkpoint) -> Iterator[str]:
    if newest.state_key:
        yield f"the student is `{newest.state_key}` of each checkpoint"
    for prefix in newest.stripped:
        yield f"`{prefix}` is taken off the tensor names"


def _warnings(
    checkpoints: Sequence[Checkpoint],
    teachers: Sequence[PlannedTeacher],
    options: FoldOptions,
    tensors: Sequence[TeacherTensor],
) -> Iterator[str]:
    if all(tensor.action == "copy" for tensor in tensors):
        yield f"nothing is averaged: all {len(tensors)} tensors are copied from `{checkpoints[-1].label}`"
    num_updates = len(teachers[0].updates) - 1
    dominated = [teacher for teacher in teachers if teacher.first_share > 0.5]
    if not num_updates:
        yield f"`{checkpoints[0].label}` is the only checkpoint: the teacher is a copy of it"
    elif dominated:
        if options.init is not None:
            first = f"the initial teacher `{Path(options.init).name}`"
        else:
            first = f"the first checkpoint `{checkpoints[0].label}`"
        momentum = dominated[0].momentum
        keeps = f"{dominated[0].first_share:.1%} of the teacher: momentum {momentum:g} works"
        if len(teachers) > 1:
            shares = ", ".join(f"{teacher.first_share:.1%} (momentum {teacher.momentum:g})" for teacher in dominated)
            keeps = f"{shares} of the teacher: momentum works"
        yield (
            f"{first} keeps {keeps} once per checkpoint here, not once per training step;"
            f" {_mended_momentum(checkpoints, num_updates, momentum)}"
        )


def _mended_momentum(checkpoints: Sequence[Checkpoint], num_updates: int, momentum: float) -> str:
    """The momentum to type instead: the one per step, where steps are known, else one that forgets the first."""
    first, last = checkpoints[0].step, checkpoints[-1].step
    if checkpoints[0].unit == "step" and first is not None and last is not None and len(checkpoints) > 1:
        gap = round((last - first) / (len(checkpoints) - 1))
        if gap > 1:
            per_gap = effective_momentum(momentum, gap)
            if per_gap < 0.9 and (1 - per_gap) ** num_updates <= 0.5:
                return f"{momentum:g} per step is `--momentum {per_gap:.2g}` over gaps of {gap} steps"
    mended = momentum_for_first_share(num_updates, 0.1)
    return f"`--momentum {mended:g}` would leave it 10 %"


def _non_finite(planned: FoldPlan, origin: NonFinite) -> CkptEmaError:
    tensor = next(tensor for tensor in planned.tensors if tensor.index == origin.tensor)
    if origin.layout is None:
        return CkptEmaError(
            f"`{tensor.name}` overflows {tensor.dtype}: every student is finite, the teacher is not",
            hint="pass `--dtype float32`" if tensor.dtype.itemsize < 4 else "pass `--accumulate float64`",
        )
    names = [item.name for item in planned.checkpoints]
    if planned.initial_teacher is not None:
        names.insert(0, planned.initial_teacher)
    name = names[origin.layout]
    if planned.initial_teacher is not None and origin.layout == 0:
        hint = "pass another teacher with `--init`"
    elif len(Path(name).parts) > 1 or planned.directory != planned.newest.path.parent:
        hint = f"leave `{name}` off the list"
    else:
        hint = f"fold without it: `--exclude '{glob.escape(name)}'`"
    if tensor.action == "average":
        hint += f"; if it is a constant mask, copy it: `--buffer '{tensor.name}'`"
    return CkptEmaError(
        f"`{tensor.name}` holds a NaN or an infinity in `{name}`, the first that does; nothing was written", hint=hint
    )
