import pytest
import torch
from torch.nn import functional as F

from lgcnet_fast.ops import relu_depthwise_separable


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2, 8])
@pytest.mark.parametrize("size", [(9, 14), (7, 7)])
def test_equals_one_dense_convolution(stride, dilation, size):
    """The product of depthwise and pointwise kernels is a dense 3x3 kernel."""
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    depthwise = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    pointwise = torch.randn(6, 4, 1, 1, dtype=torch.float64)
    dense = pointwise * depthwise.squeeze(1)
    expected = F.conv2d(x.clamp(min=0), dense, stride=stride, padding=dilation, dilation=dilation)
    found = relu_depthwise_separable(x, depthwise, pointwise, stride, dilation)
    assert found.shape[-2:] == (-(-size[0] // stride), -(-size[1] // stride))
    torch.testing.assert_close(found, expected)


def test_gradients():
    tensors = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 3, 6, 5), (3, 1, 3, 3), (2, 3, 1, 1))
    ]
    assert torch.autograd.gradcheck(
        lambda *t: relu_depthwise_separable(*t, 2, 2), tensors, fast_mode=True
    )
