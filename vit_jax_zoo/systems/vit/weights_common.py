"""Published ViT files: resizing of position embeddings, and the row of the class token."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vit_jax_zoo.ops.resize import find_grid, resize_position_grid
from vit_jax_zoo.systems.vit.model import PositionEmbedding
from vit_jax_zoo.weights.checkpoint import Checkpoint, Pretrained, Size
from vit_jax_zoo.weights.key_map import Flat, WeightsError
from vit_jax_zoo.weights.preprocess import Preprocess

CLS_TOKEN = "cls_token"
POSITIONS = "position_embedding/table"
GOOGLE = Preprocess((224, 224))  # TensorFlow resizes without the aspect ratio, to [-1, 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitCheckpoint(Checkpoint):
  """A ViT file as its format returns it."""

  family: str = "vit"
  preprocess: Preprocess = GOOGLE
  first_kernels: tuple[str, ...] = ("resnet/root_conv/kernel", "embedding/kernel")
  below_heads: tuple[str, ...] = ("pre_logits/",)
  resize: str  # the format's method of resizing position embeddings, a key of `ops.resize.METHODS`
  # whether the file states if the class token has a row in the table. If not, 16 rows are 4 x 4, or
  # 3 x 5 and the class token's: the size of the images decides.
  cls_row_is_stated: bool = True

  def choose_size(
    self, model: Any, requested: Size | None, trained: Size | None
  ) -> tuple[Size, "VitCheckpoint"]:
    trained, stride, checkpoint = trained or self.image_size, model.token_stride, self
    if self._table is not None:
      grids = (size and model.token_grid(size) for size in (trained, requested))
      checkpoint, (height, width) = self._with_grid(*grids)
      trained = (height * stride, width * stride)
    size = requested or trained or self.preprocess.image_size
    return size, checkpoint.replace(image_size=trained)

  def at_size(
    self, target: Mapping[str, Any], model: Any, size: Size, *, method: str | None = None
  ) -> "VitCheckpoint":
    if POSITIONS not in target or self.image_size is None or self._table is None:
      return self
    old, new = model.token_grid(self.image_size), model.token_grid(size)
    return self._fit_positions(target[POSITIONS].shape[1], old, new, method)

  def fit_positions_to(
    self, target: Mapping[str, Any], grid: Size | None, method: str | None
  ) -> "VitCheckpoint":
    theirs, positions = self.array(POSITIONS), target.get(POSITIONS)
    if theirs is None or positions is None or (grid is None and positions.shape == theirs.shape):
      return self
    rows = positions.shape[1]
    if grid is None:
      found = find_grid(rows, (1, 0) if CLS_TOKEN in target else (0,), None)
      if found is None:
        wrong = f"the model has positions for {rows} tokens, which is no square grid"
        raise WeightsError(f"{wrong}; give position_grid")
      grid = found[1]
    checkpoint, old = self._with_grid(None, grid)
    return checkpoint._fit_positions(rows, old, grid, method)

  @property
  def _table(self) -> np.ndarray | None:
    """The position table [1 n d]; None if it has another shape, which is reported later."""
    table = self.array(POSITIONS)
    return table if table is not None and table.ndim == 3 else None

  @property
  def _class_rows(self) -> int:
    return int(self.fields["cls_token_position"] and self.key(CLS_TOKEN) is not None)

  def _with_grid(self, given: Size | None, fallback: Size | None) -> tuple["VitCheckpoint", Size]:
    """Returns the checkpoint, and its position table's grid: `given`, a square one or `fallback`.

    A known grid determines `cls_token_position`: 25 rows are 5 x 5, or 4 x 6 and one.
    """
    if self._table is None:
      raise WeightsError(f"{self.source} has no table of positions [1, tokens, width]")
    rows, has_cls, checkpoint = self._table.shape[1], self.key(CLS_TOKEN) is not None, self
    known = given or (None if self.cls_row_is_stated else fallback)
    if known and has_cls and (found := find_grid(rows, (0, 1), known)):
      checkpoint = self.replace(fields={**self.fields, "cls_token_position": bool(found[0])})
    rows -= checkpoint._class_rows
    tried = (given,) if given or not fallback else (None, fallback)
    if found := find_grid(rows, (0,), *tried):
      return checkpoint, found[1]
    what = f"not for {given[0]} x {given[1]}" if given else "which is no square"
    if find_grid(rows, (1,), given) and not has_cls:
      token = next(row.published for row in self.table if row.ours == CLS_TOKEN)
      what += f" (is {token} missing, the class token?)"
    fix = "give source_image_size=(height, width), the size that it was trained at"
    raise WeightsError(f"{self.source} has positions for {rows} tokens, {what}; {fix}")

  def _fit_positions(self, rows: int, old: Size, new: Size, method: str | None) -> "VitCheckpoint":
    # A class token's row is added to the token if the model has none, zero if the file has none.
    key, cls_key = self.key(POSITIONS) or "", self.key(CLS_TOKEN) or ""
    fitted, count = dict(self.arrays), self._class_rows
    cls_row, table = np.split(fitted[key][0], [count])
    table = resize_position_grid(table, old, new, method or self.resize)
    class_rows = rows - len(table)
    if count and not class_rows:
      fitted[cls_key] = fitted[cls_key] + cls_row
    elif class_rows:
      table = np.concatenate([cls_row if count else np.zeros_like(table[:1]), table])
    fitted[key] = table[None]
    return self.replace(arrays=fitted)


def stage_sizes(keys: Iterable[str], pattern: str, *, first: int) -> tuple[int, ...]:
  """Returns the units of each stage; the pattern's groups are a stage's and a unit's number."""
  found = [re.match(pattern, key) for key in keys]
  last = dict(sorted((int(match[1]), int(match[2])) for match in found if match))
  return tuple(unit + 1 - first for unit in last.values())


def not_a_vit(published: Mapping[str, np.ndarray], source: str, whose: str) -> WeightsError:
  """Returns the error for a file without a ViT's arrays."""
  keys = ", ".join(sorted(published)[:3])
  return WeightsError(f"{source}: keys {keys}, ...; expected a ViT in the layout of {whose}")


def with_table(export: Pretrained, *, class_row: bool) -> Flat:
  """Returns a model's parameters with position embeddings as one table, zero if there are none.

  `class_row` adds a zero row for the class token if the model has none.
  """
  model, params = export.model, dict(export.variables)
  is_learned = model.position_embedding == "learned_1d"
  if not is_learned:
    parts = ("rows", "columns") if model.position_embedding == "learned_2d" else ()
    own = {part: params.pop(f"position_embedding/{part}") for part in parts}
    grid = model.token_grid(export.preprocess.image_size)
    table = PositionEmbedding(model.position_embedding).apply({"params": own}, grid, model.width)
    params[POSITIONS] = np.asarray(table)
  if class_row and not (is_learned and model.has_cls_token and model.cls_token_position):
    table = params[POSITIONS]
    params[POSITIONS] = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
  return params


def check_fixed(export: Pretrained, fixed: Mapping[str, Any], whose: str) -> None:
  """Raises WeightsError for fields other than `fixed`: values, or tuples of them, by field."""
  fields = export.fields()
  fields |= {f"resnet.{name}": value for name, value in (fields["resnet"] or {}).items()}
  other = [
    f"{name}={fields[name]!r} (there: {known!r})"
    for name, known in fixed.items()
    if name in fields and fields[name] not in (known if isinstance(known, tuple) else (known,))
  ]
  if other:
    raise WeightsError(f"{whose} has no ViT with {', '.join(other)}")
