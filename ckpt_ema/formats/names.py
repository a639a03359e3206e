"""What a name of a file, a key or a module says of what it holds: a name in, yes or no out."""

from __future__ import annotations

import functools
import re

AVERAGE_WORDS = ("ema", "swa", "avg", "average", "averaged", "teacher", "shadow", "polyak", "litema")
"""A word of a key, or of a part of a tensor's name, that says: these are averages."""

_AVERAGE_WORD = re.compile(rf"(^|[._\-])({'|'.join(AVERAGE_WORDS)})(\d*)([._\-]|$)", re.IGNORECASE)
# ESPnet's `valid.acc.ave_10best`; elsewhere `ave` is any mean, of a loss for instance.
_ESPNET_AVERAGE = re.compile(r"\.ave(_\d+best)?$")
_CASE_CHANGE = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@functools.lru_cache(maxsize=4096)  # asked for every part of every tensor's name, and the parts repeat
def is_average_name(name: str) -> bool:
    """Whether a key or a file's name says that it holds an average: `model_ema`, `modelEMA`, `teacher`."""
    return bool(_AVERAGE_WORD.search(in_snake_case(name)) or _ESPNET_AVERAGE.search(name))


def in_snake_case(name: str) -> str:
    """`optimizerG` as `optimizer_G`."""
    return _CASE_CHANGE.sub("_", name)
