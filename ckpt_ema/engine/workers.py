"""Threads for engines: jobs in, none of them at anything any more when the engine returns, whatever interrupts it."""

from __future__ import annotations

import contextlib
import functools
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from ckpt_ema.errors import CkptEmaError

POLL_SECONDS = 0.005
LOOK_SECONDS = 0.1


class _TorchThreads:
    """How many threads torch had before anybody here told it otherwise."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_takers = self._num_threads = 0

    @contextlib.contextmanager
    def given_back(self) -> Iterator[None]:
        """Within, `torch.set_num_threads` may be called; after it torch has as many threads as before.

        Of several at once, as of calls beside training, only the first knows how many that were: what torch is told in
        one thread is what all later ones begin with.
        """
        with self._lock:
            if not self._num_takers:
                self._num_threads = torch.get_num_threads()
            self._num_takers += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_takers -= 1
                torch.set_num_threads(self._num_threads)


TORCH_THREADS = _TorchThreads()


class Jobs:
    """What an engine's threads are at, so that none is at anything any more when the engine returns.

    Threads by themselves do not tell: one whose start is interrupted runs, and nobody has it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._is_over = False

    def run(self, job: Callable[[], None]) -> None:
        """Do `job`, in any thread, unless `end` was called."""
        with self._lock:
            if self._is_over:
                return
            self._count += 1
        try:
            job()
        finally:
            with self._lock:
                self._count -= 1

    def end(self) -> None:
        """Let none begin any more, and wait for those that have begun; to be called again where it is interrupted."""
        with self._lock:
            self._is_over = True
        while self._count:
            time.sleep(POLL_SECONDS)


class Ticket:
    """Whether a job that was handed to Workers was done."""

    def __init__(self) -> None:
        self.is_done = False
        """Or has failed; also asked in a process that was forked meanwhile."""

        self._told: queue.SimpleQueue[None] = queue.SimpleQueue()

    def wait(self) -> None:
        """Wait until it is done; may be interrupted, and called again, by several threads at once."""
        # Looked for now and then: what was told to one who waits is not told to another, nor to whoever is interrupted
        # with it in hand.
        while not self.is_done:
            with contextlib.suppress(queue.Empty):
                self._told.get(timeout=LOOK_SECONDS)

    def tell(self) -> None:
        """Let go whoever waits."""
        self.is_done = True
        self._told.put(None)


class Workers:
    """Threads that do jobs in the order in which they are handed out.

    What ThreadPoolExecutor does, with queues that are written in C: its locks are taken in Python, where Ctrl-C may
    come between one and what gives it back, and whoever waits for that waits for ever.
    """

    def __init__(self, count: int, name: str, failures: list[BaseException]) -> None:
        """Up to `count` threads, started when there is something to do. What jobs raise is added to `failures`."""
        self._count, self._name, self._failures = count, name, failures
        self._num_threads = 0
        # Of threads; asked of these themselves, since Ctrl-C amid `Thread.is_alive` makes it say no from then on.
        self._begun: list[None] = []
        self._ended: list[None] = []
        self._is_dismissed = False
        self._jobs = Jobs()
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], Ticket] | None] = queue.SimpleQueue()

    def submit(self, job: Callable[[], None]) -> Ticket:
        """Have `job` done; raises CkptEmaError where the system has no threads left."""
        ticket = Ticket()
        self._queue.put((job, ticket))
        if self._num_threads < self._count:
            name = f"{self._name}-{self._num_threads}"
            self._num_threads += 1
            start(threading.Thread(target=self._work, name=name, daemon=True))
        return ticket

    def dismiss(self) -> None:
        """Let the threads end after what was handed out; takes no lock, so that a finalizer may call it."""
        self._is_dismissed = True
        for _ in range(self._count):
            self._queue.put(None)

    @property
    def have_ended(self) -> bool:
        """Whether they were dismissed, and all that have ever done anything are at their end."""
        return self._is_dismissed and len(self._begun) == len(self._ended)

    def wait_for_threads(self) -> None:
        """Wait until they have ended, once they were dismissed; to be called again where it is interrupted."""
        while not self.have_ended:
            time.sleep(POLL_SECONDS)

    def end(self) -> None:
        """Return when none does anything any more, and let none begin; to be called again where it is interrupted."""
        self._jobs.end()
        # Where no thread could be started, nobody else takes the jobs out, and what they hold would be held.
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self.dismiss()

    def _work(self) -> None:
        self._begun.append(None)
        while (item := self._queue.get()) is not None:
            job, ticket = item
            self._jobs.run(functools.partial(self._do, job))
            # What a job holds is not held while there is nothing to do.
            del item, job
            ticket.tell()
        self._ended.append(None)

    def _do(self, job: Callable[[], None]) -> None:
        # Within what `end` waits for: whoever clears the failures then has all of them.
        try:
            job()
        except BaseException as error:
            self._failures.append(error)


def start(thread: threading.Thread) -> None:
    """Start it; raises CkptEmaError where the system has none left."""
    handled = sys.exc_info()[1]
    try:
        thread.start()
    except RuntimeError as error:
        # An interrupt between a lock and its use makes it an error to give that back.
        if error.__context__ is not handled and error.__context__ is not None:
            raise error.__context__ from None
        hint = "see how many you may have, and how much memory: `ulimit -u -v`"
        raise CkptEmaError(f"cannot start a thread: {error}", hint=hint) from error


def wait_whatever_comes(waits: Sequence[Callable[[], object]]) -> None:
    """Call each until it returns, however often it is interrupted, and raise the last interrupt then.

    None may raise anything of its own: whatever comes out of one is Ctrl-C, or what another handler of signals raised.
    Each may be called once more after it returned. Signals that follow each other within microseconds get out: between
    two lines of ours, and between what would go on from there.
    """
    interrupt: BaseException | None = None
    left = list(reversed(waits))
    while left:
        try:
            while left:
                try:
                    while left:
                        left[-1]()
                        left.pop()
                except BaseException as error:
                    interrupt = error
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
