"""Kernels of the inference engine against float64: every kind of term, products, stem, pooling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.kernels.infer_pool import run_pool_product, run_pool_sums
from lgcnet_fast.kernels.infer_stem import StemConfig, run_stem
from lgcnet_fast.kernels.infer_tile import (
    MapView,
    TileConfig,
    TileProduct,
    TileTerm,
    run_tile,
)
from tests.combinations import some_combinations

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Of the largest value; operands and results are rounded to the storage dtype, sums are float32."""
CONFIG = TileConfig(rows=4, columns=8, block_k=32, warps=4)
CANARIES = 32


class Case:
    """Random maps and weights on a device, with the float64 values that the kernels see."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator) * scale
        return values.to(self.dtype).to(self.device)

    def map(self, batch: int, size: tuple[int, int], channels: int) -> tuple[MapView, Tensor]:
        """A map whose pixels are padded with NaN, and its values (N, C, H, W) in float64."""
        pitch = -(-channels // 8) * 8 + 8
        values = self.random(batch, *size, channels)
        data = torch.full((batch, *size, pitch), torch.nan, dtype=self.dtype, device=self.device)
        data[..., :channels] = values
        view = MapView(data.flatten(), *size, channels, pitch)
        return view, values.double().permute(0, 3, 1, 2)

    def empty(self, batch: int, size: tuple[int, int], channels: int) -> MapView:
        """NaN, with as much behind it."""
        pitch = -(-channels // 8) * 8
        elements = batch * size[0] * size[1] * pitch + CANARIES
        data = torch.full((elements,), torch.nan, dtype=self.dtype, device=self.device)
        return MapView(data, *size, channels, pitch)

    def bias(self, channels: int) -> Tensor:
        return torch.randn(channels, generator=self.generator).to(self.device)

    def check(self, out: MapView, expected: Tensor) -> None:
        """out: written whole, and nothing else written."""
        batch = len(expected)
        elements = batch * out.height * out.width * out.pitch
        assert out.data[elements:].isnan().all()
        maps = out.data[:elements].view(batch, out.height, out.width, out.pitch)
        assert maps[..., out.channels :].isnan().all()
        found = maps[..., : out.channels].permute(0, 3, 1, 2).double()
        scale = float(expected.abs().max().clamp(min=1))
        assert float((found - expected).abs().max()) <= TOLERANCE[self.dtype] * scale


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def case(request: pytest.FixtureRequest, device: torch.device) -> Case:
    return Case(device, request.param)


@pytest.fixture
def exact(device: torch.device) -> Case:
    return Case(device)


def rows_of(weight: Tensor) -> Tensor:
    """(c_out, c_in, k, k) as the kernels read it."""
    return weight.permute(2, 3, 1, 0).reshape(-1, len(weight)).contiguous()


def run_one(case: Case, term: TileTerm, size: tuple[int, int], channels: int) -> MapView:
    out = case.empty(2, size, channels)
    zero = torch.zeros(channels, device=case.device)
    run_tile([term], zero, out, [], size, 2, case.dtype, CONFIG)
    return out


def half(length: int, stride: int) -> int:
    return -(-length // stride)


# -- terms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 17, 48])
def test_copy(case: Case, channels: int) -> None:
    source, x = case.map(2, (5, 9), channels)
    case.check(run_one(case, TileTerm("copy", source), (5, 9), channels), x)


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (4, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_pool(exact: Case, size: tuple[int, int], stride: int) -> None:
    source, x = exact.map(2, size, 17)
    expected = F.max_pool2d(x, 3, stride, padding=1)
    out = run_one(exact, TileTerm("pool", source, stride=stride), tuple(expected.shape[2:]), 17)
    exact.check(out, expected)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 4), (2, 1), (2, 3), (1, 12)])
@pytest.mark.parametrize(("c_in", "c_out"), [(17, 3), (48, 40)])
def test_separable(exact: Case, stride: int, dilation: int, c_in: int, c_out: int) -> None:
    check_separable(exact, stride, dilation, c_in, c_out)


def test_separable_in_storage_dtypes(case: Case) -> None:
    check_separable(case, stride=2, dilation=2, c_in=40, c_out=24)


def check_separable(case: Case, stride: int, dilation: int, c_in: int, c_out: int) -> None:
    size = (7, 9)
    source, x = case.map(2, size, c_in)
    depthwise, pointwise = case.random(c_in, 1, 3, 3), case.random(c_out, c_in, scale=c_in**-0.5)
    filtered = F.conv2d(x.relu(), depthwise.double(), None, stride, dilation, dilation, c_in)
    expected = F.conv2d(filtered, pointwise.double()[:, :, None, None])
    term = TileTerm(
        "separable",
        source,
        pointwise.t().contiguous(),
        depthwise.flatten(1).t().float().contiguous(),
        stride,
        dilation,
    )
    size = (half(7, stride), half(9, stride))
    case.check(run_one(case, term, size, c_out), expected)


@pytest.mark.parametrize(
    ("side", "stride", "dilation"), [(1, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 6)]
)
@pytest.mark.parametrize("relu", [True, False])
def test_convolution(exact: Case, side: int, stride: int, dilation: int, relu: bool) -> None:
    check_convolution(exact, side, stride, dilation, relu)


def test_convolution_in_storage_dtypes(case: Case) -> None:
    check_convolution(case, side=3, stride=2, dilation=1, relu=True)


def check_convolution(case: Case, side: int, stride: int, dilation: int, relu: bool) -> None:
    source, x = case.map(2, (5, 9), 40)
    weight = case.random(17, 40, side, side, scale=(40 * side**2) ** -0.5)
    r = x.relu() if relu else x
    expected = F.conv2d(r, weight.double(), None, stride, dilation * (side // 2), dilation)
    term = TileTerm("convolution", source, rows_of(weight), None, stride, dilation, side, relu)
    case.check(run_one(case, term, (half(5, stride), half(9, stride)), 17), expected)


@pytest.mark.parametrize("size", [(1, 1), (6, 9), (5, 4)])
def test_interleaved(exact: Case, size: tuple[int, int]) -> None:
    source, x = exact.map(2, size, 20)
    even, odd = exact.random(8, 20, 1, 1), exact.random(9, 20, 1, 1)
    shifted = F.pad(x.relu(), (-1, 1, -1, 1))
    expected = torch.cat(
        [F.conv2d(y, w.double(), stride=2) for y, w in ((x.relu(), even), (shifted, odd))], dim=1
    )
    weight = torch.block_diag(even[:, :, 0, 0].t(), odd[:, :, 0, 0].t())
    term = TileTerm("interleaved", source, weight, stride=2)
    exact.check(run_one(exact, term, tuple(expected.shape[2:]), 17), expected)


@pytest.mark.parametrize("beyond", [(0, 0), (1, 0), (0, 1)])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_transposed(exact: Case, size: tuple[int, int], beyond: tuple[int, int]) -> None:
    source, x = exact.map(2, size, 20)
    weight = exact.random(20, 17, 3, 3, scale=0.1)
    expected = F.conv_transpose2d(
        x.relu(), weight.double(), None, 2, padding=1, output_padding=beyond
    )
    term = TileTerm("transposed", source, rows_of(weight.transpose(0, 1)), side=3)
    exact.check(run_one(exact, term, tuple(expected.shape[2:]), 17), expected)


@pytest.mark.parametrize(("size", "target"), [((3, 5), (5, 9)), ((1, 1), (3, 4)), ((4, 3), (7, 1))])
def test_resized(case: Case, size: tuple[int, int], target: tuple[int, int]) -> None:
    source, x = case.map(2, size, 20)
    expected = F.interpolate(x, target, mode="bilinear", align_corners=True)
    case.check(run_one(case, TileTerm("resized", source), target, 20), expected)


def test_resized_product(case: Case) -> None:
    source, x = case.map(2, (3, 4), 20)
    weight = case.random(17, 20, 1, 1, scale=0.2)
    large = F.interpolate(x, (5, 7), mode="bilinear", align_corners=True)
    expected = F.conv2d(large.relu(), weight.double())
    term = TileTerm("resized_product", source, rows_of(weight))
    case.check(run_one(case, term, (5, 7), 17), expected)


# -- nodes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [True, False])
def test_a_node_and_its_products(case: Case, stored: bool) -> None:
    size, channels = (5, 9), 24
    (first, x), (second, y), (part, a) = (case.map(2, size, c) for c in (24, 40, 20))
    weight = case.random(channels, 40, 3, 3, scale=0.05)
    bias = case.bias(channels)
    node = x + F.conv2d(y.relu(), weight.double(), bias.double(), padding=1)
    terms = [
        TileTerm("copy", first),
        TileTerm("convolution", second, rows_of(weight), side=3),
    ]
    products, expected = [], []
    for c_out, parts, values in ((17, (), []), (48, (part,), [a])):
        joined = torch.cat([node, *values], dim=1).relu()
        w, b = case.random(c_out, joined.shape[1], 1, 1, scale=0.2), case.bias(c_out)
        expected.append(F.conv2d(joined, w.double(), b.double()))
        products.append(TileProduct(parts, rows_of(w), b, case.empty(2, size, c_out)))
    out = case.empty(2, size, channels) if stored else None
    run_tile(terms, bias, out, products, size, 2, case.dtype, CONFIG)
    if out is not None:
        case.check(out, node)
    for product, value in zip(products, expected, strict=True):
        case.check(product.out, value)


def test_other_terms_and_products_beside_a_transposed_convolution(case: Case) -> None:
    """Over several tiles, of all four parities."""
    size, channels = (11, 19), 20
    (small, x), (same, y), (part, a) = (
        case.map(1, *map_size) for map_size in (((6, 10), 24), (size, channels), (size, 16))
    )
    weight, bias = case.random(24, channels, 3, 3, scale=0.1), case.bias(channels)
    depthwise = case.random(channels, 1, 3, 3, scale=0.3).float()
    pointwise = case.random(channels, channels, 1, 1, scale=0.2)
    filtered = F.conv2d(y.relu(), depthwise.double(), padding=3, dilation=3, groups=channels)
    node = (
        F.conv_transpose2d(x.relu(), weight.double(), bias.double(), 2, padding=1)
        + F.interpolate(x[:, :channels], size, mode="bilinear", align_corners=True)
        + F.conv2d(filtered, pointwise.double())
    )
    cut = MapView(small.data, small.height, small.width, channels, small.pitch)
    terms = [
        TileTerm("transposed", small, rows_of(weight.transpose(0, 1)), side=3),
        TileTerm("resized", cut),
        TileTerm(
            "separable", same, rows_of(pointwise), depthwise.flatten(1).t().contiguous(), dilation=3
        ),
    ]
    joined = torch.cat([node, a], dim=1).relu()
    w, b = case.random(17, joined.shape[1], 1, 1, scale=0.2), case.bias(17)
    product = TileProduct((part,), rows_of(w), b, case.empty(1, size, 17))
    out = case.empty(1, size, channels)
    run_tile(terms, bias, out, [product], size, 1, case.dtype, CONFIG)
    case.check(out, node)
    case.check(product.out, F.conv2d(joined, w.double(), b.double()))


def test_a_node_of_nothing_is_its_bias(exact: Case) -> None:
    bias, out = exact.bias(17), exact.empty(2, (3, 5), 17)
    run_tile([], bias, out, [], (3, 5), 2, exact.dtype, CONFIG, relu_out=True)
    exact.check(out, bias.double().relu().view(1, -1, 1, 1).expand(2, -1, 3, 5))


def test_class_rows(case: Case) -> None:
    """Logits as rows of float32 (N, h, classes, pitch), from the node and from a product."""
    source, x = case.map(2, (3, 5), 20)
    weight = case.random(7, 20, 1, 1)
    bias, w = case.bias(7), rows_of(weight)
    expected = F.conv2d(x.relu(), weight.double(), bias.double())

    def rows() -> MapView:
        data = torch.full((2 * 3 * 7 * 32,), torch.nan, device=case.device)
        return MapView(data, 3, 5, 7, 32, class_rows=True)

    def check(out: MapView) -> None:
        found = out.data.view(2, 3, 7, 32)
        assert found[..., 5:].isnan().all()
        scale = float(expected.abs().max())
        difference = found[..., :5].transpose(1, 2) - expected
        assert float(difference.abs().max()) <= TOLERANCE[case.dtype] * scale

    alone, product = rows(), rows()
    run_tile([TileTerm("convolution", source, w)], bias, alone, [], (3, 5), 2, case.dtype, CONFIG)
    check(alone)
    zero = torch.zeros(20, device=case.device)
    products = [TileProduct((), w, bias, product)]
    run_tile([TileTerm("copy", source)], zero, None, products, (3, 5), 2, case.dtype, CONFIG)
    check(product)


def test_the_tile_does_not_matter_and_reruns_give_the_same_bits(exact: Case) -> None:
    source, x = exact.map(1, (7, 9), 40)
    weight = exact.random(17, 40, 3, 3, scale=0.1)
    expected = F.conv2d(x.relu(), weight.double(), padding=1)
    term = TileTerm("convolution", source, rows_of(weight), side=3)
    zero = torch.zeros(17, device=exact.device)
    for rows, columns, block_k in ((4, 8, 32), (2, 8, 64), (8, 16, 16)):
        config = TileConfig(rows, columns, block_k, warps=4)
        first, second = (exact.empty(1, (7, 9), 17) for _ in range(2))
        for out in (first, second):
            run_tile([term], zero, out, [], (7, 9), 1, exact.dtype, config)
        exact.check(first, expected)
        assert same_bits(first.data, second.data)


def test_as_many_taps_at_once_as_one_likes(exact: Case) -> None:
    source, x = exact.map(1, (7, 9), 40)
    depthwise = exact.random(40, 1, 3, 3)
    pointwise = exact.random(17, 40, 1, 1, scale=0.2)
    filtered = F.conv2d(x.relu(), depthwise.double(), padding=2, dilation=2, groups=40)
    expected = F.conv2d(filtered, pointwise.double())
    term = TileTerm(
        "separable", source, rows_of(pointwise), depthwise.flatten(1).t().contiguous(), dilation=2
    )
    zero, outputs = torch.zeros(17, device=exact.device), []
    for taps in (3, 9):
        out = exact.empty(1, (7, 9), 17)
        config = TileConfig(2, 8, 64, warps=4, stages=3, taps=taps)
        run_tile([term], zero, out, [], (7, 9), 1, exact.dtype, config)
        exact.check(out, expected)
        outputs.append(out.data)
    assert same_bits(*outputs)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """NaN being equal to itself."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


# -- stem and pooling -----------------------------------------------------------------------------


@some_combinations("size, pixels", [(1, 1), (7, 10)], (torch.uint8, torch.float32))
@pytest.mark.parametrize("stride", [1, 2])
def test_stem(case: Case, size: tuple[int, int], pixels: torch.dtype, stride: int) -> None:
    image = torch.randint(0, 256, (2, *size, 3), generator=case.generator).to(pixels)
    mean = (10.0, 120.5, 99.25)
    weight = torch.randn(12, 3, 3, 3, generator=case.generator) / 100
    bias = case.bias(12)
    centred = (image.double() - torch.tensor(mean).double()).permute(0, 3, 1, 2)
    expected = F.conv2d(centred, weight.double(), bias.double().cpu(), stride, padding=1).relu()
    out = case.empty(2, tuple(expected.shape[2:]), 12)
    run_stem(
        image.to(case.device), rows_of(weight).to(case.device), bias, mean, out, stride, True,
        StemConfig(block=8),
    )  # fmt: skip
    case.check(out, expected.to(case.device))


@some_combinations("size, bins", [(1, 1), (5, 9), (7, 12)], (5, 1, 2))
def test_pooling(case: Case, size: tuple[int, int], bins: int) -> None:
    (first, x), (second, y) = case.map(2, size, 17), case.map(2, size, 24)
    weight = torch.randn(41, 20, generator=case.generator).to(case.device)
    bias = case.bias(20)
    pooled = F.adaptive_avg_pool2d(torch.cat([x, y], dim=1).relu(), bins)
    expected = F.conv2d(pooled, weight.double().t()[:, :, None, None], bias.double())
    strips = 2
    partial = torch.full((2, bins**2, strips, 41), torch.nan, device=case.device)
    run_pool_sums(first, 2, bins, partial, 0)
    run_pool_sums(second, 2, bins, partial, 17)
    out = case.empty(2, (bins, bins), 20)
    run_pool_product(partial, size, weight, bias, out)
    case.check(out, expected)
