"""Frames of plain PyTorch, against arithmetic on the same images."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lgcnet_fast.benchmark.case import Case
from lgcnet_fast.benchmark.plain import (
    Normalisation,
    exact_float32,
    first_tensor,
    plain_frame,
)
from lgcnet_fast.data.normalise import network_input
from lgcnet_fast.errors import ConfigError, DeviceError
from lgcnet_fast.ops import backend
from tests.benchmark.nets import Choosy, Scores, WithAuxiliaryHead, tiny

CPU = torch.device("cpu")
SIZE = (33, 47)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("batch", [1, 3])
def test_labels_are_those_of_the_network(layout, batch):
    case, network = Case(SIZE, batch), tiny().eval()
    x = network_input(case.images(CPU), None)
    with torch.no_grad():
        full = F.interpolate(network(x), SIZE, mode="bilinear", align_corners=True)
    labels = plain_frame(network, case, CPU, "eager", layout)()
    assert labels.dtype == torch.uint8 and labels.shape == (batch, *SIZE)
    assert (labels == full.argmax(1)).float().mean() > 0.999


def test_without_upsampling_a_frame_ends_with_logits():
    logits = plain_frame(tiny(), Case(SIZE, dtype="bf16", upsample=False), CPU)()
    assert logits.shape == (1, 5, 9, 12) and logits.dtype == torch.bfloat16


def test_images_are_normalised_as_everywhere():
    images = Case(SIZE).images(CPU)
    torch.testing.assert_close(Normalisation()(images), network_input(images, None))
    assert images.dtype == torch.uint8 and images.shape == (1, *SIZE, 3)
    assert images.float().std() > 30
    assert torch.equal(images, Case(SIZE).images(CPU))


def test_the_network_given_stays_as_it_is():
    network = tiny().train()
    before = copy.deepcopy(network.state_dict())
    plain_frame(network, Case(SIZE, dtype="bf16"), CPU, "eager", "nhwc")()
    assert network.training
    for name, value in network.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])


def test_our_networks_run_on_the_reference_only():
    seen = []

    class Watching(nn.Module):
        def forward(self, x):
            seen.append(backend._here.get().name)
            return x

    plain_frame(Watching(), Case(SIZE), CPU)()
    assert set(seen) == {"reference"}


def test_logits_may_come_with_company():
    assert plain_frame(WithAuxiliaryHead(), Case(SIZE), CPU)().shape == (1, *SIZE)
    for output in ([], {}, None, 3, torch.zeros(2, 3), [torch.zeros(2)]):
        with pytest.raises(ConfigError, match="needed are logits"):
            first_tensor(output)
    with pytest.raises(ConfigError, match=r"Tensor of shape \(1, 5\)"):
        plain_frame(Scores(), Case(SIZE), CPU)
    with pytest.raises(RuntimeError, match="multiple of 32"):
        plain_frame(Choosy(), Case(SIZE), CPU)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="runtime 'fast'"):
        plain_frame(tiny(), Case(SIZE), CPU, "fast")
    with pytest.raises(ConfigError, match="layout 'nwhc'"):
        plain_frame(tiny(), Case(SIZE), CPU, "eager", "nwhc")
    for runtime in ("graph", "compile+graph"):
        with pytest.raises(DeviceError, match="CUDA graphs need a GPU"):
            plain_frame(tiny(), Case(SIZE), CPU, runtime)
    with pytest.raises(DeviceError, match="copies 'in'"):
        plain_frame(tiny(), Case(SIZE, copies="in"), CPU)
    with pytest.raises(ConfigError, match="dtype 'fp64'"):
        Case(SIZE, dtype="fp64")
    with pytest.raises(ConfigError, match="copies 'yes'"):
        Case(SIZE, copies="yes")
    with pytest.raises(ConfigError, match="at least 1"):
        Case((0, 5))


def test_exact_float32_restores_what_was_set():
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    torch.backends.cudnn.allow_tf32 = True
    with pytest.raises(RuntimeError), exact_float32():
        assert not any(flag.allow_tf32 for flag in flags)
        raise RuntimeError
    assert torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["graph", "compile", "compile+graph"])
@pytest.mark.parametrize("copies", ["none", "in", "out", "both"])
def test_runtimes_of_a_gpu_agree_with_eager(runtime, copies):
    device, case = torch.device("cuda"), Case(SIZE, 2, copies=copies)
    with exact_float32():
        plain = plain_frame(tiny(), Case(SIZE, 2), device)()
        frame = plain_frame(tiny(), case, device, runtime, "nhwc")
        found = []
        for _ in range(2):
            labels = frame()
            torch.cuda.synchronize()
            found.append(labels.clone())
            # Into whatever memory is free: a frame reads none of it.
            rubbish = [
                torch.full((size,), torch.inf, device=device) for size in range(64, 8192, 64)
            ]
            del rubbish
    for labels in found:
        assert labels.device.type == ("cpu" if copies in ("out", "both") else "cuda")
        assert (labels.cpu() == plain.cpu()).float().mean() > 0.99
