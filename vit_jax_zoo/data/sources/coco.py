"""Your own images with boxes, outlines or segments, in COCO's format or Roboflow's layout of it.

The splits are called `train` and `val`, without the year, and by their whole names, `train2017`.
`data/sources/coco_file.py` checks the whole annotation file first.

Class ids are the file's, as in the official DETR: COCO's 80 classes have ids from 1 to 90, so
`num_classes` is 91, the highest id + 1, and a detector's "no object" is the class `num_classes`.
Ids are not renumbered; those in the gaps have no examples. Files may count from 0 or from 1.
"""

import concurrent.futures
import functools
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from vit_jax_zoo.data import images as image_files
from vit_jax_zoo.data.sources import base
from vit_jax_zoo.data.sources.coco_file import CocoFile, read_coco
from vit_jax_zoo.data.transforms.detection import objects_example
from vit_jax_zoo.errors import check_names

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

_NUMBERED = enumerate(re.split(r",\s+", _THING_NAMES.strip()), start=1)
THINGS = {number: name for number, name in _NUMBERED if name != "-"}
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
"""Names by id in the panoptic annotations."""

NOT_A_CLASS = "N/A"  # name of the ids in the gaps


def names_by_id(names: Mapping[int, str]) -> tuple[str, ...]:
  """Returns a name for each id from 0 to the highest, `NOT_A_CLASS` for those that have none."""
  return tuple(names.get(i, NOT_A_CLASS) for i in range(max(names, default=-1) + 1))


def coco_ids(names: Sequence[str]) -> tuple[int, ...] | None:
  """Returns the ids of COCO's 80 or 133 classes in this order; None for other classes."""
  for classes in (THINGS, THINGS | STUFF):
    ids = {name: number for number, name in classes.items()}
    if set(names) == set(ids):
      return tuple(ids[name] for name in names)
  return None


ROBOFLOW = "_annotations.coco.json"


class _Split(NamedTuple):
  json: pathlib.Path
  images: pathlib.Path  # folder of images
  segments: pathlib.Path | None = None  # folder of segment images


class CocoSource(base.Source):
  """Images of a checked annotation file; examples as in `transforms/detection.py`."""

  def __init__(
    self, info: base.DatasetInfo, content: CocoFile, split: _Split, rotated: Mapping[int, int]
  ) -> None:
    self.info = info
    self._images, self._pngs, self._rotated = content.images, content.segments, rotated
    # As text: COCO's outlines take a fifth of the memory, in this and in every worker process.
    self._objects = {key: json.dumps(value).encode() for key, value in content.objects.items()}
    self._folder, self._segments = str(split.images), split.segments and str(split.segments)
    objects = [item for items in content.objects.values() for item in items]
    self._has_outlines = not objects or any("segmentation" in item for item in objects)
    ids = [image["id"] for image in self._images]
    self._own_ids = all(isinstance(i, int) and abs(i) < 1 << 31 for i in ids)  # batches are int32

  def __getitem__(self, index: int) -> base.Example:
    image = self._images[index]
    objects = json.loads(self._objects.get(image["id"], b"[]"))
    boxes = np.array([o.get("bbox", (0, 0, 0, 0)) for o in objects], np.float64).reshape(-1, 4)
    file, *png = self._files(index)
    example = objects_example(
      image_files.read_file(file),
      image["id"] if self._own_ids else index,
      np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
      [o["category_id"] for o in objects],
      is_crowd=[o["iscrowd"] for o in objects],
      area=[o["area"] for o in objects],
      ids=[o["id"] for o in objects],
    )
    if not self._own_ids:
      example["file_image_id"] = image["id"]  # of any size or type, for messages
    example["annotated_size"] = (image["height"], image["width"])
    if index in self._rotated:
      example["annotation_orientation"] = self._rotated[index]
    if png:
      del example["boxes_xyxy"]  # they follow from the segments, as in the official DETR
      example["segment_image"] = image_files.read_file(png[0])
    elif self._has_outlines:
      example["outlines"] = [o.get("segmentation") for o in objects]
    return example

  def _files(self, index: int) -> list[str]:
    image = self._images[index]
    files = [base.file_path(self._folder, image["file_name"])]
    if self._segments is not None:
      files.append(base.file_path(str(self._segments), self._pngs[image["id"]]))
    return files

  def example_name(self, index: int) -> str:
    return " with segments ".join(self._files(index))

  def image_size(self, index: int) -> tuple[int, int]:
    """Returns the upright size by the annotations; `load_objects` compares it with the image."""
    height, width = self._images[index]["height"], self._images[index]["width"]
    return (width, height) if self._rotated.get(index, 1) >= 5 else (height, width)

  def missing(self) -> list[int]:
    return base.missing_files([self._files(index) for index in range(len(self))])


def open_splits(
  location: str,
  *,
  panoptic: bool = False,  # read `panoptic_*.json`: segments of things and stuff
  annotated_only: bool = False,  # leave out images without annotations, as torchvision, not DETR
  exif_frame: str = "auto",  # of annotations of EXIF-rotated images; "upright", "stored"
) -> base.Splits:
  """Finds the annotation files below a local folder.

  About 1 % of COCO's images have no annotations. The automatic frame is that of the sizes in the
  annotation file. FileNotFoundError without the folder, or that of segment images; ValueError
  without annotations, or if the annotation file is refused.
  """
  check_names("exif_frame", [exif_frame], ("auto", "upright", "stored"))
  expected = "annotations/instances_*.json and folders of images (demo:scenes needs no files)"
  root = base.local_folder("coco", location, expected)
  found = dict(_find(root, panoptic=panoptic))
  if not found:
    expected = "panoptic_*.json" if panoptic else f"instances_*.json, or a folder with {ROBOFLOW}"
    other = [*(root / "annotations").glob(f"{'instances' if panoptic else 'panoptic'}_*.json")]
    hint = f"; {other[0].name} needs panoptic={not panoptic}" if other else ""
    raise ValueError(f"{root}: no annotation files; expected annotations/{expected}{hint}")
  options = dict(annotated_only=annotated_only, exif_frame=exif_frame)
  opened = {
    name: functools.cache(functools.partial(_open, f"coco:{location} {name}", split, **options))
    for name, split in found.items()
  }
  short = {re.sub(r"_?(19|20)\d\d$", "", name): source for name, source in opened.items()}
  return base.name_validation({**opened, **short} if len(short) == len(opened) else opened)


def _find(root: pathlib.Path, *, panoptic: bool) -> Iterator[tuple[str, _Split]]:
  prefix = "panoptic_" if panoptic else "instances_"
  for file in filter(os.path.isfile, sorted((root / "annotations").glob(f"{prefix}*.json"))):
    name = file.stem.removeprefix(prefix)
    candidates = (root / name, root / "images" / name, root / "images", root)
    images = next(folder for folder in candidates if folder.is_dir())
    segments = None
    if panoptic:
      folders = (file.parent / f"panoptic_{name}", root / f"panoptic_{name}")
      segments = next((folder for folder in folders if folder.is_dir()), None)
      if segments is None:
        raise FileNotFoundError(f"{folders[0]} is missing: the segment images (*.png) of {file}")
    yield name, _Split(file, images, segments)
  if not panoptic:
    for file in filter(os.path.isfile, sorted(root.glob(f"*/{ROBOFLOW}"))):
      yield file.parent.name, _Split(file, file.parent)


def _open(name: str, split: _Split, *, annotated_only: bool, exif_frame: str) -> base.Source:
  content = read_coco(split.json, panoptic=split.segments is not None)
  if annotated_only:
    annotated = [image for image in content.images if content.objects.get(image["id"])]
    content = content._replace(images=annotated)
  info = base.DatasetInfo(
    name=name,
    num_examples=len(content.images),
    num_classes=max(content.categories) + 1,
    class_names=names_by_id(content.categories),
    max_objects=max(map(len, content.objects.values()), default=0),
    num_objects=sum(not o["iscrowd"] for items in content.objects.values() for o in items),
    stuff_from=_stuff_from(split.json, content) if split.segments is not None else None,
    annotations=hashlib.blake2b(split.json.read_bytes(), digest_size=6).hexdigest(),
  )
  return CocoSource(info, content, split, _rotated(split, content.images, exif_frame))


def _stuff_from(file: pathlib.Path, content: CocoFile) -> int | None:
  """Returns the first id of the stuff classes; None without `isthing`."""
  if content.stuff is None:
    return None
  things = content.categories.keys() - content.stuff
  first = min(content.stuff, default=max(content.categories) + 1)
  if things and max(things) > first:
    raise ValueError(f"{file}: category {max(things)} is a thing, {first} stuff; number stuff last")
  return first


_SAMPLE = 256  # images whose headers are read; all are, if one is rotated or of another size


def _rotated(split: _Split, images: Sequence[Mapping[str, Any]], exif_frame: str) -> dict[int, int]:
  """Returns EXIF orientations where annotations are in the stored frame; logs wrong sizes."""
  sizes = [(image["height"], image["width"]) for image in images]
  sample = range(0, len(images), math.ceil(len(images) / _SAMPLE) or 1)
  headers = _read_headers(split, images, sample)
  if len(sample) < len(images) and any(h != (*sizes[i], 1) for i, h in headers.items()):
    headers = _read_headers(split, images, range(len(images)))
  turns = {i: turn for i, (_, _, turn) in headers.items() if turn != 1}
  turned = [i for i, (height, width, turn) in headers.items() if turn >= 5 and height != width]
  stored = sum(sizes[i] == headers[i][:2] for i in turned)
  upright = sum(sizes[i][::-1] == headers[i][:2] for i in turned)
  frame = exif_frame if exif_frame != "auto" else ("stored" if stored > upright else "upright")
  if turns:
    logging.info(
      "%s: %d images are rotated by EXIF; assuming annotations in the %s frame (sizes: %d "
      "stored, %d upright); set exif_frame='upright' or 'stored' to change it",
      split.json, len(turns), frame, stored, upright,
    )  # fmt: skip
  wrong = []
  for i, (height, width, turn) in headers.items():
    size = (width, height) if frame == "upright" and turn >= 5 else (height, width)
    if size != sizes[i]:
      wrong.append(f"{images[i]['file_name']}: {size} for {sizes[i]}")
  if wrong:
    text = "%s: %d images are not of their annotated (height, width) and cannot be used: %s"
    logging.warning(text, split.json, len(wrong), ", ".join(wrong[:3]))
  return turns if frame == "stored" else {}


def _read_headers(
  split: _Split, images: Sequence[Mapping[str, Any]], indices: Sequence[int]
) -> dict[int, tuple[int, int, int]]:
  """Returns stored height, width and EXIF orientation by index, of the images that can be read."""

  def read(index: int) -> tuple[int, int, int] | None:
    try:
      return image_files.read_header(base.file_path(str(split.images), images[index]["file_name"]))
    except base.CorruptExampleError:
      return None

  with concurrent.futures.ThreadPoolExecutor() as threads:
    found = zip(indices, threads.map(read, indices), strict=True)
    return {index: header for index, header in found if header is not None}
