"""`demo:stereo`: super-resolution of one image of a stereo pair with the other as reference.

The pair is scikit-image's motorcycle, from the Middlebury stereo data of 2014 (Scharstein et al.,
"High-resolution stereo datasets with subpixel-accurate ground truth"): the left image is enlarged,
the right one is the reference. A strip across engine and wheels, of both images, is the test split.
Photographs with a simulated second view are added to the training split.
"""

import importlib.resources
from collections.abc import Iterable, Iterator
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from vit_jax_zoo.data.sources import demo as demo_base

EYES = ("skimage/data/motorcycle_left.png", "skimage/data/motorcycle_right.png")

SHIFT = 34
"""Columns by which the right image is shifted to the right. Disparities are 8 to 60 columns, and at
most 26 after the shift."""

STRIP = slice(232, 328)
"""Rows of the test split."""

MARGIN = 28
"""Columns on either side of a test image that its reference also covers."""

TEST_WIDTH, WINDOW = 112, (160, 256)
"""Width of test images; height and width of training images, which are cropped at random."""

PHOTOS = ("astronaut", "cat", "coffee", "flower", "rocket", "temple")
PHOTO_SIDE = 320

Pair = tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w 3"]]
"""An image and its reference."""


class Stereo(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Training windows of a stereo pair, and six test images of 96x112 from a strip of it."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    picture = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
    features = tfds.features.FeaturesDict({"image": picture, "reference": picture})
    return tfds.core.DatasetInfo(
      builder=self, description=__doc__, features=features, disable_shuffling=True
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    del dl_manager
    left, right = read_eyes()
    train = [*_train_windows(left, right), *_photo_windows()]
    return {
      "train": self._generate_examples(train),
      "test": self._generate_examples(_test_pairs(left, right)),
    }

  def _generate_examples(self, pairs: Iterable[Pair]) -> Iterator[tuple[int, dict[str, Any]]]:
    for key, (image, reference) in enumerate(pairs):
      encoded = (demo_base.encode(x, "png") for x in (image, reference))
      yield key, dict(zip(("image", "reference"), encoded, strict=True))


def read_eyes() -> Pair:
  """Returns the left and the right image, [500 707 3], shifted by `SHIFT`."""
  pictures = []
  for path in EYES:
    package, _, name = path.partition("/")
    with importlib.resources.files(package).joinpath(name).open("rb") as stream:
      pictures.append(np.asarray(Image.open(stream).convert("RGB")))
  left, right = pictures
  return left[:, SHIFT:], right[:, :-SHIFT]


def _train_windows(left: np.ndarray, right: np.ndarray) -> Iterator[Pair]:
  """Yields overlapping windows above and below the strip."""
  for rows in (slice(None, STRIP.start), slice(STRIP.stop, None)):
    eyes = left[rows], right[rows]
    for top in _starts(eyes[0].shape[0], WINDOW[0], 72):
      for start in _starts(eyes[0].shape[1], WINDOW[1], 64):
        window = (slice(top, top + WINDOW[0]), slice(start, start + WINDOW[1]))
        yield eyes[0][window], eyes[1][window]


def _test_pairs(left: np.ndarray, right: np.ndarray) -> Iterator[Pair]:
  """Yields the parts of the strip, each with the other image's region and its margins."""
  width = left.shape[1]
  whole = TEST_WIDTH + 2 * MARGIN
  for start in range((width % TEST_WIDTH) // 2, width - TEST_WIDTH + 1, TEST_WIDTH):
    other = min(max(start - MARGIN, 0), width - whole)
    yield left[STRIP, start : start + TEST_WIDTH], right[STRIP, other : other + whole]


def _photo_windows() -> Iterator[Pair]:
  """Yields windows of photographs with a simulated second view."""
  rng = np.random.default_rng(0)
  for name in PHOTOS:
    image = demo_base.short_side(demo_base.read_photo(name), PHOTO_SIDE)
    for top in _starts(image.shape[0], WINDOW[0], 160):
      for start in _starts(image.shape[1], WINDOW[1], 256):
        window = (slice(top, top + WINDOW[0]), slice(start, start + WINDOW[1]))
        yield image[window], _second_eye(image, rng)[window]


def _second_eye(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns the image with a random horizontal shift, as large as the pair's, and scale."""
  middle = (image.shape[1] / 2, image.shape[0] / 2)
  motion = cv2.getRotationMatrix2D(middle, rng.uniform(-1, 1), rng.uniform(0.97, 1.03))
  motion[:, 2] += rng.uniform(-20, 20), rng.uniform(-2, 2)
  size = (image.shape[1], image.shape[0])
  moved = cv2.warpAffine(
    image, motion, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101
  )
  return np.clip(moved * rng.uniform(0.95, 1.05), 0, 255).astype(np.uint8)


def _starts(length: int, size: int, step: int) -> list[int]:
  """Returns the starts of windows `step` apart; the last window ends at the end."""
  return [*range(0, length - size, step), length - size]
