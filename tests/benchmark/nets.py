"""Networks as a user's package has them, good and bad."""

from __future__ import annotations

import torch
from torch import nn


class Tiny(nn.Module):
    """Logits at a quarter of the resolution."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, classes, 3, stride=4, padding=1)
        self.norm = nn.BatchNorm2d(classes)

    def forward(self, x):
        assert not self.training
        return self.norm(self.convolution(x))


class WithAuxiliaryHead(Tiny):
    def forward(self, x):
        logits = super().forward(x)
        return {"out": (logits, logits), "aux": None}


class Scores(Tiny):
    """Not a segmentation network."""

    def forward(self, x):
        return super().forward(x).mean((2, 3))


class Choosy(Tiny):
    def forward(self, x):
        if x.shape[-1] % 32:
            raise RuntimeError("width must be a multiple of 32\nand more lines")
        return super().forward(x)


INSTANCE = Tiny()
NUMBER = 3


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return Tiny()


def failing() -> nn.Module:
    raise FileNotFoundError("weights.pth is not here\nsecond line")


def needs_arguments(classes: int) -> nn.Module:
    return Tiny(classes)


def no_module() -> dict[str, int]:
    return {}
