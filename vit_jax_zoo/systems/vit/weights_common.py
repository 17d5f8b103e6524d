"""Published ViT files: resizing of position embeddings, and the row of the class token."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax_zoo.ops.resize import resize_position_grid
from vit_jax_zoo.systems.vit.model import sincos_2d
from vit_jax_zoo.weights.checkpoint import Checkpoint, Export, Size
from vit_jax_zoo.weights.key_map import Flat, WeightsError
from vit_jax_zoo.weights.preprocess import Preprocess

CLS_TOKEN = "cls_token"
POSITIONS = "position_embedding/table"
GOOGLE = Preprocess((224, 224))
"""Google's evaluations: TensorFlow resizes without the aspect ratio, pixels in [-1, 1]."""

PATCH_SIDE = 16
"""Side of patches if the file lacks the array that determines it, which is reported later."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitCheckpoint(Checkpoint):
  """A ViT file as its format returns it.

  Attributes:
    resize: the format's method of resizing position embeddings, a key of `ops.resize.METHODS`.
    cls_row_is_stated: whether the file states if the class token has a row in the table. If not, 16
      rows are 4 x 4, or 3 x 5 and the class token's: the size of the images decides.
  """

  family: str = "vit"
  preprocess: Preprocess = GOOGLE
  first_kernels: tuple[str, ...] = ("resnet/root_conv/kernel", "embedding/kernel")
  below_heads: tuple[str, ...] = ("pre_logits/",)
  resize: str
  cls_row_is_stated: bool = True

  def choose_size(
    self, model: Any, wanted: Size | None, trained: Size | None
  ) -> tuple[Size, "VitCheckpoint"]:
    """Derives the size from the position table if it is not stated."""
    side, trained = model.token_stride, trained or self.image_size
    given, checkpoint = trained and _grid(trained, side), self
    table = self.array(POSITIONS)
    if table is not None and table.ndim == 3:  # other shapes are reported later
      guess = None if self.cls_row_is_stated else wanted and _grid(wanted, side)
      checkpoint = self._with_class_row_of(given or guess)
      grid = checkpoint.position_grid(given=given, fallback=wanted and _grid(wanted, side))
      trained = (grid[0] * side, grid[1] * side)
    size = wanted or trained or self.preprocess.image_size
    return size, checkpoint.replace(image_size=trained)

  def _with_class_row_of(self, grid: Size | None) -> "VitCheckpoint":
    """Sets `cls_token_position` by a known grid: 25 rows are 5 x 5, or 4 x 6 and one."""
    table = self.array(POSITIONS)
    if grid is None or table is None or table.ndim != 3 or self.key(CLS_TOKEN) is None:
      return self
    others = table.shape[1] - grid[0] * grid[1]
    stated = {"cls_token_position": bool(others)} if others in (0, 1) else {}
    return self.replace(fields={**self.fields, **stated})

  def at_size(
    self, target: Mapping[str, Any], model: Any, size: Size, *, method: str | None = None
  ) -> "VitCheckpoint":
    """Resizes the position embeddings to the grid of images of `size`."""
    table = self.array(POSITIONS)
    if POSITIONS not in target or self.image_size is None or table is None or table.ndim != 3:
      return self
    side = model.token_stride
    return self.fit_positions(
      num_rows=target[POSITIONS].shape[1],
      old_grid=_grid(self.image_size, side),
      new_grid=_grid(size, side),
      method=method,
    )

  def fit_positions_to(
    self, target: Mapping[str, Any], grid: Size | None, method: str | None
  ) -> "VitCheckpoint":
    """Resizes the positions to the table of existing variables; see `Checkpoint`."""
    theirs, positions = self.array(POSITIONS), target.get(POSITIONS)
    if theirs is None or positions is None or (grid is None and positions.shape == theirs.shape):
      return self
    grid = grid or _square(positions.shape[1], has_cls=CLS_TOKEN in target)
    old_grid = self.position_grid(fallback=grid)
    return self.fit_positions(
      num_rows=positions.shape[1], old_grid=old_grid, new_grid=grid, method=method
    )

  @property
  def class_rows(self) -> int:
    """Rows of the position table for the class token: 0 or 1."""
    has_row = self.fields["cls_token_position"] and self.key(POSITIONS) is not None
    return int(has_row and self.key(CLS_TOKEN) is not None)

  def position_grid(self, *, given: Size | None = None, fallback: Size | None = None) -> Size:
    """Returns height and width, in tokens, of the grid of the file's position table.

    Args:
      given: the grid, if known; otherwise square.
      fallback: a grid to try if the number of rows is not a square.

    Raises:
      WeightsError: the file has no position table, or one for another number of tokens.
    """
    table = self.array(POSITIONS)
    if table is None or table.ndim != 3:
      raise WeightsError(f"{self.source} has no table of positions [1, tokens, width]")
    rows = table.shape[1] - self.class_rows
    grid = given or (math.isqrt(rows),) * 2
    for tried in (grid, None if given else fallback):
      if tried is not None and tried[0] * tried[1] == rows:
        return tried
    what = f"not for {given[0]} x {given[1]}" if given else "which is no square"
    if rows == grid[0] * grid[1] + 1 and self.key(CLS_TOKEN) is None:
      token = next(row.published for row in self.table if row.ours == CLS_TOKEN)
      what += f" (is {token} missing, the class token?)"
    raise WeightsError(
      f"{self.source} has positions for {rows} tokens, {what}; "
      "give source_image_size=(height, width), the size that it was trained at"
    )

  def fit_positions(
    self, *, num_rows: int, old_grid: Size, new_grid: Size, method: str | None = None
  ) -> "VitCheckpoint":
    """Resizes the position table to a model's grid, and converts the class token's row.

    If the model has no row for the class token, the row is added to the token; if the file has
    none, it is zero.

    Args:
      num_rows: rows of the model's table.
      old_grid: see `position_grid`.
      new_grid: height and width of the model's grid, in tokens.
      method: a key of `ops.resize.METHODS`; None: the format's own.
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
    return self.replace(arrays=fitted)


def _square(rows: int, *, has_cls: bool) -> Size:
  """Returns the square grid of a table, with or without a row for the class token."""
  for count in (rows - 1, rows) if has_cls else (rows,):
    if math.isqrt(count) ** 2 == count:
      return math.isqrt(count), math.isqrt(count)
  raise WeightsError(
    f"the model has positions for {rows} tokens, which is no square grid; give position_grid"
  )


def _grid(size: Size, side: int) -> Size:
  return size[0] // side, size[1] // side


def has_cls_token(fields: Mapping[str, Any]) -> bool:
  """Returns whether a model with these fields has a class token."""
  return fields["pool"] == "cls" if fields["cls_token"] is None else fields["cls_token"]


def with_table(export: Export, *, class_row: bool) -> Flat:
  """Returns a model's parameters with position embeddings as one table, as in published files.

  Fixed and factorised embeddings are expanded; without embeddings the table is zero.

  Args:
    export: the model, with the image size in its `preprocess`.
    class_row: adds a zero row for the class token if the model has none.
  """
  fields, params = export.fields(), dict(export.variables)
  has_row = has_cls_token(fields) and fields["cls_token_position"]
  learned = fields["position_embedding"] == "learned_1d"
  if learned:
    table = np.asarray(params[POSITIONS])
  else:
    grid = _grid(export.preprocess.image_size, export.model.token_stride)
    table = _fixed_table(fields, params, grid)[None]
  if class_row and not (learned and has_row):
    table = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
  return {**params, POSITIONS: table}


def _fixed_table(fields: Mapping[str, Any], params: Flat, grid: Size) -> np.ndarray:
  kind, width = fields["position_embedding"], fields["width"]
  if kind == "sincos_2d":
    return sincos_2d(*grid, width)
  if kind == "learned_2d":
    halves = [params.pop(f"position_embedding/{part}") for part in ("rows", "columns")]
    rows = np.broadcast_to(halves[0][:, None], (*grid, halves[0].shape[-1]))
    columns = np.broadcast_to(halves[1][None], (*grid, halves[1].shape[-1]))
    return np.concatenate([rows, columns], axis=-1).reshape(-1, width)
  return np.zeros((grid[0] * grid[1], width), np.float32)


def check_fixed(export: Export, fixed: Mapping[str, Any], whose: str) -> None:
  """Raises WeightsError, with all fields, for values that a code base does not support.

  Args:
    export: the model.
    fixed: field -> its only value in the code base, or a tuple of values.
    whose: name of the code base.
  """
  fields = export.fields()
  resnet = fields["resnet"] or {}
  other = []
  for name, known in fixed.items():
    value = resnet.get(name.removeprefix("resnet."), known) if "." in name else fields[name]
    if value not in (known if isinstance(known, tuple) else (known,)):
      other.append(f"{name.removeprefix('resnet.')}={value!r} (there: {known!r})")
  if other:
    raise WeightsError(f"{whose} has no ViT with {', '.join(other)}")
