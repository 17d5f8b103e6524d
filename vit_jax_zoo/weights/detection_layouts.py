"""What the official DETR and Hugging Face's have in common: the mask head, sizes of pictures."""

from collections.abc import Iterable, Mapping
from typing import Any

from vit_jax_zoo.constants import IMAGENET_MEAN, IMAGENET_STD
from vit_jax_zoo.weights.key_map import Row, WeightsError
from vit_jax_zoo.weights.preprocess import Preprocess
from vit_jax_zoo.weights.torch_layouts import (
  CONVOLUTION,
  COUNTER,
  HEADS_BIAS,
  TO_HEADS,
  layer_rows,
  norm_rows,
)

PREPROCESS = Preprocess(
  (800, 800), IMAGENET_MEAN, IMAGENET_STD, "shorter_side", "bilinear", max_side=1333
)
"""Shorter side 800, longer at most 1333 (section 4 of the paper)."""

COCO_PANOPTIC_CLASSES = 250
"""Ids up to 200 are in use; up to 90 they are things."""

MASK_PREFIXES = ("mask_head/", "mask_attention/")
_MASK_KEYS = (r"bbox_attention\..*", r"mask_head\..*")


def _mask_rows() -> list[Row]:
  rows = []
  for theirs, ours in (("q_linear", "query"), ("k_linear", "key")):
    published, path = f"bbox_attention.{theirs}", f"mask_attention/{ours}"
    rows += layer_rows(published, path, TO_HEADS, HEADS_BIAS)
  rows.append(Row("mask_head.lay1.weight", "mask_head/conv1_kernel", CONVOLUTION))
  rows.append(Row("mask_head.lay1.bias", "mask_head/conv1_bias"))
  rows += layer_rows("mask_head.lay{i}", "mask_head/conv{i}", CONVOLUTION)
  rows += norm_rows("mask_head.gn{i}", "mask_head/norm{i}")
  rows += layer_rows("mask_head.adapter{i}", "mask_head/adapter{i}", CONVOLUTION)
  return rows + layer_rows("mask_head.out_lay", "mask_head/out", CONVOLUTION)


MASK_ROWS = tuple(_mask_rows())
"""The mask head, whose names both have alike."""


def prefixed(prefix: str, rows: Iterable[Row]) -> tuple[Row, ...]:
  """Returns the rows for keys that begin with `prefix`."""
  return tuple(Row(prefix + row.published, row.ours, row.transform) for row in rows)


def heads_of(*, has_masks: bool) -> tuple[str, ...]:
  """Returns what a new task may start afresh: a mask head only where the file has none."""
  return ("class_head/",) if has_masks else ("class_head/", *MASK_PREFIXES)


def stuff_of(fields: Mapping[str, Any]) -> dict[str, int]:
  """Returns the task's `stuff_from` for the classes of COCO's panoptic models: 91; else nothing."""
  is_coco = fields["mask_head"] and fields["num_classes"] == COCO_PANOPTIC_CLASSES
  return {"stuff_from": 91} if is_coco else {}


def ignored(prefix: str) -> tuple[str, ...]:
  """Returns which keys may stay unused: counters, and the masks of a file with `prefix`.

  A detector may be taken out of a model with masks, whose inner DETR's keys have the prefix.
  """
  counters = rf".*\.{COUNTER}"
  return (counters, *_MASK_KEYS) if prefix else (counters,)


_BACKBONE = {
  "stem": "conv7",
  "shortcut": "conv",
  "se_ratio": 0.0,
  "activation": "relu",
  "norm_epsilon": 1e-5,
  "stride_in_1x1": False,
}


def check_backbone(fields: Mapping[str, Any], whose: str) -> dict[str, Any]:
  """Returns the backbone's fields: "blocks", "widths", "stem_width", "output_stride".

  Raises:
    WeightsError: one line: `whose` code has no such backbone.
  """
  given = dict(fields["backbone"] or {})
  other = [f"{k}={given[k]!r}" for k, fixed in _BACKBONE.items() if given.get(k, fixed) != fixed]
  if given.get("norm") == "group_norm":
    other.append("norm='group_norm'")
  if given.get("output_stride", 32) not in (16, 32):
    other.append(f"output_stride={given['output_stride']}")
  if other:
    raise WeightsError(f"{whose} has no backbone with {', '.join(other)}")
  sizes = {"blocks": (3, 4, 6, 3), "widths": (64, 128, 256, 512), "stem_width": 64}
  return {**sizes, "output_stride": 32, **given}
