"""Many tensors in one stretch of memory, so that one launch serves all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from lgcnet_fast.ops.lanes import lanes_of, side_by_side

ALIGNMENT = 64
"""Numbers from which a tensor may begin, 256 bytes of float32: kernels load 16 bytes at once."""


class Stretch:
    """Where tensors like given ones lie in a stretch: in their order, each as dense as it is."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """tensors: dense, of one dtype and device."""
        self._shapes = [(tensor.shape, tensor.stride()) for tensor in tensors]
        self._padding = [-tensor.numel() % ALIGNMENT for tensor in tensors]
        sizes = [t.numel() + pad for t, pad in zip(tensors, self._padding, strict=True)]
        *self._starts, _ = accumulate(sizes, initial=0)
        self._filling = tensors[0].new_zeros(ALIGNMENT)

    def views(self, stretch: Tensor) -> list[Tensor]:
        places = zip(self._shapes, self._starts, strict=True)
        return [stretch.as_strided(*shape, start) for shape, start in places]

    def holds(self, stretch: Tensor, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors still lie where `views` has put them."""
        own = stretch.untyped_storage()._cdata
        return all(
            tensor.untyped_storage()._cdata == own and tensor.storage_offset() == start
            for tensor, start in zip(tensors, self._starts, strict=True)
        )

    def filled(self, tensors: Sequence[Tensor]) -> Tensor:
        """A new stretch with copies of the tensors."""
        pieces = []
        every = zip(tensors, self._shapes, self._padding, strict=True)
        for tensor, (shape, strides), pad in every:
            if not _same_order(tensor, strides):
                tensor = tensor.new_empty_strided(shape, strides).copy_(tensor)
            pieces.append(tensor.as_strided((tensor.numel(),), (1,)))
            if pad:
                pieces.append(self._filling[:pad])
        # A launch takes some hundred pieces and leaves most of a GPU idle.
        stretch = tensors[0].new_empty(sum(map(len, pieces)))
        count = -(-len(pieces) // lanes_of(stretch.device))
        groups = [pieces[first : first + count] for first in range(0, len(pieces), count)]
        places = stretch.split([sum(map(len, group)) for group in groups])
        jobs = [
            partial(torch.cat, group, out=place)
            for group, place in zip(groups, places, strict=True)
        ]
        side_by_side(stretch.device, jobs)
        return stretch


def _same_order(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Strides of dimensions of size 1 say nothing."""
    if tensor.stride() == strides:
        return True
    every = zip(tensor.shape, tensor.stride(), strides, strict=True)
    return all(size == 1 or own == wanted for size, own, wanted in every)
