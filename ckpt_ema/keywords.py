"""Unknown keywords: a function in, the same out that names the keyword that may be meant."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from ckpt_ema.errors import MisuseError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

MAX_LISTED = 8
"""Keywords that fit into a hint."""


def refuses_unknown_keywords(options: type | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function raise MisuseError for a keyword that it does not have, and name the one that may be meant.

    `options` is the dataclass whose fields it takes as `**options`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        return _checked(function, function.__name__, options)

    return decorate


def made_of_known_keywords(cls: type[T]) -> type[T]:
    """Let a class refuse unknown keywords where it is made, as `refuses_unknown_keywords` lets a function."""
    made: Any = cls
    made.__init__ = _checked(made.__init__, cls.__name__)
    return cls


def _checked(function: Callable[P, R], name: str, options: type | None = None) -> Callable[P, R]:
    # Not inspect.signature: twelve of these would take a plan a tenth of its time.
    code = inspect.unwrap(function).__code__
    own = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    known = [keyword for keyword in own if keyword != "self"]
    known += [field.name for field in dataclasses.fields(options)] if options is not None else []
    homes = [name] if options is None else [name, options.__name__]

    @wraps(function)
    def wrapped(*arguments: P.args, **keywords: P.kwargs) -> R:
        for keyword in keywords:
            if keyword not in known:
                raise MisuseError(f"`{name}` has no keyword `{keyword}`", hint=_hint_of_keyword(keyword, known, homes))
        return function(*arguments, **keywords)

    return wrapped


def _hint_of_keyword(keyword: str, known: Collection[str], homes: Collection[str]) -> str:
    if keyword in ("decay", "ema_decay") and "momentum" in known:
        return "a decay of 0.999 is `momentum=0.001`: momentum = 1 - decay"
    import difflib  # noqa: PLC0415  (who makes no mistake need not wait for it)

    # As the command has it: `memory`, `until`.
    longer = [name for name in known if name.startswith(f"{keyword}_")]
    near = longer or difflib.get_close_matches(keyword, known, n=1)
    if near:
        return f"pass `{near[0]}`"
    if len(known) <= MAX_LISTED:
        return f"it has {', '.join(f'`{name}`' for name in known)}"
    helps = " and ".join(f"`help(ckpt_ema.{name})`" for name in homes)
    return f"{helps} {'lists' if len(homes) == 1 else 'list'} its keywords"
