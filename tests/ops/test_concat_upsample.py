import torch

from lgcnet_fast.ops import concat_upsample, upsample


def test_aligned_corners_keep_every_source_pixel():
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    large = upsample(x, (7, 9))
    torch.testing.assert_close(large[..., ::2, ::2], x)
    torch.testing.assert_close(large[..., 1, 0], (x[..., 0, 0] + x[..., 1, 0]) / 2)


def test_the_same_size_is_no_copy():
    x = torch.randn(1, 2, 4, 5)
    assert upsample(x, (4, 5)) is x
    assert concat_upsample([x], (4, 5)) is x


def test_a_single_pixel_spreads():
    x = torch.randn(1, 3, 1, 1)
    assert torch.equal(upsample(x, (4, 6)), x.expand(1, 3, 4, 6))


def test_concatenates_in_order():
    maps = [torch.randn(2, c, h, w) for c, h, w in ((2, 5, 7), (3, 3, 4), (1, 9, 13))]
    found = concat_upsample(maps, (5, 7))
    assert found.shape == (2, 6, 5, 7)
    assert torch.equal(found[:, :2], maps[0])
    assert torch.equal(found[:, 2:5], upsample(maps[1], (5, 7)))
    torch.testing.assert_close(found[:, 5:], maps[2][..., ::2, ::2])
