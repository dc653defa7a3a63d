"""Whether an engine labels pixels as the plain network does, before its time counts."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgcnet_fast.benchmark.case import Case
from lgcnet_fast.benchmark.plain import Normalisation, first_tensor
from lgcnet_fast.errors import EngineError
from lgcnet_fast.ops import use_backend

ABSOLUTE_MARGIN = 1e-3
"""Between the best two logits in fp32; below it, rounding may decide."""
RELATIVE_MARGINS = {"fp32": 0.0, "fp16": 0.02, "bf16": 0.15}
"""The same for what half precision rounds: by the largest logit."""
FEWEST_DECIDED = 0.1
"""Share of the pixels that must have a margin, or the comparison says nothing."""


@dataclass(frozen=True)
class Agreement:
    """Of labels with those of the plain network in float32."""

    decided: float
    """Share of pixels whose best two logits differ by more than rounding may change."""
    equal: float
    """Share of all pixels with equal labels; of the decided ones all are equal."""


@torch.inference_mode()
def check_labels(
    labels: Tensor, network: nn.Module, case: Case, device: torch.device, name: str
) -> Agreement:
    """Compares labels uint8 (N, H, W) of the case's images with those of `network` in float32.

    Raises `EngineError` if a decided pixel differs, or if hardly any pixel is decided.
    """
    network = copy.deepcopy(network).float().to(device).eval()
    normalised = Normalisation().to(device)(case.images(device))
    with use_backend("reference"):
        logits = first_tensor(network(normalised))
    full = F.interpolate(logits, case.size, mode="bilinear", align_corners=True)
    best = full.topk(2, dim=1)
    margin = best.values[:, 0] - best.values[:, 1]
    threshold = ABSOLUTE_MARGIN + RELATIVE_MARGINS[case.dtype] * float(full.abs().max())
    decided = margin > threshold
    equal = labels.to(device) == best.indices[:, 0]
    agreement = Agreement(float(decided.float().mean()), float(equal.float().mean()))
    wrong = int((decided & ~equal).sum())
    if wrong:
        raise EngineError(
            f"{name}: labels {wrong} of {decided.numel()} pixels differently from the plain "
            f"network in fp32, although its best two logits differ by more than {threshold:.2g}; "
            "its time means nothing"
        )
    if agreement.decided < FEWEST_DECIDED:
        raise EngineError(
            f"{name}: only {agreement.decided:.1%} of the pixels have logits that differ by more "
            f"than {threshold:.2g}, so that it cannot be told whether the engine is right in "
            f"{case.dtype}; compare in fp32"
        )
    return agreement
