"""A Titan Xp that needs no GPU: latency estimated from the operations that a module runs.

The module runs on the meta device, where only shapes flow, while every ATen operation is charged:
the slower of arithmetic and memory, and never less than a kernel launch. Rates: LGCNet section 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ELEMENTWISE_BYTES = 430e9
"""Bytes a second of everything that is not a depthwise convolution."""
DEPTHWISE_BYTES = 80e9
SPATIAL_MACS = 9e12
"""Multiply-accumulates a second of 3x3 convolutions (Winograd)."""
POINTWISE_MACS = 5e12
LAUNCH_SECONDS = 5e-6

FREE = ("empty", "batch_norm", "_unsafe_view", "lift_fresh", "dropout")
"""Parts of names of operations that launch nothing: allocation, views, and batch norm, which is
folded into the convolution before it."""


def roofline_ms(module: nn.Module, input_shapes: Iterable[tuple[int, ...]]) -> float:
    """Milliseconds of one forward pass of `module` in eval mode, float32."""
    module = module.to("meta").eval()
    inputs = [torch.empty(shape, device="meta") for shape in input_shapes]
    with torch.no_grad(), _Roofline() as roofline:
        module(*inputs)
    return 1e3 * roofline.seconds


class _Roofline(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _is_free(func):
            self.seconds += max(LAUNCH_SECONDS, _seconds(func, args, result))
        return result


def _is_free(func: torch._ops.OpOverload) -> bool:
    name = func.overloadpacket.__name__
    returns = func._schema.returns
    aliases = [value.alias_info for value in returns]
    is_view = bool(aliases) and all(alias and not alias.is_write for alias in aliases)
    return is_view or any(part in name for part in FREE)


def _seconds(func: torch._ops.OpOverload, args: tuple[Any, ...], result: Any) -> float:
    moved = _bytes(args) + _bytes((result,))
    if func.overloadpacket is not torch.ops.aten.convolution:
        return moved / ELEMENTWISE_BYTES
    x, weight, transposed, groups = args[0], args[1], args[6], args[8]
    if groups > 1 and groups == x.shape[1]:
        return moved / DEPTHWISE_BYTES
    # A filter is applied once a position of the output, or of the input where transposed.
    positions = prod((x if transposed else result).shape[2:]) * x.shape[0]
    rate = POINTWISE_MACS if prod(weight.shape[2:]) == 1 else SPATIAL_MACS
    return max(positions * weight.numel() / rate, moved / ELEMENTWISE_BYTES)


def _bytes(values: Iterable[Any]) -> int:
    """Of every tensor in `values`, lists and tuples included."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, list | tuple):
            total += _bytes(value)
    return total
