"""The folder a command runs in: the paths that it was given in, a folder that exists out."""

from __future__ import annotations

import os

import click

from ckpt_ema.cli.options import GivenPath


def leave_removed_folder() -> None:
    """Go to `/` where the current folder was removed: torch's oneMKL would end the process there.

    Raises CkptEmaError where a path of the command is relative, which would name something below `/` then.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        _check_paths(click.get_current_context())
        os.chdir("/")


def _check_paths(context: click.Context) -> None:
    from ckpt_ema.locations import RemotePath, as_path, relative_path_error  # noqa: PLC0415  (no command's help waits for it)

    for parameter in context.command.params:
        given = context.params.get(parameter.name or "") if isinstance(parameter.type, GivenPath) else None
        for path in given if isinstance(given, tuple) else (given,):
            # `..` can still be looked up in a removed folder.
            if path is not None and not isinstance(found := as_path(path), RemotePath) and not found.is_absolute():
                raise relative_path_error(path)
