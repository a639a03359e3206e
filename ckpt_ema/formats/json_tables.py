"""JSON that a stranger wrote: bytes or text in, its values out, or a ValueError before they take all memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

# Below this nothing can take much: `[],` is three bytes for seventy.
MAX_UNCOUNTED_BYTES = 8 << 20
# Of the values, of which a header of 500,000 tensors takes as much.
MAX_VALUE_BYTES = 600 << 20
BYTES_PER_TABLE = 232
BYTES_PER_LIST = 88
BYTES_PER_VALUE = 64


def parse_json(content: bytes | str, *, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The values of a JSON text; raises ValueError or RecursionError where it is none, or its values are too many."""
    if len(content) > MAX_UNCOUNTED_BYTES:
        encoded = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        # One letter that is rare makes all of a text take four bytes per letter.
        taken = len(encoded) if encoded.isascii() else 4 * len(encoded)
        taken += encoded.count(b"{") * BYTES_PER_TABLE
        taken += encoded.count(b"[") * BYTES_PER_LIST
        taken += encoded.count(b",") * BYTES_PER_VALUE
        if taken > MAX_VALUE_BYTES:
            raise ValueError(f"its values may take {taken >> 20} MiB")
    return json.loads(content, object_pairs_hook=object_pairs_hook)
