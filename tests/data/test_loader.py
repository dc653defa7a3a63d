from __future__ import annotations

import numpy as np
import pytest
import torch

from lgcnet_fast.config import Augmentation, DataConfig
from lgcnet_fast.data.cache import PackedCache, open_cache
from lgcnet_fast.data.classes import CAMVID, CITYSCAPES
from lgcnet_fast.data.dataset import SegmentationDataset, open_dataset
from lgcnet_fast.data.loader import EpochOrder, EvalLoader, TrainLoader
from lgcnet_fast.errors import DataError

CPU = torch.device("cpu")
AUGMENTATION = Augmentation(crop=(9, 11), colour=0.2)


class Numbered(SegmentationDataset):
    """Image i shows i, its label is i % 11; sizes are given."""

    name = "numbered"
    split = "train"

    def __init__(self, sizes: list[tuple[int, int]], first: int = 0, classes=CAMVID) -> None:
        self.sizes, self.first, self.classes = sizes, first, classes

    def __len__(self) -> int:
        return len(self.sizes)

    def stem(self, index: int) -> str:
        return str(index)

    def image(self, index: int) -> np.ndarray:
        return np.full((*self.sizes[index], 3), self.first + index, np.uint8)

    def label(self, index: int) -> np.ndarray:
        return np.full(self.sizes[index], (self.first + index) % 11, np.uint8)


@pytest.fixture
def cache_of(tmp_path):
    def opened(dataset: SegmentationDataset) -> PackedCache:
        return open_cache(dataset, DataConfig(cache="ram", cache_dir=tmp_path), CPU)

    return opened


def epoch(loader: TrainLoader, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader.set_epoch(number)
    return [tuple(batch) for batch in loader]


def test_batches(cache_of):
    loader = TrainLoader(cache_of(Numbered([(12, 16)] * 7)), AUGMENTATION, 3, CPU, seed=0)
    batches = list(loader)
    assert len(loader) == len(batches) == 2
    for images, labels in batches:
        assert images.shape == (3, 3, 9, 11) and images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.shape == (3, 9, 11) and labels.dtype == torch.int64


def test_an_epoch_is_reproducible_and_differs_from_the_next(cache_of):
    cache = cache_of(Numbered([(12, 16), (20, 9), (12, 16), (7, 7)] * 2))
    first = epoch(TrainLoader(cache, AUGMENTATION, 2, CPU, seed=3), 5)
    loader = TrainLoader(cache, AUGMENTATION, 2, CPU, seed=3)
    epoch(loader, 1)
    again = epoch(loader, 5)
    for (images, labels), (images2, labels2) in zip(first, again, strict=True):
        assert torch.equal(images, images2) and torch.equal(labels, labels2)
    for other in (epoch(loader, 6), epoch(TrainLoader(cache, AUGMENTATION, 2, CPU, seed=4), 5)):
        assert any(not torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


def test_images_keep_their_labels(cache_of):
    plain = Augmentation(crop=(4, 4), scale=(1, 1))
    caches = [cache_of(Numbered([(5, 6)] * 6)), cache_of(Numbered([(9, 4)] * 5, first=6))]
    loader = TrainLoader(caches, plain, 2, CPU, seed=0)
    shown = []
    for images, labels in loader:
        values = (images[:, 0, 0, 0] * 0.229 + 0.485) * 255
        for value, label in zip(
            values.round().int().tolist(), labels[:, 0, 0].tolist(), strict=True
        ):
            assert value % 11 == label
            shown.append(value)
    assert len(shown) == len(set(shown)) == 10


def test_a_set_smaller_than_a_batch_is_repeated(cache_of):
    loader = TrainLoader(cache_of(Numbered([(12, 16)] * 3)), AUGMENTATION, 8, CPU, seed=0)
    ((_, labels),) = list(loader)
    assert labels.shape[0] == 8
    assert set(labels.unique().tolist()) <= {0, 1, 2, 255}


@pytest.mark.parametrize(("count", "batch", "world"), [(23, 3, 2), (2, 3, 2), (16, 4, 4)])
def test_ranks_share_out_an_epoch(count, batch, world):
    orders = [EpochOrder(count, batch, seed=1, rank=r, world_size=world) for r in range(world)]
    shares = [[i for indices in order.epoch(2) for i in indices] for order in orders]
    assert len({order.batches for order in orders}) == 1
    assert all(len(share) == orders[0].batches * batch for share in shares)
    everything = sum(shares, [])
    if count >= batch * world:
        assert len(set(everything)) == len(everything)
    else:
        assert set(everything) == set(range(count))


def test_ranks_augment_differently(cache_of):
    cache = cache_of(Numbered([(30, 30)] * 4))
    draws = [EpochOrder(4, 2, 0, rank, 2).generator(0).get_state() for rank in range(2)]
    assert not torch.equal(*draws)
    sharded = [TrainLoader(cache, AUGMENTATION, 2, CPU, 0, rank, 2) for rank in range(2)]
    assert [len(list(loader)) for loader in sharded] == [1, 1]


def test_classes_must_agree(cache_of):
    caches = [
        cache_of(Numbered([(5, 5)])),
        cache_of(Numbered([(5, 5)], classes=CITYSCAPES)),
    ]
    with pytest.raises(DataError, match="'cityscapes' cannot be trained together with 'camvid'"):
        TrainLoader(caches, AUGMENTATION, 1, CPU, seed=0)


def test_nothing_to_train_on():
    with pytest.raises(DataError, match="data.train_splits"):
        TrainLoader([], AUGMENTATION, 1, CPU, seed=0)


def test_evaluation_shows_every_image_once_in_order(cache_of):
    sizes = [(12, 16), (12, 16), (12, 16), (9, 9), (12, 16)]
    loader = EvalLoader(cache_of(Numbered(sizes)), (6, 8), 2, CPU)
    batches = list(loader)
    assert len(loader) == len(batches)
    assert [batch.indices for batch in batches] == [(0, 1), (2,), (3,), (4,)]
    for images, labels, indices in batches:
        assert images.shape == (len(indices), 3, 6, 8)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.shape == (len(indices), *sizes[indices[0]]) and labels.dtype == torch.int64
        assert labels[:, 0, 0].tolist() == list(indices)


def test_evaluation_at_the_images_own_size(cache_of):
    (batch,) = EvalLoader(cache_of(Numbered([(12, 16)])), None, 4, CPU)
    assert batch.images.shape == (1, 3, 12, 16)


def test_real_camvid(real_data, tmp_path):
    config = DataConfig(name="camvid", root=real_data / "camvid", cache_dir=tmp_path)
    cache = open_cache(open_dataset(config, "val"), config, CPU)
    loader = TrainLoader(cache, Augmentation(crop=(120, 160)), 4, CPU, seed=0)
    images, labels = next(iter(loader))
    assert labels.unique().tolist()[-1] in (10, 255) or labels.max() <= 10
    assert abs(images.mean()) < 2 and 0.3 < images.std() < 2


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["disk", "ram", "gpu"])
def test_every_storage_gives_the_same_batches_on_a_gpu(tmp_path, storage):
    device = torch.device("cuda")
    dataset = Numbered([(12, 16), (20, 9), (12, 16), (7, 7)] * 2)
    batches = []
    for wanted, target in (("ram", CPU), (storage, device)):
        config = DataConfig(cache=wanted, cache_dir=tmp_path)
        loader = TrainLoader(open_cache(dataset, config, target), AUGMENTATION, 2, target, seed=0)
        batches.append([(images.cpu(), labels.cpu()) for images, labels in loader])
    for (images, labels), (images2, labels2) in zip(*batches, strict=True):
        torch.testing.assert_close(images, images2, rtol=1e-3, atol=1e-3)
        assert torch.equal(labels, labels2)
