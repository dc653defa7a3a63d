"""The package's operations, forward and backward, on one backend: `python -m
bench.kernels.operations --backend triton|cuda` (see command.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.device import LAYOUTS
from bench.kernels.command import main
from bench.kernels.comparison import Comparison, Family, Part
from bench.kernels.operation_cases import Inputs, OperationCase, Outputs, cases
from bench.kernels.shapes import INPUTS, Size
from bench.kernels.timing import Call, gate
from lgcnet_fast.ops.backend import current_backend

Function = Callable[[Inputs], Outputs]


def both_ways(
    case: OperationCase, function: Function, i: Inputs, weights: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Outputs, then the gradients of the differentiable inputs.

    weights: the gradients of the outputs; by default the outputs themselves.
    """
    count = case.differentiable
    leaves = [x.detach().requires_grad_() for x in i[:count]]
    found = function([*leaves, *i[count:]])
    outputs = [found] if isinstance(found, Tensor) else list(found)
    if not count:
        return outputs
    weights = weights or [y.detach() for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


def check(case: OperationCase, i: Inputs) -> None:
    results = [result.detach() for result in both_ways(case, case.ours, i)]
    exact = [x.double() if x.is_floating_point() else x for x in i]
    weights = [y.double() for y in results[: len(results) - case.differentiable]]
    truths = both_ways(case, case.plain, exact, weights)
    for number, (result, truth) in enumerate(zip(results, truths, strict=True)):
        if result.is_floating_point():
            what = f"{case.operation} {case}: result {number}"
            gate(what, result.to(case.dtype), truth.detach(), factor=case.roundings)
        elif (result != truth).float().mean() > 1e-4:
            raise SystemExit(f"WRONG RESULT: {case.operation} {case}")


def stock(case: OperationCase, layout: torch.memory_format) -> Callable[[Inputs], Call]:
    def bind(i: Inputs) -> Call:
        placed = [
            x.contiguous(memory_format=layout) if x.ndim == 4 and x.is_floating_point() else x
            for x in i
        ]
        return lambda: both_ways(case, case.plain, placed)

    return bind


def comparison(case: OperationCase) -> Comparison:
    return Comparison(
        operation=f"{current_backend().name} {case.operation}",
        case=str(case),
        bytes=case.bytes,
        operations=case.flops,
        make=case.make,
        check=lambda i: check(case, i),
        ours=lambda i: both_ways(case, case.ours, i),
        stock={name: stock(case, layout) for name, layout in LAYOUTS.items()},
        most_sets=4,
    )


def comparisons(part: Part) -> Iterator[Comparison]:
    sizes: tuple[Size | None, ...] = (None,) if part == "dry" else ((256, 512),)
    dtypes = (torch.bfloat16,)
    if part == "full":
        sizes, dtypes = tuple(INPUTS), (torch.bfloat16, torch.float32)
    for size in sizes:
        for dtype in dtypes:
            yield from map(comparison, cases(size, dtype))


FAMILY = Family("operations", comparisons)

if __name__ == "__main__":
    main(FAMILY)
