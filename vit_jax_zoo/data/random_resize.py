"""Resizing to a size drawn at random."""

import dataclasses

import numpy as np

from vit_jax_zoo.data import images
from vit_jax_zoo.data.transform_base import ImageTransform


@dataclasses.dataclass(frozen=True)
class RandomResizeSmall(ImageTransform):
  """Resizes `image`, with antialiasing, so that its shorter side is drawn from a range.

  With a random crop behind it, the augmentation of AlexNet, VGG and iGPT (section 3.1).

  Attributes:
    smallest: of the shorter sides, in pixels.
    largest: of the shorter sides.
  """

  name = "random_resize_small"

  smallest: int
  largest: int

  def __post_init__(self) -> None:
    if not 0 < self.smallest <= self.largest:
      raise ValueError(
        "random_resize_small: smallest must lie between 1 and largest, got "
        f"{self.smallest} and {self.largest}"
      )

  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the resized image; the longer side is rounded."""
    scale = rng.integers(self.smallest, self.largest, endpoint=True) / min(image.shape[:2])
    height, width = (round(side * scale) for side in image.shape[:2])
    return images.resize(image, height, width, "antialias")
