"""What the nodes of a step plan cost at least: bytes and operations.

An operation reads its map and its weights once and writes its result once; one that adds to a map
reads that too. What cuDNN and PyTorch keep in between is not counted.
"""

from __future__ import annotations

from lgcnet_fast.deploy.operations import (
    MaxPooling,
    PooledConvolution,
    Resizing,
    TransposedConvolution,
)
from lgcnet_fast.deploy.plan import Plan, dependencies
from lgcnet_fast.deploy.plan_summary import LaunchCost
from lgcnet_fast.deploy.step_plan import Addend, Node


def node_costs(plan: Plan[Node]) -> list[LaunchCost]:
    costs: list[LaunchCost] = []
    for node, needed in zip(plan.launches, dependencies(plan.launches), strict=True):
        written = plan.bytes_of(node.out) * len(node.addends)
        added_to = written - plan.bytes_of(node.out)
        costs.append(
            LaunchCost(
                node.name,
                ", ".join(_what(addend) for addend in node.addends),
                sum(_bytes_read(plan, addend) for addend in node.addends) + added_to,
                written,
                plan.batch * sum(_operations(addend, node) for addend in node.addends),
                1 + max((costs[at].depth for at in needed), default=0),
            )
        )
    return costs


def _what(addend: Addend) -> str:
    """`DepthwiseSeparableConvolution 64`: with the input's channels."""
    name = type(addend.operation).__name__
    return name if addend.source is None else f"{name} {addend.source.channels}"


def _bytes_read(plan: Plan[Node], addend: Addend) -> int:
    weights = sum(4 * weight.numel() for weight in addend.operation.parameters())
    if addend.source is None:
        return weights + plan.batch * plan.size[0] * plan.size[1] * 3
    return weights + plan.bytes_of(addend.source)


def _operations(addend: Addend, node: Node) -> int:
    """Of an image; a maximum counts as one."""
    operation, (height, width) = addend.operation, node.out.size
    weights = sum(2 * w.numel() for name, w in operation.named_parameters() if name != "bias")
    if isinstance(operation, MaxPooling):
        return height * width * 9 * node.out.channels
    if isinstance(operation, Resizing):
        return height * width * 7 * node.out.channels
    if isinstance(operation, PooledConvolution):
        return operation.bins**2 * weights + height * width * 7 * node.out.channels
    if isinstance(operation, TransposedConvolution):
        # A quarter of the output pixels has 4 taps, half of them 2, a quarter 1.
        return height * width * weights // 4
    return height * width * weights
