"""Checkpoints that claim the same step: their names by step in, the error with what to type out."""

from __future__ import annotations

import fnmatch
import glob
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ckpt_ema.errors import CkptEmaError
from ckpt_ema.locations import RemotePath
from ckpt_ema.runs.steps import ORIGINS, RANK_SUFFIX, Origin, stem_of, steps_in_name

# Of options in a hint, and of files; what is longer nobody types.
MAX_OPTIONS = 4
MAX_LISTED = 4

# A discriminator's names (`D_5`, `netD_5`, `disc_5`): suggested last.
_DISCRIMINATOR = re.compile(r"(?:^|[-_.*]|net)d(?:isc\w*)?(?:[-_.*]|$)", re.IGNORECASE)

Claims = Mapping[int, Sequence[str]]
"""The names of checkpoints by the step that they claim, ascending."""

Family = tuple[str, ...]
"""What stands before, between and after the numbers of a name."""


def collision_of(claims: Claims, origin: Origin, directory: Path, include: Sequence[str]) -> CkptEmaError:
    """The error for a run in which two or more names claim one step; `include` is what was selected by name so far."""
    unit = origin[1]
    contested = {step: names for step, names in claims.items() if len(names) > 1}
    step, names = next(iter(contested.items()))
    wholes = {RANK_SUFFIX.sub("", stem_of(name)) for name in names}
    ranks = [int(match["rank"]) for name in names if (match := RANK_SUFFIX.search(stem_of(name)))]
    if len(wholes) == 1 and sorted(ranks) == list(range(len(names))):  # LoRA's `rank8` and `rank16` are none
        return CkptEmaError(
            f"{len(names)} files are parts of one checkpoint, by their names, and are not put together",
            details=names,
            hint="fold what holds the whole model: save it in one file, or with torch.distributed.checkpoint",
        )
    ordered = _in_order_of_names(names) if origin[0] == "inside" and len(claims) == 1 else None
    if ordered is not None:
        return CkptEmaError(
            f"all {len(names)} checkpoints of `{directory}` say inside that they are of {unit} {step}, and their names"
            " count on",
            details=ordered,
            hint=f"list them in the order they are to be folded, oldest first: `{_listed(directory, ordered)}`",
        )
    return CkptEmaError(
        f"{len(names)} checkpoints claim {unit} {step}",
        details=[
            *names,
            *(f"{unit} {other} as well: {', '.join(names)}" for other, names in contested.items() if other != step),
        ],
        hint=_hint_of_families(claims, include) or _hint_of_files(claims),
    )


def hint_of_unknown(names: Sequence[str], unknown: Sequence[str], include: Sequence[str]) -> str:
    """The hint where no kind of number is in all of `names`; `unknown` lack the most common one."""
    patterns: dict[str, list[str]] = defaultdict(list)
    for name in names:
        patterns["*".join(map(glob.escape, _around_every_number(name, 0)))].append(name)
    series = [pattern for pattern, found in patterns.items() if len(found) > 1 and steps_in_name(found[0])]
    if not include and 1 < len(series) <= MAX_OPTIONS:
        return f"pass {' or '.join(f'`--include {shlex.quote(pattern)}`' for pattern in series)}"
    if 2 * len(unknown) < len(names) and len(unknown) <= MAX_OPTIONS:
        options = " ".join(f"--exclude {shlex.quote(glob.escape(name))}" for name in unknown)
        return f"leave out what is none of the series, `{options}`, or list the checkpoints in order, oldest first"
    return "list the checkpoints in the order they are to be folded, oldest first"


def _in_order_of_names(names: Sequence[str]) -> list[str] | None:
    """Names in the order of the numbers in them; None where not each has another one."""
    numbers = {name: steps_in_name(name) for name in names}
    for origin in ORIGINS:
        if all(origin in found for found in numbers.values()):
            if len({found[origin] for found in numbers.values()}) == len(names):
                return sorted(names, key=lambda name: numbers[name][origin])
            return None
    return None


def _listed(directory: Path, ordered: Sequence[str]) -> str:
    """The paths of checkpoints for a shell, by patterns where they are many."""
    patterns = _patterns_of(ordered)
    shown = list(map(shlex.quote, ordered))
    if len(ordered) > MAX_LISTED and patterns and not isinstance(directory, RemotePath):
        shown = patterns
    return " ".join(f"{shlex.quote(str(directory))}/{each}" for each in shown)


def _patterns_of(ordered: Sequence[str]) -> list[str]:
    """One for each number of digits, since a shell sorts by letters: 10 before 9; none where that is not the order."""
    patterns = list(dict.fromkeys(re.sub("[0-9]", "[0-9]", name) for name in ordered))
    found = [name for pattern in patterns for name in sorted(fnmatch.filter(ordered, pattern))]
    is_plain = all(re.fullmatch(r"[A-Za-z0-9_.=+-]+", name) for name in ordered)
    return patterns if is_plain and found == list(ordered) and len(patterns) <= MAX_LISTED else []


def _hint_of_families(claims: Claims, include: Sequence[str]) -> str | None:
    """To fold one family of names (`netG_*.pt`) where there are several that each claim most steps."""
    for around in (_around_step, _around_every_number):
        families = _families(claims, around)
        patterns = [
            pattern
            for family, members in families.items()
            if _selected(claims, pattern := "*".join(map(glob.escape, family))) == members
        ]
        if len(families) > 1 and patterns:
            instead = " in place of the one you gave" if include else ""
            patterns.sort(key=lambda pattern: _DISCRIMINATOR.search(pattern) is not None)
            ways = [f"`--include {shlex.quote(pattern)}`{instead}" for pattern in patterns[:3]]
            if len(families) == 2 and len(patterns) == 1:
                ways.append(f"`--exclude {shlex.quote(patterns[0])}`")
            return f"pass {' or '.join(ways)}"
    return None


def _families(claims: Claims, around: Callable[[str, int], Family]) -> dict[Family, set[str]]:
    """The names that share what is around their numbers, and claim more than half of the steps, each of them once."""
    members: dict[Family, list[tuple[int, str]]] = defaultdict(list)
    for step, names in claims.items():
        for name in names:
            members[around(name, step)].append((step, name))
    return {
        family: {name for _, name in found}
        for family, found in members.items()
        if len({step for step, _ in found}) == len(found) and 2 * len(found) > len(claims)
    }


def _around_step(name: str, step: int) -> Family:
    found = [match for match in re.finditer(r"\d+", name) if int(match.group()) == step]
    return (name[: found[-1].start()], name[found[-1].end() :]) if found else (name,)


def _around_every_number(name: str, _step: int) -> Family:
    return tuple(re.split(r"\d+", name))


def _selected(claims: Claims, pattern: str) -> set[str]:
    return {name for names in claims.values() for name in names if fnmatch.fnmatchcase(name, pattern)}


def _hint_of_files(claims: Claims) -> str:
    """To leave out all names of a step but the one that most others are like."""
    ways = (_around_step, _around_every_number)
    alike = Counter(around(name, step) for around in ways for step, names in claims.items() for name in names)
    surplus: list[str] = []
    for step, names in claims.items():
        rank = {name: sum(alike[around(name, step)] for around in ways) for name in names}
        surplus += sorted(names, key=lambda name: -rank[name])[1:]
    if len(surplus) > MAX_OPTIONS:
        return "list the checkpoints to fold, one of each step, oldest first"
    options = " ".join(f"--exclude {shlex.quote(glob.escape(name))}" for name in surplus)
    return f"leave all but one of a step out: `{options}`"
