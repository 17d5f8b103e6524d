import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from tests.data.images import encode, photo
from vit_jax_zoo.data import images
from vit_jax_zoo.data.images import decode_image
from vit_jax_zoo.data.sources.base import CorruptExampleError
from vit_jax_zoo.data.transforms.detection import Scale, scaled_size
from vit_jax_zoo.data.transforms.image import ResizeSmall
from vit_jax_zoo.weights.preprocess import DETECTION, ROUNDINGS, Preprocess

PHOTO = photo(48, 64)
RNG = np.random.default_rng(0)


def as_pillow(data):
  return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_exact(image_format):
  assert np.array_equal(decode_image(encode(PHOTO, image_format)), PHOTO)


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_like_pillow(image_format):
  data = encode(PHOTO, image_format)
  assert np.abs(decode_image(data).astype(int) - as_pillow(data)).max() <= 1


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_grey_repeated_in_three_channels(image_format):
  grey = PHOTO[..., 0]
  decoded = decode_image(encode(grey, image_format))
  assert decoded.shape == (48, 64, 3)
  assert np.all(decoded == decoded[..., :1])
  assert np.abs(decoded[..., 0].astype(int) - grey).max() <= 8


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (2, 3000), (1, 1)])
def test_one_pixel_wide_images(size):
  image = np.zeros((*size, 3), np.uint8)
  for rounding in sorted(set(ROUNDINGS) - {"nearest"}):  # without a limit of the longer side
    preprocess = dataclasses.replace(DETECTION, rounding=rounding)
    assert min(preprocess.resize(image).shape[:2]) >= 1
  assert min(scaled_size(size, 800, 1333)) >= 1
  inside = Preprocess((64, 64), fit="inside", interpolation="bilinear")
  assert max(inside.resize(image).shape) == 64
  if max(size) == 4000:
    covering = Preprocess((224, 224), fit="crop", interpolation="bilinear")
    small, scale = ResizeSmall(256), Scale(*scaled_size(size, 400))
    for resized in (
      covering.resize,
      lambda x: small({"image": x}, RNG),
      lambda x: scale({"image": x}),
    ):
      with pytest.raises(CorruptExampleError, match="resized to"):
        resized(image)


def test_palette_decoded():
  data = encode(Image.fromarray(PHOTO).convert("P"), "PNG")
  assert np.array_equal(decode_image(data), as_pillow(data))


def test_cmyk_decoded():
  data = encode(Image.fromarray(PHOTO).convert("CMYK"), "JPEG", quality=100, subsampling=0)
  assert np.abs(decode_image(data).astype(int) - PHOTO).mean() < 2


def test_16_bit_keeps_upper_byte():
  grey = (PHOTO[..., 0].astype(np.uint16) << 8) + 77
  decoded = decode_image(encode(Image.fromarray(grey), "PNG"))
  assert np.array_equal(decoded, np.repeat(PHOTO[..., :1], 3, axis=2))


@pytest.mark.parametrize("reduce", [2, 4, 8])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF"])
def test_reduced_decode_averages(reduce, image_format):
  data = encode(photo(96, 128), image_format)
  reduced = decode_image(data, reduce)
  whole = decode_image(data).astype(float)
  blocks = whole.reshape(96 // reduce, reduce, 128 // reduce, reduce, 3).mean((1, 3))
  assert reduced.shape == blocks.shape
  assert np.abs(reduced - blocks).mean() < 3


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "WEBP"])
@pytest.mark.parametrize("fraction", [0.1, 0.6, 0.95])
def test_truncated_file_corrupt(image_format, fraction):
  data = encode(PHOTO, image_format)
  with pytest.raises(CorruptExampleError, match=r"bytes\)"):
    decode_image(data[: int(len(data) * fraction)])


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xd9", b"GIF8"])
def test_garbage_corrupt(data):
  with pytest.raises(CorruptExampleError) as error:
    decode_image(data)
  assert "\n" not in str(error.value)
  with pytest.raises(CorruptExampleError):
    images.image_size(data)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_trailing_bytes_ignored(image_format):
  data = encode(PHOTO, image_format)
  assert np.array_equal(decode_image(data + b"\0\0\0"), decode_image(data))


def test_image_size_from_header():
  assert images.image_size(encode(PHOTO)) == (48, 64)


class TestResize:
  def test_area_averages_when_shrinking(self):
    image = np.random.default_rng(0).integers(256, size=(64, 96, 3), dtype=np.uint8)
    blocks = image.reshape(16, 4, 24, 4, 3).mean((1, 3))
    assert np.abs(images.resize(image, 16, 24) - blocks).max() <= 0.5
    assert np.abs(images.resize(image, 16, 24, "bilinear") - blocks).max() > 20

  def test_area_interpolates_when_enlarging(self):
    image = np.linspace(0, 200, 11, dtype=np.float32)[None, :, None].repeat(3, 2)
    grown = images.resize(image, 1, 44)[0, :, 0]
    assert np.all(np.diff(grown) >= 0)
    assert grown[22] - grown[21] == pytest.approx(5, abs=1e-3)

  def test_dtype_kept(self):
    for dtype in (np.uint8, np.float32):
      assert images.resize(PHOTO.astype(dtype), 20, 90).dtype == dtype

  @pytest.mark.parametrize("scale", [1.25, 1.5, 1.9, 2.2])
  def test_antialias_close_to_pillow(self, scale):
    """On noise, the hardest case; bilinear has at least 1.35 times the error."""
    noise = np.random.default_rng(0).integers(256, size=(90, 120, 3), dtype=np.uint8)
    height, width = round(90 / scale), round(120 / (1 + (scale - 1) / 2))
    expected = Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)
    errors = {
      method: np.abs(images.resize(noise, height, width, method).astype(int) - expected).mean()
      for method in ("bilinear", "antialias")
    }
    assert errors["antialias"] < errors["bilinear"] / 1.35
    assert errors["antialias"] < 7

  def test_antialias_keeps_constant_image(self):
    for height, width in ((40, 40), (40, 64), (48, 50), (25, 40), (10, 60)):
      assert np.ptp(images.resize(np.full((48, 64, 3), 77, np.uint8), height, width)) == 0

  def test_antialias_filters_axes_separately(self):
    stripes = np.zeros((60, 60, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(images.resize(stripes, 40, 60)) == 255  # only rows are shrunk
    plain = np.ptp(images.resize(stripes, 60, 40, "bilinear"))
    assert np.ptp(images.resize(stripes, 60, 40)) < plain / 1.5
