"""The `config.json` that stands beside timm's weights: how pictures are prepared, and class names.

A folder with it and `model.safetensors` is what timm puts on the hub, and what
`timm.create_model("local-dir:<folder>", pretrained=True)` reads.
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
  """What a `config.json` says.

  Attributes:
    preprocess: whatever it leaves open is the family's usual.
    stated_size: of the images that the weights were trained on, None if it does not say.
    task_fields: `class_names`, if it has them.
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
  """Returns what the file beside the weights says.

  Args:
    published: the weights.
    size: of images, where there is no file.
    mean: of pixels in [0, 1], where there is no file.
    std: as `mean`.
    crop_pct: as `mean`; see `Preprocess`.
  """
  config = published.config
  given = config.get("pretrained_cfg", {})
  stated = given.get("input_size")
  interpolation, mode = given.get("interpolation", "bicubic"), given.get("crop_mode", "center")
  if interpolation not in PILLOW_FILTERS or mode not in _FITS:
    logging.warning(
      "%s prepares pictures with interpolation %r and crop_mode %r; bicubic and a central crop "
      "stand in for what is not known here", published.path, interpolation, mode,
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
    path: of the folder.
    arrays: by timm's keys.
    export: for the preprocessing and the names of the classes.
    architecture: the name of timm's model.
    arguments: of its constructor, where they differ from the name's.
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
      "timm has no words for how pictures are prepared here (%s, %s); it is told the nearest",
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
