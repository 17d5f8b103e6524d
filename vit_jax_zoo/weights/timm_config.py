"""Reads and writes the `config.json` beside timm's weights: preprocessing and class names."""

import math
from collections.abc import Mapping
from typing import Any

from absl import logging

from vit_jax_zoo.weights.checkpoint import Export
from vit_jax_zoo.weights.hf_config import write_folder
from vit_jax_zoo.weights.key_map import Flat, WeightsError
from vit_jax_zoo.weights.preprocess import PILLOW_FILTERS, Preprocess
from vit_jax_zoo.weights.readers import Published

_FITS = {"center": "crop", "squash": "squash"}


def read(published: Published, default: Preprocess) -> dict[str, Any]:
  """Returns the fields `preprocess`, `image_size` and `task_fields` of a `Checkpoint`.

  `image_size` is None if the file does not state it.
  """
  config = published.config
  for key in ("pretrained_cfg", "model_args"):
    if not isinstance(config.get(key) or {}, Mapping):
      raise WeightsError(f"{published.path}: config.json: {key} is not an object")
  given = config.get("pretrained_cfg") or config  # older files have its fields at the top
  stated = _numbers(published, given, "input_size", 3)
  interpolation, mode = given.get("interpolation", "bicubic"), given.get("crop_mode", "center")
  if interpolation not in PILLOW_FILTERS or mode not in _FITS:
    logging.warning(
      "%s: interpolation %r or crop_mode %r is not supported; bicubic interpolation and a central "
      "crop replace what is not", published.path, interpolation, mode,
    )  # fmt: skip
  preprocess = Preprocess(
    default.image_size if stated is None else (int(stated[1]), int(stated[2])),
    mean=_numbers(published, given, "mean", 1, 3) or default.mean,
    std=_numbers(published, given, "std", 1, 3) or default.std,
    fit=_FITS.get(mode, "crop"),
    interpolation=interpolation if interpolation in PILLOW_FILTERS else "bicubic",
    crop_pct=(_numbers(published, given, "crop_pct", 1) or (default.crop_pct,))[0],
  )
  names = config.get("label_names") or given.get("label_names") or config.get("labels") or ()
  return {
    "preprocess": preprocess,
    "image_size": None if stated is None else preprocess.image_size,
    "task_fields": {"class_names": tuple(map(str, names))} if names else {},
  }


def _numbers(
  published: Published, given: Mapping[str, Any], field: str, *counts: int
) -> tuple[float, ...] | None:
  value, lowest = given.get(field), -math.inf if field == "mean" else 0
  found = value if isinstance(value, list) else [value]
  is_known = len(found) in counts and all(type(x) in (int, float) for x in found)
  if value is not None and not (is_known and all(lowest < x < math.inf for x in found)):
    expected = f"{' or '.join(map(str, counts))} numbers above {lowest}"
    raise WeightsError(f"{published.path}: config.json: {field} is {value!r}; expected {expected}")
  return None if value is None else tuple(map(float, found))


def write(path: str, arrays: Flat, export: Export, base: tuple[str, Any], arguments: Any) -> None:
  """Writes a folder with `model.safetensors`, arrays by timm's keys, and `config.json`.

  `base` is timm's name of the model that `arguments` turn into this one, and the sizes that differ.
  """
  architecture, other_sizes = base
  preprocess, names = export.preprocess, list(export.class_names)
  num_classes = export.fields()["num_classes"] or 0
  fit = {ours: theirs for theirs, ours in _FITS.items()}.get(preprocess.fit)
  is_known = preprocess.interpolation in PILLOW_FILTERS
  if fit is None or not is_known:
    logging.warning(
      "config.json: timm has no preprocessing with %s, %s; the nearest one is written",
      preprocess.fit, preprocess.interpolation,
    )  # fmt: skip
  others = ", ".join(f"{name} {value}" for name, value in other_sizes.items())
  config = {
    "architecture": architecture,
    "num_classes": num_classes,
    **({"label_names": names} if names else {}),
    "model_args": dict(arguments),
    "pretrained_cfg": {
      **({"description": f"{architecture} with {others}"} if others else {}),
      "input_size": [preprocess.channels, *preprocess.image_size],
      "mean": preprocess.means,
      "std": preprocess.stds,
      "interpolation": preprocess.interpolation if is_known else "bilinear",
      "crop_pct": preprocess.crop_pct,
      "crop_mode": fit or "center",
      "num_classes": num_classes,
      "fixed_input_size": False,
    },
  }
  write_folder(path, arrays, config=config)
