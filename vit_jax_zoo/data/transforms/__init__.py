"""Transforms of one example, between the source and the batch.

A transform is a frozen dataclass, called as `transform(example, rng)`; it returns a new example and
leaves the old one unchanged. `image` may still be encoded when it arrives: the first transform that
needs pixels decodes it, so that a crop can decode at the scale it needs. Pixels are RGB in [0, 255]
and stay uint8 unless a transform is configured for float32; the task normalises on the device.

Mixup and CutMix, which mix examples, are part of the jitted step: a host has only its own rows of
the batch.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from absl import logging

from vit_jax_zoo.data.transforms import augment, detection, image, segmentation, super_resolution
from vit_jax_zoo.data.transforms.base import Transform
from vit_jax_zoo.errors import check_names, unknown_name

TRANSFORMS: dict[str, type[Transform]] = {
  transform.name: transform
  for transform in (
    image.Decode,
    image.RandomResizedCrop,
    image.RandomResizeSmall,
    image.RandomTranslate,
    image.RandomCrop,
    image.CentralCrop,
    image.Resize,
    image.ResizeSmall,
    image.OneHot,
    image.MultiHot,
    image.KeepPrefix,
    augment.RandAugment,
    augment.TimmRandAugment,
    augment.RandomErasing,
    detection.LoadObjects,
    detection.KeepClasses,
    detection.RandomFlip,
    detection.ResizeShorter,
    detection.RandomScaleCrop,
    detection.PadObjects,
    segmentation.LoadLabelMap,
    segmentation.RandomScale,
    segmentation.RandomWindow,
    segmentation.PadLabelMap,
    super_resolution.SuperResolutionPair,
    super_resolution.RandomPairCrop,
    super_resolution.RandomPairTurn,
    super_resolution.PadPair,
  )
}
"""The transforms that a config can name."""


def build_transforms(specs: Iterable[Mapping[str, Any]]) -> tuple[Transform, ...]:
  """Builds the transforms of a config.

  Args:
    specs: `name` and fields of each transform, in order.

  Raises:
    ValueError: an unknown name or field, or a missing one.

  >>> build_transforms([dict(name="random_crop", size=32)])
  (RandomCrop(size=32),)
  """
  return tuple(_build(dict(spec)) for spec in specs)


_RETIRED = {"upright"}
"""Fields in the configs of old runs."""


def _build(spec: dict[str, Any]) -> Transform:
  name = spec.pop("name", None)
  if name not in TRANSFORMS:
    raise ValueError(unknown_name("transform", str(name), TRANSFORMS))
  for field in _RETIRED & spec.keys():
    logging.info("transform %r: the field %r is gone: images are always upright", name, field)
    del spec[field]
  fields = dataclasses.fields(TRANSFORMS[name])
  check_names(f"field of transform {name!r}", spec, [field.name for field in fields])
  for field in fields:
    if field.name not in spec and field.default is dataclasses.MISSING:
      raise ValueError(f"transform {name!r} needs the field {field.name!r}")
  return TRANSFORMS[name](**spec)
