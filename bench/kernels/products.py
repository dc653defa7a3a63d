"""Nodes as products of depthwise maps in Triton: `python -m bench.kernels.products`.

For the nodes of a cell that two and three edges end in and for one of the fusion cell, without raw
maps beside: forward with the statistics, backward with all gradients. Stock multiplies the maps out
and calls PyTorch's batch norms. Floors, in maps, of K products: 2 K + 1 forward, 3 K + 2 backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device import DEVICE, LAYOUTS
from bench.kernels.command import main
from bench.kernels.comparison import Binding, Comparison, Family, Part, Sweep
from bench.kernels.keys import case_of_key
from bench.kernels.shapes import FUSION_CHANNELS, INPUTS, Shape, at_stride, cell_shapes
from bench.kernels.timing import Call, gate
from lgcnet_fast.kernels.covariance import CovarianceConfig, covariance
from lgcnet_fast.kernels.product_algebra import (
    ProductCoefficients,
    ProductWeights,
    product_coefficients,
    product_weights,
)
from lgcnet_fast.kernels.product_gradients import (
    InputGradientsConfig,
    ProductSumsConfig,
    product_input_gradients,
    product_sums,
)
from lgcnet_fast.kernels.product_sum import ProductSumConfig, product_sum
from lgcnet_fast.ops.tuning import shape_key

TWO_EDGES, THREE_EDGES, FUSION = 8, 12, 5
"""Products of a node."""
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    shape: Shape
    """Of the depthwise maps."""
    products: int
    out_channels: int
    raw: int = 0
    plain: int = 0
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{shape} to {self.out_channels} K{self.products} {dtype}"

    @property
    def positions(self) -> int:
        return self.shape[0] * self.shape[2] * self.shape[3]

    @property
    def map_bytes(self) -> int:
        """Of all depthwise maps."""
        return self.products * self.positions * self.shape[1] * self.dtype.itemsize

    @property
    def out_bytes(self) -> int:
        """Of a raw or plain map, and of the sum."""
        return self.positions * self.out_channels * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    ds: list[Tensor]
    ys: list[Tensor]
    xs: list[Tensor]
    g: Tensor
    matrices: Tensor
    z: Tensor
    """Of products, raw and plain maps."""
    of_raw: Tensor
    """Statistics of the ys, (3, R, C_out)."""
    mean: Tensor
    covariance: Tensor
    weights: ProductWeights
    coefficients: ProductCoefficients


def make_inputs(case: Case) -> Inputs:
    images, channels, height, width = case.shape

    def maps(count: int, channels: int) -> list[Tensor]:
        shape = (images, height, width, channels)
        values = [torch.randn(shape, device=DEVICE, dtype=case.dtype) for _ in range(count)]
        return [value.movedim(-1, 1) for value in values]

    ds, (g,) = maps(case.products, channels), maps(1, case.out_channels)
    shape = (case.products, case.out_channels, channels)
    matrices = (torch.randn(shape, device=DEVICE) / channels**0.5).to(case.dtype)
    z = torch.rand(case.products + case.raw + case.plain, device=DEVICE)
    mean, matrix = covariance(ds)
    own = z[: case.products]
    weights = product_weights(mean, matrix, matrices, own, EPS)
    coefficients = product_coefficients(
        *product_sums(g, ds), mean, matrix, matrices, weights.statistics, own, case.positions
    )
    ys, xs = maps(case.raw, case.out_channels), maps(case.plain, case.out_channels)
    of_raw = torch.rand(3, case.raw, case.out_channels, device=DEVICE)
    return Inputs(ds, ys, xs, g, matrices, z, of_raw, mean, matrix, weights, coefficients)


def cases(part: Part) -> Iterator[Case]:
    if part == "dry":
        yield Case((2, 4, 3, 5), 2, 6)
        return
    for size, batch in INPUTS.items() if part == "full" else [((256, 512), 16)]:
        for shape in cell_shapes(size):
            for products in (TWO_EDGES, THREE_EDGES):
                yield Case(shape, products, shape[1])
        shape = (batch, FUSION_CHANNELS, *at_stride(size, 4))
        yield Case(shape, FUSION, FUSION_CHANNELS)


def forward(i: Inputs) -> Tensor:
    own = i.z[: len(i.ds)]
    weights = product_weights(*covariance(i.ds), i.matrices, own, EPS)
    return sum_alone(replace(i, weights=weights))


def sum_alone(i: Inputs, config: ProductSumConfig | None = None) -> Tensor:
    maps = (i.ds, i.weights.weights, i.weights.shift, i.ys, i.of_raw, i.xs)
    return product_sum(*maps, i.z[len(i.ds) :], config)


def backward(i: Inputs) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of maps, weights z and matrices."""
    known = (i.mean, i.covariance, i.matrices, i.weights.statistics, i.z[: len(i.ds)])
    found = product_coefficients(*product_sums(i.g, i.ds), *known, i.g.numel() // i.g.shape[1])
    dds = input_gradients(replace(i, coefficients=found))
    return dds, found.weight_gradients, found.matrix_gradients


def input_gradients(i: Inputs, config: InputGradientsConfig | None = None) -> list[Tensor]:
    found = i.coefficients
    through = (found.from_gradient, found.from_map, found.shift)
    return product_input_gradients(i.g, i.ds, *through, config=config)


def stock_sum(ds: Sequence[Tensor], matrices: Tensor, z: Tensor) -> Tensor:
    def term(k: int) -> Tensor:
        y = F.conv2d(ds[k], matrices[k, ..., None, None])
        return z[k] * F.batch_norm(y, None, None, training=True)

    out = term(0)
    for k in range(1, len(ds)):
        out = out + term(k)
    return out


def check_forward(i: Inputs) -> None:
    truth = stock_sum([d.double() for d in i.ds], i.matrices.double(), i.z.double())
    gate("sum of products", forward(i), truth, factor=2)


def check_backward(i: Inputs) -> None:
    ds = [d.double().requires_grad_() for d in i.ds]
    matrices, z = (leaf.double().requires_grad_() for leaf in (i.matrices, i.z))
    out = stock_sum(ds, matrices, z)
    *truths, matrix_truth, z_truth = torch.autograd.grad(out, [*ds, matrices, z], i.g.double())
    dds, dz, d_matrices = backward(i)
    for number, (found, truth) in enumerate(zip(dds, truths, strict=True)):
        gate(f"gradient of map {number}", found, truth, factor=2)
    gate("gradient of the matrices", d_matrices, matrix_truth, factor=10)
    # The terms of dz cancel: compare with their size, not with their sum.
    if not (dz - z_truth).abs().max() <= 1e-2 * i.g.numel() ** 0.5:
        raise SystemExit("WRONG RESULT: gradient of the weights of a sum of products")


def _stock(layout: torch.memory_format, gradients: bool) -> Binding:
    """The sum in PyTorch, with its gradients if asked for: both, since they share a capture."""

    def bind(i: Inputs) -> Call:
        ds = [d.contiguous(memory_format=layout) for d in i.ds]
        g, z = i.g.contiguous(memory_format=layout), i.z.to(i.g.dtype)

        def run() -> Any:
            if not gradients:
                return stock_sum(ds, i.matrices, z)
            leaves = [leaf.detach().requires_grad_() for leaf in (*ds, i.matrices, z)]
            out = stock_sum(leaves[:-2], leaves[-2], leaves[-1])
            return torch.autograd.grad(out, leaves, g)

        return run

    return bind


def comparisons(part: Part) -> Iterator[Comparison]:
    alone = {name: _stock(layout, gradients=False) for name, layout in LAYOUTS.items()}
    both = {name: _stock(layout, gradients=True) for name, layout in LAYOUTS.items()}
    for case in cases(part):
        product = 2 * case.positions * case.products * case.shape[1] * case.out_channels
        parts: list[tuple[str, Callable[[Inputs], Any], Callable[[Inputs], None], int, int]] = [
            ("forward", forward, check_forward, 2 * case.map_bytes + case.out_bytes, 2),
            ("backward", backward, check_backward, 3 * case.map_bytes + 2 * case.out_bytes, 3),
        ]
        for name, ours, check, moved, multiplied in parts:
            yield Comparison(
                operation=f"products {name}",
                case=str(case),
                bytes=moved,
                operations=multiplied * product,
                make=lambda case=case: make_inputs(case),
                check=check,
                ours=ours,
                stock=both if name == "backward" else alone,
                stock_excess=alone if name == "backward" else {},
            )


def _products(case: Case) -> str:
    return shape_key(case.dtype, case.shape, (case.products, case.out_channels))


def _with_others(case: Case) -> str:
    maps = (case.products, case.out_channels)
    return shape_key(case.dtype, case.shape, maps, (case.raw, case.plain))


def _maps(case: Case) -> str:
    return shape_key(case.dtype, case.shape, (case.products,))


def _sums_default(case: Case) -> ProductSumsConfig:
    sizes = (case.products, case.positions, case.shape[1], case.out_channels)
    return ProductSumsConfig.default(*sizes, case.dtype)


def _gradients_default(case: Case) -> InputGradientsConfig:
    sizes = (case.products, case.positions, case.shape[1], case.out_channels)
    return InputGradientsConfig.default(*sizes, case.dtype)


@dataclass(frozen=True)
class Launch:
    """One that the tuning table has tiles of."""

    key_of: Callable[[Case], str]
    default: Callable[[Case], Any]
    tried: Sequence[dict[str, int]]
    """In place of the fields of the default."""
    bytes: Callable[[Case], int]
    run: Callable[[Inputs, Any], Any]


LAUNCHES = {
    "product_statistics": Launch(
        _maps,
        lambda case: CovarianceConfig.default(case.shape[1], case.dtype),
        [
            *({"programs": programs} for programs in (132, 264, 528)),
            *({"stages": stages} for stages in (3, 4)),
            {"warps": 8},
            {"block_m": 64},
        ],
        lambda case: case.map_bytes,
        lambda i, config: covariance(i.ds, config),
    ),
    "product_sum": Launch(
        _with_others,
        lambda case: ProductSumConfig.default(case.shape[1], case.out_channels, case.dtype),
        [
            {"block_m": 64},
            {"block_m": 128},
            {"block_m": 128, "warps": 8},
            {"warps": 8},
            {"stages": 3},
            {"stages": 4},
            {"block_m": 64, "warps": 2},
        ],
        lambda case: case.map_bytes + (case.raw + case.plain + 1) * case.out_bytes,
        sum_alone,
    ),
    "product_sums": Launch(
        _products,
        _sums_default,
        [
            {"programs": 24},
            {"programs": 52},
            {"programs": 104},
            {"maps": 1},
            {"maps": 2},
            {"stages": 4},
            {"block_m": 64},
        ],
        lambda case: case.map_bytes + case.out_bytes,
        lambda i, config: product_sums(i.g, i.ds, config),
    ),
    "product_input_gradients": Launch(
        _products,
        _gradients_default,
        [
            {"programs": 16},
            {"programs": 32},
            {"programs": 96},
            {"stages": 2},
            {"stages": 4},
            {"warps": 8},
            {"block_m": 128, "warps": 8},
        ],
        lambda case: 2 * case.map_bytes + case.out_bytes,
        input_gradients,
    ),
}
"""By operation of the tuning table."""


def sweep(operation: str, key: str) -> Sweep:
    launch = LAUNCHES[operation]

    def read(dtype: torch.dtype, shape: Any, maps: Any, others: Any = (0, 0)) -> Case:
        products, *rows = maps
        raw, plain = others
        return Case(shape, products, rows[0] if rows else shape[1], raw, plain, dtype)

    case = case_of_key(key, read, launch.key_of)
    default = launch.default(case)
    return Sweep(
        operation=operation,
        key=launch.key_of(case),
        bytes=launch.bytes(case),
        make=lambda: make_inputs(case),
        run=launch.run,
        configs=[default, *(replace(default, **changes) for changes in launch.tried)],
    )


FAMILY = Family("products", comparisons, swept={name: partial(sweep, name) for name in LAUNCHES})

if __name__ == "__main__":
    main(FAMILY)
