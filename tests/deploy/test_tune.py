"""The search for tiles, with times that are made up; what it writes is what engines then use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lgcnet_fast.deploy import tune
from lgcnet_fast.deploy.fused import Call, FusedNetwork
from lgcnet_fast.deploy.plan import Tile
from lgcnet_fast.kernels.infer_tile import TileConfig
from lgcnet_fast.ops import tuning
from tests.deploy.test_plan import planned, small_network

BEST = TileConfig(rows=8, columns=16, block_k=32, warps=2, stages=3)


@pytest.fixture(scope="module")
def network() -> FusedNetwork:
    plan = planned(small_network(), (17, 33), dtype=torch.float16)
    return FusedNetwork(plan, torch.device("cpu"))


def made_up(call: Call) -> float:
    """Microseconds that grow with the number of fields that differ from `BEST`."""
    config = call.args[7]  # type: ignore[attr-defined]
    fields = ("rows", "columns", "block_k", "warps", "stages")
    return 10.0 + sum(getattr(config, name) != getattr(BEST, name) for name in fields)


def test_every_property_is_searched(network: FusedNetwork) -> None:
    tile = next(launch for launch in network.plan.launches if isinstance(launch, Tile))
    tuned = tune.tune_tile(network, tile, made_up)
    assert tuned.best == BEST
    assert tuned.best_us < tuned.default_us
    assert tuned.key == network.plan.key_of(tile)


def test_small_gains_do_not_count(network: FusedNetwork) -> None:
    tile = next(launch for launch in network.plan.launches if isinstance(launch, Tile))
    tuned = tune.tune_tile(network, tile, lambda call: 100 + made_up(call) / 10)
    assert tuned.best == network.tile_config(tile)


def test_what_does_not_fit_is_passed_over(network: FusedNetwork) -> None:
    from triton.runtime.errors import OutOfResources

    tile = next(launch for launch in network.plan.launches if isinstance(launch, Tile))
    default = network.tile_config(tile)

    def measure(call: Call) -> float:
        if call.args[7] != default:  # type: ignore[attr-defined]
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 10.0

    assert tune.tune_tile(network, tile, measure).best == default


def test_equal_launches_once_and_the_slowest_first(
    network: FusedNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "run", lambda: None)
    found = tune.tune_network(network, seconds=60, measure=made_up)
    keys = [tuned.key for tuned in found]
    tiles = [launch for launch in network.plan.launches if isinstance(launch, Tile)]
    assert len(keys) == len(set(keys)) and set(keys) == {network.plan.key_of(t) for t in tiles}
    defaults = [tuned.default_us for tuned in found]
    assert defaults == sorted(defaults, reverse=True)
    assert tune.tune_network(network, seconds=-1, measure=made_up) == []


def test_the_table_is_what_engines_read(
    network: FusedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = next(launch for launch in network.plan.launches if isinstance(launch, Tile))
    key = network.plan.key_of(tile)
    found = [tune.TunedTile(key, 5.0, BEST, 4.0)]
    other = tuning.TuningTable(
        device="a GPU", measured={}, backends={"deploy_engine": "triton"},
        configs={"upsample": {"x": {"warps": 2}}, tune.OPERATION: {"older": {"rows": 4}}},
    )  # fmt: skip
    path = tuning.write_table(tune.with_tiles(other, "a GPU", found), tmp_path)
    table = tuning.read_table(path)
    assert table.backends == other.backends and table.configs["upsample"] == {"x": {"warps": 2}}
    assert set(table.configs[tune.OPERATION]) == {"older", key}
    monkeypatch.setattr(tuning, "table_of", lambda device: table)
    assert network.tile_config(tile) == BEST
    assert tune.with_tiles(None, "new", found).configs == {tune.OPERATION: {key: vars_of(BEST)}}


def vars_of(config: TileConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in replace(config).__dataclass_fields__}


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    device = torch.device("cuda")
    plan = planned(small_network(), (65, 129), dtype=torch.float16, device=device)
    network = FusedNetwork(plan, device)
    found = tune.tune_network(network, seconds=20)
    assert found and all(0 < tuned.best_us <= tuned.default_us for tuned in found)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_profile_of_a_network(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lgcnet_fast.deploy import profile

    out = tmp_path / "profile.json"
    chosen = ["--backend", backend, "--out", str(out)]
    profile.main(["reference", "65", "129", "fp16", *chosen])
    found = json.loads(out.read_text())
    assert all(row["us"] > 0 for row in found["launches"]) and found["host_us"] > 0
    assert "sum of" in capsys.readouterr().out
