"""Responses in a file's metadata: a response in, a table that JSON can hold out, and back."""

from __future__ import annotations

import math
from typing import Any

from ckpt_ema.averages.responses import Ema, Power, Response
from ckpt_ema.sizes import MAX_COUNT

MAX_GAMMA = 2e6


def response_record(response: Response) -> dict[str, Any]:
    """What `read_response` reads; raises TypeError for a response that no file has."""
    span = {"start": response.start, "end": response.end}
    if isinstance(response, Power):
        return {"kind": "power", "gamma": response.gamma, **span}
    if isinstance(response, Ema):
        return {"kind": "ema", "momentum": response.momentum, "interval": response.interval, **span}
    raise TypeError(f"{type(response).__name__} is in no file")


def read_response(record: Any) -> Response | None:
    """The response that a file claims; None for anything that is none."""
    if not isinstance(record, dict):
        return None
    start, end = record.get("start"), record.get("end")
    if not (type(start) is int and type(end) is int and 0 <= start <= end < MAX_COUNT):
        return None
    if record.get("kind") == "power":
        gamma = _number(record.get("gamma"))
        return Power(gamma, start, end) if 0 <= gamma < MAX_GAMMA and start < end else None
    if record.get("kind") == "ema":
        momentum, interval = _number(record.get("momentum")), record.get("interval", 1)
        # After the last update lies no step that has a share.
        if 0 < momentum < 1 and type(interval) is int and 0 < interval < MAX_COUNT and (end - start) % interval == 0:
            return Ema(momentum, start, end, interval)
    return None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # JSON knows whole numbers of any size
        return math.nan
