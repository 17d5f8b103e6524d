"""Reads and writes the `config.json` beside timm's weights: preprocessing and class names.

timm publishes folders of it and `model.safetensors`, and
`timm.create_model("local-dir:<folder>", pretrained=True)` reads them.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath

from vit_jax_zoo.weights.checkpoint import Export, Size
from vit_jax_zoo.weights.key_map import Flat
from vit_jax_zoo.weights.preprocess import PILLOW_FILTERS, Preprocess
from vit_jax_zoo.weights.readers import Published
from vit_jax_zoo.weights.torch_layouts import write_safetensors

_FITS = {"center": "crop", "squash": "squash"}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Content of a `config.json`.

  Attributes:
    preprocess: preprocessing; missing fields have the family's defaults.
    stated_size: training image size, None if not stated.
    task_fields: `class_names`, if stated.
  """

  preprocess: Preprocess
  stated_size: Size | None
  task_fields: dict[str, Any]


def read(
  published: Published,
  *,
  size: Size,
  mean: float | tuple[float, ...],
  std: float | tuple[float, ...],
  crop_pct: float,
) -> Settings:
  """Returns the content of the file beside the weights, or defaults.

  Args:
    published: the weights.
    size: default image size.
    mean: default mean of pixels in [0, 1].
    std: default standard deviation.
    crop_pct: default of `Preprocess.crop_pct`.
  """
  config = published.config
  given = config.get("pretrained_cfg", {})
  stated = given.get("input_size")
  interpolation, mode = given.get("interpolation", "bicubic"), given.get("crop_mode", "center")
  if interpolation not in PILLOW_FILTERS or mode not in _FITS:
    logging.warning(
      "%s: interpolation %r or crop_mode %r is not supported; bicubic interpolation and a central "
      "crop replace what is not", published.path, interpolation, mode,
    )  # fmt: skip
  preprocess = Preprocess(
    size if stated is None else (int(stated[1]), int(stated[2])),
    mean=_numbers(given.get("mean"), mean),
    std=_numbers(given.get("std"), std),
    fit=_FITS.get(mode, "crop"),
    interpolation=interpolation if interpolation in PILLOW_FILTERS else "bicubic",
    crop_pct=float(given.get("crop_pct", crop_pct)),
  )
  names = config.get("label_names") or given.get("label_names") or ()
  return Settings(
    preprocess,
    stated_size=None if stated is None else preprocess.image_size,
    task_fields={"class_names": tuple(map(str, names))} if names else {},
  )


def _numbers(given: Any, default: float | tuple[float, ...]) -> float | tuple[float, ...]:
  return default if given is None else tuple(map(float, given))


def write(
  path: str, arrays: Flat, export: Export, architecture: str, arguments: Mapping[str, Any]
) -> None:
  """Writes a folder with `model.safetensors` and `config.json`.

  Args:
    path: folder to write.
    arrays: arrays by timm's keys.
    export: preprocessing and class names.
    architecture: name of timm's model.
    arguments: constructor arguments that differ from the architecture's.
  """
  folder = epath.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  write_safetensors(str(folder / "model.safetensors"), arrays)
  fields, names = export.fields(), list(export.class_names)
  config = {
    "architecture": architecture,
    "num_classes": fields["num_classes"] or 0,
    **({"label_names": names} if names else {}),
    "model_args": dict(arguments),
    "pretrained_cfg": _pretrained_cfg(export.preprocess, fields["num_classes"] or 0),
  }
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _pretrained_cfg(preprocess: Preprocess, num_classes: int) -> dict[str, Any]:
  fit = {ours: theirs for theirs, ours in _FITS.items()}.get(preprocess.fit)
  if fit is None or preprocess.interpolation not in PILLOW_FILTERS:
    logging.warning(
      "config.json: timm has no preprocessing with %s, %s; the nearest one is written",
      preprocess.fit, preprocess.interpolation,
    )  # fmt: skip
  known = preprocess.interpolation in PILLOW_FILTERS
  return {
    "input_size": [preprocess.channels, *preprocess.image_size],
    "mean": preprocess.means,
    "std": preprocess.stds,
    "interpolation": preprocess.interpolation if known else "bilinear",
    "crop_pct": preprocess.crop_pct,
    "crop_mode": fit or "center",
    "num_classes": num_classes,
    "fixed_input_size": False,
  }
