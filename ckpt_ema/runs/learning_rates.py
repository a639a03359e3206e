"""The learning rate that a checkpoint records: its contents in, (step, rate) pairs out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ckpt_ema.formats import Contents
from ckpt_ema.sizes import MAX_COUNT

MAX_ENTRIES = 1 << 16
MAX_SAMPLES = 256
MAX_RATE = 1e9


def learning_rates_of(contents: Contents) -> tuple[tuple[int | None, float], ...]:
    """Every rate that is recorded: a trainer's log with its steps, else the optimizer's first parameter group.

    The step is None where it is the checkpoint's own.
    """
    logged = tuple(_logged(contents.trainer_state.get("log_history")))
    # A schedule has few corners, and every checkpoint brings the whole log once more.
    logged = logged[-1 :: -max(1, math.ceil(len(logged) / MAX_SAMPLES))][::-1]
    return logged or tuple((None, rate) for rate in _of_optimizers(contents.tree))[:1]


def _logged(history: Any) -> Iterator[tuple[int, float]]:
    for entry in history[:MAX_ENTRIES] if isinstance(history, list) else ():
        step = entry.get("step") if isinstance(entry, dict) else None
        if type(step) is int and 0 <= step < MAX_COUNT and _is_rate(entry.get("learning_rate")):
            yield step, float(entry["learning_rate"])


def _of_optimizers(tree: Any) -> Iterator[float]:
    """Of `optimizer`, `optimizer_states`, ...: a state dict of torch's, or a list or a mapping of these."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if not isinstance(key, str) or "optim" not in key.lower():
            continue
        states = value if isinstance(value, list) else [value, *value.values()] if isinstance(value, dict) else []
        for state in states[:MAX_ENTRIES]:
            groups = state.get("param_groups") if isinstance(state, dict) else None
            first = groups[0] if isinstance(groups, list) and groups else None
            if isinstance(first, dict) and _is_rate(first.get("lr")):
                yield float(first["lr"])


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < MAX_RATE
