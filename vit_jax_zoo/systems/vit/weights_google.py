"""Google's ViT checkpoints, `.npz`: gs://vit_models/{imagenet21k,augreg,sam,...} and big_vision's.

Reads the module names of Flax before Linen (`LayerNorm_2`, `MlpBlock_3`) and of Linen
(`LayerNorm_1`, `MlpBlock_0`), group norms as [1 1 1 c] or [c], keys below `params/` or
`opt/target/`, stacked layers, and big_vision's position table, which is at the top level without a
row for the class token. Writes the published names.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from vit_jax_zoo.systems.vit.weights_common import (
  PATCH_SIDE,
  VitCheckpoint,
  check_fixed,
  has_cls_token,
  with_table,
)
from vit_jax_zoo.weights.checkpoint import Export
from vit_jax_zoo.weights.infer import count, side
from vit_jax_zoo.weights.key_map import CHANNELS_4D, Flat, Row, WeightsError, unroll, write
from vit_jax_zoo.weights.readers import Published

FIXED: dict[str, Any] = {
  "activation": "gelu_tanh",
  "layer_norm_epsilon": 1e-6,
  "fc_norm": False,
  "qkv_bias": True,
  "resnet.group_norm_epsilon": 1e-6,
  "resnet.std_epsilon": 1e-5,
  "resnet.variance_epsilon": 0.0,
}
"""Values of our fields that Google's code is limited to."""

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


def is_of(arrays: Mapping[str, np.ndarray]) -> bool:
  """Returns whether the keys are Google's."""
  return any(
    key.endswith("embedding/kernel") or "Transformer/encoderblock" in key for key in arrays
  )


def normalize(arrays: Mapping[str, np.ndarray]) -> Flat:
  """Returns the parameters without prefixes and optimizer state, with layers unrolled."""
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


def infer_fields(published: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
  """Returns the fields of the `VisionTransformer` that fit a file's arrays.

  Args:
    published: the result of `normalize`.
    source: the file's name.

  Raises:
    WeightsError: the file contains no ViT.
  """
  block = r"Transformer/encoderblock_(\d+)/"
  query, hidden = rf"{block}.*/query/kernel", rf"{block}MlpBlock_\d/Dense_0/kernel"
  width, num_heads = side(published, (query, 3, 0)), side(published, (query, 3, 1))
  mlp_dim = side(published, (hidden, 2, 1))
  if width is None or mlp_dim is None:
    keys = ", ".join(sorted(published)[:3])
    raise WeightsError(f"{source}: keys {keys}, ...; expected a ViT in Google's layout")
  # Without a table and a class token, big_vision's model has sine-cosine embeddings.
  has_table = any(key in published for key in (_POSITIONS, _POSITIONS_BIG_VISION, "cls"))
  fields: dict[str, Any] = {
    "num_classes": _outputs_of(published, "head"),
    "patch_size": side(published, ("embedding/kernel", 4, 0)) or PATCH_SIDE,
    "width": width,
    "depth": count(published, block),
    "num_heads": num_heads,
    "mlp_dim": mlp_dim,
    "representation_size": _outputs_of(published, "pre_logits"),
    "pool": "cls" if "cls" in published else "mean",
    "cls_token_position": _POSITIONS in published,
    "position_embedding": "learned_1d" if has_table else "sincos_2d",
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


def _outputs_of(published: Mapping[str, np.ndarray], layer: str) -> int | None:
  return side(published, (f"{layer}/bias", 1, 0), (f"{layer}/kernel", 2, 1))


def read_checkpoint(published: Published) -> VitCheckpoint:
  """Reads a file's arrays; the preprocessing is that of Google's evaluations.

  Raises:
    WeightsError: the file contains no ViT.
  """
  arrays = normalize(published.arrays)
  return VitCheckpoint(
    source=published.path,
    arrays=arrays,
    table=TABLE,
    fields=infer_fields(arrays, published.path),
    resize="corner_aligned",
  )


def write_checkpoint(path: str, export: Export) -> None:
  """Writes a model as Google published it, without its preprocessing.

  Raises:
    WeightsError: Google's code does not support the model.
  """
  check_fixed(export, FIXED, "Google's code")
  fields = export.fields()
  if has_cls_token(fields) != (fields["pool"] == "cls"):
    raise WeightsError("cls_token: True with pool='mean'; Google's code has no such ViT")
  own_row = has_cls_token(fields) and fields["cls_token_position"]
  # A file without a table has big_vision's sine-cosine embeddings.
  fixed = fields["position_embedding"] == "sincos_2d" and not has_cls_token(fields)
  params = export.variables if fixed else with_table(export, class_row=own_row)
  write_file(path, params, cls_token_position=own_row or not has_cls_token(fields))


def write_file(
  path: str, params: Mapping[str, np.ndarray], *, cls_token_position: bool = True
) -> None:
  """Writes a ViT's parameters as Google published them.

  Args:
    path: of the .npz file, local or `gs://bucket/...`.
    params: by "/"-joined path, layers scanned or unrolled.
    cls_token_position: the model's field; a table without the class token's row is written under
      big_vision's key.
  """
  published = write(unroll(params), TABLE)
  if not cls_token_position and _POSITIONS in published:
    published[_POSITIONS_BIG_VISION] = published.pop(_POSITIONS)
  with epath.Path(path).open("wb") as file:
    np.savez(file, allow_pickle=False, **published)
