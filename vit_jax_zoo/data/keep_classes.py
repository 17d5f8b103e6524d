"""Leaving out objects by their class."""

import dataclasses

import numpy as np

from vit_jax_zoo.data.base import Example
from vit_jax_zoo.data.geometry import Size, keep_objects
from vit_jax_zoo.data.transform_base import Transform


@dataclasses.dataclass(frozen=True)
class KeepClasses(Transform):
  """Keeps the objects whose class ids lie below a limit: the things of data with things and stuff.

  `image` stays; of `labels` and the other keys of `data/objects.py` the rest goes. It comes behind
  `load_objects`.

  Attributes:
    below: the first class id that is left out.
  """

  name = "keep_classes"

  below: int

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example without the others."""
    del rng
    return keep_objects(example, example["labels"] < self.below)

  def output_size(self, size: Size, rng: np.random.Generator) -> Size:
    """Returns the same size."""
    del rng
    return size
