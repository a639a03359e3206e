"""A model of a GPU's streams, on the CPU: what is queued runs later, in any order that events allow.

It stands in for no GPU: nothing of speed, kernels or drivers is in it. What it holds is the order of things. Work that
is queued on a stream runs at a random moment, as late as anything waits for it, on memory that everything else changes
meanwhile; so an event that is not waited for shows as wrong numbers.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo  # which the first dispatch mode imports else: what it leaves then holds the frames around it
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


class Moment:
    """One recording of an event: over or not."""

    def __init__(self) -> None:
        self.is_over = False


class Device:
    """Streams with work, and who runs it when."""

    def __init__(self, seed: int, *, forgets: str = "") -> None:
        """`forgets` names a way of waiting that does nothing: `wait_event`, `wait_stream` or `synchronize`."""
        self.random = random.Random(seed)
        # From a device that is always behind to one that is nearly always done.
        self.eagerness = self.random.choice([0.0, 0.3, 0.9])
        self.forgets = forgets
        self.streams: list[Stream] = []
        self.allocated: list[torch.UntypedStorage] = []
        self.allocated_bytes = 0
        self.computed: list[weakref.ref[torch.Tensor]] = []
        self.keeps_none = False
        self.pinned: list[weakref.ref[torch.Tensor]] = []
        self.num_run = 0
        self.num_timed = 0
        self._lock = threading.RLock()
        self._named = threading.local()

    @contextlib.contextmanager
    def named(self, _: object) -> Iterator[None]:
        """torch.cuda.device, of a model."""
        self._named.depth = getattr(self._named, "depth", 0) + 1
        try:
            yield
        finally:
            self._named.depth -= 1

    def check_named(self) -> None:
        """That our code, two calls up, said which device it is about.

        A thread begins with the first one, and takes memory of it by waiting there or by coming back from a stream.
        """
        is_ours = sys._getframe(2).f_globals["__name__"].startswith("ckpt_ema.")
        assert not is_ours or getattr(self._named, "depth", 0), "a device that is not named"

    def queue(self, stream: Stream, work: Callable[[], object] | Moment) -> None:
        """Let `stream` do `work`, or wait for a moment, when its turn comes."""
        with self._lock:
            stream.work.append(work)
            while self.random.random() < self.eagerness and self._run_one():
                pass

    def run_until(self, is_reached: Callable[[], bool]) -> None:
        """Run what is queued, in any order that is allowed, until something is so."""
        with self._lock:
            while not is_reached():
                assert self._run_one(), "the device waits for itself"

    def run_all(self) -> None:
        """Run everything."""
        self.run_until(lambda: not any(stream.work for stream in self.streams))

    def _run_one(self) -> bool:
        ready = [stream for stream in self.streams if stream.is_ready()]
        if not ready:
            return False
        work = self.random.choices(ready, [stream.haste for stream in ready])[0].work.popleft()
        if not isinstance(work, Moment):
            # A device knows no modes: what may be written to was checked where the work was queued.
            with _disable_current_modes(), torch.inference_mode():
                work()
            self.num_run += 1
        return True


class Stream:
    """torch.cuda.Stream, of a model."""

    def __init__(self, device: Device) -> None:
        self.device = device
        # Some lag far behind the others.
        self.haste = device.random.choice([0.01, 0.1, 1.0])
        self.work: deque[Callable[[], object] | Moment] = deque()
        device.streams.append(self)

    def is_ready(self) -> bool:
        """Whether its next piece of work waits for nothing."""
        return bool(self.work) and not (isinstance(self.work[0], Moment) and not self.work[0].is_over)

    def wait_event(self, event: Event) -> None:
        """What is queued from now on comes behind what was recorded last."""
        if event.moment is not None and self.device.forgets != "wait_event":
            self.device.queue(self, event.moment)

    def wait_stream(self, other: Stream) -> None:
        """What is queued from now on comes behind all that `other` has."""
        if self.device.forgets != "wait_stream":
            event = Event(self.device)
            event.record(other)
            self.wait_event(event)


class Event:
    """torch.cuda.Event, of a model."""

    def __init__(self, device: Device, *, is_timed: bool = False) -> None:
        self.device = device
        self.is_timed = is_timed
        device.num_timed += is_timed
        self.moment: Moment | None = None

    def record(self, stream: Stream) -> None:
        """It happens when `stream` has done all that is queued there now."""
        assert not self.is_timed or self.query(), "a time that is still to come is taken again"
        self.moment = moment = Moment()
        self.device.queue(stream, lambda: setattr(moment, "is_over", True))

    def synchronize(self) -> None:
        """Wait for what was recorded last."""
        self.device.check_named()
        if (moment := self.moment) is not None and self.device.forgets != "synchronize":
            self.device.run_until(lambda: moment.is_over)

    def query(self) -> bool:
        """Whether it has happened."""
        return self.moment is None or self.moment.is_over

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds: whatever was timed took one."""
        assert self.query()
        assert end.query()
        return 1.0


class Queueing(TorchDispatchMode):
    """Arithmetic that is called inside is queued on a stream; only what makes views is done at once."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # In inference mode some calls are not taken apart before; `to` would be taken for a view.
        with self:
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        if func.is_view:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self._stream.device.queue(self._stream, lambda: func(*args, **kwargs))
            return args[0] if func._schema.returns else None
        # Done now for the shape of what comes, and again when its turn comes for what is in it.
        made = func(*args, **kwargs)
        if isinstance(made, (torch.Tensor, tuple)) and not func.name().startswith("aten::empty"):
            self._stream.device.computed.extend(map(weakref.ref, _tensors(made)))
            self._stream.device.queue(self._stream, lambda: _put(made, func(*args, **kwargs)))
        return made


def _put(into: Any, made: Any) -> None:
    for one, other in zip(_tensors(into), _tensors(made), strict=True):
        one.copy_(other)


def _tensors(made: Any) -> tuple[torch.Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


@contextlib.contextmanager
def modelled(
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    *,
    forgets: str = "",
    largest_bytes: float = math.inf,
    free_bytes: int = 1 << 30,
) -> Iterator[Device]:
    """torch.cuda's streams are the model's for as long as this lasts, and pinned memory is plain.

    Nothing that is allocated on a device that is named may be larger than `largest_bytes`; the device says that
    `free_bytes` are free.
    """
    device = Device(seed, forgets=forgets)
    main = Stream(device)
    current = threading.local()

    def stream(chosen: Stream) -> contextlib.AbstractContextManager[None]:
        device.check_named()
        return on_stream(chosen)

    @contextlib.contextmanager
    def on_stream(chosen: Stream) -> Iterator[None]:
        before = getattr(current, "stream", main)
        current.stream = chosen
        try:
            with Queueing(chosen):
                yield
        finally:
            current.stream = before

    def unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
            tensor = make(*arguments, **options)
            if pin_memory:
                device.pinned.append(weakref.ref(tensor))
            # The engine's device is an object; where the host is meant, that is said by name.
            if isinstance(options.get("device"), torch.device) and not pin_memory:
                if tensor.nbytes > largest_bytes:
                    raise torch.OutOfMemoryError("CUDA out of memory, says the model")
                device.allocated.append(storage := tensor.untyped_storage())
                device.allocated_bytes += tensor.nbytes
                # Given back by whoever queued work on it, which is no reason to wait where the caller queues more.
                device.queue(torch.cuda.current_stream(), lambda: storage.nbytes() and tensor.fill_(255))
            return tensor

        return made

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", lambda device_=None: Stream(device))
        patch.setattr(torch.cuda, "Event", lambda enable_timing=False, **_: Event(device, is_timed=enable_timing))
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(torch.cuda, "current_stream", lambda device_=None: getattr(current, "stream", main))
        patch.setattr(torch.cuda, "device", device.named)
        patch.setattr(torch.cuda, "synchronize", lambda device_=None: device.run_all())
        patch.setattr(torch.cuda, "empty_cache", lambda: setattr(device, "keeps_none", True))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        # What torch keeps for later is taken, as far as the device knows.
        patch.setattr(torch.cuda, "mem_get_info", lambda device_=None: (free_bytes * device.keeps_none, 2 << 30))
        patch.setattr(torch, "empty", unpinned(torch.empty))
        patch.setattr(torch, "empty_like", unpinned(torch.empty_like))
        yield device
