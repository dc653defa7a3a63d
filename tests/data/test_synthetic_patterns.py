"""The patterns of the built-in scenes: told apart by their arrangement alone."""

import numpy as np
import pytest

from lgcnet_fast.data.painting.textures import (
    PERIODS,
    Pattern,
    noise_tile,
    sample_noise,
    sample_patterns,
)

WORN = [pattern for pattern in Pattern if pattern != Pattern.PLAIN]


def _tile(pattern: Pattern, origin: float = 0.0) -> np.ndarray:
    cells = (origin + (np.arange(96) + 0.5) / 48).astype(np.float32)
    v, u = np.meshgrid(cells, cells, indexing="ij")
    return sample_patterns(np.full(u.shape, pattern, dtype=np.uint8), u, v)


@pytest.mark.parametrize("pattern", WORN)
def test_patterns_share_contrast_and_shares_of_light_and_dark(pattern):
    tile = _tile(pattern)
    assert set(np.unique(tile)) == {-1.0, 1.0}
    assert abs(tile.mean()) < 0.04


@pytest.mark.parametrize("pattern", WORN)
def test_patterns_repeat(pattern):
    assert np.array_equal(_tile(pattern), _tile(pattern, origin=-PERIODS))


def test_patterns_differ():
    tiles = np.stack([_tile(pattern).ravel() for pattern in WORN])
    agreement = np.abs(tiles @ tiles.T) / tiles.shape[1] - np.eye(len(WORN))
    assert agreement.max() < 0.6


def test_plain_surfaces_have_no_pattern():
    assert not _tile(Pattern.PLAIN).any()


def test_noise_is_smooth_periodic_and_reproducible():
    tile = noise_tile(np.random.default_rng(1))
    assert np.array_equal(tile, noise_tile(np.random.default_rng(1)))
    assert tile.min() >= -1 and tile.max() <= 1
    assert np.abs(np.diff(tile, axis=0, append=tile[:1])).mean() < 0.5 * tile.std()
    assert sample_noise(tile, np.float32([0, 16]), np.float32([0, 0])).tolist() == [tile[0, 0]] * 2
