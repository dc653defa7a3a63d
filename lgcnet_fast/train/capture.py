"""Training steps as CUDA graphs: recorded once, then replayed with one launch.

A step is a function of its micro-batches. Everything else that it reads lies at addresses that do
not change: parameters, optimiser state, scheduled numbers (`DeviceScalar`) and random generators,
which the graph advances as the recorded operations would.
"""

from __future__ import annotations

import copy
import gc
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lgcnet_fast.errors import RunError
from lgcnet_fast.ops.compile_ahead import compile_ahead
from lgcnet_fast.ops.lanes import FIRST, background
from lgcnet_fast.recording import recording
from lgcnet_fast.train.run import Run

log = logging.getLogger(__name__)

Result = TypeVar("Result", bound="Tensor | tuple[Tensor, ...]")
Step = Callable[[Iterable[Any]], Result]
"""Takes micro-batches, tuples of tensors."""


class Recorder(Protocol):
    """How `CapturedStep` prepares a step, runs it beforehand, and records it."""

    def prepare(self, step: Step[Any], batches: Sequence[Any]) -> None: ...

    def warm_up(self, function: Callable[[], Result]) -> Result: ...

    def record(self, function: Callable[[], Result]) -> Callable[[], Result]:
        """A replay of `function`, which is not executed yet; raises what makes that impossible."""


def captured(
    run: Run, stage: str, step: Step[Result], generators: Sequence[torch.Generator] = ()
) -> Step[Result]:
    """`step` as a CUDA graph where the run can have one, else `step` itself.

    `generators`: those that the step draws from, besides torch's default one.
    """
    if run.device.type != "cuda" or not run.config.cuda_graph:
        return step
    if run.ranks.world > 1:
        if run.ranks.first:
            log.warning(
                "%s: %d processes train together, so their steps run eagerly: the exchange of "
                "gradients is not captured in a CUDA graph",
                stage,
                run.ranks.world,
            )
        return step
    return CapturedStep(stage, step, CudaRecorder(run.device, generators))


class CapturedStep(Generic[Result]):
    """Runs `step` on copies of its micro-batches at fixed addresses, for each of their shapes.

    The first step of a shape runs eagerly, because choosing cuDNN algorithms, compiling kernels
    and filling caches cannot be recorded. It is a step of the training like any other, so nothing
    has to be undone. The second is recorded, which executes nothing, and replayed, as are all
    others. A result is valid until the next step. Before the first, a recorder may rehearse a step
    that is a method of a trainer.
    """

    def __init__(self, stage: str, step: Step[Result], recorder: Recorder) -> None:
        self._stage, self._step, self._recorder = stage, step, recorder
        self._inputs: dict[object, list[tuple[Tensor, ...]]] = {}
        self._replays: dict[object, Callable[[], Result]] = {}

    def __call__(self, batches: Iterable[tuple[Tensor, ...]]) -> Result:
        batches = list(batches)
        shape = tuple(tensor.shape for batch in batches for tensor in batch)
        if shape not in self._inputs:
            inputs = [tuple(tensor.clone() for tensor in batch) for batch in batches]
            self._inputs[shape] = inputs
            if inspect.ismethod(self._step):
                self._recorder.prepare(self._step, inputs)
            return self._recorder.warm_up(lambda: self._step(inputs))
        inputs = self._inputs[shape]
        for own, batch in zip(inputs, batches, strict=True):
            for buffer, tensor in zip(own, batch, strict=True):
                buffer.copy_(tensor, non_blocking=True)
        if shape not in self._replays:
            self._replays[shape] = self._record(lambda: self._step(inputs))
        return self._replays[shape]()

    def _record(self, function: Callable[[], Result]) -> Callable[[], Result]:
        try:
            return self._recorder.record(function)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(
                f"{self._stage}: the training step cannot be captured in a CUDA graph ({reason}); "
                "set cuda_graph = false to run it eagerly"
            ) from error


def rehearse(
    step: Step[Any], batches: Sequence[Any], generators: Sequence[torch.Generator] = ()
) -> None:
    """Takes the step, a method, with a copy of its object; the next step is none the wiser.

    `generators`: those that the object holds.
    """
    copies: dict[int, Any] = {id(generator): generator.clone_state() for generator in generators}
    trainer = copy.deepcopy(step.__self__, copies)
    with torch.random.fork_rng():
        getattr(trainer, step.__name__)(batches)


class CudaRecorder:
    """Records on a stream of its own, with `generators` besides the default one."""

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self._stream = torch.cuda.Stream(device, priority=FIRST)
        self._generators = generators

    def prepare(self, step: Step[Any], batches: Sequence[Any]) -> None:
        """Compiles the kernels of the step that Triton has not on disk, all at once."""
        generators = self._generators
        compile_ahead(lambda: self.warm_up(lambda: rehearse(step, batches, generators)))

    def warm_up(self, function: Callable[[], Result]) -> Result:
        """Runs it on that stream, so that what belongs to a stream exists when it is recorded."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], Result]) -> Callable[[], Result]:
        # What former stages have left would take memory beside that of the graph.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        with (
            recording(graph, self._stream, self._generators),
            background(self._stream.device),
        ):
            result = function()

        def replay() -> Result:
            graph.replay()
            return result

        return replay
