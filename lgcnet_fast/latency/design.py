"""Which networks a table of engines is fitted to.

An engine compiles a kernel for each combination of operations that it fuses, which takes far
longer than timing it. So a few networks, in which every row takes each of its options about
equally often, provide the combinations of most others, which are mixtures of those: each node
takes its operations from one of them. Now and then comes a random network, so that the fit knows
other combinations too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lgcnet_fast.latency.genotypes import LIGHT_SHARES, fingerprint, light_genotype
from lgcnet_fast.space.base import Arch, ArchGroup, SearchSpace
from lgcnet_fast.space.genotype import Genotype

PREFERENCE = 10.0
"""Logit of a choice over those of the others, which only repairs of cut-off networks look at."""
TRIES = 20
"""Networks drawn for each one that is wanted, as small spaces repeat themselves."""
RANDOM_EVERY = 8
"""Behind the balanced networks one of so many is random, the others are mixtures."""

Choice = dict[str, Tensor]
"""Group name -> (rows,) index of the option."""


def fitting_genotypes(
    space: SearchSpace, bases: int, networks: int, seed: int = 1
) -> tuple[Genotype, ...]:
    """Up to `networks` different genotypes: first `bases` balanced ones, then random ones among
    mixtures of these.

    Random ones have a share of light operations from 0.1 to 0.9. Of two bases drawn for a node, a
    mixture takes the one with more light operations there with a probability from that range, so
    that small networks occur too.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = _Pool(space, _balanced(space, bases, generator), generator)
    found: dict[str, Genotype] = {}
    for choice in pool.choices:
        genotype = pool.genotype(choice)
        found[fingerprint(genotype)] = genotype
    for number in range(TRIES * networks):
        if len(found) >= networks:
            break
        is_random = number % RANDOM_EVERY == RANDOM_EVERY - 1
        genotype = pool.random() if is_random else pool.genotype(pool.mixture())
        found[fingerprint(genotype)] = genotype
    return tuple(found.values())[:networks]


@dataclass(frozen=True)
class _Pool:
    space: SearchSpace
    choices: list[Choice]
    generator: torch.Generator

    def random(self) -> Genotype:
        return light_genotype(self.space, self._share(), self.generator)

    def mixture(self) -> Choice:
        share = self._share()
        mixed = {name: rows.clone() for name, rows in self.choices[0].items()}
        for rows in self.space.fused_rows():
            pair = torch.randint(len(self.choices), (2,), generator=self.generator).tolist()
            heavier, lighter = sorted(pair, key=lambda base: self._light_in(base, rows))
            taken = self.choices[lighter if self._uniform() < share else heavier]
            for name, row in rows:
                mixed[name][row] = taken[name][row]
        return mixed

    def genotype(self, choice: Choice) -> Genotype:
        logits: Arch = {}
        for group in self.space.arch_groups():
            draw = torch.rand(len(group.rows), len(group.options), generator=self.generator)
            draw[torch.arange(len(group.rows)), choice[group.name]] += PREFERENCE
            logits[group.name] = draw.masked_fill(~_allowed(group), -torch.inf)
        return self.space.discretise(logits)[0]

    def _light_in(self, base: int, rows: tuple[tuple[str, int], ...]) -> int:
        groups = {group.name: group for group in self.space.arch_groups()}
        taken = ((groups[name], int(self.choices[base][name][row])) for name, row in rows)
        return sum(group.options[option] in group.light for group, option in taken)

    def _share(self) -> float:
        low, high = LIGHT_SHARES
        return low + (high - low) * self._uniform()

    def _uniform(self) -> float:
        return float(torch.rand((), generator=self.generator))


def _balanced(space: SearchSpace, count: int, generator: torch.Generator) -> list[Choice]:
    """`count` choices in which every row has each of its options equally often, up to one."""
    columns = {
        group.name: torch.stack(
            [
                _shuffled(allowed.nonzero().flatten(), count, generator)
                for allowed in _allowed(group)
            ]
        )
        for group in space.arch_groups()
    }
    return [{name: rows[:, base] for name, rows in columns.items()} for base in range(count)]


def _shuffled(options: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count,): every option equally often, up to one, in random order."""
    rounds = -(-count // len(options))
    orders = [torch.randperm(len(options), generator=generator) for _ in range(rounds)]
    repeated = options[torch.cat(orders)[:count]]
    return repeated[torch.randperm(count, generator=generator)]


def _allowed(group: ArchGroup) -> Tensor:
    """(rows, options): False for options that a shorter row lacks."""
    if group.mask is not None:
        return torch.tensor(group.mask)
    return torch.ones(len(group.rows), len(group.options), dtype=torch.bool)
