"""Lookup-table keys of LGCNet networks: what has to be measured at a target resolution.

Keys hold the evaluation widths. Every cell operation except `none` includes the sum into its node,
so that `skip` is not free. Everything that is not searched is a `const.*` key.

Tables of whole engines know more: what a node costs that computes anything (`node.cell`: a launch
and its output, whichever operations are fused into it), so that an operation's entry is what it
adds to the node; and what the preprocessing of a cell's input costs where an edge reads it
(`input.*`), because engines leave out what nothing reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lgcnet_fast.nn.cell import CELL_EDGES, edge_stride
from lgcnet_fast.nn.fusion import FUSION_WIDTH
from lgcnet_fast.nn.fusion_graphs import FusionEdge, FusionGraph
from lgcnet_fast.nn.operations import CELL_OPS, FUSION_OPS, UP_OPS
from lgcnet_fast.space.base import LutKey
from lgcnet_fast.space.layout import CellLayout, MacroLayout
from lgcnet_fast.space.networks import neck_channels

Size = tuple[int, int]
KeyRow = tuple[LutKey | None, ...]
"""One edge: a key for each option, None for `none`."""


@dataclass(frozen=True)
class NetworkKeys:
    """Keys of every edge's options and of the constant parts, repeated as often as they run."""

    cells: tuple[KeyRow, ...]
    fusion: tuple[KeyRow, ...]
    up: tuple[KeyRow, ...]
    constant: tuple[LutKey, ...]
    shared: tuple[tuple[LutKey, LutKey, LutKey, LutKey], ...] = ()
    """Of engines, one row a cell: nodes x1 and x2, preprocessing of i1 and i2."""

    def distinct(self) -> tuple[LutKey, ...]:
        rows = (*self.cells, *self.fusion, *self.up, *self.shared, self.constant)
        return tuple(dict.fromkeys(key for row in rows for key in row if key is not None))


def network_keys(
    layout: MacroLayout, head: str, graph: FusionGraph | None, size: Size, num_classes: int
) -> NetworkKeys:
    """Keys of a space for inputs of `size` (height, width)."""
    levels = [at_stride(size, layout.cells[tap].stride) for tap in layout.taps]
    c_neck = neck_channels(layout, head)
    return NetworkKeys(
        cells=tuple(row for cell in layout.cells for row in _cell_rows(cell, size)),
        fusion=tuple(_op_row(edge, levels) for edge in graph.op_edges) if graph else (),
        up=tuple(_up_row(edge, levels) for edge in graph.up_edges) if graph else (),
        constant=(
            LutKey("const.stem", 3, layout.stem.widths[2], *size, 4),
            *(key for cell in layout.cells for key in _cell_constants(cell, size)),
            *(
                _fusion_constants(graph, layout, levels)
                if graph
                else _fixed_head(head, layout, c_neck, levels)
            ),
            LutKey("const.classifier", c_neck, num_classes, *levels[0], 1),
        ),
    )


def engine_keys(
    layout: MacroLayout, head: str, graph: FusionGraph | None, size: Size, num_classes: int
) -> NetworkKeys:
    """`network_keys` for tables of whole engines."""
    keys = network_keys(layout, head, graph, size, num_classes)
    shared = tuple(_cell_shared(cell, size) for cell in layout.cells)
    remaining = list(keys.constant)
    for cell in layout.cells:
        for key in _preprocessing(cell, size):
            remaining.remove(key)
    return replace(keys, shared=shared, constant=tuple(remaining))


def at_stride(size: Size, stride: int) -> Size:
    """Size of a map: every stride-2 layer takes n to ceil(n / 2)."""
    return -(-size[0] // stride), -(-size[1] // stride)


def _cell_rows(cell: CellLayout, size: Size) -> Iterator[KeyRow]:
    for edge, (source, _) in enumerate(CELL_EDGES):
        height, width = at_stride(size, cell.stride if source == "x1" else cell.stride_in1)
        stride = edge_stride(edge, cell.reduction)
        yield tuple(
            None
            if op == "none"
            else LutKey(f"cell.{op}", cell.channels, cell.channels, height, width, stride)
            for op in CELL_OPS
        )


def _cell_shared(cell: CellLayout, size: Size) -> tuple[LutKey, LutKey, LutKey, LutKey]:
    node = LutKey("node.cell", cell.channels, cell.channels, *at_stride(size, cell.stride), 1)
    in0, in1 = (
        replace(key, op=key.op.replace("const.", "input.")) for key in _preprocessing(cell, size)
    )
    return node, node, in0, in1


def _preprocessing(cell: CellLayout, size: Size) -> tuple[LutKey, LutKey]:
    size0 = at_stride(size, cell.stride_in0)
    if cell.reduce_first:
        first = LutKey("const.factorized_reduce", cell.c_in0, cell.channels, *size0, 2)
    else:
        first = _relu_conv_bn(cell.c_in0, cell.channels, size0)
    return first, _relu_conv_bn(cell.c_in1, cell.channels, at_stride(size, cell.stride_in1))


def _cell_constants(cell: CellLayout, size: Size) -> Iterator[LutKey]:
    yield from _preprocessing(cell, size)
    yield LutKey("const.concat", cell.channels, cell.c_out, *at_stride(size, cell.stride), 1)


def _op_row(edge: FusionEdge, levels: list[Size]) -> KeyRow:
    c_in = FUSION_WIDTH * len(edge.sources)
    return tuple(
        LutKey(f"fusion.{op}", c_in, FUSION_WIDTH, *levels[edge.level], 1) for op in FUSION_OPS
    )


def _up_row(edge: FusionEdge, levels: list[Size]) -> KeyRow:
    source = levels[edge.level + 1]
    return tuple(LutKey(f"up.{op}", FUSION_WIDTH, FUSION_WIDTH, *source, 2) for op in UP_OPS)


def _fusion_constants(
    graph: FusionGraph, layout: MacroLayout, levels: list[Size]
) -> Iterator[LutKey]:
    for c_in, size in zip(layout.tap_channels, levels, strict=True):
        yield _relu_conv_bn(c_in, FUSION_WIDTH, size)
    for edge in graph.edges:
        joined = FUSION_WIDTH * len(edge.sources)
        if len(edge.sources) > 1:
            yield LutKey("const.concat", FUSION_WIDTH, joined, *levels[edge.level], 1)
        if edge.kind == "join":
            yield _relu_conv_bn(joined, FUSION_WIDTH, levels[edge.level])
    for value in graph.output:
        level = graph.level(value)
        if level > 0:
            factor = 2**level
            yield LutKey("const.resize", FUSION_WIDTH, FUSION_WIDTH, *levels[level], factor)
    for _ in graph.output[1:]:
        yield LutKey("const.sum", FUSION_WIDTH, FUSION_WIDTH, *levels[0], 1)


def _fixed_head(
    head: str, layout: MacroLayout, c_neck: int, levels: list[Size]
) -> Iterator[LutKey]:
    if head != "none":
        yield LutKey(f"const.{head}", layout.tap_channels[-1], c_neck, *levels[-1], 1)


def _relu_conv_bn(c_in: int, c_out: int, size: Size) -> LutKey:
    return LutKey("const.relu_conv_bn", c_in, c_out, *size, 1)
