"""Random erasing: rectangles of an image are blotted out, so that no single part decides.

Zhong, Zheng, Kang, Li, Yang, "Random Erasing Data Augmentation", arXiv:1708.04896
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from vit_jax_zoo.data.transform_base import ImageTransform
from vit_jax_zoo.ops.names import unknown_name

MODES = ("const", "rand", "pixel")

_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class RandomErasing(ImageTransform):
  """Erases random rectangles of `image`, with timm's fields, defaults and way of drawing.

  timm erases after normalisation, with zeros or normal noise; here pixels are still in [0, 255], so
  that is the data's mean, or its mean and so many of its standard deviations, clipped (and rounded,
  in a uint8 image).

  Attributes:
    probability: that an image loses anything.
    area: smallest and largest share of the image that all rectangles together take.
    aspect_ratio: smallest and largest height/width, drawn on a logarithmic scale.
    mode: "const": the mean; "rand": one random colour a rectangle; "pixel": one a pixel.
    max_count: an image loses 1 to so many rectangles.
    image_mean: as the task has it, in [0, 1]; one for all channels or one for each.
    image_std: as `image_mean`.
  """

  name = "random_erasing"

  probability: float | int = 0.5
  area: Sequence[float | int] = (0.02, 1 / 3)
  aspect_ratio: Sequence[float | int] = (0.3, 1 / 0.3)
  mode: str = "const"
  max_count: int = 1
  image_mean: float | int | Sequence[float | int] = 0.5
  image_std: float | int | Sequence[float | int] = 0.5

  def __post_init__(self) -> None:
    if self.mode not in MODES:
      raise ValueError(unknown_name("random_erasing mode", self.mode, MODES))
    if not 0 <= self.probability <= 1 or self.max_count < 1:
      raise ValueError(
        "random_erasing needs a probability in [0, 1] and a max_count of at least 1, not "
        f"{self.probability} and {self.max_count}"
      )
    for field, value, upper in (
      ("area", self.area, 1.0), ("aspect_ratio", self.aspect_ratio, math.inf),
    ):  # fmt: skip
      if not (len(value) == 2 and 0 < value[0] <= value[1] <= upper):
        raise ValueError(f"random_erasing: {field} must be (smallest, largest), got {value}")

  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the image, erased or as it was; type and range stay."""
    if rng.random() >= self.probability:
      return image
    image = image.copy()
    count = int(rng.integers(1, self.max_count, endpoint=True))
    for _ in range(count):
      box = self._box(image.shape[:2], count, rng)
      if box is not None:
        top, left, height, width = box
        part = image[top : top + height, left : left + width]
        part[:] = self._fill(part.shape, image.dtype, rng)
    return image

  def _box(
    self, size: tuple[int, int], count: int, rng: np.random.Generator
  ) -> tuple[int, int, int, int] | None:
    """Draws (top, left, height, width); None when ten attempts found no box that fits."""
    for _ in range(_ATTEMPTS):
      area = rng.uniform(self.area[0], self.area[1]) * size[0] * size[1] / count
      ratio = math.exp(rng.uniform(math.log(self.aspect_ratio[0]), math.log(self.aspect_ratio[1])))
      height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
      if height < size[0] and width < size[1]:
        top = int(rng.integers(size[0] - height, endpoint=True))
        return top, int(rng.integers(size[1] - width, endpoint=True)), height, width
    return None

  def _fill(self, shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Returns values for a rectangle, or one colour for all of it."""
    noise = np.zeros(shape[-1])
    if self.mode != "const":
      noise = rng.standard_normal(shape if self.mode == "pixel" else shape[-1])
    values = np.clip(
      255 * (np.asarray(self.image_mean) + np.asarray(self.image_std) * noise), 0, 255
    )
    return (np.rint(values) if dtype == np.uint8 else values).astype(dtype)
