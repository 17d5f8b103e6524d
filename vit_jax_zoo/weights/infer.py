"""Infers a model's sizes from a file's arrays.

Each size is read from the first of several arrays, so that a file with a missing or misshapen array
is still recognised, and all its problems are reported together.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np

Place: TypeAlias = tuple[str, int, int]
"""Location of a size: regular expression of keys, their number of axes, axis."""


def side(arrays: Mapping[str, np.ndarray], *places: Place) -> int | None:
  """Returns the size from the first matching array; None if there is none."""
  for pattern, rank, axis in places:
    for key, array in arrays.items():
      if array.ndim == rank and re.fullmatch(pattern, key):
        return array.shape[axis]
  return None


def outputs_of(arrays: Mapping[str, np.ndarray], layer: str) -> int | None:
  """Returns the number of outputs of a PyTorch dense layer from its weight or bias, else None."""
  return side(arrays, (rf"{layer}\.bias", 1, 0), (rf"{layer}\.weight", 2, 0))


def count(keys: Iterable[str], pattern: str) -> int:
  """Returns the number of layers; the pattern's group is a layer's number, from 0."""
  numbers = [int(match[1]) for key in keys if (match := re.match(pattern, key))]
  return 1 + max(numbers, default=-1)
