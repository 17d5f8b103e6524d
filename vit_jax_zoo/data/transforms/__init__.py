"""Transforms of one example, between the source and the batch.

A transform is a frozen dataclass, called as `transform(example, rng)`; it returns a new example and
leaves the old one unchanged. `image` may still be encoded: the first transform that needs pixels
decodes it, so that a crop can decode at its own scale. Pixels are RGB in [0, 255] and stay uint8
unless a transform is configured for float32; the task normalises on the device.

Mixup and CutMix, which mix examples, are part of the jitted step: a host has only its own rows of
the batch.
"""

import abc
import dataclasses
import math
import re
from typing import Any, ClassVar

import numpy as np

from vit_jax_zoo.data import images
from vit_jax_zoo.data.sources.base import Example, Source
from vit_jax_zoo.errors import check_fields
from vit_jax_zoo.registry import Registry


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
  """A transform that changes only `image`."""

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
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


_NAMES = {
  "image": "decode random_resized_crop random_resize_small random_translate random_crop "
  "central_crop resize resize_small one_hot multi_hot keep_prefix",
  "augment": "rand_augment timm_rand_augment random_erasing",
  "detection": "load_objects keep_classes random_flip resize_shorter random_scale_crop pad_objects",
  "segmentation": "load_label_map random_scale random_window pad_label_map",
  "super_resolution": "super_resolution_pair random_pair_crop random_pair_turn pad_pair",
}
TRANSFORMS = Registry(
  "transform",
  {
    name: f"{__name__}.{module}:{name.title().replace('_', '')}"
    for module, names in _NAMES.items()
    for name in names.split()
  },
)
"""The transforms that a config can name, by module; `random_crop` is the class RandomCrop."""


_MAX_SIDE = math.isqrt(images.MAX_PIXELS)
_POSITIVE = ("shorter", "longest", "height", "width", "num")


def build_transforms(specs: Any) -> tuple[Transform, ...]:
  """Builds the transforms of a config from the `name` and fields of each, in order.

  >>> build_transforms([dict(name="random_crop", size=32)])
  (RandomCrop(size=32),)
  """
  try:
    fields = [dict(spec) for spec in specs]
  except (TypeError, ValueError):
    raise ValueError(f"transforms: {specs!r}; expected dicts, each with a name") from None
  return tuple(map(_build, fields))


def _build(spec: dict[str, Any]) -> Transform:
  name = str(spec.pop("name", None))
  kind = TRANSFORMS[name]
  check_fields(f"transform {name!r}", kind, spec)
  for field in dataclasses.fields(kind):
    if field.name not in spec and field.default is dataclasses.MISSING:
      raise ValueError(f"transform {name!r} needs the field {field.name!r}")
    value, expected = spec.get(field.name), ""
    sides, is_size = np.ravel(1 if value is None else value), field.name.endswith("size")
    if is_size and not (1 <= len(sides) <= 2 and min(sides) > 0 and max(sides) <= _MAX_SIDE):
      expected = f"one or two, from 1 to {_MAX_SIDE}"
    elif field.name in _POSITIVE and not (len(sides) and min(sides) > 0):
      expected = "numbers above 0"
    elif field.name.endswith("probability") and not 0 <= sides[0] <= 1:
      expected = "a number in [0, 1]"
    if expected:
      raise ValueError(f"transform {name!r}: {field.name} is {value!r}; expected {expected}")
  return kind(**spec)
