"""One fold by many processes: the environment of torchrun or Slurm in, this process's place and word of the others out.

Ranks share nothing but the start (what is folded, and into which files) and the commit. In between each does its own
blocks, and hears once a second whether another one failed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from ckpt_ema.errors import CkptEmaError, MisuseError, first_line

POLL_SECONDS = 0.05
CHECK_SECONDS = 1.0
HEARTBEAT_SECONDS = 5.0
SILENCE_SECONDS = 90.0
"""A rank that gave no sign for so long is taken for dead; others are told within seconds if it can still speak."""

START_SECONDS = 600.0
"""For all ranks to be there: schedulers start them minutes apart."""


TELL_SECONDS = 5.0
"""Of waiting for a rank that has not begun, until that is told."""

ALONE = "where this is no job of torchrun or srun, its variables are left from one: `unset RANK SLURM_PROCID`"


class OtherRankFailedError(CkptEmaError):
    """The fold was given up because of another rank, which says itself why."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint, may_pass=True)  # as far as this rank can tell


class Ranks:
    """The one process of a fold that is not shared."""

    number = 0
    count = 1
    local = 0
    """Its number on this machine."""

    def __init__(self) -> None:
        self.tell: Callable[[str], None] = lambda text: None
        """Is called with what a person should know while this rank waits for others."""

    @property
    def is_first(self) -> bool:
        """Whether it makes the files, commits them, and talks to people."""
        return self.number == 0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def share(self, name: str, content: str | None) -> str:
        """What the first rank gives under `name`; the others wait for it, and pass None."""
        assert content is not None
        return content

    def check(self) -> None:
        """Raise OtherRankFailedError where another rank failed."""

    def arrive(self, name: str) -> None:
        """Tell that this rank has come to `name`."""

    def wait_for_all(self, name: str) -> None:
        """Until every rank has come to `name`; raises OtherRankFailedError where one never will."""


class StoreRanks(Ranks):
    """One of many processes, which talk through a store of torch's at the first one's address."""

    def __init__(self, number: int, count: int, local: int, connect: Callable[[], Any]) -> None:
        """`connect` gives a torch.distributed.Store; it is called when a fold begins, and must give each its own.

        All ranks fold the same things in the same order.
        """
        super().__init__()
        self.number, self.count, self.local = number, count, local
        self._connect = connect
        self._store: Any = None
        self._ended = threading.Event()
        self._checked = 0.0
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._heart = threading.Thread()

    def __enter__(self) -> StoreRanks:
        self._ended = threading.Event()
        self._checked = 0.0
        self._heard = {}
        # Rank 0 is asked first; where it is not there, torch waits without a word.
        waiting = threading.Timer(TELL_SECONDS, lambda: self.tell(f"waiting for rank 0 of {self.count}; {ALONE}"))
        waiting.daemon = True
        waiting.start()
        try:
            with self._explained():
                self._store = self._connect()
        finally:
            waiting.cancel()
        beat = functools.partial(self._beat, self._store, self._ended)
        self._heart = threading.Thread(target=beat, name="heartbeat", daemon=True)
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, OtherRankFailedError):
            with contextlib.suppress(Exception):  # whoever it would be told to may be gone
                self._store.set("failed", f"rank {self.number}: {_told(error)}")
        if self.is_first and kind is None:
            # The store may live in this process: it must outlast what the others still ask of it.
            with contextlib.suppress(CkptEmaError):
                self.wait_for_all("end")
        elif kind is None:
            with contextlib.suppress(CkptEmaError):
                self.arrive("end")
        self._ended.set()
        # A thread that is inside of the store when the interpreter ends aborts the process.
        self._heart.join(HEARTBEAT_SECONDS)

    def share(self, name: str, content: str | None) -> str:
        """As above; through the store."""
        if content is not None:
            with self._explained():
                self._store.set(name, content)
            return content
        self._wait(lambda: self._has(name), [0])
        with self._explained():
            return bytes(self._store.get(name)).decode()

    def check(self) -> None:
        """As above; asks at most once a second."""
        now = time.monotonic()
        if now - self._checked >= CHECK_SECONDS:
            self._checked = now
            self._raise_failure()

    def arrive(self, name: str) -> None:
        """As above."""
        with self._explained():
            self._store.set(f"{name}/{self.number}", "1")

    def wait_for_all(self, name: str) -> None:
        """As above; arrives itself."""
        self.arrive(name)
        for number in range(self.count):
            self._wait(lambda number=number: self._has(f"{name}/{number}"), [number])  # type: ignore[misc]

    def _wait(self, is_there: Callable[[], bool], needed: list[int]) -> None:
        # Asked first: a failure that was told before must stop even what is there already.
        self._raise_failure()
        began: float | None = time.monotonic()
        while not is_there():
            for number in needed:
                self._check_alive(number)
                if began is not None and time.monotonic() - began > TELL_SECONDS and not self._heard[number][0]:
                    self.tell(f"waiting for rank {number} of {self.count}, which has not begun; {ALONE}")
                    began = None
            time.sleep(POLL_SECONDS)
            self._raise_failure()

    def _has(self, name: str) -> bool:
        with self._explained():
            return bool(self._store.check([name]))

    def _raise_failure(self) -> None:
        if self._has("failed"):
            with self._explained():
                text = bytes(self._store.get("failed")).decode("utf-8", "replace")
            raise OtherRankFailedError(f"another rank failed, so that nothing was written: {text}")

    def _check_alive(self, number: int) -> None:
        """Raise OtherRankFailedError where a rank gave no sign of life for long."""
        beat = b""
        if self._has(f"alive/{number}"):
            with self._explained():
                beat = bytes(self._store.get(f"alive/{number}"))
        now = time.monotonic()
        last, since = self._heard.setdefault(number, (beat, now))
        if beat != last:
            self._heard[number] = beat, now
        elif now - since > (SILENCE_SECONDS if beat else START_SECONDS):
            what = f"gave no sign for {SILENCE_SECONDS:.0f} s" if beat else f"did not start in {START_SECONDS:.0f} s"
            raise OtherRankFailedError(
                f"rank {number} of {self.count} {what}; nothing was written", hint=None if beat else ALONE
            )

    def _beat(self, store: Any, ended: threading.Event) -> None:
        count = 0
        while not ended.is_set():
            with contextlib.suppress(Exception):  # told to the fold by its own calls
                store.set(f"alive/{self.number}", str(count))
            count += 1
            ended.wait(HEARTBEAT_SECONDS)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's DistError is one
            what = first_line(error)
            raise OtherRankFailedError(
                f"rank {self.number} of {self.count} cannot reach the first one: {what}"
            ) from None


def _told(error: BaseException) -> str:
    if isinstance(error, CkptEmaError):
        return error.message
    return f"{type(error).__name__}: {error}" if isinstance(error, Exception) else "it was stopped"


def ranks_of_environment(environment: Mapping[str, str] | None = None) -> Ranks:
    """This process's place among those that torchrun or srun started; alone where neither did.

    As the variables of `environment` say, os.environ by default. Raises MisuseError where they make no sense.
    """
    environment = os.environ if environment is None else environment
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        number, count = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        local = _number(environment, "LOCAL_RANK", "0")
        host, port = environment["MASTER_ADDR"], _number(environment, "MASTER_PORT")
        # torchrun's own agent keeps a store there; otherwise the first rank does.
        has_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        prefix = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    elif {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"} <= environment.keys():
        number, count = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")
        local = _number(environment, "SLURM_LOCALID", "0")
        host = environment.get("MASTER_ADDR") or _first_host(environment.get("SLURM_STEP_NODELIST", "127.0.0.1"))
        # Of one job and step alone, since a machine may run several.
        job = 16 * _number(environment, "SLURM_JOB_ID", "0") + _number(environment, "SLURM_STEP_ID", "0")
        port = _number(environment, "MASTER_PORT", str(20000 + job % 20000))
        has_store, prefix = False, "0"
    else:
        return Ranks()
    if not 0 < port < 1 << 16:
        raise MisuseError(f"`MASTER_PORT` is {port} in the environment, and must be below 65536")
    if not 0 <= number < count:
        raise MisuseError(f"the environment says that this is rank {number} of {count}")
    if count == 1:
        return Ranks()
    return StoreRanks(number, count, local, lambda: _connect(host, port, prefix, keeps=number == 0 and not has_store))


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    if not (text.isascii() and text.isdigit()):
        raise MisuseError(f"`{name}` is {text!r} in the environment, and must be a number", hint=f"`unset {name}`")
    return int(text)


def _first_host(nodes: str) -> str:
    """`node003` of Slurm's `node[003-010,012],other1`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?", nodes)
    if match is None:
        raise MisuseError(
            f"`SLURM_STEP_NODELIST` is {nodes!r}, and names no machine",
            hint="set `MASTER_ADDR` to that of the first rank",
        )
    return match[1] + (match[2] or "")


def _connect(host: str, port: int, prefix: str, *, keeps: bool) -> Any:
    # Here, not above: a single fold needs none of it.
    from datetime import timedelta  # noqa: PLC0415

    from torch import distributed  # noqa: PLC0415

    limit = timedelta(seconds=START_SECONDS)
    store = _stores.get((host, port))
    if store is None:
        store = distributed.TCPStore(host, port, is_master=keeps, wait_for_workers=False, timeout=limit)  # type: ignore[attr-defined]
        _stores[host, port] = store
    # The store outlives a fold, under torchrun even this process: what was said in one must mean nothing in the next.
    return distributed.PrefixStore(f"ckpt-ema/{prefix}/{next(_fold_numbers)}", store)  # type: ignore[attr-defined]


_stores: dict[tuple[str, int], Any] = {}
_fold_numbers = itertools.count()


def has_met_others() -> bool:
    """Whether this process has talked to other ranks."""
    return bool(_stores)
