"""What detection's heads shall say of each cell of an encoder's map: the target around it.

Not in the paper, whose heads are asked for the outputs of the decoder alone: `cell_weight`.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax_zoo.systems.detr import losses
from vit_jax_zoo.tasks import base
from vit_jax_zoo.tasks.detection_utils import cell_centers, is_target, target_boxes


def cell_losses(
  outputs: Mapping[str, Any],
  batch: base.Batch,
  *,
  weights: tuple[float | int, float | int, float | int],
  no_object_weight: float,
) -> Float[Array, " b"]:
  """Returns for each image what the set loss is over queries, for the map's cells.

  Cells in the padding see nothing. Classes are averaged over cells by their weights, boxes over the
  cells that see something.

  Args:
    outputs: `cell_logits` [b i j k] and `cell_boxes_cxcywh` [b i j 4].
    batch: the detection task's.
    weights: of class, L1 distance and generalised IoU.
    no_object_weight: of a cell that sees nothing.

  Raises:
    ValueError: the model predicts nothing in cells.
  """
  if "cell_logits" not in outputs:
    raise ValueError(
      "the task has a cell_weight, but the model predicts nothing in cells; set its "
      "cell_predictions, or cell_weight=0"
    )
  rows, height, width, classes = outputs["cell_logits"].shape
  logits = outputs["cell_logits"].reshape(rows, -1, classes).astype(jnp.float32)
  boxes = outputs["cell_boxes_cxcywh"].reshape(rows, -1, 4)
  targets = target_boxes(batch)
  of_cell = losses.covering_target(cell_centers(batch, (height, width)), targets, is_target(batch))
  labels = jnp.asarray(batch["labels"])
  class_loss, of_class = losses.class_losses(logits, labels, of_cell, no_object_weight)
  distance, overlap = losses.box_losses(boxes, targets, of_cell)
  by_class, by_distance, by_overlap = weights
  covered = jnp.maximum(jnp.sum(of_cell >= 0, axis=1), 1)
  box_loss = jnp.sum(by_distance * distance + by_overlap * overlap, axis=1) / covered
  return by_class * jnp.sum(class_loss, axis=1) / jnp.sum(of_class, axis=1) + box_loss
