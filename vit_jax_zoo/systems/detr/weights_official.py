"""DETR's own checkpoints: `detr-r50-e632da11.pth` and its siblings (facebookresearch/detr).

    transformer.encoder.layers.0.self_attn.in_proj_weight    query, key, value one upon the other
    backbone.0.body.layer1.0.conv1.weight                    torchvision's ResNet
    detr.transformer..., bbox_attention..., mask_head...     with a mask head

A file tells neither the number of heads, which is 8 (with a mask head it is known), nor whether the
last stage is dilated: that is read off "dc5" in its name, as the published ones have it. Where that
is wrong, give `num_heads`, or `backbone` with its "output_stride".
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax_zoo.weights import resnet_torchvision as resnet
from vit_jax_zoo.weights.checkpoint import Checkpoint, Export
from vit_jax_zoo.weights.detection_layouts import (
  MASK_ROWS,
  PREPROCESS,
  check_backbone,
  heads_of,
  ignored,
  prefixed,
  stuff_of,
)
from vit_jax_zoo.weights.fused_qkv import PARTS, join, split
from vit_jax_zoo.weights.key_map import Flat, Row, write
from vit_jax_zoo.weights.readers import Published
from vit_jax_zoo.weights.torch_file import write_torch
from vit_jax_zoo.weights.torch_layouts import (
  CONVOLUTION,
  FROM_HEADS,
  HEADS_BIAS,
  TO_HEADS,
  contiguous,
  layer_rows,
  norm_rows,
  write_safetensors,
)

_BODY = "backbone.0.body."
_JOINT = re.compile(r".*\.in_proj_(weight|bias)")


def _attention_rows(published: str, ours: str) -> list[Row]:
  rows = []
  for part in PARTS:
    rows.append(Row(f"{published}.in_proj_weight[{part}]", f"{ours}/{part}/kernel", TO_HEADS))
    rows.append(Row(f"{published}.in_proj_bias[{part}]", f"{ours}/{part}/bias", HEADS_BIAS))
  return rows + layer_rows(f"{published}.out_proj", f"{ours}/out", FROM_HEADS)


def _side_rows(side: str, attentions: Mapping[str, str]) -> list[Row]:
  """Rows of the encoder's or the decoder's layers; norms are numbered in the order of branches."""
  theirs, ours = f"transformer.{side}.layers.{{i}}", f"transformer/{side}_{{i}}"
  rows = []
  for index, (published, name) in enumerate(attentions.items(), start=1):
    rows += _attention_rows(f"{theirs}.{published}", f"{ours}/{name}")
    rows += norm_rows(f"{theirs}.norm{index}", f"{ours}/{name}_norm")
  rows += layer_rows(f"{theirs}.linear1", f"{ours}/mlp/hidden")
  rows += layer_rows(f"{theirs}.linear2", f"{ours}/mlp/out")
  rows += norm_rows(f"{theirs}.norm{len(attentions) + 1}", f"{ours}/mlp_norm")
  return rows + norm_rows(f"transformer.{side}.norm", f"transformer/{side}_norm")


TABLE: tuple[Row, ...] = (
  *resnet.rows(resnet.TORCHVISION, _BODY, "backbone/"),
  Row("backbone.1.row_embed.weight", "row_embedding"),
  Row("backbone.1.col_embed.weight", "column_embedding"),
  *layer_rows("input_proj", "input_projection", CONVOLUTION),
  Row("query_embed.weight", "query_embedding"),
  *_side_rows("encoder", {"self_attn": "attention"}),
  *_side_rows("decoder", {"self_attn": "self_attention", "multihead_attn": "cross_attention"}),
  *layer_rows("class_embed", "class_head"),
  *layer_rows("bbox_embed.layers.{i}", "box_head_{i}"),
)
"""`DETR`, between the keys that `split` leaves and our paths, layers unrolled."""
SEGMENTATION_TABLE = (*prefixed("detr.", TABLE), *MASK_ROWS)
"""`DETRsegm`, which has a DETR inside."""


def is_of(published: Mapping[str, np.ndarray]) -> bool:
  """Tells whether a file's keys are the official code's, as far as the first layers go."""
  return any(
    f"{prefix}transformer.encoder.layers.0.linear1.weight" in published for prefix in ("", "detr.")
  )


def infer_fields(published: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
  """Returns the fields of the `Detr` that a state dict is of.

  Args:
    published: the arrays, as they lie in the file.
    source: the file's name: "dc5" in it stands for a dilated last stage.

  Raises:
    WeightsError: there is no such backbone in it.
    KeyError: an array is missing from which a size is read.
  """
  prefix = _prefix(published)
  classes, width = published[f"{prefix}class_embed.weight"].shape
  first = published.get("mask_head.lay1.weight")
  backbone = resnet.infer_fields(published, resnet.TORCHVISION, source, f"{prefix}{_BODY}")
  encoder, decoder = (
    published[f"{prefix}transformer.{side}.layers.0.linear1.weight"].shape[0]
    for side in ("encoder", "decoder")
  )
  return {
    "num_classes": classes - 1,
    "num_queries": published[f"{prefix}query_embed.weight"].shape[0],
    "width": width,
    "encoder_depth": _depth(published, f"{prefix}transformer.encoder.layers"),
    "decoder_depth": _depth(published, f"{prefix}transformer.decoder.layers"),
    "num_heads": 8 if first is None else first.shape[1] - width,
    "mlp_dim": encoder,
    "decoder": None if decoder == encoder else {"mlp_dim": decoder},
    "pre_norm": f"{prefix}transformer.encoder.norm.weight" in published,
    "position_embedding": (
      "learned" if f"{prefix}backbone.1.row_embed.weight" in published else "sine"
    ),
    "mask_head": first is not None,
    "backbone": {**backbone, "output_stride": 16 if "dc5" in source.lower() else 32},
  }


def _prefix(published: Mapping[str, np.ndarray]) -> str:
  return "detr." if "detr.class_embed.weight" in published else ""


def _depth(published: Mapping[str, np.ndarray], layers: str) -> int:
  return sum(re.fullmatch(rf"{re.escape(layers)}\.\d+\.linear1\.weight", k) is not None
             for k in published)  # fmt: skip


def read_checkpoint(published: Published) -> Checkpoint:
  """Reads a `.pth` of the official code's, or the same as safetensors.

  Raises:
    WeightsError: there is no DETR of the official code's in it.
  """
  fields = infer_fields(published.arrays, published.file.name)
  prefix = _prefix(published.arrays)
  return Checkpoint(
    source=published.path,
    family="detr",
    arrays=split(published.arrays, _JOINT),
    table=SEGMENTATION_TABLE if prefix else TABLE,
    fields=fields,
    preprocess=PREPROCESS,
    task="detection",
    task_fields=stuff_of(fields),
    ignore=ignored(prefix),
    heads=heads_of(has_masks=fields["mask_head"]),
  )


def state_dict(variables: Mapping[str, np.ndarray]) -> Flat:
  """Returns a DETR's variables under the official keys.

  Args:
    variables: by path, layers unrolled.

  Raises:
    WeightsError: the official code has no name for some of them.
  """
  has_masks = any(path.startswith("mask_head/") for path in variables)
  return contiguous(join(write(variables, SEGMENTATION_TABLE if has_masks else TABLE)))


def write_checkpoint(path: str, export: Export) -> None:
  """Writes `{"model": state_dict}`, as the official code loads it; or a safetensors file.

  Args:
    path: `.safetensors`, else a file of PyTorch's, which must be installed.
    export: the model.

  Raises:
    WeightsError: the official code has no such model.
  """
  check_backbone(export.fields(), "the official code")
  arrays = state_dict(export.variables)
  if path.endswith(".safetensors"):
    write_safetensors(path, arrays)
  else:
    write_torch(path, arrays, wrapper="model")
