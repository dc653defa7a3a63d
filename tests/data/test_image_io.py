from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lgcnet_fast.data import image_io
from lgcnet_fast.data.image_io import read_colour_mask, read_image, read_mask
from lgcnet_fast.errors import DataError

GRADIENT = np.arange(6 * 8, dtype=np.uint8).reshape(6, 8) * 5
COLOURS = np.stack([GRADIENT, 255 - GRADIENT, GRADIENT // 2], axis=2)


def test_rgb_is_unchanged(tmp_path, save):
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", COLOURS)), COLOURS)


def test_grey_becomes_rgb(tmp_path, save):
    image = read_image(save(tmp_path / "a.png", GRADIENT))
    np.testing.assert_array_equal(image, np.repeat(GRADIENT[:, :, None], 3, axis=2))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, save, name):
    image = read_image(save(tmp_path / name, GRADIENT.astype(np.uint16) * 257))
    np.testing.assert_array_equal(image[:, :, 1], GRADIENT)


def test_32_bit_grey_is_refused(tmp_path, save):
    path = save(tmp_path / "a.tif", np.full((4, 4), 70000, np.int32))
    with pytest.raises(DataError, match=r"a\.tif.*16 bits.*convert"):
        read_image(path)


def test_floating_point_is_refused(tmp_path, save):
    path = save(tmp_path / "a.tif", np.ones((4, 4), np.float32))
    with pytest.raises(DataError, match=r"a\.tif.*floating"):
        read_image(path)


def test_palette_becomes_its_colours(tmp_path):
    image = Image.fromarray(COLOURS).quantize(48)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.array(image.convert("RGB")))


def test_palette_with_transparency(tmp_path):
    image = Image.fromarray(COLOURS).quantize(48)
    image.save(tmp_path / "a.png", transparency=bytes(range(48)))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.array(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "1", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(COLOURS).convert(mode)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    image.save(path)
    np.testing.assert_array_equal(read_image(path), np.array(image.convert("RGB")))


def test_alpha_leaves_colours_alone(tmp_path, save):
    pixels = np.dstack([COLOURS, np.full(GRADIENT.shape, 40, np.uint8)])
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", pixels)), COLOURS)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(COLOURS, -1))


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_truncated_file(tmp_path, kind):
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(whole, kind)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(DataError, match=rf"a\.{kind}.*not a readable image.*save it again"):
        read_image(path)


def test_empty_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    with pytest.raises(DataError, match="not a readable image"):
        read_image(path)


def test_zero_size(tmp_path):
    path = tmp_path / "a.ppm"
    path.write_bytes(b"P6 0 4 255\n")
    with pytest.raises(DataError, match=r"a\.ppm"):
        read_image(path)


def test_missing_file_folder_and_unusable_names(tmp_path):
    for path in (tmp_path / "no.png", tmp_path, tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(DataError, match="no such file"):
            read_image(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "pipe.png")


def test_decompression_bomb(tmp_path):
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 60000 60000 255\n")
    with pytest.raises(DataError, match=r"a\.pgm.*pixels; cut it"):
        read_image(path)


def test_more_pixels_than_allowed(tmp_path, save, monkeypatch):
    monkeypatch.setattr(image_io, "MAX_PIXELS", 40)
    with pytest.raises(DataError, match="more than 40 pixels"):
        read_image(save(tmp_path / "a.png", COLOURS))


def test_postscript_is_not_interpreted(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match="not a readable image"):
        read_image(path)


PNG = io.BytesIO()
Image.fromarray(COLOURS).save(PNG, "png")
JPEG = io.BytesIO()
Image.fromarray(COLOURS).save(JPEG, "jpeg")
TIFF = io.BytesIO()
Image.fromarray(COLOURS).save(TIFF, "tiff", compression="tiff_lzw")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([PNG.getvalue(), JPEG.getvalue(), TIFF.getvalue()]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8),
    st.integers(0, 10**6),
    st.binary(max_size=20),
)
def test_damaged_bytes_give_an_image_or_a_data_error(tmp_path_factory, whole, flips, end, tail):
    damaged = bytearray(whole)
    for place, value in flips:
        damaged[place % len(damaged)] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.img"
    path.write_bytes(bytes(damaged[: end % (2 * len(damaged))]) + tail)
    for read in (read_image, read_mask, read_colour_mask):
        try:
            pixels = read(path)
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert pixels.size > 0


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.img"
    path.write_bytes(content)
    try:
        assert read_image(path).shape[2] == 3
    except DataError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("name", "dtype", "high"),
    [("a.png", np.uint8, 255), ("a.png", np.uint16, 65535), ("a.tif", np.int32, 70000)],
)
def test_mask_ids_are_kept(tmp_path, save, name, dtype, high):
    ids = np.array([[0, 1, 2], [33, 7, high]], dtype)
    mask = read_mask(save(tmp_path / name, ids))
    np.testing.assert_array_equal(mask, ids)


def test_palette_mask_gives_indices(tmp_path):
    ids = np.array([[0, 1], [2, 200]], np.uint8)
    image = Image.fromarray(ids).convert("L")
    image.putpalette([v for i in range(256) for v in (255 - i, i, 7)])
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), ids)


def test_grey_mask_saved_as_rgb(tmp_path, save):
    path = save(tmp_path / "a.png", np.repeat(GRADIENT[:, :, None], 3, axis=2))
    np.testing.assert_array_equal(read_mask(path), GRADIENT)


def test_colour_mask_where_ids_are_expected(tmp_path, save):
    with pytest.raises(DataError, match=r"a\.png: holds colours .* 8-bit"):
        read_mask(save(tmp_path / "a.png", COLOURS))


def test_lossy_mask_is_refused(tmp_path, save):
    path = save(tmp_path / "a.jpg", GRADIENT)
    for read in (read_mask, read_colour_mask):
        with pytest.raises(DataError, match=r"a\.jpg: JPEG .* PNG"):
            read(path)


def test_real_images_and_masks(real_data: Path):
    image = read_image(real_data / "camvid" / "val" / "0016E5_07959.jpg")
    mask = read_mask(real_data / "camvid" / "valannot" / "0016E5_07959.png")
    assert image.shape == (360, 480, 3)
    assert mask.shape == (360, 480) and mask.max() <= 11
