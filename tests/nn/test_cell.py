import pytest
import torch
from torch import nn

from lgcnet_fast.nn.cell import CELL_EDGES, DerivedCell, SearchCell, edge_stride, weights_of
from lgcnet_fast.nn.operations import CELL_OPS

NO_OP = ("none",) * 5


def _search(reduction=False, reduce_first=False, c=4):
    return SearchCell(6, 8, c, reduction, reduce_first).eval()


def _derived(operations, reduction=False, c=4):
    return DerivedCell(6, 8, c, reduction, False, operations).eval()


def _inputs(size=(9, 12), size0=None):
    return torch.randn(2, 6, *(size0 or size)), torch.randn(2, 8, *size)


def _one_hot(operations):
    return torch.eye(len(CELL_OPS))[[CELL_OPS.index(name) for name in operations]]


@pytest.mark.parametrize("size", [(9, 12), (8, 13), (1, 2)])
@pytest.mark.parametrize("reduction", [False, True])
def test_sizes(size, reduction):
    out = _search(reduction)(*_inputs(size), torch.rand(5, 8))
    expected = tuple(-(-n // 2) for n in size) if reduction else size
    assert out.shape == (2, 8, *expected)


def test_the_larger_first_input_is_halved():
    cell = _search(reduce_first=True)
    assert cell(*_inputs((5, 7), size0=(9, 13)), torch.rand(5, 8)).shape == (2, 8, 5, 7)


def test_strides_of_a_reduction_cell():
    assert [edge_stride(edge, True) for edge in range(5)] == [2, 2, 2, 2, 1]
    assert [edge_stride(edge, False) for edge in range(5)] == [1] * 5


def test_output_is_linear_in_z_of_the_second_node():
    """x2 = sum over its three edges; x1 does not see rows 2 to 4."""
    cell, inputs = _search(), _inputs()
    z = torch.rand(5, 8)
    doubled = torch.cat((z[:2], 2 * z[2:]))
    once, twice = cell(*inputs, z), cell(*inputs, doubled)
    torch.testing.assert_close(twice[:, :4], once[:, :4])
    torch.testing.assert_close(twice[:, 4:], 2 * once[:, 4:], rtol=1e-4, atol=1e-5)


def test_the_weight_of_none_adds_nothing():
    cell, inputs = _search(), _inputs()
    z = torch.rand(5, 8)
    other = z.clone()
    other[:, CELL_OPS.index("none")] += 1
    assert torch.equal(cell(*inputs, z), cell(*inputs, other))
    assert len(cell.edges[0].candidates) == 7


def test_gradients_reach_z_and_every_weight():
    cell = _search().train()
    z = torch.rand(5, 8, requires_grad=True)
    cell(*_inputs(), z).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in cell.parameters())
    computed = [i for i, name in enumerate(CELL_OPS) if name != "none"]
    assert (z.grad[:, computed] != 0).all()
    assert (z.grad[:, CELL_OPS.index("none")] == 0).all()


@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("edge", range(5))
@pytest.mark.parametrize("name", [name for name in CELL_OPS if name != "none"])
def test_one_hot_search_cell_equals_the_derived_cell(name, edge, reduction):
    operations = ["skip", "none", "none", "skip", "skip"]
    operations[edge] = name
    search, derived = _search(reduction), _derived(operations, reduction)
    for mixed in search.edges:
        mixed.candidates["max3"][1] = nn.Identity()
    weights = {
        key.replace(f"candidates.{operations[int(key.split('.')[1])]}.", "")
        if key.startswith("edges")
        else key: value
        for key, value in search.state_dict().items()
    }
    wanted = derived.state_dict().keys()
    derived.load_state_dict({k: v for k, v in weights.items() if k in wanted}, strict=False)
    inputs = _inputs()
    torch.testing.assert_close(
        derived(*inputs), search(*inputs, _one_hot(operations)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("reduction", [False, True])
def test_a_node_that_nothing_reaches_is_zero(reduction):
    inputs = _inputs()
    size = (5, 6) if reduction else (9, 12)
    cell = _derived(NO_OP, reduction)
    assert not cell.edges
    assert torch.equal(cell(*inputs), torch.zeros(2, 8, *size))
    half = _derived(("none", "none", "skip", "none", "none"), reduction)(*inputs)
    assert half[:, :4].abs().sum() == 0 and half[:, 4:].abs().sum() > 0


def test_zeros_keep_the_memory_layout():
    cell = _derived(NO_OP).to(memory_format=torch.channels_last)
    inputs = [x.contiguous(memory_format=torch.channels_last) for x in _inputs()]
    assert cell(*inputs).is_contiguous(memory_format=torch.channels_last)


def test_edge_order():
    assert CELL_EDGES == (("i1", "x1"), ("i2", "x1"), ("i1", "x2"), ("i2", "x2"), ("x1", "x2"))


@pytest.mark.parametrize("used", [(0, 1), (1,)])
def test_weights_of_several_cells_are_picked_together(used: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    cells = [SearchCell(2, 3, 4, reduction, reduce_first=False) for reduction in (False, True)]
    cells = [cell.double() for cell in cells]
    s0, s1 = (torch.randn(2, c, 5, 6, dtype=torch.float64) for c in (2, 3))
    found = []
    for together in (True, False):
        z = torch.linspace(0.1, 0.9, 80, dtype=torch.float64).view(10, 8).requires_grad_()
        weights = weights_of(cells, z) if together else z.split(5)
        outputs = [cells[k](s0, s1, weights[k]) for k in used]
        (gradient,) = torch.autograd.grad(sum(y.square().sum() for y in outputs), z)
        found.append((*outputs, gradient))
    torch.testing.assert_close(*found)
    assert found[0][-1][:5].any().item() == (0 in used)
    none = CELL_OPS.index("none")
    assert not found[0][-1][:, none].any()
