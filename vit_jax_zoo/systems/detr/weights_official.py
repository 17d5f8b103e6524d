"""Checkpoints of the official code, `detr-r50-e632da11.pth` and others (facebookresearch/detr).

    transformer.encoder.layers.0.self_attn.in_proj_weight    query, key and value, concatenated
    backbone.0.body.layer1.0.conv1.weight                    torchvision's ResNet
    detr.transformer..., bbox_attention..., mask_head...     with a mask head

Not stored: the number of heads (assumed to be 8; known with a mask head) and the dilation of the
last stage (assumed if the file's name has "dc5").
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vit_jax_zoo.weights import backbones as resnet
from vit_jax_zoo.weights import torch_layouts as layouts
from vit_jax_zoo.weights.checkpoint import Checkpoint, Pretrained
from vit_jax_zoo.weights.hub import Entry
from vit_jax_zoo.weights.key_map import Flat, Row, WeightsError, write
from vit_jax_zoo.weights.preprocess import DETECTION
from vit_jax_zoo.weights.readers import Published, write_state_dict
from vit_jax_zoo.weights.torch_layouts import join_qkv, split_qkv

_BODY = "backbone.0.body."
_FUSED = re.compile(r".*\.in_proj_(weight|bias)")
_OTHER_ARCHITECTURES = {
  "ca_qcontent_proj": "Conditional DETR",
  "level_embed": "Deformable DETR",
  "sampling_offsets": "Deformable DETR",
  "encoder.norm.weight": "Table Transformer, a DETR with pre-norm layers",
  "encoder.layernorm.weight": "Table Transformer, a DETR with pre-norm layers",
}
"""Architectures that share most of DETR's keys, by a part of one of their own."""


def _side(side: str, attentions: Mapping[str, str]) -> list[Row]:
  theirs, ours = f"transformer.{side}.layers.{{i}}", f"transformer/{side}_{{i}}"
  norms = ("norm1", "norm2", "norm3")[: len(attentions) + 1]
  names: Any = {"norms": norms, "qkv": "in_proj_{leaf}[{part}]", "mlp": ("linear1", "linear2")}
  return layouts.block_rows(theirs, ours, attentions, **names)


_HEADS = layouts.TO_HEADS, layouts.HEADS_BIAS
_MASK_ROWS = (
  *layouts.layer_rows("bbox_attention.q_linear", "mask_attention/query", *_HEADS),
  *layouts.layer_rows("bbox_attention.k_linear", "mask_attention/key", *_HEADS),
  Row("mask_head.lay1.weight", "mask_head/conv1_kernel", layouts.CONVOLUTION),
  Row("mask_head.lay1.bias", "mask_head/conv1_bias"),
  *layouts.layer_rows("mask_head.lay{i}", "mask_head/conv{i}", layouts.CONVOLUTION),
  *layouts.norm_rows("mask_head.gn{i}", "mask_head/norm{i}"),
  *layouts.layer_rows("mask_head.adapter{i}", "mask_head/adapter{i}", layouts.CONVOLUTION),
  *layouts.layer_rows("mask_head.out_lay", "mask_head/out", layouts.CONVOLUTION),
)


def with_mask_head(rows: Iterable[Row]) -> tuple[Row, ...]:
  """Adds the rows of a mask head, beside which the detector's keys begin with "detr."."""
  return (*(Row(f"detr.{row.published}", row.ours, row.transform) for row in rows), *_MASK_ROWS)


TABLE: tuple[Row, ...] = (
  *resnet.rows(resnet.TORCHVISION, _BODY, "backbone/"),
  Row("backbone.1.row_embed.weight", "row_embedding"),
  Row("backbone.1.col_embed.weight", "column_embedding"),
  *layouts.layer_rows("input_proj", "input_projection", layouts.CONVOLUTION),
  Row("query_embed.weight", "query_embedding"),
  *_side("encoder", {"self_attn": "attention"}),
  *_side("decoder", {"self_attn": "self_attention", "multihead_attn": "cross_attention"}),
  *layouts.norm_rows("transformer.decoder.norm", "transformer/decoder_norm"),
  *layouts.layer_rows("class_embed", "class_head"),
  *layouts.layer_rows("bbox_embed.layers.{i}", "box_head_{i}"),
)
"""Keys of `DETR`, with fused matrices split, and our paths, layers unrolled."""
SEGMENTATION_TABLE = with_mask_head(TABLE)
"""Keys of `DETRsegm`."""


def is_of(published: Mapping[str, np.ndarray]) -> bool:
  """Returns whether the keys are those of the official code."""
  key = "transformer.encoder.layers.0.linear1.weight"
  return key in published or f"detr.{key}" in published


def check_architecture(published: Iterable[str], source: str) -> None:
  """Raises WeightsError for the keys of architectures that only resemble DETR."""
  for part, name in _OTHER_ARCHITECTURES.items():
    if key := next((key for key in published if part in key), None):
      raise WeightsError(f"{source}: {key} is of {name}; supported is DETR (arXiv:2005.12872)")


def infer_fields(published: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
  """Returns a `Detr`'s fields; WeightsError for other models, KeyError for a missing array."""
  check_architecture(published, source)
  prefix = prefix_of(published, "class_embed.weight")
  hidden = f"{prefix}transformer.{{side}}.layers.{{i}}.linear1.weight"
  names = f"{prefix}class_embed.weight", f"{prefix}query_embed.weight"
  fields, mlp_dims = infer_sizes(published, *names, hidden)
  encoder, decoder = mlp_dims.values()
  first = published.get("mask_head.lay1.weight")
  backbone = resnet.infer_fields(published, resnet.TORCHVISION, source, f"{prefix}{_BODY}")
  learned = f"{prefix}backbone.1.row_embed.weight" in published
  return {
    **fields,
    "num_heads": 8 if first is None else first.shape[1] - fields["width"],
    "mlp_dim": encoder,
    "decoder": None if decoder == encoder else {"mlp_dim": decoder},
    "position_embedding": "learned" if learned else "sine",
    "backbone": {**backbone, "output_stride": 16 if "dc5" in source.lower() else 32},
  }


def infer_sizes(
  published: Mapping[str, np.ndarray], class_head: str, queries: str, hidden: str
) -> tuple[dict[str, Any], dict[str, int]]:
  """Returns the fields of a `Detr` that shapes and keys determine, and the MLPs' widths by side.

  `hidden` is the key of an MLP's first kernel, with {side} and {i} for the layer.
  """
  classes, width = published[class_head].shape
  fields = {
    "num_classes": classes - 1,
    "num_queries": len(published[queries]),
    "width": width,
    "mask_head": "mask_head.lay1.weight" in published,
  }
  mlp_dims = {}
  for side in ("encoder", "decoder"):
    mlp_dims[side] = len(published[hidden.format(side=side, i=0)])
    keys = (hidden.format(side=side, i=i) for i in itertools.count())
    fields[f"{side}_depth"] = next(i for i, key in enumerate(keys) if key not in published)
  return fields, mlp_dims


def prefix_of(published: Mapping[str, np.ndarray], key: str) -> str:
  """Returns the prefix of the detector's keys, of which `key` is one."""
  return "detr." if f"detr.{key}" in published else ""


def checkpoint_fields(fields: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """Returns the fields of `Checkpoint` that the official and Hugging Face's format share."""
  has_masks, counters = fields["mask_head"], (rf".*\.{layouts.COUNTER}",)
  is_coco_panoptic = has_masks and fields["num_classes"] == 250
  return {
    "family": "detr",
    "fields": fields,
    "task": "detection",
    "task_fields": {"stuff_from": 91} if is_coco_panoptic else {},
    "ignore": (*counters, r"bbox_attention\..*", r"mask_head\..*") if prefix else counters,
    "heads": ("class_head/", *(() if has_masks else ("mask_head/", "mask_attention/"))),
  }


def read_checkpoint(published: Published) -> Checkpoint:
  """Reads a `.pth` file of the official code, or its arrays as safetensors."""
  fields = infer_fields(published.arrays, published.file.name)
  prefix = prefix_of(published.arrays, "class_embed.weight")
  return Checkpoint(
    source=published.path,
    arrays=split_qkv(published.arrays, _FUSED),
    table=SEGMENTATION_TABLE if prefix else TABLE,
    preprocess=DETECTION,
    **checkpoint_fields(fields, prefix),
  )


def state_dict(variables: Mapping[str, np.ndarray]) -> Flat:
  """Returns a DETR's variables, given by path with layers unrolled, under the official keys."""
  has_masks = any(path.startswith("mask_head/") for path in variables)
  return join_qkv(write(variables, SEGMENTATION_TABLE if has_masks else TABLE))


def write_checkpoint(path: str, export: Pretrained) -> None:
  """Writes a safetensors file, or `{"model": state_dict}` for the official code (needs torch)."""
  fields = export.fields()
  resnet.check_plain(fields, "the official code")
  heads = 8 if fields["mask_head"] else fields["num_heads"]
  others = [f"num_heads={heads} (read as 8)"] if heads != 8 else []
  export.warn_not_stored(path, DETECTION, *others)
  write_state_dict(path, state_dict(export.variables), wrapper="model")


_DETR = {
  "detr_r50": ("e632da11", "42.0 box AP"),
  "detr_r50_dc5": ("f0fb7ef5", "43.3 box AP"),
  "detr_r101": ("2c7b67e5", "43.5 box AP"),
  "detr_r101_dc5": ("a2e86def", "44.9 box AP"),
  "detr_r50_panoptic": ("00ce5173", "43.4 PQ"),
  "detr_r50_dc5_panoptic": ("da08f1b1", "44.6 PQ"),
  "detr_r101_panoptic": ("40021d53", "45.1 PQ"),
}
"""Start of the SHA-256 of the official file, score on COCO val2017."""

_README = "facebookresearch/detr, README"
PAPER_SCORES = {model: (f"{score} (COCO)", _README) for model, (_, score) in _DETR.items()}

PUBLISHED: dict[str, Entry] = {}
for _model, (_sha256, _) in _DETR.items():
  _name, _score = _model.replace("_", "-"), PAPER_SCORES[_model]
  _url = f"https://dl.fbaipublicfiles.com/detr/{_name}-{_sha256}.pth"
  _hub = f"facebook/{_name.replace('-r', '-resnet-')}"
  PUBLISHED[f"{_model}_coco"] = Entry(_model, (_url,), "", _sha256, *_score)
  PUBLISHED[f"{_model}_coco_hub"] = Entry(_model, (), _hub, "", *_score)
