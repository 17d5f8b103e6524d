"""JSON files of transformers and timm beside weights: preprocessing and names of classes."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from vit_jax_zoo.data.images import MAX_PIXELS
from vit_jax_zoo.weights.checkpoint import Pretrained, Size
from vit_jax_zoo.weights.key_map import Flat, WeightsError
from vit_jax_zoo.weights.preprocess import PILLOW_FILTERS, Preprocess, crop_fraction
from vit_jax_zoo.weights.readers import Published, write_safetensors


def check_config(
  published: Published, supported: Mapping[str, Any], needed: Sequence[str] = ()
) -> None:
  """Raises WeightsError without `config.json` or one of its `needed` keys, or for another model.

  `supported` are values by key or "section.key"; missing keys pass.
  """
  path, config = published.path, published.config
  if not published.file.with_name("config.json").exists():
    raise WeightsError(f"{path}: no config.json beside weights with Hugging Face's keys; add it")
  if missing := [key for key in needed if key not in config]:
    raise WeightsError(f"{path}/config.json: no {', '.join(missing)}; add the model's own file")
  for name, value in supported.items():
    section, _, key = name.rpartition(".")
    given = ((config.get(section) or {}) if section else config).get(key, value)
    if given != value:
      raise WeightsError(f"{path}/config.json: {name} is {given!r}; expected {value!r}")


_PROCESSOR = "preprocessor_config.json"


def interpolation_of(processor: Mapping[str, Any], source: str = _PROCESSOR) -> str:
  """Returns the filter for `resample`, Pillow's number of it; bilinear by default."""
  names = {None: "bilinear", **{int(code): name for name, code in PILLOW_FILTERS.items()}}
  code = processor.get("resample")
  if code not in names:
    expected = sorted(map(int, PILLOW_FILTERS.values()))
    raise WeightsError(f"{source}: resample is {code!r}; expected one of {expected}")
  return names[code]


def mean_and_std(
  processor: Mapping[str, Any],
  default: tuple[Sequence[float], Sequence[float]],
  source: str = _PROCESSOR,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Returns mean and std for pixels in [0, 1]: transformers may skip either of its two steps."""
  mean, std = default
  given: dict[str, Any] = {"rescale_factor": 1 / 255, "image_mean": mean, "image_std": std}
  given |= {key: processor[key] for key in given if processor.get(key) is not None}
  given |= {} if processor.get("do_rescale", True) else {"rescale_factor": 1}
  given |= {} if processor.get("do_normalize", True) else {"image_mean": 0, "image_std": 1}
  found = {}
  for field, value in given.items():
    try:
      found[field] = np.broadcast_to(np.asarray(value, np.float64), 3)
    except (TypeError, ValueError):
      found[field] = np.full(1, np.nan)
    if not np.isfinite(found[field]).all() or (field != "image_mean" and found[field].min() <= 0):
      raise WeightsError(f"{source}: {field} is {value!r}; expected a positive number, or three")
  factor, mean, std = found.values()
  return tuple((mean / (255 * factor)).tolist()), tuple((std / (255 * factor)).tolist())


_MAX_SIDE = math.isqrt(MAX_PIXELS)


def size_of(
  given: Any, field: str, known: Iterable[Sequence[str]], source: str = _PROCESSOR
) -> dict[str, int]:
  """Returns the sides by name; one number is the side of a square, two are height and width."""
  sides: Any = [given, given] if isinstance(given, int) else given
  if isinstance(sides, list) and len(sides) == 2:
    sides = dict(zip(("height", "width"), sides, strict=True))
  sides = {k: v for k, v in sides.items() if v is not None} if isinstance(sides, dict) else {}
  names = next((names for names in known if sides.keys() == set(names)), ())
  limits = {name: math.inf if name == "longest_edge" else _MAX_SIDE for name in sides}
  if not names or not all(type(x) is int and 0 < x <= limits[k] for k, x in sides.items()):
    expected = ", or ".join(map(" and ".join, known))
    wrong = f"{source}: {field} is {given!r}; expected {expected}"
    raise WeightsError(f"{wrong}, positive integers up to {_MAX_SIDE}")
  return {name: sides[name] for name in names}


_BEIT: dict[str, Any] = {"size": 224, "crop_size": 224, "resample": 3}
_DEIT = _BEIT | {"size": 256, "do_center_crop": True}
_CLIP = _DEIT | {"size": {"shortest_edge": 224}}
_CLIP["image_mean"] = [0.48145466, 0.4578275, 0.40821073]
_CLIP["image_std"] = [0.26862954, 0.26130258, 0.27577711]
_DEFAULTS = {"DeiT": _DEIT, "Beit": _BEIT, "CLIP": _CLIP, "Bit": _CLIP}
"""Kind of processor -> transformers' defaults; all others have ViT's."""


def read_preprocess(processor: Mapping[str, Any], size: Size, kind: str) -> Preprocess:
  """Returns the preprocessing that `preprocessor_config.json` states; {}: transformers' defaults.

  `size` is the default height and width; `kind` begins the name of the model's own processor.
  """
  own = kind_of(processor, kind, _DEFAULTS)
  defaults: dict[str, Any] = {"size": list(size)}
  defaults = next((x for key, x in _DEFAULTS.items() if own.startswith(key)), defaults)
  # As in transformers, null is no for a step, and an error for a value: the default here.
  stated = {k: v for k, v in processor.items() if v is not None or k.startswith("do_")}
  given: dict[str, Any] = {**defaults, **stated}
  if defaults is _CLIP and type(given["size"]) is int:
    given["size"] = {"shortest_edge": given["size"]}
  if given.get("do_pad") and "pad_size" in given:
    raise WeightsError(f"{_PROCESSOR}: pad_size is {given['pad_size']!r}; expected none")
  # A limit of the longer side would give images of several sizes.
  known = (("height", "width"), ("shortest_edge",))
  sides = list(size_of(given["size"], "size", known).values())
  height, width = resized = sides[0], sides[-1]
  do_resize = given.get("do_resize", True)
  if given.get("do_center_crop") and "crop_size" in given:
    height, width = size_of(given["crop_size"], "crop_size", known[:1]).values()
    if not do_resize or height > resized[0] or width > resized[1]:
      wrong = f"crop_size is {given['crop_size']}, size {given['size']}, do_resize {do_resize}"
      raise WeightsError(f"{_PROCESSOR}: {wrong}; expected a resize to at least the crop")
  elif len(sides) == 1 and do_resize:
    wrong = f"size is {given['size']} without a crop: images of several sizes"
    raise WeightsError(f"{_PROCESSOR}: {wrong}; expected height and width, or do_center_crop")
  fit = "crop" if len(sides) == 1 else "squash"
  return Preprocess(
    (height, width),
    *mean_and_std(given, ((0.5, 0.5, 0.5),) * 2),
    fit=fit if do_resize else "none",
    interpolation=interpolation_of(given),
    crop_pct=crop_fraction((height, width), resized),
    rounding="ratio",
  )


def kind_of(processor: Mapping[str, Any], kind: str, known: Iterable[str] = ()) -> str:
  """Returns the processor's class, by default `kind`; warns of one that is read as `kind`."""
  own = processor.get("image_processor_type") or processor.get("feature_extractor_type") or kind
  if not str(own).startswith((kind, *known)):
    logging.warning("%s: %s is read as %sImageProcessor", _PROCESSOR, own, kind)
  return str(own)


def read_class_names(config: Mapping[str, Any], count: int) -> dict[str, Any]:
  """Returns `class_names` of a `config.json` as a field of the task; a missing one is its id."""
  try:
    stated = {int(key): str(name) for key, name in (config.get("id2label") or {}).items()}
  except (AttributeError, ValueError) as error:
    raise WeightsError(f"config.json: id2label: {error}; expected names by class id") from None
  labels = {key: name for key, name in stated.items() if 0 <= key < count}
  if count and (other := sorted(stated.keys() - labels.keys())):
    text = "config.json: id2label has %d ids that are none of the %d classes (%d, ...); ignored"
    logging.warning(text, len(other), count, other[0])
  if all(re.fullmatch(r"LABEL_\d+", name) for name in labels.values()):
    return {}
  if missing := sorted(set(range(count)) - set(labels)):
    logging.warning(
      "config.json: id2label lacks %d of %d classes (%s%s); their ids are shown",
      len(missing), count, ", ".join(map(str, missing[:5])), ", ..." * (len(missing) > 5),
    )  # fmt: skip
  return {"class_names": tuple(labels.get(i, str(i)) for i in range(count))}


def label_fields(class_names: Sequence[str], count: int) -> dict[str, Any]:
  """Returns the names of `count` classes in a `config.json`; without any they are LABEL_<i>."""
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
  preprocess: Preprocess, kind: str, *, fits: Iterable[str] = ("none", "squash", "crop")
) -> dict[str, Any]:
  """Returns the `preprocessor_config.json` of an image processor class with these fits.

  With a crop the class is CLIP's: that of ViT has none before transformers 5.
  """
  crops, final = "crop" in fits, preprocess.image_size
  height, width = resized = preprocess.uncropped_size if crops else final
  covers = preprocess.fit == "crop" and crops and height == width
  is_known = covers if preprocess.fit == "crop" else preprocess.fit in fits
  has_filter = preprocess.interpolation in PILLOW_FILTERS and not preprocess.truncate
  if not is_known or not has_filter or (preprocess.crop_pct != 1 and not crops):
    logging.warning(
      "%s: %s has no fit=%s of size %s with interpolation=%s; the nearest one is written",
      _PROCESSOR, kind, preprocess.fit, preprocess.uncropped_size, preprocess.interpolation,
    )  # fmt: skip
  processor = {
    "image_processor_type": kind,
    "do_resize": preprocess.fit != "none",
    "size": {"shortest_edge": height} if covers else {"height": height, "width": width},
    "resample": int(PILLOW_FILTERS.get(preprocess.interpolation, PILLOW_FILTERS["bilinear"])),
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": preprocess.means,
    "image_std": preprocess.stds,
  }
  if covers or resized != final:
    crop = {"do_center_crop": True, "crop_size": {"height": final[0], "width": final[1]}}
    processor |= {"image_processor_type": "CLIPImageProcessor", **crop}
  return processor


_FITS = {"center": "crop", "squash": "squash"}


def read_timm(published: Published, default: Preprocess) -> dict[str, Any]:
  """Returns a checkpoint's `preprocess`, `task_fields`, and `image_size`, None if not stated."""
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


def write_timm(
  path: str, arrays: Flat, export: Pretrained, base: tuple[str, Any], arguments: Any
) -> None:
  """Writes timm's folder; `base`: its model that `arguments` change, and the sizes that differ."""
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
