"""Where the teachers go: what the user asked for in, one path per teacher out, or why not."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from ckpt_ema.averages.profiles import Profile
from ckpt_ema.errors import CkptEmaError, MisuseError, quoted
from ckpt_ema.formats import read_contents
from ckpt_ema.formats.folder import WEIGHTS_SUFFIX
from ckpt_ema.locations import RemotePath, as_path, identity_of, may_be_listed
from ckpt_ema.options import FoldOptions, PathLike
from ckpt_ema.output.old_teacher import check_folder_replaceable
from ckpt_ema.output.teacher_folder import is_model_folder
from ckpt_ema.output.writer import Draft, behind_link
from ckpt_ema.plans import FoldPlan
from ckpt_ema.runs.checkpoints import Checkpoint, Run
from ckpt_ema.teacher_record import read_record

HIDDEN_BYTES = len(Draft().name(Path("x")).name) - 1
"""By so much the hidden names beside a teacher are longer than its own."""

_ACCELERATES_NAME = re.compile(r"checkpoint_\d+")


def resolve_outputs(
    output: PathLike | None, run: Run, newest: Checkpoint, wanted: FoldOptions
) -> tuple[bool, list[Path]]:
    """Whether each teacher is a folder, and where each goes."""
    profiles = wanted.profiles
    has_folder = wanted.writes_folder or is_model_folder(newest.model_folder)
    placeholder = f"{{{profiles[0].tag[0]}}}"
    own_name = f"teacher-{placeholder}" if len(profiles) > 1 else "teacher"
    own_name += "" if has_folder else ".safetensors"
    if output is None:
        if run.root is None:
            raise MisuseError(
                "the checkpoints lie in several folders, so `--output` is needed", hint=f"pass `-o {own_name}`"
            )
        if isinstance(run.root, RemotePath):
            raise MisuseError(
                f"`{run.root}` is remote and a teacher is written to a local disk, so `--output` is needed",
                hint=f"pass `-o {own_name}`",
            )
        folder = _above_accelerates(run.root) or run.root
        targets = [(has_folder, folder / _fill(own_name, profile)) for profile in profiles]
        return has_folder, [path for _, path in _through_links(targets, wanted)]
    if output == "":
        raise MisuseError("`--output` is empty", hint="is a variable of your shell empty?")
    given = as_path(output)  # refuses what is no path
    text = os.fspath(output)
    if isinstance(given, RemotePath):
        raise MisuseError(
            f"`--output {text}` is a URL, and a teacher is written to a local disk", hint=f"pass `-o {own_name}`"
        )
    if len(profiles) > 1 and placeholder not in text:
        if not Path(text).is_dir():
            if text.endswith("/"):
                raise _no_folder(text)
            pattern = Path(text).with_name(f"{Path(text).stem}-{placeholder}{'' if has_folder else '.safetensors'}")
            raise MisuseError(
                f"`--output {text}` is one name for {len(profiles)} teachers",
                hint=f"pass `--output {quoted(str(pattern))}`, or an existing folder",
            )
        text = str(Path(text) / own_name)
    if wanted.writes_folder and text.endswith(".safetensors"):
        raise MisuseError(
            f"`--output {text}` is the name of a file, and the teacher a folder",
            hint=f"pass `--output {text.removesuffix('.safetensors')}`",
        )
    stray = [f"{{{word}}}" for word in ("momentum", "half_life", "sigma_rel") if f"{{{word}}}" in text]
    if stray not in ([], [placeholder]):
        raise MisuseError(
            f"`--output {text}` asks for {', '.join(stray)}, and these teachers are told apart by {placeholder}"
        )
    if wanted.writes_folder:
        return True, [_settled(Path(_fill(text, profile)), is_folder=True) for profile in profiles]
    resolved = [_resolve(text, profile, has_folder) for profile in profiles]
    resolved = _through_links(resolved, wanted)
    return resolved[0][0], [_settled(path, is_folder=is_folder) for is_folder, path in resolved]


def _through_links(targets: list[tuple[bool, Path]], wanted: FoldOptions) -> list[tuple[bool, Path]]:
    """`targets`, but where one is a link to a teacher's file that is to be replaced, what it leads to: the link stays.

    Raises MisuseError for devices and pipes, and where two outputs lead to one file.
    """
    found = []
    for is_folder, path in targets:
        _check_no_device(path)
        found.append((is_folder, behind_link(path) if wanted.overwrite else path))
    paths = [path for _, path in found]
    if len(set(paths)) < len(paths):
        twice = [str(path) for (_, path), real in zip(targets, paths, strict=True) if paths.count(real) > 1]
        raise MisuseError(
            f"`{twice[0]}` and `{twice[1]}` lead to one file", hint="pass another `--output`, or remove a link"
        )
    return found


def _check_no_device(path: Path) -> None:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise MisuseError(
            f"`--output {path}` is a device or a pipe, and is never replaced",
            hint="pass a file; `ckpt-ema plan` shows what would be done, and writes nothing",
        )


def _fill(text: str, profile: Profile) -> str:
    word, value = profile.tag
    return text.replace(f"{{{word}}}", value)


def _resolve(pattern: str, profile: Profile, has_folder: bool) -> tuple[bool, Path]:
    path = Path(_fill(pattern, profile))
    _check_no_device(path)
    if path.suffix == ".safetensors" and not path.is_dir() and not pattern.endswith("/"):
        return False, path
    if has_folder and not WEIGHTS_SUFFIX.search(path.name):
        return True, path
    if path.is_dir():
        return False, path / "teacher.safetensors"
    if pattern.endswith("/"):
        raise _no_folder(pattern)
    # Of the pattern: a number's decimals look like a suffix.
    named = Path(pattern)
    has_suffix = bool(named.suffix) and "}" not in named.suffix
    better = str(named.with_suffix(".safetensors")) if has_suffix else f"{named}.safetensors"
    raise MisuseError(
        f"`--output {path}` is neither a folder nor ends with .safetensors",
        hint=f"pass `--output {quoted(better)}`, or an existing folder",
    )


def _settled(path: Path, *, is_folder: bool) -> Path:
    """`path`, or another way to it that is still one when the teacher has taken its place."""
    if path.name in ("", ".."):
        path = Path(os.path.realpath(path))
    if is_folder:
        if path.is_symlink() and path.is_dir():
            path = Path(os.path.realpath(path))  # the link stays
        if path.is_mount():
            raise MisuseError(
                f"`--output {path}` is where a disk is mounted, and cannot become another folder",
                hint=f"pass `--output {shlex.quote(str(path / 'teacher'))}`",
            )
    if (above := _above_accelerates(path.parent)) is not None:
        raise MisuseError(
            f"`--output {path}` lies among accelerate's checkpoints, and its `save_state` and `load_state` take every"
            " name there for one of them",
            hint=f"pass `--output {shlex.quote(str(above / path.name))}`",
        )
    # `t/../t` leads nowhere while `t` is being replaced.
    real = os.path.realpath(path)
    if any(os.path.realpath(parent) == real for parent in path.parents):
        return Path(os.path.realpath(path.parent), path.name)
    return path


def _above_accelerates(folder: Path) -> Path | None:
    """The folder above `folder` where that is accelerate's `checkpoints/`, else None.

    accelerate looks for a number in every name there, removes the smallest and loads the largest.
    """
    real = Path(os.path.realpath(folder))
    if real.name != "checkpoints" or not real.is_dir() or not may_be_listed(real):
        return None
    if not any(_ACCELERATES_NAME.fullmatch(path.name) and path.is_dir() for path in real.iterdir()):
        return None
    return folder.parent if folder.name == real.name else real.parent


def _obstacle(folder: Path) -> Path | None:
    """What stands where `folder` or one above it would have to be created; None where `mkdir -p` creates it."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    return None if there.is_dir() else there


def _no_folder(text: str) -> MisuseError:
    obstacle = _obstacle(Path(text).absolute())
    if obstacle is not None:
        return MisuseError(f"`--output {text}`: `{obstacle}` is no folder", hint="pass another `--output`")
    return MisuseError(f"`--output {text}` is no folder", hint=f"create it first: `mkdir -p {shlex.quote(text)}`")


def check_parents(planned: FoldPlan) -> None:
    """Raise CkptEmaError where the folder that a teacher goes to is not there, or knows no names so long."""
    for teacher in planned.teachers:
        parent = teacher.output.absolute().parent
        obstacle = _obstacle(parent)
        if obstacle is not None:
            raise CkptEmaError(f"`{obstacle}` is no folder", hint="pass another `--output`")
        if not parent.is_dir():
            raise CkptEmaError(
                f"`{parent}` is no folder", hint=f"create it first: `mkdir -p {shlex.quote(str(parent))}`"
            )
        length, most = len(os.fsencode(teacher.output.name)), os.pathconf(parent, "PC_NAME_MAX") - HIDDEN_BYTES
        if length > most:
            raise CkptEmaError(
                f"`{teacher.output}` has a name of {length} bytes, and may have {most} here", hint="pass a shorter one"
            )


def check_outputs(planned: FoldPlan, written: Sequence[Collection[str]], draft: Draft) -> None:
    """Refuse what must not be replaced, before a tensor is read; `written` are the names of each teacher's files.

    What `draft` continues may have its name already, and is passed over.
    """
    for teacher, names in zip(planned.teachers, written, strict=True):
        final = [teacher.output / name for name in names] if planned.is_folder else [teacher.output]
        if not any(draft.has_named(path) for path in final):
            _check_output(planned, teacher.output, names, draft)


def check_no_checkpoint(planned: FoldPlan) -> None:
    """Refuse to replace what appeared while the teachers were being folded, unless it is a teacher as well."""
    for teacher in planned.teachers:
        if planned.options.overwrite and not planned.is_folder and teacher.output.is_file():
            _check_is_teacher(planned, teacher.output)


def _check_output(planned: FoldPlan, target: Path, written: Collection[str], draft: Draft) -> None:
    if not os.path.lexists(target):
        return
    if planned.is_folder and target.is_dir() and all(map(draft.owns, target.iterdir())):
        return
    if not planned.options.overwrite:
        raise CkptEmaError(f"`{target}` exists", hint="pass `--overwrite` to replace it, or another `--output`")
    if planned.is_folder:
        if not target.is_dir():
            raise CkptEmaError(f"`{target}` is a file, the teacher a folder", hint="pass another `--output`")
        check_folder_replaceable(target, written)
        if planned.options.writes_folder:  # which takes the place of what is there
            _check_no_input_inside(planned, target)
    elif target.is_dir():
        raise CkptEmaError(f"`{target}` is a folder, the teacher a file", hint="pass another `--output`")
    elif target.exists():
        _check_is_teacher(planned, target)


def _check_no_input_inside(planned: FoldPlan, target: Path) -> None:
    """Refuse to put a folder in the place of one that students lie in."""
    inside = target.resolve()
    for file in planned.input_files:
        if inside in file.path.resolve().parents:
            raise CkptEmaError(
                f"`{file.path}` lies in `{target}`, which the teacher would take the place of",
                hint="pass another `--output`",
            )


def _check_is_teacher(planned: FoldPlan, target: Path) -> None:
    """Raise CkptEmaError unless `target` is a teacher that a fold could make again, or holds nothing readable."""
    inputs = {file.identity for file in planned.input_files}
    identity = identity_of(target)
    is_continued = planned.options.init is not None and identity_of(as_path(planned.options.init)) == identity
    if identity in inputs and not is_continued:
        raise CkptEmaError(f"`{target}` is one of the inputs, and is never replaced", hint="pass another `--output`")
    try:
        contents = read_contents(target)
    except CkptEmaError as error:
        if error.is_refused:
            raise  # it may be anything
        return
    if not contents.is_own_teacher:
        if is_continued:
            return
        raise CkptEmaError(
            f"`{target}` holds tensors that ckpt-ema did not write; it is never replaced",
            hint="pass another `--output`, or move it away",
        )
    record = read_record(contents.metadata)
    if record.is_of_training:
        what = "a snapshot that an online teacher wrote" if record.is_snapshot else "a teacher that followed training"
        raise CkptEmaError(
            f"`{target}` is {what}, which nobody can make again; it is never replaced",
            hint="pass another `--output`, or move it away",
        )
