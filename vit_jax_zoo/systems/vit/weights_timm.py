"""timm's Vision Transformers and hybrids, such as `timm/vit_base_patch16_224.augreg_in1k`."""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from vit_jax_zoo.errors import unknown_name
from vit_jax_zoo.systems.vit import weights_common as common
from vit_jax_zoo.systems.vit.model import VARIANTS
from vit_jax_zoo.weights import json_files
from vit_jax_zoo.weights import torch_layouts as layouts
from vit_jax_zoo.weights.checkpoint import Pretrained, count, outputs_of, side
from vit_jax_zoo.weights.key_map import Flat, Row, WeightsError, unroll, write
from vit_jax_zoo.weights.preprocess import Preprocess
from vit_jax_zoo.weights.readers import Published

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")  # timm's `act_layer`, and ours
_POOLS = {"cls": "token", "mean": "avg"}  # our `pool` -> timm's `global_pool`
_RESNET = {"group_norm_epsilon": 1e-5, "std_epsilon": 0.0, "variance_epsilon": 1e-8}

FIXED: dict[str, Any] = {
  "activation": ACTIVATIONS,
  "layer_norm_epsilon": 1e-6,
  "representation_size": None,
  "resnet.width": 64,
  **{f"resnet.{name}": value for name, value in _RESNET.items()},
}
"""Values of our fields that timm's ViT is limited to: one, or one of several."""

_JOINT = re.compile(r"blocks\.\d+\.attn\.qkv\.(weight|bias)")
_BACKBONE = "patch_embed.backbone"
_UNIT = f"{_BACKBONE}.stages.{{s}}.blocks.{{u}}"


def _conv_norm_rows(published: str, ours: str) -> list[Row]:
  conv, conv_path = published.replace("@", "conv"), ours.replace("@", "conv")
  norm = layouts.norm_rows(published.replace("@", "norm"), ours.replace("@", "norm"))
  return [Row(f"{conv}.weight", f"{conv_path}/kernel", layouts.CONVOLUTION), *norm]


_BARE_STEM = _conv_norm_rows(f"{_BACKBONE}.@", "resnet/root_@")  # of a ResNet without stages
_FC_NORM = layouts.norm_rows("fc_norm", "norm")  # of a last norm after the pooling

TABLE: tuple[Row, ...] = (  # from the keys after `split_qkv`
  *_conv_norm_rows(f"{_BACKBONE}.stem.@", "resnet/root_@"),
  *_BARE_STEM,
  *_conv_norm_rows(f"{_UNIT}.downsample.@", "resnet/stage_{s}_unit_{u}/shortcut_@"),
  *_conv_norm_rows(f"{_UNIT}.@1", "resnet/stage_{s}_unit_{u}/@_1"),
  *_conv_norm_rows(f"{_UNIT}.@2", "resnet/stage_{s}_unit_{u}/@_2"),
  *_conv_norm_rows(f"{_UNIT}.@3", "resnet/stage_{s}_unit_{u}/@_3"),
  Row("cls_token", "cls_token"),
  Row("pos_embed", "position_embedding/table"),
  *layouts.layer_rows("patch_embed.proj", "embedding", layouts.CONVOLUTION),
  *layouts.block_rows(
    "blocks.{i}",
    "encoder/block_{i}",
    {"attn": "attention"},
    norms=("norm1", "norm2"),
    qkv="qkv.{leaf}[{part}]",
    out="proj",
    mlp=("mlp.fc1", "mlp.fc2"),
  ),
  *layouts.norm_rows("norm", "norm"),
  *_FC_NORM,
  *layouts.layer_rows("pre_logits.fc", "pre_logits"),
  *layouts.layer_rows("head", "head"),
)

_REFUSED = (
  (r"dist_token|head_dist\..*", "a distilled DeiT"),
  ("reg_token", "a ViT with register tokens"),
  (r"blocks\.0\.(ls1\.gamma|gamma_1)", "a ViT with LayerScale"),
  (r"patch_embed\.backbone\.layer1\..*", "a hybrid with ResNet-D"),
  (r".*_rpn_.*", "with residual post-norm blocks"),
  ("block_fn|((embed_)?norm|embed|attn|mlp)_layer", "layers other than timm's default"),
)
"""Keys, timm's architectures and arguments, of other models than a plain ViT with its keys."""

_ARCHITECTURE_ARGS: tuple[tuple[str, dict[str, Any]], ...] = (
  (r"test_vit", {"num_heads": 2}),
  (r".*_quickgelu_.*", {"act_layer": "quick_gelu"}),
  (r"vit_base_patch16_gap_224", {"num_heads": 16}),
  (r"vit_giantopt_patch16_siglip_gap_.*", {"num_heads": 16, "act_layer": "gelu_tanh"}),
  (r"vit_so400m_patch16_siglip_gap_.*", {"act_layer": "gelu_tanh"}),
  (r"vit_(base_patch32_siglip_gap_256|large_patch16_siglip_gap_512)", {"act_layer": "gelu_tanh"}),
)
"""Arguments of timm's architectures that neither their arrays nor their sizes determine. The list
is complete for timm 1.0.31: every model of `_PLAIN`."""

_PLAIN = re.compile(
  r"test_vit|flexivit_[a-z]+|((vit|deit)_[a-z0-9]+|eva_large)_"
  r"(mci|patch\d+(_siglip)?(_gap)?|r\d*_s\d+(_p\d+)?|resnet\d+d(_s\d+)?)_\d+(_miil)?"
)
"""timm's models with a plain ViT's keys, shapes and layers."""


def is_of(published: Mapping[str, np.ndarray]) -> bool:
  """Returns whether the keys are timm's."""
  has_embedding = any(key.startswith("patch_embed.") for key in published)
  return has_embedding and any(re.match(r"blocks\.\d+\.(norm1|attn)\.", key) for key in published)


def _infer_fields(published: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
  embedding = r"patch_embed\.proj\.weight"
  width = side(published, (embedding, 4, 0), (r"blocks\.\d+\.norm\d\.\w+", 1, 0))
  mlp_dim = side(published, (r"blocks\.\d+\.mlp\.fc1\.weight", 2, 0))
  if width is None or mlp_dim is None:
    raise common.not_a_vit(published, source, "timm")
  depth, fc_norm = count(published, r"blocks\.(\d+)\."), "fc_norm.weight" in published
  has_cls, rows = "cls_token" in published, side(published, ("pos_embed", 3, 1)) or 0
  sizes = ((v["width"], v["depth"], v["num_heads"]) for v in VARIANTS.values())
  of_this_size = (heads for *size, heads in sizes if size == [width, depth])
  fields = {
    "num_classes": outputs_of(published, "head"),
    "patch_size": side(published, (embedding, 4, 2)) or 16,  # reported if missing
    "width": width,
    "depth": depth,
    "num_heads": next(of_this_size, max(width // 64, 1)),
    "mlp_dim": mlp_dim,
    "representation_size": outputs_of(published, "pre_logits.fc"),
    "pool": "cls" if has_cls and not fc_norm else "mean",
    "cls_token": has_cls,
    "fc_norm": fc_norm,
    "position_embedding": "learned_1d",
    # With `no_embed_class` the number of rows is a square.
    "cls_token_position": has_cls and math.isqrt(rows) ** 2 != rows,
    "qkv_bias": any(key.endswith(".attn.qkv.bias") for key in published),
    "layer_norm_epsilon": 1e-6,
  }
  root = side(published, (rf"{_BACKBONE}\.(stem\.)?conv\.weight", 4, 0))
  if root is None:
    return fields
  units = rf"{re.escape(_BACKBONE)}\.stages\.(\d+)\.blocks\.(\d+)\."
  stages = common.stage_sizes(published, units, first=0)
  return {**fields, "resnet": {"stage_sizes": stages, "width": root, **_RESNET}}


def read_checkpoint(published: Published) -> common.VitCheckpoint:
  """Reads a file, and the `config.json` beside it, if there is one."""
  default = Preprocess((224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)
  settings = json_files.read_timm(published, default)
  path, stated_name = published.path, published.config.get("architecture") or ""
  if not isinstance(stated_name, str):
    raise WeightsError(f"{path}: architecture is {stated_name!r}; expected a name of timm")
  architecture = stated_name.rpartition("/")[-1].partition(".")[0]  # without timm's tag
  stated = published.config.get("model_args") or {}
  names = (architecture, *(k for k, x in stated.items() if x is not None), *published.arrays)
  for name, (pattern, what) in itertools.product(names, _REFUSED):
    if re.fullmatch(pattern, name):
      raise WeightsError(f"{path}: {name}, {what}; expected a plain ViT or hybrid")
  fields = _infer_fields(published.arrays, path)
  arguments: dict[str, Any] = {}
  for pattern, known in _ARCHITECTURE_ARGS:
    arguments |= known if re.fullmatch(pattern, architecture) else {}
  arguments |= stated
  fields |= _stated_fields(arguments, fields, path)
  activation = arguments.get("act_layer", "gelu")
  if activation not in ACTIVATIONS:
    raise WeightsError(f"{path}: {unknown_name('act_layer', activation, ACTIVATIONS)}")
  if not _PLAIN.fullmatch(architecture):
    logging.log(
      logging.WARNING if architecture else logging.INFO,
      "%s: architecture %r in config.json, no plain ViT; assumes %d heads, activation %s, pool %s",
      path, architecture, fields["num_heads"], activation, fields["pool"],
    )  # fmt: skip
  return common.VitCheckpoint(
    source=path,
    arrays=layouts.split_qkv(published.arrays, _JOINT),
    table=TABLE,
    fields={**fields, "activation": activation},
    resize="bicubic_antialias",
    cls_row_is_stated="no_embed_class" in arguments,
    **settings,
  )


def _stated_fields(
  arguments: Mapping[str, Any], fields: Mapping[str, Any], source: str
) -> dict[str, Any]:
  pool = arguments.get("global_pool")
  pool = _POOLS[fields["pool"]] if pool is None else pool
  of_all_tokens = fields["cls_token"] and arguments.get("pool_include_prefix") and pool == "avg"
  if pool not in _POOLS.values() or of_all_tokens:
    what = "pool_include_prefix" if of_all_tokens else f"global_pool {pool!r}"
    raise WeightsError(f"{source} has {what}; known are the class token and the patches' mean")
  heads, width = arguments.get("num_heads", fields["num_heads"]), fields["width"]
  is_usable = type(heads) is int and heads > 0 and width % heads == 0
  if "num_heads" in arguments and not is_usable:
    raise WeightsError(f"{source}: num_heads is {heads!r}; expected a divisor of the width {width}")
  stated: dict[str, Any] = {
    "num_heads": heads,
    "pool": next(ours for ours, theirs in _POOLS.items() if theirs == pool),
  }
  if fields["cls_token"] and "no_embed_class" in arguments:
    stated["cls_token_position"] = not arguments["no_embed_class"]
  return stated


def state_dict(params: Mapping[str, np.ndarray], *, fc_norm: bool = False) -> Flat:
  """Returns parameters under timm's keys; WeightsError if timm has no names for some of them."""
  layers = unroll(params)
  first = _FC_NORM if fc_norm else []
  if not any(path.startswith("resnet/stage_") for path in layers):
    first = [*first, *_BARE_STEM]
  return layouts.join_qkv(write(layers, [*first, *TABLE]))


def write_checkpoint(path: str, export: Pretrained) -> None:
  """Writes a folder that `timm.create_model("local-dir:<path>", pretrained=True)` loads."""
  common.check_fixed(export, FIXED, "timm")
  fields, with_cls = export.fields(), export.model.has_cls_token
  own_row = with_cls and fields["cls_token_position"]
  has_table = fields["position_embedding"] == "learned_1d"
  params = common.with_table(export, class_row=own_row and not has_table)
  arrays = state_dict(params, fc_norm=fields["fc_norm"])
  arguments = {
    **{name: fields[name] for name in ("patch_size", "depth", "num_heads", "qkv_bias", "fc_norm")},
    "img_size": list(export.preprocess.image_size),
    "embed_dim": fields["width"],
    "mlp_ratio": fields["mlp_dim"] / fields["width"],
    "act_layer": fields["activation"],
    "class_token": with_cls,
    "no_embed_class": with_cls and not own_row,
    "global_pool": _POOLS[fields["pool"]],
  }
  json_files.write_timm(path, arrays, export, _architecture(fields), arguments)


_SIZES = {
  "tiny": (192, 12, 3, (16,)),
  "small": (384, 12, 6, (16, 32)),
  "base": (768, 12, 12, (8, 16, 32)),
  "large": (1024, 24, 16, (14, 16, 32)),
  "huge": (1280, 32, 16, (14,)),
}
"""timm's name -> width, depth, heads, patch sizes; the MLPs have four times the width."""
_HYBRIDS = {
  (): "vit_tiny_r_s16_p8_224",
  (2, 2, 2, 2): "vit_small_r26_s32_224",
  (3, 4, 9): "vit_base_r50_s16_224",
  (3, 4, 6, 3): "vit_large_r50_s32_224",
}
"""Stages of the ResNet, which no argument changes -> timm's model."""


def _architecture(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
  """Returns the nearest of timm's models, and this model's sizes that it does not have."""
  if fields["resnet"] is None:
    width, patch = fields["width"], fields["patch_size"]
    fits = [name for name, size in _SIZES.items() if size[0] == width and patch in size[3]]
    architecture = f"vit_{fits[0]}_patch{patch}_224" if fits else "vit_base_patch16_224"
  else:
    stages = tuple(fields["resnet"]["stage_sizes"])
    if stages not in _HYBRIDS:
      known = ", ".join(map(str, _HYBRIDS))
      raise WeightsError(f"stage_sizes: {stages}; expected a ResNet of timm's hybrids: {known}")
    architecture = _HYBRIDS[stages]
  width, depth, heads, _ = _SIZES[architecture.split("_")[1]]
  own = {"width": width, "depth": depth, "num_heads": heads, "mlp_dim": 4 * width}
  if patch := re.search(r"patch(\d+)", architecture):
    own["patch_size"] = int(patch[1])
  return architecture, {key: fields[key] for key, value in own.items() if fields[key] != value}
