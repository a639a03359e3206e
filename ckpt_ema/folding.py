"""The fold: a run directory in, a teacher out.

run -> checkpoints -> updates -> catalogue -> blocks -> engine -> teacher files
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import operator
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ckpt_ema.blocks import Block, BlockPlan, plan_of_rank, without
from ckpt_ema.catalogue import TeacherTensor
from ckpt_ema.dtypes import is_rounded
from ckpt_ema.engine.contract import Engine, NonFinite, NonFiniteBlockError, Task, Teacher
from ckpt_ema.engine.inputs import InputFiles, allow_open_files
from ckpt_ema.errors import CkptEmaError, quoted, warn
from ckpt_ema.formats import reading_tables
from ckpt_ema.keywords import refuses_unknown_keywords
from ckpt_ema.options import FoldKeywords, FoldOptions, PathLike, ReconstructKeywords, ReconstructOptions, Unpack
from ckpt_ema.output.fingerprints import differences_of_ranks, fingerprint, made_of
from ckpt_ema.output.journal import FinishedBlocks, Journal, Range, journal_path, open_finished_blocks
from ckpt_ema.output.old_teacher import remove_own
from ckpt_ema.output.targets import check_no_checkpoint, check_outputs, check_parents
from ckpt_ema.output.teacher_files import Entry, TeacherFiles, dcp_files, one_file, shard_files
from ckpt_ema.output.teacher_folder import folder_to_fill, is_model_folder, new_folder, staged_companions
from ckpt_ema.output.writer import Draft, SharedFile, SpreadFiles, TeacherFile, write_small_file
from ckpt_ema.planning import plan_fold
from ckpt_ema.plans import FoldPlan, FoldReport
from ckpt_ema.provenance import teacher_metadata
from ckpt_ema.ranks import Ranks
from ckpt_ema.timings import Timings

Progress = Callable[[int, int], None]
"""Told (bytes read so far, bytes to read in all)."""


@refuses_unknown_keywords(FoldOptions)
def plan(
    run: PathLike | Sequence[PathLike], output: PathLike | None = None, **options: Unpack[FoldKeywords]
) -> FoldPlan:
    """Plan a fold without reading a tensor; arguments are those of `fold` but for `progress`, `announce`, `ranks`."""
    with reading_tables():
        return plan_fold(run, output, FoldOptions(**options))


@refuses_unknown_keywords(FoldOptions)
def fold(
    run: PathLike | Sequence[PathLike],
    output: PathLike | None = None,
    *,
    progress: Progress | None = None,
    announce: Callable[[FoldPlan], None] | None = None,
    ranks: Ranks | None = None,
    **options: Unpack[FoldKeywords],
) -> FoldReport:
    """Fold the checkpoints of a training run into a teacher, or into several in one pass.

    teacher = (1 - momentum) * teacher + momentum * student, once per checkpoint in step order, the first of which
    is copied: the rule, and on float32 students the bits, of MMDetection's MeanTeacherHook.

    `run` is a run directory, or a list of checkpoints in the order they are to be folded. `output` defaults to
    `teacher.safetensors` in the run directory, or to the folder `teacher` for Hugging Face folders; with a list of
    momenta it is a pattern with `{momentum}`, or a folder. `options` are the fields of `FoldOptions`, most used:
    `momentum=0.001` per checkpoint or with `per="step"` per training step, `half_life` in steps in place of it, `last`,
    `from_step` and `until_step`, `init` (a teacher to go on from), `dtype`, `device="auto"`,
    `memory_budget_bytes=256 << 20`, `overwrite=False`, `resume=False`. `announce` gets the plan before a tensor is
    read; without it, its warnings are issued as Python warnings. `progress` is told (bytes read, bytes to read) as it
    goes, from the folding threads. Where several processes fold together, `ranks` is
    the place of this one (`ranks_of_environment()`); all of them return when the teacher is there.

    Raises CkptEmaError; then nothing was written and an existing teacher is untouched. Of several teachers each
    appears whole or not at all, one after the other when all are finished. What a fold had done when it was killed,
    or failed after ten seconds or more, stays under hidden names beside its output; `resume=True` continues it.
    """
    with ranks or Ranks() as place:  # a rank that cannot plan must tell the others
        return _carry_out(plan(run, output, **options), progress, announce, place)


@refuses_unknown_keywords(ReconstructOptions)
def plan_reconstruction(
    run: PathLike | Sequence[PathLike], output: PathLike | None = None, **options: Unpack[ReconstructKeywords]
) -> FoldPlan:
    """Plan a reconstruction without reading a tensor; arguments are those of `reconstruct`, as with `plan`."""
    # Here, not above: it solves with torch, for which a fold's plan must not wait.
    from ckpt_ema.reconstruction import plan_reconstruct  # noqa: PLC0415

    with reading_tables():
        return plan_reconstruct(run, output, ReconstructOptions(**options))


@refuses_unknown_keywords(ReconstructOptions)
def reconstruct(
    run: PathLike | Sequence[PathLike],
    output: PathLike | None = None,
    *,
    progress: Progress | None = None,
    announce: Callable[[FoldPlan], None] | None = None,
    ranks: Ranks | None = None,
    **options: Unpack[ReconstructKeywords],
) -> FoldReport:
    """Make the teacher that would have followed the whole of training, from all that a run has stored.

    Students and the snapshots of `MeanTeacher` take part; their coefficients are solved for (see `solver`), and all
    are folded in one pass. `plan.predictions` says how near the result is expected to come. Arguments are those of
    `fold`, with the fields of `ReconstructOptions`; so is what is raised.
    """
    with ranks or Ranks() as place:
        return _carry_out(plan_reconstruction(run, output, **options), progress, announce, place)


def _carry_out(
    planned: FoldPlan, progress: Progress | None, announce: Callable[[FoldPlan], None] | None, ranks: Ranks
) -> FoldReport:
    outputs = [_output_files(planned, number) for number in range(len(planned.teachers))]
    _check_same_plan(planned, outputs, ranks)
    if ranks.is_first:
        check_parents(planned)
        _check_new_outputs(planned, outputs)
    # Here, not above: a plan must not wait for torch. Not below either: where memory is scarce, loading torch ends the
    # process, and nobody would remove a journal.
    from ckpt_ema.engine.choice import choose_engine  # noqa: PLC0415
    from ckpt_ema.engine.cpu import why_not_compiled  # noqa: PLC0415

    with _journal_of(planned, outputs, ranks) as journal:
        if journal is not None:
            with reading_tables():
                check_outputs(planned, [files.names for files in outputs], journal.draft)
            if announce is not None:
                announce(planned)
            else:
                for text in planned.warnings:
                    warn(text)
        token, finished = _share_finished(journal, ranks)
        part = plan_of_rank(planned.blocks, ranks.number, ranks.count)
        remaining = without(part, finished)
        updates = [teacher.updates for teacher in planned.teachers]
        budget = planned.options.memory_budget_bytes
        choice = choose_engine(planned.options.device, remaining, planned.layouts, updates, budget, ranks.local)
        started = time.perf_counter()
        read_so_far = part.bytes_to_read - remaining.bytes_to_read

        def count(num_bytes: int) -> None:
            nonlocal read_so_far
            read_so_far += num_bytes
            if progress is not None:
                progress(read_so_far, part.bytes_to_read)
            ranks.check()

        with contextlib.ExitStack() as stack:
            teachers = _open_teachers(stack, planned, outputs, ranks, journal)
            blocks = journal.blocks if journal is not None else stack.enter_context(_blocks_of(planned, token, ranks))
            blocks.begin_session(teachers)
            try:
                timings = _fold_into(teachers, planned, remaining, choice.engine, count, blocks)
                if journal is not None:
                    ranks.wait_for_all("folded")
                    with reading_tables():
                        check_no_checkpoint(planned)
                    journal.begin_commit()
            except BaseException as error:
                if journal is not None:
                    journal.settle(error)
                raise
        if not ranks.is_first:
            ranks.arrive("folded")
        ranks.share("committed", "yes" if ranks.is_first else None)
    resumed = planned.bytes_to_read - without(planned.blocks, finished).bytes_to_read
    seconds = time.perf_counter() - started
    not_compiled = tuple(why_not_compiled(remaining)) if choice.device == "cpu" else ()
    return FoldReport(planned, choice.device, choice.reason, seconds, timings, resumed, not_compiled)


def _check_new_outputs(planned: FoldPlan, outputs: Sequence[TeacherFiles]) -> None:
    """Refuse what must not be replaced before torch is loaded, where no unfinished fold has to be asked first."""
    if not os.path.lexists(journal_path(planned.outputs)):
        with reading_tables():
            check_outputs(planned, [files.names for files in outputs], Draft())


def _journal_of(
    planned: FoldPlan, outputs: Sequence[TeacherFiles], ranks: Ranks
) -> contextlib.AbstractContextManager[Journal | None]:
    """The journal, which the first rank has; None for the others."""
    if not ranks.is_first:
        return contextlib.nullcontext()
    options = planned.options
    return Journal(fingerprint(planned, outputs), resume=options.resume, overwrite=options.overwrite)


def _share_finished(journal: Journal | None, ranks: Ranks) -> tuple[str, list[Range]]:
    """The first rank's word: what the fold's hidden files are called after, and which blocks are finished."""
    own = None if journal is None else json.dumps([journal.draft.token, journal.finished])
    token, ranges = json.loads(ranks.share("finished", own))
    return token, [Range(*each) for each in ranges]


@contextlib.contextmanager
def _blocks_of(planned: FoldPlan, token: str, ranks: Ranks) -> Iterator[FinishedBlocks]:
    """The record of a rank other than the first."""
    blocks = open_finished_blocks(journal_path(planned.outputs).parent, token, ranks.number)
    try:
        yield blocks
    finally:
        blocks.close()


def _check_same_plan(planned: FoldPlan, outputs: Sequence[TeacherFiles], ranks: Ranks) -> None:
    """Raise CkptEmaError where this rank sees other files than the first, or was told something else."""
    if ranks.count == 1:
        return
    seen = [planned.output_names, planned.blocks.data_bytes, [teacher.updates for teacher in planned.teachers]]
    seen += [[(file.path.name, file.size) for layout in planned.layouts for file in layout.files]]
    digest = hashlib.sha256(json.dumps(seen).encode("utf-8", "surrogateescape")).hexdigest()
    if ranks.share("plan", digest if ranks.is_first else None) != digest:
        raise CkptEmaError(
            f"rank {ranks.number} sees other checkpoints than the first rank does",
            hint="is the run on a file system that all machines share, and no longer written to?",
        )
    made = made_of(planned, outputs)
    first = json.loads(ranks.share("made", json.dumps(made) if ranks.is_first else None))
    differences = differences_of_ranks(first, made)
    if differences:
        raise CkptEmaError(
            f"rank {ranks.number} was told to fold something else than the first rank",
            details=differences,
            hint="start all ranks with the same version and options",
        )


def _open_teachers(
    stack: contextlib.ExitStack,
    planned: FoldPlan,
    outputs: Sequence[TeacherFiles],
    ranks: Ranks,
    journal: Journal | None,
) -> list[SpreadFiles]:
    """The teachers' files: made by the first rank, which has the journal, and opened by the others."""
    allow_open_files(len(planned.input_files) + sum(len(each.parts) for each in outputs))
    if journal is not None:
        needed = sum(files.size for files in outputs)
        made = []
        for number, files in enumerate(outputs):
            made.append(stack.enter_context(_teacher_files(planned, number, files, needed, journal.draft)))
            needed -= files.size
        ranks.share("files", json.dumps([[str(file.temporary.absolute()) for file in each] for each in made]))
        return [_spread(files, each) for files, each in zip(outputs, made, strict=True)]
    names = json.loads(ranks.share("files", None))
    return [
        _spread(
            files,
            [
                stack.enter_context(SharedFile(Path(name), parts))
                for name, (_, parts) in zip(each, files.parts, strict=True)
            ],
        )
        for each, files in zip(names, outputs, strict=True)
    ]


def _spread(files: TeacherFiles, opened: Sequence[TeacherFile | SharedFile]) -> SpreadFiles:
    begins = [parts.extents[0].begin if parts.extents else 0 for _, parts in files.parts]
    return SpreadFiles(list(zip(begins, opened, strict=True)))


def _fold_into(
    teachers: Sequence[Teacher],
    planned: FoldPlan,
    part: BlockPlan,
    engine: Engine,
    count: Callable[[int], None],
    blocks: FinishedBlocks,
) -> Timings:
    updates = [teacher.updates for teacher in planned.teachers]

    def record(block: Block) -> None:
        blocks.add(block.position, block.end_position)

    with InputFiles(planned.layouts, part.thread_buffers.answer) as files:
        try:
            timings = engine(Task(part, planned.layouts, updates, files, record), teachers, count)
        except NonFiniteBlockError as error:
            files.check_unchanged()
            raise _non_finite(planned, error.origin) from error
        files.check_unchanged()
    return timings


def _output_files(planned: FoldPlan, number: int) -> TeacherFiles:
    """Which files one teacher is written to, and what each holds."""
    offsets = planned.blocks.offsets
    entries = sorted(
        (Entry(tensor.name, tensor.dtype, tensor.shape, *offsets[tensor.name]) for tensor in planned.tensors),
        key=operator.attrgetter("begin", "end"),
    )
    metadata = teacher_metadata(planned, number)
    options, source = planned.options, planned.newest.model_folder
    if options.output_format == "dcp":
        # As the students are, so that what loads them loads the teacher.
        key = planned.newest.state_key if planned.newest.format.startswith("distributed checkpoint") else ""
        return dcp_files(key, entries, metadata)
    stem = source.weights_name if source is not None else "model"
    if options.shard_size_bytes is not None:
        return shard_files(stem, entries, metadata, options.shard_size_bytes)
    name = f"{stem}.safetensors" if planned.is_folder else planned.teachers[number].output.name
    return one_file(name, entries, metadata)


@contextlib.contextmanager
def _teacher_files(
    planned: FoldPlan, number: int, files: TeacherFiles, needed: int, draft: Draft
) -> Iterator[list[TeacherFile]]:
    """One teacher's files; they appear when the block is left without an error, all at once where there are several."""
    target, overwrite = planned.teachers[number].output, planned.options.overwrite
    if not planned.is_folder:
        [(_, parts)] = files.parts
        with TeacherFile(target, parts, overwrite=overwrite, needed_bytes=needed, draft=draft) as file:
            yield [file]
        return
    source = planned.newest.model_folder if planned.options.output_format == "safetensors" else None
    is_single = len(files.parts) == 1 and not files.closing
    with contextlib.ExitStack() as folders:
        # A single file is replaced where it lies, so that there is a teacher at every moment.
        filled = folders.enter_context(
            folder_to_fill(target, draft)
            if is_single
            else new_folder(target, overwrite=overwrite, draft=draft, written=files.names)
        )
        for name, content in files.closing:  # into a folder that nobody reads yet
            write_small_file(filled / name, content, draft)
        commit_companions = None
        if is_model_folder(source):
            assert source is not None
            dtype = planned.options.dtype
            commit_companions = folders.enter_context(staged_companions(source, filled, dtype, draft))
        with contextlib.ExitStack() as stack:
            made = []
            for name, parts in files.parts:
                file = TeacherFile(filled / name, parts, overwrite=overwrite, needed_bytes=needed, draft=draft)
                made.append(stack.enter_context(file))
                needed -= parts.size
            yield made
        if filled == target and is_single:
            remove_own(target, keep=files.names)
        if commit_companions is not None:
            commit_companions()


def _hint_of_overflow(tensor: TeacherTensor) -> str | None:
    if tensor.dtype.itemsize < 4:
        return "pass `--dtype float32`"
    if all(is_rounded(dtype, tensor.dtype) for dtype in tensor.student_dtypes):  # students that are wider
        return "omit `--dtype`"
    return None if len(tensor.student_dtypes) > 1 else "pass `--accumulate float64`"


def _non_finite(planned: FoldPlan, origin: NonFinite) -> CkptEmaError:
    tensor = next(tensor for tensor in planned.tensors if tensor.index == origin.tensor)
    if origin.layout is None:
        return CkptEmaError(
            f"`{tensor.name}` overflows {tensor.dtype}: every student is finite, the teacher is not",
            hint=_hint_of_overflow(tensor),
        )
    name = planned.inputs[origin.layout].name
    if planned.initial_teacher is not None and origin.layout == 0:
        hint = "pass another teacher with `--init`"
    elif len(Path(name).parts) > 1 or planned.directory != planned.newest.path.parent:
        hint = f"leave `{name}` off the list"
    else:
        hint = f"fold without it: `--exclude {quoted(glob.escape(name))}`"
    if tensor.action == "average":
        hint += f"; if it is a constant mask of infinities, copy it: `--buffer {quoted(tensor.name)}`"
    return CkptEmaError(
        f"`{tensor.name}` holds a NaN or an infinity in `{name}`, the first that does; nothing was written", hint=hint
    )
