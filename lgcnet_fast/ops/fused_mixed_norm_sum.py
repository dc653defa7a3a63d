"""`mixed_norm_sum` by kernels, registered with torch: `lgcnet_fast::mixed_norm_sum`.

It takes the backend whose kernels run, so that shapes and gradients are stated once for both.
One launch takes the statistics of all maps, one writes the sum. The backward pass takes two: the
sums of the gradient against every map, and the gradients of all maps. Statistics and sums by CUDA
C++ take one more each, for what Triton's kernels do at their end. The running statistics of all
batch norms are updated by three multi-tensor launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.library import custom_op

from lgcnet_fast.ops.backend import Implementation
from lgcnet_fast.ops.constants import constant
from lgcnet_fast.ops.maps import accumulator, empty_nhwc, nhwc, refusal_by, unstacked
from lgcnet_fast.ops.products import grouped, with_own
from lgcnet_fast.ops.recompute import recomputed
from lgcnet_fast.ops.running_statistics import update_running_statistics
from lgcnet_fast.ops.tuning import shape_key, tuned

T = TypeVar("T")


def refuse(
    backend: str,
    ys: Sequence[Tensor],
    z: Tensor,
    norms: Sequence[nn.Module | None],
    options: Sequence[int],
) -> str | None:
    """Why the kernels of `backend` cannot serve these arguments of `mixed_norm_sum`."""
    for index, y in enumerate(ys):
        if y.dtype != ys[0].dtype:
            return f"ys[{index}] is {y.dtype}, ys[0] is {ys[0].dtype}"
        refusal = refusal_by(backend, f"ys[{index}]", y)
        if refusal is not None:
            return refusal
    if all(norm is None for norm in norms):
        return "norms holds no batch norm"
    if any(y.ndim == 5 and None in own for y, own in with_own(ys, norms)):
        return "norms is None for a map of a stack"
    return norm_refusal([norm for norm in norms if norm is not None], ys[0])


def norm_refusal(norms: Sequence[nn.Module], y: Tensor, affine: bool = False) -> str | None:
    """Why the kernels cannot serve these norms, all of them `affine` or none."""
    first = norms[0]
    for norm in norms:
        if isinstance(norm, nn.SyncBatchNorm):
            return "norms holds a SyncBatchNorm, whose statistics the ranks share"
        if not isinstance(norm, nn.BatchNorm2d):
            return f"norms holds a {type(norm).__name__}, not only BatchNorm2d"
        assert isinstance(first, nn.BatchNorm2d)
        if norm.affine != affine:
            return f"norms holds one {'without' if affine else 'with'} an affine part"
        if norm.running_mean is None or norm.momentum is None:
            return "norms holds one without running statistics or momentum"
        if norm.num_features != y.shape[-3]:
            return f"norms holds one of {norm.num_features} channels, the maps have {y.shape[-3]}"
        if norm.running_mean.dtype != accumulator(y.dtype):
            return f"running statistics are {norm.running_mean.dtype}, need {accumulator(y.dtype)}"
        settings = [(n.training, n.eps, n.momentum) for n in (first, norm)]
        if settings[0] != settings[1]:
            return f"norms differ in (training, eps, momentum): {settings[0]} and {settings[1]}"
    return None


def run(
    backend: str,
    ys: Sequence[Tensor],
    z: Tensor,
    norms: Sequence[nn.Module | None],
    options: Sequence[int],
) -> Tensor:
    """`mixed_norm_sum`, see there. The first call must come before capturing a CUDA graph."""
    _, raw, plain = grouped(ys, norms, options)
    normed, xs = ([nhwc(y) for y in group.entries] for group in (raw, plain))
    statistics, training = norm_statistics(backend, normed, raw.norms, len(xs))
    weights = picked_weights(z, (*raw.options, *plain.options))
    result: Tensor = mixed_sum(normed, xs, weights, statistics, training, backend)
    return result


def refuse_normalised(
    backend: str, ys: Sequence[Tensor], norm: nn.Module, function: Callable[[Tensor], T]
) -> str | None:
    """Why the kernels of `backend` cannot serve these arguments of `normalised`."""
    return refuse(backend, ys, ys[0], [norm], [0])


def run_normalised(
    backend: str, ys: Sequence[Tensor], norm: nn.Module, function: Callable[[Tensor], T]
) -> T:
    """`normalised`, see there."""
    ys = [nhwc(y) for y in ys]
    statistics, training = norm_statistics(backend, ys, [norm], plain=0)
    one = constant((1.0,), statistics.device)
    x = mixed_sum(ys, [], one, statistics, training, backend)
    raw = [y.detach() for y in ys]
    again = partial(mixed_sum, raw, [], one, statistics, training, backend)
    with recomputed((x, again)):
        return function(x)


@torch.no_grad()
def norm_statistics(
    backend: str, ys: Sequence[Tensor], norms: Sequence[Any], plain: int
) -> tuple[Tensor, bool]:
    """(3, K, C) of the K maps of ys, beside `plain` others; and whether they are the batch's."""
    training, eps = norms[0].training, norms[0].eps
    if not training:
        return running_statistics(norms, eps), training
    statistics: Tensor = _batch_statistics(ys, eps, plain, backend)
    images, _, height, width = ys[0].shape[-4:]
    update_running_statistics(norms, statistics[0], statistics[1], images * height * width)
    return statistics, training


def picked_weights(z: Tensor, options: tuple[int, ...]) -> Tensor:
    """Those at these positions; z itself where it holds them in this order."""
    if options == tuple(range(len(z))):
        return z
    return z.index_select(0, constant(options, z.device))


def running_statistics(norms: Sequence[Any], eps: float) -> Tensor:
    """(3, K, C): mean, variance and inverse deviation."""
    mean = torch.stack([norm.running_mean for norm in norms])
    variance = torch.stack([norm.running_var for norm in norms])
    return torch.stack((mean, variance, (variance + eps).rsqrt()))


def _statistics_shape(ys: Sequence[Tensor]) -> tuple[int, int, int]:
    return (3, sum(len(y) if y.ndim == 5 else 1 for y in ys), ys[0].shape[-3])


def launchers(backend: str) -> Any:
    """The modules with the forward and the backward launchers of a backend."""
    package = "native" if backend == "cuda" else "kernels"
    names = (f"lgcnet_fast.{package}.mixed_sum", f"lgcnet_fast.{package}.mixed_sum_backward")
    return tuple(import_module(name) for name in names)


def tile(backend: str, launch: str, maps: Sequence[Tensor], plain: int) -> dict[str, Any]:
    """The tile that the tuning table of the device has for a Triton launch, as its keyword."""
    if backend == "cuda":
        return {}
    from lgcnet_fast.kernels.mixed_sum import TileConfig

    y = maps[0]
    default: Any
    if launch in ("forward", "gradients"):
        default = TileConfig.streaming(y.numel(), gradients=launch == "gradients")
    else:
        products = launch == "gradient_sums"
        summed = len(maps) + (plain if products else 0)
        default = TileConfig.reducing(y.shape[1], summed, gradients=products)
    key = shape_key(y.dtype, y.shape, (len(maps), plain))
    return {"config": tuned(default, f"mixed_sum_{launch}", key, y.device)}


@custom_op("lgcnet_fast::batch_statistics", mutates_args=())
def _batch_statistics(ys: list[Tensor], eps: float, plain: int, backend: str) -> Tensor:
    """(3, K, C): mean, biased variance and inverse deviation of every map; `plain` ones beside."""
    forward, _ = launchers(backend)
    maps = unstacked(ys)
    out = ys[0].new_empty(_statistics_shape(ys), dtype=accumulator(ys[0].dtype))
    forward.batch_statistics(maps, eps, out=out, **tile(backend, "statistics", maps, plain))
    return out


@_batch_statistics.register_fake
def _(ys: list[Tensor], eps: float, plain: int, backend: str) -> Tensor:
    return ys[0].new_empty(_statistics_shape(ys), dtype=accumulator(ys[0].dtype))


@custom_op("lgcnet_fast::mixed_norm_sum", mutates_args=())
def mixed_sum(
    ys: list[Tensor], xs: list[Tensor], z: Tensor, statistics: Tensor, training: bool, backend: str
) -> Tensor:
    """Of K normalised maps ys and J plain ones xs; z: (K + J,), statistics: (3, K, C)."""
    forward, _ = launchers(backend)
    maps = unstacked(ys)
    packed = forward.Statistics(*statistics.unbind())
    config = tile(backend, "forward", maps, len(xs))
    out: Tensor = forward.mixed_sum(maps, z[: len(maps)], packed, xs, z[len(maps) :], **config)
    return out


@mixed_sum.register_fake
def _(
    ys: list[Tensor], xs: list[Tensor], z: Tensor, statistics: Tensor, training: bool, backend: str
) -> Tensor:
    return empty_nhwc(ys[0], ys[0].shape[-4:])


@custom_op("lgcnet_fast::mixed_norm_sum_backward", mutates_args=())
def mixed_sum_backward(
    g: Tensor,
    ys: list[Tensor],
    xs: list[Tensor],
    z: Tensor,
    statistics: Tensor,
    training: bool,
    with_z: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of every entry of ys, of every one of xs and, `with_z`, of z."""
    dz = torch.empty_like(z) if with_z else None
    gradients = _gradients(g, ys, xs, z, statistics, training, backend, dz)
    return gradients if dz is None else [*gradients, dz]


@custom_op("lgcnet_fast::mixed_norm_sum_backward_beside", mutates_args=("dz",))
def mixed_sum_backward_beside(
    g: Tensor,
    ys: list[Tensor],
    xs: list[Tensor],
    z: Tensor,
    statistics: Tensor,
    training: bool,
    backend: str,
    dz: Tensor,
) -> list[Tensor]:
    """As `mixed_sum_backward`, where the gradient of z goes to a part of what others write too."""
    return _gradients(g, ys, xs, z, statistics, training, backend, dz)


def _gradients(
    g: Tensor,
    ys: list[Tensor],
    xs: list[Tensor],
    z: Tensor,
    statistics: Tensor,
    training: bool,
    backend: str,
    dz: Tensor | None,
) -> list[Tensor]:
    """Of every entry of ys and of every one of xs; that of z goes to dz."""
    forward, backward = launchers(backend)
    maps, packed = unstacked(ys), forward.Statistics(*statistics.unbind())
    options = tile(backend, "gradient_sums", maps, len(xs))
    sums_of_z = None
    if backend == "triton" and dz is not None:
        dtype = accumulator(g.dtype)
        sums_of_z = dz if dz.dtype == dtype else torch.empty_like(dz, dtype=dtype)
        options["weights"] = sums_of_z
    sums = backward.mixed_sum_gradient_sums(g, maps, packed, xs, **options)
    through = sums if training else _no_sums(sums)
    dys = [empty_nhwc(g, y.shape) for y in ys]
    weights, plain = z[: len(maps)], z[len(maps) :]
    config = tile(backend, "gradients", maps, len(xs))
    _, dxs = backward.mixed_sum_grad(
        g, maps, weights, packed, through, plain, dys=unstacked(dys), **config
    )
    if dz is not None and sums_of_z is not dz:
        dz.copy_(_sums_over_channels(sums) if sums_of_z is None else sums_of_z)
    return [*dys, *dxs]


def _sums_over_channels(sums: Any) -> Tensor:
    """Of the products with every map: what Triton's kernel gives by itself."""
    if len(sums.plain) == 0:
        return sums.normalised.sum(1)
    return torch.cat((sums.normalised, sums.plain)).sum(1)


def _no_sums(sums: Any) -> Any:
    """Running statistics do not depend on the maps: no gradient passes through them."""
    zeros = (torch.zeros_like(total) for total in (sums.gradient, sums.normalised, sums.plain))
    return type(sums)(*zeros)


@mixed_sum_backward.register_fake
def _(
    g: Tensor,
    ys: list[Tensor],
    xs: list[Tensor],
    z: Tensor,
    statistics: Tensor,
    training: bool,
    with_z: bool,
    backend: str,
) -> list[Tensor]:
    gradients = [empty_nhwc(g, x.shape) for x in (*ys, *xs)]
    return [*gradients, torch.empty_like(z)] if with_z else gradients


@mixed_sum_backward_beside.register_fake
def _(
    g: Tensor,
    ys: list[Tensor],
    xs: list[Tensor],
    z: Tensor,
    statistics: Tensor,
    training: bool,
    backend: str,
    dz: Tensor,
) -> list[Tensor]:
    return [empty_nhwc(g, x.shape) for x in (*ys, *xs)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ys, xs, z, statistics, ctx.training, ctx.backend = inputs
    ctx.counts = (len(ys), len(xs))
    ctx.save_for_backward(*ys, *xs, z, statistics)


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    *maps, z, statistics = ctx.saved_tensors
    ys, xs = maps[: ctx.counts[0]], maps[ctx.counts[0] :]
    with_z = ctx.needs_input_grad[2]
    gradients = mixed_sum_backward(
        nhwc(g), ys, xs, z, statistics, ctx.training, with_z, ctx.backend
    )
    dys, dxs = gradients[: len(ys)], gradients[len(ys) : len(maps)]
    return dys, dxs, gradients[-1] if with_z else None, None, None, None


mixed_sum.register_autograd(_backward, setup_context=_keep)
NORMALISED = {
    backend: Implementation(partial(run_normalised, backend), partial(refuse_normalised, backend))
    for backend in ("triton", "cuda")
}
