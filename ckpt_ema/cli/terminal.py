"""The terminal: texts, records and progress in, what can be printed on stdout and stderr out."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from ckpt_ema.errors import CkptEmaError

if TYPE_CHECKING:
    from tqdm import tqdm

_NAMES = "names"
"""How texts become bytes: those of a file name as they were, and half a letter in a checkpoint as `\\ud800`."""


def _encode_surrogate(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    number = ord(error.object[error.start])
    is_byte = 0xDC80 <= number <= 0xDCFF
    return bytes([number - 0xDC00]) if is_byte else f"\\u{number:04x}", error.start + 1


codecs.register_error(_NAMES, _encode_surrogate)


def prepare_streams() -> None:
    """Let stdout and stderr take every text, whatever their encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # File names may be bytes that are no text, and terminals may know no bars.
            stream.reconfigure(errors=_NAMES if _is_utf8(stream) else "backslashreplace")


def silence_numpy_warning() -> None:
    """Of torch, at every start where numpy is not installed, which nothing here needs."""
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")


def _is_utf8(stream: Any) -> bool:
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"


def tell(text: str) -> None:
    """Print on stderr, as `print_text`; what that does not take is lost, and nothing else."""
    try:
        click.echo(_printable(text), err=True)
    except OSError:
        silence_stderr()


def print_text(text: str) -> None:
    """Print on stdout what a checkpoint or a person named: no control character but the line feeds of our tables."""
    text = _printable(text)
    if not _is_utf8(sys.stdout):
        text = text.translate(dict.fromkeys(map(ord, "█▉▊▋▌▍▎▏"), "#"))
    hand_over(text)


def print_json(record: Any, written: Sequence[str] = ()) -> None:
    """Print a record on stdout; `written` as `hand_over` takes it."""
    hand_over(json.dumps(record, indent=2), written)


def hand_over(text: str, written: Sequence[str] = ()) -> None:
    """Write on stdout, as it is; where that fails, it is said to be that, and `written` to be there."""
    try:
        click.echo(text)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and not written:  # `| head`
            raise
        silence_stdout()
        raise CkptEmaError(
            f"cannot write to stdout: {error.strerror}",
            details=[f"`{name}` is written all the same" for name in written],
        ) from error


def silence_stdout() -> None:
    """Send to nowhere what could not be written: on the way out Python would try again, and end with another code."""
    _silence(1)


def silence_stderr() -> None:
    """The same for stderr, where it can be written to no more."""
    _silence(2)


def _silence(stream: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != stream:
        os.dup2(nowhere, stream)
        os.close(nowhere)


def _printable(text: str) -> str:
    # Terminals obey the upper control characters as well.
    return "".join(f"\\x{ord(c):02x}" if (c < " " and c != "\n") or "\x7f" <= c <= "\x9f" else c for c in text)


class ProgressBar:
    """A tqdm bar over bytes on stderr; silent unless `shown`."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def update(self, done: int, total: int) -> None:
        """Draw the bar at `done` of `total` bytes."""
        if not self._shown:
            return
        try:
            self._draw(done, total)
        except OSError:  # the terminal is gone
            self._shown = False
            silence_stderr()

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm  # noqa: PLC0415  (30 ms that `--help` must not wait for)

            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="folding", leave=False, dynamic_ncols=True)
        self._bar.update(done - self._bar.n)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
