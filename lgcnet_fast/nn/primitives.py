"""Building blocks of the candidate operations and of the fixed parts of the network.

`affine` is False in the supernet, where the weights Z scale each candidate, and True afterwards.
Convolutions in front of batch norm have no bias.

A candidate that ends in a batch norm has it as `norm`, and `raw` is all that comes before: a mixed
node takes both apart, to normalise and sum all its candidates at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TypeGuard, TypeVar, cast

from torch import Tensor, nn

from lgcnet_fast.nn.together import Part, Work, worked
from lgcnet_fast.ops import (
    Geometry,
    Recomputable,
    average_pools,
    concat_upsample_pointwise,
    convolutions,
    interleaved_convolution,
    max_pools,
    norm_sum,
    normalised,
    pair_readers,
    readers,
    recomputable,
    recomputes,
    rectified_convolutions,
    rectified_deconvolution,
    rectified_together,
    separable_branches,
    strided_convolutions,
    upsample,
)

T = TypeVar("T")


class Source:
    """A map that candidates read, with what several of them need of it, computed once."""

    def __init__(
        self, x: Tensor, beside: Tensor | None = None, only_rectified: bool = False
    ) -> None:
        """beside: where the map is concat(x, beside).

        only_rectified: every reader begins with a ReLU, and nobody else needs the map going back.
        """
        self.size = (x.shape[-2], x.shape[-1])
        if beside is None:
            self._readers = readers(x, only_rectified)
        else:
            self._readers = pair_readers(x, beside, only_rectified)
        self.recomputable: list[Recomputable] = []
        """Raw maps that a node need not keep."""

    def plain(self) -> Tensor:
        """The map, for one more reader."""
        return self._readers.plain()

    def rectified(self, function: Callable[[Tensor], T]) -> T:
        """A function of the ReLU that convolutions begin with."""
        return self._readers.rectified(function)

    def convolved(self, layers: Sequence[nn.Conv2d]) -> list[Tensor]:
        """What each layer makes of the ReLU, those that can be in one operation; no biases."""
        fused: dict[int, list[nn.Conv2d]] = {}
        strided: dict[int, list[nn.Conv2d]] = {}
        others: list[nn.Conv2d] = []
        for layer in layers:
            geometry = (layer.kernel_size[0], layer.stride[0], layer.padding[0], layer.dilation[0])
            if geometry == (3, 1, 1, 1) and self._readers.fuses(layer.out_channels):
                fused.setdefault(layer.out_channels, []).append(layer)
            elif geometry == (3, 2, 1, 1) and self._readers.strides(layer.weight):
                strided.setdefault(layer.out_channels, []).append(layer)
            else:
                others.append(layer)
        maps: dict[nn.Conv2d, Tensor] = {}
        for group in fused.values():
            found = rectified_convolutions(self.plain(), [layer.weight for layer in group])
            maps |= zip(group, found, strict=True)
        for group in strided.values():
            weights = [layer.weight for layer in group]
            found = self.rectified(partial(strided_convolutions, weights=weights))
            maps |= zip(group, found, strict=True)
        if others:
            found = rectified_together([self._readers] * len(others), partial(convolved, others))
            maps |= zip(others, found, strict=True)
        return [maps[layer] for layer in layers]

    def deconvolved(self, layer: nn.ConvTranspose2d, size: tuple[int, int]) -> Tensor:
        """What a 3x3 layer of stride 2 makes of the ReLU; it has no bias."""
        if self._readers.reads_itself and self._readers.strides(layer.weight):
            return rectified_deconvolution(self.plain(), layer.weight, size)
        return self.rectified(partial(layer, output_size=list(size)))

    def average(self, bins: Sequence[int]) -> None:
        """Fills `means` for the readers that pool the ReLU to so many bins, in one operation."""
        if self.averages_itself:
            found = average_pools(self.plain(), bins, relu=True)
        else:
            found = self.rectified(partial(average_pools, bins=bins))
        self.means.update(zip(bins, found, strict=True))

    @property
    def averages_itself(self) -> bool:
        """Whether `average` reads the map, so that it need not be where its ReLU is made."""
        return self._readers.reads_itself

    def rectify(self) -> tuple[Tensor, list[Recomputable]]:
        """The ReLU that convolutions begin with, for one reader, who keeps it `recomputed`."""
        return self._readers.rectify()

    def cheap(self, raw: Recomputable) -> Tensor:
        """A raw map that is cheaper to compute again than to keep."""
        if recomputes(raw[0]):
            self.recomputable.append(raw)
        return raw[0]

    @cached_property
    def pooled(self) -> dict[int, list[Tensor]]:
        """By stride, filled by `PoolBN`: for one reader each."""
        return {}

    @cached_property
    def means(self) -> dict[int, Tensor]:
        """Average-pooled maps by the number of bins, each for one reader."""
        return {}


class ReLUConvBN(nn.Sequential):
    """ReLU, k x k convolution, batch norm: (N, c_in, H, W) -> (N, c_out, ceil(H / stride), ...)."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 1,
        stride: int = 1,
        dilation: int = 1,
        affine: bool = True,
    ) -> None:
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(
                c_in,
                c_out,
                kernel,
                stride=stride,
                padding=dilation * (kernel // 2),
                dilation=dilation,
                bias=False,
            ),
            nn.BatchNorm2d(c_out, affine=affine),
        )

    @property
    def layer(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self[1])

    @property
    def norm(self) -> nn.Module:
        return self[2]

    def raw(self, source: Source) -> Tensor:
        return source.rectified(self[1])

    def forward(self, x: Tensor | Source) -> Tensor:
        return _norm_of(self.norm, self.raw(source_of(x)))

    def of_rectified(self, x: Tensor) -> Tensor:
        """`forward`, from the ReLU on."""
        return _norm_of(self.norm, *raw_convolutions([self], [x]))

    def of_concatenation(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """`forward` of `concat_upsample(maps, size)`; for modules that `is_pointwise` names."""
        return _norm_of(self.norm, concat_upsample_pointwise(maps, size, self[1].weight))


def is_pointwise(module: nn.Module) -> TypeGuard[ReLUConvBN]:
    """Whether it is a 1x1 convolution of stride 1, with its ReLU and batch norm."""
    if not isinstance(module, ReLUConvBN):
        return False
    layer = module.layer
    return layer.kernel_size == (1, 1) and layer.stride == (1, 1)


def raw_convolutions(modules: Sequence[ReLUConvBN], rectified: Sequence[Tensor]) -> list[Tensor]:
    """What the norms of the modules receive; rectified: the ReLU that each begins with."""
    return convolved([module.layer for module in modules], rectified)


def convolved(layers: Sequence[nn.Conv2d], maps: Sequence[Tensor]) -> list[Tensor]:
    """What each layer makes of its own map, side by side; none has a bias."""
    geometries = [
        Geometry(layer.stride[0], cast(int, layer.padding[0]), layer.dilation[0])
        for layer in layers
    ]
    return convolutions(maps, [layer.weight for layer in layers], geometries)


def applied_together(
    modules: Sequence[ReLUConvBN], inputs: Sequence[Tensor | Source]
) -> list[Tensor]:
    """What each module makes of its own input, side by side."""
    works = []
    for module, x in zip(modules, inputs, strict=True):
        rectified, ways = source_of(x).rectify()
        part = Part(lambda x, module=module: [module.of_rectified(x)], [rectified], [module])
        works.append(Work(part, ways))
    return [y for (y,) in worked(works)]


class PoolBN(nn.Sequential):
    """3x3 max pooling and batch norm: (N, C, H, W) -> (N, C, ceil(H / stride), ...)."""

    def __init__(self, channels: int, stride: int, affine: bool = True) -> None:
        super().__init__(
            nn.MaxPool2d(3, stride=stride, padding=1), nn.BatchNorm2d(channels, affine=affine)
        )
        self.stride = stride

    @property
    def norm(self) -> nn.Module:
        return self[1]

    def raw(self, source: Source) -> Tensor:
        left = source.pooled.setdefault(self.stride, [])
        if not left:
            maps, again = max_pools(source.plain(), self.stride)
            if again is not None:
                source.cheap((maps[0], again))
            left += maps
        return left.pop()


class DepthwiseSeparable(nn.Module):
    """ReLU, depthwise 3x3, pointwise 1x1, batch norm."""

    def __init__(
        self, c_in: int, c_out: int, stride: int = 1, dilation: int = 1, affine: bool = True
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            c_in,
            c_in,
            3,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            groups=c_in,
            bias=False,
        )
        self.pointwise = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.norm = nn.BatchNorm2d(c_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return _norm_of(self.norm, self.raw(x))

    def raw(self, x: Tensor) -> Tensor:
        """What the norm receives: a map, or a stack of a single one."""
        weights = [self.depthwise.weight], [self.pointwise.weight]
        layer = self.depthwise
        ((y,),) = separable_branches(x, *weights, (layer.dilation[0],), layer.stride[0])
        return cast(Tensor, y)


class SeparablePair(nn.Sequential):
    """Two depthwise-separable stages, the second of stride 1."""

    def __init__(self, channels: int, stride: int, affine: bool = True) -> None:
        super().__init__(
            DepthwiseSeparable(channels, channels, stride, affine=affine),
            DepthwiseSeparable(channels, channels, affine=affine),
        )

    def stages(self) -> tuple[DepthwiseSeparable, DepthwiseSeparable]:
        first, second = self
        assert isinstance(first, DepthwiseSeparable) and isinstance(second, DepthwiseSeparable)
        return first, second

    @property
    def norm(self) -> nn.Module:
        return self.stages()[1].norm

    def second(self, y: Tensor) -> Tensor:
        """What the norm receives; y: what that of the first stage receives."""
        first, second = self.stages()
        return second.raw(_norm_of(first.norm, y))


class FactorizedReduce(nn.Module):
    """ReLU, two 1x1 convolutions of stride 2 on interleaved pixels, concatenation, batch norm.

    The second convolution sees the input shifted by one pixel. A zero row and column are appended
    first, so that odd sizes give two maps of the same size: n -> ceil(n / 2).
    """

    def __init__(self, c_in: int, c_out: int, affine: bool = True) -> None:
        super().__init__()
        self.even = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(c_in, c_out - c_out // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(c_out, affine=affine)

    def convolved(self, x: Tensor) -> Tensor:
        """What the norm receives; x: the ReLU of the input."""
        return interleaved_convolution(x, even=self.even.weight, odd=self.odd.weight)

    def raw(self, source: Source) -> Tensor:
        return source.rectified(self.convolved)

    def of_rectified(self, x: Tensor) -> Tensor:
        """`forward`, from the ReLU on."""
        return _norm_of(self.norm, self.convolved(x))

    def forward(self, x: Tensor | Source) -> Tensor:
        return _norm_of(self.norm, self.raw(source_of(x)))


class GlobalPool(nn.Module):
    """ReLU, average pooling to k x k, 1x1 convolution, upsampling back, batch norm.

    Batch norm follows the upsampling so that batch statistics exist for k = 1. At inference it
    still folds into the convolution exactly, because bilinear weights sum to 1.
    """

    def __init__(self, c_in: int, c_out: int, bins: int, affine: bool = True) -> None:
        super().__init__()
        self.bins = bins
        self.conv = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.norm = nn.BatchNorm2d(c_out, affine=affine)

    def raw(self, source: Source) -> Tensor:
        if self.bins not in source.means:
            source.average([self.bins])
        small = self.conv(source.means.pop(self.bins))
        return source.cheap(recomputable(partial(upsample, size=source.size), small))

    def forward(self, x: Tensor) -> Tensor:
        return _norm_of(self.norm, self.raw(Source(x)))


class Interpolate(nn.Module):
    """Bilinear upsampling with aligned corners to an explicit size."""

    norm = None

    def raw(self, source: Source, size: tuple[int, int]) -> Tensor:
        return source.cheap(recomputable(partial(upsample, size=size), source.plain()))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return upsample(x, size)


class Deconvolution(nn.Module):
    """ReLU, transposed 3x3 convolution, batch norm: n -> 2n - 1 or 2n, as `size` says."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels, affine=affine)

    def raw(self, source: Source, size: tuple[int, int]) -> Tensor:
        return source.deconvolved(self.conv, size)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return _norm_of(self.norm, self.raw(Source(x), size))


def source_of(x: Tensor | Source) -> Source:
    """That of a map which several modules read, or one for a single reader."""
    return x if isinstance(x, Source) else Source(x)


def _norm_of(norm: nn.Module, y: Tensor) -> Tensor:
    """norm(y), where y is a map or a stack of a single one."""
    if norm.affine:
        return norm_sum([y], [norm])
    return normalised([y], norm, lambda x: x)
