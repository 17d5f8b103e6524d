"""Pixel operations, against Pillow's and against their formulas."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from vit_jax_zoo.data.sources.demo import read_photo
from vit_jax_zoo.data.transforms import augment as ops

FILL = (10, 128, 250)


def images():
  rng = np.random.default_rng(0)
  photo = read_photo("temple")[100:164, 200:280]
  dull = (photo[:, ::-1] // 3 + 40).astype(np.uint8)
  flat = np.full((5, 7, 3), (0, 90, 255), np.uint8)
  return {"photo": photo, "dull": dull, "flat": flat,
          "noise": rng.integers(0, 256, (33, 20, 3), dtype=np.uint8)}  # fmt: skip


CASES = images()


@pytest.fixture(params=CASES)
def image(request):
  return np.ascontiguousarray(CASES[request.param])


def pillow(function, image, *args):
  return np.asarray(function(Image.fromarray(image), *args))


def enhanced(kind, image, factor):
  return np.asarray(kind(Image.fromarray(image)).enhance(factor))


def test_auto_contrast_equals_pillow(image):
  expected = pillow(ImageOps.autocontrast, image)
  np.testing.assert_array_equal(ops.auto_contrast(image), expected)


def test_invert_formula(image):
  np.testing.assert_array_equal(ops.invert(image), 255 - image)


@pytest.mark.parametrize("bits", [1, 4, 7, 8])
def test_posterize_equals_pillow(image, bits):
  np.testing.assert_array_equal(ops.posterize(image, bits), pillow(ImageOps.posterize, image, bits))


def test_posterize_zero_bits_black(image):
  assert not ops.posterize(image, 0).any()


@pytest.mark.parametrize("threshold", [0, 77, 128, 256])
def test_solarize_equals_pillow(image, threshold):
  expected = pillow(ImageOps.solarize, image, threshold)
  np.testing.assert_array_equal(ops.solarize(image, threshold), expected)


@pytest.mark.parametrize("addition", [0, 30, 220])
def test_solarize_add_formula(image, addition):
  added = np.minimum(image.astype(int) + addition, 255)
  expected = np.where(image < 128, added, image)
  np.testing.assert_array_equal(ops.solarize_add(image, addition), expected)


@pytest.mark.parametrize("factor", [0.1, 0.37, 1.0, 1.9, 3.7])
@pytest.mark.parametrize(
  ("function", "kind"),
  [
    (ops.brightness, ImageEnhance.Brightness),
    (ops.color, ImageEnhance.Color),
    (ops.contrast, ImageEnhance.Contrast),
    (ops.sharpness, ImageEnhance.Sharpness),
  ],
  ids=["brightness", "color", "contrast", "sharpness"],
)
def test_enhancements_equal_pillow(image, function, kind, factor):
  np.testing.assert_array_equal(function(image, factor), enhanced(kind, image, factor))


def test_contrast_with_given_grey():
  image = np.array([[[0, 100, 255]]], np.uint8)
  # 196 + 1.9 * (value - 196), truncated.
  np.testing.assert_array_equal(ops.contrast(image, 1.9, grey=196), [[[0, 13, 255]]])


@pytest.mark.parametrize(
  "resample", [ops.Resampling.NEAREST, ops.Resampling.BILINEAR, ops.Resampling.BICUBIC]
)
@pytest.mark.parametrize("degrees", [-30.0, 12.5, 27.0])
def test_rotate_close_to_pillow(image, degrees, resample):
  expected = Image.fromarray(image).rotate(degrees, resample, fillcolor=FILL)
  turned = ops.rotate(image, degrees, FILL, resample)
  # Pillow rounds its matrix to 15 digits.
  assert np.mean(turned != np.asarray(expected)) < 2e-3


def test_affine_integer_shift():
  image = CASES["noise"]
  moved = ops.affine(image, (1, 0, 3, 0, 1, -2), FILL, ops.Resampling.NEAREST)
  expected = np.empty_like(image)
  expected[:] = FILL
  expected[2:, :-3] = image[:-2, 3:]
  np.testing.assert_array_equal(moved, expected)


def test_cutout_clipped_at_border():
  image = CASES["noise"]
  cut = ops.cutout(image, (1, 18), 4, FILL)
  inside = np.zeros(image.shape[:2], bool)
  inside[0:5, 14:20] = True
  np.testing.assert_array_equal(cut[~inside], image[~inside])
  assert (cut[inside] == FILL).all()
