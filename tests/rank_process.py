"""How the workers of the distributed tests end."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable
from pathlib import Path


def run_as_rank(main: Callable[[Path], None]) -> None:
    """Call `main` with the folder that the command line names; a failure is the exit code, and stacks are printed."""
    faulthandler.enable()
    main(Path(sys.argv[1]))
    sys.stderr.flush()
    # Everything is checked. An orderly end would let torch's own threads race with the interpreter's, and abort
    # ("terminate called without an active exception") one time in many.
    os._exit(0)
