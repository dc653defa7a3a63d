"""Cell communication: how the architecture logits of neighbouring cells inform each other.

The graph-guided module (LGCNet equations 5 to 7) and the alternatives that the paper compares it
with. All of it works on small matrices: p = 5 edges by q = 8 operations a cell. It only shapes the
search and is dropped afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

Communication = Literal["gcn", "gcn_opid", "fc", "independent", "shared"]

INIT_STD = 0.01

ALL = slice(None)
"""Every pair of adjacent cells."""


class PairwiseLinear(nn.Module):
    """One linear layer for each of P pairs of adjacent cells: (P, rows, n_in) -> (P, rows, n_out).

    Initialised as `nn.Linear`.
    """

    def __init__(self, pairs: int, n_in: int, n_out: int, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(n_in)
        self.weight = nn.Parameter(torch.empty(pairs, n_in, n_out).uniform_(-bound, bound))
        self.bias = (
            nn.Parameter(torch.empty(pairs, 1, n_out).uniform_(-bound, bound)) if bias else None
        )

    def forward(self, x: Tensor, pairs: slice) -> Tensor:
        y = x @ _of_pairs(self.weight, pairs)
        return y if self.bias is None else y + _of_pairs(self.bias, pairs)


class PairwiseLayers(nn.ModuleList):
    """Linear layers in sequence, without activations: widths (a, b, c) give a -> b -> c."""

    def __init__(self, pairs: int, widths: Sequence[int]) -> None:
        super().__init__(PairwiseLinear(pairs, *ends) for ends in pairwise(widths))

    def forward(self, x: Tensor, pairs: slice) -> Tensor:
        for layer in self:
            x = layer(x, pairs)
        return x


class EdgeReasoning(nn.Module):
    """Graph convolution over edges (equations 5 to 7): what cell k - 1 tells cell k.

    Nodes are the p edges; Adj = softmax_row((alpha_k W_1)(alpha_{k-1} W_2)^T) compares each edge
    of cell k with all edges of cell k - 1. `n_fc` layers make up each of Phi_1 and Phi_2.
    """

    def __init__(self, pairs: int, options: int, width: int, n_fc: int, relu: bool) -> None:
        super().__init__()
        inner = [width] * n_fc
        self.compare_current = PairwiseLinear(pairs, options, options, bias=False)
        self.compare_previous = PairwiseLinear(pairs, options, options, bias=False)
        self.expand = PairwiseLayers(pairs, [options, *inner])
        self.convolve = PairwiseLinear(pairs, width, width, bias=False)
        self.contract = PairwiseLayers(pairs, [*inner, options])
        self.relu = relu

    def forward(self, previous: Tensor, current: Tensor, pairs: slice) -> Tensor:
        """previous, current: (P, p, q) logits of the cells in front and behind; (P, p, q)."""
        scores = self.compare_current(current, pairs) @ self.compare_previous(previous, pairs).mT
        hidden = self.expand(previous, pairs)
        return self.contract(_convolve(self, scores.softmax(-1), hidden, pairs), pairs)


class OperationReasoning(nn.Module):
    """Graph convolution over (edge, operation) pairs: p q nodes of one number each."""

    def __init__(self, pairs: int, width: int, n_fc: int, relu: bool) -> None:
        super().__init__()
        inner = [width] * n_fc
        self.expand = PairwiseLayers(pairs, [1, *inner])
        self.convolve = PairwiseLinear(pairs, width, width, bias=False)
        self.contract = PairwiseLayers(pairs, [*inner, 1])
        self.relu = relu

    def forward(self, previous: Tensor, current: Tensor, pairs: slice) -> Tensor:
        """previous, current: (P, p, q). Returns (P, p, q)."""
        nodes = previous.flatten(1).unsqueeze(-1)
        scores = current.flatten(1).unsqueeze(-1) @ nodes.mT
        hidden = self.expand(nodes, pairs)
        told = self.contract(_convolve(self, scores.softmax(-1), hidden, pairs), pairs)
        return told.reshape(current.shape)


class FullyConnectedReasoning(nn.Module):
    """One linear layer from all logits of cell k - 1 to all logits of cell k."""

    def __init__(self, pairs: int, numbers: int) -> None:
        super().__init__()
        self.layer = PairwiseLinear(pairs, numbers, numbers)

    def forward(self, previous: Tensor, current: Tensor, pairs: slice) -> Tensor:
        """previous, current: (P, p, q). Returns (P, p, q)."""
        return self.layer(previous.flatten(1).unsqueeze(1), pairs).reshape(current.shape)


class CellCommunication(nn.Module):
    """Logits alpha of all cells; `forward()` returns alpha', (cells * p, q).

    alpha' = alpha_k + gamma * reasoning(alpha_{k-1}, alpha_k), and alpha'_0 = alpha_0. `chain`
    feeds alpha'_{k-1} instead of the raw alpha_{k-1}. In mode `shared` all normal cells have one
    matrix and all reduction cells another. Runs in the parameters' precision under autocast too.
    """

    owners: Tensor | None
    """The matrix of each cell, where they share some."""

    def __init__(
        self,
        cells: int,
        edges: int,
        options: int,
        mode: Communication = "gcn",
        reductions: Sequence[int] = (),
        width: int = 64,
        gamma: float = 0.5,
        n_fc: int = 1,
        chain: bool = False,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.gamma = gamma
        self.chain = chain
        matrices = 2 if mode == "shared" else cells
        self.alpha = nn.Parameter(torch.empty(matrices, edges, options).normal_(1, INIT_STD))
        owners = torch.tensor([int(k in reductions) for k in range(cells)])
        self.register_buffer("owners", owners if mode == "shared" else None, persistent=False)
        self.reasoning = _reasoning(mode, cells - 1, edges, options, width, n_fc, relu)

    def forward(self) -> Tensor:
        with torch.autocast(self.alpha.device.type, enabled=False):
            alpha = self.alpha if self.owners is None else self.alpha[self.owners]
            if self.reasoning is not None and len(alpha) > 1:
                inform = self._chained if self.chain else self._adjacent
                alpha = inform(alpha, self.reasoning)
            return alpha.flatten(0, 1)

    def _adjacent(self, alpha: Tensor, reasoning: nn.Module) -> Tensor:
        previous, current = alpha[:-1], alpha[1:]
        told = reasoning(previous, current, ALL)
        return torch.cat((alpha[:1], current + self.gamma * told))

    def _chained(self, alpha: Tensor, reasoning: nn.Module) -> Tensor:
        updated = [alpha[:1]]
        for pair, current in enumerate(alpha[1:].split(1)):
            told = reasoning(updated[-1], current, slice(pair, pair + 1))
            updated.append(current + self.gamma * told)
        return torch.cat(updated)


def _reasoning(
    mode: Communication, pairs: int, edges: int, options: int, width: int, n_fc: int, relu: bool
) -> nn.Module | None:
    if mode == "gcn":
        return EdgeReasoning(pairs, options, width, n_fc, relu)
    if mode == "gcn_opid":
        return OperationReasoning(pairs, width, n_fc, relu)
    if mode == "fc":
        return FullyConnectedReasoning(pairs, edges * options)
    return None


def _of_pairs(parameter: Tensor, pairs: slice) -> Tensor:
    """Autograd fills zeros and copies into them for a part, be it the whole."""
    return parameter if pairs == ALL else parameter[pairs]


def _convolve(
    graph: EdgeReasoning | OperationReasoning, adjacency: Tensor, hidden: Tensor, pairs: slice
) -> Tensor:
    """Equation 7: G(H, Adj) = Adj H W + H, with a ReLU in front of the residual if asked for."""
    convolved = graph.convolve(adjacency @ hidden, pairs)
    return (convolved.relu() if graph.relu else convolved) + hidden
