"""The errors and warnings that a user can meet, and what is said of another library's errors."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

BEGIN_ANEW = "pass `--overwrite` without `--resume` to begin anew"


class CkptEmaError(Exception):
    """Something failed in a way the user can mend.

    `message` says what, where and both values; `details` are lines below it (all of them; whoever prints
    decides how many to show); `hint` says what to type. `may_pass`: the same may succeed later, as where a disk was
    full or a server did not answer.
    """

    def __init__(
        self, message: str, *, details: Sequence[str] = (), hint: str | None = None, may_pass: bool = False
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details = tuple(details)
        self.hint = hint
        self.may_pass = may_pass

    @property
    def is_refused(self) -> bool:
        """Whether this process may not do it: read a file, or look into a folder."""
        return isinstance(self.__cause__, PermissionError)

    def __str__(self) -> str:
        lines = [self.message, *(f"  {line}" for line in self.details)]
        if self.hint:
            lines += ["", f"hint: {self.hint}"]
        return "\n".join(lines)


class UnreadableCheckpointError(CkptEmaError):
    """A checkpoint is truncated, lies about itself, or is in no format this tool reads."""


class AverageAloneError(CkptEmaError):
    """A checkpoint holds an average of students, and none of them."""


class NoCheckpointError(CkptEmaError):
    """A run holds nothing to fold: not yet, or not by what was selected."""


class NoUpdateError(NoCheckpointError):
    """A run holds newer checkpoints, but no update of the average falls on them yet."""


class LostWorkError(CkptEmaError):
    """What an unfinished fold had done is gone: it cannot be continued."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint=BEGIN_ANEW)


class MisuseError(CkptEmaError):
    """What was asked for makes no sense: wrong options rather than wrong files."""


NOT_THE_CALLER = ("ckpt_ema", "torch", "contextlib")


def warn(text: str) -> None:
    """Warn of what the caller of this package has done, named by file and line, whatever lies between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in NOT_THE_CALLER:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def quoted(text: str) -> str:
    """`text` as one word of a shell, in quotes."""
    return "'" + text.replace("'", "'\"'\"'") + "'"


def hint_of_permission(error: OSError, path: Path) -> str | None:
    """What to type where `path` may not be read; None where `error` is another one."""
    return hint_to_permit(path) if isinstance(error, PermissionError) else None


def hint_to_permit(path: Path) -> str:
    """What to type so that `path` may be read, or looked into."""
    return f"`chmod u+r{'x' if os.path.isdir(path) else ''} {shlex.quote(str(path))}`, if it is yours"


def first_line(error: BaseException) -> str:
    """What another library's error says, without the advice and the traces that some put below."""
    return (str(error).splitlines() or [""])[0]
