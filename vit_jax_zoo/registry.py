"""Models by name. A family's module is imported when one of its names is asked for."""

import fnmatch
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from flax import linen as nn

from vit_jax_zoo.errors import check_names, field_names, unknown_name

FAMILIES = {
  "vit": ("vit_jax_zoo.systems.vit.model", "VisionTransformer"),
  "lambda_resnet": ("vit_jax_zoo.systems.lambda_resnet.model", "LambdaResNet"),
  "igpt": ("vit_jax_zoo.systems.igpt.model", "ImageGPT"),
  "detr": ("vit_jax_zoo.systems.detr.model", "Detr"),
  "ttsr": ("vit_jax_zoo.systems.ttsr.model", "TTSR"),
  "faster_rcnn": ("vit_jax_zoo.systems.rcnn.model", "RCNN"),
  "mask_rcnn": ("vit_jax_zoo.systems.rcnn.model", "RCNN"),
  "fpt_segmentation": ("vit_jax_zoo.systems.fpt.segmentation", "PyramidSegmenter"),
  "fpt_pyramid": ("vit_jax_zoo.systems.fpt.segmentation", "FeaturePyramidTransformer"),
}
"""Prefix of the names, module, class. The module holds `VARIANTS` and `SHARDING_RULES`; families
may share one, each with the names that begin with its own."""

PARTS = ("fpt_pyramid",)
"""Families that are a part of other models: they are called with something else than images."""


def create_model(name: str, **overrides: Any) -> nn.Module:
  """Returns the Linen module of this name, its parameters not yet made.

  Args:
    name: one of `list_models()`, such as "vit_b16".
    **overrides: fields of the model's class, over those of the variant.

  Raises:
    ValueError: the name or a field is unknown; the message has the nearest known one.
  """
  family = _family(name)
  kind = model_class(family)
  check_names(f"field of {name}", overrides, [*field_names(kind), "name"])
  return kind(**{**variants(family)[name], **overrides})


def model_class(family: str) -> type[nn.Module]:
  """Returns the class of a family's models; `family` is a key of `FAMILIES`."""
  module, class_name = _load(family)
  return getattr(module, class_name)


def family_of(model: nn.Module) -> str:
  """Returns the family that a model belongs to.

  Raises:
    ValueError: its class is in no family.
  """
  for family, (_, class_name) in FAMILIES.items():
    if type(model).__name__ == class_name and model_class(family) is type(model):
      return family
  raise ValueError(f"{type(model).__name__} is not the class of any model in this zoo")


def list_models(pattern: str = "*") -> list[str]:
  """Returns the model names that match a shell pattern such as "vit_*", sorted."""
  return sorted(fnmatch.filter((name for f in FAMILIES for name in variants(f)), pattern))


def variants(family: str) -> Mapping[str, Mapping[str, Any]]:
  """Returns the fields of each variant of a family, by model name."""
  every = _load(family)[0].VARIANTS
  return {name: fields for name, fields in every.items() if name.startswith(family)}


def sharding_rules(name: str) -> tuple[tuple[str, Any], ...]:
  """Returns the parameter sharding rules of the family that has this model."""
  return _load(_family(name))[0].SHARDING_RULES


def _load(family: str) -> tuple[ModuleType, str]:
  path, class_name = FAMILIES[family]
  return import_module(path), class_name


def _family(name: str) -> str:
  for family in FAMILIES:
    if name.startswith(family) and name in variants(family):
      return family
  raise ValueError(unknown_name("model", name, list_models()))
