import pytest
import torch

from lgcnet_fast.nn.graph import CellCommunication

MODES = ("gcn", "gcn_opid", "fc", "independent", "shared")
REASONING = ("gcn", "gcn_opid", "fc")


def _communication(mode="gcn", cells=6, **options):
    torch.manual_seed(0)
    return CellCommunication(cells, 5, 8, mode, reductions=(1, 4), **options)


@pytest.mark.parametrize("mode", MODES)
def test_shapes_and_initial_logits(mode):
    communication = _communication(mode)
    assert communication().shape == (30, 8)
    alpha = communication.alpha
    assert alpha.shape == (2 if mode == "shared" else 6, 5, 8)
    assert abs(alpha.mean() - 1) < 0.01 and 0.005 < alpha.std() < 0.02


def test_equations_5_to_7():
    """The batched module against the formulas, cell by cell."""
    module = _communication().double()
    alpha, graph = module.alpha, module.reasoning
    expand, contract = graph.expand[0], graph.contract[0]
    expected = [alpha[0]]
    for k in range(1, len(alpha)):
        previous, current, pair = alpha[k - 1], alpha[k], k - 1
        w1, w2 = graph.compare_current.weight[pair], graph.compare_previous.weight[pair]
        adjacency = torch.softmax((current @ w1) @ (previous @ w2).T, -1)
        hidden = previous @ expand.weight[pair] + expand.bias[pair]
        told = adjacency @ hidden @ graph.convolve.weight[pair] + hidden
        told = told @ contract.weight[pair] + contract.bias[pair]
        expected.append(current + 0.5 * told)
    torch.testing.assert_close(module(), torch.cat(expected))


def test_operation_identity_graph():
    module = _communication("gcn_opid", width=3).double()
    graph = module.reasoning
    previous, current = module.alpha[2].reshape(40, 1), module.alpha[3].reshape(40, 1)
    adjacency = torch.softmax(current @ previous.T, -1)
    hidden = previous @ graph.expand[0].weight[2] + graph.expand[0].bias[2]
    hidden = adjacency @ hidden @ graph.convolve.weight[2] + hidden
    told = hidden @ graph.contract[0].weight[2] + graph.contract[0].bias[2]
    expected = module.alpha[3] + 0.5 * told.reshape(5, 8)
    torch.testing.assert_close(module()[15:20], expected)


def test_fully_connected():
    module = _communication("fc").double()
    layer = module.reasoning.layer
    told = module.alpha[1].flatten() @ layer.weight[1] + layer.bias[1, 0]
    torch.testing.assert_close(module()[10:15], module.alpha[2] + 0.5 * told.reshape(5, 8))


@pytest.mark.parametrize("mode", REASONING)
def test_gamma_zero_is_independent_bit_for_bit(mode):
    assert torch.equal(_communication(mode, gamma=0.0)(), _communication("independent")())


@pytest.mark.parametrize("mode", REASONING)
@pytest.mark.parametrize("chain", [False, True])
def test_what_a_cell_depends_on(mode, chain):
    module = _communication(mode, chain=chain)
    (gradient,) = torch.autograd.grad(module()[15:20].square().sum(), module.alpha)
    touched = gradient.flatten(1).abs().sum(1).nonzero().flatten().tolist()
    assert touched == ([0, 1, 2, 3] if chain else [2, 3])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"n_fc": 2}, {"relu": True}, {"chain": True}])
def test_every_parameter_gets_a_gradient(mode, options):
    module = _communication(mode, **options)
    (module() * torch.randn(30, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_chained_and_adjacent_agree_on_the_first_two_cells():
    plain, chained = _communication()(), _communication(chain=True)()
    torch.testing.assert_close(plain[:10], chained[:10])
    assert not torch.allclose(plain[10:15], chained[10:15])


def test_shared_cells_share():
    rows = _communication("shared")().unflatten(0, (6, 5))
    for k in (2, 3, 5):
        assert torch.equal(rows[k], rows[0])
    assert torch.equal(rows[4], rows[1])
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("width", [16, 256])
def test_number_of_parameters(width):
    pair = 8 * 8 * 2 + (8 * width + width) + width * width + (width * 8 + 8)
    module = _communication(width=width)
    assert sum(p.numel() for p in module.parameters()) == 6 * 40 + 5 * pair


def test_two_layers():
    module = _communication(width=4, n_fc=2)
    shapes = [tuple(layer.weight.shape[1:]) for layer in module.reasoning.expand]
    assert shapes == [(8, 4), (4, 4)]
    assert [tuple(layer.weight.shape[1:]) for layer in module.reasoning.contract] == [
        (4, 4), (4, 8)
    ]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_single_cell_has_no_neighbour(mode):
    module = CellCommunication(1, 5, 8, mode)
    assert torch.equal(module(), module.alpha[0].expand(1, 5, 8).flatten(0, 1))


def test_runs_in_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(_communication()(), _communication().requires_grad_(False)())
        assert _communication()().dtype == torch.float32
