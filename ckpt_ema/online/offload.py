"""A teacher in host memory beside a student on a GPU: the student copied out on a stream of its own, and folded there.

    training's stream ──> a stream beside it copies the student to page-locked memory ──> a thread changes the teacher

Training goes on meanwhile; only the next step of an optimizer, which writes over the student, comes after the copy.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import weakref
from collections.abc import Callable, Sequence

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ckpt_ema.engine.staging import queueing
from ckpt_ema.engine.workers import Workers
from ckpt_ema.errors import CkptEmaError

Fold = Callable[[Sequence[torch.Tensor]], None]
"""Takes the student's tensors, in host memory, into the teacher."""


class Offload:
    """The way of a student's numbers into host memory, one update at a time.

    It holds page-locked memory for one student in its own dtype (torch takes powers of two of it for each tensor).
    """

    _is_at_exit = False
    """Whether nobody is going to wait for threads any more."""

    def __init__(self) -> None:
        self._staged: list[torch.Tensor] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pending: _Update | None = None
        """The one that is under way, or has not been waited for yet."""

        self._process = 0
        """Of the thread that folds."""

        self._worker: Workers | None = None
        _ALIVE[id(self)] = self
        _hold_optimizers_back()
        _finish_at_exit()

    def __reduce__(self) -> tuple[type[Offload], tuple[()]]:
        """A copy of a teacher has a way of its own."""
        return Offload, ()

    def update(self, students: Sequence[torch.Tensor], is_parameter: Sequence[bool], fold: Fold) -> None:
        """Copy `students` out as they are now, and call `fold` with that once it is there.

        At once where nothing is on a GPU. Else it waits for the update before alone, whose failure it raises. What is
        no parameter is copied on the GPU first: the next forward changes it.
        """
        self.wait()
        if not any(map(is_on_gpu, students)):
            fold([student.cpu() for student in students])
            return
        if self._worker is None or os.getpid() != self._process:
            self._worker = self._started_worker()
        if not _fit(self._staged, students):
            with torch.inference_mode(False):
                self._staged = [torch.empty_like(student, device="cpu", pin_memory=True) for student in students]
        sources = [
            (student if lasts else student.clone()).detach()
            for student, lasts in zip(students, is_parameter, strict=True)
        ]
        by_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for staged, source in zip(self._staged, sources, strict=True):
            if is_on_gpu(source):
                by_device.setdefault(source.device, []).append((staged, source))
            else:
                staged.copy_(source)
        copied = [(device, self._copy_from(device, copies)) for device, copies in by_device.items()]
        update = _Update(copied, sources, self._staged, fold)
        # Before it is handed out: whoever is interrupted after that leaves something to wait for. And again: a handler
        # of signals that came between may have waited, for nothing.
        self._pending = update
        self._worker.submit(update.run)
        if self._pending is None:
            self._pending = update
        if Offload._is_at_exit:
            self.wait()

    def _started_worker(self) -> Workers:
        worker = Workers(1, "ckpt-ema", [])  # an update keeps what it fails of
        self._process = os.getpid()
        weakref.finalize(self, worker.dismiss)
        for other in list(_WORKERS):
            if other.have_ended:
                _WORKERS.pop(other, None)
        _WORKERS[worker] = self._process
        # Before there is anything to do: what a thread was handed is done also where its start is interrupted.
        worker.submit(_do_nothing).wait()
        return worker

    def _copy_from(self, device: torch.device, copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.cuda.Event:
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        # The thread sleeps until then: the others have work to do.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with queueing(device, stream):
            for staged, source in copies:
                staged.copy_(source, non_blocking=True)
            event.record(stream)
        return event

    def hold_back(self) -> None:
        """What training queues from now on comes after the copy; the host does not wait."""
        pending = self._pending
        # A process that was forked has no GPU; a graph cannot wait for what is outside.
        if pending is None or os.getpid() != self._process or torch.cuda.is_current_stream_capturing():
            return
        for device, event in pending.copied:
            torch.cuda.current_stream(device).wait_event(event)

    def wait(self) -> None:
        """Wait until the last update is in the teacher, and raise what it raised.

        Raises CkptEmaError in a process that was forked from the one where it is under way.
        """
        pending = self._pending
        if pending is None:
            return
        if not pending.is_done:
            if os.getpid() != self._process:
                # The thread is not in this process, and its teacher may be half changed: waiting would never end.
                raise CkptEmaError(
                    "this process was forked while the teacher's update was under way",
                    hint="call `teacher.wait()` before what forks",
                )
            # Comes after it. Where the update was interrupted before it was handed out, there is nothing to wait for.
            assert self._worker is not None
            self._worker.submit(_do_nothing).wait()
        # Whoever interrupts the above leaves something to wait for, and an error to be raised.
        if self._pending is pending:  # another thread may have waited for it, too
            self._pending = None
        pending.tell()

    def finish(self) -> None:
        """Raise what the last update failed of, if nobody has been told; its thread has ended."""
        pending, self._pending, self._worker = self._pending, None, None
        if pending is not None:
            pending.tell()


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether it is copied out on a stream."""
    return tensor.is_cuda


def hold_back_all() -> None:
    """Hold training back for every teacher in host memory: somebody is about to write to a student they may share."""
    for offload in _alive():
        offload.hold_back()


class _Update:
    """A student on its way into the teacher."""

    def __init__(
        self,
        copied: Sequence[tuple[torch.device, torch.cuda.Event]],
        sources: list[torch.Tensor],
        staged: Sequence[torch.Tensor],
        fold: Fold,
    ) -> None:
        """`staged` is folded when all is `copied` to there; `sources`, out of which, are held until then."""
        self.copied = copied
        """Copies that the next change of the student has to come after."""

        self.is_done = False
        """Or has failed; also asked in a process that was forked meanwhile."""

        self.failure: BaseException | None = None
        """What it failed of, until somebody was told."""

        self._sources, self._staged, self._fold = sources, staged, fold

    def run(self) -> None:
        """In the thread: fold it, and keep the error."""
        try:
            for device, event in self.copied:
                with torch.cuda.device(device):  # a thread begins with the first GPU, which it might begin to use
                    event.synchronize()
            with torch.no_grad():
                self._fold(self._staged)
        except BaseException as error:
            self.failure = error
        # Of the device's memory there may be little, and the fold has the teacher, which has this.
        del self._sources, self._staged, self._fold
        self.is_done = True

    def tell(self) -> None:
        """Raise what it failed of, once."""
        failure, self.failure = self.failure, None
        if failure is not None:
            try:
                raise failure
            finally:  # or it would hold itself, and the student's copy with it
                del failure


def _do_nothing() -> None:
    pass


def _fit(staged: Sequence[torch.Tensor], students: Sequence[torch.Tensor]) -> bool:
    return len(staged) == len(students) and all(
        one.shape == other.shape and one.dtype is other.dtype for one, other in zip(staged, students, strict=True)
    )


_ALIVE: weakref.WeakValueDictionary[int, Offload] = weakref.WeakValueDictionary()
_WORKERS: dict[Workers, int] = {}
"""Whose threads may not have ended yet, and the process that has them."""


def _alive() -> list[Offload]:
    # In one call of C: another thread may make one meanwhile.
    return [offload for reference in _ALIVE.valuerefs() if (offload := reference()) is not None]


@functools.cache
def _hold_optimizers_back() -> None:
    """Before any optimizer's step, from the first teacher in host memory on."""

    def before_step(*_: object) -> None:
        hold_back_all()

    register_optimizer_step_pre_hook(before_step)


@functools.cache
def _finish_at_exit() -> None:
    """When the interpreter ends, updates under way come to their end, and what they failed of is printed.

    Of teachers that are there then. Processes that multiprocessing forks end without that. Ctrl-C does not shorten it,
    but the third one does: it aborts the process.
    """
    atexit.register(_finish_all)


def _finish_all() -> None:
    # Of this process: one that was forked has the other's teachers, but not its threads.
    offloads = [offload for offload in _alive() if offload._process == os.getpid()]
    workers = [worker for worker, process in list(_WORKERS.items()) if process == os.getpid()]
    for worker in workers:
        worker.dismiss()
    Offload._is_at_exit = True
    interrupt: BaseException | None = None
    for _ in range(3):
        try:
            # For the threads themselves: one that is at an update, or lets go of a teacher that is nowhere any more,
            # would be ended amid torch's code, which aborts the process.
            for worker in workers:
                worker.wait_for_threads()
            break
        except BaseException as error:  # a device that hangs can be left all the same
            interrupt = error
    for offload in offloads:
        try:
            offload.finish()
        except BaseException as error:  # there may be several, and nobody to raise them to
            sys.excepthook(type(error), error, error.__traceback__)
    if interrupt is not None:
        raise interrupt
