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

_RETIRED = {"upright"}  # fields in the configs of old runs


def build_transforms(specs: Iterable[Mapping[str, Any]]) -> tuple[Transform, ...]:
  """Builds the transforms of a config from the `name` and fields of each, in order.

  >>> build_transforms([dict(name="random_crop", size=32)])
  (RandomCrop(size=32),)
  """
  return tuple(_build(dict(spec)) for spec in specs)


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
