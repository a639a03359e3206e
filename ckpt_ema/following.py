"""A run that is still training in, its teacher out: every checkpoint is folded as soon as it is finished.

a look at the run -> what is new and finished -> a fold that goes on from the teacher's own file -> a look ...
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckpt_ema.averages.profiles import inverted_momentum_warning
from ckpt_ema.continuing import Beginning, read_beginning
from ckpt_ema.dtypes import DType, WrittenDtype, is_change_of_precision
from ckpt_ema.errors import CkptEmaError, MisuseError, NoCheckpointError, NoUpdateError
from ckpt_ema.folding import fold
from ckpt_ema.inheriting import inherit
from ckpt_ema.keywords import refuses_unknown_keywords
from ckpt_ema.locations import RemotePath, as_path
from ckpt_ema.newer import inside_of, newer_of
from ckpt_ema.options import FoldKeywords, FoldOptions, PathLike, Unpack
from ckpt_ema.output.targets import resolve_outputs
from ckpt_ema.plans import FoldReport
from ckpt_ema.runs.checkpoints import Checkpoint, Run
from ckpt_ema.runs.find import check_may_be_listed
from ckpt_ema.sizes import counted
from ckpt_ema.watching import Signature, WatchedRun, is_whole, signature_below

POLL_SECONDS = 1.0
"""Between two looks at the run; a checkpoint is folded when it was the same in both."""

MANY_CHECKPOINTS = 100
"""After which half of the first one shall be gone, or it is said: few runs have more."""

PATIENCE_SECONDS = 60.0
"""An unreadable checkpoint that nobody has written to for so long holds up newer ones no longer."""

MAX_PAUSE_SECONDS = 60.0
"""Between two folds of which the first failed for a reason that may pass."""


_Change = tuple[str, DType, DType]
"""What is said of a tensor's other precision, and the dtypes before and after."""


@dataclass(frozen=True, slots=True)
class FollowReport:
    """What came of a run that was followed."""

    output: Path
    """The teacher."""

    num_folded: int
    """Checkpoints that were folded, this time."""

    missed: tuple[str, ...]
    """Names of checkpoints that were seen, and vanished, stayed unreadable, or were of a step before the teacher's."""

    last: FoldReport | None
    """Of the last fold; None where nothing was new."""


class OutOfReachError(CkptEmaError):
    """The run directory was out of reach when following ended: what is there nobody knows."""

    def __init__(self, message: str, report: FollowReport | None) -> None:
        super().__init__(message, hint="follow again when it is back")
        self.report = report
        """Of what was done until then; None where there was no checkpoint to fold. The teacher may be out of reach."""


@refuses_unknown_keywords(FoldOptions)
def follow(
    run: PathLike,
    output: PathLike | None = None,
    *,
    idle_seconds: float | None = None,
    poll_seconds: float = POLL_SECONDS,
    patience_seconds: float = PATIENCE_SECONDS,
    stop: threading.Event | None = None,
    tell: Callable[[str], None] | None = None,
    warn: Callable[[str], None] | None = None,
    **options: Unpack[FoldKeywords],
) -> FollowReport:
    """Fold each checkpoint of a run that is still training as soon as it is finished; the trainer may delete it then.

    `output` as in `fold`, of which `options` are, for one exponential moving average. The teacher there is whole at
    every moment, and is continued where it exists: a restart continues where the last one ended. It is written in the
    students' dtype; in float32 where that has 16 bits or fewer, and from the first change of precision on. With `dtype`
    it is always written in that.

    Ends when `stop` is set, after a last look; once `until_step` is folded, or passed by the run; after `idle_seconds`
    in which nothing was folded and no checkpoint written to; else never. A checkpoint counts as finished when it can be
    read and was the same in two looks, `poll_seconds` apart. Of older ones that cannot be read the newer ones wait for
    `patience_seconds` after the last write to them; one that may not be read is told when it is seen. `tell` gets a
    line for what happens, `warn` (by default `tell`) one where somebody should look: "Warning: ...", "missed ...". A
    fold that fails for a reason that may pass, such as a full disk, is tried again, at last once a minute, until
    following ends; a run directory that is out of reach is waited for.

    Raises CkptEmaError as `fold` does, and the teacher is that of the last fold then; OutOfReachError, whose `report`
    is of what was done until then, where the run directory is out of reach at the end; NoCheckpointError where there is
    no teacher at the end. What was missed is in the report, and no error.
    """
    wanted = FoldOptions(**options)
    _check_makes_sense(wanted, poll_seconds, patience_seconds, idle_seconds)
    path = _local_folder(run)
    # torch takes a second or more to import, in which a trainer may remove a checkpoint that is ready to be folded.
    import ckpt_ema.engine.choice  # noqa: F401, PLC0415

    tell = tell or (lambda text: None)
    watched = WatchedRun(path, wanted.until_step, poll_seconds, patience_seconds, tell, warn or tell)
    follower = _Follower(watched, output, wanted, tell, warn or tell)
    return follower.run(stop or threading.Event(), idle_seconds)


def _check_makes_sense(
    wanted: FoldOptions, poll_seconds: float, patience_seconds: float, idle_seconds: float | None
) -> None:
    """Raise MisuseError for options of a fold that a run cannot be followed with, and for times that are none."""
    if len(wanted.profiles) > 1 or wanted.profile != "ema" or wanted.coefficients is not None:
        raise MisuseError("a run is followed by one exponential moving average", hint="pass one `--momentum`")
    for name in ("init", "last", "shard_size_bytes"):
        if getattr(wanted, name) is not None:
            raise MisuseError(f"`--{name.replace('_bytes', '').replace('_', '-')}` has no meaning while following")
    if wanted.interval > 1 and not wanted.per_step:
        raise MisuseError("`--interval` counts checkpoints, of which some may be missed", hint="omit it")
    if wanted.output_format != "safetensors":
        raise MisuseError(f"`--output-format {wanted.output_format}` is not replaced in one step", hint="omit it")
    for name, seconds in (("poll_seconds", poll_seconds), ("patience_seconds", patience_seconds)):
        if not 0 < seconds < math.inf:
            raise MisuseError(f"`{name}` is {seconds}, and must be above 0")
    if idle_seconds is not None and not idle_seconds > 0:
        raise MisuseError(f"`--idle` is {idle_seconds} s, and must be above 0")


def _local_folder(run: PathLike) -> Path:
    """The run directory, which is there and may be listed."""
    path = as_path(run)
    if isinstance(path, RemotePath):
        raise MisuseError(
            f"`{path}` is remote, and a run is followed where it is written",
            hint="fold what is new now and then: `ckpt-ema fold RUN --init TEACHER -o TEACHER --overwrite`",
        )
    if not path.is_dir():
        raise MisuseError(f"`{path}` is no folder", hint="pass the run directory that the trainer writes to")
    check_may_be_listed(path)
    return path


@dataclass(slots=True)
class _Follower:
    """The teacher of a watched run, and what is known of it between two folds."""

    watched: WatchedRun
    """The run, and which of its checkpoints are done."""

    wanted_output: PathLike | None
    """Where the teacher was asked to go."""

    wanted: FoldOptions
    """What was asked for."""

    tell: Callable[[str], None]
    """Gets a line for what happens."""

    warn: Callable[[str], None]
    """Gets a line where somebody should look."""

    options: FoldOptions = field(init=False)
    """What was asked for, with what the teacher says of itself, and the dtype that it is written in."""

    target: Path | None = None
    """Where the teacher goes; known once there is a checkpoint."""

    earlier: Path | None = None
    """A teacher that was there at the beginning, and is continued where it is `target`."""

    earlier_step: int | None = None
    """Of the newest checkpoint in `earlier`."""

    num_folded: int = 0
    """Checkpoints that were folded, this time."""

    last: FoldReport | None = None
    """Of the last fold."""

    last_path: Path | None = None
    """The newest checkpoint in the teacher: straight lines begin there."""

    unreached: str = ""
    """Why the last look could not be taken; "" where it could."""

    num_failures: int = 0
    """Folds in a row that failed for a reason that may pass; told once."""

    failed_at: float = 0.0
    """When the last of these did, in seconds of a clock that only goes forward."""

    told_losses: set[DType] = field(default_factory=set)
    """Dtypes whose digits the teacher loses, each of which is told once."""

    def __post_init__(self) -> None:
        self.options = self.wanted

    def run(self, stop: threading.Event, idle_seconds: float | None) -> FollowReport:
        since = time.monotonic()
        self._look_for_earlier()
        while True:
            stopping = stop.is_set()
            # A checkpoint that takes long to write is no idleness.
            last = max(since, self.watched.last_written)
            is_idle = idle_seconds is not None and time.monotonic() - last >= idle_seconds
            if self.look(is_last=stopping or is_idle):
                since = time.monotonic()
                continue
            if stopping or is_idle or self._is_complete():
                break
            # Not beyond the time that it may be idle.
            stop.wait(min(self.watched.poll_seconds, idle_seconds or math.inf))
        if self.unreached:
            raise OutOfReachError(f"`{self.watched.path}` is out of reach: {self.unreached}", self._report())
        self.watched.miss_the_rest()
        report = self._report()
        if report is None or not report.output.exists():
            raise NoCheckpointError(
                f"`{self.watched.path}` had no finished checkpoint", hint="is it the trainer's folder?"
            )
        return report

    def _report(self) -> FollowReport | None:
        """What came of it so far; None where nobody knows where the teacher goes, since there was no checkpoint."""
        target = self.target or self.earlier
        return None if target is None else FollowReport(target, self.num_folded, tuple(self.watched.missed), self.last)

    def _look_for_earlier(self) -> None:
        """A teacher of an earlier follower: there may be nothing new in this run ever again."""
        wanted = self.wanted_output
        places = [self.watched.path / "teacher.safetensors", self.watched.path / "teacher"]
        if wanted is not None:
            places = [as_path(wanted) / "teacher.safetensors", as_path(wanted)]
        for place in places:
            with contextlib.suppress(CkptEmaError):
                beginning = read_beginning(replace(self.options, init=place))
                if beginning is not None and beginning.past:
                    self.earlier, self.earlier_step = place, beginning.past[-1].step
                    # Before the run is read: which of its state dicts is meant may be nothing that it tells by itself.
                    inherited = inherit(beginning, self.options).options
                    self.options = replace(self.options, state=inherited.state, prefix=inherited.prefix)
                    return

    def look(self, *, is_last: bool) -> bool:
        """Fold what is new and finished; whether there was anything."""
        if self._has_lost_reach():
            return False
        try:
            return self._look(is_last=is_last)
        except (CkptEmaError, OSError):
            if not self._has_lost_reach():
                raise
            return False

    def _has_lost_reach(self) -> bool:
        """Whether the run directory cannot be looked into just now, as one on a network; told once."""
        try:
            os.listdir(self.watched.path)
            os.stat(os.path.join(self.watched.path, "."))  # what may be listed may not be entered
        except OSError as error:
            is_news, self.unreached = not self.unreached, error.strerror or str(error)
            if is_news:
                self._warn(f"`{self.watched.path}` is out of reach: {self.unreached}; it is waited for")
            return True
        if self.unreached:
            self.tell(f"`{self.watched.path}` is there again")
        self.unreached = ""
        return False

    def _look(self, *, is_last: bool) -> bool:
        found = self.watched.find(self.options)
        ready = self.watched.ready(found, is_last=is_last) if found is not None else []
        if not ready:
            return False
        assert found is not None
        # Each look after a failure folds all of it anew: less and less often, then.
        pause = min(MAX_PAUSE_SECONDS, self.watched.poll_seconds * 2**self.num_failures)
        if self.num_failures and not is_last and time.monotonic() - self.failed_at < pause:
            return False
        if self.target is None:
            self._choose_target(found, ready[-1])
            ready = [item for item in ready if item.path not in self.watched.done]
        return bool(ready) and self._fold(ready, is_last=is_last)

    def _choose_target(self, found: Run, newest: Checkpoint) -> None:
        """Where the teacher goes, and which checkpoints it has already where it is there."""
        _, [self.target] = resolve_outputs(self.wanted_output, found, newest, self.options)
        beginning = self._beginning()
        if beginning is None:
            self._tell_of_momentum()
            return
        has_changed = any(_changes_of_precision([newest], beginning))
        inherited = inherit(
            beginning, replace(self.options, dtype=self._written_dtype(newest, has_changed=has_changed))
        )
        if not beginning.past:
            raise CkptEmaError(f"`{self.target}` does not say what it was folded from", hint="pass another `--output`")
        try:
            foreign = newer_of(beginning, found.checkpoints).warnings
        except NoCheckpointError:  # nothing is newer, yet
            foreign = ()
        if foreign:
            raise CkptEmaError(foreign[0], hint="pass another `--output`")
        if inherited.warnings:
            given = [f"`--{name.replace('_', '-')}`" for name in inherited.clashing]
            leave = f"omit {' and '.join(given)} to continue it, or " if given else ""
            raise CkptEmaError(
                f"`{self.target}` is the teacher of other options",
                details=inherited.warnings,
                hint=f"{leave}pass another `--output`",
            )
        self.options = inherited.options
        for text in inherited.notes:
            self.tell(text)
        watched = self.watched
        watched.last_step, watched.last_unit = beginning.past[-1].step, beginning.past[-1].unit
        inside = inside_of(beginning, found.checkpoints)
        if inside:
            self.tell(f"{self.target} has {_first_to_last(inside)} already")
        for item in found.checkpoints:
            if item.step is None or watched.last_step is None or watched.is_older(item) or item in inside:
                watched.forget(item.path)
                if item.step == watched.last_step:
                    self.last_path = item.path

    def _tell_of_momentum(self) -> None:
        """What a fold says of a first checkpoint that dominates; how many are going to follow it nobody knows."""
        momentum = self.options.profiles[0].momentum
        if momentum is None or self.options.per_step:
            return
        inverted = inverted_momentum_warning(momentum, "`--momentum {:g}`")
        num_checkpoints = math.log(0.5) / math.log1p(-momentum)
        if inverted:
            self._warn(inverted)
        elif num_checkpoints > MANY_CHECKPOINTS:
            self._warn(
                f"momentum {momentum:g} works once per checkpoint here, not once per training step: half of the first"
                f" one is left after {num_checkpoints:,.0f} more; `--per step` makes it work as in training"
            )

    def _beginning(self) -> Beginning | None:
        assert self.target is not None
        # A follower that was killed in its first fold leaves hidden files.
        if not self.target.exists() or (self.target.is_dir() and all(map(_is_hidden, self.target.iterdir()))):
            return None
        return read_beginning(replace(self.options, init=self.target))

    def _fold(self, ready: Sequence[Checkpoint], *, is_last: bool) -> bool:
        """Fold `ready` onto the teacher; False where one of them changed or vanished, and the next look tells more.

        False as well where it failed for a reason that may pass, unless this was the last look.
        """
        paths = [*self._anchor(), *(item.path for item in ready)]
        before = {path: signature_below(path) for path in paths}
        beginning = self._beginning()
        if beginning is None and self.watched.last_step is not None:
            raise CkptEmaError(
                f"`{self.target}`, the teacher of the checkpoints so far, is gone",
                hint="follow again to begin anew with what is there",
            )
        changes = list(_changes_of_precision(ready, beginning))
        self.options = replace(self.options, dtype=self._written_dtype(ready[-1], has_changed=bool(changes)))
        try:
            report = self._fold_once(paths, beginning)
        except NoUpdateError:  # with an interval: they go in with the next ones, and are not missed
            for item in ready:
                self.watched.put_off(item)
            return False
        except CkptEmaError as error:
            # The trainer may have been removing one of them before it was looked at here.
            is_same = all(signature_below(path) == signature for path, signature in before.items())
            if is_same and all(map(is_whole, ready)):
                self._try_again_or_raise(error, is_last=is_last)
            return False
        self._tell_of_dtype(ready, beginning, changes)
        self._note_folded(ready, before, report)
        return True

    def _anchor(self) -> list[Path]:
        """The newest checkpoint in the teacher, if straight lines begin there and it has not been removed."""
        last_step, path = self.watched.last_step, self.last_path
        if not self.options.per_step or self.options.between == "hold" or last_step is None:
            return []
        if path is not None and path in self.watched.done and path.exists():
            return [path]
        if not self.num_failures:
            self._warn(f"the checkpoint of step {last_step} is gone: no straight line can begin there")
        return []

    def _fold_once(self, paths: Sequence[Path], beginning: Beginning | None) -> FoldReport:
        assert self.target is not None
        given = {name: getattr(self.options, name) for name in FoldOptions.__dataclass_fields__}
        # Where there is no teacher to go on from, there may be an unfinished fold of one.
        given |= {"init": None if beginning is None else self.target, "overwrite": True}
        given |= {"from_step": None, "until_step": None, "include": (), "exclude": ()}
        return fold(paths, self.target, announce=lambda plan: None, **given)

    def _try_again_or_raise(self, error: CkptEmaError, *, is_last: bool) -> None:
        """Count a failure that may pass, and tell the first one; raise any other, and at the last look that as well."""
        if is_last or not _may_pass(error):
            raise error
        if not self.num_failures:
            hint = f" ({error.hint})" if error.hint else ""
            self._warn(f"{error.message}{hint}; it is tried again from time to time")
        self.num_failures, self.failed_at = self.num_failures + 1, time.monotonic()

    def _note_folded(self, ready: Sequence[Checkpoint], before: Mapping[Path, Signature], report: FoldReport) -> None:
        """Take `ready` for done, and tell it."""
        self.num_failures = 0
        if self.last is None:
            for text in report.plan.losses:
                self._warn(text)
        self.last, self.last_path = report, ready[-1].path
        self.num_folded += len(ready)
        for item in ready:
            self.watched.note_folded(item, before[item.path])
        inside = {(past.name, past.step) for past in report.plan.past}
        count = len(inside | {(item.name, item.step) for item in report.plan.checkpoints})
        has = f"{counted(count, 'checkpoint')} in {self.target}"
        self.tell(f"{_first_to_last(ready)} folded in {report.seconds:.1f} s: {has}")

    def _written_dtype(self, newest: Checkpoint, *, has_changed: bool) -> WrittenDtype:
        """What the teacher is written in with `newest`: float32 where the students' own dtype cannot serve.

        To end where that changes would lose what the trainer removes until somebody looks.
        """
        if self.wanted.dtype != "student":
            return self.wanted.dtype
        is_narrow = any(dtype.is_floating_point and dtype.itemsize < 4 for dtype in newest.layout.schema.dtypes)
        is_mixed = has_changed and self.options.dtype == "student"
        return "float32" if is_narrow or is_mixed else self.options.dtype

    def _tell_of_dtype(
        self, items: Sequence[Checkpoint], beginning: Beginning | None, changes: Sequence[_Change]
    ) -> None:
        """What became of the teacher's dtype when `items` were folded, where nobody had asked for one."""
        written = self.options.dtype
        if self.wanted.dtype != "student" or written == "student":
            return
        is_new = beginning is None or beginning.record.asked_dtype != written
        teacher = f"the teacher {'is' if is_new else 'stays'} {written}"
        if is_new and beginning is not None:
            teacher += " from now on"
        seen: dict[DType, str] = {}
        for change, before, after in changes:
            seen.setdefault(before, change)
            seen.setdefault(after, change)
        for item in items:
            for name, dtype in _tensors_of(item):
                seen.setdefault(dtype, f"`{name}` of {item.label} is {dtype}")
        lost = {dtype: what for dtype, what in seen.items() if dtype.is_wide}
        # A teacher that has lost digits of it before says so of itself.
        known = set() if beginning is None or is_new else set(beginning.student_dtypes.values())
        for dtype, what in lost.items():
            if dtype not in self.told_losses | known:
                self._warn(f"{what}: {teacher}, and loses digits that {dtype} has")
        self.told_losses |= lost.keys()
        if is_new and changes and not lost:
            self.tell(f"{changes[0][0]}: {teacher}")

    def _warn(self, text: str) -> None:
        self.warn(f"Warning: {text}")

    def _is_complete(self) -> bool:
        """Whether the last step that was asked for is in the teacher, or is never going to be."""
        until = self.options.until_step
        if until is None:
            return False
        last = self.watched.last_step
        # The earlier teacher counts only while nothing readable is left: the new target may be another file.
        if self.target is None and not self.watched.is_seen:
            last = self.earlier_step
        return (last is not None and last >= until) or (self.watched.has_passed and not self.watched.waiting)


def _may_pass(error: CkptEmaError) -> bool:
    """Whether nobody need do anything about it here: not a folder that may not be written to, or is not there."""
    reason = error.__cause__
    is_final = isinstance(reason, (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError))
    return error.may_pass and not is_final and getattr(reason, "errno", None) not in (errno.EROFS, errno.EINVAL)


def _tensors_of(item: Checkpoint) -> Iterator[tuple[str, DType]]:
    """Names and dtypes of the tensors that have a precision."""
    schema = item.layout.schema
    return ((name, dtype) for name, dtype in zip(schema.names, schema.dtypes, strict=True) if dtype.kind != "integer")


def _changes_of_precision(items: Sequence[Checkpoint], beginning: Beginning | None) -> Iterator[_Change]:
    """Where a tensor's dtype became another one of its kind: what is said of it, and both."""
    known = {} if beginning is None else dict(beginning.student_dtypes)
    for item in items:
        for name, dtype in _tensors_of(item):
            before = known.get(name, dtype)
            if is_change_of_precision(before, dtype):
                yield f"{item.label} is {dtype}, and what was before is {before}", before, dtype
            known[name] = dtype


def _first_to_last(items: Sequence[Checkpoint]) -> str:
    first, last = items[0].label, items[-1].label
    return first if len(items) == 1 else f"{first} to {last}"


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")
