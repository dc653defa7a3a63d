"""Depthwise convolutions behind batch norms and ReLUs of several edges against float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lgcnet_fast.kernels.depthwise import ForwardConfig
from lgcnet_fast.kernels.depthwise_weight_grad import WeightGradConfig
from lgcnet_fast.kernels.mixed_sum import TileConfig
from lgcnet_fast.kernels.normalised_depthwise import (
    default_backward,
    default_forward,
    norm_gradients,
    normalised_depthwise,
    normalised_depthwise_backward,
)
from tests.combinations import some_combinations
from tests.kernels.test_depthwise import assert_close, random_map

SHAPES = [(1, 3, 1, 1), (2, 1, 3, 5), (1, 17, 9, 6), (2, 8, 12, 4)]
LARGE = [(2, 48, 49, 97), (2, 255, 49, 97), (16, 128, 16, 32)]
SHAPES += LARGE if torch.cuda.is_available() else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES_AND_DTYPES = some_combinations("shape, dtype", SHAPES, DTYPES)


class Inputs(NamedTuple):
    """About a quarter of the outputs of the ReLUs is zero."""

    xs: list[Tensor]
    weights: Tensor
    norm: tuple[Tensor, Tensor]
    dys: list[Tensor]

    @classmethod
    def of(
        cls,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        edges: int = 2,
        mean: float = 0.5,
    ) -> Inputs:
        torch.manual_seed(0)
        options: Any = {"device": device, "dtype": dtype}
        options["dtype"] = torch.float64 if dtype == torch.float64 else torch.float32
        means = mean + torch.randn(edges, shape[1], **options)
        xs = []
        for own in means:
            x = random_map(shape, torch.float64, device) + 0.6 + own.double()[:, None, None]
            xs.append(x.to(dtype).contiguous(memory_format=torch.channels_last))
        r = 0.5 + torch.rand(edges, shape[1], **options)
        weights = torch.randn(edges, 3, 3, shape[1], **options)
        return cls(xs, weights, (means, r), [random_map(shape, dtype, device) for _ in xs])

    def outcome(
        self,
        forward: ForwardConfig | None = None,
        backward: WeightGradConfig | None = None,
        gradients: TileConfig | None = None,
    ) -> list[Tensor]:
        """y, the gradients of yhat and of the weights, the sums, the gradient of x."""
        y = normalised_depthwise(self.xs, self.weights, self.norm, forward)
        arguments = (self.dys, self.xs, self.weights, self.norm, backward)
        e, dw, sums = normalised_depthwise_backward(*arguments)
        dx = e.clone()
        norm_gradients(dx, self.xs, self.norm, sums, gradients)
        return [y, e, dw, sums, dx]

    def normalised(self) -> list[Tensor]:
        """In float64."""
        every = zip(self.xs, *self.norm, strict=True)
        return [
            (x.double() - mean.double()[:, None, None]) * r.double()[:, None, None]
            for x, mean, r in every
        ]


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    window = weight.double().permute(2, 0, 1)[:, None]
    return F.conv2d(x, window, padding=1, groups=len(window))


@SHAPES_AND_DTYPES
def test_forward(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    guarded: None,
) -> None:
    inputs = Inputs.of(shape, dtype, device)
    found = normalised_depthwise(*inputs[:3])
    assert found.dtype == dtype and found.shape == (2, *shape)
    for y, yhat, weight in zip(found, inputs.normalised(), inputs.weights, strict=True):
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_close(y, convolved(yhat.relu(), weight), convolved(yhat.relu(), weight.abs()))


@SHAPES_AND_DTYPES
def test_gradients(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    guarded: None,
) -> None:
    inputs = Inputs.of(shape, dtype, device)
    found = inputs.outcome()[1:4]
    assert found[0].dtype == dtype and found[1].dtype == found[2].dtype == torch.float32

    def gradients(yhat: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
        leaves = (yhat.detach().requires_grad_(), weight.double().requires_grad_())
        through = convolved(leaves[0].relu(), leaves[1])
        d_yhat, dw = torch.autograd.grad(through, leaves, dy.double())
        rows = [value.sum((0, 2, 3)) for value in (d_yhat, d_yhat * leaves[0].detach())]
        return [d_yhat, dw, torch.stack(rows)]

    edges = zip(inputs.normalised(), inputs.weights, inputs.dys, *found, strict=True)
    for yhat, weight, dy, *of_edge in edges:
        truths = gradients(yhat, weight, dy)
        magnitudes = gradients(yhat.relu() + 1e-30, weight.abs(), dy.abs())
        for one, truth, magnitude in zip(of_edge, truths, magnitudes, strict=True):
            assert_close(one, truth, magnitude)


@SHAPES_AND_DTYPES
def test_gradients_of_norms(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    inputs = Inputs.of(shape, dtype, device)
    _, e, _, sums, found = inputs.outcome()
    count = e[0].numel() / shape[1]
    edges = zip(found, e.double(), inputs.normalised(), sums.double(), inputs.norm[1], strict=True)
    for dx, of_yhat, yhat, rows, r in edges:
        s0, s1, scale = (values.double()[:, None, None] for values in (*rows, r))
        wanted = scale * (of_yhat - s0 / count - yhat * s1 / count)
        magnitude = scale * (of_yhat.abs() + s0.abs() / count + (yhat * s1).abs() / count)
        assert_close(dx, wanted, magnitude)


def test_a_large_mean_cancels(device: torch.device) -> None:
    inputs = Inputs.of((2, 4, 6, 5), torch.float32, device, mean=3000.0)
    found = inputs.outcome()
    for y, yhat, weight in zip(found[0], inputs.normalised(), inputs.weights, strict=True):
        truth, size = convolved(yhat.relu(), weight), convolved(yhat.relu(), weight.abs())
        assert_close(y, truth, 8 * size)
    assert all(torch.isfinite(one).all() for one in found)


def test_edges_together_are_edges_alone(device: torch.device) -> None:
    """To the bit with the same tiles, which have the same programs for each edge."""
    inputs = Inputs.of((1, 17, 5, 4), torch.bfloat16, device)
    tiles = (
        ForwardConfig(rows=3, block_p=4, block_c=32, warps=2),
        WeightGradConfig(rows=2, block_p=4, block_c=32, warps=2, programs=2),
        TileConfig(loads=2, ahead=1, warps=2),
    )
    together = inputs.outcome(*tiles)
    for edge in range(2):
        one = slice(edge, edge + 1)
        mean, r = inputs.norm
        alone = Inputs(
            inputs.xs[one], inputs.weights[one], (mean[one], r[one]), inputs.dys[one]
        ).outcome(*tiles)
        for first, second in zip(together, alone, strict=True):
            assert torch.equal(first[one], second)


def test_tiles_of_other_sizes_agree(device: torch.device) -> None:
    inputs = Inputs.of((1, 20, 5, 7), torch.float32, device)
    others = inputs.outcome(
        ForwardConfig(rows=3, block_p=2, block_c=16, warps=1),
        WeightGradConfig(rows=2, block_p=4, block_c=16, warps=1, programs=3),
        TileConfig(loads=2, ahead=1, warps=1),
    )
    for first, second in zip(inputs.outcome(), others, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_same_inputs_same_bits(device: torch.device) -> None:
    inputs = Inputs.of(SHAPES[-1], torch.bfloat16, device)
    assert all(map(torch.equal, inputs.outcome(), inputs.outcome()))


def test_nan_stays_in_its_window_and_edge(device: torch.device) -> None:
    inputs = Inputs.of((1, 1, 5, 5), torch.float32, device)
    inputs.xs[1][0, 0, 2, 2] = torch.nan
    expected = torch.zeros(2, 5, 5, dtype=torch.bool, device=device)
    expected[1, 1:4, 1:4] = True
    y, e, _, sums, _ = inputs.outcome()
    assert torch.equal(y[:, 0, 0].isnan(), expected)
    assert e.isfinite().all()  # Where x is NaN the gradient passes the ReLU.
    assert torch.equal(sums[:, :, 0].isnan().cpu(), torch.tensor([[False] * 2, [False, True]]))


def test_edges_share_programs_and_large_ones_walk_further() -> None:
    x = torch.empty((), dtype=torch.bfloat16).expand(16, 64, 32, 64)
    assert default_backward([x, x]).programs == default_backward([x]).programs // 2 == 128
    assert (default_forward([x]).rows, default_forward([x, x]).rows) == (8, 16)


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, *yhats):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weights, *yhats)
        return normalised_depthwise(yhats, weights, _identity(yhats))

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        weights, *yhats = ctx.saved_tensors
        dys = [one.contiguous(memory_format=torch.channels_last) for one in dy]
        e, dw, _ = normalised_depthwise_backward(dys, yhats, weights, _identity(yhats))
        return dw, *e


def _identity(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    shape = (len(xs), xs[0].shape[1])
    return xs[0].new_zeros(shape), xs[0].new_ones(shape)


def test_gradcheck(device: torch.device) -> None:
    inputs = Inputs.of((1, 2, 3, 4), torch.float64, device)
    xs = [torch.where(x.abs() < 0.1, 0.5, x) for x in inputs.xs]
    xs = [x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in xs]
    leaves = (inputs.weights.requires_grad_(), *xs)
    assert torch.autograd.gradcheck(_Normalised.apply, leaves, fast_mode=True)


def test_bad_arguments_are_named(device: torch.device) -> None:
    xs, weights, norm, dys = Inputs.of((1, 3, 4, 4), torch.float32, device)
    e, sums = torch.stack(xs).movedim(2, -1).contiguous().movedim(-1, 2), weights.new_zeros(2, 2, 3)
    with pytest.raises(ValueError, match=r"norm\[1\]: shape \(2, 2\), need \(2, 3\)"):
        normalised_depthwise(xs, weights, (norm[0], norm[1][:, :2]))
    with pytest.raises(ValueError, match=r"weights: shape \(1, 3, 3, 3\)"):
        normalised_depthwise(xs, weights[:1], norm)
    with pytest.raises(ValueError, match=r"xs\[1\]: shape"):
        normalised_depthwise([xs[0], xs[1][:, :, :2]], weights, norm)
    with pytest.raises(ValueError, match="xs: need at least one map"):
        normalised_depthwise([], weights, norm)
    with pytest.raises(ValueError, match="dys: 1 maps, need 2"):
        normalised_depthwise_backward(dys[:1], xs, weights, norm)
    with pytest.raises(ValueError, match=r"dys\[0\]: dtype torch.float64"):
        normalised_depthwise_backward([dy.double() for dy in dys], xs, weights, norm)
    with pytest.raises(ValueError, match=r"e: strides"):
        norm_gradients(e[:, :, :, :2], [x[:, :, :2] for x in xs], norm, sums)
    with pytest.raises(ValueError, match="sums: shape"):
        norm_gradients(e, xs, norm, sums[:, :1])
