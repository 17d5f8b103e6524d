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

from vit_jax_zoo.data.transforms.base import Transform
from vit_jax_zoo.errors import check_names
from vit_jax_zoo.registry import Registry

_HERE = "vit_jax_zoo.data.transforms"
TRANSFORMS = Registry(
  "transform",
  {
    "decode": f"{_HERE}.image:Decode",
    "random_resized_crop": f"{_HERE}.image:RandomResizedCrop",
    "random_resize_small": f"{_HERE}.image:RandomResizeSmall",
    "random_translate": f"{_HERE}.image:RandomTranslate",
    "random_crop": f"{_HERE}.image:RandomCrop",
    "central_crop": f"{_HERE}.image:CentralCrop",
    "resize": f"{_HERE}.image:Resize",
    "resize_small": f"{_HERE}.image:ResizeSmall",
    "one_hot": f"{_HERE}.image:OneHot",
    "multi_hot": f"{_HERE}.image:MultiHot",
    "keep_prefix": f"{_HERE}.image:KeepPrefix",
    "rand_augment": f"{_HERE}.augment:RandAugment",
    "timm_rand_augment": f"{_HERE}.augment:TimmRandAugment",
    "random_erasing": f"{_HERE}.augment:RandomErasing",
    "load_objects": f"{_HERE}.detection:LoadObjects",
    "keep_classes": f"{_HERE}.detection:KeepClasses",
    "random_flip": f"{_HERE}.detection:RandomFlip",
    "resize_shorter": f"{_HERE}.detection:ResizeShorter",
    "random_scale_crop": f"{_HERE}.detection:RandomScaleCrop",
    "pad_objects": f"{_HERE}.detection:PadObjects",
    "load_label_map": f"{_HERE}.segmentation:LoadLabelMap",
    "random_scale": f"{_HERE}.segmentation:RandomScale",
    "random_window": f"{_HERE}.segmentation:RandomWindow",
    "pad_label_map": f"{_HERE}.segmentation:PadLabelMap",
    "super_resolution_pair": f"{_HERE}.super_resolution:SuperResolutionPair",
    "random_pair_crop": f"{_HERE}.super_resolution:RandomPairCrop",
    "random_pair_turn": f"{_HERE}.super_resolution:RandomPairTurn",
    "pad_pair": f"{_HERE}.super_resolution:PadPair",
  },
)
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
  name = str(spec.pop("name", None))
  kind = TRANSFORMS[name]
  for field in _RETIRED & spec.keys():
    logging.info("transform %r: the field %r is gone: images are always upright", name, field)
    del spec[field]
  fields = dataclasses.fields(kind)
  check_names(f"field of transform {name!r}", spec, [field.name for field in fields])
  for field in fields:
    if field.name not in spec and field.default is dataclasses.MISSING:
      raise ValueError(f"transform {name!r} needs the field {field.name!r}")
  return kind(**spec)
