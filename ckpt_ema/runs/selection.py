"""The checkpoints of a run in; those of the wanted names and steps, and of these the newest, out."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_ema.errors import CkptEmaError, NoCheckpointError
from ckpt_ema.formats.names import is_average_name
from ckpt_ema.runs.checkpoints import Checkpoint, Listing
from ckpt_ema.runs.steps import DATE_DIGITS, EDM2_NAME, stem_of


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

    finished: frozenset[str] = frozenset()
    """Names of those that were folded, which are not asked for again."""

    has_steps: bool = False
    """Whether checkpoints of it that are not listed any more had a step, so that one without is a copy."""

    def is_wanted(self, path: Path) -> bool:
        """Whether its name is selected."""
        if path.name in self.finished:
            return False
        return (not self.include or _matches(path, self.include)) and not _matches(path, self.exclude)

    def is_declared(self, path: Path) -> bool:
        """Whether the user describes it as an average, or its name does."""
        named = self.takes_teachers and EDM2_NAME.match(stem_of(path.name)) is not None
        return named or _matches(path, self.averages)

    def is_average_by_name(self, path: Path) -> bool:
        """Whether its name says that it is an average, and no state dict was chosen for all that."""
        return self.state is None and is_average_name(stem_of(path.name))


def select_checkpoints(directory: Path, listing: Listing, selection: Selection) -> list[Checkpoint]:
    """Those with the steps that are wanted, and the newest of them; the others are left out.

    Raises NoCheckpointError where none remains, but of a run that is live.
    """
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
            listing.left_out.append((checkpoint.label, f"after {checkpoint.unit} {selection.until_step}"))
            listing.beyond.add((checkpoint.label, checkpoint.unit))
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


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)


def _at_precision_of(bound: int, checkpoint: Checkpoint) -> int:
    """Its step; of a date as many digits as were given, so that none of a day is before or after that."""
    step = checkpoint.step or 0
    return step // 10 ** max(0, DATE_DIGITS - len(str(bound))) if checkpoint.unit == "date" else step
