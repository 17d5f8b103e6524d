"""What every transform is: the two base classes, and the way from bytes to pixels."""

import abc
import dataclasses
from typing import Any, ClassVar

import numpy as np

from vit_jax_zoo.data import images
from vit_jax_zoo.data.sources.base import Example


@dataclasses.dataclass(frozen=True)
class Transform(abc.ABC):
  """The base of all transforms; `transforms.REGISTRY` knows them by `name`."""

  name: ClassVar[str]

  @abc.abstractmethod
  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns a new example."""

  def output_size(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    """Returns height and width of the result, from those of the image; draws what a call draws.

    Raises:
      ValueError: this transform does not know it beforehand.
    """
    del size, rng
    raise ValueError(
      f"{self.name} does not say beforehand how large its result is, so images of different sizes "
      "cannot be padded behind it; use transforms of data/scaling.py"
    )


class ImageTransform(Transform):
  """A transform that changes nothing but `image`."""

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example with another `image`."""
    return {**example, "image": self.apply(pixels(example["image"]), rng)}

  @abc.abstractmethod
  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the new image."""


def pixels(image: Any) -> np.ndarray:
  """Returns uint8 or float32 [h w 3], decoding what is still encoded.

  Raises:
    CorruptExampleError: it cannot be decoded.
  """
  if isinstance(image, bytes):
    return images.decode_image(image)
  if image.ndim == 2:
    image = image[..., None]
  return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
