"""Moves 1x1 convolutions of a node into the launch that computes the node.

The node's pixels then go from registers into the products. A cell's output is read by nothing else
than the preprocessing of the next two cells and by the fusion cell, so most are never stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lgcnet_fast.deploy.packing import Packing
from lgcnet_fast.deploy.plan import Buffer, Launch, Product, Tile

MOST_CHANNELS = 128
"""Of a node that takes products; wider ones would not fit into registers."""
MOST_CHANNELS_WITHOUT_MATRIX_UNITS = 64


def chained(launches: Sequence[Launch], output: Buffer, packing: Packing) -> tuple[Launch, ...]:
    """The launches without those that moved into others, and without stores that nothing reads."""
    most = MOST_CHANNELS if packing.matrix_units else MOST_CHANNELS_WITHOUT_MATRIX_UNITS
    made_at: dict[Buffer, int] = {}
    kept: list[Launch] = []
    for launch in launches:
        node = _node_of(launch, kept, made_at, most)
        if isinstance(launch, Tile) and node is not None:
            node.products.append(_product(launch, node.out, packing))
            made_at[launch.out] = made_at[node.out]
        else:
            made_at |= {out: len(kept) for out in launch.writes}
            kept.append(launch)
    _drop_stores(kept, output)
    return tuple(kept)


def _node_of(
    launch: Launch, kept: Sequence[Launch], made_at: Mapping[Buffer, int], most: int
) -> Tile | None:
    """The node that can take a launch along: the last one computed of those that it multiplies.

    Every other part of the input is then in memory before the node is computed.
    """
    if not isinstance(launch, Tile) or launch.relu_out or launch.out.channels > 2 * most:
        return None
    if not launch.terms or not all(term.is_pointwise and term.relu for term in launch.terms):
        return None
    sources = [term.source for term in launch.terms]
    last = max(made_at[source] for source in sources)
    node = kept[last]
    if [source for source in sources if made_at[source] == last] != [node.writes[0]]:
        return None
    if not isinstance(node, Tile) or node.out.channels > most or node.out.size != launch.out.size:
        return None
    return node


def _product(launch: Tile, node: Buffer, packing: Packing) -> Product:
    ordered = sorted(launch.terms, key=lambda term: term.source is not node)
    weights = [term.weight for term in ordered if term.weight is not None]
    parts = tuple(term.source for term in ordered[1:])
    return Product(launch.name, parts, packing.stacked(weights), launch.bias, launch.out)


def _drop_stores(launches: Sequence[Launch], output: Buffer) -> None:
    read = {output, *(buffer for launch in launches for buffer in launch.reads)}
    for launch in launches:
        if isinstance(launch, Tile):
            launch.stored = launch.out in read
