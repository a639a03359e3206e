"""A folder in, the paths of its checkpoints out, by the names of what lies there; no table of tensors is read."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from ckpt_ema.errors import CkptEmaError, NoCheckpointError
from ckpt_ema.formats import is_weights_file_name
from ckpt_ema.formats.deepspeed import folder_of_latest
from ckpt_ema.formats.folder import NEVER_STUDENTS, SERIES_STEMS, has_weights, is_sharded, nameless_models
from ckpt_ema.formats.names import is_average_name
from ckpt_ema.locations import children_of, is_dead_link, may_be_listed
from ckpt_ema.runs.steps import is_copy_name, stem_of, steps_in_name

MAX_SEARCH_DEPTH = 3
MAX_FOLDERS_OF_RUN = 3
DEAD_LINK = "a link that cannot be followed"
CLOSED = "a folder that may not be listed"

# Names and patterns in which a shell finds nothing special but `*`.
_SAFE_PATTERN = re.compile(r"[\w.*=+@%:,-]+")

SNAPSHOT_NAME = re.compile(r"^teacher(_.+)?_step_\d+\.safetensors$")
"""How `MeanTeacher` names its files; what they hold is asked of themselves."""


def is_one_checkpoint(folder: Path) -> bool:
    """Whether a folder that was named is one checkpoint, and no run directory."""
    if is_sharded(folder):
        return True
    if not has_weights(folder):
        return False
    children = visible_children(folder)
    below = children
    if has_series_name(folder):  # the teacher that a callback put into each checkpoint is no checkpoint of a run
        below = [child for child in children if not is_average_name(child.name)]
    return (
        not _has_numbered_files(children)
        and not any(map(is_checkpoint_folder, below))
        and _find_numbered_below(folder) is None
    )


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a folder that lies in a run directory is one of its checkpoints."""
    if not path.is_dir() or path.name.startswith("tmp"):
        return False
    if not may_be_listed(path):
        return bool(steps_in_name(path.name))  # reading it then raises
    if has_weights(path) and not _has_numbered_files(visible_children(path)):
        return has_series_name(path) or not _is_run_with_its_final_model(path)
    if is_sharded(path):
        return not NEVER_STUDENTS.match(path.name)  # accelerate's `optimizer_0`
    # DeepSpeed's `latest` lies beside the checkpoints of a run, and in the Trainer's checkpoints, which have a number.
    if steps_in_name(path.name) and folder_of_latest(path) is not None:
        return True
    if not steps_in_name(path.name) or is_average_name(path.name):
        return False
    # checkpoint-300/ without weights is unfinished, or holds them one level down (diffusers).
    children = visible_children(path)
    if not has_series_name(path) and any(child.is_dir() and has_series_name(child) for child in children):
        return False  # `lora_run_1/checkpoint-500/`: a run by itself
    return any(child.is_dir() and may_be_listed(child) and has_weights(child) for child in children) or (
        has_series_name(path) and not any(map(_is_candidate, children))
    )


def find_run_folder(run: Path) -> tuple[Path, list[Path], list[tuple[str, str]]]:
    """The one folder at or below `run` that holds checkpoints (`checkpoints/`, `lightning_logs/version_0/...`).

    With what may be checkpoints in it, and with what is left out, and why: a lone model above the folder, the
    final one and links in it that cannot be followed, and folders that may not be listed. Raises NoCheckpointError
    where there is none, CkptEmaError where there are several.
    """
    directory, candidates, left_out = _descend(run)
    taken = set(candidates)
    children = visible_children(directory)
    left_out += [
        (path.name, "the final model, without a step of its own")
        for path in children
        if path not in taken and _is_candidate(path)
    ]
    left_out += [(path.name, DEAD_LINK) for path in _find_dead_links(directory)]
    left_out += [(path.name, CLOSED) for path in _folders_below([directory]) if _is_closed(path)]
    return directory, candidates, left_out


def find_files_beside(run: Path, directory: Path) -> tuple[list[Path], list[Path]]:
    """The files that may be snapshots, and the folders that may hold some and may not be listed.

    Both lie in folders of their own: beside, above or below `directory`, which has the checkpoints, not in it.
    """
    files: list[Path] = []
    closed: list[Path] = []
    seen = {directory.resolve()}
    level = [run, directory]
    for _ in range(MAX_SEARCH_DEPTH):
        below: list[Path] = []
        for folder in level:
            is_new = folder.resolve() not in seen
            seen.add(folder.resolve())
            for path in visible_children(folder):
                if path.is_dir() and not may_be_listed(path):
                    if is_new:
                        closed.append(path)
                elif path.is_dir():
                    if path.resolve() not in seen and not is_checkpoint_folder(path):
                        below.append(path)
                elif is_new and path.suffix == ".safetensors":
                    files.append(path)
        level = below
    return files, closed


def find_checkpoint_below(folder: Path) -> Path | None:
    """A checkpoint of a series, which makes `folder` a run, or a folder of runs, and no checkpoint itself."""
    inside = (path for path in visible_children(folder) if has_series_name(path) and is_checkpoint_folder(path))
    return next(inside, None) or _find_numbered_below(folder, is_by_custom=True)


def visible_children(folder: Path) -> list[Path]:
    """What lies in a folder, but for hidden files and links that cannot be followed."""
    return [path for path in children_of(folder) if not path.name.startswith(".") and not is_dead_link(path)]


def has_series_name(path: Path) -> bool:
    """Whether it is called as trainers call their checkpoints: by a number, and by what it counts."""
    stem = stem_of(path.name).lower()
    return bool(steps_in_name(path.name)) and stem.startswith(SERIES_STEMS)


def _is_run_with_its_final_model(folder: Path) -> bool:
    """Whether a folder with weights also holds checkpoints: `seed_1/checkpoint-500/` beside a model.

    `ckpt-100/` with its own `global_step100/` is a checkpoint.
    """
    own = set(steps_in_name(folder.name).values())
    inside = [child for child in visible_children(folder) if has_series_name(child) and child.is_dir()]
    return folder_of_latest(folder) is None and any(
        not own & set(steps_in_name(child.name).values()) and (has_weights(child) or is_sharded(child))
        for child in inside
        if may_be_listed(child)
    )


def _is_closed(folder: Path) -> bool:
    """Whether it is passed over since it may not be listed; of one with a checkpoint's name, reading it raises."""
    return not may_be_listed(folder) and not steps_in_name(folder.name)


def _find_dead_links(folder: Path) -> list[Path]:
    """Links by the names of checkpoints that cannot be followed."""
    named = [path for path in children_of(folder) if is_weights_file_name(path.name) or has_series_name(path)]
    return [path for path in named if is_dead_link(path)]


def _descend(run: Path) -> tuple[Path, list[Path], list[tuple[str, str]]]:
    """The folder with its candidates, and what was passed over on the way: a lone model above it."""
    passed_over: list[tuple[str, str]] = []
    snapshots: list[tuple[Path, list[Path]]] = []
    level = [run]
    for _ in range(MAX_SEARCH_DEPTH + 1):
        found = [(folder, candidates) for folder in level if (candidates := _candidates_of(folder))]
        # Where an online teacher writes is no run of its own.
        snapshots += [pair for pair in found if all(SNAPSHOT_NAME.match(path.name) for path in pair[1])]
        found = [pair for pair in found if pair not in snapshots]
        lone = {folder for folder, candidates in found if _is_lone_model(candidates)}
        if (lone and any(map(_find_numbered_below, level))) or len(lone) < len(found):
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
                hint=f"pass one of them: `{found[0][0]}`" + _as_one_run(found),
            )
        below = _folders_below(level)
        passed_over += [(os.path.relpath(folder, run), CLOSED) for folder in below if _is_closed(folder)]
        level = [folder for folder in below if may_be_listed(folder)]
    if snapshots:
        return *snapshots[0], passed_over
    raise NoCheckpointError(
        f"`{run}` holds no checkpoints",
        details=[f"{name}: {why}" for name, why in passed_over if why == CLOSED]
        + [f"{path.name}: {DEAD_LINK}" for path in _find_dead_links(run)],
        hint="pass the folder they lie in, or the checkpoints themselves in the order they are to be folded",
    )


def _as_one_run(found: Sequence[tuple[Path, Sequence[Path]]]) -> str:
    """How to fold a few folders that may be one training run started again, as Lightning numbers its versions.

    "" where a step is in two of them, or where no pattern takes just the numbered checkpoints.
    """
    if len(found) > MAX_FOLDERS_OF_RUN:
        return ""
    patterns, steps = [], []
    for folder, candidates in found:
        names = sorted(path.name for path in candidates if not is_copy_name(path.name))
        steps += [tuple(sorted(steps_in_name(name).items())) for name in names]
        pattern = re.sub(r"\d+", "*", names[0]) if names else ""
        matching = fnmatch.filter([path.name for path in visible_children(folder)], pattern)
        if sorted(matching) != names or not _SAFE_PATTERN.fullmatch(pattern):
            return ""
        patterns.append(f"{shlex.quote(str(folder))}/{pattern}")
    if () in steps or len(set(steps)) < len(steps):
        return ""
    return f"; where all are of one training run, pass its checkpoints: `{' '.join(patterns)}`"


def _candidates_of(directory: Path) -> list[Path]:
    children = visible_children(directory)
    found = [path for path in children if _is_candidate(path)]
    if any(path.is_dir() for path in found) or _has_numbered_files(children):
        # Trainers put the final model beside the checkpoints; it has no step, and is the last one again.
        nameless = nameless_models([path.name for path in children])
        folders = [path for path in found if path.is_dir() and may_be_listed(path)]
        found = [
            path
            for path in found
            if path.is_dir() or not (path.name in nameless or any((folder / path.name).is_file() for folder in folders))
        ]
    return found


def _is_candidate(path: Path) -> bool:
    return (path.is_file() and is_weights_file_name(path.name)) or is_checkpoint_folder(path)


def _has_numbered_files(children: Sequence[Path]) -> bool:
    """Whether files of a series are among these: `step_100.pt`, but not accelerate's `model_1.safetensors`."""
    nameless = nameless_models([path.name for path in children])
    return any(
        steps_in_name(path.name) and path.name not in nameless and path.is_file()
        for path in children
        if is_weights_file_name(path.name)
    )


def _is_lone_model(candidates: Sequence[Path]) -> bool:
    """Whether nothing here looks like a series: one model, or copies, none with a number in its name."""
    unnumbered = [path for path in candidates if not steps_in_name(path.name)]
    series = [path for path in unnumbered if not is_copy_name(path.name) and path.stem != "teacher"]
    return len(unnumbered) == len(candidates) and len(series) <= 1


def _find_numbered_below(folder: Path, *, is_by_custom: bool = False) -> Path | None:
    """The first checkpoint with a number in its name that a folder below `folder` holds.

    With `is_by_custom` one that is called as trainers call theirs: a pipeline's second text encoder has a number, too.
    """
    is_numbered = has_series_name if is_by_custom else lambda path: bool(steps_in_name(path.name))
    level = [folder]
    for _ in range(MAX_SEARCH_DEPTH):
        level = [child for child in _folders_below(level) if may_be_listed(child)]
        numbered = (path for child in level for path in _candidates_of(child) if is_numbered(path))
        if (found := next(numbered, None)) is not None:
            return found
    return None


def _folders_below(level: Sequence[Path]) -> list[Path]:
    """The next level of folders; one that a link names as well counts once."""
    folders = sorted(
        (child for folder in level for child in visible_children(folder) if child.is_dir()), key=_link_last
    )
    return sorted({folder.resolve(): folder for folder in reversed(folders)}.values())


def _link_last(path: Path) -> tuple[bool, Path]:
    return path.is_symlink(), path
