"""A run directory in, its finished checkpoints in step order out, with what was left out and why."""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ckpt_ema.byte_ranges import expect_tables
from ckpt_ema.errors import (
    AverageAloneError,
    CkptEmaError,
    MisuseError,
    UnreadableCheckpointError,
    hint_to_permit,
    quoted,
)
from ckpt_ema.formats import Contents, read_contents
from ckpt_ema.locations import common_folder, may_be_listed, name_within
from ckpt_ema.runs.candidates import (
    CLOSED,
    SNAPSHOT_NAME,
    find_files_beside,
    find_run_folder,
    is_checkpoint_folder,
    is_one_checkpoint,
)
from ckpt_ema.runs.checkpoints import Listing, OwnTeacher, Run
from ckpt_ema.runs.order import give_steps, sort_by_step
from ckpt_ema.runs.reading import CheckpointReader
from ckpt_ema.runs.selection import Selection, select_checkpoints
from ckpt_ema.runs.state_dicts import find_state_dicts
from ckpt_ema.runs.steps import is_copy_name, steps_in_name
from ckpt_ema.sizes import counted

_WILD = re.compile(r"(\*+|\?|\[[^]]+\])")
"""What a shell replaces in a pattern."""


def find_checkpoints(paths: Sequence[Path], selection: Selection) -> Run:
    """The checkpoints to fold: those of a run directory by step, or those listed, as listed.

    Raises CkptEmaError when there are none, when one of them cannot be read (but for the newest of a run
    directory, which may be half written), and when their order cannot be told.
    """
    for path in paths:
        if not path.exists():
            hint = _hint_of_pattern(str(path)) or "pass a run directory, or checkpoints"
            raise MisuseError(f"`{path}` does not exist", hint=hint)
        check_may_be_listed(path)
    is_run = len(paths) == 1 and paths[0].is_dir() and (selection.is_live or not is_one_checkpoint(paths[0]))
    if is_run:
        directory, listing = _read_run_directory(paths[0], selection)
        root: Path | None = paths[0]
    else:
        directory, listing = _read_list(paths, selection)
        root = directory if len({path.absolute().parent for path in paths}) == 1 else None
    selects = bool(listing.checkpoints) or not (listing.averages or selection.is_live)
    kept = select_checkpoints(directory, listing, selection) if selects else []
    return Run(
        directory,
        root,
        tuple(kept),
        tuple(listing.left_out),
        unselected=frozenset(listing.unselected),
        beyond=frozenset(listing.beyond),
        stepless=frozenset(listing.stepless),
        warnings=tuple(listing.warnings),
        order_warnings=tuple(listing.order_warnings),
        teachers=tuple(listing.teachers),
        averages=tuple(sorted(listing.averages, key=lambda average: (average.step or 0, average.label))),
        unfinished=tuple(listing.unreadable) if selection.is_live else (),
    )


def _hint_of_pattern(text: str) -> str | None:
    """What to type where `text` is a pattern that a shell would have replaced by names; None where it matches none."""
    matching = glob.glob(text)  # `**` as `*`, as in most shells
    if not matching:
        return None
    parts = _WILD.split(text)
    typed = "".join(part if i % 2 or not part else shlex.quote(part) for i, part in enumerate(parts))
    return (
        f"without its quotes: `{typed}`, for which a shell puts {counted(len(matching), 'name')} (Python: `glob.glob`)"
    )


def check_may_be_listed(path: Path) -> None:
    """Raise CkptEmaError for a folder that this process may not look into."""
    if path.is_dir() and not may_be_listed(path):
        raise CkptEmaError(f"`{path}` may not be listed", hint=hint_to_permit(path))


def _read_run_directory(run: Path, selection: Selection) -> tuple[Path, Listing]:
    """The checkpoints of a run directory in step order, and the folder that they lie in."""
    directory, candidates, left_out = find_run_folder(run)
    listing = Listing(left_out=left_out)
    listing.warnings += [
        _passed_over(name) for name, why in left_out if why == CLOSED and selection.is_wanted(directory / name)
    ]
    reader = CheckpointReader(selection)
    # Numbered names first, so that of two names for one file the telling one stays.
    candidates.sort(key=lambda path: (is_copy_name(path.name), path.is_symlink(), path.name))
    expect_tables([path for path in candidates if selection.is_wanted(path)])
    for path in candidates:
        _read_candidate(listing, path, selection, reader)
    if listing.averages_inside and not listing.checkpoints and not selection.is_live:
        raise listing.averages_inside[0][1]
    listing.left_out += [(name, "an average, and no raw student") for name, _ in listing.averages_inside]
    if listing.averages_by_name and not listing.checkpoints and not listing.unreadable and not selection.is_live:
        raise CkptEmaError(
            f"`{directory}` holds averages, and no raw student: {', '.join(listing.averages_by_name[:5])}",
            hint=_hint_to_fold_average(read_contents(directory / listing.averages_by_name[0])),
        )
    if selection.takes_teachers:
        _find_snapshots(listing, run, directory, selection)
    if listing.checkpoints or listing.unreadable or not listing.averages:
        sort_by_step(listing, directory, selection)
    return directory, listing


def _passed_over(name: str) -> str:
    return f"`{name}` is passed over: it is {CLOSED}"


def _read_candidate(listing: Listing, path: Path, selection: Selection, reader: CheckpointReader) -> None:
    """Add what lies in a run directory to what is known of it; what cannot be read waits until the order is known."""
    if not selection.is_wanted(path):
        listing.leave_out_unselected(path)
        return
    try:
        if listing.leaves_out_another_name(path):
            return
    except OSError:
        listing.left_out.append((path.name, "it is gone since it was listed"))
        return
    is_declared = selection.is_declared(path)
    is_average = not is_declared and selection.is_average_by_name(path)
    try:
        contents = read_contents(path)
        if contents.is_own_teacher:
            listing.set_aside(path, contents.metadata)
            return
        if is_declared:
            listing.averages.append(reader.read_average(contents))
        elif not is_average:
            listing.checkpoints.append(reader.read(contents))
    except AverageAloneError as error:
        # What has a number is one of the run's own; `best.pt` beside it may be a model for users.
        if steps_in_name(path.name) and not is_copy_name(path.name):
            raise
        listing.averages_inside.append((path.name, error))
        return
    except UnreadableCheckpointError as error:
        if is_declared or (is_average and selection.takes_teachers):
            listing.leave_out_average(path.name, error)
            return
        if not is_average:
            leave_out = f"leave it out: `--exclude {quoted(glob.escape(path.name))}`"
            if error.hint is None:
                error.hint = leave_out
            elif error.is_refused:
                error.hint = f"{error.hint}; or {leave_out}"
            listing.unreadable.append((path, error))
            return
    if is_average:
        listing.averages_by_name.append(path.name)
        listing.left_out.append((path.name, "an average, by its name"))


def _find_snapshots(listing: Listing, run: Path, directory: Path, selection: Selection) -> None:
    """Add the snapshots that lie in folders of their own; folders that may not be listed are named."""
    files, closed = find_files_beside(run, directory)
    told = {run / name for name, why in listing.left_out if why == CLOSED}
    for folder in filter(selection.is_wanted, closed):
        if folder not in told:
            label = os.path.relpath(folder, directory)
            listing.left_out.append((label, CLOSED))
            listing.warnings.append(_passed_over(label))
    for path in filter(selection.is_wanted, files):
        label = os.path.relpath(path, directory)
        try:
            contents = read_contents(path)
        except UnreadableCheckpointError as error:
            if SNAPSHOT_NAME.match(path.name):
                listing.leave_out_average(label, error)
            continue
        if contents.is_own_teacher:
            listing.teachers.append(OwnTeacher(path, label, contents.metadata))


def _read_list(paths: Sequence[Path], selection: Selection) -> tuple[Path, Listing]:
    """Checkpoints as they were listed, and the deepest folder that all of them lie in."""
    listing = Listing()
    reader = CheckpointReader(selection)
    expect_tables([path for path in paths if selection.is_wanted(path)])
    for path in paths:
        if path.is_dir() and not is_one_checkpoint(path) and not is_checkpoint_folder(path):
            raise MisuseError(
                f"`{path}` is a run directory among {len(paths)} arguments",
                hint="pass one run directory, or checkpoints in the order they are to be folded",
            )
        if not selection.is_wanted(path):
            listing.leave_out_unselected(path)
            continue
        try:
            if listing.leaves_out_another_name(path):
                continue
        except OSError as error:  # a trainer has removed it since it was seen
            raise UnreadableCheckpointError(f"cannot read `{path}`: {error.strerror}") from error
        contents = read_contents(path)
        if contents.is_own_teacher:
            if not selection.takes_teachers:
                raise CkptEmaError(
                    f"`{path}` is a teacher that ckpt-ema wrote", hint=f"pass `--init {path}` to start from it"
                )
            listing.set_aside(path, contents.metadata)
        elif selection.is_declared(path):
            listing.averages.append(reader.read_average(contents))
        elif selection.is_average_by_name(path):
            raise CkptEmaError(f"`{path}` is an average, by its name", hint=_hint_to_fold_average(contents))
        else:
            listing.checkpoints.append(reader.read(contents, is_listed=True))
    give_steps(listing)
    # Two checkpoints of the same name in different folders are told apart by their folder.
    labels = [checkpoint.label for checkpoint, _ in listing.checkpoints]
    parent = common_folder(paths)
    if len(set(labels)) < len(labels):
        listing.checkpoints = [
            (replace(checkpoint, label=name_within(parent, checkpoint.path)), numbers)
            for checkpoint, numbers in listing.checkpoints
        ]
    return parent, listing


def _hint_to_fold_average(contents: Contents) -> str:
    found = find_state_dicts(contents)
    return f"pass `--state {shlex.quote(found[0].key if found else '')}` if you mean to fold averages"
