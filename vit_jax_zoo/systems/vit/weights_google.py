"""Google's ViT checkpoints, `.npz`: gs://vit_models/{imagenet21k,augreg,sam,...} and big_vision's.

Reads names of Flax before Linen (`MlpBlock_3`) and of Linen (`MlpBlock_0`), group norms as
[1 1 1 c] or [c], keys below `params/` or `opt/target/`, stacked layers, and big_vision's position
table, which is at the top level without a row for the class token. Writes the published names.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from vit_jax_zoo.systems.vit import weights_common as common
from vit_jax_zoo.weights.checkpoint import Pretrained, count, side
from vit_jax_zoo.weights.hub import Entry
from vit_jax_zoo.weights.key_map import CHANNELS_4D, Flat, Row, WeightsError, unroll, write
from vit_jax_zoo.weights.readers import Published

# Values of our fields that Google's code is limited to.
FIXED: dict[str, Any] = {
  "activation": "gelu_tanh",
  "layer_norm_epsilon": 1e-6,
  "fc_norm": False,
  "qkv_bias": True,
  "resnet.group_norm_epsilon": 1e-6,
  "resnet.std_epsilon": 1e-5,
  "resnet.variance_epsilon": 0.0,
}

_PREFIXES = ("params/", "opt/target/")
_OTHER_STATE = re.compile(r"opt/state/.*|opt/.*step|step")
_LAYER, _NORM = ("kernel", "bias"), ("scale", "bias")


def _rows(published: str, ours: str, leaves: tuple[str, ...] = _LAYER) -> list[Row]:
  return [Row(f"{published}/{leaf}", f"{ours}/{leaf}") for leaf in leaves]


def _block_rows(norm: str, attention: str, mlp_norm: str, mlp: str) -> list[Row]:
  theirs, ours = "Transformer/encoderblock_{i}", "encoder/block_{i}"
  rows = _rows(f"{theirs}/{norm}", f"{ours}/attention_norm", _NORM)
  for part in ("query", "key", "value", "out"):
    rows += _rows(f"{theirs}/{attention}/{part}", f"{ours}/attention/{part}")
  rows += _rows(f"{theirs}/{mlp_norm}", f"{ours}/mlp_norm", _NORM)
  rows += _rows(f"{theirs}/{mlp}/Dense_0", f"{ours}/mlp/hidden")
  return rows + _rows(f"{theirs}/{mlp}/Dense_1", f"{ours}/mlp/out")


def _conv_norm_rows(published: str, ours: str) -> list[Row]:
  conv = _rows(published.replace("@", "conv"), ours.replace("@", "conv"), ("kernel",))
  norm = _rows(published.replace("@", "gn"), ours.replace("@", "norm"), _NORM)
  return conv + [dataclasses.replace(row, transform=CHANNELS_4D) for row in norm]


_POSITIONS = "Transformer/posembed_input/pos_embedding"
_POSITIONS_BIG_VISION = "pos_embedding"

TABLE: tuple[Row, ...] = (
  *_conv_norm_rows("@_root", "resnet/root_@"),
  *_conv_norm_rows("block{s+1}/unit{u+1}/@_proj", "resnet/stage_{s}_unit_{u}/shortcut_@"),
  *_conv_norm_rows("block{s+1}/unit{u+1}/@1", "resnet/stage_{s}_unit_{u}/@_1"),
  *_conv_norm_rows("block{s+1}/unit{u+1}/@2", "resnet/stage_{s}_unit_{u}/@_2"),
  *_conv_norm_rows("block{s+1}/unit{u+1}/@3", "resnet/stage_{s}_unit_{u}/@_3"),
  Row("cls", "cls_token"),
  *_rows("embedding", "embedding"),
  Row(_POSITIONS, "position_embedding/table"),
  Row(_POSITIONS_BIG_VISION, "position_embedding/table"),
  *_block_rows("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"),
  *_block_rows("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),
  *_rows("Transformer/encoder_norm", "norm", _NORM),
  *_rows("pre_logits", "pre_logits"),
  *_rows("head", "head"),
)


def is_of(arrays: Mapping[str, np.ndarray]) -> bool:
  """Returns whether the keys are Google's."""
  return any(re.search(r"embedding/kernel$|Transformer/encoderblock", key) for key in arrays)


def _normalize(arrays: Mapping[str, np.ndarray]) -> Flat:
  """Returns the parameters without prefixes and optimizer state, with layers unrolled."""
  prefix = next((p for p in _PREFIXES if any(key.startswith(p) for key in arrays)), "")
  flat: Flat = {}
  for key, array in arrays.items():
    key = key.removeprefix(prefix)
    head, stacked, rest = key.partition("Transformer/encoderblock/")
    if stacked and not head:
      flat |= {f"Transformer/encoderblock_{i}/{rest}": layer for i, layer in enumerate(array)}
    elif not _OTHER_STATE.fullmatch(key):
      flat[key] = array
  return flat


def read_checkpoint(published: Published) -> common.VitCheckpoint:
  """Reads a file's arrays; the preprocessing is that of Google's evaluations."""
  path, arrays = published.path, _normalize(published.arrays)
  block = r"Transformer/encoderblock_(\d+)/"
  query, hidden = rf"{block}.*/query/kernel", rf"{block}MlpBlock_\d/Dense_0/kernel"
  width, mlp_dim = side(arrays, (query, 3, 0)), side(arrays, (hidden, 2, 1))
  if width is None or mlp_dim is None:
    raise common.not_a_vit(arrays, path, "Google")
  classes, representation = (
    side(arrays, (f"{layer}/bias", 1, 0), (f"{layer}/kernel", 2, 1))
    for layer in ("head", "pre_logits")
  )
  # Without a table and a class token, big_vision's model has sine-cosine embeddings.
  has_table = any(key in arrays for key in (_POSITIONS, _POSITIONS_BIG_VISION, "cls"))
  fields: dict[str, Any] = {
    "num_classes": classes,
    "patch_size": side(arrays, ("embedding/kernel", 4, 0)) or 16,  # reported if missing
    "width": width,
    "depth": count(arrays, block),
    "num_heads": side(arrays, (query, 3, 1)),
    "mlp_dim": mlp_dim,
    "representation_size": representation,
    "pool": "cls" if "cls" in arrays else "mean",
    "cls_token_position": _POSITIONS in arrays,
    "position_embedding": "learned_1d" if has_table else "sincos_2d",
  }
  if "conv_root/kernel" in arrays:
    stages = common.stage_sizes(arrays, r"block(\d+)/unit(\d+)/", first=1)
    root_width = arrays["conv_root/kernel"].shape[-1]
    fields["resnet"] = {"stage_sizes": stages, "width": root_width}
  known = {"table": TABLE, "fields": fields, "resize": "corner_aligned"}
  return common.VitCheckpoint(source=path, arrays=arrays, **known)


def write_checkpoint(path: str, export: Pretrained) -> None:
  """Writes a model as Google published it, without its preprocessing.

  A position table without a class token's row is under big_vision's key.
  """
  common.check_fixed(export, FIXED, "Google's code")
  model = export.model
  export.warn_not_stored(path, common.GOOGLE.at_size(export.preprocess.image_size))
  if model.has_cls_token != (model.pool == "cls"):
    raise WeightsError("cls_token: True with pool='mean'; Google's code has no such ViT")
  own_row = model.has_cls_token and model.cls_token_position
  # A file without a table has big_vision's sine-cosine embeddings.
  fixed = model.position_embedding == "sincos_2d" and not model.has_cls_token
  params = export.variables if fixed else common.with_table(export, class_row=own_row)
  published = write(unroll(params), TABLE)
  if model.has_cls_token and not own_row:
    published[_POSITIONS_BIG_VISION] = published.pop(_POSITIONS)
  with epath.Path(path).open("wb") as file:
    np.savez(file, allow_pickle=False, **published)


_PAPER = "2010.11929, table 5"
_ISSUE_62 = "google-research/vision_transformer#62"
_README = "google-research/vision_transformer, README"
_TIMM = "timm, results-imagenet.csv"
# Model; name of the data; file; precision@1: on held-out ImageNet-21k images, or of ImageNet.
_ORIGINAL = (
  ("vit_b16", "imagenet21k", "imagenet21k/ViT-B_16", "47.88 % (ImageNet-21k)", _ISSUE_62),
  ("vit_b16", "imagenet", "imagenet21k+imagenet2012/ViT-B_16", "83.97 % at 384", _PAPER),
  ("vit_b16", "imagenet_224", "imagenet21k+imagenet2012/ViT-B_16-224", "81.2 % at 224", _README),
  ("vit_b32", "imagenet21k", "imagenet21k/ViT-B_32", "44.04 % (ImageNet-21k)", _ISSUE_62),
  ("vit_b32", "imagenet", "imagenet21k+imagenet2012/ViT-B_32", "81.28 % at 384", _PAPER),
  ("vit_l16", "imagenet21k", "imagenet21k/ViT-L_16", "49.90 % (ImageNet-21k)", _ISSUE_62),
  ("vit_l16", "imagenet", "imagenet21k+imagenet2012/ViT-L_16", "85.15 % at 384", _PAPER),
  ("vit_l16", "imagenet_224", "imagenet21k+imagenet2012/ViT-L_16-224", "82.7 % at 224", _README),
  ("vit_l32", "imagenet21k", "imagenet21k/ViT-L_32", "45.42 % (ImageNet-21k)", _ISSUE_62),
  ("vit_l32", "imagenet", "imagenet21k+imagenet2012/ViT-L_32", "80.99 % at 384", _PAPER),
  ("vit_h14", "imagenet21k", "imagenet21k/ViT-H_14", "49.06 % (ImageNet-21k)", _ISSUE_62),
  ("vit_r50_b16", "imagenet21k", "imagenet21k/R50+ViT-B_16"),
)
# Those of "How to train your ViT" (arXiv:2106.10270) that timm hosts, too: file; learning rate of
# the fine-tuning; ImageNet's precision@1 at 384.
_AUGREG = {
  "ti16": ("Ti_16", "aug_none-wd_0.03-do_0.0-sd_0.0", "0.03", "78.44"),
  "s32": ("S_32", "aug_light1-wd_0.03-do_0.0-sd_0.0", "0.03", ""),
  "s16": ("S_16", "aug_light1-wd_0.03-do_0.0-sd_0.0", "0.03", "83.81"),
  "b16": ("B_16", "aug_medium1-wd_0.1-do_0.0-sd_0.0", "0.01", "86.01"),
  "l16": ("L_16", "aug_medium1-wd_0.1-do_0.1-sd_0.1", "0.01", "87.10"),
  "r_ti16": ("R_Ti_16", "aug_none-wd_0.03-do_0.0-sd_0.0", "0.03", "75.96"),
  "r26_s32": ("R26_S_32", "aug_medium2-wd_0.03-do_0.0-sd_0.0", "0.03", "84.07"),
  "r50_l32": ("R50_L_32", "aug_medium2-wd_0.1-do_0.0-sd_0.0", "0.01", "86.19"),
}


def _entry(model: str, path: str, *reported: str) -> Entry:
  stated = dict(zip(("score", "source"), reported, strict=False))
  return Entry(model, (f"https://storage.googleapis.com/{path}.npz",), **stated)


def _augreg(size: str) -> dict[str, Entry]:
  name, recipe, rate, score = _AUGREG[size]
  upstream = f"vit_models/augreg/{name}-i21k-300ep-lr_0.001-{recipe}"
  tuned = f"{upstream}--imagenet2012-steps_20k-lr_{rate}-res_384"
  reported = (f"{score} % at 384", _TIMM) if score else ()
  return {
    f"vit_{size}_augreg_imagenet21k": _entry(f"vit_{size}", upstream),
    f"vit_{size}_augreg_imagenet": _entry(f"vit_{size}", tuned, *reported),
  }


PUBLISHED: dict[str, Entry] = {
  **{
    f"{model}_{data}": _entry(model, f"vit_models/{file}", *reported)
    for model, data, file, *reported in _ORIGINAL
  },
  **{name: entry for size in _AUGREG for name, entry in _augreg(size).items()},
  "vit_b16_sam_imagenet": _entry("vit_b16", "vit_models/sam/ViT-B_16"),
  "vit_b32_sam_imagenet": _entry("vit_b32", "vit_models/sam/ViT-B_32"),
  "vit_s16_imagenet_90ep": _entry(
    "vit_s16", "big_vision/vit_s16_i1k_90ep", "76.5 % at 224", "2205.01580"
  ),
}

PAPER_SCORES: dict[str, tuple[str, str]] = {
  "vit_b16": ("84.15 % at 384 (JFT), 83.97 % (ImageNet-21k)", _PAPER),
  "vit_b32": ("80.73 % at 384 (JFT), 81.28 % (ImageNet-21k)", _PAPER),
  "vit_l16": ("87.12 % at 384 (JFT), 85.15 % (ImageNet-21k)", _PAPER),
  "vit_l32": ("84.37 % at 384 (JFT), 80.99 % (ImageNet-21k)", _PAPER),
  "vit_h14": ("88.04 % at 384 (JFT), 85.13 % (ImageNet-21k)", _PAPER),
  "vit_r50_b32": ("84.90 % at 384 (JFT)", "2010.11929"),
  "vit_r50_b16": ("85.58 % at 384 (JFT)", "2010.11929"),
  "vit_r50_l32": ("85.68 % at 384 (JFT)", "2010.11929"),
  "vit_r50_l16": ("87.12 % at 384 (JFT)", "2010.11929"),
  "vit_s16": ("76.5 % at 224 after 90 epochs", "2205.01580"),
  "vit_ti16": ("78.44 % at 384 (ImageNet-21k)", _TIMM),
}
