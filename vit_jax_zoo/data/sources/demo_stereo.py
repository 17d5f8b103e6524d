"""`demo:stereo`: what one eye sees is enlarged with the help of the other eye's picture.

The pair is scikit-image's motorcycle, from the Middlebury stereo data of 2014 (Scharstein et al.,
"High-resolution stereo datasets with subpixel-accurate ground truth"). The left eye's picture is
what is to be enlarged, the right eye's the reference. A strip across the engine and the wheels is
held out from training, of both eyes. Photographs with a pretended second eye are added to what
there is to train on.
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
"""Columns by which the right eye's picture is moved to the right. Things stand 8 to 60 columns
further left in it; then, what belongs together is at most 26 columns apart."""

STRIP = slice(232, 328)
"""Rows that are held out."""

MARGIN = 28
"""Columns on either side of a held-out picture that its reference shows, too."""

TEST_WIDTH, WINDOW = 112, (160, 256)
"""Of held-out pictures; height and width of those to train on, which are cropped at random."""

PHOTOS = ("astronaut", "cat", "coffee", "flower", "rocket", "temple")
PHOTO_SIDE = 320

Pair = tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w 3"]]
"""A picture and its reference."""


class Stereo(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Windows of two eyes' pictures to train on, and six parts of a strip, 96x112, for the test."""

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
  """Returns what the left and the right eye see, [500 707 3], moved by `SHIFT`."""
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
  """Yields the strip part by part, each with what the other eye sees there and on both sides."""
  width = left.shape[1]
  whole = TEST_WIDTH + 2 * MARGIN
  for start in range((width % TEST_WIDTH) // 2, width - TEST_WIDTH + 1, TEST_WIDTH):
    other = min(max(start - MARGIN, 0), width - whole)
    yield left[STRIP, start : start + TEST_WIDTH], right[STRIP, other : other + whole]


def _photo_windows() -> Iterator[Pair]:
  """Yields windows of photographs, with what a second eye might see."""
  rng = np.random.default_rng(0)
  for name in PHOTOS:
    image = demo_base.short_side(demo_base.read_photo(name), PHOTO_SIDE)
    for top in _starts(image.shape[0], WINDOW[0], 160):
      for start in _starts(image.shape[1], WINDOW[1], 256):
        window = (slice(top, top + WINDOW[0]), slice(start, start + WINDOW[1]))
        yield image[window], _second_eye(image, rng)[window]


def _second_eye(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns the picture moved sideways as far as the pair's may be, a little nearer or farther."""
  middle = (image.shape[1] / 2, image.shape[0] / 2)
  motion = cv2.getRotationMatrix2D(middle, rng.uniform(-1, 1), rng.uniform(0.97, 1.03))
  motion[:, 2] += rng.uniform(-20, 20), rng.uniform(-2, 2)
  size = (image.shape[1], image.shape[0])
  moved = cv2.warpAffine(
    image, motion, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101
  )
  return np.clip(moved * rng.uniform(0.95, 1.05), 0, 255).astype(np.uint8)


def _starts(length: int, size: int, step: int) -> list[int]:
  """Returns where windows begin, `step` apart; the last ends where the whole does."""
  return [*range(0, length - size, step), length - size]
