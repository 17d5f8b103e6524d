"""Splits and joins fused QKV matrices."""

import re
from collections.abc import Mapping

import numpy as np

from vit_jax_zoo.weights.key_map import Flat

PARTS = ("query", "key", "value")
"""Order along the axis of outputs of the fused matrix."""


def split(published: Mapping[str, np.ndarray], joint: re.Pattern[str], axis: int = 0) -> Flat:
  """Splits matching arrays into `...qkv.weight[query]`, `...[key]` and `...[value]`."""
  flat: Flat = {}
  for key, array in published.items():
    if joint.fullmatch(key) and array.ndim and array.shape[axis] % len(PARTS) == 0:
      thirds = np.split(array, len(PARTS), axis)
      flat |= {f"{key}[{part}]": third for part, third in zip(PARTS, thirds, strict=True)}
    else:
      flat[key] = array
  return flat


def join(flat: Mapping[str, np.ndarray], axis: int = 0) -> Flat:
  """Inverse of `split`."""
  joint: Flat = {}
  for key, array in flat.items():
    whole = key.partition("[")[0]
    if key == f"{whole}[{PARTS[0]}]":
      joint[whole] = np.concatenate([flat[f"{whole}[{part}]"] for part in PARTS], axis)
    elif whole == key:
      joint[key] = array
  return joint
