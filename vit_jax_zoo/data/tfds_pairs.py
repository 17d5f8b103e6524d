"""Pictures with references, out of datasets with the image features `image` and `reference`."""

from typing import Any

import tensorflow_datasets as tfds

from vit_jax_zoo.data.base import DatasetInfo, Example, Source

KEYS = ("image", "reference")


class TfdsPairs(Source):
  """One split of a prepared dataset; examples are those of `data/pairs.py`."""

  def __init__(self, info: DatasetInfo, records: Any) -> None:
    self.info = info
    self._records = records

  def __getitem__(self, index: int) -> Example:
    record = self._records[index]
    return {key: record[key] for key in KEYS}

  def example_name(self, index: int) -> str:
    """Returns split and position."""
    return f"{self.info.name}[{index}]"


def has_pairs(features: Any) -> bool:
  """Whether a dataset's pictures have references."""
  return all(key in features and isinstance(features[key], tfds.features.Image) for key in KEYS)


def decoders() -> dict[str, Any]:
  """Returns TFDS's decoders that leave both pictures as they are stored."""
  return {key: tfds.decode.SkipDecoding() for key in KEYS}
