"""How much of an image a generative model is given."""

import dataclasses

import numpy as np

from vit_jax_zoo.data.sources.base import Example
from vit_jax_zoo.data.transforms.base import Transform, pixels


@dataclasses.dataclass(frozen=True)
class KeepPrefix(Transform):
  """Adds `prefix_length`, int32: so many pixels in raster order are given, the rest is to be drawn.

  `image` is decoded and stays whole, so that the truth can be shown beside.

  Attributes:
    share: of the image's rows that are given, rounded to whole rows; 0.5 is the upper half.
  """

  name = "keep_prefix"

  share: float = 0.5

  def __post_init__(self) -> None:
    if not 0 <= self.share <= 1:
      raise ValueError(f"keep_prefix: share must lie in [0, 1], got {self.share}")

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example with `prefix_length`."""
    del rng
    image = pixels(example["image"])
    height, width = image.shape[:2]
    return {**example, "image": image, "prefix_length": round(self.share * height) * width}
