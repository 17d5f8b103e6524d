"""Where object queries look: DETR's figure 6, the decoder's attention beside the box it gave."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from vit_jax_zoo.ops.names import name_of
from vit_jax_zoo.visualize import detection as draw


def draw_query_attention(
  batch: Mapping[str, Any],
  predictions: Mapping[str, Any],
  class_names: Sequence[str] = (),
  *,
  threshold: float = 0.0,
  title: str = "Where the queries look",
  max_images: int = 3,
  max_queries: int = 4,
) -> Figure:
  """Draws images with their surest boxes, and beside them each box's query: where it looked.

  Args:
    batch: as the detection task has it.
    predictions: as `draw_predictions` has them, and `attention` [b q i j]: of each query over the
      map of the padded image.
    class_names: by class id; ids by default.
    threshold: shows queries that are at least as sure, and always the surest.
    title: of the figure.
    max_images: draws the first so many.
    max_queries: the surest so many of each image.
  """
  rows = draw.real_rows(batch)[:max_images]
  surest = [_surest(np.asarray(predictions["scores"][row]), threshold, max_queries) for row in rows]
  figure, axes = draw.grid(len(rows), 1 + max(map(len, surest), default=0), title)
  for index, (row, best) in enumerate(zip(rows, surest, strict=True)):
    image = draw.image_of(batch, row)
    scale = draw.to_shown(batch, row, image)
    scores = np.asarray(predictions["scores"][row])
    labels = np.asarray(predictions["labels"][row])[best]
    boxes = np.asarray(predictions["boxes_xyxy"][row])[best] * scale
    names = [name_of(label, class_names) for label in labels]
    draw.show(axes[index, 0], image)
    draw.draw_boxes(axes[index, 0], boxes, names, labels)
    for column, query in enumerate(best):
      ax = axes[index, 1 + column]
      padded = np.asarray(batch["image"]).shape[1:3]
      draw.show(ax, _lit(image, np.asarray(predictions["attention"][row][query]), padded))
      one = slice(column, column + 1)
      draw.draw_boxes(ax, boxes[one], names[one], labels[one])
      ax.set_title(f"query {query}: {scores[query]:.0%}", fontsize=8.5, loc="left")
  return figure


def _surest(
  scores: Float[np.ndarray, " q"], threshold: float, max_queries: int
) -> Int[np.ndarray, " s"]:
  """Returns the queries to be shown, the surest first."""
  best = np.argsort(-scores, kind="stable")[:max_queries]
  return best[(scores[best] >= threshold) | (best == best[0])]


def _lit(
  image: np.ndarray, attention: Float[np.ndarray, "i j"], padded: tuple[int, ...]
) -> np.ndarray:
  """Returns the image, dark where nobody looks."""
  light = cv2.resize(attention.astype(np.float32), padded[::-1], interpolation=cv2.INTER_LINEAR)
  light = light[: image.shape[0], : image.shape[1]]
  light = light / max(float(light.max()), 1e-9)
  return (image * (0.15 + 0.85 * light[..., None])).astype(np.uint8)
