"""The package's operations on the CUDA backend, its kernels emulated, against the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from lgcnet_fast import ops
from lgcnet_fast.ops.maps import unstacked
from tests.native.truth import nhwc, poisoned_memory

Outputs = Tensor | Sequence[Tensor]


def both_ways(
    function: Callable[..., Outputs], inputs: Sequence[Tensor], name: str
) -> list[Tensor]:
    """Outputs and the gradients of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with ops.use_backend(name), poisoned_memory():
        found = function(*leaves)
        outputs = [found] if isinstance(found, Tensor) else list(found)
        gradients = torch.autograd.grad(outputs, leaves, [y.detach().sin() for y in outputs])
    return [*(y.detach() for y in outputs), *gradients]


def assert_same(function: Callable[..., Outputs], *inputs: Tensor) -> None:
    found, expected = (both_ways(function, inputs, name) for name in ("cuda", "reference"))
    for result, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-4, atol=1e-5)


def random_map(*shape: int) -> Tensor:
    return nhwc(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))))


@pytest.mark.usefixtures("cuda_backend")
class TestOperations:
    @pytest.mark.parametrize("stride", [1, 2])
    def test_max_pool(self, stride: int) -> None:
        assert_same(lambda x: ops.max_pool(x, stride), random_map(2, 5, 7, 6))

    @pytest.mark.parametrize("stride", [1, 2])
    def test_separable_branches(self, stride: int) -> None:
        depthwise = [torch.randn(8, 1, 3, 3) for _ in range(4)]
        pointwise = [torch.randn(6, 8, 1, 1) / 3 for _ in range(4)]

        def branches(x: Tensor, *weights: Tensor) -> list[Tensor]:
            stacks = ops.separable_branches(x, weights[:4], weights[4:], (1, 2), stride)
            return [y for maps in stacks for y in unstacked(maps)]

        assert_same(branches, random_map(2, 8, 7, 6), *depthwise, *pointwise)

    def test_mixed_norm_sum(self) -> None:
        norms = [nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, affine=False), None]

        def node(*inputs: Tensor) -> Tensor:
            return ops.mixed_norm_sum(inputs[:3], inputs[3], copy.deepcopy(norms))

        maps = [random_map(2, 8, 5, 3 + i)[..., :3].contiguous() for i in range(3)]
        assert_same(node, *map(nhwc, maps), torch.rand(3))

    def test_running_statistics(self) -> None:
        states = []
        for name in ("cuda", "reference"):
            norm = nn.BatchNorm2d(4, affine=False)
            with ops.use_backend(name):
                ops.mixed_norm_sum([random_map(2, 4, 5, 3)], torch.ones(1), [norm])
            states.append(norm.state_dict())
        for key, value in states[0].items():
            torch.testing.assert_close(value, states[1][key])

    def test_resizing(self) -> None:
        maps = random_map(1, 4, 3, 5), random_map(1, 4, 9, 8)
        assert_same(lambda x: ops.upsample(x, (9, 8)), maps[0])
        assert_same(lambda *xs: ops.concat_upsample(xs, (9, 8)), *maps)
        assert_same(lambda *xs: ops.sum_upsample(xs, (9, 8)), *maps)

    @pytest.mark.parametrize("relu", [False, True])
    def test_convolution_of_a_concatenation(self, relu: bool) -> None:
        maps = random_map(1, 4, 3, 5), random_map(1, 4, 9, 8)
        weight = torch.randn(3, 8, 1, 1, generator=torch.Generator().manual_seed(0))

        def convolve(*given: Tensor) -> Tensor:
            return ops.concat_upsample_pointwise(given[:-1], (9, 8), given[-1], relu)

        assert_same(convolve, *maps, weight)

    @pytest.mark.parametrize(("count", "dtype"), [(2, torch.float16), (65, torch.float32)])
    def test_convolution_of_a_concatenation_by_the_library(
        self, count: int, dtype: torch.dtype
    ) -> None:
        """Half precision, and more maps than a launch takes."""
        maps = [random_map(1, 2, 2, 3 + i % 2).to(dtype) for i in range(count)]
        weight = (random_map(3, 2 * count, 1, 1) / count**0.5).to(dtype)

        def convolve(*given: Tensor) -> Tensor:
            return ops.concat_upsample_pointwise(given[:-1], (2, 4), given[-1])

        found = both_ways(convolve, (*maps, weight), "cuda")
        truths = both_ways(convolve, [x.double() for x in (*maps, weight)], "reference")
        for result, truth in zip(found, truths, strict=True):
            assert result.dtype == dtype
            error = (result.double() - truth).norm() / truth.norm()
            assert error <= 10 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("loss", [ops.upsample_cross_entropy, ops.upsample_ohem])
    def test_losses(self, loss: Callable[..., Tensor]) -> None:
        target = torch.randint(5, (2, 9, 13), generator=torch.Generator().manual_seed(0))
        target[0, :2] = 255
        assert_same(lambda logits: loss(logits, target), random_map(2, 5, 3, 4))

    def test_argmax(self) -> None:
        logits, labels = random_map(2, 5, 3, 4), []
        for name in ("cuda", "reference"):
            with ops.use_backend(name):
                labels.append(ops.upsample_argmax(logits, (9, 13)))
        assert torch.equal(*labels)
