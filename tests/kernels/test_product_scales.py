"""Scales of raw maps and the shift of a node, against torch."""

from __future__ import annotations

import pytest
import torch

from lgcnet_fast.kernels.product_scales import product_scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("products, raw, channels", [(1, 0, 1), (1, 1, 3), (12, 6, 48), (3, 2, 65)])
def test_equals_torch(products, raw, channels, dtype, device, guarded):
    torch.manual_seed(0)
    shift = torch.randn(products, channels, dtype=dtype, device=device)
    statistics = torch.randn(3, raw, channels, dtype=dtype, device=device)
    for kind in (torch.bfloat16, dtype):
        z = torch.rand(raw, device=device).to(kind)
        scales, total = product_scales(shift, z, statistics)
        wanted = z.to(dtype)[:, None] * statistics[2]
        torch.testing.assert_close(scales, wanted)
        beside = (wanted * statistics[0]).sum(0)
        torch.testing.assert_close(total, shift.sum(0) + beside, rtol=1e-5, atol=1e-5)


def test_bad_arguments_are_named(device):
    shift, z = torch.zeros(2, 3, device=device), torch.zeros(4, device=device)
    statistics = torch.zeros(3, 4, 3, device=device)
    with pytest.raises(ValueError, match="shift: strides"):
        product_scales(shift.t(), z, statistics)
    with pytest.raises(ValueError, match="z: strides"):
        product_scales(shift, torch.zeros(8, device=device)[::2], statistics)
    with pytest.raises(ValueError, match="statistics: shape"):
        product_scales(shift, z[:3], statistics)
    with pytest.raises(ValueError, match="statistics: dtype torch.float64"):
        product_scales(shift, z, statistics.double())
