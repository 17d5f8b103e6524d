"""Reads a COCO annotation file and checks all of it in one pass.

Every kind of problem is reported once, with its count and its first example:

* refused: duplicate ids, missing or wrong fields, boxes that are not 4 numbers, unknown images or
  categories, category ids above `MAX_CATEGORY`;
* left out of the data: annotations with NaN in their box, and images without panoptic annotation;
* left out where masks are used: objects without a usable outline;
* left out in training alone: crowds, and boxes without area in their image;
* logged: no annotations, boxes in [0, 1], text where a number belongs, one file or name twice.
"""

import collections
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

MAX_CATEGORY = 99_999
"""Category ids are class ids, and a classifier has one output for each up to the largest."""

_MAX_SEGMENT = 1 << 24  # segment ids are colors of 24 bits


class CocoFile(NamedTuple):
  """Checked content of an annotation file.

  Attributes:
    images: `id`, `file_name`, `height`, `width` of each.
    objects: those of each image, by image id: `id`, `bbox`, `category_id`, `iscrowd` and `area`;
      `segmentation` where the file has outlines, None for an unusable one.
    segments: file name of the segment image by image id; empty for detection.
    categories: names by id.
    stuff: ids of the categories with `isthing` 0.
  """

  images: list[dict[str, Any]]
  objects: dict[Any, list[dict[str, Any]]]
  segments: dict[Any, str]
  categories: dict[int, str]
  stuff: frozenset[int]


def read_coco(file: pathlib.Path, *, panoptic: bool) -> CocoFile:
  """Reads and checks an annotation file.

  Raises:
    ValueError: it is refused; the message lists every reason.
  """
  data = _load(file)
  problems = _Problems(file)
  categories, stuff = _categories(data["categories"], problems)
  images = _images(data["images"], problems)
  problems.raise_refused()
  if not images:
    raise ValueError(f"{file}: images is empty; expected at least one image")
  if not categories:
    raise ValueError(f"{file}: categories is empty; expected id and name of each class")
  check = _Annotations({image["id"]: image for image in images}, categories, problems)
  for annotation in data["annotations"]:
    check.add(annotation, panoptic=panoptic)
  problems.raise_refused()
  if panoptic:
    images = check.annotated(images)
  check.report_boxes()
  problems.log()
  if not any(check.objects.values()):
    logging.warning("%s: annotations is empty: nothing can be learned from these images", file)
  return CocoFile(images, check.finished(), check.segments, categories, stuff)


def read_images(file: pathlib.Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Returns `id`, `file_name`, `height`, `width` of each image, and the categories as in the file.

  Reads a file with or without annotations, such as a test set; raises as `read_coco`.
  """
  data = _load(file, ("images", "categories"))
  problems = _Problems(file)
  images = _images(data["images"], problems)
  _categories(data["categories"], problems)
  problems.raise_refused()
  problems.log()
  return images, data["categories"]


class _Problems:
  """Problems by kind, with an example for each time."""

  def __init__(self, file: pathlib.Path) -> None:
    self._file = file
    self._refused: dict[str, list[str]] = {}
    self._warned: dict[str, list[str]] = {}

  def refuse(self, kind: str, example: str) -> None:
    self._refused.setdefault(kind, []).append(example)

  def warn(self, kind: str, example: str) -> None:
    self._warned.setdefault(kind, []).append(example)

  def raise_refused(self) -> None:
    if self._refused:
      raise ValueError(f"{self._file}: {'; '.join(map(_line, self._refused.items()))}")

  def log(self) -> None:
    for problem in self._warned.items():
      logging.warning("%s: %s", self._file, _line(problem))


def _line(problem: tuple[str, Sequence[str]]) -> str:
  kind, examples = problem
  more = ", ..." if len(examples) > 3 else ""
  return f"{len(examples)} x {kind} ({', '.join(examples[:3])}{more})"


def _load(
  file: pathlib.Path, lists: Sequence[str] = ("images", "annotations", "categories")
) -> dict[str, Any]:
  try:
    data = json.loads(file.read_bytes())  # UTF-8, -16 or -32, with a byte order mark or without
  except UnicodeDecodeError as error:
    raise ValueError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
  except (json.JSONDecodeError, RecursionError) as error:
    raise ValueError(f"{file}: not JSON ({error})") from None
  for key in lists:
    found = data.get(key) if isinstance(data, dict) else None
    if not isinstance(found, list):
      raise ValueError(
        f"{file} is not in COCO's format: {key} is missing; expected an object with the lists "
        f"{', '.join(lists)}"
      )
    for item in found:
      if not isinstance(item, dict):
        raise ValueError(f"{file} is not in COCO's format: {key} has {_short(item)}, not an object")
  return data


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + "..."


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _categories(
  given: Sequence[Mapping[str, Any]], problems: _Problems
) -> tuple[dict[int, str], frozenset[int]]:
  names: dict[int, str] = {}
  stuff = set()
  for category in given:
    number, name = category.get("id"), category.get("name")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
      problems.refuse("category without an integer id of at least 0", _short(category))
    elif not isinstance(name, str):
      problems.refuse("category without a name", f"id {number}")
    elif number > MAX_CATEGORY:
      problems.refuse(
        f"category id above {MAX_CATEGORY}; ids are class ids: number them from 0 or 1",
        f"id {number}",
      )
    elif names.get(number, name) != name:
      problems.refuse("category id with two names", f"id {number}: {names[number]}, {name}")
    else:
      if number in names or name in names.values():
        problems.warn("category that is listed twice", f"id {number}, {name}")
      names[number] = name
      if not category.get("isthing", 1):
        stuff.add(number)
  return names, frozenset(stuff)


def _images(given: Sequence[Mapping[str, Any]], problems: _Problems) -> list[dict[str, Any]]:
  images: dict[Any, dict[str, Any]] = {}
  files: dict[str, Any] = {}
  for image in given:
    number, file = image.get("id"), image.get("file_name")
    size = image.get("height"), image.get("width")
    if not isinstance(number, int | str) or isinstance(number, bool):
      problems.refuse("image without an id (an integer or text)", _short(file))
    elif not isinstance(file, str) or not file:
      problems.refuse("image without file_name", f"image {number}")
    elif not all(isinstance(side, int) and side > 0 for side in size):
      problems.refuse(
        "image without height and width in pixels", f"image {number}, {file}: {_short(size)}"
      )
    elif number in images:
      problems.refuse("image id twice", f"{number}: {images[number]['file_name']}, {file}")
    else:
      if file in files:
        problems.warn("image file that is listed twice", f"{file}: images {files[file]}, {number}")
      files[file] = number
      images[number] = {"id": number, "file_name": file, "height": size[0], "width": size[1]}
  return list(images.values())


class _RefusedError(Exception):
  """Kind and example of a problem for which the file is refused."""


class _Annotations:
  """Collects the annotations of each image, as they are checked."""

  def __init__(
    self, images: Mapping[Any, Mapping[str, Any]], categories: Mapping[int, str],
    problems: _Problems,
  ) -> None:  # fmt: skip
    self.objects: dict[Any, list[dict[str, Any]]] = collections.defaultdict(list)
    self.segments: dict[Any, str] = {}
    self._images, self._categories, self._problems = images, categories, problems
    self._outlines = self._boxes = self._small = self._crowds = 0

  def add(self, annotation: Mapping[str, Any], *, panoptic: bool) -> None:
    """Adds an object with a box, or the segments of an image."""
    try:
      (self._add_segments if panoptic else self._add_object)(annotation)
    except _RefusedError as problem:
      self._problems.refuse(*problem.args)

  def _add_object(self, annotation: Mapping[str, Any]) -> None:
    image = self._image(annotation)
    where = f"annotation {annotation.get('id')} of {image['file_name']}"
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
      kind = "bbox that is not 4 numbers (left, top, width, height)"
      raise _RefusedError(kind, f"{where}: {_short(box)}")
    found = self._object(annotation, where)
    if not all(map(math.isfinite, box)):
      self._problems.warn("bbox with NaN or infinity, left out", where)
      return
    if not found["iscrowd"] and not _has_area(box, image):
      self._problems.warn("bbox without area in its image, left out in training", where)
    self._boxes += 1
    self._small += max(box) <= 1 and min(box) >= 0
    self._crowds += found["iscrowd"]
    found = {"area": box[2] * box[3], **found, "bbox": box}
    if annotation.get("segmentation") is not None:
      outline, problem = _usable_outline(annotation["segmentation"], image)
      if problem:
        self._problems.warn(f"outline with {problem}", where)
      self._outlines += outline is not None
      found["segmentation"] = outline
    self.objects[image["id"]].append(found)

  def _add_segments(self, annotation: Mapping[str, Any]) -> None:
    image = self._image(annotation)
    file, png = image["file_name"], annotation.get("file_name")
    segments = annotation.get("segments_info")
    if not isinstance(segments, list) or not isinstance(png, str):
      kind = "panoptic annotation without segments_info and file_name"
      raise _RefusedError(kind, f"image {file}")
    if image["id"] in self.segments:
      raise _RefusedError("image with two panoptic annotations", file)
    self.segments[image["id"]] = png
    known = set()
    for segment in segments:
      number = segment.get("id") if isinstance(segment, dict) else None
      where = f"segment {_short(number)} of {file}"
      try:
        if not isinstance(number, int) or not 0 < number < _MAX_SEGMENT or number in known:
          raise _RefusedError("segment without an id of its own (1 to 16777215)", where)
        known.add(number)
        found = self._object(segment, where)
      except _RefusedError as problem:
        self._problems.refuse(*problem.args)
      else:
        self._crowds += found["iscrowd"]
        self.objects[image["id"]].append({"area": 0.0, **found})

  def annotated(self, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the images with a panoptic annotation."""
    for image in images:
      if image["id"] not in self.segments:
        self._problems.warn("image without panoptic annotation, left out", image["file_name"])
    return [image for image in images if image["id"] in self.segments]

  def report_boxes(self) -> None:
    """Reports what only all boxes together show."""
    if self._boxes and self._small == self._boxes:
      self._problems.warn(
        "dataset whose boxes all lie in [0, 1]; expected pixels: left, top, width, height",
        f"{self._boxes} boxes",
      )
    if self._crowds:
      logging.info("%d crowds, left out in training and known in scoring", self._crowds)

  def finished(self) -> dict[Any, list[dict[str, Any]]]:
    """Returns the objects by image; without outlines if none is usable."""
    if not self._outlines:
      for objects in self.objects.values():
        for found in objects:
          found.pop("segmentation", None)
    return dict(self.objects)

  def _image(self, annotation: Mapping[str, Any]) -> Mapping[str, Any]:
    number = annotation.get("image_id")
    if not isinstance(number, int | str) or number not in self._images:
      where = f"annotation {annotation.get('id')}: image {_short(number)}"
      raise _RefusedError("annotation of an image that is not listed", where)
    return self._images[number]

  def _object(self, annotation: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the fields that objects and segments share."""
    category, crowd = annotation.get("category_id"), annotation.get("iscrowd", 0)
    if isinstance(category, bool | float | list | dict) or category not in self._categories:
      known = f"{min(self._categories)}..{max(self._categories)}"
      kind = f"category_id that is not listed (known: {known})"
      raise _RefusedError(kind, f"{where}: {_short(category)}")
    if isinstance(crowd, str) and crowd in ("0", "1"):
      self._problems.warn("iscrowd that is text, read as a number", f"{where}: {crowd!r}")
      crowd = int(crowd)
    if crowd not in (0, 1, None):
      raise _RefusedError("iscrowd that is neither 0 nor 1", f"{where}: {_short(crowd)}")
    number, area = annotation.get("id"), annotation.get("area")
    found = {
      "id": number if isinstance(number, int) and abs(number) < 1 << 63 else 0,
      "category_id": category,
      "iscrowd": int(crowd or 0),
    }
    if area is not None and not (_is_number(area) and math.isfinite(area)):
      self._problems.warn("area that is not a number, taken from the box", where)
    elif area is not None:
      found["area"] = area
    return found


def _has_area(box: Sequence[float | int], image: Mapping[str, Any]) -> bool:
  left, top, width, height = box
  wide = min(left + width, image["width"]) > max(left, 0)
  return wide and min(top + height, image["height"]) > max(top, 0)


def _usable_outline(outline: Any, image: Mapping[str, Any]) -> tuple[Any, str]:
  """Returns the usable part of an outline, None if there is none, and what is wrong with it."""
  if isinstance(outline, dict):
    size = [image["height"], image["width"]]
    if outline.get("size") != size or not isinstance(outline.get("counts"), list | str):
      return None, f"run lengths that are not of the image's size {size}"
    return outline, ""
  if not isinstance(outline, list) or not outline:
    return None, "no polygon"
  problems = [_polygon_problem(polygon, image) for polygon in outline]
  pairs = zip(outline, problems, strict=True)
  usable = [_bounded(polygon, image) for polygon, problem in pairs if not problem]
  return usable or None, next(filter(None, problems), "")


def _polygon_problem(polygon: Any, image: Mapping[str, Any]) -> str:
  if not isinstance(polygon, list):
    return "coordinates outside of a polygon; expected [[x, y, x, y, ...], ...]"
  if len(polygon) < 6 or len(polygon) % 2:
    return "points as pairs" if _has_lists(polygon) else "fewer than 3 points or an odd coordinate"
  try:
    finite = math.isfinite(sum(polygon))
  except TypeError:
    return "points as pairs" if _has_lists(polygon) else "coordinates that are not numbers"
  if not finite:
    return "NaN or infinity"
  xs, ys = polygon[::2], polygon[1::2]
  left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
  if min(right, image["width"]) <= max(left, 0) or min(bottom, image["height"]) <= max(top, 0):
    return "no area in its image"
  return "" if len(xs) > 4 or _area(xs, ys) else "no area in its image"


def _has_lists(polygon: Sequence[Any]) -> bool:
  return any(isinstance(point, list | dict) for point in polygon)


def _area(xs: Sequence[float | int], ys: Sequence[float | int]) -> float | int:
  """Returns twice the signed area (the shoelace formula)."""
  following = zip([*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
  return sum(x * y2 - x2 * y for x, y, (x2, y2) in zip(xs, ys, following, strict=True))


_FAR = 10
"""Vertices are clipped to so many sides of the image: rasterising costs the length of an edge."""


def _bounded(polygon: list[float | int], image: Mapping[str, Any]) -> list[float | int]:
  limits = (_FAR * image["width"], _FAR * image["height"])
  if max(polygon) <= min(limits) and min(polygon) >= -min(limits):
    return polygon
  return [min(max(value, -limits[i % 2]), limits[i % 2]) for i, value in enumerate(polygon)]
