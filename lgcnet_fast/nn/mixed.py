"""The mixed operation: every candidate of an edge, weighted by one row of Z (equation 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from lgcnet_fast.ops import mixed_sum


class MixedOp(nn.Module):
    """Candidates in option order. One that is None (`none`) adds nothing and is not computed."""

    def __init__(self, candidates: Mapping[str, nn.Module | None]) -> None:
        super().__init__()
        self.candidates = nn.ModuleDict({k: op for k, op in candidates.items() if op is not None})
        self._options = tuple(i for i, op in enumerate(candidates.values()) if op is not None)

    def terms(self, weights: Tensor, *inputs: object) -> Iterator[tuple[Tensor, Tensor]]:
        """(output, weight) of each computed candidate, to be summed by the edge's target node.

        weights: (options,), one row of Z; inputs: what the candidates take, the map first.
        """
        row = weights.unbind()
        for option, candidate in zip(self._options, self.candidates.values(), strict=True):
            yield candidate(*inputs), row[option]

    def forward(self, weights: Tensor, *inputs: object) -> Tensor:
        outputs, row = zip(*self.terms(weights, *inputs), strict=True)
        return mixed_sum(outputs, row)
