"""The last stage of weight gradients: sums of the shares of all programs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lgcnet_fast.kernels.common import sum_rows, sum_shares, unsummed

SHAPES = [
    ((1, 1, 3, 3, 1), None),
    ((7, 2, 1, 3, 3, 5), (1, 2, 4, 5)),
    ((300, 3, 3, 4), (17, 1, 3, 2)),
    ((17, 2, 3, 3, 17), (260, 2, 3, 17)),
]


def rounded(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Whole numbers, so that sums are exact."""
    return torch.randint(-9, 10, shape, device=device).float()


@pytest.mark.parametrize("windows, products", SHAPES, ids=str)
def test_shares_of_windows_and_products(
    windows: tuple[int, ...], products: tuple[int, ...] | None, device: torch.device
) -> None:
    torch.manual_seed(0)
    of_windows = rounded(windows, device)
    of_products = None if products is None else rounded(products, device)
    found, summed = sum_shares(of_windows, of_products)
    wanted = of_windows.sum(0).reshape(-1, 3, 3, windows[-1]).movedim(-1, 1)
    assert found.is_contiguous() and torch.equal(found, wanted)
    if of_products is None:
        assert summed is None
    else:
        assert summed is not None and torch.equal(summed, of_products.sum(0))


def test_sums_that_are_left_to_others(device: torch.device) -> None:
    shares = rounded((5, 2, 3), device)
    result, kept = unsummed(lambda: sum_rows(shares))
    assert result.shape == shares.shape[1:] and kept is shares
    assert unsummed(lambda: 1) == (1, None)
    assert torch.equal(sum_rows(shares), shares.sum(0))


def test_after_an_error_sums_are_taken_again(device: torch.device) -> None:
    with pytest.raises(ZeroDivisionError):
        unsummed(lambda: 1 / 0)
    shares = rounded((5, 2), device)
    assert torch.equal(sum_rows(shares), shares.sum(0))
