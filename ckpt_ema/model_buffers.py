"""Which tensors are buffers, learnt from the model itself: `MODULE:FACTORY` in, names out."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Collection

from ckpt_ema.errors import CkptEmaError, MisuseError


def read_model_buffers(model: str, names: Collection[str]) -> frozenset[str]:
    """Build the model that `model` (`package.module:callable`) returns on the meta device; the names of its buffers.

    `names` are the students' tensor names. This runs the user's own code, never a checkpoint's. Raises MisuseError
    when the model cannot be built, and CkptEmaError when its state dict does not have exactly these names.
    """
    module_name, separator, factory_name = model.partition(":")
    if not separator or not module_name or not factory_name:
        raise MisuseError(
            f"`--model {model}` is not MODULE:FACTORY",
            hint="pass for example `--model my_project.models:build_student`",
        )
    import torch  # noqa: PLC0415  (a plan without --model must not wait for it)

    # A console script's own folder is on the path, the folder it is called from is not.
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        factory = importlib.import_module(module_name)
        for part in factory_name.split("."):
            factory = getattr(factory, part)
        with torch.device("meta"):
            built = factory() if not isinstance(factory, torch.nn.Module) else factory  # type: ignore[operator]
    except (Exception, SystemExit) as error:  # a training script may parse a command line of its own
        raise MisuseError(f"`--model {model}` cannot be built: {type(error).__name__}: {error}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
    if not isinstance(built, torch.nn.Module):
        raise MisuseError(f"`--model {model}` gives a {type(built).__name__}, not a torch.nn.Module")
    own = set(built.state_dict(keep_vars=True))
    if own != set(names):
        lines = [f"{name}: only in the checkpoints" for name in sorted(set(names) - own)]
        lines += [f"{name}: only in the model" for name in sorted(own - set(names))]
        raise CkptEmaError(
            f"`--model {model}` and the checkpoints have {len(lines)} different tensor names",
            details=lines,
            hint="name the sub-model with `--prefix`, or the buffers with `--buffer`",
        )
    return frozenset(name for name, _ in built.named_buffers(remove_duplicate=False)) & frozenset(names)
