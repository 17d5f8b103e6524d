"""Objects in images, out of datasets that TFDS has prepared: COCO's, and those laid out alike.

`coco/2017`, and any dataset with a feature `objects` of `bbox`, `label`, perhaps `is_crowd`, `area`
and `id`; and `coco/2017_panoptic`, with `panoptic_objects` and a `panoptic_image`. TFDS counts
COCO's 80 classes from 0 to 79. They get COCO's own numbers back, 1 to 90 with gaps, as every
published detector has them: so `num_classes` is 91, here and with `coco:/path` alike.
"""

import dataclasses
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vit_jax_zoo.data import images
from vit_jax_zoo.data.base import DatasetInfo, Example, Source
from vit_jax_zoo.data.coco_names import coco_ids, names_by_id
from vit_jax_zoo.data.objects import objects_example

OBJECTS = {False: "objects", True: "panoptic_objects"}
"""The feature, for detection and for panoptic segmentation."""


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where in a record things are.

  Attributes:
    image: the image's feature.
    objects: the objects' feature.
    segments: the feature of the segment image, or None.
    class_ids: the id that each of the dataset's labels stands for, or None where it is the id.
  """

  image: str
  objects: str
  segments: str | None = None
  class_ids: tuple[int, ...] | None = None


class TfdsObjects(Source):
  """One split of a prepared dataset; examples are those of `data/objects.py`."""

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

  def example_name(self, index: int) -> str:
    """Returns split and position."""
    return f"{self.info.name}[{index}]"


def find_layout(features: Any, name: str, *, panoptic: bool) -> tuple[Layout, DatasetInfo]:
  """Returns where a dataset has its objects, and what its classes are.

  Raises:
    ValueError: it has none.
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
  """Whether a dataset has boxes, so that it is not one for classification."""
  return any(key in features and "bbox" in _inner(features, key) for key in OBJECTS.values())


def decoders(layout: Layout) -> dict[str, Any]:
  """Returns TFDS's decoders that leave images as they are stored."""
  keys = (layout.image, layout.segments)
  return {key: tfds.decode.SkipDecoding() for key in keys if key is not None}


def _in_pixels(boxes: Any, image: bytes) -> np.ndarray:
  """Returns boxes [n 4] as left, top, right, bottom, from shares top, left, bottom, right."""
  height, width = images.image_size(image)
  shares = np.asarray(boxes, np.float64).reshape(-1, 4)
  return shares[:, [1, 0, 3, 2]] * (width, height, width, height)


def _inner(features: Any, key: str) -> Any:
  """Returns the features of what a sequence consists of."""
  return getattr(features[key], "feature", features[key])
