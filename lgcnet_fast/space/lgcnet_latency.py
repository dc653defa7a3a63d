"""Latency of LGCNet networks predicted from a lookup table (equations 8 and 9)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lgcnet_fast.errors import TableError
from lgcnet_fast.nn.cell import EDGES_PER_CELL
from lgcnet_fast.space.base import Arch, LatencyModel, LatencyTerms, LutKey
from lgcnet_fast.space.lgcnet_keys import NetworkKeys


class LGCNetLatency(LatencyModel):
    """Sums of Z times the table: one entry a cell, the fusion cell last."""

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
        self.constant = sum(milliseconds[key] for key in keys.constant)

    def forward(self, z: Arch) -> LatencyTerms:
        cell_edges = (z["cells"] * self.cells).sum(-1)
        cells = cell_edges.unflatten(0, (-1, EDGES_PER_CELL)).sum(-1)
        if not len(self.fusion):
            return LatencyTerms(self.constant, cells, cell_edges)
        fusion_edges = [(z[group] * getattr(self, group)).sum(-1) for group in ("fusion", "up")]
        edges = torch.cat((cell_edges, *fusion_edges))
        fusion_cell = edges[len(cell_edges) :].sum(0, keepdim=True)
        return LatencyTerms(self.constant, torch.cat((cells, fusion_cell)), edges)
