"""The resize within exported programs against `Preprocess.resize`, for symbolic image sizes."""

import jax
import numpy as np
import pytest
import skimage.data

from vit_jax_zoo.inference import programs
from vit_jax_zoo.weights import Preprocess

PHOTO = skimage.data.astronaut()
SIZES = ((300, 211), (20, 20), (16, 24))  # smaller, mixed, equal
CASES = {
  "tf_bilinear": ({}, 0.01),
  "tf_antialias": ({"truncate": True}, 1),
  "tf_area": ({}, 0.01),
  "nearest": ({}, 255),  # at ties, the other pixel
  "bilinear": ({"fit": "crop", "crop_pct": 0.875}, 1),
  "bicubic": ({"fit": "crop", "crop_pct": 0.9, "rounding": "ratio"}, 1),
  "lanczos": ({"fit": "crop", "rounding": "nearest"}, 1),
  "hamming": ({"channels": 1}, 1),
  "box": ({"crop_pct": (0.5, 1.0)}, 255),  # likewise
  "opencv": ({}, 2),
}


def resize_symbolic(preprocess):
  """Returns the resize as one program for all batch and image sizes."""
  names = jax.export.symbolic_shape("b, h, w", constraints=["h >= 2", "w >= 2"])
  spec = jax.ShapeDtypeStruct((*names, 3), np.uint8)
  size = preprocess.image_size
  function = jax.jit(lambda images: programs.traced_resize(images, preprocess, size)[0])
  return jax.export.export(function)(spec).call


@pytest.mark.parametrize("method", CASES)
def test_equals_preprocess(method):
  fields, tolerance = CASES[method]
  preprocess = Preprocess((16, 24), interpolation=method, **fields)
  program = resize_symbolic(preprocess)
  for height, width in SIZES:
    if method == "opencv" and min(height / 16, width / 24) < 1:
      continue  # an enlarged axis is not OpenCV's area filter
    image = np.ascontiguousarray(PHOTO[:height, 50 : 50 + width])
    expected = preprocess.resize(preprocess.from_rgb(image))
    found = program(image[None])[0]
    difference = np.abs(np.asarray(found) - expected)
    # Levels next to a rounding boundary may differ by one; most pixels are equal.
    assert difference.max() <= tolerance, (height, width)
    assert difference.mean() <= (1.0 if tolerance == 255 else 0.3), (height, width)


@pytest.mark.parametrize(
  ("fit", "rounding"),
  [
    ("shorter_side", "side"),
    ("shorter_side", "ratio"),
    ("shorter_side", "floor"),
    ("shorter_side", "nearest"),
    ("crop", "side"),
    ("inside", "side"),
  ],
)
def test_sizes_equal_preprocess(fit, rounding):
  """Of 400 random sizes; float32 may round an exact quotient down by one in the limited ones."""
  limit = 133 if fit == "shorter_side" and rounding != "nearest" else None
  preprocess = Preprocess((80, 80), fit=fit, rounding=rounding, max_side=limit)
  sizes = np.random.default_rng(0).integers(20, 400, (400, 2))
  found = jax.jit(jax.vmap(lambda h, w: programs.traced_size(preprocess, h, w)))
  found = np.stack(found(*sizes.T.astype(np.float32)), axis=1)
  difference = np.abs(found - [preprocess.resized_size(*map(int, size)) for size in sizes])
  assert difference.max() <= 1
  assert (difference > 0).mean() < (0.1 if rounding in ("ratio", "floor") else 0.02)


def test_padding_is_zero():
  preprocess = Preprocess((16, 16), interpolation="bilinear", fit="shorter_side", max_side=24)
  image = np.ascontiguousarray(PHOTO[:40, :50])
  resize = jax.jit(lambda images: programs.traced_resize(images, preprocess, (32, 32)))
  found, sides, given = resize(image[None])
  expected = preprocess.resize(image)
  assert tuple(sides) == expected.shape[:2] == (16, 20)
  assert tuple(given) == (40, 50)
  assert np.abs(found[0, :16, :20] - expected).max() <= 1
  assert not found[0, 16:].any()
  assert not found[0, :, 20:].any()
