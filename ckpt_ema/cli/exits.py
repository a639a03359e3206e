"""Ends of a command: errors and signals in, messages and exit codes out."""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import wraps
from types import FrameType
from typing import Any

from ckpt_ema.cli.terminal import prepare_streams, silence_numpy_warning, silence_stdout, tell
from ckpt_ema.cli.working_folder import leave_removed_folder
from ckpt_ema.errors import CkptEmaError, MisuseError, first_line

Command = Callable[..., Any]
Handler = Callable[[int, FrameType | None], None]

RETRY_SECONDS = 0.05
"""After which a signal comes again that came while a module was imported."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ends_in_order(command: Command) -> Command:
    """Print what goes wrong in a command, with its hint, instead of a traceback: exit 1 failed, 2 misused.

    The command runs in a folder that exists.
    """

    @wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> None:
        prepare_streams()
        silence_numpy_warning()
        with _signals_raise():
            try:
                _run(command, arguments, options)
            except SystemExit as end:
                _leave_if_among_ranks(end.code)
                raise

    return wrapped


def _run(command: Command, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    try:
        leave_removed_folder()
        command(*arguments, **options)
    except CkptEmaError as error:
        shown = len(error.details) if options.get("verbose") else 10
        tell(f"Error: {error.message}")
        for line in error.details[:shown]:
            tell(f"  {line}")
        if len(error.details) > shown:
            how = " (`-v` shows all)" if "verbose" in options else ""
            tell(f"  ... and {len(error.details) - shown} more{how}")
        if error.hint:
            tell(f"\nhint: {error.hint}")
        sys.exit(2 if isinstance(error, MisuseError) else 1)
    except _StoppedError as stop:
        tell("Stopped; no unfinished teacher was written" if "output" in options else "Stopped")
        sys.exit(stop.exit_code)
    except BrokenPipeError:  # `| head`
        silence_stdout()
        sys.exit(1)
    except OSError as error:
        tell(f"Error: {error.strerror or error}: {error.filename or ''}".rstrip(": "))
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        smaller = ", or pass a smaller `--memory`" if "memory_budget_bytes" in options else ""
        tell(f"Error: out of memory\n\nhint: raise `ulimit -v`{smaller}")
        sys.exit(1)
    except (ImportError, SystemError) as error:
        if isinstance(error, SystemError) and not _was_importing(error):
            raise
        tell(f"Error: cannot load {getattr(error, 'name', None) or 'a library'}: {first_line(error)}")
        tell("\nhint: raise `ulimit -v`, or install again")
        sys.exit(1)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether there was no room for something, in the words of Python, C++ or torch."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in ("bad_alloc", "can't allocate memory"))


def _leave_if_among_ranks(code: Any) -> None:
    """End a rank at once that failed: all is said, and torch's store may abort a process that ends in order."""
    ranks = sys.modules.get("ckpt_ema.ranks")
    if ranks is not None and ranks.has_met_others():
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # closed
                with contextlib.suppress(OSError):
                    stream.flush()
        os._exit(code if isinstance(code, int) else 1)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise, so that a half-written file is removed on the way out."""
    is_main = threading.current_thread() is threading.main_thread()
    try:
        with _handled(_stop, lambda handler: is_main and handler is not signal.SIG_IGN):  # nohup
            yield
    finally:
        # All is done and said: what torch does at the very end would print a traceback. Registered last it runs first.
        atexit.unregister(_be_deaf)
        atexit.register(_be_deaf)


@contextlib.contextmanager
def _handled(handler: Handler, replaces: Callable[[Any], bool]) -> Iterator[None]:
    """Signals call `handler` where it replaces the one that they have."""
    before = {number: signal.signal(number, handler) for number in _SIGNALS if replaces(signal.getsignal(number))}
    try:
        yield
    finally:
        for number, previous in before.items():
            # Once stopped, deaf until the end: a signal during the interpreter's own exit would print a traceback.
            if signal.getsignal(number) is handler:
                signal.signal(number, previous)


def _be_deaf() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _stop(number: int, frame: FrameType | None) -> None:
    if _is_importing(frame):
        # Half a module is in nobody's plan: numpy would be imported twice and say so, torch may end the process.
        again = threading.Timer(RETRY_SECONDS, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
        return
    _be_deaf()  # a second signal must not interrupt the cleaning up
    raise _StoppedError(number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _was_importing(error: Exception) -> bool:
    """Whether a module raised it before all of it was there, as where memory ran out."""
    # Python takes its own frames of an import out of tracebacks.
    return any(frame.f_code.co_name == "<module>" for frame, _ in traceback.walk_tb(error.__traceback__))


class _StoppedError(BaseException):
    """A signal asked the command to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


@contextlib.contextmanager
def first_signal_sets() -> Iterator[threading.Event]:
    """An event that the first signal sets; the second one stops at once, as elsewhere."""
    stop = threading.Event()
    # Not by the handler itself: where it interrupts a wait for the event it would wait for the lock of that, for ever.
    asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
    was_asked = False

    def set_when_asked() -> None:
        if asked.get():
            stop.set()

    setter = threading.Thread(target=set_when_asked, name="signals", daemon=True)
    setter.start()

    def set_it(number: int, frame: FrameType | None) -> None:
        nonlocal was_asked
        if was_asked:
            _stop(number, frame)
        was_asked = True
        asked.put(True)

    try:
        with _handled(set_it, lambda handler: handler is _stop):
            yield stop
    finally:
        asked.put(False)
        setter.join()
