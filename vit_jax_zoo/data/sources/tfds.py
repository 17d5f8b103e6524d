"""Datasets prepared by TFDS, read without TensorFlow.

ArrayRecord folders are read with TFDS's data source; TFRecord files, which TFDS reads with
TensorFlow and in order alone, with `data/sources/tfrecord.py`. Images stay encoded: the pipeline
decodes the part that it needs.

Folders are local or `gs://bucket/...`: listing them needs the package gcsfs, and array_record opens
`gs://` natively. Tested with a local replacement, not with a bucket. TFRecord files must be local.
"""

import contextlib
import dataclasses
import functools
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from vit_jax_zoo.data import images
from vit_jax_zoo.data.sources import tfrecord
from vit_jax_zoo.data.sources.base import DatasetInfo, Example, Source, Splits, name_validation
from vit_jax_zoo.data.sources.coco import coco_ids, names_by_id
from vit_jax_zoo.data.sources.derived_labels import LabelRule, find_rule
from vit_jax_zoo.data.transforms.detection import objects_example

LABELS = "segmentation_label"
"""Feature of label maps that is used without `label_key`."""
IMAGES = ("image", "image_left")


class _Split(Source):
  """Split of a prepared dataset."""

  def example_name(self, index: int) -> str:
    """Returns split and index."""
    return f"{self.info.name}[{index}]"


class TfdsLabelMaps(_Split):
  """Split of a dataset of label maps; examples as in `transforms/segmentation.py`."""

  def __init__(self, info: DatasetInfo, records: Any, keys: tuple[str, str]) -> None:
    self.info = info
    self._records, (self._image_key, self._label_key) = records, keys

  def __getitem__(self, index: int) -> Example:
    record = self._records[index]
    maps = {"image": record[self._image_key], "label_map": record[self._label_key]}
    return {**maps, "image_id": index}


def find_keys(
  images: Sequence[str], image_key: str | None, label_key: str | None
) -> tuple[str, str] | None:
  """Returns the features of images and of label maps; None for a dataset without label maps.

  Args:
    images: names of the image features.
    image_key: option of `open_splits`.
    label_key: option of `open_splits`; an image feature has label maps.
  """
  labels = LABELS if label_key is None else label_key
  if labels not in images:
    return None
  wanted = (*IMAGES, *images) if image_key is None else (image_key,)
  found = next((key for key in wanted if key in images and key != labels), None)
  return None if found is None else (found, labels)


KEYS = ("image", "reference")


class TfdsPairs(_Split):
  """Split of a dataset of pairs; examples as in `sources/pairs.py`."""

  def __init__(self, info: DatasetInfo, records: Any) -> None:
    self.info = info
    self._records = records

  def __getitem__(self, index: int) -> Example:
    record = self._records[index]
    return {key: record[key] for key in KEYS}


def has_pairs(features: Any) -> bool:
  """Returns whether a dataset's images have references."""
  return all(key in features and isinstance(features[key], tfds.features.Image) for key in KEYS)


OBJECTS = {False: "objects", True: "panoptic_objects"}
"""The feature, for detection and for panoptic segmentation."""


@dataclasses.dataclass(frozen=True)
class Layout:
  """Features of a record.

  Attributes:
    image: feature of the image.
    objects: feature of the objects.
    segments: feature of the segment image, or None.
    class_ids: class id of each label; None where labels are class ids.
  """

  image: str
  objects: str
  segments: str | None = None
  class_ids: tuple[int, ...] | None = None


class TfdsObjects(_Split):
  """Split of a dataset of objects; examples as in `transforms/detection.py`."""

  def __init__(self, info: DatasetInfo, records: Any, layout: Layout) -> None:
    self.info = info
    self._records = records
    self._layout = layout

  def __getitem__(self, index: int) -> Example:
    record, layout = self._records[index], self._layout
    objects, image = record[layout.objects], record[layout.image]
    boxes = _in_pixels(objects["bbox"], image)
    labels = np.asarray(objects["label"], np.int64)
    if layout.class_ids is not None:
      labels = np.asarray(layout.class_ids)[labels]
    sides = boxes[:, 2:] - boxes[:, :2]
    example = objects_example(
      image,
      int(record.get("image/id", index)),
      boxes,
      labels,
      is_crowd=objects.get("is_crowd", np.zeros(len(labels), bool)),
      area=objects.get("area", sides.prod(axis=1)),
      ids=objects.get("id", np.zeros(len(labels))),
    )
    if layout.segments is not None:
      example["segment_image"] = record[layout.segments]
    return example


def find_layout(features: Any, name: str, *, panoptic: bool) -> tuple[Layout, DatasetInfo]:
  """Returns the features of a dataset's objects, and its classes.

  Raises:
    ValueError: it has no objects.
  """
  objects = OBJECTS[panoptic]
  if objects not in features or "bbox" not in _inner(features, objects):
    kind = "panoptic segments" if panoptic else "objects with boxes"
    raise ValueError(f"{name} has no {kind}; its features are {', '.join(sorted(features))}")
  label = _inner(features, objects)["label"]
  names = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
  class_ids = coco_ids(names)
  if class_ids is not None:
    names = names_by_id(dict(zip(class_ids, names, strict=True)))
  layout = Layout(
    image="image",
    objects=objects,
    segments="panoptic_image" if panoptic else None,
    class_ids=class_ids,
  )
  return layout, DatasetInfo(name, 0, len(names) or None, names)


def has_objects(features: Any) -> bool:
  """Returns whether a dataset has boxes."""
  return any(key in features and "bbox" in _inner(features, key) for key in OBJECTS.values())


def _in_pixels(boxes: Any, image: bytes) -> np.ndarray:
  """Returns boxes [n 4], left, top, right, bottom in pixels, from relative y, x, y, x."""
  height, width = images.image_size(image)
  shares = np.asarray(boxes, np.float64).reshape(-1, 4)
  return shares[:, [1, 0, 3, 2]] * (width, height, width, height)


def _inner(features: Any, key: str) -> Any:
  """Returns the features of a sequence's elements."""
  return getattr(features[key], "feature", features[key])


_VERSION = re.compile(r"\d+\.\d+\.\d+")


class TfdsSource(_Split):
  """Split of a classification dataset.

  `label` is an int, or int32 [n] for several labels an image.
  """

  def __init__(self, info: DatasetInfo, records: Any, keys: tuple[str, str | None]) -> None:
    self.info = info
    self._records = records
    self._image_key, self._label_key = keys

  def __getitem__(self, index: int) -> Example:
    record = self._records[index]
    example = {"image": record[self._image_key]}
    if self._label_key is not None:
      label = record[self._label_key]
      # TFDS returns sequences as lists, an empty one without a type.
      several = isinstance(label, list | tuple | np.ndarray) and np.ndim(label) > 0
      example["label"] = np.asarray(label, np.int32).reshape(-1) if several else int(label)
    return example


class RuledSource(_Split):
  """Split with labels derived from other features by a rule."""

  def __init__(self, info: DatasetInfo, records: Any, image_key: str, rule: LabelRule) -> None:
    self.info = info
    self._records, self._image_key, self._rule = records, image_key, rule

  def __getitem__(self, index: int) -> Example:
    record = self._records[index]
    image = record[self._image_key]
    if self._rule.image_scale != 1:
      image = images.decode_image(image) * np.uint8(self._rule.image_scale)
    return {"image": image, "label": self._rule.label(record)}


def open_splits(
  location: str,
  data_dir: str | None = None,
  image_key: str | None = None,
  label_key: str | None = None,
  *,
  panoptic: bool = False,
  label_rule: str | None = None,
) -> Splits:
  """Opens a prepared dataset; its features decide the task.

  Boxes: detection; label maps: segmentation; references: super-resolution; else classification.

  Args:
    location: `name`, `name/config`, either with `:version`, or the folder of `dataset_info.json`,
      local or `gs://bucket/...`.
    data_dir: folder of datasets, local or `gs://bucket/...`; default: `$TFDS_DATA_DIR`, else
      `~/tensorflow_datasets`.
    image_key: image feature; default: the only one, or "image".
    label_key: label feature; default: `label`, else `labels`, else none. An image feature has label
      maps.
    panoptic: read segments of things and stuff.
    label_rule: derives the labels from other features; a key of `derived_labels.RULES`.

  Raises:
    FileNotFoundError: it has not been prepared there.
    ValueError: it lacks these features, or cannot be read by index.
  """
  is_path = location.startswith((os.sep, "~", ".")) or os.path.isabs(location)
  is_path = is_path or is_remote(location)
  folder = at_path(location) if is_path else _find(location, data_dir)
  name = f"tfds:{location}"
  if label_rule is not None:
    return _open_with_rule(folder, name, image_key, label_key, label_rule)
  return open_folder(folder, name, image_key, label_key, panoptic=panoptic)


def open_folder(
  folder: epath.PathLike,
  name: str,
  image_key: str | None = None,
  label_key: str | None = None,
  *,
  panoptic: bool = False,
) -> Splits:
  """Opens the prepared dataset in `folder`; `name` is used in messages."""
  builder = tfds.builder_from_directory(folder)
  features = builder.info.features
  if panoptic or (image_key is None and label_key is None and has_objects(features)):
    layout, whole = find_layout(features, name, panoptic=panoptic)
    make = functools.partial(TfdsObjects, layout=layout)
    encoded = [key for key in (layout.image, layout.segments) if key is not None]
  elif maps := find_keys(_images(features), image_key, label_key):
    whole, make = DatasetInfo(name, 0), functools.partial(TfdsLabelMaps, keys=maps)
    encoded = maps
  elif image_key is None and has_pairs(features):
    whole, make, encoded = DatasetInfo(name, 0), TfdsPairs, KEYS
  else:
    keys = _keys(features, name, image_key, label_key)
    whole = DatasetInfo(name, 0, *_classes(features, keys[1]))
    make = functools.partial(TfdsSource, keys=keys)
    encoded = [keys[0]]
  return _splits(builder, whole, encoded, make)


def _open_with_rule(
  folder: epath.PathLike, name: str, image_key: str | None, label_key: str | None, label_rule: str
) -> Splits:
  if label_key is not None:
    raise ValueError(f"label_rule={label_rule!r} and label_key={label_key!r}: set one of them")
  builder, rule = tfds.builder_from_directory(folder), find_rule(label_rule)
  features = builder.info.features
  image_key, _ = _keys(features, name, image_key, None)
  for key in rule.keys:
    if key not in features:
      raise ValueError(f"{name} has no feature {key!r}, which the label_rule {label_rule!r} reads")
  make = functools.partial(RuledSource, image_key=image_key, rule=rule)
  return _splits(builder, DatasetInfo(name, 0, rule.num_classes), _images(features), make)


def _splits(
  builder: Any,
  whole: DatasetInfo,
  encoded: Sequence[str],
  make: Callable[[DatasetInfo, Any], Source],
) -> Splits:
  """Returns the splits; the features `encoded` are left as stored."""
  decoders = dict.fromkeys(encoded, tfds.decode.SkipDecoding())
  return name_validation(
    {
      split: functools.partial(_open_split, builder, split, whole, decoders, make)
      for split in builder.info.splits
    }
  )


@contextlib.contextmanager
def quiet_progress() -> Iterator[None]:
  """Silences TFDS's progress bars and download messages."""
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tfds.enable_progress_bar()


def default_data_dir() -> epath.Path:
  """Returns TFDS's default folder of datasets."""
  return epath.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def is_remote(location: str) -> bool:
  """Returns whether a path has a file system: `gs://bucket/folder`."""
  return "://" in location


def _open_split(
  builder: Any,
  split: str,
  whole: DatasetInfo,
  decoders: dict[str, Any],
  make: Callable[[DatasetInfo, Any], Source],
) -> Source:
  info = builder.info.splits[split]
  if str(builder.info.file_format.value) == "tfrecord":
    files = [str(path) for path in info.filepaths]
    if is_remote(files[0]):
      raise ValueError(
        f"{whole.name} lies in TFRecord files, which can be read by index from a local disk only; "
        "copy it there and convert it with python -m vit_jax_zoo.data.prepare --from_tfrecord"
      )
    records = tfrecord.TFRecordFiles(
      files, info.shard_lengths, functools.partial(_decode, builder.info.features, decoders)
    )
  else:
    records = builder.as_data_source(split, decoders=decoders)
  one = dataclasses.replace(whole, name=f"{whole.name} {split}", num_examples=info.num_examples)
  return make(one, records)


def _decode(features: Any, decoders: dict[str, Any], record: bytes) -> dict[str, Any]:
  return features.deserialize_example_np(record, decoders=decoders)


def _keys(
  features: Any, name: str, image_key: str | None, label_key: str | None
) -> tuple[str, str | None]:
  """Returns the names of the image feature and of the label feature."""
  found = _images(features)
  if image_key is None and "image" in found:  # Pets have a mask beside it, smallNORB another view
    image_key = "image"
  for given in (image_key, label_key):
    if given is not None and given not in features:
      raise ValueError(f"{name} has no feature {given!r}; it has {', '.join(sorted(features))}")
  if image_key is None and len(found) != 1:
    known = ", ".join(sorted(found)) or "none"
    raise ValueError(f"{name}: set image_key to one of the image features: {known}")
  labels = [key for key in ("label", "labels") if key in features]
  return image_key or found[0], label_key or (labels[0] if labels else None)


def _images(features: Any) -> list[str]:
  return [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]


def _classes(features: Any, label_key: str | None) -> tuple[int | None, tuple[str, ...]]:
  feature = features[label_key] if label_key else None
  feature = getattr(feature, "feature", feature)  # what a Sequence is a sequence of
  if not isinstance(feature, tfds.features.ClassLabel):
    return None, ()
  named = feature.num_classes is not None and not _only_numbers(feature)
  return feature.num_classes, tuple(feature.names) if named else ()


def _only_numbers(feature: tfds.features.ClassLabel) -> bool:
  """Returns whether the names are 0, 1, 2, ..., TFDS's default for a number of classes."""
  return getattr(feature, "_int2str", None) is None


def at_path(location: str) -> epath.Path:
  """Returns the folder of a prepared dataset.

  Raises:
    FileNotFoundError: it is not there, or is not the innermost one.
  """
  folder = epath.Path(location).expanduser()
  if not (folder / "dataset_info.json").exists():
    problem = "has no dataset_info.json" if folder.exists() else "does not exist"
    raise FileNotFoundError(
      f"tfds:{location} {problem}; expected the inmost folder of a prepared dataset, such as "
      ".../imagenet2012/5.1.0 (demo:digits needs none)"
    )
  return folder


def _find(location: str, data_dir: str | None) -> epath.Path:
  name, _, version = location.partition(":")
  root = epath.Path(data_dir).expanduser() if data_dir else default_data_dir()
  versions = _versions(root / name)
  if not version and versions:
    return max(versions, key=lambda folder: tuple(map(int, folder.name.split("."))))
  for folder in versions:
    if folder.name == version:
      return folder
  there = f" (there: {', '.join(f.name for f in versions)})" if versions else ""
  where = "... locally and copy the result" if is_remote(str(root)) else root
  raise FileNotFoundError(
    f"tfds:{location} is not prepared in {root}{there}; run python -m vit_jax_zoo.data.prepare "
    f"--dataset={location} --data_dir={where}, or use demo:digits, which needs no data"
  )


def _versions(folder: epath.Path) -> list[epath.Path]:
  """Returns the prepared versions in a folder or in its only config."""
  if not folder.is_dir():
    return []
  inside = sorted(f for f in folder.iterdir() if (f / "dataset_info.json").exists())
  versions = [f for f in inside if _VERSION.fullmatch(f.name)]
  if versions:
    return versions
  configs = [f for f in folder.iterdir() if f.is_dir() and _versions(f)]
  return _versions(configs[0]) if len(configs) == 1 else []
