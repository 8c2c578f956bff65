"""Images: upright RGB, or one of the reasons; never something else in their place."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsm_guidance.data.buckets import Buckets
from rsm_guidance.data.preferences.images import MAX_PIXELS, content_key, decode
from rsm_guidance.data.preferences.problems import BadRow, Reason
from tests.data.pictures import BROKEN, bomb, encoded, noise, noisy


@pytest.mark.parametrize("reason", BROKEN)
def test_files_that_cannot_be_decoded_have_their_reason(reason: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    if BROKEN[reason] is not None:
        path.write_bytes(BROKEN[reason])
    with pytest.raises(BadRow) as caught:
        decode(path)
    assert caught.value.reason == reason and str(path) in caught.value.detail


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_file_that_is_cut_off_anywhere_is_refused_or_whole(format: str) -> None:
    whole = noisy(3, format)
    expected = content_key(decode(Path("x"), whole))
    for share in np.linspace(0, 0.99, 25):
        try:
            assert content_key(decode(Path("x"), whole[: int(share * len(whole))])) == expected
        except BadRow as error:
            assert error.reason in (Reason.DAMAGED, Reason.NO_IMAGE, Reason.EXIF)


def test_the_limit_of_size_is_ours_below_pillows() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    with pytest.raises(BadRow) as caught:
        decode(Path("x"), bomb(side, side))
    assert caught.value.reason is Reason.TOO_LARGE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation: int) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24] = 255  # the upper left corner is white
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Pillow's transpositions
    stored = Image.fromarray(upright) if undo is None else Image.fromarray(upright).transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    stored.save(out, "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(Path("x"), out.getvalue())), upright)


def test_transparency_is_white_and_sixteen_bits_become_eight() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(out, "PNG")
    assert decode(Path("x"), out.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    out = io.BytesIO()
    Image.fromarray(np.full((4, 4), 128 << 8, np.uint16)).save(out, "PNG")
    assert decode(Path("x"), out.getvalue()).getpixel((0, 0)) == (128, 128, 128)
    for mode in ("L", "P", "CMYK", "1", "LA"):
        out = io.BytesIO()
        Image.new(mode, (4, 4)).save(out, "TIFF")
        assert decode(Path("x"), out.getvalue()).mode == "RGB"


def test_equal_pixels_have_one_key_however_they_were_written() -> None:
    keys = {content_key(decode(Path("x"), noisy(5, format))) for format in ("PNG", "BMP", "TIFF")}
    assert len(keys) == 1 and keys != {content_key(noise(6))}
    wide, tall = (decode(Path("x"), encoded(1, size=s)) for s in ((8, 2), (2, 8)))
    assert content_key(wide) != content_key(tall)


def test_buckets_have_about_one_area_and_the_nearest_shape_is_taken() -> None:
    buckets = Buckets(512, 64, 2.0)
    assert all(not w % 64 and not h % 64 and 0.75 * 512**2 < w * h <= 512**2 for w, h in buckets.sizes)
    assert {(h, w) for w, h in buckets.sizes} == set(buckets.sizes) and (512, 512) in buckets.sizes
    assert buckets.sizes[buckets.of(noise(0, (300, 300)))] == (512, 512)
    assert buckets.sizes[buckets.of(noise(0, (900, 100)))] == (640, 384)
    assert buckets.sizes[buckets.of(noise(0, (300, 150)), noise(0, (150, 300)))] == (512, 512)
    assert Buckets(64, 16, 1.0).sizes == ((64, 64),)
    for wrong in ({"side": 100}, {"step": 0}, {"max_ratio": 0.5}, {"side": 0}):
        with pytest.raises(ValueError, match="buckets need a side"):
            Buckets(**{"side": 512, "step": 64} | wrong)


def test_an_image_is_cropped_in_the_middle_and_not_stretched() -> None:
    stripes = np.zeros((32, 96, 3), np.uint8)
    stripes[:, 32:64] = 200
    buckets = Buckets(32, 8, 1.0)
    assert np.unique(np.asarray(buckets.fitted(Image.fromarray(stripes), 0))[:, 2:-2]).tolist() == [200]
    same = noise(1, (32, 32))
    assert np.array_equal(np.asarray(buckets.fitted(same, 0)), np.asarray(same))
