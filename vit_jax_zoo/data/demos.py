"""Demonstration datasets made from images that scikit-learn and scikit-image carry in their wheels.

They are TFDS builders like any other, prepared as ArrayRecord on first use (a second or two, the
scenes ten; no download, no TensorFlow) and then read as ImageNet is read. They lie in
`$VIT_JAX_ZOO_CACHE`, or in `vit_jax_zoo` below `$XDG_CACHE_HOME` or `~/.cache`.
"""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from vit_jax_zoo.data import tfds_source
from vit_jax_zoo.data.base import Splits
from vit_jax_zoo.data.demo_base import PHOTOS, DemoBuilder, digit_images, short_side
from vit_jax_zoo.data.demo_base import read_photo as read_photo
from vit_jax_zoo.data.demo_scenes import Scenes
from vit_jax_zoo.data.demo_stereo import Stereo
from vit_jax_zoo.ops.names import unknown_name


class Digits(DemoBuilder, skip_registration=True):
  """1797 handwritten digits, 8x8 grey: 1437 to train on, 360 to test, the same on every machine."""

  DESCRIPTION = "Handwritten digits, 8x8, from scikit-learn."
  CLASS_NAMES = tuple("0123456789")
  IMAGE_SHAPE = (8, 8, 1)
  IMAGE_FORMAT = "png"

  def _examples(self) -> Iterator[tuple[np.ndarray, int]]:
    images, labels = digit_images()
    for i in np.argsort(labels, kind="stable"):
      yield images[i], int(labels[i])


class Photos(DemoBuilder, skip_registration=True):
  """Tiles of ten colour photographs; the class says which photograph a tile was cut from.

  Each photograph is brought to 512 pixels on its short side and cut into tiles of 64x64 that do not
  overlap; every fifth tile is held out, so the test asks about places not seen in training.
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
  """Returns the folder in which demos are kept."""
  if "VIT_JAX_ZOO_CACHE" in os.environ:
    return pathlib.Path(os.environ["VIT_JAX_ZOO_CACHE"]).expanduser()
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(base).expanduser() / "vit_jax_zoo"


def open_splits(location: str, *, panoptic: bool = False) -> Splits:
  """Opens a demo, and prepares it first where that has not been done.

  Args:
    location: its name.
    panoptic: of scenes, give the stuff as well as the things, and which pixels belong to what.

  Raises:
    ValueError: there is no demo of that name, or it has no stuff.
    OSError: the cache folder cannot be written.
  """
  if location not in DEMOS:
    raise ValueError(unknown_name("demo", location, DEMOS))
  folder = cache_dir() / "demos" / location / str(DEMOS[location].VERSION)
  if not folder.is_dir():
    _prepare(DEMOS[location], folder)
  return tfds_source.open_folder(folder, f"demo:{location}", panoptic=panoptic)


def _prepare(builder_class: type[tfds.core.GeneratorBasedBuilder], folder: pathlib.Path) -> None:
  """Writes the dataset beside its place and moves it there in one step.

  So nobody ever sees half a dataset, and of several processes that start together the first to
  finish wins; the others have written the same.
  """
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(dir=folder.parent, prefix=".preparing-")
  except OSError as error:
    raise OSError(
      f"cannot write to the cache {cache_dir()} ({error.strerror}); set VIT_JAX_ZOO_CACHE to a "
      "folder that can be written"
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
