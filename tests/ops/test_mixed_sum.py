import pytest
import torch

from lgcnet_fast.ops import mixed_sum


def _case(dtype=torch.float64):
    outputs = [torch.randn(2, 3, 5, 7, dtype=dtype, requires_grad=True) for _ in range(4)]
    weights = torch.rand(4, dtype=dtype, requires_grad=True)
    return outputs, weights


def test_equals_the_definition():
    outputs, weights = _case()
    expected = torch.einsum("m,mnchw->nchw", weights, torch.stack(outputs))
    torch.testing.assert_close(mixed_sum(outputs, weights.unbind()), expected)


def test_gradients():
    outputs, weights = _case()
    assert torch.autograd.gradcheck(
        lambda w, *maps: mixed_sum(maps, w.unbind()), (weights, *outputs), fast_mode=True
    )


def test_leaves_its_inputs_alone():
    outputs, weights = _case()
    before = [x.detach().clone() for x in outputs]
    mixed_sum(outputs, weights.unbind())
    for x, copy in zip(outputs, before, strict=True):
        assert torch.equal(x, copy)


def test_float32_weights_keep_the_maps_in_half_precision():
    maps = [torch.randn(1, 2, 3, 3, dtype=torch.bfloat16) for _ in range(2)]
    assert mixed_sum(maps, torch.rand(2).unbind()).dtype == torch.bfloat16


def test_different_counts_are_refused():
    outputs, weights = _case()
    with pytest.raises(ValueError):
        mixed_sum(outputs, weights[:3].unbind())
