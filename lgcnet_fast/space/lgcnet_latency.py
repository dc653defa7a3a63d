"""Latency of LGCNet networks predicted from a lookup table (equations 8 and 9).

With a table of whole engines, what edges share is added: a node costs something once if any
operation reaches it, and so does the preprocessing of an input that any edge reads. Each of these
is a product over different edges of whether they are `none`, so the latency stays differentiable
and linear in every edge's Z, its mean over independent edges is that at their mean Z, and at
one-hot Z it is exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lgcnet_fast.errors import TableError
from lgcnet_fast.nn.cell import EDGES_PER_CELL
from lgcnet_fast.nn.operations import CELL_OPS
from lgcnet_fast.space.base import Arch, LatencyModel, LatencyTerms, LutKey
from lgcnet_fast.space.lgcnet_keys import NetworkKeys

NONE = CELL_OPS.index("none")
SHARED_BY = ((0, 1), (2, 3, 4), (0, 2), (1, 3))
"""Edges into node x1, into x2, edges from i1, from i2."""


class LGCNetLatency(LatencyModel):
    """Sums of Z times the table: one entry a cell, the fusion cell last."""

    shared: Tensor
    """(cells, 4) of engines: nodes x1, x2, inputs i1, i2; empty for tables of operations."""
    portions: Tensor
    """(4, 5): an edge's portion of what it shares."""
    cells: Tensor
    fusion: Tensor
    up: Tensor

    def __init__(self, keys: NetworkKeys, milliseconds: Mapping[LutKey, float]) -> None:
        super().__init__()
        for key in keys.distinct():
            if key not in milliseconds:
                raise TableError(f"the latency table lacks the entry '{key}'; build it again")
        for group in ("cells", "fusion", "up"):
            rows = [
                [0.0 if key is None else milliseconds[key] for key in row]
                for row in getattr(keys, group)
            ]
            self.register_buffer(group, torch.tensor(rows), persistent=False)
        shared = [[milliseconds[key] for key in row] for row in keys.shared]
        self.register_buffer("shared", torch.tensor(shared), persistent=False)
        self.register_buffer("portions", _portions(), persistent=False)
        self.constant = sum(milliseconds[key] for key in keys.constant)

    def forward(self, z: Arch) -> LatencyTerms:
        cell_edges = (z["cells"] * self.cells).sum(-1)
        if len(self.shared):
            cell_edges = self._with_shared(cell_edges, z["cells"][:, NONE])
        cells = cell_edges.unflatten(0, (-1, EDGES_PER_CELL)).sum(-1)
        if not len(self.fusion):
            return LatencyTerms(self.constant, cells, cell_edges)
        fusion_edges = [(z[group] * getattr(self, group)).sum(-1) for group in ("fusion", "up")]
        edges = torch.cat((cell_edges, *fusion_edges))
        fusion_cell = edges[len(cell_edges) :].sum(0, keepdim=True)
        return LatencyTerms(self.constant, torch.cat((cells, fusion_cell)), edges)

    def _with_shared(self, edges: Tensor, none: Tensor) -> Tensor:
        """edges (cells * 5,): what the operations add; none: each edge's weight of `none`."""
        empty = none.unflatten(0, (-1, EDGES_PER_CELL)).unbind(-1)
        x1 = 1 - empty[0] * empty[1]
        # Without x1 its edge to x2 computes nothing.
        x2 = 1 - empty[2] * empty[3] * (1 - (1 - empty[4]) * x1)
        used = torch.stack((x1, x2, 1 - empty[0] * empty[2], 1 - empty[1] * empty[3]), dim=-1)
        one = torch.ones_like(x1)
        reached = torch.stack((one, one, one, one, x1), dim=-1)
        return edges * reached.flatten() + ((used * self.shared) @ self.portions).flatten()


def _portions() -> Tensor:
    portions = torch.zeros(len(SHARED_BY), EDGES_PER_CELL)
    for row, edges in zip(portions, SHARED_BY, strict=True):
        row[list(edges)] = 1 / len(edges)
    return portions
