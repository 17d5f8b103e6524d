"""Faster and Mask R-CNN with a feature pyramid transformer as neck."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from vit_jax_zoo.nn.resnet import RESNET_BLOCKS
from vit_jax_zoo.systems.fpt.figures import draw_attention, explain_attention, pad_batch
from vit_jax_zoo.systems.fpt.transformer import FeaturePyramidTransformer
from vit_jax_zoo.tasks import base


class FPTNeck(FeaturePyramidTransformer):
  """A feature pyramid transformer in a detector, with figures of its attention maps."""

  @staticmethod
  def explain(
    run: Callable[[base.Batch], Mapping[str, Any]], batch: base.Batch, size_multiple: int
  ) -> dict[str, Any]:
    """Returns the attention maps of the first target's centre, see `explain_attention`.

    Args:
      run: applies the model to a batch and returns the neck's intermediates.
      batch: detection batch.
      size_multiple: multiple to which the model pads images.
    """
    return explain_attention(run, pad_batch(batch, size_multiple))

  @staticmethod
  def draw_explanation(explanation: Mapping[str, Any], level_names: Sequence[str]) -> Figure:
    """Draws the attention maps of each level."""
    return draw_attention(explanation, level_names)


def _official(depth: int, fields: Mapping[str, Any]) -> dict[str, Any]:
  """The official repository's configs: Caffe's ResNet, group norm, adaptive heads."""
  return {
    "num_classes": 80,
    "backbone": {"blocks": RESNET_BLOCKS[depth], "stride_in_1x1": True},
    "neck": "fpt",
    "neck_fields": {"variant": "official", "norm": "group_norm"},
    "adaptive": True,
    "box_head": {"num_convs": 4, "num_dense": 1, "norm": "group_norm"},
    "convention": "detectron",
    **fields,
  }


VARIANTS: dict[str, dict[str, Any]] = {
  f"{kind}_rcnn_r{depth}_fpt": {
    "backbone": {"blocks": RESNET_BLOCKS[depth]},
    "neck": "fpt",
    **mask,
  }
  for kind, mask in (("faster", {}), ("mask", {"mask_head": {}}))
  for depth in (50, 101)
} | {
  f"{kind}_rcnn_r{depth}_fpt_official": _official(depth, mask)
  for kind, mask in (
    ("faster", {}),
    ("mask", {"mask_head": {"norm": "group_norm", "fused": True}}),
  )
  for depth in (50, 101)
}
"""Fields of `RCNN` by model name."""
