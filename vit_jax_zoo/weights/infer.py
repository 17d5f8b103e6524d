"""What a file's arrays say of a model's sizes, also where one of them is missing or misshapen.

Sizes stand in several arrays. A reader that asks more than one of them finds the model in a damaged
file, too; what is wrong with the file is then reported whole, when it is read.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np

Place: TypeAlias = tuple[str, int, int]
"""Where a size stands: regular expression of keys, number of axes that they have, axis."""


def side(arrays: Mapping[str, np.ndarray], *places: Place) -> int | None:
  """Returns a size from the first place that has it; None if no array does."""
  for pattern, rank, axis in places:
    for key, array in arrays.items():
      if array.ndim == rank and re.fullmatch(pattern, key):
        return array.shape[axis]
  return None


def outputs_of(arrays: Mapping[str, np.ndarray], layer: str) -> int | None:
  """Returns how many outputs a dense layer of PyTorch's has, or None where it is not there.

  A layer of which only one part is there counts: what it lacks is said when it is read.
  """
  return side(arrays, (rf"{layer}\.bias", 1, 0), (rf"{layer}\.weight", 2, 0))


def count(keys: Iterable[str], pattern: str) -> int:
  """Returns how many layers there are, of which the pattern's group is the number, from 0."""
  numbers = [int(match[1]) for key in keys if (match := re.match(pattern, key))]
  return 1 + max(numbers, default=-1)
