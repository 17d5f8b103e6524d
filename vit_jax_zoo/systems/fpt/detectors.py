"""Faster and Mask R-CNN with a feature pyramid transformer as neck."""

from typing import Any

from vit_jax_zoo.nn.resnet import RESNET_BLOCKS
from vit_jax_zoo.systems.fpt.figures import draw_attention, explain_attention
from vit_jax_zoo.systems.fpt.transformer import FeaturePyramidTransformer


class FPTNeck(FeaturePyramidTransformer):
  """A feature pyramid transformer in a detector, with figures of its attention maps."""

  explain = staticmethod(explain_attention)
  draw_explanation = staticmethod(draw_attention)


# The official repository's configs: Caffe's ResNet, group norm, adaptive heads.
_OFFICIAL = {
  "num_classes": 80,
  "neck": "fpt",
  "neck_fields": {"variant": "official", "norm": "group_norm"},
  "adaptive": True,
  "box_head": {"num_convs": 4, "num_dense": 1, "norm": "group_norm"},
  "convention": "detectron",
}

VARIANTS: dict[str, dict[str, Any]] = {
  f"{kind}_rcnn_r{depth}_fpt": {"backbone": {"blocks": RESNET_BLOCKS[depth]}, "neck": "fpt", **mask}
  for kind, mask in (("faster", {}), ("mask", {"mask_head": {}}))
  for depth in (50, 101)
} | {
  f"{kind}_rcnn_r{depth}_fpt_official": {
    "backbone": {"blocks": RESNET_BLOCKS[depth], "stride_in_1x1": True},
    **_OFFICIAL,
    **mask,
  }
  for kind, mask in (("faster", {}), ("mask", {"mask_head": {"norm": "group_norm", "fused": True}}))
  for depth in (50, 101)
}
"""Fields of `RCNN` by model name."""
