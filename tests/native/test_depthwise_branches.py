"""Both gradients of depthwise branches in one launch, on GPUs of sm_90; its plan anywhere."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lgcnet_fast.errors import DeviceError
from lgcnet_fast.native import instances
from lgcnet_fast.native.depthwise_branches import (
    ARGUMENTS,
    STRIP_OF_X,
    depthwise_branches_backward,
    plan,
    refusal,
    rooms_of,
)
from lgcnet_fast.native.hopper import MOST_SHARED
from lgcnet_fast.native.launcher import Launcher
from tests.native.conftest import Emulated
from tests.native.truth import assert_close, nhwc, poisoned_memory

DILATIONS = ((1, 2, 4, 8), (2, 4, 8), (1, 2, 4, 8, 12), (3, 5))


def test_the_arguments_are_as_large_as_the_kernels(emulated: Emulated) -> None:
    instance = instances.depthwise_branches_backward("BFloat16", 1)
    assert emulated.argument_bytes(instance) == ARGUMENTS.itemsize


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 32), (32, 64), (49, 97), (64, 128)])
@pytest.mark.parametrize("dilations", DILATIONS)
def test_strips_in_shared_memory_never_meet(
    size: tuple[int, int], dilations: tuple[int, ...]
) -> None:
    found = plan(*size, dilations * 2)
    assert found is not None and found.shared <= MOST_SHARED
    assert sorted(strip.branch for strip in found.strips) == list(range(2 * len(dilations)))
    begin = STRIP_OF_X + found.rows * -(-size[1] // 16) * 16 * 32
    spans = []
    for strip in found.strips:
        assert strip.dilation == dilations[strip.branch % len(dilations)]
        assert strip.width % 8 == 0 and strip.width >= size[1] + 2 * strip.dilation
        assert strip.chain * strip.chains * strip.dilation >= found.rows
        end = strip.room + (found.rows + 2 * strip.dilation) * strip.width * 32
        assert begin + end <= found.shared
        spans.append((strip.room, end))
    for at, strip in enumerate(found.strips):
        assert strip.loaded > at
        there = sorted(spans[at : strip.loaded])
        assert all(end <= room for (_, end), (room, _) in zip(there, there[1:], strict=False))


def test_a_strip_waits_until_it_fits() -> None:
    assert rooms_of([4, 4, 4], 8) == ([0, 4, 0], [2, 3, 3])
    assert rooms_of([6, 6], 8) == ([0, 0], [1, 2])
    assert rooms_of([2, 5, 2, 1], 8) == ([0, 2, 0, 7], [2, 4, 4, 4])


def test_what_fits_no_block_has_no_plan() -> None:
    assert plan(193, 193, (1,)) is None
    assert plan(16, 32, (100,)) is None


def test_a_route_without_the_kernel_launches_nothing(emulated: Emulated) -> None:
    x = nhwc(torch.zeros(1, 16, 4, 4, dtype=torch.bfloat16))
    with pytest.raises(DeviceError, match="emulation: holds no code for sm_90"):
        depthwise_branches_backward([x], x, torch.ones(1, 1, 3, 3, 16), (1,), launcher=emulated)


@pytest.mark.parametrize(
    ("maps", "dilations", "message"),
    [
        (3, (1, 2), "dys: 3 maps of branches of 2 dilations"),
        (0, (1, 2), "dys: 0 maps"),
        (1, (), "dilations: "),
        (1, (0,), r"dilations: \(0,\)"),
    ],
)
def test_branches_that_do_not_fit_their_dilations(
    maps: int,
    dilations: tuple[int, ...],
    message: str,
    emulated: Emulated,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Emulated, "hopper", True)
    x = nhwc(torch.zeros(1, 16, 4, 4, dtype=torch.bfloat16))
    windows = torch.ones(1, 1, 3, 3, 16)
    with pytest.raises(ValueError, match=message):
        depthwise_branches_backward([x] * maps, x, windows, dilations, launcher=emulated)


def test_a_cpu_is_refused() -> None:
    x = nhwc(torch.zeros(1, 16, 4, 4, dtype=torch.bfloat16))
    assert refusal([x], x, (1,), 1) == "it is for GPUs of sm_90"


# -- on a GPU -------------------------------------------------------------------------------------


def random_maps(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [nhwc(torch.randn(shape), "cuda").to(dtype) for _ in range(count)]


def exact(
    dys: list[Tensor], x: Tensor, windows: Tensor, dilations: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """In float64, of weights rounded as the kernel rounds them."""
    x64 = x.double().requires_grad_()
    w64 = windows.to(x.dtype).double().requires_grad_()
    for k, dy in enumerate(dys):
        d = dilations[k % len(dilations)]
        window = w64.flatten(0, 1)[k].permute(2, 0, 1)[:, None]
        y = F.conv2d(x64.relu(), window, padding=d, dilation=d, groups=x.shape[1])
        y.backward(dy.double())
    assert x64.grad is not None and w64.grad is not None
    return x64.grad, w64.grad


SIZES = ((1, 1), (3, 5), (9, 13), (23, 30), (16, 32), (32, 64), (49, 97), (64, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("size", "dilations"), list(product(SIZES, DILATIONS)))
def test_gradients(
    hopper: Launcher, size: tuple[int, int], dilations: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    for images, channels, edges in ((2, 48, 1), (3, 16, 2)):
        x, *dys = random_maps(1 + edges * len(dilations), (images, channels, *size), dtype)
        x.flatten()[::5] = 0
        windows = torch.randn(edges, len(dilations), 3, 3, channels, device="cuda")
        with poisoned_memory():
            dx, shares = depthwise_branches_backward(dys, x, windows, dilations, launcher=hopper)
            again = depthwise_branches_backward(dys, x, windows, dilations, launcher=hopper)
        true_dx, true_dw = exact(dys, x, windows, dilations)
        assert_close(dx, true_dx, dtype, terms=9 * len(dys))
        assert_close(shares.double().sum(0).float(), true_dw, torch.float32, dx[:, 0].numel())
        assert torch.equal(dx, again[0]) and torch.equal(shares, again[1])


@pytest.mark.gpu
def test_gradients_pass_where_x_is_no_number(hopper: Launcher) -> None:
    x, dy = random_maps(2, (1, 16, 9, 13), torch.bfloat16)
    x[0, 3, 4, 5], x[0, 4, 4, 5] = float("nan"), -1.0
    dx, _ = depthwise_branches_backward(
        [dy], x, torch.ones(1, 1, 3, 3, 16, device="cuda"), (1,), launcher=hopper
    )
    assert dx[0, 3, 4, 5] != 0 and dx[0, 4, 4, 5] == 0


@pytest.mark.gpu
def test_what_the_kernel_does_not_take_is_named(hopper: Launcher) -> None:
    x, dy = random_maps(2, (1, 16, 9, 13), torch.bfloat16)
    windows = torch.ones(1, 1, 3, 3, 16, device="cuda")
    with pytest.raises(ValueError, match=r"windows: shape \(1, 1, 3, 3, 16\), need"):
        depthwise_branches_backward([dy, dy], x, windows, (1,), launcher=hopper)
    with pytest.raises(ValueError, match=r"dys\[0\]: dtype"):
        depthwise_branches_backward([dy.half()], x, windows, (1,), launcher=hopper)
    wide, dwide = random_maps(2, (1, 16, 4, 200), torch.bfloat16)
    with pytest.raises(ValueError, match="200 columns does not fit shared memory"):
        depthwise_branches_backward([dwide], wide, windows, (1,), launcher=hopper)
    odd, dodd = random_maps(2, (1, 24, 9, 13), torch.bfloat16)
    with pytest.raises(ValueError, match="24 channels, not a multiple of 16"):
        depthwise_branches_backward(
            [dodd], odd, torch.ones(1, 1, 3, 3, 24, device="cuda"), (1,), launcher=hopper
        )
