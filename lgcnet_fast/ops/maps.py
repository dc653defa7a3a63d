"""Feature maps (N, C, H, W) and stacks (B, N, C, H, W) of them; NHWC memory on the fused path."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

STORAGE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def unstacked(maps: Sequence[Tensor]) -> list[Tensor]:
    """All maps, those of stacks as views."""
    return [y for entry in maps for y in (entry.unbind() if entry.ndim == 5 else (entry,))]


def nhwc(x: Tensor) -> Tensor:
    """A map or stack as it is, or copied where its channels are not innermost."""
    inner = x.movedim(-3, -1)
    return x if inner.is_contiguous() else inner.contiguous().movedim(-1, -3)


def empty_nhwc(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised map or stack (..., C, H, W) in NHWC memory, dtype and device of `like`."""
    *outer, channels, height, width = shape
    return like.new_empty(*outer, height, width, channels).movedim(-1, -3)


def same_order(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Whether its numbers lie as these strides say; those of sizes 1 say nothing."""
    if tensor.stride() == strides:
        return True
    every = zip(tensor.shape, tensor.stride(), strides, strict=True)
    return all(size == 1 or own == wanted for size, own, wanted in every)


def laid_like(weights: Sequence[Tensor], gradients: Iterable[Tensor]) -> list[Tensor]:
    """Gradients as their weights lie in memory, in their dtypes.

    Autograd then takes them as they are: a copy would read them, which may be too early.
    """
    result, outs, sources = [], [], []
    for weight, g in zip(weights, gradients, strict=True):
        if g.dtype == weight.dtype and same_order(g, weight.stride()):
            result.append(g.as_strided(weight.shape, weight.stride()))
            continue
        result.append(torch.empty_like(weight))
        outs.append(result[-1])
        sources.append(g)
    if outs:
        torch._foreach_copy_(outs, sources)
    return result


def dtype_refusal(name: str, x: Tensor) -> str | None:
    """Why no kernel can take a map of this dtype."""
    if x.dtype in STORAGE:
        return None
    return f"{name} is {x.dtype}, kernels take {', '.join(map(str, STORAGE))}"


def refusal_by(backend: str, name: str, x: Tensor) -> str | None:
    """As `dtype_refusal`; the kernels of `cuda` take no float64 either."""
    if backend == "cuda" and x.dtype == torch.float64:
        return "its kernels have no float64"
    return dtype_refusal(name, x)


def computed_dtype(x: Tensor) -> torch.dtype:
    """That of the products of x: autocast's where it is enabled."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def accumulator(storage: torch.dtype) -> torch.dtype:
    """Dtype of statistics and of sums over maps of a storage dtype."""
    return torch.float64 if storage == torch.float64 else torch.float32
