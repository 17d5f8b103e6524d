"""Images with a class for every pixel, out of datasets that TFDS has prepared.

`cityscapes/semantic_segmentation`, which has `image_left` and `segmentation_label`; and any dataset
with an image feature that holds class ids, if it is named: `label_key="segmentation_mask"`. (The
annotations of TFDS's `scene_parse150` are those of instances: they are no label maps.)
"""

from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds

from vit_jax_zoo.data.base import DatasetInfo, Example, Source

LABELS = "segmentation_label"
"""The feature that makes a dataset one of label maps, also where nobody names it."""
IMAGES = ("image", "image_left")


class TfdsLabelMaps(Source):
  """One split of a prepared dataset; examples are those of `data/segments.py`."""

  def __init__(self, info: DatasetInfo, records: Any, keys: tuple[str, str]) -> None:
    self.info = info
    self._records, (self._image_key, self._label_key) = records, keys

  def __getitem__(self, index: int) -> Example:
    record = self._records[index]
    maps = {"image": record[self._image_key], "label_map": record[self._label_key]}
    return {**maps, "image_id": index}

  def example_name(self, index: int) -> str:
    """Returns split and position."""
    return f"{self.info.name}[{index}]"


def find_keys(
  images: Sequence[str], image_key: str | None, label_key: str | None
) -> tuple[str, str] | None:
  """Returns the features of images and of label maps; None of a dataset without the latter.

  Args:
    images: those of the dataset's features that are images.
    image_key: as the user gave it, or None.
    label_key: likewise; that of an image names label maps.
  """
  labels = LABELS if label_key is None else label_key
  if labels not in images:
    return None
  wanted = (*IMAGES, *images) if image_key is None else (image_key,)
  found = next((key for key in wanted if key in images and key != labels), None)
  return None if found is None else (found, labels)


def decoders(keys: tuple[str, str]) -> dict[str, Any]:
  """Returns TFDS's decoders that leave images and label maps as they are stored."""
  return {key: tfds.decode.SkipDecoding() for key in keys}
