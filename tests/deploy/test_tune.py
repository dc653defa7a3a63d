"""The search for tiles, with times that are made up; what it writes is what engines then use."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lgcnet_fast.deploy import tune
from lgcnet_fast.deploy.fused import FusedNetwork
from lgcnet_fast.deploy.plan import Tile
from lgcnet_fast.errors import BackendError
from lgcnet_fast.kernels.infer_tile_config import TileConfig
from lgcnet_fast.ops import tuning
from tests.deploy.test_plan import planned, small_network


@pytest.fixture(scope="module")
def network() -> FusedNetwork:
    return network_of(torch.float16)


def network_of(dtype: torch.dtype) -> FusedNetwork:
    return FusedNetwork(planned(small_network(), (17, 33), dtype=dtype), torch.device("cpu"))


def first_tile(network: FusedNetwork) -> Tile:
    return next(launch for launch in network.plan.launches if isinstance(launch, Tile))


BEST = TileConfig(*tune.SMALL_MAPS[-1])


def made_up(tile: Tile, config: TileConfig) -> float:
    """Microseconds that grow with the number of fields that differ from `BEST`."""
    fields = ("rows", "columns", "block_k", "warps", "stages", "taps")
    return 10.0 + sum(getattr(config, name) != getattr(BEST, name) for name in fields)


def test_the_fastest_candidate_is_found(network: FusedNetwork) -> None:
    tile = first_tile(network)
    tuned = tune.tune_tile(network, tile, made_up)
    assert tuned.best == BEST and tuned.best in tune.candidates(network, tile)
    assert tuned.best_us < tuned.default_us
    assert tuned.key == network.plan.key_of(tile)


def test_small_gains_do_not_count(network: FusedNetwork) -> None:
    tile = first_tile(network)
    tuned = tune.tune_tile(network, tile, lambda *given: 100 + made_up(*given) / 10)
    assert tuned.best == network.tile_config(tile)


def test_what_cannot_serve_is_passed_over(network: FusedNetwork) -> None:
    tile = first_tile(network)
    default = network.tile_config(tile)

    def measure(tile: Tile, config: TileConfig) -> float:
        return 10.0 if config == default else float("inf")

    assert tune.tune_tile(network, tile, measure).best == default


def test_equal_launches_once_and_the_slowest_first(network: FusedNetwork) -> None:
    def measure(tile: Tile, config: TileConfig) -> float:
        return made_up(tile, config) * tile.out.channels

    found = tune.tune_network(network, seconds=60, measure=measure)
    keys = [tuned.key for tuned in found]
    tiles = [launch for launch in network.plan.launches if isinstance(launch, Tile)]
    assert len(keys) == len(set(keys)) and set(keys) == {network.plan.key_of(t) for t in tiles}
    defaults = [tuned.default_us for tuned in found]
    assert defaults == sorted(defaults, reverse=True)
    assert tune.tune_network(network, seconds=-1, measure=measure) == []


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


@pytest.mark.parametrize("matrix_units", [False, True])
@pytest.mark.parametrize("small", [tune.SMALL, 0])
def test_few_candidates_none_of_which_is_compiled_wrongly(
    matrix_units: bool, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "SMALL", small)
    monkeypatch.setattr(FusedNetwork, "matrix_units", matrix_units)
    network = network_of(torch.float16)
    for tile in tune.launches(network).values():
        tried = tune.candidates(network, tile)
        assert tried[0] == network.tile_config(tile)
        assert 6 <= len(set(tried)) == len(tried) <= 8
        assert not any(config.is_miscompiled(matrix_units) for config in tried)


@pytest.mark.parametrize("pixels", [2**6, 2**13, 2**14, 2**15, 2**22])
@pytest.mark.parametrize("channels", [3, 16, 48, 64, 128, 256])
@pytest.mark.parametrize("matrix_units", [False, True])
def test_no_default_is_compiled_wrongly(pixels: int, channels: int, matrix_units: bool) -> None:
    nodes = itertools.product(
        [("separable",), ("copy", "convolution"), ("pool",), ()],
        [(), (19,), (64, 128), (128, 48)],
    )
    for kinds, products in nodes:
        config = TileConfig.default(pixels, channels, matrix_units, kinds, products)
        assert not config.is_miscompiled(matrix_units)


def test_the_default_depends_on_what_a_node_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedNetwork, "matrix_units", True)
    network = network_of(torch.float16)
    tiles = [launch for launch in network.plan.launches if isinstance(launch, Tile)]
    tile = next(tile for tile in tiles if tile.terms and tile.products)
    asked: dict[str, object] = {}

    def default(
        cls: type[TileConfig], pixels: int, channels: int, matrix_units: bool,
        kinds: set[str], products: list[int],
    ) -> TileConfig:  # fmt: skip
        asked.update(pixels=pixels, channels=channels, kinds=kinds, products=products)
        return BEST

    monkeypatch.setattr(TileConfig, "default", classmethod(default))
    assert network.tile_config(tile) == BEST
    height, width = tile.out.size
    assert asked == {
        "pixels": network.plan.batch * height * width,
        "channels": tile.out.channels,
        "kinds": {term.kind for term in tile.terms},
        "products": [product.out.channels for product in tile.products],
    }


@pytest.mark.parametrize(
    ("config", "miscompiled"),
    [
        (TileConfig(8, 8, 64, warps=4), True),
        (TileConfig(4, 16, 32, warps=4, stages=1), True),
        (TileConfig(8, 16, 64, warps=8), True),
        (TileConfig(8, 8, 64, warps=8), False),
        (TileConfig(4, 8, 64, warps=4), False),
        (TileConfig(8, 16, 64, warps=2), False),
    ],
)
def test_tiles_that_are_compiled_wrongly(config: TileConfig, miscompiled: bool) -> None:
    assert config.is_miscompiled(matrix_units=True) == miscompiled
    assert not config.is_miscompiled(matrix_units=False)


def test_a_table_with_such_a_tile_is_refused(
    network: FusedNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = next(launch for launch in network.plan.launches if isinstance(launch, Tile))
    key = network.plan.key_of(tile)
    found = [tune.TunedTile(key, 5.0, TileConfig(8, 8, 64, warps=4), 4.0)]
    monkeypatch.setattr(tuning, "table_of", lambda device: tune.with_tiles(None, "a GPU", found))
    with pytest.raises(BackendError, match=r"infer_tile.*compiled wrongly.*deploy\.tune"):
        network.tile_config(tile)


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
