"""Hugging Face's JSON files beside the weights: how pictures are prepared, and names of classes."""

import re
from collections.abc import Mapping
from typing import Any

from absl import logging

from vit_jax_zoo.weights.checkpoint import Size
from vit_jax_zoo.weights.preprocess import PILLOW_FILTERS, Preprocess

_RESAMPLE = {int(code): name for name, code in PILLOW_FILTERS.items()}
"""`resample` is Pillow's number of a filter."""

_BILINEAR = int(PILLOW_FILTERS["bilinear"])


def read_preprocess(processor: Mapping[str, Any], size: Size) -> Preprocess:
  """Returns what a `preprocessor_config.json` of an image classifier says.

  Args:
    processor: its content, empty if there is none: then everything is transformers' default.
    size: height and width of the images that the model is for.
  """
  given, crop = processor.get("size"), processor.get("crop_size")
  has_crop = bool(processor.get("do_center_crop")) and crop is not None
  resized, keeps_ratio = _size(given, size)
  final = _size(crop, size)[0] if has_crop else resized
  name = _RESAMPLE.get(processor.get("resample", _BILINEAR), "bilinear")
  return Preprocess(
    final,
    mean=tuple(map(float, processor.get("image_mean", (0.5, 0.5, 0.5)))),
    std=tuple(map(float, processor.get("image_std", (0.5, 0.5, 0.5)))),
    fit="crop" if keeps_ratio else "squash",
    interpolation=name,
    crop_pct=final[0] / resized[0],
  )


def _size(given: Any, default: Size) -> tuple[Size, bool]:
  """Returns height and width, and whether they are those of the shorter side alone."""
  if isinstance(given, Mapping) and "height" in given:
    return (int(given["height"]), int(given["width"])), False
  if isinstance(given, Mapping) and "shortest_edge" in given:
    return (int(given["shortest_edge"]),) * 2, True
  if isinstance(given, int):
    return (given, given), False
  return default, False


def read_class_names(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the names of the classes in a `config.json`, as a field of the task; {} if none."""
  labels = {int(key): str(name) for key, name in (config.get("id2label") or {}).items()}
  names = tuple(labels[i] for i in sorted(labels))
  stands_for_none = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
  is_whole = sorted(labels) == list(range(len(labels)))
  return {} if stands_for_none or not is_whole else {"class_names": names}


def processor_of(preprocess: Preprocess, kind: str) -> dict[str, Any]:
  """Returns the `preprocessor_config.json` of an image processor that squashes pictures.

  Args:
    preprocess: what it is to do.
    kind: the processor's class.
  """
  code = {name: code for code, name in _RESAMPLE.items()}.get(preprocess.interpolation)
  if preprocess.fit != "squash" or preprocess.crop_pct != 1 or code is None:
    logging.warning(
      "Hugging Face's %s has no words for how pictures are prepared here (%s, %s); it is told to "
      "squash them", kind, preprocess.fit, preprocess.interpolation,
    )  # fmt: skip
  height, width = preprocess.image_size
  return {
    "image_processor_type": kind,
    "do_resize": True,
    "size": {"height": height, "width": width},
    "resample": _BILINEAR if code is None else code,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": preprocess.means,
    "image_std": preprocess.stds,
  }
