"""A teacher in host memory: the bits of one beside the student, whatever the device does when."""

from __future__ import annotations

import atexit
import contextlib
import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from ckpt_ema import CkptEmaError, MeanTeacher, MisuseError
from ckpt_ema.engine.workers import Ticket, Workers
from ckpt_ema.online import offload
from tests.conftest import assert_same_bits
from tests.device_model import modelled


class Student(nn.Module):
    """Two parameters, one of them tied, and a buffer that every forward changes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(40, 30, generator=generator).to(dtype))
        self.bias = nn.Parameter(torch.randn(17, generator=generator).to(dtype).t())
        self.tied = self.weight
        self.register_buffer("mean", torch.zeros(30, dtype=dtype))


Place = Callable[[], contextlib.AbstractContextManager[Any]]


def follow(
    student: Student, options: dict[str, Any], steps: int, place: Place = contextlib.nullcontext
) -> Iterator[MeanTeacher]:
    """Train a student, with its teacher, whose every number is known: forward and backward are a few additions.

    Handed out is the teacher behind each update. `place` is where training happens. The optimizer's factors are exact
    in 16 bits, where a CPU rounds them and a GPU does not.
    """
    teacher = MeanTeacher(student, momentum=0.1, **options)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.25, momentum=0.5)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for step in range(steps):
        with place():
            with torch.no_grad():
                student.mean.mul_(0.5).add_(step)
            for number, parameter in enumerate(student.parameters()):
                assert parameter.grad is not None
                parameter.grad.fill_(0.01 * step + number)
            optimizer.step()
            teacher.update()
        yield teacher


def clones(teacher: MeanTeacher) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in teacher.tensors().items()}


def last(teachers: Iterator[MeanTeacher]) -> MeanTeacher:
    """The teacher after the last step."""
    *_, teacher = teachers
    return teacher


def teacher_on_a_model(dtype: torch.dtype, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The teacher in host memory after eight steps, all of the training queued on the model's stream."""
    training = torch.cuda.current_stream()
    return clones(last(follow(Student(dtype), {**options, "device": "cpu"}, 8, lambda: torch.cuda.stream(training))))


@pytest.fixture
def _all_on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is on the CPU is the model's."""
    monkeypatch.setattr(offload, "is_on_gpu", lambda tensor: True)
    yield
    # An optimizer of the next test would hold back for what is left under way, and there is no model any more.
    for left in offload._alive():
        with contextlib.suppress(Exception):
            left.wait()


OPTIONS: list[dict[str, Any]] = [{}, {"interval": 3}, {"arithmetic": "lerp"}, {"skip_buffers": False}]


@pytest.mark.usefixtures("_all_on_gpu")
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_on_a_model_of_a_gpu_it_has_the_bits_of_a_teacher_beside_the_student(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dtype: torch.dtype, seed: int
) -> None:
    """Whenever the device does what is queued: training neither waits for the copy nor runs into it."""
    expected = clones(last(follow(Student(dtype), options, 8)))
    with modelled(monkeypatch, seed):
        assert_same_bits(teacher_on_a_model(dtype, options), expected)


@pytest.mark.usefixtures("_all_on_gpu")
@pytest.mark.parametrize("forgets", ["wait_stream", "wait_event", "synchronize"])
def test_the_model_shows_what_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, forgets: str) -> None:
    """Without any one of the three ways of waiting, some of a few trainings have another teacher."""
    expected = clones(last(follow(Student(torch.float32), {}, 8)))

    def is_right(seed: int) -> bool:
        with modelled(monkeypatch, seed, forgets=forgets):
            found = teacher_on_a_model(torch.float32, {})
        return all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    assert not all(is_right(seed) for seed in range(8))


def test_beside_a_student_on_the_cpu_it_is_any_other_teacher() -> None:
    """One configuration serves a laptop and a cluster."""
    beside, in_host_memory = (follow(Student(torch.bfloat16), options, 5) for options in ({}, {"device": "cpu"}))
    for one, other in zip(beside, in_host_memory, strict=True):
        assert_same_bits(clones(one), clones(other))


@pytest.mark.usefixtures("_all_on_gpu")
@pytest.mark.parametrize("error", [MemoryError("no room"), SystemExit("no room")])
def test_what_goes_wrong_in_the_thread_is_told_by_whoever_looks_next(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """And not lost with the thread, whatever it is; nor told twice."""
    with modelled(monkeypatch, 0):
        teacher = MeanTeacher(Student(torch.float32), momentum=0.1, device="cpu")
        teacher.update()
        teacher.wait()

        def fail(*_: Any) -> None:
            raise error

        monkeypatch.setattr(teacher._rule, "average_all_", fail)
        teacher.update()
        with pytest.raises(type(error), match="no room"):
            teacher.tensors()
        assert teacher.tensors().keys() == {"weight", "bias", "tied"}


@pytest.mark.usefixtures("_all_on_gpu")
def test_a_first_update_that_fails_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one copies the student; it does not average into what the teacher was made with."""
    with modelled(monkeypatch, 0):
        student = Student(torch.float32)
        teacher = MeanTeacher(student, momentum=0.5, device="cpu")
        prepare = teacher._rule.prepare

        def fail_once(*arguments: Any) -> None:
            monkeypatch.setattr(teacher._rule, "prepare", prepare)
            raise MemoryError("no room")

        monkeypatch.setattr(teacher._rule, "prepare", fail_once)
        with pytest.raises(MemoryError):
            teacher.update()
        assert teacher.num_updates == 0
        with torch.no_grad():
            student.bias.fill_(3.0)
        teacher.update()
        assert teacher.tensors()["bias"].tolist() == [3.0] * 17


@pytest.mark.parametrize("seed", range(6))
def test_a_student_of_which_a_part_is_on_the_cpu_is_copied_whole(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """That part at once, and all of it together."""
    monkeypatch.setattr(offload, "is_on_gpu", lambda tensor: tensor.dim() == 2)
    with modelled(monkeypatch, seed):
        training = torch.cuda.current_stream()
        student = Student(torch.float32)
        teacher = MeanTeacher(student, momentum=0.5, device="cpu")
        for number in range(4):
            with torch.cuda.stream(training), torch.no_grad():
                offload.hold_back_all()
                student.weight.fill_(float(number))
            with torch.no_grad():
                student.bias.fill_(float(number))
            teacher.update()
        assert {float(tensor.mean()) for tensor in teacher.tensors().values()} == {2.125}


@pytest.mark.usefixtures("_all_on_gpu")
def test_a_student_that_changes_its_dtype_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place in host memory is made anew, and nothing is rounded on the way there."""

    def teacher_of(options: dict[str, Any]) -> dict[str, torch.Tensor]:
        student = Student(torch.float32)
        teacher = MeanTeacher(student, momentum=0.3, **options)
        for number, dtype in enumerate((torch.float32, torch.float16, torch.float64, torch.float64)):
            teacher.wait()
            student.to(dtype)
            with torch.no_grad():
                student.weight.add_(number / 3)
            teacher.update()
        return clones(teacher)

    expected = teacher_of({})
    with modelled(monkeypatch, 0):
        assert_same_bits(teacher_of({"device": "cpu"}), expected)


@pytest.mark.usefixtures("_all_on_gpu")
@pytest.mark.parametrize("seed", range(4))
def test_whoever_looks_for_infinities_waits_for_the_update(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Or the one that brought them would not be there yet."""
    with modelled(monkeypatch, seed):
        student = Student(torch.float32)
        teacher = MeanTeacher(student, device="cpu")
        with torch.no_grad():
            student.bias[3] = torch.inf
        teacher.update()
        with pytest.raises(CkptEmaError, match="`bias` holds a NaN or an infinity"):
            teacher.check_finite()


@pytest.mark.usefixtures("_all_on_gpu")
@pytest.mark.parametrize("seed", range(8))
def test_two_optimizers_on_two_streams_are_both_held_back(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The first one's waiting is not the second's."""
    with modelled(monkeypatch, seed):
        training = torch.cuda.current_stream()
        beside = torch.cuda.Stream()
        student = Student(torch.float32)
        teacher = MeanTeacher(student, momentum=0.5, device="cpu")
        optimizers = [torch.optim.SGD([parameter], lr=1.0) for parameter in (student.weight, student.bias)]
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.zero_()
                parameter.grad = -torch.ones_like(parameter)
        for _ in range(4):
            for stream, optimizer in zip((training, beside), optimizers, strict=True):
                with torch.cuda.stream(stream):
                    optimizer.step()
            training.wait_stream(beside)
            with torch.cuda.stream(training):
                teacher.update()
        # 1, then half of each and of 2, 3 and 4.
        assert {float(tensor.mean()) for tensor in teacher.tensors().values()} == {3.125}


@pytest.mark.usefixtures("_all_on_gpu")
def test_an_interrupted_waiting_leaves_something_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a notebook: the next cell gets the update that was under way."""
    with modelled(monkeypatch, 0):
        student = Student(torch.float32)
        teacher = MeanTeacher(student, momentum=0.5, device="cpu")
        teacher.update()
        teacher.wait()
        goes_on = threading.Event()
        average = teacher._rule.average_all_

        def slowly(*arguments: Any) -> None:
            goes_on.wait(20)
            average(*arguments)

        monkeypatch.setattr(teacher._rule, "average_all_", slowly)
        with torch.no_grad():
            student.bias.copy_(student.bias + 2)
        expected = teacher.tensors()["bias"] + 1
        teacher.update()
        interrupt = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT])
        # Whoever is started in the background by a shell script ignores Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            interrupt.start()
            with pytest.raises(KeyboardInterrupt):
                teacher.wait()
            interrupt.join()
        finally:
            signal.signal(signal.SIGINT, before)
        goes_on.set()
        assert torch.allclose(teacher.tensors()["bias"], expected)


ON_A_MODEL = """
import atexit, os, signal, sys, threading, time
import pytest, torch
from ckpt_ema import CkptEmaError, MeanTeacher
from ckpt_ema.engine.workers import Workers
from ckpt_ema.online import offload
from tests.device_model import modelled
from tests.test_offload import Student

patch = pytest.MonkeyPatch()
patch.setattr(offload, "is_on_gpu", lambda tensor: True)
model = modelled(patch, 0)
model.__enter__()  # for as long as there is this process
"""


def _run_script(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, behind what all of them begin with."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", ON_A_MODEL + script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=root)


CAUGHT_WITH_A_LOCK = """
def enter(condition):
    entered = condition._lock.__enter__()
    if threading.get_ident() == threading.main_thread().ident:
        raise KeyboardInterrupt  # a signal that is handled right behind the call
    return entered


teacher = MeanTeacher(Student(torch.float32), momentum=0.5, device="cpu")
teacher.update()
teacher.wait()
average = teacher._rule.average_all_
patch.setattr(teacher._rule, "average_all_", lambda *arguments: (time.sleep(0.3), average(*arguments)))
teacher.update()
with pytest.MonkeyPatch.context() as locks:
    locks.setattr(threading.Condition, "__enter__", enter)
    try:
        teacher.wait()
    except KeyboardInterrupt:
        pass
teacher.wait()
teacher.update()
print(len(teacher.tensors()))
"""


def test_interrupted_with_a_lock_in_hand_the_next_wait_and_the_exit_come_to_an_end() -> None:
    """The lock is given back by nobody; neither the thread nor whoever waits for it may want it."""
    assert _run_script(CAUGHT_WITH_A_LOCK).stdout == "3\n"


ENDING = """
teachers = []
for _ in range(4):
    teacher = MeanTeacher(Student(torch.float32), momentum=0.5, device="cpu")
    teacher.update()
    teacher.wait()
    teachers.append(teacher)


def slowly(*_):
    time.sleep(0.3)
    os.write(1, b"came to its end\\n")  # at once, while another does


def fail(*_):
    time.sleep(0.1)
    raise MemoryError("no room")


def fail_as_well(*_):
    raise OSError("nor a file")


for teacher, average in zip(teachers, (slowly, fail, fail_as_well, slowly)):
    patch.setattr(teacher._rule, "average_all_", average)
    teacher.update()
if sys.argv[1] == "Ctrl-C":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT])
    timer.daemon = True  # or its end would be waited for before all else
    timer.start()
"""


@pytest.mark.parametrize("how", ["by itself", "Ctrl-C"])
def test_what_is_under_way_when_the_process_ends_comes_to_its_end_and_its_error_is_told(how: str) -> None:
    """The last update of a training is followed by no other that would raise it; one that is cut off aborts."""
    done = _run_script(ENDING, how)
    assert done.stdout == "came to its end\n" * 2
    assert "MemoryError: no room" in done.stderr
    assert "OSError: nor a file" in done.stderr
    assert done.returncode in (0, -signal.SIGINT)


LET_GO = """
class Large:
    def __del__(self):
        time.sleep(0.3)
        print("let go", flush=True)


teacher = MeanTeacher(Student(torch.float32), momentum=0.5, device="cpu")
teacher.update()
teacher.wait()
teacher._rule.average_all_ = lambda *_, large=Large(): time.sleep(0.1)
teacher.update()
del teacher
if sys.argv[1] == "later":
    time.sleep(0.2)
"""


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_thread_that_lets_go_of_a_teacher_when_the_process_ends_is_waited_for(when: str) -> None:
    """The last one who had it is the update: it would be ended while it gives memory back."""
    assert _run_script(LET_GO, when).stdout == "let go\n"


@pytest.mark.usefixtures("_all_on_gpu")
def test_an_update_within_an_update_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a handler of signals makes one, behind the handing out of the first."""
    submit = Workers.submit

    def interrupted(workers: Workers, job: Callable[[], None]) -> Ticket:
        monkeypatch.setattr(Workers, "submit", submit)
        ticket = submit(workers, job)
        teacher.update()
        return ticket

    with modelled(monkeypatch, 0):
        teacher = MeanTeacher(Student(torch.float32), momentum=0.5, device="cpu")
        teacher.update()
        done: list[int] = []

        def slowly(*_: Any) -> None:
            time.sleep(0.1)
            done.append(1)

        monkeypatch.setattr(teacher._rule, "average_all_", slowly)
        monkeypatch.setattr(Workers, "submit", interrupted)
        teacher.update()
        teacher.wait()
        assert len(done) == 2


STUCK = """
signal.signal(signal.SIGINT, signal.default_int_handler)
teacher = MeanTeacher(Student(torch.float32), momentum=0.5, device="cpu")
teacher.update()
teacher._rule.average_all_ = lambda *_: time.sleep(1000)
teacher.update()


def interrupt():
    for _ in range(3):
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)


threading.Thread(target=interrupt, daemon=True).start()
"""


def test_a_device_that_hangs_is_left_with_the_third_interrupt() -> None:
    """Who ends a training does not have to look for the number of its process."""
    assert "KeyboardInterrupt" in _run_script(STUCK).stderr


@pytest.mark.usefixtures("_all_on_gpu")
def test_threads_of_teachers_that_start_beside_each_other_are_all_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the end of the process would cut one off."""
    submit = Workers.submit

    def beside(workers: Workers, job: Callable[[], None]) -> Ticket:
        monkeypatch.setattr(Workers, "submit", submit)
        other = offload.Offload()
        other._started_worker()
        assert workers in offload._WORKERS
        return submit(workers, job)

    with modelled(monkeypatch, 0):
        monkeypatch.setattr(Workers, "submit", beside)
        teacher = MeanTeacher(Student(torch.float32), momentum=0.5, device="cpu")
        teacher.update()
        assert teacher._offload is not None
        assert teacher._offload._worker in offload._WORKERS


@pytest.mark.usefixtures("_all_on_gpu")
def test_threads_that_have_ended_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook makes many teachers."""
    with modelled(monkeypatch, 0):
        for _ in range(20):
            teacher = MeanTeacher(Student(torch.float32), momentum=0.5, device="cpu")
            teacher.update()
            assert teacher._offload is not None
            worker = teacher._offload._worker
            assert worker in offload._WORKERS
            del teacher
            gc.collect()
            deadline = time.monotonic() + 20
            while not worker.have_ended and time.monotonic() < deadline:
                time.sleep(0.001)
        assert len([each for each in offload._WORKERS if each.have_ended]) <= 1


def test_a_teacher_that_is_made_beside_an_optimizers_step_does_not_disturb_it() -> None:
    """In another thread: what goes through all teachers is not changed under its hands."""
    goes_on = True

    def make() -> None:
        while goes_on:
            kept = [offload.Offload() for _ in range(50)]
            del kept

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=make)
    thread.start()
    try:
        for _ in range(3000):
            offload.hold_back_all()
    finally:
        goes_on = False
        thread.join()
        sys.setswitchinterval(before)


FORKED_AWAY = """
teacher = MeanTeacher(Student(torch.float32), momentum=0.5, device="cpu")
teacher.update()
teacher.wait()
patch.setattr(teacher._rule, "average_all_", lambda *_: time.sleep(0.5) or 1 / int(sys.argv[1]))
teacher.update()
if sys.argv[1] == "0":
    while not teacher._offload._pending.is_done:
        time.sleep(0.01)
child = os.fork()
if not child:
    sys.exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("is_failing", [False, True])
def test_a_forked_process_ends_without_what_is_under_way_and_tells_nothing(is_failing: bool) -> None:
    """It is not its own: its error is told by the process that waits for it."""
    done = _run_script(FORKED_AWAY, "0" if is_failing else "1")
    assert done.stdout == "3\n"
    assert done.stderr.count("ZeroDivisionError: ") == int(is_failing), done.stderr


BEHIND = """
def save():
    try:
        teacher.update()
        print(len(teacher.tensors()), flush=True)
        teacher._rule.average_all_ = lambda *_: time.sleep(0.3) or os.write(1, b"to its end")
        teacher.update()
    except CkptEmaError as error:  # newer Pythons start no thread any more
        print(str(error).splitlines()[0], flush=True)


atexit.register(save)
teacher = MeanTeacher(Student(torch.float32), momentum=0.5, device="cpu")
teacher.update()
if sys.argv[1] == "interrupted":

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as handing_out, pytest.raises(KeyboardInterrupt):
        handing_out.setattr(Workers, "submit", interrupt)
        teacher.update()
"""


@pytest.mark.parametrize("how", ["", "interrupted"])
def test_whoever_updates_behind_the_end_of_its_thread_does_not_wait_for_ever(how: str) -> None:
    """What was to happen at exit before there was a teacher happens after its end; no update is cut off there."""
    assert _run_script(BEHIND, how).stdout.startswith(("3\nto its end", "cannot start a thread"))


@pytest.mark.usefixtures("_all_on_gpu")
@pytest.mark.parametrize("waits_before", [False, True])
@pytest.mark.parametrize("when", ["before", "behind"])
def test_an_update_that_is_interrupted_while_it_is_handed_out_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, when: str, waits_before: bool
) -> None:
    """Or the next one would copy the student to where the thread still reads; a handler of signals may wait as well."""
    submit = Workers.submit

    def interrupted(workers: Workers, job: Callable[[], None]) -> Ticket:
        monkeypatch.setattr(Workers, "submit", submit)
        if when == "before" and waits_before:
            teacher.wait()
            return submit(workers, job)
        if when == "before":
            raise KeyboardInterrupt
        ticket = submit(workers, job)
        if waits_before:
            teacher.wait()
            return ticket
        raise KeyboardInterrupt

    with modelled(monkeypatch, 0):
        student = Student(torch.float32)
        teacher = MeanTeacher(student, momentum=0.5, device="cpu")
        teacher.update()
        teacher.wait()
        average = teacher._rule.average_all_
        folded: list[float] = []

        def slowly(teachers: Any, students: Any, *arguments: Any) -> None:
            time.sleep(0.1)
            folded.append(float(students[1].mean()))
            average(teachers, students, *arguments)

        monkeypatch.setattr(teacher._rule, "average_all_", slowly)
        monkeypatch.setattr(Workers, "submit", interrupted)
        expected = []
        for number in (1.0, 100.0):
            with torch.no_grad():
                student.bias.fill_(number)
            if number == 1.0 and not waits_before:
                with pytest.raises(KeyboardInterrupt):
                    teacher.update()
            else:
                teacher.update()
            if number == 100.0 or waits_before or when == "behind":
                expected.append(number)
            teacher.wait()
            assert folded == expected


@pytest.mark.usefixtures("_all_on_gpu")
@pytest.mark.parametrize("last", ["waited for", "not waited for", "failed"])
def test_no_thread_outlives_its_teacher(monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    """Nor does it keep the teacher, nor an error that it raised: page-locked memory is given back at once."""
    before = set(threading.enumerate())
    with modelled(monkeypatch, 0):
        teacher = MeanTeacher(Student(torch.float32), momentum=0.5, device="cpu")
        teacher.update()
        teacher.wait()
        (thread,) = set(threading.enumerate()) - before
        kept = weakref.ref(teacher._offload)
        gc.collect()  # before: the model's own circles
        gc.disable()
        try:
            if last == "not waited for":
                teacher.update()
                assert teacher._offload is not None
                while not teacher._offload._pending.is_done:  # type: ignore[union-attr]
                    time.sleep(0.001)
            if last == "failed":
                teacher._rule.average_all_ = lambda *_: 1 / 0  # type: ignore[method-assign]
                teacher.update()
                with pytest.raises(ZeroDivisionError):
                    teacher.wait()
            del teacher
            assert kept() is None
        finally:
            gc.enable()
        thread.join(20)
        assert not thread.is_alive()


FORKED = """
teacher = MeanTeacher(Student(torch.float32), momentum=0.5, device="cpu")
teacher.update()
teacher.wait()
goes_on = threading.Event()
if sys.argv[1] == "under way":
    average = teacher._rule.average_all_
    patch.setattr(teacher._rule, "average_all_", lambda *arguments: (goes_on.wait(20), average(*arguments)))
    teacher.update()
if sys.argv[1] == "done":
    teacher.update()
    while not teacher._offload._pending.is_done:
        time.sleep(0.01)
child = os.fork()
if not child:
    signal.alarm(10)
    if sys.argv[1] == "waited":
        teacher.update()
    try:
        print(len(teacher.tensors()), flush=True)
    except CkptEmaError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
goes_on.set()
print(len(teacher.tensors()))
"""


@pytest.mark.parametrize(
    ("when", "says"),
    [("waited", "3"), ("done", "3"), ("under way", "forked while the teacher's update")],
)
def test_a_forked_process_does_not_wait_for_a_thread_that_it_does_not_have(when: str, says: str) -> None:
    """It says so; a teacher that was waited for is there, and in the process itself it goes on."""
    done = _run_script(FORKED, when)
    first, *_, final = done.stdout.splitlines()
    assert says in first, done
    assert final == "3"


def test_optimizers_are_held_back_once_and_no_longer_than_there_is_a_teacher() -> None:
    """A notebook that makes a teacher per run collects neither hooks, nor what happens at exit, nor teachers."""
    teachers = [MeanTeacher(Student(torch.float32), device="cpu") for _ in range(2)]
    counts = len(_global_optimizer_pre_hooks), atexit._ncallbacks()  # type: ignore[attr-defined]
    teachers.append(MeanTeacher(Student(torch.float32), device="cpu"))
    assert (len(_global_optimizer_pre_hooks), atexit._ncallbacks()) == counts  # type: ignore[attr-defined]
    kept = [weakref.ref(teacher._offload) for teacher in teachers]
    assert {reference() for reference in kept} <= set(offload._alive())
    teachers.clear()
    gc.collect()
    assert not any(reference() for reference in kept)


@pytest.mark.usefixtures("_all_on_gpu")
@pytest.mark.parametrize("seed", range(40))
def test_two_teachers_in_host_memory_do_not_see_each_other_swapped_in(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """What one writes to their student comes behind the other's copy of it."""
    with modelled(monkeypatch, seed):
        training = torch.cuda.current_stream()
        student = Student(torch.float32)
        fast, slow = (MeanTeacher(student, momentum=momentum, device="cpu") for momentum in (0.5, 0.1))
        for number in range(3):
            with torch.cuda.stream(training), torch.no_grad():
                for parameter in student.parameters():
                    parameter.fill_(float(number))
                fast.update()
                slow.update()
                with fast.swapped_into(student):
                    pass
        assert slow.tensors()["bias"].tolist() == [torch.tensor(0.0).lerp(torch.tensor(1.0), 0.1) * 0.9 + 0.2] * 17


@pytest.mark.usefixtures("_all_on_gpu")
@pytest.mark.parametrize("is_pending", [False, True])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda teacher: pickle.loads(pickle.dumps(teacher))])
def test_a_copy_of_a_teacher_goes_a_way_of_its_own(
    monkeypatch: pytest.MonkeyPatch, again: Callable[[MeanTeacher], MeanTeacher], is_pending: bool
) -> None:
    """Also where an update was under way: it is in both."""
    with modelled(monkeypatch, 0):
        student = Student(torch.float32)
        teacher = MeanTeacher(student, momentum=0.1, device="cpu")
        teacher.update()
        teacher.wait()
        with torch.no_grad():
            student.weight.add_(1)
        teacher.update()
        if not is_pending:
            teacher.wait()
        other = again(teacher)
        assert other._offload in set(offload._alive()) - {teacher._offload}
        assert_same_bits(clones(other), clones(teacher))
        other.update()
        assert other.num_updates == 3
        other.wait()


@pytest.mark.usefixtures("_all_on_gpu")
def test_interrupted_while_the_thread_starts_an_update_does_not_come_by_and_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would wait for it, and the counters know nothing of it."""
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        time.sleep(0.05)
        raise KeyboardInterrupt

    with modelled(monkeypatch, 0):
        student = Student(torch.float32)
        teacher = MeanTeacher(student, momentum=0.5, device="cpu")
        before = clones(teacher)
        with torch.no_grad():
            student.weight.add_(1)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                teacher.update()
        time.sleep(0.1)
        assert teacher.num_updates == 0
        assert_same_bits(clones(teacher), before)
        teacher.update()
        assert torch.equal(teacher.tensors()["weight"], student.weight)


def test_a_teacher_module_stays_where_it_is() -> None:
    """`device` with one is misuse, and so is a device that is none."""
    with pytest.raises(MisuseError, match="a teacher module stays where it is"):
        MeanTeacher(Student(torch.float32), Student(torch.float32), device="cpu")
    with pytest.raises(MisuseError, match="device is 'cuda'"):
        MeanTeacher(Student(torch.float32), device="cuda")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_beside_a_student_on_a_gpu_it_has_the_bits_of_a_teacher_on_the_cpu(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Its numbers stay in host memory, through swaps, states and statistics of stalling."""
    on_cpu = last(follow(Student(dtype), options, 12))
    expected = clones(on_cpu)
    student = Student(dtype).cuda()
    teacher = last(follow(student, {**options, "device": "cpu"}, 12))
    assert all(tensor.device.type == "cpu" for tensor in teacher.tensors().values())
    assert_same_bits(clones(teacher), expected)
    before = student.weight.clone()
    with teacher.swapped_into(student):
        assert torch.equal(student.weight.cpu(), expected["weight"].to(dtype))
    assert torch.equal(student.weight, before)
    assert teacher.stalled_fraction() == on_cpu.stalled_fraction()
    other = MeanTeacher(student, momentum=0.1, **options, device="cpu")
    other.load_state_dict(teacher.state_dict())
    assert_same_bits(clones(other), expected)


@pytest.mark.gpu
def test_training_goes_on_while_a_large_student_is_copied_out() -> None:
    """Steps that follow at once, on a student whose copy takes longer than they do, change nothing of the teacher."""
    teachers = []
    for options in ({}, {"device": "cpu"}):
        torch.manual_seed(0)
        student = nn.Linear(8192, 8192, device="cuda")
        teacher = MeanTeacher(student, momentum=0.1, **options)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for step in range(6):
            for parameter in student.parameters():
                parameter.grad = torch.full_like(parameter, float(step))
            optimizer.step()
            teacher.update()
        teachers.append({name: tensor.cpu() for name, tensor in clones(teacher).items()})
    assert_same_bits(*teachers)
