"""Kills folds: a process that forks one child per fold, because importing torch takes longer than any of them.

`python fault_driver.py MODE FOLDER ...` prints a JSON list of what went wrong, empty where nothing did.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ckpt_ema
import ckpt_ema.engine.choice  # and torch with it, before anything is forked
from ckpt_ema.output import journal, teacher_folder
from tests.power_failure import Disk, leave_remains

WRITING_CALLS = (
    *("open", "write", "pwrite", "ftruncate", "posix_fallocate", "fsync", "fdatasync"),
    *("rename", "replace", "link", "unlink", "mkdir", "rmdir"),
)
OPTIONS: dict[str, dict[str, Any]] = {
    "file": {},
    "overwritten": {"overwrite": True},
    "several": {"momentum": [0.1, 0.3]},
    "shards": {"overwrite": True, "shard_size_bytes": 12_000},
    "apart": {"overwrite": True, "shard_size_bytes": 30_000},
    "joined": {"overwrite": True, "shard_size_bytes": 10**9},
    "new": {"shard_size_bytes": 10**9},
    "dcp": {"output_format": "dcp", "overwrite": True},
    "model": {"overwrite": True},
}
"""What is folded how, by scenario."""


def fold(run: Path, output: Path, **options: Any) -> None:
    """A fold in small blocks by two threads."""
    options = {"momentum": 0.1, **options}
    ckpt_ema.fold(run, output, announce=lambda plan: None, memory_budget_bytes=1 << 15, num_threads=2, **options)


def start(work: Callable[[], None], errors: Path) -> int:
    """`work` in a child of its own; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        errors.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """How a child ended: 0 well, 1 with an error, below 0 by a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content_of(path: Path) -> Any:
    """All that lies at `path`: bytes of a file, a table of a folder, None of nothing."""
    if path.is_dir():
        return {child.name: content_of(child) for child in sorted(path.iterdir())}
    return path.read_bytes() if path.exists() else None


def fault_at(number: int, *, torn: bool, disk: Disk | None = None, saved: Path | None = None) -> None:
    """Kill this process before its writing call of that number, or in the middle of what that call writes.

    After one call is before the next. A call that writes nothing cannot be torn, and goes through. What the `disk` was
    told is `saved` then.
    """
    count = 0

    def faulty(call: Callable[..., Any], name: str, *arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        if name == "open" and not arguments[1] & (os.O_CREAT | os.O_TRUNC):
            return call(*arguments, **keywords)
        writes = name in ("write", "pwrite")
        is_it = count == number and (writes or not torn)
        count += writes or not torn
        if is_it and torn:
            descriptor, written, *offset = arguments
            call(descriptor, bytes(written)[: len(written) // 2], *offset)
        if is_it:
            if disk is not None and saved is not None:
                disk.save(saved)
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*arguments, **keywords)
        if disk is not None:
            disk.told(name, arguments)
        return result

    for name in WRITING_CALLS:
        setattr(os, name, functools.partial(faulty, getattr(os, name), name))
    teacher_folder._exchange = functools.partial(faulty, teacher_folder._exchange, "renameat2")


class Scenario:
    """One way to fold, into a folder of its own that is put back to its beginning before each trial."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.run = folder / ("model_run" if name == "model" else "run")
        self.begin = folder / "begin"
        self.folder = folder / name
        self.errors = folder / "errors.txt"
        self.options = OPTIONS[name]
        if name == "apart":  # a file system that cannot exchange two names
            teacher_folder._exchange = lambda one, other: False
        target = {"several": "t-{momentum}.safetensors", "file": "t.safetensors", "overwritten": "t.safetensors"}
        self.target = self.folder / target.get(name, "t")
        self.reset()
        self.before = content_of(self.folder)
        fold(self.run, self.target, **self.options)
        self.after = content_of(self.folder)

    def reset(self) -> None:
        """Put the folder back to how it was before any fold."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        if self.name == "overwritten":
            shutil.copy(self.begin / "old.safetensors", self.target)
        if self.target.name == "t" and self.name != "new":
            shutil.copytree(self.begin / self.name, self.target)

    def fold(self) -> None:
        """The fold, or the rest of it."""
        fold(self.run, self.target, resume=True, **self.options)

    def check(self, where: str) -> list[str]:
        """What is wrong after a kill: a teacher that is neither old nor new, another one after going on, leftovers."""
        wrong = []
        if self.name != "apart" and self.target.name in self.before and not self.target.exists():
            wrong.append(f"{where}: there is no teacher")
        for name, content in content_of(self.folder).items():
            if not name.startswith(".") and content not in (self.before.get(name), self.after.get(name)):
                # Of a folder, the files of both are there for a moment, each of them whole.
                whole = {**self.before.get(name, {}), **self.after.get(name, {})} if isinstance(content, dict) else {}
                both = (self.before.get(name, {}), self.after.get(name, {}))
                if not whole or any(
                    not key.startswith(".") and part not in (both[0].get(key), both[1].get(key))
                    for key, part in content.items()
                ):
                    wrong.append(f"{where}: `{name}` is neither old nor new")
        if content_of(self.folder) == self.after and not self.options.get("overwrite"):
            return wrong  # it was killed when all was done
        code = ended(start(self.fold, self.errors))
        if code:
            wrong.append(f"{where}: going on ended with {code}: {self.errors.read_text()[-1500:]}")
        elif content_of(self.folder) != self.after:
            wrong.append(f"{where}: another teacher, or something is left: {sorted(os.listdir(self.folder))}")
        return wrong


def at_every_call(scenario: Scenario) -> list[str]:
    """Kill at every call that writes."""
    wrong = []
    for torn in (False, True):
        where = "within" if torn else "before"
        for number in range(10_000):
            scenario.reset()

            def work(number: int = number, torn: bool = torn) -> None:
                fault_at(number, torn=torn)
                scenario.fold()

            code = ended(start(work, scenario.errors))
            if code == 0:
                break
            if code != -signal.SIGKILL:
                wrong.append(f"{where} call {number}: ended with {code}: {scenario.errors.read_text()[-1500:]}")
            wrong += scenario.check(f"{where} call {number}")
        if number < 8:
            wrong.append(f"only {number} calls were found")
    return wrong


def without_power(scenario: Scenario, trials: int) -> list[str]:
    """Let the power fail at every call that writes; another system, so to say, goes on from what the disk has kept."""
    wrong = []
    saved = scenario.folder.with_name("disk.pickle")
    chance = random.Random(trials)
    gone_on = 0
    journal.SYNC_SECONDS = 0.0
    os.fsync = os.fdatasync = lambda descriptor: None  # the disk is a model, and the real one slow
    for number in range(10_000):
        for _ in range(trials):
            scenario.reset()

            def work(number: int = number) -> None:
                fault_at(number, torn=False, disk=Disk(scenario.folder), saved=saved)
                scenario.fold()

            journal._machine = lambda: 1
            code = ended(start(work, scenario.errors))
            if code == 0:
                break
            if code != -signal.SIGKILL:
                wrong.append(f"call {number}: ended with {code}: {scenario.errors.read_text()[-1500:]}")
            leave_remains(scenario.folder, saved, chance)
            journal._machine = lambda: 2
            done = [journal.done_share([path.with_name(path.name[1:-8])]) for path in journals_in(scenario.folder)]
            gone_on += any(share and share < 1 for share in done)
            wrong += scenario.check(f"call {number}")
        if code == 0:
            break
    if number < 8 or not gone_on:
        wrong.append(f"only {number} calls were found, and {gone_on} times something to go on with")
    return wrong


def journals_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.endswith(journal.JOURNAL_SUFFIX)]


def at_random(scenario: Scenario, trials: int) -> list[str]:
    """Kill at random moments, up to three times in a row."""
    wrong = []
    chance = random.Random(7)
    scenario.reset()
    started = time.perf_counter()
    ended(start(scenario.fold, scenario.errors))
    seconds = time.perf_counter() - started
    killed = 0
    while killed < trials:
        scenario.reset()
        for _ in range(chance.randint(1, 3)):
            child = start(scenario.fold, scenario.errors)
            time.sleep(chance.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            killed += ended(child) == -signal.SIGKILL
        wrong += scenario.check(f"after kill {killed}")
    return wrong


def main(mode: str, folder: Path, name: str, trials: int = 0) -> None:
    """Run the trials, and print what went wrong."""
    scenario = Scenario(folder, name)
    if mode == "calls":
        wrong = at_every_call(scenario)
    else:
        wrong = without_power(scenario, trials) if mode == "power" else at_random(scenario, trials)
    print(json.dumps(wrong))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
