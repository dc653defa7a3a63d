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

from lgcnet_fast.ops.lanes import lanes_of, side_by_side
from lgcnet_fast.ops.recompute import Recomputable, recomputed, spares

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


def together(
    parts: Sequence[Part], beside: Sequence[Callable[[], None]] = ()
) -> list[list[Tensor]]:
    """What each part computes; the parts keep to the rules of `side_by_side`.

    So do the jobs `beside` them, which have no gradients. Where memory is spared (see
    ops/recompute.py) the parts follow each other in a capture, too.
    """
    if not _beside(parts):
        for job in beside:
            job()
        return [list(part.compute(*part.inputs)) for part in parts]
    places = [_places(part.modules) for part in parts]
    tensors = [
        tensor
        for part, own in zip(parts, places, strict=True)
        for tensor in (*part.inputs, *(parameters[name] for parameters, name in own))
    ]
    counts: list[int] = []
    found = iter(_Together.apply(parts, beside, places, counts, *tensors))
    return [list(islice(found, count)) for count in counts]


def _beside(parts: Sequence[Part]) -> bool:
    if len(parts) < 2 or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    first = parts[0].inputs[0]
    # Side by side they would hold their temporaries at once, a quarter more of a search's memory.
    return lanes_of(first.device) > 1 and not spares(first)


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        parts: Sequence[Part],
        beside: Sequence[Callable[[], None]],
        places: Sequence[Places],
        counts: list[int],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """counts: filled with the number of each part's results."""
        rest = iter(zip(tensors, ctx.needs_input_grad[4:], strict=True))
        leaves: list[list[Tensor]] = []
        jobs: list[Callable[[], Any]] = []
        for part, own in zip(parts, places, strict=True):
            taken = islice(rest, len(part.inputs) + len(own))
            leaves.append([tensor.detach().requires_grad_(wanted) for tensor, wanted in taken])
            jobs.append(partial(_computed, part, own, leaves[-1]))
        with torch.enable_grad():
            results = side_by_side(tensors[0].device, [*jobs, *beside])[: len(jobs)]
        counts += (len(own) for own, _ in results)
        ctx.ends = [end for _, end in results]
        ctx.counts, ctx.leaves = counts, leaves
        ctx.set_materialize_grads(False)
        return tuple(y for own, _ in results for y in own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = iter(gradients)
        jobs = [
            partial(_gradients, end, list(islice(rest, count)), leaves)
            for end, count, leaves in zip(ctx.ends, ctx.counts, ctx.leaves, strict=True)
        ]
        device = next(g.device for g in gradients if g is not None)
        found = side_by_side(device, jobs)
        # What the parts have kept must not be freed before the jobs have been joined.
        ctx.ends = ctx.leaves = None
        return None, None, None, None, *(gradient for own in found for gradient in own)


class _End(torch.autograd.Function):
    """Holds the graph of a part, not its results, which may die before they are differentiated."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor | None], *results: Tensor) -> Tensor:
        """gradients: filled with those of the results before the backward pass."""
        ctx.gradients = gradients
        return results[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, nothing: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


End = tuple[Tensor, list[Tensor | None], list[int]]
"""Of a part: what `_End` gave, the list that it takes gradients from, and the places of the results
that have any."""


def _computed(
    part: Part, places: Places, leaves: Sequence[Tensor]
) -> tuple[list[Tensor], End | None]:
    """The results of a part with these in place of its inputs and parameters, and its end."""
    count = len(part.inputs)
    with replaced(places, leaves[count:]):
        results = list(part.compute(*leaves[:count]))
    differentiable = [at for at, y in enumerate(results) if y.requires_grad]
    if not differentiable:
        return results, None
    gradients: list[Tensor | None] = []
    nothing = _End.apply(gradients, *(results[at] for at in differentiable))
    return [y.detach() for y in results], (nothing, gradients, differentiable)


def _gradients(
    end: End | None, arrived: Sequence[Tensor | None], leaves: Sequence[Tensor]
) -> list[Tensor | None]:
    """Of all leaves, from those of a part's results."""
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if end is None or not wanted or all(g is None for g in arrived):
        return [None] * len(leaves)
    nothing, gradients, differentiable = end
    gradients += (arrived[at] for at in differentiable)
    # Retained: other streams may still read what would be freed here (see ops/lanes.py).
    found = iter(
        torch.autograd.grad(nothing, wanted, nothing, retain_graph=True, allow_unused=True)
    )
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def _places(modules: Sequence[nn.Module]) -> Places:
    every = dict.fromkeys(one for module in modules for one in module.modules())
    return [
        (one._parameters, name)
        for one in every
        for name, parameter in one._parameters.items()
        if parameter is not None
    ]


@contextmanager
def replaced(places: Places, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Other tensors in place of parameters, within the `with` block."""
    before: list[Any] = [parameters[name] for parameters, name in places]
    try:
        for (parameters, name), tensor in zip(places, tensors, strict=True):
            parameters[name] = tensor
        yield
    finally:
        for (parameters, name), tensor in zip(places, before, strict=True):
            parameters[name] = tensor
