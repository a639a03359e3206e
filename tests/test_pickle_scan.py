"""The scan before a pickle is loaded: judged by pickletools, and by itself without what it keeps."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_ema.formats.pickle_scan import (
    IncompletePickleError,
    MalformedPickleError,
    PickleScan,
    forget_last_scan,
    scan_pickle,
)

TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    forget_last_scan()
    yield
    forget_last_scan()


def pickled(step: int, *, epoch_first: bool = False) -> bytes:
    """The data.pkl of a real checkpoint with an optimizer's state."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    saved: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loss": 1 / (step + 1)}
    saved = {"step": step, **saved} if epoch_first else {**saved, "step": step}
    file = io.BytesIO()
    torch.save(saved, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


CONTENT = pickled(7)


def outcome(content: bytes) -> PickleScan | str:
    """What a scan finds, or what it raises."""
    try:
        return scan_pickle(content)
    except (IncompletePickleError, MalformedPickleError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("behind", [b"", b"more"])
def test_the_end_is_where_pickletools_finds_it(behind: bytes) -> None:
    """And no fewer tuples than it finds, nor many more: a stack is made for them."""
    operations = list(pickletools.genops(CONTENT))
    tuples = sum(opcode.name in TUPLES for opcode, _, _ in operations)
    end, found, is_costly = scan_pickle(CONTENT + behind)
    assert end == operations[-1][2] + 1 == len(CONTENT)
    assert tuples <= found <= 2 * tuples
    assert not is_costly


@pytest.mark.parametrize("epoch_first", [False, True])
def test_the_next_checkpoint_of_a_run_is_scanned_as_if_it_were_the_first(epoch_first: bool) -> None:
    """A step or a loss that changed, at either end of the pickle, changes nothing in the result."""
    contents = [pickled(step, epoch_first=epoch_first) for step in (1, 2, 3, 200, 70000)]
    helped = [outcome(content) for content in contents]
    assert len({len(content) for content in contents[:3]}) == 1, "the test needs pickles of one length"
    for content, found in zip(contents, helped, strict=True):
        forget_last_scan()
        assert outcome(content) == found


@given(changes=st.lists(st.tuples(st.integers(0, len(CONTENT) - 1), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=400, deadline=None)
def test_what_is_kept_of_the_last_pickle_never_changes_a_result(changes: list[tuple[int, int]]) -> None:
    """Whatever bytes differ, the same end, the same count or the same refusal comes out as without it."""
    changed = bytearray(CONTENT)
    for position, value in changes:
        changed[position] = value
    forget_last_scan()
    alone = outcome(bytes(changed))
    forget_last_scan()
    outcome(CONTENT)
    assert outcome(bytes(changed)) == alone
