"""Official DETR weights as the variables of our model, by plain loops: the tests' own reading."""

import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file

from vit_jax_zoo.models.detr import Detr

_BATCH_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def model_of(config, **overrides):
  """The model that a fixture's config.json describes."""
  fields = {
    "num_classes": config["num_classes"],
    "num_queries": config["num_queries"],
    "width": config["hidden_dim"],
    "encoder_depth": config["enc_layers"],
    "decoder_depth": config["dec_layers"],
    "num_heads": config["nheads"],
    "mlp_dim": config["dim_feedforward"],
    "pre_norm": config["pre_norm"],
    "position_embedding": config["position_embedding"],
    "mask_head": config["masks"],
    "dropout_rate": 0.0,
    "backbone": {
      "blocks": tuple(config["depths"]),
      "widths": tuple(config["stage_planes"]),
      "stem_width": config["stem_width"],
      "output_stride": 16 if config["dilation"] else 32,
    },
  }
  return Detr(**(fields | overrides))


def read_variables(path, config):
  """Variables of `model_of(config)` from a file with the official names."""
  return variables_of(load_file(path), config)


def variables_of(tensors, config):
  tensors = {name.removeprefix("detr."): value for name, value in tensors.items()}
  flat = _backbone(tensors) | _transformer(tensors, config) | _heads(tensors, config)
  if "query_embed.weight" in tensors:
    flat["params/query_embedding"] = tensors["query_embed.weight"]
  if "backbone.1.row_embed.weight" in tensors:
    flat["params/row_embedding"] = tensors["backbone.1.row_embed.weight"]
    flat["params/column_embedding"] = tensors["backbone.1.col_embed.weight"]
  return traverse_util.unflatten_dict(flat, sep="/")


def _conv(weight):
  return np.transpose(weight, (2, 3, 1, 0))


def _linear(tensors, source, target):
  flat = {f"params/{target}/kernel": tensors[f"{source}.weight"].T}
  return flat | {f"params/{target}/bias": tensors[f"{source}.bias"]}


def _conv_with_bias(tensors, source, target):
  flat = {f"params/{target}/kernel": _conv(tensors[f"{source}.weight"])}
  return flat | {f"params/{target}/bias": tensors[f"{source}.bias"]}


def _backbone(tensors):
  flat = {}

  def add(conv, norm, target):
    flat[f"params/backbone/{target}/conv/kernel"] = _conv(tensors[f"{conv}.weight"])
    for theirs, ours in _BATCH_NORM.items():
      flat[f"batch_stats/backbone/{target}/norm/{ours}"] = tensors[f"{norm}.{theirs}"]

  body = "backbone.0.body."
  add(f"{body}conv1", f"{body}bn1", "stem/conv1")
  for name in tensors:
    if not name.startswith(f"{body}layer") or not name.endswith("conv1.weight"):
      continue
    prefix = name.removesuffix("conv1.weight")
    stage, block = prefix.removeprefix(f"{body}layer").split(".")[:2]
    target = f"c{int(stage) + 1}_block{block}"
    for i in (1, 2, 3):
      add(f"{prefix}conv{i}", f"{prefix}bn{i}", f"{target}/conv{i}")
    if f"{prefix}downsample.0.weight" in tensors:
      add(f"{prefix}downsample.0", f"{prefix}downsample.1", f"{target}/shortcut")
  return flat


def _attention(tensors, source, target, heads):
  flat = {}
  width = tensors[f"{source}.out_proj.bias"].size
  for i, name in enumerate(("query", "key", "value")):
    rows = slice(i * width, (i + 1) * width)
    kernel = tensors[f"{source}.in_proj_weight"][rows].T
    flat[f"{target}/{name}/kernel"] = kernel.reshape(width, heads, -1)
    flat[f"{target}/{name}/bias"] = tensors[f"{source}.in_proj_bias"][rows].reshape(heads, -1)
  kernel = tensors[f"{source}.out_proj.weight"].T
  flat[f"{target}/out/kernel"] = kernel.reshape(heads, -1, width)
  flat[f"{target}/out/bias"] = tensors[f"{source}.out_proj.bias"]
  return flat


def _layer(tensors, prefix, heads, attentions):
  flat = {}
  for theirs, ours in attentions.items():
    flat |= _attention(tensors, f"{prefix}.{theirs}", ours, heads)
  for theirs, ours in (("linear1", "hidden"), ("linear2", "out")):
    flat[f"mlp/{ours}/kernel"] = tensors[f"{prefix}.{theirs}.weight"].T
    flat[f"mlp/{ours}/bias"] = tensors[f"{prefix}.{theirs}.bias"]
  for i, ours in enumerate((*attentions.values(), "mlp"), start=1):
    flat[f"{ours}_norm/scale"] = tensors[f"{prefix}.norm{i}.weight"]
    flat[f"{ours}_norm/bias"] = tensors[f"{prefix}.norm{i}.bias"]
  return flat


def _transformer(tensors, config):
  flat = {}
  attentions = {
    "encoder": {"self_attn": "attention"},
    "decoder": {"self_attn": "self_attention", "multihead_attn": "cross_attention"},
  }
  for side, depth in (("encoder", config["enc_layers"]), ("decoder", config["dec_layers"])):
    layers = [
      _layer(tensors, f"transformer.{side}.layers.{i}", config["nheads"], attentions[side])
      for i in range(depth)
    ]
    for name in layers[0]:
      flat[f"params/transformer/{side}/{name}"] = np.stack([layer[name] for layer in layers])
    if f"transformer.{side}.norm.weight" in tensors:
      norm = f"transformer.{side}.norm"
      flat[f"params/transformer/{side}_norm/scale"] = tensors[f"{norm}.weight"]
      flat[f"params/transformer/{side}_norm/bias"] = tensors[f"{norm}.bias"]
  return flat


def _heads(tensors, config):
  flat = _linear(tensors, "class_embed", "class_head")
  for i in range(3):
    flat |= _linear(tensors, f"bbox_embed.layers.{i}", f"box_head_{i}")
  flat |= _conv_with_bias(tensors, "input_proj", "input_projection")
  if not config["masks"]:
    return flat
  heads = config["nheads"]
  for theirs, ours in (("q", "query"), ("k", "key")):
    kernel = tensors[f"bbox_attention.{theirs}_linear.weight"].T
    target = f"params/mask_attention/{ours}"
    flat[f"{target}/kernel"] = kernel.reshape(len(kernel), heads, -1)
    flat[f"{target}/bias"] = tensors[f"bbox_attention.{theirs}_linear.bias"].reshape(heads, -1)
  for i in range(1, 6):
    if i == 1:
      flat["params/mask_head/conv1_kernel"] = _conv(tensors["mask_head.lay1.weight"])
      flat["params/mask_head/conv1_bias"] = tensors["mask_head.lay1.bias"]
    else:
      flat |= _conv_with_bias(tensors, f"mask_head.lay{i}", f"mask_head/conv{i}")
    flat[f"params/mask_head/norm{i}/scale"] = tensors[f"mask_head.gn{i}.weight"]
    flat[f"params/mask_head/norm{i}/bias"] = tensors[f"mask_head.gn{i}.bias"]
  for i in (1, 2, 3):
    flat |= _conv_with_bias(tensors, f"mask_head.adapter{i}", f"mask_head/adapter{i}")
  return flat | _conv_with_bias(tensors, "mask_head.out_lay", "mask_head/out")
