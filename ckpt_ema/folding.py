"""The fold: a run directory in, a teacher out.

run -> checkpoints -> catalogue -> updates -> blocks -> engine -> teacher files
"""

from __future__ import annotations

import contextlib
import gc
import glob
import operator
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ckpt_ema.engine.contract import Engine, NonFinite, NonFiniteBlockError, Task
from ckpt_ema.engine.inputs import InputFiles
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.formats import forget_tables
from ckpt_ema.outputs import check_outputs
from ckpt_ema.planning import plan_fold
from ckpt_ema.provenance import teacher_metadata
from ckpt_ema.records import FoldOptions, FoldPlan, FoldReport, PathLike, ReconstructOptions
from ckpt_ema.teacher_folder import folder_to_fill, staged_companions
from ckpt_ema.timings import Timings
from ckpt_ema.writer import TeacherFile, encode_header

Progress = Callable[[int, int], None]
"""Told (bytes read so far, bytes to read in all)."""


def plan(run: PathLike | Sequence[PathLike], output: PathLike | None = None, **options: Any) -> FoldPlan:
    """Plan a fold without reading a tensor; arguments are those of `fold`."""
    with _reading_tables():
        return plan_fold(run, output, FoldOptions(**options))


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
    return _carry_out(plan(run, output, **options), progress, announce)


def plan_reconstruction(run: PathLike | Sequence[PathLike], output: PathLike | None = None, **options: Any) -> FoldPlan:
    """Plan a reconstruction without reading a tensor; arguments are those of `reconstruct`."""
    # Here, not above: it solves with torch, for which a fold's plan must not wait.
    from ckpt_ema.reconstruction import plan_reconstruct  # noqa: PLC0415

    with _reading_tables():
        return plan_reconstruct(run, output, ReconstructOptions(**options))


def reconstruct(
    run: PathLike | Sequence[PathLike],
    output: PathLike | None = None,
    *,
    progress: Progress | None = None,
    announce: Callable[[FoldPlan], None] | None = None,
    **options: Any,
) -> FoldReport:
    """Make the teacher that would have followed the whole of training, from all that a run has stored.

    Students and the snapshots of `MeanTeacher` take part; their coefficients are solved for (see `solver`), and all
    are folded in one pass. `plan.predictions` says how near the result is expected to come. Arguments are those of
    `fold`, with the fields of `ReconstructOptions`; so is what is raised.
    """
    return _carry_out(plan_reconstruction(run, output, **options), progress, announce)


def _carry_out(planned: FoldPlan, progress: Progress | None, announce: Callable[[FoldPlan], None] | None) -> FoldReport:
    with _reading_tables():
        check_outputs(planned)
    if announce is not None:
        announce(planned)
    else:
        for text in planned.warnings:
            warnings.warn(text, stacklevel=3)
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


def _non_finite(planned: FoldPlan, origin: NonFinite) -> CkptEmaError:
    tensor = next(tensor for tensor in planned.tensors if tensor.index == origin.tensor)
    if origin.layout is None:
        return CkptEmaError(
            f"`{tensor.name}` overflows {tensor.dtype}: every student is finite, the teacher is not",
            hint="pass `--dtype float32`" if tensor.dtype.itemsize < 4 else "pass `--accumulate float64`",
        )
    name = planned.inputs[origin.layout].name
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
