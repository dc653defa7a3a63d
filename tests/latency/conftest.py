"""A space of two groups, one with a shorter row, whose latency is a product of rows."""

import pytest
import torch
from pydantic import Field
from torch import nn

from lgcnet_fast.errors import TableError
from lgcnet_fast.space.base import (
    ArchGroup,
    LatencyModel,
    LatencyTerms,
    LutKey,
    LutModule,
    SearchSpace,
    SpaceOptions,
)
from lgcnet_fast.space.genotype import Genotype

OPS = ("none", "conv1", "conv3", "depthwise")


class Sum(nn.Module):
    """An operation and the sum that it is accumulated in."""

    def __init__(self, operation: nn.Module) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x, total):
        return total + self.operation(x)


class ToyOptions(SpaceOptions):
    channels: int = Field(default=8, ge=1)
    temperature: float = 1.0


class ToyGenotype(Genotype):
    space: str = "toy"
    picks: tuple[tuple[int, ...], ...]


class ToyLatency(LatencyModel):
    """Row 2 of `ops` runs only as far as `depth` keeps it: linear in each row, not in all."""

    def __init__(self, milliseconds, keys):
        super().__init__()
        missing = [key for key in keys if key not in milliseconds]
        if missing:
            raise TableError(f"lacks '{missing[0]}'")
        self.register_buffer("costs", torch.tensor([0.0, *(milliseconds[k] for k in keys[:-1])]))
        self.constant = milliseconds[keys[-1]]

    def forward(self, z):
        rows = (z["ops"] * self.costs).sum(-1)
        cells = torch.stack([rows[0], rows[1] * z["depth"][0, 1]])
        return LatencyTerms(self.constant, cells, cells)


class Toy(SearchSpace):
    name = "toy"
    Options = ToyOptions
    Genotype = ToyGenotype

    def arch_groups(self):
        mask = ((True,) * 4, (True, True, True, False))
        return (
            ArchGroup("ops", ("first", "second"), OPS, mask, frozenset({"none"})),
            ArchGroup("depth", ("kept",), ("one", "two")),
        )

    def build_arch(self):
        raise NotImplementedError

    def build_supernet(self, num_classes):
        raise NotImplementedError

    def discretise(self, arch):
        """The first row must not be none."""
        logits = arch["ops"].clone()
        first = logits[0].clone()
        first[0] = float("-inf")
        second = logits[1].clone()
        picks = ((int(first.argmax()), int(second.argmax())), (int(arch["depth"][0].argmax()),))
        return ToyGenotype(picks=picks), ()

    def one_hot(self, genotype):
        ops, depth = (torch.tensor(row) for row in genotype.picks)
        return {
            "ops": nn.functional.one_hot(ops, 4).float(),
            "depth": nn.functional.one_hot(depth, 2).float(),
        }

    def random_genotype(self, generator):
        draw = [int(torch.randint(n, (), generator=generator)) for n in (4, 3, 2)]
        return ToyGenotype(picks=((draw[0], draw[1]), (draw[2],)))

    @classmethod
    def build(cls, genotype, num_classes):
        raise NotImplementedError

    @classmethod
    def build_classifier(cls, genotype, num_classes):
        raise NotImplementedError

    def lut_keys(self, size, num_classes):
        c = self.options.channels
        keys = [LutKey(f"cell.{op}", c, c, *size, 1) for op in OPS[1:]]
        return (*keys, keys[0], LutKey("const.head", c, num_classes, *size, 1))

    def lut_module(self, key):
        c = key.c_in
        shape = (1, c, key.h_in, key.w_in)
        if key.op == "const.head":
            return LutModule(nn.Conv2d(c, key.c_out, 1), (shape,))
        modules = {
            "cell.conv1": nn.Conv2d(c, c, 1),
            "cell.conv3": nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)),
            "cell.depthwise": nn.Conv2d(c, c, 3, padding=1, groups=c),
        }
        return LutModule(Sum(modules[key.op]), (shape, shape))

    def latency_model(self, milliseconds, size, num_classes):
        return ToyLatency(milliseconds, tuple(dict.fromkeys(self.lut_keys(size, num_classes))))


@pytest.fixture
def space() -> Toy:
    return Toy(ToyOptions())


@pytest.fixture
def other_space() -> Toy:
    """The same space with another option that changes no key."""
    return Toy(ToyOptions(temperature=2.0))
