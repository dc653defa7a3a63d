import pytest
import torch
from torch import nn

from lgcnet_fast.nn.operations import (
    CELL_OPS,
    FUSION_OPS,
    LIGHT_OPS,
    UP_OPS,
    cell_operation,
    fusion_operation,
    up_operation,
)
from lgcnet_fast.nn.primitives import FactorizedReduce, GlobalPool

SIZES = [(193, 17), (12, 15), (1, 1)]


def _ceil_half(size):
    return tuple(-(-n // 2) for n in size)


def _norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", [name for name in CELL_OPS if name != "none"])
def test_cell_operations_map_sizes(name, stride, size):
    x = torch.randn(2, 6, *size)
    out = cell_operation(name, 6, stride, affine=False, pool_norm=True).eval()(x)
    assert out.shape == (2, 6, *(size if stride == 1 else _ceil_half(size)))


def test_table_ii_order_and_light_operations():
    assert CELL_OPS == (
        "max3", "skip", "conv3", "none", "sep3", "dil3_2", "dil3_4", "dil3_8"
    )  # fmt: skip
    assert LIGHT_OPS == {"none", "max3", "skip"}
    assert len(FUSION_OPS) == 10 and len(UP_OPS) == 2


def test_none_is_not_computed():
    assert cell_operation("none", 8) is None


def test_pool_has_batch_norm_in_the_search_only():
    assert _norms(cell_operation("max3", 4, pool_norm=True))
    assert not _norms(cell_operation("max3", 4))


@pytest.mark.parametrize("affine", [False, True])
def test_affine_reaches_every_batch_norm(affine):
    modules = [
        *(cell_operation(n, 4, 2, affine, pool_norm=True) for n in CELL_OPS if n != "none"),
        *(fusion_operation(n, 4, 6, affine) for n in FUSION_OPS),
        up_operation("deconv", 4, affine),
    ]
    for module in modules:
        assert _norms(module)
        assert all(norm.affine is affine for norm in _norms(module))


def test_sep3_is_applied_twice_in_cells_and_once_in_the_fusion_cell():
    assert len(_norms(cell_operation("sep3", 4))) == 2
    assert len(_norms(fusion_operation("sep3", 4, 4))) == 1


@pytest.mark.parametrize("size", [(9, 12), (3, 2), (1, 1)])
@pytest.mark.parametrize("name", FUSION_OPS)
def test_fusion_operations_keep_the_size(name, size):
    assert fusion_operation(name, 12, 4)(torch.randn(2, 12, *size)).shape == (2, 4, *size)


@pytest.mark.parametrize("target", [(97, 193), (98, 193), (97, 194)])
@pytest.mark.parametrize("name", UP_OPS)
def test_up_operations_reach_odd_and_even_sizes(name, target):
    x = torch.randn(1, 2, 49, 97)
    assert up_operation(name, 2).eval()(x, target).shape == (1, 2, *target)


def test_factorised_reduce_sees_both_pixel_lattices():
    """Every pixel of an even map reaches the output, also the last row and column of an odd one."""
    for size in ((4, 6), (5, 7)):
        reduce = FactorizedReduce(1, 2, affine=False).eval()
        nn.init.ones_(reduce.even.weight)
        nn.init.ones_(reduce.odd.weight)
        x = torch.arange(1.0, 1 + size[0] * size[1]).reshape(1, 1, *size)
        even, odd = reduce(x)[0] * (1 + reduce.norm.eps) ** 0.5
        torch.testing.assert_close(even, x[0, 0, ::2, ::2])
        shifted = torch.zeros_like(even)
        inner = x[0, 0, 1::2, 1::2]
        shifted[: inner.shape[0], : inner.shape[1]] = inner
        torch.testing.assert_close(odd, shifted)


def test_global_pool_folds_into_its_convolution():
    """Batch norm behind the upsampling is an affine of the convolution."""
    pool = GlobalPool(3, 4, bins=2).double().eval()
    nn.init.uniform_(pool.norm.running_mean)
    nn.init.uniform_(pool.norm.weight)
    nn.init.uniform_(pool.norm.bias)
    x = torch.randn(1, 3, 7, 9, dtype=torch.float64)
    scale = pool.norm.weight / (pool.norm.running_var + pool.norm.eps).sqrt()
    shift = pool.norm.bias - pool.norm.running_mean * scale
    pooled = nn.functional.adaptive_avg_pool2d(x.relu(), 2)
    folded = torch.einsum("oi,nihw->nohw", pool.conv.weight.flatten(1), pooled)
    folded = folded * scale[:, None, None] + shift[:, None, None]
    expected = nn.functional.interpolate(folded, (7, 9), mode="bilinear", align_corners=True)
    torch.testing.assert_close(pool(x), expected)


@pytest.mark.parametrize(
    "build", [cell_operation, lambda n, c: fusion_operation(n, c, c), up_operation]
)
@pytest.mark.parametrize("name", ["conv5", "", "dil3_", "gp"])
def test_unknown_names_are_refused(build, name):
    with pytest.raises(ValueError, match="unknown .* operation"):
        build(name, 4)
