"""Weights stacked once a pass of a network against weights that each operation stacks itself."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lgcnet_fast.kernels.weight_stacks import WeightStacks
from lgcnet_fast.ops import packed_weights, separable_branches, use_backend
from lgcnet_fast.ops.backend import suppose
from lgcnet_fast.ops.constants import separate_constants
from lgcnet_fast.ops.second_stages import second_stages
from lgcnet_fast.recording import recording

CHANNELS = 3


class Branches(nn.Module):
    """Two edges of two dilations, the first of which go through a second stage each."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.depthwise = nn.ParameterList(torch.randn(channels, 1, 3, 3) for _ in range(6))
        self.pointwise = nn.ParameterList(torch.randn(channels, channels, 1, 1) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels, affine=False) for _ in range(2))

    def forward(self, x: Tensor, shared: bool = False) -> Tensor:
        """shared: by tensors of their own that share the parameters' memory."""
        with packed_weights(self):
            return self.alone(x, shared)

    def alone(self, x: Tensor, shared: bool = False) -> Tensor:
        depthwise, pointwise = list(self.depthwise), list(self.pointwise)
        if shared:
            depthwise, pointwise = ([w.detach() for w in own] for own in (depthwise, pointwise))
        stacks = separable_branches(x, depthwise[:4], pointwise[:4], (1, 2), 1, (1, 1, 1, 1))
        firsts = [stacks[0], stacks[2]]
        seconds = second_stages(firsts, list(self.norms), depthwise[4:], pointwise[4:])
        return torch.cat([y.flatten() for (y,) in (*stacks, *seconds)])


class Packing(TorchDispatchMode):
    """Counts the operations that stack weights one call after the other."""

    OPERATIONS = (torch.ops.aten.stack.default, torch.ops.aten._foreach_copy_.default)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation in self.OPERATIONS
        return operation(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.fixture
def network(device: torch.device) -> Branches:
    return Branches().to(device, memory_format=torch.channels_last)


@pytest.fixture
def x(device: torch.device) -> Tensor:
    return a_map(CHANNELS, device)


def a_map(channels: int, device: torch.device) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(1, 3, 4, channels, device=device).movedim(-1, 1)


def outcome(network: Branches, *arguments: object, alone: bool = False) -> list[Tensor]:
    """Output and gradients."""
    out = (network.alone if alone else network)(*arguments)
    parameters = [*network.depthwise, *network.pointwise]
    return [out, *torch.autograd.grad(out.float().square().sum(), parameters)]


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def packings(network: Branches, *arguments: object) -> int:
    """Calls that stack weights in a pass of the network."""
    with Packing() as packing, torch.no_grad():
        network(*arguments)
    return packing.count


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    with torch.autocast(device.type, dtype or torch.float16, enabled=dtype is not None):
        yield


def half_precision(device: torch.device) -> torch.dtype:
    """The interpreter truncates to bfloat16 where a GPU rounds."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


@pytest.mark.parametrize("channels, half", [(1, False), (CHANNELS, True), (16, True)])
def test_same_bits(channels: int, half: bool, device: torch.device) -> None:
    network, x = Branches(channels).to(device), a_map(channels, device)
    with autocast(device, half_precision(device) if half else None):
        wanted = outcome(network, x, alone=True)
        network(x)
        assert same(outcome(network, x), wanted)


def test_the_second_pass_stacks_nothing_call_by_call(network: Branches, x: Tensor) -> None:
    assert packings(network, x) == 4
    assert packings(network, x) == 0
    with autocast(x.device, half_precision(x.device)):
        assert packings(network, x) == 4
        assert packings(network, x) == 0
    assert packings(network, x) == 0
    assert packings(copy.deepcopy(network), x) == 4


def test_values_of_the_pass(network: Branches, x: Tensor) -> None:
    network(x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
    assert torch.equal(network(x), network.alone(x))


def test_parameters_that_have_moved(network: Branches, x: Tensor) -> None:
    network(x)
    for parameter in network.parameters():
        parameter.data = 2 * parameter.data
    assert packings(network, x) == 4
    assert packings(network, x) == 0
    assert torch.equal(network(x), network.alone(x))


def test_copies_that_share_memory_are_served(network: Branches, x: Tensor) -> None:
    network(x)
    assert packings(network, x, True) == 0


def test_passes_without_gradients_and_with_them(network: Branches, x: Tensor) -> None:
    with torch.inference_mode():
        network(x)
        inferred = network(x)
    wanted = outcome(network, x, alone=True)
    assert packings(network, x) == 0
    assert same(outcome(network, x), wanted) and torch.equal(inferred, wanted[0])


def test_stacks_begin_where_vectors_may(
    network: Branches, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tensor] = []
    filled = WeightStacks.filled

    def noted(stacks: WeightStacks, dtype: torch.dtype) -> list[Tensor]:
        found = filled(stacks, dtype)
        made.extend(found)
        return found

    monkeypatch.setattr(WeightStacks, "filled", noted)
    with autocast(x.device, half_precision(x.device)):
        network(x)
        made.clear()
        network(x)
    assert [len(stack) for stack in made] == [4, 4, 2, 2]
    assert len({stack.untyped_storage().data_ptr() for stack in made}) == 2
    assert all(stack.data_ptr() % 16 == 0 and stack.is_contiguous() for stack in made)


def test_a_pass_that_fails_leaves_nothing_behind(network: Branches, x: Tensor) -> None:
    with pytest.raises(ZeroDivisionError), packed_weights(network):
        network.alone(x)
        raise ZeroDivisionError
    with Packing() as packing:
        network.alone(x)
    assert packing.count == 4


def test_weights_that_are_not_dense_are_stacked_by_the_operation(
    network: Branches, x: Tensor
) -> None:
    for index, parameter in enumerate(network.pointwise):
        transposed = parameter.detach().transpose(0, 1).contiguous().transpose(0, 1)
        network.pointwise[index] = nn.Parameter(transposed)
    assert packings(network, x) == 4
    assert packings(network, x) == 2
    assert torch.equal(network(x), network.alone(x))


def test_a_network_is_free_to_go(device: torch.device, x: Tensor) -> None:
    network = Branches().to(device)
    network(x)
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


def test_tensors_without_data() -> None:
    with separate_constants(), FakeTensorMode(), suppose(torch.device("cuda")):
        network, x = Branches(), torch.empty(1, 3, 4, CHANNELS).movedim(-1, 1)
        for _ in range(2):
            outcome(network, x)


def test_the_reference_and_cuda_have_nothing_prepared(network: Branches, x: Tensor) -> None:
    with use_backend("reference"):
        for _ in range(2):
            network(x)
    assert packings(network, x) == 4


@pytest.mark.gpu
def test_a_graph_stacks_the_values_of_each_replay(network: Branches, x: Tensor) -> None:
    if x.device.type != "cuda":
        pytest.skip("needs a CUDA GPU")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        network(x)
        with recording(graph, stream), Packing() as packing:
            out = network(x)
        assert packing.count == 0
        for _ in range(2):
            for parameter in network.parameters():
                parameter.mul_(1.5)
            graph.replay()
            assert torch.equal(out, network.alone(x))
