"""State dicts of the official code's detectors: Caffe's ResNet, FPT, adaptive heads.

Keys are Detectron.pytorch's (`rcnn.weights`), with those of the class `FPT`
(`weights_official`) below "Conv_Body.". The code's configs name another class, `FPT_s`, which does
not run: its lateral convolutions do not fit each other.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax_zoo.systems.fpt import weights_official as fpt_pt
from vit_jax_zoo.systems.rcnn import weights as detectron
from vit_jax_zoo.weights import backbones as resnet
from vit_jax_zoo.weights.checkpoint import Checkpoint, Pretrained
from vit_jax_zoo.weights.key_map import Row, WeightsError, write
from vit_jax_zoo.weights.preprocess import Preprocess
from vit_jax_zoo.weights.readers import Published, write_state_dict

PREPROCESS = Preprocess(
  (1000, 1000), detectron.IMAGE_MEAN, detectron.IMAGE_STD, "shorter_side", "bilinear", max_side=1400
)
"""Shorter side 1000, longer at most 1400, as in the code's test configs."""
COCO_OUTPUTS = 81  # of COCO detectors, background included

_OUTPUTS = {"Box_Outs.cls_score": 1, "Box_Outs.bbox_pred": 4, "Mask_Outs.classify": 1}


def rows(fields: Mapping[str, Any]) -> tuple[Row, ...]:
  """Returns the key map of an `RCNN` with these fields."""
  convs, mask = fields["box_head"].get("num_convs", 0), fields["mask_head"] or {}
  with_norm = fields["neck_fields"].get("norm", "none") != "none"
  return (
    *detectron.backbone_rows(),
    *fpt_pt.neck_rows(fpt_pt.BODY, "neck/", with_norm=with_norm),
    *detectron.proposal_rows(),
    *detectron.box_rows(convs, fields["pool_size"]),
    *detectron.output_rows(),
    *detectron.mask_rows(fields["mask_pool_size"], mask.get("num_convs", 4)),
  )


def is_of(published: Mapping[str, np.ndarray]) -> bool:
  """Returns whether a state dict is a detector of the official code with an FPT."""
  return f"{detectron.BODY}res1.conv1.weight" in published and fpt_pt.is_of(published, fpt_pt.BODY)


def infer_fields(published: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
  """Returns the fields of the `RCNN` of a state dict; it has three anchors per position."""
  if len(published["RPN.FPN_RPN_cls_score.bias"]) != 3:
    raise WeightsError(f"{source}: expected three anchors per position")
  neck = fpt_pt.infer_fields(published, prefix=fpt_pt.BODY, source=source)
  width = neck.pop("width")
  if "Box_Head.fc1.0.0.weight" in published:
    dense, flat = published["Box_Head.fc1.0.0.weight"].shape
    box = {"norm": "group_norm", "width": dense}
  else:
    convs = 1 + _count_convs(published, "Box_Head.convs")
    dense, flat = published["Box_Head.fc.weight"].shape
    box = {"norm": "group_norm", "num_convs": convs, "num_dense": 1, "width": dense}
  sizes = resnet.infer_fields(published, detectron.LAYOUT, source, detectron.BODY)
  fields: dict[str, Any] = {
    "num_classes": len(published["Box_Outs.cls_score.bias"]) - 1,
    "backbone": {**sizes, "stride_in_1x1": True},
    "neck": "fpt",
    "neck_fields": neck,
    "width": width,
    "adaptive": True,
    "convention": "detectron",
    "pool_size": round((flat / width) ** 0.5),
    "mask_pool_size": 14,
    "box_head": box,
    "mask_head": None,
  }
  if "Mask_Outs.classify.bias" in published:
    convs = 2 + _count_convs(published, "Mask_Head.conv_fcn")
    sizes = {"num_convs": convs, "width": len(published["Mask_Head.upconv.bias"])}
    fields["mask_pool_size"] = round(len(published["Mask_Head.mask_fc.0.bias"]) ** 0.5) // 2
    fields["mask_head"] = {"norm": "group_norm", "fused": True, **sizes}
  return fields


def _count_convs(published: Mapping[str, np.ndarray], layers: str) -> int:
  keys = [key for key in published if re.fullmatch(rf"{re.escape(layers)}\.\d+\.weight", key)]
  return sum(published[key].ndim == 4 for key in keys)


def read_checkpoint(published: Published) -> Checkpoint:
  """Reads a state dict of the official code."""
  arrays, is_coco = detectron.with_ids(published.arrays, _OUTPUTS, published.path)
  fields = infer_fields(arrays, published.path)
  return Checkpoint(
    source=published.path,
    family="faster_rcnn",
    arrays=detectron.unfold_norms(arrays),
    table=rows(fields),
    fields=fields,
    preprocess=PREPROCESS,
    task="instance_detection",
    task_fields={"class_names": detectron.NAMES} if is_coco else {},
    ignore=fpt_pt.IGNORE,
    heads=("box_outputs/", "mask_head/logits/"),
  )


def write_checkpoint(path: str, export: Pretrained) -> None:
  """Writes a state dict of the official code; frozen norms are folded into scale and bias.

  Raises WeightsError if the code has no such detector.
  """
  fields = export.fields()
  given = {**fields, "variant": (fields["neck_fields"] or {}).get("variant", "paper")}
  expected = {"neck": "fpt", "adaptive": True, "convention": "detectron", "backbone_kind": "resnet"}
  expected["variant"] = "official"
  other = [f"{k}={given[k]!r}" for k, value in expected.items() if given[k] != value]
  backbone = fields["backbone"] or {}
  if backbone.get("norm", "frozen_batch_norm") != "frozen_batch_norm":
    other.append(f"trained norms in the backbone ({backbone['norm']})")
  if not backbone.get("stride_in_1x1", False):
    other.append("stride_in_1x1=False in the backbone")
  if other:
    raise WeightsError(f"the official code has no detector with {', '.join(other)}")
  arrays = write(export.variables, rows(fields))
  arrays |= fpt_pt.state_dict(export.variables, "neck/", fpt_pt.BODY)
  arrays = detectron.fold_norms(arrays)
  arrays = detectron.without_ids(arrays, _OUTPUTS, export.class_names, COCO_OUTPUTS)
  export.warn_not_stored(path, PREPROCESS)
  write_state_dict(path, arrays)
