"""Constants on a device are made once, and apart where tensors have no data."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lgcnet_fast.ops.constants import constant, separate_constants

CPU = torch.device("cpu")


def test_a_constant_is_made_once():
    with torch.inference_mode():
        first = constant((1, 2, 3), CPU)
    assert first is constant((1, 2, 3), CPU)
    assert first.tolist() == [1, 2, 3] and not first.is_inference()


def test_constants_without_data_stay_apart():
    outside = constant((4, 5), CPU)
    with separate_constants(), FakeTensorMode():
        assert isinstance(constant((4, 5), CPU), FakeTensor)
        constant((6, 7), CPU)
    assert constant((4, 5), CPU) is outside
    assert constant((6, 7), CPU).tolist() == [6, 7]
