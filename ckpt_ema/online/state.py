"""A MeanTeacher's state dict: a teacher in, its entries out; and what somebody stored in, what it says out.

What is wrong with a stored one is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ckpt_ema.errors import CkptEmaError, first_line
from ckpt_ema.online.lineage import Lineage
from ckpt_ema.online.pairs import Pairing
from ckpt_ema.online.settings import Settings
from ckpt_ema.online.shadows import is_narrow

STATE_VERSION = 1

COUNTERS = ("num_steps", "num_updates", "num_skipped")
CONFIGURATION = ("momentum", "interval", "arithmetic")

_HINT = "pass what `MeanTeacher.state_dict()` returned"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredState:
    """What a state dict says."""

    counters: Mapping[str, int]
    """The values of COUNTERS."""

    configuration: Mapping[str, Any]
    """The values of CONFIGURATION."""

    lineage: Lineage
    """Where its numbers come from."""

    tensors: Mapping[str, torch.Tensor]
    """The teacher's by their first names; none where a teacher module keeps them."""

    snapshots: Mapping[str, Any] | None
    """The snapshot tracks' state, where there were some."""

    def lineage_under(self, settings: Settings) -> Lineage:
        """The lineage of a teacher that goes on with these settings."""
        # A state of another momentum or interval is no average that a formula describes any more.
        is_alike = all(self.configuration[name] == getattr(settings, name) for name in ("momentum", "interval"))
        # In 16 bits most updates were lost, whatever it is kept in from here on.
        was_narrow = any(map(is_narrow, self.tensors.values()))
        return self.lineage if is_alike and not was_narrow else self.lineage.without_formula()

    def changes(self, settings: Settings, pairing: Pairing, *, has_tracks: bool) -> list[str]:
        """What to warn of where a teacher like this goes on otherwise than the stored one was made."""
        warnings = [
            f"the teacher was made with {name}={value!r}, and continues with {getattr(settings, name)!r}"
            for name, value in self.configuration.items()
            if value != getattr(settings, name)
        ]
        for pair in pairing.pairs if pairing.has_shadows else ():
            dtype = self.tensors[pair.names[0]].dtype
            if dtype is not pair.local.dtype:
                warnings.append(f"the stored teacher is {dtype}, and goes on in {pair.local.dtype}")
                break
        if self.snapshots is not None and not has_tracks:
            warnings.append("the state has snapshot tracks, which end here: pass snapshots=")
        elif self.snapshots is None and has_tracks:
            num_steps = self.counters["num_steps"]
            warnings.append(f"the state has no snapshot tracks: they begin anew after step {num_steps}")
        return warnings


def state_entries(
    lineage: Lineage,
    settings: Settings,
    pairing: Pairing,
    counters: Mapping[str, int],
    snapshots: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The state dict that `stored_state` reads; its tensors, unless a teacher module keeps them, are the teacher's own.

    `counters` are the values of COUNTERS, `snapshots` the tracks' state where there are some.
    """
    entries: dict[str, Any] = {
        "version": STATE_VERSION,
        **lineage.entries(),
        "skip_buffers": settings.skip_buffers,
        **{name: counters[name] for name in COUNTERS},
        **{name: getattr(settings, name) for name in CONFIGURATION},
    }
    if pairing.has_shadows:
        entries["tensors"] = pairing.by_first_name()
    if snapshots is not None:
        entries["snapshots"] = snapshots
    return entries


def stored_state(state: Mapping[str, Any], *, skip_buffers: bool) -> StoredState:
    """What `state` says; raises CkptEmaError for what no MeanTeacher with this `skip_buffers` writes."""
    required = {"version", "start", "skip_buffers", *COUNTERS, *CONFIGURATION}
    if state.get("version") != STATE_VERSION or not required <= state.keys():
        raise CkptEmaError(
            f"no state of a MeanTeacher: its version is {state.get('version')!r}, not {STATE_VERSION}, or a part is"
            " missing",
            hint=_HINT,
        )
    if bool(state["skip_buffers"]) != skip_buffers:
        raise CkptEmaError(
            f"the state was made with skip_buffers={state['skip_buffers']}, and here it is {skip_buffers}",
            hint=f"make the MeanTeacher with skip_buffers={state['skip_buffers']}",
        )
    try:
        counters = {name: int(state[name]) for name in COUNTERS}
        lineage = Lineage.from_entries(state)
    except (TypeError, ValueError, IndexError) as error:
        raise CkptEmaError(f"the state is damaged: {first_line(error)}", hint=_HINT) from error
    return StoredState(
        counters=counters,
        configuration={name: state[name] for name in CONFIGURATION},
        lineage=lineage,
        tensors=state.get("tensors", {}),
        snapshots=state.get("snapshots"),
    )
