"""What demonstration datasets share: a TFDS builder, and the photographs they are cut from."""

import importlib.resources
import io
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

TEST_EVERY = 5
"""One example in five is held out."""


class DemoBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A classification dataset of images that need no download."""

  VERSION = tfds.core.Version("1.0.0")
  DESCRIPTION: ClassVar[str]
  CLASS_NAMES: ClassVar[tuple[str, ...]]
  IMAGE_SHAPE: ClassVar[tuple[int, int, int]]
  IMAGE_FORMAT: ClassVar[str]

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      "image": tfds.features.Image(shape=self.IMAGE_SHAPE, encoding_format=self.IMAGE_FORMAT),
      "label": tfds.features.ClassLabel(names=self.CLASS_NAMES),
    }
    features = tfds.features.FeaturesDict(features)
    return tfds.core.DatasetInfo(builder=self, description=self.DESCRIPTION, features=features)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    del dl_manager
    examples = list(self._examples())
    test = examples[::TEST_EVERY]
    train = [example for i, example in enumerate(examples) if i % TEST_EVERY]
    return {"train": self._generate_examples(train), "test": self._generate_examples(test)}

  def _generate_examples(
    self, examples: list[tuple[np.ndarray, int]]
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    for key, (image, label) in enumerate(examples):
      yield key, {"image": encode(image, self.IMAGE_FORMAT), "label": label}

  def _examples(self) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (uint8 image, label) class by class, so that every fifth is a stratified test set."""
    raise NotImplementedError


PHOTOS = {
  "astronaut": "skimage/data/astronaut.png",
  "cat": "skimage/data/chelsea.png",
  "coffee": "skimage/data/coffee.png",
  "flower": "sklearn/datasets/images/flower.jpg",
  "galaxies": "skimage/data/hubble_deep_field.jpg",
  "motorcycle": "skimage/data/motorcycle_left.png",
  "retina": "skimage/data/retina.jpg",
  "rocket": "skimage/data/rocket.jpg",
  "temple": "sklearn/datasets/images/china.jpg",
  "tissue": "skimage/data/ihc.png",
}
"""Colour photographs by class, each at its place in the wheel that carries it."""


def read_photo(name: str) -> np.ndarray:
  """Returns one of `PHOTOS`, uint8 [h w 3], at its own size."""
  package, _, path = PHOTOS[name].partition("/")
  # By the file's place: skimage.data's functions bring in a downloader and a registry.
  file = importlib.resources.files(package).joinpath(path)
  with file.open("rb") as stream, Image.open(stream) as image:
    return np.asarray(image.convert("RGB"))


def short_side(image: np.ndarray, size: int) -> np.ndarray:
  """Returns the image with `size` pixels on its shorter side."""
  height, width = image.shape[:2]
  scale = size / min(height, width)
  size_xy = (round(width * scale), round(height * scale))
  return np.asarray(Image.fromarray(image).resize(size_xy, Image.Resampling.BICUBIC))


def encode(image: np.ndarray, image_format: str) -> bytes:
  """Returns an image as a file of the format "png" or "jpeg"."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, image_format, **_QUALITY[image_format])
  return buffer.getvalue()


_QUALITY: dict[str, dict[str, int]] = {"png": {}, "jpeg": {"quality": 95}}


def digit_images() -> tuple[np.ndarray, np.ndarray]:
  """Returns scikit-learn's handwritten digits, uint8 [n 8 8] from 0 to 255, and their labels [n].

  The test set of the UCI "Optical Recognition of Handwritten Digits" data (Alpaydin and Kaynak,
  1998). Its 17 grey levels are spread over 0..255.
  """
  from sklearn.datasets import load_digits  # slow to import, and needed once

  pixels, labels = load_digits(return_X_y=True)
  return np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), np.asarray(labels)
