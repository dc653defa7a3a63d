"""The sum at a mixed node, batch norms included: LGCNet equation 3 over all edges into a node.

    out = sum_k z_k BN_k(y_k) + sum_j z_j x_j

The batch norms have no affine part in the supernet. In a derived network they have one, and every
term counts as it is: `norm_sum`. In training they normalise by the statistics of the batch, through
which the gradient passes, and update their running statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops import fused_affine_norm_sum
from lgcnet_fast.ops.backend import Implementation, Operation
from lgcnet_fast.ops.fused_mixed_norm_sum import NORMALISED
from lgcnet_fast.ops.fused_product_sum import FORMS
from lgcnet_fast.ops.maps import unstacked
from lgcnet_fast.ops.mixed_sum import mixed_sum
from lgcnet_fast.ops.operands import check_beside, check_map, check_shape
from lgcnet_fast.ops.products import Entry, Products, likenesses, multiplied

T = TypeVar("T")


def mixed_norm_sum(
    ys: Sequence[Entry],
    z: Tensor,
    norms: Sequence[nn.Module | None],
    options: Sequence[int] | None = None,
) -> Tensor:
    """`sum_k z[options[k]] * norms[k](y_k)`: (N, C, H, W) in the maps' dtype.

    ys: maps (N, C, H, W) of one shape, stacks (B, N, C, H, W) of them, or `Products` that stand for
    stacks; K maps in all. norms: K of them in the order of the maps: `nn.BatchNorm2d`, or None
    where a map enters as it is. z: vector of weights, float32 or the maps' dtype, of which
    options[k] is the k-th map's (K numbers; the first K weights by default).

    Differentiable in the maps, the weights of products and z. The batch norms behave as when
    called: training mode updates running mean, running variance (unbiased) and the count of
    batches. The fused form takes batch norms without an affine part that agree in mode, eps and
    momentum, and maps in NHWC memory; it keeps for the backward pass the maps themselves and 3 C
    numbers a map, of products their depthwise maps, covariances and copies of the weights. It does
    not wait for the device.

    A weight that is NaN or infinite is refused where z lies on the CPU; on a GPU, where looking
    would stall the step, it spreads into the loss, which the training loop watches.

    Raises `OperandError` naming the argument at fault, `ValueError` for training statistics of a
    single value a channel, `BackendError` where the chosen backend cannot serve.
    """
    _check_products(ys)
    maps = unstacked(likenesses(ys))
    options = tuple(range(len(maps)) if options is None else options)
    _check(maps, z, norms, options)
    result: Tensor = _operation(tuple(ys), z, tuple(norms), options)
    return result


def norm_sum(ys: Sequence[Tensor], norms: Sequence[nn.Module | None]) -> Tensor:
    """`sum_k norms[k](y_k)`: (N, C, H, W) in the maps' dtype; arguments as in `mixed_norm_sum`.

    The node of a derived network. The fused form takes batch norms with an affine part; it keeps
    for the backward pass the maps themselves and 3 C numbers a map. Batch norms that normalise by
    their running statistics or share those of the batch between ranks are PyTorch's on every
    backend, and on `cuda` all are, whose kernels have no affine part.

    Raises `OperandError` naming the argument at fault, `ValueError` for training statistics of a
    single value a channel, `BackendError` where the chosen backend cannot serve.
    """
    maps = unstacked(ys)
    _check_maps(maps)
    _check_norms(maps, norms)
    result: Tensor = _norm_sum(tuple(ys), tuple(norms))
    return result


def normalised(ys: Sequence[Tensor], norm: nn.Module, function: Callable[[Tensor], T]) -> T:
    """`function(norm(y))` for the single map y of ys, one as `mixed_norm_sum` takes it.

    The fused form does not keep the normalised map for the backward pass of `function`, but
    normalises y again there. Raises as `mixed_norm_sum`.
    """
    maps = unstacked(ys)
    _check_maps(maps)
    if len(maps) != 1:
        raise OperandError(f"ys: {len(maps)} maps, need one")
    result: T = _normalised(tuple(ys), norm, function)
    return result


def _reference(
    ys: Sequence[Entry],
    z: Tensor,
    norms: Sequence[nn.Module | None],
    options: Sequence[int],
) -> Tensor:
    raw = unstacked(multiplied(ys))
    maps = [y if norm is None else norm(y) for y, norm in zip(raw, norms, strict=True)]
    weights = z.unbind()
    return mixed_sum(maps, [weights[option] for option in options])


def _norm_sum_reference(ys: Sequence[Tensor], norms: Sequence[nn.Module | None]) -> Tensor:
    maps = [y if norm is None else norm(y) for y, norm in zip(unstacked(ys), norms, strict=True)]
    total: Tensor = maps[0]
    for one in maps[1:]:
        total = total + one
    return total


def _norm_sum_fused(
    backend: str, ys: Sequence[Tensor], norms: Sequence[nn.Module | None]
) -> Tensor:
    if fused_affine_norm_sum.fits(backend, ys, norms):
        return fused_affine_norm_sum.run(ys, norms)
    return _norm_sum_reference(ys, norms)


def _serves(ys: Sequence[Tensor], norms: Sequence[nn.Module | None]) -> None:
    """Nothing is refused: what the kernels do not take, PyTorch's batch norms do."""


def _normalised_reference(
    ys: Sequence[Tensor], norm: nn.Module, function: Callable[[Tensor], T]
) -> T:
    (y,) = unstacked(ys)
    return function(norm(y))


def _check(
    maps: Sequence[Tensor],
    z: Tensor,
    norms: Sequence[nn.Module | None],
    options: Sequence[int],
) -> None:
    """Raises `OperandError`."""
    _check_maps(maps)
    _check_norms(maps, norms)
    if len(options) != len(maps):
        raise OperandError(f"options: {len(options)} for {len(maps)} maps")
    _check_weights(z, options, maps[0])


def _check_products(ys: Sequence[Entry]) -> None:
    """Raises `OperandError`."""
    for index, entry in enumerate(ys):
        if not isinstance(entry, Products):
            continue
        name, shape = f"ys[{index}]", tuple(entry.maps.shape)
        if len(shape) != 5 or not entry.maps.is_floating_point():
            raise OperandError(f"{name}.maps: shape {shape}, need float maps (B, N, C, H, W)")
        if len(entry.weights) != shape[0] or not shape[0]:
            raise OperandError(f"{name}.weights: {len(entry.weights)} for {shape[0]} maps")
        for weight in entry.weights:
            check_shape(f"{name}.weights", weight, (len(entry.weights[0]), shape[2], 1, 1))
            check_beside(f"{name}.weights", weight, f"{name}.maps", entry.maps)


def _check_maps(maps: Sequence[Tensor]) -> None:
    """Raises `OperandError`."""
    if not maps:
        raise OperandError("ys: no maps to sum")
    for index, y in enumerate(maps):
        check_map(f"ys, map {index}", y)
        check_shape(f"ys, map {index}", y, tuple(maps[0].shape))
        check_beside(f"ys, map {index}", y, "the first", maps[0])


def _check_norms(maps: Sequence[Tensor], norms: Sequence[nn.Module | None]) -> None:
    """Raises `OperandError`."""
    if len(norms) != len(maps):
        raise OperandError(f"norms: {len(norms)} for {len(maps)} maps")


def _check_weights(z: Tensor, options: Sequence[int], like: Tensor) -> None:
    """Raises `OperandError`."""
    if z.ndim != 1 or not z.is_floating_point():
        raise OperandError(f"z: need a float vector, got {z.dtype} of shape {tuple(z.shape)}")
    check_beside("z", z, "ys", like)
    outside = [option for option in options if not 0 <= option < len(z)]
    if outside:
        raise OperandError(f"options: {outside[0]} is no position in z of {len(z)} weights")
    if z.device.type == "cpu" and not z.isfinite().all():
        raise OperandError(f"z: weights must be finite, got {z.tolist()}")


_operation = Operation("mixed_norm_sum", _reference, **FORMS)
_normalised = Operation(
    "normalised", _normalised_reference, **NORMALISED, tuned_as="mixed_norm_sum"
)
_norm_sum = Operation(
    "norm_sum",
    _norm_sum_reference,
    triton=Implementation(partial(_norm_sum_fused, "triton"), _serves),
    cuda=Implementation(partial(_norm_sum_fused, "cuda"), _serves),
    tuned_as="mixed_norm_sum",
)
