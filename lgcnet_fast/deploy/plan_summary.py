"""What a plan costs at least: launches, bytes, operations, and the time that the bytes take.

    python -m lgcnet_fast.deploy.plan_summary RUN_OR_ENGINE 769 1537 fp16

A launch reads each map and weight once and writes each map once. Bandwidth is that of the device's
memory; maps that are still in the cache come faster, and small launches are bound by latency, so
the floor is none for single launches.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lgcnet_fast.deploy.arena import allocate, schedule
from lgcnet_fast.deploy.blueprint import load_blueprint, run_blueprint
from lgcnet_fast.deploy.lower import lower
from lgcnet_fast.deploy.packing import Packing
from lgcnet_fast.deploy.plan import Launch, Plan, Pool, Stem, Term, Tile, dependencies

H200_BYTES_PER_SECOND = 4.25e12
"""Measured: device-to-device copy, bytes read plus bytes written."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LaunchCost:
    name: str
    what: str
    bytes_read: int
    bytes_written: int
    operations: int
    """Multiplications and additions."""
    depth: int
    """Launches on the longest way to this one, itself included."""


def launch_costs(plan: Plan) -> list[LaunchCost]:
    costs: list[LaunchCost] = []
    for launch, needed in zip(plan.launches, dependencies(plan.launches), strict=True):
        read = sum(plan.bytes_of(buffer) for buffer in set(launch.reads))
        if isinstance(launch, Stem):
            read += plan.batch * plan.size[0] * plan.size[1] * 3
        costs.append(
            LaunchCost(
                launch.name,
                _what(plan, launch),
                read + sum(_bytes(weight) for weight in _weights(launch)),
                sum(plan.bytes_of(buffer) for buffer in launch.writes),
                _operations(plan, launch),
                1 + max((costs[at].depth for at in needed), default=0),
            )
        )
    return costs


def summary(plan: Plan, bytes_per_second: float = H200_BYTES_PER_SECOND) -> str:
    """A table of the launches and their totals. The label map comes on top, in one more launch."""
    costs = launch_costs(plan)
    order = schedule(plan.launches)
    lines = [
        f"{'launch':<22}{'stream':>6}{'read MB':>9}{'written':>9}{'MFLOP':>8}{'floor us':>9}  what"
    ]
    for cost, stream in zip(costs, order.streams, strict=True):
        moved = cost.bytes_read + cost.bytes_written
        lines.append(
            f"{cost.name:<22}{stream:>6}{cost.bytes_read / 1e6:>9.2f}"
            f"{cost.bytes_written / 1e6:>9.2f}{cost.operations / 1e6:>8.0f}"
            f"{1e6 * moved / bytes_per_second:>9.2f}  {cost.what}"
        )
    total = sum(cost.bytes_read + cost.bytes_written for cost in costs)
    height, width = plan.size
    lines += [
        f"{plan.batch} x {height} x {width}, {str(plan.dtype).removeprefix('torch.')}: "
        f"{len(costs)} launches, {max(cost.depth for cost in costs)} of them one after another",
        f"{total / 1e6:.1f} MB, {1e6 * total / bytes_per_second:.0f} us at "
        f"{bytes_per_second / 1e12:.2f} TB/s; "
        f"{sum(cost.operations for cost in costs) / 1e9:.2f} GFLOP; "
        f"arena {allocate(plan, order).size / 1e6:.1f} MB",
    ]
    return "\n".join(lines)


def _what(plan: Plan, launch: Launch) -> str:
    if isinstance(launch, Tile):
        return plan.key_of(launch)
    return "stem from bytes" if isinstance(launch, Stem) else f"pool to {launch.out.size}"


def _weights(launch: Launch) -> list[Tensor]:
    if not isinstance(launch, Tile):
        return [launch.weight, launch.bias]
    found = [launch.bias]
    for term in launch.terms:
        found += [weight for weight in (term.weight, term.depthwise) if weight is not None]
    for product in launch.products:
        found += [product.weight, product.bias]
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _operations(plan: Plan, launch: Launch) -> int:
    """Of an output pixel, times the output pixels; a maximum counts as one."""
    if isinstance(launch, Pool):
        pixels = sum(source.height * source.width * source.channels for source in launch.sources)
        return plan.batch * (2 * pixels + 2 * launch.weight.numel() * launch.out.height**2)
    height, width = launch.out.size
    if isinstance(launch, Stem):
        return plan.batch * height * width * 2 * launch.weight.numel()
    of_terms = sum(_term_operations(term) for term in launch.terms)
    of_products = sum(2 * product.weight.numel() for product in launch.products)
    return plan.batch * height * width * (of_terms + of_products)


def _term_operations(term: Term) -> int:
    channels = term.source.channels
    of_weight = 0 if term.weight is None else 2 * term.weight.numel()
    if term.kind == "transposed":
        # A quarter of the output pixels has 4 taps, half of them 2, a quarter 1.
        return of_weight // 4
    extra = {"pool": 10, "separable": 19, "copy": 1, "resized": 7, "resized_product": 8}
    if term.kind == "interleaved":
        return of_weight // 2
    return of_weight + extra.get(term.kind, 1) * channels


def main() -> None:
    path, height, width, dtype = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    blueprint = run_blueprint(path) if path.is_dir() else load_blueprint(path)
    packing = Packing(torch.device("cpu"), DTYPES[dtype])
    print(summary(lower(blueprint.network, (height, width), 1, packing)))


if __name__ == "__main__":
    main()
