"""Spoils small checkpoints at random, and reads them: each must be read or refused, in seconds, and run nothing.

Each target runs in a process of its own, so that a crash or a call into C that does not end is a finding as well; what
was found is kept under --findings, by target and number.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.hostile import TARGETS, Finding, Mutator, clear, few_trials, read_input, warm_up, write_input  # noqa: E402

MAX_FINDINGS = 20
# Starting a process for a pickle that may be a bomb takes as long as reading a thousand others.
ONE_TRIAL_OF = 200


def keep(folder: Path, findings: Path, name: str, what: str) -> None:
    """Copy the input that lies in `folder`, and say what it did."""
    kept = findings / name
    kept.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        (kept / path.name).write_bytes(path.read_bytes())
    print(f"{name}: {what} (kept in {kept})", flush=True)


def fuzz(target: str, runs: int, seed: int, folder: Path, findings: Path) -> int:
    """Read `runs` inputs; returns the number of findings."""
    warm_up(target, folder)
    mutator = Mutator(target, seed)
    found = num_read = number = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.monotonic()
    with few_trials(ONE_TRIAL_OF) as skipped:
        for number in range(1, runs + 1):
            path = write_input(mutator.make(), folder)
            try:
                num_read += read_input(path, keep_tables=number % 8 == 0)
            except Finding as finding:
                found += 1
                keep(folder, findings, f"{target}-{seed}-{number}", str(finding))
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            if grown > 1 << 20:  # KiB
                found += 1
                keep(folder, findings, f"{target}-{seed}-{number}", f"took {grown >> 10} MiB")
                break
            if found >= MAX_FINDINGS:
                break
            if number % 100_000 == 0:
                rate = number / (time.monotonic() - begin)
                print(f"{target}: {number} so far, {rate:.0f}/s, {num_read} read, {found} findings", flush=True)
    seconds = time.monotonic() - begin
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        f"{target}: {number} executions, {number / seconds:.0f}/s, {num_read} read, {skipped[0]} not tried,"
        f" {found} findings, memory grew by {grown >> 10} MiB",
        flush=True,
    )
    clear(folder)
    return found


def fuzz_apart(target: str, runs: int, seed: int, findings: Path) -> int:
    """The same in a child; one that dies is a finding."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=base) as made:
        folder = Path(made)
        child = os.fork()
        if not child:
            status = 70
            try:
                status = min(fuzz(target, runs, seed, folder, findings), MAX_FINDINGS)
            except KeyboardInterrupt:
                pass
            except BaseException as error:
                print(f"{target}: the fuzzer itself failed: {error!r}", flush=True)
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            what = signal.Signals(os.WTERMSIG(status)).name
            keep(folder, findings, f"{target}-{seed}-died", f"killed the process ({what})")
            return 1
        return os.waitstatus_to_exitcode(status)


def main() -> int:
    """Every target, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one; may be given again")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs per target (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed spoils alike (default: %(default)s)")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="where inputs are kept")
    options = parser.parse_args()
    found = [fuzz_apart(target, options.runs, options.seed, options.findings) for target in options.target or TARGETS]
    return 1 if any(found) else 0


if __name__ == "__main__":
    sys.exit(main())
