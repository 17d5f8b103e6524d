"""Labels derived from annotations: VTAB's structured tasks.

As in google-research/task_adaptation, for Zhai et al., "A Large-scale Study of Representation
Learning with the Visual Task Adaptation Benchmark" (arXiv:1910.04867). The option of `tfds:` is
`label_rule="clevr_count"`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class LabelRule:
  """Label of a TFDS record."""

  keys: tuple[str, ...]  # features that it reads
  num_classes: int
  label: Callable[[Mapping[str, Any]], int]  # of a record
  image_scale: int = 1  # factor of the pixels; dSprites are stored as 0 and 1


def count_objects(record: Mapping[str, Any]) -> int:
  """CLEVR: number of objects, 3 to 10, as 0 to 7."""
  return len(record["objects"]["size"]) - 3


def nearest_object(record: Mapping[str, Any]) -> int:
  """CLEVR: interval of the distance to the nearest object."""
  distances = np.asarray(record["objects"]["pixel_coords"], np.float64).reshape(-1, 3)[:, 2]
  return _interval(distances.min(), (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0))


def nearest_vehicle(record: Mapping[str, Any]) -> int:
  """KITTI: interval of the distance ahead, in metres, to the nearest car, van or truck, or none."""
  objects = record["objects"]
  ahead = np.asarray(objects["location"], np.float64).reshape(-1, 3)[:, 2]
  vehicles = np.asarray(objects["type"], np.int64).reshape(-1) < 3  # Car, Van, Truck come first
  return _interval(min([1000.0, *ahead[vehicles].tolist()]), (-100.0, 8.0, 20.0, 999.0))


def x_position(record: Mapping[str, Any]) -> int:
  """DSprites: x position, 32 columns in 16 groups."""
  return int(record["label_x_position"]) // 2


def orientation(record: Mapping[str, Any]) -> int:
  """DSprites: orientation, 40 in 16 groups of two or three."""
  return int(int(record["label_orientation"]) / 2.5)


def _interval(value: float, starts: tuple[float, ...]) -> int:
  """Returns the index of the last interval that starts below the value."""
  return int(np.flatnonzero(np.asarray(starts) < value).max())


RULES = {
  "clevr_count": LabelRule(("objects",), 8, count_objects),
  "clevr_distance": LabelRule(("objects",), 6, nearest_object),
  "kitti_distance": LabelRule(("objects",), 4, nearest_vehicle),
  "dsprites_x_position": LabelRule(("label_x_position",), 16, x_position, image_scale=255),
  "dsprites_orientation": LabelRule(("label_orientation",), 16, orientation, image_scale=255),
}
