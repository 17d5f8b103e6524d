"""Base classes of transforms."""

import abc
import dataclasses
import re
from typing import Any, ClassVar

import numpy as np

from vit_jax_zoo.data import images
from vit_jax_zoo.data.sources.base import Example, Source


@dataclasses.dataclass(frozen=True)
class Transform(abc.ABC):
  """Base of all transforms."""

  name: ClassVar[str]  # in configs: the class's name in snake case
  is_target: ClassVar[bool] = False  # prepares labels, boxes or label maps: inference leaves it out

  def __init_subclass__(cls) -> None:
    cls.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

  @abc.abstractmethod
  def __call__(self, example: Example, rng: np.random.Generator, /) -> Example:
    """Returns a new example."""

  def check(self, field: str, ok: Any, expected: str) -> None:
    """Raises ValueError with a field's value unless it is `ok`."""
    if not ok:
      raise ValueError(f"{self.name}: {field} is {getattr(self, field)}; expected {expected}")

  def check_limits(self, field: str, upper: float) -> None:
    """Raises ValueError unless a field is (smallest, largest), above 0 and up to `upper`."""
    value = getattr(self, field)
    ok = len(value) == 2 and 0 < value[0] <= value[1] <= upper
    self.check(field, ok, f"(smallest, largest) in (0, {upper}]")

  def for_source(self, source: Source) -> "Transform":
    """Returns the transform with the fields that follow from a source's data."""
    del source
    return self

  def output_size(self, size: tuple[int, int], rng: np.random.Generator, /) -> tuple[int, int]:
    """Returns height and width of the result for an image of `size`; draws as a call does."""
    del rng
    if self.is_target:
      return size
    raise ValueError(
      f"transform {self.name!r}: the size of its result is not known in advance, which "
      "data.loader.buckets requires; use resize_shorter, random_scale or random_window"
    )


class TargetTransform(Transform):
  """A transform of labels, boxes or label maps, which keeps the image's size."""

  is_target = True


class ImageTransform(Transform):
  """A transform that changes `image` alone."""

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example with another `image`."""
    return {**example, "image": self.apply(pixels(example["image"]), rng)}

  @abc.abstractmethod
  def apply(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
    """Returns the new image."""


def pixels(image: Any) -> np.ndarray:
  """Returns uint8 or float32 [h w 3]; decodes bytes (or CorruptExampleError), repeats gray."""
  if isinstance(image, bytes):
    return images.decode_image(image)
  if image.ndim == 2:
    image = image[..., None]
  return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
