"""`python -m ckpt_ema` without the wait for torch: `python warm_python.py DESCRIPTOR` imports it once, then forks one
child for each call that comes over that socket. Each is a process of its own, and ends as one."""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

MAX_MESSAGE_BYTES = 1 << 16
TIMEOUT_S = 120


class WarmPython:
    """A Python that has imported torch and becomes the command as often as it is called."""

    def __init__(self) -> None:
        self._environment = _environment()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(TIMEOUT_S)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])

    def finds_same_environment(self) -> bool:
        """Whether a process started now would find the variables that this one was started with."""
        return _environment() == self._environment

    def call(self, folder: Path, words: list[str]) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of `ckpt-ema WORDS` in `folder`."""
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            message = json.dumps([str(folder), *words]).encode()
            socket.send_fds(self._socket, [message], [stdout.fileno(), stderr.fileno()])
            process = self._answer()
            try:
                code = self._answer()
            except TimeoutError:
                os.kill(process, signal.SIGKILL)
                self._answer()  # or the next call would take that for its own
                raise
            return code, _text(stdout.fileno()), _text(stderr.fileno())

    def _answer(self) -> int:
        answer = self._socket.recv(MAX_MESSAGE_BYTES)
        if not answer:
            raise RuntimeError("the Python that was kept warm has ended")
        return int(answer)

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._process.wait(timeout=TIMEOUT_S)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def _text(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, closefd=False) as file:
        return file.read()


def _serve(descriptor: int) -> list[str] | None:
    """In a child: what it was called with, in the folder and with the outputs it was called with. In the server: None,
    at the end of the calls."""
    with socket.socket(fileno=descriptor) as calls:
        while True:
            message, descriptors, _, _ = socket.recv_fds(calls, MAX_MESSAGE_BYTES, 2)
            if not message:
                return None
            child = os.fork()
            if not child:
                break
            for given in descriptors:
                os.close(given)
            calls.send(str(child).encode())
            _, status = os.waitpid(child, 0)
            calls.send(str(os.waitstatus_to_exitcode(status)).encode())
    for number, given in enumerate(descriptors, start=1):
        os.dup2(given, number)
        os.close(given)
    folder, *words = json.loads(message)
    os.chdir(folder)
    return list(words)


if __name__ == "__main__":
    import torch  # noqa: F401  (what the children need not wait for)

    gc.freeze()
    called = _serve(int(sys.argv[1]))
    if called is not None:
        # As `python -m` has it: the folder it was called in instead of this file's.
        sys.path[0] = os.getcwd()
        sys.argv = ["ckpt-ema", *called]
        runpy.run_module("ckpt_ema", run_name="__main__", alter_sys=True)
