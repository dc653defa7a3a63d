"""Weights of folded operations as the fused kernels read them, each made once for all sizes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from lgcnet_fast.data.normalise import DEVIATION
from lgcnet_fast.deploy.operations import (
    Convolution,
    DepthwiseSeparableConvolution,
    InterleavedConvolution,
    PooledConvolution,
    TransposedConvolution,
)


class Packing:
    """Puts weights on a device in a storage dtype; biases and depthwise filters stay float32.

    `part`: the input channels to take, a slice of a concatenation.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._made: dict[Hashable, Tensor] = {}

    @property
    def matrix_units(self) -> bool:
        """Whether the device multiplies the storage dtype on tensor cores, as kernels do it."""
        return has_matrix_units(self.device, self.dtype)

    def convolution(self, operation: Convolution, part: slice) -> Tensor:
        """(taps * c_in, c_out)."""
        weight = operation.weight[:, part]
        return self._once((operation, part.start), lambda: _rows(weight.permute(2, 3, 1, 0)))

    def transposed(self, operation: TransposedConvolution, part: slice) -> Tensor:
        """(9 * c_in, c_out)."""
        weight = operation.weight[part]
        return self._once((operation, part.start), lambda: _rows(weight.permute(2, 3, 0, 1)))

    def interleaved(self, operation: InterleavedConvolution, part: slice) -> Tensor:
        """(2 * c_in, c_out): even pixels give the first half of the output, odd ones the rest."""

        def both() -> Tensor:
            even, odd = (w[:, part, 0, 0].t() for w in (operation.even, operation.odd))
            return torch.block_diag(even, odd)

        return self._once((operation, part.start), both)

    def depthwise(self, operation: DepthwiseSeparableConvolution, part: slice) -> Tensor:
        """(9, c_in) float32."""
        weight = operation.depthwise[part].flatten(1).t()
        return self._once((operation, part.start, "depthwise"), lambda: weight, torch.float32)

    def pointwise(self, operation: DepthwiseSeparableConvolution, part: slice) -> Tensor:
        """(c_in, c_out)."""
        weight = operation.pointwise[:, part, 0, 0].t()
        return self._once((operation, part.start), lambda: weight)

    def pooled(self, operation: PooledConvolution) -> Tensor:
        """(c_in, c_out) float32."""
        weight = operation.weight[:, :, 0, 0].t()
        return self._once(operation, lambda: weight, torch.float32)

    def even_and_odd(self, operation: InterleavedConvolution) -> tuple[Tensor, Tensor]:
        """(c_in, c_out / 2) each."""
        return (
            self._once((operation, "even"), lambda: operation.even[:, :, 0, 0].t()),
            self._once((operation, "odd"), lambda: operation.odd[:, :, 0, 0].t()),
        )

    def filters(
        self, operation: Convolution | TransposedConvolution, layout: torch.memory_format
    ) -> Tensor:
        """As the operation has them; layout: NCHW or NHWC."""
        return self._laid_out((operation, layout), lambda: operation.weight, layout)

    def image_filters(self, operation: Convolution, layout: torch.memory_format) -> Tensor:
        """(c_out, 3, k, k), for pixels of 0..255 less their mean."""
        return self._laid_out((operation, layout), lambda: _for_bytes(operation), layout)

    def stem(self, operation: Convolution) -> Tensor:
        """(27, c_out) float32, for pixels of 0..255 less their mean."""

        def rows() -> Tensor:
            return _rows(_for_bytes(operation).permute(2, 3, 1, 0))

        return self._once(operation, rows, torch.float32)

    def bias(self, biases: Sequence[Tensor], channels: int) -> Tensor:
        """(channels,) float32: the sum; zero of none."""
        key = ("bias", channels, *biases)
        zero = torch.zeros(channels, dtype=torch.float64)
        return self._once(key, lambda: sum((b.double() for b in biases), zero), torch.float32)

    def stacked(self, weights: Sequence[Tensor]) -> Tensor:
        """Packed weights on top of one another."""
        return (
            weights[0]
            if len(weights) == 1
            else self._once(("stacked", *weights), lambda: torch.cat(list(weights)))
        )

    def _laid_out(
        self, key: Hashable, make: Callable[[], Tensor], layout: torch.memory_format
    ) -> Tensor:
        if layout == torch.contiguous_format:
            return self._once(key, make)
        return self._once(key, lambda: make().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _once(
        self, key: Hashable, make: Callable[[], Tensor], dtype: torch.dtype | None = None
    ) -> Tensor:
        if key not in self._made:
            packed = make().detach().to(self.device, dtype or self.dtype)
            self._made[key] = packed.contiguous()
        return self._made[key]


def has_matrix_units(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton multiplies this dtype on tensor cores: 16 bits, since compute capability 8.0.

    TF32 is never used. Of other devices than GPUs the answer is that for a recent GPU.
    """
    if dtype == torch.float32:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _for_bytes(operation: Convolution) -> Tensor:
    """The weight in float64, the deviations of the colours divided out."""
    scale = 1 / (255 * torch.tensor(DEVIATION, dtype=torch.float64))
    return operation.weight.double() * scale.view(1, 3, 1, 1)


def _rows(weight: Tensor) -> Tensor:
    """(.., c_out) to a matrix."""
    return weight.reshape(-1, weight.shape[-1])
