"""The engine of GPUs without Triton: a folded network on the CUDA kernels and cuDNN."""

from __future__ import annotations

import torch
from torch import Tensor

from lgcnet_fast.deploy.arena import Schedule, allocate, schedule
from lgcnet_fast.deploy.argmax import argmax_labels
from lgcnet_fast.deploy.fused import Call
from lgcnet_fast.deploy.native_calls import NativeCalls
from lgcnet_fast.deploy.operations import Convolution, Size
from lgcnet_fast.deploy.plan import Buffer, Plan
from lgcnet_fast.deploy.program import FoldedNetwork
from lgcnet_fast.deploy.replay import GraphEngine
from lgcnet_fast.deploy.step_plan import Addend, Node, plan_steps
from lgcnet_fast.native.upsample_argmax import upsample_argmax_forward
from lgcnet_fast.native.upsample_cells import MAX_CLASSES, MAX_SIZE


class NativeEngine(GraphEngine["NativeNetwork"]):
    """Label maps of batches of images, at every size a CUDA graph of its own."""

    def __init__(self, network: FoldedNetwork, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(network, device, dtype)
        self._calls = NativeCalls(device, dtype)

    def _in_memory(self, size: Size, batch: int, pixels: torch.dtype) -> NativeNetwork:
        plan = plan_steps(self._network, size, batch, self._dtype)
        return NativeNetwork(plan, self._calls, self._device, pixels)


class NativeNetwork:
    """From images in `image` to logits and labels, on one device; compare `FusedNetwork`."""

    def __init__(
        self,
        plan: Plan[Node],
        calls: NativeCalls,
        device: torch.device,
        pixels: torch.dtype = torch.uint8,
    ) -> None:
        self.plan = plan
        self.schedule: Schedule = schedule(plan.launches)
        arena = allocate(plan, self.schedule)
        self.arena = torch.empty(arena.size, dtype=torch.uint8, device=device)
        self._offsets, self._native = arena.offsets, calls
        self.image = torch.zeros((plan.batch, *plan.size, 3), dtype=pixels, device=device)
        self.calls: tuple[Call, ...] = tuple(self._call(node) for node in plan.launches)

    @property
    def size(self) -> Size:
        return self.plan.size

    def run(self) -> None:
        """All calls, one after another on the current stream."""
        for call in self.calls:
            call()

    def logits(self) -> Tensor:
        """(N, classes, h, w), a view of the arena."""
        return self._map(self.plan.output)

    def write_labels(self, labels: Tensor) -> None:
        """The argmax at the size of `labels`, uint8 (N, H, W), contiguous."""
        logits, size = self.logits(), (labels.shape[1], labels.shape[2])
        if logits.shape[1] <= MAX_CLASSES and max(size) <= MAX_SIZE:
            upsample_argmax_forward(logits, size, labels)
        else:
            labels.copy_(argmax_labels(logits.float(), size))

    def _call(self, node: Node) -> Call:
        """The addends of a node, the first of which writes its map."""
        out = self._map(node.out)
        calls = [self._addend(addend, out, at > 0) for at, addend in enumerate(node.addends)]

        def call() -> None:
            for one in calls:
                one()

        return call

    def _addend(self, addend: Addend, out: Tensor, accumulate: bool) -> Call:
        operation = addend.operation
        if addend.source is not None:
            return self._native.call(operation, self._map(addend.source), out, accumulate)
        if isinstance(operation, Convolution):
            return self._native.first_convolution(operation, self.image, out)
        return self._native.call(operation, self.image, out, accumulate)

    def _map(self, buffer: Buffer) -> Tensor:
        """(N, C, H, W) within the arena."""
        whole, plan = buffer.memory, self.plan
        start = self._offsets[whole]
        data = self.arena[start : start + plan.bytes_of(whole)].view(plan.dtype)
        pixels = data.view(plan.batch, *whole.size, whole.pitch)
        return pixels[..., buffer.first : buffer.first + buffer.channels].permute(0, 3, 1, 2)
