"""What steps launch, and the sweeps that are made of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch

from bench.kernels import launches
from bench.kernels.comparison import Sweep
from bench.kernels.launches import FAMILIES, family_named, launches_of, sweep_of
from bench.training import finetune, search
from bench.training.case import Step, TrainingCase
from bench.training.command import TINY_SIZE, TINY_SPACE, TINY_SUPERNET
from lgcnet_fast.errors import BackendError
from lgcnet_fast.ops import Products, mixed_norm_sum, tuning, use_backend

LEAVES_OUT = pytest.mark.skipif(
    find_spec("triton.knobs") is None, reason="Triton 3.3 cannot leave kernels out"
)
LOOKUPS = [
    ("depthwise_forward", "bfloat16 1x4x3x5 1x2 1x2"),
    ("depthwise_input_grad", "bfloat16 1x4x3x5 2x1 2x1"),
    ("depthwise_weight_grad", "float32 1x4x3x5 4 2x2"),
    ("depthwise_backward", "bfloat16 1x48x3x5 2 2x1"),
    ("depthwise_backward", "bfloat16 1x4x3x5 1 2x1"),
    ("pointwise_backward", "bfloat16 2x4x3x5 2x6"),
    ("conv3_forward", "bfloat16 1x32x3x5 2x64"),
    ("conv3_input_grad", "bfloat16 1x32x3x5 2x64"),
    ("conv3_weight_grad", "bfloat16 1x32x3x5 2x64"),
    ("mixed_sum_statistics", "bfloat16 2x4x3x5 3x1"),
    ("mixed_sum_forward", "bfloat16 2x4x3x5 1x2"),
    ("mixed_sum_gradient_sums", "float32 2x4x3x5 1x0"),
    ("mixed_sum_gradients", "bfloat16 2x4x3x5 2x1"),
    ("product_statistics", "bfloat16 2x4x3x5 3"),
    ("product_sum", "bfloat16 2x4x3x5 2x6 1x2"),
    ("product_sum", "bfloat16 2x4x3x5 2x6 0x0"),
    ("product_sums", "float32 2x4x3x5 3x6"),
    ("product_input_gradients", "bfloat16 2x4x3x5 3x6"),
    ("max_pool_forward", "bfloat16 1x4x5x3 2"),
    ("max_pool_backward", "float32 1x4x5x3 1"),
    ("concat_upsample", "bfloat16 1x48x5x5 1x48x3x3 5x5"),
    ("sum_upsample", "bfloat16 1x48x5x5 1x48x3x3 5x5"),
    ("concat_upsample_backward", "bfloat16 1x48x2x2 5x5"),
    ("sum_upsample_backward", "bfloat16 1x48x3x3 1x48x2x2 5x5"),
    ("concat_pointwise", "bfloat16 1x48x5x5 1x48x5x5 48x5x5"),
    ("concat_pointwise_backward", "bfloat16 1x48x5x5 1x48x5x5 48x5x5"),
    ("upsample_cross_entropy", "float32 1x3x3x4 5x7"),
    ("upsample_ohem", "float32 1x3x3x4 5x7"),
    ("upsample_argmax", "bfloat16 1x3x3x4 5x7"),
]


def tiny_step(stage: ModuleType) -> Step:
    searching = stage is search
    space, genotype = (TINY_SUPERNET, "") if searching else (TINY_SPACE, "random-0")
    return stage.make_step("ours-triton", TrainingCase(2, TINY_SIZE, "bf16", space, genotype))


def search_step() -> Step:
    return tiny_step(search)


def finetuning_step() -> Step:
    return tiny_step(finetune)


def sum_of_products() -> Step:
    """Maps of steps as tiny as these are multiplied out."""
    ds, y, x = (torch.randn(*outer, 2, 3, 5, 6).movedim(-1, -3) for outer in ((2,), (), ()))
    weights = [torch.randn(6, 6, 1, 1, requires_grad=True) for _ in ds]
    norms = [torch.nn.BatchNorm2d(6, affine=False) for _ in range(3)]

    def step() -> None:
        with use_backend("triton"):
            out = mixed_norm_sum([Products(ds, weights), y, x], torch.rand(4), [*norms, None])
        out.sum().backward()

    return step


@LEAVES_OUT
@pytest.mark.parametrize("stage", [search, finetune])
def test_every_launch_of_a_step_is_swept(stage: ModuleType) -> None:
    found = launches_of(tiny_step(stage))
    families = {launches.family_of(operation) for operation, _ in found}
    assert {"depthwise", "pointwise_backward", "mixed_sum", "concat_upsample"} < families
    assert sum(found.values()) > 1.5 * len(found)
    for launch in found:
        sweep = sweep_of(launch)
        assert (sweep.operation, sweep.key) == launch
        assert sweep.bytes > 0 and len(set(sweep.configs)) <= 8


@LEAVES_OUT
@pytest.mark.parametrize("make_step", [search_step, finetuning_step, sum_of_products])
def test_sweeps_begin_with_what_runs_without_a_table(
    make_step: Callable[[], Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups: list[launches.Launch] = []
    defaults: list[Any] = []

    def fields(default: Any) -> Any:
        defaults.append(default)
        return dataclasses.fields(default)

    monkeypatch.setattr(tuning, "config_for", lambda *launch: lookups.append(launch[:2]))
    monkeypatch.setattr(tuning, "fields", fields)
    with launches._without_kernels():
        make_step()()
    assert lookups
    products = {operation for operation, _ in lookups if operation.startswith("product_")}
    assert len(products) == (4 if make_step is sum_of_products else 0)
    for launch, default in dict(zip(lookups, defaults, strict=True)).items():
        assert sweep_of(launch).configs[0] == default, launch


@pytest.mark.parametrize("launch", LOOKUPS, ids=" ".join)
def test_sweep(launch: launches.Launch) -> None:
    sweep = sweep_of(launch)
    row = dataclasses.replace(sweep, configs=sweep.configs[:1]).measure(1e12)
    assert (row["operation"], row["key"]) == launch
    assert row["default_us"] == row["configs"][0]["us"] > 0


def test_a_tile_with_wrong_results_is_left_out() -> None:
    @dataclasses.dataclass(frozen=True)
    class Tile:
        scale: float

    @dataclasses.dataclass(frozen=True)
    class Sums:
        maps: list[torch.Tensor]

    def run(x: torch.Tensor, tile: Tile) -> Sums:
        time.sleep(0.02 if tile.scale == 1 else 0)
        return Sums([x, tile.scale * x])

    tiles = [Tile(1), Tile(1.001), Tile(2), Tile(float("nan"))]
    sweep = Sweep("pool", "key", 2**30, lambda: torch.ones(3), run, tiles)
    row = sweep.measure(1e12)
    assert row["configs"][0]["config"] == {"scale": 1.001}
    assert row["default_us"] > 10000


def test_every_operation_has_been_tried() -> None:
    operations = {name for family in FAMILIES for name in family_named(family).swept}
    assert operations == {operation for operation, _ in LOOKUPS}


@pytest.mark.parametrize(
    ("operation", "key"),
    [
        ("depthwise_forward", "bfloat16 1x4x3x5 1x2"),
        ("depthwise_forward", "bfloat16 1x4x3x5 1x2 1x2x3"),
        ("depthwise_forward", "bfloat16 4x3x5 1 1x1"),
        ("max_pool_forward", "bfloat17 1x4x5x3 2"),
        ("max_pool_forward", "bfloat16"),
        ("max_pool_forward", "bfloat16 1x4x5x3 two"),
        ("max_pool_forward", "bfloat16 1x4x5x3 02"),
        ("product_statistics", "bfloat16 1x4x5x3 2x4"),
        ("product_sum", "bfloat16 1x4x5x3 2x4"),
        ("concat_upsample", "bfloat16 1x47x5x5 5x5"),
        ("concat_upsample", "bfloat16 1x48x5x5 2x48x5x5 5x5"),
        ("concat_pointwise", "bfloat16 1x48x5x5 32x5x5"),
    ],
)
def test_other_keys_are_refused(operation: str, key: str) -> None:
    with pytest.raises(BackendError, match=f"'{key}' is no shape key"):
        sweep_of((operation, key))


def test_other_operations_are_refused() -> None:
    with pytest.raises(BackendError, match="average_pool: no family"):
        sweep_of(("average_pool", "bfloat16 1x4x5x3 2"))


@LEAVES_OUT
def test_noting_lookups_leaves_nothing_behind() -> None:
    found = launches_of(lambda: tuning.config_for("pool", "key", torch.device("cpu")))
    assert found == {("pool", "key"): 1}
    assert tuning.config_for("pool", "key", torch.device("cpu")) is None
    assert found == {("pool", "key"): 1}
