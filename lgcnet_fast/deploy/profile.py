"""Times every launch of a plan on a GPU, beside the time that its bytes take at least.

    python -m lgcnet_fast.deploy.profile reference 769 1537 fp16 --batch 1 --out profile.json
    python -m lgcnet_fast.deploy.profile reference 769 1537 fp32 --backend cuda

Each launch is timed alone, replayed from a CUDA graph with its maps in the cache. Their sum is
then compared with the whole network: one graph in which launches follow each other, and the engine
from image to labels. `host_us` is the time until the call for a frame returns, `graph_host_us` that
of the graph alone; `image_host_us` and `labels_host_us` are those of the copies that frames need
beside it where the graph keeps its addresses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lgcnet_fast.deploy.fold import fold
from lgcnet_fast.deploy.plan import Plan
from lgcnet_fast.deploy.plan_summary import (
    DTYPES,
    H200_BYTES_PER_SECOND,
    LaunchCost,
    launch_costs,
)
from lgcnet_fast.deploy.program import FoldedNetwork
from lgcnet_fast.deploy.replay import FusedEngine, GraphEngine, NetworkInMemory
from lgcnet_fast.deploy.tune import microseconds
from lgcnet_fast.space.genotype import load_genotype
from lgcnet_fast.space.registry import registered_spaces

FRAMES = 200


def profile(
    network: FoldedNetwork,
    size: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    backend: str = "triton",
) -> dict[str, object]:
    """Microseconds by launch and of the whole; to be run on an otherwise idle GPU."""
    engine, costs_of = _engine(network, dtype, backend)
    images = torch.randint(0, 256, (batch, *size, 3), dtype=torch.uint8, device="cuda")
    engine.labels(images, None)
    fused = engine.network(batch, size)
    labels = images.new_empty((batch, *size))
    launches = [
        {
            "launch": cost.name,
            "what": cost.what,
            "us": microseconds(call),
            "floor_us": 1e6 * (cost.bytes_read + cost.bytes_written) / H200_BYTES_PER_SECOND,
        }
        for cost, call in zip(costs_of(fused.plan), fused.calls, strict=True)
    ]
    host_us, frame_us = _frames(lambda: engine.labels(images, None))
    parts = {
        "graph_host_us": engine.start(batch, size),
        "image_host_us": lambda: fused.image.copy_(images),
        "labels_host_us": labels.clone,
    }
    return {
        "backend": backend,
        "gpu": torch.cuda.get_device_name(),
        "size": size,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "launches": launches,
        "argmax_us": microseconds(lambda: fused.write_labels(labels)),
        "one_after_another_us": microseconds(lambda: _whole(fused, labels)),
        "engine_us": frame_us,
        "host_us": host_us,
        **{name: _frames(part)[0] for name, part in parts.items()},
    }


def _engine(
    network: FoldedNetwork, dtype: torch.dtype, backend: str
) -> tuple[GraphEngine[Any], Callable[[Plan[Any]], list[LaunchCost]]]:
    """And what tells the costs of its plans."""
    device = torch.device("cuda")
    if backend == "triton":
        return FusedEngine(network, device, dtype), launch_costs
    from lgcnet_fast.deploy.native_engine import NativeEngine
    from lgcnet_fast.deploy.step_costs import node_costs

    return NativeEngine(network, device, dtype), node_costs


def _whole(fused: NetworkInMemory, labels: torch.Tensor) -> None:
    for call in fused.calls:
        call()
    fused.write_labels(labels)


def _frames(frame: Callable[[], object]) -> tuple[float, float]:
    """Microseconds a frame: until the call returns, and back to back until the GPU is done."""
    host: list[float] = []
    for _ in range(FRAMES):
        start = time.perf_counter()
        frame()
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(FRAMES):
        frame()
    torch.cuda.synchronize()
    return 1e6 * statistics.median(host), 1e6 * (time.perf_counter() - start) / FRAMES


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lgcnet_fast.deploy.profile")
    parser.add_argument("genotype", help="name of one that comes with the package, or a file")
    parser.add_argument("height", type=int)
    parser.add_argument("width", type=int)
    parser.add_argument("dtype", choices=sorted(DTYPES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--backend", choices=("triton", "cuda"), default="triton")
    parser.add_argument("--out", type=Path, help="JSON file")
    chosen = parser.parse_args(arguments)

    genotype = load_genotype(chosen.genotype)
    network = fold(registered_spaces()[genotype.space].build(genotype, 19).eval())
    size = (chosen.height, chosen.width)
    found = profile(network, size, chosen.batch, DTYPES[chosen.dtype], chosen.backend)
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(_text(found))


def _text(found: dict[str, object]) -> str:
    launches = found["launches"]
    assert isinstance(launches, list)
    lines = [
        f"{row['us']:8.2f} us, floor {row['floor_us']:6.2f}  {row['launch']:<20} {row['what']}"
        for row in launches
    ]
    lines.append(f"{sum(row['us'] for row in launches):8.1f} us: sum of {len(launches)} launches")
    for name in (name for name in found if name.endswith("_us")):
        lines.append(f"{found[name]:8.1f} us: {name.removesuffix('_us').replace('_', ' ')}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
