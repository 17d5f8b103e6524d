"""A published ViT file, read: its arrays, the table that names them, the model that they are of."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax_zoo.ops.position_grid import resize_position_grid
from vit_jax_zoo.weights.table import Flat, Row, WeightsError

CLS_TOKEN = "cls_token"
POSITIONS = "position_embedding/table"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What each format's `read_checkpoint` returns.

  Attributes:
    source: the file's name, for messages.
    arrays: by published key, joint matrices taken apart.
    table: connects the keys with our paths.
    fields: of the `VisionTransformer` that the arrays fit.
    resize: how the format's own code resizes positions, a key of `position_grid.METHODS`.
    ignore: regular expressions of keys that may stay unused.
    image_size: height and width of the images that the weights were trained on, if it is stated.
    mean: of pixels in [0, 1], for each channel or for all.
    std: as `mean`.
  """

  source: str
  arrays: Flat
  table: Sequence[Row]
  fields: Mapping[str, Any]
  resize: str
  ignore: tuple[str, ...] = ()
  image_size: tuple[int, int] | None = None
  mean: float | tuple[float, ...] = 0.5
  std: float | tuple[float, ...] = 0.5

  def key(self, path: str) -> str | None:
    """Returns the key under which the file has our parameter, None if it has not."""
    keys = (row.key(path) for row in self.table)
    return next((key for key in keys if key in self.arrays), None)

  def array(self, path: str) -> np.ndarray | None:
    """Returns what the file has for our parameter, in the file's layout."""
    key = self.key(path)
    return None if key is None else self.arrays[key]

  def replace(self, arrays: Flat) -> "Checkpoint":
    """Returns the same with other arrays."""
    return dataclasses.replace(self, arrays=arrays)

  def without(self, *prefixes: str) -> "Checkpoint":
    """Returns the same without the arrays of our paths `<prefix>/kernel` and `<prefix>/bias`."""
    dropped = {self.key(f"{prefix}/{leaf}") for prefix in prefixes for leaf in ("kernel", "bias")}
    return self.replace({k: array for k, array in self.arrays.items() if k not in dropped})

  @property
  def class_rows(self) -> int:
    """Rows of the position table that are the class token's: 0 or 1."""
    has_row = self.fields["cls_token_position"] and self.key(POSITIONS) is not None
    return int(has_row and self.key(CLS_TOKEN) is not None)

  def position_grid(
    self,
    *,
    given: tuple[int, int] | None = None,
    fallback: tuple[int, int] | None = None,
  ) -> tuple[int, int]:
    """Returns height and width, in tokens, of the grid that the file's positions cover.

    Args:
      given: the grid, if it is known. Otherwise it is taken to be square.
      fallback: a grid to try where the number of rows is no square.

    Raises:
      WeightsError: the file has no positions, or for another number of tokens.
    """
    table = self.array(POSITIONS)
    if table is None or table.ndim != 3:
      raise WeightsError(f"{self.source} has no table of positions [1, tokens, width]")
    rows = table.shape[1] - self.class_rows
    side = math.isqrt(rows)
    for grid in ((side, side), fallback) if given is None else (given,):
      if grid is not None and grid[0] * grid[1] == rows:
        return grid
    what = "which is no square" if given is None else f"not for {given[0]} x {given[1]}"
    raise WeightsError(
      f"{self.source} has positions for {rows} tokens, {what}; "
      "give source_image_size=(height, width), the size that it was trained at"
    )

  def fit_positions(
    self,
    *,
    num_rows: int,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    method: str | None = None,
  ) -> "Checkpoint":
    """Resizes the position table to a model's grid, and moves the class token's row if it must.

    The token's position and the token itself are only ever added up: where the model has no row for
    it, the row goes into the token; where the file has none, a row of zeros changes nothing.

    Args:
      num_rows: rows of the model's table.
      old_grid: see `position_grid`.
      new_grid: height and width of the model's grid, in tokens.
      method: a key of `position_grid.METHODS`; None: as the format's own code does it.
    """
    key = self.key(POSITIONS)
    if key is None:
      return self
    fitted = dict(self.arrays)
    count = self.class_rows
    cls_row, table = fitted[key][0, :count], fitted[key][0, count:]
    table = resize_position_grid(table, old_grid, new_grid, method or self.resize)
    wanted = num_rows - len(table)
    if count and not wanted:
      cls_key = self.key(CLS_TOKEN) or ""
      fitted[cls_key] = fitted[cls_key] + cls_row
    elif wanted and not count:
      cls_row = np.zeros_like(table[:1])
    if wanted:
      table = np.concatenate([cls_row, table])
    fitted[key] = table[None]
    return self.replace(fitted)
