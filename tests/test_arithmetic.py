"""The update's bits: whatever torch offers in one pass, they are those of the hook's two calls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckpt_ema.engine import arithmetic
from ckpt_ema.engine.arithmetic import update_
from tests.conftest import assert_same_bits

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64)
SPECIAL = (0.0, -0.0, 1e-45, -1e-39, 3e38, -3e38, float("inf"), float("-inf"), float("nan"), 1.0)


def values(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """4096 numbers of any size and sign, and every pair of the special ones."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(4096, generator=generator, dtype=torch.float64)
    numbers *= torch.exp(8 * torch.randn(4096, generator=generator, dtype=torch.float64))
    pairs = torch.cartesian_prod(torch.tensor(SPECIAL, dtype=torch.float64), torch.tensor(SPECIAL, dtype=torch.float64))
    numbers[: len(pairs)] = pairs[:, seed % 2]
    return numbers.to(dtype)


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@given(keep=st.floats(0, 1), take=st.floats(0, 1))
@example(keep=0.0, take=1.0)
@example(keep=0.0, take=0.5)
@example(keep=1.0, take=0.0)
@example(keep=0.999, take=0.001)
@settings(max_examples=20, deadline=None)
def test_an_update_has_the_bits_of_the_hooks_two_calls(
    keep: float, take: float, dtype: torch.dtype, one_pass: bool
) -> None:
    """For every dtype, infinities and NaN included, with torch's one-pass kernel and without."""
    teacher, student = values(2, dtype), values(3, dtype)
    expected = teacher.clone().mul_(keep).add_(student, alpha=take)
    row = teacher.clone().view(1, -1)
    with pytest.MonkeyPatch.context() as patch:
        if not one_pass:
            patch.setattr(arithmetic, "addr_has_the_hooks_bits", lambda dtype: False)
        update_(row, student, keep, take)
    nan = expected.isnan()
    assert torch.equal(row[0].isnan(), nan)
    assert_same_bits({"teacher": row[0][~nan]}, {"teacher": expected[~nan]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kernel_that_rounds_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A torch whose addr multiplies and adds with two roundings, or fuses the other product, is found out."""
    original = torch.Tensor.addr_

    def two_roundings(self: torch.Tensor, one: torch.Tensor, student: torch.Tensor, **scale: float) -> torch.Tensor:
        return self.copy_(self * scale["beta"] + student * scale["alpha"])

    def other_product(self: torch.Tensor, one: torch.Tensor, student: torch.Tensor, **scale: float) -> torch.Tensor:
        fused = student.clone().view(1, -1)
        return self.copy_(original(fused, one, self.view(-1), beta=scale["alpha"], alpha=scale["beta"]))

    for kernel in (two_roundings, other_product):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "addr_", kernel)
            assert not arithmetic.addr_has_the_hooks_bits.__wrapped__(dtype)
