"""CUDA graphs without a GPU: operations recorded on a tape and executed again.

As in a CUDA graph, Python runs only while recording: a number that it handed to an operation stays
what it was, every tensor stays where it was, and reading a value on the host is refused. Recording
executes the operations too, so the first replay only hands out their results.
"""

from __future__ import annotations

import inspect

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lgcnet_fast.train.capture import rehearse

SYNCHRONISING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.lift_fresh.default,
}
"""Values read on the host, and (the last) tensors made from Python numbers."""


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in SYNCHRONISING and not _checks_an_argument():
            raise RuntimeError(f"{operation} waits for the device")
        results = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def run(self):
        for operation, args, kwargs, results in self.operations:
            returns = operation._schema.returns
            if any(
                value.alias_info is not None and not value.alias_info.is_write for value in returns
            ):
                continue  # a view of memory that is written by now
            fresh = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(fresh), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


def _checks_an_argument():
    """Operations look at values that lie on the CPU in their checks; on a GPU they do not."""
    stack = inspect.stack(context=0)
    return any("/ops/" in frame.filename and frame.function.startswith("_check") for frame in stack)


class TapeRecorder:
    """In the place of `CudaRecorder`; `recordings` counts the tapes, `rehearsals` the others."""

    def __init__(self, generators=()):
        self.generators = generators
        self.recordings = self.rehearsals = 0

    def prepare(self, step, batches):
        self.rehearsals += 1
        rehearse(step, batches, self.generators)

    def warm_up(self, function):
        return function()

    def record(self, function):
        self.recordings += 1
        tape = Tape()
        with tape:
            result = function()
        done = [True]

        def replay():
            if not (done and done.pop()):
                tape.run()
            return result

        return replay
