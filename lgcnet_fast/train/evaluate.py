"""mIoU of the trained network on val: whole images, one scale, no flip (LGCNet section 6)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgcnet_fast.data.loader import EvalBatch
from lgcnet_fast.ops import upsample_argmax
from lgcnet_fast.train.metrics import Confusion
from lgcnet_fast.train.precision import placed
from lgcnet_fast.train.run import Run
from lgcnet_fast.train.sources import eval_loader

STAGE = "evaluate"
LABEL_REDUCTION = {"full": 1, "bisenet_speed": 8}
"""Protocol -> factor by which labels are reduced (nearest) before predictions are compared.

`bisenet_speed` is how BiSeNet scored its speed rows; it flatters small objects and borders.
"""


@torch.no_grad()
def score(
    network: nn.Module,
    batches: Iterable[EvalBatch],
    protocols: Sequence[str],
    num_classes: int,
    device: torch.device,
) -> dict[str, Confusion]:
    """One confusion matrix a protocol, in float32; the network is left in eval mode.

    `batches` holds resized images and labels (N, H, W) at full resolution.
    """
    network.eval()
    confusions = {name: Confusion(num_classes, device) for name in protocols}
    for images, labels, _ in batches:
        logits = network(images)
        for name, confusion in confusions.items():
            target = reduce_labels(labels, LABEL_REDUCTION[name])
            height, width = target.shape[-2:]
            confusion.add(upsample_argmax(logits, (height, width)), target)
    return confusions


def reduce_labels(labels: Tensor, factor: int) -> Tensor:
    """(N, H, W) -> (N, H // factor, W // factor), at least one pixel, by nearest neighbour."""
    if factor == 1:
        return labels
    size = [max(1, side // factor) for side in labels.shape[-2:]]
    # Class ids up to 255 are exact in float32, which every interpolation kernel takes.
    return F.interpolate(labels[:, None].float(), size=size, mode="nearest")[:, 0].long()


def evaluate(run: Run) -> dict[str, Any]:
    """Writes evaluation.json: mIoU and IoU of each class for every protocol asked for.

    IoU is None for a class that neither occurs nor is predicted. `constant_miou` is that of the
    best constant prediction on the same labels.
    """
    network = placed(run.trained_network(), run.device)
    split, protocols = run.config.data.val_split, run.config.evaluate.protocols
    confusions = score(network, eval_loader(run, split), protocols, run.num_classes, run.device)
    result = {
        "split": split,
        "size": run.config.evaluate.size,
        "protocols": {name: _scores(run, counts) for name, counts in confusions.items()},
    }
    return run.finish(STAGE, result)


def _scores(run: Run, confusion: Confusion) -> dict[str, Any]:
    iou = confusion.iou().tolist()
    return {
        "miou": confusion.miou(),
        "pixel_accuracy": confusion.pixel_accuracy(),
        "constant_miou": confusion.constant_miou(),
        "class_iou": {
            name: None if value != value else value
            for name, value in zip(run.classes.names, iou, strict=True)
        },
    }
