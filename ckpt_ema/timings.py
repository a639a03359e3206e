"""Where the seconds of a fold went."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Timings:
    """Seconds by what was done; with several threads, those of one of them on average."""

    reading: float = 0.0
    copying: float = 0.0
    """Waiting for a copy between host and device, without what goes on beside reading; 0 on the CPU."""

    computing: float = 0.0
    writing: float = 0.0
    waiting: float = 0.0
    """The thread that queues work for the device, until a reader or a writer is done; 0 on the CPU."""

    def shares(self) -> dict[str, float]:
        """What was done and its share of the time, for all that took any."""
        named = asdict(self)
        total = sum(named.values())
        return {name: seconds / total for name, seconds in named.items() if seconds > 0}
