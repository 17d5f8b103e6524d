"""Hugging Face's ViTs: folders with `config.json` and `model.safetensors`.

Keys of `ViTForImageClassification` begin with `vit.`, those of `ViTModel` do not; its pooler is the
paper's `pre_logits`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax_zoo.systems.vit import weights_common as common
from vit_jax_zoo.weights import json_files
from vit_jax_zoo.weights import torch_layouts as layouts
from vit_jax_zoo.weights.checkpoint import Pretrained, count, outputs_of, side
from vit_jax_zoo.weights.key_map import Flat, Row, WeightsError, unroll, write
from vit_jax_zoo.weights.readers import Published

ACTIVATIONS = {
  **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
  **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new"), "gelu_tanh"),
  "quick_gelu": "quick_gelu",
  "relu": "relu",
}
"""transformers' `hidden_act` -> our activation; the first of several is written."""

FIXED: dict[str, Any] = {
  "pool": "cls",
  "resnet": None,
  "fc_norm": False,
  "activation": tuple(dict.fromkeys(ACTIVATIONS.values())),
}
"""Values of our fields that transformers' ViT is limited to: one, or one of several."""

_MULTI_LABEL = "multi_label_classification"  # transformers' pipeline then applies a sigmoid
_LAYER = r"(?:vit\.)?encoder\.layer\.(\d+)\."

BASE_TABLE: tuple[Row, ...] = (  # of `ViTModel`
  Row("embeddings.cls_token", "cls_token"),
  Row("embeddings.position_embeddings", "position_embedding/table"),
  *layouts.layer_rows("embeddings.patch_embeddings.projection", "embedding", layouts.CONVOLUTION),
  *layouts.block_rows(
    "encoder.layer.{i}",
    "encoder/block_{i}",
    {"attention": "attention"},
    norms=("layernorm_before", "layernorm_after"),
    qkv="attention.{part}.{leaf}",
    out="output.dense",
    mlp=("intermediate.dense", "output.dense"),
  ),
  *layouts.norm_rows("layernorm", "norm"),
  *layouts.layer_rows("pooler.dense", "pre_logits"),
)
CLASSIFIER_TABLE = (  # of `ViTForImageClassification`
  *(Row(f"vit.{row.published}", row.ours, row.transform) for row in BASE_TABLE),
  *layouts.layer_rows("classifier", "head"),
)


def is_of(published: Mapping[str, np.ndarray]) -> bool:
  """Returns whether the keys are Hugging Face's."""
  return any(re.match(_LAYER, key) for key in published)


def read_checkpoint(published: Published) -> common.VitCheckpoint:
  """Reads a folder with its `config.json`."""
  path, config, arrays = published.path, published.config, published.arrays
  json_files.check_config(published, {"model_type": "vit"}, ["num_attention_heads", "patch_size"])
  activation, pooler = config.get("hidden_act", "gelu"), config.get("pooler_act", "tanh")
  if activation not in [*ACTIVATIONS] or pooler != "tanh":
    given = f"hidden_act {activation!r} and pooler_act {pooler!r}"
    raise WeightsError(f"{path} has {given}; known are {', '.join(ACTIVATIONS)}, and tanh")
  file, sides = f"{path}/config.json", [("height", "width")]
  image = json_files.size_of(config.get("image_size", 224), "image_size", sides, file)
  patch = json_files.size_of(config["patch_size"], "patch_size", sides, file)
  if patch["height"] != patch["width"]:
    raise WeightsError(f"{path} has patches of {config['patch_size']}; ours are square")
  hidden = rf"{_LAYER}intermediate\.dense\.weight"
  width, mlp_dim = side(arrays, (hidden, 2, 1)), side(arrays, (hidden, 2, 0))
  if width is None or mlp_dim is None:
    raise common.not_a_vit(arrays, path, "Hugging Face")
  fields: dict[str, Any] = {
    "num_classes": outputs_of(arrays, "classifier"),
    "patch_size": patch["height"],
    "width": width,
    "depth": count(arrays, _LAYER),
    "num_heads": config["num_attention_heads"],
    "mlp_dim": mlp_dim,
    "representation_size": outputs_of(arrays, r"(?:vit\.)?pooler\.dense"),
    "pool": "cls",
    "cls_token": True,
    "position_embedding": "learned_1d",
    "cls_token_position": True,
    "qkv_bias": config.get("qkv_bias", True),
    "activation": ACTIVATIONS[activation],
    "layer_norm_epsilon": config.get("layer_norm_eps", 1e-12),
  }
  size = (image["height"], image["width"])
  task_fields = json_files.read_class_names(config, fields["num_classes"] or 0)
  if config.get("problem_type") == _MULTI_LABEL:
    task_fields["objective"] = "sigmoid"
  return common.VitCheckpoint(
    source=path,
    arrays=arrays,
    table=(*CLASSIFIER_TABLE, *BASE_TABLE),
    fields=fields,
    resize="bicubic",
    preprocess=json_files.read_preprocess(published.processor, size, "ViT"),
    task_fields=task_fields,
    image_size=size,
  )


def state_dict(params: Mapping[str, np.ndarray]) -> Flat:
  """Returns parameters under Hugging Face's keys, those of a classifier if there is a head."""
  if "pre_logits/kernel" in params and "head/kernel" in params:
    raise WeightsError("Hugging Face has no model with both pre_logits and head; drop one of them")
  return write(unroll(params), CLASSIFIER_TABLE if "head/kernel" in params else BASE_TABLE)


def write_checkpoint(path: str, export: Pretrained) -> None:
  """Writes a folder that `ViTForImageClassification.from_pretrained` loads, or `ViTModel`'s."""
  common.check_fixed(export, FIXED, "Hugging Face")
  arrays = state_dict(common.with_table(export, class_row=True))
  processor = json_files.processor_of(export.preprocess, "ViTImageProcessor")
  fields, size = export.fields(), export.preprocess.image_size
  num_classes, pooled = fields["num_classes"], fields["representation_size"]
  config = {
    "architectures": ["ViTModel" if num_classes is None else "ViTForImageClassification"],
    "model_type": "vit",
    "hidden_size": fields["width"],
    "num_hidden_layers": fields["depth"],
    "num_attention_heads": fields["num_heads"],
    "intermediate_size": fields["mlp_dim"],
    "hidden_act": next(a for a, ours in ACTIVATIONS.items() if ours == fields["activation"]),
    "layer_norm_eps": fields["layer_norm_epsilon"],
    "qkv_bias": fields["qkv_bias"],
    "image_size": size[0] if size[0] == size[1] else list(size),
    "patch_size": fields["patch_size"],
    "num_channels": export.preprocess.channels,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    **(json_files.label_fields(export.class_names, num_classes) if num_classes else {}),
    **({"problem_type": _MULTI_LABEL} if export.task_fields.get("objective") == "sigmoid" else {}),
    **({} if pooled is None else {"pooler_output_size": pooled, "pooler_act": "tanh"}),
  }
  json_files.write_folder(path, arrays, config=config, preprocessor_config=processor)
