"""Loading a pickle that may cost too much: its bytes in, a refusal out where they take too much time or memory.

Nothing can interrupt a hash in C, and nothing takes back the memory of a process. So such a pickle is first loaded by
another process, whose limits the system keeps; what that process survives is loaded here as well.
"""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from ckpt_ema.formats.pickle_scan import MalformedPickleError
from ckpt_ema.formats.pickles import MetadataUnpickler

# A third and a half of what is promised (10 s, 1 GB): scanning it before and loading it afterwards cost as well.
MAX_SECONDS = 3
MAX_BYTES = 512 << 20
# Where the machine is so busy that a process gets hardly any of it.
MAX_WALL_SECONDS = 60

# Hashing nested tuples recurses in C. Any thread's stack holds this many; for more, a stack is made that does.
SHALLOW_TUPLES = 5000
STACK_BYTES_PER_TUPLE = 512

_OUT_OF_MEMORY = 3
# The package may have been found by a path that a process started with -I does not know.
_CHILD = "import sys; sys.path.insert(0, sys.argv[1]); from ckpt_ema.formats.pickle_trial import _try_here; _try_here()"


def load_with_stack(unpickler: MetadataUnpickler, num_tuples: int) -> Any:
    """The pickle's root, loaded on a stack that holds `num_tuples` nested tuples; raises MalformedPickleError."""
    if num_tuples < SHALLOW_TUPLES:
        return unpickler.load()
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(unpickler.load())
        except BaseException as error:
            outcome.append(error)

    stack_bytes = num_tuples * STACK_BYTES_PER_TUPLE
    before = threading.stack_size((4 << 20) + stack_bytes // 4096 * 4096)
    thread = threading.Thread(target=work, name="unpickle", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # a limit on address space
        raise MalformedPickleError(f"a stack of {stack_bytes >> 20} MiB for its nested tuples cannot be had") from error
    finally:
        threading.stack_size(before)
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def try_pickle(content: bytes, num_tuples: int) -> None:
    """Raise MalformedPickleError where loading a pickle of `num_tuples` tuples takes more than can be afforded."""
    command = [sys.executable, "-I", "-c", _CHILD, str(Path(__file__).parents[2]), str(num_tuples)]
    try:
        done = subprocess.run(
            command,
            input=content,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=MAX_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MalformedPickleError(f"loading it in another process had no end in {MAX_WALL_SECONDS} s") from error
    except OSError as error:
        raise MalformedPickleError(
            f"it is too intricate to load untried, and trying failed: {error.strerror}"
        ) from error
    if done.returncode == _OUT_OF_MEMORY:
        raise MalformedPickleError(f"loading it takes more than {MAX_BYTES >> 20} MiB of memory")
    if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):  # the first is sent to those that can be told
        raise MalformedPickleError(f"loading it takes more than {MAX_SECONDS} s of processor time, or was killed")
    if done.returncode:
        raise MalformedPickleError(f"loading it in another process ended with {done.returncode}")


def _try_here() -> None:
    """What the other process runs: the pickle is on its standard input."""
    num_tuples = int(sys.argv[2])
    with open(0, "rb", closefd=False) as stream:
        content = stream.read()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    taken = sum(int(line.split()[1]) for line in _status() if line.startswith("VmSize:")) << 10
    allowed = taken + MAX_BYTES + num_tuples * STACK_BYTES_PER_TUPLE + (8 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    try:
        load_with_stack(MetadataUnpickler(content), num_tuples)
    except MalformedPickleError as error:
        # Nothing else needs to be known: whoever asked meets the same error. A RuntimeError by itself is a thread that
        # found no room for its stack.
        if isinstance(error.__cause__, MemoryError) or type(error.__cause__) is RuntimeError:
            raise SystemExit(_OUT_OF_MEMORY) from None


def _status() -> list[str]:
    path = Path("/proc/self/status")
    return path.read_text().splitlines() if path.exists() else []
