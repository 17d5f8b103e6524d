"""Datasets of TFDS, read and written without TensorFlow.

ArrayRecord folders are read with TFDS's data source; TFRecord files, which TFDS reads only in order
and with TensorFlow, with `TFRecordFiles`. Images stay encoded: the pipeline decodes the part that
it needs.

Folders are local or `gs://bucket/...`: listing them needs the package gcsfs, and array_record opens
`gs://` natively. Tested with a local replacement, not with a bucket. TFRecord files must be local.
"""

import bisect
import contextlib
import dataclasses
import functools
import io
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from vit_jax_zoo.data import images
from vit_jax_zoo.data.sources.base import DatasetInfo, Example, Source, Splits, name_validation
from vit_jax_zoo.data.sources.coco import coco_ids, names_by_id
from vit_jax_zoo.data.transforms.detection import objects_example
from vit_jax_zoo.errors import check_names

Record: TypeAlias = Mapping[str, Any]
RecordSplits: TypeAlias = Mapping[str, Iterable[Record]]
Maker: TypeAlias = Callable[[Record, int], Example]  # from a record and its index to an example
Kind: TypeAlias = tuple[DatasetInfo, Sequence[str], Maker]  # classes, encoded features, examples

OBJECTS = {False: "objects", True: "panoptic_objects"}  # feature, by whether it is panoptic

PAIR = ("image", "reference")


class TfdsSource(Source):
  """Split of a prepared dataset."""

  def __init__(self, info: DatasetInfo, records: Any, make: Maker) -> None:
    self.info = info
    self._records, self._make = records, make

  def __getitem__(self, index: int) -> Example:
    try:
      record = self._records[index]
    except RuntimeError as error:  # array_record's, of a damaged or missing file
      raise images.CorruptExampleError(" ".join(str(error).split())) from None
    return self._make(record, index)


def open_splits(
  location: str,
  data_dir: str | None = None,  # default: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`
  image_key: str | None = None,  # default: the only image feature, or "image"
  label_key: str | None = None,  # default: `label`, else `labels`, else none
  *,
  panoptic: bool = False,  # read segments of things and stuff
  derived_labels: str | None = None,  # derives the labels from other features; a key of `RULES`
) -> Splits:
  """Opens a prepared dataset; its features determine the kind of its examples.

  Boxes: detection; label maps, for which `label_key` is an image feature: segmentation; references:
  super-resolution; else classification. The location is `name`, `name/config`, either with
  `:version`, or the folder of `dataset_info.json`. FileNotFoundError without the prepared dataset;
  ValueError without these features, or where it cannot be read by index.
  """
  is_path = location.startswith((os.sep, "~", ".")) or os.path.isabs(location)
  folder = at_path(location) if is_path or "://" in location else _find(location, data_dir)
  keys = (image_key, label_key)
  return open_folder(folder, f"tfds:{location}", keys, derived_labels, panoptic=panoptic)


def open_folder(
  folder: epath.PathLike,
  name: str,  # in messages
  keys: tuple[str | None, str | None] = (None, None),  # features of images and labels
  derived_labels: str | None = None,
  *,
  panoptic: bool = False,
) -> Splits:
  """Opens the prepared dataset in `folder`."""
  try:
    builder = tfds.builder_from_directory(folder)
  except Exception as error:  # of protobuf and others, without the name of a file
    reason = " ".join(str(error).split())
    raise ValueError(f"{folder}: dataset_info.json or features.json: damaged ({reason})") from None
  features, whole, encoded = builder.info.features, DatasetInfo(name, 0), PAIR
  has_boxes = any(_has_boxes(features, key) for key in OBJECTS.values())
  if derived_labels is not None:
    whole, encoded, make = _derived(features, name, *keys, derived_labels)
  elif panoptic or (keys == (None, None) and has_boxes):
    whole, encoded, make = _objects(features, name, panoptic=panoptic)
  elif maps := _label_maps(features, *keys):
    encoded, make = maps, functools.partial(_map_example, keys=maps)
  elif keys[0] is None and set(PAIR) <= set(_images(features)):
    make = _pair_example
  else:
    image_key, label_key = _keys(features, name, *keys)
    whole = DatasetInfo(name, 0, *_classes(features, label_key))
    encoded = (image_key,)
    make = functools.partial(_labelled_example, image_key=image_key, label_key=label_key)
  decoders = dict.fromkeys(encoded, tfds.decode.SkipDecoding())  # left as stored
  opened = functools.partial(_open_split, builder, whole, decoders, make)
  return name_validation({s: functools.partial(opened, s) for s in builder.info.splits})


def _open_split(
  builder: Any, whole: DatasetInfo, decoders: dict[str, Any], make: Maker, split: str
) -> Source:
  info = builder.info.splits[split]
  if str(builder.info.file_format.value) == "tfrecord":
    files = [str(path) for path in info.filepaths]
    if "://" in files[0]:
      raise ValueError(
        f"{whole.name}: TFRecord files can be read by index only from a local disk; copy them "
        "there and convert them with python -m vit_jax_zoo.data.prepare --from_tfrecord"
      )
    decode = functools.partial(builder.info.features.deserialize_example_np, decoders=decoders)
    records = TFRecordFiles(files, info.shard_lengths, decode)
  else:
    records = builder.as_data_source(split, decoders=decoders)
  one = dataclasses.replace(whole, name=f"{whole.name} {split}", num_examples=info.num_examples)
  return TfdsSource(one, records, make)


def _labelled_example(record: Record, _: int, *, image_key: str, label_key: str | None) -> Example:
  """`label` is an int, or int32 [n] for several labels an image."""
  example = {"image": record[image_key]}
  if label_key is not None:
    label = record[label_key]
    # TFDS returns sequences as lists, an empty one without a type.
    several = isinstance(label, list | tuple | np.ndarray) and np.ndim(label) > 0
    example["label"] = np.asarray(label, np.int32).reshape(-1) if several else int(label)
  return example


class LabelRule(NamedTuple):
  """Label derived from the annotations of a record: VTAB's structured tasks.

  As in google-research/task_adaptation, for Zhai et al., "A Large-scale Study of Representation
  Learning with the Visual Task Adaptation Benchmark" (arXiv:1910.04867).
  """

  key: str  # feature that it reads
  num_classes: int
  label: Callable[[Any], int]  # of the feature's value
  image_scale: int = 1  # factor of the pixels; dSprites are stored as 0 and 1


def nearest_object(objects: Record) -> int:
  """CLEVR: interval of the distance to the nearest object."""
  distances = np.asarray(objects["pixel_coords"], np.float64).reshape(-1, 3)[:, 2]
  return _interval(distances.min(), (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0))


def nearest_vehicle(objects: Record) -> int:
  """KITTI: interval of the distance ahead, in metres, to the nearest car, van or truck, or none."""
  ahead = np.asarray(objects["location"], np.float64).reshape(-1, 3)[:, 2]
  vehicles = np.asarray(objects["type"], np.int64).reshape(-1) < 3  # Car, Van, Truck come first
  return _interval(min([1000.0, *ahead[vehicles].tolist()]), (-100.0, 8.0, 20.0, 999.0))


def _interval(value: float, starts: tuple[float, ...]) -> int:
  return int(np.flatnonzero(np.asarray(starts) < value).max())


RULES = {
  "clevr_count": LabelRule("objects", 8, lambda objects: len(objects["size"]) - 3),
  "clevr_distance": LabelRule("objects", 6, nearest_object),
  "kitti_distance": LabelRule("objects", 4, nearest_vehicle),
  # 32 columns, and 40 orientations, in 16 groups.
  "dsprites_x_position": LabelRule("label_x_position", 16, lambda x: int(x) // 2, 255),
  "dsprites_orientation": LabelRule("label_orientation", 16, lambda i: int(int(i) / 2.5), 255),
}


def _derived(
  features: Any, name: str, image_key: str | None, label_key: str | None, derived_labels: str
) -> Kind:
  if label_key is not None:
    raise ValueError(f"{derived_labels=} and {label_key=}: set one of them")
  check_names("derived_labels", [derived_labels], RULES)
  rule = RULES[derived_labels]
  image_key, _ = _keys(features, name, image_key, None)
  if rule.key not in features:
    raise ValueError(f"{name} has no feature {rule.key!r}; {derived_labels=} reads it")
  make = functools.partial(_derived_example, image_key=image_key, rule=derived_labels)
  return DatasetInfo(name, 0, rule.num_classes), _images(features), make


def _derived_example(record: Record, _: int, *, image_key: str, rule: str) -> Example:
  image, found = record[image_key], RULES[rule]  # by name: lambdas cannot be pickled
  if found.image_scale != 1:
    image = images.decode_image(image) * np.uint8(found.image_scale)
  return {"image": image, "label": found.label(record[found.key])}


def _label_maps(features: Any, image: str | None, label: str | None) -> tuple[str, str] | None:
  pictures, labels = _images(features), label or "segmentation_label"
  candidates = ("image", "image_left", *pictures) if image is None else (image,)
  found = next((key for key in candidates if key in pictures and key != labels), None)
  return None if found is None or labels not in pictures else (found, labels)


def _map_example(record: Record, index: int, *, keys: tuple[str, str]) -> Example:
  return {"image": record[keys[0]], "label_map": record[keys[1]], "image_id": index}


def _pair_example(record: Record, _: int) -> Example:
  return {key: record[key] for key in PAIR}


def _objects(features: Any, name: str, *, panoptic: bool) -> Kind:
  objects = OBJECTS[panoptic]
  if not _has_boxes(features, objects):
    kind = "panoptic segments" if panoptic else "objects with boxes"
    raise ValueError(f"{name} has no {kind}; its features are {', '.join(sorted(features))}")
  label = _inner(features, objects)["label"]
  names = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
  class_ids = coco_ids(names)
  if class_ids is not None:
    names = names_by_id(dict(zip(class_ids, names, strict=True)))
  encoded = ["image", "panoptic_image"] if panoptic else ["image"]
  make = functools.partial(_objects_example, panoptic=panoptic, class_ids=class_ids)
  return DatasetInfo(name, 0, len(names) or None, names), encoded, make


def _objects_example(
  record: Record, index: int, *, panoptic: bool, class_ids: tuple[int, ...] | None
) -> Example:
  """`class_ids` are those of the record's labels; None where labels are ids."""
  found, image = record[OBJECTS[panoptic]], record["image"]
  height, width = images.image_size(image)
  relative_yxyx = np.asarray(found["bbox"], np.float64).reshape(-1, 4)
  boxes = relative_yxyx[:, [1, 0, 3, 2]] * (width, height, width, height)
  labels = np.asarray(found["label"], np.int64)
  example = objects_example(
    image,
    int(record.get("image/id", index)),
    boxes,
    labels if class_ids is None else np.asarray(class_ids)[labels],
    is_crowd=found.get("is_crowd", np.zeros(len(labels), bool)),
    area=found.get("area", (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)),
    ids=found.get("id", np.zeros(len(labels))),
  )
  return {**example, "segment_image": record["panoptic_image"]} if panoptic else example


def _has_boxes(features: Any, key: str) -> bool:
  return key in features and "bbox" in _inner(features, key)


def _inner(features: Any, key: str) -> Any:
  return getattr(features[key], "feature", features[key])


def _keys(features: Any, name: str, image: str | None, label: str | None) -> tuple[str, str | None]:
  found = _images(features)
  if image is None and "image" in found:  # Pets also have a mask, smallNORB a second view
    image = "image"
  for given in (image, label):
    if given is not None and given not in features:
      raise ValueError(f"{name} has no feature {given!r}; it has {', '.join(sorted(features))}")
  if image is None and len(found) != 1:
    known = ", ".join(sorted(found)) or "none"
    raise ValueError(f"{name}: set image_key to one of the image features: {known}")
  labels = [key for key in ("label", "labels") if key in features]
  return image or found[0], label or (labels[0] if labels else None)


def _images(features: Any) -> list[str]:
  return [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]


def _classes(features: Any, label_key: str | None) -> tuple[int | None, tuple[str, ...]]:
  feature = _inner(features, label_key) if label_key else None
  if not isinstance(feature, tfds.features.ClassLabel):
    return None, ()
  # Without names TFDS counts 0, 1, 2, ...
  named = feature.num_classes is not None and getattr(feature, "_int2str", None) is not None
  return feature.num_classes, tuple(feature.names) if named else ()


class _Writer(tfds.dataset_builders.AdhocBuilder, skip_registration=True):
  def _split_generators(self, dl_manager: Any) -> dict[Any, Any]:
    del dl_manager  # AdhocBuilder's own method imports TensorFlow
    return {split: enumerate(records) for split, records in self._split_datasets.items()}


def write_dataset(
  name: str, features: Record, splits: RecordSplits, data_dir: str | os.PathLike, *, shuffle: bool
) -> pathlib.Path:
  """Writes records as ArrayRecord, without TensorFlow and TFDS's messages; returns the folder."""
  builder = _Writer(
    name=name,
    version="1.0.0",
    features=tfds.features.FeaturesDict(features),
    split_datasets=splits,
    data_dir=data_dir,
    file_format="array_record",
    disable_shuffling=not shuffle,
  )
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare()
  finally:
    tfds.enable_progress_bar()
  return pathlib.Path(builder.data_dir)


def default_data_dir() -> epath.Path:
  """Returns TFDS's default folder of datasets."""
  return epath.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def at_path(location: str) -> epath.Path:
  """Returns the innermost folder of a prepared dataset, or FileNotFoundError."""
  folder = epath.Path(location).expanduser()
  if not (folder / "dataset_info.json").exists():
    problem = "has no dataset_info.json" if folder.exists() else "does not exist"
    expected = "the innermost folder of a prepared dataset, such as .../imagenet2012/5.1.0"
    raise FileNotFoundError(f"tfds:{location} {problem}; expected {expected}")
  return folder


def _find(location: str, data_dir: str | None) -> epath.Path:
  name, _, version = location.partition(":")
  root = epath.Path(data_dir).expanduser() if data_dir else default_data_dir()
  versions = _versions(root / name)
  if found := [folder for folder in versions if version in ("", folder.name)]:
    return max(found, key=lambda folder: tuple(map(int, folder.name.split("."))))
  available = f" (available: {', '.join(f.name for f in versions)})" if versions else ""
  target = "... locally and copy the result" if "://" in str(root) else root
  raise FileNotFoundError(
    f"tfds:{location} is not prepared in {root}{available}; run python -m vit_jax_zoo.data.prepare "
    f"--dataset={location} --data_dir={target}, or use demo:digits, which needs no data"
  )


def _versions(folder: epath.Path) -> list[epath.Path]:
  if not folder.is_dir():
    return []
  inside = sorted(f for f in folder.iterdir() if (f / "dataset_info.json").exists())
  if versions := [f for f in inside if re.fullmatch(r"\d+\.\d+\.\d+", f.name)]:
    return versions
  configs = [f for f in folder.iterdir() if f.is_dir() and _versions(f)]
  return _versions(configs[0]) if len(configs) == 1 else []


_HEADER, _FOOTER = 12, 4


class TFRecordFiles:
  """Records of TFRecord files by index; each file is indexed at its first access.

  A file is a sequence of records: uint64 length, uint32 CRC of the length, data, uint32 CRC of the
  data, all little-endian (tensorflow/core/lib/io/record_writer.h).
  """

  def __init__(
    self, files: Sequence[str], lengths: Sequence[int], decode: Callable[[bytes], Any]
  ) -> None:
    self._files, self._decode = list(files), decode
    self._ends = list(itertools.accumulate(lengths))
    self._indices: dict[str, np.ndarray] = {}

  def __getitem__(self, index: int) -> Any:
    shard = bisect.bisect_right(self._ends, index)
    first, path = self._ends[shard - 1] if shard else 0, self._files[shard]
    if path not in self._indices:
      found = np.array(list(_index(path)), np.int64).reshape(-1, 2)
      if len(found) != self._ends[shard] - first:
        problem = f"{path} has {len(found)} whole records, expected {self._ends[shard] - first}"
        raise ValueError(f"{problem} by dataset_info.json; copy the file of this version again")
      self._indices[path] = found
    start, length = self._indices[path][index - first]
    with open(path, "rb") as file:
      file.seek(start)
      return self._decode(file.read(length))


def _index(path: str) -> Iterator[tuple[int, int]]:
  """Yields (offset, length) of the data of every whole record."""
  size, start = os.path.getsize(path), _HEADER
  with open(path, "rb") as file:
    while start + _FOOTER <= size:
      file.seek(start - _HEADER)
      length = int.from_bytes(file.read(8), "little")
      if start + length + _FOOTER > size:
        return
      yield start, length
      start += length + _FOOTER + _HEADER
