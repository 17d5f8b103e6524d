"""keep_classes: drops objects by class."""

import numpy as np

from vit_jax_zoo.data.transforms import build_transforms


def test_below_filters_all_object_fields():
  example = {
    "image": np.zeros((4, 4, 3), np.uint8),
    "labels": np.array([12, 3, 9, 10]),
    "boxes_xyxy": np.arange(16, dtype=np.float32).reshape(4, 4),
    "masks": np.eye(4, dtype=bool)[:, None].repeat(4, 1),
    "area": np.arange(4),
    "image_id": 7,
  }
  (keep,) = build_transforms([{"name": "keep_classes", "below": 10}])
  kept = keep(example, np.random.default_rng(0))
  assert kept["labels"].tolist() == [3, 9]
  assert kept["area"].tolist() == [1, 2]
  np.testing.assert_array_equal(kept["masks"], example["masks"][1:3])
  assert kept["image_id"] == 7
