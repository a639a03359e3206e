"""The contents of a checkpoint in, the checkpoint with its student chosen and what may be its step out."""

from __future__ import annotations

import glob
from dataclasses import replace
from pathlib import Path

from ckpt_ema.errors import CkptEmaError, UnreadableCheckpointError, quoted
from ckpt_ema.formats import Contents
from ckpt_ema.formats.folder import MODEL_STEM, nameless_models
from ckpt_ema.layouts import SchemaPool, compact_layout
from ckpt_ema.runs.candidates import has_series_name, visible_children
from ckpt_ema.runs.checkpoints import Checkpoint, Numbered
from ckpt_ema.runs.learning_rates import learning_rates_of
from ckpt_ema.runs.selection import Selection
from ckpt_ema.runs.state_dicts import is_flat
from ckpt_ema.runs.steps import ORIGINS, stem_of, step_of_average, steps_in_name, steps_inside
from ckpt_ema.runs.students import choose_student

EMA_PYTORCH_PREFIX = "ema_model."
"""Before the names of its averages; its counters have none."""


class CheckpointReader:
    """Reads the checkpoints of one run: what they have in common is kept once."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._pool = SchemaPool()
        self._nameless: dict[Path, set[str]] = {}

    def read(self, contents: Contents, *, is_listed: bool = False) -> Numbered:
        """A checkpoint, and every number that may be its step; raises CkptEmaError where no student can be chosen.

        Of one that was listed by itself the folder's name may say it.
        """
        return self._read(contents, self._selection.state, self._selection.prefix, is_listed=is_listed)

    def read_average(self, contents: Contents) -> Checkpoint:
        """What was said to be an average, with its step: no other one is looked for inside.

        Raises CkptEmaError where nothing tells the step.
        """
        path, selection = contents.path, self._selection
        state = selection.state if selection.state is not None or not is_flat(contents) else ""
        prefix = selection.prefix
        if any(str(name).startswith(EMA_PYTORCH_PREFIX) for name in contents.tree if isinstance(contents.tree, dict)):
            prefix = EMA_PYTORCH_PREFIX + (prefix or "").removeprefix(EMA_PYTORCH_PREFIX)
        checkpoint, numbers = self._read(contents, state, prefix)
        step = step_of_average(path.name)
        if step is not None:
            return replace(checkpoint, step=step)
        origin = next((origin for origin in ORIGINS if origin in numbers), None)
        if origin is None:
            raise CkptEmaError(
                f"`{path}` was said to be an average, and of which step it is, neither its contents nor its name tell",
                hint=f"leave it out: `--exclude {quoted(glob.escape(path.name))}`",
            )
        return replace(checkpoint, step=numbers[origin], unit=origin[1])

    def _read(self, contents: Contents, state: str | None, prefix: str | None, *, is_listed: bool = False) -> Numbered:
        path = contents.path
        student = choose_student(contents, state=state, prefix=prefix)
        if not student.tensors:
            raise UnreadableCheckpointError(f"`{path}` holds no tensors")
        layout = compact_layout(student.tensors, self._pool)
        checkpoint = Checkpoint(
            path=path,
            label=path.name,
            step=None,
            unit="step",
            format=contents.format,
            size=sum(file.size for file in layout.files),
            layout=layout,
            state_key=student.key,
            stripped=student.stripped,
            left_out=dict(student.left_out),
            known_buffers=student.known_buffers,
            learning_rates=learning_rates_of(contents) if self._selection.takes_teachers else (),
            model_folder=contents.folders.get(student.key) or contents.folders.get(""),
        )
        # `checkpoint-300/model.safetensors`, listed as a file: the folder has the number.
        folder = path.absolute().parent
        is_in_series = is_listed and has_series_name(folder) and not steps_in_name(path.name)
        named = folder if is_in_series or self._is_nameless(path) else path
        return checkpoint, {**steps_in_name(named.name), **steps_inside(contents)}

    def _is_nameless(self, path: Path) -> bool:
        """Whether a file's name says only that it is a model, so that its folder's name gives the step."""
        if MODEL_STEM.match(stem_of(path.name)) is None or path.is_dir():
            return False
        folder = path.absolute().parent
        if folder not in self._nameless:
            self._nameless[folder] = nameless_models([other.name for other in visible_children(folder)])
        return path.name in self._nameless[folder]
