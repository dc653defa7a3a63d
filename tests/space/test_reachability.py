import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lgcnet_fast.nn.cell import CELL_EDGES
from lgcnet_fast.nn.operations import CELL_OPS
from lgcnet_fast.space.reachability import NONE, connect_taps, unreachable_taps
from lgcnet_fast.space.registry import make_space

SKIP = CELL_OPS.index("skip")
CONV3 = CELL_OPS.index("conv3")


def _cells(*rows):
    return [["skip" if edge == "1" else "none" for edge in row] for row in rows]


def test_a_cell_whose_second_node_hangs_on_a_dead_first_is_cut_off():
    assert unreachable_taps(_cells("00001"), [0]) == [0]
    assert unreachable_taps(_cells("10000"), [0]) == []
    assert unreachable_taps(_cells("00010"), [0]) == []


def test_a_dead_cell_is_bypassed_by_the_next():
    """Cell 2 reaches over the dead cell 1 to cell 0 through i1, but not through i2."""
    assert unreachable_taps(_cells("10000", "00000", "10000"), [0, 1, 2]) == [1]
    assert unreachable_taps(_cells("10000", "00000", "01000"), [0, 1, 2]) == [1, 2]


def _brute_force(cells, tap):
    """Reachability by flooding the whole graph."""
    reached = {("out", -1), ("out", -2)}
    for _ in range(4 * len(cells)):
        for k, row in enumerate(cells):
            nodes = {"i1": ("out", k - 2), "i2": ("out", k - 1), "x1": ("x1", k), "x2": ("x2", k)}
            for op, (source, target) in zip(row, CELL_EDGES, strict=True):
                if op != "none" and nodes[source] in reached:
                    reached |= {nodes[target], ("out", k)}
    return ("out", tap) in reached


def test_every_pair_of_cells_against_flooding():
    patterns = ["".join(bits) for bits in itertools.product("01", repeat=5)]
    for first, second in itertools.product(patterns, patterns):
        cells = _cells(first, second)
        expected = [tap for tap in (0, 1) if not _brute_force(cells, tap)]
        assert unreachable_taps(cells, [0, 1]) == expected


def test_the_smallest_gap_takes_its_runner_up():
    logits = torch.zeros(1, 5, 8)
    logits[0, :, NONE] = 5.0
    logits[0, 2, SKIP] = 4.0
    logits[0, 3, CONV3] = 4.5
    choice = logits.argmax(-1).tolist()
    assert connect_taps(logits, choice, [0]) == [(0, 3)]
    assert choice == [[NONE, NONE, NONE, CONV3, NONE]]


def test_a_longer_but_cheaper_way_wins():
    """i1->x1 and x1->x2 are nearly undecided, but x1 alone already revives the cell."""
    logits = torch.zeros(2, 5, 8)
    logits[..., NONE] = 5.0
    logits[0, 0, SKIP] = 4.9
    logits[1, 1, SKIP] = 4.9
    logits[1, 0, CONV3] = 4.0
    choice = logits.argmax(-1).tolist()
    assert sorted(connect_taps(logits, choice, [1])) == [(0, 0), (1, 1)]


def test_connected_choices_stay():
    logits = torch.randn(3, 5, 8)
    logits[..., SKIP] = 9.0
    choice = logits.argmax(-1).tolist()
    assert connect_taps(logits, choice, [0, 2]) == []
    assert choice == [[SKIP] * 5] * 3


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 100_000), pull=st.sampled_from([0.0, 1.0, 3.0, 10.0]))
def test_discretise_always_gives_a_valid_genotype(seed, pull):
    """Random logits drawn towards `none`; construction validates that taps are reached."""
    space = make_space({"cells": 5, "reductions": [1, 3], "widths": [4, 8, 16]})
    generator = torch.Generator().manual_seed(seed)
    arch = {
        group.name: torch.randn(len(group.rows), len(group.options), generator=generator)
        for group in space.arch_groups()
    }
    arch["cells"][:, NONE] += pull
    genotype, changes = space.discretise(arch)
    wanted = [CELL_OPS[option] for option in arch["cells"].argmax(1).tolist()]
    found = [op for cell in genotype.cells for op in cell]
    different = [(w, f) for w, f in zip(wanted, found, strict=True) if w != f]
    assert len(different) == len(changes)
    assert all(w == "none" and f != "none" for w, f in different)
    again, more = space.discretise(space.one_hot(genotype))
    assert again == genotype and not more


def test_changes_name_the_place():
    space = make_space({"cells": 3, "reductions": [1, 2], "widths": [4, 8, 16]})
    arch = {g.name: torch.zeros(len(g.rows), len(g.options)) for g in space.arch_groups()}
    arch["cells"][:, NONE] = 1.0
    arch["cells"][6, SKIP] = 0.9
    _, changes = space.discretise(arch)
    assert any(line.startswith("cell 1 edge i2->x1: none becomes skip") for line in changes)
