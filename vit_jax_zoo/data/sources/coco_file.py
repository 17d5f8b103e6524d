"""Reads a COCO annotation file and checks all of it in one pass.

Every kind of problem is reported once, with its count and its first example; the guide
docs/guides/detection.md lists which are refused, left out or logged.
"""

import collections
import itertools
import json
import math
import operator
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from absl import logging
from faster_coco_eval.core import mask as run_lengths
from faster_coco_eval.mask_api_new_cpp import toUncompressedRLE

from vit_jax_zoo.data.sources.base import composed
from vit_jax_zoo.errors import shorten

MAX_CATEGORY = 99_999  # ids are class ids: a classifier has one output for each up to the largest
_MAX_SEGMENT = 1 << 24  # segment ids are colors of 24 bits


class CocoFile(NamedTuple):
  """Checked content of an annotation file.

  Objects have `id`, `bbox`, `category_id`, `iscrowd` and `area`; `segmentation` where the file has
  outlines, None for an unusable one.
  """

  images: list[dict[str, Any]]  # `id`, `file_name`, `height`, `width` of each
  objects: dict[Any, list[dict[str, Any]]]  # by image id
  segments: dict[Any, str]  # file name of the segment image by image id; empty for detection
  categories: dict[int, str]  # names by id
  stuff: frozenset[int] | None  # ids of the categories with `isthing` 0; None: no `isthing` at all


def read_coco(file: pathlib.Path, *, panoptic: bool) -> CocoFile:
  """Reads and checks an annotation file; ValueError, with every reason, if it is refused."""
  data = _load(file, ("images", "annotations", "categories"))
  check = _Check(file)
  check.each(data["categories"], check.category)
  check.each(data["images"], check.image)
  check.raise_refused()
  for key, found in (("images", check.images), ("categories", check.names)):
    if not found:
      raise ValueError(f"{file}: {key} is empty; expected at least one")
  check.each(data["annotations"], check.segments_of_image if panoptic else check.object_with_box)
  check.raise_refused()
  images = list(check.images.values())
  if panoptic:
    for number in check.names.keys() - check.stuff - check.things:
      check.warn("category without isthing, counted as a thing", f"id {number}")
    for image in images:
      if image["id"] not in check.segments:
        check.warn("image without panoptic annotation, left out", image["file_name"])
    images = [image for image in images if image["id"] in check.segments]
  check.log()
  stuff = frozenset(check.stuff) if check.stuff or check.things else None
  return CocoFile(images, dict(check.objects), check.segments, check.names, stuff)


def read_images(file: pathlib.Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Returns the images of a file with or without annotations, and its categories unchanged."""
  data = _load(file, ("images", "categories"))
  check = _Check(file)
  check.each(data["images"], check.image)
  check.each(data["categories"], check.category)
  check.raise_refused()
  check.log_warned()
  return list(check.images.values()), data["categories"]


def _load(file: pathlib.Path, lists: Sequence[str]) -> dict[str, Any]:
  try:
    data = json.loads(file.read_bytes())  # UTF-8, -16 or -32, with a byte order mark or without
  except UnicodeDecodeError as error:
    raise ValueError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{file}: not JSON ({error})") from None
  wrong = f"{file} is not in COCO's format:"
  for key in lists:
    found = data.get(key) if isinstance(data, dict) else None
    if not isinstance(found, list):
      raise ValueError(f"{wrong} {key} is missing; expected the lists {', '.join(lists)}")
    for item in found:
      if not isinstance(item, dict):
        raise ValueError(f"{wrong} {key} has {_short(item)}, not an object")
  return data


def _short(value: Any) -> str:
  return shorten(repr(value), 60)


def _is_int(value: Any) -> TypeGuard[int]:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  return _is_int(value) or isinstance(value, float)


def _is_finite(value: float | int) -> bool:
  return abs(value) < 1e15  # neither NaN nor infinity; products of two fit into float32


def _is_path(value: Any) -> TypeGuard[str]:
  try:
    return isinstance(value, str) and value != "" and b"\0" not in os.fsencode(value)
  except UnicodeEncodeError:  # half a surrogate pair
    return False


class _RefusedError(Exception):
  """Kind and example of a problem for which the file is refused."""


class _Check:
  """Checks a file, and collects its content, and its problems by kind with examples."""

  def __init__(self, file: pathlib.Path) -> None:
    self.names: dict[int, str] = {}
    self.stuff, self.things = set[int](), set[int]()
    self.images: dict[Any, dict[str, Any]] = {}
    self.objects: dict[Any, list[dict[str, Any]]] = collections.defaultdict(list)
    self.segments: dict[Any, str] = {}
    self._file, self._files, self._seen = file, dict[str, Any](), set[int]()
    self._refused: dict[str, list[str]] = {}
    self._warned: dict[str, list[str]] = {}
    self._without_outline: list[str] = []
    self._outlines = self._boxes = self._outside = self._crowds = 0
    self._corners = self._corner_areas = 0

  def each(self, items: Iterable[Any], add: Callable[[Any], None]) -> None:
    for item in items:
      try:
        add(item)
      except _RefusedError as problem:
        kind, example = problem.args
        self._refused.setdefault(kind, []).append(example)

  def warn(self, kind: str, example: str) -> None:
    self._warned.setdefault(kind, []).append(example)

  def raise_refused(self) -> None:
    if self._refused:
      raise ValueError(f"{self._file}: {'; '.join(map(_line, self._refused.items()))}")

  def log_warned(self) -> None:
    for problem in self._warned.items():
      logging.warning("%s: %s", self._file, _line(problem))

  def log(self) -> None:
    """Logs the problems of single items, and of the annotations as a whole."""
    suspicious = 10 * self._outside >= self._boxes or 2 * self._corner_areas > self._boxes
    if self._boxes and self._corners == self._boxes and suspicious:
      kind = "dataset whose boxes seem to be left, top, right, bottom; expected width and height"
      found = f"{self._outside} of {self._boxes} boxes end outside of their image"
      self.warn(kind, f"{found}, {self._corner_areas} areas are (right - left) * (bottom - top)")
    if self._crowds:
      logging.info("%d crowds: left out in training, ignored regions in scoring", self._crowds)
    if not self._outlines:  # none is usable
      for found in itertools.chain(*self.objects.values()):
        found.pop("segmentation", None)
    elif self._without_outline:
      kind = "object without segmentation, left out where masks are used"
      self._warned[kind] = self._without_outline
    self.log_warned()
    if all(found["iscrowd"] for found in itertools.chain(*self.objects.values())):
      what = "annotations has crowds only" if self._crowds else "annotations is empty"
      logging.warning("%s: %s; a detector cannot be trained on it", self._file, what)

  def category(self, category: Mapping[str, Any]) -> None:
    number, name = category.get("id"), category.get("name")
    if not _is_int(number) or number < 0:
      raise _RefusedError("category without an integer id of at least 0", _short(category))
    if not isinstance(name, str):
      raise _RefusedError("category without a name", f"id {number}")
    name = composed(name)
    if number > MAX_CATEGORY:
      kind = f"category id above {MAX_CATEGORY}; ids are class ids: number them from 0 or 1"
      raise _RefusedError(kind, f"id {number}")
    if self.names.get(number, name) != name:
      raise _RefusedError("category with two names", f"id {number}: {self.names[number]}, {name}")
    if number in self.names or name in self.names.values():
      self.warn("category that is listed twice", f"id {number}, {name}")
    self.names[number] = name
    thing = category.get("isthing")
    if thing not in (None, 0, 1, "0", "1"):
      raise _RefusedError("isthing that is neither 0 nor 1", f"id {number}: {_short(thing)}")
    if thing is not None:
      (self.things if int(thing) else self.stuff).add(number)

  def image(self, image: Mapping[str, Any]) -> None:
    number, file = image.get("id"), image.get("file_name")
    size = image.get("height"), image.get("width")
    if not isinstance(number, str) and not _is_int(number):
      raise _RefusedError("image without an id (an integer or text)", _short(file))
    if not _is_path(file):
      example = f"image {number}" if file is None else f"image {number}: {_short(file)}"
      raise _RefusedError("image without file_name", example)
    if not all(_is_int(side) and 0 < side < 1 << 31 for side in size):
      example = f"image {number}, {file}: {_short(size)}"
      raise _RefusedError("image without height and width in pixels", example)
    if number in self.images:
      raise _RefusedError("image id twice", f"{number}: {self.images[number]['file_name']}, {file}")
    if file in self._files:
      self.warn("image file that is listed twice", f"{file}: images {self._files[file]}, {number}")
    if "\\" in file or "://" in file:
      self.warn("file_name with a backslash or of a URL; expected a path below the images", file)
    self._files[file] = number
    self.images[number] = {"id": number, "file_name": file, "height": size[0], "width": size[1]}

  def object_with_box(self, annotation: Mapping[str, Any]) -> None:
    image = self._image_of(annotation)
    where = f"annotation {annotation.get('id')} of {image['file_name']}"
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
      kind = "bbox that is not 4 numbers (left, top, width, height)"
      raise _RefusedError(kind, f"{where}: {_short(box)}")
    found = self._shared_fields(annotation, where)
    self._check_unique(annotation, where)
    if not all(map(_is_finite, box)) or min(box[2:]) < 0:
      self.warn("bbox with NaN, numbers beyond 1e15 or a negative side, left out", where)
      return
    width, height = image["width"], image["height"]
    right, bottom = box[0] + box[2], box[1] + box[3]
    visible = min(right, width) - max(box[0], 0), min(bottom, height) - max(box[1], 0)
    outside = max(-box[0], -box[1], right - width, bottom - height) > 1
    if not found["iscrowd"] and min(visible) <= 0:
      self.warn("bbox without area in its image, left out in training", where)
    elif max(box) <= 1.01 and width * height > 1:  # 1.01: rounded
      self.warn("bbox in [0, 1]; expected pixels: left, top, width, height", where)
    elif outside:
      self.warn("bbox that reaches out of its image, clipped in training", where)
    self._boxes += 1
    self._outside += outside
    if box[0] < box[2] <= width and box[1] < box[3] <= height:
      self._corners += 1
      areas = box[2] * box[3], (box[2] - box[0]) * (box[3] - box[1])
      is_close = [math.isclose(found.get("area", 0), area, rel_tol=0.01) for area in areas]
      self._corner_areas += is_close == [False, True]
    self._crowds += found["iscrowd"]
    found = {"area": box[2] * box[3], **found, "bbox": box}
    if annotation.get("segmentation") is not None:
      outline, problem = _usable_outline(annotation["segmentation"], image)
      if problem:
        self.warn(f"outline with {problem}", where)
      self._outlines += outline is not None
      found["segmentation"] = outline
    else:
      self._without_outline.append(where)
    self.objects[image["id"]].append(found)

  def _check_unique(self, annotation: Mapping[str, Any], where: str) -> None:
    number, *content = (annotation.get(key) for key in ("id", "image_id", "category_id", "bbox"))
    if number is not None and hash(repr(number)) in self._seen:
      raise _RefusedError("annotation id twice; pycocotools keeps the last of them", where)
    if hash(str(content)) in self._seen:
      self.warn("object that repeats another: same image, category and bbox", where)
    self._seen |= {hash(repr(number)), hash(str(content))}

  def segments_of_image(self, annotation: Mapping[str, Any]) -> None:
    image = self._image_of(annotation)
    file, png = image["file_name"], annotation.get("file_name")
    segments = annotation.get("segments_info")
    if not isinstance(segments, list) or not _is_path(png):
      raise _RefusedError("panoptic annotation without segments_info or file_name", f"image {file}")
    if image["id"] in self.segments:
      raise _RefusedError("image with two panoptic annotations", file)
    self.segments[image["id"]] = png
    ids = set()

    def add(segment: Any) -> None:
      number = segment.get("id") if isinstance(segment, dict) else None
      where = f"segment {_short(number)} of {file}"
      if not _is_int(number) or not 0 < number < _MAX_SEGMENT or number in ids:
        raise _RefusedError("segment without an id of its own (1 to 16777215)", where)
      ids.add(number)
      found = self._shared_fields(segment, where)
      self._crowds += found["iscrowd"]
      self.objects[image["id"]].append({"area": 0.0, **found})

    self.each(segments, add)

  def _image_of(self, annotation: Mapping[str, Any]) -> Mapping[str, Any]:
    number = annotation.get("image_id")
    if isinstance(number, bool | float | list | dict) or number not in self.images:
      where = f"annotation {annotation.get('id')}: image {_short(number)}"
      raise _RefusedError("annotation of an image that is not listed", where)
    return self.images[number]

  def _shared_fields(self, annotation: Mapping[str, Any], where: str) -> dict[str, Any]:
    category, crowd = annotation.get("category_id"), annotation.get("iscrowd", 0)
    if isinstance(category, bool | float | list | dict) or category not in self.names:
      kind = f"category_id that is not listed (known: {min(self.names)}..{max(self.names)})"
      raise _RefusedError(kind, f"{where}: {_short(category)}")
    if isinstance(crowd, str) and crowd in ("0", "1"):
      self.warn("iscrowd that is text, read as a number", f"{where}: {crowd!r}")
      crowd = int(crowd)
    if crowd not in (0, 1, None):
      raise _RefusedError("iscrowd that is neither 0 nor 1", f"{where}: {_short(crowd)}")
    number, area = annotation.get("id"), annotation.get("area")
    has_id = isinstance(number, int) and abs(number) < 1 << 63
    found = {"id": number if has_id else 0, "category_id": category, "iscrowd": int(crowd or 0)}
    if area is not None and not (_is_number(area) and _is_finite(area) and area >= 0):
      self.warn("area that is not a number of at least 0, taken from the box", where)
    elif area is not None:
      found["area"] = area
    return found


def _line(problem: tuple[str, Sequence[str]]) -> str:
  kind, examples = problem
  more = ", ..." if len(examples) > 3 else ""
  return f"{len(examples)} x {kind} ({', '.join(examples[:3])}{more})"


def _usable_outline(outline: Any, image: Mapping[str, Any]) -> tuple[Any, str]:
  """Returns the usable part of an outline, None if there is none, and what is wrong with it."""
  if isinstance(outline, dict):
    problem = _run_lengths_problem(outline, [image["height"], image["width"]])
    return None if problem else outline, problem
  if not isinstance(outline, list) or not outline:
    return None, "no polygon"
  problems = [_polygon_problem(polygon, image) for polygon in outline]
  usable = [_bounded(p, image) for p, bad in zip(outline, problems, strict=True) if not bad]
  return usable or None, next(filter(None, problems), "")


def _run_lengths_problem(outline: Mapping[str, Any], size: list[int]) -> str:
  counts = outline.get("counts")
  if str(outline.get("size")) != str(size) or not isinstance(counts, list | str):
    return f"run lengths that are not of the image's size {size}"
  if isinstance(counts, str):
    try:
      (found,) = toUncompressedRLE([{"size": size, "counts": counts.encode()}])
    except (ValueError, RuntimeError):
      return "run lengths that cannot be read"
    counts = found["counts"]
  elif not all(_is_int(count) and count >= 0 for count in counts):
    return "run lengths that are not integers of at least 0"
  if sum(counts) != math.prod(size):
    return "run lengths that do not add up to the pixels of its image"
  return "" if any(counts[1::2]) else "no area in its image"


def _polygon_problem(polygon: Any, image: Mapping[str, Any]) -> str:
  if not isinstance(polygon, list):
    return "coordinates outside of a polygon; expected [[x, y, x, y, ...], ...]"
  if len(polygon) < 6 or len(polygon) % 2:
    return "points as pairs" if _has_lists(polygon) else "fewer than 3 points or an odd coordinate"
  try:
    finite = math.isfinite(sum(polygon))
  except TypeError:
    return "points as pairs" if _has_lists(polygon) else "coordinates that are not numbers"
  except OverflowError:  # an integer beyond float64
    finite = False
  if not (finite and _is_finite(min(polygon)) and _is_finite(max(polygon))):
    return "NaN or numbers beyond 1e15"
  bounded = _bounded(polygon, image)
  return "" if bounded and _has_pixels(bounded, image) else "no pixel in its image"


def _has_pixels(polygon: list[float | int], image: Mapping[str, Any]) -> bool:
  """Returns whether a mask has a pixel; only small, thin and clipped polygons are rasterised."""
  height, width, xs, ys = image["height"], image["width"], polygon[::2], polygon[1::2]
  left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
  if min(right, width) <= max(left, 0) or min(bottom, height) <= max(top, 0):
    return False
  products = map(operator.mul, xs, [*ys[1:], ys[0]]), map(operator.mul, [*xs[1:], xs[0]], ys)
  area, sides = abs(sum(products[0]) - sum(products[1])) / 2, right - left + bottom - top
  inside = min(left, top) >= 0 and right <= width and bottom <= height
  if (inside and area > 2 * sides) or sides * len(xs) > 1e6:  # 1e6: rasterising takes memory
    return True
  return bool(run_lengths.area(run_lengths.frPyObjects([polygon], height, width))[0])


def _has_lists(polygon: Sequence[Any]) -> bool:
  return any(isinstance(point, list | dict) for point in polygon)


_FAR = 10  # sides of the image at which polygons are clipped: rasterising costs an edge's length


def _bounded(polygon: list[float | int], image: Mapping[str, Any]) -> list[float | int]:
  """Clips a polygon by Sutherland and Hodgman: moving its vertices would turn its edges."""
  limits = (_FAR * image["width"], _FAR * image["height"])
  if max(polygon) <= min(limits) and min(polygon) >= -min(limits):
    return polygon
  points = list(zip(polygon[::2], polygon[1::2], strict=True))
  for axis, sign in itertools.product((0, 1), (1, -1)):
    room = [limits[axis] - sign * point[axis] for point in points]  # negative outside
    kept = []
    for i, (x, y) in enumerate(points):
      kept += [(x, y)] if room[i] >= 0 else []
      j = (i + 1) % len(points)
      if (room[i] < 0) != (room[j] < 0):
        part = room[i] / (room[i] - room[j])
        kept.append((x + part * (points[j][0] - x), y + part * (points[j][1] - y)))
    points = kept
  return list(itertools.chain(*points))
