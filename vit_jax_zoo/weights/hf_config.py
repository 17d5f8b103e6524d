"""Hugging Face's JSON files beside weights: preprocessing and names of classes."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from vit_jax_zoo.weights.checkpoint import Size
from vit_jax_zoo.weights.key_map import Flat, WeightsError
from vit_jax_zoo.weights.preprocess import PILLOW_FILTERS, Preprocess, crop_fraction
from vit_jax_zoo.weights.readers import Published
from vit_jax_zoo.weights.torch_layouts import write_safetensors


def check_config(
  published: Published, supported: Mapping[str, Any], needed: Sequence[str] = ()
) -> None:
  """Raises WeightsError for no `config.json`, one without `needed` keys, or of an unknown model.

  `supported` has values by key or "section.key"; a key that is missing in the file passes.
  """
  path, config = published.path, published.config
  if not published.has_config:
    raise WeightsError(f"{path}: no config.json beside weights with Hugging Face's keys; add it")
  if missing := [key for key in needed if key not in config]:
    raise WeightsError(f"{path}/config.json: no {', '.join(missing)}; add the model's own file")
  for name, value in supported.items():
    section, _, key = name.rpartition(".")
    given = ((config.get(section) or {}) if section else config).get(key, value)
    if given != value:
      raise WeightsError(f"{path}/config.json: {name} is {given!r}; expected {value!r}")


def interpolation_of(processor: Mapping[str, Any], source: str = "preprocessor_config.json") -> str:
  """Returns the filter for `resample`, Pillow's number of it; bilinear by default."""
  names = {None: "bilinear", **{int(code): name for name, code in PILLOW_FILTERS.items()}}
  code = processor.get("resample")
  if code not in names:
    expected = sorted(map(int, PILLOW_FILTERS.values()))
    raise WeightsError(f"{source}: resample is {code!r}; expected one of {expected}")
  return names[code]


def mean_and_std(
  processor: Mapping[str, Any], default: tuple[Sequence[float], Sequence[float]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Returns mean and std for pixels in [0, 1]: transformers may skip either of its two steps."""
  factor = float(processor.get("rescale_factor", 1 / 255)) * 255
  factor = factor if processor.get("do_rescale", True) else 255.0
  mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
  if processor.get("do_normalize", True):
    mean, std = (
      processor.get(f"image_{k}") or d for k, d in zip(("mean", "std"), default, strict=True)
    )
  return tuple(m / factor for m in mean), tuple(s / factor for s in std)


def read_preprocess(processor: Mapping[str, Any], size: Size) -> Preprocess:
  """Returns the preprocessing of an image classifier's `preprocessor_config.json`.

  `processor` is its content, {} for transformers' defaults; `size` the default height and width.
  """
  given, crop = processor.get("size"), processor.get("crop_size")
  has_crop = bool(processor.get("do_center_crop")) and crop is not None
  resized, keeps_ratio = _size(given, size)
  final, do_resize = _size(crop, size)[0] if has_crop else resized, processor.get("do_resize", True)
  if has_crop and (not do_resize or max(final) > min(resized)):
    wrong = f"size {given} (do_resize {do_resize}) with crop_size {crop}"
    raise WeightsError(f"preprocessor_config.json: {wrong}; expected a resize to at least the crop")
  fit = "crop" if keeps_ratio else "squash"
  return Preprocess(
    final,
    *mean_and_std(processor, ((0.5, 0.5, 0.5),) * 2),
    fit=fit if do_resize else "none",
    interpolation=interpolation_of(processor),
    crop_pct=crop_fraction(final[0], resized[0]),
  )


def _size(given: Any, default: Size) -> tuple[Size, bool]:
  if isinstance(given, int):
    return (given, given), False
  if isinstance(given, Mapping) and "height" in given:
    return (int(given["height"]), int(given["width"])), False
  if isinstance(given, Mapping) and "shortest_edge" in given:
    return (int(given["shortest_edge"]),) * 2, True
  return default, False


def read_class_names(config: Mapping[str, Any], count: int = 0) -> dict[str, Any]:
  """Returns the names of a model's `count` classes in a `config.json`, as a field of the task.

  {} if there are none; classes without a name get their id as their name, with a warning.
  """
  labels = {int(key): str(name) for key, name in (config.get("id2label") or {}).items()}
  if all(re.fullmatch(r"LABEL_\d+", name) for name in labels.values()):
    return {}
  count = max(count, max(labels) + 1)
  missing = sorted(set(range(count)) - set(labels))
  if missing:
    logging.warning(
      "config.json: id2label lacks %d of %d classes (%s%s); their ids are shown",
      len(missing), count, ", ".join(map(str, missing[:5])), ", ..." * (len(missing) > 5),
    )  # fmt: skip
  return {"class_names": tuple(labels.get(i, str(i)) for i in range(count))}


def label_fields(class_names: Sequence[str], count: int) -> dict[str, Any]:
  """Returns the names of `count` classes in a `config.json`; without any they are LABEL_<i>.

  Classes without a name beside others get their id, with a warning.
  """
  if 0 < len(class_names) < count:
    text = "class_names: %d names of %d classes; the others are written as their ids"
    logging.warning(text, len(class_names), count)
  other = "" if class_names else "LABEL_"
  names = [*class_names, *(f"{other}{i}" for i in range(len(class_names), count))]
  ids = {name: i for i, name in enumerate(names)}
  return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": ids}


def write_folder(path: str, arrays: Flat, **contents: Mapping[str, Any]) -> None:
  """Writes `model.safetensors` and a JSON file for each of `contents`."""
  folder = epath.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  write_safetensors(str(folder / "model.safetensors"), arrays)
  for name, content in contents.items():
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def processor_of(
  preprocess: Preprocess, kind: str, *, fits: Iterable[str] = ("none", "squash")
) -> dict[str, Any]:
  """Returns the `preprocessor_config.json` of an image processor class with these fits."""
  known = preprocess.interpolation in PILLOW_FILTERS
  if preprocess.fit not in fits or preprocess.crop_pct != 1 or not known:
    logging.warning(
      "preprocessor_config.json: %s has no fit=%s, interpolation=%s; written as squash, bilinear",
      kind, preprocess.fit, preprocess.interpolation,
    )  # fmt: skip
  height, width = preprocess.image_size
  return {
    "image_processor_type": kind,
    "do_resize": preprocess.fit != "none",
    "size": {"height": height, "width": width},
    "resample": int(PILLOW_FILTERS.get(preprocess.interpolation, PILLOW_FILTERS["bilinear"])),
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": preprocess.means,
    "image_std": preprocess.stds,
  }
