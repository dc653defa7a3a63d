"""Parts of a network that do not depend on each other, side by side in a CUDA graph, both ways.

Autograd goes back through one operation after the other, so that operations which `side_by_side`
runs beside each other going forward would follow each other going backward. `together` hides them
from it: what autograd sees is one operation, which differentiates each part by an autograd of its
own, all parts side by side again. Elsewhere than in a capture the parts simply follow each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lgcnet_fast.ops.lanes import lanes_of, side_by_side
from lgcnet_fast.ops.recompute import Recomputable, recomputed

Places = list[tuple[dict[str, Any], str]]
"""Where modules keep their parameters: a module's own ones, and a name among them."""


@dataclass(frozen=True)
class Part:
    """compute(*inputs), which reads no other tensors that have gradients than parameters."""

    compute: Callable[..., Sequence[Tensor]]
    inputs: Sequence[Tensor]
    modules: Sequence[nn.Module] = ()
    """Those whose parameters it reads."""


@dataclass(frozen=True)
class Work:
    """A part whose inputs are among what can be computed again (see ops/recompute.py)."""

    part: Part
    ways: Sequence[Recomputable]


def worked(works: Sequence[Work]) -> list[list[Tensor]]:
    """What the part of each computes, `together`."""
    with recomputed(*(way for work in works for way in work.ways)):
        return together([work.part for work in works])


def together(parts: Sequence[Part]) -> list[list[Tensor]]:
    """What each part computes; the parts keep to the rules of `side_by_side`."""
    if not _beside(parts):
        return [list(part.compute(*part.inputs)) for part in parts]
    places = [_places(part.modules) for part in parts]
    tensors = [
        tensor
        for part, own in zip(parts, places, strict=True)
        for tensor in (*part.inputs, *(parameters[name] for parameters, name in own))
    ]
    counts: list[int] = []
    found = iter(_Together.apply(parts, places, counts, *tensors))
    return [list(islice(found, count)) for count in counts]


def _beside(parts: Sequence[Part]) -> bool:
    if len(parts) < 2 or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return lanes_of(parts[0].inputs[0].device) > 1


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        parts: Sequence[Part],
        places: Sequence[Places],
        counts: list[int],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """counts: filled with the number of each part's results."""
        rest = iter(zip(tensors, ctx.needs_input_grad[3:], strict=True))
        leaves, jobs = [], []
        for part, own in zip(parts, places, strict=True):
            taken = islice(rest, len(part.inputs) + len(own))
            leaves.append([tensor.detach().requires_grad_(wanted) for tensor, wanted in taken])
            jobs.append(partial(_computed, part, own, leaves[-1]))
        with torch.enable_grad():
            results = side_by_side(tensors[0].device, jobs)
        counts += map(len, results)
        # The results themselves need not live until they are differentiated.
        ctx.edges = [[_edge(y) for y in own] for own in results]
        ctx.leaves = leaves
        ctx.set_materialize_grads(False)
        return tuple(y.detach() for own in results for y in own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = iter(gradients)
        jobs = [
            partial(_gradients, edges, list(islice(rest, len(edges))), leaves)
            for edges, leaves in zip(ctx.edges, ctx.leaves, strict=True)
        ]
        device = next(g.device for g in gradients if g is not None)
        found = side_by_side(device, jobs)
        # What the parts have kept must not be freed before the jobs have been joined.
        ctx.edges = ctx.leaves = None
        return None, None, None, *(gradient for own in found for gradient in own)


def _computed(part: Part, places: Places, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The results of a part with these in place of its inputs and parameters."""
    count = len(part.inputs)
    with _replaced(places, leaves[count:]):
        return list(part.compute(*leaves[:count]))


def _gradients(
    edges: Sequence[GradientEdge | None],
    gradients: Sequence[Tensor | None],
    leaves: Sequence[Tensor],
) -> list[Tensor | None]:
    """Of all leaves, from those of a part's results."""
    arrived = [
        (edge, g)
        for edge, g in zip(edges, gradients, strict=True)
        if edge is not None and g is not None
    ]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not arrived or not wanted:
        return [None] * len(leaves)
    outputs, own = zip(*arrived, strict=True)
    # Retained: other streams may still read what would be freed here (see ops/lanes.py).
    found = iter(torch.autograd.grad(outputs, wanted, own, retain_graph=True, allow_unused=True))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def _edge(y: Tensor) -> GradientEdge | None:
    return get_gradient_edge(y) if y.requires_grad else None


def _places(modules: Sequence[nn.Module]) -> Places:
    every = dict.fromkeys(one for module in modules for one in module.modules())
    return [
        (one._parameters, name)
        for one in every
        for name, parameter in one._parameters.items()
        if parameter is not None
    ]


@contextmanager
def _replaced(places: Places, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Other tensors in place of parameters, within the `with` block."""
    before: list[Any] = [parameters[name] for parameters, name in places]
    try:
        for (parameters, name), tensor in zip(places, tensors, strict=True):
            parameters[name] = tensor
        yield
    finally:
        for (parameters, name), tensor in zip(places, before, strict=True):
            parameters[name] = tensor
