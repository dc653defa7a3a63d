"""CUDA kernel of inference branches: `python -m bench.kernels.native_separable`, see command.py.

ReLU, depthwise and pointwise convolution and bias in one launch, batch 1, against the four
operations of PyTorch. Floor: x + y.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device import DEVICE, LAYOUTS
from bench.kernels.command import main
from bench.kernels.comparison import Binding, Comparison, Family, Part, Sweep
from bench.kernels.depthwise_cases import Case, reference
from bench.kernels.shapes import CELLS, FUSION_CHANNELS, at_stride
from bench.kernels.timing import Call, gate
from lgcnet_fast.native.separable import separable_forward
from lgcnet_fast.ops.tuning import shape_key

SIZES = ((769, 1537), (360, 480))
DTYPES = (torch.float32, torch.float16)


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    depthwise: Tensor
    """(3, 3, C)."""
    pointwise: Tensor
    """(C, C)."""
    bias: Tensor


@dataclass(frozen=True)
class Width:
    """Outputs a block, the default for None."""

    width: int | None


def make_inputs(case: Case) -> Inputs:
    images, channels, height, width = case.shape
    x = torch.randn(images, height, width, channels, device=DEVICE, dtype=case.dtype)
    pointwise = torch.randn(channels, channels, device=DEVICE) / channels**0.5
    depthwise, bias = (torch.randn(*size, channels, device=DEVICE) for size in ((3, 3), ()))
    return Inputs(x.movedim(-1, 1), depthwise, pointwise, bias)


DEFAULT = Width(None)


def ours(case: Case, i: Inputs, config: Width = DEFAULT) -> Tensor:
    (dilation,) = case.dilations
    weights = (i.depthwise, i.pointwise, i.bias)
    geometry = {"dilation": dilation, "stride": case.stride, "relu": True}
    return separable_forward(i.x, *weights, **geometry, width=config.width)


def check(case: Case, i: Inputs) -> None:
    y = reference(i.x.double().relu(), i.depthwise[None, None], case)[0, 0]
    truth = torch.einsum("nchw,cm->nmhw", y, i.pointwise.double()) + i.bias.double()[:, None, None]
    gate(f"separable {case}", ours(case, i), truth)


def _stock(case: Case, layout: torch.memory_format) -> Binding:
    (d,), channels = case.dilations, case.shape[1]

    def bind(i: Inputs) -> Call:
        x = i.x.contiguous(memory_format=layout)
        window = i.depthwise.permute(2, 0, 1).unsqueeze(1).to(case.dtype)
        product = i.pointwise.t()[:, :, None, None].to(case.dtype)
        window, product = (w.contiguous(memory_format=layout) for w in (window, product))
        bias = i.bias.to(case.dtype)

        def run() -> Tensor:
            y = F.conv2d(x.relu(), window, None, case.stride, d, d, channels)
            return F.conv2d(y, product, bias)

        return run

    return bind


def cases(part: Part) -> Iterator[Case]:
    if part == "dry":
        yield from (Case((1, 4, 3, 5), (d,), s, dtype=torch.float32) for d, s in ((1, 1), (2, 2)))
        return
    sizes = SIZES if part == "full" else SIZES[:1]
    for size, dtype in itertools.product(sizes, DTYPES if part == "full" else DTYPES[:1]):
        for channels, stride in (*CELLS, (FUSION_CHANNELS, 4)):
            shape = (1, channels, *at_stride(size, stride))
            yield from (Case(shape, (d,), dtype=dtype) for d in (1, 4, 8))
            yield Case(shape, (1,), stride=2, dtype=dtype)


def comparisons(part: Part) -> Iterator[Comparison]:
    for case in cases(part):
        channels, outputs = case.shape[1], case.y_bytes // case.dtype.itemsize
        yield Comparison(
            operation="separable branch",
            case=str(case),
            bytes=case.x_bytes + case.y_bytes,
            operations=2 * (9 + channels) * outputs,
            make=partial(make_inputs, case),
            check=partial(check, case),
            ours=partial(ours, case),
            stock={name: _stock(case, layout) for name, layout in LAYOUTS.items()},
        )


def sweeps(tiny: bool) -> Iterator[Sweep]:
    for case in cases("dry" if tiny else "full"):
        yield Sweep(
            operation="native_separable",
            key=shape_key(case.dtype, case.shape, case.dilations, (case.stride,)),
            bytes=case.x_bytes + case.y_bytes,
            make=partial(make_inputs, case),
            run=partial(ours, case),
            configs=[Width(None), Width(32), Width(64)],
        )


FAMILY = Family("CUDA separable branch", comparisons, sweeps)

if __name__ == "__main__":
    main(FAMILY)
