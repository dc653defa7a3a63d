"""Whether the taps of a genotype are connected to the stem, and the least change that does it.

The nodes of the whole network form one graph: a cell's output counts as reached when one of its
two intermediate nodes is, because the output concatenates them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lgcnet_fast.nn.cell import CELL_EDGES
from lgcnet_fast.nn.operations import CELL_OPS

NONE = CELL_OPS.index("none")


@dataclass(frozen=True)
class _Route:
    """Cheapest way from the stem to a node: its cost, and the (cell, edge) pairs it pays for."""

    cost: float
    paid: tuple[tuple[int, int], ...] = ()


def unreachable_taps(cells: Sequence[Sequence[str]], taps: Sequence[int]) -> list[int]:
    """Taps that no path of operations other than `none` connects to the stem."""
    routes = _routes(taps[-1] + 1, lambda k, edge: math.inf if cells[k][edge] == "none" else 0.0)
    return [tap for tap in taps if routes[tap].cost > 0]


def connect_taps(
    logits: Tensor, choice: list[list[int]], taps: Sequence[int]
) -> list[tuple[int, int]]:
    """Changes `choice` in place so that every tap is reached; returns the changed (cell, edge)s.

    logits: (cells, 5, 8) on the CPU; choice: option index of each cell's edges. While a tap is cut
    off, the `none` edges on its cheapest way from the stem take their runner-up, the smallest
    logit gap first; the cost of a way is the sum of those gaps.
    """
    others = logits.clone()
    others[..., NONE] = -math.inf
    runner_up = others.argmax(-1).tolist()
    gaps = (logits[..., NONE] - others.amax(-1)).clamp(min=1e-12).tolist()
    changed = []
    for tap in taps:
        routes = _routes(tap + 1, lambda k, edge: gaps[k][edge] if choice[k][edge] == NONE else 0.0)
        for k, edge in sorted(routes[tap].paid, key=lambda place: gaps[place[0]][place[1]]):
            choice[k][edge] = runner_up[k][edge]
            changed.append((k, edge))
    return changed


def _routes(cells: int, cost: Callable[[int, int], float]) -> list[_Route]:
    """Cheapest route to the output of each cell."""
    stem = _Route(0.0)
    outputs = [stem, stem]
    for k in range(cells):
        nodes = {"i1": outputs[-2], "i2": outputs[-1]}
        for edge, (source, target) in enumerate(CELL_EDGES):
            price = cost(k, edge)
            paid = ((k, edge),) if price > 0 else ()
            route = _Route(nodes[source].cost + price, nodes[source].paid + paid)
            nodes[target] = min(nodes.get(target, route), route, key=lambda way: way.cost)
        outputs.append(min(nodes["x1"], nodes["x2"], key=lambda way: way.cost))
    return outputs[2:]
