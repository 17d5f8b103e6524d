"""DETR's claims (arXiv:2005.12872, sections 4.2 and 4.4) on scenes of shapes.

python -m benchmarks.claims.detr
"""

from collections.abc import Mapping
from typing import Any

import cv2
import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.claims import common
from benchmarks.claims.common import Change, Part, Scores, Setting, table_of
from vit_jax_zoo import builder
from vit_jax_zoo.data.sources.demo import SHAPES

FIELDS = {
  "data.train.source": "demo:shapes", "data.eval.test.source": "demo:shapes",
  "eval_every": 0, "checkpoint.every": 0,
}  # fmt: skip
LAYERS = 3
BOXES = ("test/box_ap", "test/box_ap50")


def layer_scores(config: ConfigDict, variables: Any) -> Scores:
  """Returns AP and AP50 of each decoder layer, with and without non-maximum suppression."""
  task = builder.build(config).task

  @jax.jit
  def outputs(variables: Any, batch: Any) -> Any:
    return task.model.apply(variables, task._images(batch), train=False)

  def detections_of(layer: int, *, suppress: bool) -> Change:
    def change(batch: dict[str, Any], found: dict[str, Any] | None) -> dict[str, Any]:
      if found is None:
        return batch
      return detections(jax.device_get(outputs(variables, batch)), layer, suppress=suppress)

    return change

  changes = {
    f"layer {layer + 1}{suffix}": detections_of(layer, suppress=bool(suffix))
    for layer in range(LAYERS)
    for suffix in ("", ", suppressed")
  }
  found = common.evaluate(config, variables, changes)
  names = ("box_ap", "box_ap50")
  return {f"{k}, {layer}": scores[k] for layer, scores in found.items() for k in names}


def detections(outputs: Any, layer: int, *, suppress: bool) -> dict[str, Any]:
  """Returns the detections of a decoder layer, in pixels of the scenes, which are 64x64."""
  logits, boxes = (
    np.concatenate([outputs[f"auxiliary_{name}"], outputs[name][None]])[layer]
    for name in ("logits", "boxes_cxcywh")
  )
  probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))[..., :-1]
  scores, labels = probabilities.max(-1), probabilities.argmax(-1)
  corners = np.concatenate([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., 2:]], axis=-1) * 64
  keep = np.full(scores.shape, not suppress)
  for row in range(len(scores)) if suppress else ():  # within each class, as usual
    keep[row, cv2.dnn.NMSBoxesBatched(corners[row], scores[row], labels[row], 0.0, 0.7)] = True
  corners[..., 2:] += corners[..., :2]
  # A removed detection has an empty box, which matches nothing, and the lowest score.
  kept = {"scores": np.where(keep, scores, 0), "labels": labels}
  return {**kept, "boxes_xyxy": np.where(keep[..., None], corners, 0)}


def _detector(fields: Mapping[str, Any] | None = None, **more: Any) -> Setting:
  return Setting("detr:demo,num_steps=1500,batch_size=16", FIELDS | (fields or {}), BOXES, **more)


SETTINGS = {
  "all losses": _detector(measure=layer_scores),
  "without GIoU": _detector({"task.giou_weight": 0.0}),
  "without L1": _detector({"task.box_weight": 0.0}),
  "masks": Setting(
    "detr:demo_panoptic,num_steps=750,batch_size=16",
    FIELDS | {"task.stuff_from": len(SHAPES)},
    ("test/pq", "test/pq_things", "test/pq_stuff", *BOXES),
    init_from="all losses",
  ),
}

_BY_LAYER = {
  f"{name}{column}": {
    f"{i + 1}": ("all losses", f"{score}, layer {i + 1}{suffix}") for i in range(LAYERS)
  }
  for name, score in (("AP", "box_ap"), ("AP50", "box_ap50"))
  for column, suffix in (("", ""), (" with suppression", ", suppressed"))
}


def _layer(number: int, suffix: str = "") -> tuple[str, str]:
  return "all losses", f"box_ap, layer {number}{suffix}"


PARTS = (
  Part(
    key="layers",
    columns=_BY_LAYER,
    rows="decoder layer",
    axis="box AP",
    plotted=("AP", "AP with suppression"),
    compared={
      "AP of the last layer is above that of the first": (_layer(LAYERS), _layer(1)),
      "Suppression raises AP of the first layer": (_layer(1, ", suppressed"), _layer(1)),
      "Suppression lowers AP of the last layer": (_layer(LAYERS), _layer(LAYERS, ", suppressed")),
    },
  ),
  Part(
    key="losses",
    columns=table_of(
      {name: name for name in ("all losses", "without GIoU", "without L1")},
      {"AP": "test/box_ap", "AP50": "test/box_ap50"},
    ),
    rows="losses",
    axis="box AP",
    ordered=False,
    compared={
      f"All losses have a higher AP than {name}": (("all losses", BOXES[0]), (name, BOXES[0]))
      for name in ("without GIoU", "without L1")
    },
  ),
  Part(
    key="masks",
    columns=table_of(
      {"masks": "masks"},
      {
        "PQ": "test/pq",
        "PQ of shapes": "test/pq_things",
        "PQ of textures": "test/pq_stuff",
        "box AP": BOXES[0],
      },
    ),
    rows="setting",
    axis="PQ",
    ordered=False,
    plotted=("PQ", "PQ of shapes", "PQ of textures"),
    compared={
      "Textures have a higher PQ than shapes": (
        ("masks", "test/pq_stuff"),
        ("masks", "test/pq_things"),
      )
    },
  ),
)

if __name__ == "__main__":
  common.main("detr")
