"""Shared by all configs: parses `variant,field=value` behind `--config=configs/vit.py:`.

    --config=configs/vit.py                                  the demo
    --config=configs/vit.py:b16_imagenet21k                  a variant
    --config=configs/vit.py:b16_imagenet21k,image_size=384   a variant with another field

A variant is a function; its keyword arguments are the fields that can be set, and their defaults
determine the types. All other config fields are set by flags:
`--config.optimizer.learning_rate=3e-4`, `--config.init_from`, `--config.sharding.mesh.fsdp`.

The recipe's batch size and learning rate are in `config.recipe`: a much smaller batch triggers a
warning with the scaled learning rate (`training/lr_scaling.py`).
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vit_jax_zoo.errors import unknown_name
from vit_jax_zoo.registry import model_name as model_name
from vit_jax_zoo.training.lr_scaling import SINGLE
from vit_jax_zoo.training.lr_scaling import scaled_rate as scaled_rate

Variants: TypeAlias = Mapping[str, Callable[..., ConfigDict]]


def build(
  arg: str | None, variants: Variants, renamed: Mapping[str, str] | None = None
) -> ConfigDict:
  """Returns the config of an argument, with `recipe` filled in from the variant's defaults.

  Args:
    arg: `variant,field=value,...`; by default the first variant.
    variants: by name.
    renamed: old names of variants -> new names, with the file if it has changed; old ones are
      errors.

  Raises:
    ValueError: the variant, a field or a value is unknown or invalid.
  """
  old = (arg or "").partition(",")[0].strip()
  if renamed and old in renamed:
    raise ValueError(f"variant {old!r} is now {renamed[old]!r}")
  variant, texts = parse_arg(arg, variants)
  defaults = {p.name: p.default for p in inspect.signature(variants[variant]).parameters.values()}
  fields = {}
  for name, text in texts.items():
    if name not in defaults:
      raise ValueError(unknown_name(f"field of {variant}", name, defaults))
    fields[name] = _parse_value(f"{variant},{name}", text, defaults[name])
  config = variants[variant](**fields)
  if "recipe" not in config:
    optimizer = config.get("optimizer") or {}
    groups = {SINGLE: optimizer} if "name" in optimizer else optimizer
    config.recipe = {
      "batch_size": defaults.get("batch_size", config.get("batch_size")),
      "learning_rates": {group: section["learning_rate"] for group, section in groups.items()},
    }
  return config


def variant_of(base: Callable[..., ConfigDict], **changes: Any) -> Callable[..., ConfigDict]:
  """Returns a recipe that differs from another one in some values.

    variant_of(jft, size="l16", num_epochs=14, optimizer={"learning_rate": 4e-4})

  Args:
    base: the other recipe.
    **changes: arguments of `base`, such as `size` and `num_epochs`, and fields of its config, which
      are merged by section. Arguments without a default (`size`) cannot be set behind `--config=`.
  """
  parameters = inspect.signature(base).parameters
  arguments = {name: value for name, value in changes.items() if name in parameters}
  fields = {name: value for name, value in changes.items() if name not in parameters}

  @functools.wraps(base)
  def variant(**given: Any) -> ConfigDict:
    config = base(**(arguments | given))
    config.update(fields)
    return config

  kept = [p for p in parameters.values() if p.default is not p.empty]
  kept = [p.replace(default=arguments.get(p.name, p.default)) for p in kept]
  variant.__dict__["__signature__"] = inspect.Signature(kept)
  return variant


def task(name: str, **fields: Any) -> dict[str, Any]:
  """Returns a task whose number of classes and class names are read from the data."""
  classes = {"num_classes": placeholder(int), "class_names": placeholder(tuple)}
  return {"name": name, **classes, **fields}


def recipe(batch_size: int, learning_rate: float) -> dict[str, Any]:
  """Returns the section `recipe`: the published learning rate and its global batch size.

  Needed only where the learning rate is an argument or depends on the batch size; see `build`.
  """
  return {"batch_size": batch_size, "learning_rates": {SINGLE: learning_rate}}


def parse_arg(arg: str | None, variants: Variants) -> tuple[str, dict[str, str]]:
  """Splits `variant,field=value,...`; the default is the first variant.

  >>> parse_arg("b16,image_size=384,source=folder:a,b", {"demo": ConfigDict, "b16": ConfigDict})
  ('b16', {'image_size': '384', 'source': 'folder:a,b'})
  """
  parts = [part for part in (arg or "").split(",") if part.strip()]
  first = next(iter(variants))
  variant = parts.pop(0).strip() if parts and "=" not in parts[0] else first
  if variant not in variants:
    raise ValueError(unknown_name("variant", variant, variants))
  fields: dict[str, str] = {}
  for part in parts:
    name, equals, text = part.strip().partition("=")
    if not equals and fields:  # a comma inside a value, such as a path
      fields[next(reversed(fields))] += f",{part}"
      continue
    if not equals:
      raise ValueError(f"{arg!r}: {part!r} is no field; expected variant,field=value,field=value")
    if name in fields:
      raise ValueError(f"{name}: set twice in {arg!r}; expected once")
    fields[name] = text
  return variant, fields


def with_data_dir(config: ConfigDict, data_dir: str) -> ConfigDict:
  """Sets the TFDS data folder of all datasets of a config, and returns the config.

  Args:
    config: with `data.train` and `data.eval`.
    data_dir: local or `gs://bucket/...`; "" keeps TFDS's default folder, or that of a flag such as
      `--config.data.train.data_dir`.

  Raises:
    ValueError: `data_dir` is set, but no dataset is TFDS's.
  """
  specs = (config.data.train, *config.data.eval.values())
  prepared = [spec for spec in specs if spec.source.startswith("tfds:")]
  if data_dir and not prepared:
    raise ValueError(
      f"data_dir={data_dir!r}: the source {specs[0].source!r} has no data_dir; expected a source "
      "that begins with tfds:. Leave data_dir out"
    )
  for spec in prepared:
    spec.data_dir = data_dir or placeholder(str)
  return config


def _parse_value(where: str, text: str, default: Any) -> Any:
  """Reads a value as the type of the field's default."""
  if isinstance(default, bool):
    if text.lower() not in ("true", "false"):
      raise ValueError(f"{where}={text!r}: expected true or false")
    return text.lower() == "true"
  kind = type(default)
  try:
    return kind(text)
  except ValueError:
    message = f"{where}={text!r}: expected {_KINDS[kind]}, such as {default}"
    raise ValueError(message) from None


_KINDS = {int: "a whole number", float: "a number"}
