"""Demo datasets from images in the wheels of scikit-learn and scikit-image.

They are TFDS builders, prepared as ArrayRecord at their first use (1 to 2 s, scenes 10 s; no
download, no TensorFlow) in `$VIT_JAX_ZOO_CACHE`, or in `vit_jax_zoo` below `$XDG_CACHE_HOME` or
`~/.cache`, and read as ImageNet is.
"""

import importlib.resources
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax_zoo.data.sources import tfds as tfds_source
from vit_jax_zoo.data.sources.base import Splits
from vit_jax_zoo.data.sources.demo_scenes import Scenes
from vit_jax_zoo.data.sources.demo_stereo import Stereo
from vit_jax_zoo.errors import unknown_name

TEST_EVERY = 5
"""One example in five is in the test split."""


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
    """Yields (uint8 image, label) by class, so that every fifth is a stratified test set."""
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
"""Color photographs by class, with their paths in the wheels."""


def read_photo(name: str) -> np.ndarray:
  """Returns one of `PHOTOS`, uint8 [h w 3], at its size."""
  package, _, path = PHOTOS[name].partition("/")
  # By path: skimage.data's functions import a downloader.
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
  """Returns an image's file content, "png" or "jpeg"."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, image_format, **_QUALITY[image_format])
  return buffer.getvalue()


_QUALITY: dict[str, dict[str, int]] = {"png": {}, "jpeg": {"quality": 95}}


def digit_images() -> tuple[np.ndarray, np.ndarray]:
  """Returns scikit-learn's handwritten digits, uint8 [n 8 8] in 0..255, and their labels [n].

  The test set of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998),
  with its 17 gray levels scaled to 0..255.
  """
  from sklearn.datasets import load_digits  # slow to import

  pixels, labels = load_digits(return_X_y=True)
  return np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), np.asarray(labels)


class Digits(DemoBuilder, skip_registration=True):
  """1797 handwritten digits, 8x8 gray: 1437 for training, 360 for test."""

  DESCRIPTION = "Handwritten digits, 8x8, from scikit-learn."
  CLASS_NAMES = tuple("0123456789")
  IMAGE_SHAPE = (8, 8, 1)
  IMAGE_FORMAT = "png"

  def _examples(self) -> Iterator[tuple[np.ndarray, int]]:
    images, labels = digit_images()
    for i in np.argsort(labels, kind="stable"):
      yield images[i], int(labels[i])


class Photos(DemoBuilder, skip_registration=True):
  """Tiles of ten color photographs; the class is the photograph.

  Each photograph is resized to a shorter side of 512 and cut into 64x64 tiles without overlap;
  every fifth tile is in the test split, so that test tiles are not seen in training.
  """

  DESCRIPTION = "64x64 tiles of photographs from scikit-image and scikit-learn."
  CLASS_NAMES = tuple(PHOTOS)
  IMAGE_SHAPE = (64, 64, 3)
  IMAGE_FORMAT = "jpeg"

  SHORT_SIDE = 512

  def _examples(self) -> Iterator[tuple[np.ndarray, int]]:
    tile = self.IMAGE_SHAPE[0]
    for label, name in enumerate(PHOTOS):
      image = short_side(read_photo(name), self.SHORT_SIDE)
      for top in range(0, image.shape[0] - tile + 1, tile):
        for left in range(0, image.shape[1] - tile + 1, tile):
          yield image[top : top + tile, left : left + tile], label


DEMOS = {"digits": Digits, "photos": Photos, "scenes": Scenes, "stereo": Stereo}


def cache_dir() -> pathlib.Path:
  """Returns the folder of prepared demos."""
  if "VIT_JAX_ZOO_CACHE" in os.environ:
    return pathlib.Path(os.environ["VIT_JAX_ZOO_CACHE"]).expanduser()
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(base).expanduser() / "vit_jax_zoo"


def open_splits(location: str, *, panoptic: bool = False) -> Splits:
  """Opens a demo; prepares it at its first use.

  Args:
    location: its name.
    panoptic: of scenes: things and stuff with their segments.

  Raises:
    ValueError: an unknown demo, or one without segments.
    OSError: the cache folder cannot be written.
  """
  if location not in DEMOS:
    raise ValueError(unknown_name("demo", location, DEMOS))
  folder = cache_dir() / "demos" / location / str(DEMOS[location].VERSION)
  if not folder.is_dir():
    _prepare(DEMOS[location], folder)
  return tfds_source.open_folder(folder, f"demo:{location}", panoptic=panoptic)


def _prepare(builder_class: type[tfds.core.GeneratorBasedBuilder], folder: pathlib.Path) -> None:
  """Writes the dataset to a temporary folder and renames it in one step.

  No process sees half a dataset; of several that start together, the first to finish wins.
  """
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(dir=folder.parent, prefix=".preparing-")
  except OSError as error:
    raise OSError(
      f"cache folder {cache_dir()} cannot be written ({error.strerror}); set VIT_JAX_ZOO_CACHE to "
      "another folder"
    ) from error
  try:
    builder = builder_class(data_dir=scratch, file_format="array_record")
    with tfds_source.quiet_progress():
      builder.download_and_prepare()
    os.rename(builder.data_dir, folder)
  except OSError:
    if not folder.is_dir():
      raise
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
