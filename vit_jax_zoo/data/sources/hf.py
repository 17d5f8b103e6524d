"""Datasets of the package `datasets`: a local folder, or a name on Hugging Face's hub.

The columns determine the kind of the examples: docs/guides/data.md. No code of the hub is run. Rows
keep their order.
"""

import copy
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from absl import logging

from vit_jax_zoo.data import images
from vit_jax_zoo.data.sources import base, folder
from vit_jax_zoo.data.sources.coco import coco_ids, names_by_id
from vit_jax_zoo.data.transforms.detection import objects_example
from vit_jax_zoo.errors import check_names, one_line, shorten

try:
  import datasets
except ImportError:
  raise ImportError("hf: needs the package datasets; pip install -e '.[hf]'") from None

Rows: TypeAlias = Any  # a `datasets.Dataset`

LABEL_MAPS = ("annotation", "mask", "label_map", "segmentation_mask", "label", "labels")
BOX_FORMATS = ("xywh", "xyxy", "cxcywh")  # as in torchvision


class Boxes(NamedTuple):
  """Column of objects, and how they are stored."""

  key: str
  box_format: str
  relative: bool
  class_ids: Mapping[Any, int]  # by category


Target: TypeAlias = Boxes | str | None  # objects, column of label maps, or none: classification


class HfSource(folder.LabelledSource):
  """Rows of a split; `files` has the number of each as text, and its label."""

  def __init__(
    self, info: base.DatasetInfo, rows: Rows, files: folder.Labelled, image: str, target: Target
  ) -> None:
    super().__init__(info, "", files)
    self._image, self._target = image, target
    objects = target.key if isinstance(target, Boxes) else target
    rows = rows.select_columns([image, *filter(None, [objects])])
    for key, feature in rows.features.items():
      if isinstance(feature, datasets.Image):
        rows = rows.cast_column(key, datasets.Image(decode=False))
    self._rows = rows

  def _load(self, index: int) -> base.Example:
    row, target = int(self._files[index][0]), self._target
    record = self._rows[row]
    image = _encoded(record, self._image)
    if isinstance(target, Boxes):
      return _objects_example(image, row, record[target.key], target)
    if target is not None:
      return {"image": image, "label_map": _encoded(record, target), "image_id": row}
    return {"image": image}

  def example_name(self, index: int) -> str:
    return f"{self.info.name}[{self._files[index][0]}]"


def open_splits(  # noqa: PLR0913  (each is a field of a config)
  location: str,
  config_name: str | None = None,  # a dataset's configuration, "subset" on the hub
  revision: str | None = None,  # branch, tag or commit on the hub
  image_key: str | None = None,  # default: "image", "img", or the first column of images
  label_key: str | None = None,  # of labels or label maps; default: the usual names
  objects_key: str = "objects",
  box_format: str = "xywh",  # one of `BOX_FORMATS`
  *,
  relative_boxes: bool = False,  # boxes are fractions of the image's size, not in pixels
  class_names: folder.ClassNames = None,
) -> base.Splits:
  """Opens a dataset: FileNotFoundError without, ValueError, with row and column, for a wrong one.

  Names of the classes of label maps are those in `classes.txt` in the folder, if there is one.
  """
  check_names("box_format", [box_format], BOX_FORMATS)
  name, found = f"hf:{location}", _load(location, config_name, revision)
  features = next(iter(found.values())).features
  check_names(f"column of {name}", filter(None, (image_key, label_key)), features)
  pictures = [key for key, feature in features.items() if _is_image(feature)]
  image = image_key or next((key for key in ("image", "img", *pictures) if key in pictures), None)
  if image is None:
    raise ValueError(f"{name}: no images in the columns {', '.join(features)}; set image_key")
  candidates = [label_key] if label_key else LABEL_MAPS
  maps = [key for key in candidates if key in pictures and key != image]
  if objects_key in features and label_key is None:
    ids, names = _categories(name, objects_key, features[objects_key], class_names)
    target = Boxes(objects_key, box_format, relative_boxes, ids)
  elif maps:
    file = os.path.join(os.path.expanduser(location), "classes.txt")
    names = folder.read_class_names(class_names or (file if os.path.isfile(file) else None))
    target = maps[0]
  else:
    label = label_key or _find_label(name, features)
    return folder.hold_out_test(_labelled(name, found, image, label, class_names))
  info = base.DatasetInfo(name, 0, len(names) or None, names)
  opened = functools.partial(_open, info, image=image, target=target)
  splits = {s: functools.cache(functools.partial(opened, s, rows)) for s, rows in found.items()}
  return folder.hold_out_test(splits)


def _load(location: str, config_name: str | None, revision: str | None) -> dict[str, Rows]:
  """Returns the rows of each split; a single one is `train`."""
  path, name = os.path.expanduser(location), f"hf:{location}"
  if not os.path.isdir(path) and (os.path.exists(path) or location.startswith((os.sep, "~", "."))):
    raise FileNotFoundError(f"{name}: no such folder; expected one, or a name on the hub")
  try:
    if any(os.path.isfile(os.path.join(path, f)) for f in ("dataset_dict.json", "state.json")):
      found = datasets.load_from_disk(path)
    else:
      found = datasets.load_dataset(path, config_name, revision=revision)
  except (FileNotFoundError, ConnectionError) as error:
    raise FileNotFoundError(f"{name}: {one_line(str(error))}") from None
  except Exception as error:  # of several libraries
    raise ValueError(f"{name}: {shorten(one_line(str(error)), 300)}") from None
  sources = {str(s): rows for s, rows in found.items()} if isinstance(found, dict) else {"": found}
  (first, *others) = sources
  return sources if others or folder.split_of(first) else {"train": sources[first]}


def _is_image(feature: Any) -> bool:
  is_file = isinstance(feature, Mapping) and "bytes" in feature
  return is_file or getattr(feature, "dtype", None) in ("PIL.Image.Image", "binary")


def _class_names(feature: Any) -> tuple[str, ...]:
  feature = getattr(feature, "feature", feature)  # of a list
  return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()


def _find_label(name: str, features: Mapping[str, Any]) -> str | None:
  usual = [key for key in ("label", "labels") if key in features]
  found = usual[:1] or [key for key, feature in features.items() if _class_names(feature)]
  if len(found) > 1:
    raise ValueError(f"{name}: several columns of labels; set label_key: {' or '.join(found)}")
  return found[0] if found else None


def _labelled(
  name: str, found: Mapping[str, Rows], image: str, label: str | None, class_names: Any
) -> folder.LabelledSplits:
  def open_some(*splits: str) -> dict[str, HfSource]:
    files, count, names = {split: _files(split, found[split], label) for split in splits}, None, ()
    if label is not None:
      files, count, names = folder.encode_labels(
        files, stored or class_names, lambda file: f"{name} {file[2]}[{file[0]}].{label}:"
      )
    infos = {split: base.DatasetInfo(f"{name} {split}", 0, count, names) for split in splits}
    return {s: HfSource(infos[s], found[s], files[s], image, None) for s in splits}

  stored = _class_names(next(iter(found.values())).features[label]) if label else ()
  if stored or label is None:  # one by one: test sets of the hub may have no labels, -1
    return {s: functools.cache(lambda s=s: open_some(s)[s]) for s in found}
  return {s: functools.partial(copy.copy, source) for s, source in open_some(*found).items()}


def _files(split: str, rows: Rows, label: str | None) -> folder.Labelled:
  values = [None] * len(rows) if label is None else _column(rows, label)
  labels = (tuple(value) if isinstance(value, list) else value for value in values)
  return [(str(row), value, split) for row, value in enumerate(labels)]


def _column(rows: Rows, key: str) -> Iterator[Any]:
  for batch in rows.select_columns([key]).with_format("arrow").iter(1000):
    yield from batch.column(0).to_pylist()


def _encoded(record: Mapping[str, Any], key: str) -> bytes:
  value = record[key]
  if isinstance(value, Mapping):
    file = value.get("path")
    value = value["bytes"] or (images.read_file(file) if file else None)
  if not isinstance(value, bytes):
    raise base.CorruptExampleError(f"{key}: no image")
  return value


def _open(info: base.DatasetInfo, split: str, rows: Rows, image: str, target: Target) -> HfSource:
  """Opens a split of detection or segmentation, and checks its objects."""
  info = dataclasses.replace(info, name=f"{info.name} {split}")
  if isinstance(target, Boxes):
    counts, wrong, odd, kept = [], [], 0, 0
    for row, objects in enumerate(_column(rows, target.key)):
      try:
        boxes, good, fields = _read_objects(objects, target)
      except ValueError as error:
        raise ValueError(f"{info.name}[{row}].{target.key}.{error}") from None
      counts.append(len(boxes))
      kept += int((good & ~_crowds(fields, len(boxes))).sum())
      wrong += [f"[{row}]"] * int((~good).sum())
      odd += (good & ((boxes.max(axis=1, initial=0) > 1.5) == target.relative)).sum()
    if odd:
      text = "%s: %d of %d boxes are %s [0, 1]; expected relative_boxes=%s"
      kind = "beyond" if target.relative else "in"
      logging.warning(text, info.name, odd, sum(counts), kind, not target.relative)
    if wrong:
      text = "%s: %d boxes with NaN or a negative side, left out: %s"
      logging.warning(text, info.name, len(wrong), ", ".join(wrong[:3]))
    info = dataclasses.replace(info, max_objects=max(counts, default=0), num_objects=kept)
  return HfSource(info, rows, _files(split, rows, None), image, target)


def _categories(
  name: str, key: str, feature: Any, class_names: Sequence[str] | str | None
) -> tuple[dict[Any, int], tuple[str, ...]]:
  """Returns the class id of each category, and the names by id; COCO's classes have COCO's ids."""
  inner = getattr(feature, "feature", feature)
  if "category" not in inner or "bbox" not in inner:
    raise ValueError(f"{name}: {key} has {', '.join(inner)}; expected bbox and category")
  if stored := _class_names(inner["category"]):
    ids = coco_ids(stored) or range(len(stored))
    return dict(enumerate(ids)), names_by_id(dict(zip(ids, stored, strict=True)))
  if not (names := folder.read_class_names(class_names)):
    raise ValueError(f"{name}: {key}.category is no ClassLabel; set class_names")
  return {category: i for i, n in enumerate(names) for category in (i, n)}, names


def _read_objects(objects: Any, spec: Boxes) -> tuple[np.ndarray, np.ndarray, Mapping[str, Any]]:
  """Returns boxes as left, top, right, bottom, which are valid, and all fields, in columns."""
  if isinstance(objects, list):  # of one mapping an object
    objects = {key: [found[key] for found in objects] for key in (objects[0] if objects else ())}
  categories = objects.get("category", [])
  try:
    boxes = np.array(objects.get("bbox") or np.zeros((0, 4)), np.float64)
  except (TypeError, ValueError):
    boxes = np.zeros(0)
  if boxes.shape != (len(categories), 4):
    raise ValueError(f"bbox: {objects.get('bbox')}; expected 4 numbers for each category")
  for category in set(categories) - spec.class_ids.keys():
    raise ValueError(f"category: {category!r}; expected one of the {len(spec.class_ids)} classes")
  for key in ("iscrowd", "is_crowd", "area"):
    values = objects.get(key) or [0] * len(boxes)
    if len(values) != len(boxes) or not (key == "area" or {*values} <= {0, 1, None}):
      raise ValueError(f"{key}: {values}; expected a number, 0 or 1 for crowds, for each category")
  first, second = boxes[:, :2], boxes[:, 2:]
  if spec.box_format == "cxcywh":
    first = first - second / 2
  if spec.box_format != "xyxy":
    second = first + second
  boxes = np.concatenate([first, second], axis=1)
  return boxes, np.isfinite(boxes).all(axis=1) & np.all(second >= first, axis=1), objects


def _objects_example(image: bytes, row: int, objects: Any, spec: Boxes) -> base.Example:
  boxes, good, fields = _read_objects(objects, spec)
  if spec.relative:
    height, width = images.image_size(image)
    boxes = boxes * (width, height, width, height)
  of_boxes = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
  area = np.array(fields.get("area") or of_boxes, np.float64)
  area = np.where(area >= 0, area, of_boxes)  # NaN or None
  labels = np.array([spec.class_ids[category] for category in fields.get("category", [])], int)
  columns = {"is_crowd": _crowds(fields, len(boxes)), "area": area, "ids": np.arange(len(boxes))}
  columns = {key: values[good] for key, values in columns.items()}
  return objects_example(image, row, boxes[good], labels[good], **columns)


def _crowds(fields: Mapping[str, Any], count: int) -> np.ndarray:
  return np.array(fields.get("iscrowd", fields.get("is_crowd")) or [0] * count, bool)
