"""COCO files of the predictions of all images.

    coco.json           images, annotations with a `score`, categories: pycocotools' `COCO(file)`
    coco_results.json   results for `COCO(ground_truth).loadRes(file)`; without `bbox` in it, masks
                        are scored by their own areas
    coco_panoptic.json  images, segments and categories, beside the pictures `*_panoptic.png`

Images are numbered from 1 in order, and categories have the model's class ids, unless `GroundTruth`
gives those of an annotation file.
"""

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from vit_jax_zoo.data.sources.base import composed
from vit_jax_zoo.data.sources.coco_file import read_images
from vit_jax_zoo.errors import escape_surrogates
from vit_jax_zoo.inference.base import Image, Result

FILES = ("coco.json", "coco_results.json", "coco_panoptic.json")
_LISTED = 10


class GroundTruth:
  """Ids of the images and categories of a COCO file, for predictions that are scored with it.

  An image is matched if its path ends with one `file_name`, else if one has the same base name.
  Classes are matched by name, or by id if the model has no names; a class that is not in the file
  keeps its id, or if the file uses that id, gets one above the file's.
  """

  def __init__(self, file: pathlib.Path, paths: Sequence[pathlib.Path]) -> None:
    if not file.is_file():
      raise FileNotFoundError(f"--coco_ids={file}: no such file")
    self.file = file
    images, self.categories = read_images(file)
    self._sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    self._names = {c["id"]: composed(escape_surrogates(c["name"])) for c in self.categories}
    self._ids = {name: number for number, name in reversed(self._names.items())}
    self.image_ids = self._match(images, paths)

  def _match(self, images: list[dict[str, Any]], paths: Sequence[pathlib.Path]) -> dict[str, Any]:
    by_name, by_base_name = collections.defaultdict(list), collections.defaultdict(list)
    for image in images:
      name = pathlib.Path(composed(image["file_name"]))
      by_name[name.parts].append(image["id"])
      by_base_name[name.name].append(image["id"])
    found: dict[str, Any] = {}
    given: dict[Any, pathlib.Path] = {}
    for path in paths:
      parts = pathlib.Path(composed(str(path))).parts
      ends = (parts[i:] for i in range(len(parts)))
      ids = next((by_name[end] for end in ends if end in by_name), by_base_name.get(parts[-1], ()))
      if len(ids) == 1 and ids[0] not in given:
        given[ids[0]] = path
        found[escape_surrogates(str(path))] = ids[0]
        continue
      why = f"not in {self.file}"
      if len(ids) > 1:
        why = f"{len(ids)} images of {self.file} have this file_name; expected one"
      elif ids:
        why = f"image {ids[0]!r} of {self.file} is already {given[ids[0]]}"
      logging.warning("%s: %s; not in coco.json", path, why)
    if len(found) < len(images):
      text = "%s: %d of %d images are not given; scores count their objects as missed"
      logging.warning(text, self.file, len(images) - len(found), len(images))
    return found

  def find(self, path: str, size: tuple[int, int]) -> Any:
    """Returns an image's id, None if it is not in the file; warns about another size."""
    number = self.image_ids.get(path)
    expected = self._sizes.get(number, size)
    if size != expected:
      text = "%s: %dx%d pixels (height x width); %s has %dx%d"
      logging.warning(text, path, *size, self.file, *expected)
    return number

  def category_id(self, label: int, name: str | None) -> int:
    """Returns the file's id of a class."""
    name = self._names.get(label, str(label)) if name is None else composed(name)
    if self._names.get(label) == name:
      return label
    if name in self._ids:
      return self._ids[name]
    number = max(self._names) + 1 if label in self._names else label
    self._names[number], self._ids[name] = name, number
    self.categories.append({"id": number, "name": name})
    text = "class %r of the model is not in the categories of %s; its id is %d, and is not scored"
    logging.log_first_n(logging.WARNING, text, _LISTED, name, self.file, number)
    return number


class CocoFiles:
  """Collects detections and segments of images; with `truth`, of its images, with its ids."""

  def __init__(self, truth: GroundTruth | None = None) -> None:
    self._truth = truth
    self._images: list[dict[str, Any]] = []
    self._annotations: list[dict[str, Any]] = []
    self._panoptic: list[dict[str, Any]] = []
    self._names: dict[int, str] = {}
    self._has = {"objects": False, "segments": False}

  def add(self, path: str, name: str, image: Image, prediction: Result) -> None:
    """Adds the prediction for an image; `name` is the prefix of the names of its pictures."""
    self._has["objects"] |= prediction.objects is not None
    self._has["segments"] |= prediction.segments is not None
    number, (height, width) = len(self._images) + 1, image.shape[:2]
    if self._truth is not None:
      number = self._truth.find(path, (height, width))
    if number is None:
      return
    self._images.append({"id": number, "file_name": path, "height": height, "width": width})
    for found in prediction.objects or ():
      ids = {"id": len(self._annotations) + 1, "image_id": number}
      self._annotations.append(ids | self._without_name(found))
    if prediction.segments is not None:
      segments = [self._without_name(segment) for segment in prediction.segments]
      image_fields = {"image_id": number, "file_name": f"{name}_panoptic.png"}
      self._panoptic.append(image_fields | {"segments_info": segments})

  def contents(self) -> dict[str, Any]:
    """Returns the contents of the files by name."""
    categories = [{"id": k, "name": v} for k, v in sorted(self._names.items())]
    if self._truth is not None:
      categories = self._truth.categories
      if not any(self._has.values()):
        logging.warning("--coco_ids: unused; the model predicts no objects")
    shared, files = {"images": self._images, "categories": categories}, {}
    if self._has["objects"]:
      keys = ("image_id", "category_id", "bbox", "score", "segmentation")
      files["coco.json"] = {**shared, "annotations": self._annotations}
      files["coco_results.json"] = [{k: a[k] for k in keys if k in a} for a in self._annotations]
    if self._has["segments"]:
      files["coco_panoptic.json"] = {**shared, "annotations": self._panoptic}
    return files

  def _without_name(self, found: Mapping[str, Any]) -> dict[str, Any]:
    label, name = found["category_id"], found.get("name")
    if self._truth is not None:
      label = self._truth.category_id(label, name)
    self._names[label] = str(label) if name is None else name
    fields = {key: value for key, value in found.items() if key != "name"}
    return {"iscrowd": 0, **fields, "category_id": label}


def box_annotation(
  category: Mapping[str, Any], box_xyxy: Sequence[float], score: float, **more: Any
) -> dict[str, Any]:
  """Returns a COCO annotation without ids; `category` has `category_id` and maybe `name`."""
  left, top, right, bottom = (float(side) for side in box_xyxy)
  box = [left, top, right - left, bottom - top]
  return {**category, "bbox": box, "score": score, "area": box[2] * box[3], **more}
