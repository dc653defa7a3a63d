"""Counting memory on tensors that have shapes and no data, so without a GPU and in seconds."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lgcnet_fast.ops.fused_concat_pointwise import by_cuda_kernel

ROUNDING = 512
"""Bytes: torch's CUDA allocator hands out multiples of them."""
WITH_DEPTHWISE_MAPS = "lgcnet_fast::normalised_depthwise_backward"
"""An operation inside which depthwise maps exist, unless they are left to nodes."""
WITH_CONCATENATIONS = {
    "lgcnet_fast::concat_upsample_pointwise": 1,
    "lgcnet_fast::concat_upsample_pointwise_backward": 2,
}
"""Operations inside which so many concatenated maps exist at once, unless kernels do without: then
those that are resized for them, or none."""


class LiveBytes(TorchDispatchMode):
    """Inside the `with` block: bytes of all storages that operations made and nobody freed yet.

    What autograd saves for the backward pass counts until it is freed there, as on a GPU. Meant for
    use inside `FakeTensorMode`; counts real tensors as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._count = 0
        self._count_at_peak = 0
        self._births: dict[int, int] = {}
        """Storage -> count of operations when it was made."""

    def forget_peak(self) -> None:
        self.peak = self.now

    def existed_at_peak(self, tensor: Tensor) -> bool:
        return self._births[_key(tensor.untyped_storage())] <= self._count_at_peak

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operation is torch.ops.aten.exponential_.default:
            return args[0]  # Drawn in place; tensors without data take no generators.
        if operation is torch.ops.aten._local_scalar_dense.default:
            return True  # There is no data; checks of arguments ask whether values are in order.
        result = operation(*args, **(kwargs or {}))
        self._count += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        bytes_now = self.now + rounded(scratch(operation, args))
        if bytes_now > self.peak:
            self.peak, self._count_at_peak = bytes_now, self._count
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = _key(storage), rounded(storage.nbytes())
        if key not in self._births:
            self._births[key] = self._count
            self.now += size
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        del self._births[key]
        self.now -= size


def storage_bytes(*tensors: Tensor) -> int:
    """Of the storages of tensors, which may share them."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    sizes = {_key(storage): rounded(storage.nbytes()) for storage in storages}
    return sum(sizes.values())


def rounded(size: int) -> int:
    return -(-size // ROUNDING) * ROUNDING


def scratch(operation: Any, args: Any) -> int:
    """Bytes of maps that an operation of this package makes inside and frees before it ends."""
    name = operation.name()
    if name != WITH_DEPTHWISE_MAPS and name not in WITH_CONCATENATIONS:
        return 0
    names = (argument.name for argument in operation._schema.arguments)
    given = dict(zip(names, args, strict=False))
    if name in WITH_CONCATENATIONS:
        return WITH_CONCATENATIONS[name] * _concatenation(given)
    if not given["products"].numel():
        return 0
    return sum(y.numel() * y.element_size() for y in given["ys"])


def _concatenation(given: dict[str, Any]) -> int:
    """Bytes of the maps side by side, as far as they are written."""
    maps, size, backend = given["maps"], tuple(given["size"]), given["backend"]
    if maps[0].element_size() == 2 and backend == "triton":
        return 0
    if by_cuda_kernel(backend, maps):
        maps = [x for x in maps if tuple(x.shape[2:]) != size]
    return sum(len(x) * x.shape[1] * math.prod(size) * x.element_size() for x in maps)


def _key(storage: torch.UntypedStorage) -> int:
    return storage._cdata
