"""Random sizes and crops for detection: arXiv:2005.12872, section 4, as its code has them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vit_jax_zoo.data.geometry import GeometricTransform, Scale, Size, Step, Window

SHORTER_SIDES = tuple(range(480, 801, 32))
CROP_FROM = (400, 500, 600)
CROP_SIDES = (384, 600)


def scaled_size(size: Size, shorter: int, longest: int | None = None) -> Size:
  """Returns the size with another shorter side, smaller where the longer one would be too long.

  With DETR's rounding: where `longest` counts, the shorter side is rounded first, and the longer
  one follows from it, so that it may miss `longest` by a few pixels.
  """
  short, long = min(size), max(size)
  if longest is not None and long / short * shorter > longest:
    shorter = round(longest * short / long)
  if short == shorter:
    return size
  other = int(shorter * long / short)
  return (shorter, other) if size[0] <= size[1] else (other, shorter)


@dataclasses.dataclass(frozen=True)
class ResizeShorter(GeometricTransform):
  """Resizes `image`, and what is marked in it, to a given shorter side; keeps the aspect ratio.

  Attributes:
    shorter: the shorter side in pixels, or several of which one is drawn.
    longest: the longer side is no longer than that, or None.
  """

  name = "resize_shorter"

  shorter: int | Sequence[int] = 800
  longest: int | None = 1333

  def plan(self, size: Size, rng: np.random.Generator) -> Sequence[Step]:
    """Returns a scale."""
    return (_drawn_scale(size, self.shorter, self.longest, rng),)


@dataclasses.dataclass(frozen=True)
class RandomScaleCrop(GeometricTransform):
  """Draws a size for `image` and its marks; or first crops it, as often as not, at another size.

  Attributes:
    shorter: the shorter sides that the result may have.
    longest: its longer side is no longer than that, or None.
    crop_probability: how often it is cropped.
    crop_from: the shorter sides that the image may have when it is cropped.
    crop_sides: smallest and largest height and width of the crop; the largest is bounded by the
      image.
  """

  name = "random_scale_crop"

  shorter: Sequence[int] = SHORTER_SIDES
  longest: int | None = 1333
  crop_probability: float = 0.5
  crop_from: Sequence[int] = CROP_FROM
  crop_sides: Sequence[int] = CROP_SIDES

  def __post_init__(self) -> None:
    if not 0 <= self.crop_probability <= 1:
      raise ValueError(
        f"random_scale_crop: crop_probability must lie in [0, 1], got {self.crop_probability}"
      )

  def plan(self, size: Size, rng: np.random.Generator) -> Sequence[Step]:
    """Returns a scale; or a scale, a window and a scale."""
    steps: list[Step] = []
    if rng.random() < self.crop_probability:
      scale = _drawn_scale(size, self.crop_from, None, rng)
      low, high = self.crop_sides
      height, width = (
        int(rng.integers(min(low, side), min(high, side), endpoint=True)) for side in scale
      )
      top = int(rng.integers(scale.height - height, endpoint=True))
      left = int(rng.integers(scale.width - width, endpoint=True))
      steps += [scale, Window(top, left, height, width)]
      size = height, width
    return [*steps, _drawn_scale(size, self.shorter, self.longest, rng)]


def _drawn_scale(
  size: Size, shorter: int | Sequence[int], longest: int | None, rng: np.random.Generator
) -> Scale:
  choices = np.atleast_1d(shorter)
  return Scale(*scaled_size(size, int(choices[rng.integers(len(choices))]), longest))
