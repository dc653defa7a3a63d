"""What Triton asks of a GPU when it compiles for one that is not there."""

from __future__ import annotations

from triton.backends.compiler import GPUTarget


class StandIn:
    """A driver of a GPU that is not there, as far as compiling needs one."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
