"""The estimated Titan Xp, against arithmetic done by hand."""

import pytest
import torch
from torch import nn

from lgcnet_fast.latency.roofline import LAUNCH_SECONDS, roofline_ms

SHAPE = (1, 64, 193, 385)
MAP = 64 * 193 * 385
"""Values in a map of SHAPE."""
LAUNCH = 1e3 * LAUNCH_SECONDS


def ms(module, *shapes):
    return roofline_ms(module, shapes or (SHAPE,))


class Views(nn.Module):
    def forward(self, x):
        return x[:, :, 1:].transpose(2, 3).detach().unsqueeze(0).chunk(2)


class Concat(nn.Module):
    def forward(self, x, y):
        return torch.cat((x, y), 1)


def test_elementwise_reads_and_writes_at_the_memory_rate():
    assert ms(nn.ReLU()) == pytest.approx(1e3 * 2 * 4 * MAP / 430e9)
    assert ms(nn.ReLU(inplace=True)) == pytest.approx(1e3 * 2 * 4 * MAP / 430e9)
    assert ms(Concat(), SHAPE, SHAPE) == pytest.approx(1e3 * 4 * 4 * MAP / 430e9)


def test_3x3_convolutions_run_at_their_arithmetic_rate():
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    assert ms(conv) == pytest.approx(1e3 * MAP * 64 * 9 / 9e12)


def test_wide_1x1_convolutions_run_at_their_arithmetic_rate():
    conv = nn.Conv2d(64, 512, 1, bias=False)
    assert ms(conv) == pytest.approx(1e3 * MAP * 512 / 5e12)


def test_narrow_1x1_convolutions_wait_for_memory():
    conv = nn.Conv2d(64, 8, 1, bias=False)
    moved = 4 * (MAP + MAP // 8 + 64 * 8)
    assert ms(conv) == pytest.approx(1e3 * moved / 430e9)


def test_depthwise_convolutions_are_slow():
    conv = nn.Conv2d(64, 64, 3, padding=2, dilation=2, groups=64, bias=False)
    assert ms(conv) == pytest.approx(1e3 * 4 * (2 * MAP + 64 * 9) / 80e9)


def test_transposed_convolutions_are_charged_by_input_positions():
    conv = nn.ConvTranspose2d(64, 64, 3, stride=2, padding=1, bias=False)
    assert ms(conv) == pytest.approx(1e3 * MAP * 64 * 9 / 9e12)


def test_batch_norm_is_folded_and_views_are_free():
    conv = nn.Conv2d(64, 64, 3, padding=1)
    assert ms(nn.Sequential(conv, nn.BatchNorm2d(64))) == ms(conv)
    assert ms(Views()) == 0


def test_no_kernel_is_faster_than_its_launch():
    assert ms(nn.ReLU(), (1, 1, 2, 2)) == pytest.approx(LAUNCH)
    assert ms(nn.Conv2d(1, 1, 1), (1, 1, 2, 2)) == pytest.approx(LAUNCH)


def test_pooling_and_resizing_are_charged():
    assert ms(nn.MaxPool2d(3, 1, 1)) > 1e3 * 2 * 4 * MAP / 430e9
    up = nn.UpsamplingBilinear2d(scale_factor=2)
    assert ms(up) == pytest.approx(1e3 * 5 * 4 * MAP / 430e9)
    assert ms(nn.AdaptiveAvgPool2d(5)) >= LAUNCH


def test_nothing_is_computed():
    """A map that no machine could hold."""
    assert ms(nn.Conv2d(64, 64, 3), (1, 64, 10**6, 10**5)) > 1e5
