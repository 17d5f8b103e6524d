"""torchvision's Faster and Mask R-CNN: `fasterrcnn_resnet50_fpn_coco-258fb6c6.pth` and its sister.

Newer files have "conv.0.0" for "conv", and ".0" behind the numbers of layers and levels. Version 2
of both, with norms and convolutions in their heads, is another network, and is refused.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax_zoo.systems.rcnn import weights_detectron as detectron
from vit_jax_zoo.weights import backbones as resnet
from vit_jax_zoo.weights.checkpoint import Checkpoint, Pretrained
from vit_jax_zoo.weights.key_map import Row, WeightsError, write
from vit_jax_zoo.weights.preprocess import DETECTION
from vit_jax_zoo.weights.readers import Published, write_state_dict
from vit_jax_zoo.weights.torch_layouts import CONVOLUTION, COUNTER, DENSE, layer_rows

_BODY = "backbone.body."
_PREDICTOR, _MASKS = "roi_heads.box_predictor", "roi_heads.mask_predictor"
_OUTPUTS = {
  f"{_PREDICTOR}.cls_score": 1,
  f"{_PREDICTOR}.bbox_pred": 4,
  f"{_MASKS}.mask_fcn_logits": 1,
}
PREPROCESS = dataclasses.replace(DETECTION, interpolation="tf_bilinear", rounding="floor")
"""Shorter side 800, longer at most 1333, without antialiasing."""
COCO_OUTPUTS = 91  # of COCO detectors, background included


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
    *resnet.rows(resnet.TORCHVISION, _BODY, "backbone/"),
    *(row for layer in convolutions.items() for row in layer_rows(*layer, CONVOLUTION)),
    *layer_rows("roi_heads.box_head.fc6", "box_head/dense_0", detectron.flattened_crops(pool_size)),
    *layer_rows("roi_heads.box_head.fc7", "box_head/dense_1", DENSE),
    *detectron.output_rows(_PREDICTOR),
    *layer_rows(f"{_MASKS}.conv5_mask", "mask_head/upsample", detectron.DOUBLING),
    *detectron.mask_output_rows(f"{_MASKS}.mask_fcn_logits"),
  )


def is_of(published: Mapping[str, np.ndarray]) -> bool:
  """Returns whether a state dict is torchvision's R-CNN on a ResNet."""
  return f"{_BODY}conv1.weight" in published and f"{_PREDICTOR}.cls_score.bias" in published


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
    "backbone": resnet.infer_fields(published, resnet.TORCHVISION, source, _BODY),
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
  arrays, is_coco = detectron.with_ids(published.arrays, _OUTPUTS, published.path)
  fields = infer_fields(arrays, published.path)
  names = {"class_names": detectron.NAMES} if is_coco else {}
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
  if fields["neck"] != "fpn" or fields["convention"] != "torchvision":
    raise WeightsError(
      f"torchvision has no R-CNN with neck={fields['neck']!r} and "
      f"convention={fields['convention']!r}; expected 'fpn' and 'torchvision'"
    )
  arrays = write(export.variables, rows(fields["pool_size"]))
  arrays = detectron.without_ids(arrays, _OUTPUTS, export.class_names, COCO_OUTPUTS)
  export.warn_not_stored(path, PREPROCESS)
  write_state_dict(path, arrays)
