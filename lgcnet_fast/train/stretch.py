"""Many tensors in one stretch of memory, so that one launch serves all of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from lgcnet_fast.ops.cast_together import copy_together
from lgcnet_fast.ops.maps import same_order

ALIGNMENT = 64
"""Numbers from which a tensor may begin, 256 bytes of float32: kernels load 16 bytes at once."""


class Stretch:
    """Where tensors like given ones lie in a stretch: in their order, each as dense as it is."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """tensors: dense, of one dtype and device."""
        self._shapes = [(tensor.shape, tensor.stride()) for tensor in tensors]
        sizes = [-(-tensor.numel() // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        *self._starts, self._size = accumulate(sizes, initial=0)

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

    def zeros(self, like: Tensor) -> Tensor:
        """A new stretch, of the dtype and device of `like`."""
        return like.new_zeros(self._size)

    def filled(self, tensors: Sequence[Tensor]) -> Tensor:
        """A new stretch with copies of the tensors, and zeros between them."""
        stretch = self.zeros(tensors[0])
        self.fill(stretch, tensors)
        return stretch

    def fill(self, stretch: Tensor, tensors: Sequence[Tensor]) -> None:
        """Copies the tensors to where `views` has them, but for those that lie there."""
        own = stretch.untyped_storage()._cdata
        places, pieces = [], []
        for tensor, (shape, strides), start in zip(
            tensors, self._shapes, self._starts, strict=True
        ):
            if tensor.untyped_storage()._cdata == own and tensor.storage_offset() == start:
                continue
            if not same_order(tensor, strides):
                tensor = tensor.new_empty_strided(shape, strides).copy_(tensor)
            # Of one dimension: strides that differ where a size is 1 would make it a launch each.
            pieces.append(tensor.as_strided((tensor.numel(),), (1,)))
            places.append(stretch[start : start + tensor.numel()])
        if places:
            copy_together(places, pieces)
