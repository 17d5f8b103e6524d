"""Collects predictions of all images in COCO's formats.

    coco.json           images, annotations with a `score`, categories: pycocotools' `COCO(file)`
                        reads it, and its list of annotations is what `loadRes` takes
    coco_panoptic.json  the same of panoptic segmentation, beside the pictures `*_panoptic.png`

Images are numbered from 1 in order; `file_name` is the given path.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax_zoo.inference.base import Image, Prediction


class CocoFiles:
  """Collects detections and segments of images."""

  def __init__(self) -> None:
    """Starts empty."""
    self._images: list[dict[str, Any]] = []
    self._annotations: list[dict[str, Any]] = []
    self._panoptic: list[dict[str, Any]] = []
    self._names: dict[int, str] = {}
    self._looked_for = {"objects": False, "segments": False}

  def add(self, path: str, name: str, image: Image, prediction: Prediction) -> None:
    """Adds one image.

    Args:
      path: of its file.
      name: prefix of the names of its pictures.
      image: its pixels, for their size.
      prediction: for the image.
    """
    number, (height, width) = len(self._images) + 1, image.shape[:2]
    self._images.append({"id": number, "file_name": path, "height": height, "width": width})
    if prediction.objects is not None:
      self._looked_for["objects"] = True
      for found in prediction.objects:
        known = {"id": len(self._annotations) + 1, "image_id": number}
        self._annotations.append(known | self._without_name(found))
    if prediction.segments is not None:
      self._looked_for["segments"] = True
      segments = [self._without_name(segment) for segment in prediction.segments]
      self._panoptic.append(
        {"image_id": number, "file_name": f"{name}_panoptic.png", "segments_info": segments}
      )

  def contents(self) -> dict[str, Any]:
    """Returns the contents of the files by name."""
    categories = [{"id": k, "name": v} for k, v in sorted(self._names.items())]
    files = {}
    for file, key, annotations in (
      ("coco.json", "objects", self._annotations),
      ("coco_panoptic.json", "segments", self._panoptic),
    ):
      if self._looked_for[key]:
        files[file] = {
          "images": self._images, "annotations": annotations, "categories": categories
        }  # fmt: skip
    return files

  def _without_name(self, found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an annotation as COCO has it; its class's name is kept for the categories."""
    label = found["category_id"]
    self._names[label] = found.get("name", str(label))
    return {"iscrowd": 0, **{key: value for key, value in found.items() if key != "name"}}


def box_annotation(
  category: Mapping[str, Any], box_xyxy: Sequence[float], score: float, **more: Any
) -> dict[str, Any]:
  """Returns a COCO annotation without `id` and `image_id`.

  Args:
    category: `category_id`, and `name` if known.
    box_xyxy: left, top, right, bottom in pixels.
    score: in [0, 1].
    **more: other keys, such as `segmentation`. `area` is the box's by default.
  """
  left, top, right, bottom = (float(side) for side in box_xyxy)
  box = [left, top, right - left, bottom - top]
  return {**category, "bbox": box, "score": score, "area": box[2] * box[3], **more}
