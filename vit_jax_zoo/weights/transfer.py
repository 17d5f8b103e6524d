"""From the variables of one run to those of another model, which is to be fine-tuned."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging
from flax import traverse_util

from vit_jax_zoo.ops.position_grid import resize_position_grid

HEADS = ("head/", "pre_logits/")
"""What a new task may drop, or start afresh."""

POSITIONS = "position_embedding/table"


def adapt(source: Mapping[str, Any], variables: Mapping[str, Any], name: str) -> dict[str, Any]:
  """Returns `variables` with every array that `source` has for it.

  A head of another shape, and one that sits on a dropped layer, stays as it is in `variables`; a
  learned position table is resized to the new grid, corners on corners, as Google's code does it.

  Args:
    source: variables of a run of ours, as numpy arrays.
    variables: fresh ones of the model that is to be trained.
    name: of the source, for messages.

  Raises:
    ValueError: one line with every array that is missing, has no place, or another shape.
  """
  adapted = dict(variables)
  problems: list[str] = []
  for collection in source.keys() & variables.keys():
    have = traverse_util.flatten_dict(source[collection], sep="/")
    want = traverse_util.flatten_dict(variables[collection], sep="/")
    taken = dict(_taken(have, want, problems))
    adapted[collection] = traverse_util.unflatten_dict({**want, **taken}, sep="/")
    fresh = sorted(want.keys() - taken.keys())
    if fresh and not problems:
      logging.info("%s: these start afresh: %s", name, ", ".join(fresh))
  if problems:
    raise ValueError(f"the weights of {name} do not fit this model: {'; '.join(problems)}")
  return adapted


def _taken(
  have: Mapping[str, Any], want: Mapping[str, Any], problems: list[str]
) -> Iterator[tuple[str, Any]]:
  """Yields what is taken over, and notes what should be and cannot."""
  dropped_below_head = "pre_logits/kernel" in have and "pre_logits/kernel" not in want
  for key, leaf in want.items():
    is_head = key.startswith(HEADS)
    if key not in have:
      if not is_head:
        problems.append(f"{key} is missing")
    elif is_head and (dropped_below_head or have[key].shape != leaf.shape):
      continue
    elif have[key].shape == leaf.shape:
      yield key, have[key]
    elif key == POSITIONS:
      yield key, _resized(have[key], leaf.shape[1], "cls_token" in want)
    else:
      problems.append(f"{key} has shape {have[key].shape}, and {leaf.shape} is wanted")
  for key in have.keys() - want.keys():
    if not key.startswith(HEADS):
      problems.append(f"{key} has no place")


def _resized(table: np.ndarray, rows: int, has_cls: bool) -> np.ndarray:  # noqa: FBT001
  """Resizes a table [1 n d] to another number of rows; the class token's row stays."""
  first = int(has_cls and math.isqrt(rows - 1) ** 2 == rows - 1)
  old, new = (math.isqrt(count - first) for count in (table.shape[1], rows))
  if old**2 != table.shape[1] - first or new**2 != rows - first:
    raise ValueError(
      f"cannot resize positions of {table.shape[1]} tokens to {rows}: not square grids; "
      "use load_pretrained with image_size and source_image_size"
    )
  grid = resize_position_grid(np.asarray(table[0, first:]), (old, old), (new, new))
  return np.concatenate([table[:, :first], grid[None]], axis=1).astype(table.dtype)
