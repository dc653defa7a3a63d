"""The module that a lookup-table key stands for, as it runs in a derived network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lgcnet_fast.errors import TableError
from lgcnet_fast.nn.heads import ASPP, PPM, Classifier
from lgcnet_fast.nn.operations import (
    CELL_OPS,
    FUSION_OPS,
    UP_OPS,
    cell_operation,
    fusion_operation,
    up_operation,
)
from lgcnet_fast.nn.primitives import FactorizedReduce, Interpolate, ReLUConvBN
from lgcnet_fast.nn.stem import Stem
from lgcnet_fast.space.base import LutKey, LutModule
from lgcnet_fast.space.layout import StemShape


def lut_module(key: LutKey, stem: StemShape) -> LutModule:
    """Raises `TableError` for a key of another space."""
    family, _, name = key.op.partition(".")
    shape = (1, key.c_in, key.h_in, key.w_in)
    operation = cell_operation(name, key.c_in, key.stride) if name in CELL_OPS else None
    if family == "cell" and operation is not None:
        accumulator = (1, key.c_out, -(-key.h_in // key.stride), -(-key.w_in // key.stride))
        return LutModule(_Accumulate(operation), (shape, accumulator))
    if family == "fusion" and name in FUSION_OPS:
        return LutModule(fusion_operation(name, key.c_in, key.c_out), (shape,))
    if family == "up" and name in UP_OPS:
        return LutModule(_Enlarge(up_operation(name, key.c_in), key), (shape,))
    if family == "const" and name == "concat":
        return LutModule(_Concat(), (shape,) * (key.c_out // key.c_in))
    if family == "const" and name == "sum":
        return LutModule(_Accumulate(nn.Identity()), (shape, shape))
    if family == "node" and name == "cell":
        return LutModule(_Accumulate(nn.Identity()), (shape, shape))
    if family == "input" and name in ("relu_conv_bn", "factorized_reduce"):
        family = "const"
    if family == "const" and (module := _constant(name, key, stem)) is not None:
        return LutModule(module, (shape,))
    raise TableError(f"the entry '{key}' does not belong to this search space")


class _Accumulate(nn.Module):
    """An operation and the sum into its node."""

    def __init__(self, operation: nn.Module) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor, accumulator: Tensor) -> Tensor:
        return accumulator + self.operation(x)


class _Enlarge(nn.Module):
    """Up-sampling by the key's stride to n -> stride * (n - 1) + 1.

    That is the exact size for inputs of 16k + 1 pixels; for others it misses the last rows, which
    a latency does not show.
    """

    def __init__(self, operation: nn.Module, key: LutKey) -> None:
        super().__init__()
        self.operation = operation
        self.size = (key.stride * (key.h_in - 1) + 1, key.stride * (key.w_in - 1) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x, self.size)


class _Concat(nn.Module):
    def forward(self, *maps: Tensor) -> Tensor:
        return torch.cat(maps, dim=1)


def _constant(name: str, key: LutKey, stem: StemShape) -> nn.Module | None:
    if name == "stem":
        return Stem(stem.widths, stem.strides)
    if name == "relu_conv_bn":
        return ReLUConvBN(key.c_in, key.c_out)
    if name == "factorized_reduce":
        return FactorizedReduce(key.c_in, key.c_out)
    if name == "resize":
        return _Enlarge(Interpolate(), key)
    if name == "aspp":
        return ASPP(key.c_in)
    if name == "ppm":
        return PPM(key.c_in)
    if name == "classifier":
        return Classifier(key.c_in, key.c_out)
    return None
