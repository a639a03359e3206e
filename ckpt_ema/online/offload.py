"""A teacher in host memory beside a student on a GPU: the student copied out on a stream of its own, and folded there.

    training's stream ──> a stream beside it copies the student to page-locked memory ──> a thread changes the teacher

Training goes on meanwhile; only the next step of an optimizer, which writes over the student, comes behind the copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

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

        self._folding: Future[None] | None = None
        self._worker: ThreadPoolExecutor | None = None
        _hold_optimizers_back(self)

    def update(self, students: Sequence[torch.Tensor], is_parameter: Sequence[bool], fold: Fold) -> None:
        """Copy `students` out as they are now, and call `fold` with that once it is there.

        At once where nothing is on a GPU. Else it waits for the update before alone, whose failure it raises. What is
        no parameter is copied on the GPU first: the next forward changes it.
        """
        self.wait()
        if not any(map(is_on_gpu, students)):
            fold([student.cpu() for student in students])
            return
        if not _fit(self._staged, students):
            with torch.inference_mode(False):
                self._staged = [torch.empty_like(student, device="cpu", pin_memory=True) for student in students]
        sources = [
            (student if lasts else student.clone()).detach()
            for student, lasts in zip(students, is_parameter, strict=True)
        ]
        for staged, source in zip(self._staged, sources, strict=True):
            if not is_on_gpu(source):
                staged.copy_(source)
        devices = dict.fromkeys(source.device for source in sources if is_on_gpu(source))
        self._copied = [(device, self._copy_from(device, sources)) for device in devices]
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "ckpt-ema")
        # With the sources: their memory is not given to anybody else before it was read.
        self._folding = self._worker.submit(_fold_when_copied, self._copied, sources, self._staged, fold)

    def _copy_from(self, device: torch.device, sources: Sequence[torch.Tensor]) -> torch.cuda.Event:
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            for staged, source in zip(self._staged, sources, strict=True):
                if source.device == device:
                    staged.copy_(source, non_blocking=True)
            event.record(stream)
        return event

    def hold_back(self) -> None:
        """What training queues from now on comes behind the copy; the host does not wait."""
        for device, event in self._copied:
            torch.cuda.current_stream(device).wait_event(event)
        self._copied = []

    def wait(self) -> None:
        """Wait until the last update is in the teacher, and raise what it raised."""
        folding, self._folding = self._folding, None
        if folding is not None:
            folding.result()


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether it has to be copied out."""
    return tensor.device.type != "cpu"


@torch.no_grad()
def _fold_when_copied(
    copied: Sequence[tuple[torch.device, torch.cuda.Event]],
    sources: Sequence[torch.Tensor],
    staged: Sequence[torch.Tensor],
    fold: Fold,
) -> None:
    for _, event in copied:
        event.synchronize()
    fold(staged)


def _fit(staged: Sequence[torch.Tensor], students: Sequence[torch.Tensor]) -> bool:
    return len(staged) == len(students) and all(
        one.shape == other.shape and one.dtype is other.dtype for one, other in zip(staged, students, strict=True)
    )


def _hold_optimizers_back(offload: Offload) -> None:
    """Before any optimizer's step, for as long as `offload` is there."""
    reference = weakref.ref(offload)

    def before_step(*_: object) -> None:
        alive = reference()
        if alive is not None:
            alive.hold_back()

    weakref.finalize(offload, register_optimizer_step_pre_hook(before_step).remove)
