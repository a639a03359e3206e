"""A teacher in host memory beside a student on a GPU: the student copied out on a stream of its own, and folded there.

    training's stream ──> a stream beside it copies the student to page-locked memory ──> a thread changes the teacher

Training goes on meanwhile; only the next step of an optimizer, which writes over the student, comes behind the copy.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import weakref
from collections.abc import Callable, Sequence

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ckpt_ema.engine.staging import queueing
from ckpt_ema.engine.workers import Ticket, Workers
from ckpt_ema.errors import CkptEmaError

Fold = Callable[[Sequence[torch.Tensor]], None]
"""Takes the student's tensors, in host memory, into the teacher."""


class Offload:
    """The way of a student's numbers into host memory, one update at a time.

    It holds page-locked memory for one student in its own dtype (torch takes powers of two of it for each tensor).
    """

    def __init__(self) -> None:
        self._staged: list[torch.Tensor] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._copied: list[tuple[torch.device, torch.cuda.Event]] = []
        """Copies that the next change of the student has to come behind."""

        self._pending: tuple[Ticket, list[BaseException]] | None = None
        """The update that is under way or has not been waited for yet, and what it raised."""

        self._process = 0
        """Of the thread that folds."""

        self._worker: Workers | None = None
        _ALIVE.add(self)
        _hold_optimizers_back()
        _wait_at_exit()

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
        if self._worker is None:
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
        self._copied = [(device, self._copy_from(device, copies)) for device, copies in by_device.items()]
        # With the sources: their memory is not given to anybody else before it was read.
        self._process = os.getpid()
        failures: list[BaseException] = []
        job = functools.partial(_fold_when_copied, self._copied, sources, self._staged, fold, failures)
        self._pending = self._worker.submit(job), failures

    def _started_worker(self) -> Workers:
        worker = Workers(1, "ckpt-ema", [])
        ending = weakref.finalize(self, worker.dismiss)
        ending.atexit = False  # nothing is told to threads that the interpreter is about to end
        # Before there is anything to do: what a thread was handed is done also where its start is interrupted.
        worker.submit(lambda: None).wait()
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
        """What training queues from now on comes behind the copy; the host does not wait."""
        if not self._copied or torch.cuda.is_current_stream_capturing():  # a graph cannot wait for what is outside
            return
        for device, event in self._copied:
            torch.cuda.current_stream(device).wait_event(event)

    def wait(self) -> None:
        """Wait until the last update is in the teacher, and raise what it raised.

        Raises CkptEmaError in a process that was forked from the one where it is under way.
        """
        pending = self._pending
        if pending is None:
            return
        ticket, failures = pending
        if not ticket.is_done and os.getpid() != self._process:
            # The thread is not in this process, and its teacher may be half changed: waiting would never end.
            raise CkptEmaError(
                "this process was forked while the teacher's update was under way",
                hint="call `teacher.wait()` before what forks",
            )
        # Whoever interrupts this leaves something to wait for, and an error to be raised.
        ticket.wait()
        if self._pending is pending:  # another thread may have waited for it, too
            self._pending, self._copied = None, []
        if failures:
            raise failures[0]


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether it is copied out on a stream."""
    return tensor.is_cuda


def hold_back_all() -> None:
    """Hold training back for every teacher in host memory: somebody is about to write to a student they may share."""
    for offload in list(_ALIVE):
        offload.hold_back()


@torch.no_grad()
def _fold_when_copied(
    copied: Sequence[tuple[torch.device, torch.cuda.Event]],
    sources: Sequence[torch.Tensor],
    staged: Sequence[torch.Tensor],
    fold: Fold,
    failures: list[BaseException],
) -> None:
    try:
        for device, event in copied:
            with torch.cuda.device(device):  # a thread begins with the first GPU, which it might begin to use
                event.synchronize()
        fold(staged)
    except BaseException as error:
        failures.append(error)


def _fit(staged: Sequence[torch.Tensor], students: Sequence[torch.Tensor]) -> bool:
    return len(staged) == len(students) and all(
        one.shape == other.shape and one.dtype is other.dtype for one, other in zip(staged, students, strict=True)
    )


_ALIVE: weakref.WeakSet[Offload] = weakref.WeakSet()


@functools.cache
def _hold_optimizers_back() -> None:
    """Before any optimizer's step, from the first teacher in host memory on."""

    def before_step(*_: object) -> None:
        hold_back_all()

    register_optimizer_step_pre_hook(before_step)


@functools.cache
def _wait_at_exit() -> None:
    """When the process ends: updates under way come to their end, and Python prints what one of them raised."""

    def wait_for_all() -> None:
        with contextlib.ExitStack() as stack:  # for each, whatever comes of another
            for offload in list(_ALIVE):
                if offload._process == os.getpid():  # a process that was forked has no thread
                    stack.callback(offload.wait)

    atexit.register(wait_for_all)
