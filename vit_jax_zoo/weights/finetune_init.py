"""Initialises a model from the variables of another run: new heads, resized position tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from absl import logging
from flax import traverse_util

from vit_jax_zoo.ops.resize import find_grid, resize_position_grid
from vit_jax_zoo.weights.key_map import (
  check_finite,
  list_problems,
  scanned_paths,
  stack,
  unroll,
  unroll_shapes,
)

HEADS = ("head/", "pre_logits/", "class_head/", "mask_head/", "mask_attention/")
"""Sub-trees that a new task may drop or newly initialise."""

POSITIONS = "position_embedding/table"
PIXEL_POSITIONS = "position_embedding"
"""Path of iGPT's position embeddings: one per pixel, [n d]."""

Grid: TypeAlias = tuple[int, int]
"""Height and width, in tokens."""


def adapt(
  source: Mapping[str, Any],
  variables: Mapping[str, Any],
  name: str,
  *,
  source_grid: Grid | None = None,
  grid: Grid | None = None,
  optional: Sequence[str] = (),
) -> dict[str, Any]:
  """Returns `variables` with every array of `source` that fits.

  A head of another shape, and one on top of a dropped layer, keeps its value from `variables`. A
  learned position table is interpolated to the new grid with aligned corners, as in Google's code;
  so are pixel position embeddings, which no paper does. Layers are scanned or unrolled as in the
  model.

  Args:
    source: variables of a run, numpy arrays.
    variables: initial variables of the model to train.
    name: name of the source, for error messages.
    source_grid: height and width, in tokens, that the source's position table covers: 36 rows may
      be 6 x 6 or 4 x 9.
    grid: height and width, in tokens, of the model's position table. If either grid is unknown,
      tables of equal length are copied, and a table to be resized is assumed to be square.
    optional: sub-trees, such as "params/critic", that may exist in one of the two only: the model's
      keeps its value from `variables`, the source's is ignored.

  Raises:
    ValueError: one line with the first missing, unused or misshapen array; or a position table
      that does not match its grid; or values that are not finite.
  """
  adapted = dict(variables)
  problems: list[str] = []
  for collection in source.keys() & variables.keys():
    want = traverse_util.flatten_dict(variables[collection], sep="/")
    have = traverse_util.flatten_dict(source[collection], sep="/")
    loose = [part.partition("/")[2] for part in optional if part.startswith(f"{collection}/")]
    have, shared = _without_lone(have, want, loose)
    taken = dict(_taken(_in_layout_of(have, shared), shared, problems, (source_grid, grid)))
    adapted[collection] = traverse_util.unflatten_dict({**want, **taken}, sep="/")
    fresh = sorted(want.keys() - taken.keys())
    if fresh and not problems:
      logging.info("%s: not loaded, newly initialised: %s", name, ", ".join(fresh))
  if problems:
    raise ValueError(f"the weights of {name} do not fit this model: {list_problems(problems)}")
  check_finite({k: tree for k, tree in source.items() if k in variables}, name)
  return adapted


def _without_lone(
  have: Mapping[str, Any], want: Mapping[str, Any], parts: Sequence[str]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
  for part in parts:
    one, other = ({k for k in leaves if k.startswith(f"{part}/")} for leaves in (have, want))
    if bool(one) != bool(other):
      have, want = ({k: v for k, v in x.items() if k not in one | other} for x in (have, want))
  return have, want


def _in_layout_of(have: Mapping[str, Any], want: Mapping[str, Any]) -> dict[str, Any]:
  """Scans or unrolls layers as in `want`; layers without a match stay as they are."""
  if have.keys() == want.keys():
    return dict(have)
  layers = unroll(have)
  wanted = unroll_shapes({path: np.shape(leaf) for path, leaf in want.items()})
  if not wanted.keys() <= layers.keys():
    return dict(have)
  rest = layers.keys() - wanted.keys()
  return stack(layers, want) | {path: layers[path] for path in rest}


def relayout(variables: Mapping[str, Any], *, scan_layers: bool | None) -> dict[str, Any]:
  """Returns a model's variables with its layers scanned or unrolled.

  Args:
    variables: as numpy arrays.
    scan_layers: the model's field; None: unchanged.
  """
  if scan_layers is None:
    return dict(variables)
  changed = {}
  for collection, tree in variables.items():
    leaves: dict[str, Any] = dict(traverse_util.flatten_dict(tree, sep="/"))
    flat = unroll(leaves)
    flat = stack(flat, scanned_paths(flat)) if scan_layers else flat
    changed[collection] = traverse_util.unflatten_dict(flat, sep="/")
  return changed


def _taken(
  have: Mapping[str, Any],
  want: Mapping[str, Any],
  problems: list[str],
  grids: tuple[Grid | None, Grid | None],
) -> Iterator[tuple[str, Any]]:
  """Yields the arrays that fit; appends what does not fit to `problems`."""
  has_cls = "cls_token" in have, "cls_token" in want
  dropped_below_head = "pre_logits/kernel" in have and "pre_logits/kernel" not in want
  for key, leaf in want.items():
    is_head = key.startswith(HEADS)
    if key not in have:
      if not is_head:
        problems.append(f"{key} is missing")
    elif is_head and (dropped_below_head or have[key].shape != leaf.shape):
      continue
    elif (fitted := _fitted(key, have[key], leaf, grids, has_cls)) is not None:
      yield key, fitted
    else:
      problems.append(f"{key} has shape {have[key].shape}; expected {leaf.shape}")
  for key in have.keys() - want.keys():
    if not key.startswith(HEADS):
      problems.append(f"{key} has no place")


def _fitted(
  key: str,
  array: Any,
  leaf: Any,
  grids: tuple[Grid | None, Grid | None],
  has_cls: tuple[bool, bool],
) -> Any | None:
  """Returns an array in the shape of `leaf`, position tables resized; None if it does not fit."""
  if key == POSITIONS and array.shape[2:] == leaf.shape[2:]:
    return _refit(array, leaf.shape[1], grids, has_cls)
  if array.shape == leaf.shape:
    return array
  if key == PIXEL_POSITIONS and array.shape[1:] == leaf.shape[1:]:
    return _refit(array[None], leaf.shape[0], (None, None), (False, False))[0]
  return None


def _refit(
  table: np.ndarray, rows: int, grids: tuple[Grid | None, Grid | None], has_cls: tuple[bool, bool]
) -> np.ndarray:
  """Returns a position table [1 n d] resized to another grid; the class token's row is kept.

  Args:
    table: the source's table.
    rows: number of rows of the model's table.
    grids: grids of the source and the model; None if unknown.
    has_cls: whether the source and the model have a class token.
  """
  if table.shape[1] == rows and (None in grids or grids[0] == grids[1]):
    return table
  first, old = _layout(table.shape[1], grids[0], has_cls[0], "the source")
  wanted, new = _layout(rows, grids[1], has_cls[1], "the model")
  if first != wanted:
    raise ValueError(
      f"position embeddings: the source has {first} rows for the class token; expected {wanted}; "
      "set cls_token_position as in the source"
    )
  resized = resize_position_grid(np.asarray(table[0, first:]), old, new)
  return np.concatenate([table[:, :first], resized[None]], axis=1).astype(table.dtype)


def _layout(rows: int, grid: Grid | None, has_cls: bool, whose: str) -> tuple[int, Grid]:  # noqa: FBT001
  """Returns the number of rows before the grid's, and the grid; a square one if unknown."""
  found = find_grid(rows, (1, 0) if has_cls else (0,), grid)
  if found is None:
    wrong = (
      ", which is no square grid, and the height and width of its grid are unknown; use images "
    )
    wrong += "of the same size or square ones"
    if grid is not None:
      wrong = f"; expected a grid of {grid[0]} x {grid[1]} tokens; check the image size"
    raise ValueError(f"position embeddings: {whose} has {rows}{wrong}")
  return found
