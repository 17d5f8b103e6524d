"""State dicts of R-CNNs: torchvision's; rows of Detectron.pytorch's, as in FPT's official code.

Detectron's images are BGR (the first convolution's input channels are reversed). In both, the
background is the first class (here the last), and crops are flattened channel first. Class ids of
COCO are 1 to 90 with gaps, as in `data.sources.coco`: files with 81 outputs (Detectron, without
gaps) or 91 (torchvision, with gaps) get outputs for the unused ids. Otherwise the file's class 1 is
class 0 here.

Newer files of torchvision have "conv.0.0" for "conv", and ".0" behind the numbers of layers and
levels. Version 2, with norms and convolutions in its heads, is another network, and is refused.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from vit_jax_zoo.data.sources.coco import THINGS, names_by_id
from vit_jax_zoo.weights import backbones as resnet
from vit_jax_zoo.weights.checkpoint import Checkpoint, Pretrained
from vit_jax_zoo.weights.key_map import KEEP, Array, Flat, Row, Transform, WeightsError, write
from vit_jax_zoo.weights.preprocess import DETECTION
from vit_jax_zoo.weights.readers import Published, write_state_dict
from vit_jax_zoo.weights.torch_layouts import CONVOLUTION, COUNTER, DENSE, layer_rows, norm_rows

IMAGE_MEAN = (122.7717 / 255, 115.9465 / 255, 102.9801 / 255)  # RGB, for `normalize_images`
IMAGE_STD = (1 / 255, 1 / 255, 1 / 255)

NORM_EPSILON = 1e-5  # of our norms; Caffe's folded norms have neither epsilon nor variance
UNIT_VARIANCE = np.float32(1 - NORM_EPSILON)

FIRST_CONVOLUTION = Transform(
  lambda array, shape: CONVOLUTION.read(array[:, ::-1] if array.ndim == 4 else array, shape),
  lambda array: CONVOLUTION.write(array)[:, ::-1],
)
"""[out bgr h w] <-> [h w rgb out]."""


def background_last(inner: Transform, per_class: int = 1) -> Transform:
  """Moves the first class to the end, then applies `inner`; `per_class` outputs per class."""
  return Transform(
    lambda array, shape: inner.read(np.roll(array, -per_class, axis=0), shape),
    lambda array: np.roll(inner.write(array), per_class, axis=0),
  )


DOUBLING = Transform(
  lambda array, _: array.transpose(2, 3, 0, 1) if array.ndim == 4 else array,
  lambda array: array.transpose(2, 3, 0, 1),
)
"""A transposed convolution, [in out h w] <-> [h w in out]."""


def flattened_crops(side: int) -> Transform:
  """[out, channels x side x side] <-> [side x side x channels, out]."""

  def read_array(array: Array, shape: tuple[int, ...]) -> Array:
    if array.ndim != 2 or array.shape[1] % side**2 or array.size != math.prod(shape):
      return array
    return array.reshape(len(array), -1, side, side).transpose(2, 3, 1, 0).reshape(shape)

  def write_array(array: Array) -> Array:
    grouped = array.reshape(side, side, -1, array.shape[-1])
    return grouped.transpose(3, 2, 0, 1).reshape(array.shape[-1], -1)

  return Transform(read_array, write_array)


BODY = "Conv_Body.conv_body."  # prefix of the backbone's keys in a detector
LAYOUT = dataclasses.replace(
  resnet.TORCHVISION,
  stem=("res1.conv1", "res1.bn1"),
  block=tuple(f"res{stage}.{{b}}" for stage in range(2, 6)),
)


def backbone_rows(ours: str = "backbone/") -> list[Row]:
  """Rows of Caffe's ResNet after `unfold_norms`."""
  first, *others = resnet.rows(LAYOUT, BODY, ours)
  return [Row(first.published, first.ours, FIRST_CONVOLUTION), *others]


def proposal_rows() -> list[Row]:
  """Rows of the first stage."""
  return [
    *layer_rows("RPN.FPN_RPN_conv", "proposal_head/conv", CONVOLUTION),
    *layer_rows("RPN.FPN_RPN_cls_score", "proposal_head/objectness", CONVOLUTION),
    *layer_rows("RPN.FPN_RPN_bbox_pred", "proposal_head/deltas", CONVOLUTION),
  ]


def box_rows(num_convs: int = 4, pool_size: int = 7, prefix: str = "Box_Head") -> list[Row]:
  """Rows of the adaptive box heads: two dense layers, or convolutions and one dense layer."""
  crops, ours = flattened_crops(pool_size), "box_head"
  if not num_convs:
    return [
      *layer_rows(f"{prefix}.fc1.{{l}}.0", f"{ours}/first_{{l}}", crops),
      *norm_rows(f"{prefix}.fc1.{{l}}.1", f"{ours}/first_{{l}}_norm"),
      *layer_rows(f"{prefix}.fc2.0", f"{ours}/dense_1", DENSE),
      *norm_rows(f"{prefix}.fc2.1", f"{ours}/dense_1_norm"),
    ]
  return [
    *_conv_norm_rows(f"{prefix}.conv1_head.{{l}}", f"{ours}/first_{{l}}"),
    *layer_rows(f"{prefix}.fc", f"{ours}/dense_0", crops),
    *_sequence_rows(f"{prefix}.convs", ours, num_convs),
  ]


def _conv_norm_rows(published: str, ours: str, place: int = 0) -> list[Row]:
  conv = Row(f"{published}.{place}.weight", f"{ours}/kernel", CONVOLUTION)
  return [conv, *norm_rows(f"{published}.{place + 1}", f"{ours}_norm")]


def _sequence_rows(published: str, ours: str, end: int) -> list[Row]:
  convs = (_conv_norm_rows(published, f"{ours}/conv_{i}", 3 * (i - 1)) for i in range(1, end))
  return list(itertools.chain(*convs))


def output_rows(prefix: str = "Box_Outs") -> list[Row]:
  """Rows of the second stage's classes and boxes."""
  classes, boxes = background_last(DENSE), background_last(DENSE, 4)
  return [
    *layer_rows(f"{prefix}.cls_score", "box_outputs/logits", classes, background_last(KEEP)),
    *layer_rows(f"{prefix}.bbox_pred", "box_outputs/deltas", boxes, background_last(KEEP, 4)),
  ]


def mask_rows(mask_pool_size: int = 14, num_convs: int = 4) -> list[Row]:
  """Rows of the adaptive, fused mask head."""
  theirs, ours = "Mask_Head", "mask_head"
  return [
    *_conv_norm_rows(f"{theirs}.mask_conv1.{{l}}", f"{ours}/first_{{l}}"),
    *_sequence_rows(f"{theirs}.conv_fcn", ours, num_convs - 1),
    *_conv_norm_rows(f"{theirs}.mask_conv4", f"{ours}/conv_{num_convs - 1}"),
    *_conv_norm_rows(f"{theirs}.mask_conv4_fc", f"{ours}/fused_conv_0"),
    *_conv_norm_rows(f"{theirs}.mask_conv5_fc", f"{ours}/fused_conv_1"),
    *layer_rows(f"{theirs}.mask_fc.0", f"{ours}/fused_dense", flattened_crops(mask_pool_size)),
    *layer_rows(f"{theirs}.upconv", f"{ours}/upsample", DOUBLING),
    *mask_output_rows("Mask_Outs.classify"),
  ]


def mask_output_rows(published: str) -> list[Row]:
  """Rows of the masks' classes."""
  kernel, bias = background_last(CONVOLUTION), background_last(KEEP)
  return layer_rows(published, "mask_head/logits", kernel, bias)


def unfold_norms(arrays: Mapping[str, Array]) -> Flat:
  """Adds mean 0 and variance 1 (minus epsilon) to the backbone's folded norms.

  A folded norm is x * scale + bias: a frozen norm with mean 0 and variance + epsilon = 1.
  """
  found = dict(arrays)
  for key, scale in arrays.items():
    norm = key.removesuffix(".weight")
    is_norm = key.startswith(BODY) and norm != key and scale.ndim == 1
    if is_norm and f"{norm}.running_var" not in arrays:
      found[f"{norm}.running_mean"] = np.zeros(scale.shape, np.float32)
      found[f"{norm}.running_var"] = np.full(scale.shape, UNIT_VARIANCE)
  return found


def fold_norms(arrays: Mapping[str, Array]) -> Flat:
  """Folds the backbone's running statistics into scale and bias; inverse of `unfold_norms`."""
  found = dict(arrays)
  for key in arrays:
    norm = key.removesuffix(".running_var")
    if norm == key or not key.startswith(BODY):
      continue
    mean, var = found.pop(f"{norm}.running_mean"), found.pop(key)
    if np.any(mean != 0) or np.any(var != UNIT_VARIANCE):
      share = found[f"{norm}.weight"] / np.sqrt(var + NORM_EPSILON)
      found[f"{norm}.bias"] = (found[f"{norm}.bias"] - mean * share).astype(np.float32)
      found[f"{norm}.weight"] = share.astype(np.float32)
  return found


_BLOB = re.compile(r"conv1_w|res_conv1_bn_[sb]|res\d_\d+_branch\w+?(_w|_bn_[sb])")
_BRANCHES = {"2a": ("conv1", "bn1"), "2b": ("conv2", "bn2"), "2c": ("conv3", "bn3")}
# Some of Caffe's files have a bias of the first convolution; Detectron ignores it, too.
_IGNORE = (r"conv1_b", r"(pred|fc1000)_[wb]", r".*_momentum", r"lr|weight_order")


def recognize_backbone(arrays: Flat) -> resnet.Backbone | None:
  """Returns the backbone of one of Caffe's files or of a detector of Detectron.pytorch's.

  Caffe                conv1_w, res2_0_branch2a_w, ...bn_s, ...bn_b   R-50.pkl, R-101.pkl
  Detectron.pytorch    Conv_Body.conv_body.res2.0.conv1.weight, ...   part of a detector
  """
  blobs = {_detectron_key(key): array for key, array in arrays.items() if _BLOB.fullmatch(key)}
  ignore: tuple[str, ...] = _IGNORE
  if f"{BODY}res1.conv1.weight" in blobs:
    arrays = blobs | {key: array for key, array in arrays.items() if not _BLOB.fullmatch(key)}
  elif f"{BODY}res1.conv1.weight" in arrays:
    ignore = (rf"(?!{re.escape(BODY)}).*",)
  else:
    return None
  return resnet.Backbone(unfold_norms(arrays), backbone_rows(ours=""), ignore)


def _detectron_key(blob: str) -> str:
  name, _, kind = blob.rpartition("_")
  is_norm = name.endswith("_bn")
  name = name.removesuffix("_bn")
  suffix = "bias" if kind == "b" else "weight"
  if not name.startswith("res") or name == "res_conv1":
    return f"{BODY}res1.{'bn1' if is_norm else 'conv1'}.{suffix}"
  stage, block, branch = name.split("_")
  layers = _BRANCHES.get(branch.removeprefix("branch"), ("downsample.0", "downsample.1"))
  return f"{BODY}{stage}.{block}.{layers[is_norm]}.{suffix}"


IDS = sorted(THINGS)
NUM_CLASSES = IDS[-1] + 1
NAMES = names_by_id(THINGS)
UNUSED = -20.0  # bias of outputs without class: they are never predicted, and remain trainable

# Outputs of a file -> their places, background first: Detectron's without, torchvision's with gaps.
_PLACES = {len(ids) + 1: [0, *(i + 1 for i in ids)] for ids in (IDS, range(1, NUM_CLASSES))}


def with_ids(
  arrays: Mapping[str, Array], layers: Mapping[str, int], source: str
) -> tuple[Flat, bool]:
  """Reorders a COCO detector's outputs by class id, background first; returns whether it is COCO's.

  A state dict with 81 or 91 outputs is taken as COCO's; others stay as they are. `layers` has the
  outputs per class of layers (without ".weight" and ".bias"), the class logits first.
  """
  logits = f"{next(iter(layers))}.bias"
  count = len(arrays[logits])
  places = _PLACES.get(count)
  if places is None:
    text = "%s: %d outputs; the file's class 1, after the background, is class 0 here"
    logging.info(text, source, count)
    return dict(arrays), False
  logging.info("%s: %d outputs, assumed to be COCO's; classes are COCO's ids", source, count)

  def spread(key: str, own: Array) -> Array:
    if len(own) != len(places):
      return own
    wide = np.full((NUM_CLASSES + 1, *own.shape[1:]), UNUSED if key == logits else 0, own.dtype)
    wide[places] = own
    return wide

  return _change_classes(arrays, layers, spread), True


def without_ids(
  arrays: Mapping[str, Array], layers: Mapping[str, int], names: Sequence[str], outputs: int
) -> Flat:
  """Inverse of `with_ids` for a file with `outputs` classes, if the class names are COCO's."""
  if tuple(names) != NAMES:
    return dict(arrays)
  return _change_classes(arrays, layers, lambda _, own: own[_PLACES[outputs]])


def _change_classes(
  arrays: Mapping[str, Array], layers: Mapping[str, int], change: Callable[[str, Array], Array]
) -> Flat:
  """Applies `change` to arrays of layers, by key, as [classes, outputs per class, ...]."""
  found = dict(arrays)
  for layer, per_class in layers.items():
    for key in {f"{layer}.weight", f"{layer}.bias"} & arrays.keys():
      rest = arrays[key].shape[1:]
      if len(arrays[key]) % per_class == 0:
        found[key] = change(key, arrays[key].reshape(-1, per_class, *rest)).reshape(-1, *rest)
  return found


_TORCHVISION = "backbone.body."
_PREDICTOR, _MASKS = "roi_heads.box_predictor", "roi_heads.mask_predictor"
# Layers by class, and their outputs per class.
_OUTPUTS = {f"{_PREDICTOR}.cls_score": 1, f"{_PREDICTOR}.bbox_pred": 4}
_OUTPUTS |= {f"{_MASKS}.mask_fcn_logits": 1}
PREPROCESS = dataclasses.replace(DETECTION, interpolation="tf_bilinear", rounding="floor")
"""Shorter side 800, longer at most 1333, without antialiasing."""


def rows(pool_size: int = 7) -> tuple[Row, ...]:
  """Returns the key map; `pool_size` is the side of the box head's input."""
  convolutions = {
    "backbone.fpn.inner_blocks.{l}.0": "neck/lateral_{l}",
    "backbone.fpn.inner_blocks.{l}": "neck/lateral_{l}",
    "backbone.fpn.layer_blocks.{l}.0": "neck/output_{l}",
    "backbone.fpn.layer_blocks.{l}": "neck/output_{l}",
    "rpn.head.conv.0.0": "proposal_head/conv",
    "rpn.head.conv": "proposal_head/conv",
    "rpn.head.cls_logits": "proposal_head/objectness",
    "rpn.head.bbox_pred": "proposal_head/deltas",
    "roi_heads.mask_head.{i}.0": "mask_head/conv_{i}",
    "roi_heads.mask_head.mask_fcn{i+1}": "mask_head/conv_{i}",
  }
  return (
    *resnet.rows(resnet.TORCHVISION, _TORCHVISION, "backbone/"),
    *(row for layer in convolutions.items() for row in layer_rows(*layer, CONVOLUTION)),
    *layer_rows("roi_heads.box_head.fc6", "box_head/dense_0", flattened_crops(pool_size)),
    *layer_rows("roi_heads.box_head.fc7", "box_head/dense_1", DENSE),
    *output_rows(_PREDICTOR),
    *layer_rows(f"{_MASKS}.conv5_mask", "mask_head/upsample", DOUBLING),
    *mask_output_rows(f"{_MASKS}.mask_fcn_logits"),
  )


def is_of(published: Mapping[str, np.ndarray]) -> bool:
  """Returns whether a state dict is torchvision's R-CNN on a ResNet."""
  return published.keys() >= {f"{_TORCHVISION}conv1.weight", f"{_PREDICTOR}.cls_score.bias"}


def infer_fields(published: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
  """Returns the fields of the `RCNN` of a state dict; WeightsError if it is another detector."""
  if "roi_heads.box_head.fc6.weight" not in published:
    raise WeightsError(f"{source}: torchvision's R-CNN v2 is not supported; use the first version")
  if len(published["rpn.head.cls_logits.bias"]) != 3:
    raise WeightsError(f"{source}: expected three anchors per position")
  dense, flat = published["roi_heads.box_head.fc6.weight"].shape
  width = published["rpn.head.cls_logits.weight"].shape[1]
  fields: dict[str, Any] = {
    "num_classes": len(published[f"{_PREDICTOR}.cls_score.bias"]) - 1,
    "backbone": resnet.infer_fields(published, resnet.TORCHVISION, source, _TORCHVISION),
    "neck": "fpn",
    "width": width,
    "convention": "torchvision",
    "pool_size": round((flat / width) ** 0.5),
    "box_head": {"width": dense},
  }
  if f"{_MASKS}.conv5_mask.bias" in published:
    convs = [k for k in published if re.fullmatch(r"roi_heads\.mask_head\..*\.?bias", k)]
    channels = len(published[f"{_MASKS}.conv5_mask.bias"])
    fields["mask_head"] = {"num_convs": len(convs), "width": channels}
  return fields


def read_checkpoint(published: Published) -> Checkpoint:
  """Reads a state dict of torchvision."""
  arrays, is_coco = with_ids(published.arrays, _OUTPUTS, published.path)
  fields = infer_fields(arrays, published.path)
  names = {"class_names": NAMES} if is_coco else {}
  return Checkpoint(
    source=published.path,
    family="faster_rcnn",
    arrays=arrays,
    table=rows(fields["pool_size"]),
    fields=fields,
    preprocess=PREPROCESS,
    task="instance_detection",
    # Models trained here paste exactly: its rule costs 6 % of IoU with objects of 30 pixels.
    task_fields={"mask_paste": "torchvision", **names},
    ignore=(rf".*\.{COUNTER}",),
    heads=("box_outputs/", "mask_head/logits/"),
  )


def write_checkpoint(path: str, export: Pretrained) -> None:
  """Writes a state dict that torchvision loads; WeightsError if it has no such detector."""
  fields = export.fields()
  resnet.check_plain(fields, "torchvision")
  neck, convention = fields["neck"], fields["convention"]
  if (neck, convention) != ("fpn", "torchvision"):
    wrong = f"torchvision has no R-CNN with {neck=} and {convention=}"
    raise WeightsError(f"{wrong}; expected 'fpn' and 'torchvision'")
  arrays = write(export.variables, rows(fields["pool_size"]))
  arrays = without_ids(arrays, _OUTPUTS, export.class_names, outputs=NUM_CLASSES)
  export.warn_not_stored(path, PREPROCESS)
  write_state_dict(path, arrays)
