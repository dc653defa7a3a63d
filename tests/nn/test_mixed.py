"""The weights that nodes take from Z."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lgcnet_fast.nn.mixed import node_weights


@dataclass(frozen=True)
class Edge:
    options: tuple[int, ...]
    order: tuple[int, ...]

    def kinds(self) -> list[int]:
        return list(self.order)


NODES = {
    "one edge, in another order": [[Edge((0, 1, 2, 3), (1, 0, 2, 0))]],
    "an option that no edge has": [[Edge((0, 2, 3), (2, 1, 0))]],
    "several nodes": [[Edge((0, 1), (1, 0)), Edge((0, 1), (0, 1))], [Edge((0, 1), (0, 2))]],
    "as they lie": [[Edge((0, 1), (0, 1))]],
}


@pytest.mark.parametrize("nodes", NODES.values(), ids=NODES)
def test_gradients_go_back_to_where_weights_came_from(nodes: list[list[Edge]]) -> None:
    torch.manual_seed(0)
    rows, options = sum(map(len, nodes)), 4 if len(nodes[0][0].options) > 2 else 2
    z = torch.rand(rows, options, dtype=torch.float64, requires_grad=True)
    found = node_weights(nodes, z)
    first = 0
    for edges, weights in zip(nodes, found, strict=True):
        every = [
            (kind, row, option)
            for row, edge in enumerate(edges, start=first)
            for option, kind in zip(edge.options, edge.kinds(), strict=True)
        ]
        wanted = torch.stack([z[row, option] for _, row, option in sorted(every)])
        assert torch.equal(weights, wanted)
        first += len(edges)
    assert torch.autograd.gradcheck(lambda z: tuple(node_weights(nodes, z)), (z,))
