"""timm's Vision Transformers and hybrids, as safetensors: `timm/vit_base_patch16_224.augreg_in1k`.

Query, key and value are one matrix, which `fused_qkv` splits and joins; the table converts the
rest. The arrays do not determine heads, activation and pooling: they are read from `architecture`
and `model_args` of config.json. Without them, the heads are those of the published size of the same
width and depth, or 64 wide, and the assumptions are logged.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from vit_jax_zoo.errors import unknown_name
from vit_jax_zoo.systems.vit.model import VARIANTS
from vit_jax_zoo.systems.vit.weights_common import (
  PATCH_SIDE,
  VitCheckpoint,
  check_fixed,
  has_cls_token,
  with_table,
)
from vit_jax_zoo.weights import timm_config
from vit_jax_zoo.weights.checkpoint import Export
from vit_jax_zoo.weights.fused_qkv import PARTS, join, split
from vit_jax_zoo.weights.infer import count, outputs_of, side
from vit_jax_zoo.weights.key_map import Flat, Row, WeightsError, unroll, write
from vit_jax_zoo.weights.readers import Published
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

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
"""timm's `act_layer`; the names are ours, too."""

_POOLS = {"cls": "token", "mean": "avg"}
"""Our `pool` -> timm's `global_pool`."""

FIXED: dict[str, Any] = {
  "activation": ACTIVATIONS,
  "layer_norm_epsilon": 1e-6,
  "representation_size": None,
  "resnet.width": 64,
  "resnet.group_norm_epsilon": 1e-5,
  "resnet.std_epsilon": 0.0,
  "resnet.variance_epsilon": 1e-8,
}
"""Values of our fields that timm's ViT is limited to: one, or one of several."""

HALF = (0.5, 0.5, 0.5)
"""Default mean and standard deviation of pixels."""

_JOINT = re.compile(r"blocks\.\d+\.attn\.qkv\.(weight|bias)")
_BACKBONE = "patch_embed.backbone"


def _conv_row(published: str, ours: str) -> Row:
  return Row(f"{published}.weight", f"{ours}/kernel", CONVOLUTION)


def _block_rows() -> list[Row]:
  theirs, ours = "blocks.{i}", "encoder/block_{i}"
  rows = norm_rows(f"{theirs}.norm1", f"{ours}/attention_norm")
  for part in PARTS:
    fused = f"{theirs}.attn.qkv"
    rows.append(Row(f"{fused}.weight[{part}]", f"{ours}/attention/{part}/kernel", TO_HEADS))
    rows.append(Row(f"{fused}.bias[{part}]", f"{ours}/attention/{part}/bias", HEADS_BIAS))
  rows += layer_rows(f"{theirs}.attn.proj", f"{ours}/attention/out", FROM_HEADS)
  rows += norm_rows(f"{theirs}.norm2", f"{ours}/mlp_norm")
  rows += layer_rows(f"{theirs}.mlp.fc1", f"{ours}/mlp/hidden")
  return rows + layer_rows(f"{theirs}.mlp.fc2", f"{ours}/mlp/out")


def _resnet_rows(root: str) -> list[Row]:
  rows = [_conv_row(f"{root}.conv", "resnet/root_conv")]
  rows += norm_rows(f"{root}.norm", "resnet/root_norm")
  theirs, ours = f"{_BACKBONE}.stages.{{s}}.blocks.{{u}}", "resnet/stage_{s}_unit_{u}"
  for part in ("1", "2", "3"):
    rows.append(_conv_row(f"{theirs}.conv{part}", f"{ours}/conv_{part}"))
    rows += norm_rows(f"{theirs}.norm{part}", f"{ours}/norm_{part}")
  rows.append(_conv_row(f"{theirs}.downsample.conv", f"{ours}/shortcut_conv"))
  return rows + norm_rows(f"{theirs}.downsample.norm", f"{ours}/shortcut_norm")


def table(*, root: str = f"{_BACKBONE}.stem", norm: str = "norm") -> tuple[Row, ...]:
  """Returns the rows between the keys after `split` and our paths.

  Args:
    root: prefix of a hybrid's first convolution: the backbone's own if it has no stages.
    norm: name of the last norm: "fc_norm" after the pooling.
  """
  return (
    *_resnet_rows(root),
    Row("cls_token", "cls_token"),
    Row("pos_embed", "position_embedding/table"),
    *layer_rows("patch_embed.proj", "embedding", CONVOLUTION),
    *_block_rows(),
    *norm_rows(norm, "norm"),
    *layer_rows("pre_logits.fc", "pre_logits"),
    *layer_rows("head", "head"),
  )


def _table_of(keys: Mapping[str, Any] | set[str]) -> tuple[Row, ...]:
  root = _BACKBONE if f"{_BACKBONE}.conv.weight" in keys else f"{_BACKBONE}.stem"
  return table(root=root, norm="fc_norm" if _normalizes_after_pool(keys) else "norm")


def _normalizes_after_pool(keys: Mapping[str, Any] | set[str]) -> bool:
  return any(key.startswith("fc_norm.") for key in keys)


_REFUSED_KEYS = {
  r"dist_token|head_dist\..*": "a distilled DeiT (dist_token)",
  "reg_token": "a ViT with register tokens (reg_token)",
}
_REFUSED_ARCHITECTURES = {r".*_rpn_.*": "residual post-norm blocks"}
"""timm's architectures with a plain ViT's keys and shapes that compute something else."""

_ARCHITECTURE_ARGS: tuple[tuple[str, dict[str, Any]], ...] = (
  (r"test_vit", {"num_heads": 2}),
  (r"vit_base_patch16_gap_224", {"num_heads": 16}),
  (r"vit_giantopt_patch16_siglip_gap_.*", {"num_heads": 16, "act_layer": "gelu_tanh"}),
  (r"vit_so400m_patch16_siglip_gap_.*", {"act_layer": "gelu_tanh"}),
  (r"vit_(base_patch32_siglip_gap_256|large_patch16_siglip_gap_512)", {"act_layer": "gelu_tanh"}),
)
"""Arguments of timm's architectures that neither their arrays nor their sizes determine. The list
is complete for timm 1.0.31: every ViT, DeiT and hybrid whose keys and shapes are a plain ViT's."""


def is_of(published: Mapping[str, np.ndarray]) -> bool:
  """Returns whether the keys are timm's."""
  has_embedding = any(key.startswith("patch_embed.") for key in published)
  return has_embedding and any(re.match(r"blocks\.\d+\.(norm1|attn)\.", key) for key in published)


def infer_fields(published: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
  """Returns the fields of the `VisionTransformer` that fit a state dict.

  Args:
    published: the file's arrays.
    source: the file's name.

  Raises:
    WeightsError: the file contains no ViT of timm's.
  """
  embedding = r"patch_embed\.proj\.weight"
  width = side(published, (embedding, 4, 0), (r"blocks\.\d+\.norm\d\.\w+", 1, 0))
  mlp_dim = side(published, (r"blocks\.\d+\.mlp\.fc1\.weight", 2, 0))
  if width is None or mlp_dim is None:
    keys = ", ".join(sorted(published)[:3])
    raise WeightsError(f"{source} holds no ViT of timm's; its keys begin with {keys}")
  depth = count(published, r"blocks\.(\d+)\.")
  has_cls, after_pool = "cls_token" in published, _normalizes_after_pool(published)
  fields = {
    "num_classes": outputs_of(published, "head"),
    "patch_size": side(published, (embedding, 4, 2)) or PATCH_SIDE,
    "width": width,
    "depth": depth,
    "num_heads": _infer_heads(width, depth),
    "mlp_dim": mlp_dim,
    "representation_size": outputs_of(published, "pre_logits.fc"),
    "pool": "cls" if has_cls and not after_pool else "mean",
    "cls_token": has_cls,
    "fc_norm": after_pool,
    "position_embedding": "learned_1d",
    "cls_token_position": has_cls and _has_class_row(published),
    "qkv_bias": any(key.endswith(".attn.qkv.bias") for key in published),
    "activation": "gelu",
    "layer_norm_epsilon": 1e-6,
  }
  return {**fields, **_infer_resnet(published)}


def _has_class_row(published: Mapping[str, np.ndarray]) -> bool:
  """Returns whether the number of rows is not a square, as it is with `no_embed_class`."""
  rows = side(published, ("pos_embed", 3, 1)) or 0
  return math.isqrt(rows) ** 2 != rows


def _infer_heads(width: int, depth: int) -> int:
  for fields in VARIANTS.values():
    if (fields["width"], fields["depth"]) == (width, depth):
      return fields["num_heads"]
  return max(width // 64, 1)


def _infer_resnet(published: Mapping[str, np.ndarray]) -> dict[str, Any]:
  table_ = _table_of(published)
  root = published.get(table_[0].published)
  if root is None:
    return {}
  sizes: dict[int, int] = {}
  for key in published:
    if match := re.match(rf"{re.escape(_BACKBONE)}\.stages\.(\d+)\.blocks\.(\d+)\.", key):
      stage, unit = int(match[1]), int(match[2])
      sizes[stage] = max(unit + 1, sizes.get(stage, 0))
  resnet = {
    "stage_sizes": tuple(sizes[stage] for stage in sorted(sizes)),
    "width": root.shape[0],
    "group_norm_epsilon": 1e-5,
    "std_epsilon": 0.0,
    "variance_epsilon": 1e-8,
  }
  return {"resnet": resnet}


def read_checkpoint(published: Published) -> VitCheckpoint:
  """Reads a file, and the `config.json` beside it, if there is one.

  Raises:
    WeightsError: the file contains no plain ViT or hybrid of timm's.
  """
  architecture = str(published.config.get("architecture", ""))
  _check_architecture(architecture, published)
  fields = infer_fields(published.arrays, published.path)
  arguments: dict[str, Any] = {}
  for pattern, known in _ARCHITECTURE_ARGS:
    arguments |= known if re.fullmatch(pattern, architecture) else {}
  arguments |= published.config.get("model_args", {})
  fields |= _stated_fields(arguments, fields, published.path)
  activation = arguments.get("act_layer", "gelu")
  if activation not in ACTIVATIONS:
    raise WeightsError(f"{published.path}: {unknown_name('act_layer', activation, ACTIVATIONS)}")
  if not architecture:
    logging.info(
      "%s: no config.json with an architecture; assumes %d heads, activation %s, pool %s",
      published.path, fields["num_heads"], activation, fields["pool"],
    )  # fmt: skip
  settings = timm_config.read(published, size=(224, 224), mean=HALF, std=HALF, crop_pct=0.9)
  return VitCheckpoint(
    source=published.path,
    arrays=split(published.arrays, _JOINT),
    table=_table_of(published.arrays),
    fields={**fields, "activation": activation},
    resize="bicubic_antialias",
    preprocess=settings.preprocess,
    task_fields=settings.task_fields,
    image_size=settings.stated_size,
    cls_row_is_stated="no_embed_class" in arguments,
  )


def _check_architecture(architecture: str, published: Published) -> None:
  """Raises WeightsError for models with a plain ViT's keys that are something else."""
  found = [
    what
    for pattern, what in _REFUSED_KEYS.items()
    if any(re.fullmatch(pattern, key) for key in published.arrays)
  ]
  found += [
    f"{architecture}, with {what}"
    for pattern, what in _REFUSED_ARCHITECTURES.items()
    if re.fullmatch(pattern, architecture)
  ]
  if found:
    raise WeightsError(f"{published.path}: {found[0]}; expected a plain ViT or hybrid")


def _stated_fields(
  arguments: Mapping[str, Any], fields: Mapping[str, Any], source: str
) -> dict[str, Any]:
  """Returns the fields that the arguments of timm's constructor determine."""
  pool = arguments.get("global_pool") or _POOLS[fields["pool"]]
  of_all_tokens = fields["cls_token"] and arguments.get("pool_include_prefix") and pool == "avg"
  if pool not in _POOLS.values() or of_all_tokens:
    what = "pool_include_prefix" if of_all_tokens else f"global_pool {pool!r}"
    raise WeightsError(f"{source} has {what}; known are the class token and the patches' mean")
  stated: dict[str, Any] = {
    "num_heads": arguments.get("num_heads", fields["num_heads"]),
    "pool": next(ours for ours, theirs in _POOLS.items() if theirs == pool),
  }
  if fields["cls_token"] and "no_embed_class" in arguments:
    stated["cls_token_position"] = not arguments["no_embed_class"]
  return stated


def state_dict(params: Mapping[str, np.ndarray], *, fc_norm: bool = False) -> Flat:
  """Returns a ViT's parameters under timm's keys.

  Args:
    params: by "/"-joined path, layers scanned or unrolled.
    fc_norm: the model's field.

  Raises:
    WeightsError: timm has no names for some of them.
  """
  layers = unroll(params)
  stages = any(path.startswith("resnet/stage_") for path in layers)
  rows = table(
    root=f"{_BACKBONE}.stem" if stages else _BACKBONE, norm="fc_norm" if fc_norm else "norm"
  )
  return contiguous(join(write(layers, rows)))


def write_file(path: str, params: Mapping[str, np.ndarray], *, fc_norm: bool = False) -> None:
  """Writes `state_dict` as safetensors."""
  write_safetensors(path, state_dict(params, fc_norm=fc_norm))


def write_checkpoint(path: str, export: Export) -> None:
  """Writes a folder that `timm.create_model("local-dir:<path>", pretrained=True)` loads.

  Raises:
    WeightsError: timm does not support the model.
  """
  check_fixed(export, FIXED, "timm")
  fields = export.fields()
  with_cls = has_cls_token(fields)
  own_row = with_cls and fields["cls_token_position"]
  params = with_table(export, class_row=own_row and fields["position_embedding"] != "learned_1d")
  arrays = state_dict(params, fc_norm=fields["fc_norm"])
  size = export.preprocess.image_size
  arguments = {
    "img_size": list(size),
    "patch_size": fields["patch_size"],
    "embed_dim": fields["width"],
    "depth": fields["depth"],
    "num_heads": fields["num_heads"],
    "mlp_ratio": fields["mlp_dim"] / fields["width"],
    "qkv_bias": fields["qkv_bias"],
    "act_layer": fields["activation"],
    "class_token": with_cls,
    "no_embed_class": with_cls and not own_row,
    "global_pool": _POOLS[fields["pool"]],
    "fc_norm": fields["fc_norm"],
  }
  timm_config.write(path, arrays, export, _architecture(fields), arguments)


_ARCHITECTURES = {
  **{
    (width, patch): f"vit_{name}_patch{patch}_224"
    for name, width, patches in (
      ("tiny", 192, (16,)),
      ("small", 384, (16, 32)),
      ("base", 768, (8, 16, 32)),
      ("large", 1024, (14, 16, 32)),
      ("huge", 1280, (14,)),
    )
    for patch in patches
  },
}
"""Width and patch size -> timm's model; the arguments in config.json state all sizes again."""
_HYBRIDS = {
  (): "vit_tiny_r_s16_p8_224",
  (2, 2, 2, 2): "vit_small_r26_s32_224",
  (3, 4, 9): "vit_base_r50_s16_224",
  (3, 4, 6, 3): "vit_large_r50_s32_224",
}
"""Stages of the ResNet, which no argument changes -> timm's model."""


def _architecture(fields: Mapping[str, Any]) -> str:
  """Returns timm's model that has this one's parts; its arguments determine the sizes."""
  if fields["resnet"] is None:
    return _ARCHITECTURES.get((fields["width"], fields["patch_size"]), "vit_base_patch16_224")
  stages = tuple(fields["resnet"]["stage_sizes"])
  if stages not in _HYBRIDS:
    raise WeightsError(
      f"stage_sizes: {stages}; expected a ResNet of timm's hybrids: {', '.join(map(str, _HYBRIDS))}"
    )
  return _HYBRIDS[stages]
