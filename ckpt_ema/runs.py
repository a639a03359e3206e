"""A run directory in, its finished checkpoints in step order out, with what was left out and why."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import re
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckpt_ema.byte_ranges import expect_tables
from ckpt_ema.collisions import collision_of
from ckpt_ema.errors import CkptEmaError, MisuseError, NoCheckpointError, UnreadableCheckpointError, quoted
from ckpt_ema.formats import Contents, ModelFolder, is_weights_file_name, read_contents
from ckpt_ema.formats.deepspeed import folder_of_latest
from ckpt_ema.formats.folder import MODEL_STEM, NEVER_STUDENTS, has_weights, is_sharded, nameless_models
from ckpt_ema.layouts import Layout, SchemaPool, compact_layout
from ckpt_ema.learning_rates import learning_rates_of
from ckpt_ema.locations import children_of, common_folder, identity_of, name_within
from ckpt_ema.steps import (
    DATE_DIGITS,
    EDM2_NAME,
    ORIGINS,
    Origin,
    Unit,
    is_copy_name,
    stem_of,
    step_of_average,
    steps_in_name,
    steps_inside,
)
from ckpt_ema.students import choose_student, find_state_dicts, is_average_name, is_flat

STEPLESS_COPY = "a copy by its name, without a step"
NOT_SELECTED = "not selected by name"
BEYOND = "after"
"""How the reason begins for what lies behind `until_step`."""

OWN_TEACHER = "a teacher that ckpt-ema wrote"
OUT_OF_ORDER = "the list is not in step order"
EMA_PYTORCH_PREFIX = "ema_model."
"""Before the names of its averages; its counters have none."""

MAX_SEARCH_DEPTH = 3
SERIES_STEMS = ("checkpoint", "step", "epoch", "global_step", "iter")
"""How the names of checkpoints that are folders begin, before their number."""

SNAPSHOT_NAME = re.compile(r"^teacher(_.+)?_step_\d+\.safetensors$")
"""How `MeanTeacher` names its files; what they hold is asked of themselves."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One finished save of the student."""

    path: Path
    label: str
    """Its name within the run, for people."""

    step: int | None
    """Step (or epoch, or number) after which it was saved; None where nothing says it."""

    unit: Unit
    """What `step` counts."""

    format: str
    size: int
    """Bytes of its files that hold the student."""

    layout: Layout
    state_key: str
    """Dotted path of the state dict inside the checkpoint, "" for the checkpoint itself."""

    stripped: tuple[str, ...]
    """Prefixes taken off the tensor names."""

    left_out: dict[str, str]
    """What of the checkpoint is not folded, and why."""

    known_buffers: frozenset[str] | None
    learning_rates: tuple[tuple[int | None, float], ...]
    """What it records of the learning rate, by step, None for its own; for a reconstruction alone."""

    model_folder: ModelFolder | None
    """Where its configuration and tokenizer lie, for a folder in the Hugging Face manner."""


@dataclass(frozen=True, slots=True)
class OwnTeacher:
    """A teacher that this tool wrote, met among the checkpoints."""

    path: Path
    label: str
    """Its name within the run, for people."""

    metadata: Mapping[str, str]
    """`__metadata__` of its file."""


@dataclass(frozen=True, slots=True)
class Run:
    """The checkpoints of one training run, in the order they are folded."""

    directory: Path
    """The folder that the checkpoints lie in."""

    root: Path | None
    """The run directory as it was named, or the folder of all checkpoints listed; None where they share none."""

    checkpoints: tuple[Checkpoint, ...]
    left_out: tuple[tuple[str, str], ...]
    """Names of what is not folded, each with the reason."""

    warnings: tuple[str, ...] = ()
    teachers: tuple[OwnTeacher, ...] = ()
    """What of this tool lies among them."""

    averages: tuple[Checkpoint, ...] = ()
    """What was said to be an average, by step."""

    unfinished: tuple[tuple[Path, str], ...] = ()
    """Of a run that is being written: what cannot be read yet, and why."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which checkpoints of a run, and which state dict of each."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    from_step: int | None = None
    until_step: int | None = None
    last: int | None = None
    state: str | None = None
    prefix: str | None = None
    takes_teachers: bool = False
    """Whether teachers of this tool may be listed among the checkpoints."""

    averages: tuple[str, ...] = ()
    """Names of what are averages rather than checkpoints."""

    is_live: bool = False
    """Whether the run is still being written: what cannot be read is told rather than raised."""

    has_steps: bool = False
    """Whether checkpoints of it that are not listed any more had a step, so that one without is a copy."""


class _Shared:
    """What the checkpoints of a run have in common, found once."""

    def __init__(self) -> None:
        self.pool = SchemaPool()
        self._nameless: dict[Path, set[str]] = {}

    def is_nameless(self, path: Path) -> bool:
        """Whether a file says by its name that it is a model, and not which one."""
        if MODEL_STEM.match(stem_of(path.name)) is None or path.is_dir():
            return False
        folder = path.absolute().parent
        if folder not in self._nameless:
            self._nameless[folder] = nameless_models([other.name for other in _children(folder)])
        return path.name in self._nameless[folder]


@dataclass(slots=True)
class _Listing:
    """What is known while a run is being read."""

    checkpoints: list[tuple[Checkpoint, dict[Origin, int]]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[tuple[Path, UnreadableCheckpointError]] = field(default_factory=list)
    averages: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    teachers: list[OwnTeacher] = field(default_factory=list)
    declared: list[Checkpoint] = field(default_factory=list)

    def set_aside(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Keep a teacher of this tool apart from the checkpoints."""
        self.left_out.append((path.name, OWN_TEACHER))
        self.teachers.append(OwnTeacher(path, path.name, metadata))

    def set_unreadable(self, label: str, error: UnreadableCheckpointError) -> None:
        """Leave an average out aloud: a reconstruction goes without it."""
        self.left_out.append((label, f"it cannot be read: {error.message}"))
        self.warnings.append(f"`{label}` takes no part: {error.message}")


def find_checkpoints(paths: Sequence[Path], selection: Selection) -> Run:
    """The checkpoints to fold: those of a run directory by step, or those listed, as listed.

    Raises CkptEmaError when there are none, when one of them cannot be read (but for the newest of a run
    directory, which may be half written), and when their order cannot be told.
    """
    for path in paths:
        if not path.exists():
            raise MisuseError(f"`{path}` does not exist", hint="pass a run directory, or checkpoints")
    if len(paths) == 1 and paths[0].is_dir() and not _is_one_checkpoint(paths[0]):
        directory, listing = _read_run_directory(paths[0], selection)
        root: Path | None = paths[0]
    else:
        directory, listing = _read_list(paths, selection)
        root = directory if len({path.absolute().parent for path in paths}) == 1 else None
    selects = bool(listing.checkpoints) or not (listing.declared or selection.is_live)
    kept = _select(directory, listing, selection) if selects else []
    return Run(
        directory,
        root,
        tuple(kept),
        tuple(listing.left_out),
        tuple(listing.warnings),
        tuple(listing.teachers),
        tuple(sorted(listing.declared, key=lambda average: (average.step or 0, average.label))),
        tuple((path, error.message) for path, error in listing.unreadable) if selection.is_live else (),
    )


def _read_checkpoint(contents: Contents, selection: Selection, shared: _Shared) -> tuple[Checkpoint, dict[Origin, int]]:
    """One checkpoint with its student chosen, and every number that may be its step."""
    path = contents.path
    student = choose_student(contents, state=selection.state, prefix=selection.prefix)
    if not student.tensors:
        raise UnreadableCheckpointError(f"`{path}` holds no tensors")
    layout = compact_layout(student.tensors, shared.pool)
    checkpoint = Checkpoint(
        path=path,
        label=path.name,
        step=None,
        unit="step",
        format=contents.format,
        size=sum(file.size for file in layout.files),
        layout=layout,
        state_key=student.key,
        stripped=student.stripped,
        left_out=dict(student.left_out or {}),
        known_buffers=student.known_buffers,
        learning_rates=learning_rates_of(contents) if selection.takes_teachers else (),
        model_folder=contents.folders.get(student.key) or contents.folders.get(""),
    )
    # `checkpoint-300/model.safetensors`, listed as a file: the folder has the number.
    named = path.absolute().parent if shared.is_nameless(path) else path
    return checkpoint, {**steps_in_name(named.name), **steps_inside(contents)}


def _is_declared(path: Path, selection: Selection) -> bool:
    """Whether the user describes it as an average, or its name does."""
    named = selection.takes_teachers and EDM2_NAME.match(stem_of(path.name)) is not None
    return named or _matches(path, selection.averages)


def _take_declared(listing: _Listing, path: Path, selection: Selection, shared: _Shared) -> None:
    contents = read_contents(path)
    if contents.is_own_teacher:  # which says better itself what it is
        listing.set_aside(path, contents.metadata)
    else:
        listing.declared.append(_read_declared(contents, selection, shared))


def _find_snapshots(listing: _Listing, run: Path, directory: Path, selection: Selection) -> None:
    """Add the snapshots that lie in folders of their own: beside, above or below that of the checkpoints."""
    seen = {directory.resolve()}
    level = [run, directory]
    for _ in range(MAX_SEARCH_DEPTH):
        below: list[Path] = []
        for folder in level:
            is_new = folder.resolve() not in seen
            seen.add(folder.resolve())
            for path in _children(folder):
                if path.is_dir():
                    if path.resolve() not in seen and not _is_checkpoint_folder(path):
                        below.append(path)
                elif is_new and path.suffix == ".safetensors" and _is_wanted(path, selection):
                    _take_snapshot(listing, path, os.path.relpath(path, directory))
        level = below


def _take_snapshot(listing: _Listing, path: Path, label: str) -> None:
    try:
        contents = read_contents(path)
    except UnreadableCheckpointError as error:
        if SNAPSHOT_NAME.match(path.name):
            listing.set_unreadable(label, error)
        return
    if contents.is_own_teacher:
        listing.teachers.append(OwnTeacher(path, label, contents.metadata))


def _is_wanted(path: Path, selection: Selection) -> bool:
    return (not selection.include or _matches(path, selection.include)) and not _matches(path, selection.exclude)


def _read_declared(contents: Contents, selection: Selection, shared: _Shared) -> Checkpoint:
    """What was said to be an average: no other one is looked for inside."""
    path = contents.path
    state = selection.state if selection.state is not None or not is_flat(contents) else ""
    prefix = selection.prefix
    if any(str(name).startswith(EMA_PYTORCH_PREFIX) for name in contents.tree if isinstance(contents.tree, dict)):
        prefix = EMA_PYTORCH_PREFIX + (prefix or "").removeprefix(EMA_PYTORCH_PREFIX)
    checkpoint, numbers = _read_checkpoint(contents, replace(selection, state=state, prefix=prefix), shared)
    step = step_of_average(path.name)
    if step is not None:
        return replace(checkpoint, step=step)
    origin = next((origin for origin in ORIGINS if origin in numbers), None)
    if origin is None:
        raise CkptEmaError(
            f"`{path}` was said to be an average, and of which step it is, neither its contents nor its name tell",
            hint=f"leave it out: `--exclude {quoted(glob.escape(path.name))}`",
        )
    return replace(checkpoint, step=numbers[origin], unit=origin[1])


def _hint_to_fold_average(contents: Contents) -> str:
    found = find_state_dicts(contents)
    return f"pass `--state {found[0].key if found and found[0].key else chr(39) * 2}` if you mean to fold averages"


def _is_one_checkpoint(folder: Path) -> bool:
    if is_sharded(folder):
        return True
    if not has_weights(folder):
        return False
    children = _children(folder)
    return (
        not _has_numbered_files(children)
        and not any(map(_is_checkpoint_folder, children))
        and find_numbered_below(folder) is None
    )


def _has_numbered_files(children: Sequence[Path]) -> bool:
    """Whether files of a series are among these: `step_100.pt`, but not accelerate's `model_1.safetensors`."""
    nameless = nameless_models([path.name for path in children])
    return any(
        steps_in_name(path.name) and path.name not in nameless and path.is_file()
        for path in children
        if is_weights_file_name(path.name)
    )


def find_checkpoint_below(folder: Path) -> Path | None:
    """A checkpoint of a series, which makes `folder` a run, or a folder of runs, and no checkpoint itself."""
    inside = (path for path in _children(folder) if _has_series_name(path) and _is_checkpoint_folder(path))
    return next(inside, None) or find_numbered_below(folder, is_by_custom=True)


def find_numbered_below(folder: Path, *, is_by_custom: bool = False) -> Path | None:
    """The first checkpoint with a number in its name that a folder below `folder` holds.

    With `is_by_custom` one that is called as trainers call theirs: a pipeline's second text encoder has a number, too.
    """
    is_numbered = _has_series_name if is_by_custom else lambda path: bool(steps_in_name(path.name))
    level = [folder]
    for _ in range(MAX_SEARCH_DEPTH):
        level = _folders_below(level)
        numbered = (path for child in level for path in _candidates_of(child) if is_numbered(path))
        if (found := next(numbered, None)) is not None:
            return found
    return None


def _has_series_name(path: Path) -> bool:
    """Whether it is called as trainers call their checkpoints: by a number, and by what it counts."""
    stem = stem_of(path.name).lower()
    return bool(steps_in_name(path.name)) and stem.startswith(SERIES_STEMS)


def _children(folder: Path) -> list[Path]:
    return [path for path in children_of(folder) if not path.name.startswith(".")]


def _is_checkpoint_folder(path: Path) -> bool:
    if not path.is_dir() or path.name.startswith("tmp"):
        return False
    if has_weights(path) and not _has_numbered_files(_children(path)):
        return True
    if is_sharded(path):
        return not NEVER_STUDENTS.match(path.name)  # accelerate's `optimizer_0`
    # DeepSpeed's `latest` lies beside the checkpoints of a run, and in the Trainer's checkpoints, which have a number.
    if steps_in_name(path.name) and folder_of_latest(path) is not None:
        return True
    if not steps_in_name(path.name) or is_average_name(path.name):
        return False
    # checkpoint-300/ without weights is unfinished, or holds them one level down (diffusers).
    return any(child.is_dir() and has_weights(child) for child in _children(path)) or (
        _has_series_name(path) and not any(_is_candidate(child) for child in _children(path))
    )


def _is_candidate(path: Path) -> bool:
    return (path.is_file() and is_weights_file_name(path.name)) or _is_checkpoint_folder(path)


def _candidates_of(directory: Path) -> list[Path]:
    children = _children(directory)
    found = [path for path in children if _is_candidate(path)]
    if any(path.is_dir() for path in found) or _has_numbered_files(children):
        # Trainers put the final model beside the checkpoints; it has no step, and is the last one again.
        nameless = nameless_models([path.name for path in children])
        found = [path for path in found if path.is_dir() or path.name not in nameless]
    return found


def _folders_below(level: Sequence[Path]) -> list[Path]:
    """The next level of folders; one that a link names as well counts once."""
    folders = sorted((child for folder in level for child in _children(folder) if child.is_dir()), key=_link_last)
    return sorted({folder.resolve(): folder for folder in reversed(folders)}.values())


def _link_last(path: Path) -> tuple[bool, Path]:
    return path.is_symlink(), path


def _descend(run: Path) -> tuple[Path, list[Path], list[tuple[str, str]]]:
    """The one folder at or below `run` that holds checkpoints (`checkpoints/`, `lightning_logs/version_0/...`).

    With its candidates, and with what was passed over on the way: a lone model above the folder of checkpoints.
    """
    passed_over: list[tuple[str, str]] = []
    snapshots: list[tuple[Path, list[Path]]] = []
    level = [run]
    for _ in range(MAX_SEARCH_DEPTH + 1):
        found = [(folder, candidates) for folder in level if (candidates := _candidates_of(folder))]
        # Where an online teacher writes is no run of its own.
        snapshots += [pair for pair in found if all(SNAPSHOT_NAME.match(path.name) for path in pair[1])]
        found = [pair for pair in found if pair not in snapshots]
        lone = {folder for folder, candidates in found if _is_lone_model(candidates)}
        if (lone and any(map(find_numbered_below, level))) or len(lone) < len(found):
            passed_over += [
                (os.path.relpath(path, run), "not among the numbered checkpoints")
                for folder, candidates in found
                if folder in lone
                for path in candidates
            ]
            found = [(folder, candidates) for folder, candidates in found if folder not in lone]
        if len(found) == 1:
            return *found[0], passed_over
        if found:
            names = [os.path.relpath(folder, run) for folder, _ in found]
            raise CkptEmaError(
                f"`{run}` holds {len(found)} folders with checkpoints, and which is the run cannot be told",
                details=names,
                hint=f"pass one of them: `{found[0][0]}`",
            )
        level = _folders_below(level)
    if snapshots:
        return *snapshots[0], passed_over
    raise NoCheckpointError(
        f"`{run}` holds no checkpoints",
        hint="pass the folder they lie in, or the checkpoints themselves in the order they are to be folded",
    )


def _is_lone_model(candidates: Sequence[Path]) -> bool:
    """Whether nothing here looks like a series: one model, or copies, none with a number in its name."""
    unnumbered = [path for path in candidates if not steps_in_name(path.name)]
    series = [path for path in unnumbered if not is_copy_name(path.name) and path.stem != "teacher"]
    return len(unnumbered) == len(candidates) and len(series) <= 1


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)


def _read_run_directory(run: Path, selection: Selection) -> tuple[Path, _Listing]:
    directory, candidates, passed_over = _descend(run)
    listing = _Listing(left_out=passed_over)
    taken = set(candidates)
    listing.left_out += [
        (path.name, "the final model, without a step of its own")
        for path in _children(directory)
        if path not in taken and _is_candidate(path)
    ]
    shared = _Shared()
    seen: dict[Hashable, Path] = {}
    # Numbered names first, so that of two names for one file the telling one stays.
    candidates.sort(key=lambda path: (is_copy_name(path.name), path.is_symlink(), path.name))
    expect_tables([path for path in candidates if _is_wanted(path, selection)])
    for path in candidates:
        if not _is_wanted(path, selection):
            listing.left_out.append((path.name, NOT_SELECTED))
            continue
        try:
            original = seen.setdefault(identity_of(path), path)
        except OSError:
            listing.left_out.append((path.name, "a link to nowhere"))
            continue
        if original is not path:
            listing.left_out.append((path.name, f"another name of `{original.name}`"))
            continue
        if _is_declared(path, selection):
            try:
                _take_declared(listing, path, selection, shared)
            except UnreadableCheckpointError as error:
                listing.set_unreadable(path.name, error)
            continue
        named_average = selection.state is None and is_average_name(stem_of(path.name))
        try:
            contents = read_contents(path)
            if contents.is_own_teacher:
                listing.set_aside(path, contents.metadata)
            elif not named_average:
                listing.checkpoints.append(_read_checkpoint(contents, selection, shared))
        except UnreadableCheckpointError as error:
            if not named_average:
                error.hint = error.hint or f"leave it out: `--exclude {quoted(glob.escape(path.name))}`"
                listing.unreadable.append((path, error))
                continue
            if selection.takes_teachers:
                listing.set_unreadable(path.name, error)
                continue
        if named_average and not any(name == path.name for name, _ in listing.left_out):
            listing.averages.append(path.name)
            listing.left_out.append((path.name, "an average, by its name"))
    if listing.averages and not listing.checkpoints and not listing.unreadable and not selection.is_live:
        raise CkptEmaError(
            f"`{directory}` holds averages, and no raw student: {', '.join(listing.averages[:5])}",
            hint=_hint_to_fold_average(read_contents(directory / listing.averages[0])),
        )
    if selection.takes_teachers:
        _find_snapshots(listing, run, directory, selection)
    if listing.checkpoints or listing.unreadable or not listing.declared:
        _sort_by_step(listing, directory, selection)
    return directory, listing


def _sort_by_step(listing: _Listing, directory: Path, selection: Selection) -> None:
    is_live = selection.is_live
    _leave_out_stepless_copies(listing, has_steps=selection.has_steps)
    if is_live and not listing.checkpoints:
        return
    if not listing.checkpoints:
        _forgive_newest(listing, None)
        raise NoCheckpointError(
            f"no checkpoint of `{directory}` is left to fold",
            details=[f"{name}: {reason}" for name, reason in listing.left_out],
            hint="snapshots need a student beside them: what is not averaged comes from it"
            if listing.teachers
            else None,
        )
    origin = next((o for o in ORIGINS if all(o in numbers for _, numbers in listing.checkpoints)), None)
    if origin is None:
        if len(listing.checkpoints) > 1:
            common = max(ORIGINS, key=lambda o: sum(o in numbers for _, numbers in listing.checkpoints))
            unknown = [item.label for item, numbers in listing.checkpoints if common not in numbers]
            raise CkptEmaError(
                f"the order of the checkpoints in `{directory}` cannot be told: neither their contents nor their names"
                " give all of them a step",
                details=[f"{name}: no {common[1]}" for name in unknown],
                hint="list the checkpoints in the order they are to be folded, oldest first",
            )
        if not is_live:
            _forgive_newest(listing, None)
        return
    if not is_live:
        _forgive_newest(listing, origin)
    _check_epochs_ascend(listing, origin, directory)
    by_step: dict[int, list[Checkpoint]] = defaultdict(list)
    for checkpoint, numbers in listing.checkpoints:
        by_step[numbers[origin]].append(replace(checkpoint, step=numbers[origin], unit=origin[1]))
    ordered = []
    for step, same in sorted(by_step.items()):
        originals = [checkpoint for checkpoint in same if not is_copy_name(checkpoint.label)]
        if len(originals) > 1:
            claims = {
                each: [item.label for item in found if not is_copy_name(item.label)]
                for each, found in sorted(by_step.items())
            }
            raise collision_of(claims, origin, directory, selection.include)
        kept = (originals or same)[0]
        ordered.append((kept, {origin: step}))
        listing.left_out += [(copy.label, f"a copy of {origin[1]} {step}") for copy in same if copy is not kept]
    listing.checkpoints = ordered


def _check_epochs_ascend(listing: _Listing, origin: Origin, directory: Path) -> None:
    """Steps that begin anew with every epoch are no order; epochs beside them tell."""
    epoch: Origin = (origin[0], "epoch")
    pairs = sorted((n[origin], n[epoch], c.label) for c, n in listing.checkpoints if epoch in n)
    for (step, older, label), (next_step, newer, next_label) in itertools.pairwise(pairs):
        if newer < older or (newer != older and step == next_step):
            raise CkptEmaError(
                f"the order of the checkpoints in `{directory}` cannot be told: their steps begin anew with each epoch",
                details=[f"{label}: epoch {older}, step {step}", f"{next_label}: epoch {newer}, step {next_step}"],
                hint="list the checkpoints in the order they are to be folded, oldest first",
            )


def _leave_out_stepless_copies(listing: _Listing, *, has_steps: bool) -> None:
    """`final.pt` without a step beside checkpoints with one is the last of them again."""
    stepless = [item for item in listing.checkpoints if not item[1] and (has_steps or is_copy_name(item[0].label))]
    if stepless and (has_steps or len(stepless) < len(listing.checkpoints)):
        dropped = {id(item) for item in stepless}
        listing.checkpoints = [item for item in listing.checkpoints if id(item) not in dropped]
        listing.left_out += [(item[0].label, STEPLESS_COPY) for item in stepless]


def _forgive_newest(listing: _Listing, origin: Origin | None) -> None:
    """Leave an unreadable newest checkpoint out aloud; raise for any other."""
    readable: dict[Unit, int] = defaultdict(lambda: -1)
    for checkpoint, numbers in listing.checkpoints:
        for (_, unit), number in {**steps_in_name(checkpoint.label), **numbers}.items():
            readable[unit] = max(readable[unit], number)
    numbered = []
    for path, error in listing.unreadable:
        names = steps_in_name(path.name)
        units: list[Unit] = [unit for _, unit in names]
        if is_copy_name(path.name) and not names:
            if "best" in path.name.lower() or not listing.checkpoints:
                raise error
            numbered.append((float("inf"), path, error))
        elif units and all(names["name", unit] > readable[unit] for unit in units) and listing.checkpoints:
            numbered.append((float(names["name", units[0]]), path, error))
        else:
            raise error
    steps = [item for item in numbered if item[0] != float("inf")]
    if len(steps) > 1:
        raise min(steps, key=lambda item: item[0])[2]
    for _, path, error in numbered:
        listing.left_out.append((path.name, f"unfinished: {error.message}"))
        listing.warnings.append(f"`{path.name}` is left out, it looks unfinished: {error.message}")


def _read_list(paths: Sequence[Path], selection: Selection) -> tuple[Path, _Listing]:
    listing = _Listing()
    shared = _Shared()
    seen: dict[Hashable, Path] = {}
    expect_tables(paths)
    for path in paths:
        if path.is_dir() and not _is_one_checkpoint(path) and not _is_checkpoint_folder(path):
            raise MisuseError(
                f"`{path}` is a run directory among {len(paths)} arguments",
                hint="pass one run directory, or checkpoints in the order they are to be folded",
            )
        try:
            original = seen.setdefault(identity_of(path), path)
        except OSError as error:  # a trainer has removed it since it was seen
            raise UnreadableCheckpointError(f"cannot read `{path}`: {error.strerror}") from error
        if original is not path:
            listing.left_out.append((path.name, f"another name of `{original.name}`"))
        elif not _is_wanted(path, selection):
            listing.left_out.append((path.name, NOT_SELECTED))
        elif _is_declared(path, selection):
            _take_declared(listing, path, selection, shared)
        else:
            contents = read_contents(path)
            if contents.is_own_teacher and selection.takes_teachers:
                listing.set_aside(path, contents.metadata)
                continue
            if contents.is_own_teacher:
                raise CkptEmaError(
                    f"`{path}` is a teacher that ckpt-ema wrote", hint=f"pass `--init {path}` to start from it"
                )
            if selection.state is None and is_average_name(stem_of(path.name)):
                raise CkptEmaError(f"`{path}` is an average, by its name", hint=_hint_to_fold_average(contents))
            listing.checkpoints.append(_read_checkpoint(contents, selection, shared))
    origin = next((o for o in ORIGINS if all(o in numbers for _, numbers in listing.checkpoints)), None)
    listing.checkpoints = [
        (replace(checkpoint, step=numbers[origin] if origin else None, unit=origin[1] if origin else "step"), numbers)
        for checkpoint, numbers in listing.checkpoints
    ]
    # Two checkpoints of the same name in different folders are told apart by their folder.
    labels = [checkpoint.label for checkpoint, _ in listing.checkpoints]
    parent = common_folder(paths)
    if len(set(labels)) < len(labels):
        listing.checkpoints = [
            (replace(checkpoint, label=name_within(parent, checkpoint.path)), numbers)
            for checkpoint, numbers in listing.checkpoints
        ]
    steps = [checkpoint.step for checkpoint, _ in listing.checkpoints]
    known = [step for step in steps if step is not None]
    if known != sorted(known):
        older, newer = next((a, b) for a, b in itertools.pairwise(known) if a > b)
        unit = origin[1] if origin else "step"
        listing.warnings.append(
            f"{OUT_OF_ORDER}: {unit} {newer} comes after {unit} {older}, and is folded so; pass the run directory to"
            " fold in step order"
        )
    return parent, listing


def _at_precision_of(bound: int, checkpoint: Checkpoint) -> int:
    """Its step; of a date as many digits as were given, so that none of a day is before or after that."""
    step = checkpoint.step or 0
    return step // 10 ** max(0, DATE_DIGITS - len(str(bound))) if checkpoint.unit == "date" else step


def _select(directory: Path, listing: _Listing, selection: Selection) -> list[Checkpoint]:
    kept = []
    needs_steps = selection.from_step is not None or selection.until_step is not None
    for checkpoint, _ in listing.checkpoints:
        if needs_steps and checkpoint.step is None:
            raise CkptEmaError(
                f"`{checkpoint.label}` has no known step, so `--from` and `--until` cannot select it",
                hint="list the checkpoints to fold instead",
            )
        first, last = selection.from_step, selection.until_step
        if first is not None and _at_precision_of(first, checkpoint) < first:
            listing.left_out.append((checkpoint.label, f"before {checkpoint.unit} {selection.from_step}"))
        elif last is not None and _at_precision_of(last, checkpoint) > last:
            listing.left_out.append((checkpoint.label, f"{BEYOND} {checkpoint.unit} {selection.until_step}"))
        else:
            kept.append(checkpoint)
    if selection.last is not None:
        listing.left_out += [(item.label, f"not among the last {selection.last}") for item in kept[: -selection.last]]
        kept = kept[-selection.last :]
    if not kept and not selection.is_live:
        steps = [checkpoint.step for checkpoint, _ in listing.checkpoints if checkpoint.step is not None]
        known = f": it has {listing.checkpoints[0][0].unit}s {min(steps)} to {max(steps)}" if steps else ""
        raise NoCheckpointError(
            f"no checkpoint of `{directory}` is left to fold{known}",
            details=[f"{name}: {reason}" for name, reason in listing.left_out],
        )
    return kept
