"""Whether an exported file computes what the network computes, on random and on real images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lgcnet_fast.config import DataConfig, Size
from lgcnet_fast.data.dataset import open_dataset
from lgcnet_fast.data.normalise import network_input
from lgcnet_fast.errors import DataError, ExportError
from lgcnet_fast.ops import upsample

SMALLEST, LARGEST = 32, 16384
"""Sides in pixels that exports are made for; below, the deepest maps are single pixels."""

TOLERANCE = 1e-4
"""Largest difference allowed, as a share of the image's largest logit: 0.001 where that is 10.
Rounding alone stays below a tenth of it."""

Runner = Callable[[Tensor], Tensor]
"""An exported file, loaded: RGB uint8 (1, H, W, 3) to logits or labels."""


@dataclass(frozen=True)
class Agreement:
    """A check that was passed."""

    random: int
    """Random images that were compared."""
    real: int
    """Images of the run's own data that were compared."""
    sizes: tuple[Size, ...]
    difference: float
    """The largest, in logits. For labels: how much lower the logit of an exported label is than
    the largest logit of its pixel."""
    allowed: float
    """Of the image whose logits are largest."""


def check(
    network: nn.Module, run: Runner, sizes: Sequence[Size], real: Sequence[Tensor], labels: bool
) -> Agreement:
    """Compares with `network`, float32 in eval mode on the CPU, on a random image of each size and
    on `real`. Raises `ExportError` if they differ, naming the size."""
    generator = torch.Generator().manual_seed(0)
    random = [_random_image(size, generator) for size in sizes]
    difference = allowed = 0.0
    for image in (*random, *real):
        found, most = _compare(network, run, image, labels)
        # Written so that not-a-number fails, too.
        if not found <= most:
            raise ExportError(
                f"the exported file disagrees with the network on a {image.shape[1]}x"
                f"{image.shape[2]} image: largest difference {found:.3g}, allowed {most:.3g}; "
                "nothing was written"
            )
        difference, allowed = max(difference, found), max(allowed, most)
    return Agreement(len(random), len(real), tuple(sizes), difference, allowed)


def check_sizes(size: Size, dynamic: bool) -> tuple[Size, ...]:
    """Heights and widths that random images are made for; with `dynamic` odd and even ones."""
    if not dynamic:
        return (size,)
    height, width = size
    near = ((height + 1, width + 2), (height + 7, width - 3), (height // 2 + 1, width // 2))
    clipped = ((_clip(height), _clip(width)) for height, width in near)
    return tuple(dict.fromkeys((size, *clipped)))


def real_images(data: DataConfig, sizes: Sequence[Size], count: int) -> tuple[list[Tensor], str]:
    """Up to `count` images of the validation split, spread over it, resized to `sizes` in turn.

    Where the data cannot be read: none, and why.
    """
    try:
        dataset = open_dataset(data, data.val_split)
        chosen = sorted({round(i) for i in np.linspace(0, len(dataset) - 1, count)})
        pictures = [dataset.image(index) for index in chosen]
    except DataError as error:
        return [], str(error)
    return [
        _resized(picture, sizes[index % len(sizes)]) for index, picture in enumerate(pictures)
    ], ""


@torch.inference_mode()
def _compare(network: nn.Module, run: Runner, image: Tensor, labels: bool) -> tuple[float, float]:
    """Largest difference, and the one allowed."""
    logits = network(network_input(image, None))
    allowed = TOLERANCE * logits.abs().max().item()
    result = run(image)
    size = (image.shape[1], image.shape[2])
    expected = ((1, *size), torch.uint8) if labels else (tuple(logits.shape), torch.float32)
    if (tuple(result.shape), result.dtype) != expected:
        raise ExportError(
            f"the exported file returns {result.dtype} {tuple(result.shape)} for a "
            f"{size[0]}x{size[1]} image, not {expected[1]} {expected[0]}; nothing was written"
        )
    if not labels:
        return (result - logits).abs().max().item(), allowed
    full = upsample(logits, size)
    chosen = result.long()[:, None]
    if chosen.max() >= full.shape[1]:
        return float("inf"), allowed
    return (full.amax(dim=1, keepdim=True) - full.gather(1, chosen)).max().item(), allowed


def _random_image(size: Size, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8, generator=generator)


def _resized(picture: np.ndarray, size: Size) -> Tensor:
    height, width = size
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized))[None]


def _clip(side: int) -> int:
    return min(max(side, SMALLEST), LARGEST)
