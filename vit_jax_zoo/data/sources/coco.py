"""Your own images with boxes, outlines or segments, in COCO's format.

    annotations/instances_train2017.json  train2017/*.jpg  (images/train2017/*.jpg as well)
    annotations/panoptic_train2017.json   annotations/panoptic_train2017/*.png    panoptic=True
    train/_annotations.coco.json          train/*.jpg      (Roboflow's)

The splits are called `train` and `val`, without the year, and by their whole names, `train2017`.

Class ids are those of the file, as in the official DETR: COCO's 80 classes have ids from 1 to 90,
so `num_classes` is 91, the highest id + 1, and a detector's "no object" comes behind them, as the
class `num_classes`. Nothing is renumbered, on the way in or out; ids in the gaps are never learned.
Whoever makes a file counts from 0 or from 1, as they like: `num_classes` follows.
"""

import collections
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from vit_jax_zoo.data.sources.base import DatasetInfo, Example, Source, Splits, name_validation
from vit_jax_zoo.data.transforms.detection import objects_example

_THING_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, -, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
bear, zebra, giraffe, -, backpack, umbrella, -, -, handbag, tie, suitcase, frisbee, skis,
snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, -, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich,
orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, -,
dining table, -, -, toilet, -, tv, laptop, mouse, remote, keyboard, cell phone, microwave,
oven, toaster, sink, refrigerator, -, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush
"""

THINGS = {
  number: name
  for number, name in enumerate(map(str.strip, _THING_NAMES.split(",")), start=1)
  if name != "-"
}
"""Names by id."""

STUFF = {
  92: "banner", 93: "blanket", 95: "bridge", 100: "cardboard", 107: "counter", 109: "curtain",
  112: "door-stuff", 118: "floor-wood", 119: "flower", 122: "fruit", 125: "gravel", 128: "house",
  130: "light", 133: "mirror-stuff", 138: "net", 141: "pillow", 144: "platform",
  145: "playingfield", 147: "railroad", 148: "river", 149: "road", 151: "roof", 154: "sand",
  155: "sea", 156: "shelf", 159: "snow", 161: "stairs", 166: "tent", 168: "towel",
  171: "wall-brick", 175: "wall-stone", 176: "wall-tile", 177: "wall-wood", 178: "water-other",
  180: "window-blind", 181: "window-other", 184: "tree-merged", 185: "fence-merged",
  186: "ceiling-merged", 187: "sky-other-merged", 188: "cabinet-merged", 189: "table-merged",
  190: "floor-other-merged", 191: "pavement-merged", 192: "mountain-merged", 193: "grass-merged",
  194: "dirt-merged", 195: "paper-merged", 196: "food-other-merged", 197: "building-other-merged",
  198: "rock-merged", 199: "wall-other-merged", 200: "rug-merged",
}  # fmt: skip
"""Names by id, of the panoptic annotations."""

NOT_A_CLASS = "N/A"
"""Stands for the ids in the gaps."""


def names_by_id(names: Mapping[int, str]) -> tuple[str, ...]:
  """Returns a name for each id from 0 to the highest, `NOT_A_CLASS` for those that have none."""
  return tuple(names.get(i, NOT_A_CLASS) for i in range(max(names, default=-1) + 1))


def coco_ids(names: Sequence[str]) -> tuple[int, ...] | None:
  """Returns the ids of COCO's classes in this order; None if these are not COCO's 80 or 133."""
  for classes in (THINGS, THINGS | STUFF):
    ids = {name: number for number, name in classes.items()}
    if set(names) == set(ids):
      return tuple(ids[name] for name in names)
  return None


ROBOFLOW = "_annotations.coco.json"
NAMED = 5
"""So many boxes without area are named in the log."""


class _Split(NamedTuple):
  """One annotation file, its images' folder, and that of its segment images."""

  json: pathlib.Path
  images: pathlib.Path
  segments: pathlib.Path | None = None


class CocoSource(Source):
  """The images of an annotation file; examples are those of `data/objects.py`."""

  def __init__(
    self,
    info: DatasetInfo,
    images: Sequence[Mapping[str, Any]],
    annotations: Mapping[int, Any],
    split: _Split,
  ) -> None:
    self.info = info
    self._images = images
    # As text again: COCO's outlines take a fifth of the memory so, here and in every worker.
    self._annotations = {key: json.dumps(value).encode() for key, value in annotations.items()}
    self._folder, self._segments = str(split.images), split.segments and str(split.segments)

  def __getitem__(self, index: int) -> Example:
    image = self._images[index]
    objects, png = json.loads(self._annotations.get(image["id"], b"[[], null]"))
    boxes = np.array([o["bbox"] for o in objects], np.float64).reshape(-1, 4)
    example = objects_example(
      _read(self.example_name(index)),
      image["id"] if isinstance(image["id"], int) else index,
      np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
      [o["category_id"] for o in objects],
      is_crowd=[o.get("iscrowd", 0) for o in objects],
      area=[o.get("area", o["bbox"][2] * o["bbox"][3]) for o in objects],
      ids=[o["id"] if isinstance(o.get("id"), int) else 0 for o in objects],
    )
    example["annotated_size"] = self.image_size(index)
    if self._segments is not None:
      example["segment_image"] = _read(os.path.join(self._segments, png)) if png else b""
    elif all("segmentation" in o for o in objects):
      example["outlines"] = [o["segmentation"] for o in objects]
    return example

  def example_name(self, index: int) -> str:
    """Returns the path of the image."""
    return os.path.join(self._folder, self._images[index]["file_name"])

  def image_size(self, index: int) -> tuple[int, int]:
    """Returns what the annotations say; `load_objects` holds it against the image."""
    return self._images[index]["height"], self._images[index]["width"]


def open_splits(location: str, *, panoptic: bool = False, annotated_only: bool = False) -> Splits:
  """Finds the annotation files below a folder.

  Args:
    location: the folder, on a disk of this machine.
    panoptic: read the files `panoptic_*.json`: segments of things and stuff.
    annotated_only: leave out images without any annotation, of which COCO has about one in a
      hundred; the official DETR trains on them, torchvision's detectors do not.

  Raises:
    FileNotFoundError: there is no such folder, or an image or folder that belongs there is missing.
    ValueError: it holds no annotations, or broken ones.
  """
  root = pathlib.Path(location).expanduser()
  if not root.is_dir():
    raise FileNotFoundError(
      f"coco:{location} is not a folder on a local disk; expected annotations/instances_*.json in "
      "it, and the images beside (demo:scenes needs no files)"
    )
  found = dict(_find(root, panoptic=panoptic))
  if not found:
    wanted = "panoptic_*.json" if panoptic else f"instances_*.json, nor a folder with {ROBOFLOW}"
    raise ValueError(f"{root} has no annotations/{wanted}")
  opened = {
    name: functools.cache(
      functools.partial(_open, f"coco:{location}", name, split, annotated_only=annotated_only)
    )
    for name, split in found.items()
  }
  short = {re.sub(r"_?(19|20)\d\d$", "", name): source for name, source in opened.items()}
  return name_validation({**opened, **short} if len(short) == len(opened) else opened)


def _find(root: pathlib.Path, *, panoptic: bool) -> Iterator[tuple[str, _Split]]:
  """Yields each split's name and files."""
  prefix = "panoptic_" if panoptic else "instances_"
  for file in sorted((root / "annotations").glob(f"{prefix}*.json")):
    name = file.stem.removeprefix(prefix)
    places = (root / name, root / "images" / name, root / "images", root)
    images = next(folder for folder in places if folder.is_dir())
    segments = None
    if panoptic:
      folders = (file.parent / f"panoptic_{name}", root / f"panoptic_{name}")
      segments = next((folder for folder in folders if folder.is_dir()), None)
      if segments is None:
        raise FileNotFoundError(f"{folders[0]} is missing: the segment images (*.png) of {file}")
    yield name, _Split(file, images, segments)
  if not panoptic:
    for file in sorted(root.glob(f"*/{ROBOFLOW}")):
      yield file.parent.name, _Split(file, file.parent)


def _open(dataset: str, name: str, split: _Split, *, annotated_only: bool) -> Source:
  try:
    data = json.loads(split.json.read_text())
    images, categories = data["images"], {c["id"]: c["name"] for c in data["categories"]}
    annotations = _by_image(data["annotations"], panoptic=split.segments is not None)
    _check_images(split, images)
    if not categories:
      raise ValueError(f"{split.json} lists no categories")
    _check_objects(split, images, annotations, categories)
  except (KeyError, TypeError, json.JSONDecodeError) as error:
    raise ValueError(f"{split.json} is not in COCO's format: {error!r}") from error
  if annotated_only:
    images = [image for image in images if annotations.get(image["id"], ([], None))[0]]
  info = DatasetInfo(
    name=f"{dataset} {name}",
    num_examples=len(images),
    num_classes=max(categories) + 1,
    class_names=names_by_id(categories),
  )
  return CocoSource(info, images, annotations, split)


def _by_image(annotations: Sequence[Mapping[str, Any]], *, panoptic: bool) -> dict[int, Any]:
  """Returns each image's objects, and its segment image."""
  if panoptic:
    return {a["image_id"]: (a["segments_info"], a["file_name"]) for a in annotations}
  found: dict[int, Any] = collections.defaultdict(lambda: ([], None))
  for annotation in annotations:
    found[annotation["image_id"]][0].append(annotation)
  return dict(found)


def _check_images(split: _Split, images: Sequence[Mapping[str, Any]]) -> None:
  if not images:
    raise ValueError(f"{split.json} lists no images")
  for image in (images[0], images[-1]):  # asking for all of them takes long on slow disks
    if not (split.images / image["file_name"]).is_file():
      raise FileNotFoundError(
        f"{split.images / image['file_name']} is missing; {split.json} lists it"
      )


def _check_objects(
  split: _Split,
  images: Sequence[Mapping[str, Any]],
  annotations: Mapping[int, Any],
  categories: Mapping[int, str],
) -> None:
  """Checks classes, and says which boxes training will leave out."""
  files = {image["id"]: image for image in images}
  flat = []
  for image_id, (objects, _) in annotations.items():
    if image_id not in files:
      raise ValueError(f"{split.json}: annotations of image {image_id}, which is not listed")
    for o in objects:
      if o["category_id"] not in categories:
        raise ValueError(
          f"{split.json}: annotation {o.get('id')} of {files[image_id]['file_name']} has category "
          f"{o['category_id']}, which is not listed (known: {min(categories)}..{max(categories)})"
        )
      if not o.get("iscrowd") and not _has_area(o["bbox"], files[image_id]):
        flat.append(f"{o.get('id')} of {files[image_id]['file_name']}")
  crowds = sum(bool(o.get("iscrowd")) for objects, _ in annotations.values() for o in objects)
  if flat:
    logging.warning(
      "%s: %d boxes have no area in their image, training leaves them out: annotations %s%s",
      split.json,
      len(flat),
      ", ".join(flat[:NAMED]),
      ", ..." if len(flat) > NAMED else "",
    )
  if crowds:
    logging.info("%s: training leaves out %d crowds; scoring knows them", split.json, crowds)


def _has_area(bbox: Sequence[float | int], image: Mapping[str, Any]) -> bool:
  left, top, width, height = bbox
  wide = min(left + width, image["width"]) > max(left, 0)
  return wide and min(top + height, image["height"]) > max(top, 0)


def _read(file: str) -> bytes:
  try:
    with open(file, "rb") as stream:
      return stream.read()
  except FileNotFoundError:
    raise FileNotFoundError(f"{file} is missing, and the annotations list it") from None
