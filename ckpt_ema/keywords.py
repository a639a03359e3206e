"""The library's functions in, the same out with a word for whoever passes a keyword that they do not have."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection
from functools import wraps
from typing import ParamSpec, TypeVar

from ckpt_ema.errors import MisuseError

P = ParamSpec("P")
R = TypeVar("R")


def refuses_unknown_keywords(*more: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function raise MisuseError for a keyword that it does not have, and name the one that may be meant.

    `more` are those that it takes as `**options`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters.values()
        known = [each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD] + [*more]

        @wraps(function)
        def wrapped(*arguments: P.args, **keywords: P.kwargs) -> R:
            for keyword in keywords:
                if keyword not in known:
                    raise MisuseError(
                        f"`{function.__name__}` has no keyword `{keyword}`", hint=_hint_of_keyword(keyword, known)
                    )
            return function(*arguments, **keywords)

        return wrapped

    return decorate


def _hint_of_keyword(keyword: str, known: Collection[str]) -> str:
    if keyword in ("decay", "ema_decay") and "momentum" in known:
        return "a decay of 0.999 is `momentum=0.001`: momentum = 1 - decay"
    # As the command has it: `memory`, `until`.
    longer = [name for name in known if name.startswith(f"{keyword}_")]
    near = longer or difflib.get_close_matches(keyword, known, n=1)
    return f"pass `{near[0]}`" if near else f"it has {', '.join(f'`{name}`' for name in known)}"
