from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lgcnet_fast.config import Augmentation
from lgcnet_fast.data.augment import (
    ClassificationAugmentation,
    SegmentationAugmentation,
    centre_window,
    draw_colour_factors,
    jitter_colours,
)
from lgcnet_fast.data.normalise import (
    DEVIATION,
    MEAN,
    mean_colour,
    network_input,
    normalise,
)
from lgcnet_fast.data.windows import Window, render, stage

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=_generator(seed))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def crop_of_scaled(image, label, scale, top, left, crop):
    """The plain way: scale the whole image, pad, cut out."""
    pixels = image.permute(2, 0, 1)[None].float()
    size = (round(image.shape[0] * scale), round(image.shape[1] * scale))
    pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
    ids = F.interpolate(label[None, None].float(), size, mode="nearest-exact")
    around = (crop[1], crop[1], crop[0], crop[0])
    ids = F.pad(ids, around, value=255)[0, 0].long()
    pixels = F.pad(pixels - mean_colour(CPU), around) + mean_colour(CPU)
    rows = slice(top + crop[0], top + 2 * crop[0])
    columns = slice(left + crop[1], left + 2 * crop[1])
    return pixels[0, :, rows, columns], ids[rows, columns]


def test_the_whole_image_at_its_size_is_unchanged():
    image, label = noise(7, 9, 3), noise(7, 9)
    images, labels = render(stage([image], [label], [Window(0, 0, 7, 9)], (7, 9)))
    torch.testing.assert_close(images[0], image.permute(2, 0, 1).float(), rtol=0, atol=1e-3)
    assert torch.equal(labels[0], label.long())
    assert labels.dtype == torch.int64


def test_flip_mirrors_image_and_label():
    image, label = noise(6, 10, 3), noise(6, 10)
    images, labels = render(stage([image], [label], [Window(1, 2, 4, 5, flip=True)], (4, 5)))
    expected = image[1:5, 2:7].flip(1).permute(2, 0, 1).float()
    torch.testing.assert_close(images[0], expected, rtol=0, atol=1e-3)
    assert torch.equal(labels[0], label[1:5, 2:7].flip(1).long())


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0]),
    st.tuples(st.integers(4, 12), st.integers(4, 12)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_equals_scaling_padding_and_cropping(scale, half_size, crop, down, across):
    size = (2 * half_size[0], 2 * half_size[1])
    image, label = noise(*size, 3), noise(*size)
    top = round((size[0] * scale - crop[0]) * down)
    left = round((size[1] * scale - crop[1]) * across)
    window = Window(top / scale, left / scale, crop[0] / scale, crop[1] / scale)
    images, labels = render(stage([image], [label], [window], crop))
    expected, expected_ids = crop_of_scaled(image, label, scale, top, left, crop)
    torch.testing.assert_close(images[0], expected, rtol=0, atol=2e-2)
    assert torch.equal(labels[0], expected_ids)


def test_samples_do_not_depend_on_their_batch():
    sources = [(noise(20, 30, 3), noise(20, 30)), (noise(5, 8, 3), noise(5, 8))]
    windows = [Window(3.2, 4.1, 9.7, 12.3), Window(-2, -1, 9, 9.5, flip=True)]
    together = stage([i for i, _ in sources], [n for _, n in sources], windows, (11, 13))
    images, labels = render(together)
    for index, ((image, label), window) in enumerate(zip(sources, windows, strict=True)):
        alone, alone_ids = render(stage([image], [label], [window], (11, 13)))
        torch.testing.assert_close(images[index], alone[0], rtol=0, atol=1e-2)
        assert torch.equal(labels[index], alone_ids[0])


def test_only_what_the_window_covers_is_staged():
    staged = stage([noise(500, 400, 3)], None, [Window(100, 50, 20, 30)], (40, 60))
    assert max(staged.images.shape[1] - 20, staged.images.shape[2] - 30) <= 4
    assert not staged.padded and render(staged)[1] is None


def test_padding_is_the_mean_colour_and_ignored():
    image, label = noise(4, 4, 3), torch.zeros(4, 4, dtype=torch.uint8)
    images, labels = render(stage([image], [label], [Window(-2, -2, 8, 8)], (8, 8)))
    assert (labels == 255).sum() == 64 - 16
    assert (labels[0, 2:6, 2:6] == 0).all()
    outside = images.permute(0, 2, 3, 1)[labels == 255]
    torch.testing.assert_close(outside, torch.tensor(MEAN).expand(48, 3) * 255)
    assert (normalise(images).permute(0, 2, 3, 1)[labels == 255] == 0).all()


def test_one_pixel_source():
    images, labels = render(stage([noise(1, 1, 3)], [noise(1, 1)], [Window(0, 0, 1, 1)], (3, 3)))
    torch.testing.assert_close(images, noise(1, 1, 3).view(1, 3, 1, 1).expand(1, 3, 3, 3).float())
    assert (labels == noise(1, 1)[0, 0]).all()


def test_normalise():
    images = torch.rand(2, 3, 4, 5) * 255
    result = normalise(images.clone())
    expected = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(
        3, 1, 1
    )
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_network_input_resizes():
    images = noise(2, 8, 6, 3)
    assert network_input(images, None).shape == (2, 3, 8, 6)
    resized = network_input(images, (5, 9))
    assert resized.shape == (2, 3, 5, 9) and resized.dtype == torch.float32
    constant = network_input(torch.full((1, 8, 6, 3), 77, dtype=torch.uint8), (5, 9))
    torch.testing.assert_close(constant.std(dim=(2, 3)), torch.zeros(1, 3))


@pytest.mark.parametrize("size", [(300, 500), (20, 30), (100, 20)])
def test_drawn_windows_touch_the_image_and_keep_the_range(size):
    augmentation = SegmentationAugmentation(Augmentation(crop=(65, 97), scale=(0.5, 2.0)))
    generator = _generator(0)
    windows = [augmentation.draw(size, generator) for _ in range(300)]
    scales = [65 / w.height for w in windows]
    assert 0.5 <= min(scales) < 0.55 and 1.95 < max(scales) <= 2.0
    assert sum(scales) / 300 == pytest.approx(1.25, abs=0.1)
    assert 100 < sum(w.flip for w in windows) < 200
    for w in windows:
        assert w.height / w.width == pytest.approx(65 / 97)
        for start, extent, length in ((w.top, w.height, size[0]), (w.left, w.width, size[1])):
            if extent <= length:  # the crop lies in the image, to half a pixel of rounding
                assert -1 <= start <= length - extent + 1
            else:  # the image lies in the crop
                assert length - extent - 1 <= start <= 1


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.sampled_from([(0.05, 0.05), (0.05, 20.0), (1.0, 1.0), (20.0, 20.0)]),
    st.integers(0, 1000),
)
def test_extreme_sizes_and_scales(size, crop, scale, seed):
    augmentation = SegmentationAugmentation(Augmentation(crop=crop, scale=scale))
    window = augmentation.draw(size, _generator(seed))
    images, labels = render(stage([noise(*size, 3)], [noise(*size)], [window], crop))
    assert images.shape == (1, 3, *crop) and labels.shape == (1, *crop)
    assert images.min() >= 0 and images.max() <= 255.01


def test_draws_without_flip_and_scale():
    augmentation = SegmentationAugmentation(Augmentation(crop=(8, 8), scale=(1, 1), flip=False))
    for _ in range(20):
        window = augmentation.draw((30, 30), _generator(1))
        assert not window.flip and window.top == int(window.top) and window.height == 8


def test_random_resized_crop_lies_in_the_image():
    augmentation = ClassificationAugmentation(24)
    generator = _generator(0)
    areas = []
    for _ in range(200):
        w = augmentation.draw((60, 80), generator)
        assert w.top >= 0 and w.left >= 0
        assert w.top + w.height <= 60 + 1e-6 and w.left + w.width <= 80 + 1e-6
        areas.append(w.height * w.width / 4800)
    assert min(areas) < 0.2 and max(areas) > 0.8


def test_centre_window():
    assert centre_window((256, 384)) == Window(16, 80, 224, 224)


def test_colour_jitter():
    images = torch.rand(4, 3, 6, 6) * 255
    same = jitter_colours(images, torch.ones(3, 4, 1, 1, 1))
    torch.testing.assert_close(same, images, rtol=1e-4, atol=1e-2)
    factors = draw_colour_factors(4, 0.5, _generator(0))
    assert (factors >= 0.5).all() and (factors <= 1.5).all()
    jittered = jitter_colours(images, factors)
    assert jittered.min() >= 0 and jittered.max() <= 255
    assert not torch.allclose(jittered, images, atol=5)
    grey = jitter_colours(images, torch.tensor([1.0, 1.0, 0.0]).view(3, 1, 1, 1, 1))
    torch.testing.assert_close(grey[:, 0], grey[:, 1])
