"""Google's ViT checkpoints, `.npz`: gs://vit_models/{imagenet21k,augreg,sam,...} and big_vision's.

The published files spell modules as Flax did before Linen (`LayerNorm_2`, `MlpBlock_3`), files
written since as Linen does (`LayerNorm_1`, `MlpBlock_0`); group norms are [1 1 1 c] or [c]; all
keys may stand below `params/` or `opt/target/`; big_vision may stack the layers, and keeps its
position table at the top, without a row for the class token. All of that is read; writing gives the
published spelling.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from vit_jax_zoo.ops.position_grid import resize_position_grid
from vit_jax_zoo.weights.table import CHANNELS_4D, Flat, Row, WeightsError, unroll, write

_PREFIXES = ("params/", "opt/target/")
_OTHER_STATE = (r"opt/state/.*", r"opt/.*step", r"step")


def _pairs(published: str, ours: str, leaves: tuple[str, ...] = ("kernel", "bias")) -> list[Row]:
  return [Row(f"{published}/{leaf}", f"{ours}/{leaf}") for leaf in leaves]


def _block_rows(norm: str, attention: str, mlp_norm: str, mlp: str) -> list[Row]:
  theirs, ours = "Transformer/encoderblock_{i}", "encoder/block_{i}"
  rows = _pairs(f"{theirs}/{norm}", f"{ours}/attention_norm", ("scale", "bias"))
  for part in ("query", "key", "value", "out"):
    rows += _pairs(f"{theirs}/{attention}/{part}", f"{ours}/attention/{part}")
  rows += _pairs(f"{theirs}/{mlp_norm}", f"{ours}/mlp_norm", ("scale", "bias"))
  rows += _pairs(f"{theirs}/{mlp}/Dense_0", f"{ours}/mlp/hidden")
  return rows + _pairs(f"{theirs}/{mlp}/Dense_1", f"{ours}/mlp/out")


def _group_norm(published: str, ours: str) -> list[Row]:
  return [Row(f"{published}/{leaf}", f"{ours}/{leaf}", CHANNELS_4D) for leaf in ("scale", "bias")]


def _resnet_rows() -> list[Row]:
  rows = [Row("conv_root/kernel", "resnet/root_conv/kernel")]
  rows += _group_norm("gn_root", "resnet/root_norm")
  theirs, ours = "block{s+1}/unit{u+1}", "resnet/stage_{s}_unit_{u}"
  for part in ("1", "2", "3"):
    rows.append(Row(f"{theirs}/conv{part}/kernel", f"{ours}/conv_{part}/kernel"))
    rows += _group_norm(f"{theirs}/gn{part}", f"{ours}/norm_{part}")
  rows.append(Row(f"{theirs}/conv_proj/kernel", f"{ours}/shortcut_conv/kernel"))
  return rows + _group_norm(f"{theirs}/gn_proj", f"{ours}/shortcut_norm")


_POSITIONS = "Transformer/posembed_input/pos_embedding"
_POSITIONS_BIG_VISION = "pos_embedding"

TABLE: tuple[Row, ...] = (
  *_resnet_rows(),
  Row("cls", "cls_token"),
  *_pairs("embedding", "embedding"),
  Row(_POSITIONS, "position_embedding/table"),
  Row(_POSITIONS_BIG_VISION, "position_embedding/table"),
  *_block_rows("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"),
  *_block_rows("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),
  *_pairs("Transformer/encoder_norm", "norm", ("scale", "bias")),
  *_pairs("pre_logits", "pre_logits"),
  *_pairs("head", "head"),
)


def read_file(path: str) -> Flat:
  """Returns the file's parameters by key, without prefix and optimizer state, layers unrolled."""
  with np.load(path, allow_pickle=False) as file:
    arrays = {key: _as_numbers(file[key]) for key in file.files}
  prefix = next((p for p in _PREFIXES if any(key.startswith(p) for key in arrays)), "")
  flat: Flat = {}
  for key, array in arrays.items():
    key = key.removeprefix(prefix)
    if any(re.fullmatch(pattern, key) for pattern in _OTHER_STATE):
      continue
    if key.startswith("Transformer/encoderblock/"):
      rest = key.removeprefix("Transformer/encoderblock/")
      flat.update({f"Transformer/encoderblock_{i}/{rest}": x for i, x in enumerate(array)})
    else:
      flat[key] = array
  return flat


def _as_numbers(array: np.ndarray) -> np.ndarray:
  # numpy stores bfloat16 as two bytes without a meaning.
  return array.view(ml_dtypes.bfloat16).astype(np.float32) if array.dtype == "V2" else array


def infer_fields(published: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
  """Returns the fields of the `VisionTransformer` that a file's arrays fit.

  Args:
    published: as `read_file` returns them.
    source: the file's name, for the message.

  Raises:
    WeightsError: there is no ViT in the file.
  """
  query = _first(published, r"Transformer/encoderblock_0/.*/query/kernel")
  hidden = _first(published, r"Transformer/encoderblock_0/MlpBlock_\d/Dense_0/kernel")
  embedding = published.get("embedding/kernel")
  if query is None or hidden is None or embedding is None:
    keys = ", ".join(sorted(published)[:3])
    raise WeightsError(f"{source} holds no ViT in Google's layout; its keys begin with {keys}")
  blocks = [re.match(r"Transformer/encoderblock_(\d+)/", key) for key in published]
  fields: dict[str, Any] = {
    "num_classes": _side(published, "head/bias", 0),
    "patch_size": embedding.shape[0],
    "width": query.shape[0],
    "depth": 1 + max(int(match[1]) for match in blocks if match),
    "num_heads": query.shape[1],
    "mlp_dim": hidden.shape[1],
    "representation_size": _side(published, "pre_logits/bias", 0),
    "pool": "cls" if "cls" in published else "mean",
    "cls_token_position": _POSITIONS in published,
    "position_embedding": "learned_1d" if position_key(published) else "sincos_2d",
  }
  if "conv_root/kernel" in published:
    fields["resnet"] = _infer_resnet(published)
  return fields


def _infer_resnet(published: Mapping[str, np.ndarray]) -> dict[str, Any]:
  sizes: dict[int, int] = {}
  for key in published:
    if match := re.match(r"block(\d+)/unit(\d+)/", key):
      stage, unit = int(match[1]), int(match[2])
      sizes[stage] = max(unit, sizes.get(stage, 0))
  stages = tuple(sizes[stage] for stage in sorted(sizes))
  return {"stage_sizes": stages, "width": published["conv_root/kernel"].shape[-1]}


def _first(published: Mapping[str, np.ndarray], pattern: str) -> np.ndarray | None:
  return next((array for key, array in published.items() if re.fullmatch(pattern, key)), None)


def _side(published: Mapping[str, np.ndarray], key: str, axis: int) -> int | None:
  return published[key].shape[axis] if key in published else None


def position_key(published: Mapping[str, np.ndarray]) -> str | None:
  """Returns the key of the file's position table, or None if it has none."""
  return next((k for k in (_POSITIONS, _POSITIONS_BIG_VISION) if k in published), None)


def position_grid(
  published: Mapping[str, np.ndarray],
  source: str,
  *,
  given: tuple[int, int] | None = None,
  fallback: tuple[int, int] | None = None,
) -> tuple[int, int]:
  """Returns height and width, in tokens, of the grid that the file's positions cover.

  Args:
    published: as `read_file` returns them, with a position table.
    source: the file's name, for the message.
    given: the grid, if it is known. Otherwise it is taken to be square.
    fallback: a grid to try where the number of rows is no square.

  Raises:
    WeightsError: the file has another number of rows.
  """
  rows = published[position_key(published) or ""].shape[1] - _class_rows(published)
  side = math.isqrt(rows)
  for grid in ((side, side), fallback) if given is None else (given,):
    if grid is not None and grid[0] * grid[1] == rows:
      return grid
  what = "which is no square" if given is None else f"not for {given[0]} x {given[1]}"
  raise WeightsError(
    f"{source} has positions for {rows} tokens, {what}; "
    "give source_image_size=(height, width), the size that it was trained at"
  )


def _class_rows(published: Mapping[str, np.ndarray]) -> int:
  return int(_POSITIONS in published and "cls" in published)


def fit_positions(
  published: Mapping[str, np.ndarray],
  *,
  num_rows: int,
  old_grid: tuple[int, int],
  new_grid: tuple[int, int],
  method: str = "corner_aligned",
) -> Flat:
  """Resizes the position table to a model's grid, and moves the class token's row if it must.

  The token's position and the token itself are only ever added up: where the model has no row for
  it, the row goes into `cls`; where the file has none, a row of zeros changes nothing.

  Args:
    published: as `read_file` returns them.
    num_rows: rows of the model's table.
    old_grid: see `position_grid`.
    new_grid: height and width of the model's grid, in tokens.
    method: a key of `position_grid.METHODS`.
  """
  key = position_key(published)
  if key is None:
    return dict(published)
  fitted = dict(published)
  count = _class_rows(published)
  cls_row, table = published[key][0, :count], published[key][0, count:]
  table = resize_position_grid(table, old_grid, new_grid, method)
  wanted = num_rows - len(table)
  if count and not wanted:
    fitted["cls"] = published["cls"] + cls_row
  elif wanted and not count:
    cls_row = np.zeros_like(table[:1])
  if wanted:
    table = np.concatenate([cls_row, table])
  fitted[key] = table[None]
  return fitted


def write_file(
  path: str, params: Mapping[str, np.ndarray], *, cls_token_position: bool = True
) -> None:
  """Writes a ViT's parameters as Google published them: what `read_file` reads.

  Args:
    path: of the .npz file.
    params: by "/"-joined path, layers scanned or unrolled.
    cls_token_position: the model's field; a table without the class token's row goes where
      big_vision keeps it, so that a reader knows.
  """
  published = write(unroll(params), TABLE)
  if not cls_token_position and _POSITIONS in published:
    published[_POSITIONS_BIG_VISION] = published.pop(_POSITIONS)
  np.savez(path, allow_pickle=False, **published)
